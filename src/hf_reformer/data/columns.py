"""Roles in a table: which columns hold texts and labels, which splits and rows are trained on or held out."""

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .tables import read_column, require

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset


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
LABEL_COLUMNS = ("label", "labels", "target", "class", "category", "score")


def find_columns(
    dataset: "Dataset | IterableDataset", text: str | None = None, pair: str | None = None, label: str | None = None
) -> Columns:
    """Use the given column names, and find the other columns by their usual names.

    Without a label column, `label` is None.

    Raises:
        ValueError: a column is missing or given for two purposes, or it is unclear which one holds the text.
    """
    names = dataset.column_names or list(next(iter(dataset), {}))
    listed = ", ".join(f"`{name}`" for name in names)
    for name in (text, pair, label):
        if name is not None and name not in names:
            raise ValueError(f"There is no column `{name}`. The columns are {listed}.")
    check_distinct({"--text_column": text, "--text_pair_column": pair, "--label_column": label})
    label = label or next((name for name in LABEL_COLUMNS if name in names and name not in (text, pair)), None)
    if text is None and pair is None and "text" not in names:
        text, pair = next((both for both in _PAIR_COLUMNS if {*both} <= {*names} - {label}), (None, None))
    if text is None:
        known = dataset.features or dict.fromkeys(names, require("datasets").Value("string"))
        kinds = {name: getattr(known[name], "dtype", None) for name in names if name not in (pair, label)}
        text = next((name for name in _TEXT_COLUMNS if kinds.get(name) is not None), None)
        strings = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
        if text is None and len(strings) > 1:  # all columns of a csv file are strings
            strings = [x for x in strings if x not in LABEL_COLUMNS and not _holds_numbers(dataset, x)]
        text = text or (strings[0] if len(strings) == 1 else None)
    if text is None:
        raise ValueError(f"Which column holds the text? The columns are {listed}. Name it with `--text_column`.")
    return Columns(text, pair, label)


def _holds_numbers(dataset: Any, name: str) -> bool:
    cells = read_column(dataset, name) if hasattr(dataset, "__len__") else [row[name] for row in dataset.take(100)]
    return all(not cell or is_number(cell) for cell in cells)


_NUMBER = re.compile(r"\s*[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf(inity)?)\s*", re.IGNORECASE | re.ASCII)


def is_number(text: str) -> bool:
    """Whether a text is a number as people and programs write it, such as "-1.5e3", "nan" or "inf"."""
    return _NUMBER.fullmatch(text) is not None


def check_distinct(names: Mapping[str, str | None]) -> None:
    """Raise ValueError if two options name the same column."""
    given = [name for name in names.values() if name is not None]
    for name in given:
        if given.count(name) > 1:
            options = " and ".join(option for option, value in names.items() if value == name)
            raise ValueError(f"{options} both name the column `{name}`. Name two columns, or leave one option out.")


def labels_unknown(split: str, labels: Iterable[Any]) -> bool:
    """Whether a test split has no labels, only inputs to predict: each label is None, "", NaN or -1.

    A list of labels is unknown if all of its items are.
    """

    def unknown(label: Any) -> bool:
        if isinstance(label, list):
            return all(map(unknown, label))
        return label in (None, "", -1, "-1") or label != label

    return split.startswith("test") and all(map(unknown, labels))


def check_columns(dataset: "Dataset", split: str, names: Iterable[str | None], advice: str = "") -> None:
    """Raise ValueError unless the dataset has all the given columns."""
    if missing := [name for name in names if name is not None and name not in dataset.column_names]:
        raise ValueError(f"The {split} data has no column {missing}; its columns are {dataset.column_names}. {advice}")


def splits_of(part: str, names: Iterable[str]) -> list[str]:
    """Return the splits of a part: only `train` for training, else possibly several, such as `validation_matched`."""
    return [name for name in names if name == part or (part != "train" and name.split("_")[0] == part)]


def hold_out(
    dataset: "Dataset", label_column: str | None, fraction: float, seed: int, groups: Sequence[Any] | None = None
) -> "DatasetDict":
    """Split off random validation data; with labels, stratified: shuffle, sort by label, take rows evenly.

    Args:
        groups: the group of every row, such as its document. Rows of the same group stay together, so that training
            reveals nothing about the validation data. Ignored if all rows are of one group.

    Raises:
        ValueError: one of the two parts would be empty.
    """
    members: dict[Any, list[int]] = {}
    for row, group in enumerate(range(len(dataset)) if groups is None or len(set(groups)) < 2 else groups):
        members.setdefault(group, []).append(row)
    order, seen, chosen = list(members.values()), 0, set[int]()
    random.Random(seed).shuffle(order)
    if label_column is not None:
        labels = read_column(dataset, label_column)
        order.sort(key=lambda rows: labels[rows[0]])
    for rows in order:
        seen += len(rows)
        if 2 * (round(seen * fraction) - len(chosen)) >= len(rows):  # closer to the wanted size than without them
            chosen.update(rows)
    if not chosen and round(seen * fraction):  # all groups are larger than twice the part
        smallest = min(order, key=len)
        chosen.update(smallest)
    if not 0 < len(chosen) < seen:
        raise ValueError(
            f"--validation_fraction {fraction} of {seen} rows are {len(chosen)} rows, so there is nothing to "
            f"{'train' if chosen else 'evaluate'} on. Change it, or give a --validation_file."
        )
    return require("datasets").DatasetDict(
        train=dataset.select([row for row in range(len(dataset)) if row not in chosen]),
        validation=dataset.select(sorted(chosen)),
    )
