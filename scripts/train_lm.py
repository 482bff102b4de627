"""Train a Reformer language model on texts, causal or masked, and judge it in bits per byte.

    # bytes, on one book
    python scripts/train_lm.py --train_file book.txt --validation_file end_of_book.txt --baselines

    # a vocabulary learnt from the texts; rows of 8192 tokens
    python scripts/train_lm.py --train_file a.txt b.txt --tokenizer train --sequence_length 8192

    # texts that do not fit into memory, read again and again
    python scripts/train_lm.py --train_file huge.txt --validation_file small.txt --streaming --max_steps 10000

    # a masked model, of a data set of the Hub, on several processes
    accelerate launch scripts/train_lm.py --masked \
        --dataset_name Salesforce/wikitext --dataset_config_name wikitext-2-raw-v1

    # a saved model, judged at rows longer than those it was trained on
    python scripts/train_lm.py --model_name_or_path runs/lm --validation_file other.txt --eval_length 16384

A text file is one document, a row of a table (csv, tsv, json, jsonl, parquet) another. Training packs all of them
into rows of full length. Evaluation scores every byte of the validation texts once. All options of
`transformers.TrainingArguments` work, `--resume_from_checkpoint last` included.
"""

import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from _language_modeling import (
    BitsPerByte,
    Documents,
    LanguageModelTrainer,
    causal_lm_collator,
    compressors,
    hold_out_end,
    hub_documents,
    masked_rows,
    read_documents,
    scored_rows,
    separator,
    streamed_rows,
    training_rows,
)
from _models import (
    ModelArguments,
    force_cpu_backend,
    make_model,
    make_tokenizer,
    train_and_save,
    write_model_card,
)
from datasets import Dataset, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

logger = logging.get_logger("hf_reformer.train_lm")

# Where a small Reformer that starts from nothing wants other settings than those of the arguments' classes.
DEFAULTS = {
    "tokenizer": "bytes",
    "output_dir": "runs/lm",
    "num_train_epochs": 10,
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 4,
    "logging_steps": 20,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
}
FINE_TUNING = {"tokenizer": None, "learning_rate": 3e-4, "num_train_epochs": 3}


@dataclass
class TextArguments:
    """Where the texts come from, and how they are cut."""

    train_file: list[str] | None = field(
        default=None,
        metadata={"help": "Text files, or csv, tsv, json, jsonl and parquet with a column of texts."},
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Files to judge on. Default: the end of the training texts."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub, instead of files."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Which of its configurations."})
    text_column: str | None = field(default=None, metadata={"help": "Default: found by its name."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the training texts while training; needs --max_steps."}
    )
    masked: bool = field(default=False, metadata={"help": "Train a masked model, which sees both sides."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens hidden from a masked model."})
    sequence_length: int = field(default=1024, metadata={"help": "Tokens of a row in training."})
    eval_length: int | None = field(
        default=None, metadata={"help": "Tokens of a row in evaluation. Default: --sequence_length."}
    )
    eval_context: int | None = field(
        default=None,
        metadata={"help": "Tokens that a row of evaluation repeats from the row before. Default: half of the row."},
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Part of the training texts to judge on, without a --validation_file."}
    )
    baselines: bool = field(default=False, metadata={"help": "Also judge general compressors."})


def parse_arguments(argv: Sequence[str] | None) -> tuple[TextArguments, ModelArguments, TrainingArguments]:
    """Read the command line; presets stand behind whatever is given there."""
    argv = list(sys.argv[1:] if argv is None else argv)
    force_cpu_backend()
    parser = HfArgumentParser((TextArguments, ModelArguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    if any(argument.split("=")[0] == "--model_name_or_path" for argument in argv):
        parser.set_defaults(**FINE_TUNING)
    texts, model, args = parser.parse_args_into_dataclasses(argv)
    check_arguments(texts, model, args)
    return texts, model, args


def check_arguments(texts: TextArguments, model: ModelArguments, args: TrainingArguments) -> None:
    """Raise SystemExit for options that cannot work together."""
    if texts.train_file is not None and texts.dataset_name is not None:
        raise SystemExit("Give --train_file or --dataset_name, not both.")
    has_train = texts.train_file is not None or texts.dataset_name is not None
    if not has_train and (model.model_name_or_path is None or texts.validation_file is None):
        raise SystemExit(
            "Give --train_file or --dataset_name; or --model_name_or_path and --validation_file, to judge a saved "
            "model. See --help."
        )
    files = [*(texts.train_file or []), *(texts.validation_file or [])]
    if absent := [file for file in files if not Path(file).is_file()]:
        raise SystemExit(f"There is no file {', '.join(absent)}.")
    if texts.streaming and args.max_steps <= 0:
        raise SystemExit("--streaming does not know how long the texts are: give --max_steps.")
    if texts.streaming and texts.train_file is not None and texts.validation_file is None:
        raise SystemExit("--streaming cannot keep a part of the training texts to judge on: give --validation_file.")
    if texts.sequence_length < 2:
        raise SystemExit(
            f"--sequence_length {texts.sequence_length} leaves nothing to learn: a row needs at least 2 tokens, one "
            "to predict the other."
        )
    if not 0 < texts.mlm_probability <= 1:
        raise SystemExit(f"--mlm_probability {texts.mlm_probability} must lie above 0, and not above 1.")
    if not 0 < texts.validation_fraction < 1:
        raise SystemExit(
            f"--validation_fraction {texts.validation_fraction} must lie between 0 and 1: some of the texts to train "
            "on, some to judge on."
        )
    texts.eval_length = texts.eval_length or texts.sequence_length
    texts.eval_context = texts.eval_length // 2 if texts.eval_context is None else texts.eval_context
    if not 1 <= texts.eval_context < texts.eval_length:
        raise SystemExit(
            f"--eval_context {texts.eval_context} must lie between 1 and --eval_length - 1 = {texts.eval_length - 1}."
        )


def load_texts(args: TextArguments) -> tuple[list[str], list[str]]:
    """All training texts, none of them when they are streamed, and all validation texts."""

    def read(files: list[str] | None, split: str) -> list[str]:
        if files is not None:
            return ["".join(pieces) for pieces in read_documents(files, args.text_column)]
        rows = hub_documents(args.dataset_name, args.dataset_config_name, split, args.text_column, streaming=False)
        return ["".join(pieces) for pieces in rows]

    has_train = args.train_file is not None or args.dataset_name is not None
    train = read(args.train_file, "train") if has_train and not args.streaming else []
    if args.validation_file is not None or args.dataset_name is not None:
        return train, read(args.validation_file, "validation")
    train, held_out = hold_out_end(train, args.validation_fraction)
    logger.warning(f"No validation data given: the last {sum(map(len, held_out))} characters are kept to judge on.")
    return train, held_out


def streamed_documents(args: TextArguments, files: list[str]) -> Documents:
    """The training documents, read as they are asked for: those of files, or of the Hub where there is none."""
    if args.dataset_name is not None:
        return hub_documents(args.dataset_name, args.dataset_config_name, "train", args.text_column, streaming=True)
    return read_documents(files, args.text_column)


def first_texts(documents: Documents, characters: int = 10_000_000) -> Iterator[str]:
    """The texts up to so many characters, piece by piece."""
    for piece in itertools.chain.from_iterable(documents):
        yield piece
        characters -= len(piece)
        if characters < 0:
            return


def evaluation_set(args: TextArguments, texts: list[str], tokenizer, seed: int) -> Dataset:
    if args.masked:
        return masked_rows(texts, tokenizer, args.eval_length, args.mlm_probability, seed)
    return scored_rows(texts, tokenizer, args.eval_length, args.eval_context)


def draw_learning_curve(trainer: LanguageModelTrainer, metric: str, bits: float) -> None:
    """Training loss and scores of evaluation over the steps, both in bits per byte; `bits` of one nat per token."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for key, scale, label in (("loss", bits, "training"), (f"eval_{metric}", 1.0, "validation")):
        points = [(entry["step"], entry[key] * scale) for entry in trainer.state.log_history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None, label=label)
    axes.set(xlabel="step", ylabel=metric.replace("_", " "), ylim=(None, 5))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(Path(trainer.args.output_dir) / "learning_curve.png", dpi=120)
    plt.close(figure)


def report(trainer: LanguageModelTrainer, metric: str, scores: dict[str, float], source: str) -> None:
    """Print the scores; leave them in `scores.json` and in the model card."""
    folder = Path(trainer.args.output_dir)
    lines = [f"| {'':38} | {metric.replace('_', ' ')} |", f"|:{'-' * 39}|--------------:|"]
    lines += [f"| {name:38} | {bits:13.3f} |" for name, bits in scores.items()]
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    write_model_card(trainer, "\n".join(lines), source)
    print("\n" + "\n".join(lines) + f"\n\nModel, scores and learning_curve.png lie in {folder}/")


def run(texts: TextArguments, model_args: ModelArguments, args: TrainingArguments) -> None:
    """Texts, model, training, judgement."""
    set_seed(args.seed)
    with args.main_process_first(desc="reading the texts"):
        train, held_out = load_texts(texts)
        longest = max(texts.sequence_length, texts.eval_length)
        sources = texts.train_file or [name for name in [texts.dataset_name] if name]
        documents = partial(streamed_documents, texts)
        known = first_texts(documents(sources)) if texts.streaming else train
        tokenizer = make_tokenizer(model_args, known, longest)
        if tokenizer.pad_token is None:
            tokenizer.pad_token_id = separator(tokenizer)
        hide = (
            DataCollatorForLanguageModeling(tokenizer, mlm_probability=texts.mlm_probability) if texts.masked else None
        )
        rows: Dataset | IterableDataset | None = None
        if texts.streaming:
            rows = streamed_rows(documents, sources, tokenizer, texts.sequence_length, args.seed)
        elif train:
            rows = training_rows([[text] for text in train], tokenizer, texts.sequence_length)
        judged = evaluation_set(texts, held_out, tokenizer, args.seed)
    metrics = BitsPerByte(held_out, tokenizer, texts.masked)
    auto_class: Any = AutoModelForMaskedLM if texts.masked else AutoModelForCausalLM
    model = make_model(auto_class, model_args, tokenizer, longest, is_decoder=not texts.masked)
    trainer = LanguageModelTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=judged,
        processing_class=tokenizer,
        data_collator=hide or causal_lm_collator,
        compute_metrics=metrics,
    )
    if args.process_index == 0:
        amount = f"{len(rows):,} rows of {texts.sequence_length} tokens" if isinstance(rows, Dataset) else "streamed"
        print(f"Training texts: {amount}; validation: {metrics.size:,} bytes in {metrics.tokens:,} tokens.")
        print(f"Parameters: {model.num_parameters():,}; layers: {', '.join(model.config.attn_layers)}")
    if rows is not None:
        train_and_save(trainer, args.resume_from_checkpoint)
    score = trainer.evaluate()[f"eval_{metrics.name}"]
    if trainer.is_world_process_zero():
        scores = {"Reformer": score}
        if texts.baselines and not texts.masked:
            scores |= compressors(train, held_out)
        report(trainer, metrics.name, scores, ", ".join(sources))
        draw_learning_curve(trainer, metrics.name, metrics.tokens / metrics.size / math.log(2))


def main(argv: Sequence[str] | None = None) -> None:
    run(*parse_arguments(argv))


if __name__ == "__main__":
    main()
