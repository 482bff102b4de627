"""Line plots over length and depth, from result rows only; log-log axes, every line labeled at its end."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from .cases import BOTH, FORWARD, INFERENCE, NEXT, STEP
from .results import Row, name_of


class Style(NamedTuple):
    label: str
    color: str
    line: str = "-"


STYLES = {
    "hf-reformer window": Style("hf-reformer, windows", "#0b5d7a"),
    "hf-reformer chunk": Style("hf-reformer, chunks", "#3fa0c0"),
    "hf-reformer": Style("hf-reformer", "#0b5d7a"),
    "hf-reformer recorded": Style("hf-reformer, CUDA graph", "#3fa0c0"),
    "hf-reformer plain": Style("hf-reformer, not reversible", "#3fa0c0"),
    "hf-reformer window torch": Style("windows, PyTorch alone", "#0b5d7a", ":"),
    "hf-reformer chunk torch": Style("chunks, PyTorch alone", "#3fa0c0", ":"),
    "hf-reformer torch": Style("hf-reformer, PyTorch alone", "#0b5d7a", ":"),
    "transformers": Style("transformers' Reformer", "#d1495b"),
    "reformer-pytorch": Style("reformer-pytorch", "#d98a1f"),
    "hf-reformer window triton": Style("windows, Triton", "#3fa0c0", ":"),
    "sdpa": Style("exact attention", "#5b4a8a"),
    "flash": Style("flash attention", "#8c6bb1"),
    "flex": Style("flex attention, windows", "#4d9221"),
    "longformer": Style("Longformer", "#d1495b"),
    "bigbird": Style("BigBird", "#d98a1f"),
    "modernbert": Style("ModernBERT", "#5b4a8a"),
    "mamba": Style("Mamba in PyTorch", "#8d8d8d"),
    "llama": Style("Llama, exact", "#5b4a8a"),
    "mistral": Style("Mistral, windows by SDPA", "#d98a1f"),
    "mistral flex": Style("Mistral, windows by flex", "#4d9221"),
    "full": Style("Transformer, exact", "#5b4a8a"),
    "local": Style("local chunks (bound)", "#8d8d8d", "--"),
}


@dataclass(frozen=True)
class Plot:
    """A file of panels, each showing one quantity for one kind of work."""

    name: str
    section: str
    axis: str  # "length" or "layers"
    panels: tuple[tuple[str, str], ...]


PLOTS = [
    Plot("core_time", "core", "length", (("time", FORWARD), ("time", BOTH))),
    Plot("core_memory", "core", "length", (("memory", FORWARD), ("memory", BOTH))),
    Plot("step_over_length", "step", "length", (("time", STEP), ("memory", STEP))),
    Plot("classifier_time", "classifier", "length", (("time", STEP), ("time", INFERENCE))),
    Plot("classifier_memory", "classifier", "length", (("memory", STEP), ("memory", INFERENCE))),
    Plot("causal_time", "causal", "length", (("time", STEP), ("time", INFERENCE))),
    Plot("causal_memory", "causal", "length", (("memory", STEP), ("memory", INFERENCE))),
    Plot("next_token", "generation", "length", (("time", NEXT),)),
    Plot("step_over_depth", "depth", "layers", (("time", STEP), ("memory", STEP))),
]
UNITS: dict[str, Callable[[Row], float]] = {"time": lambda row: row.seconds, "memory": lambda row: row.peak_bytes}
LABEL_GAP = 0.058  # between labels, as a fraction of the panel's height


def draw_all(rows: list[Row], folder: Path) -> list[Path]:
    """Draw every plot for which there are enough rows for a line, and return the files."""
    machines = sorted({row.machine for row in rows if row.quantity == "time"})
    made = []
    for plot in PLOTS:
        for machine in machines:
            device, dtype, threads, huge_pages = machine
            panels = [panel_rows(rows, plot, panel, machine) for panel in plot.panels]
            if any(row.quantity == plot.panels[0][0] for panel in panels for row in panel):
                end = f"_{threads}_threads" * (plot.panels[0][0] == "time" and device == "cpu")
                end += "_huge_pages" * huge_pages + f"_{dtype}" * ((device, dtype) != ("cpu", "float32"))
                path = folder / f"{plot.name}{end}.png"
                draw(plot, [panel for panel in panels if panel], path)
                made.append(path)
    return list(dict.fromkeys(made))


def panel_rows(rows: list[Row], plot: Plot, panel: tuple[str, str], machine: tuple) -> list[Row]:
    """Select one panel's rows: causal (except classifiers), two rounds if available, one length if depth is the axis.

    Empty if they have only one point. Memory does not depend on the number of threads.
    """
    quantity, work = panel
    found = [row for row in rows if (row.section, row.quantity, row.work) == (plot.section, quantity, work)]
    found = [row for row in found if row.value and row.impl in STYLES]
    if quantity == "memory":
        found = [replace(row, threads=machine[2]) for row in found]
    found = [row for row in found if row.machine == machine]
    found = [row for row in found if row.causal or plot.section == "classifier"]
    rounds = {row.rounds for row in found}
    found = [row for row in found if row.rounds == (2 if 2 in rounds else min(rounds))]
    if plot.axis == "layers":
        found = [row for row in found if row.length == max(other.length for other in found)]
    return found if len({getattr(row, plot.axis) for row in found}) > 1 else []


def draw(plot: Plot, panels: list[list[Row]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 * len(panels), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, rows in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw_panel(panel, rows, plot.axis)
        row = rows[0]
        words = [row.work, f"{row.layers} layers" if plot.axis == "length" and row.layers else ""]
        words += [f"{row.rounds} rounds" if not row.layers else "", "causal" if row.causal else "bidirectional"]
        words += [f"{row.length} tokens" if plot.axis == "layers" else ""]
        words += [name_of(row.machine)] if row.quantity == "time" or row.device != "cpu" else []
        title = "Time" if row.quantity == "time" else "Peak memory beyond inputs and weights"
        panel.set_title(f"{title}\n{', '.join(filter(None, words))}", fontsize=10, loc="left")
    figure.savefig(path, dpi=150)


def draw_panel(panel, rows: list[Row], axis: str) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    value, quantity = UNITS[rows[0].quantity], rows[0].quantity
    ticks = sorted({getattr(row, axis) for row in rows})
    ends = {}
    for impl in (name for name in STYLES if any(row.impl == name for row in rows)):
        points = sorted((getattr(row, axis), value(row)) for row in rows if row.impl == impl)
        style, bold = STYLES[impl], impl.startswith("hf-reformer") and not impl.endswith("torch")
        width = 2.4 if bold else 1.5
        panel.plot(
            *zip(*points, strict=True), style.line, color=style.color, linewidth=width, marker="o", markersize=4
        )
        ends[impl] = points[-1]
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(ticks, [thousands(tick) for tick in ticks])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("tokens" if axis == "length" else "layers")
    span = max(map(value, rows)) / min(map(value, rows))
    base, subs = (
        (2, (1,) if span > 16 else (1, 1.5)) if quantity == "memory" else (10, (1,) if span > 500 else (1, 2, 5))
    )
    panel.yaxis.set_major_locator(LogLocator(base, subs, numticks=12))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: seconds(y) if quantity == "time" else size(y)))
    panel.grid(alpha=0.25)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    name_lines(panel, ends)


def name_lines(panel, ends: dict[str, tuple[float, float]]) -> None:
    """Label curves in the right margin, without overlap, with a thin line to the end of each curve."""
    to_panel = panel.transData + panel.transAxes.inverted()
    positions = {impl: to_panel.transform(end) for impl, end in ends.items()}
    ordered = sorted(ends, key=lambda impl: positions[impl][1])
    for impl, height in zip(ordered, spread([positions[impl][1] for impl in ordered], LABEL_GAP), strict=True):
        style = STYLES[impl]
        panel.annotate(
            style.label,
            xy=positions[impl],
            xytext=(1.04, height),
            xycoords="axes fraction",
            textcoords="axes fraction",
            color=style.color,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": style.color, "linewidth": 0.6, "alpha": 0.6, "relpos": (0, 0.5)},
        )


def spread(heights: list[float], gap: float) -> list[float]:
    """Spread ascending heights by a few rounds of pushing neighbors apart, moving them as little as needed."""
    moved = list(heights)
    for _ in range(200):
        for i in range(len(moved) - 1):
            short = gap - (moved[i + 1] - moved[i])
            if short > 1e-6:
                moved[i] -= short / 2
                moved[i + 1] += short / 2
    return moved


def thousands(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)


def seconds(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{value * 1e3:g} ms"


def size(value: float) -> str:
    return f"{value / 2**30:g} GiB" if value >= 2**30 else f"{value / 2**20:g} MiB"
