"""The number format of the residual streams: values on a grid, so that additions can be undone exactly."""

from typing import NamedTuple

import torch


class Grid(NamedTuple):
    """The number format of the residual streams: a dtype, and a grid of multiples of 2^-bits.

    Sums are exact while |stream| <= `limit`. With `bits=None`, values are not rounded (evaluation).
    """

    dtype: torch.dtype
    bits: int | None

    @property
    def limit(self) -> float:
        mantissa = {torch.float64: 53, torch.float32: 24}[self.dtype]
        return float("inf") if self.bits is None else 2.0 ** (mantissa - self.bits)


def choose_grid(precision: str, weight_dtype: torch.dtype, rounded: bool) -> Grid:
    """Choose the grid for `residual_precision` ("float64" or "float32") and the dtype of the model's weights."""
    if weight_dtype == torch.float64:  # for tests: fine enough for finite differences
        return Grid(torch.float64, 40 if rounded else None)
    if precision == "float64":
        return Grid(torch.float64, 32 if rounded else None)
    return Grid(torch.float32, 16 if rounded else None)


class _AddRounded(torch.autograd.Function):
    """Rounding to the grid and addition to a stream, in the stream's dtype; both gradients pass unchanged."""

    generate_vmap_rule = True

    @staticmethod
    def forward(stream, x, grid):
        return torch.add(stream, _multiples(x, grid.bits), alpha=2.0**-grid.bits)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = inputs[1].dtype

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.to(ctx.dtype), None


class _AddRoundedForwardMode(_AddRounded):
    """The same for eager mode, with a forward-mode derivative, which torch.compile does not support."""

    @staticmethod
    def jvp(ctx, stream_tangent, tangent, _):
        return stream_tangent + tangent


def _multiples(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Return x in units of 2^-bits, rounded to integers, in at least float32."""
    return (x.to(torch.promote_types(x.dtype, torch.float32)) * 2.0**bits).round_()


def add_rounded(stream: torch.Tensor, x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Round x to the grid and add it to the stream."""
    if grid.bits is None:
        return stream + x.to(grid.dtype)
    function = _AddRounded if torch.compiler.is_compiling() else _AddRoundedForwardMode
    return function.apply(stream, x, grid)


def subtract_rounded(stream: torch.Tensor, x: torch.Tensor, grid: Grid, in_place: bool = False) -> torch.Tensor:
    """Undo `add_rounded`, without gradients."""
    step, size = (x, 1.0) if grid.bits is None else (_multiples(x, grid.bits), 2.0**-grid.bits)
    return stream.sub_(step, alpha=size) if in_place else torch.sub(stream, step, alpha=size)


def to_stream(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Convert x to the streams' dtype and grid, without negative zeros, so that equal numbers have equal bits."""
    return add_rounded(x.new_zeros((), dtype=grid.dtype).expand(x.shape), x, grid)
