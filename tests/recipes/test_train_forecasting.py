"""The forecasting recipe: tables and rows, scores by hand, baselines, forecasts beyond the end, what is refused."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from transformers import AutoModelForTimeSeriesPrediction

from hf_reformer.data.series import RowWindows, Windows, windows_of_rows
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
    assert re.search(r"predictions_validation.jsonl +one line per example", printed)
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


def test_a_saved_model_finds_its_series_by_their_names(tmp_path):
    write(tmp_path / "train.csv", 60)
    saved = ["--model_name_or_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "again")]
    files = ["--train_file", str(tmp_path / "train.csv"), "--predict_file", str(tmp_path / "train.csv")]
    recipe.main([*TINY, *files, "--output_dir", str(tmp_path / "out"), *LENGTHS])
    whole = pd.read_csv(tmp_path / "train.csv")
    whole[["time", "still", "b", "a"]].to_csv(tmp_path / "turned.csv", index=False)
    recipe.main([*TINY, *saved, "--predict_file", str(tmp_path / "turned.csv")])
    first, again = (pd.read_csv(tmp_path / name / "forecast.csv") for name in ("out", "again"))
    forecasts = [name for name in first if name.endswith("forecast")]
    assert np.abs(first[forecasts] - again[forecasts]).to_numpy().max() < 1e-4
    assert first["b forecast"].mean() > 10 + first["a forecast"].mean()
    whole.rename(columns={"a": "c"}).to_csv(tmp_path / "other.csv", index=False)
    for option in ("--predict_file", "--test_file", "--train_file"):
        with pytest.raises(ValueError, match=r"no column \['a'\].*found by their names"):
            recipe.main([*TINY, *saved, option, str(tmp_path / "other.csv")])
    with pytest.raises(ValueError, match="--series a: the saved model is of a, b, still"):
        recipe.main([*TINY, *saved, "--test_file", str(tmp_path / "train.csv"), "--series", "a"])
    whole.drop(columns="time").to_csv(tmp_path / "untimed.csv", index=False)
    with pytest.raises(ValueError, match="trained with times, and there are none"):
        recipe.main([*TINY, *saved, "--predict_file", str(tmp_path / "untimed.csv")])


def test_months_are_forecast(tmp_path):
    months = pd.date_range("2019-01-31", periods=60, freq="ME").strftime("%Y-%m-%d")
    pd.DataFrame({"month": months, "a": np.arange(60.0)}).to_csv(tmp_path / "train.csv", index=False)
    files = ["--train_file", str(tmp_path / "train.csv"), "--predict_file", str(tmp_path / "train.csv")]
    recipe.main([*TINY, *files, "--output_dir", str(tmp_path / "out"), *LENGTHS])
    assert pd.read_csv(tmp_path / "out" / "forecast.csv")["time"].tolist() == [
        "2024-01-31", "2024-02-29", "2024-03-31", "2024-04-30",
    ]  # fmt: skip
    assert AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path / "out").config.num_time_features == 2


def load(tmp_path, **options):
    """The windows of a table of 60 steps to train on, and of one of 30 to predict."""
    write(tmp_path / "train.csv", 60)
    write(tmp_path / "test.csv", 30, start="2024-01-03 12:00", gap=False)
    files = {"train_file": str(tmp_path / "train.csv"), "test_file": str(tmp_path / "test.csv")}
    options = {"context_length": 12, "prediction_length": 4, **options}
    return recipe.load(recipe.DataArguments(**files, **options), None, 0)


def test_without_times_a_file_is_a_course_of_its_own(tmp_path, caplog):
    timed = load(tmp_path).windows["test"]
    assert timed.ends.tolist() == list(range(60, 87))  # the past reaches back into the training data
    untimed = load(tmp_path, time_column="none").windows
    assert untimed["test"].ends.tolist() == list(range(12, 27))
    assert len(untimed["test"].values) == 30
    assert untimed["validation"].ends.tolist() == list(range(54, 57))  # what was held out goes on, as it must
    assert "The test data has no times" in caplog.text
    assert "validation data" not in caplog.text


def test_of_test_windows_the_first_are_predicted(tmp_path):
    options = {"max_predict_samples": 5, "max_train_samples": 6}
    found = load(tmp_path, **options).windows
    assert found["test"].ends.tolist() == list(range(60, 65))
    train = found["train"].ends
    assert (len(train), train[-1] - train[0] > 10) == (6, True)  # drawn from all of them
    assert (np.diff(train) > 0).all()


def test_steps_of_several_lengths_are_refused(tmp_path):
    write(tmp_path / "train.csv", 60)
    days = pd.DataFrame({"time": pd.date_range("2024-02-01", periods=30), "a": 1.0, "b": 1.0, "still": 3.0})
    days.to_csv(tmp_path / "test.csv", index=False)
    data = recipe.DataArguments(train_file=str(tmp_path / "train.csv"), test_file=str(tmp_path / "test.csv"))
    with pytest.raises(ValueError, match=r"of the test data are 1 days.*of the train data are 0 days 01:00:00"):
        recipe.load(data, None, 0)


def test_windows_without_a_future_teach_and_score_nothing(tmp_path):
    frame = pd.DataFrame({"a": np.arange(60.0)})
    frame.loc[20:30, "a"] = np.nan
    frame.to_csv(tmp_path / "train.csv", index=False)
    data = recipe.DataArguments(train_file=str(tmp_path / "train.csv"), context_length=12, prediction_length=4)
    ends = recipe.load(data, None, 0).windows["train"].ends.tolist()
    assert not set(ends) & set(range(20, 28))
    assert {19, 28} <= set(ends)


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
    with pytest.raises(ValueError, match=r"--context_length 5: that of the saved model .* is 12"):
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
    config = AutoModelForTimeSeriesPrediction.from_pretrained(tmp_path / "out").config
    assert (config.series_names, config.predicted_series, config.relative_positions) == (("x", "y"), ("x", "y"), True)
    distances = []
    for row, car in zip(rows, truth, strict=True):
        assert row["x"]["true"] == pytest.approx(car["fut_x"], abs=1e-3)
        error = np.array([row[name]["forecast"] for name in "xy"]) - np.array([car["fut_x"], car["fut_y"]])
        distances.append(np.linalg.norm(error, axis=0))
    assert scores["Reformer"]["ade"] == pytest.approx(np.mean(distances), abs=1e-2)  # turning changes no distance


@pytest.mark.parametrize("relative", [True, False])
def test_rows_without_a_future_are_forecast_alike_by_the_run_and_by_its_saved_model(relative, tmp_path):
    """Also by --predict_file, and whatever the order of the columns; nothing is scored."""
    train, test = (cars(count, seed).add_column("obs_speed", [[5.0] * 6] * count) for count, seed in ((20, 0), (3, 1)))
    train.to_parquet(tmp_path / "train.parquet")
    test.select_columns(["obs_speed", "obs_y", "obs_x"]).to_parquet(tmp_path / "test.parquet")
    options = ["--train_file", str(tmp_path / "train.parquet"), "--test_file", str(tmp_path / "test.parquet")]
    options += ["--relative_positions", str(relative), "--predict_file", str(tmp_path / "test.parquet")]
    recipe.main([*TINY, *options, "--output_dir", str(tmp_path / "out")])
    saved = ["--model_name_or_path", str(tmp_path / "out"), "--test_file", str(tmp_path / "test.parquet")]
    recipe.main([*TINY, *saved, "--output_dir", str(tmp_path / "again")])
    rows, again = (lines(tmp_path / name / "predictions_test.jsonl") for name in ("out", "again"))
    assert len(rows) == len(again) == 3
    assert set(rows[0]) == {"row", "x", "y"}  # the speed has no future in training
    assert "true" not in rows[0]["x"]
    table = pd.read_csv(tmp_path / "out" / "forecast.csv").set_index(["row", "step"])
    for number in range(3):
        for name in "xy":
            forecast = rows[number][name]["forecast"]
            assert again[number][name]["forecast"] == pytest.approx(forecast, abs=1e-3)
            assert table.loc[number][f"{name} forecast"].tolist() == pytest.approx(forecast, abs=1e-3)
    for name in ("out", "again"):
        assert "test" not in json.loads((tmp_path / name / "scores.json").read_text())
        found = json.loads((tmp_path / name / "test_results.json").read_text())
        assert not [name for name in found if not name.endswith(("_time", "_runtime", "_per_second"))]
    if relative:
        steps = pd.DataFrame({name: np.arange(20.0) for name in ("x", "y", "speed")})
        steps.to_csv(tmp_path / "steps.csv", index=False)
        with pytest.raises(ValueError, match="it needs a table with one window per row"):
            recipe.main([*TINY, *saved[:2], "--test_file", str(tmp_path / "steps.csv")])
    else:
        with pytest.raises(ValueError, match=r"--relative_positions True: that of the saved model .* is False"):
            recipe.main([*TINY, *saved, "--relative_positions", "True"])


def test_rows_to_learn_from_need_a_future(tmp_path):
    rows = cars(4, 0).to_dict()
    rows["fut_x"][2] = rows["fut_y"][2] = [None] * 4
    Dataset.from_dict(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="1 rows of the train data have no future; the first is row 2"):
        recipe.load(recipe.DataArguments(train_file=str(tmp_path / "train.parquet")), None, 0)


def test_scores_by_hand():
    truth = np.array([[[0.0, 0, 1], [0, 0, np.nan]]])
    forecast = np.array([[[3.0, 4, 1], [0, 1, 7]]])
    found = score(forecast, truth, np.array([1.0, 2, 1]), ["x", "y", "v"], ["x", "y"], by_series=True)
    assert found["mse"] == pytest.approx((9 + 4 + 0 + 0.25) / 4)
    assert found["mae"] == found["crps"] == pytest.approx((3 + 2 + 0 + 0.5) / 4)
    assert (found["ade"], found["fde"]) == (3.0, 1.0)
    assert found["rmse x"] == pytest.approx(np.sqrt(4.5))
    assert "rmse v" not in found
    truth[..., 1] = np.nan  # nothing is known of y, so it has no score
    found = score(forecast, truth, np.array([1.0, 2, 1]), ["x", "y", "v"], ["x", "y"], by_series=True)
    assert set(found) == {"mse", "mae", "crps", "rmse x"}


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


def test_a_gap_does_not_switch_ridge_regression_off():
    draw = np.random.default_rng(0)
    past = draw.normal(size=(200, 6, 1))
    rows = RowWindows(["a"], ["a"], past, past[:, 1:4] * 2)  # not what a last value could tell
    rows.future[7, 1] = np.nan
    windows = windows_of_rows(rows)
    found = baseline_forecasts(windows, windows, None, rows=True)
    error = {name: np.nanmean((x - rows.future) ** 2) for name, x in found.items()}
    assert error["ridge regression"] < 0.01 * error["last value"]


@pytest.mark.parametrize(("scaling", "expected"), [(None, "mean"), ("mean", "mean"), ("none", None)])
def test_counts_are_scaled_as_they_can_be(scaling, expected, tmp_path):
    series = load(tmp_path, distribution="negative_binomial", scaling=scaling)
    data = recipe.DataArguments(distribution="negative_binomial", scaling=scaling)
    fields = recipe.fields_of(series, data)
    assert (fields["scaling"], fields["linear_skip"]) == (expected, False)


@pytest.mark.slow
def test_the_load_of_a_grid_is_learnt(tmp_path):
    recipe.main(["--demo", "--use_cpu", "--disable_tqdm", "True", "--output_dir", str(tmp_path)])
    scores = json.loads((tmp_path / "scores.json").read_text())["validation"]
    assert scores["Reformer"]["mse"] < 0.6 * scores["last value"]["mse"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prediction_length", "500"], "The train data has 54 steps, too few for a window of 500 steps"),
        (
            ["--prediction_length", "10", "--validation_fraction", "0.15"],
            r"\(the last 0.15 of the training data\) has 9 steps.* raise --validation_fraction",
        ),
        (["--series", "c"], r"no column \['c'\]"),
        (["--prediction_length", "0"], "--prediction_length 0 must be at least 1"),
        (["--predict_file", "nowhere.csv"], "there is no table"),
        (["--distribution", "negative_binomial", "--scaling", "std"], "--scaling std shifts values"),
        (["--distribution", "negative_binomial", "--linear_skip", "True"], "--linear_skip shifts values"),
        (["--distribution", "normal", "--loss", "mse"], "--loss mse learns a number"),
    ],
)
def test_tables_that_cannot_be_forecast_are_refused_before_training(more, message, tmp_path):
    write(tmp_path / "train.csv", 60)
    with pytest.raises(ValueError, match=message):
        recipe.main([*TINY, "--train_file", str(tmp_path / "train.csv"), "--output_dir", str(tmp_path / "out"), *more])
    assert not (tmp_path / "out" / "model.safetensors").exists()
