"""A report of tables and plots, made from the results only."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from .environment import RATES
from .plots import draw_all
from .results import Row, load, name_of
from .targets import Target, find_targets

TITLES = {
    "machine": "Rates of the machine",
    "core": "Cores: hash, sort and attention",
    "centering": "Centered hashing",
    "ops": "Single ops and their floors",
    "break-even": "Break-even with exact attention",
    "step": "Training steps",
    "autocast": "Training steps in half precision",
    "growth": "Growth of the core",
    "depth": "Depth",
    "classifier": "Classifiers that people choose",
    "causal": "Causal models that people choose",
    "coverage": "The coverage loss",
    "generation": "A decode step, of sixteen in a row",
    "prefill": "A prompt, with a cache, at once and in chunks",
    "step-growth": "Growth of a training step",
}
WHOLE_MODELS = ("core", "step", "classifier", "causal", "generation")  # sections that list where others are faster
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
hf_reformer's does at every length. `bf16`: forward and loss under autocast.
- A step's floor is its dense products (forward, recomputation, backward) at the rate of `mm`, plus its attention \
measured alone. An op's floor is its products at the rate of `mm` or its reading and writing at that of `copy`, \
whichever takes longer.
- The next token: the baselines use their caches. transformers' Reformer keeps states, projects what it needs again, \
and computes the positions of the whole context.
- Longformer, BigBird, ModernBERT, Mamba, Llama and Mistral are made from transformers' configs with the same width, \
depth, heads and vocabulary, without dropout; gated feed-forwards have as many weights. From 65536 tokens on they \
recompute their layers. In a layer a token sees about 256: hf_reformer's local layers show 128, its lsh layers 384 \
(in training 512); Longformer 257 and the first token; BigBird 8 blocks of 32 (in inference transformers points the \
random three at the first one); ModernBERT 257 in two layers of three and everything in the third, by SDPA; Mistral \
the last 256, by SDPA under a mask of all pairs, or by flex attention in blocks, which on CPUs has no backward. Llama \
shows everything before a token, by SDPA. Mamba runs in transformers' own PyTorch code, a loop over tokens whose \
backward takes time with the square of the length; its own kernels need a GPU and a compiler. A classifier's \
inference gives the classes of a text; a causal model's the logits after the last token, without a cache."""


class Page(NamedTuple):
    """Contents of a report other than its tables.

    Attributes:
        targets: returns a heading and a list of targets for each table of targets.
    """

    title: str
    notes: str
    targets: Callable[[list[Row]], Iterable[tuple[str, list[Target]]]]


def cpu_targets(rows: list[Row]) -> Iterable[tuple[str, list[Target]]]:
    """Yield the targets for every thread count and page setting."""
    timed = sorted({row.machine for row in rows if row.quantity == "time"})
    for machine in timed or sorted({row.machine for row in rows if row.threads}):
        yield f"Targets, {name_of(machine)}", find_targets(rows, *machine[2:])


CPU_PAGE = Page("Benchmarks", NOTES, cpu_targets)


def write_report(results: Path, folder: Path, page: Page = CPU_PAGE) -> list[Path]:
    """Write report.md and the plots to `folder`, and return their paths."""
    rows = load(results)
    plots = draw_all(rows, folder)
    parts = [f"# {page.title}", facts_table(rows), page.notes]
    for heading, targets in page.targets(rows):
        parts += [f"## {heading}", target_table(targets)]
    checks = [row for row in rows if row.quantity == "check"]
    if checks:
        parts += ["## Correctness", *check_table(checks)]
    for section, title in TITLES.items():
        mine = [row for row in rows if row.section == section and row.quantity in ("time", "memory")]
        if mine:
            parts += [f"## {title}", *section_tables(mine)]
    if plots:
        parts += ["## Plots", *(f"![{path.stem.replace('_', ' ')}]({path.name})" for path in plots)]
    report = folder / "report.md"
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return [report, *plots]


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """Format a Markdown table."""
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


def check_table(rows: list[Row]) -> list[str]:
    """Summarize how many calls agree with the definition, with a table row for each."""
    done = [row for row in rows if row.status != "skipped"]
    agree = sum(row.status == "ok" for row in done)
    lines = []
    for row in rows:
        direction = "causal" if row.causal else "bidirectional"
        ratio = "" if row.ratio is None else f"{row.ratio:.2g}"
        lines.append([row.work, direction, row.dtype, row.impl, ratio, row.status, row.note])
    head = ["call", "direction", "dtype", "backend", "largest difference / allowed", "status", ""]
    said = f"{agree} of {len(done)} calls agree with `reference`, values and every gradient"
    left = f"; {len(rows) - len(done)} were not tried" if len(done) < len(rows) else ""
    return [f"**{said}{left}.**", table(head, lines)]


def section_tables(rows: list[Row]) -> list[str]:
    """Make a table for every quantity and machine setting: a row per case, a column per implementation."""
    found = []
    for kind in ("time", "memory"):
        mine = [row for row in rows if row.quantity == kind]
        for machine in sorted({row.machine for row in mine}):
            same = [row for row in mine if row.machine == machine]
            make_table = op_table if same[0].section in ("ops", "machine") else case_table
            found += [f"**{kind.capitalize()}, {name_of(machine)}**", make_table(same)]
            found += where_others_lead(same) if rows[0].section in WHOLE_MODELS else []
    notes = sorted(
        {
            f"- {row.impl}, {row.length} tokens: {row.note}"
            for row in rows
            if row.status == "failed" or row.section == "generation"
        }
    )
    return found + (["\n".join(notes)] if notes else [])


def where_others_lead(rows: list[Row]) -> list[str]:
    """Make a sentence on where hf_reformer, the first of its group, is slower or larger than others."""
    better = {"time": "faster", "memory": "smaller"}[rows[0].quantity]
    behind = [row for row in rows if row.ratio is not None and row.ratio < 1 and is_rival(row)]
    if not behind:
        return []
    said = [f"{row.impl} at {row.length} tokens, {row.work} ({row.ratio:.2f})" for row in behind]
    return [f"Here others are {better} than hf-reformer: {'; '.join(said)}."]


def is_rival(row: Row) -> bool:
    """Return whether a row's ratio compares another package with hf_reformer."""
    others = row.impl.startswith("hf-reformer") or row.impl in ("attention part", *RATES)
    return row.base.startswith("hf-reformer ") and not others


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
    """Format a value, its ratio to the first of its group and a mark if called once; or why there is none."""
    if row.value is None:
        return f"skipped: {row.note}" if row.status == "skipped" else row.status
    shown = f"{row.value * 1e3:.4g} ms" if row.quantity == "time" else f"{row.value / 2**20:.4g} MiB"
    of_another = row.base.endswith(f" {row.length}") and row.base != f"{row.impl} {row.length}"
    ratio = f" ({row.ratio:.2f})" if row.ratio is not None and of_another and row.impl not in RATES else ""
    return shown + ratio + "*" * (row.status == "once")


def op_table(rows: list[Row]) -> str:
    """Make a table of ops with their rates, and the share of the floor set by the machine's product and copy rates."""
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
    """Compute the seconds that an op's products and bytes would take at the rates measured with it."""
    product, copy = (
        next((other for other in rows if (other.impl, other.length) == (impl, row.length)), None) for impl in RATES
    )
    if row.impl in RATES or not (product and copy and product.seconds and copy.seconds):
        return None
    return max((row.flops or 0) / product.flops * product.seconds, (row.bytes or 0) / copy.bytes * copy.seconds)
