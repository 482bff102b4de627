"""Rotary position embeddings (Su et al. 2021) along one axis or several."""

from collections.abc import Sequence

import torch

from .axes import along_axes

CosAndSin = tuple[torch.Tensor, torch.Tensor]  # cos and sin


def rotary_tables(
    position_ids: torch.Tensor, head_size: int, theta: float, shape: Sequence[int] | None = None
) -> CosAndSin:
    """Compute cos and sin, each (B or 1, 1, T, D) float32, of angles p * theta^(-2i / D) (Su et al. 2021, 3.2.2).

    Args:
        shape: shape of a grid that positions index in row-major order. Each axis rotates an equal share of the pairs
            by its own coordinate; if they cannot be divided equally, the last axes have one more.
    """
    axes = [position_ids] if shape is None else along_axes(position_ids, shape)
    pairs, parts = head_size // 2, []
    for axis, coordinate in enumerate(axes):
        share = (pairs + axis) // len(axes)
        exponent = torch.arange(share, dtype=torch.float32, device=position_ids.device) / share
        parts.append(coordinate[:, None, :, None].float() * float(theta) ** -exponent)  # (B, 1, T, share)
    angles = torch.cat(parts, dim=-1)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, tables: CosAndSin, heads: int | None = None) -> torch.Tensor:
    """Rotate vectors, (B, H, T, D), by their positions, in the first `heads` or all heads, in at least float32."""
    if heads is not None and heads < x.shape[1]:
        return torch.cat([rotate(x[:, :heads], tables), x[:, heads:]], dim=1)
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
