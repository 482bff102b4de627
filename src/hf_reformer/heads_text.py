"""Task heads for text: backbone, one projection, one loss each."""

import copy
from typing import Any

import torch
from torch import nn
from transformers.generation import GenerationMixin
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

from .cache import CACHE_NAME, adopt
from .configuration_reformer import ReformerConfig
from .losses import IGNORE, check_labels, chunked_cross_entropy, cross_entropy, with_coverage
from .modeling_reformer import ReformerModel, ReformerPreTrainedModel
from .outputs import (
    ReformerCausalLMOutput,
    ReformerMaskedLMOutput,
    ReformerMultipleChoiceOutput,
    ReformerQuestionAnsweringOutput,
    ReformerSequenceClassifierOutput,
    ReformerTokenClassifierOutput,
)
from .sharding import Shard, own_tokens, sum_of_shares, whole_sequence


class _LanguageModel(ReformerPreTrainedModel):
    """What causal and masked language models share: the head and its chunked loss.

    With `tie_word_embeddings`, `lm_head` has the weight of the embeddings, and reads both streams merged into one.
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

    def _loss_and_logits(self, hidden, targets, shard: Shard | None, num_items, logits_to_keep=0):
        """Hidden states of this process's tokens, (B, T, 2 D), and targets of all, or None.

        In training with targets the logits exist for a few tokens at a time and are not returned.
        """
        loss = logits = None
        every = isinstance(logits_to_keep, int) and logits_to_keep == 0
        hidden = self.merge_streams(hidden) if self.config.tie_word_embeddings else hidden
        if targets is None or not self.training:
            logits = self.lm_head(kept_tokens(hidden, logits_to_keep, shard))
        if targets is not None:
            targets = targets.to(hidden.device)
            check_labels(targets, self.config.vocab_size)  # of all processes' tokens: all raise, or none
            num_items = (targets != IGNORE).sum() if num_items is None else num_items
            own = own_tokens(targets, shard).reshape(-1)
            if logits is not None and every:
                loss = cross_entropy(logits.flatten(0, 1), own, num_items)
            else:
                chunk, size = self.config.chunk_size_lm_head, self.config.vocab_size
                loss = chunked_cross_entropy(hidden.flatten(0, 1), self.lm_head, own, size, chunk, num_items)
            loss = sum_of_shares(loss, shard)
        if logits is not None and every:
            logits = whole_sequence(logits, shard)
        return loss, logits


class ReformerForCausalLM(_LanguageModel, GenerationMixin):
    """Reformer with a language-model head. Always causal, whatever `config.is_decoder` says."""

    def __init__(self, config: ReformerConfig):
        if not config.is_decoder:
            config = copy.deepcopy(config)
            config.is_decoder = True
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
        **kwargs,
    ) -> ReformerCausalLMOutput:
        r"""
        Args:
            labels: (B, T) int64: the tokens themselves (shifting happens here), -100 for no target.
            logits_to_keep: compute the logits of the last so many positions (0: all), or of the given indices.
            num_items_in_batch: divide the summed loss by it (the Trainer's gradient accumulation).
            num_hashes, num_buckets: as `ReformerModel` takes them; named here, so that `generate` takes them, too.
            shift_labels: (B, T) int64: the target of every position, already shifted; instead of `labels`.

        Returns:
            ReformerCausalLMOutput. `logits` (B, T, vocab_size) is None in training with labels.
        """
        shift_labels = kwargs.pop("shift_labels", None)  # in the signature, Trainer would want it in evaluation
        kwargs.update(num_hashes=num_hashes, num_buckets=num_buckets, return_dict=True)
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        hidden, shape = outputs.last_hidden_state, given_shape(input_ids, inputs_embeds)
        check_label_shape(shift_labels if shift_labels is not None else labels, shape)
        targets: torch.Tensor | None = shift_labels
        if targets is None and labels is not None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
        shard = self.model.shard(shape[1])
        loss, logits = self._loss_and_logits(hidden, targets, shard, num_items_in_batch, logits_to_keep)
        weight = self.config.coverage_loss_weight
        return ReformerCausalLMOutput(
            loss=with_coverage(loss, outputs.coverage_loss, weight, targets, num_items_in_batch),
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            coverage_loss=outputs.coverage_loss,
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return True  # the library says no to whatever is called Reformer

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        """The library's choice of a cache with layers of ours; none for shared sequences: steps run all."""
        if self.model.sequence_group is not None:
            if "inputs_embeds" in model_kwargs:
                raise ValueError(
                    "generate(inputs_embeds=…) needs a cache, and shared sequences have none. Give `input_ids`."
                )
            generation_config.use_cache = False
        if generation_config.cache_implementation == "quantized":
            raise ValueError(
                'cache_implementation="quantized" cannot serve here: its tokens are read one by one, not all at once. '
                "Leave it out."
            )
        library: Any = super()
        library._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        if model_kwargs.get(CACHE_NAME) is not None:
            model_kwargs[CACHE_NAME] = adopt(model_kwargs[CACHE_NAME], self.config)
            if generation_config.is_assistant:  # what it guesses wrong is taken back
                model_kwargs[CACHE_NAME].activate_past_recording()

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(
            "continuous batching hands attention pages of keys that others wrote, without their hash buckets. Use "
            "`generate` with a batch padded on the left: every row comes out as it would alone."
        )


class ReformerForMaskedLM(_LanguageModel):
    """Reformer with a masked language-model head; needs `is_decoder=False`."""

    def __init__(self, config: ReformerConfig):
        if config.is_decoder:
            raise ValueError(
                "ReformerForMaskedLM fills in masked tokens from both sides, but `config.is_decoder=True` makes "
                "attention causal. Set it to False, or use ReformerForCausalLM."
            )
        if config.is_encoder_decoder:
            raise ValueError(
                "ReformerForMaskedLM is an encoder alone, but `config.is_encoder_decoder=True`, so a saved language "
                "model's head would be a decoder's. Use ReformerForConditionalGeneration, or set it to False."
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
        **kwargs,
    ) -> ReformerMaskedLMOutput:
        r"""`labels`: (B, T) int64, -100 where nothing was masked. `logits` is None in training with labels."""
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs)
        shape = given_shape(input_ids, inputs_embeds)
        check_label_shape(labels, shape)
        shard = self.model.shard(shape[1])
        loss, logits = self._loss_and_logits(outputs.last_hidden_state, labels, shard, num_items_in_batch)
        weight = self.config.coverage_loss_weight
        return ReformerMaskedLMOutput(
            loss=with_coverage(loss, outputs.coverage_loss, weight, labels, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            coverage_loss=outputs.coverage_loss,
        )


class ClassificationHead(nn.Module):
    """Dropout, dense, tanh, dropout, projection: (B, 2 D) → (B, classes)."""

    def __init__(self, config: ReformerConfig, classes: int):
        super().__init__()
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.dense = nn.Linear(2 * config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(x)))))


class ReformerForSequenceClassification(ReformerPreTrainedModel):
    """Reformer with a classification or regression head over the pooled sequence (`config.classifier_pooling`)."""

    accepts_loss_kwargs = False  # the loss is a mean over rows

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ReformerModel(config)
        self.classifier = ClassificationHead(config, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs,
    ) -> ReformerSequenceClassifierOutput:
        r"""`labels`: (B) int64 classes, (B) or (B, num_labels) floats for regression or several labels a row."""
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs)
        shard = self.model.shard(given_shape(input_ids, inputs_embeds)[1])
        logits = self.classifier(pool(outputs.last_hidden_state, attention_mask, self.config.pooling, shard))
        loss = None if labels is None else _classification_loss(self.config, logits, labels.to(logits.device))
        return ReformerSequenceClassifierOutput(
            loss=with_coverage(loss, outputs.coverage_loss, self.config.coverage_loss_weight),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            coverage_loss=outputs.coverage_loss,
        )


class ReformerForTokenClassification(ReformerPreTrainedModel):
    """Reformer with a classifier on every token."""

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ReformerModel(config)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)
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
        **kwargs,
    ) -> ReformerTokenClassifierOutput:
        r"""`labels`: (B, T) int64, -100 for no target."""
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs)
        shard = self.model.shard(given_shape(input_ids, inputs_embeds)[1])
        logits = whole_sequence(self.classifier(self.dropout(outputs.last_hidden_state)), shard)
        check_label_shape(labels, logits.shape[:2])
        loss = None
        if labels is not None:
            loss = cross_entropy(logits.flatten(0, 1), labels.reshape(-1).to(logits.device), num_items_in_batch)
        weight = self.config.coverage_loss_weight
        return ReformerTokenClassifierOutput(
            loss=with_coverage(loss, outputs.coverage_loss, weight, labels, num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            coverage_loss=outputs.coverage_loss,
        )


class ReformerForQuestionAnswering(ReformerPreTrainedModel):
    """Reformer with a span head: scores of every token as start and as end of the answer."""

    accepts_loss_kwargs = False  # the loss is a mean over rows

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.model = ReformerModel(config)
        self.qa_outputs = nn.Linear(2 * config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        **kwargs,
    ) -> ReformerQuestionAnsweringOutput:
        r"""`start_positions`, `end_positions`: (B) int64; a position outside the input (cut away) or on padding is no
        target. Logits of padding are as low as the dtype goes."""
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, return_dict=True, **kwargs)
        shard = self.model.shard(given_shape(input_ids, inputs_embeds)[1])
        scores = whole_sequence(self.qa_outputs(outputs.last_hidden_state), shard)  # (B, T, 2)
        real = torch.ones_like(scores[..., 0], dtype=torch.bool)
        if attention_mask is not None:  # an answer neither begins nor ends on padding: its width changes no loss
            real = (attention_mask != 0).to(scores.device)
            scores = scores.masked_fill(~real[..., None], torch.finfo(scores.dtype).min)
        start_logits, end_logits = scores.unbind(-1)
        if (start_positions is None) != (end_positions is None):
            raise ValueError("Give both `start_positions` and `end_positions`, or neither.")
        loss = None
        if start_positions is not None and end_positions is not None:
            pairs = ((start_logits, start_positions), (end_logits, end_positions))
            loss = sum(cross_entropy(logits, _inside(positions, real)) for logits, positions in pairs) / 2
        return ReformerQuestionAnsweringOutput(
            loss=with_coverage(loss, outputs.coverage_loss, self.config.coverage_loss_weight),
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            coverage_loss=outputs.coverage_loss,
        )


class ReformerForMultipleChoice(ReformerPreTrainedModel):
    """Reformer that scores every choice of a question and picks among them."""

    accepts_loss_kwargs = False  # the loss is a mean over questions

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.model = ReformerModel(config)
        self.classifier = ClassificationHead(config, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        **kwargs,
    ) -> ReformerMultipleChoiceOutput:
        r"""Inputs are (B, choices, T); `labels`: (B) int64, the index of the right choice."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        wanted = 3 if inputs_embeds is None else 4
        if given is None or given.dim() != wanted:
            found = None if given is None else tuple(given.shape)
            raise ValueError(f"Multiple choice needs inputs of shape (batch, choices, length, …), found {found}.")
        choices = given.shape[1]
        flat = [
            None if x is None else x.flatten(0, 1) for x in (input_ids, attention_mask, position_ids, inputs_embeds)
        ]
        outputs = self.model(*flat, return_dict=True, **kwargs)
        shard = self.model.shard(given.shape[2])
        pooled = pool(outputs.last_hidden_state, flat[1], self.config.pooling, shard)
        logits = self.classifier(pooled).view(-1, choices)
        loss = None if labels is None else cross_entropy(logits, labels.to(logits.device))
        return ReformerMultipleChoiceOutput(
            loss=with_coverage(loss, outputs.coverage_loss, self.config.coverage_loss_weight),
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            coverage_loss=outputs.coverage_loss,
        )


def given_shape(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Size:
    """(B, T) of the input; what there is of it was checked by the backbone."""
    return (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]


def pool(
    hidden: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str, shard: Shard | None = None
) -> torch.Tensor:
    """(B, T, D) → (B, D): mean over the real tokens, or the last or first real one; of all processes' tokens.

    A row without a real token gives 0 (mean), or its last or first token.
    """
    rows, length = hidden.shape[0], hidden.shape[1] if shard is None else shard.length
    mask = hidden.new_ones(rows, length) if attention_mask is None else (attention_mask != 0).to(hidden.device)
    mask = mask.to(torch.promote_types(hidden.dtype, torch.float32))  # half precision cannot count a long sequence
    if pooling == "mean":
        weights = own_tokens(mask / mask.sum(-1, keepdim=True).clamp(min=1), shard)
        return sum_of_shares((hidden * weights[..., None]).sum(1), shard).to(hidden.dtype)
    place = mask.argmax(-1) if pooling == "first" else length - 1 - mask.flip(-1).argmax(-1)  # (B)
    return tokens_at(hidden, place[:, None], shard)[:, 0]


def tokens_at(hidden: torch.Tensor, places: torch.Tensor, shard: Shard | None) -> torch.Tensor:
    """(B, own tokens, D) and places (B, N) in the whole sequence → (B, N, D), on every process."""
    begin, end = (0, hidden.shape[1]) if shard is None else (shard.begin, shard.end)
    found = hidden.gather(1, (places - begin).clamp(0, end - begin - 1)[..., None].expand(-1, -1, hidden.shape[2]))
    if shard is None:
        return found
    mine = (places >= begin) & (places < end)
    return sum_of_shares(torch.where(mine[..., None], found, 0), shard)


def kept_tokens(hidden: torch.Tensor, logits_to_keep: int | torch.Tensor, shard: Shard | None) -> torch.Tensor:
    """The hidden states whose logits are wanted; of several processes, unless all are wanted."""
    if shard is None or (isinstance(logits_to_keep, int) and logits_to_keep == 0):
        return slice_logits_to_keep(hidden, logits_to_keep)
    places = torch.arange(shard.length, device=hidden.device).expand(hidden.shape[0], -1)[..., None]
    return tokens_at(hidden, slice_logits_to_keep(places, logits_to_keep)[..., 0], shard)


def _classifier_dropout(config: ReformerConfig) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


def _classification_loss(config: ReformerConfig, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """By `config.problem_type`, or else by the number of labels and the labels' dtype. The config is not changed."""
    kind = config.problem_type
    if kind is None and config.num_labels == 1:
        kind = "regression"
    elif kind is None:
        kind = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    if kind == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1))
    shape = logits.shape
    if labels.numel() != logits.numel():
        raise ValueError(f"labels have shape {tuple(labels.shape)}; {kind} with logits {tuple(shape)} needs the same.")
    labels = labels.view(shape).to(logits.dtype)
    if kind == "regression":
        return nn.functional.mse_loss(logits, labels)
    return nn.functional.binary_cross_entropy_with_logits(logits, labels)


def _inside(positions: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """(B) targets of a span head, -100 where they lie outside the input, or on what is not `real`, (B, T) bool."""
    positions = positions.reshape(-1).to(real.device)
    check_label_shape(positions, real.shape[:1])
    inside = (positions >= 0) & (positions < real.shape[1])
    nearest = positions.long().clamp(0, real.shape[1] - 1)
    return torch.where(inside & real.gather(1, nearest[:, None])[:, 0], positions, IGNORE)


def check_label_shape(labels: torch.Tensor | None, shape: torch.Size) -> None:
    if labels is not None and labels.shape != shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, but there is a target for each of {tuple(shape)}.")


ReformerModelWithLMHead = ReformerForCausalLM
