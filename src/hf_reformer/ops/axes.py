"""Positions as places of a grid of any number of axes, in row-major order."""

import math
from collections.abc import Sequence

import torch


def along_axes(position_ids: torch.Tensor, shape: Sequence[int]) -> list[torch.Tensor]:
    """The coordinate of every position along each axis of a grid, all of them shaped as the positions.

    The first axis has no end: positions behind the grid go on in further rows of it.
    """
    coordinates, stride = [], math.prod(shape)
    for axis, size in enumerate(shape):
        stride //= size
        coordinate = position_ids.div(stride, rounding_mode="floor")
        coordinates.append(coordinate % size if axis else coordinate)
    return coordinates
