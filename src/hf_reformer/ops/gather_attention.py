"""Attention over lists of tokens: of single new tokens over those kept, and where the weights are asked for."""

from collections.abc import Iterable
from typing import NamedTuple

import torch

from .layout import AttentionLayout
from .prng import keep_threshold, pair_scramble
from .reference import MASKED_SCORE, SELF_SCORE, attention_with_weights, inverse_permutation, pair_keys

MAX_GATHERED = 2**24  # numbers of keys looked up at once


class SparseAttention(NamedTuple):
    """Which tokens every token attends to, and how much.

    Attributes:
        tokens: (B, H, T, K) int64, places of the tokens attended to in the input (and the cache before it); -1: none.
            In chunk mode a token may be listed several times, and its weights add up.
        weights: (B, H, T, K), 0 where there is none, before dropout; each token's add up to 1, or are all 0 where it
            sees nothing.
    """

    tokens: torch.Tensor
    weights: torch.Tensor

    def dense(self, length: int) -> torch.Tensor:
        """The matrix of weights over `length` tokens, (B, H, T, length)."""
        matrix = self.weights.new_zeros(*self.weights.shape[:3], length)
        return matrix.scatter_add(-1, self.tokens.clamp(min=0), self.weights)

    def received(self, paid: torch.Tensor) -> torch.Tensor:
        """What every token receives of T tokens without others before them, by their shares (B, T): (B, T)."""
        weights = (self.weights * paid.to(self.weights.dtype)[:, None, :, None]).flatten(1)
        return weights.new_zeros(paid.shape).scatter_add(1, self.tokens.clamp(min=0).flatten(1), weights)


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
    """One softmax per head and query over the tokens listed.

    Args:
        query: (B, H, N, D).
        keys, values: (B, H, C, D); token t stands in slot t % C.
        tokens: (B, H or 1, N, K) int64; negative: none.
        own: (B, N) int64, each query's own token.
        scale: of the scores; None for shared query/key attention, whose `keys` are queries (`reference.shared_key`).
        dedup_pairs: whether a token that is listed several times counts once; otherwise so many times.
        masked: like `tokens`, bool: listed with a score of -1e9.
        dropout, draws: on the weights, by `reference.pair_keys` of these queries and of all keys.

    Returns:
        (B, H, N, D) in the dtype of `values`, 0 where nothing is listed; and the weights, sorted by token if each
        counts once.
    """
    batch, heads, slots, size = keys.shape
    tokens = tokens.expand(-1, heads, -1, -1)
    tokens = tokens.sort(-1).values if dedup_pairs else tokens
    if dedup_pairs:
        again = torch.nn.functional.pad(tokens[..., 1:] == tokens[..., :-1], (1, 0))
        tokens = torch.where(again, -1, tokens)
    listed = tokens >= 0
    line = torch.arange(batch * heads, device=keys.device).view(batch, heads, 1, 1) * slots
    rows = (line + tokens.remainder(slots)).flatten()
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        key, value = (x.reshape(-1, x.shape[-1]).index_select(0, rows).to(dtype) for x in (keys, values))
        key, value = (x.view(*tokens.shape, -1) for x in (key, value))
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


def joined(attentions: Iterable[SparseAttention]) -> SparseAttention:
    """Those of several queries, one after the other."""
    return SparseAttention(*(torch.cat(parts, dim=2) for parts in zip(*attentions, strict=True)))


def slices(query: torch.Tensor, listed: int) -> tuple[torch.Tensor, ...]:
    """Places of queries (B, H, N, D) to be worked on together, where each lists so many tokens."""
    batch, heads, new, size = query.shape
    return torch.arange(new, device=query.device).split(max(1, MAX_GATHERED // (batch * heads * listed * size)))


def without_end(attention: SparseAttention | torch.Tensor, length: int) -> SparseAttention | torch.Tensor:
    """Of the first `length` tokens alone; those behind them weigh nothing."""
    if isinstance(attention, torch.Tensor):
        return attention[:, :, :length, :length]
    tokens, weights = (x[:, :, :length] for x in attention)
    there = tokens < length
    return SparseAttention(torch.where(there, tokens, -1), weights * there)


def visible_tokens(orders: AttentionLayout) -> torch.Tensor:
    """The tokens that every token's windows show, round after round, (B, H, T, K) int64; -1: none."""
    rounds, length = orders.perm.shape[2:]
    place = inverse_permutation(orders.perm)
    first, last = (
        x.long().gather(-1, place)[..., None] for x in (orders.window_start, orders.window_end)
    )  # (B, H, R, T, 1)
    width = orders.left_reach + orders.right_reach + (1 if orders.dedup_pairs else orders.block_size)
    shown = first + torch.arange(width, device=place.device)
    line = orders.perm.flatten(2).long()
    tokens = line.gather(-1, shown.flatten(2) % (rounds * length)).view_as(shown)
    return torch.where(shown <= last, tokens, -1).transpose(2, 3).flatten(3)


def attend_by_matrix(
    query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor, orders: AttentionLayout, *, scale: float, **how
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_ops.windowed_attention` and its weights (B, H, T, T), through which gradients pass."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query, key, values = (None if x is None else x.to(dtype) for x in (query, key, value))
        out, weights = attention_with_weights(query, None if key is None else key * scale, values, orders, **how)
    return out.to(value.dtype), weights


def attention_with_sparse_weights(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    orders: AttentionLayout,
    *,
    scale: float,
    causal: bool,
    mask: torch.Tensor | None,
    dropout: float,
    dropout_key: torch.Tensor | None,
) -> tuple[torch.Tensor, SparseAttention]:
    """`attention_ops.windowed_attention` and its weights, a few queries at a time."""
    tokens, (batch, heads, length, _) = visible_tokens(orders), query.shape
    own = torch.arange(length, device=query.device).expand(batch, -1)
    draws = None if dropout_key is None else pair_keys(dropout_key, batch, heads, length)
    found = []
    for some in slices(query, tokens.shape[-1]):
        listed, masked = tokens[:, :, some], None
        if not orders.dedup_pairs:
            masked = listed > some[:, None] if causal else torch.zeros_like(listed, dtype=torch.bool)
            if mask is not None:
                hidden = ~mask[:, None, None, :].expand(-1, *listed.shape[1:3], -1)
                masked = masked | hidden.gather(-1, listed.clamp(min=0))
        found.append(
            gather_attention(
                query[:, :, some],
                query if key is None else key,
                value,
                listed,
                own[:, some],
                None if key is None else scale,
                dedup_pairs=orders.dedup_pairs,
                masked=masked,
                dropout=dropout,
                draws=None if draws is None else (draws[0][:, :, some], draws[1]),
            )
        )
    outs, attentions = zip(*found, strict=True)
    return torch.cat(outs, dim=2), joined(attentions)
