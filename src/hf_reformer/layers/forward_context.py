"""Arguments that one forward pass shares with all layers, and reports of their attention."""

from typing import Any, NamedTuple

import torch

from ..ops.gather_attention import AttentionWeights
from ..ops.layout import AttentionLayout
from ..ops.prng import fold
from ..ops.sequence_parallel import SequenceShard


class EncoderContext(NamedTuple):
    """Source information for a decoder's layers, except the encoder's states, which carry gradients."""

    mask: torch.Tensor | None = None  # (B, S) bool, True for real tokens of the source; None if all are real
    cache: Any = None  # the library's cache; every layer writes the source's keys and values to it once


class ForwardContext(NamedTuple):
    """Arguments of one forward pass for all layers. Read-only, without gradients."""

    mask: torch.Tensor | None  # (B, T) bool, True for real tokens; None if all are real
    samples: torch.Tensor | None  # (B, T) int32, each token's sample in a packed sequence; None if not packed
    ranks: torch.Tensor  # (B or 1, T) int32, number of real tokens before each token in its sample
    rotary: tuple[torch.Tensor, torch.Tensor] | None  # cos and sin of `rotary.rotary_tables`
    key: torch.Tensor | None  # () int32, random key of this forward pass; None in evaluation
    training: bool  # whether rotations and exploration use the key; otherwise only dropout does
    num_hashes: int  # that of this call, by default the config's
    num_buckets: int | tuple[int, ...] | None  # likewise; None: legacy rule by length
    padded_length: int  # chunk mode: length that layers pad to, a multiple of the chunk lengths
    shard: SequenceShard | None = None  # this process's share under sequence parallelism; T is the whole length
    layer_key: torch.Tensor | None = None  # `key` for one layer, see `for_layer`
    cache: Any = None  # `cache.ReformerCache` of earlier tokens, read and written by layers; T: new tokens
    encoder: EncoderContext | None = None  # source of a decoder's layers
    query_weights: torch.Tensor | None = None  # (B, T), weight of each query in the attention mass; None: not reported
    want_weights: bool | str = False  # whether layers report their attention weights: False, "sparse" or "dense"
    want_sorting: bool = False  # whether layers report how they sorted the tokens

    @property
    def offset(self) -> int:
        """Position of the first token of this process outside attention."""
        return 0 if self.shard is None else self.shard.begin

    def for_layer(self, index: int) -> "ForwardContext":
        """Return a copy with the key of a layer."""
        return self if self.key is None else self._replace(layer_key=fold(self.key, index))


class Sorting(NamedTuple):
    """How a layer sorted the tokens.

    Attributes:
        layout: sort orders and windows of the attention op; in chunk mode of the padded input.
        heads: H, number of heads for which this process computes attention.
        mask: (B, T) bool, True for real tokens.
        vectors: (B, H, T, D), the hashed vectors; None without hashing.
        buckets: (B, H, R, T) int32, the bucket of every token in every hash round; None without hashing.
        num_buckets: number of buckets per round; 0 without hashing.
        samples: (B, T) int32, each token's sample in a packed sequence; None if not packed.
        query: (B, H, T, D), the queries used in scores, with rotary positions applied; None in full layers.
    """

    layout: AttentionLayout
    heads: int
    mask: torch.Tensor
    vectors: torch.Tensor | None = None
    buckets: torch.Tensor | None = None
    num_buckets: int = 0
    samples: torch.Tensor | None = None
    query: torch.Tensor | None = None


def real_tokens(ctx: ForwardContext, value: torch.Tensor) -> torch.Tensor:
    """Return the mask of real tokens, (B, T) bool, for values (B, H, T, D)."""
    return torch.ones_like(value[:, 0, :, 0], dtype=torch.bool) if ctx.mask is None else ctx.mask


class AttentionReport(NamedTuple):
    """A layer's report of its attention; fields are None unless requested by `ForwardContext`."""

    mass: torch.Tensor | None = None  # (B, T) floating, attention mass of every token; differentiable
    encoder_mass: torch.Tensor | None = None  # (B, S), attention mass of the source's tokens, in decoders
    weights: AttentionWeights | None = None  # self-attention, sparse with a cache; differentiable
    encoder_weights: torch.Tensor | None = None  # (B, H, T, S), cross-attention, in decoders
    sorting: Sorting | None = None
