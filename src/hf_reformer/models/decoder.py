"""The decoder of an encoder-decoder: a causal Reformer whose layers attend to the encoder's states, too."""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.utils import can_return_tuple

from ..cache.cache import CACHE_NAME
from ..configuration_reformer import ReformerConfig
from ..layers.attention import Call
from ..layers.cross_attention import CrossAttention, Source
from ..layers.feed_forward import LayerNorm
from ..layers.reformer_layer import ReformerLayer
from ..ops.coverage import CoverageTarget, coverage_loss, coverage_target
from .input_checks import check_mask_values, given_shape
from .modeling_reformer import ReformerModel
from .outputs import ReformerDecoderOutput


class ReformerDecoderLayer(ReformerLayer):
    """A causal layer whose f is self-attention plus cross-attention, side by side, each behind its own norm."""

    def __init__(self, config: ReformerConfig, layer: int):
        super().__init__(config, layer)
        self.cross_attention_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attention = CrossAttention(config, layer)

    def project(self, x2: torch.Tensor, call: Call, first: int) -> list[torch.Tensor | None]:
        query = self.cross_attention.project(self.cross_attention_norm(x2))
        return [*super().project(x2, call, first), query]

    def attend(self, projected: list[Any], call: Call, *states: torch.Tensor, known: Any = None) -> Any:
        """As every layer's; then, where the call asks for it, also what every token of the source receives, (B, S)."""
        mixed, *received = self.cross_attention(projected.pop(), *states, call.source, call.paid)
        own = super().attend(projected, call, known)
        own, *told = own if isinstance(own, tuple) else (own,)
        mixed = torch.cat([own, mixed], dim=-1)
        return (mixed, *told, *received) if told else mixed

    def merge(self, mixed: torch.Tensor, call: Call, first: int) -> torch.Tensor:
        own, cross = mixed.chunk(2, dim=-1)
        cross = self.cross_attention.merge(cross, call.layer_key, call.first + first)
        return super().merge(own, call, first) + cross


class ReformerDecoder(ReformerModel):
    """A causal Reformer whose layers look at an encoder's states, too. Its config is `ReformerConfig.decoder_config()`."""

    layer_class = ReformerDecoderLayer
    _no_split_modules = ["ReformerDecoderLayer"]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        output_attentions: bool | str | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> ReformerDecoderOutput:
        r"""
        Args:
            encoder_hidden_states: (B, S, 2 D), the encoder's last hidden state.
            encoder_attention_mask: (B, S), 1 for real tokens of the source.
            cache, past_key_values: two names for an `EncoderDecoderCache`.
            others: as `ReformerModel` takes them.

        Raises:
            ValueError: states, masks or caches that cannot be right.
        """
        if cache is not None and past_key_values is not None:
            raise ValueError("`cache` and `past_key_values` are two names for one argument. Give one of them.")
        states, rows = encoder_hidden_states, given_shape(input_ids, inputs_embeds)[0]
        self._check_source(states, encoder_attention_mask, rows)
        both = self._both_caches(past_key_values if cache is None else cache, use_cache, states)
        if both is None or both.get_seq_length() == 0:  # and not for every token that is generated
            check_mask_values(encoder_attention_mask)
        mask = None if encoder_attention_mask is None else encoder_attention_mask.to(states.device) != 0
        if mask is not None and not torch.compiler.is_compiling() and bool(mask.all()):
            mask = None
        wanted = self.config.output_attentions if output_attentions is None else output_attentions
        kept = (None, None) if both is None else (both.self_attention_cache, both.cross_attention_cache)
        source = Source(mask, kept[1], [] if wanted else None)
        outputs = super().forward(
            input_ids,
            attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            past_key_values=kept[0],
            of_encoder=((states,), source),
            **{**kwargs, "return_dict": True},
        )
        return ReformerDecoderOutput(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE_NAME: both},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            coverage_loss=outputs.coverage_loss,
            cross_attentions=None if source.attentions is None else tuple(source.attentions),
        )

    def _coverage(self, received: list[torch.Tensor], shares: CoverageTarget, source: Any) -> torch.Tensor:
        """Of what tokens of target and source receive in turn, layer by layer, the sum of both losses (layers)."""
        own = super()._coverage(received[::2], shares, source)
        cross = torch.stack(received[1::2])
        real = (shares.paid > 0).any(-1, keepdim=True).expand(cross.shape[1:])  # rows with a target
        real = real if source.mask is None else real & source.mask
        target = coverage_target(real, real.cumsum(-1) - 1)
        return own + coverage_loss(cross, target).to(own.dtype)

    def _check_source(self, states: torch.Tensor | None, mask: torch.Tensor | None, rows: int) -> None:
        width = 2 * self.config.hidden_size
        if states is None:
            raise ValueError("A decoder needs `encoder_hidden_states`, the encoder's last hidden state.")
        if states.dim() != 3 or states.shape[0] != rows or states.shape[1] == 0 or states.shape[2] != width:
            raise ValueError(
                f"The encoder's states have shape {tuple(states.shape)}; for {rows} rows of the target they must be "
                f"({rows}, source length, {width}): both residual streams of every source token."
            )
        if mask is not None and mask.shape != states.shape[:2]:
            raise ValueError(
                f"`attention_mask` has shape {tuple(mask.shape)}; with a source of {tuple(states.shape[:2])} tokens "
                "it must be the same."
            )

    def _both_caches(self, given: Any, wanted: bool | None, states: torch.Tensor) -> EncoderDecoderCache | None:
        """Of the target's tokens, and of the source's keys and values, which begin anew with the target."""
        if given is not None and not isinstance(given, EncoderDecoderCache):
            raise ValueError(
                f"The cache given is a {type(given).__name__}, but an encoder-decoder keeps two. Give what an earlier "
                "call returned, or `EncoderDecoderCache(DynamicCache(), DynamicCache())`."
            )
        own = self._cache(None if given is None else given.self_attention_cache, wanted)
        if own is None:
            return None
        both = EncoderDecoderCache(own, DynamicCache()) if given is None else given
        both.self_attention_cache = own  # type: ignore[assignment]  # any cache
        if own.get_seq_length() == 0:
            both.cross_attention_cache = DynamicCache()
        layers = both.cross_attention_cache.layers
        held = [getattr(layer, "keys", None) for layer in layers]
        if own.get_seq_length() and [x is not None and x.shape[2] for x in held] != [states.shape[1]] * len(
            self.layers
        ):
            raise ValueError(
                f"The cache was filled with another source than this one of {states.shape[1]} tokens. Begin anew with "
                "an empty cache."
            )
        return both
