"""Reference implementation of windowed attention: dense, readable, differentiable by autograd, in any float dtype.

Memory and time are quadratic in the length. Values and gradients of all other backends are compared with it.
"""

from typing import Any

import torch

from .layout import AttentionLayout
from .prng import fold, keep_threshold, pair_scramble

SELF_SCORE = -1e5  # shared query/key: a token attends to itself only if nothing else is visible
MASKED_SCORE = -1e9  # chunk rule: padding and future tokens stay in the softmax with this score


def inverse_permutation(perm: torch.Tensor) -> torch.Tensor:
    """Invert the permutation of every round: (B, H, R, T) int64, each token's sorted position within the round."""
    sorted_pos = torch.arange(perm.shape[-1], device=perm.device).expand(perm.shape)
    return torch.empty_like(sorted_pos, memory_format=torch.contiguous_format).scatter(-1, perm.long(), sorted_pos)


def visible_counts(layout: AttentionLayout) -> torch.Tensor:
    """Count how many positions in token i's windows hold token j, over all rounds: (B, H, T, T) int64."""
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
    """Return keys for shared query/key attention: queries scaled to unit length (paper, section 2); (..., D)."""
    size = query.shape[-1]
    return query * torch.rsqrt(query.square().mean(-1, keepdim=True) + 1e-6) * size**-0.5


def pair_keys(key: torch.Tensor, batch: int, heads: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw random numbers for queries, (B, H, T), and keys, (T), int32; a pair's dropout bit is a function of both.

    key: (), or (2): the key, and the index of the first head if these are only some of a layer's heads.
    """
    rows, head, position = (torch.arange(n, dtype=torch.int32, device=key.device) for n in (batch, heads, length))
    if key.dim():
        key, head = key[0], head + key[1]
    return fold(key, rows[:, None, None], head[:, None], position), fold(key, -1, position)


def dropout_factors(key: torch.Tensor, p: float, batch: int, heads: int, length: int) -> torch.Tensor:
    """Return (B, H, T, T) float64: 0 for dropped pairs, 1 / (1 - p) for the others."""
    queries, keys = pair_keys(key, batch, heads, length)
    is_kept = pair_scramble(queries[..., None], keys).long() >= keep_threshold(p)
    return is_kept.double() / (1 - p) if p < 1 else torch.zeros_like(is_kept, dtype=torch.float64)


def attention_mass(weights: torch.Tensor, query_weights: torch.Tensor) -> torch.Tensor:
    """Compute the attention mass of every key, (B, S), from weights, (B, H, N, S), and query weights, (B, N)."""
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
    """Compute the op of `dispatch.windowed_attention`. Half precision is computed in float32."""
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
    """Compute the output, (B, H, T, D), and the weights before dropout, (B, H, T, T).

    Arguments are those of `dispatch.windowed_attention`; `shared`: `key` is the `shared_key` of `query`.
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
    weights = weights / torch.where(row_sum > 0, row_sum, 1)  # tokens with empty windows get 0
    used = weights
    if dropout > 0 and dropout_key is not None:
        used = weights * dropout_factors(dropout_key, dropout, batch, heads, length).to(weights.dtype)
    return used @ value, weights
