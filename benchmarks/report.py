"""Tables and plots from results alone."""

import math
from collections.abc import Iterable
from pathlib import Path

from .environment import RATES
from .plots import draw_all
from .results import Row, load
from .targets import Target, find_targets

TITLES = {
    "machine": "Rates of the machine",
    "core": "Cores: hash, sort and attention",
    "centering": "Centred hashing",
    "ops": "Single ops and their floors",
    "break-even": "Break-even with exact attention",
    "step": "Training steps",
    "growth": "Growth of the core",
    "depth": "Depth",
    "coverage": "The coverage loss",
    "generation": "A decode step, of sixteen in a row",
    "prefill": "A prompt, with a cache, at once and in chunks",
    "step-growth": "Growth of a training step",
}
NOTES = """\
All numbers: float32, batch 1, 8 heads of 64. Times are wall-clock medians of calls in turn, back and forth, within \
one process, after a call each to warm up; in brackets the median ratio to the first of them. `*`: too slow to \
repeat, called once, cold. Memory is the high-water mark of a process of its own above what was there before the \
call, where malloc returns freed blocks to the system (`MALLOC_MMAP_THRESHOLD_=65536`). All get the same inputs and \
compute the gradients of all of them.

- **Page faults are part of the ratios.** The baselines allocate hundreds of MiB of temporaries in a call, and the \
default allocator takes them from the system anew each time. With transparent huge pages (`--huge_pages`, in tables \
of their own) faults are few, and the ratios to the baselines shrink.
- Chunk mode is the baselines' own rule: chunks of 64 that see one back. Window mode has windows of 96 in as many \
hash rounds (without the order of positions): what a token of a chunk sees on average up to itself.
- transformers' Reformer hashes with as many buckets as hf_reformer's chunk mode, factorised from the same length \
on. reformer-pytorch has half as many, one set of rotations for all heads, and never factorises: time and memory of \
its hash grow with the square of the length.
- `sdpa` is torch's exact attention; it and `local`, exact attention inside chunks along the sequence, do not depend \
on the number of rounds. `local` is a bound for one round, not a baseline.
- Models have hidden size 512, feed-forward 1024, layers (local, lsh) in turn, no dropout. hf_reformer's has its \
default windows of 128, which in training show the order of positions, two hash rounds and one of exploration; \
transformers' its default chunks of 64, two rounds. `hf-reformer plain` keeps activations instead of recomputing \
them. `full` is a Transformer on `sdpa` with fixed positions; from 65536 tokens on it recomputes its layers, as \
hf_reformer's does at every length.
- A step's floor is its dense products (forward, recomputation, backward) at the rate of `mm`, plus its attention \
measured alone. An op's floor is its products at the rate of `mm` or its reading and writing at that of `copy`, \
whichever takes longer.
- The next token: the baselines use their caches. transformers' Reformer keeps states, projects what it needs again, \
and computes the positions of the whole context."""


def write_report(results: Path, folder: Path) -> list[Path]:
    """Write report.md and the plots into `folder`; the paths of all that was made."""
    rows = load(results)
    plots = draw_all(rows, folder)
    parts = ["# Benchmarks", facts_table(rows), NOTES]
    timed = sorted({(row.threads, row.huge_pages) for row in rows if row.quantity == "time"})
    for threads, huge_pages in timed or sorted({(row.threads, row.huge_pages) for row in rows if row.threads}):
        parts += [f"## Targets, {name_of(threads, huge_pages)}", target_table(find_targets(rows, threads, huge_pages))]
    for section, title in TITLES.items():
        mine = [row for row in rows if row.section == section and row.quantity != "fact"]
        if mine:
            parts += [f"## {title}", *section_tables(mine)]
    if plots:
        parts += ["## Plots", *(f"![{path.stem.replace('_', ' ')}]({path.name})" for path in plots)]
    report = folder / "report.md"
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [report, *plots]


def name_of(threads: int, huge_pages: bool) -> str:
    return f"{threads} thread{'s' * (threads > 1)}" + ", huge pages" * huge_pages


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """A markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)


def facts_table(rows: list[Row]) -> str:
    facts = dict.fromkeys((row.impl, row.note) for row in rows if row.quantity == "fact")
    return table(["machine", ""], map(list, facts))


def target_table(targets: list[Target]) -> str:
    lines = (
        [
            target.what,
            target.against,
            target.setting,
            ("≥ " if target.at_least else "≤ ") + quantity(target.wanted, target.unit),
            measured_text(target),
            {True: "yes", False: "no", None: "not measured"}[target.met],
        ]
        for target in targets
    )
    return table(["what", "against", "setting", "target", "measured", "met"], lines)


def measured_text(target: Target) -> str:
    if target.measured is None or math.isinf(target.measured):
        return target.note or "–"
    return quantity(target.measured, target.unit) + (f" ({target.note})" if target.note else "")


def quantity(value: float, unit: str) -> str:
    if unit == "tokens":
        return f"{value:.0f} tokens"
    if unit == "extra":
        return f"{value:+.1%}"
    return f"{value:.2f} {unit}".strip()


def section_tables(rows: list[Row]) -> list[str]:
    """For every quantity, thread count and page setting a table: a line per case, a column per implementation."""
    found = []
    for kind in ("time", "memory"):
        mine = [row for row in rows if row.quantity == kind]
        for threads, huge_pages in sorted({(row.threads, row.huge_pages) for row in mine}):
            same = [row for row in mine if (row.threads, row.huge_pages) == (threads, huge_pages)]
            make_table = op_table if same[0].section in ("ops", "machine") else case_table
            found += [f"**{kind.capitalize()}, {name_of(threads, huge_pages)}**", make_table(same)]
    notes = sorted(
        {
            f"- {row.impl}, {row.length} tokens: {row.note}"
            for row in rows
            if row.status == "failed" or row.section == "generation"
        }
    )
    return found + (["\n".join(notes)] if notes else [])


def case_table(rows: list[Row]) -> str:
    impls = list(dict.fromkeys(row.impl for row in rows))
    cases: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row.setting, {})[row.impl] = row
    lines = []
    for setting, by_impl in sorted(cases.items(), key=lambda item: (not item[0][2], item[0])):
        _, _, causal, rounds, layers, work, length = setting
        first = [str(length), str(rounds), str(layers or "–"), "causal" if causal else "bidirectional", work]
        lines.append(first + [cell(by_impl[impl]) if impl in by_impl else "" for impl in impls])
    return table(["tokens", "rounds", "layers", "direction", "work", *impls], lines)


def cell(row: Row) -> str:
    """The value, its ratio to the first of its group, and a mark where it was called once; or why there is none."""
    if row.value is None:
        return f"skipped: {row.note}" if row.status == "skipped" else row.status
    shown = f"{row.value * 1e3:.4g} ms" if row.quantity == "time" else f"{row.value / 2**20:.4g} MiB"
    of_another = row.base.endswith(f" {row.length}") and row.base != f"{row.impl} {row.length}"
    ratio = f" ({row.ratio:.2f})" if row.ratio is not None and of_another and row.impl not in RATES else ""
    return shown + ratio + "*" * (row.status == "once")


def op_table(rows: list[Row]) -> str:
    """Ops with their rates, and the share of the floor that products and copies at the machine's rates would set."""
    lines = []
    for row in sorted(rows, key=lambda row: row.length):
        if row.seconds is None:
            lines.append([row.impl, str(row.length), row.work, cell(row), "", "", ""])
            continue
        rates = [f"{amount / row.seconds / 1e9:.1f}" if amount else "" for amount in (row.flops, row.bytes)]
        floor = floor_of(row, rows)
        shown = f"{floor / row.seconds:.2f}" if floor is not None else ""
        lines.append([row.impl, str(row.length), row.work, f"{row.seconds * 1e3:.4g} ms", *rates, shown])
    return table(["op", "tokens", "work", "time", "GFLOP/s", "GB/s", "share of floor"], lines)


def floor_of(row: Row, rows: list[Row]) -> float | None:
    """Seconds that the op's products and bytes would take at the rates measured beside it."""
    product, copy = (
        next((other for other in rows if (other.impl, other.length) == (impl, row.length)), None) for impl in RATES
    )
    if row.impl in RATES or not (product and copy and product.seconds and copy.seconds):
        return None
    return max((row.flops or 0) / product.flops * product.seconds, (row.bytes or 0) / copy.bytes * copy.seconds)
