"""The Triton backend equals the reference: in Triton's interpreter on a CPU, and on a GPU where there is one.

Triton decides at import whether it interprets, so the checks of the kernels run in a process of their own: they are
the functions named `check_…`, which pytest collects only there.
"""

import copy
import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attention_cases import TOLERANCES, Case, assert_equals_reference, make_case
from attention_mass_cases import assert_mass_equals_reference
from conftest import SMALL_WINDOWS, make_ids, make_model, max_abs_diff
from torch.utils._python_dispatch import TorchDispatchMode

from hf_reformer import ReformerForCausalLM
from hf_reformer.cache.cache import CACHE_NAME, ReformerCache
from hf_reformer.layers import cached_attention
from hf_reformer.ops import dispatch, kernel_check, lsh, reference
from hf_reformer.ops.dispatch import select_backend, windowed_attention
from hf_reformer.ops.prng import make_key
from reformer_kernels import triton as backend

HERE = Path(__file__).resolve()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
HALF = [torch.bfloat16, torch.float16]


def run_apart(*command: str | Path, interpret: bool = False) -> str:
    """Run a Python program in a process of its own, and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TRITON_INTERPRET"] = "1" if interpret else "0"
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=HERE.parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-20000:] + done.stderr[-5000:]
    return done.stdout


def run_checks(*arguments: str, interpret: bool = True) -> None:
    """Run checks of this file."""
    options = ("-o", "python_functions=check_*", "-p", "no:xdist", "-q")
    run_apart("-m", "pytest", HERE, *options, *arguments, interpret=interpret)


@NEEDS_TRITON
def test_a_small_case_in_the_interpreter():
    run_checks("-k", "check_a_small_case or check_centered_buckets or check_decode_steps")


@NEEDS_TRITON
@pytest.mark.slow
def test_all_checks_in_the_interpreter():
    run_checks()


@NEEDS_TRITON
@pytest.mark.slow
def test_many_cases_in_the_interpreter():
    run_checks("-m", "slow")


@NEEDS_TRITON
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_all_checks_on_a_gpu():
    run_checks("-m", "slow or not slow", interpret=False)


# --- how the kernels are compiled


@NEEDS_TRITON
@pytest.mark.slow
def test_no_kernel_keeps_registers_in_memory():
    printed = run_apart("dev/compile_triton.py")
    print(printed)
    assert "all is well" in printed


@NEEDS_TRITON
def test_nothing_is_tuned_while_a_model_runs():
    """A reversible layer computes its forward twice and relies on equal bits: other tiles add in another order."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction, KernelInterface

    from reformer_kernels.triton import backward, decoding, forward, hashing, pairs

    found = [x for module in (backward, decoding, forward, hashing, pairs) for x in vars(module).values()]
    kinds = {type(x) for x in found if isinstance(x, KernelInterface)}  # an autotuner or a heuristic would be another
    assert len(kinds) == 1
    assert kinds < {JITFunction, InterpretedFunction}


# --- what the backend refuses


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"size": 129}, "head sizes must be 1 to 128, not 129"),
        ({}, "it runs on a CUDA GPU, not on cpu"),
    ],
)
@NEEDS_TRITON
def test_a_refusal_says_why(monkeypatch, changes, reason):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("HF_REFORMER_BACKEND", raising=False)
    query = torch.zeros(1, 1, 4, changes.get("size", 8), dtype=changes.get("dtype", torch.float32))
    with pytest.raises(ValueError, match=rf"'triton' cannot be used here: [^.]*{reason}\. Choose"):
        select_backend("triton", query, query)


@NEEDS_TRITON
def test_the_interpreter_takes_tensors_of_the_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.zeros(1, 1, 4, 8)
    assert backend.unsupported_reason(x, x) is None


@NEEDS_TRITON
def test_transforms_of_torch_func_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.zeros(1, 1, 4, 8)
    reason = dispatch.unsupported_reason
    torch.func.vmap(lambda x: pytest.fail("missed") if reason("triton", x, x) is None else x)(x)


@NEEDS_TRITON
def test_too_many_sorted_positions_are_refused(monkeypatch):
    x = torch.zeros(1, 1, 1, 8)
    layout = Case(length=1, batch=1, heads=1).layout
    layout = layout._replace(perm=layout.perm[:, :, :1].expand(-1, -1, 2**29 + 1, -1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="536870913 sorted positions"):
        windowed_attention(x, None, x, layout, causal=True, backend="triton")


@pytest.mark.slow
def test_the_backend_can_be_imported_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, importlib.util as util\n"
        "util.find_spec = lambda name, find=util.find_spec: None if name == 'triton' else find(name)\n"
        "from reformer_kernels.triton import unsupported_reason\n"
        "print(unsupported_reason(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "Triton is not installed", done.stderr


# --- the checks


def on_device(*inputs):
    """The op on tensors of the CPU, wherever it runs."""
    results = backend.attention(*(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in inputs))
    return tuple(x.cpu() for x in results)


@pytest.fixture(autouse=True)
def cpu_tensors_go_to_the_gpu(monkeypatch):
    if DEVICE == "cuda":
        kernel = SimpleNamespace(unsupported_reason=lambda *tensors: None, attention=on_device)
        monkeypatch.setitem(dispatch.KERNELS, "triton", kernel)


@pytest.fixture
def tiles_of(monkeypatch):
    """Sets the numbers of queries and of keys in a tile, so that several fit in a short line."""

    def use(queries, keys):
        from reformer_kernels.triton import launch
        from reformer_kernels.triton.tiles import Tiles

        monkeypatch.setattr(launch, "choose_tiles", lambda *_: Tiles(queries, keys, 4, 1))

    return use


def check_a_small_case(tiles_of):
    tiles_of(16, 16)
    case = Case(length=19, window=4, batch=1, heads=1, size=8, dropout=0.2)
    assert_equals_reference(case, "triton", torch.float32)


# --- what decides whether "auto" takes the kernels on a GPU

KIND = ("windows", True, True, True)


@pytest.mark.parametrize("kind", kernel_check.KINDS, ids=str)
def check_the_kernels_pass(kind, tiles_of):
    tiles_of(16, 16)
    assert kernel_check.triton_agrees(backend, torch.device(DEVICE), torch.float32, 8, 8, [kind], length=28)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def check_the_kernels_pass_in_half_precision(dtype, tiles_of):
    tiles_of(16, 16)
    assert kernel_check.triton_agrees(backend, torch.device(DEVICE), dtype, 8, 16, [KIND], length=28)


# --- hashing


def drawn_hashing(count: int) -> list:
    """The options of `test_cpu_kernel.test_centered_buckets_are_those_of_the_torch_backend`, drawn from a seed."""
    draw = random.Random(0)
    options = {
        "length": range(1, 150), "causal": [True, False], "padding": [True, False], "packed": [True, False],
        "before": [0, 0, 1, 40], "dtype": [torch.float32, *HALF], "size": [8, 24, 40, 64], "heads": [1, 3],
        "factors": [(2,), (6,), (64,), (4, 8), (2, 4, 6)], "share": [1.0, 0.5],
    }  # fmt: skip
    return [{name: draw.choice(values) for name, values in options.items()} for _ in range(count)]


def assert_hashed_as_in_torch(seed, length, causal, padding, packed, before, dtype, size, heads, factors, share):
    generator = torch.Generator().manual_seed(seed)
    vectors = (torch.randn(2, length + before, heads, size, generator=generator) + 1).to(dtype).transpose(1, 2)
    mask = torch.rand(2, length, generator=generator) > 0.3 if padding else None
    samples = (torch.rand(2, length, generator=generator) < 0.03).cumsum(-1, dtype=torch.int32) if packed else None
    samples = None if samples is None else samples - samples[:, :1]
    sums = counts = None
    if causal and not packed and before:
        sums, counts = lsh.unit_sums(vectors[:, :, :before]), torch.full((2,), before)
    rotations = lsh.window_rotations(make_key(seed), 0, heads, size, 2, factors)
    inputs, center = (vectors[:, :, before:], rotations), lsh.Centering(causal, mask, samples, sums, counts, share)
    for centered in (True, False):
        expected = lsh.lsh_buckets(*inputs, factors, center if centered else None)
        there = [
            x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in (*inputs, list(factors), centered, *center)
        ]
        found = backend.lsh_buckets(*there).cpu()
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        assert (found != expected).sum() <= 1  # a near-tie


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def check_buckets_are_those_of_the_torch_backend(seed):
    assert_hashed_as_in_torch(seed, **drawn_hashing(40)[seed])


@pytest.mark.parametrize("packed", [True, False])
def check_centered_buckets(packed):
    assert_hashed_as_in_torch(0, 75, True, True, packed, 3, torch.float32, 8, 2, (4, 8), 0.5)


def check_vectors_that_cannot_be_squared_or_are_no_numbers_are_hashed_as_in_torch():
    vectors = torch.randn(1, 1, 40, 8, generator=torch.Generator().manual_seed(0))
    vectors[0, 0, 5] *= 1e30
    vectors[0, 0, 9, 3], vectors[0, 0, 12, 2] = float("nan"), float("inf")
    rotations, center = lsh.window_rotations(make_key(0), 0, 1, 8, 2, 8), lsh.Centering(causal=True)
    there = [x.to(DEVICE) for x in (vectors, rotations)]
    found = backend.lsh_buckets(*there, [8], True, *center).cpu()
    assert torch.equal(found, lsh.lsh_buckets(vectors, rotations, 8, center))
    plain = backend.lsh_buckets(*there, [8], False, *center).cpu()
    assert ((plain >= 0) & (plain < 8)).all()  # whatever they are, they are buckets
    known = vectors.isfinite().all(-1)[0, 0]
    assert torch.equal(plain[..., known], lsh.lsh_buckets(vectors, rotations, 8)[..., known])


def check_hashing_keeps_torchs_rules():
    vectors, rotations = torch.randn(1, 2, 9, 8, device=DEVICE), torch.randn(2, 8, 2, 3, device=DEVICE)
    for center in ((False, *lsh.Centering(True)), (True, *lsh.Centering(False))):
        torch.library.opcheck(
            torch.ops.reformer_kernels.triton_lsh_buckets.default, (vectors, rotations, [6], *center)
        )
    with pytest.raises(ValueError, match="don't fit bucket factors"):
        backend.lsh_buckets(vectors, rotations, [8], False, *lsh.Centering(True))


def check_no_tensor_of_hashing_holds_a_number_for_every_bucket():
    """Buckets by the thousand, and nothing that grows with them but the rotations."""
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, (list, tuple)) else [out]) if torch.is_tensor(x))
            return out

    vectors, rotations = torch.randn(1, 1, 64, 8), torch.randn(1, 8, 1, 64)
    with Sizes():
        backend.lsh_buckets(vectors.to(DEVICE), rotations.to(DEVICE), [128], True, *lsh.Centering(True))
    assert max(sizes) <= max(vectors.numel(), rotations.numel())


# --- generation


def drawn_steps(count: int) -> list:
    draw = random.Random(0)
    options = {
        "kind": ["lsh", "lsh", "local"], "dtype": [torch.float32, *HALF], "heads": [1, 3], "size": [8, 24, 40, 64],
        "rows": [1, 3], "padded": [True, False], "prompt": [1, 7, 30], "pieces": [(1, 1, 1), (3, 8, 1), (20, 1)],
        "num_hashes": [1, 2, 3], "num_buckets": [4, 16, [2, 4], [2, 2, 4]], "lsh_window": [1, 4, 6, 40],
        "local_window": [1, 3, 6, 40], "lsh_include_local": [True, True, False], "lsh_centering": [True, 0.5, False],
        "lsh_rotary": [0.0, 0.5, 1.0], "capacity": [0, 64],
    }  # fmt: skip
    return [{name: draw.choice(values) for name, values in options.items()} for _ in range(count)]


@torch.no_grad()
def assert_decoded_as_in_torch(
    monkeypatch, kind, dtype, heads, size, rows, padded, prompt, pieces, capacity, **changes
):
    """What follows a prompt, in pieces; the prompt itself is taken in by the torch backend."""
    monkeypatch.setitem(dispatch.KERNELS, "triton", backend)
    monkeypatch.setattr(cached_attention, "prefers_decode", lambda *_: True)
    sizes = {"hidden_size": heads * size, "num_attention_heads": heads, "attention_head_size": size}
    model = make_model(
        ReformerForCausalLM, dtype=dtype, attn_layers=[kind, kind], attention_backend="torch", is_decoder=True,
        initializer_range=0.6 * sizes["hidden_size"] ** -0.5, position_embedding_type="rotary", **sizes, **changes,
    ).to(DEVICE)  # fmt: skip
    ids, mask = make_ids(rows, prompt + sum(pieces)).to(DEVICE), torch.ones(rows, prompt + sum(pieces), device=DEVICE)
    if padded:
        mask[0, -2], mask[-1, : prompt // 2] = 0, 0
    filled = model(ids[:, :prompt], attention_mask=mask[:, :prompt], cache=ReformerCache(model.config, capacity))
    found = {}
    for name in ("torch", "triton"):
        for layer in model.base_model.layers:
            layer.attention.backend = name
        kept, at, logits = copy.deepcopy(filled[CACHE_NAME]), prompt, []
        for piece in pieces:
            at += piece
            out = model(ids[:, at - piece : at], attention_mask=mask[:, :at], cache=kept)
            logits.append(out.logits)
        found[name] = torch.cat(logits, dim=1).float()[mask[:, prompt:] == 1], kept.layers
    (expected, expected_layers), (logits, layers) = found["torch"], found["triton"]
    assert max_abs_diff(logits, expected) <= TOLERANCES[dtype] * max(1, expected.abs().max().item())
    ours, theirs = layers[0], expected_layers[0]  # later ones hold what earlier ones rounded
    assert torch.equal(ours.lengths, theirs.lengths)
    keys, values, numbers = ours.last_tokens(min(ours.capacity, ours.seen_tokens))
    real = (numbers >= 0)[:, None].expand(-1, heads, -1)
    for a, b in zip((keys, values), theirs.last_tokens(numbers.shape[1]), strict=False):
        assert torch.equal(a[real], b[real])
    if kind == "lsh":
        real = (torch.arange(ours.seen_tokens, device=DEVICE) < ours.lengths[:, None])[:, None, None]
        real = real.expand_as(ours.buckets[..., : ours.seen_tokens])
        assert torch.equal(*(x.buckets[..., : ours.seen_tokens][real] for x in (ours, theirs)))
        assert torch.equal(ours.chains.newest, theirs.chains.newest)
    if ours.sums is not None:
        assert max_abs_diff(ours.sums, theirs.sums) <= 1e-4


@pytest.mark.parametrize("kind", ["lsh", "local"])
def check_decode_steps(kind, monkeypatch):
    given = {"heads": 2, "size": 8, "rows": 2, "padded": True, "prompt": 9, "pieces": (1, 4), "capacity": 0}
    assert_decoded_as_in_torch(monkeypatch, kind, torch.float32, **given, **SMALL_WINDOWS)


@pytest.mark.slow
@pytest.mark.parametrize("drawn", drawn_steps(40), ids=str)
def check_many_decode_steps(drawn, monkeypatch):
    assert_decoded_as_in_torch(monkeypatch, **drawn)


def check_tokens_that_do_not_fit_a_cache_are_refused():
    row = torch.zeros(1, 2, 1, 8, device=DEVICE)
    cache, index = backend.CacheTensors(row[:, :1], row[:, :1]), torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"A cache of \(1, 1, 1, 8\) cannot take tokens of \(1, 2, 1, 8\)"):
        backend.decode_attention(row, row, row, None, index, cache, 4, 1.0)


# Of every option these values, equally often, in cases that are otherwise thrown together at random.
OPTIONS = {
    "mode": ["window", "chunk"],
    "dtype": [torch.float32, torch.float32, *HALF],
    "shared": [True, False],
    "causal": [True, False],
    "dropout": [0.0, 0.3, 0.0, 0.3, 1.0],
    "padding": [None, 0.0, 0.3, 0.9],
    "length": [1, 2, 7, 16, 17, 29, 33, 48, 57, 65, 70],
    "size": range(8, 129, 8),
    "value_size": range(8, 129, 8),
    "batch": [1, 2],
    "heads": [1, 2],
    "rounds": [1, 2, 3],
    "position_order": [True, False],
    "num_buckets": [1, 3, 5],
    "window": [1, 2, 5, 8, 12, 40],
    "block_size": [1, 3, 8, 32],
    "tiles": [(16, 16), (16, 32), (32, 16), None],
}


def many_cases(count: int) -> list:
    draw, columns = random.Random(0), []
    for values in OPTIONS.values():
        column = (list(values) * count)[:count]
        draw.shuffle(column)
        columns.append(column)
    return [dict(zip(OPTIONS, row, strict=True)) for row in zip(*columns, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("drawn", many_cases(100))
def check_many_cases(drawn, tiles_of):
    options = {name: value for name, value in drawn.items() if name not in ("tiles", "dtype")}
    if drawn["tiles"] is not None:
        tiles_of(*drawn["tiles"])
    case = make_case(options)
    case.inputs[0] *= drawn["size"] ** -0.5  # tolerances are for products of size about 1
    case.inputs[2] *= drawn["value_size"] ** -0.5
    assert_equals_reference(case, "triton", drawn["dtype"])


@pytest.mark.parametrize("mode", ["window", "chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize(("shared", "causal", "dropout"), [(True, True, 0.3), (True, False, 0.0), (False, False, 1.0)])
def check_every_dtype(mode, dtype, shared, causal, dropout, tiles_of):
    tiles_of(16, 16)
    case = Case(mode=mode, length=40, batch=1, heads=1, shared=shared, causal=causal, dropout=dropout)
    assert_equals_reference(case, "triton", dtype)


@pytest.mark.parametrize(("mode", "causal", "window"), [("window", True, 128), ("chunk", False, 64)])
def check_default_sizes(mode, causal, window):
    case = Case(
        mode=mode,
        causal=causal,
        length=192,
        batch=1,
        heads=1,
        rounds=1,
        size=64,
        num_buckets=2,
        window=window,
        padding=0.1,
    )
    assert_equals_reference(case, "triton", torch.float32)


@pytest.mark.parametrize("block_size", [3, 32])
def check_windows_reach_left_and_right_from_every_position(block_size):
    """On which the gradient of the keys relies, whatever the block size."""
    layout = Case(length=60, block_size=block_size, causal=False).layout
    sorted_pos = torch.arange(layout.perm[0, 0].numel()).view(layout.perm.shape[2:])
    sees = layout.window_start <= layout.window_end
    assert ((sorted_pos - layout.window_start)[sees] <= layout.left_reach).all()
    assert ((layout.window_end - sorted_pos)[sees] <= layout.right_reach).all()


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
    assert max_abs_diff(one.attend(*two.inputs, backend="triton"), expected) <= 1e-6


def check_the_layout_of_the_inputs_does_not_matter():
    case = Case(dtype=torch.float32, batch=1, length=20)
    expected = case.values_and_gradients("triton")
    projected = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.inputs]
    strided = [torch.stack([x, -x], dim=-1).flatten(-2)[..., ::2] for x in case.inputs]
    for case.inputs in (projected, strided):
        for a, b in zip(case.values_and_gradients("triton"), expected, strict=True):
            assert torch.equal(a, b)


def check_kernels_read_aligned_rows():
    """Triton compiles others for other addresses, and equal inputs must give equal bits."""
    from reformer_kernels.triton.launch import as_rows

    aligned = torch.randn(1, 9, 2, 8)
    shifted = torch.cat([torch.zeros(1), aligned.flatten()])[1:].view(aligned.shape)
    for x in (aligned, shifted):
        found = as_rows(x.transpose(1, 2))
        assert found.data_ptr() % 16 == 0
        assert torch.equal(found, aligned.transpose(1, 2))
    assert as_rows(aligned.transpose(1, 2)).data_ptr() == aligned.data_ptr()


@pytest.mark.parametrize("widest", [0, 1, 2])
def check_inputs_may_differ_in_dtype(widest):
    """Rotary positions, for one, turn half-precision queries and keys into float32 and leave the values."""
    case = Case(length=20, batch=1, heads=1, size=8, shared=False, dtype=torch.bfloat16)
    case.inputs[widest] = case.inputs[widest].float()
    found = case.values_and_gradients("triton")
    expected = case.values_and_gradients("reference", torch.float64)
    assert [x.dtype for x in found] == [case.inputs[2].dtype, *(x.dtype for x in case.inputs)]
    for a, b in zip(found, expected, strict=True):
        assert max_abs_diff(a, b) <= TOLERANCES[torch.bfloat16] * max(1, b.abs().max().item())


@pytest.mark.parametrize("mode", ["window", "chunk"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def check_what_is_not_a_number_shows(mode, shared, dropout):
    """In the output and the gradients of all who see it, dropped or not."""
    case = Case(
        mode=mode, shared=shared, dropout=dropout, length=32, size=8, window=8, padding=None, dtype=torch.float32
    )
    case.inputs[0][0, 0, 20] = float("nan")
    found = case.values_and_gradients("triton")
    expected = case.values_and_gradients("reference")
    assert expected[0][0, 0, 20:].isnan().any()
    for a, b in zip(found, expected, strict=True):
        assert not (b.isnan() & a.isfinite()).any()
        assert a[1].isfinite().all()  # the other row of the batch


def check_a_token_that_sees_nothing_gives_zero_and_has_no_gradient():
    out, *grads = Case(padding=1.0, dtype=torch.float32).values_and_gradients("triton")
    assert all((x == 0).all() for x in (out, *grads))


@pytest.mark.parametrize("mode", ["window", "chunk"])
def check_a_shared_token_alone_sees_itself(mode):
    case = Case(mode=mode, length=1, padding=None, dtype=torch.bfloat16)
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
    case = Case(length=9, block_size=8, window=1, padding=None, dtype=torch.float32)
    case.inputs[0] = case.inputs[0] * scale
    assert all(x.isfinite().all() for x in case.values_and_gradients("triton"))


def check_dropout_drops_the_pairs_of_the_reference(tiles_of):
    """With equal scores and values that name the tokens, a weight of 0 is a dropped pair."""
    tiles_of(16, 16)
    case = Case(length=40, batch=2, heads=2, num_buckets=1, window=80, padding=None, dropout=0.5, dtype=torch.float32)
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
    case = Case(dtype=torch.float32, length=9, batch=1, shared=shared)
    query, key, value = (x.to(DEVICE).requires_grad_() for x in case.inputs)
    layout = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in case.layout]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for query_weights in (None, torch.rand(1, 9, device=DEVICE)):
        inputs = (
            query,
            None if shared else key,
            value,
            *layout[:3],
            None,
            None,
            query_weights,
            *layout[3:],
            True,
            0.0,
            0.5,
        )
        torch.library.opcheck(backend.attention, inputs, test_utils=tests)


def check_compiled_code_holds_the_op():
    case = Case(dtype=torch.float32, length=20, batch=1)

    def attend(query, value):
        return windowed_attention(query * 2, None, value, case.layout, causal=True, backend="triton")[0] + 1

    query, _, value = case.inputs
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(query, value), attend(query, value))


def check_memory_between_forward_and_backward_grows_with_length_alone():
    def kept(window):
        numbers = []
        case = Case(length=64, window=window, rounds=2, batch=1, heads=1, dropout=0.1, dtype=torch.float32)
        inputs = [x.requires_grad_() for x in case.inputs]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: numbers.append(x.numel()) or x, lambda x: x):
            case.attend(*inputs, backend="triton")
        return sum(numbers)

    assert kept(32) == kept(4) > 0


@pytest.mark.parametrize("mode", ["window", "chunk"])
def check_a_reversible_model_agrees_with_the_torch_backend(mode, captured_warnings):
    """In training, with dropout. A recomputation that is not equal bit for bit would warn."""
    ids, outputs = make_ids(1, 20), []
    for name in ("triton", "torch"):
        overrides = {"attention_backend": name, "attention_mode": mode, "lsh_attention_probs_dropout_prob": 0.2}
        model = make_model(ReformerForCausalLM, dtype=torch.float32, **SMALL_WINDOWS, **overrides).train()
        torch.manual_seed(0)
        loss = model(ids, labels=ids).loss
        loss.backward()
        outputs.append([loss.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*outputs, strict=True):
        assert max_abs_diff(a, b) <= 2e-4 * max(1, b.abs().max().item())
    assert captured_warnings == []


@pytest.mark.parametrize(
    ("mode", "shared", "dropout"), [("window", True, 0.3), ("chunk", True, 0.0), ("window", False, 0.0)]
)
def check_attention_mass(mode, shared, dropout, tiles_of):
    case = Case(mode=mode, shared=shared, dropout=dropout, length=20, batch=1, rounds=2, dtype=torch.float32)
    tiles_of(16, 16)
    assert_mass_equals_reference(case, "triton", torch.float32)
