"""Lines over length and depth, from rows alone."""

from collections.abc import Callable
from pathlib import Path

from .cases import BOTH, FORWARD
from .results import Row
from .training import STEP

COLOURS = {
    "ours": "#1f6f8b",
    "ours window": "#1f6f8b",
    "ours chunk": "#5fb0c9",
    "ours plain": "#5fb0c9",
    "ours torch": "#9aa5b1",
    "ours window torch": "#9aa5b1",
    "ours chunk torch": "#c3cad2",
    "built-in": "#d1495b",
    "reformer-pytorch": "#edae49",
    "sdpa": "#4b3f72",
    "full": "#4b3f72",
    "local": "#8d8d8d",
}
UNITS: dict[str, tuple[str, Callable[[Row], float]]] = {
    "time": ("seconds", lambda row: row.seconds or 0.0),
    "memory": ("MiB beyond what was there", lambda row: (row.peak_bytes or 0.0) / 2**20),
}
# section, quantity, works (a panel each), axis
PICTURES = [
    ("core", "time", (FORWARD, BOTH), "length"),
    ("core", "memory", (FORWARD, BOTH), "length"),
    ("step", "time", (STEP,), "length"),
    ("step", "memory", (STEP,), "length"),
    ("depth", "time", (STEP,), "layers"),
    ("depth", "memory", (STEP,), "layers"),
]


def draw_all(rows: list[Row], folder: Path) -> list[Path]:
    """Every picture for which there are rows."""
    made = []
    for section, quantity, works, axis in PICTURES:
        mine = [row for row in rows if (row.section, row.quantity) == (section, quantity) and row.value and row.causal]
        mine = [row for row in mine if row.rival in COLOURS]
        for threads, huge_pages in sorted({(row.threads, row.huge_pages) for row in mine}):
            same = [row for row in mine if (row.threads, row.huge_pages) == (threads, huge_pages)]
            rounds = {row.rounds for row in same}
            same = [row for row in same if row.rounds == (2 if 2 in rounds else min(rounds))]
            end = f"_{threads}_threads" * (quantity == "time") + "_huge_pages" * huge_pages
            path = folder / f"{section}_{quantity}_over_{axis}{end}.png"
            draw(same, quantity, works, axis, f"{section}, {threads} thread{'s' * (threads > 1)}", path)
            made.append(path)
    return made


def draw(rows: list[Row], quantity: str, works: tuple[str, ...], axis: str, title: str, path: Path) -> None:
    """One picture, a panel for every kind of work that was measured."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    works = tuple(work for work in works if any(row.work == work for row in rows))
    figure = Figure(figsize=(5.5 * len(works), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(works), squeeze=False)[0]
    for panel, work in zip(panels, works, strict=True):
        panel_rows = [row for row in rows if row.work == work]
        draw_panel(panel, panel_rows, quantity, axis)
        panel.set_title(f"{title}: {work}" if work != title else title)
    figure.savefig(path, dpi=150)


def draw_panel(panel, rows: list[Row], quantity: str, axis: str) -> None:
    """Both axes by powers of two over length; plain axes over depth."""
    unit, value = UNITS[quantity]
    for rival in [name for name in COLOURS if any(row.rival == name for row in rows)]:
        points = sorted((getattr(row, axis), value(row)) for row in rows if row.rival == rival)
        ours = rival.startswith("ours")
        panel.plot(*zip(*points, strict=True), marker="o", color=COLOURS[rival], linewidth=2.2 if ours else 1.4)
        panel.lines[-1].set_label(rival)
    ticks = sorted({getattr(row, axis) for row in rows})
    if axis == "length":
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
    else:
        panel.set_ylim(bottom=0)
    panel.set_xticks(ticks, [str(tick) for tick in ticks])
    panel.set_xlabel("tokens" if axis == "length" else "layers")
    panel.set_ylabel(unit)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize="small")
