"""Reformer for Hugging Face transformers: long sequences with little memory."""

from .analysis.memory import MemoryEstimate, estimate_memory
from .configuration_reformer import ReformerConfig
from .hub.pipelines import LongDocumentQuestionAnswering
from .hub.registration import register
from .models.heads_image import ReformerForImageClassification
from .models.heads_speech import ReformerForAudioClassification, ReformerForCTC
from .models.heads_text import (
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
)
from .models.heads_time_series import ReformerForTimeSeriesPrediction
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
    "ReformerForAudioClassification",
    "ReformerForCTC",
    "ReformerForCausalLM",
    "ReformerForConditionalGeneration",
    "ReformerForImageClassification",
    "ReformerForMaskedLM",
    "ReformerForMultipleChoice",
    "ReformerForQuestionAnswering",
    "ReformerForSequenceClassification",
    "ReformerForTimeSeriesPrediction",
    "ReformerForTokenClassification",
    "ReformerModel",
    "ReformerModelWithLMHead",
    "ReformerPreTrainedModel",
    "estimate_memory",
    "register",
]

register()
register_moved_modules()
