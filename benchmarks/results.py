"""The results file: one row per implementation and case, and one per fact about the environment."""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .cases import Case


@dataclass(frozen=True, kw_only=True)
class Row(Case):
    """A row of the CSV; numbers that were not measured are None.

    Attributes:
        quantity: "time", "memory", "check" or "fact".
        status: "ok"; "once" (too slow to repeat); "skipped" or "failed", with the reason in the note.
        seconds, fastest, cpu_seconds: medians over `repeats` calls, and the fastest.
        ratio: this time or memory over that of `base`, the first implementation (and length) of the group; for a
            check, the largest difference over the allowed one.
        flops, bytes: the minimum work of a call; see `cases.Run`.
    """

    quantity: str
    impl: str
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
        """Return the seconds, or the peak bytes."""
        return self.seconds if self.quantity == "time" else self.peak_bytes

    @property
    def setting(self) -> tuple:
        """Return the case without the implementation."""
        return self.quantity, self.section, self.causal, self.rounds, self.layers, self.work, self.length

    @property
    def machine(self) -> tuple[str, str, int, bool]:
        """Return the setting that a table shares: device, dtype, threads (0 on a GPU), and whether pages are huge."""
        return self.device, self.dtype, self.threads, self.huge_pages

    @property
    def identity(self) -> tuple:
        """Return the key that a later row must share to replace this one."""
        return self.setting, self.impl, self.machine


def name_of(machine: tuple[str, str, int, bool]) -> str:
    """Describe a machine setting in words; see `Row.machine`."""
    device, dtype, threads, huge_pages = machine
    words = [f"{threads} thread{'s' * (threads > 1)}" if device == "cpu" else "GPU"]
    words += ["huge pages"] if huge_pages else []
    return ", ".join([*words, *([dtype] if (device, dtype) != ("cpu", "float32") else [])])


COLUMNS = [field.name for field in fields(Row)]
PARSERS = {
    str: str,
    int: int,
    bool: lambda text: text == "True",
    float | None: lambda text: float(text) if text else None,
}


def append(path: Path, rows: Iterable[Row]) -> None:
    """Append rows to the file immediately, so that a run that ends early keeps its results.

    Raises:
        ValueError: the file has other columns.
    """
    fresh = not path.exists()
    if not fresh:
        check(path)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for row in rows:
            writer.writerow({name: tidy(value) for name, value in asdict(row).items()})


def current_name(impl: str) -> str:
    """Return an implementation's current name, also for names in older results."""
    return impl.replace("ours", "hf-reformer").replace("built-in", "transformers")


def check(path: Path) -> None:
    """Raise ValueError unless the file consists of complete rows with these columns."""
    text = path.read_text()
    header = text.partition("\n")[0].replace("rival", "impl")  # the column's name in older files
    if header.split(",") != COLUMNS:
        raise ValueError(f"{path} has other columns than these results. Choose another --output_dir.")
    if not text.endswith("\n"):
        raise ValueError(f"{path} ends in the middle of a row. Remove its last line.")


def tidy(value: Any) -> Any:
    """Format floats with six digits, and None as an empty string."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return "" if value is None else value


def load(path: Path) -> list[Row]:
    """Load all rows; of several with the same identity, the last counts, preferring rows with a number."""
    found: dict[tuple, Row] = {}
    for row in read(path):
        if row.value is not None or found.get(row.identity, row).value is None:
            found[row.identity] = row
    return list(found.values())


def read(path: Path) -> Iterator[Row]:
    check(path)
    with path.open(newline="") as file:
        next(file)  # the header
        for line in csv.DictReader(file, COLUMNS):
            line |= {name: current_name(line[name]) for name in ("impl", "base")}
            yield Row(**{field.name: PARSERS[field.type](line[field.name]) for field in fields(Row)})  # type: ignore
