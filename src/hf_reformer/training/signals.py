"""What the recipes of recordings and pictures share: options, batches, changes of training data, their labels."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from sklearn.dummy import DummyClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch.utils.data import DataLoader
from transformers import AutoFeatureExtractor, Trainer, TrainerCallback, Wav2Vec2FeatureExtractor

from ..data.columns import Columns, check_columns
from ..data.signals import (
    AUDIO_COLUMNS,
    RATE_COLUMNS,
    SOUNDS,
    find_signal_column,
    read_signals,
    recordings,
    stored_rate,
)
from ..data.tables import read_column
from ..hub.model_folder import check_own_files
from ..models.frontend import log_spectrum
from ..models.losses import IGNORE
from .classification import MATRIX_LABELS, SINGLE, Metrics, Task, define_task, draw_confusion_matrix, write_predictions
from .data_setup import SplitArguments
from .model_setup import BackboneArguments, option
from .reports import format_tables, write_report
from .trainers import GroupedTrainer, predict_splits

NO_LABELS = "To predict recordings or pictures without labels, give them as --test_file."
CHUNK = 500  # rows of a table that are encoded at a time


@dataclass
class SignalArguments(SplitArguments):
    """Options of recordings and pictures alike."""

    suffixes: ClassVar[tuple[str, ...]] = SOUNDS  # of files in folders

    label_column: str | None = option(None, "Default: found by its name.")
    augment: bool = option(True, "Change the training data a little in every epoch; see the documentation.")
    baselines: bool = option(False, "Also evaluate a trivial baseline and a simple strong one.")

    def read_file(self, file: str) -> Dataset:
        return read_signals(file, self.suffixes)


@dataclass
class AudioArguments(SignalArguments):
    """Options of recordings."""

    audio_column: str | None = option(None, "Sounds, samples, or names of files. Default: found by its name or kind.")
    sampling_rate_column: str | None = option(None, "Sampling rates of samples. Default: found by its name.")
    sampling_rate: int | None = option(
        None, "What the model hears, in Hz; recordings are resampled. Default: that of the first one."
    )
    frame_ms: float = option(25.0, "Milliseconds of a frame, which is a token.")
    stride_ms: float = option(10.0, "Milliseconds from one frame to the next.")
    frame_transform: str = option(
        "spectrum", "What is mapped to a token: log power spectra of frames, or linear: their samples.",
        choices=["spectrum", "linear"],
    )  # fmt: skip
    predict_file: str | None = option(None, "A sound file, or a folder of them, to predict at the end.")

    def has_inputs(self) -> bool:
        return self.predict_file is not None

    def check(self, model: BackboneArguments, args: Any) -> None:
        super().check(model, args)
        if self.stride_ms > self.frame_ms:
            raise ValueError(
                f"--stride_ms {self.stride_ms:g} is more than --frame_ms {self.frame_ms:g}, so nothing would hear the "
                "samples between frames. Lower it."
            )
        if self.predict_file is not None and not self.files_to_predict():
            raise ValueError(f"--predict_file: there is no sound file `{self.predict_file}`, nor a folder of them.")

    def files_to_predict(self) -> list[str]:
        """Sound files that --predict_file names."""
        path = Path(self.predict_file or "")
        files = [path] if path.is_file() else sorted(x for x in path.rglob("*") if x.suffix.lower() in SOUNDS)
        return [str(file) for file in files if self.predict_file is not None]

    def columns(self, dataset: Dataset) -> tuple[str, str | None]:
        """The columns of the recordings and of their sampling rates."""
        audio = find_signal_column(dataset, self.audio_column, AUDIO_COLUMNS, "--audio_column")
        rate = self.sampling_rate_column or next((name for name in RATE_COLUMNS if name in dataset.column_names), None)
        if rate is not None:
            check_columns(dataset, "first", [rate])
        return audio, rate

    def extractor(self, model: BackboneArguments, first: Dataset | None) -> Any:
        """What prepares recordings for the model: that of a saved model, or one of the data's sampling rate."""
        if model.model_name_or_path is not None:
            if Path(model.model_name_or_path).is_dir():
                check_own_files(Path(model.model_name_or_path))
            found = AutoFeatureExtractor.from_pretrained(model.model_name_or_path)
            if self.sampling_rate not in (None, found.sampling_rate):
                raise ValueError(
                    f"--sampling_rate {self.sampling_rate}: `{model.model_name_or_path}` hears {found.sampling_rate} "
                    "Hz. Leave the option out: recordings are resampled."
                )
            return found
        rate = self.sampling_rate
        if rate is None and first is not None:
            rate = stored_rate(first, *self.columns(first))
        if rate is None:
            raise ValueError(
                "The recordings are samples without a sampling rate. Name a column of rates by "
                "--sampling_rate_column, or give the rate of all by --sampling_rate."
            )
        return Wav2Vec2FeatureExtractor(sampling_rate=rate, return_attention_mask=True, do_normalize=True)

    def frame_fields(self, rate: int) -> dict[str, Any]:
        """Fields of a new model's config."""
        size, stride = (max(1, round(rate * ms / 1000)) for ms in (self.frame_ms, self.stride_ms))
        return {"frame_size": size, "frame_stride": min(size, stride), "frame_transform": self.frame_transform}

    def encode(self, dataset: Dataset, extractor: Any, columns: Mapping[str, list[Any]] | None = None) -> Dataset:
        """Columns `input_values`, normalised, `length`, and those that are given."""
        audio, rate_column = self.columns(dataset)
        rate = extractor.sampling_rate

        def rows() -> Iterator[dict[str, Any]]:
            for samples in recordings(dataset, audio, rate, rate_column):
                values = extractor(samples, sampling_rate=rate)["input_values"][0]
                yield {"input_values": np.asarray(values, dtype=np.float32), "length": len(values)}

        return in_memory(rows(), columns)


def in_memory(rows: Iterable[dict[str, Any]], columns: Mapping[str, list[Any]] | None = None) -> Dataset:
    """A data set of rows that are made one by one, and of whole columns; arrays stay arrays."""
    rows, parts = iter(rows), []
    while part := list(islice(rows, CHUNK)):
        parts.append(Dataset.from_dict({name: [row[name] for row in part] for name in part[0]}))
    dataset = concatenate_datasets(parts)
    for name, values in (columns or {}).items():
        dataset = dataset.add_column(name, values)
    return dataset.with_format("numpy")


class AudioCollator:
    """Batches of recordings, padded at their ends; labels of classes, or of characters padded with -100."""

    def __init__(self, extractor: Any) -> None:
        self.extractor = extractor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        values = [np.asarray(row["input_values"], dtype=np.float32) for row in rows]
        batch = dict(self.extractor.pad({"input_values": values}, padding=True, return_tensors="pt"))
        if "labels" in rows[0]:
            batch["labels"] = stacked_labels([row["labels"] for row in rows])
        return batch


class PictureCollator:
    """Batches of pictures of one shape (channels, height, width)."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        values = np.stack([np.asarray(row["pixel_values"], dtype=np.float32) for row in rows])
        batch = {"pixel_values": torch.from_numpy(values).unflatten(1, self.shape)}
        if "labels" in rows[0]:
            batch["labels"] = stacked_labels([row["labels"] for row in rows])
        return batch


def stacked_labels(labels: list[Any]) -> torch.Tensor:
    """(B) classes, (B) or (B, labels) floats; lists of ids of several lengths are padded with -100."""
    arrays = [np.asarray(label) for label in labels]
    if arrays[0].ndim == 0 or arrays[0].dtype.kind == "f":
        found = torch.from_numpy(np.stack(arrays))
        return found.float() if found.is_floating_point() else found.long()
    length = max(map(len, arrays))
    return torch.from_numpy(np.stack([np.pad(x, (0, length - len(x)), constant_values=IGNORE) for x in arrays])).long()


class AugmentingCollator(TrainerCallback):
    """Changes every row before a collator makes batches of them. To be a callback of the Trainer as well.

    How a row is changed depends on the row, the epoch and the seed alone, so that a resumed run sees what the whole
    one does: batches are made ahead of their step.
    """

    def __init__(
        self, collate: Any, name: str, change: Callable[[np.ndarray, np.random.Generator], np.ndarray], seed: int
    ):
        self.collate, self.name, self.change, self.seed, self.epoch = collate, name, change, seed, 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.epoch = int(state.epoch or 0)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        changed = []
        for row in rows:
            values = np.asarray(row[self.name], dtype=np.float32)
            draw = np.random.default_rng([self.seed, self.epoch, zlib.crc32(values.tobytes())])
            changed.append({**row, self.name: self.change(values, draw)})
        return self.collate(changed)


class SignalTrainer(GroupedTrainer):
    """A Trainer whose training batches may come from a collator of their own (`augmenting`)."""

    augmenting: AugmentingCollator | None = None

    def get_train_dataloader(self) -> DataLoader:
        evaluating = self.data_collator
        self.data_collator = self.augmenting or evaluating
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = evaluating


def vary_recording(samples: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Faster or slower by up to 12 %, with noise at up to a tenth of its deviation."""
    length = max(1, round(len(samples) * draw.uniform(0.88, 1.12)))
    places = np.linspace(0, len(samples) - 1, length)
    varied = np.interp(places, np.arange(len(samples)), samples)
    return (varied + draw.uniform(0, 0.1) * draw.standard_normal(length)).astype(np.float32)


def vary_picture(shape: tuple[int, int, int], flip: bool) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """Moved by up to a fourteenth of its sides, its edges going on; half of them mirrored, if `flip`."""
    reach = [max(1, side // 14) for side in shape[1:]]

    def change(values: np.ndarray, draw: np.random.Generator) -> np.ndarray:
        x = values.reshape(shape)
        padded = np.pad(x, ((0, 0), *((size, size) for size in reach)), mode="edge")
        top, left = (int(draw.integers(0, 2 * size + 1)) for size in reach)
        x = padded[:, top : top + shape[1], left : left + shape[2]]
        return np.ascontiguousarray(x[..., ::-1] if flip and draw.random() < 0.5 else x).reshape(-1)

    return change


def label_splits(
    args: SignalArguments,
    column: Callable[[Dataset], str],
    model_labels: list[str] | None,
    seed: int,
    model_problem_type: str | None = None,
) -> tuple[DatasetDict, Task]:
    """Read the data, define the task, number the labels, and hold out validation data if there is none."""
    splits = args.read()
    first = next(iter(splits))
    usual = ("label", "labels", "target", "class", "category", "score")
    with args.naming_source(first):
        names = splits[first].column_names
        if args.label_column is not None and args.label_column not in names and not first.startswith("test"):
            raise ValueError(f"There is no column `{args.label_column}`. The columns are {names}.")
        label = args.label_column or next((name for name in usual if name in names), None)
        columns = Columns(column(splits[first]), None, label)
        task = define_task(splits[first], columns, first, None, model_labels, model_problem_type)
    for split, part in splits.items():
        with args.naming_source(split):
            check_columns(part, split, [columns.text, None if split.startswith("test") else label], NO_LABELS)
            splits[split] = task.add_labels(part, split)
    return args.complete(splits, seed, "labels" if task.problem_type == SINGLE else None), task


def label_columns(dataset: Dataset) -> dict[str, list[Any]]:
    """The column `labels`, if they are known."""
    return {"labels": read_column(dataset, "labels")} if "labels" in dataset.column_names else {}


def label_fields(task: Task) -> dict[str, Any]:
    """Fields of the config of a model that classifies."""
    names = dict(enumerate(task.label_names or ["score"]))
    return {"problem_type": task.problem_type, "id2label": names, "label2id": {n: i for i, n in names.items()}}


def report_classes(
    trainer: Trainer,
    metrics: Metrics,
    splits: DatasetDict,
    encoded: Mapping[str, Dataset],
    args: SignalArguments,
    what: str,
    features: Callable[[Dataset], np.ndarray],
    strong: str,
) -> None:
    """Write predictions, confusion matrices and scores of all splits but the training data, and those of baselines.

    Args:
        what: a row in words, such as "recordings".
        features: (rows, numbers) of encoded rows, for the strong baseline, a support vector machine.
        strong: its name.
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


def mean_spectra(size: int) -> Callable[[Dataset], np.ndarray]:
    """What a simple model hears of recordings: mean and deviation over time of their log spectra, in three parts."""

    def features(encoded: Dataset) -> np.ndarray:
        found = []
        for row in encoded:
            x = torch.from_numpy(np.array(row["input_values"], dtype=np.float32))
            x = torch.nn.functional.pad(x, (0, max(0, 3 * size - len(x))))
            spectra = log_spectrum(x.unfold(0, size, max(1, size // 2)))
            parts = spectra.tensor_split(3)
            numbers = [part.mean(0) for part in parts] + [part.std(0, correction=0) for part in parts]
            found.append(torch.cat([*numbers, torch.tensor([np.log(row["length"])]).float()]).numpy())
        return np.stack(found)

    return features
