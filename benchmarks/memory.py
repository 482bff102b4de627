"""Measure the peak memory of one call; started by `measure.peak_memory` in a separate process.

python -m benchmarks.memory '{"case": {"section": "core", "length": 4096}, "impl": "sdpa", "threads": 1}'
"""

import ctypes
import gc
import json
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .cases import Case
from .plan import make

SHARE = 0.9  # of the free memory, for one measuring process


def proc(file: str, name: str) -> int | None:
    """Return a field of a file in /proc in bytes; None if the system does not provide it."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc", file).read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def bound_memory() -> None:
    """Limit this process to most of the free memory, so that an implementation that needs more fails on its own."""
    free, used = proc("meminfo", "MemAvailable"), proc("self/status", "VmData")
    if free is None or used is None:
        return
    limit, hard = int(SHARE * free) + used, resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def resident() -> int:
    """Return the resident bytes; if the system does not provide them, their peak so far."""
    return proc("self/status", "VmRSS") or highest()


def highest() -> int:
    """Return the peak resident bytes so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return proc("self/status", "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_highest() -> bool:
    """Reset the high-water mark to the resident memory, and return whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back() -> None:
    """Return freed memory to the system, so that it does not count as in use before the call."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # not glibc


def peak_of(call: Callable[[], Any], device: str) -> tuple[int, bool]:
    """Return the peak bytes that a call takes beyond those in use before it, and whether the number is exact."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before, True
    give_back()
    exact = forget_highest()
    before = resident()
    result = call()
    peak = highest() - before
    del result
    return peak, exact


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    bound_memory()
    case, impl = Case(**request["case"]), request["impl"]
    make(case.warm_up(), impl).call()  # loads libraries, threads and kernels
    run = make(case, impl)
    peak, exact = peak_of(run.call, case.device)
    note = run.note if exact else f"{run.note} lower bound: the high-water mark could not be reset".strip()
    print(json.dumps({"peak_bytes": peak, "bytes": run.bytes, "note": note}))


if __name__ == "__main__":
    main()
