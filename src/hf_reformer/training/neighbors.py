"""Token embeddings from co-occurrence counts, to initialize a new model."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.utils.extmath import randomized_svd


def co_occurrences(sequences: Sequence[np.ndarray], count: int, window: int) -> sparse.csr_matrix:
    """Count how often two tokens occur within `window` steps of each other: a symmetric (count, count) matrix.

    Args:
        sequences: token ids below `count`, such as the items of a user, oldest first.
    """
    counts = sparse.csr_matrix((count, count))
    for step in range(1, window + 1):
        pairs = [(ids[:-step], ids[step:]) for ids in sequences if len(ids) > step]
        before, after = (np.concatenate([pair[side] for pair in pairs] or [np.empty(0, int)]) for side in (0, 1))
        counts += sparse.coo_matrix((np.ones(len(before)), (before, after)), (count, count)).tocsr()
    return counts + counts.T


def ppmi_embeddings(counts: sparse.csr_matrix, size: int) -> np.ndarray:
    """Compute vectors (count, size) that are similar for tokens with the same neighbors; zero for tokens without any.

    They are the singular vectors of the positive pointwise mutual information (PPMI), times the square roots of its
    singular values (Levy and Goldberg 2014, section 4).
    """
    pairs, totals = counts.tocoo(), np.asarray(counts.sum(1)).ravel()
    pmi = np.log(pairs.data * totals.sum() / (totals[pairs.row] * totals[pairs.col]))
    positive = sparse.csr_matrix((np.maximum(pmi, 0), (pairs.row, pairs.col)), counts.shape)
    left, values, _ = randomized_svd(positive, min(size, counts.shape[0]), random_state=0)
    vectors = np.where(positive.sum(1) > 0, left * np.sqrt(values), 0)
    return np.pad(vectors, ((0, 0), (0, size - vectors.shape[1])))


@torch.no_grad()
def initialize_embeddings(model: Any, sequences: Sequence[np.ndarray], window: int) -> None:
    """Set the token embeddings of a new model to `ppmi_embeddings`, scaled to a standard deviation of
    `initializer_range`; tokens without neighbors keep theirs."""
    weight = model.get_input_embeddings().weight
    vectors = torch.from_numpy(ppmi_embeddings(co_occurrences(sequences, len(weight), window), weight.shape[1]))
    known = vectors.abs().sum(1) > 0
    if known.any():
        weight[known] = (vectors[known] / vectors[known].std() * model.config.initializer_range).to(weight)
