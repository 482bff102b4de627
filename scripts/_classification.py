"""What `train_classification.py` knows about labels and metrics, and how it orders its batches."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from _models import SequentialEvalMixin
from datasets import Dataset
from transformers import EvalPrediction, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_reformer.data.tables import Columns

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


class GroupedTrainer(SequentialEvalMixin, Trainer):
    """Trainer that batches by `EpochLengthSampler`."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochLengthSampler(batch, list(self.train_dataset["length"]), seed)


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
