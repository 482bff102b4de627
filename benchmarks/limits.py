"""A bound on this process's memory: a rival that wants too much then fails by itself, instead of killing the run."""

import resource
from pathlib import Path

SHARE = 0.9  # of what is free


def bound_memory() -> None:
    """Allow this process nine tenths of the memory that is free. Without effect where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        used = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    except (OSError, StopIteration):
        return
    free = next((line for line in lines if line.startswith("MemAvailable")), None)
    if free is None:
        return
    limit = int(SHARE * kilobytes(free) * 1024) + kilobytes(used) * 1024
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def kilobytes(line: str) -> int:
    return int(line.split()[1])
