"""What `train_lm.py` knows about texts: documents of files, rows of full length, and what it costs to predict them."""

import bz2
import lzma
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset, load_dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
)

from hf_reformer.data.tables import TABLE_FORMATS, find_columns, read_examples
from hf_reformer.models.losses import IGNORE

PIECE = 2**16  # characters that are read and tokenised at a time, up to the next end of line

Documents = Iterable[Iterable[str]]  # a document is given in pieces, so that a file need not fit into memory


def read_documents(files: list[str], column: str | None = None) -> Iterator[Iterable[str]]:
    """The documents of files: a text file is one, and so is every row of a table (csv, tsv, json, jsonl, parquet)."""
    for file in files:
        if Path(file).suffix.lower() not in TABLE_FORMATS:
            yield _pieces(file)
            continue
        table = read_examples(file)
        name = find_columns(table, column).text
        for text in table[name]:
            yield [text or ""]


def _pieces(file: str) -> Iterator[str]:
    with open(file, encoding="utf-8", errors="replace", newline="") as text:
        while piece := text.read(PIECE):
            yield piece + text.readline(PIECE)


def hub_documents(name: str, config: str | None, split: str, column: str | None, streaming: bool) -> Documents:
    """The rows of a data set on the Hub.

    Raises:
        ConnectionError: it could not be read.
    """
    try:
        table = load_dataset(name, config, split=split, streaming=streaming)
    except (OSError, ConnectionError) as error:
        raise ConnectionError(
            f"The data set `{name}` could not be read from the Hub. Without a connection, use --train_file."
        ) from error
    column = find_columns(table, column).text
    return ([row[column] or ""] for row in table)


def hold_out_end(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """The texts without their last part, and that part: documents from the end, one of them cut at a line's end."""
    missing = round(sum(map(len, documents)) * fraction)
    kept, held = list(documents), list[str]()
    while kept and missing > 0:
        document = kept.pop()
        if len(document) > missing:
            cut = document.rfind("\n", 0, len(document) - missing) + 1 or len(document) - missing
            kept.append(document[:cut])
            document = document[cut:]
        held.insert(0, document)
        missing -= len(document)
    return kept, held


def separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before every document."""
    for kind in ("bos", "eos", "cls", "sep", "pad"):
        found = getattr(tokenizer, f"{kind}_token_id")
        if found is not None:
            return found
    raise ValueError(
        "The tokenizer has no special token to put between documents. Give it one: "
        '`tokenizer.add_special_tokens({"bos_token": "<s>"})`, then save it.'
    )


def token_ids(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The ids of all documents piece by piece, a separator before each document."""
    for pieces in documents:
        yield [separator(tokenizer)]
        for piece in pieces:
            yield tokenizer(piece, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def packed_rows(documents: Documents, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[dict[str, Any]]:
    """All texts one after the other in rows of `length` tokens; a rest that fills no row is left out."""
    rest: list[int] = []
    for ids in token_ids(documents, tokenizer):
        rest += ids
        full = len(rest) // length * length
        for first in range(0, full, length):
            yield {"input_ids": rest[first : first + length]}
        rest = rest[full:]


def training_rows(documents: Documents, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """`packed_rows` in memory.

    Raises:
        ValueError: the texts do not fill a row.
    """
    rows = [np.asarray(row["input_ids"], dtype=np.int32) for row in packed_rows(documents, tokenizer, length)]
    if not rows:
        raise _no_row(length)
    return Dataset.from_dict({"input_ids": rows})


def _no_row(length: int) -> ValueError:
    return ValueError(
        f"The training texts do not fill a single row of {length} tokens. Lower --sequence_length, or give more."
    )


def streamed_rows(
    open_documents: Callable[[list[str]], Documents],
    sources: list[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    seed: int,
) -> IterableDataset:
    """`packed_rows` of `open_documents(sources)`, read anew in every epoch and shuffled among 256 neighbours.

    Raises:
        ValueError: the texts do not fill a row.
    """

    def rows(sources: tuple[str, ...]) -> Iterator[dict[str, Any]]:
        return packed_rows(open_documents(list(sources)), tokenizer, length)

    if next(rows(tuple(sources)), None) is None:
        raise _no_row(length)
    return IterableDataset.from_generator(rows, gen_kwargs={"sources": tuple(sources)}).shuffle(
        seed=seed, buffer_size=256
    )


def scored_rows(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, context: int) -> Dataset:
    """Rows of at most `length` tokens in which every token of every text is scored once.

    A row repeats the last `context` tokens before what it scores: their labels are -100.
    """
    rows: dict[str, list] = {"input_ids": [], "labels": []}
    for text in texts:
        ids = [token for piece in token_ids([[text]], tokenizer) for token in piece]
        scored = 1  # nothing tells the separator
        while scored < len(ids):
            first = max(0, scored - context)
            row = ids[first : first + length]
            rows["input_ids"].append(row)
            rows["labels"].append([IGNORE] * (scored - first) + row[scored - first :])
            scored = first + len(row)
    if not rows["input_ids"]:
        raise ValueError("The validation texts are empty: there is nothing to judge.")
    return Dataset.from_dict(rows)


def masked_rows(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, probability: float, seed: int
) -> Dataset:
    """Rows of at most `length` tokens of which some are hidden, the same in every evaluation."""
    hide = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=probability, seed=seed)
    rows: dict[str, list] = {"input_ids": [], "labels": []}
    for row in scored_rows(texts, tokenizer, length, context=1):
        hidden = hide([{"input_ids": row["input_ids"]}])
        rows["input_ids"].append(hidden["input_ids"][0].tolist())
        rows["labels"].append(hidden["labels"][0].tolist())
    return Dataset.from_dict(rows)


def causal_lm_collator(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of full rows. Separators are targets like all else, whether or not the tokenizer pads with them."""
    ids = torch.tensor([row["input_ids"] for row in rows], dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


class LanguageModelTrainer(Trainer):
    """A Trainer that scores every row of evaluation by itself, and gives `compute_metrics` its nats and targets."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        tokenizer: Any = self.processing_class
        self.evaluation_collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        training_collator, self.data_collator = self.data_collator, self.evaluation_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Mean nats of the batch, and (B) nats and (B) numbers of targets of its rows."""
        inputs = self._prepare_inputs(inputs)
        unwrapped: Any = self.model
        options = {"logits_to_keep": 1} if unwrapped.can_generate() else {}  # then the loss never holds all logits
        nats = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for row in range(len(inputs["labels"])):
                one = {name: value[row : row + 1] for name, value in inputs.items()}
                nats.append(model(**one, num_items_in_batch=1, **options).loss.float())
        counts = (inputs["labels"] != IGNORE).sum(-1)
        total = torch.stack(nats)
        return total.sum() / counts.sum().clamp(min=1), total, counts


class BitsPerByte:
    """`compute_metrics` for LanguageModelTrainer.

    For a masked model, bits of the hidden tokens per byte they stand for, taken at the texts' mean bytes per token.
    """

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerBase, masked: bool):
        self.size = sum(len(text.encode()) for text in texts)
        self.tokens = sum(len(ids) for ids in token_ids([[text] for text in texts], tokenizer)) - len(texts)
        self.name = "bits_per_masked_byte" if masked else "bits_per_byte"

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        nats, targets = np.asarray(prediction.predictions, dtype=np.float64), np.asarray(prediction.label_ids)
        return {self.name: nats.sum() / max(1, targets.sum()) / math.log(2) * self.tokens / self.size}


def compressors(train: list[str], texts: list[str]) -> dict[str, float]:
    """Bits per byte of the texts by general compressors: what they add to the compressed training texts."""
    known, new = "".join(train).encode(), "".join(texts).encode()
    found = {}
    for name, compress in (("xz", lambda x: lzma.compress(x, preset=9 | lzma.PRESET_EXTREME)), ("bz2", bz2.compress)):
        found[f"{name}, given the training texts" if train else name] = (
            8 * (len(compress(known + new)) - len(compress(known))) / len(new)
        )
    return found
