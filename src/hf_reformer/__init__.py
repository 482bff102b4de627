"""Reformer for Hugging Face transformers: long sequences on little memory."""

from .analysis.memory import MemoryEstimate, estimate_memory
from .configuration_reformer import ReformerConfig
from .hub.pipelines import LongDocumentQuestionAnswering
from .hub.registration import register
from .models.heads_text import (
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
)
from .models.language_models import ReformerForCausalLM, ReformerForMaskedLM, ReformerModelWithLMHead
from .models.modeling_reformer import ReformerModel
from .models.pretrained import ReformerPreTrainedModel
from .models.seq2seq import ReformerForConditionalGeneration
from .moved import register_moved_modules
from .tokenization_reformer import ReformerByteTokenizer

__version__ = "0.2.0"

__all__ = [
    "LongDocumentQuestionAnswering",
    "MemoryEstimate",
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
    "estimate_memory",
    "register",
]

register()
register_moved_modules()
