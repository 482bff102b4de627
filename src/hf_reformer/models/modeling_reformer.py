"""ReformerModel: embeddings, a stack of reversible layers, a final norm over both streams."""

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel, load_state_dict
from transformers.utils import can_return_tuple, logging

from ..cache.cache import CACHE_NAME, ReformerCache, adopt, check_call
from ..configuration_reformer import ReformerConfig, padded_length
from ..layers.attention import Call
from ..layers.compiled_stack import can_be_whole, whole_stack
from ..layers.feed_forward import LayerNorm
from ..layers.fused_decode import token_step
from ..layers.position_embeddings import AxialPositionEmbeddings, LearnedPositionEmbeddings, rotary_tables
from ..layers.reformer_layer import ReformerLayer
from ..ops.coverage import Shares, coverage_loss, make_shares
from ..ops.lsh import product_of
from ..ops.prng import EMBEDDING_DROPOUT, FINAL_DROPOUT, draw_key, dropout, fold
from ..ops.sequence_parallel import Shard, check_group, check_same_inputs, make_shard, own_tokens, same_everywhere
from ..reversible.recompute import can_reverse
from ..reversible.reversible import Chain, Grid, choose_grid, needs_plain_path, to_stream
from .input_checks import check_inputs, check_nothing_is_lost, packed_samples, refuse_packed
from .outputs import ReformerModelOutput

logger = logging.get_logger(__name__)

# Parameter names of transformers' own Reformer, and ours. Names that match no pattern are left alone.
BUILTIN_NAMES = {
    r"^(reformer\.)?embeddings\.word_embeddings\.": "model.embed_tokens.",
    r"^(reformer\.)?embeddings\.position_embeddings\.embedding\.": "model.position_embeddings.",
    r"^(reformer\.)?embeddings\.position_embeddings\.weights\.": "model.position_embeddings.weights.",
    r"^(reformer\.)?encoder\.layer_norm\.": "model.norm.",
    r"^(reformer\.)?encoder\.layers\.": "model.layers.",
    r"\.attention\.layer_norm\.": ".attention_norm.",
    r"\.attention\.self_attention\.query_key\.": ".attention.qk_proj.",
    r"\.attention\.self_attention\.query\.": ".attention.q_proj.",
    r"\.attention\.self_attention\.key\.": ".attention.k_proj.",
    r"\.attention\.self_attention\.value\.": ".attention.v_proj.",
    r"\.attention\.output\.dense\.": ".attention.o_proj.",
    r"\.feed_forward\.layer_norm\.": ".feed_forward_norm.",
    r"\.feed_forward\.dense\.dense\.": ".feed_forward.up_proj.",
    r"\.feed_forward\.output\.dense\.": ".feed_forward.down_proj.",
    r"^lm_head\.decoder\.weight$": "lm_head.weight",
}

# Files of transformers 4, and since 5.24, hold the head's bias by this name too. Where they differ, this one counts.
OLDER_BIAS = "lm_head.decoder.bias"

# What a folder of an encoder-decoder holds besides the encoder, which is all that other models read of it.
BEYOND_THE_ENCODER = r"^(decoder|lm_head|merge_streams)\."


class ReformerPreTrainedModel(PreTrainedModel):
    """Weights, their initialisation, and loading, also from folders of transformers' own Reformer."""

    config_class = ReformerConfig
    config: ReformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ReformerLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_context_parallel = False
    _keys_to_ignore_on_load_unexpected = [r"\.(self_)?mask_value_float(16|32)$", r"^lm_head\.decoder\.bias$"]

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As for every model of the library. A folder of transformers' own Reformer is read by its names."""
        kwargs.setdefault("key_mapping", BUILTIN_NAMES)
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._weight_conversions = None  # what is saved from now on bears our own names
        return loaded

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs):
        if model.config.is_encoder_decoder and not hasattr(model, "decoder"):
            model._keys_to_ignore_on_load_unexpected |= {BEYOND_THE_ENCODER}
        found = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)
        if OLDER_BIAS in found[0].unexpected_keys and hasattr(model, "lm_head"):
            for state in [state_dict] if state_dict is not None else map(load_state_dict, checkpoint_files):
                if OLDER_BIAS in state:
                    head = model.lm_head
                    head.bias = nn.Parameter(state[OLDER_BIAS].to(head.weight.device, head.bias.dtype, copy=True))
                    head.bias._is_hf_initialized = True
            found[0].missing_keys.discard("lm_head.bias")
        return found

    def share_sequences(self, group: Any) -> None:
        """Let the processes of a `torch.distributed` group share every sequence (sequence parallelism).

        From now on all of them must be given the same inputs. Outside attention each works on its share of the tokens,
        inside on its share of the heads: exact, with a share of the memory. Losses and the heads' logits are whole on
        every process; hidden states hold a process's own tokens. Gradients are those of one process once they are
        averaged over the group, as DistributedDataParallel does. `None` ends it.

        Raises:
            ValueError: what is no group of this process; in `forward`, inputs that differ between processes, heads
                that the group's size does not divide, or fewer tokens than processes.
        """
        if group is not None:
            check_group(group)
            if refuse_different_inputs not in self._forward_pre_hooks.values():
                self.register_forward_pre_hook(refuse_different_inputs, with_kwargs=True)
        self.base_model.sequence_group = group

    def compile_layers(self, **options: Any) -> None:
        """Compile the token-wise parts of every layer, in place: projections, feed-forward, norms around them.

        The way to compile deep models: compiling takes as long as for one layer. `torch.compile` of the whole model
        works too, since torch 2.13. Its memory in training is flat in depth as well, but that of a checkpointed model
        where hooks or adapters sit in the layers, and under DDP.

        Args:
            options: those of `torch.compile`.
        """
        for layer in self.modules():
            if isinstance(layer, ReformerLayer):
                layer.compile_parts(**options)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.ParameterList):  # of axial positions; the owner, without parameters of its own,
            for weight in module:  # never gets here: the library passes it over in classes that it does not ship
                init.normal_(weight, std=self.config.axial_norm_std)


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

    def shard(self, length: int) -> Shard | None:
        """This process's part of sequences of `length` tokens; None unless `share_sequences` was called."""
        group = self.sequence_group
        return None if group is None else make_shard(group, length, self.config.num_attention_heads)

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
        check_nothing_is_lost(position_ids, **kwargs)
        given = input_ids if inputs_embeds is None else inputs_embeds
        shard = self.shard(given.shape[1])
        own = own_tokens(given, shard)
        embeds = self.embed_tokens(own) if inputs_embeds is None else own
        call, positions = self._make_call(
            embeds, given.shape[1], shard, attention_mask, position_ids, num_hashes, num_buckets, cache
        )
        if self.config.position_embedding_type != "rotary":
            embeds = embeds + self.position_embeddings(own_tokens(positions, shard))
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

    def _shares(self, call: Call, given: torch.Tensor) -> Shares:
        real = torch.ones(given.shape[:2], dtype=torch.bool, device=given.device) if call.mask is None else call.mask
        return make_shares(real, call.ranks, call.samples, self.config.is_decoder)

    def _coverage(self, received: list[torch.Tensor], shares: Shares, source: Any) -> torch.Tensor:
        """Of what tokens receive in every layer, (B, T) each, the losses (layers)."""
        return coverage_loss(torch.stack(received), shares).to(received[0].dtype)

    def _check_attentions(self, wanted: bool | str) -> None:
        if not wanted:
            return
        reason = None
        if isinstance(wanted, str) and wanted != "sparse":
            reason = 'it must be True, False or "sparse"'
        elif self.sequence_group is not None:
            reason = "processes share the sequences (`share_sequences`)"
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
            reason = "processes share the sequences (`share_sequences`)"
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
        chain = None if plain else Chain(grid, len(self.layers))
        # Traced into a graph, layers one by one cannot rebuild their inputs, but the graph can compute them again.
        traced = self.config.reversible and torch.is_grad_enabled() and torch.compiler.is_compiling()
        traced = traced and call.cache is None and not looked
        x2, x1 = streams.pop(), streams.pop()
        states: list[torch.Tensor] = []
        received: list[torch.Tensor] = []
        if traced and not keep_states and can_be_whole(self.layers, call):
            x1, x2, *received = whole_stack(self.layers, x1, x2, call, grid)
            return x1, x2, None, received
        if not keep_states and (found := token_step(self.layers, x1, x2, call)) is not None:
            return *found, None, []
        for index, layer in enumerate(self.layers):
            if keep_states:
                x2 = passing(x2, self.norm.weight.dtype, states)
            if traced:
                x2, x1, *more = checkpoint(layer, x2, x1, call, grid, None, index, *extra, use_reentrant=False)
            else:
                x2, x1, *more = layer(x2, x1, call, grid, chain, index, *extra)
            received += more
        if keep_states:
            x2 = passing(x2, self.norm.weight.dtype, states)
        return x1, x2, tuple(states) if keep_states else None, received

    def _make_call(
        self, embeds, length: int, shard: Shard | None, attention_mask, position_ids, num_hashes, num_buckets, cache
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
            refuse_packed(samples, "A cache holds one sample a row: pad instead, or leave out the cache.")
        if samples is not None and config.attention_mode == "chunk":
            refuse_packed(samples, "Chunks cannot keep them apart: pad instead, or use `attention_mode='window'`.")
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
        if seen and config.attention_mode == "window" and length < 2 * product_of(num_buckets):
            logger.info_once(
                f"Inputs are so short that {product_of(num_buckets)} hash buckets stay nearly empty: lsh layers see "
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


def passing(stream: torch.Tensor, dtype: torch.dtype, states: list[torch.Tensor]) -> torch.Tensor:
    """The stream, on through a state of that dtype which is put into `states`: so gradients pass through it."""
    state = stream.to(dtype)
    states.append(state)
    if state is stream or not torch.is_grad_enabled():
        return stream
    return stream.detach() + (state - state.detach())


def refuse_different_inputs(model: Any, args: tuple, kwargs: dict) -> None:
    """Before anything of a forward can fail in one process and leave the others waiting."""
    group = model.base_model.sequence_group
    if group is None or torch.compiler.is_compiling():
        return
    signature = inspect.signature(model.forward)
    found = signature.bind(*args, **kwargs).arguments
    given = {name: found.get(name) for name in signature.parameters}
    given["num_hashes, num_buckets or another keyword"] = given.pop("kwargs")
    given |= {"train() or eval()": model.training, "no_grad()": torch.is_grad_enabled()}
    check_same_inputs(group, model.device, given)


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


def _fresh_key(device: torch.device, shard: Shard | None) -> torch.Tensor:
    key = draw_key(device)
    return key if shard is None else same_everywhere(key, shard.group)


def make_position_embeddings(config: ReformerConfig) -> nn.Module:
    """The module that adds positions to embeddings."""
    if config.position_embedding_type == "axial":
        return AxialPositionEmbeddings(tuple(config.axial_pos_shape), tuple(config.axial_pos_embds_dim))
    return LearnedPositionEmbeddings(config.max_position_embeddings, config.hidden_size)


def _subkey(key: torch.Tensor | None, site: int) -> torch.Tensor | None:
    return None if key is None else fold(key, -1, site)
