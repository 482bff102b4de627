"""The decoder of an encoder-decoder: a causal Reformer whose layers also attend to the encoder's states."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.utils import can_return_tuple

from ..cache.cache import CACHE_NAME, whole_step
from ..compat import may_look_at
from ..configuration_reformer import ReformerConfig
from ..layers.feed_forward import LayerNorm
from ..layers.forward_context import AttentionReport, EncoderContext, ForwardContext
from ..layers.full_attention import FullAttention
from ..layers.reformer_layer import ReformerLayer
from ..ops.coverage import CoverageTarget, coverage_loss, coverage_target
from ..reversible.chunking import Handoff
from .input_checks import check_mask_values, given_shape, has_no_token
from .modeling_reformer import ReformerModel
from .outputs import ReformerModelOutput


class ReformerDecoderLayer(ReformerLayer):
    """A causal layer whose f is self-attention plus cross-attention, in parallel, each with its own norm."""

    def __init__(self, config: ReformerConfig, layer: int):
        super().__init__(config, layer)
        self.cross_attention_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.cross_attention = FullAttention(config, layer, over_encoder=True)

    def qkv_projection(self, x2: torch.Tensor, ctx: ForwardContext, offset: int) -> list[torch.Tensor | None]:
        return [*self.cross_attention.qkv(self.cross_attention_norm(x2)), *super().qkv_projection(x2, ctx, offset)]

    def attend(self, projected: Handoff, ctx: ForwardContext, *states: torch.Tensor) -> tuple[Any, ...]:
        cross_query, *own = projected.take()
        cross, cross_report = self.cross_attention(Handoff([cross_query]), ctx, *states)
        handoff = Handoff(own)
        del cross_query, own
        mixed, report = self.attention(handoff, ctx)
        report = report._replace(encoder_mass=cross_report.encoder_mass, encoder_weights=cross_report.encoder_weights)
        return torch.cat([mixed, cross], dim=-1), *report

    def output_projection(self, mixed: torch.Tensor, ctx: ForwardContext, offset: int) -> torch.Tensor:
        own, cross = mixed.chunk(2, dim=-1)
        cross = self.cross_attention.output(cross, ctx.layer_key, ctx.offset + offset)
        return super().output_projection(own, ctx, offset) + cross


class ReformerDecoder(ReformerModel):
    """A causal Reformer whose layers also attend to an encoder's states; its config is `config.decoder_config()`."""

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
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> ReformerModelOutput:
        r"""
        Args:
            encoder_hidden_states: (B, S, 2 D), the encoder's last hidden state.
            encoder_attention_mask: (B, S), 1 for real tokens of the source.
            cache, past_key_values: two names for an `EncoderDecoderCache`.
            others: as in `ReformerModel`.

        Raises:
            ValueError: invalid states, masks or caches.
        """
        if cache is not None and past_key_values is not None:
            raise ValueError("`cache` and `past_key_values` are two names for one argument. Give one of them.")
        states: Any = encoder_hidden_states
        batch = given_shape(input_ids, inputs_embeds)[0]
        if has_no_token(states):  # treat an empty source as padding
            states = nn.functional.pad(states, (0, 0, 0, 1))
            encoder_attention_mask = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
        self._check_source(states, encoder_attention_mask, batch)
        both = self._both_caches(past_key_values if cache is None else cache, use_cache, states)
        if both is None or both.get_seq_length() == 0:  # not for every generated token
            check_mask_values(encoder_attention_mask)
        mask = None if encoder_attention_mask is None else encoder_attention_mask.to(states.device) != 0
        if mask is not None and may_look_at(mask) and bool(mask.all()):
            mask = None
        with whole_step(both):
            outputs = super().forward(
                input_ids,
                attention_mask,
                inputs_embeds=inputs_embeds,
                past_key_values=None if both is None else both.self_attention_cache,
                encoder_hidden_states=states,
                encoder_context=EncoderContext(mask, None if both is None else both.cross_attention_cache),
                **{**kwargs, "return_dict": True},
            )
            if both is not None:
                outputs[CACHE_NAME] = both
            return outputs

    def _coverage(
        self, reports: list[AttentionReport], target: CoverageTarget, encoder: EncoderContext | None
    ) -> torch.Tensor:
        """Compute the coverage loss of every layer, (layers): the sum over the target's and the source's tokens."""
        own = super()._coverage(reports, target, encoder)
        cross = torch.stack([report.encoder_mass for report in reports])
        real = (target.query_weights > 0).any(-1, keepdim=True).expand(cross.shape[1:])  # sequences with a target
        real = real if encoder.mask is None else real & encoder.mask
        return own + coverage_loss(cross, coverage_target(real, real.cumsum(-1) - 1)).to(own.dtype)

    def _check_source(self, states: torch.Tensor | None, mask: torch.Tensor | None, batch: int) -> None:
        width = 2 * self.config.hidden_size
        if states is None:
            raise ValueError("A decoder needs `encoder_hidden_states`, the encoder's last hidden state.")
        if states.dim() != 3 or states.shape[0] != batch or states.shape[1] == 0 or states.shape[2] != width:
            raise ValueError(
                f"The encoder's states have shape {tuple(states.shape)}; for {batch} targets they must be "
                f"({batch}, source length, {width}): both residual streams of every source token."
            )
        if mask is not None and mask.shape != states.shape[:2]:
            raise ValueError(
                f"`attention_mask` has shape {tuple(mask.shape)}; with a source of {tuple(states.shape[:2])} tokens "
                "it must be the same."
            )

    def _both_caches(self, cache: Any, use_cache: bool | None, states: torch.Tensor) -> EncoderDecoderCache | None:
        """Return the caches of target tokens and of source keys and values; the latter is new for each target."""
        if cache is not None and not isinstance(cache, EncoderDecoderCache):
            raise ValueError(
                f"The cache given is a {type(cache).__name__}, but an encoder-decoder keeps two. Give what an earlier "
                "call returned, or `EncoderDecoderCache(DynamicCache(), DynamicCache())`."
            )
        own: Any = self._cache(None if cache is None else cache.self_attention_cache, use_cache)
        if own is None:
            return None
        both = EncoderDecoderCache(own, DynamicCache()) if cache is None else cache
        both.self_attention_cache = own
        if own.get_seq_length() == 0:
            both.cross_attention_cache = DynamicCache()
            return both
        keys = [getattr(layer, "keys", None) for layer in both.cross_attention_cache.layers]
        if [x is not None and x.shape[2] for x in keys] != [states.shape[1]] * len(self.layers):
            raise ValueError(
                f"The cache was filled with another source than this one of {states.shape[1]} tokens. Start again "
                "with an empty cache."
            )
        return both
