"""Model cards: README.md files generated from a model's config and the Trainer's state."""

import inspect
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from .registration import AUTO_CLASSES

TEMPLATE = Path(__file__).with_name("model_card_template.md")
PIPELINE_TAGS = {
    "AutoModel": "feature-extraction",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTimeSeriesPrediction": "time-series-forecasting",
    "AutoModelForTokenClassification": "token-classification",
}
SIGNAL_TAGS = {
    "audio-classification",
    "automatic-speech-recognition",
    "image-classification",
    "time-series-forecasting",
}
LAYER_NUMBERS = "attention_found|bucket_entropy|fullest_bucket|received_entropy|reached_share"  # logged by callbacks
NON_METRICS = re.compile(rf"(.*_)?(runtime|({LAYER_NUMBERS})(_layer_\d+)?)|.*_per_second|.*_time")
RESERVED_FIELDS = {"library_name", "pipeline_tag", "model_name", "eval_results", "ignore_metadata_errors"}
MOST_SCORES = 100  # per evaluation
FIELDS = {
    name for name, field in inspect.signature(ModelCardData).parameters.items() if field.kind == field.KEYWORD_ONLY
} - RESERVED_FIELDS


class Evaluation(NamedTuple):
    """Scores of one evaluation by the Trainer. `final`: it ran after training, on the final weights."""

    step: int
    scores: dict[str, float]
    final: bool


def evaluations(history: list[dict[str, Any]]) -> list[Evaluation]:
    """Return all evaluations in a `log_history`, in order; those on several datasets at one step are merged."""
    found: list[Evaluation] = []
    final = False
    for entry in history:
        final = final or "train_runtime" in entry
        scores = {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
        scores = {name: value for name, value in scores.items() if not NON_METRICS.fullmatch(name)}
        scores = {_in_a_cell(name): value for name, value in scores.items() if _is_score(value)}
        if not scores:
            continue
        if found and (found[-1].step, found[-1].final) == (entry["step"], final):
            scores = found.pop().scores | scores
        found.append(Evaluation(int(entry["step"]), dict(list(scores.items())[:MOST_SCORES]), final))
    return found


def _in_a_cell(name: str) -> str:
    """Sanitize a metric's name to one line of plain text: records are untrusted, and a card is a web page."""
    return " ".join(re.sub(r"[^\w@%.,:;/()=+-]+", " ", name).split())[:80]


def _is_score(value: Any) -> bool:
    """Return whether a logged value is a number that a card can show."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not abs(value) >= 10**300


def evaluation_of_weights(state: TrainerState, found: list[Evaluation]) -> Evaluation | None:
    """Return the evaluation of the weights saved with the state, or None if there is none or it is ambiguous.

    This is an evaluation after training, or at the last step. If training has ended and an earlier step was better,
    the Trainer may have loaded that step (`load_best_model_at_end`), which it does not record.
    """
    if not found:
        return None
    last = found[-1]
    finished = any("train_runtime" in entry for entry in state.log_history)
    maybe_reloaded = finished and state.best_global_step not in (None, state.global_step)
    return last if last.final or (last.step == state.global_step and not maybe_reloaded) else None


def table(found: list[Evaluation], weights: Evaluation | None, best_step: int | None) -> str:
    """Make a Markdown table of the evaluation of these weights, the best one during training, and the last one."""
    best = next((x for x in found if x.step == best_step and not x.final), None)
    rows: dict[int, list[str]] = {}
    for name, evaluation in (("these weights", weights), ("best", best), ("last", found[-1])):
        if evaluation:
            rows.setdefault(found.index(evaluation), []).append(name)
    names = list(dict.fromkeys(name for number in rows for name in found[number].scores))
    lines = [f"| | step | {' | '.join(names)} |", "|:--|--:|" + "--:|" * len(names)]
    for number, what in rows.items():
        scores = [found[number].scores.get(name, "") for name in names]
        cells = [f"{score:.4g}" if isinstance(score, float) else str(score) for score in scores]
        lines.append(f"| {', '.join(what)} | {found[number].step} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _in_a_line(text: str) -> str:
    return " ".join(text.split())


def _listed(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def example_inputs(config: Any, task: str) -> str | None:
    """Return Python code for random inputs of a signal model; None for other models."""
    shapes: dict[str, tuple[int, ...]] = {}
    if task in ("audio-classification", "automatic-speech-recognition"):
        features = config.num_input_features
        shapes = {"input_values": (1, 16000)} if features == 1 else {"input_features": (1, 1000, features)}
    elif task == "image-classification":
        side = 28 if config.grid_width is None else config.grid_width * config.patch_size
        shapes = {"pixel_values": (1, config.num_channels, side, side)}
    elif task == "time-series-forecasting":
        series = config.input_size if config.series_mean is None else len(config.series_mean)
        shapes = {"past_values": (1, config.context_length, series)}
        if config.num_time_features:
            shapes["past_time_features"] = (1, config.context_length, config.num_time_features)
            shapes["future_time_features"] = (1, config.prediction_length, config.num_time_features)
    return ", ".join(f"{name}=torch.randn{shape}" for name, shape in shapes.items()) or None


def check_metadata(metadata: Mapping[str, Any]) -> None:
    """Raise ValueError for metadata that the Hub would reject."""
    if unknown := sorted(set(metadata) - FIELDS):
        raise ValueError(f"A model card has no field {', '.join(unknown)}. Its fields: {', '.join(sorted(FIELDS))}.")
    for language in _listed(metadata.get("language")):
        if not re.fullmatch(r"[a-z]{2,3}|code|multilingual", language):
            raise ValueError(f"`language={language!r}` is no code of ISO 639 like 'en', nor 'multilingual' or 'code'.")
    for license in _listed(metadata.get("license")):
        if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
            raise ValueError(
                f"`license={license!r}` is no identifier of the Hub's list, such as 'apache-2.0'. For another license "
                "pass license='other' with `license_name` and `license_link`."
            )
    if metadata.get("license") == "other" and not (metadata.get("license_name") and metadata.get("license_link")):
        raise ValueError("`license='other'` needs `license_name` and `license_link`.")
    for field in ("datasets", "base_model"):
        for name in _listed(metadata.get(field)):
            try:
                validate_repo_id(name)
            except ValueError as error:
                raise ValueError(f"`{field}` must name repositories of the Hub. {error}") from error


def model_card(
    model: PreTrainedModel,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    state: TrainerState | None = None,
    *,
    with_code: bool = True,
    dataset_name: str | None = None,
    training: Mapping[str, Any] | None = None,
    notes: str | None = None,
    **metadata: Any,
) -> ModelCard:
    """Make the card of a model; `card.save(path)` writes it.

    Args:
        model: one of our models.
        name: the Hub repository or directory that the example loads.
        tokenizer: the tokenizer for the example.
        state: `trainer.state`, the source of all scores.
        with_code: whether the modeling code is exported with the model.
        dataset_name: display name of the evaluation dataset. The metadata include scores if this or `datasets` is
            given.
        training: training settings to list. Default: those in `state`.
        notes: Markdown to append to the card.
        metadata: fields of `huggingface_hub.ModelCardData`, such as `language`, `license`, `datasets`, `base_model`,
            `tags`.

    Raises:
        ValueError: the Hub would reject the metadata, or the model is not one of ours.
    """
    check_metadata(metadata)
    auto_class = next((auto.__name__ for auto, ours in AUTO_CLASSES.items() if isinstance(model, ours)), None)
    if auto_class is None:
        raise ValueError(f"{type(model).__name__} is not one of hf_reformer's models.")
    task, title = PIPELINE_TAGS[auto_class], _in_a_line(name.split("/")[-1])
    found = evaluations(state.log_history) if state is not None else []
    weights = evaluation_of_weights(state, found) if state is not None else None
    datasets = _listed(metadata.get("datasets"))
    dataset_name = _in_a_line(dataset_name or ", ".join(datasets))
    identifier = datasets[0] if len(datasets) == 1 else re.sub(r"\W+", "-", dataset_name).strip("-").lower()
    results = [
        EvalResult(task, identifier, dataset_name, metric_type=metric, metric_value=value)
        for metric, value in (weights.scores if weights and dataset_name else {}).items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    ]
    metadata["tags"] = list(dict.fromkeys(["reformer", "hf_reformer", *_listed(metadata.get("tags"))]))
    if results:
        metadata |= {"model_name": title, "eval_results": results}
    if training is None and state is not None and state.global_step:
        training = {"steps": state.global_step, "epochs": round(state.epoch or 0, 2)}
        training |= {"batch size per device": state.train_batch_size} if state.train_batch_size else {}
        training = {key: value for key, value in training.items() if _is_score(value)}
    config = model.config
    return ModelCard.from_template(
        ModelCardData(library_name="transformers", pipeline_tag=task, **metadata),
        template_path=str(TEMPLATE),
        title=title,
        name_in_code=json.dumps(name, ensure_ascii=False),
        auto_class=auto_class,
        architecture=type(model).__name__.removeprefix("FSDP"),
        parameters=f"{model.num_parameters():,}",
        layers=list(config.attn_layers),
        decoder_layers=list(config.decoder_attn_layers) if hasattr(model, "decoder") else [],
        example_inputs=example_inputs(config, task),
        has_tokenizer=tokenizer is not None and task not in SIGNAL_TAGS,
        has_mask=getattr(tokenizer, "mask_token", None) is not None,
        has_chat_template=getattr(tokenizer, "chat_template", None) is not None,
        with_code=with_code,
        training=[_in_a_line(f"{key}: {value}") for key, value in (training or {}).items()],
        evaluations=table(found, weights, state.best_global_step) if state is not None and found else None,
        knows_weights=weights is not None,
        dataset_name=dataset_name,
        notes=notes,
    )
