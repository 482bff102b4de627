"""Runs groups of measurements, on a CPU or a GPU, and returns their result rows."""

import gc
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from . import environment
from .cases import Entry, Group, Run
from .checks import check
from .measure import CLOCKS, Forecasts, Timing, TimingBudget, alternate, describe, peak_memory
from .memory import peak_of
from .plan import make
from .report import cell
from .results import Row, append


class Limits(NamedTuple):
    """Time limits in seconds.

    Attributes:
        budget: for the repetitions of a group.
        longest_run: for one call of a single op; models get more.
        deadline: groups not started by this `time.monotonic` are recorded as skipped.
        in_process: measure memory in this process, as always on a GPU, instead of a separate one.
    """

    budget: float
    longest_run: float
    deadline: float = float("inf")
    in_process: bool = False

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()


class Runner:
    """Runs groups of measurements and returns their rows."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.forecasts = Forecasts()
        self.warm: set[tuple] = set()

    def row(self, quantity: str, entry: Entry, threads: int, **found) -> Row:
        pages = environment.asks_for_huge_pages()
        return Row(
            **asdict(entry.case), quantity=quantity, impl=entry.impl, threads=threads, huge_pages=pages, **found
        )

    def skipped(self, group: Group, threads: int, why: str) -> list[Row]:
        return [self.row(group.quantity, entry, threads, status="skipped", note=why) for entry in group.entries]

    def measure(self, group: Group, threads: int) -> list[Row]:
        """Measure the rows of a group; those that would take too long are skipped."""
        if self.limits.left < 0:
            return self.skipped(group, threads, "out of time")
        allowed = min(self.limits.longest_run * group.scale, self.limits.left)
        forecasts = {entry: self.forecasts.seconds(entry.case, entry.impl, threads) for entry in group.entries}
        entries = [entry for entry, seconds in forecasts.items() if seconds <= allowed]
        measure = {"time": self.time, "memory": self.memory, "check": self.check}[group.quantity]
        rows = [*measure(group._replace(entries=entries), threads)]
        for entry, seconds in forecasts.items():
            if seconds > allowed:
                why = f"forecast {seconds:.0f} s, more than {allowed:.0f} s"
                rows += self.skipped(group._replace(entries=[entry]), threads, why)
        return with_base(rows)

    def check(self, group: Group, threads: int) -> Iterator[Row]:
        for entry in group.entries:
            try:
                ratio, note = check(*entry), ""
            except Exception as error:  # any error of the backend
                ratio, note = None, describe(error)
            status = "ok" if ratio is not None and ratio <= 1 else "failed"
            yield self.row("check", entry, threads, status=status, ratio=ratio, note=note)

    def memory(self, group: Group, threads: int) -> Iterator[Row]:
        for entry in group.entries:
            if entry.case.device != "cpu" or self.limits.in_process:
                found = self.memory_here(entry)
            else:
                found = peak_memory(entry.case, entry.impl, threads, self.limits.longest_run * group.scale)
            if "failure" in found:
                found = {"status": "failed", "note": found["failure"]}
            yield self.row("memory", entry, threads, **found)

    def memory_here(self, entry: Entry) -> dict:
        """Measure like `peak_memory`, but in this process."""
        try:
            run = self.prepare(entry)
            peak, _ = peak_of(run.call, entry.case.device)
        except Exception as error:  # out of memory, or the case is not supported
            return {"failure": describe(error)}
        return {"peak_bytes": peak, "bytes": run.bytes, "note": run.note}

    def time(self, group: Group, threads: int) -> Iterator[Row]:
        if threads:
            torch.set_num_threads(threads)
        runs, failures = {}, {}
        for entry in group.entries:
            try:
                runs[entry] = self.prepare(entry)
            except Exception as error:  # not installed, or the case is not supported
                failures[entry] = Timing(failure=describe(error))
        budget = TimingBudget(self.limits.budget, once_over=self.limits.budget * group.scale)
        clock = CLOCKS[group.entries[0].case.device] if group.entries else CLOCKS["cpu"]
        calls = {entry: run.call for entry, run in runs.items()}
        timings = alternate(calls, budget, group.in_a_row, clock) | failures
        for entry in group.entries:
            yield self.time_row(entry, threads, timings[entry], timings[group.entries[0]], runs.get(entry))

    def prepare(self, entry: Entry) -> Run:
        """Make the run of an entry; the first of its kind is warmed up on a small case, which loads what it needs."""
        kind = entry.case.section, entry.case.work, entry.case.dtype, entry.impl
        if kind not in self.warm:
            make(entry.case.warm_up(), entry.impl).call()
            self.warm.add(kind)
        return make(*entry)

    def time_row(self, entry: Entry, threads: int, timing: Timing, base: Timing, run: Run | None) -> Row:
        if timing.failure or run is None:
            return self.row("time", entry, threads, status="failed", note=timing.failure)
        self.forecasts.add(entry.case, entry.impl, threads, timing.median)
        return self.row(
            "time",
            entry,
            threads,
            status="once" if timing.once else "ok",
            seconds=timing.median,
            fastest=min(timing.wall),
            cpu_seconds=median(timing.cpu),
            repeats=len(timing.wall),
            ratio=None if base.failure else timing.ratio(base),
            flops=run.flops or None,
            bytes=run.bytes or None,
            note=run.note,
        )


class DeviceLostError(Exception):
    """Raised after a call that left the GPU unusable for this process; `done` groups are in the file."""

    def __init__(self, done: int):
        super().__init__("The GPU cannot be used by this process any more.")
        self.done = done


def carry_out(runner: Runner, work: Iterable[tuple[Group, int]], path: Path, first: int = 0) -> None:
    """Measure groups from `first` on, each with its number of threads, and write them to the file group by group.

    Raises:
        DeviceLostError: the GPU is unusable after a group.
    """
    work = list(work)
    begin = time.monotonic()
    for number, (group, threads) in list(enumerate(work, 1))[first:]:
        seconds = time.monotonic() - begin
        clock = f"{int(seconds // 60)}:{int(seconds % 60):02}"
        print(f"[{number}/{len(work)}, {clock}] {label_of(group, threads)}", flush=True)
        rows = runner.measure(group, threads)
        append(path, rows)
        print("    " + ", ".join(f"{name_of(row, group)} {cell(row)}" for row in rows), flush=True)
        if any(entry.case.device == "cuda" for entry in group.entries):
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise DeviceLostError(number) from error
            gc.collect()
            torch.cuda.empty_cache()


def with_base(rows: list[Row]) -> list[Row]:
    """Set the first row as the base of all, and compute the ratios of peak memory to it."""
    if not rows or rows[0].value is None:
        return rows
    base = rows[0]
    label, peak = f"{base.impl} {base.length}", base.peak_bytes
    found = [replace(row, base=label) if row.value is not None else row for row in rows]
    return [replace(row, ratio=row.peak_bytes / max(peak, 1)) if peak and row.peak_bytes else row for row in found]


def label_of(group: Group, threads: int) -> str:
    """Describe on one line what the cases of a group have in common."""
    case = group.entries[0].case
    lengths, works = (list(dict.fromkeys(getattr(e.case, name) for e in group.entries)) for name in ("length", "work"))
    words = [case.section, group.quantity, f"{' and '.join(map(str, lengths))} tokens"]
    words += [] if case.causal else ["bidirectional"]
    words += [" and ".join(works), f"{case.layers} layers" if case.layers else f"{case.rounds} rounds"]
    return ", ".join([*words, f"threads: {threads}"])


def name_of(row: Row, group: Group) -> str:
    """Return the implementation's name, with what distinguishes its case from others of the group."""
    varies = [name for name in ("work", "length") if len({getattr(entry.case, name) for entry in group.entries}) > 1]
    return " ".join([row.impl, *(str(getattr(row, name)) for name in varies)])
