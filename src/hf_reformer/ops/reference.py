"""The definition of windowed attention: dense, readable, differentiable by plain autograd, any float dtype.

Needs memory and time of length squared. Every other backend is compared with it, values and gradients.
"""

from typing import Any

import torch

from .layout import AttentionLayout
from .prng import fold, keep_threshold, pair_scramble

SELF_SCORE = -1e5  # shared query/key: a token attends to itself only where nothing else is visible
MASKED_SCORE = -1e9  # chunk rule: padding and the future stay in the softmax with this score


def inverse_permutation(perm: torch.Tensor) -> torch.Tensor:
    """Inverse of every round's permutation: (B, H, R, T) int64, every token's sorted position within the round."""
    sorted_pos = torch.arange(perm.shape[-1], device=perm.device).expand(perm.shape)
    return torch.empty_like(sorted_pos, memory_format=torch.contiguous_format).scatter(-1, perm.long(), sorted_pos)


def visible_counts(layout: AttentionLayout) -> torch.Tensor:
    """(B, H, T, T) int64: how many positions of token i's windows hold token j, over all rounds."""
    rounds, length = layout.perm.shape[2:]
    total = rounds * length
    sorted_pos = inverse_permutation(layout.perm)
    start, end = (x.long().gather(-1, sorted_pos) for x in (layout.window_start, layout.window_end))
    counts = torch.zeros(*sorted_pos.shape[:2], length, length, dtype=torch.int64, device=sorted_pos.device)
    for i in range(rounds):
        for j in range(rounds):
            target = sorted_pos[:, :, j, None, :] + j * length  # (B, H, 1, T)
            first, last = start[:, :, i, :, None], end[:, :, i, :, None]  # (B, H, T, 1)
            counts = (
                counts
                + (last - target).div(total, rounding_mode="floor")
                - (first - 1 - target).div(total, rounding_mode="floor")
            )
    return counts.clamp(max=1) if layout.dedup_pairs else counts


def shared_key(query: torch.Tensor) -> torch.Tensor:
    """Keys of shared query/key attention: queries scaled to unit length (paper, section 2); (..., D) → (..., D)."""
    size = query.shape[-1]
    return query * torch.rsqrt(query.square().mean(-1, keepdim=True) + 1e-6) * size**-0.5


def pair_keys(key: torch.Tensor, batch: int, heads: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random numbers of queries (B, H, T) and of keys (T), int32; a pair's dropout bit is a function of both.

    key: (), or (2): the key, and the number of the first head, where these are some of a layer's heads.
    """
    rows, head, position = (torch.arange(n, dtype=torch.int32, device=key.device) for n in (batch, heads, length))
    if key.dim():
        key, head = key[0], head + key[1]
    return fold(key, rows[:, None, None], head[:, None], position), fold(key, -1, position)


def dropout_factors(key: torch.Tensor, p: float, batch: int, heads: int, length: int) -> torch.Tensor:
    """(B, H, T, T) float64: 0 where a pair is dropped, 1 / (1 - p) elsewhere."""
    queries, keys = pair_keys(key, batch, heads, length)
    is_kept = pair_scramble(queries[..., None], keys).long() >= keep_threshold(p)
    return is_kept.double() / (1 - p) if p < 1 else torch.zeros_like(is_kept, dtype=torch.float64)


def attention_mass(weights: torch.Tensor, query_weights: torch.Tensor) -> torch.Tensor:
    """Weights (B, H, N, S) and the queries' weights in the sum, (B, N) → attention mass of every key, (B, S)."""
    return torch.einsum("bhns,bn->bs", weights, query_weights.to(weights.dtype))


def windowed_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    layout: AttentionLayout,
    *,
    scale: float = 1.0,
    query_weights: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The op itself, see `dispatch.windowed_attention`. Half precision computes in float32."""
    key = key if key is None or scale == 1 else key * scale
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        q, v = (x.to(torch.promote_types(x.dtype, dtype)) for x in (query, value))
        k = None if key is None else key.to(torch.promote_types(key.dtype, dtype))
        out, weights = attention_with_weights(q, k, v, layout, **options)
        return out.to(value.dtype), None if query_weights is None else attention_mass(weights, query_weights)


def attention_with_weights(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    layout: AttentionLayout,
    *,
    causal: bool,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    dropout_key: torch.Tensor | None = None,
    shared: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D), and the weights (B, H, T, T) before dropout.

    Arguments as those of `dispatch.windowed_attention`; `shared`: `key` is the `shared_key` of `query`.
    """
    length = query.shape[-2]
    batch, heads = query.shape[:2]
    counts = visible_counts(layout).expand(batch, heads, length, length)
    shared = shared or key is None
    key = shared_key(query) if key is None else key
    scores = query @ key.transpose(-1, -2)  # (B, H, T, T)
    position = torch.arange(length, device=query.device)
    if not layout.dedup_pairs:
        masked = torch.zeros(length, length, dtype=torch.bool, device=query.device)
        masked = position[:, None] < position if causal else masked
        masked = masked if mask is None else masked | ~mask[:, None, None, :]
        scores = scores.masked_fill(masked, MASKED_SCORE)
    if shared:
        scores = scores.masked_fill(position[:, None] == position, SELF_SCORE)
    scores = scores.masked_fill(counts == 0, -torch.inf)
    row_max = scores.detach().amax(-1, keepdim=True).clamp(min=-1e30)
    weights = counts.to(scores.dtype) * (scores - row_max).exp()
    row_sum = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(row_sum > 0, row_sum, 1)  # a token with empty windows gives 0
    used = weights
    if dropout > 0 and dropout_key is not None:
        used = weights * dropout_factors(dropout_key, dropout, batch, heads, length).to(weights.dtype)
    return used @ value, weights
