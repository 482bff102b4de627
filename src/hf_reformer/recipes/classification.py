"""Train a Reformer to classify texts or pairs of texts, or to predict a number for them.

    # a complete run without a download, in a few minutes on two cores
    hf-reformer train classification --demo

    # your own files: csv, tsv, json, jsonl, parquet, or a folder with one sub-folder of texts per label
    hf-reformer train classification --train_file train.csv --validation_file validation.csv --baselines

    # a GLUE task from the Hub, on several GPUs
    accelerate launch -m hf_reformer train classification --task_name sst2 --tokenizer bytes

    # a model saved by one of these runs: train it further, or only predict
    hf-reformer train classification --model_name_or_path runs/classification --train_file more.csv
    hf-reformer train classification --model_name_or_path runs/classification --predict_file letter.txt

Decimal numbers as labels mean regression; lists of labels mean several labels per text. All options of
`transformers.TrainingArguments` work, `--resume_from_checkpoint last` included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from ..data.columns import check_columns, check_distinct, find_columns
from ..data.demo_corpus import clean_source, corpus_file, installed_packages_corpus
from ..data.packing import token_ids
from ..data.tables import read_column, read_named_dataset, read_text
from ..training.classification import (
    MATRIX_LABELS,
    MULTI,
    REGRESSION,
    SINGLE,
    Metrics,
    Task,
    baselines,
    define_task,
    draw_confusion_matrix,
    label_fields,
    shortened,
    task_of_model,
    write_predictions,
)
from ..training.data_setup import SplitsAndFileArguments
from ..training.model_setup import (
    SAVED_MODEL,
    ModelArguments,
    for_pairs,
    load_trained,
    make_model,
    make_tokenizer,
    option,
    run_recipe,
)
from ..training.neighbors import initialize_embeddings
from ..training.pretraining import MaskedPretrainingArguments, pretrain
from ..training.reports import format_tables, write_report
from ..training.trainers import GroupedTrainer, build_trainer, longest_first, predict_splits, train_and_save

DEFAULTS = {  # one layer, few epochs: from scratch, on hundreds or thousands of texts, more of either only memorizes
    "output_dir": "runs/classification", "train_sampling_strategy": "group_by_length",
    "attn_layers": ["lsh"], "num_train_epochs": 3, "per_device_train_batch_size": 4,
}  # fmt: skip
DEMO = {  # trained on chunks of the documents, evaluated on whole ones
    "output_dir": "runs/demo", "baselines": True, "max_length": 6144, "train_length": 512,
    "attn_layers": ["lsh"], "attention_head_size": 32, "feed_forward_size": 128, "num_hashes": 1,
    "config_overrides": "lsh_window=64,local_window=32",
    "num_train_epochs": 1, "per_device_train_batch_size": 4, "logging_steps": 50, "eval_strategy": "no",
}  # fmt: skip
NEIGHBOR_WINDOW = 10  # `--neighbor_init` counts tokens at most so far apart as neighbors
PRESETS: dict[str, dict[str, Any]] = {
    **SAVED_MODEL,
    "--demo": DEMO,
    "--early_stopping_patience": {"load_best_model_at_end": True},
}


@dataclass
class DataArguments(MaskedPretrainingArguments, SplitsAndFileArguments):
    """Where the texts come from."""

    sources = ("demo", "task_name")

    demo: bool = option(False, "Complete run without a download: which installed package a source file comes from.")
    task_name: str | None = option(None, "A GLUE task from the Hub: sst2, mnli, stsb, …")
    train_file: str | None = option(
        None, "csv, tsv, json, jsonl or parquet file, or a folder with one sub-folder of texts per label."
    )
    text_column: str | None = option(None, "The texts. Default: found by name.")
    text_pair_column: str | None = option(None, "The second texts, for pairs.")
    label_column: str | None = option(None, "Default: found by name.")
    problem_type: str | None = option(None, "Default: derived from the labels.", choices=[SINGLE, MULTI, REGRESSION])
    max_length: int = option(4096, "Longer texts are truncated to this many tokens.", aliases=["--max_seq_length"])
    train_length: int | None = option(
        None, "Split training texts into chunks of this many tokens; evaluation still uses whole texts."
    )
    neighbor_init: bool = option(
        False, "Initialize a new model with similar embeddings for tokens that share neighbors."
    )
    baselines: bool = option(False, "Also evaluate the most frequent label and TF-IDF with a linear model.")
    predict_file: str | None = option(None, "A text file to classify at the end.", aliases=["--classify"])
    early_stopping_patience: int | None = option(
        None, "Stop after this many evaluations without improvement, and keep the best model."
    )

    def check(self, model: ModelArguments, args: TrainingArguments) -> None:
        columns = {"text": self.text_column, "text_pair": self.text_pair_column, "label": self.label_column}
        check_distinct({f"--{name}_column": column for name, column in columns.items()})
        if self.neighbor_init and (model.model_name_or_path or self.pretrain_steps):
            raise ValueError(
                "--neighbor_init initializes a new model, but --model_name_or_path and --pretrain_steps start from "
                "another. Leave one out."
            )
        super().check(model, args)

    def read_source(self) -> Mapping[str, Dataset]:
        if self.demo:
            return installed_packages_corpus()
        if self.task_name is not None:
            return read_named_dataset("nyu-mll/glue", self.task_name, "--train_file and --validation_file, or --demo")
        return super().read_source()

    def describe(self) -> str:
        return "installed packages" if self.demo else super().describe()


NO_LABELS = "To predict texts without labels, give them as --test_file."


def prepare_data(
    args: DataArguments, model_labels: list[str] | None, seed: int, model_problem_type: str | None = None
) -> tuple[DatasetDict, Task]:
    """Read the data, define the task, number the labels, and hold out validation data if there is none."""
    splits = args.read()
    first = next(iter(splits))
    with args.naming_source(first):
        label = args.label_column
        label = None if first.startswith("test") and label not in splits[first].column_names else label
        columns = find_columns(splits[first], args.text_column, args.text_pair_column, label)
        task = define_task(splits[first], columns, first, args.problem_type, model_labels, model_problem_type)
    for split, part in splits.items():
        with args.naming_source(split):
            check_columns(part, split, columns[:2] if split.startswith("test") else columns, NO_LABELS)
            splits[split] = task.add_labels(part, split)
    groups = list(zip(*task.texts(splits["train"]), strict=True)) if "train" in splits else None
    return args.complete(splits, seed, "labels", groups), task


def tokenize(dataset: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, chunk: int | None = None) -> Dataset:
    """Make columns of inputs, `length` and, if known, `labels`.

    `chunk`: cut each text into chunks of so many tokens, each of which becomes an example.
    """

    def encode(batch: dict[str, list]) -> dict[str, list]:
        texts = task.texts(batch)
        encoded = tokenizer(*texts, truncation=True, max_length=chunk, return_overflowing_tokens=bool(chunk))
        source = encoded.pop("overflow_to_sample_mapping", range(len(texts[0])))
        if "labels" in batch:
            encoded["labels"] = [batch["labels"][row] for row in source]
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    return dataset.map(encode, batched=True, batch_size=64, remove_columns=dataset.column_names, desc="Tokenizing")


def evaluate_splits(
    trainer: Trainer, metrics: Metrics, splits: DatasetDict, encoded: dict[str, Dataset], args: DataArguments
) -> None:
    """Write predictions, confusion matrices and scores of all splits except the training data, with baselines."""
    task, folder, trained = metrics.task, Path(trainer.args.output_dir), "train" in splits
    tables = {}
    for split, logits in predict_splits(trainer, encoded):
        part = splits[split]
        write_predictions(folder / f"predictions_{split}.csv", task, part, logits)
        if "labels" in part.column_names:
            labels, (predictions, _) = np.asarray(read_column(part, "labels")), task.predict(logits)
            tables[split] = {"Reformer": metrics.score(predictions, labels)}
            if args.baselines and trained:
                tables[split] |= baselines(metrics, splits["train"], part)
            if task.problem_type == SINGLE and len(task.label_names) <= MATRIX_LABELS:
                file = folder / f"confusion_matrix_{split}.png"
                draw_confusion_matrix(file, task.label_names, labels, predictions, f"{split}: {len(labels)} texts")
    glue = {"datasets": "nyu-mll/glue"} if args.task_name else {}
    summary = format_tables(tables, splits, "texts")
    write_report(trainer, tables, summary, args.describe() if trained else None, **glue)


def check_saved(model: PreTrainedModel, folder: str, texts: list[str]) -> None:
    """Load the saved model with from_pretrained and pipeline, and check that both agree with the trained one."""
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reloaded = AutoModelForSequenceClassification.from_pretrained(folder).to(model.device).eval()
    classifier = pipeline("text-classification", model=folder, device=model.device)
    for text in texts:
        inputs = tokenizer(text, truncation=True, return_tensors="pt").to(model.device)
        with torch.no_grad():
            logits = model(**inputs).logits
            torch.testing.assert_close(reloaded(**inputs).logits, logits, atol=1e-4, rtol=1e-4)
        probabilities, answer = logits[0].softmax(-1), classifier(text, truncation=True)[0]
        number = model.config.label2id[answer["label"]]
        if number != probabilities.argmax() or abs(probabilities[number] - answer["score"]) > 1e-3:
            raise RuntimeError(f"The pipeline answers {answer}, the trained model {probabilities.tolist()}.")
    print(f"Reloaded by from_pretrained and by pipeline: both agree with the trained model on {len(texts)} texts.")


def predict_file(data: DataArguments, folder: str, args: TrainingArguments) -> None:
    """Print the most probable labels of a file, which for the demo is cleaned like its documents."""
    text = read_text(str(data.predict_file))
    if data.demo:
        text = clean_source(text, max_bytes=16384)
    print(f"\n{data.predict_file}" + (" (cleaned like the training texts)" if data.demo else ""))
    model = load_trained(AutoModelForSequenceClassification, folder)
    for answer in pipeline("text-classification", model=model, tokenizer=folder)(text, truncation=True, top_k=5):
        print(f"  {answer['score']:7.3f}  {answer['label']}")


def run(data: DataArguments, model_args: ModelArguments, args: TrainingArguments) -> bool:
    """Read the data, train, evaluate and report. Returns whether a model was trained."""
    set_seed(args.seed)
    model_labels, model_problem_type = task_of_model(model_args.model_name_or_path)
    with args.main_process_first(desc="preparing the data"):
        splits, task = prepare_data(data, model_labels, args.seed, model_problem_type)
        train_texts = [text for texts in task.texts(splits["train"]) for text in texts] if "train" in splits else []
        pairs = task.columns.pair is not None
        tokenizer = make_tokenizer(model_args, train_texts, data.max_length, pairs=pairs)
        encoded = {
            split: tokenize(part, task, tokenizer, data.train_length)
            if split == "train"
            else longest_first(tokenize(part, task, tokenizer))
            for split, part in splits.items()
        }
    metrics = Metrics(task, data.task_name)
    fields, trains = label_fields(task), "train" in splits
    model_args = for_pairs(model_args, tokenizer) if pairs else model_args
    pieces = token_ids(([text] for text in train_texts), tokenizer)
    model_args = pretrain(data, model_args, args, tokenizer, pieces, data.max_length)
    model = make_model(AutoModelForSequenceClassification, model_args, tokenizer, data.max_length, trains, **fields)
    if trains and data.neighbor_init:
        initialize_embeddings(model, list(map(np.array, encoded["train"]["input_ids"])), NEIGHBOR_WINDOW)
    patience = data.early_stopping_patience
    options = {"data_collator": DataCollatorWithPadding(tokenizer), "compute_metrics": metrics}
    options |= {"callbacks": [EarlyStoppingCallback(patience)] if patience else None}
    trainer = build_trainer(GroupedTrainer, model, args, tokenizer, encoded, **options)
    counts = ", ".join(f"{split} {len(part)}" for split, part in splits.items())
    mean = np.mean(read_column(next(iter(encoded.values())), "length"))
    labels = shortened(task.label_names) if task.label_names else task.problem_type
    train_and_save(trainer, f"Texts: {counts}; {mean:.0f} tokens on average. Labels: {labels}")
    evaluate_splits(trainer, metrics, splits, encoded, data)
    if data.demo and trains and "validation" in splits and trainer.is_world_process_zero():
        check_saved(model, str(args.output_dir), splits["validation"]["text"][:4])
        data.predict_file = data.predict_file or str(corpus_file(splits["validation"]["path"][0]))
    return trains


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with the given arguments, by default those of the process."""
    classes = (DataArguments, ModelArguments, TrainingArguments)
    run_recipe("classification", __doc__, classes, run, arguments, DEFAULTS, PRESETS, predict_file)
