"""The attention branch of local and LSH layers. "full" layers use `full_attention.FullAttention`."""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..configuration_reformer import ReformerConfig
from ..ops.dispatch import (
    chunk_layout,
    contain_nonfinite,
    lsh_buckets,
    rotate,
    window_layout,
    window_rotations,
    windowed_attention,
)
from ..ops.gather_attention import attention_with_dense_weights, attention_with_sparse_weights, crop, mass_of_weights
from ..ops.layout import AttentionLayout, sees_any, window_extent
from ..ops.lsh import Centering, exploration_buckets, legacy_num_buckets, num_buckets_total, seeded_rotations
from ..ops.prng import make_key
from ..ops.sequence_parallel import all_reduce
from ..reversible.chunking import Handoff
from .cached_attention import decode, prefers_decode, prefill
from .feed_forward import Dropout
from .forward_context import AttentionReport, ForwardContext, Sorting, real_tokens
from .full_attention import AttentionProjections, attention_dropout_key, merge_heads, split_heads


class Hasher(NamedTuple):
    """The hash function of a layer, for one call or for the lifetime of a cache."""

    rotations: torch.Tensor  # (H, D, R, sum(factors) / 2), as in `lsh.lsh_buckets`
    num_buckets: int | tuple[int, ...]  # per round, or their factors
    backend: str  # the config's choice

    def buckets(self, vectors: torch.Tensor, centering: Centering | None) -> torch.Tensor:
        """Hash vectors (B, H, T, D) into buckets (B, H, R, T) int32."""
        return lsh_buckets(vectors, self.rotations, self.num_buckets, centering, self.backend)


class ReformerAttention(AttentionProjections):
    """Windowed attention over several sort orders of the tokens."""

    def __init__(self, config: ReformerConfig, layer: int):
        kinds: Any = config.attn_layers
        super().__init__(config, layer, kinds[layer])
        self.backend, self.mode = config.attention_backend, config.attention_mode
        self.centering = float(config.lsh_centering or 0) if self.mode == "window" else 0.0
        turned = math.ceil(round(config.lsh_rotary * self.heads, 6))
        self.turned_heads = turned if self.kind == "lsh" else self.heads
        self.dropout = Dropout(getattr(config, f"{self.kind}_attention_probs_dropout_prob") or 0.0)
        self.chunk = getattr(config, f"{self.kind}_attn_chunk_length")
        self.before = getattr(config, f"{self.kind}_num_chunks_before") or 0
        self.after = getattr(config, f"{self.kind}_num_chunks_after") or 0

    def forward(self, projected: Handoff, ctx: ForwardContext) -> tuple[torch.Tensor, AttentionReport]:
        """Attend with the output of `qkv`; returns the concatenated heads, (B, T, H * head_size), and a report."""
        split: list[Any] = [None if x is None else split_heads(x, self.heads, ctx.shard) for x in projected.take()]
        query, key, value = split
        projected_query, turned = query, self.turned_heads
        if ctx.shard is not None:
            own = ctx.shard.own_heads(self.heads)
            turned = min(max(turned, own.start), own.stop) - own.start
        query = rotate(query, ctx.rotary, turned, self.backend)
        key = None if key is None else rotate(key, ctx.rotary, turned, self.backend)
        hashed = query if self.centering else projected_query
        vectors = hashed if self.kind == "lsh" else None
        cache_layer = None if ctx.cache is None else ctx.cache.layers[self.layer]
        if cache_layer is not None and cache_layer.seen_tokens:
            attend = decode if prefers_decode(self, value.shape[2], ctx) else prefill
            out, sparse = attend(self, query, query if key is None else key, value, vectors, ctx)
            return merge_heads(out.to(value.dtype)), AttentionReport(weights=sparse)
        if cache_layer is None and self._sees_all_unhashed(ctx):
            vectors = None
        buckets = None if vectors is None else self.buckets(vectors, ctx)
        if cache_layer is not None:
            cache_layer.append(query if key is None else key, value, buckets, ctx.mask)
        length, mask, query_weights = value.shape[2], ctx.mask, ctx.query_weights
        num_buckets = 0 if buckets is None else num_buckets_total(self._num_buckets(ctx))
        sorted_by = value.shape[1], real_tokens(ctx, value), vectors, buckets, num_buckets, ctx.samples, query
        if ctx.padded_length > length:  # chunk mode needs whole chunks
            more = ctx.padded_length - length
            mask = value.new_ones(value.shape[0], length, dtype=torch.bool) if mask is None else mask
            mask, query_weights, buckets = (_pad(x, (0, more)) for x in (mask, query_weights, buckets))
            query, key, value = (_pad(x, (0, 0, 0, more)) for x in (query, key, value))
        layout = self.layout(buckets, mask, ctx, value)
        options: dict[str, Any] = {"causal": self.causal, "mask": mask, "scale": self.scale}
        options |= {"dropout": self.dropout.rate, "dropout_key": attention_dropout_key(self, ctx)}
        weights: Any = None
        if ctx.want_weights:
            as_lists = ctx.want_weights == "sparse"
            weigh: Any = attention_with_sparse_weights if as_lists else attention_with_dense_weights
            reach = partial(sees_any, layout=layout, causal=self.causal, mask=mask)
            out, weights = contain_nonfinite(partial(weigh, layout=layout, **options), reach, query, key, value)
            mass = None if query_weights is None else mass_of_weights(weights, query_weights)
            weights = crop(weights, length)
        else:
            options |= {"query_weights": query_weights, "backend": self.backend}
            out, mass = windowed_attention(query, key, value, layout, **options)
        report = AttentionReport(
            mass=None if mass is None else all_reduce(mass[:, :length], ctx.shard),
            weights=weights,
            sorting=Sorting(layout, *sorted_by) if ctx.want_sorting else None,
        )
        return merge_heads(out[:, :, :length], ctx.shard), report

    def _sees_all_unhashed(self, ctx: ForwardContext) -> bool:
        """Whether the input is so short that buckets do not matter: every token sees all tokens that it may see."""
        if self.mode == "chunk":
            return ctx.padded_length <= self.chunk
        if ctx.want_sorting or torch.compiler.is_compiling() or not self.config.lsh_include_local:
            return False  # a graph must serve any length
        return ctx.padded_length <= 1 + window_extent(self.config.local_window, self.causal)[0]

    def layout(
        self, buckets: torch.Tensor | None, mask: torch.Tensor | None, ctx: ForwardContext, value: torch.Tensor
    ) -> AttentionLayout:
        """Compute the sort orders of the tokens of `value` (B, H, T, D) and the windows in them.

        Args:
            buckets: (B, H, R, T) int32 in lsh layers, otherwise None.
            mask: (B, T) bool, True for real tokens; None if all are real.
        """
        config, (batch, heads, length, _) = self.config, value.shape
        heads = 1 if buckets is None else heads
        position = torch.zeros(batch, heads, 1, length, dtype=torch.int32, device=value.device)
        count = 1 if buckets is None else num_buckets_total(self._num_buckets(ctx))
        if self.mode == "chunk":
            if buckets is None:  # chunks follow the sequence; padding stays in place and is masked in the softmax
                buckets, mask = position, None
            return chunk_layout(buckets, count, self.chunk, self.before, self.after, mask, self.backend)
        groups: list[tuple[torch.Tensor, int | None, int]] = [(position, 1, config.local_window)]
        if buckets is not None:
            groups = groups if config.lsh_include_local else []
            groups.append((buckets, count, config.lsh_window))
            if ctx.training and config.lsh_exploration_orders:
                key, orders = self._randomness(ctx, value.device), config.lsh_exploration_orders
                explored = exploration_buckets(key, self.layer, self.heads, orders, count, ctx.ranks)
                explored = explored if ctx.shard is None else explored[:, ctx.shard.own_heads(self.heads)]
                groups.append((explored.expand(batch, -1, -1, -1), count, config.lsh_window))
        if ctx.samples is not None:  # every order keeps the samples of a sequence apart
            sample = ctx.samples[:, None, None, :].long()  # a distinct number for every bucket of every sample
            groups = [(sample * (count or 1) + group, None, window) for group, count, window in groups]
        return window_layout(groups, self.causal, mask, backend=self.backend)

    def buckets(self, vectors: torch.Tensor, ctx: ForwardContext) -> torch.Tensor:
        """Hash vectors (B, H, T, D), which continue those of the cache, into buckets (B, H, R, T) int32."""
        hasher, centering = self.hasher(vectors, ctx), None
        if self.centering:
            cache_layer = None if ctx.cache is None else ctx.cache.layers[self.layer]
            sums, counts = (None, None) if cache_layer is None else (cache_layer.sums, cache_layer.lengths)
            centering = Centering(self.causal, ctx.mask, ctx.samples, sums, counts, self.centering)
        return hasher.buckets(vectors, centering)

    def hasher(self, vectors: torch.Tensor, ctx: ForwardContext) -> Hasher:
        """Return the hash function for vectors (B, H, T, D): that of the cache if it has one, otherwise a new one."""
        cache_layer = None if ctx.cache is None else ctx.cache.layers[self.layer]
        if cache_layer is not None and cache_layer.hasher is not None:
            return cache_layer.hasher
        num_buckets, seed, chunks = self._num_buckets(ctx), self.config.hash_seed, self.mode == "chunk"
        shape = self.heads, self.head_size, ctx.num_hashes, num_buckets
        if chunks and seed is not None:
            rotations = seeded_rotations(seed, *shape, like=vectors)
        else:
            key = self._randomness(ctx, vectors.device)
            rotations = window_rotations(key, self.layer, *shape, like=vectors, backend=self.backend)
        rotations = rotations if ctx.shard is None else rotations[ctx.shard.own_heads(self.heads)]
        hasher = Hasher(rotations, num_buckets, self.backend)
        if cache_layer is not None:
            cache_layer.hasher = hasher._replace(rotations=rotations.contiguous())
        return hasher

    def _num_buckets(self, ctx: ForwardContext) -> int | tuple[int, ...]:
        """Return the number of buckets of this call, else of the cache, else by the legacy rule for its length."""
        if ctx.num_buckets is not None:
            return ctx.num_buckets
        hasher = None if ctx.cache is None else ctx.cache.layers[self.layer].hasher
        if hasher is not None:
            return hasher.num_buckets
        return legacy_num_buckets(max(ctx.padded_length, self.chunk), self.chunk, self.config.max_position_embeddings)

    def _randomness(self, ctx: ForwardContext, device: torch.device) -> torch.Tensor:
        """Return the key for rotations and exploration: that of this forward pass, or in evaluation a fixed one."""
        if ctx.training and ctx.key is not None and self.config.resample_rotations:
            return ctx.key
        return make_key(self.config.hash_seed or 0, device)


def _pad(x: torch.Tensor | None, padding: tuple[int, ...]) -> torch.Tensor | None:
    return None if x is None else nn.functional.pad(x, padding)
