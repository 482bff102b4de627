"""Options of recipes for recordings and pictures: where they are, and how they are given to the model."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    Speech2TextFeatureExtractor,
    Wav2Vec2FeatureExtractor,
)

from ..data.columns import check_columns
from ..data.demo_signals import handwritten_digits
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
from ..models.frontend import count_frames
from .data_setup import SplitArguments
from .model_setup import BackboneArguments, check_same_as_saved, make_model, option, parse_overrides
from .signals import SLOWEST, STEP_MS, hears_features, in_memory, steps_per_second, varied_length

NO_RATE = (
    "The recordings are samples without a sampling rate. Name a column of rates by --sampling_rate_column, or give "
    "the rate of all by --sampling_rate."
)
LOG_MEL = "log_mel"
FRAME_MS, STRIDE_MS = 25.0, 10.0  # of a new model
SHORTEST_GAIN_MS = 10
SHORTEST_MS = 25  # window of one step of log-mel features


@dataclass
class SignalArguments(SplitArguments):
    """Options shared by recordings and pictures; class variables say which of the two."""

    suffixes: ClassVar[tuple[str, ...]] = ()  # of the files to read in a folder
    usual_columns: ClassVar[tuple[str, ...]] = ()
    column_option: ClassVar[str] = ""  # the option that names the column of the recordings or pictures

    baselines: bool = option(False, "Also evaluate a trivial baseline and a simple, strong one.")

    def read_file(self, file: str) -> Dataset:
        dataset = read_signals(file, self.suffixes)
        if Path(file).is_dir():
            return dataset
        try:
            return files_beside(dataset, self.column(dataset), Path(file).parent)
        except ValueError as error:
            raise ValueError(f"{error} (This is `{file}`.)") from error

    def column(self, dataset: Dataset) -> str:
        """Return the column of the recordings or pictures, or of their file names."""
        given = getattr(self, self.column_option)
        return find_signal_column(dataset, given, self.usual_columns, f"--{self.column_option}")


@dataclass
class InputArguments(SignalArguments):
    """`SignalArguments`, with augmentation of the training data and prediction of files."""

    kind_of_file: ClassVar[str] = ""

    augment: bool = option(True, "Augment the training data, differently in every epoch; see the documentation.")
    predict_file: str | None = option(None, "A file, or a folder of files, to predict at the end.")

    def check(self, model: BackboneArguments, args: Any) -> None:
        super().check(model, args)
        if self.predict_file is not None and not self.files_to_predict():
            raise ValueError(
                f"--predict_file: there is no {self.kind_of_file} `{self.predict_file}`, nor a folder of them."
            )

    def files_to_predict(self) -> list[str]:
        """Return the files that --predict_file names."""
        if self.predict_file is None:
            return []
        path = Path(self.predict_file)
        files = [path] if path.is_file() else sorted(x for x in path.rglob("*") if x.suffix.lower() in self.suffixes)
        return [str(file) for file in files]


@dataclass
class LabelArguments(InputArguments):
    """`InputArguments` for classification."""

    label_column: str | None = option(None, "Default: found by name.")


@dataclass
class PictureArguments(SignalArguments):
    """Options of pictures."""

    sources = ("demo",)
    suffixes = PICTURES
    usual_columns = IMAGE_COLUMNS
    column_option = "image_column"

    demo: bool = option(False, "Complete run without a download: handwritten digits of scikit-learn.")
    image_column: str | None = option(None, "Images, pixels or file names. Default: found by name or type.")
    image_size: int | None = option(
        None, "Height and width that images are resized to. Default: those of the first one."
    )

    def read_source(self) -> Mapping[str, Dataset]:
        return handwritten_digits() if self.demo else super().read_source()

    def describe(self) -> str:
        return "handwritten digits of scikit-learn" if self.demo else super().describe()

    def size(self, first: Dataset) -> tuple[int, int]:
        """Return the height and width of a new model's pictures."""
        if self.image_size is not None:
            return self.image_size, self.image_size
        width, height = next(pictures(first, self.column(first))).size
        return height, width

    def check_size(self, name: str, height: int, width: int) -> None:
        """Raise ValueError if the requested size differs from that of the saved model `name`."""
        check_same_as_saved(name, self, {"image_size": height if height == width else f"{height} × {width}"})


@dataclass
class AudioArguments(InputArguments):
    """Options of recordings."""

    suffixes = SOUNDS
    usual_columns = AUDIO_COLUMNS
    column_option = "audio_column"
    kind_of_file = "sound file"

    audio_column: str | None = option(None, "Recordings, samples or file names. Default: found by name or type.")
    sampling_rate_column: str | None = option(None, "Sampling rates of samples. Default: found by name.")
    sampling_rate: int | None = option(
        None, "In Hz; recordings are resampled to it. Default: that of the first one. It is also the rate of "
        "samples without one.",
    )  # fmt: skip
    features: str | None = option(
        None, "Input of the model: the waveform, or log_mel, 80 features every 10 ms at 16 kHz. Default: waveform.",
        choices=["waveform", LOG_MEL],
    )  # fmt: skip
    frame_ms: float | None = option(
        None, "Milliseconds per frame; each frame is a token. Default: 25; with log_mel, one feature step."
    )
    stride_ms: float | None = option(None, "Milliseconds from the start of one frame to the next. Default: 10.")
    frame_transform: str | None = option(
        None, "Tokens are made from a frame's log power spectrum, or (linear) from its samples. Default: spectrum.",
        choices=["spectrum", "linear"],
    )  # fmt: skip
    gain_ms: float | None = option(
        None, "Automatic gain control: subtract the mean of the samples within so many milliseconds and divide by "
        "their standard deviation, for recordings whose loudness changes. Default: 0, none.",
    )  # fmt: skip

    def check(self, model: BackboneArguments, args: Any) -> None:
        super().check(model, args)
        frame, stride = self.sizes(self.features == LOG_MEL).values()
        if stride > frame and model.model_name_or_path is None:
            raise ValueError(
                f"--stride_ms {stride:g} is more than --frame_ms {frame:g}, so nothing would hear the samples between "
                "frames. Lower it."
            )
        if self.features == LOG_MEL and self.frame_transform == "spectrum":
            raise ValueError(
                f"--frame_transform spectrum is of a waveform, and --features {LOG_MEL} are spectra. Leave it out."
            )
        if self.gain_ms and not SHORTEST_GAIN_MS <= self.gain_ms < math.inf:
            raise ValueError(
                f"--gain_ms {self.gain_ms:g}: loudness cannot be measured within that time. Give 0 for none, or "
                f"{SHORTEST_GAIN_MS} or more; 1000 is about right for speech."
            )
        if self.gain_ms and self.features == LOG_MEL:
            raise ValueError(f"--gain_ms {self.gain_ms:g} is for waveforms, not --features {LOG_MEL}. Leave one out.")
        for name, ms in self.sizes(mels=True).items() if self.features == LOG_MEL else ():
            if ms % STEP_MS:
                raise ValueError(f"--{name} {ms:g}: {LOG_MEL} features are {STEP_MS} ms apart. Give a multiple.")

    def sizes(self, mels: bool) -> dict[str, float]:
        """Return the milliseconds per frame and between the starts of frames, for log-mel features or a waveform."""
        frame = self.frame_ms or (STEP_MS if mels else FRAME_MS)
        return {"frame_ms": frame, "stride_ms": self.stride_ms or (STEP_MS if mels else STRIDE_MS)}

    def columns(self, dataset: Dataset) -> tuple[str, str | None]:
        """Return the columns of the recordings and of their sampling rates, None if there is no such column."""
        rate = self.sampling_rate_column or next((name for name in RATE_COLUMNS if name in dataset.column_names), None)
        if rate is not None:
            check_columns(dataset, "first", [rate])
        return self.column(dataset), rate

    def extractor(self, model: BackboneArguments, first: Dataset) -> Any:
        """Make the feature extractor: that of the saved model, one for log-mel features, or one for waveforms.

        The sampling rate of waveforms is the one requested, or else that of the data.
        """
        audio, rate_column = self.columns(first)
        if model.model_name_or_path is not None:
            if Path(model.model_name_or_path).is_dir():
                check_own_files(Path(model.model_name_or_path))
            found = AutoFeatureExtractor.from_pretrained(model.model_name_or_path)
            who = f"`{model.model_name_or_path}`"
        elif self.features == LOG_MEL:
            found, who = Speech2TextFeatureExtractor(normalize_vars=False), LOG_MEL  # silence would give NaN
        if model.model_name_or_path is not None or self.features == LOG_MEL:
            tells = rate_column is not None or not holds_samples(first, audio)
            if tells and self.sampling_rate not in (None, found.sampling_rate):
                raise ValueError(
                    f"--sampling_rate {self.sampling_rate}: {who} expects {found.sampling_rate} Hz. Leave the "
                    "option out: these recordings specify their own rate and are resampled."
                )
            return found
        rate = self.sampling_rate or stored_rate(first, audio, rate_column)
        if rate is None:
            raise ValueError(NO_RATE)
        return Wav2Vec2FeatureExtractor(sampling_rate=rate, return_attention_mask=True, do_normalize=True)

    def frame_fields(self, model: BackboneArguments, extractor: Any) -> dict[str, Any]:
        """Return the config fields that define frames, of a new model or the saved one.

        Raises:
            ValueError: the options differ from those of the saved model.
        """
        rate, mels = steps_per_second(extractor), hears_features(extractor)
        sizes = self.sizes(mels)
        size, stride = (max(1, round(rate * ms / 1000)) for ms in sizes.values())
        found: dict[str, Any] = {"frame_size": size, "frame_stride": min(size, stride)}
        found["frame_transform"] = self.frame_transform or ("linear" if mels else "spectrum")
        found["gain_window"] = round(rate * (self.gain_ms or 0) / 1000)
        found["num_input_features"] = extractor.feature_size
        if model.model_name_or_path is None:
            overrides = parse_overrides(model.config_overrides)
            return {name: overrides.get(name, value) for name, value in found.items()}
        saved: Any = AutoConfig.from_pretrained(model.model_name_or_path)
        same = {"frame_transform": saved.frame_transform, "features": LOG_MEL if mels else "waveform"}
        sizes["gain_ms"] = self.gain_ms or 0
        for name, field in (("frame_ms", "frame_size"), ("stride_ms", "frame_stride"), ("gain_ms", "gain_window")):
            value = getattr(saved, field)
            same[name] = sizes[name] if value == found[field] else round(1000 * value / rate, 3)
        check_same_as_saved(model.model_name_or_path, self, same)
        return {name: getattr(saved, name) for name in found}

    def hearing_model(
        self, auto_class: Any, model: BackboneArguments, tokenizer: Any, encoded: Mapping[str, Dataset],
        extractor: Any, **fields: Any,
    ) -> Any:  # fmt: skip
        """Make the saved model or a new one, with a position for every frame of the longest recording.

        Augmented training data may be longer than the original recordings, which is taken into account.

        Raises:
            ValueError: the model has too few positions.
        """
        frame = self.frame_fields(model, extractor)
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
                f"The longest recording has {count:,} frames, but the model has positions for only {covered:,}. "
                "Shorten the recording, or train a model with more positions or with --position_embedding_type "
                "rotary, which has no limit."
            )
        return found

    def encode(self, dataset: Dataset, extractor: Any, columns: Mapping[str, list[Any]] | None = None) -> Dataset:
        """Encode recordings as normalized `input_values` or `input_features` with their `length`; add `columns`."""
        audio, rate_column = self.columns(dataset)
        rate, name = extractor.sampling_rate, extractor.model_input_names[0]
        shortest = rate * SHORTEST_MS // 1000 if hears_features(extractor) else 1
        if rate_column is None and holds_samples(dataset, audio) and self.sampling_rate is None:
            raise ValueError(NO_RATE)

        def rows() -> Iterator[dict[str, Any]]:
            heard = recordings(dataset, audio, rate, rate_column, self.sampling_rate)
            for number, samples in enumerate(heard):
                if len(samples) < shortest:
                    raise ValueError(
                        f"Row {number}: The recording is shorter than {SHORTEST_MS} ms, which is too short to "
                        "compute features. Leave it out."
                    )
                values = np.asarray(extractor(samples, sampling_rate=rate)[name][0], dtype=np.float32)
                yield {name: values.reshape(-1), "length": len(values)}

        return in_memory(rows(), columns)
