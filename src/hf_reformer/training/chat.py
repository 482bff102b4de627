"""Chat: bits per byte of replies, choosing the true reply among others, a word-based baseline, a plot."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import EvalPrediction, PreTrainedTokenizerBase

from ..data.conversations import Messages
from .similarity import word_similarity

LAST = 3  # turns that the baseline uses
ELSEWHERE = 8  # other conversations with which a reply's likelihood is compared
ELSEWHERE_LENGTH = 128  # tokens of each


class ReplyBits:
    """`compute_metrics` for `LanguageModelTrainer`: bits per byte of the assistant's messages.

    End-of-message tokens count toward the bits but not toward the bytes.
    """

    def __init__(self, conversations: Sequence[Messages], labels: Sequence[Sequence[int]]):
        self.num_bytes = sum(len(text.encode()) for messages in conversations for text in replies(messages))
        self.num_tokens = sum(label >= 0 for row in labels for label in row)

    @property
    def bits_per_nat(self) -> float:
        """Bits per byte of a loss of one nat per token."""
        return self.num_tokens / self.num_bytes / math.log(2)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        nats, targets = np.asarray(prediction.predictions, dtype=np.float64), np.asarray(prediction.label_ids)
        return {"bits_per_byte": nats.sum() / max(1, targets.sum()) * self.bits_per_nat}


def replies(messages: Messages) -> list[str]:
    """Return the texts of the assistant's messages."""
    return [message["content"] for message in messages if message["role"] == "assistant"]


class Choice(NamedTuple):
    """The messages before a reply, the replies to choose from, the true one first, and what was said elsewhere.

    `elsewhere` holds the messages before replies in other conversations, in which no candidate occurs.
    """

    before: Messages
    candidates: list[str]
    elsewhere: list[Messages]


def make_choices(conversations: Sequence[Messages], size: int, count: int, seed: int) -> list[Choice]:
    """Draw up to `count` replies at random, each with `size` - 1 different ones from other conversations.

    Replies for which there are too few others are skipped.
    """
    draw = random.Random(seed)
    places = [
        (number, turn)
        for number, messages in enumerate(conversations)
        for turn, message in enumerate(messages)
        if message["role"] == "assistant" and turn > 0
    ]
    others = [[*dict.fromkeys(replies(messages))] for messages in conversations]
    choices, draw_elsewhere = [], random.Random(seed)
    for number, turn in sorted(draw.sample(places, min(count, len(places)))):
        true = conversations[number][turn]["content"]
        wrong = {text for i, some in enumerate(others) if i != number for text in some} - {true}
        if len(wrong) >= size - 1:
            candidates = [true, *draw.sample(sorted(wrong), size - 1)]
            taken = {number, *(i for i, some in enumerate(others) if not {*candidates}.isdisjoint(some))}
            free = [place for place in places if place[0] not in taken]
            drawn = draw_elsewhere.sample(free, min(ELSEWHERE, len(free)))
            elsewhere = [conversations[i][:end] for i, end in drawn]
            choices.append(Choice(conversations[number][:turn], candidates, elsewhere))
    return choices


def rank_replies(
    model: Any, tokenizer: PreTrainedTokenizerBase, choices: Sequence[Choice], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rank the true reply in every choice, starting from 1, and compute its bits per byte.

    Replies are ranked by how much likelier the conversation makes them: their log-likelihood given the earlier
    messages, minus the mean of those given what was said elsewhere or, without it, that at the beginning of a
    conversation (pointwise mutual information; Li et al. 2016, arXiv 1510.03055). Ranked by likelihood alone, common
    replies would win whatever was said before.

    The context is cut to as many of its last tokens as fit into `length` with the longest candidate, those of other
    conversations to `ELSEWHERE_LENGTH`, and candidates to their first `length` - 1 tokens.
    """

    def prompt_of(messages: Messages, asks: bool = True) -> str:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=asks, tokenize=False))

    ranks, bits = [], []
    for before, candidates, elsewhere in choices:
        prompt, said = prompt_of(before), prompt_of(before, asks=False)
        opening = prompt[len(said) :] if prompt.startswith(said) else ""  # such as "assistant" and a new line
        prompts = [prompt, *(map(prompt_of, elsewhere) if elsewhere else [opening or tokenizer.eos_token])]
        context, *contexts = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
        encoded = tokenizer(candidates, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ends = [[*ids, tokenizer.eos_token_id][: length - 1] for ids in encoded]
        room = length - max(map(len, ends))
        given = log_likelihoods(model, tokenizer, context[-room:], ends)
        few = min(room, ELSEWHERE_LENGTH)
        alone = [log_likelihoods(model, tokenizer, tokens[-few:], ends) for tokens in contexts]
        ranks.append(rank_of_first(given - np.mean(alone, axis=0)))
        bits.append(-given[0] / len(candidates[0].encode()) / math.log(2))
    return np.array(ranks), np.array(bits)


@torch.no_grad()
def log_likelihoods(
    model: Any, tokenizer: PreTrainedTokenizerBase, context: Sequence[int], ends: Sequence[Sequence[int]]
) -> np.ndarray:
    """Compute the log-likelihood, in nats, of each of `ends` given a context of at least one token."""
    rows = [{"input_ids": [*context, *ids]} for ids in ends]
    batch = tokenizer.pad(rows, return_tensors="pt", padding_side="right").to(model.device)
    keep = batch["input_ids"].shape[1] - len(context) + 1
    logits = model(**batch, logits_to_keep=keep).logits[:, :-1].float().log_softmax(-1)
    chosen = (
        row[: len(ids)].gather(-1, torch.tensor(ids, device=row.device)[:, None])
        for row, ids in zip(logits, ends, strict=True)
    )
    return np.array([float(nats.sum()) for nats in chosen])


def rank_of_first(values: np.ndarray) -> float:
    """Rank the first value, starting from 1 for the largest; equal values share the mean of their ranks."""
    return float(1 + (values > values[0]).sum() + ((values == values[0]).sum() - 1) / 2)


def tfidf_ranks(choices: Sequence[Choice], conversations: Sequence[Messages]) -> np.ndarray | None:
    """Rank the true replies by TF-IDF similarity to the last turns; None if no conversation contains a word."""
    similarity = word_similarity(message["content"] for messages in conversations for message in messages)
    if similarity is None:
        return None
    last = (" ".join(message["content"] for message in choice.before[-LAST:]) for choice in choices)
    both = zip(last, choices, strict=True)
    return np.array([rank_of_first(similarity(text, choice.candidates)) for text, choice in both])


def accuracy(ranks: np.ndarray) -> float:
    """Share of the choices whose true reply ranks first; a tie of two counts half, a larger tie nothing."""
    return float(np.where(ranks < 2, 2 - ranks, 0).mean())


def draw_replies(
    file: Path, choices: Sequence[Choice], bits: np.ndarray, ranks: dict[str, np.ndarray], title: str
) -> None:
    """Plot bits per byte of true replies by their position in the conversation, and their ranks among others.

    Args:
        bits: bits per byte of the true replies.
        ranks: ranks of the true replies, by model name.
    """
    size = len(choices[0].candidates)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    turns, places = figure.subplots(1, 2)
    by_turn: dict[int, list[float]] = {}
    for choice, value in zip(choices, bits, strict=True):
        by_turn.setdefault(len(choice.before), []).append(value)
    order = sorted(by_turn)
    turns.plot(order, [float(np.mean(by_turn[turn])) for turn in order], marker=".")
    turns.set(xlabel="messages before the reply", ylabel="bits per byte (mean over replies)", title=title)
    turns.grid(alpha=0.3)
    width = 0.8 / max(1, len(ranks))
    for i, (name, some) in enumerate(ranks.items()):
        share = [float(((some > place - 1) & (some <= place)).mean()) for place in range(1, size + 1)]
        places.bar(np.arange(1, size + 1) + (i - (len(ranks) - 1) / 2) * width, share, width, label=name)
    places.axhline(1 / size, color="gray", linestyle=":", label="random guessing")
    places.set(xlabel=f"rank of the true reply among {size}", ylabel="share of replies", title="choosing the reply")
    places.legend()
    figure.savefig(file, dpi=120)
