"""What hashing finds of exact attention equals a count pair after pair."""

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from conftest import SMALL_WINDOWS, make_ids, make_model, max_abs_diff

from hf_reformer import (
    ReformerForCausalLM,
    ReformerForConditionalGeneration,
    ReformerForMultipleChoice,
    ReformerModel,
)
from hf_reformer.analysis import (
    attention_found,
    bucket_balance,
    format_found,
    plot_attention_found,
    view_layer,
    visible_pairs,
)

matplotlib.use("Agg")

LENGTH = 60
IDS, MASK = make_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
MASK[0, :20], MASK[1, 40:50] = 0, 0
PADDED = {"input_ids": IDS, "attention_mask": MASK}
PACKED = {"input_ids": IDS, "position_ids": torch.cat([torch.arange(25), torch.arange(35)])[None]}
CHUNKS = {
    "attention_mode": "chunk",
    "num_buckets": [2, 4],
    "lsh_attn_chunk_length": 8,
    "position_embedding_type": "learned",
}
WINDOWS = {
    "rotary": {**SMALL_WINDOWS, "position_embedding_type": "rotary"},
    "learned": {**SMALL_WINDOWS, "position_embedding_type": "learned"},
    "no local": {**SMALL_WINDOWS, "lsh_include_local": False},
}
MODES = WINDOWS | {"chunk": CHUNKS}
SHARES = ("hashed", "more_local", "random", "best")
each_direction = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def make(mode="rotary", causal=True, cls=ReformerModel, layers=("lsh",), **overrides):
    return make_model(cls, **{**MODES[mode], "attn_layers": list(layers), "is_decoder": causal, **overrides})


def equal(a, b, tolerance=1e-10):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert x.layer == y.layer
        assert all(max_abs_diff(*pair) <= tolerance for pair in zip(x[1:], y[1:], strict=True))


def expected_shares(model, inputs, chosen, count_of_heads=2):
    """By loops over pairs; exact attention is that of a window of everything. Means of (H) for queries `chosen`."""
    whole = make_model(
        type(model), **{**model.config.to_diff_dict(), "attention_mode": "window", "lsh_include_local": True,
                        "local_window": 4 * LENGTH, "num_buckets": 4, "initializer_range": 0.3}
    )  # fmt: skip
    whole.load_state_dict(model.state_dict())
    view, config = view_layer(model, layer=0, **inputs), model.config
    places = {"position_ids": torch.arange(LENGTH)[None]} if config.attention_mode == "chunk" else {}
    exact = whole(**inputs, **places, output_attentions=True).attentions[0]
    mask = inputs.get("attention_mask", torch.ones_like(IDS))
    positions = inputs.get("position_ids", torch.arange(LENGTH)[None]).expand_as(IDS)
    sample = (positions == 0).long().cumsum(-1)
    results = []
    for head in range(count_of_heads):
        sums = dict.fromkeys(("found", "beyond", *SHARES, "keys"), 0.0)
        for row in range(len(IDS)):
            shown = [set(), set()]
            for i, j, order in zip(*(x.tolist() for x in visible_pairs(view, row, head)), strict=True):
                shown[view.names[order].startswith("hash")].add((i, j))
            rank = mask[row].cumsum(-1).tolist()
            for i in chosen[row]:
                mass = exact[row, head, i].tolist()
                sees = [j for j in range(LENGTH) if mask[row, j] and sample[row, i] == sample[row, j]]
                sees = [j for j in sees if j <= i] if view.causal else sees
                near = {i}
                if config.attention_mode == "window" and config.lsh_include_local:
                    reach = config.local_window - 1 if view.causal else config.local_window // 2
                    near = {j for j in sees if abs(rank[i] - rank[j]) <= reach}
                far = [j for j in sees if j not in near]
                by_distance = sorted(far, key=lambda j: (abs(rank[i] - rank[j]), j))
                hashed = [j for j in far if (i, j) in shown[1]]
                sums["keys"] += len(hashed)
                sums["found"] += sum(mass[j] for j in sees if (i, j) in shown[0] | shown[1])
                sums["beyond"] += sum(mass[j] for j in far)
                sums["hashed"] += sum(mass[j] for j in hashed)
                sums["more_local"] += sum(mass[j] for j in by_distance[: len(hashed)])
                sums["random"] += sum(mass[j] for j in far) * len(hashed) / max(len(far), 1)
                sums["best"] += sum(sorted((mass[j] for j in far), reverse=True)[: len(hashed)])
        count = sum(map(len, chosen))
        results.append({n: x / (sums["beyond"] if n in SHARES else count) for n, x in sums.items()})
    return {name: [numbers[name] for numbers in results] for name in results[0]}


@torch.no_grad()
@each_direction
@pytest.mark.parametrize(
    ("mode", "inputs"),
    [*((mode, PADDED) for mode in MODES), *((mode, PACKED) for mode in WINDOWS)],  # chunks would mix samples
    ids=[*(f"{mode}, padded" for mode in MODES), *(f"{mode}, packed" for mode in WINDOWS)],
)
def test_shares_equal_a_count_pair_after_pair(mode, inputs, causal):
    model = make(mode, causal)
    (found,) = attention_found(model, inputs)
    chosen = [row.nonzero().flatten().tolist() for row in inputs.get("attention_mask", torch.ones_like(IDS))]
    for name, numbers in expected_shares(model, inputs, chosen).items():
        assert getattr(found, name).tolist() == pytest.approx(numbers, abs=1e-9), name
    assert (found.hashed > 0.05).all()


@torch.no_grad()
def test_some_queries_are_evenly_spaced_real_tokens():
    model = make()
    (found,) = attention_found(model, PADDED, queries=10)
    real = [row.nonzero().flatten() for row in MASK]
    chosen = [row[torch.arange(1, 11) * len(row) // 10 - 1].tolist() for row in real]
    for name, numbers in expected_shares(model, PADDED, chosen).items():
        assert getattr(found, name).tolist() == pytest.approx(numbers, abs=1e-9), name
    with pytest.raises(ValueError, match="queries=0"):
        attention_found(model, PADDED, queries=0)


@each_direction
def test_windows_that_show_everything_find_everything(causal):
    (found,) = attention_found(make(causal=causal, local_window=2 * LENGTH), {"input_ids": IDS})
    for name in ("found", *SHARES):
        assert max_abs_diff(getattr(found, name), torch.ones(2)) <= 1e-12
    assert not found.beyond.any()
    inputs = {"input_ids": IDS[:, :40]}
    (found,) = attention_found(make("no local", causal, lsh_window=200, num_hashes=40, num_buckets=2), inputs)
    for name in ("found", *SHARES):
        assert max_abs_diff(getattr(found, name), torch.ones(2)) <= 1e-10
    assert (found.beyond > 0.9).all()


@pytest.mark.parametrize("mode", MODES)
def test_the_parts_add_up_and_nothing_is_better_than_the_best(mode):
    fewer, more = (attention_found(make(mode, layers=["local", "lsh", "lsh"]), PADDED, num_hashes=n) for n in (1, 4))
    assert [x.layer for x in fewer] == [1, 2]
    for few, many in zip(fewer, more, strict=True):
        for x in (few, many):
            assert max_abs_diff(x.found, 1 - x.beyond * (1 - x.hashed)) <= 1e-12
            assert all((x.best >= getattr(x, name)).all() for name in SHARES)
            assert (x.best <= 1 + 1e-12).all()
    assert (more[0].hashed >= fewer[0].hashed).all()
    assert (more[0].keys > fewer[0].keys).all()


@pytest.mark.parametrize("mode", WINDOWS)
def test_padding_and_the_rest_of_a_batch_change_nothing(mode):
    model = make(mode, layers=["local", "lsh"])
    alone = attention_found(model, {"input_ids": IDS[:1]}, queries=16)
    ids = torch.cat([make_ids(1, 7, seed=3), IDS[:1], make_ids(1, 5, seed=4)], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :7], mask[:, -5:] = 0, 0
    equal(attention_found(model, {"input_ids": ids, "attention_mask": mask}, queries=16), alone)
    empty = {"input_ids": torch.cat([ids, ids]), "attention_mask": torch.cat([mask, 0 * mask])}
    equal(attention_found(model, empty, queries=16), alone)
    both, other = (attention_found(model, {"input_ids": x}, queries=16) for x in (IDS, IDS[1:]))
    for x, a, b in zip(both, alone, other, strict=True):
        assert max_abs_diff(x.found, (a.found + b.found) / 2) <= 1e-12
        assert max_abs_diff(x.hashed * x.beyond, (a.hashed * a.beyond + b.hashed * b.beyond) / 2) <= 1e-12


def test_packed_samples_are_those_alone():
    model = make(layers=["local", "lsh"])
    ids, positions = IDS[:1], torch.arange(30).repeat(2)[None]
    packed = attention_found(model, {"input_ids": ids, "position_ids": positions})
    for x, y in zip(packed, attention_found(model, {"input_ids": ids.view(2, 30)}), strict=True):
        assert all(max_abs_diff(a, b) <= 1e-10 for a, b in zip(x[1:8], y[1:8], strict=True))


def test_balance_of_heads_is_that_of_the_layer():
    model = make()
    (found,) = attention_found(model, PADDED)
    numbers = bucket_balance(view_layer(model, layer=0, **PADDED))
    assert found.bucket_entropy.mean().item() == pytest.approx(numbers["entropy"])
    assert found.fullest_bucket.mean().item() == pytest.approx(numbers["largest"])


def test_training_counts_exploration_and_half_precision_works():
    model = make()
    (found,) = attention_found(model.train(), PADDED)
    assert (found.found > 1 - found.beyond * (1 - found.hashed)).all()
    (found,) = attention_found(model.eval().bfloat16(), PADDED)
    (exact,) = attention_found(make(), PADDED)
    assert max_abs_diff(found.found, exact.found) < 0.1


def test_encoders_and_decoders_and_models_with_several_choices():
    layers = {**SMALL_WINDOWS, "attn_layers": ["local", "lsh"]}
    model = make_model(ReformerForConditionalGeneration, **layers, is_encoder_decoder=True, tie_encoder_decoder=True)
    inputs = {**PADDED, "labels": make_ids(2, 40, seed=5)}
    encoder, decoder = attention_found(model, inputs)
    assert (encoder.layer, decoder.layer) == (1, 3)
    assert view_layer(model, layer=3, **inputs).causal
    assert not torch.equal(encoder.found, decoder.found)
    choices = make_model(ReformerForMultipleChoice, **layers)
    (found,) = attention_found(choices, {"input_ids": IDS.view(2, 3, 20)})
    equal([found], attention_found(choices, {"input_ids": IDS.view(6, 1, 20)}))


def test_layers_that_do_not_hash_are_left_out():
    assert attention_found(make(layers=["local", "full"]), PADDED) == []
    assert attention_found(make("chunk", False), {"input_ids": IDS[:, :8]}) == []
    with pytest.raises(ValueError, match="none of this package's layers"):
        attention_found(torch.nn.Linear(2, 2), PADDED)
    with pytest.raises(ValueError, match="no layer hashed"):
        plot_attention_found([])


def test_the_table_and_the_plot_show_every_head():
    found = attention_found(make(cls=ReformerForCausalLM, layers=["lsh", "local", "lsh"]), PADDED)
    lines = format_found(found).splitlines()
    assert len(lines) == 5
    assert len(set(map(len, lines))) == 1
    assert lines[4].split()[:3] == ["2", "1", f"{found[1].found[1]:.3f}"]
    ax = plot_attention_found(found)
    for bars, name in zip(ax.containers, SHARES, strict=True):
        expected = [x for layer in found for x in getattr(layer, name).tolist()]
        assert [bar.get_height() for bar in bars] == pytest.approx(expected)
    ax.figure.canvas.draw()
    mine = plt.figure().add_subplot()
    assert plot_attention_found(found, ax=mine) is mine
    plt.close("all")
