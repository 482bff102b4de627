"""Classification: what kind of task the labels are, its metrics, baselines and predictions."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pandas as pd
from datasets import Dataset
from matplotlib.figure import Figure
from scipy.special import expit, softmax
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from transformers import EvalPrediction

from ..data.tables import Columns

METRIC_MODULE = str(Path(__file__).with_name("metrics.py"))
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
METRICS: dict[str | None, dict[str, dict[str, Any]]] = {  # by GLUE task, else by problem type
    "cola": {"matthews_correlation": {}},
    "mrpc": {"accuracy": {}, "f1": {"average": "binary"}},
    "qqp": {"accuracy": {}, "f1": {"average": "binary"}},
    SINGLE: {"accuracy": {}, "f1": {"average": "macro"}},
    MULTI: {"f1": {"average": "micro"}, "accuracy": {}},
    REGRESSION: {"pearsonr": {}, "spearmanr": {}},
}


@dataclass
class Task:
    """Which columns to read, what to predict, and what the labels are called."""

    columns: Columns
    problem_type: str
    label_names: list[str] = field(default_factory=list)

    def texts(self, examples: Any) -> list[list[str]]:
        """The texts of all examples, and their second texts if they are pairs; "" where one is missing."""
        names = [name for name in (self.columns.text, self.columns.pair) if name is not None]
        return [[text or "" for text in examples[name]] for name in names]

    def add_labels(self, dataset: Dataset, split: str) -> Dataset:
        """Add the column `labels` in the form that the model's loss expects."""
        if self.columns.label not in dataset.column_names:
            return dataset
        if self.problem_type == REGRESSION:
            return dataset.add_column("labels", [float(label) for label in read_labels(dataset, self.columns, split)])
        labels = read_label_names(dataset, self.columns, split)
        number = {name: i for i, name in enumerate(self.label_names)}
        if unknown := sorted({name for names in labels for name in names} - set(number)):
            raise ValueError(
                f"Labels of the {split} data are not among those of training: {unknown} not in {self.label_names}."
            )
        if self.problem_type == SINGLE:
            return dataset.add_column("labels", [number[names[0]] for names in labels])
        return dataset.add_column("labels", [[float(name in names) for name in self.label_names] for names in labels])

    def predict(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Predictions in the form of `labels`, and the probabilities of all labels."""
        if self.problem_type == REGRESSION:
            return logits.reshape(len(logits)), None
        if self.problem_type == MULTI:
            return (expit(logits) > 0.5).astype(int), expit(logits)
        return logits.argmax(axis=-1), softmax(logits, axis=-1)

    def format_label(self, label: Any) -> str | float:
        """A label as a person would write it."""
        if self.problem_type == REGRESSION:
            return float(label)
        if self.problem_type == MULTI:
            return "|".join(name for name, present in zip(self.label_names, label, strict=True) if present)
        return self.label_names[int(label)]


def read_labels(dataset: Dataset, columns: Columns, split: str) -> list:
    """The labels of all examples as they are; an example without one raises ValueError."""
    if columns.label is None:
        raise ValueError(
            f"Which column holds the label? The columns are {dataset.column_names}. Name it with `--label_column`."
        )
    labels = list(dataset[columns.label])
    missing = [row for row, label in enumerate(labels) if label is None]
    if missing:
        raise ValueError(f"{len(missing)} rows of the {split} data have no label; the first is row {missing[0]}.")
    return labels


def read_label_names(dataset: Dataset, columns: Columns, split: str) -> list[list[str]]:
    """The names of every example's labels: one, unless it is a multi-label task."""
    labels = read_labels(dataset, columns, split)
    feature = dataset.features[columns.label]
    names = getattr(getattr(feature, "feature", feature), "names", None)

    def name_of(label: Any) -> str:
        return names[label] if names else f"{label:g}" if isinstance(label, float) else str(label)

    return [[name_of(one) for one in (label if isinstance(label, list) else [label])] for label in labels]


def define_task(
    dataset: Dataset, columns: Columns, split: str, problem_type: str | None, model_labels: list[str] | None
) -> Task:
    """Derive the kind of task from the labels: floats mean regression, lists mean several labels per text.

    `model_labels`: label names of a model to be fine-tuned; they keep their numbers if they cover the data.
    """
    labels = read_label_names(dataset, columns, split)
    feature = dataset.features[columns.label]
    if problem_type is None:
        is_float = str(getattr(feature, "dtype", "")).startswith(("float", "double"))
        problem_type = MULTI if hasattr(feature, "feature") else REGRESSION if is_float else SINGLE
    if problem_type == REGRESSION:
        return Task(columns, problem_type)

    def numbers_first(name: str) -> tuple[bool, int, str]:
        return (not name.isdigit(), int(name) if name.isdigit() else 0, name)

    present = {name for names in labels for name in names}
    names = getattr(getattr(feature, "feature", feature), "names", None) or sorted(present, key=numbers_first)
    if model_labels and present <= set(model_labels):
        names = model_labels
    if len(names) < 2:
        raise ValueError(f"All {len(labels)} rows of the {split} data have the same label, {names}: nothing to learn.")
    return Task(columns, problem_type, list(names))


class Metrics:
    """`compute_metrics` for the Trainer, with the metrics of a GLUE task, or of the kind of task."""

    def __init__(self, task: Task, glue: str | None) -> None:
        self.task = task
        self.options = METRICS.get(glue, METRICS[task.problem_type])
        self.modules = {name: evaluate.load(METRIC_MODULE, name, keep_in_memory=True) for name in self.options}

    def score(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        scores: dict[str, float] = {}
        if self.task.problem_type != REGRESSION:
            references = references.astype(int)
        for name, module in self.modules.items():
            scores |= module.compute(predictions=predictions, references=references, **self.options[name])
        return scores

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        predictions, _ = self.task.predict(np.asarray(prediction.predictions))
        return self.score(predictions, np.asarray(prediction.label_ids))


def baselines(metrics: Metrics, train: Dataset, evaluation: Dataset) -> dict[str, dict[str, float]]:
    """The scores of always predicting the most frequent label, and of a linear model on TF-IDF, on the same split."""
    task = metrics.task
    if task.problem_type == REGRESSION:
        constant, linear, names = DummyRegressor(), Ridge(), ("mean of train", "TF-IDF + ridge regression")
    else:
        constant, linear = DummyClassifier(), LogisticRegression(C=10, max_iter=1000)
        names = "most frequent label", "TF-IDF + logistic regression"
    if task.problem_type == MULTI:
        linear = OneVsRestClassifier(linear)

    def data(dataset: Dataset) -> tuple[list[str], np.ndarray]:
        texts = ["\n".join(parts) for parts in zip(*task.texts(dataset), strict=True)]
        return texts, np.asarray(dataset["labels"], dtype=float if task.problem_type == REGRESSION else int)

    (x, y), (x_eval, y_eval) = data(train), data(evaluation)
    models = zip(names, (constant, make_pipeline(TfidfVectorizer(sublinear_tf=True), linear)), strict=True)
    return {name: metrics.score(model.fit(x, y).predict(x_eval), y_eval) for name, model in models}


def write_predictions(file: Path, task: Task, dataset: Dataset, logits: np.ndarray) -> None:
    """A csv with a line per text, in the order of the data: label (if known), prediction and its probability."""
    predictions, probabilities = task.predict(logits)
    table: dict[str, list] = {"row": list(range(len(dataset)))}
    if "path" in dataset.column_names:
        table["path"] = dataset["path"]
    if "labels" in dataset.column_names:
        table["label"] = [task.format_label(label) for label in dataset["labels"]]
    table["prediction"] = [task.format_label(label) for label in predictions]
    if task.problem_type == SINGLE:
        table["probability"] = [round(float(p), 6) for p in probabilities.max(axis=-1)]
    if task.problem_type == MULTI:
        for i, name in enumerate(task.label_names):
            table[f"probability of {name}"] = [round(float(p), 6) for p in probabilities[:, i]]
    pd.DataFrame(table).to_csv(file, index=False)


def draw_confusion_matrix(file: Path, task: Task, labels: np.ndarray, predictions: np.ndarray, title: str) -> None:
    """Rows are the true labels, columns the predicted ones."""
    side = max(4.0, 1.5 + 0.55 * len(task.label_names))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    matrix = confusion_matrix(labels, predictions, labels=range(len(task.label_names)))
    display = ConfusionMatrixDisplay(matrix, display_labels=task.label_names)
    display.plot(ax=axes, cmap="Blues", colorbar=False, xticks_rotation=45)
    axes.set_title(title)
    figure.savefig(file, dpi=120)
