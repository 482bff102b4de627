"""Reading a user's own tables and texts: which files, which columns, which part is held out.

`datasets` is imported only inside the functions that need it, so importing this module costs nothing.
"""

import importlib
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def require(module: str) -> ModuleType:
    """Import an optional dependency, or a module that has some. If one is missing, the error names the extra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        cause: Any = error
        while cause is not None and getattr(cause, "name", None) is None:  # transformers' lazy imports hide it
            cause = cause.__cause__
        missing = module if cause is None else cause.name
        raise ImportError(f"This needs `{missing}`. Install it with `pip install 'hf_reformer[train]'`.") from error


TABLE_FORMATS: dict[str, tuple[str, dict]] = {
    ".csv": ("csv", {"keep_default_na": False, "na_values": [""]}),  # "None" and "NA" are words like any other
    ".tsv": ("csv", {"keep_default_na": False, "na_values": [""], "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}


def read_examples(path: str | Path, texts: Sequence[str] = ()) -> "Dataset":
    """Read one split: a csv, tsv, json, jsonl or parquet file, or a folder with one sub-folder of texts per label.

    Args:
        texts: columns of strings. Otherwise "007" in a csv or tsv file becomes 7. An empty cell is None.
    """
    datasets = require("datasets")
    path = Path(path)
    if path.is_dir():
        return _read_text_folder(path)
    if path.suffix.lower() not in TABLE_FORMATS:
        raise ValueError(
            f"`{path}` has an unknown extension. Give a file ending in {', '.join(TABLE_FORMATS)}, or "
            "a folder that holds one sub-folder of text files per label."
        )
    if not path.exists():
        raise FileNotFoundError(f"There is no file `{path}`.")
    if not path.stat().st_size:
        raise ValueError(f"`{path}` is empty: not even the names of its columns can be read. Leave it out.")
    reader, options = TABLE_FORMATS[path.suffix.lower()]
    if reader == "csv":
        options = {**options, "converters": dict.fromkeys(texts, str)}
    try:
        return datasets.load_dataset(reader, data_files={"train": str(path)}, split="train", **options)
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        raise ValueError(f"`{path}` holds no row.") from error


def read_hub_dataset(name: str, config: str | None = None, alternative: str = "--train_file", **options: Any) -> Any:
    """A data set on the Hub; ConnectionError, which names an alternative, if it cannot be read."""
    try:
        return require("datasets").load_dataset(name, config, **options)
    except OSError as error:
        raise ConnectionError(
            f"The data set `{name}` could not be read from the Hub. Without a connection, use {alternative}."
        ) from error


def _read_text_folder(folder: Path) -> "Dataset":
    rows = [
        {
            "text": file.read_text(encoding="utf-8", errors="replace"),
            "label": file.relative_to(folder).parts[0],
            "path": file.relative_to(folder).as_posix(),
        }
        for file in sorted(folder.glob("*/**/*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not rows:
        raise ValueError(f"`{folder}` holds no texts. A folder needs one sub-folder per label, with text files in it.")
    return require("datasets").Dataset.from_list(rows)


class Columns(NamedTuple):
    """Which columns of a table hold the text, the second text of a pair, and the label."""

    text: str
    pair: str | None
    label: str | None


_TEXT_COLUMNS = ("text", "sentence", "document", "content", "review", "body", "article")
_PAIR_COLUMNS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("question1", "question2"),
    ("text1", "text2"), ("query", "document"), ("question", "context"),
)  # fmt: skip
_LABEL_COLUMNS = ("label", "labels", "target", "class", "category", "score")


def find_columns(
    dataset: "Dataset", text: str | None = None, pair: str | None = None, label: str | None = None
) -> Columns:
    """Use the columns that are named, and find the others by their usual names.

    A table without a label column gives `label=None`; one whose text column is unclear raises ValueError.
    """
    names = dataset.column_names
    listed = ", ".join(f"`{name}`" for name in names)
    for name in (text, pair, label):
        if name is not None and name not in names:
            raise ValueError(f"There is no column `{name}`. The columns are {listed}.")
    label = label or next((name for name in _LABEL_COLUMNS if name in names and name not in (text, pair)), None)
    if text is None and pair is None and "text" not in names:
        text, pair = next((both for both in _PAIR_COLUMNS if {*both} <= {*names}), (None, None))
    if text is None:
        kinds = {name: getattr(dataset.features[name], "dtype", None) for name in names if name not in (pair, label)}
        strings = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
        text = next((name for name in _TEXT_COLUMNS if name in strings), strings[0] if len(strings) == 1 else None)
    if text is None:
        raise ValueError(f"Which column holds the text? The columns are {listed}. Name it with `--text_column`.")
    return Columns(text, pair, label)


def check_columns(dataset: "Dataset", split: str, names: Iterable[str | None], advice: str = "") -> None:
    """Raise ValueError unless the dataset has all columns that are named."""
    if missing := [name for name in names if name is not None and name not in dataset.column_names]:
        raise ValueError(f"The {split} data has no column {missing}; its columns are {dataset.column_names}. {advice}")


def hold_out(dataset: "Dataset", label_column: str | None, fraction: float, seed: int) -> "DatasetDict":
    """Split off random validation data; with labels, stratified: shuffle, sort by label, take every n-th row."""
    if label_column is None:
        parts = dataset.train_test_split(test_size=fraction, seed=seed)
        return require("datasets").DatasetDict(train=parts["train"], validation=parts["test"])
    labels = dataset[label_column]
    order = list(range(len(dataset)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda row: labels[row])
    step = max(2, round(1 / fraction))
    chosen = set(order[step // 2 :: step])
    return require("datasets").DatasetDict(
        train=dataset.select([row for row in range(len(dataset)) if row not in chosen]),
        validation=dataset.select(sorted(chosen)),
    )
