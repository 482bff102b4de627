"""Checks of the kernels on a GPU, in another process; the verdicts are stored on disk.

Another process is used because a faulty kernel may make the GPU unusable for its process: after an illegal memory
access, all later CUDA calls fail. The check also cannot interfere with tracing, graph capture or autograd here.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock

from ..contract import CONTRACT
from ..cpu.build import KernelBuildError, cache_folders, run_limited

logger = logging.getLogger(__name__)

CHECK_SECONDS = 900  # timeout; compiling takes one or two minutes
CHECK = """
import json, sys
module, subject, answer, sys.path[:] = json.loads(sys.argv[1])
from reformer_kernels.triton import verdicts
verdicts.answer(module, verdicts.Subject(*subject), answer)
"""


class Verdict(NamedTuple):
    """The result of a check.

    Attributes:
        reason: why the kernels are not used; None if they agree with the reference.
        lasting: whether the result will be the same later with the same versions; false if memory or a compiler was
            missing.
    """

    reason: str | None
    lasting: bool


class Subject(NamedTuple):
    """A configuration that is compiled and checked separately.

    Attributes:
        device: for example "cuda:0".
        dtype: dtype of query, key and value, for example "float32".
        size, value_size: head sizes.
    """

    device: str
    dtype: str
    size: int
    value_size: int


def judge(agrees: Callable[[], bool]) -> Verdict:
    """Run a check in this process and return the verdict."""
    from triton import CompilationError, OutOfResources
    from triton.runtime.errors import PTXASError

    try:
        if agrees():
            return Verdict(None, lasting=True)
        return Verdict("its kernels disagree with their definition here", lasting=True)
    except (CompilationError, OutOfResources, PTXASError) as error:
        return Verdict(f"its kernels do not compile here ({_in_short(error)})", lasting=True)
    except Exception as error:
        return Verdict(f"its kernels cannot be checked here ({_in_short(error)})", lasting=False)


def _in_short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


def answer(module: str, subject: Subject, path: str) -> None:
    """Check the kernels and write the verdict to a file; runs in the other process."""
    device, dtype, agrees = (
        torch.device(subject.device),
        getattr(torch, subject.dtype),
        importlib.import_module(module),
    )
    kernels = importlib.import_module(__package__)
    verdict = judge(lambda: agrees.triton_agrees(kernels, device, dtype, subject.size, subject.value_size))
    Path(path).write_text(json.dumps(verdict._asdict()), encoding="utf-8")


def check_elsewhere(subject: Subject, module: str) -> Verdict:
    """Check the kernels in another process, by `triton_agrees` of a module."""
    if not sys.executable or getattr(sys, "frozen", False):
        return Verdict("its kernels are checked by another process, and there is no Python to start", lasting=False)
    logger.warning(
        "checking the Triton attention kernels for %s, head size %d, on %s, once (a minute or two)",
        subject.dtype, subject.size, subject.device,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "verdict"
        arguments = json.dumps([module, subject, str(path), list(map(str, sys.path))])
        status, output = run_limited([sys.executable, "-c", CHECK, arguments], CHECK_SECONDS)
        try:
            return Verdict(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            how = f"took more than {CHECK_SECONDS} seconds" if status is None else f"ended with status {status}"
            last = "".join(f": {line}" for line in output.strip().splitlines()[-1:])
            return Verdict(f"the check of its kernels {how}{last}", lasting=False)


def identity(subject: Subject, module: str) -> dict[str, Any]:
    """Return all that a verdict depends on: what is checked, by what, on which GPU, with which versions."""
    import triton

    properties = torch.cuda.get_device_properties(subject.device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "contract": CONTRACT,
        "sources": sources_digest(sys.modules[module].__file__),
        **{name: value for name, value in subject._asdict().items() if name != "device"},
    }


def driver_version() -> str:
    """Return the version of the GPU driver as the system reports it, else the CUDA version it supports."""
    with contextlib.suppress(OSError):
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    version = ctypes.c_int()
    with contextlib.suppress(OSError):
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        driver.cuDriverGetVersion(ctypes.byref(version))
    return f"CUDA {version.value}"


@functools.cache
def sources_digest(check: str | None) -> str:
    """Compute a digest of the kernels and of the file that checks them."""
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in [*sorted(folder.glob("*.py")), folder.parent / "attention_op.py", *([Path(check)] if check else [])]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def remembered(identity: dict[str, Any], check: Callable[[], Verdict]) -> str | None:
    """Return why the kernels are not used, or None: as stored for this identity, or else by calling `check`.

    One process runs the check while others that need it wait. If nothing can be stored, every process runs it.
    """
    paths = _paths(identity)
    for path in paths:
        if stored := _read(path, identity):
            return stored.reason
    with _locked(paths) as writable:
        if writable is not None and (stored := _read(writable, identity)):
            return stored.reason
        verdict = check()
        if writable is not None and verdict.lasting:
            with contextlib.suppress(OSError):
                _store(writable, identity, verdict)
    return verdict.reason


def _paths(identity: dict[str, Any]) -> list[Path]:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    try:
        return [folder / f"triton-{digest}.json" for folder in cache_folders()]
    except KernelBuildError:  # there is no cache folder
        return []


@contextlib.contextmanager
def _locked(paths: list[Path]) -> Iterator[Path | None]:
    """Lock the first of several paths that is writable and yield it, or None if there is none."""
    with contextlib.ExitStack() as stack:
        writable = None
        for path in paths:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(path.with_suffix(".lock"), timeout=CHECK_SECONDS))
                writable = path
                break
        yield writable


def _read(path: Path, identity: dict[str, Any]) -> Verdict | None:
    """Read the verdict stored for this identity, None if there is no valid one."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["identity"] == identity and (stored["reason"] is None or isinstance(stored["reason"], str)):
            return Verdict(stored["reason"], lasting=True)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def _store(path: Path, identity: dict[str, Any], verdict: Verdict) -> None:
    """Write a verdict atomically, by way of a file next to it."""
    handle, name = tempfile.mkstemp(prefix=path.stem, dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump({"identity": identity, "reason": verdict.reason}, file, indent=1)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def fault(subject: Subject, module: str) -> str | None:
    """Return why the kernels cannot be used for a subject on its GPU, or None; checked by a module if needed."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET is set, and the interpreter is slower than PyTorch"
    return remembered(identity(subject, module), functools.partial(check_elsewhere, subject, module))
