"""Train a Reformer to forecast time series, several at once, with gaps: load, weather, the ways of cars.

    # a complete run without a download, in about two minutes on two cores
    hf-reformer train forecasting --demo

    # your own series: csv, jsonl or parquet with a row a step, a column of times and a column for each series
    hf-reformer train forecasting --train_file power.csv --context_length 336 --prediction_length 96 --baselines

    # a window a row: lists obs_x, obs_y, … of the past, and fut_x, fut_y, … of the future
    hf-reformer train forecasting --train_file cars.parquet --validation_file cars.validation.parquet --baselines

    # a model that was saved by one of these runs: train it further, or only forecast what comes after a table
    hf-reformer train forecasting --model_name_or_path runs/forecasting --train_file more.csv
    hf-reformer train forecasting --model_name_or_path runs/forecasting --predict_file until_today.csv

All options of `transformers.TrainingArguments` work, `--resume_from_checkpoint last` included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForTimeSeriesPrediction,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils import logging

from ..data.demo_signals import seasonal_load
from ..data.series import (
    NONE,
    Frame,
    RowWindows,
    SeriesTable,
    Windows,
    describe_rows,
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
from ..training.data_setup import SplitArguments
from ..training.forecasting import (
    BAND,
    ForecastScores,
    ForecastTrainer,
    baseline_forecasts,
    draw_forecasts,
    draw_trajectories,
)
from ..training.model_setup import (
    SAVED_MODEL,
    BackboneArguments,
    check_same_as_saved,
    load_trained,
    make_model,
    option,
    run_recipe,
)
from ..training.reports import format_tables, write_report, write_rows
from ..training.trainers import build_trainer, train_and_save

logger = logging.get_logger(__name__)

DEFAULTS = {
    "output_dir": "runs/forecasting", "attn_layers": ["local", "lsh"], "hidden_dropout_prob": 0.1,
    "num_train_epochs": 5, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 32,
    "lr_scheduler_type": "cosine", "label_names": ["future_values"],
}  # fmt: skip
DEMO = {
    "output_dir": "runs/demo-forecast", "baselines": True, "num_train_epochs": 2, "context_length": 168,
    "prediction_length": 48, "season": 168, "hidden_size": 64, "attention_head_size": 32, "feed_forward_size": 128,
    "eval_strategy": "no", "window_stride": 2, "eval_stride": 4,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {**SAVED_MODEL, "--demo": DEMO}
COUNTS = "negative_binomial"


@dataclass
class DataArguments(SplitArguments):
    """Where the series come from, and how they are cut into windows."""

    sources = ("demo",)

    demo: bool = option(False, "Complete run without a download: the made-up load of a grid.")
    train_file: str | None = option(None, "csv, tsv, json, jsonl or parquet file: a row a step, or a window a row.")
    time_column: str | None = option(
        None, "Default: found by its name; without one, or by none, rows are steps, and each file is a course."
    )
    series: list[str] | None = option(None, "Names of the series. Default: all columns of numbers.")
    past_prefix: str = option("obs_", "Of a table with a window a row: what columns of the past begin with.")
    future_prefix: str = option("fut_", "What columns of the future begin with.")
    relative_positions: bool | None = option(
        None, "Of a window a row: see series x and y from the last place, turned into the way that it goes. "
        "Default: do, or as the saved model."
    )  # fmt: skip
    context_length: int | None = option(None, "Steps that a forecast looks back. Default: 96; of rows: all.")
    prediction_length: int | None = option(None, "Steps to forecast. Default: 24; of rows: all.")
    patch_length: int | None = option(None, "Steps of a token. Default: a twenty-fourth of the context.")
    window_stride: int = option(1, "Steps from one training window to the next.")
    eval_stride: int = option(1, "Steps from one window that is evaluated to the next.")
    mix_series: bool | None = option(
        None, "A token holds all series, not one: where series explain each other. Default: for a window a row."
    )
    time_features: bool | None = option(
        None,
        "Tell the model the time of day and week, or of year where steps are long. Default: where there are times.",
    )
    scaling: str | None = option(
        None, "What each window is scaled by: std, last, mean, none. Default: std; for a window a row: none; of "
        "counts: mean.", choices=["std", "last", "mean", NONE],
    )  # fmt: skip
    loss: str | None = option(
        None, "nll: learn a distribution; mse or mae: a number. Default: nll.", choices=["nll", "mse", "mae"]
    )
    distribution: str | None = option(
        None, "Of --loss nll: student_t, normal, or negative_binomial, of counts. Default: student_t.",
        choices=["student_t", "normal", COUNTS],
    )  # fmt: skip
    linear_skip: bool | None = option(
        None, "Add a linear map of the context to forecasts. Default: do, but not for counts."
    )
    season: int | None = option(None, "Steps of a season, for the baseline that repeats the last one.")
    baselines: bool = option(False, "Also evaluate simple models on the same windows.")
    predict_file: str | None = option(None, "A table: forecast what comes after its end.")

    def read_source(self) -> Mapping[str, Dataset]:
        return {"train": seasonal_load()} if self.demo else super().read_source()

    def describe(self) -> str:
        return "the made-up load of a grid" if self.demo else super().describe()

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
        """Raise ValueError for options that say something else than the config of the saved model `name`."""
        scaling = NONE if saved.scaling is None else saved.scaling
        fields = {"distribution": saved.distribution_output, "scaling": scaling}
        fields |= {"time_features": saved.num_time_features > 0}
        same = ("context_length", "prediction_length", "patch_length", "mix_series", "loss", "linear_skip")
        fields |= {option: getattr(saved, option) for option in (*same, "relative_positions")}
        check_same_as_saved(name, self, fields)

    def names_of(self, saved: Any) -> list[str] | None:
        """The series to read, in the order of the saved model; None: those that are found."""
        if saved is None or saved.series_names is None:
            return self.series
        if self.series is not None and set(self.series) != set(saved.series_names):
            raise ValueError(
                f"--series {' '.join(self.series)}: the saved model is of {', '.join(saved.series_names)}. Leave the "
                "option out, or leave out --model_name_or_path to train a new model."
            )
        return list(saved.series_names)

    def uses_frames(self, saved: Any) -> bool:
        """Whether positions of rows are relative."""
        return self.relative_positions is not False if saved is None else saved.relative_positions


class Series(NamedTuple):
    """Windows of every split, and what is known of all of them."""

    names: list[str]
    predicted: list[str]
    windows: dict[str, Windows]
    by_row: bool
    mean: np.ndarray  # (S), of the training data
    std: np.ndarray
    frames: dict[str, Frame | None]  # of rows whose positions are relative


def load(data: DataArguments, saved: Any, seed: int) -> Series:
    """Read all splits and cut them into windows; hold out validation data, the last ones in time, if there is none."""
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


def read_steps(part: Dataset, data: DataArguments, saved: Any, names: Sequence[str] | None) -> SeriesTable:
    """A table with a row a step, for a saved model or a new one.

    Args:
        names: of the series, which the model or an earlier split has; None: those that are found.
    """
    if saved is not None and saved.relative_positions:
        raise ValueError(
            "The model sees positions from where each window ends, so it takes a table with a window a row: lists in "
            f"columns that begin with {data.past_prefix!r}. The columns are {part.column_names}."
        )
    if names is not None and (missing := [name for name in names if name not in part.column_names]):
        raise ValueError(
            f"There is no column {missing}. The series are {list(names)}, and are found by their names; the columns "
            f"are {part.column_names}. Rename them, or train another model."
        )
    return read_table(part, data.time_column, names)


def read_rows(
    part: Dataset, data: DataArguments, saved: Any, known: RowWindows | None
) -> tuple[RowWindows, Frame | None]:
    """Windows of a table with a window a row, for a saved model or a new one; their frame, if positions are relative.

    Args:
        known: an earlier split, whose series and lengths this one is to have.
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


def _load_rows(data: DataArguments, splits: Mapping[str, Dataset], saved: Any, seed: int) -> Series:
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


def _load_tables(data: DataArguments, tables: dict[str, SeriesTable], saved: Any, seed: int) -> Series:
    first = next(iter(tables))
    names = tables[first].names
    for split, table in tables.items():
        if None not in (table.step, tables[first].step) and table.step != tables[first].step:
            raise ValueError(
                f"From row to row of the {split} data are {table.step}, of the {first} data {tables[first].step}. "
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
                f"The {split} data have no times, so nothing tells whether they go on where others end: they are "
                "taken as a course of their own, whose first steps are only looked at."
            )
        joins = history is not None and steps is not None  # then the past may reach back
        history = courses[split] = joined(history, table, steps) if joins else table
        count = len(history.values)
        earliest = count - len(table.values) if joins else min(before, max(1, count - ahead))
        found = np.arange(earliest, count - ahead + 1, data.window_stride if split == "train" else data.eval_stride)
        if not len(found):
            raise ValueError(
                f"The {split} data has {len(table.values)} steps, too few for a window of {ahead} steps to predict. "
                "Give more, or lower --prediction_length."
            )
        if not split.startswith("test"):  # from a future that nobody knows nothing is learnt
            known = np.append(0, np.cumsum(~np.isnan(history.values).all(axis=1)))
            found = found[known[found + ahead] > known[found]]
            if not len(found):
                raise ValueError(f"The {split} data holds no value to predict: all are empty.")
        ends[split] = found
    windows: dict[str, Windows] = {}
    for split, (_, numbers) in data.choose_rows({split: len(found) for split, found in ends.items()}, seed).items():
        features = _features(courses[split], data, saved, all(table.times is not None for table in tables.values()))
        windows[split] = Windows(courses[split].values, ends[split][np.sort(numbers)], (before, ahead), features)
    mean, std = _units(saved, tables["train"].values if "train" in tables else None, names)
    return Series(names, list(names), windows, False, mean, std, {})


def _features(table: SeriesTable, data: DataArguments, saved: Any, have_times: bool) -> np.ndarray | None:
    """What the model is told of every step; None where it is told nothing."""
    wanted = data.time_features is not False if saved is None else saved.num_time_features > 0
    if saved is not None and wanted and not have_times:
        raise ValueError("The model was trained with times, and there are none. Name their column by --time_column.")
    if not wanted or not have_times or table.times is None or table.step is None:
        return None
    features = calendar(table.times, table.step)
    if saved is not None and features.shape[1] != saved.num_time_features:
        raise ValueError(
            f"Of steps of {table.step} the model would be told {features.shape[1]} numbers, but it was trained on "
            f"steps with {saved.num_time_features}. Resample the data, or train another model."
        )
    return features


def _units(saved: Any, train: np.ndarray | None, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of every series: those of the saved model, or of the training data."""
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
    return mean, np.where(std > 1e-9, std, 1.0)  # a constant series is 0


def fields_of(series: Series, data: DataArguments) -> dict[str, Any]:
    """Fields of a new model's config."""
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
        "num_time_features": 0 if window.features is None else window.features.shape[1],
        "series_names": series.names, "predicted_series": series.predicted,
        "relative_positions": any(frame is not None for frame in series.frames.values()),
    }  # fmt: skip
    if counts:
        return fields
    return {**fields, "series_mean": series.mean.tolist(), "series_std": series.std.tolist()}


def in_data_units(x: np.ndarray, names: Sequence[str], frame: Frame | None) -> np.ndarray:
    """(rows, N, S) with positions as the data has them, not relative ones."""
    if frame is None:
        return x
    x = np.array(x, dtype=np.float64)
    for pair in map(list, position_pairs(names)):
        x[..., pair] = frame.leave(x[..., pair])
    return x


def report(trainer: Any, scores: ForecastScores, series: Series, data: DataArguments) -> None:
    """Write forecasts, pictures and scores of all splits but the training data, and those of baselines."""
    folder, tables, trained = Path(str(trainer.args.output_dir)), {}, trainer.train_dataset is not None
    for split, windows in series.windows.items():
        if split == "train":
            continue
        output = trainer.predict(windows, metric_key_prefix=split)
        past, truth = windows.arrays()
        if np.isnan(truth).all(axis=(1, 2)).any():  # of windows without a future it is no loss, but 0
            output.metrics.pop(f"{split}_loss", None)
        trainer.save_metrics(split, output.metrics)
        if not trainer.is_world_process_zero():
            continue
        forecast, low, high, crps = (np.asarray(x) for x in output.predictions)
        found = {"forecast": forecast, "low": low, "high": high}
        if not np.isnan(truth).all():
            tables[split] = {"Reformer": scores.of(forecast, truth, crps)}
            if data.baselines and trained:
                simple = baseline_forecasts(series.windows["train"], windows, data.season, series.by_row)
                tables[split] |= {name: scores.of(x, truth) for name, x in simple.items()}
        title = f"{split}: {len(windows)} windows"
        draw_forecasts(folder / f"forecast_{split}.png", windows, found, series.names, title, series.by_row)
        pairs = position_pairs(series.names)
        if series.by_row and pairs:
            xy = list(pairs[0])
            draw_trajectories(
                folder / f"trajectories_{split}.png", past[..., xy], truth[..., xy], forecast[..., xy], title
            )
        write_rows(folder / f"predictions_{split}.jsonl", _lines(split, series, windows, found, truth))
    what = "windows"
    write_report(trainer, tables, format_tables(tables, series.windows, what), data.describe() if trained else None)


def _lines(
    split: str, series: Series, windows: Windows, found: Mapping[str, np.ndarray], truth: np.ndarray
) -> list[dict[str, Any]]:
    """A line for every row, or for windows that follow each other: forecast, and true values where they are known."""
    chosen = [series.names.index(name) for name in series.predicted]
    frame = series.frames.get(split)
    moved = {name: in_data_units(x, series.names, frame) for name, x in found.items()}
    if frame is not None:  # a band of turned coordinates is none of the coordinates
        moved = {"forecast": moved["forecast"]}
    true, rows, next_end = in_data_units(truth, series.names, frame), [], 0
    for number, end in enumerate(windows.ends.tolist()):
        if not series.by_row and end < next_end:
            continue
        next_end = end + windows.lengths[1]
        row: dict[str, Any] = {"row" if series.by_row else "step": number if series.by_row else end}
        for name, index in zip(series.predicted, chosen, strict=True):
            row[name] = {key: x[number, :, index] for key, x in moved.items()}
            if not np.isnan(true[number, :, index]).all():
                row[name]["true"] = true[number, :, index]
        rows.append(row)
    return describe_rows(iter(rows))


def predict_file(data: DataArguments, folder: str, args: TrainingArguments) -> None:
    """Forecast what comes after the end of a table, or of each of its rows: print the first steps, and write all to
    `forecast.csv`."""
    model = load_trained(AutoModelForTimeSeriesPrediction, folder).eval()
    config: Any = model.config
    file, output = str(data.predict_file), Path(str(args.output_dir))
    ahead, dataset = config.prediction_length, data.read_file(file)
    frame: Frame | None = None
    if has_row_windows(dataset, data.past_prefix):
        rows, frame = read_rows(dataset, data, config, None)
        names, predicted, windows = rows.names, rows.predicted, windows_of_rows(rows)
        index: Any = pd.MultiIndex.from_product([range(len(windows)), range(ahead)], names=["row", "step"])
        what = f"{ahead} steps after the end of each row"
    else:
        table = read_steps(dataset, data, config, data.names_of(config))
        names, predicted = table.names, table.names
        whole = joined(table, SeriesTable(names, np.full((ahead, len(names)), np.nan), None), 1)
        features = _features(whole, data, config, whole.times is not None and whole.step is not None)
        windows = Windows(whole.values, np.array([len(table.values)]), (config.context_length, ahead), features)
        steps, name = (range(len(whole.values)), "step") if whole.times is None else (whole.times, "time")
        index, what = pd.Index(steps[-ahead:], name=name), f"{ahead} steps after its end"
    columns: dict[str, list[np.ndarray]] = {}
    for row in (windows[number] for number in range(len(windows))):
        known = {name: x[None] for name, x in row.items() if name != "future_values"}
        with torch.no_grad():
            columns.setdefault("forecast", []).append(model(**known).prediction_outputs[0].numpy())
            if config.loss == "nll" and frame is None:  # a band of turned coordinates is none of the coordinates
                drawn = model.generate(**known).sequences[0]
                for q in BAND:
                    columns.setdefault(f"{round(100 * q)} %", []).append(drawn.quantile(q, dim=0).numpy())
    moved = {kind: in_data_units(np.stack(x), names, frame) for kind, x in columns.items()}
    found = pd.DataFrame(
        {f"{name} {kind}": x[..., names.index(name)].reshape(-1) for name in predicted for kind, x in moved.items()},
        index=index,
    )
    output.mkdir(parents=True, exist_ok=True)
    found.to_csv(output / "forecast.csv")
    print(f"\n{file}: {what}, in {output / 'forecast.csv'}\n{found.head(12).to_string()}")


def run(data: DataArguments, model_args: BackboneArguments, args: TrainingArguments) -> bool:
    """Read the data, train, evaluate and report. Returns whether a model was trained."""
    set_seed(args.seed)
    saved = (
        None if model_args.model_name_or_path is None else AutoConfig.from_pretrained(model_args.model_name_or_path)
    )
    if saved is not None:
        data.check_saved(str(model_args.model_name_or_path), saved)
    series = load(data, saved, args.seed)
    trains = "train" in series.windows
    fields = fields_of(series, data) if saved is None else {}
    window = next(iter(series.windows.values()))
    model = make_model(
        AutoModelForTimeSeriesPrediction, model_args, None, max(256, sum(window.lengths)), trains, **fields
    )
    scores = ForecastScores(series.std, series.names, series.predicted, series.by_row)
    options = {"data_collator": default_data_collator, "compute_metrics": scores}
    trainer = build_trainer(ForecastTrainer, model, args, None, series.windows, **options)
    counts = ", ".join(f"{split} {len(part)}" for split, part in series.windows.items())
    before, ahead = window.lengths
    train_and_save(
        trainer, f"Windows: {counts}; {before} steps, {ahead} to predict. Series: {', '.join(series.names)}"
    )
    report(trainer, scores, series, data)
    return trains


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with these arguments, by default those of the process."""
    classes = (DataArguments, BackboneArguments, TrainingArguments)
    run_recipe("forecasting", __doc__, classes, run, arguments, DEFAULTS, PRESETS, predict_file)
