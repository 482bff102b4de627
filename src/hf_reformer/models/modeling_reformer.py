"""ReformerModel: embeddings, a stack of reversible layers, and a final norm over both streams."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import Cache
from transformers.utils import can_return_tuple, logging

from ..cache.cache import CACHE_NAME, ReformerCache, begin_writing, check_call, to_reformer_cache, whole_step
from ..compat import in_graph_capture, may_look_at, values_are_known
from ..configuration_reformer import ReformerConfig, padded_length
from ..layers.compiled_stack import compiled_stack, supports_compiled_stack
from ..layers.feed_forward import Dropout, LayerNorm
from ..layers.forward_context import AttentionReport, EncoderContext, ForwardContext
from ..layers.fused_decode import plan_fused_decode
from ..layers.position_embeddings import AxialPositionEmbeddings
from ..layers.reformer_layer import ReformerLayer
from ..ops.coverage import CoverageTarget, coverage_loss, coverage_target
from ..ops.lsh import num_buckets_total
from ..ops.prng import EMBEDDING_DROPOUT, FINAL_DROPOUT, draw_key, fold
from ..ops.rotary import rotary_tables
from ..ops.sequence_parallel import SequenceShard, broadcast, local_tokens, make_sequence_shard
from ..reversible.chunking import Handoff
from ..reversible.grid import Grid, choose_grid, to_stream
from ..reversible.recompute import can_reverse
from ..reversible.reversible import StreamHandoff, needs_plain_path
from .input_checks import (
    check_inputs,
    has_no_token,
    packed_samples,
    refuse_values,
    reject_ignored_packing_args,
    reject_packed_samples,
    reject_tracing,
)
from .outputs import ReformerModelOutput
from .pretrained import ReformerPreTrainedModel, ZeroEmbedding

logger = logging.get_logger(__name__)


class ReformerModel(ReformerPreTrainedModel):
    """The bare Reformer model: bidirectional, or causal with `config.is_decoder=True`.

    The last hidden state is twice as wide as `hidden_size`: both residual streams, the attention stream first.
    """

    layer_class = ReformerLayer

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.type_vocab_size:
            self.token_type_embeddings = ZeroEmbedding(config.type_vocab_size, config.hidden_size, padding_idx=0)
        if config.position_embedding_type == "axial":
            self.position_embeddings: nn.Module = AxialPositionEmbeddings(
                config.axial_pos_shape, config.axial_pos_embds_dim
            )
        elif config.position_embedding_type == "learned":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.layers = nn.ModuleList(self.layer_class(config, i) for i in range(len(config.attn_layers)))
        self.norm = LayerNorm(2 * config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.sequence_group = None
        self.post_init()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, without sequence parallelism: process groups cannot be copied."""
        return self.__dict__ | {"sequence_group": None}

    def shard(self, length: int) -> SequenceShard | None:
        """Return this process's shard of sequences of `length` tokens; None without sequence parallelism."""
        group = self.sequence_group
        return None if group is None else make_sequence_shard(group, length, self.config.num_attention_heads)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]  # any module

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
        output_attention_mass: bool | None = None,
        output_sorting: bool | None = None,
        encoder_hidden_states: torch.FloatTensor | None = None,
        encoder_context: EncoderContext | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> ReformerModelOutput:
        r"""
        Args:
            input_ids: (B, T) int64, any T up to the positions that the config covers; or `inputs_embeds`: (B, T, D).
            attention_mask: (B, T), 1 for real tokens. Zeros may be anywhere; outputs there are meaningless.
            position_ids: (B, T). Default: in window mode the number of real tokens before each token, so that left
                padding changes nothing; in chunk mode 0 … T - 1. Positions that restart at 0 within a sequence mark
                a new sample. Samples packed into one sequence do not attend to each other (window mode).
            num_hashes, num_buckets: number of hash rounds and of buckets in this call.
            output_hidden_states: also return the feed-forward stream before every layer and after the last, (B, T, D)
                each. In training this uses the plain path, whose memory grows with depth.
            output_attentions: also return the attention of every layer: as matrices (B, H, T, before + T) if True, or
                as `gather_attention.SparseAttention`, whose size is linear in the length, if `"sparse"`. Both are
                slow: they are computed token by token on the plain path.
            cache, past_key_values: two names for the cache of an earlier call, or an empty one; the inputs continue
                it. `attention_mask` must then also cover the earlier tokens: (B, before + T).
            use_cache: return a cache (causal models). Calls with a cache compute as in evaluation. In chunk mode, they
                follow the legacy decoding rule, which differs from a single call (docs/generation.md).
            output_coverage: also return the `coverage.coverage_loss` of every layer. Default: True if
                `config.coverage_loss_weight` is above 0 and there is no cache.
            output_attention_mass: also return the attention mass that every token receives, (B, T) per layer.
            output_sorting: also return how every layer sorted the tokens, `forward_context.Sorting`; not with a
                cache. Uses the plain path.
            encoder_hidden_states, encoder_context: the source of a decoder (`ReformerDecoder`).
            token_type_ids: (B, T), the text of a pair that each token belongs to; ignored if `config.type_vocab_size`
                is 0. Default: zeros.

        Returns:
            ReformerModelOutput with `last_hidden_state` (B, T, 2 D), the cache (as `cache` since transformers 5.24,
            before as `past_key_values`), and `coverage_loss` (layers).

        Raises:
            ValueError: invalid shapes, ids, positions or masks; the message says which and why.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        self._check_attentions(output_attentions)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if cache is not None and past_key_values is not None:
            raise ValueError("`cache` and `past_key_values` are two names for one argument. Give one of them.")
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        if cache is not None and (output_coverage or output_sorting or output_attention_mass):
            name = "coverage" if output_coverage else "sorting" if output_sorting else "attention_mass"
            raise ValueError(
                f"`output_{name}=True` needs all tokens of a sequence at once, and some are in the cache. Leave out "
                "`past_key_values` and `use_cache`."
            )
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        looked_at = output_attentions or output_sorting or output_attention_mass or self.sequence_group is not None
        if has_no_token(inputs) and cache is None and not looked_at:
            return self._without_tokens(inputs, inputs_embeds is not None, bool(output_hidden_states), **kwargs)
        cover = self._covers(output_coverage) and cache is None
        past = 0 if cache is None else cache.get_seq_length()
        reject_tracing(self.config)
        check_inputs(
            self.config, input_ids, attention_mask, position_ids, inputs_embeds, num_hashes, num_buckets, past,
            token_type_ids,
        )  # fmt: skip
        reject_ignored_packing_args(position_ids, **kwargs)
        shard = self.shard(inputs.shape[1])
        inputs_here = local_tokens(inputs, shard)
        embeds = self.embed_tokens(inputs_here) if inputs_embeds is None else inputs_here
        ctx, positions = self._make_context(
            embeds, inputs.shape[1], shard, attention_mask, position_ids, num_hashes, num_buckets, cache
        )
        if ctx.mask is not None:  # the values of padding do not matter, but 0 * NaN is NaN
            padding = ~local_tokens(ctx.mask, shard)[..., None]
            embeds = embeds.masked_fill(padding & ~embeds.isfinite(), 0)
        target, real = None, ctx.mask
        if cover or output_attention_mass:
            real = torch.ones(inputs.shape[:2], dtype=torch.bool, device=embeds.device) if real is None else real
            target = coverage_target(real, ctx.ranks, ctx.samples, self.config.is_decoder)
        ctx = ctx._replace(
            encoder=encoder_context,
            query_weights=None if target is None else target.query_weights / self.config.num_attention_heads,
            want_weights=output_attentions and ("sparse" if output_attentions == "sparse" else "dense"),
            want_sorting=bool(output_sorting),
        )
        if self.config.type_vocab_size:
            types = inputs.new_zeros(inputs.shape[:2], dtype=torch.int64) if token_type_ids is None else token_type_ids
            embeds = embeds + self.token_type_embeddings(local_tokens(types, shard))
        if self.config.position_embedding_type != "rotary":
            embeds = embeds + self.position_embeddings(local_tokens(positions, shard))
        embeds = self.dropout(embeds, _subkey(ctx.key, EMBEDDING_DROPOUT), ctx.offset)
        precision = "float32" if embeds.device.type == "mps" else self.config.residual_precision  # MPS has no float64
        grid = choose_grid(precision, self.norm.weight.dtype, rounded=torch.is_grad_enabled())
        run_stack = self._choose_stack(ctx, grid, embeds, bool(output_hidden_states))
        stream = Handoff(to_stream(embeds, grid))
        del embeds, inputs_here  # so that layers can free their inputs
        states = () if encoder_hidden_states is None else (encoder_hidden_states,)
        with whole_step(cache):
            if cache is not None:
                begin_writing(cache)
            x1, x2, reports, hidden_states = run_stack(stream, ctx, grid, *states)
            hidden = self.norm(torch.cat([x1, x2], dim=-1))
            hidden = self.dropout(hidden, _subkey(ctx.key, FINAL_DROPOUT), ctx.offset)
            weights, cross = ([getattr(r, name) for r in reports] for name in ("weights", "encoder_weights"))
            if output_attentions and output_attentions != "sparse":
                weights = [x if isinstance(x, torch.Tensor) else x.dense(past + inputs.shape[1]) for x in weights]
            return ReformerModelOutput(
                last_hidden_state=hidden,
                **{CACHE_NAME: cache},
                hidden_states=hidden_states,
                attentions=tuple(weights) if output_attentions else None,
                cross_attentions=tuple(cross) if output_attentions and states else None,
                coverage_loss=self._coverage(reports, target, encoder_context) if cover else None,
                attention_mass=tuple(r.mass for r in reports) if output_attention_mass else None,
                sorting=tuple(r.sorting for r in reports) if output_sorting else None,
            )

    def _without_tokens(self, inputs: torch.Tensor, embeds: bool, states: bool, **kwargs: Any) -> ReformerModelOutput:
        """Compute the output for empty sequences: that of one padding token, which is then removed.

        This way, every parameter gets a gradient of zeros, as distributed training requires.
        """
        mask = torch.zeros(inputs.shape[0], 1, dtype=torch.int64, device=inputs.device)
        one = (
            {"inputs_embeds": inputs.new_zeros(inputs.shape[0], 1, *inputs.shape[2:])}
            if embeds
            else {"input_ids": mask}
        )
        more = {"output_hidden_states": states, "output_coverage": False, "use_cache": False, "return_dict": True}
        out = self(attention_mask=mask, **one, **{**kwargs, **more})
        out["last_hidden_state"] = out.last_hidden_state[:, :0]
        if states:
            out["hidden_states"] = tuple(x[:, :0] for x in out.hidden_states)
        return out

    def _covers(self, output_coverage: bool | None) -> bool:
        """Whether a call without a cache computes the coverage loss."""
        return self.config.coverage_loss_weight > 0 if output_coverage is None else output_coverage

    def _coverage(
        self, reports: list[AttentionReport], target: CoverageTarget, encoder: EncoderContext | None
    ) -> torch.Tensor:
        """Compute the coverage loss of every layer, (layers)."""
        mass = torch.stack([report.mass for report in reports])
        return coverage_loss(mass, target).to(mass.dtype)

    def _check_attentions(self, output_attentions: bool | str) -> None:
        reason = None
        if isinstance(output_attentions, str) and output_attentions != "sparse":
            reason = 'it must be True, False or "sparse"'
        elif self.sequence_group is not None:
            reason = "processes share the sequences (`enable_sequence_parallel`)"
        elif self.gradient_checkpointing and self.training:
            reason = "gradient checkpointing would drop them"
        if output_attentions and reason is not None:
            raise ValueError(f"`output_attentions={output_attentions!r}` is not possible: {reason}.")

    def _cache(self, cache: Any, use_cache: bool | None) -> Cache | None:
        """Return the cache of this call: the given one, or a new one if requested and possible."""
        if cache is None and not use_cache:
            return None
        reason = None
        if not self.config.is_decoder:
            reason = "the model is bidirectional (`config.is_decoder=False`), so later tokens change earlier results"
        elif self.sequence_group is not None:
            reason = "processes share the sequences (`enable_sequence_parallel`)"
        elif self.gradient_checkpointing and self.training:
            reason = "gradient checkpointing runs layers twice, and each run would write to it"
        if cache is None:
            return ReformerCache(self.config) if reason is None else None
        cache = to_reformer_cache(cache, self.config)
        if reason is not None:
            raise ValueError(f"A cache (`past_key_values`) cannot be used: {reason}. Leave it out.")
        return cache

    def _choose_stack(self, ctx: ForwardContext, grid: Grid, embeds: torch.Tensor, record_states: bool) -> Callable:
        """Choose a path through the layers: (stream, ctx, grid, *encoder states) → (x1, x2, reports, states or None).

        All paths give the same values: decode steps in one kernel call, or one per supported layer; the whole stack
        as one call in a compiled graph; or layer by layer: recomputed in the backward pass of a traced graph,
        reversible, or plain if more than the final values is requested.
        """
        observed = record_states or ctx.want_weights or ctx.want_sorting
        step = None if observed else plan_fused_decode(self.layers, ctx, embeds, grid.dtype)
        if step is not None:
            return partial(_run_whole, step)
        # Layers traced one by one cannot reconstruct their inputs, but the graph can recompute them.
        traced = self.config.reversible and torch.is_grad_enabled() and torch.compiler.is_compiling()
        traced = traced and ctx.cache is None and not (ctx.want_weights or ctx.want_sorting)
        if traced and not observed and ctx.encoder is None and supports_compiled_stack(self.layers, ctx):
            return partial(_run_whole, partial(compiled_stack, self.layers))
        handoff = None
        plain = observed or ctx.cache is not None or (self.gradient_checkpointing and self.training)
        if self.config.reversible and can_reverse() and not plain:
            reason = next(filter(None, map(needs_plain_path, self.layers)), None)
            if reason is None:
                handoff = StreamHandoff(grid, len(self.layers))
            else:
                logger.warning_once(
                    f"Layers take the plain path, whose memory grows with depth, because of {reason}: backward could "
                    "not repeat that when it reruns layers."
                )
        fuse = ctx.cache is not None and not (ctx.want_weights or ctx.want_sorting)
        run = partial(_run_layers, self.layers, handoff=handoff, recompute=traced, fuse=fuse)
        return partial(run, state_dtype=self.norm.weight.dtype if record_states else None)

    def _make_context(
        self, embeds: torch.Tensor, length: int, shard: SequenceShard | None, attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None, num_hashes: Any, num_buckets: Any, cache: Any,
    ) -> tuple[ForwardContext, torch.Tensor]:  # fmt: skip
        """Make the context of this forward pass; also returns the position ids, (B or 1, T)."""
        config, device = self.config, embeds.device
        positions = torch.arange(length, device=device)[None]
        mask = None if attention_mask is None else attention_mask != 0
        if mask is not None and cache is None and values_are_known():
            # With a mask, exact attention has no flash kernel and materializes all pairs, which is so slow that it is
            # worth synchronizing with a CUDA device once.
            waits = mask.is_cuda and "full" in config.attn_layers and not in_graph_capture()
            looks = may_look_at(mask) or waits
            mask = None if looks and bool(mask.all()) else mask
        mask = None if mask is None else mask.to(device)
        before: torch.Tensor | int = 0
        num_hashes = num_hashes or config.num_hashes
        num_buckets = config.num_buckets if num_buckets is None else num_buckets
        num_buckets = num_buckets if num_buckets is None or isinstance(num_buckets, int) else tuple(num_buckets)
        if cache is not None:
            check_call(cache, embeds.shape[0], num_hashes, num_buckets)
            mask, before = new_tokens(cache, mask)
        ranks = positions + before if mask is None else (mask.long().cumsum(-1) - 1 + before).clamp(min=0)
        samples = None if position_ids is None else packed_samples(position_ids.to(device), ranks, mask)
        if samples is not None and cache is not None:
            reject_packed_samples(samples, "A cache holds one sample per sequence: pad instead, or leave it out.")
            samples = None
        if samples is not None and config.attention_mode == "chunk":
            reject_packed_samples(samples, "Chunks would mix them: pad instead, or use `attention_mode='window'`.")
        elif samples is not None:
            samples = samples.expand(embeds.shape[0], -1).contiguous()
            first = torch.searchsorted(samples, samples)  # where each token's sample begins
            ranks = ranks.expand_as(first) - ranks.expand_as(first).gather(-1, first)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = ranks if config.attention_mode == "window" else positions + past
        rotary = None
        if config.position_embedding_type == "rotary":
            rotary = rotary_tables(position_ids, config.attention_head_size, config.rope_theta, config.rotary_shape)
        training = self.training and cache is None
        # Only dropout may be in training mode, for Monte Carlo dropout (Gal and Ghahramani 2016).
        drops = training or (cache is None and any(isinstance(m, Dropout) and m.rate for m in self.modules()))
        key = draw_key(device) if drops else None
        if key is not None and shard is not None:
            key = broadcast(key, shard.group)
        eager = not torch.compiler.is_compiling()
        if eager and config.attention_mode == "window" and length < 2 * num_buckets_total(num_buckets):
            logger.info_once(
                f"Inputs are so short that {num_buckets_total(num_buckets)} hash buckets stay nearly empty: LSH "
                "layers attend to little beyond their local window. For short inputs, lower `num_buckets` or "
                "`max_position_embeddings`."
            )
        return ForwardContext(
            mask=mask,
            samples=samples if config.attention_mode == "window" else None,
            ranks=ranks.to(torch.int32),
            rotary=rotary,
            key=key,
            training=training,
            num_hashes=num_hashes,
            num_buckets=num_buckets,
            padded_length=padded_length(config, length),
            shard=shard,
            cache=cache,
        ), position_ids


def _run_whole(run: Callable, stream: Handoff, *inputs: Any) -> tuple[Any, ...]:
    """Run all layers in one call of `run`."""
    x = stream.take()
    return *run(x, x, *inputs), None


def _run_layers(
    layers: nn.ModuleList,
    stream: Handoff,
    ctx: ForwardContext,
    grid: Grid,
    *states: torch.Tensor,
    handoff: StreamHandoff | None,
    recompute: bool,
    fuse: bool,
    state_dtype: torch.dtype | None,
) -> tuple[Any, ...]:
    """Run layer by layer.

    Args:
        handoff: if given, run the layers reversibly.
        fuse: in a decode step, run each layer that the kernel supports as one call.
        recompute: recompute each layer in the backward pass of a traced graph.
        state_dtype: if given, record the feed-forward stream before and after every layer in this dtype.
    """
    x1 = x2 = stream.take()
    reports, hidden_states = [], []

    def record(stream: torch.Tensor) -> torch.Tensor:
        """Record the stream and return it, routed through the recorded state so that gradients pass through it."""
        hidden_states.append(stream.to(state_dtype))
        if hidden_states[-1] is stream or not torch.is_grad_enabled():
            return stream
        return stream.detach() + (hidden_states[-1] - hidden_states[-1].detach())

    for index, layer in enumerate(layers):
        x2 = x2 if state_dtype is None else record(x2)
        fused = plan_fused_decode([layer], ctx, x2, x2.dtype) if fuse else None
        if fused is not None:
            x1, x2, report = fused(x1, x2)
        elif recompute:
            x2, x1, *report = checkpoint(layer, x2, x1, ctx, grid, None, index, *states, use_reentrant=False)
        else:
            x2, x1, *report = layer(x2, x1, ctx, grid, handoff, index, *states)
        reports.append(AttentionReport(*report))
    x2 = x2 if state_dtype is None else record(x2)
    return x1, x2, reports, None if state_dtype is None else tuple(hidden_states)


def new_tokens(cache: Cache, mask: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | int]:
    """Return the new tokens' part of a mask (B, before + T), None if all are real, and the count of real ones before.

    Raises:
        ValueError: the mask contradicts the one used to fill the cache.
    """
    layer: Any = cache.layers[0]
    before = layer.lengths[:, None] if layer.seen_tokens else 0
    if mask is None:
        return None, before
    if layer.seen_tokens:
        refuse_values(
            mask[:, : layer.seen_tokens] == layer.mask_so_far(),
            "`attention_mask` masks other tokens of the cache than when it was filled. What is in a cache cannot be "
            "masked afterwards: start with a new cache.",
        )
    mask = mask[:, layer.seen_tokens :]
    looks = may_look_at(mask) or torch.compiler.is_compiling()
    return None if looks and bool(mask.all()) else mask, before


def _subkey(key: torch.Tensor | None, site: int) -> torch.Tensor | None:
    return None if key is None else fold(key, -1, site)
