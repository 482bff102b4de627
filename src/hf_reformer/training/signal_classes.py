"""Classification of recordings and pictures: their labels, and the report of a run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from sklearn.dummy import DummyClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from transformers import (
    Trainer,
)

from ..data.columns import LABEL_COLUMNS, Columns, check_columns
from ..data.tables import read_column
from .classification import MATRIX_LABELS, SINGLE, Metrics, Task, define_task, draw_confusion_matrix, write_predictions
from .reports import format_tables, write_report
from .signal_options import LabelArguments
from .trainers import predict_splits

NO_LABELS = "To predict recordings or pictures without labels, give them as --test_file."


def label_splits(
    args: LabelArguments,
    model_labels: list[str] | None,
    seed: int,
    model_problem_type: str | None = None,
) -> tuple[DatasetDict, Task]:
    """Read the data, define the task, number the labels, and hold out validation data if there is none."""
    splits = args.read()
    first = next(iter(splits))
    with args.naming_source(first):
        names = splits[first].column_names
        if args.label_column is not None and args.label_column not in names and not first.startswith("test"):
            raise ValueError(f"There is no column `{args.label_column}`. The columns are {names}.")
        label = args.label_column or next((name for name in LABEL_COLUMNS if name in names), None)
        columns = Columns(args.column(splits[first]), None, label)
        task = define_task(splits[first], columns, first, None, model_labels, model_problem_type)
    for split, part in splits.items():
        with args.naming_source(split):
            check_columns(part, split, [columns.text, None if split.startswith("test") else label], NO_LABELS)
            splits[split] = task.add_labels(part, split)
    return args.complete(splits, seed, "labels" if task.problem_type == SINGLE else None), task


def label_columns(dataset: Dataset) -> dict[str, list[Any]]:
    """Return the column `labels`, if there is one."""
    return {"labels": read_column(dataset, "labels")} if "labels" in dataset.column_names else {}


def report_classes(
    trainer: Trainer,
    metrics: Metrics,
    splits: DatasetDict,
    encoded: Mapping[str, Dataset],
    args: LabelArguments,
    what: str,
    features: Callable[[Dataset], np.ndarray],
    strong: str,
) -> None:
    """Write predictions, confusion matrices and scores of all splits except the training data, with baselines.

    Args:
        what: what the rows are, such as "recordings".
        features: computes features (rows, numbers) of encoded rows for the strong baseline, a support vector machine.
        strong: name of the strong baseline.
    """
    task, folder, trained = metrics.task, Path(str(trainer.args.output_dir)), "train" in splits
    tables = {}
    compares = args.baselines and trained and task.problem_type == SINGLE
    for split, logits in predict_splits(trainer, encoded):
        part = splits[split]
        write_predictions(folder / f"predictions_{split}.csv", task, part, logits)
        if "labels" not in part.column_names:
            continue
        labels, (predictions, _) = np.asarray(read_column(part, "labels")), task.predict(logits)
        tables[split] = {"Reformer": metrics.score(predictions, labels)}
        if compares:
            order = np.argsort(read_column(encoded[split], "row"))
            known = np.asarray(read_column(splits["train"], "labels"))
            x, unseen = features(encoded["train"]), features(encoded[split].select(order))
            machine = make_pipeline(StandardScaler(), SVC(C=10))
            for name, model in (("most frequent label", DummyClassifier()), (strong, machine)):
                tables[split][name] = metrics.score(model.fit(x, known).predict(unseen), labels)
        if task.problem_type == SINGLE and len(task.label_names) <= MATRIX_LABELS:
            file = folder / f"confusion_matrix_{split}.png"
            draw_confusion_matrix(file, task.label_names, labels, predictions, f"{split}: {len(labels)} {what}")
    summary = format_tables(tables, splits, what)
    write_report(trainer, tables, summary, args.describe() if trained else None)
