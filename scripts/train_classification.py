"""Train a Reformer to classify texts, pairs of texts, or to give them a number.

    # a complete run without a download, in a few minutes on two cores
    python scripts/train_classification.py --demo

    # your own files: csv, tsv, json, jsonl, parquet, or a folder with one sub-folder of texts per label
    python scripts/train_classification.py --train_file train.csv --validation_file validation.csv --baselines

    # a GLUE task from the Hub, on several GPUs
    accelerate launch scripts/train_classification.py --task_name sst2 --tokenizer bytes

    # a model that was saved by one of these runs: train it further, or only let it judge
    python scripts/train_classification.py --model_name_or_path runs/classification --train_file more.csv
    python scripts/train_classification.py --model_name_or_path runs/classification --classify letter.txt

Labels that are numbers with decimals mean regression, lists of labels several labels per text. All options of
`transformers.TrainingArguments` work, `--resume_from_checkpoint last` included.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from _classification import MULTI, REGRESSION, SINGLE, GroupedTrainer, Metrics, Task, define_task
from _models import ModelArguments, force_cpu_backend, make_model, make_tokenizer, train_and_save
from _reports import check_saved, classify, draw_confusion_matrix, summarise, write_predictions
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_reformer.data.demo_corpus import corpus_file, installed_packages_corpus
from hf_reformer.data.tables import find_columns, hold_out, read_examples

logger = logging.get_logger("hf_reformer.train_classification")

# Where a small Reformer that starts from nothing wants other settings than `TrainingArguments` has.
DEFAULTS = {
    "output_dir": "runs/classification",
    "num_train_epochs": 5,
    "learning_rate": 1e-3,
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "logging_steps": 10,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "train_sampling_strategy": "group_by_length",
}
FINE_TUNING = {"learning_rate": 2e-4, "num_train_epochs": 3}
DEMO = {  # trained on pieces of the documents, judged on whole ones
    "output_dir": "runs/demo",
    "baselines": True,
    "max_length": 6144,
    "train_length": 512,
    "attn_layers": ["lsh"],
    "attention_head_size": 32,
    "feed_forward_size": 128,
    "num_hashes": 1,
    "config_overrides": "lsh_window=64,local_window=32,initializer_range=0.05",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "logging_steps": 50,
    "eval_strategy": "no",
}


@dataclass
class DataArguments:
    """Where the texts come from."""

    demo: bool = field(
        default=False,
        metadata={"help": "Complete run without a download: which installed package does a source file come from?"},
    )
    task_name: str | None = field(
        default=None, metadata={"help": "A GLUE task, read from the Hub: sst2, mnli, stsb …"}
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "csv, tsv, json, jsonl or parquet file, or a folder with one sub-folder of texts per label."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Default: a part of the training data."})
    test_file: str | None = field(default=None, metadata={"help": "Predicted at the end; needs no labels."})
    text_column: str | None = field(default=None, metadata={"help": "Default: found by its name."})
    text_pair_column: str | None = field(default=None, metadata={"help": "Second text, for pairs."})
    label_column: str | None = field(default=None, metadata={"help": "Default: found by its name."})
    problem_type: str | None = field(
        default=None,
        metadata={"help": "Default: told from the labels.", "choices": [SINGLE, MULTI, REGRESSION]},
    )
    max_length: int = field(default=4096, metadata={"help": "Longer texts are cut after so many tokens."})
    train_length: int | None = field(
        default=None,
        metadata={"help": "Cut the training texts into pieces of so many tokens, and still judge on whole ones."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many training texts only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use so many validation texts only."})
    validation_fraction: float = field(
        default=0.1, metadata={"help": "Part of the training data to judge on, without a --validation_file."}
    )
    baselines: bool = field(
        default=False, metadata={"help": "Also judge the most frequent label and TF-IDF with a linear model."}
    )
    classify: str | None = field(default=None, metadata={"help": "A text file to classify at the end."})
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after so many evaluations without progress and keep the best model."}
    )


def parse_arguments(argv: Sequence[str] | None) -> tuple[DataArguments, ModelArguments, TrainingArguments]:
    """Read the command line; presets stand behind whatever is given there."""
    argv = list(sys.argv[1:] if argv is None else argv)
    force_cpu_backend()
    parser = HfArgumentParser((DataArguments, ModelArguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    given = {argument.split("=")[0] for argument in argv}
    if "--model_name_or_path" in given:
        parser.set_defaults(**FINE_TUNING)
    if "--demo" in given:
        parser.set_defaults(**DEMO)
    if "--early_stopping_patience" in given:
        parser.set_defaults(load_best_model_at_end=True)
    return parser.parse_args_into_dataclasses(argv)


def load_splits(args: DataArguments) -> DatasetDict:
    """All data of the run: `train`, one or more splits that start with `validation`, and perhaps `test`."""
    if args.demo:
        return installed_packages_corpus()
    if args.task_name is not None:
        try:
            splits = load_dataset("nyu-mll/glue", args.task_name)
        except (OSError, ConnectionError) as error:
            raise ConnectionError(
                f"The GLUE task `{args.task_name}` could not be read from the Hub. "
                "Without a connection, use --train_file and --validation_file, or --demo."
            ) from error
        return DatasetDict({name: part for name, part in splits.items() if not name.startswith("test")})
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    return DatasetDict({split: read_examples(file) for split, file in files.items() if file is not None})


def prepare_data(args: DataArguments, known_labels: list[str] | None, seed: int) -> tuple[DatasetDict, Task]:
    """Read the data, tell what is asked for, number the labels, and see to it that there is something to judge on."""
    splits = load_splits(args)
    first = next(iter(splits))
    columns = find_columns(splits[first], args.text_column, args.text_pair_column, args.label_column)
    task = define_task(splits[first], columns, first, args.problem_type, known_labels, args.task_name)
    for split in splits:
        names = splits[split].column_names
        wanted = [c for c in (columns.text, columns.pair, columns.label if split != "test" else None) if c]
        if absent := [column for column in wanted if column not in names]:
            raise ValueError(f"The {split} data has no column {absent}; its columns are {names}.")
        splits[split] = task.encode(splits[split], split)
    if "train" in splits and not any(split.startswith("validation") for split in splits):
        held_out = hold_out(splits.pop("train"), "labels", args.validation_fraction, seed)
        splits = DatasetDict({**held_out, **splits})
        logger.warning(
            f"No validation data given: {len(splits['validation'])} of the training texts are kept to judge on."
        )
    for split, part in splits.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        if limit is not None and limit < len(part):
            splits[split] = part.shuffle(seed=seed).select(range(limit))
    return splits, task


def tokenize(dataset: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, piece: int | None = None) -> Dataset:
    """Columns `input_ids`, `attention_mask`, `length` and, where known, `labels`; with `piece`, a row per piece."""

    def encode(rows: dict[str, list]) -> dict[str, list]:
        texts = [text or "" for text in rows[task.columns.text]]
        pairs = [pair or "" for pair in rows[task.columns.pair]] if task.columns.pair else None
        encoded = tokenizer(texts, pairs, truncation=True, max_length=piece, return_overflowing_tokens=bool(piece))
        source = encoded.pop("overflow_to_sample_mapping", range(len(texts)))
        if "labels" in rows:
            encoded["labels"] = [rows["labels"][row] for row in source]
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    return dataset.map(encode, batched=True, batch_size=64, remove_columns=dataset.column_names, desc="Tokenising")


def judge(
    trainer: GroupedTrainer, metrics: Metrics, splits: DatasetDict, encoded: dict[str, Dataset]
) -> dict[str, dict]:
    """Predict all splits but the training data; write predictions and confusion matrices. Returns scores by split."""
    task, scores = metrics.task, {}
    for split, data in encoded.items():
        if split == "train":
            continue
        output = trainer.predict(data, metric_key_prefix=split)
        trainer.save_metrics(split, output.metrics)
        if not trainer.is_world_process_zero():
            continue
        logits = np.empty_like(output.predictions)
        logits[data["row"]] = output.predictions  # the longest texts came first
        folder = Path(trainer.args.output_dir)
        write_predictions(folder / f"predictions_{split}.csv", task, splits[split], logits)
        if "labels" in splits[split].column_names:
            labels, (predictions, _) = np.asarray(splits[split]["labels"]), task.decide(logits)
            scores[split] = metrics.score(predictions, labels)
            if task.problem_type == SINGLE:
                picture = folder / f"confusion_matrix_{split}.png"
                draw_confusion_matrix(picture, task, labels, predictions, f"{split}: {len(labels)} texts")
    return scores


def run(data_args: DataArguments, model_args: ModelArguments, args: TrainingArguments) -> None:
    """Data, model, training, judgement, summary."""
    set_seed(args.seed)
    known = None
    if model_args.model_name_or_path is not None:
        known = list(AutoConfig.from_pretrained(model_args.model_name_or_path).id2label.values())
    with args.main_process_first(desc="preparing the data"):
        splits, task = prepare_data(data_args, known, args.seed)
        texts = task.texts(splits["train"]) if "train" in splits else []
        tokenizer = make_tokenizer(model_args, texts, data_args.max_length)
        pieces = {"train": data_args.train_length}
        encoded = {split: tokenize(part, task, tokenizer, pieces.get(split)) for split, part in splits.items()}
    for split in encoded:
        if split != "train":
            longest_first = np.argsort(-np.asarray(encoded[split]["length"]), kind="stable")
            encoded[split] = encoded[split].select(longest_first).add_column("row", longest_first)
    metrics = Metrics(task)
    names = task.names or ["score"]
    model = make_model(
        AutoModelForSequenceClassification,
        model_args,
        tokenizer,
        data_args.max_length,
        problem_type=task.problem_type,
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
    )
    validation = {split: part for split, part in encoded.items() if split.startswith("validation")}
    patience = data_args.early_stopping_patience
    trainer = GroupedTrainer(
        model=model,
        args=args,
        train_dataset=encoded.get("train"),
        eval_dataset=validation if len(validation) > 1 else next(iter(validation.values()), None),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=metrics,
        callbacks=[EarlyStoppingCallback(patience)] if patience else None,
    )
    if args.process_index == 0:
        counts = ", ".join(f"{split} {len(part)}" for split, part in splits.items())
        lengths = encoded[next(iter(encoded))]["length"]
        print(f"Texts: {counts}; {np.mean(lengths):.0f} tokens on average. Labels: {task.names or task.problem_type}")
        print(f"Parameters: {model.num_parameters():,}; layers: {', '.join(model_args.attn_layers)}")
    if "train" in encoded:
        train_and_save(trainer, args.resume_from_checkpoint)
    scores = judge(trainer, metrics, splits, encoded)
    if trainer.is_world_process_zero():
        dataset = "installed packages" if data_args.demo else data_args.task_name or str(data_args.train_file)
        summarise(trainer, metrics, splits, scores, dataset, data_args.baselines)
        if data_args.demo:
            check_saved(model, args.output_dir, splits["validation"]["text"][:4])
            data_args.classify = data_args.classify or str(corpus_file(splits["validation"]["path"][0]))


def main(argv: Sequence[str] | None = None) -> None:
    data_args, model_args, args = parse_arguments(argv)
    files = (data_args.train_file, data_args.validation_file, data_args.test_file)
    has_data = data_args.demo or data_args.task_name is not None or any(files)
    if not has_data and (data_args.classify is None or model_args.model_name_or_path is None):
        raise SystemExit(
            "Give --demo, --train_file, --task_name, or --model_name_or_path with --classify. See --help."
        )
    if has_data:
        run(data_args, model_args, args)
    if data_args.classify is not None and args.process_index == 0:
        folder = args.output_dir if has_data else model_args.model_name_or_path
        classify(Path(data_args.classify), folder, clean=data_args.demo)


if __name__ == "__main__":
    main()
