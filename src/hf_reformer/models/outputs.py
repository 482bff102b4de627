"""Model outputs: transformers' output classes plus the coverage loss of every layer."""

from dataclasses import dataclass

import torch
from transformers import modeling_outputs
from transformers.utils import ModelOutput

from ..layers.forward_context import Sorting

# In all classes, `coverage_loss` (layers) is the unweighted `coverage.coverage_loss` of every layer.


@dataclass
class ReformerModelOutput(modeling_outputs.BaseModelOutputWithPastAndCrossAttentions):
    """Output of the backbone or a decoder; `attention_mass` and `sorting` have one entry per layer."""

    coverage_loss: torch.Tensor | None = None
    attention_mass: tuple[torch.Tensor, ...] | None = None
    sorting: tuple[Sorting, ...] | None = None


@dataclass
class ReformerCausalLMOutput(modeling_outputs.CausalLMOutputWithPast):
    coverage_loss: torch.Tensor | None = None


@dataclass
class ReformerMaskedLMOutput(modeling_outputs.MaskedLMOutput):
    coverage_loss: torch.Tensor | None = None


@dataclass
class ReformerSequenceClassifierOutput(modeling_outputs.SequenceClassifierOutput):
    coverage_loss: torch.Tensor | None = None


@dataclass
class ReformerTokenClassifierOutput(modeling_outputs.TokenClassifierOutput):
    coverage_loss: torch.Tensor | None = None


@dataclass
class ReformerQuestionAnsweringOutput(modeling_outputs.QuestionAnsweringModelOutput):
    coverage_loss: torch.Tensor | None = None


@dataclass
class ReformerMultipleChoiceOutput(modeling_outputs.MultipleChoiceModelOutput):
    coverage_loss: torch.Tensor | None = None


@dataclass
class ReformerCTCOutput(modeling_outputs.CausalLMOutput):
    coverage_loss: torch.Tensor | None = None


@dataclass
class ReformerImageClassifierOutput(modeling_outputs.ImageClassifierOutput):
    coverage_loss: torch.Tensor | None = None


@dataclass
class ReformerTimeSeriesOutput(ModelOutput):
    """Output of `ReformerForTimeSeriesPrediction` for P predicted steps, and S series if the past has a series axis.

    `prediction_outputs`: (B, P[, S]) forecasts, the means of the distributions, in the units of the data. `params`:
    distribution parameters, (B, P[, S]) each, of the values minus `loc` divided by `scale`, both (B, 1[, S]).
    """

    loss: torch.Tensor | None = None
    prediction_outputs: torch.Tensor | None = None
    params: tuple[torch.Tensor, ...] | None = None
    loc: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    coverage_loss: torch.Tensor | None = None


@dataclass
class ReformerSeq2SeqLMOutput(modeling_outputs.Seq2SeqLMOutput):
    coverage_loss: torch.Tensor | None = None
