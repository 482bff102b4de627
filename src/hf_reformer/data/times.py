"""Timestamps: parsing, the step between them in time or calendar months, and calendar features for a model."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .columns import is_number
from .tables import cell_text, require

DAY = 86400 * 10**9  # nanoseconds
DATES = {4: "%Y", 6: "%Y%m", 8: "%Y%m%d"}  # number of digits → format of dates written as numbers
UNITS = {range(9, 12): "s", range(12, 15): "ms", range(15, 18): "us", range(18, 20): "ns"}  # of Unix times, by digits
ADVICE = "Name another column with --time_column; if rows are consecutive steps, use --time_column none."


class Step(NamedTuple):
    """The step from one row to the next: nanoseconds, or months if times are equally far from their start or end."""

    size: int
    unit: str  # "ns", "months", "month ends"

    @property
    def is_long(self) -> bool:
        """Whether the step is a week or longer."""
        return self.unit != "ns" or self.size >= 7 * DAY

    def after(self, start: np.datetime64, numbers: np.ndarray) -> np.ndarray:
        """Return the times `numbers` steps after `start`."""
        if self.unit == "ns":
            return start + numbers * np.timedelta64(self.size, "ns")
        first = start.astype("datetime64[M]") + (self.unit == "month ends")
        return (first + numbers * self.size).astype("datetime64[ns]") + (start - first.astype("datetime64[ns]"))

    def between(self, start: np.datetime64, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how many steps after `start` each time is, rounded down, and whether that is exact."""
        unit = f"datetime64[{'ns' if self.unit == 'ns' else 'M'}]"
        numbers = (times.astype(unit) - start.astype(unit)).astype(np.int64) // self.size
        return numbers, self.after(start, numbers) == times

    def __str__(self) -> str:
        if self.unit != "ns":
            return "a month" if self.size == 1 else f"{self.size} months"
        return str(require("pandas").Timedelta(self.size, "ns"))


def step_of(times: np.ndarray) -> Step:
    """Find the step of two or more increasing times: whole months if all are equally far from the start or end of
    theirs, else the median gap.

    Months differ in length, and so do quarters and years.
    """
    gaps = np.diff(times)
    if gaps.min() >= np.timedelta64(28, "D"):
        months = times.astype("datetime64[M]")
        from_begin, to_end = times - months.astype(times.dtype), (months + 1).astype(times.dtype) - times
        alike = [(lag[0], unit) for lag, unit in ((from_begin, "months"), (to_end, "month ends")) if not np.ptp(lag)]
        if alike:
            return Step(int(np.median(np.diff(months).astype(np.int64))), min(alike)[1])
    return Step(int(np.median(gaps.astype("timedelta64[ns]").astype(np.int64))), "ns")


def read_times(cells: Sequence[Any], name: str) -> np.ndarray:
    """Parse times to (N) datetime64[ns], converted to UTC if they name a time zone.

    Whole numbers are years, months or days (2024, 202401, 20240131); those of 9 digits or more are seconds,
    milliseconds, microseconds or nanoseconds since 1970, by the number of digits. Other numbers are refused.

    Raises:
        ValueError: cells are empty or not times.
    """
    pandas = require("pandas")
    texts = [cell_text(cell) if isinstance(cell, (int, float, str, type(None))) else None for cell in cells]
    given = [text for text in texts if text is not None and text.strip()]
    found: Any = pandas.Series(list(cells))
    options: dict[str, Any] = {}
    if given and all(map(is_number, given)):
        whole = {text.strip().removesuffix(".0") for text in given}
        sizes = {len(text) for text in whole} if all(map(str.isdecimal, whole)) else set()
        shape = next((shape for size, shape in DATES.items() if sizes == {size}), None)
        unit = next((unit for digits, unit in UNITS.items() if sizes and sizes <= set(digits)), None)
        if shape is None and unit is None:
            raise ValueError(f"The column `{name}` holds numbers such as {given[0]}, which are no times. {ADVICE}")
        numbers = [None if text is None or not text.strip() else text.strip().removesuffix(".0") for text in texts]
        found = pandas.Series(numbers if shape else [x if x is None else int(x) for x in numbers], dtype=object)
        options = {"format": shape} if shape else {"unit": unit}
    try:
        read = pandas.to_datetime(found, utc=True, **options).dt
        times = read.tz_localize(None).dt.as_unit("ns").to_numpy()  # raises if nanoseconds cannot represent them
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"The column `{name}` holds no times: {error}. {ADVICE}") from error
    if np.isnat(times).any():
        raise ValueError(f"Row {int(np.isnat(times).argmax())} has no time. Leave it out.")
    return times


def calendar(times: np.ndarray, step: Step) -> np.ndarray:
    """Compute calendar features (N, 4) float32: the times of day and week, as points on two circles.

    For steps of a week or longer, of which these tell little, (N, 2): the time of year.
    """
    if step.is_long:
        years = times.astype("datetime64[Y]")
        begin, end = (x.astype("datetime64[s]").astype(np.int64) for x in (years, years + 1))
        angles = 2 * np.pi * ((times.astype("datetime64[s]").astype(np.int64) - begin) / (end - begin))[:, None]
    else:
        seconds = times.astype("datetime64[s]").astype(np.int64)
        day, week = seconds / 86400.0, (seconds / 86400.0 + 3) / 7  # 1970 began on a Thursday
        angles = 2 * np.pi * np.stack([day % 1, week % 1], axis=1)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
