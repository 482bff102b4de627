"""What generation keeps: projected keys and values, and per head the newest members of every hash bucket.

A layer numbers the real tokens of a row 0, 1, 2 … and keeps them by that number: padding takes no room, and rows of a
batch may be of different lengths. One step then reads the last `window` members of the new token's buckets, and the
last `local_window` tokens, whatever the length. In chunk mode a step sorts the buckets of all tokens
(`chunk_decoding.py`).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ..configuration_reformer import ReformerConfig, padded_length
from ..ops.bucket_tables import BucketChains
from ..ops.lsh import num_buckets_total
from .chunk_decoding import hash_chunks, local_chunks

GROWTH = 1.125  # of the room for tokens, when it is full


class ReformerCacheLayer(CacheLayerMixin):
    """The kept tokens of one layer.

    Attributes:
        keys, values: (B, H, room, D), by the number of a token in its row; modulo the room in local layers. Keys of
            lsh layers are their shared query/key vectors as projected, turned by position but not normalised.
        buckets: (B, H, R, room) int32, lsh layers.
        lengths: (B) int64, real tokens of every row.
        real: (B, columns) bool, which of all tokens given so far were real; None: all were.
    """

    is_croppable = True
    keys: Any  # None until there are tokens, like all tensors here
    values: Any
    buckets: torch.Tensor | None
    lengths: Any
    longest: Any
    oldest: Any
    real: torch.Tensor | None
    tables: BucketChains | None
    rotations: torch.Tensor | None
    of_every_row: tuple[str, ...] = ("keys", "values", "buckets", "lengths", "longest", "oldest", "real")

    def __init__(self, config: ReformerConfig, layer: int, room: int = 0):
        super().__init__()
        self.kind, self.like = config.attn_layers[layer], likes(config)[layer]
        self.local_window, self.window = config.local_window, config.lsh_window
        self.include_local = self.kind == "local" or config.lsh_include_local
        self.is_sliding = self.kind == "local"
        self.first_room = room
        self.record_past = False
        self.sibling_local_layers: list[
            ReformerCacheLayer
        ] = []  # local layers of its cache, unless it is one: all lose the same
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self.keys = self.values = self.buckets = self.real = self.tables = self.rotations = None
        self.num_hashes: int | None = None
        self.num_buckets: Any = None
        self.is_initialized = False
        self.columns = self.batch_size = 0
        self.lengths = self.longest = self.oldest = None

    @property
    def room(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    @property
    def ring(self) -> bool:
        """Whether old tokens make room for new ones."""
        return self.kind == "local" and not self.record_past

    # --- growing

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.device, self.dtype = key_states.device, key_states.dtype
        self.batch_size, heads, _, size = key_states.shape
        room = min(self.first_room, 2 * self.local_window) if self.ring else self.first_room
        self.keys = key_states.new_zeros(self.batch_size, heads, room, size)
        self.values = self.keys.clone()
        self.lengths = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)
        self.longest = self.lengths  # that a row was before tokens were taken back
        self.oldest = self.lengths  # number of the first token that is still there, once the past is recorded
        self.is_initialized = True

    def choose_rotations(self, num_hashes: int, num_buckets: Any, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The rotations of all tokens kept; made once."""
        if self.rotations is None:
            self.rotations, self.num_hashes, self.num_buckets = make().contiguous(), num_hashes, num_buckets
        return self.rotations

    def append(
        self, keys: torch.Tensor, values: torch.Tensor, buckets: torch.Tensor | None, real: torch.Tensor | None
    ) -> torch.Tensor:
        """Keep new tokens, (B, H, N, D) each; buckets (B, H, R, N); real (B, N) bool, None: all.

        Returns:
            (B, N) int64, their numbers; -1 for padding.
        """
        keys, values = (x.detach().to(self.keys.dtype) for x in (keys, values))
        numbers = self.reserve(keys.shape[2], real, None if buckets is None else buckets.shape[:3])
        self._write(numbers, keys, values, buckets)
        if self.tables is not None:
            self.tables.add(buckets, numbers)
        self.count(numbers)
        return numbers

    def reserve(self, new: int, real: torch.Tensor | None, lines: tuple[int, ...] | None) -> torch.Tensor:
        """Numbers (B, N) of N new tokens, with room for them; `lines`: (B, H, R) of lsh layers."""
        numbers = self.lengths[:, None]
        numbers = numbers if new == 1 else numbers + torch.arange(new, device=self.device)
        if real is not None or self.real is not None:
            real = torch.ones_like(numbers, dtype=torch.bool) if real is None else real
            before = self.real_so_far()
            numbers = torch.where(real, self.lengths[:, None] + real.cumsum(-1) - 1, -1)
            self.real = torch.cat([before, real], dim=-1)
        if lines is not None and self.buckets is None:
            self.buckets = torch.zeros(*lines, self.room, dtype=torch.int32, device=self.device)
            self.tables = self._new_tables(lines)
        most = 2 * self.local_window if self.ring else math.inf
        if self.room < min(self.columns + new, most):
            room = int(min(max(self.columns + new, self.room * GROWTH + 1), most))
            self.keys, self.values = (_longer(x, room, dim=2) for x in (self.keys, self.values))
            self.buckets = None if self.buckets is None else _longer(self.buckets, room, dim=3)
            if self.tables is not None:
                self.tables.previous = _longer(self.tables.previous, 1 + room, dim=3)
        return numbers

    def _new_tables(self, lines: tuple[int, ...]) -> BucketChains | None:
        return BucketChains(lines, num_buckets_total(self.num_buckets), self.room, self.device)

    def count(self, numbers: torch.Tensor) -> None:
        """The tokens of these numbers are kept now."""
        self.columns += numbers.shape[1]
        self.lengths = numbers[:, -1] + 1 if self.real is None else torch.maximum(self.lengths, numbers.amax(-1) + 1)

    def real_so_far(self) -> torch.Tensor:
        if self.real is not None:
            return self.real
        return torch.ones(self.batch_size, self.columns, dtype=torch.bool, device=self.device)

    def _write(self, numbers, keys, values, buckets) -> None:
        new = numbers.shape[1]
        if self.real is None and not self.ring:
            own = slice(self.columns, self.columns + new)
            self.keys[:, :, own], self.values[:, :, own] = keys, values
            if buckets is not None:
                self.buckets[..., own] = buckets
            return
        stays = numbers >= 0
        if self.ring:
            stays &= numbers > numbers.amax(-1, keepdim=True) - self.room
        row, column = stays.nonzero(as_tuple=True)
        slot = numbers[row, column] % self.room if self.ring else numbers[row, column]
        self.keys[row, :, slot], self.values[row, :, slot] = keys[row, :, column], values[row, :, column]
        if buckets is not None:
            self.buckets[row, :, :, slot] = buckets[row, :, :, column]

    # --- reading

    def all(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Keys and values (B, H, T, D), buckets (B, H, R, T) and, unless all are there, which are, (B, T) bool."""
        length = self.columns if self.real is None else max(1, int(self.lengths.max()))
        mask = None
        if self.real is not None:
            mask = torch.arange(length, device=self.device) < self.lengths[:, None]
        buckets = None if self.buckets is None else self.buckets[..., :length]
        return self.keys[:, :, :length], self.values[:, :, :length], buckets, mask

    def visible_tokens(self, own: torch.Tensor, buckets: torch.Tensor | None) -> torch.Tensor:
        """Numbers of the tokens that the newest token of every row sees, (B, H or 1, K) int64; -1: none.

        own: (B) int64, its number; buckets: (B, H, R, 1).
        """
        seen = []
        if self.include_local:
            count = min(self.local_window, self.columns)
            near = own[:, None] - torch.arange(count, device=own.device)  # (B, W)
            seen.append(near[:, None].clamp(min=-1))
        if buckets is not None:
            seen.insert(0, self.tables.last(buckets[..., 0], self.window))
            seen = [x.expand(-1, seen[0].shape[1], -1) for x in seen]
        return torch.cat(seen, dim=-1)

    def input_positions(self, numbers: torch.Tensor) -> torch.Tensor:
        """Where the tokens of these numbers (B, H, N, K) stand among all that were given; -1 stays."""
        if self.real is None:
            return numbers
        columns = (~self.real).long().argsort(dim=-1, stable=True)[:, None, None]  # of real tokens, and the others
        found = columns.expand(-1, *numbers.shape[1:3], -1).gather(-1, numbers.clamp(min=0))
        return torch.where(numbers >= 0, found, -1)

    def latest(self, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values of the last `count` tokens, (B, H, count, D), and which there are, (B, count) bool."""
        numbers = self.lengths[:, None] - count + torch.arange(count, device=self.device)
        slot = (numbers.clamp(min=0) % max(1, self.room))[:, None, :, None]
        index = slot.expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
        return self.keys.gather(2, index), self.values.gather(2, index), numbers >= 0

    # --- the library's own operations

    def update(self, key_states, value_states, *args, **kwargs):
        raise RuntimeError(
            "The layers of a ReformerCache cannot be filled from outside: tokens have to be hashed, too. Give the "
            "cache to the model as `cache` or `past_key_values`, and its attention writes to it."
        )

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def activate_past_recording(self) -> None:
        """Keep every token from now on, so that any number can be taken back."""
        if self.kind == "local" and self.is_initialized and not self.record_past:
            self.oldest = (torch.maximum(self.longest, self.lengths) - self.room).clamp(min=0)
            keys, values, _ = self.latest(min(self.room, self.columns))
            self._unroll(keys, values)
        self.record_past = True

    def _unroll(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """From a ring to slots by number; numbers before those kept stay unwritten."""
        room = max(self.columns, 1)
        numbers = self.lengths[:, None] - keys.shape[2] + torch.arange(keys.shape[2], device=self.device)
        row, column = (numbers >= 0).nonzero(as_tuple=True)
        self.keys, self.values = (x.new_zeros(*x.shape[:2], room, x.shape[3]) for x in (keys, values))
        slot = numbers[row, column]
        self.keys[row, :, slot], self.values[row, :, slot] = keys[row, :, column], values[row, :, column]

    def lengths_without(self, count: int) -> torch.Tensor:
        return self.lengths - self.real_so_far()[:, -count:].sum(-1)

    def has_evicted(self, count: int) -> bool:
        """Whether tokens are gone that would be seen again if the last `count` columns were taken back."""
        if self.kind != "local" or not self.is_initialized:
            return False
        oldest = torch.maximum(self.longest, self.lengths) - self.room if self.ring else self.oldest
        return bool(((oldest > 0) & (self.lengths_without(count) - self.local_window < oldest)).any())

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` columns.

        Raises:
            ValueError: a positive number, or more tokens than there are.
            RuntimeError: a local layer no longer has the tokens that would come back into its window. No layer of
                the cache is changed then.
        """
        count = -tokens_to_remove
        if count == 0 or not self.is_initialized:
            return
        if not 0 < count <= self.columns:
            raise ValueError(
                f"crop({tokens_to_remove}) on a cache of {self.columns} tokens: give the number to take back, as a "
                "negative number."
            )
        if any(
            layer.has_evicted(count) for layer in (self, *self.sibling_local_layers) if layer.columns == self.columns
        ):
            raise RuntimeError(
                f"{count} tokens cannot be taken back: a local layer no longer has those that would be seen again. "
                "Begin anew with a `ReformerCache(config)`, and call its `activate_past_recording()` before tokens "
                "that may be taken back."
            )
        if count == self.columns:
            self.reset()
            return
        self.longest = torch.maximum(self.longest, self.lengths)
        old, self.lengths = self.lengths, self.lengths_without(count)
        self.columns -= count
        self.real = None if self.real is None else self.real[:, : self.columns]
        if self.tables is None:
            return
        numbers = old[:, None] - 1 - torch.arange(count, device=self.device)
        numbers = torch.where(numbers >= self.lengths[:, None], numbers, -1)
        index = numbers.clamp(min=0)[:, None, None].expand(-1, *self.buckets.shape[1:3], -1)
        self.tables.remove(self.buckets.gather(-1, index), numbers)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a function to every tensor with a row for each of the batch."""
        for holder, names in (
            (self, self.of_every_row),
            (self.tables, ("newest", "previous")),
        ):
            for name in names:
                x = getattr(holder, name, None)
                if x is not None:
                    setattr(holder, name, change(x))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            self._each(lambda x: x[indices.to(x.device)])
            self.batch_size = self.lengths.shape[0]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._each(lambda x: x.repeat_interleave(repeats, dim=0))
            self.batch_size = self.lengths.shape[0]

    def offload(self) -> None:
        if self.is_initialized:
            self._each(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized:
            self._each(lambda x: x.to(self.device, non_blocking=True))


class ChunkCacheLayer(ReformerCacheLayer):
    """The kept tokens of one lsh or local layer in chunk mode. Every row is a sequence of its own, without padding.

    Attributes:
        chunks_from: (B) int64, lsh layers: a new token with fewer tokens before it sees all of them.
    """

    of_every_row = (*ReformerCacheLayer.of_every_row, "chunks_from")

    def __init__(self, config: ReformerConfig, layer: int, room: int = 0):
        super().__init__(config, layer, room)
        self.config = config
        self.chunk = getattr(config, f"{self.kind}_attn_chunk_length")
        self.before = getattr(config, f"{self.kind}_num_chunks_before") or 0
        self.local_window = (self.before + 1) * self.chunk

    def reset(self) -> None:
        super().reset()
        self.chunks_from: Any = None

    def _new_tables(self, lines: tuple[int, ...]) -> None:
        return None  # a step sorts all tokens

    def count(self, numbers: torch.Tensor) -> None:
        super().count(numbers)
        if self.kind == "lsh" and self.columns == numbers.shape[1]:  # the first tokens
            begins = [self._chunks_from(length) for length in self.lengths.tolist()]
            self.chunks_from = torch.tensor(begins, device=self.device)

    def _chunks_from(self, length: int) -> int:
        """A first input of one chunk is not cut in chunks, and neither is the first step after it."""
        if padded_length(self.config, length) > self.chunk:
            return min(length, self.chunk)
        return max(length + 1, self.chunk)

    def visible_tokens(self, own: torch.Tensor, buckets: torch.Tensor | None) -> torch.Tensor:
        if buckets is None:
            return local_chunks(own, self.chunk, self.before)[:, None]
        kept = self.buckets[..., : self.columns]
        return hash_chunks(kept, buckets, own, self.lengths, self.chunk, self.before, own >= self.chunks_from)


def _longer(x: torch.Tensor, size: int, dim: int) -> torch.Tensor:
    """x with room for `size` entries along a dimension."""
    shape = list(x.shape)
    shape[dim] = size
    longer = x.new_zeros(shape)
    longer.narrow(dim, 0, x.shape[dim]).copy_(x)
    return longer


def likes(config: ReformerConfig) -> list[tuple]:
    """What a cache of the config depends on, layer by layer."""
    fields = ["attention_mode", "num_attention_heads", "attention_head_size", "local_window", "lsh_window",
              "lsh_include_local", "local_attn_chunk_length", "local_num_chunks_before", "lsh_attn_chunk_length",
              "lsh_num_chunks_before"]  # fmt: skip
    found = vars(config)  # attributes take their time, and every token asks
    return [(kind, *[found[name] for name in fields]) for kind in found["attn_layers"]]
