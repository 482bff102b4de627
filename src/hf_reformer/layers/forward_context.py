"""What one forward pass tells every layer, and what a layer's attention reports beside its values."""

from typing import Any, NamedTuple

import torch

from ..ops.gather_attention import SparseAttention
from ..ops.layout import AttentionLayout
from ..ops.prng import fold
from ..ops.sequence_parallel import SequenceShard


class EncoderContext(NamedTuple):
    """What a decoder's layers know of the source beside the encoder's states, which carry gradients.

    Attributes:
        mask: (B, S) bool, True for real tokens of the source; None: all are.
        cache: the library's cache, to which every layer writes the source's keys and values once; or None.
    """

    mask: torch.Tensor | None = None
    cache: Any = None


class ForwardContext(NamedTuple):
    """What one forward pass tells every layer. Read-only, without gradients.

    Attributes:
        mask: (B, T) bool, True for real tokens, or None.
        samples: (B, T) int32, which of the samples packed into its sequence a token belongs to; None: one sample each.
        ranks: (B or 1, T) int32, number of real tokens of its sample before each token.
        rotary: cos and sin of `position_embeddings.rotary_tables`, or None.
        key: int32 key of shape () of this forward's randomness; None in evaluation.
        layer_key: the same for one layer, see `for_layer`.
        num_hashes, num_buckets: the config's, or this call's own. `num_buckets=None`: the legacy rule by length.
        padded_length: chunk mode: length up to which layers pad, a multiple of the chunk lengths.
        shard: this process's part, where several share every sequence. T is the whole length.
        cache: `cache.ReformerCache` of the tokens before these, which the layers read and write. T counts new tokens.
        encoder: what a decoder's layers know of the source; None in models of one stack.
        query_weights: (B, T), how much each query counts in the attention mass, over all heads; None: not wanted.
        want_weights: whether layers report their attention weights: False, "sparse" or "dense".
        want_sorting: whether layers report how they arranged the tokens.
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
    encoder: EncoderContext | None = None
    query_weights: torch.Tensor | None = None
    want_weights: bool | str = False
    want_sorting: bool = False

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
        vectors: (B, H, T, D), what was hashed; None where nothing was.
        buckets: (B, H, R, T) int32, the bucket of every token in every hash round; None as above.
        num_buckets: how many buckets a round has; 0 as above.
    """

    layout: AttentionLayout
    vectors: torch.Tensor | None = None
    buckets: torch.Tensor | None = None
    num_buckets: int = 0


class AttentionReport(NamedTuple):
    """What a layer reports of its attention, each None unless `ForwardContext` asks for it.

    Attributes:
        mass: (B, T) floating, attention mass that every token receives; differentiable.
        encoder_mass: (B, S), the same of the source's tokens, in decoders.
        weights: attention weights over own tokens, as asked for, or with a cache sparse; differentiable.
        encoder_weights: (B, H, T, S), those over the source's tokens, in decoders.
        sorting: how the layer arranged the tokens.
    """

    mass: torch.Tensor | None = None
    encoder_mass: torch.Tensor | None = None
    weights: SparseAttention | torch.Tensor | None = None
    encoder_weights: torch.Tensor | None = None
    sorting: Sorting | None = None
