"""Next-item recommendation: ranks, scores at k, a Trainer that ranks all items, baselines and plots."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import sparse
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import EvalPrediction, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..models.losses import IGNORE
from .neighbors import co_occurrences
from .trainers import GroupedTrainer

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "unk_token": "<unk>"}
UNKNOWN = -1  # in place of an item id
MISSED = 0.0  # in place of a rank


class User(NamedTuple):
    """A user's items, oldest first, and the item to recommend, if it is known."""

    id: str
    history: list[str]
    target: str | None


# --- the vocabulary


def item_tokenizer(items: Sequence[str], max_length: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer whose tokens are items: the text `"17 4"` becomes `"<s> 17 4"`.

    Items are separated by white space, or by line breaks if an id contains a space.

    Raises:
        ValueError: an item has the same name as a special token.
    """
    if taken := sorted({*items} & {*SPECIAL.values()}):
        raise ValueError(f"The item {taken[0]} has the same name as a special token of the vocabulary. Rename it.")
    words = {word: number for number, word in enumerate([*SPECIAL.values(), *items])}
    backend = Tokenizer(models.WordLevel(words, unk_token=SPECIAL["unk_token"]))
    border = r"\n+" if any(len(item.split()) > 1 for item in items) else r"\s+"
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(border), "removed")
    bos = SPECIAL["bos_token"]
    backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, words[bos])])
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=max_length, model_input_names=names, **SPECIAL
    )


def generation_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Settings with which `generate` recommends the likeliest items, without repeating any."""
    return {"do_sample": False, "no_repeat_ngram_size": 1, "suppress_tokens": sorted(tokenizer.all_special_ids)}


# --- scores


def ranks_of(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Rank the target of each row, starting from 1; equal scores share the mean of their ranks.

    Args:
        scores: (rows, items), -inf for items that must not be recommended.
        targets: (rows) int.
    """
    own = np.take_along_axis(scores, targets[:, None], axis=1)
    return 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2


def scores_at(ranks: np.ndarray, sizes: Sequence[int]) -> dict[str, float]:
    """Compute hit rate, NDCG and MRR of the first k recommendations for every k; each user has one true item.

    Args:
        ranks: ranks of the true items, starting from 1; MISSED for items that are not in the vocabulary.
    """
    found = {}
    for size in sizes:
        hit = (ranks >= 1) & (ranks <= size)
        found[f"hr@{size}"] = hit.mean()
        found[f"ndcg@{size}"] = (hit / np.log2(np.maximum(ranks, 1) + 1)).mean()
        found[f"mrr@{size}"] = (hit / np.maximum(ranks, 1)).mean()
    return {name: float(value) for name, value in found.items()}


# --- evaluation


def nearby_order(items: torch.Tensor, distance: float) -> torch.Tensor:
    """Draw an order (B, T) in which items may overtake others that were less than `distance` places before them.

    Order within a session is mostly chance, which a model should not memorize (CL4SRec, Xie et al. 2022, reorders
    parts of histories for this reason).

    Args:
        items: (B, T) bool, True for the items that may be moved; what comes before or after all of them stays.
    """
    places = torch.arange(items.shape[1], device=items.device).expand(items.shape)
    moved = places + distance * torch.rand(items.shape, device=items.device)
    outside = torch.where(items.cumsum(1) > 0, torch.inf, -torch.inf)
    return torch.where(items, moved, outside).argsort(dim=1, stable=True)


@dataclass
class ItemCollator:
    """Pads training windows and their labels on the right, and histories to be continued on the left."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        trains = "labels" in rows[0]
        ids = {"input_ids": [row["input_ids"] for row in rows]}
        batch = dict(self.tokenizer.pad(ids, return_tensors="pt", padding_side="right" if trains else "left"))
        filled = {"labels": IGNORE} if trains else {"had": self.tokenizer.bos_token_id}  # never recommended
        for name, fill in filled.items():
            columns = [torch.tensor(row[name], dtype=torch.int64) for row in rows]
            batch[name] = torch.nn.utils.rnn.pad_sequence(columns, batch_first=True, padding_value=fill)
        for name in () if trains else ("target", "row"):
            batch[name] = torch.tensor([row[name] for row in rows])
        return batch


class RecommendationTrainer(GroupedTrainer):
    """A Trainer whose predictions rank all items that the user did not have; its label ids are row numbers.

    Predictions: (rows) float32, ranks of the targets; (rows, count) int64, the best items, UNKNOWN where there are
    fewer; (rows, count) float32, their log-probabilities.
    """

    count = 10
    item_dropout = 0.0
    reorder = 0.0

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """In training, move items among their neighbors (`reorder`) and hide some of the inputs (`item_dropout`)."""
        ids = inputs["input_ids"]
        tokenizer: Any = self.processing_class
        items = (ids != tokenizer.pad_token_id) & (ids != tokenizer.bos_token_id)
        if self.reorder and model.training:
            order = nearby_order(items, self.reorder)
            inputs = {**inputs, **{name: inputs[name].gather(1, order) for name in ("input_ids", "labels")}}
        if self.item_dropout and model.training:
            hidden = (torch.rand(ids.shape, device=ids.device) < self.item_dropout) & items
            inputs = {**inputs, "input_ids": inputs["input_ids"].masked_fill(hidden, tokenizer.unk_token_id)}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, Any, torch.Tensor]:
        prepared: Any = self._prepare_inputs(inputs)
        tokenizer: Any = self.processing_class
        target, had, row = (prepared.pop(name) for name in ("target", "had", "row"))
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = model(**prepared, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)  # (B, V)
        known = target >= 0
        own = scores.gather(1, target.clamp(min=0)[:, None])  # (B, 1)
        loss = -own[known].mean() if bool(known.any()) else scores.new_zeros(())
        scores = scores.scatter(1, had, -torch.inf)
        scores[:, tokenizer.all_special_ids] = -torch.inf
        own = scores.gather(1, target.clamp(min=0)[:, None])
        ranks = 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2
        best, items = scores.topk(min(self.count, scores.shape[1]))
        ranks, items = ranks.masked_fill(~known, MISSED), items.masked_fill(best.isinf(), UNKNOWN)
        return loss, (ranks, items, best), row


class RankScores:
    """`compute_metrics` for `RecommendationTrainer`: scores at k of its predictions."""

    def __init__(self, sizes: Sequence[int]):
        self.sizes = sizes

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        ranks: Any = prediction.predictions[0]
        return scores_at(np.asarray(ranks), self.sizes)


# --- baselines

NEAR = 5  # items co-occur if they are at most so many steps apart
RECENT = 10  # last items of a user that co-occurrence uses
LAST = 20  # last items of a user that item-kNN uses

Scorer = Callable[[np.ndarray], np.ndarray]


def baseline_scorers(histories: Sequence[np.ndarray], items: int) -> dict[str, Scorer]:
    """Fit baselines to `histories`: functions that map a user's items, oldest first, to scores of all items.

    Args:
        histories: items of every training user, as numbers from 0 to `items` - 1.
    """
    every = np.concatenate([*histories, np.empty(0, np.int64)]).astype(np.int64)
    popularity = np.bincount(every, minlength=items).astype(float)
    near = co_occurrences(histories, items, NEAR)
    users = np.repeat(np.arange(len(histories)), [len(had) for had in histories])
    had_by = sparse.coo_matrix((np.ones(len(every)), (every, users)), (items, len(histories))).tocsr()
    norms = np.sqrt(np.maximum(popularity, 1))
    rarely = 1e-9 * popularity  # breaks ties

    def co_occurrence(had: np.ndarray) -> np.ndarray:
        last = had[-RECENT:][::-1]
        return (1 / np.arange(1, len(last) + 1)) @ near[last] + rarely  # the most recent ones count most

    def knn(had: np.ndarray) -> np.ndarray:
        last = had[-LAST:]
        likeness = (sparse.diags(1 / norms[last]) @ had_by[last]).sum(0) @ had_by.T  # sum of cosines, up to one norm
        return np.asarray(likeness).ravel() / norms + rarely

    return {
        "popularity": lambda had: popularity,
        f"item-kNN (cosine) with the last {LAST}": knn,
        f"co-occurrence within {NEAR} steps": co_occurrence,
    }


def baseline_ranks(scorer: Scorer, histories: Sequence[np.ndarray], targets: np.ndarray) -> np.ndarray:
    """Rank the targets by a baseline, among all items that the user did not have; MISSED for UNKNOWN targets."""
    ranks = np.full(len(targets), MISSED)
    for row, (had, target) in enumerate(zip(histories, targets, strict=True)):
        if target != UNKNOWN:
            scores = np.array(scorer(had), dtype=float)
            scores[had] = -np.inf
            ranks[row] = ranks_of(scores[None], np.array([target]))[0]
    return ranks


# --- plots


def draw_recommendations(
    file: Path, ranks: Mapping[str, np.ndarray], popularity: np.ndarray, targets: np.ndarray, items: np.ndarray,
    title: str,
) -> None:  # fmt: skip
    """Plot the hit rate by number of recommendations, and the popularity of the recommended and the true items.

    Args:
        ranks: ranks of the true items by each model.
        popularity: (items) how often each item occurs in the training data.
        targets: (users) the true items; UNKNOWN is left out.
        items: (users, count) the recommended items; UNKNOWN is left out.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    hits, shares = figure.subplots(1, 2)
    sizes = range(1, min(100, len(popularity)) + 1)
    for name, some in ranks.items():
        rates = [scores_at(some, [size])[f"hr@{size}"] for size in sizes]
        hits.plot(sizes, rates, label=name, linewidth=2.5 if name == "Reformer" else 1.2)
    hits.set(xscale="log", xlabel="recommendations", ylabel="hit rate", title=title, ylim=(0, None))
    hits.grid(alpha=0.3)
    hits.legend()
    place = np.empty(len(popularity), int)
    place[np.argsort(-popularity, kind="stable")] = np.arange(len(popularity))
    for name, some in (("true next items", targets), ("recommended by the Reformer", items.ravel())):
        known = some[some != UNKNOWN]
        if len(known):
            counts = np.bincount(place[known], minlength=len(popularity))
            reached = len(np.unique(known)) / len(popularity)
            line = np.concatenate([[0], counts.cumsum()]) / len(known)
            shares.plot(np.linspace(0, 1, len(line)), line, label=f"{name} ({reached:.0%} of all items)")
    total = np.concatenate([[0], np.sort(popularity)[::-1].cumsum()]) / max(1, popularity.sum())
    shares.plot(np.linspace(0, 1, len(total)), total, label="training data", color="gray", linestyle=":")
    shares.set(xlabel="share of items, most popular first", ylabel="cumulative share of choices")
    shares.set(title="popularity", xlim=(0, 1), ylim=(0, 1))
    shares.grid(alpha=0.3)
    shares.legend(loc="lower right")
    figure.savefig(file, dpi=120)
