"""Register our models with transformers' Auto classes.

Auto classes fall back to comparing config classes by name, and transformers' own Reformer also has a `ReformerConfig`.
So ours must be registered with every Auto class that supports the built-in; otherwise an Auto class would build the
built-in's head from our config.
"""

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..compat import register_model_name
from ..configuration_reformer import ReformerConfig
from ..models.heads_image import ReformerForImageClassification
from ..models.heads_speech import ReformerForAudioClassification, ReformerForCTC
from ..models.heads_text import (
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
)
from ..models.heads_time_series import ReformerForTimeSeriesPrediction
from ..models.language_models import ReformerForCausalLM, ReformerForMaskedLM
from ..models.modeling_reformer import ReformerModel
from ..models.seq2seq import ReformerForConditionalGeneration
from ..tokenization_reformer import ReformerByteTokenizer
from .peft_targets import register_adapters
from .pipelines import register_pipelines
from .signal_pipelines import register_signal_pipelines

AUTO_CLASSES = {
    transformers.AutoModel: ReformerModel,
    transformers.AutoModelForAudioClassification: ReformerForAudioClassification,
    transformers.AutoModelForCTC: ReformerForCTC,
    transformers.AutoModelForCausalLM: ReformerForCausalLM,
    transformers.AutoModelForImageClassification: ReformerForImageClassification,
    transformers.AutoModelForMaskedLM: ReformerForMaskedLM,
    transformers.AutoModelForMultipleChoice: ReformerForMultipleChoice,
    transformers.AutoModelForPreTraining: ReformerForCausalLM,
    transformers.AutoModelForQuestionAnswering: ReformerForQuestionAnswering,
    transformers.AutoModelForSeq2SeqLM: ReformerForConditionalGeneration,
    transformers.AutoModelForSequenceClassification: ReformerForSequenceClassification,
    transformers.AutoModelForTextEncoding: ReformerModel,
    transformers.AutoModelForTimeSeriesPrediction: ReformerForTimeSeriesPrediction,
    transformers.AutoModelForTokenClassification: ReformerForTokenClassification,
}
MODEL_CLASSES = {cls.__name__: cls for cls in AUTO_CLASSES.values()}


def register(replace_builtin: bool = False) -> None:
    """Make `AutoConfig`, `AutoModel…` and `AutoTokenizer` return our classes for `model_type: hf_reformer`.

    Importing the package calls this; calling it again has no effect. Configs, models and tokenizers of transformers'
    own Reformer still use the built-in classes. Also registers our models' default targets with peft, and
    pipelines for question answering and for audio without ffmpeg.

    Args:
        replace_builtin: in this process, also return our classes for checkpoints with `model_type: reformer`. A
            config object of the built-in class still yields the built-in model.
    """
    transformers.AutoConfig.register(ReformerConfig.model_type, ReformerConfig, exist_ok=True)
    transformers.AutoTokenizer.register(ReformerConfig, tokenizer_class=ReformerByteTokenizer, exist_ok=True)
    for auto_class, model_class in AUTO_CLASSES.items():
        auto_class.register(ReformerConfig, model_class, exist_ok=True)
        # Code that looks up in the tables whether a model type is sequence-to-sequence, such as lm-eval, applies the
        # answer to all its models. Ours are causal; encoder-decoders are identified by `architectures`.
        seq2seq = auto_class is transformers.AutoModelForSeq2SeqLM
        name = f"{ReformerConfig.model_type}_encoder_decoder" if seq2seq else ReformerConfig.model_type
        register_model_name(auto_class, name, model_class.__name__)
    register_adapters()
    register_pipelines()
    register_signal_pipelines()
    if replace_builtin:
        CONFIG_MAPPING.register("reformer", ReformerConfig, exist_ok=True)  # `AutoConfig.register` requires our type
