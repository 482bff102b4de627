"""Embeddings that a new model starts from: similar for tokens with the same neighbors."""

import numpy as np
import pytest
import torch
from conftest import make_model

from hf_reformer import ReformerForCausalLM
from hf_reformer.training.neighbors import co_occurrences, initialize_embeddings, ppmi_embeddings

GROUPS = 4, 8  # of tokens, all of which stand near each other


def group_sequences(number: int = 400) -> list[np.ndarray]:
    """Tokens of one group each."""
    draw = np.random.default_rng(0)
    return [row % GROUPS[0] * GROUPS[1] + draw.permutation(GROUPS[1]) for row in range(number)]


def test_tokens_with_the_same_neighbors_have_similar_vectors():
    count = GROUPS[0] * GROUPS[1] + 1
    found = ppmi_embeddings(co_occurrences(group_sequences(), count, 5), GROUPS[0])
    assert found.shape == (count, GROUPS[0])
    assert not found[-1].any()
    units = found[:-1] / np.linalg.norm(found[:-1], axis=1, keepdims=True)
    group = np.arange(count - 1) // GROUPS[1]
    same = group[:, None] == group
    assert (units @ units.T)[same].min() > (units @ units.T)[~same].max() + 0.5
    again = ppmi_embeddings(co_occurrences(group_sequences()[::-1], count, 5), GROUPS[0])
    assert np.array_equal(found, again)  # whatever the order of the sequences


@pytest.mark.parametrize("sequences", [[], [[2]], [[0, 1]], [[0, 1], [1, 2, 0]]], ids=str)
def test_few_tokens_give_finite_vectors(sequences):
    found = ppmi_embeddings(co_occurrences([np.array(ids) for ids in sequences], 3, 5), 16)
    assert found.shape == (3, 16)
    assert np.isfinite(found).all()
    assert found.any() == any(len(ids) > 1 for ids in sequences)


def test_a_new_model_starts_from_the_neighbors_of_its_tokens(global_generator_untouched):
    model = make_model(
        ReformerForCausalLM, dtype=torch.float32, vocab_size=3 + GROUPS[0] * GROUPS[1] + 1, is_decoder=True
    )
    before = model.get_input_embeddings().weight.clone()
    initialize_embeddings(model, [3 + ids for ids in group_sequences()], 5)
    after = model.get_input_embeddings().weight
    moved = (before != after).any(1)
    assert torch.equal(moved, torch.tensor([False] * 3 + [True] * GROUPS[0] * GROUPS[1] + [False]))
    assert after[moved].std().item() == pytest.approx(model.config.initializer_range, rel=1e-4)
