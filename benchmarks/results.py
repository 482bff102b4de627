"""The results file: one row for every rival on every case, and for every fact about the machine."""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """A line of the CSV; numbers that were not measured are None.

    Attributes:
        quantity: "time", "memory" or "fact".
        status: "ok"; "once" (too slow to repeat); "skipped" or "failed", and the note says why.
        seconds, fastest, cpu_seconds: medians over `repeats` calls, and the fastest.
        ratio: this time or memory over that of `base`, the rival (and length) at the head of the group.
        flops, bytes: the least a call must do; see `cases.Run`.
    """

    quantity: str
    section: str
    rival: str
    length: int = 0
    work: str = ""
    rounds: int = 0
    causal: bool = True
    layers: int = 0
    threads: int = 0
    huge_pages: bool = False
    status: str = "ok"
    seconds: float | None = None
    fastest: float | None = None
    cpu_seconds: float | None = None
    repeats: int = 0
    base: str = ""
    ratio: float | None = None
    peak_bytes: float | None = None
    flops: float | None = None
    bytes: float | None = None
    note: str = ""

    @property
    def value(self) -> float | None:
        """Seconds, or bytes at the peak."""
        return self.seconds if self.quantity == "time" else self.peak_bytes

    @property
    def identity(self) -> tuple:
        """What a later row must share to replace this one."""
        return self.setting, self.rival, self.threads, self.huge_pages

    @property
    def setting(self) -> tuple:
        """The case, without the rival."""
        return self.quantity, self.section, self.causal, self.rounds, self.layers, self.work, self.length


COLUMNS = [field.name for field in fields(Row)]
PARSERS = {
    str: str,
    int: int,
    bool: lambda text: text == "True",
    float | None: lambda text: float(text) if text else None,
}


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to the file, at once, so that a run that ends early leaves what it has."""
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow({name: tidy(value) for name, value in asdict(row).items()})


def tidy(value: Any) -> Any:
    """Floats with six digits, None as nothing."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value


def load(paths: Iterable[Path]) -> list[Row]:
    """All rows of the files; of rows on the same thing the last one counts."""
    found: dict[tuple, Row] = {}
    for path in paths:
        for row in read(path):
            found.pop(row.identity, None)
            found[row.identity] = row
    return list(found.values())


def read(path: Path) -> Iterator[Row]:
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            yield Row(**{field.name: PARSERS[field.type](line[field.name]) for field in fields(Row)})  # type: ignore
