"""Interactions of users with items: reading tables of them, and the items of each user in order of time."""

import json
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers.utils import logging

from .columns import check_distinct
from .tables import cell_text, open_text, read_column, read_examples, require

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)

ATOMIC_FORMATS = (".inter", ".item", ".user")  # RecBole's


class InteractionColumns(NamedTuple):
    """Which columns hold the user, the item or list of items, the time or times, and the item to be recommended."""

    user: str
    item: str | None
    time: str | None = None
    target: str | None = None


# Usual names of columns, in lower case and without underscores.
_NAMES = {
    "user": ("userid", "user", "uid", "customerid", "customer", "reviewerid", "sessionid", "session", "visitorid"),
    "item": (
        *("itemids", "items", "itemidlist", "history", "itemid", "item", "iid", "movieid", "productid", "parentasin"),
        *("asin", "bookid", "trackid", "songid", "articleid", "sku", "gameid", "movie", "product", "book", "track"),
    ),
    "time": ("timestamps", "timestamp", "times", "time", "unixtime", "unixreviewtime", "datetime", "date"),
    "target": ("targetitemid", "targetitem", "target"),
}


def find_interaction_columns(dataset: "Dataset", **named: str | None) -> InteractionColumns:
    """Use the given columns (user, item, time, target), and find the others by their usual names.

    Raises:
        ValueError: a given column is missing or given twice, or there is no column of users or of items.
    """
    listed = ", ".join(f"`{name}`" for name in dataset.column_names)
    check_distinct({f"--{kind}_column": name for kind, name in named.items()})
    if missing := [name for name in named.values() if name is not None and name not in dataset.column_names]:
        raise ValueError(f"There is no column `{missing[0]}`. The columns are {listed}.")
    usual = {name.lower().replace("_", ""): name for name in dataset.column_names if name not in named.values()}
    found = {
        kind: named.get(kind) or next((usual[name] for name in names if name in usual), None)
        for kind, names in _NAMES.items()
    }
    for kind in ("user", "item"):
        if found[kind] is None and (kind == "user" or found["target"] is None):
            raise ValueError(f"Which column holds the {kind}s? The columns are {listed}. Name it by --{kind}_column.")
    return InteractionColumns(**found)


def read_interactions(path: str | Path) -> "Dataset":
    """Read a table of interactions or items: one of RecBole's atomic files, or any file that `read_examples` reads.

    Raises:
        FileNotFoundError, ValueError: the file is missing, empty, damaged or of another format.
    """
    path = Path(path)
    if path.suffix.lower() not in ATOMIC_FORMATS:
        return read_examples(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file `{path}`.")
    with open_text(path, newline="\n") as file:
        header = [name.rpartition(":")[0] or name for name in file.readline().rstrip("\r\n").split("\t")]
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise ValueError(f"`{path}` has several columns called {twice}. Rename all but one.")
        columns: dict[str, list[str]] = {name: [] for name in header}
        for number, line in enumerate(file, start=2):
            cells = line.rstrip("\r\n").split("\t")
            if not line.strip():
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"`{path}`, line {number}: there are {len(cells)} cells, but the first line names {len(header)} "
                    "columns. Tabs separate them."
                )
            for name, cell in zip(header, cells, strict=True):
                columns[name].append(cell)
    if not any(columns.values()):
        raise ValueError(f"`{path}` holds no row.")
    return require("datasets").Dataset.from_dict(columns)


class Histories(NamedTuple):
    """The items of each user, oldest first and each once, and the items to recommend, if there is a column of them."""

    items: dict[str, list[str]]
    targets: dict[str, str]


def read_histories(rows: "Dataset", columns: InteractionColumns, split: str) -> Histories:
    """Read histories from a table with a row per interaction, or with a list of items per row.

    Items with the same time stay in the order of the rows, and so do all items without a column of times. If a user
    had an item several times, only the first time counts.

    Raises:
        ValueError: a user, item or time is missing or invalid; the message names the row.
    """
    had: dict[str, list[tuple[float, str]]] = {}
    targets: dict[str, str] = {}
    cells = (read_column(rows, name) if name is not None else [None] * len(rows) for name in columns)
    for row, (user, items, times, target) in enumerate(zip(*cells, strict=True)):
        where = f"Row {row} of the {split} data"
        name = _identifier(user, columns.user, where)
        pairs = list(_pairs(items, times, columns, where)) if columns.item is not None else []
        had.setdefault(name, []).extend(pairs)
        if columns.target is not None:
            if targets.get(name, target) != target:
                raise ValueError(f"{where} gives the user {name!r} a second `{columns.target}`. Leave one out.")
            targets[name] = _identifier(target, columns.target, where)
    if columns.time is None and columns.item is not None and any(len(pairs) > 1 for pairs in had.values()):
        logger.warning(f"The {split} data has no column of times: its rows are taken for the order of time.")
    ordered = {user: [item for _, item in sorted(pairs, key=lambda x: x[0])] for user, pairs in had.items()}
    once = {user: list(dict.fromkeys(items)) for user, items in ordered.items()}
    if again := sum(map(len, ordered.values())) - sum(map(len, once.values())):
        logger.warning(
            f"{again} interactions of the {split} data are with an item that the user had before: left out."
        )
    return Histories(once, targets)


def _identifier(cell: Any, column: str, where: str) -> str:
    """Convert an id to text: 7 and "7" are the same, and so is 7.0, which tables with gaps turn 7 into."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    text = None if isinstance(cell, list | dict | bytes) else cell_text(cell)
    if text is None or not text.strip() or "\n" in text:
        raise ValueError(f"{where} has no id as `{column}`, but {cell!r}. Leave it out.")
    return text.strip()


def _pairs(items: Any, times: Any, columns: InteractionColumns, where: str) -> Iterator[tuple[float, str]]:
    """Yield the time and item of all interactions of a row; none for a row with only a target."""
    if items is None and columns.target is not None:
        return
    if isinstance(items, str) and items.startswith("["):  # in a cell of a csv file
        items, times = _list(items, columns.item, where), _list(times, columns.time, where)
    if not isinstance(items, list):
        items, times = [items], [times]
    if times is None or columns.time is None:
        times = [0.0] * len(items)
    if not isinstance(times, list) or len(times) != len(items):
        raise ValueError(
            f"{where} has {len(items)} items in `{columns.item}`, but in `{columns.time}` "
            f"{len(times) if isinstance(times, list) else repr(times)}. Give a time for each, or none at all."
        )
    for item, time in zip(items, times, strict=True):
        seconds = 0.0 if columns.time is None else _seconds(time, columns.time, where)
        yield seconds, _identifier(item, columns.item, where)


def _list(cell: Any, column: str | None, where: str) -> Any:
    if not isinstance(cell, str):
        return cell
    try:
        return json.loads(cell)
    except ValueError as error:
        raise ValueError(f"{where}: the list in `{column}` is not valid JSON: {error}.") from error


def _seconds(cell: Any, column: str, where: str) -> float:
    """Convert a time to a number: numbers stay as they are; dates become seconds, in UTC if they name no time zone."""
    try:
        number = float(cell.timestamp() if isinstance(cell, datetime) else cell)
    except (TypeError, ValueError):
        try:
            time = datetime.fromisoformat(str(cell).strip())
            number = (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"{where} has {cell!r} as `{column}`, where a number or a date like 2024-05-01 12:30:00 is expected."
        )
    return number


def read_titles(path: str) -> dict[str, str]:
    """Read titles from a table of items, with a column of ids and one of titles or names.

    Raises:
        ValueError: one of these columns is missing.
    """
    rows = read_interactions(path)
    usual = {name.lower().replace("_", ""): name for name in rows.column_names}
    item = next((usual[name] for name in (*_NAMES["item"], "id") if name in usual), None)
    titles = ("title", "itemname", "movietitle", "name", "producttitle", "label", "description")
    title = next((usual[name] for name in titles if name in usual), None)
    if item is None or title is None:
        listed = ", ".join(f"`{name}`" for name in rows.column_names)
        raise ValueError(f"`{path}` must have the columns `item_id` and `title`; its columns are {listed}.")
    pairs = zip(read_column(rows, item), read_column(rows, title), strict=True)
    cells = {
        _identifier(one, item, f"Row {row} of `{path}`"): cell_text(text) for row, (one, text) in enumerate(pairs)
    }
    return {one: " ".join(text.split()) for one, text in cells.items() if text and text.strip()}
