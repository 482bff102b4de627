"""The Triton backend equals the reference: in Triton's interpreter on a CPU, and on a GPU where there is one.

Triton decides at import whether it interprets, so the checks of the kernels run in a process of their own: they are
the functions named `check_…`, which pytest collects only there.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import Case, assert_equals_reference, cases, make_case
from conftest import largest_gap
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hf_reformer import attention_ops, reference
from hf_reformer.kernels import triton as backend

HERE = Path(__file__).resolve()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
HALF = [torch.bfloat16, torch.float16]
SMALL = [(16, 16), (16, 32), (32, 16)]  # tiles of queries and keys; several fit in a short line


def run_checks(*arguments: str, interpret: bool = True) -> None:
    """Run the checks of this file in another process."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "1" if interpret else "0"
    command = [sys.executable, "-m", "pytest", str(HERE), "-o", "python_functions=check_*", "-q", *arguments]
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]


@NEEDS_TRITON
@pytest.mark.slow
def test_the_kernels_equal_the_reference_in_the_interpreter():
    run_checks("-p", "no:xdist")


@NEEDS_TRITON
@pytest.mark.skipif("HF_REFORMER_LONG_TESTS" not in os.environ, reason="takes minutes; set HF_REFORMER_LONG_TESTS")
@pytest.mark.slow
def test_the_kernels_equal_the_reference_in_many_cases():
    run_checks("-p", "no:xdist", "-m", "slow")


@NEEDS_TRITON
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_kernels_equal_the_reference_on_a_gpu():
    run_checks("-p", "no:xdist", "-m", "slow or not slow", interpret=False)


@NEEDS_TRITON
@pytest.mark.skipif("HF_REFORMER_LONG_TESTS" not in os.environ, reason="takes minutes; set HF_REFORMER_LONG_TESTS")
@pytest.mark.slow
def test_no_kernel_spills_registers():
    script = HERE.parents[1] / "scripts" / "dev" / "compile_triton.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, script, "--short"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is well" in done.stdout


# --- what the backend refuses


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"size": 129}, "head sizes from 1 to 128, and query's is 129"),
        ({}, "on a CUDA GPU, and the tensors are on cpu"),
    ],
)
@NEEDS_TRITON
def test_a_refusal_says_why(monkeypatch, changes, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query = torch.zeros(1, 1, 4, changes.get("size", 8), dtype=changes.get("dtype", torch.float32))
    assert reason in backend.why_not(query, query)


@NEEDS_TRITON
def test_the_interpreter_takes_tensors_of_the_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.zeros(1, 1, 4, 8)
    assert backend.why_not(x, x) is None


def test_the_backend_can_be_imported_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, importlib.util as util\n"
        "util.find_spec = lambda name, find=util.find_spec: None if name == 'triton' else find(name)\n"
        "from hf_reformer.kernels.triton import why_not\n"
        "print(why_not(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "Triton is not installed.", done.stderr


# --- the checks


def on_device(query, key, value, orders, *, causal, mask, dropout, dropout_key):
    """The backend on tensors of the CPU, wherever it runs."""
    move = lambda x: x.to(DEVICE) if isinstance(x, torch.Tensor) else x  # noqa: E731
    query, key, value, mask, dropout_key = map(move, (query, key, value, mask, dropout_key))
    orders = type(orders)(*map(move, orders))
    options = {"causal": causal, "mask": mask, "dropout": dropout, "dropout_key": dropout_key}
    return backend.ordered_attention(query, key, value, orders, **options).cpu()


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    if INTERPRETED or DEVICE == "cuda":
        monkeypatch.setitem(attention_ops.BACKENDS, "triton", on_device)


@pytest.fixture
def small_tiles(monkeypatch):
    def use(queries, keys):
        from hf_reformer.kernels.triton import launch
        from hf_reformer.kernels.triton.tiles import Tiles

        monkeypatch.setattr(launch, "choose_tiles", lambda *_: Tiles(queries, keys, 4, 1))

    return use


tiles = st.sampled_from([*SMALL, None])


def compare(drawn, size, shape) -> None:
    """In float32, whose tolerance leaves no room for a mistake; `check_every_dtype` has the others."""
    from hf_reformer.kernels.triton import launch
    from hf_reformer.kernels.triton.tiles import Tiles

    with pytest.MonkeyPatch.context() as patch:
        if shape is not None:
            patch.setattr(launch, "choose_tiles", lambda *_: Tiles(*shape, 4, 1))
        assert_equals_reference(make_case(drawn, size=size), "triton", torch.float32)


@given(drawn=cases, size=st.sampled_from([1, 4, 16, 20]), shape=tiles)
@settings(max_examples=6, phases=[Phase.generate])  # a search for a smaller example would take minutes
def check_a_few_cases(drawn, size, shape):
    compare({**drawn, "batch": 1, "heads": min(drawn["heads"], 2)}, size, shape)


@pytest.mark.slow
@given(drawn=cases, size=st.sampled_from([1, 4, 16, 20]), shape=tiles)
@settings(max_examples=60, phases=[Phase.generate])
def check_many_cases(drawn, size, shape):
    compare(drawn, size, shape)


@pytest.mark.parametrize("mode", ["window", "chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("shared", "causal", "dropout"), [(True, True, 0.3), (True, False, 0.0), (False, False, 1.0)])
def check_every_dtype(mode, dtype, shared, causal, dropout, small_tiles):
    small_tiles(16, 16)
    case = Case(mode=mode, length=40, batch=1, heads=1, shared=shared, causal=causal, dropout=dropout)
    assert_equals_reference(case, "triton", dtype)


@pytest.mark.parametrize(("mode", "causal", "window"), [("window", True, 128), ("chunk", False, 64)])
def check_default_sizes(mode, causal, window):
    case = Case(
        mode=mode, causal=causal, length=192, batch=1, heads=1, rounds=1, size=64, count=2, window=window, hidden=0.1
    )
    assert_equals_reference(case, "triton", torch.float32)


@pytest.mark.parametrize("tile", [3, 32])
def check_windows_reach_before_and_after_from_every_place(tile):
    """On which the gradient of the keys relies, whatever the tile of the orders."""
    orders = Case(length=60, tile=tile, causal=False).orders
    place = torch.arange(orders.line[0, 0].numel()).view(orders.line.shape[2:])
    sees = orders.lo <= orders.hi
    assert ((place - orders.lo)[sees.expand_as(orders.lo)] <= orders.before).all()
    assert ((orders.hi - place)[sees.expand_as(orders.lo)] <= orders.after).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def check_recording_a_graph_changes_no_bit(dtype):
    case = Case(length=70, window=20, batch=1, heads=1, dropout=0.2, dtype=dtype)
    expected = case.values_and_gradients("triton")[0]
    with torch.no_grad():
        assert torch.equal(case.attend(*case.inputs, backend="triton"), expected)


def check_gradients_repeat_bit_for_bit():
    first, second = (Case(length=40, batch=1, dtype=torch.float32).values_and_gradients("triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("mode", ["window", "chunk"])
def check_one_order_may_serve_all_heads(mode):
    one, two = (Case(mode=mode, heads=heads, rounds=1, dtype=torch.float32) for heads in (1, 2))
    two.inputs = [x.expand(-1, 2, -1, -1) for x in one.inputs]
    expected = one.values_and_gradients("triton")[0].expand(-1, 2, -1, -1)
    assert largest_gap(one.attend(*two.inputs, backend="triton"), expected) <= 1e-6


def check_the_layout_of_the_inputs_does_not_matter():
    case = Case(dtype=torch.float32, batch=1, length=20)
    expected = case.values_and_gradients("triton")
    projected = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.inputs]
    strided = [torch.stack([x, -x], dim=-1).flatten(-2)[..., ::2] for x in case.inputs]
    for case.inputs in (projected, strided):
        for a, b in zip(case.values_and_gradients("triton"), expected, strict=True):
            assert torch.equal(a, b)


def check_a_token_that_sees_nothing_gives_zero_and_has_no_gradient():
    out, *grads = Case(hidden=1.0, dtype=torch.float32).values_and_gradients("triton")
    assert all((x == 0).all() for x in (out, *grads))


@pytest.mark.parametrize("mode", ["window", "chunk"])
def check_a_shared_token_alone_sees_itself(mode):
    case = Case(mode=mode, length=1, hidden=None, dtype=torch.bfloat16)
    out, query, *_ = case.values_and_gradients("triton")
    assert torch.equal(out, case.inputs[2])
    assert (query == 0).all()


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def check_large_and_small_scores_stay_finite(scale):
    case = Case(dtype=torch.float32, length=37, batch=1)
    case.inputs = [x * scale for x in case.inputs]
    assert all(x.isfinite().all() for x in case.values_and_gradients("triton"))


@pytest.mark.parametrize("scale", [1.0, 200.0])
def check_the_last_token_of_a_partial_tile_has_finite_gradients(scale):
    case = Case(length=9, tile=8, window=1, hidden=None, dtype=torch.float32)
    case.inputs[0] = case.inputs[0] * scale
    assert all(x.isfinite().all() for x in case.values_and_gradients("triton"))


def check_dropout_drops_the_pairs_of_the_reference(small_tiles):
    """With equal scores and values that name the tokens, a weight of 0 is a dropped pair."""
    small_tiles(16, 16)
    case = Case(length=40, batch=2, heads=2, count=1, window=80, hidden=None, dropout=0.5, dtype=torch.float32)
    query, key, _ = case.inputs
    names = torch.eye(40).expand(2, 2, -1, -1)
    found = case.attend(query * 0, key, names, backend="triton") > 0
    factors = reference.dropout_factors(case.options["dropout_key"], 0.5, 2, 2, 40) > 0
    others = torch.ones(40, 40).tril(-1).bool()
    assert torch.equal(found & others, factors & others)


def check_a_second_derivative_is_refused():
    case = Case(dtype=torch.float32, length=9, batch=1)
    inputs = [x.requires_grad_() for x in case.inputs]
    out = case.attend(*inputs, backend="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="triton_attention_backward"):
        grad.sum().backward()


@pytest.mark.parametrize("shared", [True, False])
def check_the_op_keeps_torchs_rules(shared):
    """Schema, fake and autograd rules agree with what the op does."""
    from hf_reformer.kernels.triton.operator import triton_attention

    case = Case(dtype=torch.float32, length=9, batch=1, shared=shared)
    query, key, value = (x.to(DEVICE).requires_grad_() for x in case.inputs)
    orders = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in case.orders]
    inputs = (query, None if shared else key, value, *orders[:3], None, None, *orders[3:], True, 0.0)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(triton_attention, inputs, test_utils=tests)


def check_compiled_code_holds_the_op():
    case = Case(dtype=torch.float32, length=20, batch=1)
    inputs = [x.to(DEVICE) for x in case.inputs]
    orders = type(case.orders)(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in case.orders))

    def attend(query, value):
        return backend.ordered_attention(query * 2, None, value, orders, causal=True, mask=None) + 1

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(inputs[0], inputs[2]), attend(inputs[0], inputs[2]))


def check_memory_between_forward_and_backward_grows_with_length_alone():
    def kept(window):
        numbers = []
        case = Case(length=64, window=window, rounds=2, batch=1, heads=1, dropout=0.1, dtype=torch.float32)
        inputs = [x.requires_grad_() for x in case.inputs]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: numbers.append(x.numel()) or x, lambda x: x):
            case.attend(*inputs, backend="triton")
        return sum(numbers)

    assert kept(32) == kept(4) > 0
