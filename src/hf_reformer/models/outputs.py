"""What models return: the library's own output classes, and the coverage loss of every layer."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import (
    BaseModelOutputWithPastAndCrossAttentions,
    CausalLMOutputWithPast,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from ..layers.forward_context import Sorting

# In each: `coverage_loss` (layers), `coverage.coverage_loss` of every layer, without `config.coverage_loss_weight`.


@dataclass
class ReformerModelOutput(BaseModelOutputWithPastAndCrossAttentions):
    """Of the backbone, and of a decoder; `attention_mass` and `sorting`: of every layer, as `ReformerModel` says."""

    coverage_loss: torch.Tensor | None = None
    attention_mass: tuple[torch.Tensor, ...] | None = None
    sorting: tuple[Sorting, ...] | None = None


@dataclass
class ReformerCausalLMOutput(CausalLMOutputWithPast):
    coverage_loss: torch.Tensor | None = None


@dataclass
class ReformerMaskedLMOutput(MaskedLMOutput):
    coverage_loss: torch.Tensor | None = None


@dataclass
class ReformerSequenceClassifierOutput(SequenceClassifierOutput):
    coverage_loss: torch.Tensor | None = None


@dataclass
class ReformerTokenClassifierOutput(TokenClassifierOutput):
    coverage_loss: torch.Tensor | None = None


@dataclass
class ReformerQuestionAnsweringOutput(QuestionAnsweringModelOutput):
    coverage_loss: torch.Tensor | None = None


@dataclass
class ReformerMultipleChoiceOutput(MultipleChoiceModelOutput):
    coverage_loss: torch.Tensor | None = None


@dataclass
class ReformerSeq2SeqLMOutput(Seq2SeqLMOutput):
    coverage_loss: torch.Tensor | None = None
