"""Forecasting: the Trainer, scores, baselines and plots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scoringrules
import torch
from matplotlib.figure import Figure
from sklearn.linear_model import Ridge
from transformers import EvalPrediction, Trainer

from ..data.series import Windows, filled_forward, position_pairs
from .trainers import RecipeMixin, SequentialEvalMixin

SAMPLES = 100  # samples of a distribution for its scores and bands
BAND = (0.1, 0.9)
FITTED = 5000  # maximum number of windows to fit linear maps to
Scores = dict[str, float]


def fit_skip(model: Any, train: Windows) -> None:
    """Initialize the linear part of a new model by ridge regression on windows spread over the training data."""
    chosen = np.linspace(0, len(train) - 1, min(len(train), FITTED)).astype(int)
    model.fit_skip(torch.utils.data.DataLoader(train.select(np.unique(chosen)), batch_size=256))


class ForecastTrainer(RecipeMixin, SequentialEvalMixin, Trainer):
    """A Trainer whose predictions are forecasts, the bounds of their bands and their CRPS.

    They are a tuple (forecast, low, high, crps) of shape (rows, P, S) each, in the data's units.
    """

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, ...]:
        inputs = self._prepare_inputs(inputs)
        unwrapped: Any = self.accelerator.unwrap_model(model)
        with torch.no_grad(), self.compute_loss_context_manager():
            out = model(**inputs)
            if prediction_loss_only:
                return out.loss.detach(), None, None
            future, forecast = inputs["future_values"].float(), out.prediction_outputs.float()
            low = high = forecast
            crps = (forecast - future).abs()  # the CRPS of a single number
            if unwrapped.config.loss == "nll":
                known = {name: x for name, x in inputs.items() if not name.startswith("future_v")}
                drawn = unwrapped.generate(**known, num_parallel_samples=SAMPLES).sequences.float()
                low, high = drawn.quantile(torch.tensor(BAND, device=drawn.device), dim=1)
                truth, ensemble = future.cpu().numpy().astype(float), drawn.movedim(1, -1).cpu().numpy().astype(float)
                crps = torch.from_numpy(scoringrules.crps_ensemble(truth, ensemble)).to(forecast)
        return out.loss.detach(), (forecast, low, high, crps), future


def score(
    forecast: np.ndarray, truth: np.ndarray, std: np.ndarray, names: Sequence[str], predicted: Sequence[str],
    crps: np.ndarray | None = None, by_series: bool = False,
) -> Scores:  # fmt: skip
    """Score (rows, P, S) forecasts, ignoring NaN in the truth.

    Scores for which no truth is known are left out.

    Args:
        std: (S), by which errors are divided: `mse`, `mae` and `crps` are of standardized values.
        predicted: those of `names` that are to be predicted.
        crps: (rows, P, S) continuous ranked probability scores; None: the absolute errors, as for single numbers.
        by_series: add the root mean squared error of every series; and for positions, `ade` and `fde`: the mean
            distance over all steps and at the last one. All of these are in the data's units.
    """
    chosen = [names.index(name) for name in predicted]
    error = (forecast - truth)[..., chosen] / std[chosen]
    ranked = np.abs(error) if crps is None else crps[..., chosen] / std[chosen]
    parts = {"mse": error**2, "mae": np.abs(error), "crps": ranked}
    if by_series:
        for name, index in zip(predicted, chosen, strict=True):
            parts[f"rmse {name}"] = (forecast - truth)[..., index] ** 2
        for x, y in position_pairs(list(names)):
            if {x, y} <= set(chosen):
                distance = np.linalg.norm((forecast - truth)[..., [x, y]], axis=-1)
                prefix = names[x][:-1]
                parts |= {f"{prefix}ade": distance, f"{prefix}fde": distance[:, -1]}
    found = {name: float(np.nanmean(part)) for name, part in parts.items() if not np.isnan(part).all()}
    return {name: value**0.5 if name.startswith("rmse ") else value for name, value in found.items()}


class ForecastScores:
    """`compute_metrics` for the Trainer."""

    def __init__(self, std: np.ndarray, names: Sequence[str], predicted: Sequence[str], by_series: bool) -> None:
        self.std, self.names, self.predicted, self.by_series = std, list(names), list(predicted), by_series

    def __call__(self, prediction: EvalPrediction) -> Scores:
        predictions: Any = prediction.predictions
        return self.of(predictions[0], np.asarray(prediction.label_ids), predictions[3])

    def of(self, forecast: np.ndarray, truth: np.ndarray, crps: np.ndarray | None = None) -> Scores:
        return score(forecast, truth, self.std, self.names, self.predicted, crps, self.by_series)


def baseline_forecasts(train: Windows, evaluated: Windows, season: int | None, rows: bool) -> dict[str, np.ndarray]:
    """Compute forecasts of simple models, (rows, P, S).

    Args:
        season: steps per season; the last season is repeated.
        rows: True: windows are rows of a table, and a linear model maps the past of all series to their future.
            False: windows are of one continuous table, and a linear model shared by all series maps the past of a
            series, minus its last value, to its future (NLinear).
    """
    past, _ = evaluated.arrays()
    past, ahead = filled_forward(past), evaluated.lengths[1]
    last = np.repeat(past[:, -1:], ahead, axis=1)
    found = {"last value": last}
    if season is not None and season <= past.shape[1]:
        found[f"last {season} steps"] = np.concatenate([past[:, -season:]] * -(-ahead // season), axis=1)[:, :ahead]
    if rows:
        reach = min(5, past.shape[1] - 1)
        if reach > 0:
            slope = (past[:, -1:] - past[:, -1 - reach : -reach]) / reach
            found["last slope"] = last + slope * np.arange(1, ahead + 1)[:, None]
        found["ridge regression"] = _ridge(train, past)
    else:
        found["NLinear (ridge)"] = _nlinear(train, past)
    return found


def _ridge(train: Windows, past: np.ndarray) -> np.ndarray:
    known, future = train.arrays()
    wanted = ~np.isnan(future).all(axis=(0, 1))
    both, before = filled_forward(np.concatenate([known, future], axis=1)), known.shape[1]
    known, future = both[:, :before], both[:, before:]
    found = np.repeat(past[:, -1:], future.shape[1], axis=1)
    scale = known.std(axis=(0, 1)) + 1e-9
    x, y = (a / scale for a in (known, past))
    model = Ridge(alpha=1.0).fit(x.reshape(len(x), -1), future[..., wanted].reshape(len(future), -1))
    found[..., wanted] = model.predict(y.reshape(len(y), -1)).reshape(len(past), future.shape[1], -1)
    return found


def _nlinear(train: Windows, past: np.ndarray) -> np.ndarray:
    """Ridge regression (alpha 10) of the future on the past, both minus the last value, shared by all series."""
    (before, ahead), series = train.lengths, past.shape[2]
    mean, std = np.nanmean(train.values, axis=0), np.nanstd(train.values, axis=0) + 1e-9
    chosen = np.linspace(0, len(train) - 1, min(len(train), FITTED)).astype(int)
    products, targets = np.zeros((before, before)), np.zeros((before, ahead))
    for part in np.array_split(chosen, max(1, len(chosen) // 500)):
        x, y = train.select(part).arrays()
        both = filled_forward((np.concatenate([x, y], axis=1) - mean) / std)
        both = both - both[:, before - 1 : before]
        for number in range(series):
            a, b = both[:, :before, number], both[:, before:, number]
            products += a.T @ a
            targets += a.T @ b
    weights = np.linalg.solve(products + 10 * np.eye(before), targets)
    x = (past - mean) / std
    found = np.einsum("mls,lp->mps", x - x[:, -1:], weights) + x[:, -1:]
    return found * std + mean


def draw_forecasts(
    file: Path, windows: Windows, predictions: Mapping[str, np.ndarray], names: Sequence[str], title: str, rows: bool
) -> None:
    """Plot past, future, forecast and band of up to four series of one window, or one series of up to six rows."""
    count = min(6 if rows else 4, len(windows) if rows else len(names))
    figure = Figure(figsize=(9, 2.1 * count), layout="constrained")
    before, ahead = windows.lengths
    shown = min(before, 2 * ahead)
    for axes, number in zip(np.atleast_1d(figure.subplots(count)), range(count), strict=True):
        window, series = (number * len(windows) // count, 0) if rows else (len(windows) // 2, number)
        row = windows[window]
        past, truth = row["past_values"][-shown:, series], row["future_values"][:, series]
        steps = np.arange(ahead)
        axes.plot(np.arange(-shown, 0), past, color="black", linewidth=1)
        axes.plot(steps, truth, color="black", linewidth=1, linestyle=":", label="true")
        axes.plot(steps, predictions["forecast"][window, :, series], color="tab:blue", label="forecast")
        low, high = (predictions[name][window, :, series] for name in ("low", "high"))
        if not np.array_equal(low, high):
            axes.fill_between(steps, low, high, color="tab:blue", alpha=0.25, linewidth=0, label="80 % interval")
        axes.set(ylabel=names[series])
        axes.grid(alpha=0.3)
    axes.legend(loc="lower left", fontsize="small")
    axes.set(xlabel="steps from now")
    figure.suptitle(title)
    figure.savefig(file, dpi=110)


def draw_trajectories(file: Path, past: np.ndarray, truth: np.ndarray, forecast: np.ndarray, title: str) -> None:
    """Plot nine rows in the plane, given (rows, N, 2) positions of past, true future and forecast."""
    figure = Figure(figsize=(10, 10), layout="constrained")
    for axes, row in zip(figure.subplots(3, 3).flat, np.linspace(0, len(past) - 1, 9).astype(int), strict=True):
        for points, style in ((past, "k.-"), (truth, "k:"), (forecast, "b-")):
            axes.plot(*points[row].T, style, markersize=3)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_title(f"row {row}", fontsize="small")
    figure.suptitle(f"{title}: past, true future (dotted), forecast (blue)")
    figure.savefig(file, dpi=110)
