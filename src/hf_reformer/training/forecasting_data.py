"""Data of a forecasting model: options, windows of tables by step or by row, and config fields."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers.utils import logging

from ..data.series import (
    NONE,
    Frame,
    RowWindows,
    SeriesTable,
    Windows,
    follows,
    has_row_windows,
    joined,
    moving_frame,
    position_pairs,
    read_row_windows,
    read_table,
    windows_of_rows,
)
from ..data.times import calendar
from .data_setup import SplitArguments
from .model_setup import (
    BackboneArguments,
    check_same_as_saved,
    option,
)

logger = logging.get_logger(__name__)

COUNTS = "negative_binomial"


@dataclass
class SeriesArguments(SplitArguments):
    """Options for time series: their columns, how they are cut into windows, and what a new model does with them."""

    train_file: str | None = option(
        None, "csv, tsv, json, jsonl or parquet file: one time step per row, or one window per row."
    )
    time_column: str | None = option(
        None, "Default: found by name. Without times, or with none, rows are steps and files are separate."
    )
    series: list[str] | None = option(None, "Names of the series. Default: all numeric columns.")
    past_prefix: str = option("obs_", "With one window per row: prefix of the columns of the past.")
    future_prefix: str = option("fut_", "Prefix of the columns of the future.")
    relative_positions: bool | None = option(
        None, "With one window per row: take series x and y relative to the last position, rotated into the "
        "direction of motion. Default: yes, or as the saved model does."
    )  # fmt: skip
    context_length: int | None = option(None, "Past steps the model sees. Default: 96; with one window per row, all.")
    prediction_length: int | None = option(None, "Steps to forecast. Default: 24; with one window per row, all.")
    patch_length: int | None = option(None, "Steps per token. Default: 1/24 of the context.")
    window_stride: int = option(1, "Steps from one training window to the next.")
    eval_stride: int = option(1, "Steps from one evaluation window to the next.")
    mix_series: bool | None = option(
        None, "Put all series into each token; use it if they influence each other. Default: with one window per row."
    )
    time_features: bool | None = option(
        None,
        "Give the model the time of day and week, or of the year if steps are long. Default: if there are times.",
    )
    scaling: str | None = option(
        None, "What each window is scaled by. Default: std; with one window per row, none; for counts, mean.",
        choices=["std", "last", "mean", NONE],
    )  # fmt: skip
    loss: str | None = option(
        None, "nll: predict distributions; mse or mae: predict values. Default: nll.", choices=["nll", "mse", "mae"]
    )
    distribution: str | None = option(
        None, "With --loss nll: student_t, normal, or negative_binomial for counts. Default: student_t.",
        choices=["student_t", "normal", COUNTS],
    )  # fmt: skip
    linear_skip: bool | None = option(
        None, "Add a linear map of the context to the forecasts. Default: yes, except for counts."
    )
    individual_skip: bool | None = option(None, "One such map for each series, instead of one for all. Default: no.")
    season: int | None = option(None, "Steps per season, for the baseline that repeats the last season.")
    baselines: bool = option(False, "Also evaluate simple models on the same windows.")
    predict_file: str | None = option(None, "A table whose continuation is forecast at the end.")

    def check(self, model: BackboneArguments, args: Any) -> None:
        super().check(model, args)
        if self.predict_file is not None and not Path(self.predict_file).is_file():
            raise ValueError(f"--predict_file: there is no table `{self.predict_file}`.")
        if self.distribution is not None and self.loss not in (None, "nll"):
            raise ValueError(
                f"--distribution {self.distribution}: --loss {self.loss} learns a number, no distribution. Leave one "
                "of the two out."
            )
        if self.distribution == COUNTS and (self.scaling in ("std", "last") or self.linear_skip):
            wrong = "--linear_skip" if self.linear_skip else f"--scaling {self.scaling}"
            raise ValueError(f"{wrong} shifts values, and counts ({COUNTS}) cannot be shifted. Leave it out.")

    def check_saved(self, name: str, saved: Any) -> None:
        """Raise ValueError for options that contradict the config of the saved model `name`."""
        scaling = NONE if saved.scaling is None else saved.scaling
        fields = {"distribution": saved.distribution_output, "scaling": scaling}
        fields |= {"time_features": saved.num_time_features > 0}
        same = (
            "context_length",
            "prediction_length",
            "patch_length",
            "mix_series",
            "loss",
            "linear_skip",
            "individual_skip",
        )
        fields |= {option: getattr(saved, option) for option in (*same, "relative_positions")}
        check_same_as_saved(name, self, fields)

    def names_of(self, saved: Any) -> list[str] | None:
        """Return the series to read, in the order of the saved model; None: all that are found."""
        if saved is None or saved.series_names is None:
            return self.series
        if self.series is not None and set(self.series) != set(saved.series_names):
            raise ValueError(
                f"--series {' '.join(self.series)}: the saved model is of {', '.join(saved.series_names)}. Leave the "
                "option out, or leave out --model_name_or_path to train a new model."
            )
        return list(saved.series_names)

    def uses_frames(self, saved: Any) -> bool:
        """Whether positions in rows are to be made relative."""
        return self.relative_positions is not False if saved is None else saved.relative_positions


class Series(NamedTuple):
    """Windows of every split, and what they have in common."""

    names: list[str]
    predicted: list[str]
    windows: dict[str, Windows]
    by_row: bool
    mean: np.ndarray  # (S), of the training data
    std: np.ndarray
    frames: dict[str, Frame | None]  # None unless positions are relative


def load(data: SeriesArguments, saved: Any, seed: int) -> Series:
    """Read all splits and cut them into windows, holding out validation data if there is none.

    Those are the last steps of a table by step, or random rows of a table by row.
    """
    splits = data.read()
    first = next(iter(splits.values()))
    if has_row_windows(first, data.past_prefix):
        return _load_rows(data, splits, saved, seed)
    tables: dict[str, SeriesTable] = {}
    names = data.names_of(saved)
    for split, part in splits.items():
        with data.naming_source(split):
            tables[split] = read_steps(part, data, saved, names)
        names = tables[split].names
    return _load_tables(data, tables, saved, seed)


def read_steps(part: Dataset, data: SeriesArguments, saved: Any, names: Sequence[str] | None) -> SeriesTable:
    """Read a table with one step per row, for a saved or new model.

    Args:
        names: names of the series, from the model or an earlier split; None: all that are found.
    """
    if saved is not None and saved.relative_positions:
        raise ValueError(
            "The model uses positions relative to the end of each window, so it needs a table with one window per "
            f"row: lists in columns whose names begin with {data.past_prefix!r}. The columns are {part.column_names}."
        )
    if names is not None and (missing := [name for name in names if name not in part.column_names]):
        raise ValueError(
            f"There is no column {missing}. The series are {list(names)}, and are found by their names; the columns "
            f"are {part.column_names}. Rename them, or train another model."
        )
    return read_table(part, data.time_column, names)


def read_rows(
    part: Dataset, data: SeriesArguments, saved: Any, known: RowWindows | None
) -> tuple[RowWindows, Frame | None]:
    """Read a table with one window per row, for a saved or new model; also return the frame of relative positions.

    Args:
        known: an earlier split, whose series and lengths this one must have.
    """
    if known is not None:
        steps, names, predicted = (known.past.shape[1], known.future.shape[1]), known.names, known.predicted
    else:
        steps = None if saved is None else (saved.context_length, saved.prediction_length)
        names = data.names_of(saved)
        predicted = None if saved is None else saved.predicted_series
    rows = read_row_windows(part, data.past_prefix, data.future_prefix, steps, names, predicted)
    pairs = position_pairs(rows.names) if data.uses_frames(saved) else []
    if not pairs:
        return rows, None
    frame, past, future = moving_frame(rows.past[..., list(pairs[0])]), rows.past.copy(), rows.future.copy()
    for pair in map(list, pairs):
        past[..., pair], future[..., pair] = frame.enter(past[..., pair]), frame.enter(future[..., pair])
    return rows._replace(past=past, future=future), frame


def _load_rows(data: SeriesArguments, splits: Mapping[str, Dataset], saved: Any, seed: int) -> Series:
    rows: dict[str, tuple[RowWindows, Frame | None]] = {}
    known: RowWindows | None = None
    for split, part in splits.items():
        with data.naming_source(split):
            rows[split] = read_rows(part, data, saved, known)
            known = rows[split][0]
            unknown = np.isnan(known.future).all(axis=(1, 2))
            if unknown.any() and not split.startswith("test"):
                raise ValueError(
                    f"{unknown.sum()} rows of the {split} data have no future; the first is row {unknown.argmax()}. "
                    "Leave such rows out. To forecast rows without a future, give them as --test_file."
                )
    names, predicted = next(iter(rows.values()))[0][:2]
    frames, windows = {}, {}
    chosen = data.choose_rows({split: len(part.past) for split, (part, _) in rows.items()}, seed)
    for split, (source, numbers) in chosen.items():
        part, frame = rows[source]
        windows[split] = windows_of_rows(part._replace(past=part.past[numbers], future=part.future[numbers]))
        frames[split] = None if frame is None else Frame(frame.origin[numbers], frame.rotation[numbers])
    mean, std = _units(saved, windows["train"].values if "train" in windows else None, names)
    return Series(names, predicted, windows, True, mean, std, frames)


def _load_tables(data: SeriesArguments, tables: dict[str, SeriesTable], saved: Any, seed: int) -> Series:
    first = next(iter(tables))
    names = tables[first].names
    for split, table in tables.items():
        if None not in (table.step, tables[first].step) and table.step != tables[first].step:
            raise ValueError(
                f"Rows of the {split} data are {table.step} apart, but those of the {first} data are "
                f"{tables[first].step} apart. "
                "Resample one of them, such as by pandas' `resample(…).mean()`."
            )
    before = data.context_length or 96 if saved is None else saved.context_length
    ahead = data.prediction_length or 24 if saved is None else saved.prediction_length
    held_out = "train" in tables and "validation" in data.parts and "validation" not in tables
    if held_out:
        whole = tables["train"]
        cut = round(len(whole.values) * (1 - data.validation_fraction))
        parts = {"train": slice(0, cut), "validation": slice(cut, None)}
        held = {
            split: SeriesTable(names, whole.values[part], None if whole.times is None else whole.times[part])
            for split, part in parts.items()
        }
        tables = {**held, **{split: table for split, table in tables.items() if split != "train"}}
    courses: dict[str, SeriesTable] = {}
    ends: dict[str, np.ndarray] = {}
    history: SeriesTable | None = None
    for split, table in tables.items():
        steps = None if history is None else follows(history, table)
        if held_out and split == "validation":
            steps = 1
        elif history is not None and table.times is None:
            logger.warning(
                f"The {split} data has no times, so it is unknown whether it continues other data: it is treated as "
                "a separate series, whose first steps serve only as context."
            )
        joins = history is not None and steps is not None  # then the past may reach into earlier data
        history = courses[split] = joined(history, table, steps) if joins else table
        count = len(history.values)
        earliest = count - len(table.values) if joins else min(before, max(1, count - ahead))
        found = np.arange(earliest, count - ahead + 1, data.window_stride if split == "train" else data.eval_stride)
        if not len(found):
            origin, way = "", "Give more,"
            if held_out and split == "validation":
                origin = f" (the last {data.validation_fraction:g} of the training data)"
                way = "Give a --validation_file, raise --validation_fraction,"
            raise ValueError(
                f"The {split} data{origin} has {len(table.values)} steps, too few for a window of {ahead} steps to "
                f"predict. {way} or lower --prediction_length."
            )
        if not split.startswith("test"):  # windows with an entirely unknown future are useless
            known = np.append(0, np.cumsum(~np.isnan(history.values).all(axis=1)))
            found = found[known[found + ahead] > known[found]]
            if not len(found):
                raise ValueError(f"The {split} data holds no value to predict: all are empty.")
        ends[split] = found
    windows: dict[str, Windows] = {}
    for split, (_, numbers) in data.choose_rows({split: len(found) for split, found in ends.items()}, seed).items():
        features = time_features(
            courses[split], data, saved, all(table.times is not None for table in tables.values())
        )
        windows[split] = Windows(courses[split].values, ends[split][np.sort(numbers)], (before, ahead), features)
    mean, std = _units(saved, tables["train"].values if "train" in tables else None, names)
    return Series(names, list(names), windows, False, mean, std, {})


def time_features(table: SeriesTable, data: SeriesArguments, saved: Any, have_times: bool) -> np.ndarray | None:
    """Compute the calendar features of every step, (N, F); None if the model takes none or there are no times."""
    wanted = data.time_features is not False if saved is None else saved.num_time_features > 0
    if saved is not None and wanted and not have_times:
        raise ValueError("The model was trained with times, and there are none. Name their column by --time_column.")
    if not wanted or not have_times or table.times is None or table.step is None:
        return None
    features = calendar(table.times, table.step)
    if saved is not None and features.shape[1] != saved.num_time_features:
        raise ValueError(
            f"Steps of {table.step} have {features.shape[1]} calendar features, but the model was trained with "
            f"{saved.num_time_features}. Resample the data, or train another model."
        )
    return features


def _units(saved: Any, train: np.ndarray | None, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of every series, from the saved model or else the training data."""
    if saved is not None and saved.series_mean is not None:
        if len(saved.series_mean) != len(names):
            raise ValueError(
                f"The data has {len(names)} series, {list(names)}; the model is of {len(saved.series_mean)}."
            )
        return np.array(saved.series_mean), np.array(saved.series_std)
    if train is None:
        return np.zeros(len(names)), np.ones(len(names))
    for name, values in zip(names, train.T, strict=True):
        if np.isnan(values).all():
            raise ValueError(f"The series `{name}` has no value in the training data. Leave it out by --series.")
    mean, std = np.nanmean(train, axis=0), np.nanstd(train, axis=0)
    return mean, np.where(std > 1e-9, std, 1.0)  # constant series become 0


def fields_of(series: Series, data: SeriesArguments) -> dict[str, Any]:
    """Return the config fields of a new model."""
    window = next(iter(series.windows.values()))
    before, ahead = window.lengths
    mix = series.by_row if data.mix_series is None else data.mix_series
    counts = data.distribution == COUNTS
    scaling = data.scaling or ("mean" if counts else NONE if series.by_row else "std")
    fields = {
        "context_length": before, "prediction_length": ahead,
        "patch_length": data.patch_length or max(1, before // 24), "input_size": len(series.names), "mix_series": mix,
        "loss": data.loss or "nll", "distribution_output": data.distribution or "student_t",
        "scaling": None if scaling == NONE else scaling, "linear_skip": data.linear_skip is not False and not counts,
        "individual_skip": bool(data.individual_skip) and len(series.names) > 1,
        "num_time_features": 0 if window.features is None else window.features.shape[1],
        "series_names": series.names, "predicted_series": series.predicted,
        "relative_positions": any(frame is not None for frame in series.frames.values()),
    }  # fmt: skip
    if counts:
        return fields
    return {**fields, "series_mean": series.mean.tolist(), "series_std": series.std.tolist()}


def in_data_units(x: np.ndarray, names: Sequence[str], frame: Frame | None) -> np.ndarray:
    """Convert relative positions in (rows, N, S) values back to those of the data."""
    if frame is None:
        return x
    x = np.array(x, dtype=np.float64)
    for pair in map(list, position_pairs(names)):
        x[..., pair] = frame.leave(x[..., pair])
    return x
