"""Train a Reformer to forecast one or several time series, with gaps: load, weather, vehicle trajectories.

    # a complete run without a download, in about two minutes on two cores
    hf-reformer train forecasting --demo

    # your own series: csv, jsonl or parquet with one time step per row, a column of times and one for each series
    hf-reformer train forecasting --train_file power.csv --context_length 336 --prediction_length 96 --baselines

    # one window per row: lists obs_x, obs_y, … of the past, and fut_x, fut_y, … of the future
    hf-reformer train forecasting --train_file cars.parquet --validation_file cars.validation.parquet --baselines

    # a model saved by one of these runs: train it further, or only forecast beyond the end of a table
    hf-reformer train forecasting --model_name_or_path runs/forecasting --train_file more.csv
    hf-reformer train forecasting --model_name_or_path runs/forecasting --predict_file until_today.csv

All options of `transformers.TrainingArguments` work, `--resume_from_checkpoint last` included.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    SeriesTable,
    Windows,
    describe_rows,
    has_row_windows,
    joined,
    position_pairs,
    windows_of_rows,
)
from ..training.forecasting import (
    BAND,
    ForecastScores,
    ForecastTrainer,
    baseline_forecasts,
    draw_forecasts,
    draw_trajectories,
    fit_skip,
)
from ..training.forecasting_data import (
    Series,
    SeriesArguments,
    fields_of,
    in_data_units,
    load,
    read_rows,
    read_steps,
    time_features,
)
from ..training.model_setup import SAVED_MODEL, BackboneArguments, load_trained, make_model, option, run_recipe
from ..training.reports import format_tables, write_report, write_rows
from ..training.trainers import build_trainer, train_and_save

DEFAULTS = {
    "output_dir": "runs/forecasting", "attn_layers": ["local", "lsh"], "hidden_dropout_prob": 0.1,
    "num_train_epochs": 5, "learning_rate": 3e-4, "per_device_train_batch_size": 32, "per_device_eval_batch_size": 32,
    "lr_scheduler_type": "cosine", "label_names": ["future_values"],
}  # fmt: skip
DEMO = {
    "output_dir": "runs/demo-forecast", "baselines": True, "num_train_epochs": 2, "learning_rate": 1e-3,
    "context_length": 168, "prediction_length": 48, "season": 168,
    "hidden_size": 64, "attention_head_size": 32, "feed_forward_size": 128,
    "eval_strategy": "no", "window_stride": 2, "eval_stride": 4,
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {**SAVED_MODEL, "--demo": DEMO}


@dataclass
class DataArguments(SeriesArguments):
    """Where the series come from."""

    sources = ("demo",)

    demo: bool = option(False, "Complete run without a download: synthetic electricity load.")

    def read_source(self) -> Mapping[str, Dataset]:
        return {"train": seasonal_load()} if self.demo else super().read_source()

    def describe(self) -> str:
        return "the made-up load of a grid" if self.demo else super().describe()


def report(trainer: Any, scores: ForecastScores, series: Series, data: DataArguments) -> None:
    """Write forecasts, plots and scores of all splits except the training data, with baselines."""
    folder, tables, trained = Path(str(trainer.args.output_dir)), {}, trainer.train_dataset is not None
    for split, windows in series.windows.items():
        if split == "train":
            continue
        output = trainer.predict(windows, metric_key_prefix=split)
        past, truth = windows.arrays()
        if np.isnan(truth).all(axis=(1, 2)).any():  # the loss of windows without a future is a meaningless 0
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
    """Make a line for every row, or for consecutive windows: the forecast, and the true values if known."""
    chosen = [series.names.index(name) for name in series.predicted]
    frame = series.frames.get(split)
    moved = {name: in_data_units(x, series.names, frame) for name, x in found.items()}
    if frame is not None:  # bands of rotated coordinates are not bands of the original ones
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
    """Forecast beyond the end of a table or each of its rows; print the first steps, write all to `forecast.csv`."""
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
        features = time_features(whole, data, config, whole.times is not None and whole.step is not None)
        windows = Windows(whole.values, np.array([len(table.values)]), (config.context_length, ahead), features)
        steps, name = (range(len(whole.values)), "step") if whole.times is None else (whole.times, "time")
        index, what = pd.Index(steps[-ahead:], name=name), f"{ahead} steps after its end"
    columns: dict[str, list[np.ndarray]] = {}
    for row in (windows[number] for number in range(len(windows))):
        known = {name: x[None] for name, x in row.items() if name != "future_values"}
        with torch.no_grad():
            columns.setdefault("forecast", []).append(model(**known).prediction_outputs[0].numpy())
            if config.loss == "nll" and frame is None:  # rotated coordinates have other bands
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
    if saved is None and model.config.linear_skip:
        fit_skip(model, series.windows["train"])
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
    """Run the recipe with the given arguments, by default those of the process."""
    classes = (DataArguments, BackboneArguments, TrainingArguments)
    run_recipe("forecasting", __doc__, classes, run, arguments, DEFAULTS, PRESETS, predict_file)
