"""Convert audio to the format that models expect: mono float32 samples at the model's sampling rate."""

import importlib
import io
import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

CHANNELS = 8  # the most that a recording may have; tells which axis is channels


def waveform(source: Any, sampling_rate: int, from_rate: int | None = None) -> np.ndarray:
    """Convert a recording to (N) float32 samples at `sampling_rate`, N at least 1; channels are averaged.

    Args:
        source: a path or the bytes of a file that soundfile reads (wav, flac, ogg, mp3); samples as an array, tensor
            or list of floats or integers of any width; a mapping with `array` (or `raw`) and `sampling_rate`, or with
            `bytes` or `path`, as in columns of `datasets`; or an object with `get_all_samples`, such as torchcodec's
            decoders.
        from_rate: the sampling rate if `source` consists of samples; None: `sampling_rate`.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: soundfile or scipy is needed but not installed.
        ValueError: the source is not audio, is empty, contains NaN or infinity, or has axes that could be either
            channels or samples.
    """
    name = "The recording"
    if isinstance(source, Mapping):
        source = {key: value for key, value in source.items() if value is not None}
        kind = next((key for key in ("array", "raw", "bytes", "path") if key in source), None)
        if kind is None:
            raise ValueError(
                f"A recording is {sorted(source)}; it needs `array` and `sampling_rate`, `bytes` or `path`."
            )
        if kind in ("array", "raw") and "sampling_rate" not in source:
            raise ValueError(f"A recording has `{kind}` but no `sampling_rate`, without which it cannot be used.")
        source, from_rate = source[kind], source.get("sampling_rate", from_rate)
    if hasattr(source, "get_all_samples"):
        decoded = source.get_all_samples()
        source, from_rate = decoded.data, decoded.sample_rate
    if isinstance(source, (str, Path, bytes)):
        name = "The recording" if isinstance(source, bytes) else f"`{source}`"
        samples, from_rate = _read(source, name)
    else:
        samples = _as_floats(source, name)
    if samples.ndim > 1:
        samples = _mixed(samples, name)
    if not samples.size:
        raise ValueError(f"{name} is empty: it has no sample. Leave it out.")
    if not np.isfinite(samples).all():
        where = int((~np.isfinite(samples)).argmax())
        raise ValueError(f"{name} holds NaN or infinity, first at sample {where}. Repair it, or leave it out.")
    return resampled(samples, sampling_rate if from_rate is None else int(from_rate), sampling_rate)


def resampled(samples: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """Resample (N) float32 samples with a polyphase filter."""
    if from_rate < 1 or to_rate < 1:
        raise ValueError(f"Sampling rates of {from_rate} and {to_rate} Hz are not possible. Give at least 1.")
    if from_rate == to_rate:
        return samples
    signal = _needed("scipy.signal", f"to change the sampling rate from {from_rate} to {to_rate} Hz")
    shared = math.gcd(from_rate, to_rate)
    return signal.resample_poly(samples, to_rate // shared, from_rate // shared).astype(np.float32)


def _read(source: Any, name: str) -> tuple[np.ndarray, int]:
    soundfile = _needed("soundfile", "to read sound files")
    if not isinstance(source, bytes):
        if not Path(source).is_file():
            raise FileNotFoundError(f"There is no sound file {name}.")
        source = Path(source).read_bytes()
    if not source:
        raise ValueError(f"{name} is empty: it has no byte. Leave it out.")
    try:
        samples, rate = soundfile.read(io.BytesIO(source), dtype="float32", always_2d=True)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name} is no sound file that soundfile reads (wav, flac, ogg, mp3): {error}") from error
    return samples.mean(axis=1), rate


def _as_floats(source: Any, name: str) -> np.ndarray:
    """Convert samples to float32, scaling integers to the range from -1 to 1."""
    try:
        samples = np.asarray(source.detach().cpu() if hasattr(source, "detach") else source)
    except ValueError as error:
        raise ValueError(f"{name} is no array of samples: {error}") from error
    if samples.size and samples.dtype.kind not in "iuf":
        raise ValueError(f"{name} is an array of {samples.dtype}; samples are numbers.")
    if samples.dtype.kind == "i":
        largest = np.iinfo(samples.dtype).max
        if samples.itemsize == 8:  # a list, whose sample width is unknown; usually 16 bits
            largest = 2**15 - 1 if not samples.size or np.abs(samples).max() <= 2**15 else 2**31 - 1
        return (samples / (largest + 1.0)).astype(np.float32)
    if samples.dtype.kind == "u":
        middle = (np.iinfo(samples.dtype).max + 1) / 2
        return ((samples - middle) / middle).astype(np.float32)
    return samples.astype(np.float32)


def _mixed(samples: np.ndarray, name: str) -> np.ndarray:
    """Average the channels of (samples, channels) or (channels, samples)."""
    if samples.ndim > 2:
        raise ValueError(f"{name} has the shape {samples.shape}; it must be samples, or samples and channels.")
    few = [axis for axis in (0, 1) if samples.shape[axis] <= CHANNELS]
    if len(few) != 1:
        raise ValueError(
            f"{name} has the shape {samples.shape}, in which the channel axis is not clear. Give one channel."
        )
    return samples.mean(axis=few[0])


def _needed(module: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"`{package}` is needed {purpose}. In a clone: `pip install -e '.[signals]'`.") from error
