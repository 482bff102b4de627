"""Exact attention, over a layer's own tokens ("full" layers) or over an encoder's states (cross-attention).

It goes through the library's attention interface: `attn_implementation="sdpa"` (the default) or `"eager"`.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..configuration_reformer import ReformerConfig
from ..ops.gather_attention import SparseAttention
from ..ops.layout import AttentionLayout, window_layout
from ..ops.prng import ATTENTION_DROPOUT, CROSS_DROPOUT, OUTPUT_DROPOUT, dropout, fold
from ..ops.reference import dropout_factors
from ..ops.sequence_parallel import SequenceShard, all_reduce, all_to_all_heads, all_to_all_tokens
from ..reversible.chunking import Handoff
from .forward_context import AttentionReport, EncoderContext, ForwardContext, Sorting
from .position_embeddings import rotate

MAX_SCORES = 2**24  # scores computed at once for the attention mass


class FullAttention(nn.Module):
    """One softmax per query over all keys that it may see: `qkv(x)`, then `forward`, then `output(mixed)`.

    With `over_encoder`, keys and values are projected from the encoder's last hidden state, (B, S, 2 D).
    """

    kind = "full"

    def __init__(self, config: ReformerConfig, layer: int, over_encoder: bool = False):
        super().__init__()
        self.layer, self.config, self.over_encoder = layer, config, over_encoder
        self.causal = config.is_decoder and not over_encoder
        self.heads, self.head_size = config.num_attention_heads, config.attention_head_size
        self.scale = self.head_size**-0.5
        self.output_dropout = config.hidden_dropout_prob
        self.dropout = 0.0 if over_encoder else config.local_attention_probs_dropout_prob or 0.0
        inner, source = self.heads * self.head_size, config.hidden_size * (2 if over_encoder else 1)
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(source, inner, bias=False)
        self.v_proj = nn.Linear(source, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def qkv(self, x: torch.Tensor) -> list[torch.Tensor | None]:
        """(B, T, D) normalised stream → query and, of own tokens, key and value, (B, T, H * head_size)."""
        return [self.q_proj(x)] if self.over_encoder else [self.q_proj(x), self.k_proj(x), self.v_proj(x)]

    def output(self, mixed: torch.Tensor, key: torch.Tensor | None, offset: int = 0) -> torch.Tensor:
        """As `ReformerAttention.output`."""
        site = CROSS_DROPOUT if self.over_encoder else OUTPUT_DROPOUT
        return dropout(self.o_proj(mixed), self.output_dropout, None if key is None else fold(key, site), offset)

    def forward(
        self, projected: Handoff, ctx: ForwardContext, states: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, AttentionReport]:
        """What `qkv` gave → (B, T, H * head_size). A query that may see nothing gets 0.

        Args:
            states: (B, S, 2 D), the encoder's, of which `ctx.encoder` tells more.
        """
        shard = None if self.over_encoder else ctx.shard
        query, *own = (split_heads(x, self.heads, shard) for x in projected.take())
        dtype, encoder, positions = query.dtype, ctx.encoder or EncoderContext(), None
        if states is None:
            query, key, value, allowed, sees, positions = self._own_tokens(query, own[0], own[1], ctx)
        else:
            key, value, allowed, sees = self._encoder_tokens(states, encoder)
        causal = self.causal and allowed is None
        dropout_key = attention_dropout_key(self, ctx)
        weights: Any = None
        mass = None
        if ctx.want_weights or dropout_key is not None:
            visible = allowed if sees is None else allowed & sees
            out, weights = dense_attention(query, key, value, visible, causal, self.scale, self.dropout, dropout_key)
        else:
            interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
            out = interface(self, query, key, value, allowed, scaling=self.scale, is_causal=causal)[0].transpose(1, 2)
            out = out if sees is None else torch.where(sees, out, 0)
        if ctx.query_weights is not None:
            mass = full_attention_mass(query, key, ctx.query_weights, allowed, causal, self.scale)
        weights = weights if ctx.want_weights else None
        if states is not None:
            mass = mass if mass is None or encoder.mask is None else torch.where(encoder.mask, mass, 0)
            report = AttentionReport(encoder_mass=mass, encoder_weights=weights)
        else:
            if weights is not None and (ctx.want_weights == "sparse" or positions is not None):
                weights = _as_lists(weights, positions, allowed, causal)
            report = AttentionReport(
                mass=None if mass is None else all_reduce(mass, shard),
                weights=weights,
                sorting=Sorting(dense_layout(value, self.causal, ctx.mask, ctx.samples)) if ctx.want_sorting else None,
            )
        return merge_heads(out.to(dtype), shard), report

    def _own_tokens(self, query, key, value, ctx: ForwardContext) -> tuple[Any, ...]:
        """Query, key and value of all tokens so far, and about them:

        which keys each query may see (`allowed` of `dense_attention`); which queries see any, or None; and for keys of
        a cache where their tokens stand in the input, (B, 1, 1, T), or None.
        """
        query, key = rotate(query, ctx.rotary), rotate(key, ctx.rotary)
        cache_layer = None if ctx.cache is None else ctx.cache.layers[self.layer]
        if cache_layer is not None and cache_layer.seen_tokens:
            numbers = cache_layer.append(key, value, None, ctx.mask)
            key, value, *_ = cache_layer.all_tokens()
            all_numbers = torch.arange(key.shape[2], device=key.device)
            allowed = (all_numbers <= numbers.clamp(min=0)[..., None])[:, None]  # (B, 1, N, T)
            positions = cache_layer.input_positions(all_numbers.expand(key.shape[0], 1, 1, -1))
            return query.to(key.dtype), key, value, allowed, None, positions
        if cache_layer is not None:
            cache_layer.append(key, value, None, ctx.mask)
        allowed = make_attention_mask(ctx.mask, ctx.samples, value.shape[2], self.causal, value.device)
        return query, key, value, allowed, None if ctx.mask is None else ctx.mask[:, None, :, None], None

    def _encoder_tokens(self, states: torch.Tensor, encoder: EncoderContext) -> tuple[Any, ...]:
        """The same of the source's tokens, without the query. The cache computes keys and values once."""
        mask, cache = encoder
        if cache is not None and len(cache.layers) > self.layer:
            key, value = cache.layers[self.layer].keys, cache.layers[self.layer].values
        else:
            key, value = (split_heads(x, self.heads) for x in (self.k_proj(states), self.v_proj(states)))
            if cache is not None:
                cache.update(key.detach(), value.detach(), self.layer)
        if mask is None:
            return key, value, None, None
        sees = mask.any(-1)[:, None, None, None]  # (B, 1, 1, 1)
        return key, value, mask[:, None, None] | ~sees, sees  # never without any


def _as_lists(
    weights: torch.Tensor, positions: torch.Tensor | None, allowed: torch.Tensor | None, causal: bool
) -> SparseAttention:
    """Weights (B, H, T, S) as lists of the tokens that a query may see."""
    positions = torch.arange(weights.shape[-1], device=weights.device) if positions is None else positions
    if allowed is None and causal:
        allowed = torch.ones(weights.shape[2:], dtype=torch.bool, device=weights.device).tril()
    tokens = positions if allowed is None else torch.where(allowed, positions, -1)
    return SparseAttention(tokens.expand_as(weights), weights)


def split_heads(x: torch.Tensor, heads: int, shard: SequenceShard | None = None) -> torch.Tensor:
    """(B, T, H * head_size) → (B, H, T, head_size); of a shared sequence all tokens of this process's heads."""
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return x if shard is None else all_to_all_heads(x, shard)


def merge_heads(x: torch.Tensor, shard: SequenceShard | None = None) -> torch.Tensor:
    """The inverse of `split_heads`."""
    return (x if shard is None else all_to_all_tokens(x, shard)).transpose(1, 2).flatten(2)


def attention_dropout_key(attention: Any, ctx: ForwardContext) -> torch.Tensor | None:
    """The key of a layer's dropout on attention weights, as `reference.pair_keys` takes it; None without dropout."""
    if ctx.layer_key is None or not attention.dropout:
        return None
    key = fold(ctx.layer_key, ATTENTION_DROPOUT)
    if ctx.shard is None:
        return key
    return torch.stack([key, key.new_tensor(ctx.shard.own_heads(attention.heads).start)])


def dense_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    causal: bool = False,
    scale: float = 1.0,
    p: float = 0.0,
    dropout_key: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain computation in at least float32: (B, H, T, D) in the dtype of `value`, and the weights before dropout,
    (B, H, T, S).

    Args:
        query: (B, H, T, D); key, value: (B, H, S, D).
        allowed: bool, broadcast to (B, 1, T, S); None: all, or with `causal` those up to the query's own position.
        p, dropout_key: dropout on the weights, as `dispatch.windowed_attention` takes it.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale
        if allowed is None and causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if allowed is not None:
            scores = scores.masked_fill(~allowed, torch.finfo(dtype).min)
        weights = scores.softmax(-1)
        weights = weights if allowed is None else weights * allowed
        used = weights
        if dropout_key is not None:
            used = weights * dropout_factors(dropout_key, p, *query.shape[:3]).to(dtype)
        return (used @ value.to(dtype)).to(value.dtype), weights


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dense_attention` as the library's attention interface has it: (B, T, H, D), and the weights."""
    out, weights = dense_attention(query, key, value, attention_mask, is_causal, scaling)
    return out.transpose(1, 2), weights


def full_attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weights: torch.Tensor,
    allowed: torch.Tensor | None,
    causal: bool = False,
    scale: float = 1.0,
) -> torch.Tensor:
    """The attention mass that every key receives, (B, S) in at least float32: `dispatch.windowed_attention`'s.

    A few queries at a time, whose weights are recomputed in backward: memory grows with the longer of the two lengths.

    Args:
        query: (B, H, T, D); key: (B, H, S, D); query_weights: (B, T), 0 for padding.
        allowed, causal: as `dense_attention` takes them.
    """
    batch, heads, length, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    if allowed is None and causal:
        positions = torch.arange(max(length, key.shape[2]), device=query.device)
        allowed = (positions[:length, None] >= positions[: key.shape[2]])[None, None]
    with torch.autocast(query.device.type, enabled=False):
        query, key = query.to(dtype) * scale, key.to(dtype)
        total = query.new_zeros(batch, key.shape[2])
        size = length if torch.compiler.is_compiling() else max(1, MAX_SCORES // (batch * heads * key.shape[2]))
        for first in range(0, length, size):
            some = slice(first, first + size)
            visible = allowed if allowed is None or allowed.shape[2] == 1 else allowed[:, :, some]
            run = partial(_mass_of_queries, visible=visible, query_weights=query_weights[:, some].to(dtype))
            inputs = query[:, :, some], key
            recompute = size < length and torch.is_grad_enabled()
            total = total + (checkpoint(run, *inputs, use_reentrant=False) if recompute else run(*inputs))
    return total


def _mass_of_queries(query, key, visible, query_weights) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2)
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return torch.einsum("bhns,bn->bs", scores.softmax(-1), query_weights)


def make_attention_mask(
    mask: torch.Tensor | None, samples: torch.Tensor | None, length: int, causal: bool, device: torch.device
) -> torch.Tensor | None:
    """Which tokens of its sequence each may see: `allowed` of `dense_attention`.

    mask: (B, T) bool, real tokens; samples: (B, T), the sample of a packed sequence that a token belongs to.
    """
    if mask is None and samples is None:
        return None
    allowed = torch.ones(1, 1, length if causal else 1, length, dtype=torch.bool, device=device)
    allowed = allowed.tril() if causal else allowed
    if mask is not None:
        allowed = allowed & mask[:, None, None, :]
    if samples is not None:
        allowed = allowed & (samples[:, None, :, None] == samples[:, None, None, :])
    return allowed


def dense_layout(
    value: torch.Tensor, causal: bool, mask: torch.Tensor | None, samples: torch.Tensor | None
) -> AttentionLayout:
    """Windows that show every real token of the same sample: exact attention as the op of the other layers."""
    batch, _, length, _ = value.shape
    position = torch.zeros(batch, 1, 1, length, dtype=torch.int32, device=value.device)
    position = position if samples is None else samples[:, None, None, :]
    return window_layout([(position, 1 if samples is None else None, length if causal else 2 * length)], causal, mask)
