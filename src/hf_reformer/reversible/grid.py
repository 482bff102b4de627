"""The number format of the residual streams: values rounded to a grid, so that additions can be undone exactly."""

from typing import NamedTuple

import torch


class Grid(NamedTuple):
    """The number format of the residual streams: a dtype, and the exponent of its grid of multiples of 2^-bits.

    Sums are exact while |stream| <= `limit`. `bits=None` does not round (evaluation).
    """

    dtype: torch.dtype
    bits: int | None

    @property
    def limit(self) -> float:
        mantissa = {torch.float64: 53, torch.float32: 24}[self.dtype]
        return float("inf") if self.bits is None else 2.0 ** (mantissa - self.bits)


def choose_grid(precision: str, weight_dtype: torch.dtype, rounded: bool) -> Grid:
    """The streams' grid for `residual_precision` ("float64" or "float32") and the dtype of the model's weights."""
    if weight_dtype == torch.float64:  # tests: finer, so that finite differences see through it
        return Grid(torch.float64, 40 if rounded else None)
    if precision == "float64":
        return Grid(torch.float64, 32 if rounded else None)
    return Grid(torch.float32, 16 if rounded else None)


class _Round(torch.autograd.Function):
    """Cast to the streams' dtype and round to the grid; the gradient passes unchanged."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, grid):
        scale = 2.0**grid.bits
        whole = (x.to(torch.promote_types(x.dtype, torch.float32)) * scale).round_()
        whole.add_(0.0)  # -0 becomes +0, so that equal numbers have equal bits
        return whole.to(grid.dtype).mul_(1 / scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype, ctx.grid = inputs[0].dtype, inputs[1]

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


class _RoundForwardMode(_Round):
    """The same in eager mode, with a derivative in forward mode, which torch.compile does not take."""

    @staticmethod
    def jvp(ctx, tangent, _):
        return tangent.to(ctx.grid.dtype)


def to_stream(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """x in the streams' dtype, on the grid."""
    if grid.bits is None:
        return x.to(grid.dtype)
    return (_Round if torch.compiler.is_compiling() else _RoundForwardMode).apply(x, grid)
