"""Measure hf_reformer beside transformers' own Reformer, reformer-pytorch, and exact and local attention.

From the root of the repository, with the package and its `bench` extra installed:

    python -m benchmarks.run --short                             # about ten minutes on two cores
    python -m benchmarks.run --output_dir runs/benchmarks        # everything; some hours
    python -m benchmarks.run --only core --lengths 4096 --rounds 2 --threads 1 --output_dir runs/core
    python -m benchmarks.run --only core step --huge_pages --append --output_dir runs/benchmarks

Every repetition calls all rivals in turn, so that a busy machine slows them alike. Rows go to results.csv as they are
found; tables and pictures are made from it, also later: `python -m benchmarks.report runs/benchmarks/results.csv`.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from . import machine
from .cases import Entry, Group, Run, Settings
from .limits import bound_memory
from .measure import Effort, Forecasts, Timing, alternate, describe, peak_memory
from .plan import OWNERS, make, plan
from .report import write_report
from .results import Row, append

BUDGET, SHORT_BUDGET = 60.0, 6.0  # seconds for the repetitions of a group of single ops
LONGEST, SHORT_LONGEST = 300.0, 10.0  # seconds for one call of a single op
SHORT_MINUTES = 9.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer lengths and repetitions, at most ten minutes")
    parser.add_argument("--only", nargs="+", choices=list(OWNERS), default=list(OWNERS), help="sections to measure")
    parser.add_argument("--lengths", type=int, nargs="+", help="instead of every section's own; multiples of 128")
    parser.add_argument("--rounds", type=int, nargs="+", help="hash rounds of the cores (1 2 4; short: 2)")
    parser.add_argument("--threads", type=int, nargs="+", help="thread counts (1 2; short: 2)")
    parser.add_argument("--quantities", nargs="+", choices=["time", "memory"], default=["time", "memory"])
    parser.add_argument("--budget", type=float, help="seconds for the repetitions of a group; models get more")
    parser.add_argument("--longest_run", type=float, help="seconds a call may take at all; models get more")
    parser.add_argument("--minutes", type=float, help="what has not begun by then is written as skipped")
    parser.add_argument("--huge_pages", action="store_true", help="let torch ask for transparent huge pages")
    parser.add_argument("--append", action="store_true", help="add to the results that are there; later rows count")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args(arguments)
    cores = os.cpu_count() or 1
    args.threads = args.threads or ([min(2, cores)] if args.short else sorted({1, min(2, cores)}))
    args.rounds = args.rounds or ([2] if args.short else [1, 2, 4])
    args.budget = args.budget or (SHORT_BUDGET if args.short else BUDGET)
    args.longest_run = args.longest_run or (SHORT_LONGEST if args.short else LONGEST)
    args.minutes = args.minutes or (SHORT_MINUTES if args.short else None)
    if args.lengths and any(length < 1 or length % 128 for length in args.lengths):
        parser.error(f"--lengths {args.lengths}: the rivals take multiples of 128 only.")
    return args


class Runner:
    """Carries out groups and gives their rows."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.forecasts = Forecasts()
        self.warm: set[tuple] = set()

    def row(self, quantity: str, entry: Entry, threads: int, **found) -> Row:
        case = entry.case
        return Row(
            quantity,
            case.section,
            entry.rival,
            case.length,
            case.work,
            case.rounds,
            case.causal,
            case.layers,
            threads,
            machine.asks_for_huge_pages(),
            **found,
        )

    def skipped(self, group: Group, threads: int, why: str) -> list[Row]:
        return [self.row(group.quantity, entry, threads, status="skipped", note=why) for entry in group.entries]

    def split(self, group: Group, threads: int) -> tuple[list[Entry], list[Row]]:
        """Entries to measure, and rows for those that would take too long."""
        allowed, measured, rows = self.args.longest_run * group.allowed, [], []
        for entry in group.entries:
            seconds = self.forecasts.seconds(entry.case, entry.rival, threads)
            if seconds <= allowed:
                measured.append(entry)
                continue
            why = f"forecast {seconds:.0f} s, more than {allowed:.0f} s"
            rows.append(self.row(group.quantity, entry, threads, status="skipped", note=why))
        return measured, rows

    def measure(self, group: Group, threads: int) -> list[Row]:
        entries, rows = self.split(group, threads)
        measured = self.memory if group.quantity == "memory" else self.time
        return with_ratios(list(measured(entries, group.allowed, threads))) + rows

    def memory(self, entries: list[Entry], allowed: float, threads: int) -> Iterator[Row]:
        for entry in entries:
            found = peak_memory(entry.case, entry.rival, threads, self.args.longest_run * allowed)
            if "failure" in found:
                yield self.row("memory", entry, threads, status="failed", note=found["failure"])
            else:
                yield self.row("memory", entry, threads, **found)

    def time(self, entries: list[Entry], allowed: float, threads: int) -> Iterator[Row]:
        torch.set_num_threads(threads)
        runs, failures = {}, {}
        for entry in entries:
            try:
                runs[entry] = self.prepare(entry)
            except Exception as error:  # a rival that is not installed or cannot take the case
                failures[entry] = Timing(failure=describe(error))
        budget = self.args.budget * allowed
        effort = Effort(budget, once_over=budget / 4)
        timings = alternate({entry: run.call for entry, run in runs.items()}, effort) | failures
        base = timings[entries[0]] if entries else Timing()
        for entry in entries:
            yield self.time_row(entry, threads, timings[entry], base, runs.get(entry))

    def prepare(self, entry: Entry) -> Run:
        """The entry ready to be called; the first of its kind is called in small, which loads what it needs."""
        kind = entry.case.section, entry.case.work, entry.rival
        if kind not in self.warm:
            make(entry.case.warm_up(), entry.rival).call()
            self.warm.add(kind)
        return make(*entry)

    def time_row(self, entry: Entry, threads: int, timing: Timing, base: Timing, run: Run | None) -> Row:
        if timing.failure or run is None:
            return self.row("time", entry, threads, status="failed", note=timing.failure)
        self.forecasts.add(entry.case, entry.rival, threads, timing.median)
        return self.row(
            "time",
            entry,
            threads,
            status="once" if timing.once else "ok",
            seconds=timing.median,
            fastest=min(timing.wall),
            cpu_seconds=sorted(timing.cpu)[len(timing.cpu) // 2],
            repeats=len(timing.wall),
            ratio=timing.ratio(base) if base.wall else None,
            flops=run.flops or None,
            bytes=run.bytes or None,
            note=run.note,
        )


def with_ratios(rows: list[Row]) -> list[Row]:
    """Name the first row as everyone's base, and compare peaks of memory to its own."""
    if not rows or rows[0].value is None:
        return rows
    base = rows[0]
    label, peak = f"{base.rival} {base.length}", base.peak_bytes
    found = [replace(row, base=label) if row.value is not None else row for row in rows]
    return [replace(row, ratio=row.peak_bytes / max(peak, 1)) if peak and row.peak_bytes else row for row in found]


def label_of(group: Group) -> str:
    case = group.entries[0].case
    words = [group.quantity, case.section, f"{case.length}", case.work]
    return " ".join(words + ([f"{case.rounds} rounds"] if case.section == "core" else []))


def restart_with_huge_pages() -> None:
    """The allocator reads its setting when the process begins."""
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks.run", *sys.argv[1:]], environment)


def main() -> None:
    args = parse()
    if args.huge_pages and not machine.asks_for_huge_pages():
        restart_with_huge_pages()
    path = args.output_dir / "results.csv"
    if path.exists() and not args.append:
        sys.exit(f"{path} is there already. Add to it with --append, or choose another --output_dir.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    logging.set_verbosity_error()
    bound_memory()
    start, runner = time.monotonic(), Runner(args)
    facts = machine.facts().items()
    append(
        path,
        [Row("fact", "machine", name, huge_pages=machine.asks_for_huge_pages(), note=fact) for name, fact in facts],
    )
    groups = plan(Settings(args.lengths, args.rounds, args.short), args.only)
    work = [
        (group, threads)
        for threads in args.threads
        for group in groups
        if group.quantity in args.quantities and (group.quantity == "time" or threads == args.threads[0])
    ]
    with tqdm(work, desc="benchmarks") as progress:
        for group, threads in progress:
            progress.set_postfix_str(f"{label_of(group)}, {threads} threads")
            late = args.minutes is not None and time.monotonic() - start > args.minutes * 60
            rows = runner.skipped(group, threads, "out of time") if late else runner.measure(group, threads)
            append(path, rows)
    for made in write_report([path], args.output_dir):
        print(made)


if __name__ == "__main__":
    main()
