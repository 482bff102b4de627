"""Axial position embeddings (Trax). For rotary ones, see `ops.rotary`."""

from collections.abc import Sequence

import torch
from torch import nn

from ..ops.axes import along_axes


class _Tables(nn.ParameterList):
    """A ParameterList that is read by calling it, so that hooks that load offloaded weights run."""

    __call__ = nn.Module.__call__

    def forward(self) -> list[torch.Tensor]:
        return list(self)


class AxialPositionEmbeddings(nn.Module):
    """Embeddings of a grid of positions: one small table per axis, with their rows concatenated.

    In a grid of shape (s_0, …, s_n), position p is a multi-index in row-major order; its embedding is the
    concatenation of one row of each table. Any length up to the product of the shape works, also in training.

    `weights[i]` has shape (1, …, s_i, …, 1, dims[i]), as in older checkpoints.
    """

    def __init__(self, shape: Sequence[int], dims: Sequence[int]):
        super().__init__()
        self.shape = tuple(shape)
        self.weights = _Tables(
            nn.Parameter(torch.ones(*(size if i == axis else 1 for i in range(len(shape))), dim))
            for axis, (size, dim) in enumerate(zip(self.shape, dims, strict=True))
        )

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Embed position ids (B or 1, T) int64 as (B or 1, T, sum(dims))."""
        parts = []
        for index, size, weight in zip(along_axes(position_ids, self.shape), self.shape, self.weights(), strict=True):
            parts.append(nn.functional.embedding(index % size, weight.view(size, -1)))
        return torch.cat(parts, dim=-1)
