"""Time series: tables with a row per step or per window; both become windows of past and future."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from .columns import is_number
from .tables import cell_text, read_column
from .times import ADVICE, Step, read_times, step_of

if TYPE_CHECKING:
    from datasets import Dataset

TIME_COLUMNS = ("time", "date", "datetime", "timestamp", "ds", "day", "month")
NONE = "none"
MOST_MISSING = 100  # a table with more than so many times as many steps as rows is refused


@dataclass
class SeriesTable:
    """Series by step: `values` (N, S), NaN where not observed; `times` (N) datetime64, or None."""

    names: list[str]
    values: np.ndarray
    times: np.ndarray | None

    @property
    def step(self) -> Step | None:
        return None if self.times is None or len(self.times) < 2 else step_of(self.times)


def read_table(dataset: "Dataset", time_column: str | None, series: Sequence[str] | None) -> SeriesTable:
    """Read a table with a row per step, in order and evenly spaced; missing steps become NaN.

    Args:
        time_column: default: found by name. If there is none, or for "none", consecutive rows are steps.
        series: names of the series to read, in this order; default: all numeric columns.

    Raises:
        ValueError: a column is missing, a cell is not a number or time, or times are out of order or unevenly spaced.
    """
    names = dataset.column_names
    without = time_column == NONE and NONE not in names
    time_column = None if without else time_column
    if missing := [name for name in (time_column, *(series or ())) if name is not None and name not in names]:
        raise ValueError(f"There is no column {missing}. The columns are {names}.")
    time = time_column or next((name for name in TIME_COLUMNS if name in names and not without), None)
    columns, chosen = [], []
    for name in series or [name for name in names if name != time]:
        values = numbers(read_column(dataset, name), name, strict=series is not None)
        if values is not None:
            columns.append(values)
            chosen.append(name)
    if not columns:
        raise ValueError(f"No column holds numbers. The columns are {names}. Name the series by --series.")
    table = np.stack(columns, axis=1)
    if time is None:
        return SeriesTable(chosen, table, None)
    return _regular(SeriesTable(chosen, table, read_times(read_column(dataset, time), time)))


def numbers(cells: Sequence[Any], name: str, strict: bool) -> np.ndarray | None:
    """Parse cells to (N) float64, NaN for empty ones; None if others are not numbers, or ValueError if `strict`."""
    found = np.full(len(cells), np.nan)
    for row, cell in enumerate(cells):
        if isinstance(cell, (list, dict, bytes)):
            if strict:
                raise ValueError(
                    f"Row {row} of the column `{name}` holds a {type(cell).__name__}, which is no number."
                )
            return None
        text = cell_text(cell)
        if text is None or not text.strip():
            continue
        if not is_number(text):
            if strict:
                raise ValueError(f"Row {row} of the column `{name}` holds {text[:40]!r}, which is no number.")
            return None
        found[row] = float(text)
    if np.isinf(found).any():
        raise ValueError(f"Row {int(np.isinf(found).argmax())} of the column `{name}` is infinite. Leave it empty.")
    return found


def _regular(table: SeriesTable) -> SeriesTable:
    """Insert rows of NaN for missing steps."""
    gaps = np.diff(table.times)
    if not len(gaps):
        return table
    if (gaps <= np.timedelta64(0)).any():
        row = int((gaps <= np.timedelta64(0)).argmax()) + 1
        kind = (
            "has the time of the row before it"
            if gaps[row - 1] == np.timedelta64(0)
            else "is earlier than the row before it"
        )
        raise ValueError(f"Row {row} ({table.times[row]}) {kind}. Sort the rows by time, one for each step.")
    step = step_of(table.times)
    places, exact = step.between(table.times[0], table.times)
    if not exact.all():
        row = int(exact.argmin())
        raise ValueError(
            f"Steps are not even: most are {step}, but row {row} ({table.times[row]}) comes "
            f"{gaps[row - 1].astype('timedelta64[s]')} after the row before it. Resample the data, such as by pandas' "
            f"`resample(…).mean()`. {ADVICE}"
        )
    if places[-1] > MOST_MISSING * len(gaps):
        raise ValueError(f"Only {len(table.values)} of {int(places[-1]) + 1} steps are present. Resample the data.")
    values = np.full((places[-1] + 1, table.values.shape[1]), np.nan)
    values[places] = table.values
    return SeriesTable(table.names, values, step.after(table.times[0], np.arange(len(values))))


def follows(first: SeriesTable, second: SeriesTable) -> int | None:
    """Return how many steps (at least 1) after the end of one table another begins; None if it does not follow it."""
    if first.times is None or second.times is None or first.step is None or second.times[0] <= first.times[-1]:
        return None
    (steps,), (exact,) = first.step.between(first.times[-1], second.times[:1])
    return int(steps) if exact and steps <= MOST_MISSING * len(first.times) else None


def joined(first: SeriesTable, second: SeriesTable, steps: int) -> SeriesTable:
    """Join two tables, the second of which begins `steps` steps after the last one of the first."""
    between = np.full((steps - 1, len(first.names)), np.nan)
    values = np.concatenate([first.values, between, second.values])
    step, times = first.step, None
    if first.times is not None and step is not None:
        times = step.after(first.times[0], np.arange(len(values)))
    return SeriesTable(first.names, values, times)


class RowWindows(NamedTuple):
    """One window per row: past (M, L, S) and future (M, P, S), NaN where missing, with series ordered as `names`."""

    names: list[str]
    predicted: list[str]
    past: np.ndarray
    future: np.ndarray


def has_row_windows(dataset: "Dataset", past: str) -> bool:
    """Whether a table has one window per row, in columns whose names begin with `past`."""
    return any(name.startswith(past) for name in dataset.column_names)


def read_row_windows(
    dataset: "Dataset",
    past: str,
    future: str,
    steps: tuple[int, int] | None = None,
    series: Sequence[str] | None = None,
    predicted: Sequence[str] | None = None,
) -> RowWindows:
    """Read a table with one window per row, as lists in its cells.

    Columns `past` + name and `future` + name form one series. Other lists with as many steps as the past are series of
    which only the past is known, such as those of another car.

    Args:
        steps: numbers of past and future steps, as of a saved model; default: those of the first row.
        series: names of the series to read; default: all, those with a future first.
        predicted: those of `series` to predict, if known; then the series keep their order, and futures may be
            missing.

    Raises:
        ValueError: rows differ in length or hold something other than numbers, or a series is missing.
    """
    names = dataset.column_names
    own = [name.removeprefix(past) for name in names if name.startswith(past)]
    if not own:
        raise ValueError(f"No column begins with {past!r}, so there is no past. Name it by --past_prefix.")
    given = [name for name in own if future + name in names]
    first = dataset[0]
    length = steps[0] if steps else len(first[past + own[0]])
    ahead = next((len(first[future + name]) for name in given if first.get(future + name)), None)
    ahead = steps[1] if steps else ahead
    if ahead is None:
        raise ValueError(
            f"No column begins with {future!r}, so there is no future to learn. Name it by --future_prefix."
        )
    others = [name for name in names if not name.startswith((past, future)) and isinstance(first[name], list)]
    others = [
        name
        for name in others
        if len(first[name]) == length and all(isinstance(x, (int, float, type(None))) for x in first[name])
    ]
    order = [*given, *(name for name in own if name not in given), *others]
    found = order if predicted is None else [*order, *(set(names) - set(order))]
    if series is not None and (unknown := [name for name in series if name not in found]):
        raise ValueError(f"There is no series {unknown}. The series are {order}.")
    if predicted is not None:
        order = list(order if series is None else series)
    else:
        order = [name for name in order if series is None or name in series]
        predicted = [name for name in given or own if name in order]
    if not predicted:
        raise ValueError(f"None of the series {order} has a future. Name one that is to be predicted.")

    def column(name: str, size: int) -> np.ndarray:
        if name not in names:
            return np.full((len(dataset), size), np.nan)
        rows = read_column(dataset, name)
        for row, cell in enumerate(rows):
            if not isinstance(cell, list) or len(cell) != size:
                found = f"{len(cell)} steps" if isinstance(cell, list) else repr(cell)[:40]
                raise ValueError(f"Row {row} of the column `{name}` has {found}, where others have {size} steps.")
        try:
            values = np.array(rows, dtype=np.float64)
        except (ValueError, TypeError) as error:
            raise ValueError(f"The column `{name}` holds something else than numbers: {error}") from error
        if np.isinf(values).any():
            raise ValueError(f"Row {int(np.isinf(values).any(1).argmax())} of the column `{name}` is infinite.")
        return values

    before = [column(past + name if name in own else name, length) for name in order]
    behind = [column(future + name if name in predicted else "", ahead) for name in order]
    return RowWindows(order, list(predicted), np.stack(before, axis=2), np.stack(behind, axis=2))


class Frame(NamedTuple):
    """Coordinate frames of rows: the last position (M, 2), and rotations (M, 2, 2) into the direction of motion."""

    origin: np.ndarray
    rotation: np.ndarray

    def enter(self, points: np.ndarray) -> np.ndarray:
        """Transform (M, N, 2) points into the frames, whose first axis is the direction of motion."""
        return (points - self.origin[:, None]) @ self.rotation.transpose(0, 2, 1)

    def leave(self, points: np.ndarray) -> np.ndarray:
        return points @ self.rotation + self.origin[:, None]


def position_pairs(names: Sequence[str]) -> list[tuple[int, int]]:
    """Find the pairs of series that are coordinates of the same object: names that differ in ending with x and y."""
    return [
        (names.index(name), names.index(name[:-1] + "y"))
        for name in names
        if name.endswith("x") and name[:-1] + "y" in names
    ]


def moving_frame(past: np.ndarray, reach: int = 5) -> Frame:
    """Compute the frames of (M, L, 2) positions: the last one, and the direction of the last `reach` steps, or of all.

    The direction of all steps is used if the last ones are a distance of 0.1 or less. Missing positions are replaced
    by the last observed one.
    """
    past = filled_forward(past)
    last = past[:, -1]
    ways = [last - past[:, -1 - min(reach, past.shape[1] - 1)], last - past[:, 0]]
    sizes = [np.linalg.norm(way, axis=1) for way in ways]
    way = np.where((sizes[0] > 0.1)[:, None], ways[0], ways[1])
    size = np.linalg.norm(way, axis=1)
    unit = np.where((size > 1e-6)[:, None], way / np.maximum(size, 1e-6)[:, None], [1.0, 0.0])
    cos, sin = unit[:, 0], unit[:, 1]
    return Frame(last, np.stack([np.stack([cos, sin], 1), np.stack([-sin, cos], 1)], axis=1))


class Windows(torch.utils.data.Dataset):
    """Windows of a table of series: the past before each of `ends`, and the future from there on.

    Args:
        values: (N, S), NaN where not observed.
        ends: (windows), the first future step of each window.
        lengths: numbers of past and future steps. A past that reaches back before the first step is padded with NaN.
        features: (at most N + P, F) known of every step, or None.
        first: (windows), the first step that each window may use, for a table of several independent parts.
    """

    def __init__(
        self, values: np.ndarray, ends: np.ndarray, lengths: tuple[int, int], features: np.ndarray | None = None,
        first: np.ndarray | None = None,
    ):  # fmt: skip
        self.values, self.features = values.astype(np.float32), features
        self.ends, self.lengths = ends, lengths
        self.first = np.zeros_like(ends) if first is None else first

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        (before, ahead), end = self.lengths, int(self.ends[number])
        begin = max(end - before, int(self.first[number]))
        row = {
            "past_values": _padded(self.values[begin:end], before - (end - begin), 0, np.nan),
            "future_values": _padded(self.values[end : end + ahead], 0, end + ahead - len(self.values), np.nan),
        }
        if self.features is not None:
            row["past_time_features"] = _padded(self.features[begin:end], before - (end - begin), 0, 0.0)
            row["future_time_features"] = self.features[end : end + ahead]
        return {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in row.items()}

    def select(self, numbers: Sequence[int] | np.ndarray) -> "Windows":
        numbers = np.asarray(numbers, dtype=np.int64)
        return Windows(self.values, self.ends[numbers], self.lengths, self.features, self.first[numbers])

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the past (windows, L, S) and the future (windows, P, S) of all windows."""
        rows = [self[number] for number in range(len(self))]
        return tuple(np.stack([row[name].numpy() for row in rows]) for name in ("past_values", "future_values"))  # type: ignore[return-value]


def _padded(x: np.ndarray, before: int, behind: int, value: float) -> np.ndarray:
    if before <= 0 and behind <= 0:
        return x
    return np.pad(x, ((max(0, before), max(0, behind)), (0, 0)), constant_values=value)


def windows_of_rows(rows: RowWindows) -> Windows:
    """Make `Windows` from a table with one window per row."""
    count, before, ahead = len(rows.past), rows.past.shape[1], rows.future.shape[1]
    values = np.concatenate([rows.past, rows.future], axis=1).reshape(count * (before + ahead), -1)
    first = np.arange(count) * (before + ahead)
    return Windows(values, first + before, (before, ahead), None, first)


def filled_forward(past: np.ndarray) -> np.ndarray:
    """Fill gaps in (M, L, S) with the last observed value; before the first one, with that, or 0 if there is none."""
    found = past.copy()
    for step in range(1, found.shape[1]):
        found[:, step] = np.where(np.isnan(found[:, step]), found[:, step - 1], found[:, step])
    for step in range(found.shape[1] - 2, -1, -1):
        found[:, step] = np.where(np.isnan(found[:, step]), found[:, step + 1], found[:, step])
    return np.nan_to_num(found)


def describe_rows(rows: Iterator[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Convert rows for JSON: floats are rounded, NaN becomes None."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return [plain(x) for x in value.tolist()]
        if isinstance(value, dict):
            return {name: plain(x) for name, x in value.items()}
        return (None if value != value else round(value, 5)) if isinstance(value, float) else value

    return [{name: plain(value) for name, value in row.items()} for row in rows]
