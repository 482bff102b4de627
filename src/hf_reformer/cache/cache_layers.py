"""Cache layers: projected keys and values, and for each head the newest members of every hash bucket.

A decode step updates tensors in place, so that a CUDA graph can capture it (`models.recorded_step`). New tensors are
allocated only when the cache grows or its sequences are selected, repeated or cropped.

A layer numbers the real tokens of a sequence 0, 1, 2 … and stores them by number: padding takes no memory, and the
sequences of a batch may differ in length. A decode step reads the last `lsh_window` members of the new token's buckets
and the last `local_window` tokens, independent of the length. In chunk mode it sorts the buckets of all tokens.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ..compat import may_look_at
from ..configuration_reformer import ReformerConfig, padded_length
from ..ops.bucket_tables import BucketChains
from ..ops.lsh import num_buckets_total, sum_dtype, unit_sums

GROWTH = 1.125  # factor by which the capacity grows when it is full


class ReformerCacheLayer(CacheLayerMixin):
    """The cached tokens of one layer, stored by number; local layers keep only the last ones, modulo the capacity."""

    is_croppable = True
    # None until there are tokens:
    keys: Any  # (B, H, capacity, D), rotated by position; lsh layers: query/key vectors, not normalized
    values: Any  # (B, H, capacity, D)
    buckets: Any  # (B, H, R, capacity) int32, lsh layers
    sums: Any  # (B, H, D) float64, sum of `lsh.unit_rows` of all keys; lsh layers with centered hashing
    lengths: Any  # (B) int64, number of real tokens of every sequence
    longest: Any  # (B) int64, `lengths` before tokens were cropped
    oldest: Any  # (B) int64, number of the first token still stored when recording of the past began
    attention_mask: torch.Tensor | None  # (B, seen_tokens) bool, True for real tokens; None: all are real
    chains: Any  # `BucketChains`, the members of every bucket; lsh layers in window mode
    hasher: Any  # `layers.attention.Hasher` of all tokens; lsh layers
    seen_tokens: int  # number of tokens of each sequence so far, including padding
    selections: int  # number of times that sequences were selected or repeated
    half_done: bool  # whether an update is unfinished: `cache.to_reformer_cache` then rejects the cache
    makes_chains = True
    per_sequence: tuple[str, ...] = ("keys", "values", "buckets", "sums", "lengths", "longest", "oldest")
    per_sequence += ("attention_mask",)

    def __init__(self, config: ReformerConfig, layer: int, capacity: int = 0):
        super().__init__()
        self.signature = signatures(config)[layer]
        self.kind = self.signature[0]
        self.centered = self.kind == "lsh" and config.attention_mode == "window" and config.lsh_centering
        self.local_window, self.lsh_window = config.local_window, config.lsh_window
        # Number of last tokens that a new one attends to by position.
        self.local_reach = config.local_window if self.kind == "local" or config.lsh_include_local else 0
        self.is_sliding = self.kind == "local"
        self.initial_capacity = capacity
        self.record_past = False
        self.sibling_local_layers: list[ReformerCacheLayer] = []  # empty in local layers: all evict alike
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.half_done = True
        for name in (*self.per_sequence, "chains", "hasher"):
            setattr(self, name, None)
        self.is_initialized = False
        self.seen_tokens = self.selections = 0
        self.half_done = False

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Wrap an update of several tensors: if it is interrupted, the layer cannot be used again."""
        before, self.half_done = self.half_done, True
        yield
        self.half_done = before

    @property
    def batch_size(self) -> int:
        return 0 if self.lengths is None else self.lengths.shape[0]

    @property
    def capacity(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def is_ring_buffer(self) -> bool:
        """Whether new tokens overwrite the oldest ones."""
        return self.kind == "local" and not self.record_past

    @property
    def largest_capacity(self) -> float:
        return 2 * self.local_window if self.is_ring_buffer else math.inf

    def has_room(self, new: int) -> bool:
        """Whether `new` more tokens fit into the allocated memory."""
        return self.capacity >= min(self.seen_tokens + new, self.largest_capacity)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.device, self.dtype = key_states.device, key_states.dtype
        batch, heads, _, size = key_states.shape
        capacity = self.initial_capacity
        capacity = min(capacity, 2 * self.local_window) if self.is_ring_buffer else capacity
        self.keys = key_states.new_zeros(batch, heads, capacity, size)
        self.values = self.keys.clone()
        if self.centered:
            self.sums = torch.zeros(batch, heads, size, dtype=sum_dtype(self.device), device=self.device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.longest, self.oldest = self.lengths.clone(), self.lengths.clone()
        self.is_initialized = True

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, buckets: torch.Tensor | None, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Store new tokens: keys and values (B, H, N, D), buckets (B, H, R, N), mask (B, N) bool (None: all are real).

        Returns:
            (B, N) int64, the numbers of the tokens; -1 for padding.
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        keys, values = (x.detach().to(self.keys.dtype) for x in (keys, values))
        if self.sums is not None:
            self.sums += unit_sums(keys, mask)
        numbers = self.reserve(keys.shape[2], mask)
        if self.attention_mask is None and not self.is_ring_buffer:  # the same slots in every sequence
            self.keys.index_copy_(2, numbers[0], keys)
            self.values.index_copy_(2, numbers[0], values)
            if buckets is not None:
                self.buckets.index_copy_(3, numbers[0], buckets)
        else:
            self._write(numbers, keys, values, buckets)
        if self.chains is not None:
            self.chains.add(buckets, numbers)
        self.commit(numbers)
        return numbers

    def reserve(self, new: int, mask: torch.Tensor | None) -> torch.Tensor:
        """Allocate memory for N new tokens and return their numbers, (B, N) int64; -1 for padding."""
        numbers = self.lengths[:, None]  # a view, which `commit` changes
        numbers = numbers.clone() if new == 1 else numbers + torch.arange(new, device=self.device)
        if mask is not None or self.attention_mask is not None:
            mask = torch.ones_like(numbers, dtype=torch.bool) if mask is None else mask
            before = self.mask_so_far()
            numbers = torch.where(mask, self.lengths[:, None] + mask.cumsum(-1) - 1, -1)
            self.attention_mask = torch.cat([before, mask], dim=-1)
        if self.hasher is not None and self.buckets is None:
            rounds = (*self.keys.shape[:2], self.hasher.rotations.shape[2])
            self.buckets = torch.zeros(*rounds, self.capacity, dtype=torch.int32, device=self.device)
            if self.makes_chains:
                num_buckets = num_buckets_total(self.hasher.num_buckets)
                self.chains = BucketChains(rounds, num_buckets, self.capacity, self.device)
        if not self.has_room(new):
            capacity = int(min(max(self.seen_tokens + new, self.capacity * GROWTH + 1), self.largest_capacity))
            self.keys, self.values = (_extend(x, capacity, dim=2) for x in (self.keys, self.values))
            self.buckets = None if self.buckets is None else _extend(self.buckets, capacity, dim=3)
            if self.chains is not None:
                self.chains.previous = _extend(self.chains.previous, 1 + capacity, dim=3)
        return numbers

    def commit(self, numbers: torch.Tensor) -> None:
        """Mark the tokens with these numbers as stored."""
        self.seen_tokens += numbers.shape[1]
        if self.attention_mask is None:
            self.lengths += numbers.shape[1]
        else:
            self.lengths.copy_(torch.maximum(self.lengths, numbers.amax(-1) + 1))

    def changed_in_place(self) -> list[torch.Tensor]:
        """Return the tensors that a decode step writes to."""
        chains = [] if self.chains is None else [self.chains.newest, self.chains.previous]
        return [x for x in (self.keys, self.values, self.buckets, self.sums, self.lengths, *chains) if x is not None]

    def mask_so_far(self) -> torch.Tensor:
        """Return the mask of all tokens so far, (B, seen_tokens) bool, True for real ones."""
        if self.attention_mask is not None:
            return self.attention_mask
        return torch.ones(self.batch_size, self.seen_tokens, dtype=torch.bool, device=self.device)

    def _write(self, numbers: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, buckets: Any = None) -> None:
        """Write tokens to the slots of their numbers, except padding and what a ring buffer overwrites at once."""
        newest, last = numbers.max(-1, keepdim=True)  # (B, 1)
        written = (numbers >= 0) & (numbers > newest - self.capacity)
        # The others write the newest token again, which keeps shapes fixed; without any new token, the old content.
        column = torch.where(written, torch.arange(numbers.shape[1], device=numbers.device), last)
        slot = numbers.gather(-1, column).clamp(min=0) % self.capacity

        def write(kept: torch.Tensor, new: torch.Tensor) -> None:
            """Scatter along dimension 2."""
            at, source = (x[:, None, :, None].expand_as(new) for x in (slot, column))
            any_new = (newest >= 0)[..., None, None]
            kept.scatter_(2, at, torch.where(any_new, new.gather(2, source), kept.gather(2, at)))

        write(self.keys, keys)
        write(self.values, values)
        if buckets is not None:
            write(self.buckets.transpose(2, 3), buckets.transpose(2, 3))

    def all_tokens(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return keys and values (B, H, T, D), buckets (B, H, R, T) or None, and (B, T) bool, None without padding."""
        length = self.seen_tokens
        if self.attention_mask is not None and may_look_at(self.lengths):
            length = max(1, int(self.lengths.max()))
        mask = None
        if self.attention_mask is not None:
            mask = torch.arange(length, device=self.device) < self.lengths[:, None]
        buckets = None if self.buckets is None else self.buckets[..., :length]
        return self.keys[:, :, :length], self.values[:, :, :length], buckets, mask

    def visible_tokens(self, own: torch.Tensor, buckets: torch.Tensor | None) -> torch.Tensor:
        """Return the numbers of the tokens that each sequence's newest token attends to, (B, H or 1, K) int64.

        Unused entries are -1. own: (B) int64, numbers of the newest tokens; buckets: (B, H, R, 1), their buckets.
        """
        visible = []
        if self.local_reach:
            count = min(self.local_reach, self.capacity)
            near = own[:, None] - torch.arange(count, device=own.device)  # (B, W)
            visible.append(near[:, None].clamp(min=-1))
        if buckets is not None:
            visible.insert(0, self.chains.last(buckets[..., 0], self.lsh_window))
            visible = [x.expand(-1, visible[0].shape[1], -1) for x in visible]
        return torch.cat(visible, dim=-1)

    def input_positions(self, numbers: torch.Tensor) -> torch.Tensor:
        """Map token numbers, (B, H, N, K), to positions among all input tokens, padding included; -1 stays -1."""
        if self.attention_mask is None:
            return numbers
        positions = (~self.attention_mask).long().argsort(dim=-1, stable=True)[:, None, None]  # real tokens first
        positions = positions.expand(-1, *numbers.shape[1:3], -1).gather(-1, numbers.clamp(min=0))
        return torch.where(numbers >= 0, positions, -1)

    def last_tokens(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return keys and values of the last `count` tokens, (B, H, count, D), and numbers, (B, count); < 0: none."""
        numbers = self.lengths[:, None] - count + torch.arange(count, device=self.device)
        slot = (numbers.clamp(min=0) % max(1, self.capacity))[:, None, :, None]
        index = slot.expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
        return self.keys.gather(2, index), self.values.gather(2, index), numbers

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(
            "The layers of a ReformerCache cannot be filled from outside: tokens have to be hashed, too. Give the "
            "cache to the model as `cache` or `past_key_values`, and its attention writes to it."
        )

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def activate_past_recording(self) -> None:
        """Store every token from now on, so that any number of them can be cropped."""
        if self.kind == "local" and self.seen_tokens and not self.record_past:
            with self._changing():
                self._keep_by_number()
        self.record_past = True

    def _keep_by_number(self) -> None:
        self.oldest = (torch.maximum(self.longest, self.lengths) - self.capacity).clamp(min=0)
        keys, values, numbers = self.last_tokens(min(self.capacity, self.seen_tokens))
        capacity = max(self.seen_tokens, 1)  # from here on, slots are numbers; those of evicted tokens stay unused
        self.keys, self.values = (x.new_zeros(*x.shape[:2], capacity, x.shape[3]) for x in (keys, values))
        self._write(numbers, keys, values)
        self.record_past = True

    def lengths_without(self, count: int) -> torch.Tensor:
        return self.lengths - self.mask_so_far()[:, -count:].sum(-1)

    def has_evicted(self, count: int) -> bool:
        """Whether cropping the last `count` tokens would bring evicted tokens back into a window."""
        if self.kind != "local" or not self.is_initialized:
            return False
        oldest = torch.maximum(self.longest, self.lengths) - self.capacity if self.is_ring_buffer else self.oldest
        return bool(((oldest > 0) & (self.lengths_without(count) - self.local_window < oldest)).any())

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: `tokens_to_remove` is positive, or exceeds the number of tokens.
            RuntimeError: a local layer has evicted tokens that would reenter its window. The cache is unchanged.
        """
        count = -tokens_to_remove
        if count == 0 or not self.is_initialized:
            return
        if not 0 < count <= self.seen_tokens:
            raise ValueError(
                f"crop({tokens_to_remove}) on a cache of {self.seen_tokens} tokens: pass the number of tokens to "
                "remove as a negative number."
            )
        not_cropped = [x for x in (self, *self.sibling_local_layers) if x.seen_tokens == self.seen_tokens]
        if any(layer.has_evicted(count) for layer in not_cropped):
            raise RuntimeError(
                f"{count} tokens cannot be removed: a local layer has evicted tokens that would be seen again. Begin "
                "with a new `ReformerCache(config)`, and call its `activate_past_recording()` before tokens that may "
                "be removed."
            )
        if count == self.seen_tokens:
            self.reset()
            return
        with self._changing():
            self._remove_last(count)

    def _remove_last(self, count: int) -> None:
        self.longest = torch.maximum(self.longest, self.lengths)
        old, self.lengths = self.lengths, self.lengths_without(count)
        self.seen_tokens -= count
        self.attention_mask = None if self.attention_mask is None else self.attention_mask[:, : self.seen_tokens]
        if self.chains is None:
            return
        numbers = old[:, None] - 1 - torch.arange(count, device=self.device)
        numbers = torch.where(numbers >= self.lengths[:, None], numbers, -1)
        index = numbers.clamp(min=0)[:, None, None].expand(-1, *self.buckets.shape[1:3], -1)
        if self.sums is not None:
            keys = self.keys.gather(2, index[:, :, 0, :, None].expand(-1, -1, -1, self.keys.shape[3]))
            self.sums = self.sums - unit_sums(keys, numbers >= 0)  # keys are stored as they were hashed
        self.chains.remove(self.buckets.gather(-1, index), numbers)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a function to every tensor that has an entry per sequence."""
        with self._changing():
            for holder, names in ((self, self.per_sequence), (self.chains, ("newest", "previous"))):
                for name in names:
                    x = getattr(holder, name, None)
                    if x is not None:
                        setattr(holder, name, change(x))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._each(lambda x: x[indices.to(x.device)])
        self.selections += 1

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))
        self.selections += 1

    def offload(self) -> None:
        self._each(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._each(lambda x: x.to(self.device, non_blocking=True))


class ChunkCacheLayer(ReformerCacheLayer):
    """The cached tokens of an lsh or local layer in chunk mode. Each sequence is treated alone, without padding."""

    chunks_from: Any  # (B) int64, lsh layers: new tokens with a smaller number attend to all tokens before them
    makes_chains = False  # a decode step sorts all tokens
    per_sequence = (*ReformerCacheLayer.per_sequence, "chunks_from")

    def __init__(self, config: ReformerConfig, layer: int, capacity: int = 0):
        super().__init__(config, layer, capacity)
        self.config = config
        self.chunk = getattr(config, f"{self.kind}_attn_chunk_length")
        self.before = getattr(config, f"{self.kind}_num_chunks_before") or 0
        self.local_window = (self.before + 1) * self.chunk
        # Up to this many tokens, neither they nor the first step after them are cut into chunks.
        self.uncut = max(n for n in range(self.chunk + 1) if padded_length(config, n) <= self.chunk)

    def commit(self, numbers: torch.Tensor) -> None:
        super().commit(numbers)
        if self.kind == "lsh" and self.seen_tokens == numbers.shape[1]:  # the first tokens
            after_cut, after_uncut = self.lengths.clamp(max=self.chunk), (self.lengths + 1).clamp(min=self.chunk)
            self.chunks_from = torch.where(self.lengths > self.uncut, after_cut, after_uncut)

    def visible_tokens(self, own: torch.Tensor, buckets: torch.Tensor | None) -> torch.Tensor:
        """Return the tokens of the newest token's chunk and of the chunks before it, by position or in each round.

        Rounds wrap around, so a token may occur several times. It counts as often as it occurs.
        """
        window = torch.arange(self.local_window, device=own.device)
        if buckets is None:
            visible = own[:, None] - window
            first = (own.div(self.chunk, rounding_mode="floor") - self.before) * self.chunk
            return torch.where(visible >= first[:, None], visible, -1).clamp(min=-1)[:, None]
        all_buckets, lengths = self.buckets[..., : self.seen_tokens], self.lengths[:, None, None, None]
        real = torch.arange(self.seen_tokens, device=own.device) < lengths  # (B, 1, 1, T)
        perm = torch.where(real, all_buckets, torch.iinfo(torch.int32).max).sort(dim=-1, stable=True).indices
        sorted_pos = ((all_buckets <= buckets) & real).sum(-1, keepdim=True) - 1  # (B, H, R, 1): last of its bucket
        first = (sorted_pos.div(self.chunk, rounding_mode="floor") - self.before) * self.chunk
        visible = perm.gather(-1, (first + window) % lengths.clamp(min=1)).flatten(-2)  # (B, H, K)
        visible = torch.nn.functional.pad(visible, (0, max(0, self.chunk + 1 - visible.shape[-1])), value=-1)
        number = torch.arange(visible.shape[-1], device=own.device)
        everything = torch.where(number <= own[:, None], number, -1)[:, None]  # (B, 1, K)
        return torch.where((own >= self.chunks_from)[:, None, None], visible, everything)


def _extend(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """Pad x with zeros to `size` entries along a dimension."""
    shape = list(x.shape)
    shape[dim] = size
    extended = x.new_zeros(shape)
    extended.narrow(dim, 0, x.shape[dim]).copy_(x)
    return extended


def signatures(config: ReformerConfig) -> list[tuple]:
    """Return the settings that each cache layer depends on."""
    fields = ["attention_mode", "num_attention_heads", "attention_head_size", "local_window", "lsh_window",
              "lsh_include_local", "lsh_centering", "lsh_rotary", "local_attn_chunk_length", "local_num_chunks_before",
              "lsh_attn_chunk_length", "lsh_num_chunks_before"]  # fmt: skip
    values = vars(config)  # faster than attribute access, since this runs in every decode step
    return [(kind, *[values[name] for name in fields]) for kind in values["attn_layers"]]
