"""The package's performance targets, compared with measurements."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from .cases import BACKWARD, BOTH, FORWARD, STEP
from .models import LAYERS
from .results import Row

K = 1024
BREAK_EVEN = 384  # tokens


class Target(NamedTuple):
    """A row of the table: `measured` must be at least (or at most) `wanted`; None if it was not measured."""

    what: str
    against: str
    setting: str
    wanted: float
    at_least: bool
    measured: float | None
    unit: str = "×"
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted


class Measured:
    """Result rows, found by section, implementation and case."""

    def __init__(self, rows: list[Row]):
        self.rows = rows

    def all(self, section: str, impl: str, **wanted: Any) -> list[Row]:
        """Return the matching rows with a number; times unless `quantity` is given."""
        wanted = {"quantity": "time", "section": section, "impl": impl} | wanted
        found = [row for row in self.rows if all(getattr(row, name) == value for name, value in wanted.items())]
        return [row for row in found if row.value is not None]

    def one(self, section: str, impl: str, **wanted: Any) -> Row | None:
        return next(iter(self.all(section, impl, **wanted)), None)

    def quotient(self, section: str, above: str, below: str, **wanted: Any) -> float | None:
        """Return the time or memory of one implementation over another's on the same case."""
        return over(self.one(section, above, **wanted), self.one(section, below, **wanted))


def over(above: Row | None, below: Row | None) -> float | None:
    """Compute the quotient of two rows, from their paired ratios if they were in the same group."""
    if above is None or below is None or not above.value or not below.value:
        return None
    if above.base == below.base and above.ratio and below.ratio:
        return above.ratio / below.ratio
    return above.value / below.value


def find_targets(rows: list[Row], threads: int, huge_pages: bool) -> list[Target]:
    """Return all targets for one thread count of a CPU. Memory does not depend on it and is always included."""
    mine = [row for row in rows if row.device == "cpu" and row.huge_pages == huge_pages]
    measured = Measured([row for row in mine if row.threads == threads or row.quantity == "memory"])
    parts = (cores, modes, centering, shares, memory, break_even, steps, coverage, torch_backend, growth)
    return [target for part in parts for target in part(measured)]


def find_gpu_targets(rows: list[Row]) -> list[Target]:
    """Return the targets on a GPU: forward and backward of causal cores in bfloat16.

    Those against flash attention are what hash-sparse flash attention reached at half the length (Pagliardini et al.
    2023).
    """
    measured = Measured(rows)
    return [
        Target(
            f"core {BOTH}, windows",
            against,
            f"{length} tokens, bfloat16, causal",
            least,
            True,
            measured.quotient("core", against, "hf-reformer window", length=length, work=BOTH, dtype="bfloat16"),
        )
        for against, length, least in (("flash", 16 * K, 2.0), ("flash", 32 * K, 3.3), ("transformers", 16 * K, 10.0))
    ]


def cores(measured: Measured) -> Iterator[Target]:
    lengths = (K, 4 * K, 16 * K, 64 * K)
    for work, causal, wanted in (
        (FORWARD, True, dict(zip(lengths, (12, 12, 18, 18), strict=True))),
        (BOTH, True, dict(zip(lengths, (8, 10, 13, 13), strict=True))),
        (FORWARD, False, {4 * K: 7}),
        (BOTH, False, {4 * K: 8}),
    ):
        for length, least in wanted.items():
            case = {"length": length, "work": work, "rounds": 2, "causal": causal}
            setting = f"{length} tokens, {'causal' if causal else 'bidirectional'}"
            for impl in ("transformers", "reformer-pytorch"):
                ratio = measured.quotient("core", impl, "hf-reformer chunk", **case)
                yield Target(f"core {work}, chunks", impl, setting, least, True, ratio)


def modes(measured: Measured) -> Iterator[Target]:
    for work in (FORWARD, BOTH):
        for length in (K, 4 * K, 16 * K, 64 * K):
            case = {"length": length, "work": work, "rounds": 2, "causal": True}
            ratio = measured.quotient("core", "hf-reformer window", "hf-reformer chunk", **case)
            yield Target(f"core {work}, windows", "hf-reformer, chunks", f"{length} tokens, causal", 1.3, False, ratio)


def centering(measured: Measured) -> Iterator[Target]:
    for length in (4 * K, 16 * K):
        for causal in (True, False):
            for work in (FORWARD, BOTH):
                case = {"length": length, "work": work, "rounds": 2, "causal": causal}
                ratio = measured.quotient("centering", "hf-reformer window", "hf-reformer uncentered", **case)
                setting = f"{length} tokens, {'causal' if causal else 'bidirectional'}"
                yield Target(f"core {work}, centered hashing", "hashing as it is", setting, 1.05, False, ratio)


def shares(measured: Measured) -> Iterator[Target]:
    for length, least in ((4 * K, 0.85), (64 * K, 0.75)):
        product = measured.one("ops", "mm", length=length, rounds=2)
        for work in (FORWARD, BACKWARD):
            op = measured.one("ops", "chunk attention", length=length, work=work, rounds=2)
            setting = f"{length} tokens, chunks"
            yield Target(f"attention alone, {work}", "matrix products", setting, least, True, share(op, product))


def share(op: Row | None, product: Row | None) -> float | None:
    """Compute an op's rate as a fraction of that of large matrix products."""
    slowness = over(op, product)
    if not slowness or not op.flops or not product.flops:
        return None
    return op.flops / product.flops / slowness


def memory(measured: Measured) -> Iterator[Target]:
    for mode in ("chunk", "window"):
        row = measured.one(
            "core", f"hf-reformer {mode}", quantity="memory", length=16 * K, work=BOTH, rounds=2, causal=True
        )
        extra = row.peak_bytes / row.bytes - 1 if row and row.peak_bytes and row.bytes else None
        yield Target(f"memory of core {BOTH}, {mode}s", "out, dq and dv", "16384 tokens", 0.08, False, extra, "extra")


def break_even(measured: Measured) -> Iterator[Target]:
    for work in (FORWARD, BOTH):
        length, note = break_even_length(measured, work)
        setting = "1 hash round and the order of positions"
        yield Target(f"break-even, {work}", "sdpa", setting, BREAK_EVEN, False, length, "tokens", note)


def break_even_length(measured: Measured, work: str) -> tuple[float | None, str]:
    """Find the length beyond which exact attention stays slower: between the last one where it wins and the next."""
    hf_reformer = {row.length: row for row in measured.all("break-even", "hf-reformer default", work=work)}
    exact = {row.length: row for row in measured.all("break-even", "sdpa", work=work)}
    ratios = [
        (length, over(exact[length], hf_reformer[length])) for length in sorted(hf_reformer.keys() & exact.keys())
    ]
    known = [(length, ratio) for length, ratio in ratios if ratio]
    losing = [index for index, (_, ratio) in enumerate(known) if ratio < 1]
    if not known:
        return None, ""
    if not losing:
        return float(known[0][0]), "or shorter"
    if losing[-1] == len(known) - 1:
        last = known[-1][0]
        return (math.inf if last >= BREAK_EVEN else None), f"beyond {last} tokens"
    (short, below), (long, above) = known[losing[-1]], known[losing[-1] + 1]
    part = -math.log(below) / (math.log(above) - math.log(below))
    return short * (long / short) ** part, ""


def steps(measured: Measured) -> Iterator[Target]:
    case = {"length": 16 * K, "layers": LAYERS, "causal": True}
    faster = measured.quotient("step", "transformers", "hf-reformer", **case)
    smaller = measured.quotient("step", "hf-reformer", "transformers", quantity="memory", **case)
    yield Target(STEP, "transformers", "16384 tokens", 2, True, faster)
    yield Target(f"memory of a {STEP}", "transformers", "16384 tokens", 1 / 3, False, smaller)
    yield Target(STEP, "its floor", "16384 tokens", 1.25, False, over_floor(measured, case))
    for length, least in ((16 * K, 3.5), (64 * K, 10)):
        case = case | {"length": length}
        row = measured.one("step", "full", **case)
        note = ", ".join(filter(None, [row.note, "called once" * (row.status == "once")])) if row else ""
        ratio = measured.quotient("step", "full", "hf-reformer", **case)
        yield Target(STEP, "sdpa Transformer", f"{length} tokens", least, True, ratio, note=note)


def coverage(measured: Measured) -> Iterator[Target]:
    for length in (4 * K, 16 * K):
        ratio = measured.quotient("coverage", "hf-reformer coverage", "hf-reformer", length=length)
        yield Target(f"{STEP}, coverage loss", "hf-reformer without it", f"{length} tokens", 1.15, False, ratio)


def over_floor(measured: Measured, case: dict[str, Any]) -> float | None:
    """Compute the time of a step over that of its dense products at the measured rate plus its attention."""
    step, product, attention = (measured.one("step", impl, **case) for impl in ("hf-reformer", "mm", "attention part"))
    products, attended = over(product, step), over(attention, step)
    if not products or not attended or not product.flops or not step.flops:
        return None
    return 1 / (step.flops / product.flops * products + step.layers / 2 * attended)


def torch_backend(measured: Measured) -> Iterator[Target]:
    for mode, least in (("chunk", 2.5), ("window", 2.0)):
        for work in (FORWARD, BOTH):
            for length in (4 * K, 16 * K):
                case = {"length": length, "work": work, "rounds": 2, "causal": True}
                ratio = measured.quotient("core", "transformers", f"hf-reformer {mode} torch", **case)
                what = f"core {work}, {mode}s, torch backend"
                yield Target(what, "transformers", f"{length} tokens, causal", least, True, ratio)


def growth(measured: Measured) -> Iterator[Target]:
    for section, impls, works in (
        ("growth", ("hf-reformer chunk", "hf-reformer window"), (FORWARD, BOTH)),
        ("step-growth", ("hf-reformer",), (STEP,)),
    ):
        for impl in impls:
            for work in works:
                yield growth_of(measured, section, impl, work)


def growth_of(measured: Measured, section: str, impl: str, work: str) -> Target:
    """Compute the time per token of the longest sequence over that of the shortest."""
    rows = sorted(measured.all(section, impl, work=work), key=lambda row: row.length)
    setting, ratio = f"{128 * K} to {16 * K} tokens", None
    if len(rows) > 1:
        short, long = rows[0], rows[-1]
        setting, quotient = f"{long.length} to {short.length} tokens", over(long, short)
        ratio = quotient * short.length / long.length if quotient else None
    what = work if section == "step-growth" else f"core {work}, {impl.split()[-1]}s"
    return Target(f"time per token, {what}", "shorter sequences", setting, 1.25, False, ratio)
