"""Task heads for text other than language models: each has a backbone, a classifier and a loss."""

from typing import Any

import torch
from torch import nn
from transformers.utils import can_return_tuple

from ..configuration_reformer import ReformerConfig
from ..ops.sequence_parallel import SequenceShard, all_reduce, gather_sequence, local_tokens, tokens_at
from .input_checks import given_shape
from .losses import IGNORE, check_label_shape, cross_entropy
from .modeling_reformer import ReformerModel
from .outputs import (
    ReformerMultipleChoiceOutput,
    ReformerQuestionAnsweringOutput,
    ReformerSequenceClassifierOutput,
    ReformerTokenClassifierOutput,
)
from .pretrained import ReformerPreTrainedModel


class ClassificationHead(nn.Module):
    """Dropout, dense, tanh, dropout, projection: (B, 2 D) → (B, classes)."""

    def __init__(self, config: ReformerConfig, classes: int):
        super().__init__()
        self.dropout = nn.Dropout(classifier_dropout(config))
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
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> ReformerSequenceClassifierOutput:
        r"""`labels`: (B) int64 classes; floats, (B) or (B, num_labels), for regression or multi-label tasks."""
        kwargs.update(token_type_ids=token_type_ids, return_dict=True)
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        shard = self.model.shard(given_shape(input_ids, inputs_embeds)[1])
        logits = self.classifier(pool(outputs.last_hidden_state, attention_mask, self.config.pooling, shard))
        loss = None if labels is None else classification_loss(self.config, logits, labels.to(logits.device))
        return self._head_output(ReformerSequenceClassifierOutput, outputs, loss, logits=logits)


class ReformerForTokenClassification(ReformerPreTrainedModel):
    """Reformer with a classification head on every token."""

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ReformerModel(config)
        self.dropout = nn.Dropout(classifier_dropout(config))
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
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> ReformerTokenClassifierOutput:
        r"""`labels`: (B, T) int64, -100 for no target."""
        kwargs.update(token_type_ids=token_type_ids, return_dict=True)
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        shard = self.model.shard(given_shape(input_ids, inputs_embeds)[1])
        logits = gather_sequence(self.classifier(self.dropout(outputs.last_hidden_state)), shard)
        check_label_shape(labels, logits.shape[:2])
        loss = None
        if labels is not None:
            loss = cross_entropy(logits.flatten(0, 1), labels.reshape(-1).to(logits.device), num_items_in_batch)
        items = num_items_in_batch
        return self._head_output(ReformerTokenClassifierOutput, outputs, loss, labels, items, logits=logits)


class ReformerForQuestionAnswering(ReformerPreTrainedModel):
    """Reformer with a span head that scores every token as start and as end of the answer."""

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
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> ReformerQuestionAnsweringOutput:
        r"""`start_positions`, `end_positions`: (B) int64; positions outside the input (truncated) or on padding are
        ignored. Logits at padding are the lowest number of the dtype."""
        kwargs.update(token_type_ids=token_type_ids, return_dict=True)
        outputs = self.model(input_ids, attention_mask, position_ids, inputs_embeds, **kwargs)
        shard = self.model.shard(given_shape(input_ids, inputs_embeds)[1])
        scores = gather_sequence(self.qa_outputs(outputs.last_hidden_state), shard)  # (B, T, 2)
        real = torch.ones_like(scores[..., 0], dtype=torch.bool)
        if attention_mask is not None:  # no answer starts or ends on padding, so its length does not affect the loss
            real = (attention_mask != 0).to(scores.device)
            scores = scores.masked_fill(~real[..., None], torch.finfo(scores.dtype).min)
        logits = {"start_logits": scores[..., 0], "end_logits": scores[..., 1]}
        if (start_positions is None) != (end_positions is None):
            raise ValueError("Give both `start_positions` and `end_positions`, or neither.")
        loss = None
        if start_positions is not None and end_positions is not None:
            if not real.shape[1]:
                raise ValueError(
                    "The inputs hold no token, so they contain no answer. Leave such rows out of training."
                )
            start_loss = cross_entropy(logits["start_logits"], _inside(start_positions, real))
            loss = (start_loss + cross_entropy(logits["end_logits"], _inside(end_positions, real))) / 2
        return self._head_output(ReformerQuestionAnsweringOutput, outputs, loss, **logits)


class ReformerForMultipleChoice(ReformerPreTrainedModel):
    """Reformer with a head that scores every choice of a question."""

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
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> ReformerMultipleChoiceOutput:
        r"""Inputs are (B, choices, T); `labels`: (B) int64, the index of the correct choice."""
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is None or inputs.dim() != (3 if inputs_embeds is None else 4):
            shape = None if inputs is None else tuple(inputs.shape)
            raise ValueError(f"Multiple choice needs inputs of shape (batch, choices, length, …), found {shape}.")
        tensors = (input_ids, attention_mask, position_ids, inputs_embeds, token_type_ids)
        *flat, types = [None if x is None else x.flatten(0, 1) for x in tensors]
        outputs = self.model(*flat, token_type_ids=types, return_dict=True, **kwargs)
        pooled = pool(outputs.last_hidden_state, flat[1], self.config.pooling, self.model.shard(inputs.shape[2]))
        logits = self.classifier(pooled).view(inputs.shape[:2])
        loss = None if labels is None else cross_entropy(logits, labels.to(logits.device))
        return self._head_output(ReformerMultipleChoiceOutput, outputs, loss, logits=logits)


def pool(
    hidden: torch.Tensor, attention_mask: torch.Tensor | None, pooling: str, shard: SequenceShard | None = None
) -> torch.Tensor:
    """Pool (B, T, D) to (B, D): the mean of the real tokens of all processes, or the last or first one.

    The result is 0 for a sequence without real tokens, regardless of its padding.
    """
    batch, length = hidden.shape[0], hidden.shape[1] if shard is None else shard.length
    mask = hidden.new_ones(batch, length) if attention_mask is None else (attention_mask != 0).to(hidden.device)
    mask = mask.to(torch.promote_types(hidden.dtype, torch.float32))  # half precision cannot count long sequences
    if pooling == "mean":
        weights = local_tokens(mask / mask.sum(-1, keepdim=True).clamp(min=1), shard)
        return all_reduce((hidden * weights[..., None]).sum(1), shard).to(hidden.dtype)
    if length == 0:
        return hidden.sum(1)
    position = mask.argmax(-1) if pooling == "first" else length - 1 - mask.flip(-1).argmax(-1)  # (B)
    pooled = tokens_at(hidden, position[:, None], shard)[:, 0]
    return pooled if attention_mask is None else torch.where(mask.any(-1, keepdim=True), pooled, 0)


def classifier_dropout(config: ReformerConfig) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


def classification_loss(config: ReformerConfig, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the loss for `config.problem_type`; if None, by `num_labels` and dtype. Does not change the config."""
    several = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    kind = config.problem_type or ("regression" if config.num_labels == 1 else several)
    if kind == "single_label_classification":
        return cross_entropy(logits, labels.reshape(-1))
    shape = tuple(logits.shape)
    if labels.numel() != logits.numel():
        raise ValueError(f"labels have shape {tuple(labels.shape)}, but {kind} needs that of the logits, {shape}.")
    loss = nn.functional.mse_loss if kind == "regression" else nn.functional.binary_cross_entropy_with_logits
    return loss(logits, labels.view(shape).to(logits.dtype))


def _inside(positions: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Return the targets of a span head, (B), -100 if outside the input or on padding; `real`: (B, T) bool."""
    positions = positions.reshape(-1).to(real.device)
    check_label_shape(positions, real.shape[:1])
    length = real.shape[1]
    nearest = torch.where(positions >= 0, positions.long(), length).clamp(max=length)
    real = torch.cat([real, torch.zeros_like(positions, dtype=torch.bool)[:, None]], dim=1)  # past the end is not real
    inside = real.gather(1, nearest[:, None])[:, 0]
    return torch.where(inside, positions, IGNORE)
