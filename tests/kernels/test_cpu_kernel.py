"""The fused C++ kernel: equal to the reference in every variant that runs here, and a fallback where none does."""

import logging

import pytest
import torch
from attention_cases import Case, assert_equals_reference, cases, make_case, reference_of
from conftest import SMALL_WINDOWS, make_ids, make_model, max_abs_diff
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_reformer import ReformerForCausalLM
from hf_reformer.ops import dispatch, kernel_check
from hf_reformer.ops.dispatch import select_backend
from hf_reformer.ops.layout import sort_by_bucket, window_extent
from hf_reformer.ops.lsh import Centering, lsh_buckets, unit_sums, window_rotations
from hf_reformer.ops.prng import make_key, normal_rows
from reformer_kernels import cpu
from reformer_kernels.cpu import build, library

try:
    build.compiler()
except build.KernelBuildError as error:
    pytest.skip(f"no compiled kernel: {error}", allow_module_level=True)

FOUR_TILES = {"length": 250, "num_buckets": 3}


@pytest.fixture(scope="module", params=build.supported_variants(), autouse=True)
def variant(request):
    """Every test runs with every variant that this processor knows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_REFORMER_CPU_VARIANT", request.param)
        dispatch.check_library.cache_clear()
        assert dispatch.check_library() is None
        yield request.param
    dispatch.check_library.cache_clear()


@pytest.fixture
def checked_again():
    """The library is checked when the test first uses it, and again when the next one does."""
    dispatch.check_library.cache_clear()
    yield
    dispatch.check_library.cache_clear()


def check(dtype: torch.dtype = torch.float32, **options) -> None:
    """Values and gradients are those of the reference, which is the same for all variants."""
    options["dtype"] = dtype
    assert_equals_reference(Case(**options), "cpu", dtype, reference_of(**options))


def test_the_variant_is_the_one_that_was_asked_for(variant):
    assert cpu.current_variant() == variant


# --- attention


@given(drawn=cases, size=st.sampled_from([8, 16, 24, 40]), scale=st.sampled_from([1.0, -0.3]))
@settings(max_examples=100)
def test_it_equals_the_reference(drawn, size, scale):
    case = make_case(drawn, size=size, value_size=size, scale=scale, dtype=torch.float32)
    assert_equals_reference(case, "cpu", torch.float32)


@pytest.mark.slow
@given(drawn=cases, size=st.sampled_from([8, 32, 72, 128]), length=st.integers(60, 300), window=st.integers(1, 200))
@settings(max_examples=300)
def test_it_equals_the_reference_over_many_tiles(drawn, size, length, window):
    case = make_case(drawn, size=size, value_size=8, length=length, window=window, dtype=torch.float32)
    assert_equals_reference(case, "cpu", torch.float32)


@pytest.mark.parametrize("mode", ["window", "chunk"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_it_equals_the_reference_at_usual_sizes(mode, causal, shared, dropout):
    check(
        mode=mode, causal=causal, shared=shared, dropout=dropout, length=512, batch=1, size=64, value_size=64,
        num_buckets=4, window=64, padding=0.1,
    )  # fmt: skip


@pytest.mark.parametrize("window", [1, 63, 64, 65, 250, 2000])
def test_any_window(window):
    check(window=window, size=8, value_size=16, **FOUR_TILES)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    ("chunk", "length"),
    [(300, 900), (96, 960), (400, 400)]
    + [pytest.param(*sizes, marks=pytest.mark.slow) for sizes in ((384, 1152), (832, 3328), (1500, 1500))],
)
def test_chunks_far_longer_than_the_kernels_tiles(chunk, length, shared, two_threads):
    """A chunk sees the one before it, and one that is as long as the input sees itself."""
    check(mode="chunk", window=chunk, length=length, shared=shared, rounds=1, batch=1, heads=1, size=8, value_size=8)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_does_not_matter(default, checked_again):
    case = Case(length=200, size=8, value_size=8, dtype=torch.float32)
    expected = case.values_and_gradients("cpu")
    normals = cpu.normal_rows(make_key(0), 2, 100)
    torch.set_default_dtype(default)
    dispatch.check_library.cache_clear()
    try:
        assert all(map(torch.equal, case.values_and_gradients("cpu"), expected))
        assert torch.equal(cpu.normal_rows(make_key(0), 2, 100), normals)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mode", ["window", "chunk"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_half_precision_accumulates_in_float32(dtype, mode, dropout):
    check(dtype, mode=mode, length=60, size=16, value_size=16, dropout=dropout)


@pytest.mark.parametrize("mode", ["window", "chunk"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 20.0, 300.0])
def test_small_and_large_scores(mode, scale):
    """Beyond a bound on the scores the softmax looks for their maximum; neither way may overflow or lose a row."""
    case = Case(mode=mode, size=16, value_size=16, window=16, dtype=torch.float32, length=192)
    case.inputs[0] = case.inputs[0] * scale
    out, *grads = case.values_and_gradients("cpu")
    expected, *expected_grads = case.values_and_gradients("reference", torch.float64)
    assert max_abs_diff(out, expected) <= 1e-5 * max(1, scale)
    for a, b in zip(grads, expected_grads, strict=True):
        assert max_abs_diff(a, b) <= 1e-5 * max(1, scale) * max(1, b.abs().max().item())


@pytest.mark.parametrize("widest", [0, 2])
def test_inputs_may_differ_in_dtype(widest):
    """Rotary positions, for one, turn half-precision queries into float32 and leave the values."""
    case = Case(length=60, size=16, value_size=16, dtype=torch.bfloat16)
    case.inputs[widest] = case.inputs[widest].float()
    out, *grads = case.values_and_gradients("cpu")
    expected, *expected_grads = case.values_and_gradients("reference", torch.float64)
    assert [x.dtype for x in grads] == [x.dtype for x in case.inputs]
    for a, b in zip((out, *grads), (expected, *expected_grads), strict=True):
        assert max_abs_diff(a, b) <= 2e-2 * max(1, b.abs().max().item())


@pytest.mark.parametrize("mode", ["window", "chunk"])
@pytest.mark.parametrize("scale", [1.0, 300.0])
@pytest.mark.parametrize("shared", [True, False])
def test_what_is_not_a_number_shows(mode, scale, shared):
    """A token that sees itself or others through NaN gives NaN, whichever way its softmax is computed."""
    case = Case(
        mode=mode, shared=shared, size=8, value_size=8, padding=None, window=16, length=64, dtype=torch.float32
    )
    case.inputs[0] = case.inputs[0] * scale
    case.inputs[0][0, 0, 20] = float("nan")
    out = case.attend(*case.inputs, backend="cpu")
    expected = case.attend(*case.inputs, backend="reference")
    assert expected[0, 0, 20:].isnan().any()
    assert not (expected.isnan() & out.isfinite()).any()
    assert out[1].isfinite().all()  # the other row of the batch


@pytest.mark.parametrize("mode", ["window", "chunk"])
def test_a_token_alone_sees_itself(mode):
    case = Case(mode=mode, length=1, padding=None, size=8, value_size=8, dtype=torch.float32)
    out, query, _, value = case.values_and_gradients("cpu")
    assert torch.equal(out, case.inputs[2])
    assert (query == 0).all()
    assert (value != 0).all()


def test_a_token_that_sees_nothing_gives_zero_and_has_no_gradient():
    case = Case(padding=1.0, size=8, value_size=8, dtype=torch.float32)
    assert all((x == 0).all() for x in case.values_and_gradients("cpu"))


def test_the_layout_of_the_inputs_does_not_matter():
    case = Case(size=8, value_size=8, dtype=torch.float32, **FOUR_TILES)
    expected = case.values_and_gradients("cpu")
    for layout in (
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # as a projection gives it
        lambda x: torch.stack([x, -x], dim=-1).flatten(-2)[..., ::2],
    ):
        other = Case(size=8, value_size=8, dtype=torch.float32, **FOUR_TILES)
        other.inputs = [layout(x) for x in case.inputs]
        for a, b in zip(other.values_and_gradients("cpu"), expected, strict=True):
            assert torch.equal(a, b)


def test_inputs_stay_as_they_are():
    case = Case(size=8, value_size=8, dtype=torch.float32)
    before = [x.clone() for x in case.inputs]
    case.values_and_gradients("cpu")
    assert all(torch.equal(a, b) for a, b in zip(case.inputs, before, strict=True))


@pytest.mark.parametrize("mode", ["window", "chunk"])
@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_no_bit_of_the_output(mode, threads):
    """One row and one head, so that its segments run side by side."""
    case = Case(
        mode=mode, batch=1, heads=1, length=4096, size=8, value_size=8, window=16, num_buckets=20, padding=None,
        dtype=torch.float32,
    )  # fmt: skip
    alone = case.values_and_gradients("cpu")
    torch.set_num_threads(threads)
    try:
        together = case.values_and_gradients("cpu")
    finally:
        torch.set_num_threads(1)
    assert torch.equal(alone[0], together[0])
    for a, b in zip(alone[1:], together[1:], strict=True):
        assert max_abs_diff(a, b) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_recording_a_graph_changes_no_bit(dtype):
    case = Case(size=8, value_size=8, dropout=0.2, dtype=dtype, **FOUR_TILES)
    expected = case.values_and_gradients("cpu")[0]
    with torch.no_grad():
        assert torch.equal(case.attend(*case.inputs, backend="cpu"), expected)


def test_a_second_derivative_is_refused():
    case = Case(size=8, value_size=8, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in case.inputs]
    out = case.attend(*inputs, backend="cpu")
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="autograd"):
        grad.sum().backward()


@pytest.mark.parametrize("variant", build.supported_variants()[:1], indirect=True)  # it is torch's side of the ops
def test_the_ops_keep_their_promises_to_torch():
    """Shapes, strides and dtypes that compilation relies on are those of the real outputs."""
    ops = torch.ops.reformer_kernels
    case = Case(size=8, value_size=16, dtype=torch.float32, mode="window")
    query, _, value = (x.detach().requires_grad_() for x in case.inputs)
    layout = case.layout
    for query_weights in (None, torch.rand(case.mask.shape)):
        inputs = (query, None, value, *layout[:3], case.mask, None, query_weights, *layout[3:], True, 0.0, 1.0)
        torch.library.opcheck(ops.cpu_attention.default, inputs)
    rotations = window_rotations(make_key(0), 0, 2, 8, 2, 6)
    for center in ((False, *Centering(True)), (True, *Centering(False, case.mask))):
        torch.library.opcheck(ops.cpu_lsh_buckets.default, (query.detach(), rotations, [6], *center))
    torch.library.opcheck(ops.cpu_normal_rows.default, (make_key(0), 2, 5))
    for outputs in (1, 2, 3):
        torch.library.opcheck(
            ops.cpu_sort_by_bucket.default, ([case.buckets] * 2, case.mask, [3, -1], [4, 9], [0, 1], outputs)
        )


# --- hashing and sorting


@given(seed=st.integers(-(2**31), 2**31 - 1), rows=st.integers(1, 4), count=st.integers(1, 9000))
@settings(max_examples=30)
def test_normal_numbers_are_those_of_the_torch_backend(seed, rows, count):
    found = cpu.normal_rows(make_key(seed), rows, count)
    assert found.dtype == torch.float32
    assert max_abs_diff(found, normal_rows(make_key(seed), rows, count)) <= 5e-6


@given(
    seed=st.integers(0, 10**6), length=st.integers(1, 150), size=st.sampled_from([8, 24, 64]),
    rounds=st.integers(1, 4), factors=st.sampled_from([2, 6, 64, (4, 8), (2, 4, 6)]),
)  # fmt: skip
def test_buckets_are_those_of_the_torch_backend(seed, length, size, rounds, factors):
    vectors = torch.randn(2, 3, length, size, generator=torch.Generator().manual_seed(seed))
    rotations = window_rotations(make_key(seed), 0, 3, size, rounds, factors)
    found, expected = (hash_(vectors, rotations, factors) for hash_ in (dispatch.lsh_buckets, lsh_buckets))
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert (found != expected).sum() <= 1  # a near-tie


@given(
    seed=st.integers(0, 10**6), length=st.integers(1, 300), causal=st.booleans(), padding=st.booleans(),
    packed=st.booleans(), before=st.integers(0, 40), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    size=st.sampled_from([8, 24, 40, 64]), heads=st.sampled_from([1, 3]), share=st.sampled_from([1.0, 0.5]),
)  # fmt: skip
def test_centered_buckets_are_those_of_the_torch_backend(
    seed, length, causal, padding, packed, before, dtype, size, heads, share, two_threads
):
    generator = torch.Generator().manual_seed(seed)
    vectors = (torch.randn(1, length + before, heads, size, generator=generator) + 1).to(dtype).transpose(1, 2)
    mask = torch.rand(1, length, generator=generator) > 0.3 if padding else None
    samples = (torch.rand(1, length, generator=generator) < 0.03).cumsum(-1, dtype=torch.int32) if packed else None
    samples = None if samples is None else samples - samples[:, :1]
    sums = counts = None
    if causal and not packed and before:
        sums, counts = unit_sums(vectors[:, :, :before]), torch.full((1,), before)
    centering = Centering(causal, mask, samples, sums, counts, share)
    rotations = window_rotations(make_key(seed), 0, heads, size, 2, 6)
    inputs = vectors[:, :, before:], rotations, 6, centering
    assert (dispatch.lsh_buckets(*inputs) != lsh_buckets(*inputs)).sum() <= 1  # a near-tie


@given(
    seed=st.integers(0, 10**6), length=st.integers(1, 200), count=st.integers(1, 30), window=st.integers(1, 50),
    causal=st.booleans(), padding=st.sampled_from([None, 0.0, 0.3, 1.0]),
)  # fmt: skip
def test_sorting_is_that_of_the_torch_backend(seed, length, count, window, causal, padding):
    generator = torch.Generator().manual_seed(seed)
    buckets = torch.randint(0, count, (2, 3, 2, length), generator=generator).int()
    mask = None if padding is None else torch.rand(2, length, generator=generator) >= padding
    left, right = window_extent(window, causal)
    in_a_cache = torch.cat([buckets, torch.full_like(buckets, 2**30)], dim=-1)[..., :length]
    for group in (buckets, buckets[:, :1], in_a_cache):
        groups, counts = [group, group[:, :, :1] * 0], (count, 1)
        for inputs in (([left, 3], [right, 0], 2 if causal else 3), ([0, 0], [0, 0], 1)):
            expected = sort_by_bucket(groups, mask, counts, *inputs)
            assert len(expected) == inputs[-1]
            for known in (counts, (-1, -1)):
                assert all(map(torch.equal, cpu.sort_by_bucket(groups, mask, known, *inputs), expected))


# --- models


@pytest.mark.parametrize("mode", ["window", "chunk"])
def test_a_model_agrees_with_the_torch_backend(mode):
    ids = make_ids(2, 90)
    outputs = []
    for backend in ("cpu", "torch"):
        model = make_model(
            ReformerForCausalLM, dtype=torch.float32, attention_backend=backend, attention_mode=mode, **SMALL_WINDOWS
        )
        loss = model(ids, labels=ids).loss
        loss.backward()
        outputs.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*outputs, strict=True):
        assert max_abs_diff(a, b) <= 2e-4 * max(1, b.abs().max().item())


# --- where it cannot be used


def test_what_it_cannot_serve_is_told(monkeypatch):
    monkeypatch.delenv("HF_REFORMER_BACKEND", raising=False)
    double, odd = torch.zeros(1, 1, 4, 8, dtype=torch.float64), torch.zeros(1, 1, 4, 12)
    assert select_backend("auto", double, double) == select_backend("auto", odd, odd) == "torch"
    with pytest.raises(ValueError, match=r"'cpu' cannot be used here.*float64"):
        select_backend("cpu", double, double)
    with pytest.raises(ValueError, match=r"multiples of 8, not 12"):
        select_backend("cpu", odd, odd)


def test_numbers_out_of_range_are_refused():
    buckets = torch.tensor([[[[0, 1, 9]]]], dtype=torch.int32)
    with pytest.raises(ValueError, match="outside of the number of buckets"):
        cpu.sort_by_bucket([buckets], None, [7], [0], [0], 1)
    vectors, rotations = torch.zeros(1, 2, 4, 8), window_rotations(make_key(0), 0, 2, 8, 1, 6)
    for samples in ([1, 1, 2, 2], [0, 0, 2, 2], [0, 1, 0, 1]):
        with pytest.raises(ValueError, match="numbered 0, 1"):
            cpu.lsh_buckets(vectors, rotations, [6], True, *Centering(False, None, torch.tensor([samples])))
    with pytest.raises(ValueError, match="3 columns don't fit bucket factors \\[8\\]"):
        cpu.lsh_buckets(torch.zeros(1, 2, 4, 8), rotations, [8], False, *Centering(True))


def test_a_key_of_another_dtype_is_not_narrowed():
    query = torch.zeros(1, 1, 4, 8)
    assert select_backend("auto", query, query, query.double()) == "torch"


def test_a_kernel_that_disagrees_is_not_used(monkeypatch, caplog, checked_again):
    monkeypatch.setattr(dispatch, "agrees", lambda kernels: False)
    single = torch.zeros(1, 1, 4, 8)
    with caplog.at_level(logging.WARNING):
        assert select_backend("auto", single, single) == "torch"
        assert select_backend("auto", single, single) == "torch"
    assert sum("disagrees with its definition" in message for message in caplog.messages) == 1


def test_the_check_sees_a_wrong_result(monkeypatch):
    real = cpu.bindings.backward

    def wrong(*args):
        grad_query, *others = real(*args)
        return grad_query + 1e-2, *others

    assert kernel_check.agrees(cpu)
    monkeypatch.setattr(cpu.bindings, "backward", wrong)
    assert not kernel_check.agrees(cpu)


def test_kernels_of_another_structure_are_not_used(monkeypatch, caplog, checked_again):
    """A field that only one side has would be silent memory corruption."""
    fields = [*library.SortParams._fields_, ("one_more", library.ctypes.c_int64)]
    longer = type("SortParams", (library.ctypes.Structure,), {"_fields_": fields})
    present = library.current_library()
    monkeypatch.setattr(build, "_compile", lambda variant, path, check, *_: check(present))  # the same comes out again
    monkeypatch.setitem(library.FUNCTIONS, "hf_sort", longer)
    dispatch._warn_once.cache_clear()
    single = torch.zeros(1, 1, 4, 8)
    with caplog.at_level(logging.WARNING):
        assert select_backend("auto", single, single) == "torch"
    size = library.ctypes.sizeof(library.SortParams)
    assert f"do not fit this package: their SortParams has {size} bytes, not {size + 8}" in caplog.text
    with pytest.raises(ValueError, match=r"'cpu' cannot be used here.*SortParams"):
        select_backend("cpu", single, single)
