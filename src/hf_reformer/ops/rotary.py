"""Rotary position embeddings (Su et al. 2021)."""

import torch

CosAndSin = tuple[torch.Tensor, torch.Tensor]  # cos and sin


def rotary_tables(position_ids: torch.Tensor, head_size: int, theta: float) -> CosAndSin:
    """cos and sin, each (B or 1, 1, T, D) float32: angles p * theta^(-2i / D) (Su et al. 2021, 3.2.2)."""
    exponent = torch.arange(0, head_size, 2, dtype=torch.float32, device=position_ids.device) / head_size
    angles = position_ids[:, None, :, None].float() * theta**-exponent  # (B, 1, T, D / 2)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, tables: CosAndSin, heads: int | None = None) -> torch.Tensor:
    """Turn (B, H, T, D) vectors by their positions, those of the first `heads` or of all, in at least float32."""
    if heads is not None and heads < x.shape[1]:
        return torch.cat([rotate(x[:, :heads], tables), x[:, heads:]], dim=1)
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
