"""Attention over lists of tokens, for decoding with a cache and for returning attention weights."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from .layout import AttentionLayout
from .prng import keep_threshold, pair_scramble
from .reference import MASKED_SCORE, SELF_SCORE, attention_with_weights, inverse_permutation, pair_keys

MAX_GATHERED = 2**24  # elements of gathered keys at once


class SparseAttention(NamedTuple):
    """The tokens that every token attends to, and their weights.

    Attributes:
        tokens: (B, H, T, K) int64, positions of the tokens attended to, including cached ones; unused entries are -1.
            In chunk mode a token may be listed several times, and its weights add up.
        weights: (B, H, T, K), weights before dropout, 0 for unused entries; they sum to 1 for each token, or are all
            0 if nothing is visible to it.
    """

    tokens: torch.Tensor
    weights: torch.Tensor

    def dense(self, length: int) -> torch.Tensor:
        """Return the dense matrix of weights over `length` tokens, (B, H, T, length)."""
        matrix = self.weights.new_zeros(*self.weights.shape[:3], length)
        return matrix.scatter_add(-1, self.tokens.clamp(min=0), self.weights)


AttentionWeights = SparseAttention | torch.Tensor  # sparse, or the dense matrix, (B, H, T, length)


def mass_of_weights(attention: AttentionWeights, query_weights: torch.Tensor) -> torch.Tensor:
    """Compute the attention mass of every token, (B, T), given query weights, (B, T); not for cached tokens."""
    if isinstance(attention, torch.Tensor):
        return torch.einsum("bhns,bn->bs", attention, query_weights.to(attention.dtype))
    mass = (attention.weights * query_weights.to(attention.weights.dtype)[:, None, :, None]).flatten(1)
    return mass.new_zeros(query_weights.shape).scatter_add(1, attention.tokens.clamp(min=0).flatten(1), mass)


def gather_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tokens: torch.Tensor,
    own: torch.Tensor,
    scale: float | None,
    *,
    dedup_pairs: bool = True,
    masked: torch.Tensor | None = None,
    dropout: float = 0.0,
    draws: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, SparseAttention]:
    """Compute attention with one softmax per head and query over the listed tokens.

    Args:
        query: (B, H, N, D).
        keys, values: (B, H, C, D); token t is stored in slot t % C.
        tokens: (B, H or 1, N, K) int64; negative entries are unused.
        own: (B, N) int64, the token of each query.
        scale: of the scores; None for shared query/key attention, whose `keys` are queries (`reference.shared_key`).
        dedup_pairs: count a token once even if it is listed several times.
        masked: bool, shaped like `tokens`: entries whose score is -1e9.
        dropout, draws: dropout on the weights; `reference.pair_keys` of these queries and of all keys.

    Returns:
        The output, (B, H, N, D) in the dtype of `values`, 0 if nothing is listed; and the weights, sorted by token
        with `dedup_pairs`.
    """
    batch, heads, slots, size = keys.shape
    tokens = tokens.expand(-1, heads, -1, -1)
    tokens = tokens.sort(-1).values if dedup_pairs else tokens
    if dedup_pairs:
        again = torch.nn.functional.pad(tokens[..., 1:] == tokens[..., :-1], (1, 0))
        tokens = torch.where(again, -1, tokens)
    listed = tokens >= 0
    offset = torch.arange(batch * heads, device=keys.device).view(batch, heads, 1, 1) * slots
    index = (offset + tokens.remainder(slots)).flatten()
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        key, value = (x.reshape(-1, x.shape[-1]).index_select(0, index).to(dtype) for x in (keys, values))
        key, value = (x.view(*tokens.shape, -1).masked_fill(~listed[..., None], 0) for x in (key, value))
        scores = (key @ query.to(dtype)[..., None]).squeeze(-1)
        if scale is None:
            scores = scores * torch.rsqrt(key.square().mean(-1) + 1e-6) * size**-0.5
        else:
            scores = scores * scale
        scores = scores if masked is None else scores.masked_fill(masked, MASKED_SCORE)
        if scale is None:
            scores = scores.masked_fill(tokens == own[:, None, :, None], SELF_SCORE)
        weights = scores.masked_fill(~listed, torch.finfo(dtype).min).softmax(-1) * listed
        used = weights
        if draws is not None and dropout > 0:
            drawn = pair_scramble(draws[0][..., None], draws[1][tokens.clamp(min=0)])
            used = weights * (drawn.long() >= keep_threshold(dropout)) * (0 if dropout >= 1 else 1 / (1 - dropout))
        out = (used[..., None, :] @ value).squeeze(-2).to(values.dtype)
    return out, SparseAttention(tokens, weights)


def concat_queries(results: Iterable[tuple[torch.Tensor, SparseAttention]]) -> tuple[torch.Tensor, SparseAttention]:
    """Concatenate results of `gather_attention` along the queries; their lists may differ in length."""
    outs, attentions = zip(*results, strict=True)
    width = max(attention.tokens.shape[-1] for attention in attentions)
    pad = torch.nn.functional.pad
    tokens = [pad(x.tokens, (0, width - x.tokens.shape[-1]), value=-1) for x in attentions]
    weights = [pad(x.weights, (0, width - x.weights.shape[-1])) for x in attentions]
    return torch.cat(outs, dim=2), SparseAttention(torch.cat(tokens, dim=2), torch.cat(weights, dim=2))


def crop(attention: AttentionWeights, length: int) -> AttentionWeights:
    """Crop attention to the first `length` tokens; the weights of padding after them become 0."""
    if isinstance(attention, torch.Tensor):  # unchanged if possible, so that it gets its gradient
        return attention if attention.shape[2] == length else attention[:, :, :length, :length]
    tokens, weights = (x[:, :, :length] for x in attention)
    inside = tokens < length
    return SparseAttention(torch.where(inside, tokens, -1), weights * inside)


def visible_tokens(layout: AttentionLayout, queries: torch.Tensor | None = None) -> torch.Tensor:
    """Return the tokens in every token's windows, round by round, (B, H, T, K) int64; unused entries are -1.

    With `queries`, (Q), only for these tokens: (B, H, Q, K).
    """
    rounds, length = layout.perm.shape[2:]
    sorted_pos = inverse_permutation(layout.perm)
    sorted_pos = sorted_pos if queries is None else sorted_pos[..., queries]
    bounds = (layout.window_start, layout.window_end)
    first, last = (x.long().gather(-1, sorted_pos)[..., None] for x in bounds)  # (B, H, R, T, 1)
    width = layout.left_reach + layout.right_reach + (1 if layout.dedup_pairs else layout.block_size)
    visible = first + torch.arange(width, device=first.device)
    perm = layout.perm.flatten(2).long()
    tokens = perm.gather(-1, visible.flatten(2) % (rounds * length)).view_as(visible)
    return torch.where(visible <= last, tokens, -1).transpose(2, 3).flatten(3)


def attention_with_dense_weights(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `dispatch.windowed_attention` and its weights, (B, H, T, T), differentiable; arguments are the same."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        key = None if key is None else key.to(dtype) * scale
        out, weights = attention_with_weights(query.to(dtype), key, value.to(dtype), layout, **options)
    return out.to(value.dtype), weights


def attention_with_sparse_weights(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    dropout_key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, SparseAttention]:
    """Compute `dispatch.windowed_attention` and its weights, a few queries at a time; arguments are the same."""
    tokens, (batch, heads, length, size) = visible_tokens(layout), query.shape
    positions = torch.arange(length, device=query.device)
    draws = None if dropout_key is None else pair_keys(dropout_key, batch, heads, length)
    keys, scores_scale = (query, None) if key is None else (key, scale)
    options: dict[str, Any] = {"dedup_pairs": layout.dedup_pairs, "dropout": dropout}
    results = []
    for some in positions.split(max(1, MAX_GATHERED // (batch * heads * tokens.shape[-1] * size))):
        listed, masked = tokens[:, :, some], None
        if not layout.dedup_pairs:
            masked = listed > some[:, None] if causal else torch.zeros_like(listed, dtype=torch.bool)
            if mask is not None:
                padding = ~mask[:, None, None, :].expand(-1, *listed.shape[1:3], -1)
                masked = masked | padding.gather(-1, listed.clamp(min=0))
        options |= {"masked": masked, "draws": None if draws is None else (draws[0][:, :, some], draws[1])}
        inputs = query[:, :, some], keys, value, listed, some.expand(batch, -1), scores_scale
        results.append(gather_attention(*inputs, **options))
    return concat_queries(results)
