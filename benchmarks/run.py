"""Compare hf_reformer with other Reformers, exact and local attention, and popular alternative models.

From the root of the repository, with the package and its `bench` extra installed:

    python -m benchmarks.run --short                             # ten minutes on two cores
    python -m benchmarks.run                                     # everything; hours
    python -m benchmarks.run --only core --lengths 65536 --rounds 2 --threads 2 --append     # a part of it
    python -m benchmarks.run --only step --lengths 65536 --impls full --threads 2 --append  # one slow baseline
    python -m benchmarks.run --only core --huge_pages --append   # page faults cost less
    python -m benchmarks.run --only classifier causal --short    # popular alternatives, in a few minutes
    python -m benchmarks.run --report                            # redo tables and plots from existing results

Every repetition calls all implementations in turn, so that a busy machine slows them equally. Rows are written to
results.csv immediately; report.md and the plots are made from that file only.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

from transformers.utils import logging

from . import environment
from .cases import Settings
from .memory import bound_memory
from .plan import SECTIONS, plan
from .report import write_report
from .results import Row, append, check, current_name
from .runner import Limits, Runner, carry_out

BUDGET, SHORT_BUDGET = 20.0, 3.0  # seconds for the repetitions of a group of single ops
LONGEST, SHORT_LONGEST = 120.0, 10.0  # seconds for one call of a single op
SHORT_MINUTES = 9.0


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer lengths and repetitions, ten minutes at most")
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


def restart_with_huge_pages() -> None:
    """Restart this process: the allocator reads its setting at startup."""
    environment = os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "benchmarks.run", *sys.argv[1:]], environment)


def measure_all(args: argparse.Namespace, path: Path) -> None:
    """Run all planned measurements."""
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
    deadline = time.monotonic() + 60 * (args.minutes or math.inf)
    carry_out(Runner(Limits(args.budget, args.longest_run, deadline)), work, path)


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
