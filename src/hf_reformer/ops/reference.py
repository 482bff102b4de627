"""The definition of ordered attention: dense, readable, differentiable by plain autograd, any float dtype.

Needs memory and time of length squared. Every other backend is compared with it, values and gradients.
"""

import torch

from .layout import AttentionLayout
from .prng import fold, keep_threshold, pair_scramble

SELF_SCORE = -1e5  # shared query/key: a token sees itself only where it sees nothing else
MASKED_SCORE = -1e9  # chunk rule: padding and the future stay in the softmax with this score


def inverse_permutation(line: torch.Tensor) -> torch.Tensor:
    """Inverse of every round's permutation: (B, H, R, T) int64, the place at which each token stands."""
    place = torch.arange(line.shape[-1], device=line.device).expand(line.shape)
    return torch.empty_like(place, memory_format=torch.contiguous_format).scatter_(-1, line.long(), place)


def shown_counts(orders: AttentionLayout) -> torch.Tensor:
    """(B, H, T, T) int64: how many places of token i's windows hold token j, over all rounds."""
    rounds, length = orders.perm.shape[2:]
    total = rounds * length
    place = inverse_permutation(orders.perm)
    lo, hi = orders.window_start.long().gather(-1, place), orders.window_end.long().gather(-1, place)
    counts = torch.zeros(*place.shape[:2], length, length, dtype=torch.int64, device=place.device)
    for i in range(rounds):
        for j in range(rounds):
            target = place[:, :, j, None, :] + j * length  # (B, H, 1, T)
            first, last = lo[:, :, i, :, None], hi[:, :, i, :, None]  # (B, H, T, 1)
            counts += (last - target).div(total, rounding_mode="floor") - (first - 1 - target).div(
                total, rounding_mode="floor"
            )
    return counts.clamp(max=1) if orders.dedup_pairs else counts


def shared_key(query: torch.Tensor) -> torch.Tensor:
    """Keys of shared query/key attention: queries scaled to unit length (paper, section 2); (..., D) → (..., D)."""
    size = query.shape[-1]
    return query * torch.rsqrt(query.square().mean(-1, keepdim=True) + 1e-6) * size**-0.5


def pair_keys(key: torch.Tensor, batch: int, heads: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random numbers of queries (B, H, T) and of keys (T), int32; a pair's dropout bit is a function of both.

    key: (), or (2): the key, and the number of the first head, where these are some of a layer's heads.
    """
    rows, head, place = (torch.arange(n, dtype=torch.int32, device=key.device) for n in (batch, heads, length))
    if key.dim():
        key, head = key[0], head + key[1]
    return fold(key, rows[:, None, None], head[:, None], place), fold(key, -1, place)


def dropout_factors(key: torch.Tensor, p: float, batch: int, heads: int, length: int) -> torch.Tensor:
    """(B, H, T, T) float64: 0 where a pair is dropped, 1 / (1 - p) elsewhere."""
    queries, keys = pair_keys(key, batch, heads, length)
    kept = pair_scramble(queries[..., None], keys).long() >= keep_threshold(p)
    return kept.double() / (1 - p) if p < 1 else torch.zeros_like(kept, dtype=torch.float64)


def windowed_attention(
    query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor, orders: AttentionLayout, **how
) -> torch.Tensor:
    """The op itself; see `attention_ops.windowed_attention` for the arguments. Half precision computes in float32."""
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = (
            None if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key, value)
        )
        return attention_with_weights(q, k, v, orders, **how)[0].to(value.dtype)


def attention_with_weights(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    orders: AttentionLayout,
    *,
    causal: bool,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    dropout_key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax over all that a token's windows show: output (B, H, T, D), and weights (B, H, T, T) before dropout.

    Arguments as those of `attention_ops.windowed_attention`.
    """
    length = query.shape[-2]
    batch, heads = query.shape[:2]
    counts = shown_counts(orders).expand(batch, heads, length, length)
    shared = key is None
    key = shared_key(query) if shared else key
    scores = query @ key.transpose(-1, -2)  # (B, H, T, T)
    place = torch.arange(length, device=query.device)
    if not orders.dedup_pairs:
        hidden = (
            place[:, None] < place if causal else torch.zeros(length, length, dtype=torch.bool, device=place.device)
        )
        hidden = hidden if mask is None else hidden | ~mask[:, None, None, :]
        scores = scores.masked_fill(hidden, MASKED_SCORE)
    if shared:
        scores = scores.masked_fill(place[:, None] == place, SELF_SCORE)
    scores = scores.masked_fill(counts == 0, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True).clamp(min=-1e30)
    weights = counts.to(scores.dtype) * (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total > 0, total, 1)  # a token that sees nothing gives 0
    used = weights
    if dropout > 0 and dropout_key is not None:
        used = weights * dropout_factors(dropout_key, dropout, batch, heads, length).to(weights.dtype)
    return used @ value, weights
