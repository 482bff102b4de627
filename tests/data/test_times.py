"""Times of steps: what cells are read as, steps of unequal months, what a model is told."""

import datetime

import numpy as np
import pytest

from hf_reformer.data.times import Step, calendar, read_times, step_of

pd = pytest.importorskip("pandas")


@pytest.mark.parametrize(
    ("cells", "first"),
    [
        (["2024-03-01 05:00", "2024-03-01 06:00"], "2024-03-01T05:00"),
        (["2024-03-01 05:00+02:00"], "2024-03-01T03:00"),
        ([datetime.datetime(2024, 3, 1, 5)], "2024-03-01T05:00"),
        ([2023, 2024], "2023-01-01"),
        (["2023", "2024"], "2023-01-01"),
        ([202403, 202404], "2024-03-01"),
        ([20240301, 20240302], "2024-03-01"),
        ([1709269200, 1709272800], "2024-03-01T05:00"),
        ([1709269200.0, 1709272800.0], "2024-03-01T05:00"),
        (["1709269200000", "1709272800000"], "2024-03-01T05:00"),
    ],
)
def test_what_cells_say(cells, first):
    assert read_times(cells, "time")[0] == np.datetime64(first)


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([0, 1, 2], "holds numbers such as 0, which are no times.*--time_column none"),
        ([0.5, 1.5], "holds numbers such as 0.5"),
        ([2020, 20200101], "holds numbers such as 2020"),
        (["Jan", "Feb"], "holds no times.*--time_column"),
        (["0001-01-01"], "holds no times"),
        ([2020, None], "Row 1 has no time"),
    ],
)
def test_what_are_no_times(cells, message):
    with pytest.raises(ValueError, match=message):
        read_times(cells, "time")


@pytest.mark.parametrize("kind", ["h", "D", "7D", "MS", "ME", "QS", "YE", "15"])
def test_steps_go_on_as_the_calendar_does(kind):
    freq = pd.DateOffset(months=1) if kind == "15" else kind
    whole = pd.date_range("2022-01-15" if kind == "15" else "2022-01-01", periods=40, freq=freq).to_numpy()
    whole = whole.astype("datetime64[ns]")
    step = step_of(whole[:30])
    assert np.array_equal(step.after(whole[29], np.arange(1, 11)), whole[30:])
    numbers, exact = step.between(whole[0], whole)
    assert numbers.tolist() == list(range(40))
    assert exact.all()
    assert not step.between(whole[0], whole[1:] + np.timedelta64(1, "s"))[1].any()


def test_two_rows_a_month_apart_are_months():
    assert step_of(np.array(["2024-07-01", "2024-08-01"], dtype="datetime64[ns]")) == Step(1, "months")
    assert step_of(np.array(["2024-07-01", "2024-07-31"], dtype="datetime64[ns]")).unit == "ns"


def test_the_calendar_of_long_steps_is_the_year():
    months = pd.date_range("2021-01-01", periods=36, freq="MS").to_numpy().astype("datetime64[ns]")
    found = calendar(months, step_of(months))
    assert found.shape == (36, 2)
    assert np.abs(found[12:] - found[:-12]).max() < 0.02  # years differ by a day
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-6
