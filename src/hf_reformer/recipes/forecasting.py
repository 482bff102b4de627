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

from ..data.demo_signals import seasonal_load
from ..data.series import (
    Frame,
    RowWindows,
    SeriesTable,
    Windows,
    calendar,
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
from ..training.data_setup import SplitArguments
from ..training.forecasting import (
    BAND,
    ForecastScores,
    ForecastTrainer,
    baseline_forecasts,
    draw_forecasts,
    draw_trajectories,
)
from ..training.model_setup import SAVED_MODEL, BackboneArguments, load_trained, make_model, option, parse_arguments
from ..training.reports import format_tables, write_report, write_rows
from ..training.trainers import build_trainer, train_and_save

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
NONE = "none"


@dataclass
class DataArguments(SplitArguments):
    """Where the series come from, and how they are cut into windows."""

    sources = ("demo",)

    demo: bool = option(False, "Complete run without a download: the made-up load of a grid.")
    train_file: str | None = option(None, "csv, tsv, json, jsonl or parquet file: a row a step, or a window a row.")
    time_column: str | None = option(None, "Default: found by its name; without one, rows are steps.")
    series: list[str] | None = option(None, "Names of the series. Default: all columns of numbers.")
    past_prefix: str = option("obs_", "Of a table with a window a row: what columns of the past begin with.")
    future_prefix: str = option("fut_", "What columns of the future begin with.")
    relative_positions: bool = option(
        True, "Of a window a row: see series x and y from the last place, turned into the way that it goes."
    )
    context_length: int | None = option(None, "Steps that a forecast looks back. Default: 96; of rows: all.")
    prediction_length: int | None = option(None, "Steps to forecast. Default: 24; of rows: all.")
    patch_length: int | None = option(None, "Steps of a token. Default: a twenty-fourth of the context.")
    window_stride: int = option(1, "Steps from one training window to the next.")
    eval_stride: int = option(1, "Steps from one window that is evaluated to the next.")
    mix_series: bool | None = option(
        None, "A token holds all series, not one: where series explain each other. Default: for a window a row."
    )
    time_features: bool = option(True, "Tell the model the time of day and of the week, where there are times.")
    scaling: str | None = option(
        None, "What each window is scaled by: std, last, mean, none. Default: std; for a window a row: none.",
        choices=["std", "last", "mean", NONE],
    )  # fmt: skip
    loss: str = option("nll", "nll: learn a distribution; mse or mae: a number.", choices=["nll", "mse", "mae"])
    distribution: str = option(
        "student_t", "Of --loss nll.", choices=["student_t", "normal", "negative_binomial"]
    )  # fmt: skip
    linear_skip: bool = option(True, "Add a linear map of the context to forecasts.")
    season: int | None = option(None, "Steps of a season, for the baseline that repeats the last one.")
    baselines: bool = option(False, "Also evaluate simple models on the same windows.")
    predict_file: str | None = option(None, "A table: forecast what comes after its end.")

    def read_source(self) -> Mapping[str, Dataset]:
        return {"train": seasonal_load()} if self.demo else super().read_source()

    def describe(self) -> str:
        return "the made-up load of a grid" if self.demo else super().describe()

    def has_inputs(self) -> bool:
        return self.predict_file is not None

    def check(self, model: BackboneArguments, args: Any) -> None:
        super().check(model, args)
        if self.predict_file is not None and not Path(self.predict_file).is_file():
            raise ValueError(f"--predict_file: there is no table `{self.predict_file}`.")
        if model.model_name_or_path is not None and (self.context_length or self.prediction_length):
            raise ValueError(
                "--context_length and --prediction_length are those of the saved model. Leave them out, or leave out "
                "--model_name_or_path to train a new one."
            )


class Series(NamedTuple):
    """Windows of every split, and what is known of all of them."""

    names: list[str]
    predicted: list[str]
    windows: dict[str, Windows]
    by_row: bool
    mean: np.ndarray  # (S), of the training data
    std: np.ndarray
    frames: dict[str, Frame]  # of rows whose positions are relative
    tables: dict[str, SeriesTable]


def load(data: DataArguments, saved: Any, seed: int) -> Series:
    """Read all splits and cut them into windows; hold out validation data, the last ones in time, if there is none."""
    splits = data.read()
    first = next(iter(splits.values()))
    if has_row_windows(first, data.past_prefix):
        return _load_rows(data, splits, saved, seed)
    tables = {}
    for split, part in splits.items():
        with data.naming_source(split):
            tables[split] = read_table(part, data.time_column, data.series)
    return _load_tables(data, tables, saved)


def _load_rows(data: DataArguments, splits: Mapping[str, Dataset], saved: Any, seed: int) -> Series:
    steps = None if saved is None else (saved.context_length, saved.prediction_length)
    rows: dict[str, RowWindows] = {}
    for split, part in splits.items():
        with data.naming_source(split):
            rows[split] = read_row_windows(part, data.past_prefix, data.future_prefix, steps, data.series)
            steps = (rows[split].past.shape[1], rows[split].future.shape[1])
    names, predicted = next(iter(rows.values()))[:2]
    for split, part in rows.items():
        if part.names != names:
            raise ValueError(f"The {split} data has the series {part.names}, not {names}.")
    frames, windows = {}, {}
    chosen = data.choose_rows({split: len(part.past) for split, part in rows.items()}, seed)
    for split, (source, numbers) in chosen.items():
        part = rows[source]
        part = part._replace(past=part.past[numbers], future=part.future[numbers])
        pairs = position_pairs(names) if data.relative_positions else []
        if pairs:
            frame = frames[split] = moving_frame(part.past[..., list(pairs[0])])
            past, future = part.past.copy(), part.future.copy()
            for pair in map(list, pairs):
                past[..., pair], future[..., pair] = frame.enter(past[..., pair]), frame.enter(future[..., pair])
            part = part._replace(past=past, future=future)
        windows[split] = windows_of_rows(part)
    mean, std = _units(saved, windows["train"].values if "train" in windows else None, names)
    return Series(names, predicted, windows, True, mean, std, frames, {})


def _load_tables(data: DataArguments, tables: dict[str, SeriesTable], saved: Any) -> Series:
    names = next(iter(tables.values())).names
    for split, table in tables.items():
        if table.names != names:
            raise ValueError(f"The {split} data has the series {table.names}, not {names}.")
    before = data.context_length or 96 if saved is None else saved.context_length
    ahead = data.prediction_length or 24 if saved is None else saved.prediction_length
    if "train" in tables and "validation" in data.parts and "validation" not in tables:
        whole = tables["train"]
        cut = round(len(whole.values) * (1 - data.validation_fraction))
        parts = {"train": slice(0, cut), "validation": slice(cut, None)}
        held = {
            split: SeriesTable(names, whole.values[part], None if whole.times is None else whole.times[part])
            for split, part in parts.items()
        }
        tables = {**held, **{split: table for split, table in tables.items() if split != "train"}}
    uses_times = data.time_features if saved is None else saved.num_time_features > 0
    uses_times = uses_times and all(table.times is not None for table in tables.values())
    windows: dict[str, Windows] = {}
    history: SeriesTable | None = None
    limits = {"train": data.max_train_samples, "test": data.max_predict_samples}
    for split, table in tables.items():
        start = 0
        steps: int | None = None if history is None else follows(history, table)
        if history is not None and table.times is None and "train" in tables and data.validation_file is None:
            steps = 1  # what was held out
        if history is not None and steps is not None:  # the past may reach back
            start = len(history.values) + steps - 1
            whole = joined(history, table, steps) if table.times is not None else SeriesTable(
                names, np.concatenate([history.values, table.values]), None
            )  # fmt: skip
        else:
            whole = table
        history = whole
        earliest = start if start else min(before, max(1, len(table.values) - ahead))
        stride = data.window_stride if split == "train" else data.eval_stride
        ends = np.arange(earliest, len(whole.values) - ahead + 1, stride)
        if not len(ends):
            raise ValueError(
                f"The {split} data has {len(table.values)} steps, too few for a window of {ahead} steps to predict. "
                "Give more, or lower --prediction_length."
            )
        limit = limits.get(split.split("_")[0], data.max_eval_samples)
        if limit is not None and limit < len(ends):
            ends = ends[np.linspace(0, len(ends) - 1, limit).astype(int)]
        features = calendar(whole.times) if uses_times and whole.times is not None else None
        windows[split] = Windows(whole.values, ends, (before, ahead), features)
    mean, std = _units(saved, tables["train"].values if "train" in tables else None, names)
    return Series(names, list(names), windows, False, mean, std, {}, tables)


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
    scaling = data.scaling or (NONE if series.by_row else "std")
    counts = data.loss == "nll" and data.distribution == "negative_binomial"
    fields = {
        "context_length": before, "prediction_length": ahead,
        "patch_length": data.patch_length or max(1, before // 24), "input_size": len(series.names), "mix_series": mix,
        "loss": data.loss, "distribution_output": data.distribution,
        "scaling": None if scaling == NONE else scaling, "linear_skip": data.linear_skip and not counts,
        "num_time_features": 0 if window.features is None else window.features.shape[1],
    }  # fmt: skip
    if counts:
        return {**fields, "scaling": "mean"}
    return {**fields, "series_mean": series.mean.tolist(), "series_std": series.std.tolist()}


def in_data_units(x: np.ndarray, series: Series, split: str) -> np.ndarray:
    """(rows, N, S) with positions as the data has them, not relative ones."""
    frame = series.frames.get(split)
    if frame is None:
        return x
    x = np.array(x, dtype=np.float64)
    for pair in map(list, position_pairs(series.names)):
        x[..., pair] = frame.leave(x[..., pair])
    return x


def report(trainer: Any, scores: ForecastScores, series: Series, data: DataArguments) -> None:
    """Write forecasts, pictures and scores of all splits but the training data, and those of baselines."""
    folder, tables, trained = Path(str(trainer.args.output_dir)), {}, trainer.train_dataset is not None
    for split, windows in series.windows.items():
        if split == "train":
            continue
        output = trainer.predict(windows, metric_key_prefix=split)
        trainer.save_metrics(split, output.metrics)
        if not trainer.is_world_process_zero():
            continue
        forecast, low, high, crps = (np.asarray(x) for x in output.predictions)
        past, truth = windows.arrays()
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
    moved = {name: in_data_units(x, series, split) for name, x in found.items()}
    if series.frames:  # a band of turned coordinates is none of the coordinates
        moved = {"forecast": moved["forecast"]}
    true, rows, next_end = in_data_units(truth, series, split), [], 0
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


def predict_file(file: str, folder: str, output: Path, data: DataArguments) -> None:
    """Forecast what comes after the end of a table: print the first steps, and write all to `forecast.csv`."""
    model = load_trained(AutoModelForTimeSeriesPrediction, folder).eval()
    config: Any = model.config
    table = read_table(data.read_file(file), data.time_column, data.series)
    ahead, uses_times = config.prediction_length, config.num_time_features > 0
    if uses_times and (table.times is None or table.step is None):
        raise ValueError(f"`{file}` has no times, and the model was trained with times. Name them by --time_column.")
    index: Any = np.arange(len(table.values), len(table.values) + ahead)
    features = None
    if table.times is not None and table.step is not None:
        index = table.times[-1] + np.arange(1, ahead + 1) * table.step
        features = calendar(np.concatenate([table.times, index])) if uses_times else None
    row = Windows(table.values, np.array([len(table.values)]), (config.context_length, ahead), features)[0]
    known = {name: x[None] for name, x in row.items() if name != "future_values"}
    with torch.no_grad():
        columns = {"forecast": model(**known).prediction_outputs[0].numpy()}
        if config.loss == "nll":
            drawn = model.generate(**known).sequences[0]
            columns |= {f"{round(100 * q)} %": drawn.quantile(q, dim=0).numpy() for q in BAND}
    found = pd.DataFrame(
        {f"{name} {kind}": x[:, number] for number, name in enumerate(table.names) for kind, x in columns.items()},
        index=pd.Index(index, name="time" if table.times is not None else "step"),
    )
    output.mkdir(parents=True, exist_ok=True)
    found.to_csv(output / "forecast.csv")
    print(f"\n{file}: {ahead} steps after its end, in {output / 'forecast.csv'}\n{found.head(12).to_string()}")


def run(data: DataArguments, model_args: BackboneArguments, args: TrainingArguments) -> bool:
    """Read the data, train, evaluate and report. Returns whether a model was trained."""
    set_seed(args.seed)
    saved = (
        None if model_args.model_name_or_path is None else AutoConfig.from_pretrained(model_args.model_name_or_path)
    )
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
    data, model_args, args = parse_arguments("forecasting", __doc__, classes, arguments, DEFAULTS, PRESETS)
    data.check(model_args, args)
    trained = bool(data.parts) and run(data, model_args, args)
    if data.predict_file is not None and args.process_index == 0:
        folder = args.output_dir if trained else model_args.model_name_or_path
        predict_file(data.predict_file, str(folder), Path(str(args.output_dir)), data)
