"""Exact attention, over a layer's own tokens ("full" layers) or an encoder's states (cross-attention).

It uses the library's attention interface: `attn_implementation="sdpa"` (the default) or `"eager"`.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..configuration_reformer import ReformerConfig
from ..ops.dispatch import contain_nonfinite, rotate, transform_needs_reference, windowed_attention
from ..ops.gather_attention import SparseAttention
from ..ops.layout import AttentionLayout, window_layout
from ..ops.prng import ATTENTION_DROPOUT, CROSS_DROPOUT, OUTPUT_DROPOUT, fold
from ..ops.reference import dropout_factors
from ..ops.sequence_parallel import SequenceShard, all_reduce, all_to_all_heads, all_to_all_tokens
from ..reversible.chunking import Handoff
from .feed_forward import Dropout
from .forward_context import AttentionReport, EncoderContext, ForwardContext, Sorting, real_tokens

MAX_SCORES = 2**24  # number of scores computed at once for the attention mass


class AttentionProjections(nn.Module):
    """Base class of attention modules: projections to queries, keys and values (`qkv`), and back (`output`)."""

    def __init__(self, config: ReformerConfig, layer: int, kind: str, over_encoder: bool = False):
        super().__init__()
        self.layer, self.kind, self.config, self.over_encoder = layer, kind, config, over_encoder
        self.causal = config.is_decoder and not over_encoder
        self.heads, self.head_size = config.num_attention_heads, config.attention_head_size
        self.scale = self.head_size**-0.5
        self.output_dropout = Dropout(config.hidden_dropout_prob)
        inner, source = self.heads * self.head_size, config.hidden_size * (2 if over_encoder else 1)
        if kind == "lsh":
            self.qk_proj = nn.Linear(config.hidden_size, inner, bias=False)
        else:
            self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
            self.k_proj = nn.Linear(source, inner, bias=False)
        self.v_proj = nn.Linear(source, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def qkv(self, x: torch.Tensor) -> list[torch.Tensor | None]:
        """Project the normalized stream, (B, T, D), to query, key and value, (B, T, H * head_size) each.

        The key is None if it equals the query. Cross-attention projects only the query.
        """
        if self.kind == "lsh":
            return [self.qk_proj(x), None, self.v_proj(x)]
        return [self.q_proj(x)] if self.over_encoder else [self.q_proj(x), self.k_proj(x), self.v_proj(x)]

    def output(self, mixed: torch.Tensor, key: torch.Tensor | None, offset: int = 0) -> torch.Tensor:
        """Project the concatenated heads, (B, T, H * head_size), to (B, T, D).

        Args:
            key: random key of this layer's dropout; None in evaluation.
            offset: position of mixed[:, 0] in its sequence.
        """
        key = None if key is None else fold(key, CROSS_DROPOUT if self.over_encoder else OUTPUT_DROPOUT)
        return self.output_dropout(self.o_proj(mixed), key, offset)


class FullAttention(AttentionProjections):
    """Attention with one softmax per query over all keys that it may see.

    With `over_encoder`, keys and values are projected from the encoder's last hidden state, (B, S, 2 D).
    """

    def __init__(self, config: ReformerConfig, layer: int, over_encoder: bool = False):
        super().__init__(config, layer, "full", over_encoder)
        self.dropout = Dropout(0.0 if over_encoder else config.local_attention_probs_dropout_prob or 0.0)

    def forward(
        self, projected: Handoff, ctx: ForwardContext, states: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, AttentionReport]:
        """Attend with the output of `qkv`; returns the concatenated heads, (B, T, H * head_size), and a report.

        The output of a query that may see nothing is 0.

        Args:
            states: (B, S, 2 D), the encoder's states, described by `ctx.encoder`.
        """
        shard = None if self.over_encoder else ctx.shard
        query, *own = (split_heads(x, self.heads, shard) for x in projected.take())
        dtype, encoder, positions = query.dtype, ctx.encoder or EncoderContext(), None
        if states is None:
            query, key, value, allowed, sees, positions = self._own_tokens(query, own[0], own[1], ctx)
        else:
            key, value, allowed, sees = self._encoder_tokens(states, encoder)
        causal = self.causal and allowed is None
        dropout_key, rate, mass = attention_dropout_key(self, ctx), self.dropout.rate, None

        def attend(query: torch.Tensor, key: Any, value: torch.Tensor) -> tuple[torch.Tensor, Any]:
            """Compute the output, (B, H, T, D), and the weights if requested."""
            if ctx.want_weights:
                visible = allowed if sees is None else allowed & sees
                factors = None if dropout_key is None else dropout_factors(dropout_key, rate, *query.shape[:3])
                out, weights = eager_attention(self, query, key, value, visible, self.scale, causal, factors)
                return out.transpose(1, 2), weights
            if dropout_key is not None:  # keyed dropout masks, which the library's functions do not support
                layout = dense_layout(value, self.causal, ctx)
                options: Any = {"scale": self.scale, "dropout": rate, "dropout_key": dropout_key}
                options["backend"] = self.config.attention_backend
                return windowed_attention(query, key, value, layout, causal=self.causal, **options)
            implementation = "eager" if transform_needs_reference() else self.config._attn_implementation
            interface = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
            out, _ = interface(self, query, key, value, allowed, scaling=self.scale, is_causal=causal)
            out = out.transpose(1, 2)
            return out if sees is None else torch.where(sees, out, 0), None

        def reach(tokens: torch.Tensor) -> torch.Tensor:
            """Return which queries, (B, H or 1, T), may see any of these keys, (B, H, S)."""
            if allowed is None:
                last = tokens.cumsum(-1) if causal else tokens.sum(-1, keepdim=True).expand(query.shape[:3])
                return last > 0
            seen = (allowed & tokens.any(1)[:, None, None]).any(-1)
            return seen if sees is None else seen & sees[..., 0]

        out, weights = contain_nonfinite(attend, reach, query, key, value)
        if ctx.query_weights is not None:
            mass = full_attention_mass(query, key, ctx.query_weights, allowed, causal, self.scale)
        if states is not None:
            mass = mass if mass is None or encoder.mask is None else torch.where(encoder.mask, mass, 0)
            report = AttentionReport(encoder_mass=mass, encoder_weights=weights)
        else:
            if weights is not None and (ctx.want_weights == "sparse" or positions is not None):
                tokens = torch.arange(key.shape[2], device=key.device) if positions is None else positions
                visible = _visible(allowed, causal, weights.shape, key.device)
                tokens = tokens if visible is None else torch.where(visible, tokens, -1)
                weights = SparseAttention(tokens.expand_as(weights), weights)
            sorting = None
            if ctx.want_sorting:
                sorting = Sorting(dense_layout(value, self.causal, ctx), value.shape[1], real_tokens(ctx, value))
            report = AttentionReport(
                mass=None if mass is None else all_reduce(mass, shard),
                weights=weights,
                sorting=sorting,
            )
        return merge_heads(out.to(dtype), shard), report

    def _own_tokens(self, query, key, value, ctx: ForwardContext) -> tuple[Any, ...]:
        """Prepare self-attention over all tokens so far.

        Returns:
            Query, key and value; which keys each query may see (`make_attention_mask`); which queries see any,
            (B, 1, T, 1), or None; and with a non-empty cache the input positions of the keys, (B, 1, 1, T), or None.
        """
        query, key = (rotate(x, ctx.rotary, backend=self.config.attention_backend) for x in (query, key))
        cache_layer: Any = None if ctx.cache is None else ctx.cache.layers[self.layer]
        continues = cache_layer is not None and cache_layer.seen_tokens > 0
        if cache_layer is not None:
            numbers = cache_layer.append(key, value, None, ctx.mask)
        if continues:
            key, value, *_ = cache_layer.all_tokens()
            all_numbers = torch.arange(key.shape[2], device=key.device)
            allowed = (all_numbers <= numbers.clamp(min=0)[..., None])[:, None]  # (B, 1, N, T)
            positions = cache_layer.input_positions(all_numbers.expand(key.shape[0], 1, 1, -1))
            return query.to(key.dtype), key, value, allowed, None, positions
        allowed = make_attention_mask(ctx, value.shape[2], self.causal, value.device)
        return query, key, value, allowed, None if ctx.mask is None else ctx.mask[:, None, :, None], None

    def _encoder_tokens(self, states: torch.Tensor, encoder: EncoderContext) -> tuple[Any, ...]:
        """Prepare cross-attention likewise, without query and positions. Cached keys and values are computed once."""
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
        return key, value, mask[:, None, None] | ~sees, sees  # no row without a visible key


def split_heads(x: torch.Tensor, heads: int, shard: SequenceShard | None = None) -> torch.Tensor:
    """Split (B, T, H * head_size) into (B, H, T, head_size); with a shard, all tokens of this process's heads."""
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return x if shard is None else all_to_all_heads(x, shard)


def merge_heads(x: torch.Tensor, shard: SequenceShard | None = None) -> torch.Tensor:
    """Undo `split_heads`."""
    return (x if shard is None else all_to_all_tokens(x, shard)).transpose(1, 2).flatten(2)


def attention_dropout_key(attention: Any, ctx: ForwardContext) -> torch.Tensor | None:
    """Return the key of a layer's attention dropout, as in `reference.pair_keys`; None without dropout."""
    if ctx.layer_key is None or not attention.dropout.rate:
        return None
    key = fold(ctx.layer_key, ATTENTION_DROPOUT)
    if ctx.shard is None:
        return key
    return torch.stack([key, key.new_full((), ctx.shard.own_heads(attention.heads).start)])


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool = False,
    dropout_factors: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention in at least float32, with the signature of the library's attention interface.

    Args:
        query: (B, H, T, D); key, value: (B, H, S, D).
        attention_mask: bool, broadcast to (B, 1, T, S), True for keys that a query may see; None: all keys, or with
            `is_causal` none after the query.
        dropout_factors: (B, H, T, T), multiplied with the weights.

    Returns:
        The output, (B, T, H, D) in the dtype of `value`, and the weights before dropout, (B, H, T, S).
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        scores = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scaling
        weights = _softmax(scores, _visible(attention_mask, is_causal, scores.shape, scores.device))
        used = weights if dropout_factors is None else weights * dropout_factors.to(dtype)
        return (used @ value.to(dtype)).to(value.dtype).transpose(1, 2), weights


def full_attention_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    query_weights: torch.Tensor,
    allowed: torch.Tensor | None,
    causal: bool = False,
    scale: float = 1.0,
) -> torch.Tensor:
    """Compute the attention mass of every key, (B, S) in at least float32, as in `dispatch.windowed_attention`.

    Queries are processed a few at a time and their weights recomputed in backward, so memory grows linearly.

    Args:
        query: (B, H, T, D); key: (B, H, S, D); query_weights: (B, T), 0 for padding.
        allowed, causal: as `attention_mask` and `is_causal` of `eager_attention`.
    """
    (batch, heads, length, _), keys = query.shape, key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)

    def mass_of(query, key, visible, query_weights):
        return torch.einsum("bhns,bn->bs", _softmax(query @ key.transpose(-1, -2), visible), query_weights)

    with torch.autocast(query.device.type, enabled=False):
        query, key = query.to(dtype) * scale, key.to(dtype)
        visible = _visible(allowed, causal, (length, keys), query.device)
        total = query.new_zeros(batch, keys)
        size = length if torch.compiler.is_compiling() else max(1, MAX_SCORES // (batch * heads * keys))
        for first in range(0, length, size):
            some = slice(first, first + size)
            seen = visible if visible is None or visible.shape[-2] == 1 else visible[..., some, :]
            inputs = query[:, :, some], key, seen, query_weights[:, some].to(dtype)
            recompute = size < length and torch.is_grad_enabled()
            total = total + (checkpoint(mass_of, *inputs, use_reentrant=False) if recompute else mass_of(*inputs))
    return total


def _visible(allowed: torch.Tensor | None, causal: bool, shape: tuple[int, ...], device: Any) -> torch.Tensor | None:
    """Return `allowed`, or if it is None and attention is causal, which of S keys T queries may see, (T, S)."""
    if allowed is not None or not causal:
        return allowed
    return torch.ones(shape[-2:], dtype=torch.bool, device=device).tril()


def _softmax(scores: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    """Apply the softmax over visible keys; the weights of others are 0."""
    if visible is None:
        return scores.softmax(-1)
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1) * visible


def make_attention_mask(ctx: ForwardContext, length: int, causal: bool, device: torch.device) -> torch.Tensor | None:
    """Return which tokens each token may see, bool, broadcast to (B, 1, T, T); None if `ctx` hides none."""
    if ctx.mask is None and ctx.samples is None:
        return None
    allowed = torch.ones(1, 1, length if causal else 1, length, dtype=torch.bool, device=device)
    allowed = allowed.tril() if causal else allowed
    if ctx.mask is not None:
        allowed = allowed & ctx.mask[:, None, None, :]
    if ctx.samples is not None:
        allowed = allowed & (ctx.samples[:, None, :, None] == ctx.samples[:, None, None, :])
    return allowed


def dense_layout(value: torch.Tensor, causal: bool, ctx: ForwardContext) -> AttentionLayout:
    """Make windows of all real tokens of a sample, for exact attention by the op of the other layers."""
    batch, _, length, _ = value.shape
    position = torch.zeros(batch, 1, 1, length, dtype=torch.int32, device=value.device)
    count = 1 if ctx.samples is None else None
    position = position if ctx.samples is None else ctx.samples[:, None, None, :]
    return window_layout([(position, count, length if causal else 2 * length)], causal, ctx.mask)
