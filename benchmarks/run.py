"""Measure hf_reformer against transformers' own Reformer, reformer-pytorch, and exact and local attention.

From the root of the repository, with the package and its `bench` extra installed:

    python -m benchmarks.run --short                             # about seven minutes on two cores
    python -m benchmarks.run                                     # everything; hours
    python -m benchmarks.run --only core --lengths 65536 --rounds 2 --threads 2 --append     # one piece of it
    python -m benchmarks.run --only step --lengths 65536 --impls full --threads 2 --append  # one slow baseline
    python -m benchmarks.run --only core --huge_pages --append   # where page faults weigh less
    python -m benchmarks.run --report                            # tables and plots again, from what is there

Every repetition calls all implementations in turn, so that a busy machine slows them alike. Rows go to
results.csv at once; report.md and the plots beside it are made from it alone.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch
from transformers.utils import logging

from . import environment
from .cases import Entry, Group, Run, Settings
from .measure import Forecasts, Timing, TimingBudget, alternate, describe, peak_memory
from .memory import bound_memory
from .plan import SECTIONS, make, plan
from .report import cell, write_report
from .results import Row, append, check, current_name

BUDGET, SHORT_BUDGET = 20.0, 3.0  # seconds for the repetitions of a group of single ops
LONGEST, SHORT_LONGEST = 120.0, 10.0  # seconds for one call of a single op
SHORT_MINUTES = 9.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer lengths and repetitions, about seven minutes")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to measure")
    parser.add_argument("--lengths", type=int, nargs="+", help="instead of every section's own; multiples of 128")
    parser.add_argument("--rounds", type=int, nargs="+", help="hash rounds of the cores (1 2 4; short: 2)")
    parser.add_argument("--threads", type=int, nargs="+", help="thread counts (1 2; short: 2)")
    parser.add_argument("--quantities", nargs="+", choices=["time", "memory"], default=["time", "memory"])
    parser.add_argument(
        "--impls", "--rivals", nargs="+", type=current_name, help="only these, by their names in results.csv"
    )
    parser.add_argument("--budget", type=float, help=f"seconds to repeat each group in ({BUDGET:.0f})")
    parser.add_argument("--longest_run", type=float, help=f"seconds a call may take ({LONGEST:.0f}); models get more")
    parser.add_argument("--minutes", type=float, help="what has not begun by then is written as skipped")
    parser.add_argument("--huge_pages", action="store_true", help="let torch ask for transparent huge pages")
    parser.add_argument("--append", action="store_true", help="add to the results that are there; later rows count")
    parser.add_argument("--report", action="store_true", help="measure nothing, report on what is there")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmarks"))
    args = parser.parse_args(arguments)
    cores = os.cpu_count() or 1
    for name in ("threads", "rounds", "budget", "longest_run", "minutes"):
        given = getattr(args, name)
        if given is not None and min(given if isinstance(given, list) else [given]) <= 0:
            parser.error(f"--{name} {given}: must be more than 0.")
    args.threads = args.threads or ([min(2, cores)] if args.short else sorted({1, min(2, cores)}))
    args.rounds = args.rounds or ([2] if args.short else [1, 2, 4])
    args.budget = args.budget or (SHORT_BUDGET if args.short else BUDGET)
    args.longest_run = args.longest_run or (SHORT_LONGEST if args.short else LONGEST)
    args.minutes = args.minutes or (SHORT_MINUTES if args.short else None)
    if args.lengths and any(length < 128 or length % 128 for length in args.lengths):
        parser.error(f"--lengths {args.lengths}: the baselines take multiples of 128 only.")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir {args.output_dir} is a file.")
    return args


class Runner:
    """Carries out groups and gives their rows."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
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
        """Rows of a group; those that would take too long are skipped."""
        allowed = self.args.longest_run * group.scale
        forecasts = {entry: self.forecasts.seconds(entry.case, entry.impl, threads) for entry in group.entries}
        entries = [entry for entry, seconds in forecasts.items() if seconds <= allowed]
        rows = [*(self.memory if group.quantity == "memory" else self.time)(group._replace(entries=entries), threads)]
        for entry, seconds in forecasts.items():
            if seconds > allowed:
                why = f"forecast {seconds:.0f} s, more than {allowed:.0f} s"
                rows += self.skipped(group._replace(entries=[entry]), threads, why)
        return with_base(rows)

    def memory(self, group: Group, threads: int) -> Iterator[Row]:
        for entry in group.entries:
            found = peak_memory(entry.case, entry.impl, threads, self.args.longest_run * group.scale)
            if "failure" in found:
                found = {"status": "failed", "note": found["failure"]}
            yield self.row("memory", entry, threads, **found)

    def time(self, group: Group, threads: int) -> Iterator[Row]:
        torch.set_num_threads(threads)
        runs, failures = {}, {}
        for entry in group.entries:
            try:
                runs[entry] = self.prepare(entry)
            except Exception as error:  # it is not installed or cannot take the case
                failures[entry] = Timing(failure=describe(error))
        budget = TimingBudget(self.args.budget, once_over=self.args.budget * group.scale)
        timings = alternate({entry: run.call for entry, run in runs.items()}, budget, group.in_a_row) | failures
        for entry in group.entries:
            yield self.time_row(entry, threads, timings[entry], timings[group.entries[0]], runs.get(entry))

    def prepare(self, entry: Entry) -> Run:
        """The entry ready to be called; the first of its kind is called in small, which loads what it needs."""
        kind = entry.case.section, entry.case.work, entry.impl
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


def with_base(rows: list[Row]) -> list[Row]:
    """Name the first row as everyone's base, and compare peaks of memory to its own."""
    if not rows or rows[0].value is None:
        return rows
    base = rows[0]
    label, peak = f"{base.impl} {base.length}", base.peak_bytes
    found = [replace(row, base=label) if row.value is not None else row for row in rows]
    return [replace(row, ratio=row.peak_bytes / max(peak, 1)) if peak and row.peak_bytes else row for row in found]


def label_of(group: Group, threads: int) -> str:
    """What the cases of a group have in common, on a line."""
    case = group.entries[0].case
    lengths, works = (list(dict.fromkeys(getattr(e.case, name) for e in group.entries)) for name in ("length", "work"))
    words = [case.section, group.quantity, f"{' and '.join(map(str, lengths))} tokens"]
    words += [] if case.causal else ["bidirectional"]
    words += [" and ".join(works), f"{case.layers} layers" if case.layers else f"{case.rounds} rounds"]
    return ", ".join([*words, f"threads: {threads}"])


def name_of(row: Row, group: Group) -> str:
    """The implementation, and what sets its case apart from others of the group."""
    varies = [name for name in ("work", "length") if len({getattr(entry.case, name) for entry in group.entries}) > 1]
    return " ".join([row.impl, *(str(getattr(row, name)) for name in varies)])


def restart_with_huge_pages() -> None:
    """The allocator reads its setting when the process begins."""
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks.run", *sys.argv[1:]], environment)


def measure_all(args: argparse.Namespace, path: Path) -> None:
    """Carry out the plan, row by row into the file."""
    try:
        groups = plan(Settings(args.lengths, args.rounds, args.short), args.only, args.impls)
    except ValueError as error:
        sys.exit(str(error))
    work = [
        (group, threads)
        for threads in args.threads
        for group in groups
        if group.quantity in args.quantities and (group.quantity == "time" or threads == args.threads[0])
    ]
    if not work:
        sys.exit("Nothing to measure: no group of these sections holds these implementations and quantities.")
    pages = environment.asks_for_huge_pages()
    facts = environment.facts().items()
    rows = [Row(section="machine", length=0, quantity="fact", impl=k, huge_pages=pages, note=v) for k, v in facts]
    append(path, rows)
    start, runner = time.monotonic(), Runner(args)
    for number, (group, threads) in enumerate(work, 1):
        seconds = time.monotonic() - start
        clock = f"{int(seconds // 60)}:{int(seconds % 60):02}"
        print(f"[{number}/{len(work)}, {clock}] {label_of(group, threads)}", flush=True)
        late = args.minutes is not None and seconds > args.minutes * 60
        rows = runner.skipped(group, threads, "out of time") if late else runner.measure(group, threads)
        append(path, rows)
        print("    " + ", ".join(f"{name_of(row, group)} {cell(row)}" for row in rows), flush=True)


def main() -> None:
    args = parse()
    path = args.output_dir / "results.csv"
    if path.exists():
        try:
            check(path)
        except ValueError as error:
            sys.exit(str(error))
    if not args.report:
        if args.huge_pages and not environment.asks_for_huge_pages():
            restart_with_huge_pages()
        if path.exists() and not args.append:
            sys.exit(f"{path} is there already. Add to it with --append, or choose another --output_dir.")
        args.output_dir.mkdir(parents=True, exist_ok=True)
        logging.set_verbosity_error()
        bound_memory()
        measure_all(args, path)
    elif not path.exists():
        sys.exit(f"{path} is not there. Measure first, or name its folder with --output_dir.")
    for made in write_report(path, args.output_dir):
        print(made)


if __name__ == "__main__":
    main()
