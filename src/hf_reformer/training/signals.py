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
from transformers import AutoConfig, AutoFeatureExtractor, Trainer, Wav2Vec2FeatureExtractor

from ..data.columns import LABEL_COLUMNS, Columns, check_columns
from ..data.demo_signals import handwritten_digits
from ..data.packing import EpochCollator
from ..data.signals import (
    AUDIO_COLUMNS,
    IMAGE_COLUMNS,
    PICTURES,
    RATE_COLUMNS,
    SOUNDS,
    files_beside,
    find_signal_column,
    holds_samples,
    pictures,
    read_signals,
    recordings,
    stored_rate,
)
from ..data.tables import read_column
from ..hub.model_folder import check_own_files
from ..models.frontend import count_frames, log_spectrum
from ..models.losses import IGNORE
from .classification import MATRIX_LABELS, SINGLE, Metrics, Task, define_task, draw_confusion_matrix, write_predictions
from .data_setup import SplitArguments
from .model_setup import BackboneArguments, check_same_as_saved, make_model, option, parse_overrides
from .reports import format_tables, write_report
from .trainers import GroupedTrainer, predict_splits

NO_LABELS = "To predict recordings or pictures without labels, give them as --test_file."
NO_RATE = (
    "The recordings are samples without a sampling rate. Name a column of rates by --sampling_rate_column, or give "
    "the rate of all by --sampling_rate."
)
FRAME_MS, STRIDE_MS = 25.0, 10.0  # of a new model
FASTEST, SLOWEST = 0.88, 1.12  # lengths of varied recordings
CHUNK = 500  # rows of a table that are encoded at a time


@dataclass
class SignalArguments(SplitArguments):
    """Options of recordings and pictures alike. A recipe says what they are of, by the class variables."""

    suffixes: ClassVar[tuple[str, ...]] = ()  # of files in folders
    usual_columns: ClassVar[tuple[str, ...]] = ()
    column_option: ClassVar[str] = ""  # names the column of the recordings or pictures

    baselines: bool = option(False, "Also evaluate a trivial baseline and a simple strong one.")

    def read_file(self, file: str) -> Dataset:
        dataset = read_signals(file, self.suffixes)
        return dataset if Path(file).is_dir() else files_beside(dataset, self.column(dataset), Path(file).parent)

    def column(self, dataset: Dataset) -> str:
        """The column of the recordings or pictures, or of the names of their files."""
        given = getattr(self, self.column_option)
        return find_signal_column(dataset, given, self.usual_columns, f"--{self.column_option}")


@dataclass
class InputArguments(SignalArguments):
    """The same, for a model that answers to files, and whose training data are varied."""

    kind_of_file: ClassVar[str] = ""

    augment: bool = option(True, "Change the training data a little in every epoch; see the documentation.")
    predict_file: str | None = option(None, "A file, or a folder of files, to predict at the end.")

    def has_inputs(self) -> bool:
        return self.predict_file is not None

    def check(self, model: BackboneArguments, args: Any) -> None:
        super().check(model, args)
        if self.predict_file is not None and not self.files_to_predict():
            raise ValueError(
                f"--predict_file: there is no {self.kind_of_file} `{self.predict_file}`, nor a folder of them."
            )

    def files_to_predict(self) -> list[str]:
        """The files that --predict_file names."""
        if self.predict_file is None:
            return []
        path = Path(self.predict_file)
        files = [path] if path.is_file() else sorted(x for x in path.rglob("*") if x.suffix.lower() in self.suffixes)
        return [str(file) for file in files]


@dataclass
class LabelArguments(InputArguments):
    """The same, of classes."""

    label_column: str | None = option(None, "Default: found by its name.")


@dataclass
class PictureArguments(SignalArguments):
    """Options of pictures."""

    sources = ("demo",)
    suffixes = PICTURES
    usual_columns = IMAGE_COLUMNS
    column_option = "image_column"

    demo: bool = option(False, "Complete run without a download: handwritten digits of scikit-learn.")
    image_column: str | None = option(None, "Pictures, pixels, or names of files. Default: found by its name or kind.")
    image_size: int | None = option(
        None, "Height and width that pictures are resized to. Default: those of the first."
    )

    def read_source(self) -> Mapping[str, Dataset]:
        return handwritten_digits() if self.demo else super().read_source()

    def describe(self) -> str:
        return "handwritten digits of scikit-learn" if self.demo else super().describe()

    def size(self, first: Dataset) -> tuple[int, int]:
        """Height and width of the pictures of a new model."""
        if self.image_size is not None:
            return self.image_size, self.image_size
        width, height = next(pictures(first, self.column(first))).size
        return height, width

    def check_size(self, name: str, height: int, width: int) -> None:
        """Raise ValueError if another size is asked for than that of the saved model `name`."""
        check_same_as_saved(name, self, {"image_size": height if height == width else f"{height} × {width}"})


@dataclass
class AudioArguments(InputArguments):
    """Options of recordings."""

    suffixes = SOUNDS
    usual_columns = AUDIO_COLUMNS
    column_option = "audio_column"
    kind_of_file = "sound file"

    audio_column: str | None = option(None, "Sounds, samples, or names of files. Default: found by its name or kind.")
    sampling_rate_column: str | None = option(None, "Sampling rates of samples. Default: found by its name.")
    sampling_rate: int | None = option(
        None, "What a new model hears, in Hz; recordings are resampled. Default: that of the first one. Also the rate "
        "of samples that tell none.",
    )  # fmt: skip
    frame_ms: float | None = option(None, "Milliseconds of a frame, which is a token. Default: 25.")
    stride_ms: float | None = option(None, "Milliseconds from one frame to the next. Default: 10.")
    frame_transform: str | None = option(
        None, "What is mapped to a token: log power spectra of frames, or linear: their samples. Default: spectrum.",
        choices=["spectrum", "linear"],
    )  # fmt: skip

    def check(self, model: BackboneArguments, args: Any) -> None:
        super().check(model, args)
        frame, stride = self.frame_ms or FRAME_MS, self.stride_ms or STRIDE_MS
        if stride > frame and model.model_name_or_path is None:
            raise ValueError(
                f"--stride_ms {stride:g} is more than --frame_ms {frame:g}, so nothing would hear the samples between "
                "frames. Lower it."
            )

    def columns(self, dataset: Dataset) -> tuple[str, str | None]:
        """The columns of the recordings and of their sampling rates."""
        rate = self.sampling_rate_column or next((name for name in RATE_COLUMNS if name in dataset.column_names), None)
        if rate is not None:
            check_columns(dataset, "first", [rate])
        return self.column(dataset), rate

    def extractor(self, model: BackboneArguments, first: Dataset) -> Any:
        """What prepares recordings for the model: that of a saved model, or one of the data's sampling rate."""
        audio, rate_column = self.columns(first)
        if model.model_name_or_path is not None:
            if Path(model.model_name_or_path).is_dir():
                check_own_files(Path(model.model_name_or_path))
            found = AutoFeatureExtractor.from_pretrained(model.model_name_or_path)
            tells = rate_column is not None or not holds_samples(first, audio)
            if tells and self.sampling_rate not in (None, found.sampling_rate):
                raise ValueError(
                    f"--sampling_rate {self.sampling_rate}: `{model.model_name_or_path}` hears {found.sampling_rate} "
                    "Hz. Leave the option out: these recordings tell their rate, and are resampled."
                )
            return found
        rate = self.sampling_rate or stored_rate(first, audio, rate_column)
        if rate is None:
            raise ValueError(NO_RATE)
        return Wav2Vec2FeatureExtractor(sampling_rate=rate, return_attention_mask=True, do_normalize=True)

    def frame_fields(self, model: BackboneArguments, rate: int) -> dict[str, Any]:
        """Fields of the config of a new model, or of the saved one, that tell what a frame is.

        Raises:
            ValueError: the options name others than those of the saved model.
        """
        sizes = {"frame_ms": self.frame_ms or FRAME_MS, "stride_ms": self.stride_ms or STRIDE_MS}
        size, stride = (max(1, round(rate * ms / 1000)) for ms in sizes.values())
        found: dict[str, Any] = {"frame_size": size, "frame_stride": min(size, stride)}
        found["frame_transform"] = self.frame_transform or "spectrum"
        if model.model_name_or_path is None:
            overrides = parse_overrides(model.config_overrides)
            return {name: overrides.get(name, value) for name, value in found.items()}
        saved: Any = AutoConfig.from_pretrained(model.model_name_or_path)
        same = {"frame_transform": saved.frame_transform}
        for name, field in (("frame_ms", "frame_size"), ("stride_ms", "frame_stride")):
            value = getattr(saved, field)
            same[name] = sizes[name] if value == found[field] else round(1000 * value / rate, 3)
        check_same_as_saved(model.model_name_or_path, self, same)
        return {name: getattr(saved, name) for name in found}

    def hearing_model(
        self, auto_class: Any, model: BackboneArguments, tokenizer: Any, encoded: Mapping[str, Dataset], rate: int,
        **fields: Any,
    ) -> Any:  # fmt: skip
        """The saved model, or a new one, with a position for every frame of what it is to hear.

        Training data that are varied become longer, too.

        Raises:
            ValueError: the positions of the model do not reach so far.
        """
        frame = self.frame_fields(model, rate)
        longest = 0
        for split, rows in encoded.items():
            steps = int(max(read_column(rows, "length")))
            longest = max(longest, varied_length(steps, SLOWEST) if self.augment and split == "train" else steps)
        count = count_frames(longest, frame["frame_size"], frame["frame_stride"])
        fields |= frame if model.model_name_or_path is None else {}
        found = make_model(auto_class, model, tokenizer, max(count, 256), "train" in encoded, **fields)
        covered = getattr(found.config, "covered_positions", count)
        if count > covered:
            raise ValueError(
                f"The longest recording has {count:,} frames, and the model positions for {covered:,}. Cut it, or "
                "train a model with more of them, or with --position_embedding_type rotary, which knows no end."
            )
        return found

    def encode(self, dataset: Dataset, extractor: Any, columns: Mapping[str, list[Any]] | None = None) -> Dataset:
        """Columns `input_values`, normalised, `length`, and those that are given."""
        audio, rate_column = self.columns(dataset)
        rate = extractor.sampling_rate
        if rate_column is None and holds_samples(dataset, audio) and self.sampling_rate is None:
            raise ValueError(NO_RATE)

        def rows() -> Iterator[dict[str, Any]]:
            for samples in recordings(dataset, audio, rate, rate_column, self.sampling_rate):
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


Change = Callable[[np.ndarray, np.random.Generator, Mapping[str, Any]], np.ndarray]


class AugmentingCollator(EpochCollator):
    """Changes every row before a collator makes batches of them.

    Args:
        name: of the column that is changed.
        change: (its values, what to draw from, the whole row) → other values.
    """

    def __init__(self, collate: Any, name: str, change: Change, seed: int) -> None:
        super().__init__(seed)
        self.collate, self.name, self.change = collate, name, change

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        changed = []
        for row in rows:
            values = np.asarray(row[self.name], dtype=np.float32)
            draw = np.random.default_rng([self.seed, self.epoch, zlib.crc32(values.tobytes())])
            changed.append({**row, self.name: self.change(values, draw, row)})
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


def varied_length(steps: int, speed: float) -> int:
    """Samples of a recording that is so many times as long."""
    return max(1, round(steps * speed))


def vary_recording(
    samples: np.ndarray, draw: np.random.Generator, row: Mapping[str, Any], shortest: int = 1
) -> np.ndarray:
    """Faster or slower by up to 12 %, of `shortest` samples at least, with noise at up to a tenth of its deviation."""
    length = max(shortest, varied_length(len(samples), draw.uniform(FASTEST, SLOWEST)))
    places = np.linspace(0, len(samples) - 1, length)
    varied = np.interp(places, np.arange(len(samples)), samples)
    return (varied + draw.uniform(0, 0.1) * draw.standard_normal(length)).astype(np.float32)


def vary_picture(shape: tuple[int, int, int], move: bool, flip: bool) -> Change:
    """If `move`, moved by up to a fourteenth of its sides, its edges going on; if `flip`, half of them mirrored."""
    reach = [max(1, side // 14) if move else 0 for side in shape[1:]]

    def change(values: np.ndarray, draw: np.random.Generator, row: Mapping[str, Any]) -> np.ndarray:
        x = values.reshape(shape)
        padded = np.pad(x, ((0, 0), *((size, size) for size in reach)), mode="edge")
        top, left = (int(draw.integers(0, 2 * size + 1)) for size in reach)
        x = padded[:, top : top + shape[1], left : left + shape[2]]
        return np.ascontiguousarray(x[..., ::-1] if flip and draw.random() < 0.5 else x).reshape(-1)

    return change


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
    """The column `labels`, if they are known."""
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
