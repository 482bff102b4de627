"""Positions as coordinates in a grid with any number of axes, in row-major order."""

import math
from collections.abc import Sequence

import torch


def along_axes(position_ids: torch.Tensor, shape: Sequence[int]) -> list[torch.Tensor]:
    """Compute the coordinates of positions along each axis of a grid, each with the shape of `position_ids`.

    The first axis is unbounded: positions beyond the grid continue in further rows.
    """
    coordinates, stride = [], math.prod(shape)
    for axis, size in enumerate(shape):
        stride //= size
        coordinate = position_ids.div(stride, rounding_mode="floor")
        coordinates.append(coordinate % size if axis else coordinate)
    return coordinates
