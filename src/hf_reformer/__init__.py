"""Reformer for Hugging Face transformers: long sequences on little memory."""

from .configuration_reformer import ReformerConfig
from .heads_text import (
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
)
from .language_models import ReformerForCausalLM, ReformerForMaskedLM, ReformerModelWithLMHead
from .modeling_reformer import ReformerModel, ReformerPreTrainedModel
from .pipelines import LongDocumentQuestionAnswering
from .registration import register
from .seq2seq import ReformerForConditionalGeneration
from .tokenization_reformer import ReformerByteTokenizer

__version__ = "0.1.0"

__all__ = [
    "LongDocumentQuestionAnswering",
    "ReformerByteTokenizer",
    "ReformerConfig",
    "ReformerForCausalLM",
    "ReformerForConditionalGeneration",
    "ReformerForMaskedLM",
    "ReformerForMultipleChoice",
    "ReformerForQuestionAnswering",
    "ReformerForSequenceClassification",
    "ReformerForTokenClassification",
    "ReformerModel",
    "ReformerModelWithLMHead",
    "ReformerPreTrainedModel",
    "register",
]

register()
