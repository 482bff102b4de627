"""LSH attention can learn: the duplication task of the paper, section 5.1."""

import pytest
from experiment_scripts import load_experiment


@pytest.fixture(scope="module")
def script():
    return load_experiment("duplication")


def test_sequences_are_a_word_twice_and_only_the_second_is_a_target(script):
    args = script.Arguments()
    ids, labels = script.draw(args, 3, script.torch.Generator().manual_seed(0))
    half = args.length // 2
    assert ids.shape == (3, args.length)
    assert (ids[:, :half] == ids[:, half:]).all()
    assert (labels[:, : half + 1] == -100).all()
    assert (labels[:, half + 1 :] == ids[:, half + 1 :]).all()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_windows_without_the_position_order_learn_to_duplicate_as_chunks_do(script, seed):
    """Within one evaluation: centered hashing may cost 25 steps here (docs/evidence.md); without it, none later."""
    steps, accuracy = {}, {}
    for mode in ("window", "chunk"):
        args = script.Arguments(attention_mode=mode, evaluate_every=25, overrides="initializer_range=0.02")
        steps[mode], accuracy[mode] = script.learn(args, seed)
    assert accuracy["window"][4] >= 0.99
    assert steps["window"] <= steps["chunk"] + 25
