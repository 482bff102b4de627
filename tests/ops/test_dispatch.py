"""The attention op: every backend equals the reference, and the reference equals counting by hand."""

import math

import pytest
import torch
from attention_cases import Case, assert_equals_reference, cases, make_case
from conftest import SMALL_WINDOWS, make_ids, make_model, max_abs_diff
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from hf_reformer import ReformerModel
from hf_reformer.ops import dispatch, tiled_attention
from hf_reformer.ops.dispatch import BACKENDS, resolve_backend, select_backend, windowed_attention
from hf_reformer.ops.layout import sees_any, window_layout
from hf_reformer.ops.prng import make_key
from hf_reformer.ops.reference import attention_with_weights, dropout_factors, visible_counts

FAST_BACKENDS = [name for name in BACKENDS if name != "reference"]


# --- backends against the reference


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@given(drawn=cases, scores=st.sampled_from([1, 50, 700, 2**20]))
@settings(max_examples=100)
def test_a_backend_equals_the_reference(backend, drawn, scores):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled_attention, "BLOCK_SCORES", scores)  # blocks split everywhere
        assert_equals_reference(make_case(drawn), backend)


@pytest.mark.slow
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@given(drawn=cases, scores=st.sampled_from([1, 50, 700, 2**20]))
@settings(max_examples=1000)
def test_a_backend_equals_the_reference_in_many_cases(backend, drawn, scores):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled_attention, "BLOCK_SCORES", scores)
        assert_equals_reference(make_case(drawn), backend)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("mode", ["window", "chunk"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_backend_equals_the_reference_at_default_sizes(backend, mode, causal):
    window = 128 if mode == "window" else 64
    case = Case(mode=mode, causal=causal, length=1024, batch=1, size=16, num_buckets=8, window=window, padding=0.1)
    assert_equals_reference(case, backend)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["window", "chunk"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_other_dtypes_lose_no_more_than_their_rounding(backend, dtype, mode, dropout):
    assert_equals_reference(Case(mode=mode, length=60, dropout=dropout), backend, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["window", "chunk"])
def test_the_reference_accumulates_half_precision_in_float32(dtype, mode):
    assert_equals_reference(Case(mode=mode, length=60), "reference", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["window", "chunk"])
def test_autocast_does_not_touch_the_op(backend, mode):
    case = Case(mode=mode, dtype=torch.float32)
    expected = case.values_and_gradients(backend)
    found = case.values_and_gradients(backend, autocast=True)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_layout_of_the_inputs_does_not_matter(backend):
    case = Case()
    expected = case.values_and_gradients(backend)
    projected = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.inputs]  # as a projection gives them
    strided = [torch.stack([x, -x], dim=-1).flatten(-2)[..., ::2] for x in case.inputs]
    for inputs in (projected, strided):
        assert not any(x.is_contiguous() for x in inputs)
        case.inputs = inputs
        for a, b in zip(case.values_and_gradients(backend), expected, strict=True):
            assert max_abs_diff(a, b) <= 1e-12
    rows = [x[:1].expand(2, -1, -1, -1) for x in case.inputs]  # rows that share memory
    case.inputs = [x.contiguous() for x in rows]
    expected = case.values_and_gradients(backend)[0]
    found = case.attend(*rows, backend=backend)
    assert max_abs_diff(found, expected) <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["window", "chunk"])
def test_one_order_may_serve_all_heads(backend, mode):
    one, two = (Case(mode=mode, heads=heads, rounds=1) for heads in (1, 2))
    two.inputs = [x.expand(-1, 2, -1, -1) for x in one.inputs]
    expected = one.values_and_gradients(backend)[0].expand(-1, 2, -1, -1)
    assert max_abs_diff(one.attend(*two.inputs, backend=backend), expected) <= 1e-12


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recording_a_graph_changes_no_bit(backend, dtype):
    """A reversible layer computes a branch again in backward and relies on it."""
    case = Case(length=200, window=20, dropout=0.2, dtype=dtype)
    expected = case.values_and_gradients(backend)[0]
    with torch.no_grad():
        found = case.attend(*case.inputs, backend=backend)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("mode", ["window", "chunk"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_are_those_of_finite_differences(backend, mode, dropout, shared):
    case = Case(mode=mode, length=10, batch=1, heads=1, size=3, dropout=dropout, shared=shared, causal=shared)
    inputs = [x.requires_grad_() for x in case.inputs]
    assert torch.autograd.gradcheck(lambda *x: case.attend(*x, backend=backend), inputs)


def test_gradients_that_nobody_wants_are_not_made():
    case = Case()
    query, key, value = case.inputs
    value.requires_grad_()
    case.attend(query, key, value, backend="torch").sum().backward()
    assert value.grad is not None
    assert query.grad is None
    assert key.grad is None


def test_a_second_derivative_is_refused():
    case = Case()
    inputs = [x.requires_grad_() for x in case.inputs]
    out = case.attend(*inputs, backend="torch")
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_memory_between_forward_and_backward_grows_with_length_alone(backend):
    def kept(window):
        numbers = []
        case = Case(length=512, window=window, rounds=2, batch=1, dropout=0.1)
        inputs = [x.requires_grad_() for x in case.inputs]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: numbers.append(x.numel()) or x, lambda x: x):
            case.attend(*inputs, backend=backend)
        return sum(numbers)

    assert kept(64) == kept(8)


# --- the whole encoder


@pytest.mark.parametrize(
    ("path", "causal", "training"),
    [
        ("reversible", True, True),
        pytest.param("reversible", False, False, marks=pytest.mark.slow),
        pytest.param("plain", True, True, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_an_encoder_are_those_of_finite_differences(path, causal, training):
    model = make_model(
        ReformerModel,
        **{**SMALL_WINDOWS, "hidden_size": 4, "attention_head_size": 2, "feed_forward_size": 4},
        is_decoder=causal,
        reversible=path == "reversible",
        hidden_dropout_prob=0.2,
        lsh_attention_probs_dropout_prob=0.2,
    ).train(training)
    length = 9
    mask = (torch.arange(length)[None] != 3).long()
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, length, 4, generator=generator, dtype=torch.float64).requires_grad_()
    name = "layers.1.attention.qk_proj.weight"
    weight = dict(model.named_parameters())[name].detach().clone().requires_grad_()

    def forward(embeds, weight):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the key of this forward's dropout and rotations
            out = functional_call(model, {name: weight}, kwargs={"inputs_embeds": embeds, "attention_mask": mask})
        return (out.last_hidden_state[mask.bool()] * mixing).sum(-1)

    mixing = torch.randn(8, generator=generator, dtype=torch.float64)
    torch.autograd.gradcheck(forward, (embeds, weight), eps=1e-5, atol=1e-5, rtol=1e-4, nondet_tol=1e-12)


# --- what is attended to, counted by hand


def union_by_hand(case: Case, row: int, head: int) -> list[set[int]]:
    """For every token, the set of tokens that its windows show."""
    length = case.buckets.shape[-1]
    real = range(length) if case.mask is None else case.mask[row].nonzero().flatten().tolist()
    seen = [set() for _ in range(length)]
    for buckets, count, window in case.groups:
        for order in buckets[row, head].tolist():
            for bucket in range(count):
                segment = [t for t in real if order[t] == bucket]
                for place, token in enumerate(segment):
                    first = place - window + 1 if case.causal else place - window // 2
                    last = place if case.causal else place + window // 2
                    seen[token] |= set(segment[max(first, 0) : last + 1])
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=cases)
@settings(max_examples=40)
def test_every_pair_counts_once(backend, drawn):
    """With equal scores and values that name the tokens, the output is the share of each token."""
    case = make_case(drawn, mode="window", dropout=0.0, length=min(drawn["length"], 30))
    query, key, _ = case.inputs
    batch, heads, length = query.shape[:3]
    names = torch.eye(length, dtype=torch.float64).expand(batch, heads, -1, -1)
    found = case.attend(query * 0, key, names, backend=backend)
    for row in range(batch):
        for head in range(heads):
            for token, seen in enumerate(union_by_hand(case, row, head)):
                seen = seen - {token} or seen if case.shared else seen
                expected = torch.zeros(length, dtype=torch.float64)
                expected[list(seen)] = 1 / max(len(seen), 1)
                assert max_abs_diff(found[row, head, token], expected) <= 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@given(drawn=cases)
@settings(max_examples=40)
def test_chunks_count_a_pair_as_often_as_it_is_shown(backend, drawn):
    case = make_case(drawn, mode="chunk", dropout=0.0, shared=False, padding=None, length=min(drawn["length"], 30))
    query, key, _ = case.inputs
    batch, heads, length = query.shape[:3]
    names = torch.eye(length, dtype=torch.float64).expand(batch, heads, -1, -1)
    found = case.attend(query * 0, key, names, backend=backend)
    lines = case.layout.perm.flatten(2)
    for row in range(batch):
        for head in range(heads):
            line = lines[row, head].tolist()
            shown = torch.zeros(length, length, dtype=torch.float64)
            for place, token in enumerate(line):
                first, last = (
                    int(x.flatten(2)[row, head, place]) for x in (case.layout.window_start, case.layout.window_end)
                )
                for other in range(first, last + 1):
                    shown[token, line[other % len(line)]] += 1
            if case.causal:
                shown = shown.tril()  # what is left out by a score of -1e9 weighs nothing: a token sees itself
            assert max_abs_diff(found[row, head], shown / shown.sum(-1, keepdim=True)) <= 1e-12


@given(drawn=cases)
def test_weights_of_a_token_add_up_to_one(drawn):
    case = make_case(drawn)
    query, key, value = case.inputs
    _, weights = attention_with_weights(query, None if case.shared else key, value, case.layout, **case.options)
    sums = weights.sum(-1)
    expected = torch.ones_like(sums)
    if case.mode == "window" and case.mask is not None:  # padding sees nothing
        expected = case.mask[:, None].expand_as(sums).double()
    assert max_abs_diff(sums, expected) <= 1e-12
    assert weights.min() >= 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_sees_nothing_gives_zero_and_has_no_gradient(backend):
    case = Case(padding=1.0)
    out, *grads = case.values_and_gradients(backend)
    assert all((x == 0).all() for x in (out, *grads))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["window", "chunk"])
def test_a_shared_token_alone_sees_itself(backend, mode):
    case = Case(mode=mode, length=1, padding=None, dtype=torch.float32)
    out, query, key, value = case.values_and_gradients(backend)
    assert torch.equal(out, case.inputs[2])
    assert (query == 0).all()
    assert (key == 0).all()
    assert (value != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("length", [30, 37])
def test_large_and_small_scores_stay_finite(backend, scale, length):
    case = Case(dtype=torch.float32, length=length)
    case.inputs = [x * scale for x in case.inputs]
    assert all(x.isfinite().all() for x in case.values_and_gradients(backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position_order", [True, False])
@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_the_last_token_of_a_partial_tile_has_finite_gradients(backend, position_order, scale):
    """A score of the token with itself may be far beyond all that it sees, or all that it sees."""
    case = Case(length=9, block_size=8, window=1, padding=None, position_order=position_order, dtype=torch.float32)
    case.inputs[0] = case.inputs[1] = case.inputs[0] * scale
    assert all(x.isfinite().all() for x in case.values_and_gradients(backend))


# --- what is not a number


@pytest.mark.parametrize("mode", ["window", "chunk"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padding", [None, 0.3])
@pytest.mark.parametrize(("length", "window"), [(30, 5), (4, 5), (1, 2)])
def test_which_tokens_see_any_of_some(mode, causal, padding, length, window):
    case = Case(mode=mode, causal=causal, padding=padding, length=length, window=window)
    tokens = torch.rand(2, 2, length, generator=torch.Generator().manual_seed(1)) < 0.15
    visible = visible_counts(case.layout).expand(2, 2, length, length) > 0
    if mode == "chunk":
        visible = visible.tril() if causal else visible
        visible = visible if case.mask is None else visible & case.mask[:, None, None]
    expected = (visible & tokens[:, :, None]).any(-1)
    assert torch.equal(sees_any(tokens, case.layout, causal, case.mask), expected)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("looks", [True, False], ids=["cpu", "device"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["query", "key", "value"])
@pytest.mark.parametrize("mode", ["window", "chunk"])
def test_what_is_not_finite_reaches_what_sees_it_alone(monkeypatch, backend, looks, value, which, mode):
    """Infinity may weigh nothing, and still is times 0 not a number in gradients."""
    case = Case(mode=mode, shared=False, length=70, size=8, value_size=8, padding=None, dtype=torch.float32)
    if not looks:
        monkeypatch.setattr(dispatch, "may_look_at", lambda x: False)
    clean = [x.clone() for x in case.inputs]
    bad_token = torch.zeros(2, 2, 70, dtype=torch.bool)
    bad_token[1, 0, 20] = True
    clean[which][bad_token] = 0
    found = [x.clone().requires_grad_() for x in clean]
    with torch.no_grad():
        found[which][1, 0, 20, 3] = value
    expected = [x.requires_grad_() for x in clean]
    spoiled = bad_token if which == 0 else sees_any(bad_token, case.layout, case.causal)
    assert spoiled.any()
    assert not spoiled[0].any()
    outs = [case.attend(*inputs, backend=backend) for inputs in (found, expected)]
    assert torch.equal(outs[0].isnan(), spoiled[..., None].expand_as(outs[0]))
    assert max_abs_diff(outs[0][~spoiled], outs[1][~spoiled]) < 1e-6
    for out in outs:
        out[~spoiled].sum().backward()
    for a, b in zip(found, expected, strict=True):
        assert a.grad.isfinite().all()
        assert max_abs_diff(a.grad[~bad_token], b.grad[~bad_token]) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("which", ["shared", "query", "key", "padding"])
@pytest.mark.parametrize("mode", ["window", "chunk"])
def test_numbers_whose_squares_are_not_finite_are_numbers(backend, which, mode):
    options = {"length": 70, "size": 8, "value_size": 8, "padding": 0.3, "causal": True, "dtype": torch.float32}
    case = Case(mode=mode, shared=which == "shared", **options)
    inputs = [None if x is None else x.clone() for x in case.inputs]
    inputs[which == "key"][:, :, 20, 3] = 1e20
    if which == "padding":
        inputs[0][:, :, 20, 3], inputs[1].transpose(1, 2)[~case.mask] = 0, 1e20
    found, expected = (case.attend(*inputs, backend=name) for name in (backend, "reference"))
    assert expected.isfinite().all()
    assert max_abs_diff(found, expected) < 1e-5


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("mode", ["window", "chunk"])
def test_finite_inputs_give_the_same_bits_whether_or_not_they_are_looked_at(monkeypatch, backend, shared, mode):
    case = Case(mode=mode, shared=shared, length=70, dtype=torch.float32)
    expected = case.values_and_gradients(backend)
    monkeypatch.setattr(dispatch, "may_look_at", lambda x: False)
    assert all(map(torch.equal, case.values_and_gradients(backend), expected))


# --- dropout


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_the_share_it_promises(p):
    factors = dropout_factors(make_key(3), p, batch=4, heads=4, length=128)
    kept = (factors > 0).double()
    deviation = math.sqrt(p * (1 - p) / kept.numel())
    assert abs(kept.mean().item() - (1 - p)) < 5 * deviation
    assert factors.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    for dim in (0, 1, 2, 3):  # no row, head, query or key is favoured
        others = [d for d in range(4) if d != dim]
        assert (kept.mean(others) - (1 - p)).abs().max() < 6 * deviation * math.sqrt(kept.shape[dim])


def test_dropout_is_a_function_of_its_key():
    cases = [Case(dropout=0.5) for _ in range(3)]
    cases[2].options["dropout_key"] = make_key(99)
    outs = [case.values_and_gradients("torch")[0] for case in cases]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


# --- choice of backend


def test_an_unknown_backend_is_refused(monkeypatch):
    case = Case()
    with pytest.raises(ValueError, match=r"'flash' is unknown.*'torch'.*HF_REFORMER_BACKEND"):
        case.attend(*case.inputs, backend="flash")
    monkeypatch.setenv("HF_REFORMER_BACKEND", "flash")
    with pytest.raises(ValueError, match=r"'flash' is unknown"):
        resolve_backend("torch")


def test_the_environment_chooses_the_backend(monkeypatch):
    called = []

    def watch(name, function):
        def watched(*args, **kwargs):
            called.append(name)
            return function(*args, **kwargs)

        return watched

    for name, function in BACKENDS.items():
        monkeypatch.setitem(BACKENDS, name, watch(name, function))
    model = make_model(ReformerModel, **SMALL_WINDOWS, attention_backend="torch")
    for choice in ("reference", "torch"):
        monkeypatch.setenv("HF_REFORMER_BACKEND", choice)
        called.clear()
        model(make_ids(1, 10))
        assert called == [choice, choice]  # a local and an lsh layer


def test_auto_is_a_backend_that_works(monkeypatch):
    monkeypatch.delenv("HF_REFORMER_BACKEND", raising=False)
    double, single = (torch.zeros(1, 1, 4, 8, dtype=dtype) for dtype in (torch.float64, torch.float32))
    assert select_backend("auto", double, double) == "torch"  # the kernels know no float64
    assert select_backend("auto", single, single) in ("cpu", "torch")
    assert select_backend("reference", single, single) == "reference"


def test_models_agree_whatever_the_backend():
    ids = make_ids(2, 50)
    outputs = [
        make_model(ReformerModel, **SMALL_WINDOWS, attention_backend=name)(ids).last_hidden_state for name in BACKENDS
    ]
    for output in outputs[1:]:
        assert max_abs_diff(output, outputs[0]) <= 1e-10


def test_rows_too_long_to_count_are_refused(monkeypatch):
    monkeypatch.setattr(tiled_attention, "MAX_LENGTH", 8)
    x = torch.zeros(1, 1, 9, 4)
    layout = window_layout([(torch.zeros(1, 1, 1, 9, dtype=torch.int32), 1, 3)], True, None)
    with pytest.raises(ValueError, match="8 tokens a sequence"):
        windowed_attention(x, x, x, layout, causal=True, backend="torch")
