"""Which tokens stand near each other, and embeddings of a new model that tell."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.utils.extmath import randomized_svd


def co_occurrences(sequences: Sequence[np.ndarray], count: int, reach: int) -> sparse.csr_matrix:
    """How often two tokens stand within `reach` steps of each other, (count, count), symmetric.

    Args:
        sequences: token ids below `count`, such as the items that a user had, oldest first.
    """
    pairs = [(ids[:-step], ids[step:]) for ids in sequences for step in range(1, reach + 1) if len(ids) > step]
    before, after = (np.concatenate([pair[side] for pair in pairs] or [np.empty(0, int)]) for side in (0, 1))
    near = sparse.coo_matrix((np.ones(len(before)), (before, after)), (count, count)).tocsr()
    return near + near.T


def neighbor_embeddings(near: sparse.csr_matrix, size: int) -> np.ndarray:
    """Vectors (count, size) that are alike where tokens have the same neighbors; zero without any.

    The singular vectors of the positive pointwise mutual information, times the roots of its singular values (Levy and
    Goldberg 2014, section 4).
    """
    pairs, often = near.tocoo(), np.asarray(near.sum(1)).ravel()
    information = np.log(pairs.data * often.sum() / (often[pairs.row] * often[pairs.col]))
    positive = sparse.csr_matrix((np.maximum(information, 0), (pairs.row, pairs.col)), near.shape)
    vectors, values, _ = randomized_svd(positive, min(size, near.shape[0]), random_state=0)
    found = np.where(positive.sum(1) > 0, vectors * np.sqrt(values), 0)
    return np.pad(found, ((0, 0), (0, size - found.shape[1])))


@torch.no_grad()
def start_from_neighbors(model: Any, sequences: Sequence[np.ndarray], reach: int) -> None:
    """Give the tokens of a new model the embeddings of their neighbors, as large as they were; others stay."""
    weight = model.get_input_embeddings().weight
    found = torch.from_numpy(neighbor_embeddings(co_occurrences(sequences, len(weight), reach), weight.shape[1]))
    known = found.abs().sum(1) > 0
    if known.any():
        weight[known] = (found[known] / found[known].std() * model.config.initializer_range).to(weight)
