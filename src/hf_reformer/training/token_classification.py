"""Token classification: scores of entities by seqeval, or of words; a baseline; entity spans."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from seqeval.metrics import accuracy_score, classification_report, f1_score, precision_score, recall_score
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import f1_score as f1_of_classes
from transformers import EvalPrediction

from ..models.losses import IGNORE

Tags = Sequence[Sequence[str]]  # the labels of the words of every sentence


def marks_entities(names: Sequence[str]) -> bool:
    """Whether labels mark spans: each is "O", or "B-", "I-", … with a type, as in B-PER."""
    return any(name != "O" for name in names) and all(re.fullmatch(r"O|[BIESLU]-.+", name) for name in names)


def as_bioes(tags: Tags) -> list[list[str]]:
    """Convert labels to seqeval's scheme of B, I, E, S and O: the L and U of BILOU become E and S."""
    known = {"L-": "E-", "U-": "S-"}
    return [[known.get(tag[:2], tag[:2]) + tag[2:] for tag in some] for some in tags]


class TagScores:
    """`compute_metrics` for labels that mark entities or else label single words."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.entities = marks_entities(names)

    def score(self, true: Tags, predicted: Tags) -> dict[str, float]:
        """Compute precision, recall and F1 of entities and word accuracy; without entities, accuracy and macro F1."""
        if self.entities:
            true, predicted = as_bioes(true), as_bioes(predicted)
            scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
            found = {name: score(true, predicted, zero_division=0) for name, score in scores.items()}
            return {name: float(x) for name, x in found.items()} | {"accuracy": accuracy_score(true, predicted)}
        flat_true, flat_predicted = ([tag for tags in some for tag in tags] for some in (true, predicted))
        macro = f1_of_classes(flat_true, flat_predicted, average="macro", zero_division=0)
        return {"accuracy": float(np.mean(np.array(flat_true) == flat_predicted)), "f1": float(macro)}

    def by_entity(self, true: Tags, predicted: Tags) -> dict[str, dict[str, float]]:
        """Compute precision, recall, F1 and number of the entities of each type."""
        if not self.entities:
            return {}
        table = classification_report(as_bioes(true), as_bioes(predicted), output_dict=True, zero_division=0)
        rows = {name: row for name, row in table.items() if not name.endswith(" avg")}
        names = {"precision": "precision", "recall": "recall", "f1-score": "f1", "support": "number"}
        return {name: {new: float(row[old]) for old, new in names.items()} for name, row in rows.items()}

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        predictions, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        true, predicted = [], []
        for found, wanted in zip(predictions, labels, strict=True):
            words = wanted != IGNORE
            true.append([self.names[i] for i in wanted[words]])
            predicted.append([self.names[i] for i in found[words]])
        return self.score(true, predicted)


def most_frequent_labels(words: Tags, tags: Tags, asked: Tags) -> list[list[str]]:
    """A baseline: the most frequent training label of each word; for unseen words, the most frequent label overall."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    total: Counter[str] = Counter()
    for sentence, labels in zip(words, tags, strict=True):
        total.update(labels)
        for word, label in zip(sentence, labels, strict=True):
            counts[word][label] += 1
    usual = total.most_common(1)[0][0]
    return [
        [counts[word].most_common(1)[0][0] if word in counts else usual for word in sentence] for sentence in asked
    ]


def entity_spans(words: Sequence[str], tags: Sequence[str], entities: bool) -> list[tuple[int, int, str]]:
    """Return (start, end, type) of entities, or else of every word, as characters of the words joined by spaces."""
    starts = np.cumsum([0, *(len(word) + 1 for word in words)]).tolist()
    if entities:
        found = [(first, last, kind) for kind, first, last in get_entities(as_bioes([tags])[0])]
    else:
        found = [(i, i, tag) for i, tag in enumerate(tags)]
    return [(starts[first], starts[last] + len(words[last]), kind) for first, last, kind in found]
