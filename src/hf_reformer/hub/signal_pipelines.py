"""transformers' audio pipelines for our models: files are read with soundfile, and any sampling rate is accepted.

transformers' own versions need ffmpeg for files and torchaudio for resampling. Other models are unaffected.
"""

from typing import Any

from transformers.pipelines import AudioClassificationPipeline, AutomaticSpeechRecognitionPipeline

from ..compat import pipeline_entry, register_pipeline_task
from ..configuration_reformer import ReformerConfig
from .audio import waveform


class SpeechRecognition(AutomaticSpeechRecognitionPipeline):
    """The `"automatic-speech-recognition"` pipeline: one pass for any length, unless `chunk_length_s` is given."""

    def _sanitize_parameters(self, **kwargs: Any) -> Any:
        config: Any = self.model.config
        wanted = [name for name in ("chunk_length_s", "return_timestamps") if kwargs.get(name)]
        if wanted and config.model_type == ReformerConfig.model_type and config.num_input_features > 1:
            raise ValueError(
                f"`{wanted[0]}` counts samples, but each input feature of this model covers many samples. "
                "Leave it out: a recording of any length is transcribed in one pass."
            )
        return super()._sanitize_parameters(**kwargs)

    def preprocess(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if _reads(self.model, inputs):
            rate, heard = self.feature_extractor.sampling_rate, {}
            if isinstance(inputs, dict) and inputs.get("stride") is not None:
                ratio = rate / inputs.get("sampling_rate", rate)
                heard["stride"] = tuple(round(samples * ratio) for samples in inputs["stride"])
            inputs = {"raw": waveform(inputs, rate), "sampling_rate": rate, **heard}
        yield from super().preprocess(inputs, *args, **kwargs)


class AudioClassification(AudioClassificationPipeline):
    """The `"audio-classification"` pipeline."""

    def preprocess(self, inputs: Any) -> Any:
        if _reads(self.model, inputs):
            inputs = waveform(inputs, self.feature_extractor.sampling_rate)
        return super().preprocess(inputs)


def register_signal_pipelines() -> None:
    """Make `pipeline` use these classes for their tasks. Calling it again has no effect."""
    for task, ours in (
        ("automatic-speech-recognition", SpeechRecognition),
        ("audio-classification", AudioClassification),
    ):
        register_pipeline_task(task, {**pipeline_entry(task), "impl": ours})


def _reads(model: Any, inputs: Any) -> bool:
    """Return whether the model is one of ours and the recording is not a URL, which transformers handles."""
    on_the_web = isinstance(inputs, str) and inputs.startswith(("http://", "https://"))
    return model.config.model_type == ReformerConfig.model_type and not on_the_web
