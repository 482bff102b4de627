"""Extractive question answering: SQuAD's scores, a Trainer that evaluates spans, baselines and plots."""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import EvalPrediction, PreTrainedTokenizerBase

from ..hub.pipelines import best_spans, log_probabilities, trimmed
from .similarity import word_similarity
from .trainers import GroupedTrainer


class Example(NamedTuple):
    """A question about a document. `answers`: (text, start) pairs; empty if there is no answer, None if unknown."""

    id: str
    question: str
    context: str
    answers: list[tuple[str, int]] | None


# --- SQuAD's scores


def normalized(answer: str) -> list[str]:
    """Return the words of an answer in lower case, without punctuation and articles."""
    text = "".join(character for character in answer.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(answer: str, gold: str) -> float:
    """Return 1 if both have the same words, else 0."""
    return float(normalized(answer) == normalized(gold))


def f1(answer: str, gold: str) -> float:
    """Compute the F1 score of the words of both. If one has no words: 1 if the other has none either, else 0."""
    found, wanted = normalized(answer), normalized(gold)
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))


def score_one(answer: str, golds: Sequence[str]) -> tuple[float, float]:
    """Compute exact match and F1 against the best of several answers; answers without words count as "no answer"."""
    golds = [gold for gold in golds if normalized(gold)] or [""]
    return max(exact_match(answer, gold) for gold in golds), max(f1(answer, gold) for gold in golds)


def score_answers(answers: Sequence[str], golds: Sequence[Sequence[str]]) -> dict[str, float]:
    """Average the scores over all questions, from 0 to 100; if only some have an answer, also over each kind."""
    scores = np.array([score_one(answer, some) for answer, some in zip(answers, golds, strict=True)]) * 100
    has_answer = np.array([len(some) > 0 for some in golds])
    found = {"exact_match": scores[:, 0].mean(), "f1": scores[:, 1].mean()}
    if not has_answer.all() and has_answer.any():
        found |= {"HasAns_exact": scores[has_answer, 0].mean(), "HasAns_f1": scores[has_answer, 1].mean()}
        found |= {"NoAns_f1": scores[~has_answer, 1].mean()}
    return {name: float(value) for name, value in found.items()}


# --- evaluation


@dataclass
class SpanCollator:
    """Pads inputs, and the character offsets of their tokens with -1; stacks positions and row numbers, if any."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = {name: [row[name] for row in rows] for name in self.tokenizer.model_input_names if name in rows[0]}
        batch = dict(self.tokenizer.pad(inputs, return_tensors="pt", padding_side="right"))
        length = batch["input_ids"].shape[1]
        for name in ("start_positions", "end_positions", "row"):
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows])
        for name in ("char_starts", "char_ends"):
            if name in rows[0]:
                batch[name] = torch.tensor([[*row[name], *[-1] * (length - len(row[name]))] for row in rows])
        return batch


class SpanTrainer(GroupedTrainer):
    """A Trainer whose predictions are the best spans of every document, and whose label ids are example numbers.

    Predictions: (rows, 1 + count, 2) int64, start and exclusive end (characters) of the spans, best first, after the
    null position; and (rows, 1 + count) float32, their log-probabilities, -inf where there are fewer spans.
    """

    count = 1
    max_answer_length = 64

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor | None, Any, torch.Tensor]:
        prepared: Any = self._prepare_inputs(inputs)
        row, starts, ends = (prepared.pop(name) for name in ("row", "char_starts", "char_ends"))
        with torch.no_grad(), self.compute_loss_context_manager():
            output = model(**prepared)
        loss = output.loss.detach() if "start_positions" in prepared else None
        spans = torch.zeros(len(row), 1 + self.count, 2, dtype=torch.int64)
        scores = torch.full((len(row), 1 + self.count), -math.inf)
        for i, real in enumerate(prepared["attention_mask"].bool()):
            places = starts[i][real].cpu(), ends[i][real].cpu()
            solid = places[1] > places[0]  # white space has no width
            logits = (x[i][real].cpu() for x in (output.start_logits, output.end_logits))
            first, last = (log_probabilities(x, solid) for x in logits)
            scores[i, 0] = first[0] + last[0]
            first, last = (x.masked_fill(~solid, -math.inf) for x in (first, last))
            offsets = list(zip(places[0].tolist(), places[1].tolist(), strict=True))
            found = best_spans(first, last, places[0] >= 0, offsets, self.count, self.max_answer_length)
            for n, (a, b, score) in enumerate(found, start=1):
                spans[i, n], scores[i, n] = torch.tensor([offsets[a][0], offsets[b][1]]), score
        return loss, (spans.to(row.device), scores.to(row.device)), row


class Answer(NamedTuple):
    """A span of a document and its probability; the empty span from 0 to 0 means "no answer"."""

    text: str
    start: int
    end: int
    score: float


NO_ANSWER = Answer("", 0, 0, 0.0)


@dataclass
class Reader:
    """`compute_metrics` for `SpanTrainer`: turns its predictions into answers and scores them.

    Args:
        threshold: "no answer" is given if its log-probability exceeds that of the best span by more than this; None:
            every question has an answer.
        examples: the examples of all evaluated splits, in the order of their numbers.
    """

    threshold: float | None
    examples: list[Example] = field(default_factory=list)

    def answers(self, context: str, spans: np.ndarray, scores: np.ndarray) -> list[Answer]:
        """Return the answers to one question, best first."""
        found = []
        for (start, end), score in zip(spans[1:].tolist(), scores[1:].tolist(), strict=True):
            if score > -math.inf:
                text, start = trimmed(context, start, end)
                found.append(Answer(text, start, start + len(text), math.exp(score)))
        if self.threshold is not None:
            none = NO_ANSWER._replace(score=math.exp(scores[0]))
            found.insert(0 if not found or scores[0] - scores[1] > self.threshold else len(found), none)
        return found or [NO_ANSWER]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        spans, scores = (np.asarray(x) for x in prediction.predictions)
        examples = [self.examples[number] for number in np.asarray(prediction.label_ids).tolist()]
        if any(example.answers is None for example in examples):
            return {}
        best = [self.answers(x.context, *some)[0].text for x, *some in zip(examples, spans, scores, strict=True)]
        return score_answers(best, [gold_texts(example) for example in examples])


def gold_texts(example: Example) -> list[str]:
    """Return the texts of an example's true answers."""
    return [text for text, _ in example.answers or ()]


# --- baselines


def sentences(text: str) -> list[str]:
    """Split a text after periods, question marks and exclamation marks that are followed by white space."""
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", text.strip()) if sentence] or [text]


def baselines(examples: Sequence[Example], version_2: bool) -> dict[str, dict[str, float]]:
    """Score answering with the whole document, with the sentence most similar to the question, and never answering."""
    golds = [gold_texts(example) for example in examples]
    similarity = word_similarity(example.context for example in examples)
    if similarity is None:
        return {}
    most_similar = []
    for example in examples:
        parts = sentences(example.context)
        most_similar.append(parts[int(similarity(example.question, parts).argmax())])
    found = {
        "the whole document": score_answers([example.context for example in examples], golds),
        "the sentence most similar to the question (TF-IDF)": score_answers(most_similar, golds),
    }
    return found | ({"no answer": score_answers([""] * len(golds), golds)} if version_2 else {})


# --- plots

_QUESTIONS = ("what", "which", "who", "when", "where", "how", "why")


def kind_of_question(question: str) -> str:
    """Return the first question word: who, when, how many, …; "other" if there is none."""
    words = re.findall(r"\w+", question.lower())
    for i, word in enumerate(words):
        if word in _QUESTIONS:
            many = word == "how" and words[i + 1 : i + 2] in (["many"], ["much"], ["long"], ["old"], ["far"])
            return " ".join(words[i : i + 2]) if many else word
        if word in ("whom", "whose"):
            return "who"
    return "other"


def draw_answers(file: Path, examples: Sequence[Example], answers: Sequence[Answer], title: str) -> None:
    """Plot the true and predicted positions of answers in their documents, and F1 by question word."""
    scores = [score_one(one.text, gold_texts(x))[1] for x, one in zip(examples, answers, strict=True)]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    places, bars = figure.subplots(1, 2)
    points = [
        (min((start for _, start in x.answers), key=lambda start: abs(start - one.start)), one.start, score)
        for x, one, score in zip(examples, answers, scores, strict=True)
        if x.answers and one.text
    ]
    if points:
        true, found, colors = zip(*points, strict=True)
        dots = places.scatter(true, found, c=colors, s=12, alpha=0.7, cmap="RdYlGn", vmin=0, vmax=1, linewidths=0)
        figure.colorbar(dots, ax=places, label="F1")
    places.set(xlabel="true start (character)", ylabel="predicted start (character)", title=title)
    kinds: dict[str, list[float]] = {}
    for example, score in zip(examples, scores, strict=True):
        kinds.setdefault(kind_of_question(example.question), []).append(score)
    often = sorted(kinds.items(), key=lambda kind: len(kind[1]))[-10:]
    bars.barh([f"{kind} ({len(some)})" for kind, some in often], [100 * float(np.mean(some)) for _, some in often])
    bars.set(xlabel="F1", title="F1 by question word", xlim=(0, 100))
    figure.savefig(file, dpi=120)
