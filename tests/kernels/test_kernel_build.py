"""Compiling the C++ kernel on first use: once, announced, and never a reason to fail."""

import os
import shutil
import subprocess
import sys

import pytest

from reformer_kernels.cpu import build

ATTEND = """
import torch
from hf_reformer.ops.dispatch import select_backend, windowed_attention
from hf_reformer.ops.layout import window_layout
x = torch.randn(1, 1, 4, 8)
layout = window_layout([(torch.zeros(1, 1, 1, 4, dtype=torch.int32), 1, 2)], True, None)
assert windowed_attention(x, None, x, layout, causal=True)[0].isfinite().all()
print(select_backend("auto", x, x))
"""
VARIANT = build.supported_variants()[-1]


def attend(cache, **environment) -> subprocess.CompletedProcess:
    """Attention in a fresh process, with a cache of its own."""
    own = {"HF_REFORMER_CACHE": str(cache), "HF_REFORMER_CPU_VARIANT": VARIANT, **environment}
    return subprocess.run(
        [sys.executable, "-c", ATTEND], capture_output=True, text=True, check=False, env={**os.environ, **own}
    )


@pytest.fixture
def needs_compiler():
    try:
        build.compiler()
    except build.KernelBuildError as error:
        pytest.skip(str(error))


def test_without_a_compiler_everything_runs_in_pytorch(tmp_path):
    done = attend(tmp_path, PATH=str(tmp_path), CXX="")
    assert done.stdout.strip() == "torch", done.stderr
    assert done.stderr.count("there is no C++ compiler") == 1


@pytest.mark.slow
def test_a_compiler_that_is_not_there_is_told_about(tmp_path):
    done = attend(tmp_path, CXX="no-such-compiler")
    assert done.stdout.strip() == "torch", done.stderr
    assert done.stderr.count("CXX='no-such-compiler' cannot be found") == 1


def test_a_compiler_may_bring_arguments(monkeypatch, needs_compiler):
    path, *_ = build.compiler()
    monkeypatch.setenv("CXX", f"{path} -g0")
    assert build.compiler() == [path, "-g0"]


@pytest.mark.slow
def test_a_compiler_that_fails_is_told_about(tmp_path):
    done = attend(tmp_path, CXX=shutil.which("false"))
    assert done.stdout.strip() == "torch", done.stderr
    assert done.stderr.count("compiling failed") == 1


@pytest.mark.slow
def test_an_unwritable_cache_is_told_about(tmp_path, needs_compiler):
    (tmp_path / "file").write_text("not a folder")
    done = attend(tmp_path / "file")
    assert done.stdout.strip() == "torch", done.stderr
    assert done.stderr.count("cannot be stored in") == 1


@pytest.mark.slow
def test_it_is_compiled_once_and_says_so(tmp_path, needs_compiler):
    found = [attend(tmp_path) for _ in range(2)]
    assert [done.stdout.strip() for done in found] == ["cpu", "cpu"], found
    assert [done.stderr.count("compiling the") for done in found] == [1, 0]


@pytest.mark.parametrize("variant", ["mmx", "avx512"])
def test_a_variant_that_the_processor_does_not_run_is_refused(variant, monkeypatch):
    monkeypatch.setattr(build.torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("HF_REFORMER_CPU_VARIANT", variant)
    with pytest.raises(ValueError, match=rf"'{variant}' is none of \['avx2', 'portable'\]"):
        build.supported_variants()
