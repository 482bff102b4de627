"""reformer_kernels knows torch alone: what it repeats of hf_reformer is equal."""

import pytest

from hf_reformer.ops import prng, reference
from reformer_kernels import contract


@pytest.mark.parametrize("name", ["SELF_SCORE", "MASKED_SCORE"])
def test_fixed_scores_are_those_of_the_reference(name):
    assert getattr(contract, name) == getattr(reference, name)


@pytest.mark.parametrize("name", ["GOLDEN", "MIX_1", "MIX_2"])
def test_multipliers_are_those_of_the_random_numbers(name):
    assert getattr(contract, name) == getattr(prng, name)


@pytest.mark.parametrize("dropout", [0.0, 1e-10, 0.1, 0.5, 0.999, 1.0])
def test_the_threshold_of_dropout_is_that_of_the_random_numbers(dropout):
    assert contract.keep_threshold(dropout) == min(prng.keep_threshold(dropout), 2**31 - 1)
