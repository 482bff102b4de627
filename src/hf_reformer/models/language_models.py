"""Causal and masked language models: backbone, head, and a loss that in training never materializes all logits."""

import copy
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import EncoderDecoderCache
from transformers.generation import GenerationMixin
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from ..cache.cache import CACHE_NAME, to_reformer_cache, whole_step
from ..cache.cache_layers import ReformerCacheLayer
from ..configuration_reformer import ReformerConfig
from ..ops.sequence_parallel import SequenceShard, all_reduce, gather_sequence, local_tokens, tokens_at
from .input_checks import given_shape
from .losses import IGNORE, check_label_shape, check_labels, chunked_cross_entropy, cross_entropy
from .modeling_reformer import ReformerModel
from .outputs import ReformerCausalLMOutput, ReformerMaskedLMOutput
from .pretrained import ReformerPreTrainedModel


class ReformerLMBase(ReformerPreTrainedModel):
    """Base class of language models: backbone, head and chunked loss.

    With `tie_word_embeddings`, `lm_head` shares the embedding weights, and a projection merges both streams for it.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.model = ReformerModel(config)
        width = 2 * config.hidden_size
        if config.tie_word_embeddings:
            self.merge_streams = nn.Linear(width, config.hidden_size, bias=False)
            width = config.hidden_size
        self.lm_head = nn.Linear(width, config.vocab_size)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    def _loss_and_logits(self, hidden, targets, shard: SequenceShard | None, num_items, logits_to_keep=0):
        """Compute loss and logits from this process's hidden states, (B, T, 2 D), and all targets or None.

        In training with targets, logits are computed for a few tokens at a time and not returned.
        """
        loss = logits = None
        every = isinstance(logits_to_keep, int) and logits_to_keep == 0
        hidden = self.merge_streams(hidden) if self.config.tie_word_embeddings else hidden
        if targets is None or not self.training:
            logits = self.lm_head(kept_tokens(hidden, logits_to_keep, shard))
        if targets is not None:
            targets = targets.to(hidden.device)
            check_labels(targets, self.config.vocab_size)  # targets of all processes, so that all raise or none
            num_items = (targets != IGNORE).sum() if num_items is None else num_items
            own = local_tokens(targets, shard).reshape(-1)
            if logits is not None and every:
                loss = cross_entropy(logits.flatten(0, 1), own, num_items)
            else:
                chunk, size = self.config.chunk_size_lm_head, self.config.vocab_size
                loss = chunked_cross_entropy(hidden.flatten(0, 1), self.lm_head, own, size, chunk, num_items)
            loss = all_reduce(loss, shard)
        if logits is not None and every:
            logits = gather_sequence(logits, shard)
        return loss, logits


class ReformerGenerativeLM(ReformerLMBase, GenerationMixin):
    """A language model with transformers' `generate` and our cache."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return True  # the library says no to every class with `reformer` in its name

    def _prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs):
        """Infer the mask from padding ids, as in transformers; cached tokens keep theirs: texts may hold the id."""
        library: Any = super()
        mask = library._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        cache = model_kwargs.get("past_key_values", model_kwargs.get("cache"))
        layers = [x for x in getattr(cache, "layers", []) if isinstance(x, ReformerCacheLayer) and x.seen_tokens]
        if not layers or mask.shape[0] != layers[0].batch_size or mask.shape[1] <= layers[0].seen_tokens:
            return mask
        new = mask[:, layers[0].seen_tokens :]
        new = torch.ones_like(new) if new.shape[1] == 1 else new  # the token just written
        return torch.cat([layers[0].mask_so_far().to(mask), new], dim=-1)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        """Prepare the cache that transformers selects, with our layers; none under sequence parallelism."""
        if self.model.sequence_group is not None:
            if "inputs_embeds" in model_kwargs:
                raise ValueError(
                    "generate(inputs_embeds=…) needs a cache, and sequence parallelism has none. Give `input_ids`."
                )
            generation_config.use_cache = False
        if generation_config.cache_implementation == "quantized":
            raise ValueError(
                'cache_implementation="quantized" is not supported: a Reformer reads single tokens of its cache. '
                "Leave it out."
            )
        library: Any = super()
        library._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache: Any = model_kwargs.get(CACHE_NAME)
        if cache is not None and not self.config.is_encoder_decoder:
            cache = model_kwargs[CACHE_NAME] = to_reformer_cache(cache, self.config)
        elif isinstance(cache, EncoderDecoderCache):
            own: Any = to_reformer_cache(cache.self_attention_cache, self.get_decoder().config)
            cache.self_attention_cache = own
        if cache is not None and generation_config.is_assistant:  # rejected tokens are cropped
            cache.activate_past_recording()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "`generate_batch` (continuous batching) is not supported: its pages of keys lack hash buckets. Use "
            "`generate` with a batch padded on the left; every sequence gives the same text as alone."
        )


class ReformerForCausalLM(ReformerGenerativeLM):
    """Reformer with a language-model head. Always causal, regardless of `config.is_decoder`; without token types."""

    def __init__(self, config: ReformerConfig):
        if not config.is_decoder or config.type_vocab_size:
            config = copy.deepcopy(config)
            config.is_decoder, config.type_vocab_size = True, 0
            config.validate()
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_hashes: int | None = None,
        num_buckets: int | list[int] | None = None,
        **kwargs: Any,
    ) -> ReformerCausalLMOutput:
        r"""
        Args:
            labels: (B, T) int64, the tokens themselves (shifted inside the model), -100 for no target.
            logits_to_keep: number of last positions to compute logits for (0: all), or their indices.
            num_items_in_batch: divisor of the summed loss (gradient accumulation in the Trainer).
            num_hashes, num_buckets: as in `ReformerModel`; named here so that `generate` accepts them.
            shift_labels: (B, T) int64, the target of every position, already shifted; instead of `labels`.

        Returns:
            ReformerCausalLMOutput. `logits` (B, T, vocab_size) is None in training with labels.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # not in the signature: Trainer would require it in evaluation
        kwargs.update(num_hashes=num_hashes, num_buckets=num_buckets, return_dict=True)
        given = kwargs.get("past_key_values") if kwargs.get("cache") is None else kwargs["cache"]
        with whole_step(given):
            outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
            hidden, shape = outputs.last_hidden_state, given_shape(input_ids, inputs_embeds)
            check_label_shape(shift_labels if shift_labels is not None else labels, shape)
            targets: torch.Tensor | None = shift_labels
            if targets is None and labels is not None:
                targets = nn.functional.pad(labels[:, 1:], (0, min(1, labels.shape[1])), value=IGNORE)
            shard = self.model.shard(shape[1])
            loss, logits = self._loss_and_logits(hidden, targets, shard, num_items_in_batch, logits_to_keep)
            fields = {"logits": logits, CACHE_NAME: getattr(outputs, CACHE_NAME)}
            return self._head_output(ReformerCausalLMOutput, outputs, loss, targets, num_items_in_batch, **fields)


class ReformerForMaskedLM(ReformerLMBase):
    """Reformer with a masked language-model head; needs `is_decoder=False`."""

    def __init__(self, config: ReformerConfig):
        if config.is_decoder:
            raise ValueError(
                "ReformerForMaskedLM predicts masked tokens from both sides, but `config.is_decoder=True` makes "
                "attention causal. Set it to False, or use ReformerForCausalLM."
            )
        if config.is_encoder_decoder:
            raise ValueError(
                "ReformerForMaskedLM is only an encoder, but `config.is_encoder_decoder=True`. Use "
                "ReformerForConditionalGeneration, or set it to False."
            )
        super().__init__(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> ReformerMaskedLMOutput:
        r"""`labels`: (B, T) int64, -100 at tokens that were not masked. `logits` is None in training with labels."""
        kwargs.update(token_type_ids=token_type_ids, return_dict=True)
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        shape = given_shape(input_ids, inputs_embeds)
        check_label_shape(labels, shape)
        shard = self.model.shard(shape[1])
        loss, logits = self._loss_and_logits(outputs.last_hidden_state, labels, shard, num_items_in_batch)
        return self._head_output(ReformerMaskedLMOutput, outputs, loss, labels, num_items_in_batch, logits=logits)


def kept_tokens(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor, shard: SequenceShard | None) -> torch.Tensor:
    """Select the hidden states whose logits are needed, from all processes unless all logits are needed."""
    if shard is None or (isinstance(logits_to_keep, int) and logits_to_keep == 0):
        return slice_logits_to_keep(hidden, logits_to_keep)
    positions = torch.arange(shard.length, device=hidden.device).expand(hidden.shape[0], -1)[..., None]
    return tokens_at(hidden, slice_logits_to_keep(positions, logits_to_keep)[..., 0], shard)


ReformerModelWithLMHead = ReformerForCausalLM
