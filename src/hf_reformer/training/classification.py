"""Classification: the kind of task, its metrics, baselines and predictions."""

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
from transformers import AutoConfig, EvalPrediction
from transformers.utils import logging

from ..data.columns import Columns, is_number, labels_unknown
from ..data.tables import cell_text, read_column

logger = logging.get_logger(__name__)

METRIC_MODULE = str(Path(__file__).with_name("metrics.py"))
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
MATRIX_LABELS = 100  # a larger confusion matrix can be neither read nor drawn
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
    """Which columns to read, what to predict, and the names of the labels.

    `multi_hot`: labels are rows of zeros and ones, one per class, instead of lists of names.
    """

    columns: Columns
    problem_type: str
    label_names: list[str] = field(default_factory=list)
    multi_hot: bool = False

    def texts(self, examples: Any) -> list[list[str]]:
        """Return the texts of all examples, and their second texts if they are pairs; "" where one is missing."""
        names = [name for name in (self.columns.text, self.columns.pair) if name is not None]
        return [[cell_text(cell) or "" for cell in examples[name][:]] for name in names]

    def add_labels(self, dataset: Dataset, split: str) -> Dataset:
        """Add the column `labels` in the form that the model's loss expects, replacing any column of that name.

        A test split without any label gets no such column: it is only predicted.
        """
        labels, name = None, self.columns.label
        if name in dataset.column_names:
            cells = labels_as_written(dataset, name, self.multi_hot)
            if not labels_unknown(split, cells):
                labels = self._numbered(check_none_missing(cells, split), split)
        if "labels" in dataset.column_names:
            dataset = dataset.remove_columns("labels")
        return dataset if labels is None else dataset.add_column("labels", labels)

    def _numbered(self, labels: list, split: str) -> list:
        if self.problem_type == REGRESSION:
            return [_number(label, row, split) for row, label in enumerate(labels)]
        names = names_in_labels(labels, split)
        number = {name: i for i, name in enumerate(self.label_names)}
        if unknown := sorted({one for some in names for one in some} - set(number)):
            raise ValueError(
                f"Labels of the {split} data are not among those of training: {shortened(unknown)} not in "
                f"{shortened(self.label_names)}."
            )
        if self.problem_type == SINGLE:
            return [number[_only(some, row, split)] for row, some in enumerate(names)]
        rows = np.zeros((len(names), len(number)))
        for row, some in zip(rows, names, strict=True):
            row[[number[one] for one in some]] = 1
        return rows.tolist()

    def predict(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return predictions in the form of `labels`, and the probabilities of all labels (None for regression)."""
        if self.problem_type == REGRESSION:
            return logits.reshape(len(logits)), None
        if self.problem_type == MULTI:
            return (expit(logits) > 0.5).astype(int), expit(logits)
        return logits.argmax(axis=-1), softmax(logits, axis=-1)

    def format_label(self, label: Any) -> str | float:
        """Format a label for human readers."""
        if self.problem_type == REGRESSION:
            return float(label)
        if self.problem_type == MULTI:
            return "|".join(name for name, present in zip(self.label_names, label, strict=True) if present)
        return self.label_names[int(label)]


def labels_as_written(dataset: Dataset, column: str, multi_hot: bool) -> list:
    """Return the cells of a label column, with numbers of a `ClassLabel` and ones of multi-hot rows replaced by names.

    A `ClassLabel` below 0, which means unknown, becomes None.
    """
    cells, names = read_column(dataset, column), class_names(dataset.features[column])
    if multi_hot:
        return [x if x is None else _hot_names(x, names, row) for row, x in enumerate(cells)]
    if names is None:
        return cells

    def name_of(number: int | None) -> str | None:
        return None if number is None or number < 0 else names[number]

    return [list(map(name_of, x)) if isinstance(x, list) else name_of(x) for x in cells]


def class_names(feature: Any) -> list[str] | None:
    """Return the class names of a `ClassLabel` or a list of them; None for other features."""
    return getattr(getattr(feature, "feature", feature), "names", None)


def is_multi_hot(cells: list) -> bool:
    """Whether cells are rows of zeros and ones, one per class, rather than lists of names."""
    rows = [cell for cell in cells if cell is not None]
    size = len(rows[0]) if rows and isinstance(rows[0], list) else 0
    return size > 1 and all(isinstance(x, list) and len(x) == size and all(y in (0, 1) for y in x) for x in rows)


def _hot_names(cell: Any, names: list[str] | None, row: int) -> list[str]:
    if not is_multi_hot([cell]) or len(cell) != len(names or cell):
        raise ValueError(f"The labels of row {row} are {cell!r}, where other rows hold a 0 or 1 for each class.")
    return [name for name, hot in zip(names or map(str, range(len(cell))), cell, strict=True) if hot]


def is_missing(label: Any) -> bool:
    """Whether a cell holds no label: it is empty, or NaN in a numeric column."""
    return label in (None, "") or label != label


def check_none_missing(labels: list, split: str) -> list:
    """Return the labels; raise ValueError if an example has none."""
    missing = [row for row, label in enumerate(labels) if is_missing(label)]
    if missing:
        raise ValueError(
            f"{len(missing)} rows of the {split} data have no label; the first is row {missing[0]}. Leave such rows "
            "out. To predict texts without labels, give them as --test_file."
        )
    return labels


def names_in_labels(labels: list, split: str) -> list[list[str]]:
    """Return the label names of every example: one name each, unless the task is multi-label."""
    return [[_name(one, row, split) for one in (x if isinstance(x, list) else [x])] for row, x in enumerate(labels)]


def _name(label: Any, row: int, split: str) -> str:
    name = str(int(label)) if isinstance(label, float) and label.is_integer() else cell_text(label)
    if name is None:
        raise ValueError(f"Row {row} of the {split} data has an empty label in its list. Leave it out.")
    return name


def _is_numeric(label: Any) -> bool:
    return isinstance(label, (int, float)) or (isinstance(label, str) and is_number(label))


def _number(label: Any, row: int, split: str) -> float:
    number = float(label) if _is_numeric(label) else None
    if number is None or not np.isfinite(number):
        raise ValueError(
            f"Row {row} of the {split} data has the label {label!r}, but regression needs finite numbers. Correct it, "
            f"or give --problem_type {SINGLE}."
        )
    return number


def _only(names: list[str], row: int, split: str) -> str:
    if len(names) != 1:
        raise ValueError(
            f"Row {row} of the {split} data has the labels {names}, but {SINGLE} means one a row. Leave out "
            "--problem_type."
        )
    return names[0]


def shortened(names: list[str]) -> str:
    """Format a list of names for a message, with at most the first 20 of them."""
    return str(names) if len(names) <= 20 else f"{str(names[:20])[:-1]}, … {len(names) - 20} more]"


def _derived_problem_type(labels: list, was_regression: bool) -> str:
    """Multi-label if any cell is a list; regression if all labels are numbers and some are written with decimals."""
    if any(isinstance(label, list) for label in labels):
        return MULTI
    decimals = was_regression or any(isinstance(x, float) or (isinstance(x, str) and "." in x) for x in labels)
    return REGRESSION if decimals and all(map(_is_numeric, labels)) else SINGLE


def task_of_model(name: str | None) -> tuple[list[str] | None, str | None]:
    """Return the label names and problem type of a saved model; None for what is unknown, as without a model."""
    if name is None:
        return None, None
    config = AutoConfig.from_pretrained(name)
    labels = list(config.id2label.values())
    return labels, config.problem_type or (REGRESSION if len(labels) == 1 else None)


def label_fields(task: Task) -> dict[str, Any]:
    """Return the config fields that describe the labels of a task."""
    names = dict(enumerate(task.label_names or ["score"]))
    return {"problem_type": task.problem_type, "id2label": names, "label2id": {n: i for i, n in names.items()}}


def define_task(
    dataset: Dataset,
    columns: Columns,
    split: str,
    problem_type: str | None,
    model_labels: list[str] | None,
    model_problem_type: str | None = None,
) -> Task:
    """Derive the kind of task from the labels: numbers with decimals mean regression, lists mean multi-label.

    The label names of a saved model (`model_labels`) keep their numbers if they cover the data. A regression model
    (`model_problem_type`) stays one for any numeric labels. Without training data, the task is that of the model.
    """
    if columns.label is None and split == "train":
        raise ValueError(
            f"Which column holds the label? The columns are {dataset.column_names}. Name it with `--label_column`."
        )
    cells = [] if columns.label is None else read_column(dataset, columns.label)
    multi_hot = is_multi_hot(cells)
    if split != "train":
        found = problem_type or model_problem_type or SINGLE
        return Task(columns, found, [] if found == REGRESSION else model_labels or [], multi_hot)
    labels = check_none_missing(labels_as_written(dataset, columns.label, multi_hot), split)
    derived = _derived_problem_type(labels, model_problem_type == REGRESSION)
    if problem_type is None and derived != _derived_problem_type(labels, False):
        logger.warning(
            f"The saved model predicts numbers (regression), so the labels of the {split} data are taken as numbers. "
            f"If they are classes, write them as words (or, for texts, give --problem_type {SINGLE})."
        )
    problem_type = problem_type or derived
    if problem_type == REGRESSION:
        return Task(columns, problem_type)

    def numbers_first(name: str) -> tuple[bool, int, str, str]:
        number = name.lstrip("0") if name.isascii() and name.isdigit() else ""
        return (not (name.isascii() and name.isdigit()), len(number), number, name)

    present = {name for names in names_in_labels(labels, split) for name in names}
    if model_labels and present <= set(model_labels):
        return Task(columns, problem_type, model_labels, multi_hot)
    positions = [str(i) for i in range(len(cells[0]))] if multi_hot else None
    names = class_names(dataset.features[columns.label]) or positions or sorted(present, key=numbers_first)
    if len(names) < 2 or (problem_type == SINGLE and len(present) < 2):
        raise ValueError(
            f"All {len(labels)} rows of the {split} data have the same label, {sorted(present)}: nothing to learn."
        )
    return Task(columns, problem_type, list(names), multi_hot)


class Metrics:
    """`compute_metrics` for the Trainer, with the metrics of a GLUE task or else of the problem type."""

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
    """Score two baselines on a split: the most frequent label (or the mean), and a linear model on TF-IDF."""
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
        kind = float if task.problem_type == REGRESSION else int
        return texts, np.asarray(read_column(dataset, "labels"), dtype=kind)

    (x, y), (x_eval, y_eval) = data(train), data(evaluation)
    models = zip(names, (constant, make_pipeline(TfidfVectorizer(sublinear_tf=True), linear)), strict=True)
    return {name: metrics.score(model.fit(x, y).predict(x_eval), y_eval) for name, model in models}


def write_predictions(file: Path, task: Task, dataset: Dataset, logits: np.ndarray) -> None:
    """Write a CSV file with a line per example, in the order of the data: label if known, prediction, probability."""
    predictions, probabilities = task.predict(logits)
    table: dict[str, list] = {"row": list(range(len(dataset)))}
    if "path" in dataset.column_names:
        table["path"] = read_column(dataset, "path")
    if "labels" in dataset.column_names:
        table["label"] = [task.format_label(label) for label in read_column(dataset, "labels")]
    table["prediction"] = [task.format_label(label) for label in predictions]
    if task.problem_type == SINGLE:
        table["probability"] = [round(float(p), 6) for p in probabilities.max(axis=-1)]
    if task.problem_type == MULTI:
        for i, name in enumerate(task.label_names):
            table[f"probability of {name}"] = [round(float(p), 6) for p in probabilities[:, i]]
    pd.DataFrame(table).to_csv(file, index=False)


def draw_confusion_matrix(
    file: Path, names: list[str], labels: np.ndarray, predictions: np.ndarray, title: str, normalize: str | None = None
) -> None:
    """Plot a confusion matrix: rows are true labels, columns predicted ones. `normalize`: as in scikit-learn."""
    side = max(4.0, 1.5 + 0.55 * len(names))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    matrix = confusion_matrix(labels, predictions, labels=range(len(names)), normalize=normalize)
    display = ConfusionMatrixDisplay(matrix, display_labels=names)
    values = {"values_format": ".2f"} if normalize else {}
    display.plot(ax=axes, cmap="Blues", colorbar=False, xticks_rotation=45, **values)
    axes.set_title(title)
    figure.savefig(file, dpi=120)
