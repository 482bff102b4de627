"""ReformerModel: embeddings, a stack of reversible layers, a final norm over both streams."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.utils import can_return_tuple, logging

from ..cache.cache import CACHE_NAME, ReformerCache, adopt, check_call
from ..configuration_reformer import ReformerConfig, padded_length
from ..layers.attention import Call
from ..layers.compiled_stack import compiled_stack, supports_compiled_stack
from ..layers.feed_forward import LayerNorm
from ..layers.fused_decode import token_step
from ..layers.position_embeddings import AxialPositionEmbeddings, LearnedPositionEmbeddings, rotary_tables
from ..layers.reformer_layer import ReformerLayer
from ..ops.coverage import CoverageTarget, coverage_loss, coverage_target
from ..ops.lsh import num_buckets_total
from ..ops.prng import EMBEDDING_DROPOUT, FINAL_DROPOUT, draw_key, dropout, fold
from ..ops.sequence_parallel import SequenceShard, broadcast, local_tokens, make_sequence_shard
from ..reversible.grid import Grid, choose_grid, to_stream
from ..reversible.recompute import can_reverse
from ..reversible.reversible import StreamHandoff, needs_plain_path
from .input_checks import check_inputs, packed_samples, reject_ignored_packing_args, reject_packed_samples
from .outputs import ReformerModelOutput
from .pretrained import ReformerPreTrainedModel

logger = logging.get_logger(__name__)


class ReformerModel(ReformerPreTrainedModel):
    """The bare model. Bidirectional, or causal with `config.is_decoder=True`.

    Its last hidden state is twice as wide as `hidden_size`: both residual streams, attention stream first.
    """

    layer_class = ReformerLayer

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_embedding_type != "rotary":
            self.position_embeddings = make_position_embeddings(config)
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(len(config.attn_layers)))
        self.norm = LayerNorm(2 * config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.sequence_group = None
        self.post_init()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which share no sequences: a group of processes cannot be copied."""
        return self.__dict__ | {"sequence_group": None}

    def shard(self, length: int) -> SequenceShard | None:
        """This process's part of sequences of `length` tokens; None unless `enable_sequence_parallel` was called."""
        group = self.sequence_group
        return None if group is None else make_sequence_shard(group, length, self.config.num_attention_heads)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]  # whatever the caller puts there

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        num_hashes: int | None = None,
        num_buckets: int | list[int] | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | str | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        output_coverage: bool | None = None,
        **kwargs,
    ) -> ReformerModelOutput:
        r"""
        Args:
            input_ids: (B, T) int64, any T up to the positions the config covers; or `inputs_embeds`: (B, T, D).
            attention_mask: (B, T), 1 for real tokens. Zeros may stand anywhere; the output there is meaningless.
            position_ids: (B, T). Default: in window mode the number of real tokens before each token, so that left
                padding changes nothing; in chunk mode 0 … T - 1. Where they restart at 0 within a row, another sample
                begins: samples packed into a row don't see each other (window mode).
            num_hashes, num_buckets: this call's own number of hash rounds and of buckets.
            output_hidden_states: also give the feed-forward stream before every layer and after the last, (B, T, D)
                each. In training this takes the plain path, whose memory grows with depth.
            output_attentions: also give every layer's attention: True as matrices of weights (B, H, T, before + T),
                `"sparse"` as `listed_attention.SparseAttention`, of which the size grows with the length alone. Both
                are computed token by token, slowly, on the plain path.
            cache, past_key_values: two names for what an earlier call returned, or an empty cache: the inputs continue
                it. Then `attention_mask` counts the tokens before, too: (B, before + T).
            use_cache: return a cache (causal models). A call with a cache computes as in evaluation. In chunk mode its
                tokens follow the older rule of decoding, which is not that of one call (docs/generation.md).
            output_coverage: also give every layer's `coverage.coverage_loss`. Default: if
                `config.coverage_loss_weight` is above 0 and there is no cache.

        Returns:
            ReformerModelOutput with `last_hidden_state` (B, T, 2 D), the cache, as `cache` since transformers 5.24, or
            `past_key_values` before, and `coverage_loss` (layers).

        Raises:
            ValueError: shapes, ids, positions or masks that cannot be right; the message says which and why.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        self._check_attentions(output_attentions)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if cache is not None and past_key_values is not None:
            raise ValueError("`cache` and `past_key_values` are two names for one argument. Give one of them.")
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        cover = self._covers(output_coverage, cache)
        past = 0 if cache is None else cache.get_seq_length()
        check_inputs(
            self.config, input_ids, attention_mask, position_ids, inputs_embeds, num_hashes, num_buckets, past
        )
        reject_ignored_packing_args(position_ids, **kwargs)
        given = input_ids if inputs_embeds is None else inputs_embeds
        shard = self.shard(given.shape[1])
        own = local_tokens(given, shard)
        embeds = self.embed_tokens(own) if inputs_embeds is None else own
        call, positions = self._make_call(
            embeds, given.shape[1], shard, attention_mask, position_ids, num_hashes, num_buckets, cache
        )
        if self.config.position_embedding_type != "rotary":
            embeds = embeds + self.position_embeddings(local_tokens(positions, shard))
        embeds = dropout(embeds, self.config.hidden_dropout_prob, _subkey(call.key, EMBEDDING_DROPOUT), call.first)
        precision = "float32" if embeds.device.type == "mps" else self.config.residual_precision  # it has no float64
        grid = choose_grid(precision, self.norm.weight.dtype, rounded=torch.is_grad_enabled())
        streams = [to_stream(embeds, grid)] * 2
        del embeds  # so that the layers can free what they have used up
        if output_attentions:
            call = call._replace(attentions=[], dense=output_attentions != "sparse")
        extra, source = kwargs.get("of_encoder", ((), None))  # given by a decoder (seq2seq.py)
        call = call._replace(source=source)
        shares = self._shares(call, given) if cover else None
        if shares is not None:
            call = call._replace(paid=shares.paid / self.config.num_attention_heads)
        x1, x2, states, received = self._run_layers(streams, call, grid, bool(output_hidden_states), extra)
        hidden = self.norm(torch.cat([x1, x2], dim=-1))
        hidden = dropout(hidden, self.config.hidden_dropout_prob, _subkey(call.key, FINAL_DROPOUT), call.first)
        attentions: Any = call.attentions
        if call.dense:
            attentions = [x if isinstance(x, torch.Tensor) else x.dense(past + given.shape[1]) for x in attentions]
        return ReformerModelOutput(
            last_hidden_state=hidden,
            **{CACHE_NAME: cache},
            hidden_states=states,
            attentions=None if attentions is None else tuple(attentions),
            coverage_loss=None if shares is None else self._coverage(received, shares, source),
        )

    def _covers(self, wanted: bool | None, cache: Cache | None) -> bool:
        """Whether this call tells how far attention reaches."""
        if wanted and cache is not None:
            raise ValueError(
                "`output_coverage=True` needs all tokens of a row at once, and a cache holds some of them. Leave out "
                "`past_key_values` and `use_cache`."
            )
        return cache is None and (self.config.coverage_loss_weight > 0 if wanted is None else wanted)

    def _shares(self, call: Call, given: torch.Tensor) -> CoverageTarget:
        real = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device) if call.mask is None else call.mask
        return coverage_target(real, call.ranks, call.samples, self.config.is_decoder)

    def _coverage(self, received: list[torch.Tensor], shares: CoverageTarget, source: Any) -> torch.Tensor:
        """Of what tokens receive in every layer, (B, T) each, the losses (layers)."""
        return coverage_loss(torch.stack(received), shares).to(received[0].dtype)

    def _check_attentions(self, wanted: bool | str) -> None:
        if not wanted:
            return
        reason = None
        if isinstance(wanted, str) and wanted != "sparse":
            reason = 'it must be True, False or "sparse"'
        elif self.sequence_group is not None:
            reason = "processes share the sequences (`enable_sequence_parallel`)"
        elif self.gradient_checkpointing and self.training:
            reason = "gradient checkpointing would drop them"
        if reason is not None:
            raise ValueError(f"`output_attentions={wanted!r}` cannot be: {reason}.")

    def _cache(self, given: Any, wanted: bool | None) -> Cache | None:
        """The cache of this call: the one given, or a new one where it is asked for."""
        if given is None and not wanted:
            return None
        cache = ReformerCache(self.config) if given is None else adopt(given, self.config)
        reason = None
        if not self.config.is_decoder:
            reason = "the model is bidirectional (`config.is_decoder=False`), and what comes changes what was"
        elif self.sequence_group is not None:
            reason = "processes share the sequences (`enable_sequence_parallel`)"
        elif self.gradient_checkpointing and self.training:
            reason = "gradient checkpointing runs layers twice, and each time would write to it"
        if reason is not None and given is None:
            return None
        if reason is not None:
            raise ValueError(f"A cache (`past_key_values`) cannot be used: {reason}. Leave it out.")
        return cache

    def _run_layers(self, streams: list[torch.Tensor], call: Call, grid: Grid, keep_states: bool, extra: tuple):
        """Both streams through all layers, and the states to return. The path is chosen here, the values are one.

        Empties `streams`.
        """
        checkpointing = self.gradient_checkpointing and self.training
        looked = call.attentions is not None
        plain = keep_states or looked or checkpointing or not self.config.reversible or not can_reverse()
        plain = plain or call.cache is not None or any(needs_plain_path(layer) for layer in self.layers)
        chain = None if plain else StreamHandoff(grid, len(self.layers))
        # Traced into a graph, layers one by one cannot rebuild their inputs, but the graph can compute them again.
        traced = self.config.reversible and torch.is_grad_enabled() and torch.compiler.is_compiling()
        traced = traced and call.cache is None and not looked
        x2, x1 = streams.pop(), streams.pop()
        states: list[torch.Tensor] = []
        received: list[torch.Tensor] = []
        if traced and not keep_states and supports_compiled_stack(self.layers, call):
            x1, x2, *received = compiled_stack(self.layers, x1, x2, call, grid)
            return x1, x2, None, received
        if not keep_states and (found := token_step(self.layers, x1, x2, call)) is not None:
            return *found, None, []
        for index, layer in enumerate(self.layers):
            if keep_states:
                x2 = record_hidden_state(x2, self.norm.weight.dtype, states)
            if traced:
                x2, x1, *more = checkpoint(layer, x2, x1, call, grid, None, index, *extra, use_reentrant=False)
            else:
                x2, x1, *more = layer(x2, x1, call, grid, chain, index, *extra)
            received += more
        if keep_states:
            x2 = record_hidden_state(x2, self.norm.weight.dtype, states)
        return x1, x2, tuple(states) if keep_states else None, received

    def _make_call(
        self,
        embeds,
        length: int,
        shard: SequenceShard | None,
        attention_mask,
        position_ids,
        num_hashes,
        num_buckets,
        cache,
    ) -> tuple[Call, torch.Tensor]:
        """What every layer is told, and the position ids (B or 1, T)."""
        config, device = self.config, embeds.device
        places = torch.arange(length, device=device)[None]
        mask = None if attention_mask is None else attention_mask.to(device) != 0
        before: torch.Tensor | int = 0
        num_hashes = num_hashes or config.num_hashes
        num_buckets = config.num_buckets if num_buckets is None else num_buckets
        num_buckets = num_buckets if num_buckets is None or isinstance(num_buckets, int) else tuple(num_buckets)
        if cache is not None:
            check_call(cache, embeds.shape[0], num_hashes, num_buckets)
            mask, before = new_tokens(cache, mask)
        ranks = places + before if mask is None else (mask.long().cumsum(-1) - 1 + before).clamp(min=0)
        samples = None if position_ids is None else packed_samples(position_ids.to(device), ranks, mask)
        if samples is not None and cache is not None:
            reject_packed_samples(samples, "A cache holds one sample a row: pad instead, or leave out the cache.")
        if samples is not None and config.attention_mode == "chunk":
            reject_packed_samples(
                samples, "Chunks cannot keep them apart: pad instead, or use `attention_mode='window'`."
            )
        elif samples is not None:
            samples = samples.expand(embeds.shape[0], -1).contiguous()
            first = torch.searchsorted(samples, samples)  # where each token's sample begins
            ranks = ranks.expand_as(first) - ranks.expand_as(first).gather(-1, first)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = ranks if config.attention_mode == "window" else places + past
        rotary = None
        if config.position_embedding_type == "rotary":
            rotary = rotary_tables(position_ids, config.attention_head_size, config.rope_theta)
        seen = not torch.compiler.is_compiling()
        if seen and config.attention_mode == "window" and length < 2 * num_buckets_total(num_buckets):
            logger.info_once(
                f"Inputs are so short that {num_buckets_total(num_buckets)} hash buckets stay nearly empty: lsh layers see "
                "little beyond their local window. For short inputs, lower `num_buckets` or `max_position_embeddings`."
            )
        return Call(
            mask=mask,
            samples=samples if config.attention_mode == "window" else None,
            ranks=ranks.to(torch.int32),
            rotary=rotary,
            key=_fresh_key(device, shard) if self.training and cache is None else None,
            num_hashes=num_hashes,
            num_buckets=num_buckets,
            padded_length=padded_length(config, length),
            shard=shard,
            cache=cache,
        ), position_ids


def record_hidden_state(stream: torch.Tensor, dtype: torch.dtype, states: list[torch.Tensor]) -> torch.Tensor:
    """The stream, on through a state of that dtype which is put into `states`: so gradients pass through it."""
    state = stream.to(dtype)
    states.append(state)
    if state is stream or not torch.is_grad_enabled():
        return stream
    return stream.detach() + (state - state.detach())


def new_tokens(cache: Cache, mask: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | int]:
    """Of a mask (B, before + T) the part of the new tokens, None if all are real; and (B, 1) real tokens before.

    Raises:
        ValueError: the mask contradicts the one that the cache was filled with.
    """
    layer: Any = cache.layers[0]
    before = layer.lengths[:, None] if layer.columns else 0
    if mask is None:
        return None, before
    if layer.columns and not torch.equal(mask[:, : layer.columns], layer.real_so_far()):
        raise ValueError(
            "`attention_mask` masks other tokens of the cache than when it was filled. What is in a cache cannot be "
            "masked afterwards: begin anew."
        )
    mask = mask[:, layer.columns :]
    return None if bool(mask.all()) else mask, before


def _fresh_key(device: torch.device, shard: SequenceShard | None) -> torch.Tensor:
    key = draw_key(device)
    return key if shard is None else broadcast(key, shard.group)


def make_position_embeddings(config: ReformerConfig) -> nn.Module:
    """The module that adds positions to embeddings."""
    if config.position_embedding_type == "axial":
        return AxialPositionEmbeddings(tuple(config.axial_pos_shape), tuple(config.axial_pos_embds_dim))
    return LearnedPositionEmbeddings(config.max_position_embeddings, config.hidden_size)


def _subkey(key: torch.Tensor | None, site: int) -> torch.Tensor | None:
    return None if key is None else fold(key, -1, site)
