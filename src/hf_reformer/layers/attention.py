"""The attention branch: LSH, local and full self-attention modules."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from ..configuration_reformer import ReformerConfig
from ..ops.dispatch import compiled_step, hashing_backend, windowed_attention
from ..ops.gather_attention import (
    SparseAttention,
    attend_by_matrix,
    attention_with_sparse_weights,
    gather_attention,
    joined,
    slices,
    without_end,
)
from ..ops.layout import AttentionLayout, chunk_layout, window_layout
from ..ops.lsh import exploration_buckets, num_buckets_total, seeded_rotations, window_rotations
from ..ops.prng import ATTENTION_DROPOUT, OUTPUT_DROPOUT, dropout, fold, make_key
from ..ops.received_attention import exact_received, received_from
from ..ops.sequence_parallel import SequenceShard, all_reduce, all_to_all_heads, all_to_all_tokens
from .full_attention import dense_layout, exact_attention, make_attention_mask
from .position_embeddings import rotate

MAX_DECODE_TOKENS = 8  # new tokens on top of a cache, up to which each is looked up by itself
DECODE_COST_RATIO = 16  # of looking a token up, in tokens of one forward over all


class Call(NamedTuple):
    """What one forward of the model tells every layer. Carries no gradients.

    Attributes:
        mask: (B, T) bool, True for real tokens, or None.
        samples: (B, T) int32, which of the samples packed into its row a token belongs to; None: every row is one.
        ranks: (B or 1, T) int32, number of real tokens of its sample before each token.
        rotary: cos and sin of `positions.rotary_tables`, or None.
        key: int32 key of shape () of this forward's randomness; None in evaluation.
        layer_key: the same for the layer that is told, a function of its number.
        num_hashes, num_buckets: the config's, or this call's own. `num_buckets=None`: the older rule by length.
        padded_length: chunk rule: length up to which layers pad, a multiple of the chunk lengths.
        shard: this process's part, where several share every sequence. T is the whole length.
        cache: `cache.ReformerCache` of the tokens before these, which the layers read and write. T counts new tokens.
        attentions: where every layer puts its weights; None: nobody asks for them.
        dense: whether they are wanted as matrices. They may be a `SparseAttention` all the same.
        source: `cross_attention.Source` of a decoder's layers.
        paid: (B, T), each query's share in what tokens receive, over all heads; None: nobody asks what they receive.
        known: (B, T), what they receive in the layer that is told, where it runs again.
        received: where that layer puts it.
    """

    mask: torch.Tensor | None
    samples: torch.Tensor | None
    ranks: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor] | None
    key: torch.Tensor | None
    num_hashes: int
    num_buckets: int | tuple[int, ...] | None
    padded_length: int
    shard: SequenceShard | None = None
    layer_key: torch.Tensor | None = None
    cache: Any = None
    attentions: list[Any] | None = None
    dense: bool = False
    source: Any = None
    paid: torch.Tensor | None = None
    known: torch.Tensor | None = None
    received: list[torch.Tensor] | None = None

    @property
    def first(self) -> int:
        """Position of the first token that this process holds outside attention."""
        return 0 if self.shard is None else self.shard.begin


class ReformerAttention(nn.Module):
    """Projections, ordered attention, output projection: `project(x)`, then `forward`, then `merge`."""

    def __init__(self, config: ReformerConfig, layer: int):
        super().__init__()
        self.layer, self.kind = layer, config.attn_layers[layer]
        self.causal, self.backend, self.mode = config.is_decoder, config.attention_backend, config.attention_mode
        self.heads, self.head_size = config.num_attention_heads, config.attention_head_size
        self.scale = self.head_size**-0.5
        self.output_dropout = config.hidden_dropout_prob
        own = "lsh" if self.kind == "lsh" else "local"
        self.dropout = getattr(config, f"{own}_attention_probs_dropout_prob") or 0.0
        self.chunk = getattr(config, f"{own}_attn_chunk_length")
        self.before = getattr(config, f"{own}_num_chunks_before") or 0
        self.after = getattr(config, f"{own}_num_chunks_after") or 0
        self.config = config
        inner = self.heads * self.head_size
        if self.kind == "lsh":
            self.qk_proj = nn.Linear(config.hidden_size, inner, bias=False)
        else:
            self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
            self.k_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def project(self, x: torch.Tensor) -> list[torch.Tensor | None]:
        """(B, T, D) normalised stream → query, key (None where it is the query) and value, (B, T, H * head_size)."""
        if self.kind == "lsh":
            return [self.qk_proj(x), None, self.v_proj(x)]
        return [self.q_proj(x), self.k_proj(x), self.v_proj(x)]

    def merge(self, mixed: torch.Tensor, key: torch.Tensor | None, first: int = 0) -> torch.Tensor:
        """What attention gave, (B, T, H * head_size) → (B, T, D).

        Args:
            key: of this layer's dropout, None in evaluation.
            first: position of mixed[:, 0] in its sequence.
        """
        key = None if key is None else fold(key, OUTPUT_DROPOUT)
        return dropout(self.o_proj(mixed), self.output_dropout, key, first)

    def forward(self, projected: list[torch.Tensor | None], call: Call) -> torch.Tensor:
        """What `project` gave → (B, T, H * head_size), every head's attention side by side.

        Empties the list, so that projections are freed as soon as they were used.
        """
        query, key_vectors, value = (None if x is None else self._heads(x, call.shard) for x in projected)
        projected.clear()
        if call.cache is not None:
            out = self._attend_cached(query, key_vectors, value, call).to(value.dtype)
        else:
            out = self._attend(query, key_vectors, value, call, call.layer_key)  # (B, H, T, head_size)
        out = out if call.shard is None else all_to_all_tokens(out, call.shard)
        if call.received:
            call.received.append(all_reduce(call.received.pop(), call.shard))
        return out.transpose(1, 2).flatten(2)

    def _attend(self, query: Any, key_vectors: Any, value: Any, call: Call, key: torch.Tensor | None) -> torch.Tensor:
        dropout_key = None if key is None or not self.dropout else fold(key, ATTENTION_DROPOUT)
        if dropout_key is not None and call.shard is not None:
            dropout_key = torch.stack([dropout_key, dropout_key.new_tensor(call.shard.own_heads(self.heads).start)])
        hashed = query if self.kind == "lsh" else None
        query = rotate(query, call.rotary)
        if key_vectors is not None:
            key_vectors = rotate(key_vectors, call.rotary)
        if hashed is not None and self.mode == "chunk" and call.padded_length <= self.chunk:
            hashed = None
        buckets = None if hashed is None else self._buckets(hashed, call)
        return self._over_each_other(buckets, query, key_vectors, value, call, dropout_key)

    def _over_each_other(self, buckets, query, key_vectors, value, call: Call, dropout_key=None) -> torch.Tensor:
        """Attention among the tokens of the call; buckets (B, H, R, T) in lsh layers."""
        if self.kind == "full" and dropout_key is None and call.attentions is None:
            allowed = make_attention_mask(call.mask, call.samples, value.shape[2], self.causal, value.device)
            out = exact_attention(self, query, key_vectors, value, allowed, self.causal)
            if call.received is not None:
                which = call.paid, allowed, self.causal, self.scale
                call.received.append(exact_received(query, key_vectors, *which))
            return out if call.mask is None else torch.where(call.mask[:, None, :, None], out, 0)
        if self.kind == "full":
            orders = dense_layout(value, self.causal, call.mask, call.samples)
        elif self.mode == "chunk":
            return self._over_chunks(buckets, query, key_vectors, value, call, dropout_key)
        else:
            orders = self._window_layout(buckets, call.mask, call, value)
        return self._over(orders, query, key_vectors, value, call, call.mask, dropout_key)

    def _over_chunks(self, buckets, query, key_vectors, value, call: Call, dropout_key) -> torch.Tensor:
        """By the older rule, over the input padded to whole chunks."""
        mask, length = call.mask, value.shape[2]
        if call.padded_length > length:
            more = call.padded_length - length
            query, key_vectors, value = (
                None if t is None else nn.functional.pad(t, (0, 0, 0, more)) for t in (query, key_vectors, value)
            )
            buckets = None if buckets is None else nn.functional.pad(buckets, (0, more))
            mask = mask if mask is not None else value.new_ones(value.shape[0], length, dtype=torch.bool)
            mask = nn.functional.pad(mask, (0, more))
            call = call._replace(paid=_padded(call.paid, more), known=_padded(call.known, more))
        orders = self._chunk_layout(buckets, mask, call, value)
        out = self._over(orders, query, key_vectors, value, call, mask, dropout_key)
        if call.attentions is not None:
            call.attentions.append(without_end(call.attentions.pop(), length))
        if call.received is not None:
            call.received.append(call.received.pop()[:, :length])
        return out[:, :, :length]

    def _over(
        self, orders: AttentionLayout, query, key_vectors, value, call: Call, mask, dropout_key=None
    ) -> torch.Tensor:
        how: dict[str, Any] = {"causal": self.causal, "mask": mask, "scale": self.scale}
        how |= {"dropout": self.dropout, "dropout_key": dropout_key}
        if call.attentions is not None:
            attend = attend_by_matrix if call.dense else attention_with_sparse_weights
            out, attention = attend(query, key_vectors, value, orders, **how)
            call.attentions.append(attention)
            if call.received is not None:
                if isinstance(attention, torch.Tensor):
                    call.received.append(received_from(attention, call.paid))
                else:
                    call.received.append(attention.received(call.paid))
            return out
        backend = "reference" if self.kind == "full" else self.backend
        weights = None if call.received is None else call.paid
        out, mass = windowed_attention(
            query, key_vectors, value, orders, backend=backend, query_weights=weights, **how
        )
        if call.received is not None:
            call.received.append(mass)
        return out

    def _attend_cached(self, query: Any, key_vectors: Any, value: Any, call: Call) -> torch.Tensor:
        """Attention of new tokens over those of the cache and each other. The first tokens are one forward.

        In window mode those that follow get what one forward over all would give them. In chunk mode each of them is
        looked up by itself.
        """
        kept, hashed = call.cache.layers[self.layer], query if self.kind == "lsh" else None
        query = rotate(query, call.rotary)
        keys = query if key_vectors is None else rotate(key_vectors, call.rotary)
        if not kept.is_initialized:
            kept.lazy_initialization(keys, value)
        if not kept.columns:
            buckets = None if hashed is None else self._buckets(hashed, call, kept.choose_rotations)
            kept.append(keys, value, buckets, call.mask)
            return self._over_each_other(buckets, query, None if key_vectors is None else keys, value, call)
        if self.kind == "full":
            return self._over_all_kept(query, keys, value, call)
        new = value.shape[2]
        few = new <= MAX_DECODE_TOKENS or (self.kind == "lsh" and new * DECODE_COST_RATIO <= kept.columns)
        if few or self.mode == "chunk" or call.attentions is not None:
            return self._one_by_one(query, keys, value, hashed, call)
        if self.kind == "local":
            return self._over_latest(query, keys, value, call)
        buckets = self._buckets(hashed, call, kept.choose_rotations)
        return self._over_hashed(kept.append(keys, value, buckets, call.mask), call)

    def _over_hashed(self, numbers: torch.Tensor, call: Call) -> torch.Tensor:
        """Many new tokens of an lsh layer, by their numbers (B, N): the windows of all tokens, where only they see.

        A few heads at a time, so that what is as long as the context is no larger than what is as long as the piece.
        """
        keys, values, buckets, mask = call.cache.layers[self.layer].all()
        length, new, found = keys.shape[2], numbers.shape[1], []
        first = torch.where(numbers >= 0, numbers, length).amin(-1)[:, None, None, None]
        at_once = max(1, self.heads * new // length)
        for head in range(0, self.heads, at_once):
            own = slice(head, head + at_once)
            value = values[:, own]
            orders = self._window_layout(buckets[:, own], mask, call, value)
            orders = orders._replace(
                window_start=torch.where(orders.perm < first, orders.window_end + 1, orders.window_start)
            )
            out = self._over(orders, keys[:, own], None, value, call, mask)
            index = numbers.clamp(min=0)[:, None, :, None].expand(-1, out.shape[1], -1, out.shape[3])
            found.append(out.gather(2, index))
        return torch.cat(found, dim=1)

    def _over_all_kept(self, query, keys, value, call: Call) -> torch.Tensor:
        kept = call.cache.layers[self.layer]
        numbers = kept.append(keys, value, None, call.mask)
        keys, values, *_ = kept.all()
        place = torch.arange(keys.shape[2], device=keys.device)
        seen = (place <= numbers.clamp(min=0)[..., None])[:, None]  # (B, 1, N, T)
        query = query.to(keys.dtype)
        if call.attentions is not None:
            found = []
            for some in slices(query, keys.shape[2]):
                tokens = torch.where(seen[:, :, some], place, -1)
                found.append(gather_attention(query[:, :, some], keys, values, tokens, numbers[:, some], self.scale))
            return self._joined(found, call)
        return exact_attention(self, query, keys, values, seen)

    def _over_latest(self, query, keys, value, call: Call) -> torch.Tensor:
        """Many new tokens of a local layer: they see each other, and the last ones before them."""
        kept, new = call.cache.layers[self.layer], value.shape[2]
        old_keys, old_values, there = kept.latest(min(kept.columns, self.config.local_window - 1))
        kept.append(keys, value, None, call.mask)
        mask = None
        if call.mask is not None or kept.real is not None:
            real = there.new_ones(value.shape[0], new) if call.mask is None else call.mask
            mask = torch.cat([there, real], dim=-1)
        pairs = (old_keys, query), (old_keys, keys), (old_values, value)
        query, keys, value = (torch.cat(pair, dim=2) for pair in pairs)
        orders = self._window_layout(None, mask, call, value)
        return self._over(orders, query, keys, value, call, mask)[:, :, -new:]

    def _one_by_one(self, query, keys, value, hashed, call: Call) -> torch.Tensor:
        """New tokens one after the other, each looked up in the cache by itself: never of the context's length."""
        kept, lines = call.cache.layers[self.layer], None
        if hashed is not None:
            rotations = kept.choose_rotations(*self._hashes(hashed, call))
            lines = (*value.shape[:2], call.num_hashes)
        by_kernel = self.mode == "window" and call.attentions is None
        step = compiled_step(self.backend, kept.keys) if by_kernel else None
        if step is not None:
            numbers = kept.reserve(value.shape[2], call.mask, lines)
            window = self.config.local_window if kept.include_local else 0
            out = step(query, keys, value, hashed, kept, numbers, window, self.scale)
            kept.count(numbers)
            return out
        found, makers = [], hashing_backend(self.backend, value)
        for column in range(value.shape[2]):
            own = slice(column, column + 1)
            mask = None if call.mask is None else call.mask[:, own]
            buckets = None
            if hashed is not None:
                buckets = makers.lsh_buckets(hashed[:, :, own], rotations, kept.num_buckets)
            number = kept.append(keys[:, :, own], value[:, :, own], buckets, mask)[:, 0]
            seen = kept.visible_tokens(number, buckets)[:, :, None]
            scale, once = None if self.kind == "lsh" else self.scale, self.mode == "window"
            where = kept.keys, kept.values, seen, number[:, None], scale
            found.append(gather_attention(query[:, :, own], *where, dedup_pairs=once))
        return self._joined(found, call)

    def _joined(self, found: list[tuple[torch.Tensor, SparseAttention]], call: Call) -> torch.Tensor:
        """Of what `gather_attention` gave for one query after the other; weights go where they are asked for."""
        outs, attentions = zip(*found, strict=True)
        if call.attentions is not None:
            tokens, weights = joined(attentions)
            columns = call.cache.layers[self.layer].input_positions(tokens)
            call.attentions.append(SparseAttention(columns, weights))
        return torch.cat(outs, dim=2)

    def _hashes(self, hashed: torch.Tensor, call: Call) -> tuple[int, Any, Any]:
        """Numbers of hashes and of buckets, and what makes their rotations."""
        num_buckets = self._num_buckets(call)
        make = partial(self._rotations, hashed, call, num_buckets)
        return call.num_hashes, num_buckets, make

    def _buckets(self, hashed: torch.Tensor, call: Call, choose: Any = None) -> torch.Tensor:
        """Hash buckets (B, H, R, T); `choose` may know the rotations already."""
        num_hashes, num_buckets, make = self._hashes(hashed, call)
        rotations = make() if choose is None else choose(num_hashes, num_buckets, make)
        return hashing_backend(self.backend, hashed).lsh_buckets(hashed, rotations, num_buckets)

    def _num_buckets(self, call: Call) -> Any:
        """The call's own; where they are None those of the tokens in the cache, or the older rule by length."""
        kept = None if call.cache is None else call.cache.layers[self.layer].num_buckets
        if call.num_buckets is not None or kept is not None:
            return kept if call.num_buckets is None else call.num_buckets
        return legacy_num_buckets(max(call.padded_length, self.chunk), self.chunk, self.config.max_position_embeddings)

    def _heads(self, x: torch.Tensor, shard: SequenceShard | None) -> torch.Tensor:
        x = x.unflatten(-1, (self.heads, self.head_size)).transpose(1, 2)
        return x if shard is None else all_to_all_heads(x, shard)  # (B, H or own heads, T, D)

    def _rotations(self, hashed: torch.Tensor, call: Call, num_buckets) -> torch.Tensor:
        """Rotations of this call: float32 functions of a key, or the older rule's draws where its seed is given."""
        seed, shape = self.config.hash_seed, (self.heads, self.head_size, call.num_hashes, num_buckets)
        if self.mode == "chunk" and seed is not None:
            rotations = seeded_rotations(seed, *shape, like=hashed)
        else:
            fresh = call.key is not None and self.config.resample_rotations
            key = call.key if fresh else make_key(seed or 0, hashed.device)
            rotations = window_rotations(
                key, self.layer, *shape, normals=hashing_backend(self.backend, hashed).normals
            )
        return rotations if call.shard is None else rotations[call.shard.own_heads(self.heads)]

    def _window_layout(
        self, buckets: torch.Tensor | None, mask: torch.Tensor | None, call: Call, value
    ) -> AttentionLayout:
        """Position order, hash orders, and in training exploration orders."""
        config, (batch, heads, length, _) = self.config, value.shape
        makers = hashing_backend(self.backend, value)
        heads = 1 if buckets is None else heads
        position = torch.zeros(batch, heads, 1, length, dtype=torch.int32, device=value.device)
        groups = [(position, 1, config.local_window)]
        if buckets is not None:
            count, window = num_buckets_total(call.num_buckets), config.lsh_window
            groups = groups if config.lsh_include_local else []
            groups.append((buckets, count, window))
            if call.key is not None and config.lsh_exploration_orders:
                key = call.key if config.resample_rotations else make_key(config.hash_seed or 0, value.device)
                explored = exploration_buckets(
                    key, self.layer, self.heads, config.lsh_exploration_orders, count, call.ranks
                )
                explored = explored if call.shard is None else explored[:, call.shard.own_heads(self.heads)]
                groups.append((explored.expand(batch, -1, -1, -1), count, window))
        if call.samples is not None:  # the samples of a row lie one after the other in every order
            sample = call.samples[:, None, None, :]
            groups = [(sample * count + group, None, window) for group, count, window in groups]
        return window_layout(groups, self.causal, mask, sort=makers.sort_windows)

    def _chunk_layout(
        self, buckets: torch.Tensor | None, mask: torch.Tensor | None, call: Call, value
    ) -> AttentionLayout:
        makers, count = hashing_backend(self.backend, value), 1
        if buckets is None:
            buckets = torch.zeros(value.shape[0], 1, 1, value.shape[2], dtype=torch.int32, device=value.device)
            mask = None  # local chunks follow the sequence; padding keeps its place and is masked in the softmax
        else:
            count = num_buckets_total(self._num_buckets(call))
        return chunk_layout(buckets, count, self.chunk, self.before, self.after, mask, makers.sort_line)


def _padded(x: torch.Tensor | None, more: int) -> torch.Tensor | None:
    return None if x is None else nn.functional.pad(x, (0, more))


def legacy_num_buckets(length: int, chunk: int, max_positions: int) -> int | tuple[int, int]:
    """The older rule's choice by the input's length: a power of two near 2 * length / chunk, factorised if large."""
    bits = (2 * (length // chunk)).bit_length() - 1
    limit = 2 * max(int((max_positions // chunk) ** 0.5), chunk)
    return 2**bits if 2**bits <= limit else (2 ** (bits // 2), 2 ** (bits - bits // 2))
