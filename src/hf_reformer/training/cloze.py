"""Cloze questions: pre-training for question answering that needs documents but no questions.

A span is taken out of a sentence, and some of the words around it become the question; the span is the answer. This
exercises what real questions need: finding the sentence that shares words with the question, and what it adds to them
(Dhingra et al. 2018, arXiv 1804.00720; Lewis et al. 2019, arXiv 1906.04980).
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .question_answering import Example

FREQUENT = 100  # number of frequent words, with which no answer begins or ends; at most a twentieth of all words
LONGEST = 6  # words of an answer
SHRINK = 0.7  # probability of an answer relative to that of answers one word shorter
AROUND = (5, 15)  # words on each side of the answer of which a question is made
DROPPED = 0.6  # the largest share of these words to leave out
_SENTENCE = re.compile(r"\S.*?(?:[.!?](?=\s)|[。！？]|\Z)", re.DOTALL)
_WORD = re.compile(r"\w+(?:[-–'’.,/]\w+)*")


class Sentence(NamedTuple):
    """The words of a sentence, as (start, end) in its passage; and by length, where possible answers begin."""

    passage: str
    words: list[tuple[int, int]]
    answers: dict[int, list[int]]


def cut(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[str]:
    """Cut documents into passages of about `length` tokens."""
    passages = []
    for document in documents:
        tokens = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [start for start, _ in tokens["offset_mapping"][::length]]
        passages += [document[start:end] for start, end in pairwise([*starts, len(document)])]
    return passages


def cloze_examples(passages: list[str], count: int, seed: int) -> list[Example]:
    """Draw `count` cloze questions about passages.

    Raises:
        ValueError: no passage contains a sentence of three words.
    """
    numbers = Counter(word.lower() for passage in passages for word in _WORD.findall(passage))
    frequent = {word for word, _ in numbers.most_common(min(FREQUENT, len(numbers) // 20))}
    found = [sentence for passage in passages for sentence in _sentences(passage, frequent)]
    if not found:
        raise ValueError(
            "--pretrain_steps asks for words of sentences of three words or more, and the training documents, cut to "
            "passages of --pretrain_length tokens, contain none. Raise --pretrain_length, or omit --pretrain_steps."
        )
    draw = random.Random(seed)
    return [_question(draw.choice(found), draw, str(number)) for number in range(count)]


def _sentences(passage: str, frequent: set[str]) -> Iterator[Sentence]:
    """Yield the sentences of three words or more."""
    for place in _SENTENCE.finditer(passage):
        words = [word.span() for word in _WORD.finditer(passage, *place.span())]
        if len(words) < 3:
            continue
        apart = [not passage[end:start].isspace() for (_, end), (start, _) in pairwise(words)]  # by punctuation
        rare = [passage[start:end].lower() not in frequent for start, end in words]
        answers: dict[int, list[int]] = {}
        for size in range(1, min(LONGEST, len(words) - 2) + 1):
            for first in range(len(words) - size + 1):
                last = first + size - 1
                if ((rare[first] and rare[last]) or not any(rare)) and not any(apart[first:last]):
                    answers.setdefault(size, []).append(first)
        yield Sentence(passage, words, answers)


def _question(sentence: Sentence, draw: random.Random, name: str) -> Example:
    """Draw an answer, and a question from the words on both sides of it."""
    passage, words, answers = sentence
    size = draw.choices([*answers], [SHRINK**size for size in answers])[0]
    first = draw.choice(answers[size])
    around, dropped = draw.randint(*AROUND), draw.uniform(0, DROPPED)
    beside = words[max(0, first - around) : first] + words[first + size : first + size + around]
    kept = [word for word in beside if draw.random() >= dropped] or beside
    start, end = words[first][0], words[first + size - 1][1]
    return Example(name, " ".join(passage[a:b] for a, b in kept) + "?", passage, [(passage[start:end], start)])
