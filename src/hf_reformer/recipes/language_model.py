"""Train a causal or masked Reformer language model, and evaluate it in bits per byte.

    # bytes, on one book
    hf-reformer train language-model --train_file book.txt --validation_file end_of_book.txt --baselines

    # a vocabulary trained on the texts; sequences of 8192 tokens
    hf-reformer train language-model --train_file a.txt b.txt --tokenizer train --sequence_length 8192

    # texts that do not fit into memory, read again in every epoch
    hf-reformer train language-model --train_file huge.txt --validation_file small.txt --streaming --max_steps 10000

    # a masked model, on a data set of the Hub, in several processes
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
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from ..data.packing import (
    Documents,
    causal_lm_collator,
    first_texts,
    hold_out_end,
    hub_documents,
    masked_windows,
    packed_dataset,
    packed_stream,
    read_documents,
    scoring_windows,
)
from ..data.tables import TABLE_FORMATS, text_encoding
from ..training.bits_per_byte import BitsPerByte, compressor_baselines
from ..training.model_setup import ModelArguments, make_model, make_tokenizer, option, parse_arguments
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
class TextArguments:
    """Where the texts come from, and how they are cut."""

    train_file: list[str] | None = option(
        None, "Text files, or csv, tsv, json, jsonl and parquet with a column of texts."
    )
    validation_file: list[str] | None = option(None, "Files to evaluate on. Default: the end of the training texts.")
    dataset_name: str | None = option(None, "A data set on the Hub, instead of files.")
    dataset_config_name: str | None = option(None, "Its configuration.")
    text_column: str | None = option(None, "Default: found by its name.")
    streaming: bool = option(False, "Read the training texts while training; needs --max_steps.")
    masked: bool = option(False, "Train a masked model, which is bidirectional.")
    mlm_probability: float = option(0.15, "Share of tokens masked for a masked model.")
    sequence_length: int = option(1024, "Tokens of a training sequence.")
    eval_length: int | None = option(None, "Tokens of a sequence in evaluation. Default: --sequence_length.")
    eval_context: int | None = option(
        None, "Tokens that evaluation repeats from the previous sequence. Default: half of the sequence."
    )
    validation_fraction: float = option(
        0.05, "Part of the training texts to evaluate on, without a --validation_file."
    )
    baselines: bool = option(False, "Also evaluate general compressors.")


def check_arguments(texts: TextArguments, model: ModelArguments, args: TrainingArguments) -> None:
    """Fill in defaults; raise ValueError for options that cannot work, SystemExit for none."""
    if texts.train_file is not None and texts.dataset_name is not None:
        raise ValueError("Give --train_file or --dataset_name, not both.")
    has_train = texts.train_file is not None or texts.dataset_name is not None
    if not has_train and (model.model_name_or_path is None or texts.validation_file is None):
        raise SystemExit(
            "Give --train_file or --dataset_name; or --model_name_or_path and --validation_file, to evaluate a saved "
            "model. See --help."
        )
    files = [*(texts.train_file or []), *(texts.validation_file or [])]
    if missing := [file for file in files if not Path(file).is_file()]:
        raise ValueError(f"There is no file {', '.join(missing)}.")
    if texts.streaming and args.max_steps <= 0:
        raise ValueError("With --streaming the number of steps in an epoch is unknown: give --max_steps.")
    if texts.streaming and texts.train_file is not None and texts.validation_file is None:
        raise ValueError("With --streaming no part of the training texts is held out: give --validation_file.")
    if texts.sequence_length < 2:
        raise ValueError(
            f"--sequence_length {texts.sequence_length} is too short: a sequence needs at least 2 tokens, one to "
            "predict the other."
        )
    texts.eval_length = texts.eval_length or texts.sequence_length
    texts.eval_context = texts.eval_length // 2 if texts.eval_context is None else texts.eval_context
    if not 1 <= texts.eval_context < texts.eval_length:
        raise ValueError(
            f"--eval_context {texts.eval_context} must be between 1 and --eval_length - 1 = {texts.eval_length - 1}."
        )


def open_documents(args: TextArguments, split: str, streaming: bool = False) -> Documents | None:
    """The documents of a split, from its files, or from the Hub if there are none; None if there is no such split."""
    files = args.train_file if split == "train" else args.validation_file
    if files is not None:
        return read_documents(files, args.text_column)
    if args.dataset_name is None:
        return None
    documents = hub_documents(args.dataset_name, args.dataset_config_name, split, args.text_column, streaming)
    if documents is None and split == "train":
        raise ValueError(f"The data set `{args.dataset_name}` has no split `train`. Name another one.")
    return documents


def load_texts(args: TextArguments) -> tuple[list[str], list[str]]:
    """All training texts (none if they are streamed) and all validation texts."""
    validation = open_documents(args, "validation")
    held_out = None if validation is None else ["".join(document) for document in validation]
    if args.streaming:
        for file in args.train_file or []:  # before training, and not when the stream gets there
            if Path(file).suffix.lower() not in TABLE_FORMATS:
                text_encoding(file)
        if held_out is None:
            raise ValueError(
                f"The data set `{args.dataset_name}` has no split `validation`, and with --streaming no part of the "
                "training texts is held out: give --validation_file."
            )
        return [], held_out
    train = ["".join(document) for document in open_documents(args, "train") or ()]
    if held_out is not None:
        return train, held_out
    train, held_out = hold_out_end(train, args.validation_fraction)
    logger.warning(
        f"There is no validation data: the last {sum(map(len, held_out))} characters of the training texts are held "
        "out for it."
    )
    return train, held_out


def run(texts: TextArguments, model_args: ModelArguments, args: TrainingArguments) -> None:
    """Read the texts, train, evaluate and report."""
    set_seed(args.seed)
    stream = partial(open_documents, texts, "train", streaming=True)
    length, eval_length = texts.sequence_length, texts.eval_length
    max_length = max(length, eval_length)
    with args.main_process_first(desc="reading the texts"):
        train, held_out = load_texts(texts)
        tokenizer = make_tokenizer(model_args, first_texts(stream()) if texts.streaming else train, max_length)
        splits, amount = {}, "none"
        if texts.streaming:
            splits["train"], amount = packed_stream(stream, tokenizer, length, args.seed), "streamed"
        elif train:
            splits["train"] = packed_dataset([[text] for text in train], tokenizer, length)
            amount = f"{len(splits['train']):,} sequences of {length} tokens"
        if texts.masked:
            share = texts.mlm_probability
            splits["validation"] = masked_windows(held_out, tokenizer, eval_length, share, args.seed)
            collator: Any = DataCollatorForLanguageModeling(tokenizer, mlm_probability=share)
        else:
            splits["validation"] = scoring_windows(held_out, tokenizer, eval_length, texts.eval_context)
            collator = causal_lm_collator
    metric = BitsPerByte(held_out, tokenizer, texts.masked)
    auto_class: Any = AutoModelForMaskedLM if texts.masked else AutoModelForCausalLM
    trains = "train" in splits
    model = make_model(auto_class, model_args, tokenizer, max_length, trains, is_decoder=not texts.masked)
    options = {"data_collator": collator, "compute_metrics": metric}
    trainer = build_trainer(LanguageModelTrainer, model, args, tokenizer, splits, **options)
    size = f"{metric.num_bytes:,} bytes in {metric.num_tokens:,} tokens"
    train_and_save(trainer, f"Training texts: {amount}; validation: {size}.")
    scores = {"Reformer": trainer.evaluate()[f"eval_{metric.name}"]}
    if trainer.is_world_process_zero():
        if texts.baselines and not texts.masked:
            scores |= compressor_baselines(train, held_out)
        draw_learning_curve(trainer, metric.name, metric.bits_per_nat)
        table = format_table({name: {metric.name.replace("_", " "): bits} for name, bits in scores.items()})
        write_report(trainer, scores, table, ", ".join(texts.train_file or filter(None, [texts.dataset_name])))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with these arguments, by default those of the process."""
    classes = (TextArguments, ModelArguments, TrainingArguments)
    texts, model_args, args = parse_arguments("language-model", __doc__, classes, arguments, DEFAULTS, PRESETS)
    check_arguments(texts, model_args, args)
    run(texts, model_args, args)
