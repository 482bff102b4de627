"""Time series forecasting in one pass: the steps to predict are query tokens appended to the past."""

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributions import Distribution
from transformers.modeling_outputs import SampleTSPredictionOutput
from transformers.time_series_utils import NegativeBinomialOutput, NormalOutput, StudentTOutput
from transformers.utils import can_return_tuple

from ..configuration_reformer import ReformerConfig
from ..ops.sequence_parallel import gather_sequence
from .input_checks import refuse_values
from .modeling_reformer import ReformerModel
from .outputs import ReformerTimeSeriesOutput
from .pretrained import ReformerPreTrainedModel, ZeroLinear

DISTRIBUTIONS = {"student_t": StudentTOutput, "normal": NormalOutput, "negative_binomial": NegativeBinomialOutput}
MEANS = ("loc", "value")  # parameters that are shifted with the values
SCALERS = {
    "std": "TimeSeriesStdScaler", "last": "TimeSeriesStdScaler", "mean": "TimeSeriesMeanScaler",
    None: "TimeSeriesNOPScaler",
}  # fmt: skip


def _make_scaler(scaling: str | None) -> Any:
    """Make a scaler of transformers. Imported here, as its module fails under `python -OO`, which drops docstrings."""
    from transformers.models.time_series_transformer import modeling_time_series_transformer as library

    return getattr(library, SCALERS[scaling])(SimpleNamespace(default_scale=1.0))  # else that of the batch


class SeriesEmbeddings(nn.Module):
    """Embeddings of patches of time series, past and future. Missing values are 0 and flagged as missing."""

    def __init__(self, config: ReformerConfig):
        super().__init__()
        self.patch = config.patch_length
        series = config.input_size if config.mix_series else 1
        self.projection = nn.Linear(self.patch * (2 * series + config.num_time_features), config.hidden_size)
        self.future = nn.Embedding(1, config.hidden_size)
        self.series = None
        if config.input_size > 1 and not config.mix_series:
            self.series = nn.Embedding(config.input_size, config.hidden_size)

    def forward(self, steps: torch.Tensor, patches: int) -> torch.Tensor:
        """Embed the steps of S sequences, (B, S, N, F), as (B, S, T, D); the last `patches` patches are the future."""
        x = self.projection(steps.unflatten(2, (-1, self.patch)).flatten(3))
        x = x + nn.functional.pad(self.future.weight.expand(patches, -1), (0, 0, x.shape[2] - patches, 0))
        return x if self.series is None else x + self.series.weight[:, None]


class Window(NamedTuple):
    """The context of a forecast: values (B, N, S), scaled per window, and 0 if missing."""

    values: torch.Tensor
    observed: torch.Tensor  # (B, N, S), in the dtype of the values
    loc: torch.Tensor  # (B, 1, S)
    scale: torch.Tensor  # (B, 1, S)


class SeriesGenerationMixin:
    """`generate` for forecasts. Without this base class, transformers adds text generation to classes from the Hub."""

    config: Any
    distribution: Any

    @torch.no_grad()
    def generate(
        self,
        past_values: torch.Tensor,
        past_observed_mask: torch.Tensor | None = None,
        past_time_features: torch.Tensor | None = None,
        future_time_features: torch.Tensor | None = None,
        num_parallel_samples: int | None = None,
        **kwargs: Any,
    ) -> SampleTSPredictionOutput:
        """Draw `num_parallel_samples` independent samples of every future value; `sequences`: (B, samples, P[, S]).

        Other arguments are those of `forward`, which runs once for all samples.

        Raises:
            ValueError: the model predicts single values, not distributions (`config.loss`).
        """
        if self.distribution is None:
            raise ValueError(
                f"This model was made with `loss={self.config.loss!r}`: it gives one forecast, `prediction_outputs` "
                "of a call, and no distribution to draw from. Train one with `loss='nll'`."
            )
        model: Any = self
        out = model(
            past_values=past_values,
            past_observed_mask=past_observed_mask,
            past_time_features=past_time_features,
            future_time_features=future_time_features,
            **{**kwargs, "return_dict": True},
        )
        count = self.config.num_parallel_samples if num_parallel_samples is None else num_parallel_samples
        drawn = model._distribution(out.params, out.loc, out.scale).sample((count,))
        return SampleTSPredictionOutput(sequences=drawn.transpose(0, 1))

    @classmethod
    def can_generate(cls) -> bool:
        """Return False: this is not text generation, so there is no `generation_config`."""
        return False


class ReformerForTimeSeriesPrediction(SeriesGenerationMixin, ReformerPreTrainedModel):
    """Reformer that predicts `prediction_length` steps of time series, as distributions or single values."""

    main_input_name = "past_values"
    accepts_loss_kwargs = False  # the loss is a mean over observed values

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.model = ReformerModel(config)
        self.model.set_input_embeddings(SeriesEmbeddings(config))
        self.distribution = DISTRIBUTIONS[config.distribution_output]() if config.loss == "nll" else None
        outputs = config.patch_length * (config.input_size if config.mix_series else 1)
        names = ["value"] if self.distribution is None else list(self.distribution.args_dim)
        # so that initial forecasts are those of the linear map alone
        kinds = {name: ZeroLinear if config.linear_skip and name in MEANS else nn.Linear for name in names}
        self.parameters_proj = nn.ModuleDict(
            {name: kind(2 * config.hidden_size, outputs) for name, kind in kinds.items()}
        )
        if config.linear_skip:
            series = config.input_size if config.mix_series else 1
            sizes = config.context_length * series, config.prediction_length * series
            maps = [ZeroLinear(*sizes) for _ in range(config.input_size if config.individual_skip else 1)]
            self.skip: Any = nn.ModuleList(maps) if config.individual_skip else maps[0]
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        past_values: torch.Tensor | None = None,
        past_observed_mask: torch.Tensor | None = None,
        past_time_features: torch.Tensor | None = None,
        future_values: torch.Tensor | None = None,
        future_time_features: torch.Tensor | None = None,
        future_observed_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> ReformerTimeSeriesOutput:
        r"""
        Args:
            past_values: (B, N) for one series or (B, N, S) for several, any N; NaN marks missing values.
            past_observed_mask: like `past_values`, 1 for observed values. Use zeros before the start of a series that
                starts later than others in its batch.
            past_time_features: (B, N, num_time_features), known for every step.
            future_values: (B, P[, S]), P = `prediction_length`: the targets, NaN where unknown.
            future_time_features: (B, P, num_time_features).
            future_observed_mask: like `future_values`, 1 for values that count in the loss.
        """
        past, alone = self._with_series_axis(past_values, "past_values")
        window = self._window(past, past_observed_mask)
        steps, real = self._steps(window, past.shape[1], past_time_features, future_time_features)
        batch, rows, length = steps.shape[:3]
        patch = self.config.patch_length
        ahead = -(-self.config.prediction_length // patch)
        embeds = self.model.embed_tokens(steps, ahead).flatten(0, 1)
        mask = real.unflatten(2, (-1, patch)).any(-1).flatten(0, 1).long()
        outputs = self.model(inputs_embeds=embeds, attention_mask=mask, return_dict=True, **kwargs)
        hidden = gather_sequence(outputs.last_hidden_state, self.model.shard(length // patch))[:, -ahead:]
        params = self._forecast_parameters(hidden.unflatten(0, (batch, rows)), window)
        mean, std = self._units(past)
        distribution = self._distribution(params, window.loc, window.scale)
        forecast = distribution if isinstance(distribution, torch.Tensor) else distribution.mean
        loss = None
        if future_values is not None:
            future, _ = self._with_series_axis(future_values, "future_values")
            loss = self._loss(distribution, future, future_observed_mask, past, mean, std)
        fields: dict[str, Any] = {
            "prediction_outputs": forecast * std + mean,
            "loc": window.loc * std + mean,
            "scale": window.scale * std,
        }
        fields = {name: x[..., 0] if alone else x for name, x in fields.items()}
        fields["params"] = tuple(x[..., 0] if alone else x for x in params)
        return self._head_output(ReformerTimeSeriesOutput, outputs, loss, **fields)

    def _with_series_axis(self, values: torch.Tensor | None, name: str) -> tuple[torch.Tensor, bool]:
        """Check values (B, N[, S]); returns (B, N, S) in at least float32, and whether the series axis was added."""
        config, shape = self.config, None if values is None else tuple(values.shape)
        if shape is None or len(shape) not in (2, 3) or 0 in shape:
            raise ValueError(f"`{name}` has shape {shape}; it must be (batch, steps) or (batch, steps, series).")
        x = values if len(shape) == 3 else values[..., None]
        size = config.input_size if config.series_mean is None else len(config.series_mean)
        if x.shape[2] != size and (size > 1 or config.mix_series or config.series_mean is not None):
            raise ValueError(f"`{name}` has shape {shape}, {x.shape[2]} series, but the model is of {size}.")
        x = x.to(self.device, torch.promote_types(self.dtype, torch.float32))
        refuse_values(~x.isinf(), f"`{name}` holds infinite values. Repair them, or mark them as NaN: not observed.")
        return x, len(shape) == 2

    def _units(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation of the training data, (S) each, or 0 and 1."""
        mean, std = self.config.series_mean, self.config.series_std
        return x.new_tensor([0.0] if mean is None else mean), x.new_tensor([1.0] if std is None else std)

    def _window(self, past: torch.Tensor, observed_mask: torch.Tensor | None) -> Window:
        """Standardize and scale the last `context_length` steps; a shorter past is padded with unobserved steps."""
        observed = _observed(past, observed_mask, "past")
        mean, std = self._units(past)
        x = (past.nan_to_num() - mean) / std * observed
        size = self.config.context_length
        x, observed = (
            nn.functional.pad(value[:, -size:], (0, 0, max(0, size - value.shape[1]), 0)) for value in (x, observed)
        )
        _, loc, scale = _make_scaler(self.config.scaling)(x, observed)
        if self.config.scaling == "last":
            last = size - 1 - observed.flip(1).argmax(1, keepdim=True)
            loc = x.gather(1, last)
        return Window((x - loc) / scale * observed, observed, loc, scale)

    def _steps(
        self, window: Window, length: int, past_features: torch.Tensor | None, future_features: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Assemble the features of every step, past and future, (B, S, N, F), in whole patches.

        S = 1 if series are mixed. Also returns which steps exist, (B, S, N) bool: those from the start of a series on.
        """
        config, patch = self.config, self.config.patch_length
        before, behind = -config.context_length % patch, -config.prediction_length % patch
        values = torch.stack([window.values, window.observed], dim=-1)  # (B, N, S, 2)
        values = values.flatten(2)[:, :, None] if config.mix_series else values  # (B, N, 1, 2 S)
        values = nn.functional.pad(values, (0, 0, 0, 0, before, config.prediction_length + behind)).transpose(1, 2)
        begun = window.observed.cummax(1).values.bool()
        begun = begun.any(-1, keepdim=True) if config.mix_series else begun
        real = nn.functional.pad(begun, (0, 0, before, 0)).transpose(1, 2)
        real = nn.functional.pad(real, (0, config.prediction_length + behind), value=True)
        parts = [values.to(self.dtype)]
        if config.num_time_features:
            size = config.context_length
            past = self._features(past_features, "past", length)[:, -size:]
            past = nn.functional.pad(past, (0, 0, before + size - past.shape[1], 0))
            future = self._features(future_features, "future", config.prediction_length)
            future = nn.functional.pad(future, (0, 0, 0, behind))
            parts.append(torch.cat([past, future], dim=1)[:, None].expand(-1, values.shape[1], -1, -1))
        return torch.cat(parts, dim=-1), real

    def _features(self, features: torch.Tensor | None, name: str, steps: int) -> torch.Tensor:
        count = self.config.num_time_features
        shape = None if features is None else tuple(features.shape)
        if shape is None or len(shape) != 3 or shape[1:] != (steps, count):
            raise ValueError(f"`{name}_time_features` has shape {shape}; here it must be (batch, {steps}, {count}).")
        return features.to(self.device, self.dtype)

    def _forecast_parameters(self, hidden: torch.Tensor, window: Window) -> tuple[torch.Tensor, ...]:
        """Compute the parameters of the distributions, (B, P, S) each, in at least float32; or only the values."""
        steps, params = self.config.prediction_length, []
        for name, projection in self.parameters_proj.items():
            x = projection(hidden).to(window.values.dtype)  # (B, S or 1, patches, patch · (1 or S))
            if self.config.mix_series:
                x = x[:, 0].unflatten(-1, (self.config.patch_length, -1)).flatten(1, 2)
            else:
                x = x.flatten(2).transpose(1, 2)
            x = x[:, :steps]
            if name in MEANS and self.config.linear_skip:
                x = x + self._skip(window.values.to(self.dtype)).to(x.dtype)
            params.append(x)
        if self.distribution is None:
            return tuple(params)
        return tuple(self.distribution.domain_map(*(x[..., None] for x in params)))

    def _skip(self, values: torch.Tensor) -> torch.Tensor:
        """Map (B, N, S) to (B, P, S), with one map per series, one shared by all, or one from all series to all."""
        if self.config.mix_series:
            return self.skip(values.flatten(1)).unflatten(1, (self.config.prediction_length, -1))
        if self.config.individual_skip:
            return torch.stack([skip(values[..., number]) for number, skip in enumerate(self.skip)], dim=-1)
        return self.skip(values.transpose(1, 2)).transpose(1, 2)

    @torch.no_grad()
    def fit_skip(
        self,
        batches: Iterable[Mapping[str, torch.Tensor]],
        penalties: Sequence[float] = (0.1, 1.0, 10.0, 100.0, 1e3, 3e3, 1e4, 3e4, 1e5),
    ) -> None:
        """Fit the linear map of the context by ridge regression, so that training starts from its forecasts.

        Args:
            batches: `past_values`, `future_values` and their masks, as in `forward`, in chronological order. Missing
                future values repeat the last one before them; series without any in a window are left out.
            penalties: candidate penalties on the weights, in the scale that the model sees. The one chosen predicts
                the last fifth of all windows best from the others; the final fit then uses all windows.

        Raises:
            ValueError: the model has no such map (`config.linear_skip`).
        """
        if not self.config.linear_skip:
            raise ValueError("The model has no linear map to fit. Make it with `linear_skip=True`.")
        maps, windows = list(self.skip) if self.config.individual_skip else [self.skip], list(batches)
        like, size = maps[0].weight, maps[0].in_features + 1  # plus a constant for the bias
        products = like.new_zeros(len(maps), 2, size, size, dtype=torch.float64)  # for fitting and for validation
        targets = like.new_zeros(len(maps), 2, size, maps[0].out_features, dtype=torch.float64)
        count = sum(len(batch["past_values"]) for batch in windows)
        left = count + -count // 5  # windows for fitting; at least one is left for validation
        for batch in windows:
            for part, piece in enumerate((slice(left), slice(left, None))):
                some = {name: values[piece] for name, values in batch.items()}
                if len(some["past_values"]):
                    for number, (x, y) in enumerate(self._skip_rows(some)):
                        products[number, part] += x.T @ x
                        targets[number, part] += x.T @ y
            left = max(0, left - len(batch["past_values"]))
        shrunk = torch.eye(size, dtype=torch.float64, device=like.device)
        shrunk[-1, -1] = 1e-6  # the bias is not penalized
        for skip, product, target in zip(maps, products, targets, strict=True):

            def error(penalty: float, product: Any = product, target: Any = target) -> float:
                """Compute the squared error on the validation rows, up to a constant."""
                found = torch.linalg.solve(product[0] + penalty * shrunk, target[0])
                return (found * (product[1] @ found - 2 * target[1])).sum().item()

            fitted = torch.linalg.solve(product.sum(0) + min(penalties, key=error) * shrunk, target.sum(0)).T
            skip.weight.copy_(fitted[:, :-1])
            skip.bias.copy_(fitted[:, -1])

    def _skip_rows(self, batch: Mapping[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Make the regression problem of every linear map: inputs with a constant 1, and targets, float64.

        Shapes are (rows, inputs + 1) and (rows, outputs). Both are multiplied by the scale of the window, so that
        errors count as in the loss instead of more in quiet windows.
        """
        past, _ = self._with_series_axis(batch["past_values"], "past_values")
        future, _ = self._with_series_axis(batch["future_values"], "future_values")
        window = self._window(past, batch.get("past_observed_mask"))
        observed = _observed(future, batch.get("future_observed_mask"), "future").bool()
        mean, std = self._units(past)
        wanted = ((future.nan_to_num() - mean) / std - window.loc) / window.scale
        steps = [window.values[:, -1]]
        for step in range(wanted.shape[1]):
            steps.append(torch.where(observed[:, step], wanted[:, step], steps[-1]))
        wanted, known = torch.stack(steps[1:], dim=1), observed.any(1)  # (B, P, S), (B, S)
        if self.config.mix_series:
            rows = [(window.values.flatten(1), (wanted * known[:, None]).flatten(1), window.scale.mean(-1))]
        else:
            x, y, scale = (part.transpose(1, 2) for part in (window.values, wanted, window.scale))  # (B, S, …)
            maps = torch.eye(x.shape[1], dtype=torch.bool, device=x.device) if self.config.individual_skip else [True]
            rows = [(x[chosen], y[chosen], scale[chosen]) for chosen in (known & series for series in maps)]
        return [(scale.double() * nn.functional.pad(x, (0, 1), value=1.0), scale.double() * y) for x, y, scale in rows]

    def _distribution(self, params: tuple, loc: torch.Tensor, scale: torch.Tensor) -> Distribution | torch.Tensor:
        if self.distribution is None:
            return params[0] * scale + loc
        # transformers' negative binomial adds to its parameters in place
        return self.distribution.distribution(tuple(x.clone() for x in params), loc, scale)

    def _loss(
        self,
        distribution: Distribution | torch.Tensor,
        future: torch.Tensor,
        observed_mask: torch.Tensor | None,
        past: torch.Tensor,
        mean: torch.Tensor,
        std: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the mean loss over observed, standardized values; 0 if there are none."""
        wanted = (past.shape[0], self.config.prediction_length, past.shape[2])
        if future.shape != wanted:
            raise ValueError(f"`future_values` have shape {tuple(future.shape)}: batch, steps, series; not {wanted}.")
        observed = _observed(future, observed_mask, "future")
        target = (future.nan_to_num() - mean) / std
        if isinstance(distribution, torch.Tensor):
            error = distribution - target
            losses = error.square() if self.config.loss == "mse" else error.abs()
        else:
            losses = -distribution.log_prob(torch.where(observed > 0, target, 0))
        return torch.where(observed > 0, losses, 0).sum() / observed.sum().clamp(min=1)


def _observed(values: torch.Tensor, mask: torch.Tensor | None, name: str) -> torch.Tensor:
    """Return the mask of observed values, (B, N, S), in the dtype of the values."""
    observed = ~values.isnan()
    if mask is not None:
        mask = mask if mask.dim() == 3 else mask[..., None]
        if mask.shape != values.shape:
            raise ValueError(
                f"`{name}_observed_mask` has shape {tuple(mask.shape)}, its values {tuple(values.shape)}. Give one "
                "for each."
            )
        observed = observed & (mask.to(values.device) != 0)
    return observed.to(values.dtype)
