"""Time series: tables by step and by window, gaps and times, what is relative to where."""

import numpy as np
import pytest
from datasets import Dataset

from hf_reformer.data.series import (
    RowWindows,
    SeriesTable,
    Windows,
    filled_forward,
    follows,
    joined,
    moving_frame,
    position_pairs,
    read_row_windows,
    read_table,
    windows_of_rows,
)
from hf_reformer.data.times import calendar, step_of

TIMES = ["2024-01-01 00:00", "2024-01-01 01:00", "2024-01-01 02:00"]


def table(**columns) -> Dataset:
    return Dataset.from_dict(columns)


def test_a_table_of_a_csv_file():
    """All cells are strings there; an empty one is a gap."""
    found = read_table(table(date=TIMES, a=["1", "", "3.5"], b=["4", "5", "nan"], note=["x", "y", "z"]), None, None)
    assert found.names == ["a", "b"]
    assert np.array_equal(found.values, [[1, 4], [np.nan, 5], [3.5, np.nan]], equal_nan=True)
    assert str(found.step) == "0 days 01:00:00"


def test_missing_steps_become_gaps():
    found = read_table(
        table(time=[TIMES[0], TIMES[2], "2024-01-01 03:00", "2024-01-01 04:00"], a=[1.0, 3, 4, 5]), None, None
    )
    assert np.array_equal(found.values[:, 0], [1, np.nan, 3, 4, 5], equal_nan=True)
    assert len(found.times) == 5


def test_months_are_steps_though_they_are_unequal():
    found = read_table(table(month=["2024-01", "2024-02", "2024-04", "2024-05"], a=[1.0, 2, 4, 5]), None, None)
    assert np.array_equal(found.values[:, 0], [1, 2, np.nan, 4, 5], equal_nan=True)
    assert found.times[2] == np.datetime64("2024-03-01")
    later = read_table(table(month=["2024-07", "2024-08"], a=[7.0, 8.0]), None, None)
    assert follows(found, later) == 2
    assert joined(found, later, 2).times[-1] == later.times[-1]


def test_rows_are_steps_where_the_times_are_not_to_be_read():
    uneven = table(time=[TIMES[0], TIMES[1], "2024-01-01 01:30"], a=[1.0, 2, 3])
    found = read_table(uneven, "none", None)
    assert (found.names, found.times) == (["a"], None)
    assert found.values[:, 0].tolist() == [1, 2, 3]


def test_series_are_read_in_the_order_that_is_asked_for():
    found = read_table(table(b=[4.0, 5], a=[1.0, 2]), None, ["a", "b"])
    assert found.values.tolist() == [[1, 4], [2, 5]]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"b": [[1.0], [2.0], [3.0]]}, {"series": ["b"]}, "Row 0 of the column `b` holds a list"),
        ({"time": [0, 1, 2]}, {}, "numbers such as 0, which are no times"),
        ({"time": [TIMES[0], TIMES[0], TIMES[1]]}, {}, r"Row 1 .* has the time of the row before"),
        ({"time": [TIMES[1], TIMES[0], TIMES[2]]}, {}, r"Row 1 .* is earlier than the row before"),
        ({"time": [TIMES[0], TIMES[1], "2024-01-01 01:30"]}, {}, r"Steps are not even"),
        ({"time": ["now", "then", "never"]}, {}, r"`time` holds no times"),
        ({"time": [TIMES[0], None, TIMES[2]]}, {}, r"Row 1 has no time"),
        ({}, {"series": ["b"]}, r"no column \['b'\]"),
        ({"b": ["x", "1", "2"]}, {"series": ["b"]}, r"Row 0 of the column `b` holds 'x'"),
        ({"a": ["x", "y", "z"]}, {}, r"No column holds numbers"),
        ({"a": [1.0, float("inf"), 2.0]}, {}, r"Row 1 of the column `a` is infinite"),
    ],
)
def test_tables_that_are_refused(columns, options, message):
    with pytest.raises(ValueError, match=message):
        read_table(table(**{"a": [1.0, 2.0, 3.0], **columns}), options.get("time_column"), options.get("series"))


def test_tables_that_follow_each_other_are_one_course():
    first = read_table(table(time=TIMES, a=[1.0, 2, 3]), None, None)
    second = read_table(table(time=["2024-01-01 05:00", "2024-01-01 06:00"], a=[6.0, 7.0]), None, None)
    assert follows(first, second) == 3
    whole = joined(first, second, 3)
    assert np.array_equal(whole.values[:, 0], [1, 2, 3, np.nan, np.nan, 6, 7], equal_nan=True)
    assert whole.times[-1] == second.times[-1]
    assert follows(second, first) is None
    assert follows(first, SeriesTable(["a"], np.zeros((2, 1)), None)) is None
    between = read_table(table(time=["2024-01-01 05:30", "2024-01-01 06:30"], a=[6.0, 7.0]), None, None)
    assert follows(first, between) is None


def test_the_calendar_repeats_by_day_and_week():
    hours = np.datetime64("2024-01-01T00:00") + np.arange(24 * 15) * np.timedelta64(1, "h")  # a Monday
    found = calendar(hours, step_of(hours))
    assert found.shape == (360, 4)
    assert np.abs(found[:, [0, 2]][24:] - found[:, [0, 2]][:-24]).max() < 1e-4
    assert np.abs(found[168:] - found[:-168]).max() < 1e-4
    assert np.abs(found[0] - [0, 0, 1, 1]).max() < 1e-6


def test_windows_hold_the_steps_before_and_behind():
    values = np.arange(10.0)[:, None]
    windows = Windows(values, np.array([2, 5, 9]), (4, 2), features=np.arange(10.0)[:, None].astype(np.float32))
    assert windows[1]["past_values"][:, 0].tolist() == [1, 2, 3, 4]
    assert windows[1]["future_values"][:, 0].tolist() == [5, 6]
    assert windows[1]["future_time_features"][:, 0].tolist() == [5, 6]
    early, late = windows[0], windows[2]
    assert np.array_equal(early["past_values"][:, 0], [np.nan, np.nan, 0, 1], equal_nan=True)
    assert np.array_equal(late["future_values"][:, 0], [9, np.nan], equal_nan=True)
    assert windows.select([2])[0]["past_values"][:, 0].tolist() == [5, 6, 7, 8]


def test_windows_of_rows():
    rows = table(
        obs_x=[[1.0, 2], [5, 6]], obs_speed=[[1.0, 1], [2, 2]], fut_x=[[3.0, 4, 5], [7, 8, 9]],
        lead=[[9.0, 9], [8, 8]], name=["a", "b"],
    )  # fmt: skip
    found = read_row_windows(rows, "obs_", "fut_")
    assert found.names == ["x", "speed", "lead"]
    assert found.predicted == ["x"]
    windows = windows_of_rows(found)
    row = windows[1]
    assert row["past_values"].tolist() == [[5, 2, 8], [6, 2, 8]]
    assert np.array_equal(row["future_values"], [[7, np.nan, np.nan], [8, np.nan, np.nan], [9, np.nan, np.nan]], True)
    assert read_row_windows(rows, "obs_", "fut_", series=["x", "lead"]).names == ["x", "lead"]
    with pytest.raises(ValueError, match=r"None of the series \['lead'\] has a future"):
        read_row_windows(rows, "obs_", "fut_", series=["lead"])


def test_row_windows_of_known_series_keep_their_order():
    """Whether a future is there or not, and wherever the columns are: of a table to be predicted, too."""
    rows = table(lead=[[9.0, None]], obs_speed=[[1.0, 1]], obs_x=[[1.0, 2]])
    found = read_row_windows(rows, "obs_", "fut_", (2, 3), ["x", "speed", "lead"], ["x"])
    assert (found.names, found.predicted) == (["x", "speed", "lead"], ["x"])
    assert np.array_equal(found.past, [[[1, 1, 9], [2, 1, np.nan]]], equal_nan=True)
    assert np.isnan(found.future).all()
    with pytest.raises(ValueError, match=r"no series \['y'\]"):
        read_row_windows(rows, "obs_", "fut_", (2, 3), ["x", "y"], ["x"])
    with pytest.raises(ValueError, match="No column begins with 'past_'"):
        read_row_windows(rows, "past_", "fut_")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"obs_x": [[1.0, 2], [5]]}, "Row 1 of the column `obs_x` has 1 steps, where others have 2"),
        ({"obs_x": [[1.0, 2], None]}, "Row 1 of the column `obs_x` has None"),
        ({"obs_x": [["a", "b"], ["c", "d"]]}, "something else than numbers"),
        ({"obs_x": [[1.0, float("inf")], [1, 2]]}, "Row 0 of the column `obs_x` is infinite"),
    ],
)
def test_rows_that_are_refused(columns, message):
    rows = {"obs_x": [[1.0, 2], [5, 6]], "fut_x": [[3.0], [7.0]], **columns}
    with pytest.raises(ValueError, match=message):
        read_row_windows(table(**rows), "obs_", "fut_")
    with pytest.raises(ValueError, match="no future to learn"):
        read_row_windows(table(obs_x=[[1.0, 2]]), "obs_", "fut_")


def test_positions_are_seen_from_the_last_place_along_the_way():
    draw = np.random.default_rng(0)
    past, future = draw.normal(size=(5, 8, 2)).cumsum(1) * 3, draw.normal(size=(5, 4, 2))
    past[4] = past[4, :1]  # one that stands still
    frame = moving_frame(past)
    seen = frame.enter(past)
    assert np.abs(seen[:, -1]).max() < 1e-9
    assert (seen[:4, -6, 0] < 0).all()  # it came from behind,
    assert np.abs(seen[:4, -6, 1]).max() < 1e-9  # straight
    assert np.abs(frame.leave(frame.enter(future)) - future).max() < 1e-9
    lengths = np.linalg.norm(np.diff(seen, axis=1), axis=-1)
    assert np.abs(lengths - np.linalg.norm(np.diff(past, axis=1), axis=-1)).max() < 1e-9


def test_a_gap_at_the_last_step_does_not_erase_the_row():
    past = np.stack([np.arange(8.0), np.zeros(8)], axis=-1)[None].repeat(3, axis=0)
    past[1, -1], past[2, -1, 1] = np.nan, np.nan
    frame = moving_frame(past)
    assert np.array_equal(frame.origin, [[7, 0], [6, 0], [7, 0]])
    seen = frame.enter(past)
    assert np.array_equal(seen[1, :-1, 0], np.arange(7) - 6.0)
    assert np.isnan(seen[1, -1]).all()
    nothing = moving_frame(np.full((1, 8, 2), np.nan))
    assert np.array_equal(nothing.leave(np.ones((1, 1, 2))), np.ones((1, 1, 2)))


def test_pairs_of_coordinates():
    assert position_pairs(["x", "speed", "y", "lead_x", "lead_y", "max"]) == [(0, 2), (3, 4)]


def test_gaps_are_filled_forward_and_then_backward():
    past = np.array([np.nan, 1, np.nan, 3, np.nan])[None, :, None]
    assert filled_forward(past)[0, :, 0].tolist() == [1, 1, 1, 3, 3]
    assert filled_forward(past * np.nan)[0, :, 0].tolist() == [0, 0, 0, 0, 0]


def test_row_windows_are_a_tuple_of_arrays():
    rows = RowWindows(["a"], ["a"], np.zeros((3, 4, 1)), np.ones((3, 2, 1)))
    past, future = windows_of_rows(rows).arrays()
    assert past.shape == (3, 4, 1)
    assert (future == 1).all()
