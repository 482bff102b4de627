"""Language modeling data: documents, packed into sequences for training or cut into windows for evaluation."""

import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase, TrainerCallback

from ..models.losses import IGNORE
from .columns import find_columns, splits_of
from .tables import TABLE_FORMATS, cell_text, open_text, read_examples, read_named_dataset

READ_SIZE = 2**16  # characters read and tokenized at a time, extended to the next end of line

Documents = Iterable[Iterable[str]]  # documents come in chunks, so that files need not fit into memory


def read_documents(files: list[str], column: str | None = None) -> Iterator[Iterable[str]]:
    """Yield the documents of files: whole text files, and the rows of tables (csv, tsv, json, jsonl, parquet)."""
    for file in files:
        if Path(file).suffix.lower() in TABLE_FORMATS:
            yield from _rows(read_examples(file), column)
        else:
            yield _read_chunks(file)


def _read_chunks(file: str) -> Iterator[str]:
    with open_text(file, newline="") as text:
        while chunk := text.read(READ_SIZE):
            yield chunk + text.readline(READ_SIZE)


def hub_documents(name: str, config: str | None, split: str, column: str | None, streaming: bool) -> Documents | None:
    """Load the rows of a split of a Hub dataset, the first if several match; None if there is no validation split.

    Raises:
        ConnectionError: the dataset cannot be read.
        ValueError: it has no such split.
    """
    tables = read_named_dataset(name, config, streaming=streaming)
    if found := splits_of(split, tables):
        return _rows(tables[found[0]], column)
    if split == "validation":
        return None
    raise ValueError(
        f"The dataset `{name}` has no split `{split}`; its splits are {', '.join(tables)}. Name another one, or give "
        f"--{split}_file."
    )


def _rows(table: Dataset | IterableDataset, column: str | None) -> Documents:
    name = find_columns(table, column).text
    return ([cell_text(cell) or ""] for batch in table.iter(1000) for cell in batch[name])


def first_texts(documents: Documents, characters: int = 10_000_000) -> Iterator[str]:
    """Yield about the first `characters` characters of the documents, chunk by chunk."""
    for chunk in chain.from_iterable(documents):
        yield chunk
        characters -= len(chunk)
        if characters < 0:
            return


def hold_out_end(documents: list[str], fraction: float) -> tuple[list[str], list[str]]:
    """Split off the end of the texts: whole documents, and part of one, cut at the end of a line if possible."""
    missing = round(sum(map(len, documents)) * fraction)
    train, held_out = list(documents), list[str]()
    while train and missing > 0:
        document = train.pop()
        if len(document) > missing:
            cut = document.rfind("\n", 0, len(document) - missing) + 1 or len(document) - missing
            train.append(document[:cut])
            document = document[cut:]
        held_out.append(document)
        missing -= len(document)
    return train, held_out[::-1]


def separator(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that is put before every document."""
    for kind in ("bos", "eos", "cls", "sep", "pad"):
        token_id = getattr(tokenizer, f"{kind}_token_id")
        if token_id is not None:
            return token_id
    raise ValueError(
        "The tokenizer has no special token to put between documents. Give it one: "
        '`tokenizer.add_special_tokens({"bos_token": "<s>"})`, then save it.'
    )


def token_ids(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Yield the ids of all documents, chunk by chunk, with a separator before each document."""
    for document in documents:
        yield [separator(tokenizer)]
        for chunk in document:
            yield tokenizer(chunk, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def pack(pieces: Iterable[list[int]], length: int, option: str = "--sequence_length") -> Iterator[dict[str, Any]]:
    """Concatenate pieces of token ids and cut them into sequences of `length`; an incomplete last one is dropped.

    Raises:
        ValueError: the pieces do not fill one sequence; the message names the `option` that sets its length.
    """
    rest: list[int] = []
    empty = True
    for ids in pieces:
        rest += ids
        if full := len(rest) // length * length:
            for start in range(0, full, length):
                yield {"input_ids": rest[start : start + length]}
                empty = False
            rest = rest[full:]
    if empty:
        raise ValueError(
            f"The training texts are too short for a single sequence of {length} tokens. Lower {option} or add texts."
        )


def packed_dataset(pieces: Iterable[list[int]], length: int, option: str = "--sequence_length") -> Dataset:
    """Make a dataset in memory of the sequences of `pack`."""
    sequences = [np.asarray(row["input_ids"], dtype=np.int32) for row in pack(pieces, length, option)]
    return Dataset.from_dict({"input_ids": sequences})


def packed_stream(
    open_documents: Callable[[], Documents], tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> IterableDataset:
    """Make a stream of the sequences of `pack`, read again in every epoch and shuffled in a buffer of 256."""

    def sequences() -> Iterator[dict[str, Any]]:
        return pack(token_ids(open_documents(), tokenizer), length)

    next(sequences())  # raises at once if the texts are too short
    return IterableDataset.from_generator(sequences).shuffle(seed=seed, buffer_size=256)


def scoring_windows(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, context: int) -> Dataset:
    """Cut texts into windows of at most `length` tokens in which every token of every text is a target once.

    A window starts with the last `context` tokens before its targets; their labels are -100.
    """
    windows: dict[str, list] = {"input_ids": [], "labels": []}
    for text in texts:
        ids = [token for chunk in token_ids([[text]], tokenizer) for token in chunk]
        for window, labels in cut_windows(ids, length, context):
            windows["input_ids"].append(window)
            windows["labels"].append(labels)
    if not windows["input_ids"]:
        raise ValueError("The validation texts are empty: there is nothing to evaluate.")
    return Dataset.from_dict(windows)


def cut_windows(
    ids: list[int], length: int, context: int, labels: list[int] | None = None
) -> Iterator[tuple[list[int], list[int]]]:
    """Cut windows of at most `length` tokens, and their labels, so that every token but the first is a target once.

    A window starts with the last `context` tokens before its targets; their labels are -100. `labels`: default `ids`.
    """
    labels = ids if labels is None else labels
    done = 1  # nothing predicts the first one
    while done < len(ids):
        start = max(0, done - context)
        yield ids[start : start + length], [IGNORE] * (done - start) + labels[done : start + length]
        done = start + length


def masked_windows(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, probability: float, seed: int
) -> Dataset:
    """Cut texts into windows of at most `length` tokens and mask some tokens, the same ones in every evaluation."""
    mask = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=probability, seed=seed)
    windows: dict[str, list] = {"input_ids": [], "labels": []}
    for row in scoring_windows(texts, tokenizer, length, context=1):
        masked = mask([{"input_ids": row["input_ids"]}])
        for name, values in windows.items():
            values.append(masked[name][0].tolist())
    return Dataset.from_dict(windows)


class EpochCollator(TrainerCallback):
    """A collator whose random draws change with every epoch. It must also be a callback of the Trainer.

    Draws depend only on the row, the epoch and the seed, so that a resumed run sees the same batches as an
    uninterrupted one, although batches are made ahead of their step.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.epoch = seed, 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch = int(state.epoch or 0)


class MaskingCollator(EpochCollator):
    """Makes batches of sequences of one length with masked tokens.

    Args:
        whole: use all tokens as labels, not only the masked ones, for a decoder that reconstructs the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int, whole: bool = False) -> None:
        super().__init__(seed)
        self.mask = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=probability, seed=seed)
        self.whole = whole

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batches = []
        for example in examples:
            ids = np.asarray(example["input_ids"], dtype=np.int64)
            key = zlib.crc32(ids.tobytes(), zlib.crc32(f"{self.seed} {self.epoch}".encode()))
            self.mask.generator = torch.Generator().manual_seed(key)
            batch = self.mask([{"input_ids": ids.tolist()}])
            batches.append({**batch, "labels": torch.from_numpy(ids)[None]} if self.whole else batch)
        return {name: torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "labels")}


def causal_lm_collator(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Make a batch of full sequences. Separators are targets like other tokens, even if they are the padding token."""
    ids = torch.tensor([example["input_ids"] for example in examples], dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}
