"""Train a causal or masked Reformer language model, and evaluate it in bits per byte.

    # bytes, on one book
    hf-reformer train language-model --train_file book.txt --validation_file end_of_book.txt --baselines

    # a vocabulary trained on the texts; sequences of 8192 tokens
    hf-reformer train language-model --train_file a.txt b.txt --tokenizer train --sequence_length 8192

    # texts that do not fit in memory, read again in every epoch
    hf-reformer train language-model --train_file huge.txt --validation_file small.txt --streaming --max_steps 10000

    # a masked model, on a dataset from the Hub, in several processes
    accelerate launch -m hf_reformer train language-model --masked \\
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1

    # a saved model, evaluated on longer sequences than those it was trained on
    hf-reformer train language-model --model_name_or_path runs/lm --validation_file other.txt --eval_length 16384

A text file is one document, and so is a row of a table (csv, tsv, json, jsonl, parquet). For training, all documents
are packed into sequences of full length. Evaluation scores every byte of the validation texts once. All options of
`transformers.TrainingArguments` work, `--resume_from_checkpoint last` included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from ..data.packing import (
    Documents,
    MaskingCollator,
    causal_lm_collator,
    first_texts,
    hold_out_end,
    hub_documents,
    masked_windows,
    packed_dataset,
    packed_stream,
    read_documents,
    scoring_windows,
    token_ids,
)
from ..data.tables import TABLE_FORMATS, text_encoding
from ..training.bits_per_byte import BitsPerByte, compressor_baselines
from ..training.data_setup import SplitArguments
from ..training.model_setup import ModelArguments, for_pairs, make_model, make_tokenizer, option, run_recipe
from ..training.reports import draw_learning_curve, format_table, write_report
from ..training.trainers import LanguageModelTrainer, build_trainer, train_and_save

logger = logging.get_logger(__name__)

DEFAULTS = {
    "tokenizer": "bytes", "output_dir": "runs/lm",
    "num_train_epochs": 10, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_steps": 0.05,
    "weight_decay": 0.1, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 4,
    "logging_steps": 20, "save_total_limit": 1,
}  # fmt: skip
PRESETS = {"--model_name_or_path": {"tokenizer": None, "learning_rate": 3e-4, "num_train_epochs": 3}}


@dataclass
class TextArguments(SplitArguments):
    """Where the texts come from, and how they are cut."""

    train_file: list[str] | None = option(  # type: ignore[assignment]
        None, "Text files, or csv, tsv, json, jsonl and parquet with a column of texts."
    )
    validation_file: list[str] | None = option(  # type: ignore[assignment]
        None, "Files to evaluate on. Default: those of the dataset, else the end of the training texts."
    )
    test_file: list[str] | None = option(None, "More files to score, at the end.")  # type: ignore[assignment]
    max_train_samples: int | None = option(None, "Use at most this many training documents, the first ones.")
    max_eval_samples: int | None = option(None, "Evaluate on at most this many documents, the first ones.")
    max_predict_samples: int | None = option(None, "Score at most this many test documents, the first ones.")
    text_column: str | None = option(None, "The texts. Default: found by name.")
    streaming: bool = option(False, "Stream the training texts instead of loading them; needs --max_steps.")
    masked: bool = option(False, "Train a masked (bidirectional) model.")
    mlm_probability: float = option(0.15, "Share of tokens to mask, with --masked.")
    sequence_length: int = option(1024, "Tokens per training sequence.", aliases=["--block_size"])
    eval_length: int | None = option(None, "Tokens per sequence in evaluation. Default: --sequence_length.")
    eval_context: int | None = option(
        None, "Tokens that evaluation repeats from the previous sequence. Default: half of the sequence."
    )
    validation_fraction: float = option(
        0.05, "Fraction of the training texts held out for evaluation, without a --validation_file."
    )
    baselines: bool = option(False, "Also score general-purpose compressors.")

    def check(self, model: ModelArguments, args: TrainingArguments) -> None:
        super().check(model, args)
        files = [*(self.train_file or []), *(self.validation_file or []), *(self.test_file or [])]
        if missing := [file for file in files if not Path(file).is_file()]:
            raise ValueError(f"There is no file {', '.join(missing)}.")
        if self.streaming and args.max_steps <= 0:
            raise ValueError("With --streaming the number of steps in an epoch is unknown: give --max_steps.")
        if self.streaming and args.do_eval and self.train_file is not None and self.validation_file is None:
            raise ValueError("With --streaming no part of the training texts is held out: give --validation_file.")
        if self.sequence_length < 2:
            raise ValueError(
                f"--sequence_length {self.sequence_length} is too short: a sequence needs at least 2 tokens, one to "
                "predict the other."
            )
        self.eval_length = self.eval_length or self.sequence_length
        self.eval_context = self.eval_length // 2 if self.eval_context is None else self.eval_context
        if not 1 <= self.eval_context < self.eval_length:
            raise ValueError(
                f"--eval_context {self.eval_context} must be between 1 and --eval_length - 1 = {self.eval_length - 1}."
            )


def open_documents(args: TextArguments, split: str, streaming: bool = False) -> Documents | None:
    """Open the documents of a split, from its files or else from the dataset; None if there is no such split."""
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples, "test": args.max_predict_samples}
    files = getattr(args, f"{split}_file")
    if files is not None:
        return islice(read_documents(files, args.text_column), limits[split])
    if args.dataset_name is None:
        return None
    documents = hub_documents(args.dataset_name, args.dataset_config_name, split, args.text_column, streaming)
    return None if documents is None else islice(documents, limits[split])


def load_texts(args: TextArguments) -> dict[str, list[str]]:
    """Read all texts of every split, except the training texts if they are streamed."""
    texts = {}
    if args.streaming:
        for file in args.train_file or []:  # fail before training, not when the stream gets there
            if Path(file).suffix.lower() not in TABLE_FORMATS:
                text_encoding(file)
    for split in args.parts:
        documents = None if split == "train" and args.streaming else open_documents(args, split)
        if documents is not None:
            texts[split] = ["".join(document) for document in documents]
    if "validation" not in args.parts or "validation" in texts:
        return texts
    if "train" not in texts:
        way = "with --streaming no part of the training texts is held out" if args.streaming else "nothing is trained"
        raise ValueError(
            f"The dataset `{args.dataset_name}` has no split `validation`, and {way}: give --validation_file."
        )
    texts["train"], texts["validation"] = hold_out_end(texts["train"], args.validation_fraction)
    logger.warning(
        f"There is no validation data: the last {sum(map(len, texts['validation']))} characters of the training texts "
        "are held out for it."
    )
    return texts


def run(data: TextArguments, model_args: ModelArguments, args: TrainingArguments) -> None:
    """Read the texts, train, evaluate and report."""
    set_seed(args.seed)
    stream = partial(open_documents, data, "train", streaming=True)
    length, eval_length = data.sequence_length, data.eval_length
    max_length = max(length, eval_length)
    with args.main_process_first(desc="reading the texts"):
        texts = load_texts(data)
        train = texts.pop("train", [])
        learned_from = first_texts(stream()) if data.streaming else train
        tokenizer = make_tokenizer(model_args, learned_from, max_length, pairs=data.masked, causal=not data.masked)
        if data.masked:  # an encoder, perhaps for pairs of texts
            model_args = for_pairs(model_args, tokenizer, comparing=False)
        splits, amount = {}, "none"
        if data.streaming:
            splits["train"], amount = packed_stream(stream, tokenizer, length, args.seed), "streamed"
        elif train:
            splits["train"] = packed_dataset(token_ids([[text] for text in train], tokenizer), length)
            amount = f"{len(splits['train']):,} sequences of {length} tokens"
        for split, held_out in texts.items():
            if data.masked:
                share = data.mlm_probability
                splits[split] = masked_windows(held_out, tokenizer, eval_length, share, args.seed)
            else:
                splits[split] = scoring_windows(held_out, tokenizer, eval_length, data.eval_context)
    options: dict[str, Any] = {"data_collator": causal_lm_collator}
    if data.masked:
        collator = MaskingCollator(tokenizer, data.mlm_probability, args.seed)
        options = {"data_collator": collator, "callbacks": [collator]}
    metrics = {split: BitsPerByte(held_out, tokenizer, data.masked) for split, held_out in texts.items()}
    auto_class: Any = AutoModelForMaskedLM if data.masked else AutoModelForCausalLM
    trains = "train" in splits
    model = make_model(auto_class, model_args, tokenizer, max_length, trains, is_decoder=not data.masked)
    trainer = build_trainer(LanguageModelTrainer, model, args, tokenizer, splits, **options)
    trainer.metrics = metrics
    sizes = [f"; {split}: {one.num_bytes:,} bytes in {one.num_tokens:,} tokens" for split, one in metrics.items()]
    train_and_save(trainer, f"Training texts: {amount}{''.join(sizes)}.")
    scores: dict[str, float] = {}
    table: dict[str, dict[str, float]] = {}
    for split, metric in metrics.items():
        prefix = "eval" if split == "validation" else split
        found = {"Reformer": trainer.evaluate(splits[split], metric_key_prefix=prefix)[f"{prefix}_{metric.name}"]}
        if data.baselines and not data.masked and trainer.is_world_process_zero():
            found |= compressor_baselines(train, texts[split])
        named = {name if split == "validation" else f"{name}, {split}": bits for name, bits in found.items()}
        scores |= named
        table |= {name: {metric.name.replace("_", " "): bits} for name, bits in named.items()}
    if trainer.is_world_process_zero() and "validation" in metrics:
        draw_learning_curve(trainer, metrics["validation"].name, metrics["validation"].bits_per_nat)
    write_report(trainer, scores, format_table(table), data.describe() if trains else None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with the given arguments, by default those of the process."""
    classes = (TextArguments, ModelArguments, TrainingArguments)
    run_recipe("language-model", __doc__, classes, run, arguments, DEFAULTS, PRESETS)
