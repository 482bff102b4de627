"""Peak memory of one call; started by `measure.peak_memory` in a process of its own.

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

SHARE = 0.9  # of the memory that is free, for one measuring process


def proc(file: str, name: str) -> int | None:
    """A field of a file in /proc in bytes, None where the system does not tell."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc", file).read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def bound_memory() -> None:
    """Limit this process to most of the free memory: an implementation that needs more then fails by itself."""
    free, used = proc("meminfo", "MemAvailable"), proc("self/status", "VmData")
    if free is None or used is None:
        return
    limit, hard = int(SHARE * free) + used, resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def resident() -> int:
    """Bytes in memory now; where the system does not tell, the highest so far."""
    return proc("self/status", "VmRSS") or highest()


def highest() -> int:
    """The most bytes ever in memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return proc("self/status", "VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_highest() -> bool:
    """Set the high-water mark to what is in memory now. Whether that worked."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back() -> None:
    """Return freed memory to the system, so that it does not count as being there before."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass  # not glibc


def peak_of(call: Callable[[], Any], device: str) -> tuple[int, bool]:
    """The most bytes that a call takes beyond those before it, and whether that is exact."""
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
    make(case.warm_up(), impl).call()  # libraries, threads and kernels are loaded by now
    run = make(case, impl)
    peak, exact = peak_of(run.call, case.device)
    note = run.note if exact else f"{run.note} lower bound: the high-water mark could not be reset".strip()
    print(json.dumps({"peak_bytes": peak, "bytes": run.bytes, "note": note}))


if __name__ == "__main__":
    main()
