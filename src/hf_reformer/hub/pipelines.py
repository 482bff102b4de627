"""A question-answering pipeline for whole documents; transformers 5 has none, earlier versions split documents."""

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import AutoModelForQuestionAnswering
from transformers.pipelines.base import Pipeline

from ..compat import register_pipeline_task

TASK = "long-document-question-answering"


class LongDocumentQuestionAnswering(Pipeline):
    """Extractive question answering in one pass over a whole document.

    The tokenizer encodes question and document as a pair, in this order. An answer is a span of the document without
    leading or trailing whitespace. Its score is the probability that its first token is the start times the
    probability that its last token is the end. Both are normalized over the document's non-whitespace tokens and the
    *null position*, the first token of the input, which training data uses for questions without an answer.

    Works with any question-answering head of transformers and any fast tokenizer. Batching does not change results.

    Args:
        model: a model for question answering.
        tokenizer: its fast tokenizer.
        kwargs: arguments common to all pipelines (`device`, `batch_size`, …), and options of `__call__`.

    Raises:
        ValueError: the model has no question-answering head, or the tokenizer is missing or not a fast one.

    Example:
        >>> reader = pipeline("long-document-question-answering", model=folder)
        >>> reader(question="Who wrote it?", context=book)
        {'score': 0.87, 'start': 51423, 'end': 51434, 'answer': 'Jane Austen'}
    """

    _load_tokenizer = True
    _load_processor = _load_image_processor = _load_video_processor = _load_feature_extractor = False

    def __init__(self, model: Any, tokenizer: Any = None, **kwargs: Any) -> None:
        if "start_positions" not in inspect.signature(model.forward).parameters:
            raise ValueError(f"{type(model).__name__} scores no spans. Load it with AutoModelForQuestionAnswering.")
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"The tokenizer is {type(tokenizer).__name__}, which gives no offsets to find answers by. Give a fast "
                "tokenizer, such as ReformerByteTokenizer."
            )
        super().__init__(model=model, tokenizer=tokenizer, **kwargs)

    def __call__(self, question: Any = None, context: Any = None, **kwargs: Any) -> Any:
        """Answer one question or many.

        Args:
            question: a string or list of strings; or a dict with `question` and `context`, or a list, torch `Dataset`
                or generator of such dicts.
            context: the document, or a list of documents. A single document is used for all questions, and a single
                question for all documents.
            top_k: maximum number of answers, best first, none of which overlaps a better one. Default: 1.
            max_answer_length: maximum number of tokens in an answer. Default: 64.
            handle_impossible_answer: also consider "no answer", an empty answer from 0 to 0. Default: False.
            batch_size: number of inputs per batch. Default: 1.

        Returns:
            For each question a dict, or a list of dicts if `top_k` is above 1: `score`, the character positions
            `start` and `end`, and `answer`, which is `context[start:end]`. A list of inputs gives a list.

        Raises:
            TypeError: an input is none of the above, or an option is unknown.
            ValueError: a text is empty, lists differ in length, an input is too long, an option is not a positive
                integer, or scores are not finite.
        """
        inputs = question if context is None else _pairs(question, context)
        return [] if isinstance(inputs, list) and not inputs else super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, **options: Any) -> tuple[dict, dict, dict]:
        if unknown := sorted(set(options) - {"top_k", "max_answer_length", "handle_impossible_answer"}):
            raise TypeError(f"There is no option {', '.join(unknown)}.")
        options = {name: value for name, value in options.items() if value is not None}
        for name in ("top_k", "max_answer_length"):
            value = options.get(name, 1)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}={value}` must be a whole number of at least 1.")
        return {}, {}, options

    def preprocess(self, inputs: Any) -> dict[str, Any]:
        question, context = _question_and_context(inputs)
        options = {"truncation": False, "verbose": False}  # the limit is checked below
        encoded = self.tokenizer(question, context, return_tensors="pt", return_attention_mask=True, **options)
        limit = min(self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", math.inf))
        limit = getattr(self.model.config, "covered_positions", limit)  # only our models have it
        length = encoded["input_ids"].shape[1]
        if length > limit:
            asked = self.tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]
            raise ValueError(
                f"Question and document make {length} tokens, {len(asked)} of them the question's, but the model has "
                f"positions for {limit}. Shorten the document, or train a model with a larger "
                '`max_position_embeddings` or with `position_embedding_type="rotary"`.'
            )
        if encoded[0].sequence_ids.count(0) == 0 or not any(solid_tokens(encoded[0], context)):
            raise ValueError("The tokenizer gives no token for the question or the document. Give more text.")
        return {**encoded, "encoding": encoded[0], "context": context}

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        unchanged = {name: model_inputs.pop(name) for name in ("encoding", "context")}
        outputs = self.model(**model_inputs, return_dict=True)
        logits = {"start_logits": outputs.start_logits, "end_logits": outputs.end_logits}
        return {**logits, "attention_mask": model_inputs["attention_mask"], **unchanged}

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        top_k: int = 1,
        max_answer_length: int = 64,
        handle_impossible_answer: bool = False,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """Return the answers in one document, given logits (1, T), padded or not."""
        encoding, context = model_outputs["encoding"], model_outputs["context"]
        real = model_outputs["attention_mask"][0] != 0
        solid = torch.tensor(solid_tokens(encoding, context))
        inside = torch.tensor([sequence == 1 for sequence in encoding.sequence_ids])
        logits = (model_outputs[name][0][real] for name in ("start_logits", "end_logits"))
        starts, ends = (log_probabilities(x, solid) for x in logits)
        null: dict[str, Any] = {"score": math.exp(starts[0] + ends[0]), "start": 0, "end": 0, "answer": ""}
        starts, ends = (scores.masked_fill(~solid, -math.inf) for scores in (starts, ends))
        answers: list[dict[str, Any]] = []
        for first, last, score in best_spans(starts, ends, inside, encoding.offsets, top_k, max_answer_length):
            answer, start = trimmed(context, encoding.offsets[first][0], encoding.offsets[last][1])
            answers.append({"score": math.exp(score), "start": start, "end": start + len(answer), "answer": answer})
        if handle_impossible_answer:
            answers = sorted([*answers, null], key=lambda answer: -answer["score"])[:top_k]
        return answers[0] if top_k == 1 else answers


def register_pipelines() -> None:
    """Register `pipeline("long-document-question-answering", …)`. Calling it again has no effect."""
    entry = {"impl": LongDocumentQuestionAnswering, "pt": (AutoModelForQuestionAnswering,), "default": {}}
    register_pipeline_task(TASK, {**entry, "type": "text"})


def best_spans(
    starts: torch.Tensor,
    ends: torch.Tensor,
    inside: torch.Tensor,
    offsets: list[tuple[int, int]],
    count: int,
    max_length: int,
) -> Iterator[tuple[int, int, float]]:
    """Yield first token, last token and score of the best spans, none of which shares a character with a better one.

    Time grows with T · `max_length`, memory with T. Ties go to the earliest span, then to the shortest.

    Args:
        starts, ends: (T) scores of every token as the first and last one, -inf where no span may start or end.
        inside: (T) bool, True for tokens that spans may contain.
        offsets: the character range of every token.
        count, max_length: maximum number of spans, and of tokens in a span.
    """
    free = inside.clone()
    scores, lasts = _best_lasts(starts, ends, free, max_length)
    for _ in range(count):
        first = int(scores.argmax())
        score, last = float(scores[first]), int(lasts[first])
        if score == -math.inf:
            return
        yield first, last, score
        low, high = first, last + 1  # widened to whole characters, as a token may be part of one
        while low > 0 and inside[low - 1] and offsets[low - 1][1] > offsets[first][0]:
            low -= 1
        while high < len(free) and inside[high] and offsets[high][0] < offsets[last][1]:
            high += 1
        free[low:high] = False
        reach = slice(max(0, low - max_length + 1), high)  # starts of spans that are no longer possible
        scores[reach], shifted = _best_lasts(starts[reach], ends[reach], free[reach], max_length)
        lasts[reach] = shifted + reach.start


def _best_lasts(
    starts: torch.Tensor, ends: torch.Tensor, free: torch.Tensor, max_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the best span of `free` tokens from every first token: its score and last token, (T) each."""
    length = len(starts)
    best = torch.full_like(starts, -math.inf)
    lasts = torch.arange(length)
    unbroken = free
    for shift in range(min(max_length, length)):
        unbroken = unbroken[: length - shift] & free[shift:]
        if not unbroken.any():
            break
        scores = starts[: length - shift] + ends[shift:]
        rows = (unbroken & (scores > best[: length - shift])).nonzero()[:, 0]
        best[rows], lasts[rows] = scores[rows], rows + shift
    return best, lasts


def trimmed(context: str, start: int, end: int) -> tuple[str, int]:
    """Return the text from `start` to `end` without surrounding whitespace, and the position where it starts."""
    span = context[start:end]
    return span.strip(), start + len(span) - len(span.lstrip())


def log_probabilities(logits: torch.Tensor, solid: torch.Tensor) -> torch.Tensor:
    """Compute log-probabilities over the first token and the `solid` ones, -inf elsewhere: (T) → (T) float64."""
    taking_part = solid.clone()
    taking_part[0] = True
    found = logits.double().masked_fill(~taking_part, -math.inf).log_softmax(-1)
    if found.isnan().any():
        raise ValueError("The model's scores are NaN or infinite. Check its weights, or load it in float32.")
    return found


def solid_tokens(encoding: Any, context: str) -> list[bool]:
    """Mark the document's tokens that contain more than whitespace, so that an answer may start or end there."""
    return [
        sequence == 1 and not (context[start:end].isspace() or start == end)
        for sequence, (start, end) in zip(encoding.sequence_ids, encoding.offsets, strict=True)
    ]


def _pairs(question: Any, context: Any) -> Any:
    """Combine questions and documents, single or in lists, into a dict or a list of dicts."""
    several, many = isinstance(question, (list, tuple)), isinstance(context, (list, tuple))
    if not several and not many:
        return {"question": question, "context": context}
    questions = question if several else [question] * len(context)
    contexts = context if many else [context] * len(question)
    if len(questions) != len(contexts):
        raise ValueError(f"There are {len(questions)} questions and {len(contexts)} documents. Give as many, or one.")
    return [{"question": one, "context": other} for one, other in zip(questions, contexts, strict=True)]


def _question_and_context(inputs: Any) -> tuple[str, str]:
    if not isinstance(inputs, Mapping):
        raise TypeError(f"An input is {type(inputs).__name__}. Give `question` and `context`, or dicts of the two.")
    for name in ("question", "context"):
        text = inputs.get(name)
        if not isinstance(text, str):
            raise TypeError(f"`{name}` is {type(text).__name__}; it must be a string.")
        if not text.strip():
            raise ValueError(f"`{name}` is empty. There is nothing to {'ask' if name == 'question' else 'find'}.")
    return inputs["question"], inputs["context"]
