"""Whether "auto" takes the Triton kernels on a GPU: the check, what is kept of it, and what is said. No GPU is needed.

GPUs are made up: tensors of torch's FakeTensorMode, an identity, and a check that says what a test wants.
"""

import importlib.util
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from hf_reformer.ops import dispatch, kernel_check
from hf_reformer.ops.dispatch import describe_backends, select_backend
from hf_reformer.ops.lsh import Centering
from reformer_kernels import cpu
from reformer_kernels.triton import verdicts
from reformer_kernels.triton.verdicts import Subject, Verdict

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

AGREES, DISAGREES = Verdict(None, True), Verdict("its kernels disagree with their definition here", True)
UNKNOWN = Verdict("its kernels cannot be checked here (no memory)", False)
IDENTITY = {"gpu": "Made Up 1", "driver": "1.0", "torch": "2.9", "triton": "3.7", "sources": "0"}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU whose identity and verdict a test may change, and what was asked of it."""
    made_up = SimpleNamespace(identity=dict(IDENTITY), verdict=AGREES, checks=[], cache=tmp_path / "cache")

    def check(subject, module):
        made_up.checks.append(subject)
        return made_up.verdict

    monkeypatch.setenv("HF_REFORMER_CACHE", str(made_up.cache))
    monkeypatch.delenv("HF_REFORMER_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(verdicts, "check_elsewhere", check)
    monkeypatch.setattr(verdicts, "identity", lambda subject, _: made_up.identity | {"of": list(subject)})
    forget()
    yield made_up
    forget()


def forget():
    """As if another process began."""
    dispatch.check_triton.cache_clear()
    dispatch._warn_once.cache_clear()


def choose(size: int = 64, dtype: torch.dtype = torch.float32, choice: str = "auto", count: int = 2) -> str:
    with FakeTensorMode():
        return select_backend(choice, *(torch.empty(1, 2, 8, size, dtype=dtype, device="cuda") for _ in range(count)))


def stored(gpu) -> list:
    return sorted(gpu.cache.glob("triton-*.json"))


# --- the choice


def test_auto_takes_kernels_that_agree(gpu, caplog):
    assert [choose(), choose(), choose(count=1)] == ["triton"] * 3
    assert gpu.checks == [Subject("cuda:0", "float32", 64, 64)]
    assert caplog.messages == []


def test_every_dtype_and_head_size_is_checked(gpu):
    choose(32), choose(64), choose(64, torch.bfloat16)
    assert [(x.dtype, x.size) for x in gpu.checks] == [("float32", 32), ("float32", 64), ("bfloat16", 64)]


@pytest.mark.parametrize("verdict", [DISAGREES, UNKNOWN])
def test_kernels_that_fail_are_left_alone_with_one_warning(gpu, verdict, caplog):
    gpu.verdict = verdict
    with caplog.at_level(logging.WARNING):
        assert {choose(), choose(), choose(count=1)} == {"torch"}
    assert caplog.messages == [
        f"Attention runs in pure PyTorch, several times slower than compiled: {verdict.reason}."
    ]


def test_what_the_kernels_do_not_serve_is_not_checked(gpu):
    assert choose(dtype=torch.float64) == choose(size=256) == "torch"
    assert gpu.checks == []


def test_integers_are_not_checked(gpu):
    with FakeTensorMode():
        select_backend("auto", torch.zeros(1, 2, 1, 8, dtype=torch.int32, device="cuda"))
    assert gpu.checks == []


@pytest.mark.parametrize("choice", ["torch", "triton", "reference"])
def test_a_choice_overrules_the_check(gpu, choice, monkeypatch):
    gpu.verdict = DISAGREES
    assert choose(choice=choice) == choice
    monkeypatch.setenv("HF_REFORMER_BACKEND", choice)
    assert choose() == choice
    assert gpu.checks == []


def test_transforms_of_torch_func_take_pytorch_unchecked(gpu):
    with FakeTensorMode():
        x = torch.empty(3, 1, 2, 8, 64, device="cuda")
        torch.func.vmap(lambda x: x * ((select_backend("auto", x) == "triton" and pytest.fail("missed")) or 1))(x)
    assert gpu.checks == []


def test_the_interpreter_is_no_backend_of_a_gpu(gpu, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose() == "torch"
    assert gpu.checks == []


def test_a_compiled_graph_holds_the_verdict(gpu, monkeypatch):
    """Asked while it is traced, outside of the trace."""
    monkeypatch.setitem(dispatch.KERNEL_OF_DEVICE, "cpu", "triton")
    monkeypatch.setattr(dispatch.KERNELS["triton"], "unsupported_reason", lambda *tensors: None)

    def attend(x):
        return x + 1 if select_backend("auto", x, x) == "triton" else x - 1

    compiled = torch.compile(attend, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1, 1, 2, 8)).eq(1).all()
    gpu.verdict = DISAGREES
    assert compiled(torch.zeros(1, 1, 2, 16)).eq(-1).all()
    assert len(gpu.checks) == 2


def test_every_device_is_described(gpu, monkeypatch):
    monkeypatch.setattr(dispatch, "check_library", lambda: None)
    assert describe_backends()["cuda"] == "none: no CUDA device"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for verdict, expected in ((AGREES, "triton"), (DISAGREES, f"torch: {DISAGREES.reason}")):
        gpu.verdict, gpu.identity = verdict, gpu.identity | {"gpu": str(verdict)}
        forget()
        with FakeTensorMode():
            assert describe_backends()["cuda:0"] == expected


# --- what is kept


@pytest.mark.parametrize("verdict", [AGREES, DISAGREES])
def test_a_verdict_is_kept_for_later_processes(gpu, verdict):
    gpu.verdict = verdict
    first = choose()
    gpu.verdict = UNKNOWN  # whoever asks again hears something else
    forget()
    assert choose() == first
    assert len(gpu.checks) == 1


def test_what_may_be_otherwise_tomorrow_is_not_kept(gpu):
    gpu.verdict = UNKNOWN
    assert choose() == "torch"
    assert stored(gpu) == []
    gpu.verdict = AGREES
    forget()
    assert choose() == "triton"


@pytest.mark.parametrize("name", IDENTITY)
def test_another_version_is_checked_anew(gpu, name):
    choose()
    gpu.identity[name] = "another"
    gpu.verdict = DISAGREES
    forget()
    assert choose() == "torch"
    assert len(gpu.checks) == len(stored(gpu)) == 2


DAMAGED = [
    b"",
    b"\xff\xfe",
    b"[]",
    b"null",
    b"{",
    b'{"reason": null}',
    b'{"identity": {}, "reason": null}',
    b"[" * 10**5,
]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda x: str(x[:8]))
def test_a_damaged_file_counts_as_none(gpu, content):
    choose()
    (path,) = stored(gpu)
    whole = path.read_bytes()
    path.write_bytes(content)
    forget()
    assert choose() == "triton"
    assert len(gpu.checks) == 2
    assert path.read_bytes() == whole


@pytest.mark.parametrize("reason", [0, ["agrees"], {}, False])
def test_a_reason_is_words_or_nothing(gpu, reason):
    choose()
    (path,) = stored(gpu)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"reason": reason}))
    forget()
    choose()
    assert len(gpu.checks) == 2


def test_files_appear_whole_and_nothing_else_stays(gpu):
    choose()
    assert {path.suffix for path in gpu.cache.iterdir()} <= {".json", ".lock"}


def test_where_nothing_can_be_kept_each_process_checks(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_REFORMER_CACHE", str(tmp_path / "file" / "below"))
    for _ in range(2):
        forget()
        assert choose() == "triton"
    assert len(gpu.checks) == 2


def test_an_identity_names_all_that_matters(monkeypatch):
    properties = SimpleNamespace(name="Made Up 1", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(verdicts, "driver_version", lambda: "570.1")
    subject = Subject("cuda:1", "bfloat16", 64, 32)
    found = verdicts.identity(subject, "hf_reformer.ops.kernel_check")
    assert {name: found[name] for name in ("gpu", "capability", "driver", "dtype", "size", "value_size")} == {
        "gpu": "Made Up 1", "capability": "9.0", "driver": "570.1", "dtype": "bfloat16", "size": 64, "value_size": 32,
    }  # fmt: skip
    assert {"torch", "triton", "cuda", "contract", "sources"} <= found.keys()
    assert "device" not in found  # equal GPUs share a verdict


# --- the check


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + 1e-2


def passes(wrong: str) -> bool:
    """Whether the check lets kernels pass that give one thing a little wrong; the CPU's stand for a GPU's."""

    def attention(query, key, value, *rest):
        rows = {"query": query, "key": key, "value": value}
        rows = [WrongGradient.apply(x) if name == wrong and x is not None else x for name, x in rows.items()]
        out, row_max, row_sum, mass = cpu.attention(*rows, *rest)
        return out + 1e-2 * (wrong == "out"), row_max, row_sum, mass + 1e-2 * (wrong == "mass")

    def lsh_buckets(vectors, rotations, factors, centered, *center):
        if wrong == "mean":
            return cpu.lsh_buckets(vectors, rotations, factors, False, *Centering(False))
        return cpu.lsh_buckets(vectors, rotations, factors, centered, *center)

    def decode_attention(query, key, value, *rest):
        return cpu.decode_attention(query, key, value, *rest) + 1e-2 * (wrong == "decoding")

    kernels = SimpleNamespace(
        attention=attention, lsh_buckets=lsh_buckets, decode_attention=decode_attention, CacheTensors=cpu.CacheTensors
    )
    return kernel_check.triton_agrees(kernels, torch.device("cpu"), torch.float32, 8, 8)


@pytest.mark.skipif(dispatch.check_library() is not None, reason="no compiled kernel stands in")
def test_the_check_lets_right_kernels_pass_and_no_wrong_ones():
    wrong = ("nothing", "query", "key", "value", "out", "mass", "mean", "decoding")
    assert [name for name in wrong if passes(name)] == ["nothing"]


def test_errors_become_verdicts():
    from triton import OutOfResources

    def fails_with(error):
        def check():
            raise error

        return verdicts.judge(check)

    assert verdicts.judge(lambda: True) == AGREES
    assert verdicts.judge(lambda: False) == DISAGREES
    resources = fails_with(OutOfResources(2**20, 2**17, "shared memory"))
    assert resources.lasting
    assert "do not compile here (OutOfResources" in resources.reason
    memory = fails_with(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"))
    assert memory == Verdict("its kernels cannot be checked here (OutOfMemoryError: CUDA out of memory.)", False)


@pytest.mark.slow
def test_a_check_that_ends_its_process_leaves_this_one(tmp_path, monkeypatch):
    (tmp_path / "made_up_check.py").write_text(
        "import os\n"
        "def triton_agrees(kernels, device, dtype, size, value_size):\n"
        "    return size == 64 or os.abort()\n"
    )  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("PYTHONFAULTHANDLER", raising=False)
    subject = Subject("cpu", "float32", 64, 64)
    assert verdicts.check_elsewhere(subject, "made_up_check") == AGREES
    crashed = verdicts.check_elsewhere(subject._replace(size=32), "made_up_check")
    assert not crashed.lasting
    assert "ended with status -6" in crashed.reason


def test_without_a_python_to_start_nothing_is_taken(monkeypatch):
    monkeypatch.setattr(verdicts.sys, "executable", "")
    assert verdicts.check_elsewhere(Subject("cuda:0", "float32", 64, 64), "no_module").reason
