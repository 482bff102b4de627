"""Tables of recordings and pictures: finding their column, and reading its cells or the files it names."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..hub.audio import waveform
from .tables import TABLE_FORMATS, read_column, read_examples, require

if TYPE_CHECKING:
    from datasets import Dataset

AUDIO_COLUMNS = ("audio", "waveform", "speech", "recording", "sound", "path", "file")
IMAGE_COLUMNS = ("image", "img", "picture", "pixels", "pixel_values", "path", "file")
RATE_COLUMNS = ("sampling_rate", "sample_rate", "rate")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".aiff", ".au")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")


def read_signals(path: str | Path, suffixes: Sequence[str]) -> "Dataset":
    """Read one split: a table, or a folder with one sub-folder of files per label.

    Rows of a folder have `path`, `file` and `label`. For files named in a table, see `files_beside`.

    Raises:
        FileNotFoundError, ValueError: as in `read_examples`; or the folder contains no such files.
    """
    datasets, path = require("datasets"), Path(path)
    if not path.is_dir():
        if path.suffix.lower() not in TABLE_FORMATS:
            raise ValueError(
                f"`{path}` has an unknown extension. Give a file ending in {', '.join(TABLE_FORMATS)}, or a folder "
                f"that holds one sub-folder per label, with files ending in {', '.join(suffixes)}."
            )
        return read_examples(path)
    files = [file for file in sorted(path.glob("*/**/*")) if file.suffix.lower() in suffixes and file.is_file()]
    rows = [
        {"path": str(file), "file": file.relative_to(path).as_posix(), "label": file.relative_to(path).parts[0]}
        for file in files
        if not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not rows:
        raise ValueError(
            f"`{path}` holds no files ending in {', '.join(suffixes)}. A folder needs one sub-folder per label, with "
            "such files in it."
        )
    return datasets.Dataset.from_list(rows)


def files_beside(dataset: "Dataset", column: str, folder: Path) -> "Dataset":
    """Resolve relative file names in a column, or in cells with a `path` and no `bytes`, against the table's folder.

    Empty cells stay empty.
    """
    feature, dataset = dataset.features[column], undecoded(dataset, column)
    kind = dataset.features[column]
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        pa, cells = require("pyarrow"), dataset.data.column(column)
        fields = [field.name for field in cells.type] if pa.types.is_struct(cells.type) else []
        holds_all = "bytes" in fields and not require("pyarrow.compute").struct_field(cells, "bytes").null_count
        if "path" not in fields or holds_all:
            return dataset.cast_column(column, feature)

    def beside(cell: Any) -> Any:
        if isinstance(cell, dict):
            return cell if cell.get("bytes") else {**cell, "path": beside(cell["path"])}
        if cell is None or not cell.strip():
            return None
        return cell if Path(cell).is_absolute() else str(folder / cell)

    found = [beside(cell) for cell in read_column(dataset, column)]
    old = f"{column} as written"
    dataset = dataset.rename_column(column, old).add_column(column, found, feature=kind).remove_columns(old)
    return dataset.cast_column(column, feature)


def holds_samples(dataset: "Dataset", column: str) -> bool:
    """Whether cells are lists of samples, which do not include their sampling rate."""
    return type(dataset.features[column]).__name__ in ("List", "LargeList", "Sequence")


def find_signal_column(dataset: "Dataset", name: str | None, usual: Sequence[str], option: str) -> str:
    """Return the named column, else one of type `Audio` or `Image`, else one with a usual name.

    Raises:
        ValueError: the named column is missing, or none is found.
    """
    names, listed = dataset.column_names, ", ".join(f"`{name}`" for name in dataset.column_names)
    if name is not None:
        if name not in names:
            raise ValueError(f"There is no column `{name}`. The columns are {listed}.")
        return name
    kinds = [key for key in names if type(dataset.features[key]).__name__ in ("Audio", "Image")]
    found = next(iter(kinds), None) or next((key for key in usual if key in names), None)
    if found is None:
        raise ValueError(f"Which column holds the data? The columns are {listed}. Name it with `{option}`.")
    return found


def undecoded(dataset: "Dataset", column: str) -> "Dataset":
    """Keep cells of sounds and pictures as bytes or paths: the decoders of `datasets` may not be installed."""
    datasets = require("datasets")
    kind = type(dataset.features[column]).__name__
    if kind in ("Audio", "Image"):
        return dataset.cast_column(column, getattr(datasets, kind)(decode=False))
    return dataset


def stored_rate(dataset: "Dataset", column: str, rate_column: str | None) -> int | None:
    """Return the sampling rate of the first recording, from a column, its cell or its file; None for bare samples.

    Raises:
        ValueError: the first recording is missing or cannot be read.
    """
    row = undecoded(dataset, column)[0]
    cell = row[column]
    source = cell.get("bytes") or cell.get("path") if isinstance(cell, dict) else cell
    try:
        if rate_column is not None:
            return _rate(row[rate_column])
        if isinstance(cell, dict) and cell.get("sampling_rate"):
            return _rate(cell["sampling_rate"])
        if holds_samples(dataset, column):
            return None
        if not source:
            raise ValueError("There is no recording.")
        try:
            sound = io.BytesIO(source) if isinstance(source, bytes) else source
            return int(require("soundfile").info(sound).samplerate)
        except (RuntimeError, ValueError, TypeError):
            waveform(source, 1)  # raises an error that says what is wrong
            raise
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"Row 0: {error}") from error


def _rate(cell: Any) -> int:
    if cell is None or (isinstance(cell, str) and not cell.strip()) or cell != cell:
        raise ValueError("There is no sampling rate.")
    return int(cell)


def recordings(
    dataset: "Dataset", column: str, rate: int, rate_column: str | None, from_rate: int | None = None
) -> Iterator[np.ndarray]:
    """Yield (N) float32 samples of every row, at the sampling rate `rate`.

    Args:
        from_rate: sampling rate of bare samples without a column of rates.

    Raises:
        ValueError: a recording is missing or invalid; the message names its row.
    """
    dataset = undecoded(dataset, column).select_columns([column, *([rate_column] if rate_column else [])])
    listed = holds_samples(dataset, column)
    width = getattr(getattr(dataset.features[column], "feature", None), "dtype", "")
    for number, row in enumerate(dataset.with_format("numpy") if listed else dataset):
        cell = row[column]
        if cell is not None and str(width).startswith(("int", "uint")):  # numpy's format widens it
            cell = np.asarray(cell).astype(width)
        try:
            if cell is None or (isinstance(cell, str) and not cell):
                raise ValueError("There is no recording.")
            yield waveform(cell, rate, _rate(row[rate_column]) if rate_column else from_rate)
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"Row {number}: {error}") from error


def pictures(dataset: "Dataset", column: str) -> Iterator[Any]:
    """Yield an RGB PIL image of every row: from files, bytes, arrays of numbers from 0 to 255, or flat square lists.

    Raises:
        ValueError: a picture is missing or invalid; the message names its row.
    """
    dataset = undecoded(dataset, column).select_columns(column)
    listed = type(dataset.features[column]).__name__ not in ("Value", "Image")
    for number, row in enumerate(dataset.with_format("numpy") if listed else dataset):
        try:
            yield picture(row[column])
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"Row {number}: {error}") from error


def picture(source: Any) -> Any:
    """Read one picture, as in `pictures`. Floats up to 1 range from black to white; transparency becomes white."""
    image_module = require("PIL.Image")
    name = f"`{source}`" if isinstance(source, str) else "The picture"
    if isinstance(source, dict):
        source = source.get("bytes") or source.get("path")
    if source is None or (isinstance(source, (str, bytes)) and not source):
        raise ValueError("There is no picture.")
    if isinstance(source, (str, bytes)):
        if isinstance(source, str) and not Path(source).is_file():
            raise FileNotFoundError(f"There is no picture {name}.")
        try:
            found = image_module.open(io.BytesIO(source) if isinstance(source, bytes) else source)
            found.load()
        except (OSError, SyntaxError, image_module.DecompressionBombError) as error:
            raise ValueError(f"{name} cannot be read as a picture: {error}") from error
    elif isinstance(source, image_module.Image):
        found = source
    else:
        found = image_module.fromarray(_pixels(np.asarray(source), name))
    if found.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in found.info:
        found = found.convert("RGBA")
        found = image_module.alpha_composite(image_module.new("RGBA", found.size, "white"), found)
    if found.mode.startswith("I"):  # 16 bits: PIL would clip values above 255
        values = np.asarray(found, dtype=np.float64)
        found = image_module.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
    return found.convert("RGB")


def _pixels(values: np.ndarray, name: str) -> np.ndarray:
    """Convert pixels to (H, W) or (H, W, 3 or 4) uint8; a list of S² numbers becomes a square."""
    if values.dtype.kind not in "iufb" or not values.size:
        raise ValueError(f"{name} is an array of {values.dtype}, shape {values.shape}; pixels are numbers.")
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError(f"{name} holds NaN or infinity.")
    if values.min() < 0 or values.max() > 255:
        raise ValueError(f"{name} has values from {values.min()} to {values.max()}; pixels are 0 … 255.")
    if values.ndim == 1:
        side = round(len(values) ** 0.5)
        if side * side != len(values):
            raise ValueError(f"{name} is a list of {len(values)} numbers, which is no square. Give rows of pixels.")
        values = values.reshape(side, side)
    if values.ndim == 3 and values.shape[0] in (1, 3, 4) and values.shape[2] not in (1, 3, 4):
        values = np.moveaxis(values, 0, -1)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (3, 4)):
        raise ValueError(f"{name} has the shape {values.shape}; it must be rows and columns, and 1, 3 or 4 channels.")
    scale = 255 if values.dtype.kind == "f" and values.max() <= 1 else 1
    return (values * scale).round().astype(np.uint8)
