"""What one forward pass tells every layer, and what a layer's attention reports beside its values."""

from typing import Any, NamedTuple

import torch

from ..ops.gather_attention import AttentionWeights
from ..ops.layout import AttentionLayout
from ..ops.prng import fold
from ..ops.sequence_parallel import SequenceShard


class EncoderContext(NamedTuple):
    """What a decoder's layers know of the source beside the encoder's states, which carry gradients."""

    mask: torch.Tensor | None = None  # (B, S) bool, True for real tokens of the source; None: all are
    cache: Any = None  # the library's cache, to which every layer writes the source's keys and values once


class ForwardContext(NamedTuple):
    """What one forward pass tells every layer. Read-only, without gradients."""

    mask: torch.Tensor | None  # (B, T) bool, True for real tokens; None: all are
    samples: torch.Tensor | None  # (B, T) int32, which sample of a packed sequence a token belongs to; None: one each
    ranks: torch.Tensor  # (B or 1, T) int32, number of real tokens of its sample before each token
    rotary: tuple[torch.Tensor, torch.Tensor] | None  # cos and sin of `rotary.rotary_tables`
    key: torch.Tensor | None  # int32 key of shape () of this forward's randomness; None in evaluation
    training: bool  # whether rotations and exploration draw from it; otherwise dropout alone
    num_hashes: int  # the config's, or this call's own
    num_buckets: int | tuple[int, ...] | None  # the same; None: the legacy rule by length
    padded_length: int  # chunk mode: length up to which layers pad, a multiple of the chunk lengths
    shard: SequenceShard | None = (
        None  # this process's part, where several share every sequence; T is the whole length
    )
    layer_key: torch.Tensor | None = None  # `key` for one layer, see `for_layer`
    cache: Any = None  # `cache.ReformerCache` of the tokens before these, which layers read and write; T: new tokens
    encoder: EncoderContext | None = None  # what a decoder's layers know of the source
    query_weights: torch.Tensor | None = None  # (B, T), each query's share of the attention mass; None: not reported
    want_weights: bool | str = False  # whether layers report their attention weights: False, "sparse" or "dense"
    want_sorting: bool = False  # whether layers report how they arranged the tokens

    @property
    def offset(self) -> int:
        """Position of the first token that this process holds outside attention."""
        return 0 if self.shard is None else self.shard.begin

    def for_layer(self, index: int) -> "ForwardContext":
        """The same with the layer's own key."""
        return self if self.key is None else self._replace(layer_key=fold(self.key, index))


class Sorting(NamedTuple):
    """How a layer arranged the tokens.

    Attributes:
        layout: sort orders and windows, as the attention op gets them; in chunk mode of the padded input.
        heads: H, of which this process computes attention.
        mask: (B, T) bool, True for real tokens.
        vectors: (B, H, T, D), what was hashed; None where nothing was.
        buckets: (B, H, R, T) int32, the bucket of every token in every hash round; None as above.
        num_buckets: how many buckets a round has; 0 as above.
        samples: (B, T) int32, which sample of a packed sequence a token belongs to; None: one each.
        query: (B, H, T, D), the queries as scores use them, turned by rotary positions; None in full layers.
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
    """(B, T) bool, True for real tokens, for values (B, H, T, D)."""
    return torch.ones_like(value[:, 0, :, 0], dtype=torch.bool) if ctx.mask is None else ctx.mask


class AttentionReport(NamedTuple):
    """What a layer reports of its attention, each None unless `ForwardContext` asks for it."""

    mass: torch.Tensor | None = None  # (B, T) floating, attention mass that every token receives; differentiable
    encoder_mass: torch.Tensor | None = None  # (B, S), the same of the source's tokens, in decoders
    weights: AttentionWeights | None = None  # over own tokens, with a cache sparse; differentiable
    encoder_weights: torch.Tensor | None = None  # (B, H, T, S), those over the source's tokens, in decoders
    sorting: Sorting | None = None
