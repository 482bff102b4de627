"""The forecasting recipe: tables and rows, scores by hand, baselines, forecasts beyond the end, what is refused."""

import json

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from transformers import AutoModelForTimeSeriesPrediction

from hf_reformer.data.series import Windows
from hf_reformer.recipes import forecasting as recipe
from hf_reformer.training.forecasting import baseline_forecasts, score

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = [
    *("--hidden_size", "16", "--attn_layers", "full", "--num_attention_heads", "1", "--attention_head_size", "16"),
    *("--feed_forward_size", "16", "--use_cpu", "--disable_tqdm", "True", "--save_strategy", "no"),
    *("--eval_strategy", "no", "--max_steps", "2"),
]
LENGTHS = ["--context_length", "12", "--prediction_length", "4"]


def write(path, steps: int, start: str = "2024-01-01", gap: bool = True) -> None:
    time = pd.date_range(start, periods=steps, freq="h")
    values = np.sin(np.arange(steps) / 4)
    frame = pd.DataFrame({"time": time, "a": values, "b": 50 + 10 * values, "still": 3.0})
    if gap:
        frame.loc[5, "a"] = np.nan
    frame.to_csv(path, index=False)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_table_is_forecast_and_goes_on_where_it_ends(tmp_path, capsys):
    write(tmp_path / "train.csv", 120)
    options = ["--train_file", str(tmp_path / "train.csv"), "--output_dir", str(tmp_path / "out"), *LENGTHS]
    options += ["--baselines", "--season", "6", "--predict_file", str(tmp_path / "train.csv")]
    recipe.main([*TINY, *options])
    printed = capsys.readouterr().out
    for name in ("Reformer", "last value", "last 6 steps", "NLinear (ridge)"):
        assert f"| {name} " in printed
    out = tmp_path / "out"
    assert (out / "forecast_validation.png").exists()
    rows = lines(out / "predictions_validation.jsonl")
    assert [row["step"] for row in rows] == [108, 112, 116]  # windows of what was held out, each after the other
    assert len(rows[0]["a"]["forecast"]) == 4
    assert rows[0]["a"]["true"] == pytest.approx(np.sin(np.arange(108, 112) / 4), abs=1e-4)
    beyond = pd.read_csv(out / "forecast.csv")
    assert beyond["time"].tolist()[0] == "2024-01-06 00:00:00"
    assert {"a forecast", "a 10 %", "a 90 %"} <= set(beyond.columns)
    config = AutoModelForTimeSeriesPrediction.from_pretrained(out).config
    assert config.num_time_features == 4
    assert config.series_mean[2] == 3
    assert config.series_std[2] == 1  # of a constant series


def test_validation_data_look_back_into_training_data(tmp_path):
    write(tmp_path / "train.csv", 60)
    write(tmp_path / "validation.csv", 8, start="2024-01-03 12:00", gap=False)
    options = ["--train_file", str(tmp_path / "train.csv"), "--validation_file", str(tmp_path / "validation.csv")]
    recipe.main([*TINY, *options, *LENGTHS, "--output_dir", str(tmp_path / "out"), "--loss", "mse"])
    rows = lines(tmp_path / "out" / "predictions_validation.jsonl")
    assert [row["step"] for row in rows] == [60, 64]
    saved = ["--model_name_or_path", str(tmp_path / "out"), "--validation_file", str(tmp_path / "train.csv")]
    recipe.main([*TINY, *saved, "--output_dir", str(tmp_path / "again"), "--do_eval"])
    scores = json.loads((tmp_path / "again" / "scores.json").read_text())["validation"]["Reformer"]
    assert scores["crps"] == pytest.approx(scores["mae"])  # of one number
    with pytest.raises(ValueError, match="those of the saved model"):
        recipe.main([*TINY, *saved, "--context_length", "5", "--do_eval"])


def cars(count: int, seed: int) -> Dataset:
    draw = np.random.default_rng(seed)
    angle, speed = draw.uniform(0, 6.28, (count, 1)), draw.uniform(5, 15, (count, 1))
    time, start = np.arange(10) * 0.5, draw.uniform(-100, 100, (count, 2))
    x, y = (start[:, [i]] + speed * time * trig(angle) for i, trig in ((0, np.cos), (1, np.sin)))
    return Dataset.from_dict({"obs_x": x[:, :6], "obs_y": y[:, :6], "fut_x": x[:, 6:], "fut_y": y[:, 6:]})


def test_rows_are_forecast_in_their_own_coordinates(tmp_path):
    """Cars that keep their way and speed: constant velocity is exact, wherever they are and go."""
    cars(40, 0).to_parquet(tmp_path / "train.parquet")
    cars(9, 1).to_parquet(tmp_path / "validation.parquet")
    options = [
        "--train_file",
        str(tmp_path / "train.parquet"),
        "--validation_file",
        str(tmp_path / "validation.parquet"),
    ]
    recipe.main([*TINY, *options, "--output_dir", str(tmp_path / "out"), "--baselines", "--loss", "mae"])
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["validation"]
    assert scores["last slope"]["ade"] < 1e-3
    assert scores["last value"]["fde"] > 5
    assert {"mse", "mae", "crps", "ade", "fde", "rmse x", "rmse y"} == set(scores["Reformer"])
    assert (tmp_path / "out" / "trajectories_validation.png").exists()
    rows = lines(tmp_path / "out" / "predictions_validation.jsonl")
    truth = cars(9, 1)
    assert len(rows) == 9
    distances = []
    for row, car in zip(rows, truth, strict=True):
        assert row["x"]["true"] == pytest.approx(car["fut_x"], abs=1e-3)
        error = np.array([row[name]["forecast"] for name in "xy"]) - np.array([car["fut_x"], car["fut_y"]])
        distances.append(np.linalg.norm(error, axis=0))
    assert scores["Reformer"]["ade"] == pytest.approx(np.mean(distances), abs=1e-2)  # turning changes no distance


def test_test_rows_need_no_future(tmp_path):
    cars(20, 0).to_parquet(tmp_path / "train.parquet")
    cars(3, 1).remove_columns(["fut_x", "fut_y"]).to_parquet(tmp_path / "test.parquet")
    options = ["--train_file", str(tmp_path / "train.parquet"), "--test_file", str(tmp_path / "test.parquet")]
    recipe.main([*TINY, *options, "--output_dir", str(tmp_path / "out")])
    rows = lines(tmp_path / "out" / "predictions_test.jsonl")
    assert len(rows) == 3
    assert "true" not in rows[0]["x"]
    assert "test" not in json.loads((tmp_path / "out" / "scores.json").read_text())


def test_scores_by_hand():
    truth = np.array([[[0.0, 0, 1], [0, 0, np.nan]]])
    forecast = np.array([[[3.0, 4, 1], [0, 1, 7]]])
    found = score(forecast, truth, np.array([1.0, 2, 1]), ["x", "y", "v"], ["x", "y"], by_series=True)
    assert found["mse"] == pytest.approx((9 + 4 + 0 + 0.25) / 4)
    assert found["mae"] == found["crps"] == pytest.approx((3 + 2 + 0 + 0.5) / 4)
    assert (found["ade"], found["fde"]) == (3.0, 1.0)
    assert found["rmse x"] == pytest.approx(np.sqrt(4.5))
    assert "rmse v" not in found


def test_baselines_continue_what_they_can():
    steps = np.arange(200.0)
    season, line = np.tile([1.0, 2, 3, 4], 50), 5 + 2 * steps
    values = np.stack([season, line], axis=1)
    windows = Windows(values, np.arange(20, 190), (16, 8))
    _, truth = windows.arrays()
    found = baseline_forecasts(windows, windows, 4, rows=False)
    assert np.abs(found["last 4 steps"][..., 0] - truth[..., 0]).max() < 1e-6
    assert (np.abs(found["NLinear (ridge)"] - truth) / values.std(0)).max() < 0.1
    by_row = baseline_forecasts(windows, windows, None, rows=True)
    assert np.abs(by_row["last slope"][..., 1] - truth[..., 1]).max() < 1e-3
    assert np.abs(by_row["ridge regression"] - truth).max() < 0.5


@pytest.mark.slow
def test_the_load_of_a_grid_is_learnt(tmp_path):
    recipe.main(["--demo", "--use_cpu", "--disable_tqdm", "True", "--output_dir", str(tmp_path)])
    scores = json.loads((tmp_path / "scores.json").read_text())["validation"]
    assert scores["Reformer"]["mse"] < 0.6 * scores["last value"]["mse"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prediction_length", "500"], "too few for a window of 500 steps"),
        (["--series", "c"], r"no column \['c'\]"),
        (["--prediction_length", "0"], "--prediction_length 0 must be at least 1"),
        (["--predict_file", "nowhere.csv"], "there is no table"),
    ],
)
def test_tables_that_cannot_be_forecast_are_refused_before_training(more, message, tmp_path):
    write(tmp_path / "train.csv", 60)
    with pytest.raises(ValueError, match=message):
        recipe.main([*TINY, "--train_file", str(tmp_path / "train.csv"), "--output_dir", str(tmp_path / "out"), *more])
    assert not (tmp_path / "out" / "model.safetensors").exists()
