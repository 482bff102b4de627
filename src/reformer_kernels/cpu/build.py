"""Compiling the C++ kernels on first use: one shared library per vector width, kept in the user's cache."""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from filelock import FileLock

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared"]
# What each variant asks of the compiler; every processor runs the last one.
VARIANTS = {
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}
COMPILE_SECONDS = 120  # longer than that, something is wrong


class KernelBuildError(Exception):
    """Why there is no compiled kernel, worded for users."""


def supported_variants() -> list[str]:
    """Variants that this processor supports, best first; HF_REFORMER_CPU_VARIANT selects one of them.

    Raises:
        ValueError: the environment variable names no variant, or one that this processor does not support.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    runs = list(VARIANTS)[{"AVX512": 0, "AVX2": 1}.get(capability, 2) :]
    chosen = os.environ.get("HF_REFORMER_CPU_VARIANT")
    if chosen and chosen not in runs:
        raise ValueError(f"HF_REFORMER_CPU_VARIANT={chosen!r} is none of {runs}, which this processor runs.")
    return [chosen] if chosen else runs


def compiler() -> list[str]:
    """The C++ compiler and its first arguments: $CXX, else the first of c++, g++ and clang++.

    Raises:
        KernelBuildError: there is none, or what CXX names cannot be found.
    """
    if sys.platform == "win32":
        raise KernelBuildError("the compiled kernels are not built on Windows")
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    if chosen:
        raise KernelBuildError(f"CXX={os.environ['CXX']!r} cannot be found; correct it, or unset it")
    raise KernelBuildError("there is no C++ compiler (c++, g++ or clang++; or set CXX)")


def cache_folder() -> Path:
    """$HF_REFORMER_CACHE, or hf_reformer in the user's cache directory."""
    if chosen := os.environ.get("HF_REFORMER_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_reformer"


def _command(variant: str) -> list[str]:
    return [*compiler(), *FLAGS, *VARIANTS[variant], str(SOURCES / "api.cpp")]


def library_path(variant: str) -> Path:
    """Path of the compiled variant; its name is a hash of sources, compiler and flags."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    version = subprocess.run([*compiler(), "--version"], capture_output=True, check=False).stdout
    digest.update(version + " ".join([*_command(variant), platform.machine()]).encode())
    return cache_folder() / f"kernels-{variant}-{digest.hexdigest()[:16]}.so"


@functools.cache
def load_library(variant: str) -> ctypes.CDLL:
    """The compiled variant, from the cache or compiled now.

    Raises:
        KernelBuildError: no compiler, or it fails.
    """
    path = library_path(variant)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock"), timeout=COMPILE_SECONDS):
            if not path.exists():
                _compile(variant, path)
        return ctypes.CDLL(str(path))
    except OSError as error:  # an unwritable cache, a lock that is never released, a library that does not load
        raise KernelBuildError(
            f"the compiled kernels cannot be stored in or loaded from {path.parent}: {error}"
        ) from error


def _compile(variant: str, path: Path) -> None:
    logger.warning("compiling the %s attention kernel, once (about ten seconds)", variant)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        command = [*_command(variant), "-o", str(built)]
        for threads in (["-fopenmp"], []):  # without OpenMP (Apple, clang without libomp) it starts its own threads
            try:
                done = subprocess.run(
                    command + threads, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False
                )
            except subprocess.TimeoutExpired as error:
                raise KernelBuildError(
                    f"compiling took more than {COMPILE_SECONDS} seconds: {' '.join(command)}"
                ) from error
            if done.returncode == 0:
                break
        else:
            raise KernelBuildError(f"compiling failed: {' '.join(command)}\n{done.stderr[-2000:]}")
        built.replace(path)
