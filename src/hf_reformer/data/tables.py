"""Reading users' own tables and texts, in various formats. For the roles of their columns, see `columns`.

`datasets` is imported only inside the functions that need it, so importing this module costs nothing.
"""

import codecs
import csv
import importlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from datasets import Dataset


def require(module: str) -> ModuleType:
    """Import an optional dependency, or a module that needs some. If one is missing, the error names the extra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        cause: Any = error
        while cause is not None and getattr(cause, "name", None) is None:  # transformers' lazy imports hide it
            cause = cause.__cause__
        missing = module if cause is None else cause.name
        extra = "signals" if missing in _OF_SIGNALS else "train"
        raise ImportError(f"This needs `{missing}`. In a clone: `pip install -e '.[{extra}]'`.") from error


_OF_SIGNALS = {"PIL", "jiwer", "scoringrules", "soundfile"}  # in an extra of their own
TABLE_FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
_BATCH = 10_000  # rows of a table converted at a time
_MANY_NAMES = 1000  # of a column's objects; if there are more, and most are absent, they are data
_BYTE_ORDER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_COMPRESSED = {
    rb"\x1f\x8b": "gzip",
    rb"PK\x03\x04": "zip",
    rb"BZh[1-9]1AY&SY": "bzip2",
    rb"\xfd7zXZ\x00": "xz",
    rb"\x28\xb5\x2f\xfd": "zstd",
    rb"7z\xbc\xaf\x27\x1c": "7z",
}


def text_encoding(path: str | Path) -> str:
    """Return the encoding of a text file: that of its byte order mark, else UTF-8. Reads the whole file.

    Raises:
        ValueError: the file is not text in that encoding, or compressed; the message says what is wrong, and where.
    """
    with open(path, "rb") as file:
        block = file.read(2**20)
        for pattern, name in _COMPRESSED.items():
            if re.match(pattern, block):
                raise ValueError(f"`{path}` is compressed ({name}), so its bytes are not text. Unpack it first.")
        encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if block.startswith(mark)), "utf-8")
        decoder, done, characters = codecs.getincrementaldecoder(encoding)(), 0, 0
        while True:
            before = done - len(decoder.getstate()[0])  # bytes of an incomplete character are kept for the next block
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                wrong = f"byte 0x{error.object[error.start]:02x} at position {before + error.start}"
                name = encoding.upper().removesuffix("-SIG")
                raise ValueError(f"`{path}` is not valid {name} text: {wrong}. Save it as UTF-8.") from None
            if "\0" in text:
                position = characters + text.index("\0")
                raise ValueError(f"`{path}` is not a text file: character {position} is NUL. Save it as UTF-8.")
            if not block:
                return encoding
            done, characters = done + len(block), characters + len(text)
            block = file.read(2**20)


def open_text(path: str | Path, newline: str | None = None) -> TextIO:
    """Open a text file in its own encoding, without its byte order mark; errors as in `text_encoding`."""
    return open(path, encoding=text_encoding(path), newline=newline)


def read_text(path: str | Path) -> str:
    """Read the whole text of a file; errors as in `text_encoding`."""
    with open_text(path) as file:
        return file.read()


def read_examples(path: str | Path) -> "Dataset":
    """Read one split: a csv, tsv, json, jsonl or parquet file, or a folder with one sub-folder of texts per label.

    Cells are kept as written: all cells of a csv or tsv file are strings, even "007" and "NA". Types are not guessed
    from a file's first rows: if a json column has cells of several types, all become strings.

    Raises:
        FileNotFoundError, ValueError: the file is missing, empty, damaged, not text or in another format.
    """
    datasets = require("datasets")
    path = Path(path)
    if path.is_dir():
        return _read_text_folder(path)
    suffix = path.suffix.lower()
    if suffix not in TABLE_FORMATS:
        raise ValueError(
            f"`{path}` has an unknown extension. Give a file ending in {', '.join(TABLE_FORMATS)}, or "
            "a folder that holds one sub-folder of text files per label."
        )
    if not path.exists():
        raise FileNotFoundError(f"There is no file `{path}`.")
    if not path.stat().st_size:
        raise ValueError(f"`{path}` is empty: not even the names of its columns can be read. Leave it out.")
    if suffix == ".parquet":
        return _read_parquet(path)
    delimiter = "\t" if suffix == ".tsv" else ","
    rows = partial(_json_rows, path) if suffix.startswith(".json") else partial(_csv_rows, path, delimiter)
    try:
        dataset = datasets.Dataset(_to_arrow(rows, path))
    except (require("pyarrow").ArrowException, RecursionError) as error:
        raise ValueError(f"`{path}` cannot be read as a table: {error}") from error
    if not len(dataset):
        raise ValueError(f"`{path}` holds no row.")
    return dataset


def _read_parquet(path: Path) -> "Dataset":
    datasets = require("datasets")
    # Its cache identifies files by path and modification time, which copying can set. Nothing sets the change time.
    name, dataset = str(path.stat().st_ctime_ns), None
    try:
        if require("pyarrow.parquet").read_metadata(path).num_rows:
            dataset = datasets.load_dataset("parquet", name, data_files={"train": str(path)}, split="train")
            dataset.data.validate(full=True)  # including that strings are text
    except (datasets.exceptions.DatasetGenerationError, ValueError, OSError) as error:
        raise ValueError(f"`{path}` cannot be read as parquet: {error.__cause__ or error}") from error
    if dataset is None:
        raise ValueError(f"`{path}` holds no row.")
    return dataset


def _csv_rows(path: Path, delimiter: str) -> Iterator[dict[str, Any]]:
    """Yield the rows with every cell as written, "" for an empty one."""
    limit = csv.field_size_limit(2**31 - 1)
    reader = None
    try:
        with open_text(path, newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            header = [name or f"Unnamed: {i}" for i, name in enumerate(next(reader, []))]
            if twice := sorted({name for name in header if header.count(name) > 1}):
                raise ValueError(f"`{path}` has several columns called {twice}. Rename all but one.")
            for cells in reader:
                if len(cells) not in (0, len(header)):
                    raise ValueError(
                        f"`{path}`, line {reader.line_num}: there are {len(cells)} cells, but the first line names "
                        f"{len(header)} columns. A cell that holds {delimiter!r} needs double quotes around it."
                    )
                if cells:  # an empty line is not a row
                    yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        line = reader.line_num if reader is not None else 1
        raise ValueError(f"`{path}`, line {line}: {error}. Look at the double quotes there.") from error
    finally:
        csv.field_size_limit(limit)


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file: one object per line, or a list of objects or texts, or an object of columns."""
    with open_text(path, newline="\n") as file:
        number, line = 1, file.readline()
        while line and not line.strip():
            number, line = number + 1, file.readline()
        try:
            first = _json(line or "[]", path, number)
        except ValueError as error:
            if not isinstance(error.__cause__, json.JSONDecodeError):
                raise
            first = None  # the value continues on the next line
        if not isinstance(first, dict):
            file.seek(0)
            yield from _json_objects(_json(file.read(), path), path)
            return
        rest = ((number, line) for number, line in enumerate(file, start=number + 1) if line.strip())
        second = next(rest, None)
        if second is None and path.suffix.lower() == ".json":
            yield from _json_objects(first, path)
            return
        yield first
        for number, line in chain([second] if second else [], rest):
            row = _json(line.strip(), path, number)
            if not isinstance(row, dict):
                raise ValueError(f"`{path}`, line {number}: a {type(row).__name__}, where a row is an object.")
            yield row


def _json(text: str, path: Path, line: int = 1) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"`{path}`, line {line}: {error.object[error.start]!r} is half a character.") from error
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise ValueError(f"`{path}`, line {line}, is not valid JSON: {error}. Write one object per line.") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = sorted(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"one object has several values called {twice[:5]}")
    return value


def _json_objects(value: Any, path: Path) -> list[dict[str, Any]]:
    """Return the rows of a whole JSON value."""
    columns = list(value.values()) if isinstance(value, dict) else []
    several = len(columns) > 1 or (columns and isinstance(columns[0], dict) and len(columns[0]) > 1)
    if several and all(isinstance(x, dict) and [*x] == [*columns[0]] and all(map(str.isdecimal, x)) for x in columns):
        columns = [list(x.values()) for x in columns]  # pandas' default format, by row numbers
    elif not all(isinstance(x, list) for x in columns):
        columns = []
    if columns and len({len(x) for x in columns}) == 1:
        return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
    rows = [{"text": x} if isinstance(x, str) else x for x in (value if isinstance(value, list) else [value])]
    if wrong := next((x for x in rows if not isinstance(x, dict)), None):
        raise ValueError(f"`{path}` holds {str(wrong)[:40]!r}, where a row is an object.")
    return rows


def _to_arrow(read: Callable[[], Iterator[dict[str, Any]]], path: Path) -> Any:
    """Make a table of rows. They are read again if a column has cells of several types, which become strings."""
    pa = require("pyarrow")
    parts: list[dict[str, Any]] = []  # one per batch of rows; a name that occurred is in all later ones
    sizes: list[int] = []
    rows = read()
    while batch := list(islice(rows, _BATCH)):
        names = dict.fromkeys(chain.from_iterable([*parts[-1:], *batch]))
        if _mostly_absent(len(names), batch):
            raise ValueError(
                f"The rows of `{path}` have {len(names):,} names, most of them in a few rows alone. Give all rows the "
                "same few names, and put what differs into cells."
            )
        parts.append({name: _array([row.get(name) for row in batch]) for name in names})
        sizes.append(len(batch))
    table, mixed = dict.fromkeys(parts[-1] if parts else ()), dict[str, list[Any]]()
    for name in table:
        arrays = [part.get(name, pa.nulls(size)) for part, size in zip(parts, sizes, strict=True)]
        try:
            columns = [pa.table([array], [name]) for array in arrays]
            kind = pa.unify_schemas([x.schema for x in columns], promote_options="permissive").field(0).type
            if len(columns) > 1 and kind.num_fields > _MANY_NAMES:
                raise TypeError("objects of many names")
            table[name] = pa.concat_tables(columns, promote_options="permissive")[name]
        except (pa.ArrowException, TypeError):
            mixed[name] = []
    for row in read() if mixed else ():
        for name, cells in mixed.items():
            cells.append(row.get(name))
    return pa.table({**table, **{name: pa.array(_as_written(cells)) for name, cells in mixed.items()}})


def _array(cells: list[Any]) -> Any:
    """Convert cells to an array; None if they are of several types."""
    pa = require("pyarrow")
    try:
        return None if _must_be_text(cells) else pa.array(cells)
    except (pa.ArrowException, OverflowError):
        return None


def _must_be_text(cells: list[Any]) -> bool:
    """Whether booleans, which pyarrow would make numbers, are among decimals, or objects have ever different names."""
    kinds = set(map(type, cells))
    lists = [cell for cell in cells if isinstance(cell, list)] if list in kinds else []
    objects = [cell for cell in cells if isinstance(cell, dict)] if dict in kinds else []
    inner: dict[str, list[Any]] = {}
    for name, value in chain.from_iterable(map(dict.items, objects)):
        inner.setdefault(name, []).append(value)
    if {bool, float} <= kinds or _mostly_absent(len(inner), objects):
        return True
    return any(map(_must_be_text, [*inner.values(), *([list(chain.from_iterable(lists))] if lists else [])]))


def _mostly_absent(names: int, objects: list[dict[str, Any]]) -> bool:
    """Whether columns of all names would have a hundred times as many cells as there are values."""
    return names > _MANY_NAMES and names * len(objects) > 100 * sum(map(len, objects))


def _as_written(cells: list[Any]) -> list[Any]:
    """Convert cells of several types to strings; if there are lists, and no objects, all to lists of strings."""

    def text(cell: Any) -> str | None:
        return json.dumps(cell, ensure_ascii=False) if isinstance(cell, (dict, list)) else cell_text(cell)

    if any(isinstance(cell, dict) for cell in cells) or not any(isinstance(cell, list) for cell in cells):
        return list(map(text, cells))
    lists = (cell if cell is None or isinstance(cell, list) else [cell] for cell in cells)
    return [None if one is None else list(map(text, one)) for one in lists]


def cell_text(cell: Any) -> str | None:
    """Convert a cell to text: strings stay as they are, other values as Python writes them; None for an empty cell.

    Raises:
        ValueError: the cell is a list, an object or bytes.
    """
    if cell is None or isinstance(cell, str):
        return cell
    if isinstance(cell, (dict, list, bytes)):
        raise ValueError(f"A cell holds no text, but {str(cell)[:60]!r} ({type(cell).__name__}).")
    return None if cell != cell else str(cell)


def read_column(dataset: "Dataset", name: str) -> list[Any]:
    """Return all cells of a column at once; reading them one by one takes a hundred times as long."""
    return dataset[name][:]


def read_named_dataset(name: str, config: str | None = None, alternative: str = "--train_file", **options: Any) -> Any:
    """Load a dataset from the Hub or a local folder, with all its splits.

    Raises:
        ConnectionError: it cannot be read from the Hub; the message names an alternative.
        ValueError: it cannot be read from the folder, or it is a script.
    """
    datasets = require("datasets")
    local = Path(name).is_dir()
    try:
        return datasets.load_dataset(name, config, **options)
    except RuntimeError as error:
        if "scripts" not in str(error):
            raise
        raise ValueError(
            f"The dataset `{name}` is a script, which datasets does not run. Name a copy of it in parquet files, or "
            f"use {alternative}."
        ) from error
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        if local:
            cause = " ".join(str(error.__cause__ or error).split())
            raise ValueError(
                f"`{name}` cannot be read by datasets.load_dataset: {cause} Give its files by {alternative}."
            ) from error
        if not isinstance(error, OSError):
            raise
        raise ConnectionError(
            f"The dataset `{name}` is no folder here and could not be read from the Hub. Without a connection, use "
            f"{alternative}."
        ) from error


def _read_text_folder(folder: Path) -> "Dataset":
    rows = [
        {
            "text": read_text(file),
            "label": file.relative_to(folder).parts[0],
            "path": file.relative_to(folder).as_posix(),
        }
        for file in sorted(folder.glob("*/**/*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not rows:
        raise ValueError(f"`{folder}` holds no texts. A folder needs one sub-folder per label, with text files in it.")
    return require("datasets").Dataset.from_list(rows)
