"""What `train_classification.py` knows about labels: encoding, metrics, baselines, and the files it leaves behind."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Dataset
from transformers import EvalPrediction, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_reformer.data import Columns

METRICS = Path(__file__).parent / "metrics"
SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"
GLUE_METRICS: dict[str, dict[str, dict]] = {
    "cola": {"matthews_correlation": {}},
    "mrpc": {"accuracy": {}, "f1": {"average": "binary"}},
    "qqp": {"accuracy": {}, "f1": {"average": "binary"}},
}


@dataclass
class Task:
    """Which columns to read, what kind of answer is asked for, and what the answers are called."""

    columns: Columns
    problem_type: str
    names: list[str] = field(default_factory=list)
    glue: str | None = None

    @property
    def num_labels(self) -> int:
        return max(1, len(self.names))

    def texts(self, dataset: Dataset) -> list[str]:
        """The first texts of all rows; missing ones are empty."""
        return [text or "" for text in dataset[self.columns.text]]

    def pairs(self, dataset: Dataset) -> list[str] | None:
        """The second texts of all rows, if there are any."""
        return [text or "" for text in dataset[self.columns.pair]] if self.columns.pair else None

    def encode(self, dataset: Dataset, split: str) -> Dataset:
        """Add the column `labels` in the form that the model's loss expects."""
        if self.columns.label not in dataset.column_names:
            return dataset
        if self.problem_type == REGRESSION:
            return dataset.add_column("labels", [float(label) for label in read_labels(dataset, self.columns, split)])
        labels = spell_labels(dataset, self.columns, split)
        number = {name: i for i, name in enumerate(self.names)}
        unknown = sorted({name for label in labels for name in label} - set(number))
        if unknown:
            raise ValueError(
                f"Labels of the {split} data are not among those of training: {unknown} not in {self.names}."
            )
        if self.problem_type == SINGLE:
            return dataset.add_column("labels", [number[label[0]] for label in labels])
        return dataset.add_column("labels", [[float(name in label) for name in self.names] for label in labels])

    def decide(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Predictions in the form of `labels`, and the probabilities of all classes."""
        if self.problem_type == REGRESSION:
            return logits.reshape(len(logits)), None
        if self.problem_type == MULTI:
            probabilities = 1 / (1 + np.exp(-logits))
            return (probabilities > 0.5).astype(int), probabilities
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return logits.argmax(axis=-1), exponentials / exponentials.sum(axis=-1, keepdims=True)

    def spell(self, label: np.ndarray | int | float) -> str | float:
        """A label as a person would write it."""
        if self.problem_type == REGRESSION:
            return float(label)
        if self.problem_type == MULTI:
            return "|".join(name for name, present in zip(self.names, np.asarray(label), strict=True) if present)
        return self.names[int(label)]


def read_labels(dataset: Dataset, columns: Columns, split: str) -> list:
    """The labels of all rows as they are; a row without one raises."""
    if columns.label is None:
        raise ValueError(
            f"Which column holds the label? The columns are {dataset.column_names}. Say it with `--label_column`."
        )
    labels = dataset[columns.label]
    missing = [row for row, label in enumerate(labels) if label is None]
    if missing:
        raise ValueError(f"{len(missing)} rows of the {split} data have no label, the first one is row {missing[0]}.")
    return list(labels)


def spell_labels(dataset: Dataset, columns: Columns, split: str) -> list[list[str]]:
    """The names of the labels of all rows, one for every row unless it is a multi-label task."""
    labels = read_labels(dataset, columns, split)
    feature = dataset.features[columns.label]
    names = getattr(getattr(feature, "feature", feature), "names", None)

    def spell(label: Any) -> str:
        return names[label] if names else f"{label:g}" if isinstance(label, float) else str(label)

    return [[spell(one) for one in label] if isinstance(label, list) else [spell(label)] for label in labels]


def define_task(
    dataset: Dataset,
    columns: Columns,
    split: str,
    problem_type: str | None = None,
    known: list[str] | None = None,
    glue: str | None = None,
) -> Task:
    """Tell the kind of task from the labels: floats mean regression, lists several labels per text.

    `known` are the label names of a model to be fine-tuned; they keep their numbers if they cover the data.
    """
    labels = spell_labels(dataset, columns, split)
    feature = dataset.features[columns.label]
    if problem_type is None:
        is_float = str(getattr(feature, "dtype", "")).startswith(("float", "double"))
        problem_type = MULTI if hasattr(feature, "feature") else REGRESSION if is_float else SINGLE
    if problem_type == REGRESSION:
        return Task(columns, problem_type, glue=glue)
    present = {name for label in labels for name in label}
    names = getattr(getattr(feature, "feature", feature), "names", None) or sorted(present, key=_rank)
    if known and present <= set(known):
        names = known
    if len(names) < 2:
        raise ValueError(f"All {len(labels)} rows of the {split} data have the same label, {names}: nothing to learn.")
    return Task(columns, problem_type, list(names), glue)


def _rank(name: str) -> tuple[bool, int, str]:
    """Numbers by value and before words."""
    return (not name.isdigit(), int(name) if name.isdigit() else 0, name)


class EpochLengthSampler(LengthGroupedSampler):
    """Texts of similar length together, in an order that seed and epoch alone decide.

    So a resumed run sees the batches that an uninterrupted one would, and all processes of a run agree on them.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class GroupedTrainer(Trainer):
    """Trainer that batches by `EpochLengthSampler`, and predicts in the order of the data."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochLengthSampler(batch, list(self.train_dataset["length"]), seed)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> torch.utils.data.Sampler | None:
        return torch.utils.data.SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


class Metrics:
    """`compute_metrics` for Trainer, from the metric modules beside this file: nothing is downloaded."""

    def __init__(self, task: Task) -> None:
        self.task = task
        chosen: dict[str, dict[str, dict]] = {
            REGRESSION: {"pearsonr": {}, "spearmanr": {}},
            SINGLE: {"accuracy": {}, "f1": {"average": "macro"}},
            MULTI: {"f1": {"average": "micro"}, "accuracy": {}},
        }
        self.options = GLUE_METRICS.get(task.glue or "", chosen[task.problem_type])
        config = "multilabel" if task.problem_type == MULTI else None
        self.modules = {name: evaluate.load(str(METRICS / name), config, keep_in_memory=True) for name in self.options}

    def score(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        result: dict[str, float] = {}
        if self.task.problem_type != REGRESSION:
            references = references.astype(int)
        for name, module in self.modules.items():
            result.update(module.compute(predictions=predictions, references=references, **self.options[name]))
        return result

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        predictions, _ = self.task.decide(np.asarray(prediction.predictions))
        return self.score(predictions, np.asarray(prediction.label_ids))


def baselines(metrics: Metrics, train: Dataset, evaluation: Dataset) -> dict[str, dict[str, float]]:
    """What always guessing the most frequent answer, and TF-IDF with a linear model, reach on the same split."""
    from sklearn.dummy import DummyClassifier, DummyRegressor
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline

    task = metrics.task
    regression = task.problem_type == REGRESSION
    linear = Ridge() if regression else LogisticRegression(C=10, max_iter=1000)
    if task.problem_type == MULTI:
        linear = OneVsRestClassifier(linear)
    models = {
        "mean of train" if regression else "most frequent label": DummyRegressor()
        if regression
        else DummyClassifier(),
        f"TF-IDF + {'ridge' if regression else 'logistic'} regression": make_pipeline(
            TfidfVectorizer(sublinear_tf=True), linear
        ),
    }
    kind = float if regression else int
    x, y = _joined(task, train), np.asarray(train["labels"], dtype=kind)
    x_eval, y_eval = _joined(task, evaluation), np.asarray(evaluation["labels"], dtype=kind)
    return {name: metrics.score(model.fit(x, y).predict(x_eval), y_eval) for name, model in models.items()}


def _joined(task: Task, dataset: Dataset) -> list[str]:
    texts, pairs = task.texts(dataset), task.pairs(dataset)
    return texts if pairs is None else [f"{text}\n{pair}" for text, pair in zip(texts, pairs, strict=True)]


def write_predictions(file: Path, task: Task, dataset: Dataset, logits: np.ndarray) -> None:
    """A csv with a row per text, in the order of the data: label (if known), prediction and its probability."""
    import pandas as pd

    predictions, probabilities = task.decide(logits)
    table: dict[str, list] = {"row": list(range(len(dataset)))}
    if "path" in dataset.column_names:
        table["path"] = dataset["path"]
    if "labels" in dataset.column_names:
        table["label"] = [task.spell(label) for label in dataset["labels"]]
    table["prediction"] = [task.spell(label) for label in predictions]
    if task.problem_type == SINGLE:
        table["probability"] = [round(float(p), 6) for p in probabilities.max(axis=-1)]
    if task.problem_type == MULTI:
        for i, name in enumerate(task.names):
            table[f"probability of {name}"] = [round(float(p), 6) for p in probabilities[:, i]]
    pd.DataFrame(table).to_csv(file, index=False)


def draw_confusion_matrix(file: Path, task: Task, labels: np.ndarray, predictions: np.ndarray, title: str) -> None:
    """Rows are the true labels, columns the predicted ones."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from sklearn.metrics import ConfusionMatrixDisplay

    side = max(4.0, 1.5 + 0.55 * len(task.names))
    figure, axes = plt.subplots(figsize=(side, side), layout="constrained")
    ConfusionMatrixDisplay.from_predictions(
        labels,
        predictions,
        labels=range(len(task.names)),
        display_labels=task.names,
        xticks_rotation=45,
        cmap="Blues",
        colorbar=False,
        ax=axes,
    )
    axes.set_title(title)
    figure.savefig(file, dpi=120)
    plt.close(figure)


def format_table(rows: dict[str, dict[str, float]]) -> str:
    """A Markdown table, a row per model and a column per metric."""
    names = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    width = max(map(len, rows))
    lines = [
        f"| {'':{width}} | {' | '.join(names)} |",
        f"|:{'-' * width}-|{'|'.join('-' * (len(n) + 1) + ':' for n in names)}|",
    ]
    for model, scores in rows.items():
        cells = (f"{scores[n]:{len(n)}.3f}" if n in scores else " " * len(n) for n in names)
        lines.append(f"| {model:{width}} | {' | '.join(cells)} |")
    return "\n".join(lines)
