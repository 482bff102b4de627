"""What is drawn of LSH attention is what the model computed."""

import sys

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from conftest import SMALL_WINDOWS, make_ids, make_model, max_abs_diff

from hf_reformer import ReformerForCausalLM, ReformerForMultipleChoice, ReformerModel
from hf_reformer.analysis import plots as visualize
from hf_reformer.analysis.lsh_stats import (
    attention_mass,
    bucket_balance,
    bucket_sizes,
    round_agreement,
    view_layer,
    visible_pairs,
)
from hf_reformer.analysis.plots import (
    attention_image,
    plot_attention,
    plot_attention_mass,
    plot_bucket_sizes,
    plot_buckets,
    plot_pairs,
    plot_round_agreement,
)
from hf_reformer.ops.gather_attention import SparseAttention

matplotlib.use("Agg")

LENGTH = 90
IDS, MASK = make_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
MASK[0, :25], MASK[1, 50:60] = 0, 0
MODES = {
    "window": {**SMALL_WINDOWS, "attn_layers": ["local", "lsh", "full"]},
    "no local": {**SMALL_WINDOWS, "attn_layers": ["local", "lsh"], "lsh_include_local": False},
    "chunk": {
        "attention_mode": "chunk",
        "attn_layers": ["local", "lsh"],
        "num_buckets": [2, 4],
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
        "position_embedding_type": "learned",
    },
}


@pytest.fixture(autouse=True)
def _no_figure_stays_open():
    yield
    plt.close("all")


def make(mode="window", causal=True, cls=ReformerModel, **overrides):
    return make_model(cls, **{**MODES[mode], "is_decoder": causal, **overrides})


@torch.no_grad()
def attentions(model, how="sparse"):
    return model(IDS, attention_mask=MASK, output_attentions=how).attentions


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("mode", MODES)
def test_pairs_are_those_that_the_model_attends_to(mode, causal):
    model = make(mode, causal)
    for layer, weights in enumerate(attentions(model, True)):
        view = view_layer(model, IDS, layer, attention_mask=MASK)
        for row in range(2):
            for head in range(2):
                query, key, order = visible_pairs(view, row, head)
                drawn = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
                drawn[query, key] = True
                attended = (weights[row, head] > 0) & MASK[row, :, None].bool()
                if view.kind == "lsh":  # there a token sees itself where it sees nothing else
                    drawn, attended = (x | torch.eye(LENGTH, dtype=torch.bool) for x in (drawn, attended))
                assert torch.equal(drawn, attended)
                for number, name in enumerate(view.names):
                    a, b = query[order == number], key[order == number]
                    if name.startswith("hash") and mode != "chunk":
                        buckets = view.buckets[row, head, int(name.split()[1]) - 1]
                        assert torch.equal(buckets[a], buckets[b])
                    if name == "position" and view.kind != "full" and mode != "chunk":
                        assert ((a - b).abs() < model.config.local_window + 10).all()  # 10 of padding between


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_what_is_attended_to_beyond_the_local_window_shares_a_bucket(causal):
    model = make(causal=causal)
    view, weights = view_layer(model, IDS, 1), model(IDS, output_attentions=True).attentions[1]
    assert view.buckets.shape == (2, 2, 2, LENGTH)
    together = (view.buckets[..., None] == view.buckets[..., None, :]).any(2)  # (B, H, T, T)
    place = torch.arange(LENGTH)
    far = (place[:, None] - place).abs() >= model.config.local_window
    beyond = (weights > 0) & far
    assert beyond.any()
    assert together[beyond].all()
    assert not together[:, :, far].all()


def test_training_shows_its_own_rotations_and_exploration_and_the_model_is_left_as_it_was():
    model = make(cls=ReformerForCausalLM)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    views = [view_layer(model, IDS, 1), view_layer(model, IDS, 1), view_layer(model.train(), IDS, 1)]
    assert torch.equal(views[0].buckets, views[1].buckets)
    assert not torch.equal(views[0].buckets, views[2].buckets)
    assert views[0].names == ("position", "hash 1", "hash 2")
    assert views[2].names == (*views[0].names, "exploration 1")
    assert views[2].layout.perm.shape[2] == 4
    model.eval()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("mode", MODES)
def test_sizes_and_balance_equal_a_count_by_hand(mode):
    view = view_layer(make(mode), IDS, 1, attention_mask=MASK)
    sizes, count = bucket_sizes(view), 8 if mode == "chunk" else 4
    expected = [
        [[(view.buckets[row, head, i][MASK[row].bool()] == bucket).sum() for bucket in range(count)] for i in range(2)]
        for row, head in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert sizes.flatten().tolist() == torch.tensor(expected).flatten().tolist()
    numbers = bucket_balance(view)
    even = MASK.sum(-1)[:, None, None] / count
    assert numbers["largest"] == pytest.approx((sizes.amax(-1) / even).mean().item(), rel=1e-6)
    assert numbers["used"] == (sizes > 0).double().mean().item()
    assert 0 < numbers["entropy"] < 1


def test_balance_knows_its_extremes():
    view = view_layer(make(), IDS, 1)
    even = view._replace(buckets=torch.arange(LENGTH - 2).remainder(4).expand(2, 2, 2, -1), mask=MASK[:, 2:] >= 0)
    assert bucket_balance(even) == pytest.approx({"largest": 1, "used": 1, "entropy": 1})
    one = even._replace(buckets=torch.zeros_like(even.buckets))
    assert bucket_balance(one) == pytest.approx({"largest": 4, "used": 0.25, "entropy": 0})


def test_agreement_equals_pair_after_pair():
    view = view_layer(make(), IDS, 1, attention_mask=MASK, num_hashes=4)
    pairs, together = 0, [0.0] * 4
    for row in range(2):
        real = MASK[row].nonzero().flatten().tolist()
        for head in range(2):
            x = torch.nn.functional.normalize(view.vectors[row, head], dim=-1)
            for i in real:
                others = sorted((j for j in real if j != i), key=lambda j: -(x[i] @ x[j]).item())
                for j in others[:3]:
                    same = (view.buckets[row, head, :, i] == view.buckets[row, head, :, j]).tolist()
                    pairs += 1
                    together = [n + any(same[: r + 1]) for r, n in enumerate(together)]
    share = round_agreement(view, neighbors=3)
    assert share.tolist() == pytest.approx([n / pairs for n in together])
    assert share[0] > 1.5 / 4  # neighbors, not any two tokens


@pytest.mark.parametrize("mode", MODES)
def test_all_attention_is_received(mode):
    model = make(mode)
    for sparse, dense in zip(attentions(model), attentions(model, True), strict=True):
        received = attention_mass(sparse, MASK)
        assert max_abs_diff(received, attention_mass(dense, MASK)) <= 1e-12
        expected = (dense * MASK[:, None, :, None]).sum(2) / MASK.sum(-1)[:, None, None]
        assert max_abs_diff(received, expected) <= 1e-12
        assert max_abs_diff(received.sum(-1), torch.ones(2, 2)) <= 1e-10
        assert not received.transpose(1, 2)[MASK == 0].any()
        if mode != "chunk":  # padding attends to nothing there
            assert max_abs_diff(received, attention_mass(sparse)) <= 1e-12


def test_gradients_pass_through_what_is_received():
    weights = torch.rand(1, 1, 3, 2, requires_grad=True)
    attention_mass(SparseAttention(torch.tensor([[[[0, -1], [0, 1], [1, 2]]]]), weights)).sum().backward()
    assert (weights.grad > 0).all()


@pytest.mark.parametrize("side", [256, 90, 45, 7])
@pytest.mark.parametrize("mode", ["window", "chunk"])
def test_images_in_blocks_keep_every_line_s_sum(mode, side):
    model = make(mode)
    sparse, dense = attentions(model)[1], attentions(model, True)[1]
    image, steps = attention_image(sparse, 0, 1, MASK, side)
    assert max(image.shape) <= side
    assert max_abs_diff(image, attention_image(dense, 0, 1, MASK, side)[0]) <= 1e-12
    seeing = [MASK[0, i : i + steps[0]].any() for i in range(0, LENGTH, steps[0])]
    assert max_abs_diff(image.sum(-1), torch.tensor(seeing).double()) <= 1e-10
    if side >= LENGTH:
        assert max_abs_diff(image, dense[0, 1] * MASK[0, :, None]) <= 1e-12


PICTURES = {
    "buckets": lambda view, weights, ax: plot_buckets(view, 1, ax=ax),
    "pairs": lambda view, weights, ax: plot_pairs(view, ax=ax),
    "attention": lambda view, weights, ax: plot_attention(weights, mask=MASK, ax=ax),
    "received": lambda view, weights, ax: plot_attention_mass(weights, mask=MASK, ax=ax),
    "sizes": lambda view, weights, ax: plot_bucket_sizes(view, ax=ax),
    "agreement": lambda view, weights, ax: plot_round_agreement(view, ax=ax),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_axes_and_nothing_is_shown(name, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda *_, **__: pytest.fail("shown"))
    model = make(cls=ReformerForCausalLM)
    view, weights = view_layer(model, IDS, 1, attention_mask=MASK), attentions(model)[1]
    ax = PICTURES[name](view, weights, None)
    assert ax.get_xlabel()
    assert ax.get_ylabel()
    assert ax.get_title()
    ax.figure.canvas.draw()
    mine = plt.figure().add_subplot()
    open_before = plt.get_fignums()
    assert PICTURES[name](view, weights, mine) is mine
    assert plt.get_fignums() == open_before


def test_nothing_is_drawn_for_padding():
    model = make()
    view, weights = view_layer(model, IDS, 1, attention_mask=MASK), attentions(model)[1]
    padding = MASK[0] == 0
    points = plot_buckets(view).collections[0].get_offsets()
    assert points[:, 0].tolist() == MASK[0].nonzero().flatten().tolist()
    pairs = torch.as_tensor(plot_pairs(view).images[0].get_array().filled())
    shown = torch.as_tensor(plot_attention(weights).images[0].get_array().filled())
    for image, empty in ((pairs, len(view.names)), (shown, 0)):
        assert (image[padding] == empty).all()
        assert (image[:, padding] == empty).all()
        assert (image != empty).any()


def test_a_pair_has_the_colour_of_the_first_order_that_shows_it():
    view = view_layer(make(), IDS, 1)
    image = torch.as_tensor(plot_pairs(view, head=1).images[0].get_array().filled())
    query, key, order = visible_pairs(view, head=1)
    firsts = {}
    for i, j, n in zip(query.tolist(), key.tolist(), order.tolist(), strict=True):
        firsts[i, j] = min(n, firsts.get((i, j), n))
    assert set(firsts.values()) == {0, 1, 2}
    assert all(image[pair] == n for pair, n in firsts.items())
    assert (image < 3).sum() == len(firsts)


def test_texts_stand_along_both_axes():
    model = make()
    weights = model(IDS[:, :5], output_attentions="sparse").attentions[0]
    ax = plot_attention(weights, tokens=list("abcde"))
    for axis in (ax.xaxis, ax.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == list("abcde")
    with pytest.raises(ValueError, match="holds 4 texts for 5 tokens"):
        plot_attention(weights, tokens=list("abcd"))


@torch.no_grad()
def test_a_step_of_generation_can_be_drawn():
    model = make(cls=ReformerForCausalLM)
    past = model(IDS[:, :60], use_cache=True).past_key_values
    step = model(IDS[:, 60:63], past_key_values=past, output_attentions="sparse").attentions[1]
    assert attention_mass(step).shape == (2, 2, 63)
    assert attention_image(step)[0].shape == (3, 63)
    assert len(plot_attention(step).images) == 1


def test_what_does_not_exist_says_so(monkeypatch):
    model = make()
    local, hashed = view_layer(model, IDS, 0), view_layer(model, IDS, 1)
    for call, words in (
        (lambda: view_layer(model, IDS, 3), r"`layer=3` does not exist: 0 to 2"),
        (lambda: view_layer(torch.nn.Linear(2, 2), IDS, 0), "none of this package's layers"),
        (lambda: view_layer(model, IDS, 0, past_key_values=object()), "past_key_values"),
        (lambda: view_layer(model, IDS, 0, cache=object()), "`cache` holds tokens"),
        (lambda: plot_buckets(local), "is a local layer"),
        (lambda: bucket_balance(view_layer(make("chunk"), IDS[:, :8], 1)), "no longer than its chunk"),
        (lambda: plot_buckets(hashed, hash_round=2), "`hash_round=2`"),
        (lambda: plot_pairs(hashed, head=2), "`head=2`"),
        (lambda: plot_attention(torch.zeros(1, 1, 4, 4), row=-1), "`row=-1`"),
        (lambda: plot_attention_mass(torch.zeros(1, 1, 4, 4), row=1), "`row=1`"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert not plt.get_fignums(), "what cannot be drawn opens no figure"
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"\.\[train\]"):
        visualize.plot_pairs(hashed)


def test_models_with_several_choices_and_models_that_return_tuples():
    choices = make_model(ReformerForMultipleChoice, **MODES["window"])
    ids, mask = make_ids(2, 3, 9), torch.ones(2, 3, 9, dtype=torch.long)
    mask[0, 1, 5:] = 0
    view = view_layer(choices, ids, 1, attention_mask=mask)
    assert torch.equal(view.mask, mask.view(6, 9).bool())
    assert bucket_sizes(view).sum() == mask.sum() * view.heads * view.buckets.shape[2]
    tuples = make(return_dict=False)
    assert torch.equal(view_layer(tuples, IDS, 1).buckets, view_layer(make(), IDS, 1).buckets)
