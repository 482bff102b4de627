"""Measurement methods: alternating calls and medians for time; a separate process for memory."""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from .cases import Case

REPOSITORY = Path(__file__).resolve().parents[1]
START_UP = 60.0  # seconds that a measuring process may take beyond the call itself
# Implementations whose time is quadratic in the length.
QUADRATIC = ("sdpa", "full", "flash", "modernbert", "mamba", "llama", "mistral")
Key = TypeVar("Key", bound=Hashable)


class TimingBudget(NamedTuple):
    """Limits on the duration of measurements.

    Attributes:
        budget: seconds for the repetitions of a group; at least `min_repeats` are done in any case.
        once_over: an implementation whose first call takes longer is not called again.
    """

    budget: float
    once_over: float
    min_repeats: int = 3
    max_repeats: int = 200


@dataclass
class Timing:
    """Seconds of one implementation, one entry per repetition. `failure` is the reason if there are none."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    once: bool = False
    failure: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    def ratio(self, base: "Timing") -> float:
        """Return the median ratio to the base's time, paired by repetition if both were repeated."""
        if self.once or base.once:
            return self.median / base.median
        pairs = zip(self.wall, base.wall, strict=False)
        return statistics.median(mine / other for mine, other in pairs)


def describe(error: BaseException) -> str:
    """Describe an error on one line, short enough for a table."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


Clock = Callable[[Callable[[], Any], int], tuple[float, float]]


def timed(call: Callable[[], Any], in_a_row: int = 1) -> tuple[float, float]:
    """Measure wall and CPU seconds per call over `in_a_row` calls. Results are freed after the clock is read."""
    results: list[Any] = [None] * in_a_row
    cpu, wall = time.process_time(), time.perf_counter()
    for index in range(in_a_row):
        results[index] = call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    del results
    return wall / in_a_row, cpu / in_a_row


def timed_on_gpu(call: Callable[[], Any], in_a_row: int = 1) -> tuple[float, float]:
    """Measure the same on a CUDA device, from the start of the first call's work to the end of the last call's."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    cpu = time.process_time()
    begin.record()
    for _ in range(in_a_row):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / in_a_row, (time.process_time() - cpu) / in_a_row


CLOCKS: dict[str, Clock] = {"cpu": timed, "cuda": timed_on_gpu}


def alternate(
    calls: Mapping[Key, Callable[[], Any]], budget: TimingBudget, in_a_row: int = 1, clock: Clock = timed
) -> dict[Key, Timing]:
    """Time all implementations in alternation, in repeated rounds of alternating order; the first round is a warm-up.

    An implementation that fails is dropped, and the others continue.
    """
    timings = {key: Timing() for key in calls}
    gc.collect()
    gc.freeze()  # existing objects need not be scanned between rounds
    gc.disable()
    try:
        for key, call in calls.items():
            attempt(timings[key], call, in_a_row, clock)
        for timing in timings.values():
            timing.once = bool(timing.wall) and timing.median > budget.once_over
        again = [key for key, timing in timings.items() if timing.wall and not timing.once]
        for key in again:
            timings[key] = Timing()
        start, repeats = time.perf_counter(), 0
        while repeats < budget.max_repeats and again:
            if repeats >= budget.min_repeats and time.perf_counter() - start > budget.budget:
                break
            again.reverse()  # so that no implementation always follows the same one
            for key in again:
                attempt(timings[key], calls[key], in_a_row, clock)
            again = [key for key in again if not timings[key].failure]
            gc.collect()
            repeats += 1
    finally:
        gc.enable()
        gc.unfreeze()
    return timings


def attempt(timing: Timing, call: Callable[[], Any], in_a_row: int, clock: Clock) -> None:
    """Add the time of one call, or the reason for its failure."""
    try:
        wall, cpu = clock(call, in_a_row)
    except Exception as error:  # any error is recorded, and the others continue
        timing.failure = describe(error)
        return
    timing.wall.append(wall)
    timing.cpu.append(cpu)


class Forecasts:
    """Forecasts of the time of a call, from the last input on which the same was measured."""

    def __init__(self) -> None:
        self.known: dict[tuple, tuple[int, float]] = {}

    @staticmethod
    def key(case: Case, impl: str, threads: int) -> tuple:
        return case.section, impl, case.work, case.rounds, case.causal, case.layers, case.dtype, threads

    def add(self, case: Case, impl: str, threads: int, seconds: float) -> None:
        self.known[self.key(case, impl, threads)] = case.length, seconds

    def seconds(self, case: Case, impl: str, threads: int) -> float:
        """Forecast the seconds of a call; 0 if nothing is known."""
        length, seconds = self.known.get(self.key(case, impl, threads), (case.length, 0.0))
        return seconds * (case.length / length) ** (2 if impl in QUADRATIC else 1)


def peak_memory(case: Case, impl: str, threads: int, timeout: float) -> dict[str, Any]:
    """Measure, in a new process, the memory that one call takes beyond that in use before it.

    Returns:
        The output of `benchmarks.memory`: `peak_bytes`, `bytes`, `note`; or, if it fails, `failure`.
    """
    # By default glibc keeps freed blocks of up to 32 MB: gaps in its heap, different in every run, would count.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    request = json.dumps({"case": asdict(case), "impl": impl, "threads": threads})
    command = [sys.executable, "-m", "benchmarks.memory", request]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout + START_UP, cwd=REPOSITORY, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"failure": f"longer than {timeout + START_UP:.0f} s"}
    if done.returncode < 0:
        why = ", as if out of memory" if done.returncode == -9 else ""
        return {"failure": f"killed by signal {-done.returncode}{why}"}
    if done.returncode:
        return {"failure": " ".join(done.stderr.strip().splitlines()[-1:])[:160] or f"exit status {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])
