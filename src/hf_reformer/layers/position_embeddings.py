"""Position embeddings: axial (Trax) and rotary (Su et al. 2021)."""

import math
from collections.abc import Sequence

import torch
from torch import nn

CosAndSin = tuple[torch.Tensor, torch.Tensor]  # cos and sin


class _Tables(nn.ParameterList):
    """Parameters that are asked for by a call, so that hooks which bring offloaded weights see it."""

    __call__ = nn.Module.__call__

    def forward(self) -> list[torch.Tensor]:
        return list(self)


class AxialPositionEmbeddings(nn.Module):
    """A grid of positions: one small table per axis, their rows concatenated.

    Position p of a grid of shape (s_0, …, s_n) is the multi-index of p in row-major order; its embedding is the
    concatenation of one row of each table. Every length up to the product of the shape works, in training too.

    `weights[i]` has shape (1, …, s_i, …, 1, dims[i]), as older checkpoints store it.
    """

    def __init__(self, shape: Sequence[int], dims: Sequence[int]):
        super().__init__()
        self.shape = tuple(shape)
        self.weights = _Tables(
            nn.Parameter(torch.ones(*(size if i == axis else 1 for i in range(len(shape))), dim))
            for axis, (size, dim) in enumerate(zip(self.shape, dims, strict=True))
        )

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """(B or 1, T) int64 → (B or 1, T, sum(dims))"""
        parts, stride = [], math.prod(self.shape)
        for size, weight in zip(self.shape, self.weights(), strict=True):
            stride //= size
            index = position_ids.div(stride, rounding_mode="floor") % size
            parts.append(nn.functional.embedding(index, weight.view(size, -1)))
        return torch.cat(parts, dim=-1)


def rotary_tables(position_ids: torch.Tensor, head_size: int, theta: float) -> CosAndSin:
    """cos and sin, each (B or 1, 1, T, D) float32: angles p * theta^(-2i / D) (Su et al. 2021, 3.2.2)."""
    exponent = torch.arange(0, head_size, 2, dtype=torch.float32, device=position_ids.device) / head_size
    angles = position_ids[:, None, :, None].float() * theta**-exponent  # (B, 1, T, D / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, tables: CosAndSin | None, heads: int | None = None) -> torch.Tensor:
    """Turn (B, H, T, D) vectors by their positions, those of the first `heads` or of all. None: no tables, no turn."""
    if tables is None or heads == 0:
        return x
    if heads is not None and heads < x.shape[1]:
        return torch.cat([rotate(x[:, :heads], tables), x[:, heads:]], dim=1)
    cos, sin = (table.to(x.dtype) for table in tables)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
