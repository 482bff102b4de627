"""Recordings and pictures for a Trainer: batches, augmentation of training data, and spectra."""

import zlib
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader

from ..data.packing import EpochCollator
from ..models.frontend import log_spectrum
from ..models.losses import IGNORE
from .trainers import GroupedTrainer

FASTEST, SLOWEST = 0.88, 1.12  # relative lengths of augmented recordings
STEP_MS = 10  # from one step of log-mel features to the next
CHUNK = 500  # rows of a table that are encoded at a time


def in_memory(rows: Iterable[dict[str, Any]], columns: Mapping[str, list[Any]] | None = None) -> Dataset:
    """Make a dataset from rows generated one by one, and add whole columns; arrays stay arrays."""
    rows, parts = iter(rows), []
    while part := list(islice(rows, CHUNK)):
        parts.append(Dataset.from_dict({name: [row[name] for row in part] for name in part[0]}))
    dataset = concatenate_datasets(parts)
    for name, values in (columns or {}).items():
        dataset = dataset.add_column(name, values)
    return dataset.with_format("numpy")


def hears_features(extractor: Any) -> bool:
    """Whether the extractor turns recordings into features, (steps, features), rather than waveforms, (samples)."""
    return extractor.model_input_names[0] == "input_features"


def steps_per_second(extractor: Any) -> int:
    """Return the steps per second of the model's input: feature steps, or samples of a waveform."""
    return round(1000 / STEP_MS) if hears_features(extractor) else extractor.sampling_rate


def as_steps(values: np.ndarray, width: int) -> np.ndarray:
    """Reshape (N · width) numbers, as tables hold them, to (N) samples or (N, width) features."""
    return values if width == 1 else values.reshape(-1, width)


class AudioCollator:
    """Batches recordings, padded at the end, and labels: classes, or character ids padded with -100."""

    def __init__(self, extractor: Any) -> None:
        self.extractor = extractor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        name = self.extractor.model_input_names[0]
        width = self.extractor.feature_size
        values = [as_steps(np.asarray(row[name], dtype=np.float32), width) for row in rows]
        batch = dict(self.extractor.pad({name: values}, padding=True, return_tensors="pt"))
        if "labels" in rows[0]:
            batch["labels"] = stacked_labels([row["labels"] for row in rows])
        return batch


class PictureCollator:
    """Batches pictures of one shape (channels, height, width)."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        values = np.stack([np.asarray(row["pixel_values"], dtype=np.float32) for row in rows])
        batch = {"pixel_values": torch.from_numpy(values).unflatten(1, self.shape)}
        if "labels" in rows[0]:
            batch["labels"] = stacked_labels([row["labels"] for row in rows])
        return batch


def stacked_labels(labels: list[Any]) -> torch.Tensor:
    """Stack labels: classes to (B), floats to (B) or (B, labels); lists of ids are padded with -100."""
    arrays = [np.asarray(label) for label in labels]
    if arrays[0].ndim == 0 or arrays[0].dtype.kind == "f":
        found = torch.from_numpy(np.stack(arrays))
        return found.float() if found.is_floating_point() else found.long()
    length = max(map(len, arrays))
    return torch.from_numpy(np.stack([np.pad(x, (0, length - len(x)), constant_values=IGNORE) for x in arrays])).long()


Change = Callable[[np.ndarray, np.random.Generator, Mapping[str, Any]], np.ndarray]


class AugmentingCollator(EpochCollator):
    """Augments every row before another collator batches them.

    Args:
        collate: the other collator.
        name: the column to change.
        change: function from (values of the column, random generator, whole row) to new values.
        width: number of features per step, for values of shape (N, width); 1: their shape is (N).
    """

    def __init__(self, collate: Any, name: str, change: Change, seed: int, width: int = 1) -> None:
        super().__init__(seed)
        self.collate, self.name, self.change, self.width = collate, name, change, width

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        changed = []
        for row in rows:
            values = np.asarray(row[self.name], dtype=np.float32)
            draw = np.random.default_rng([self.seed, self.epoch, zlib.crc32(values.tobytes())])
            changed.append({**row, self.name: self.change(as_steps(values, self.width), draw, row)})
        return self.collate(changed)


class SignalTrainer(GroupedTrainer):
    """A Trainer that can use a separate collator (`augmenting`) for training batches."""

    augmenting: AugmentingCollator | None = None

    def get_train_dataloader(self) -> DataLoader:
        evaluating = self.data_collator
        self.data_collator = self.augmenting or evaluating
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = evaluating


def varied_length(steps: int, speed: float) -> int:
    """Return the steps of a recording that is made `speed` times as long."""
    return max(1, round(steps * speed))


def vary_recording(
    samples: np.ndarray, draw: np.random.Generator, row: Mapping[str, Any], shortest: int = 1
) -> np.ndarray:
    """Make a recording up to 12 % shorter or longer, but not below `shortest` steps, and add noise.

    The standard deviation of the noise is at most 0.1, a tenth of that of a normalized waveform.

    Args:
        samples: (N) of a waveform, or (N, F) features.
    """
    length = max(shortest, varied_length(len(samples), draw.uniform(FASTEST, SLOWEST)))
    places = np.linspace(0, len(samples) - 1, length)
    columns = samples.reshape(len(samples), -1).T
    varied = np.stack([np.interp(places, np.arange(len(samples)), column) for column in columns], axis=1)
    noise = draw.uniform(0, 0.1) * draw.standard_normal(varied.shape)
    return (varied + noise).reshape(length, *samples.shape[1:]).astype(np.float32)


def vary_picture(shape: tuple[int, int, int], move: bool, flip: bool) -> Change:
    """If `move`, shift pictures by up to 1/14 of their sides, repeating the edges; if `flip`, mirror half of them."""
    reach = [max(1, side // 14) if move else 0 for side in shape[1:]]

    def change(values: np.ndarray, draw: np.random.Generator, row: Mapping[str, Any]) -> np.ndarray:
        x = values.reshape(shape)
        padded = np.pad(x, ((0, 0), *((size, size) for size in reach)), mode="edge")
        top, left = (int(draw.integers(0, 2 * size + 1)) for size in reach)
        x = padded[:, top : top + shape[1], left : left + shape[2]]
        return np.ascontiguousarray(x[..., ::-1] if flip and draw.random() < 0.5 else x).reshape(-1)

    return change


def spectra_of(row: Mapping[str, Any], size: int, stride: int, count: int = 1) -> torch.Tensor:
    """Return (frames, bands) of a row: its features, or log spectra of its waveform, padded to `count` frames or more.

    Frames of a waveform have `size` samples and start `stride` apart.
    """
    if "input_features" in row:
        return torch.from_numpy(np.array(row["input_features"], dtype=np.float32)).unflatten(0, (row["length"], -1))
    x = torch.from_numpy(np.array(row["input_values"], dtype=np.float32))
    x = torch.nn.functional.pad(x, (0, max(0, count * size - len(x))))
    return log_spectrum(x.unfold(0, size, stride))


def mean_spectra(size: int) -> Callable[[Dataset], np.ndarray]:
    """Make a function that computes features of recordings for simple models.

    They are the means and standard deviations over time of the log spectra of each third, and the log of the length.
    """

    def features(encoded: Dataset) -> np.ndarray:
        found = []
        for row in encoded:
            spectra = spectra_of(row, size, max(1, size // 2), 3)
            parts = spectra.tensor_split(3)
            numbers = [part.mean(0) for part in parts] + [part.std(0, correction=0) for part in parts]
            found.append(torch.cat([*numbers, torch.tensor([np.log(row["length"])]).float()]).numpy())
        return np.stack(found)

    return features
