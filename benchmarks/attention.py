"""Sections on attention: whole cores against their rivals, single ops against the machine, break-even, growth."""

from collections.abc import Callable, Sequence

from hf_reformer.attention import old_num_buckets
from hf_reformer.attention_ops import ordered_attention
from hf_reformer.configuration_reformer import default_num_buckets
from hf_reformer.hashing import Orders, factors_of

from . import machine
from .cases import (
    BACKWARD,
    BATCH,
    BOTH,
    CHUNK,
    FORWARD,
    HEADS,
    SIZE,
    WINDOW,
    Case,
    Entry,
    Group,
    Run,
    Settings,
    inputs,
    make_core,
    our_orders,
    run_function,
)

OURS = ["ours chunk", "ours window"]
REFORMERS = [*OURS, "built-in", "reformer-pytorch"]
BOUNDS = ["sdpa", "local"]  # neither depends on the number of rounds
TORCH_BACKEND = ["ours chunk torch", "ours window torch"]
SHORTEST_FOR_ALL = 4096  # up to this length the bounds are measured for every number of rounds
LONGEST_BOUND_MEMORY = 16384
FLOAT = 4  # bytes
PRODUCTS_PER_PAIR = {FORWARD: 4, BACKWARD: 10}  # times head size: floating-point operations per visible pair


def main_rounds(settings: Settings) -> int:
    """The number of rounds at which everything is measured."""
    return 2 if 2 in settings.rounds else settings.rounds[0]


def entries(case: Case, rivals: Sequence[str]) -> list[Entry]:
    return [Entry(case, rival) for rival in rivals]


def core_groups(settings: Settings) -> list[Group]:
    """Whole cores, time and memory. Causal throughout, and bidirectional at one length."""
    main = main_rounds(settings)
    lengths = settings.choose((512, 1024, 4096, 16384, 65536, 131072), (1024, 4096, 16384))
    found = []
    for length in lengths:
        for rounds in settings.rounds:
            rivals = REFORMERS + (TORCH_BACKEND if rounds == main else [])
            rivals = rivals + (BOUNDS if rounds == main or length <= SHORTEST_FOR_ALL else [])
            for work in (FORWARD, BOTH):
                found.append(Group("time", entries(Case("core", length, work, rounds), rivals)))
    middle = min(lengths, key=lambda length: abs(length - 4096))
    for work in (FORWARD, BOTH):
        case = Case("core", middle, work, main, causal=False)
        found.append(Group("time", entries(case, [*REFORMERS, *BOUNDS])))
    for length in settings.choose((1024, 4096, 16384, 65536), (4096, 16384)):
        rivals = REFORMERS + (BOUNDS if length <= LONGEST_BOUND_MEMORY else [])
        for work in (BOTH,) if settings.short else (FORWARD, BOTH):
            found.append(Group("memory", entries(Case("core", length, work, main), rivals)))
    return found


def op_groups(settings: Settings) -> list[Group]:
    """Single ops in turn with the machine's own rates, which change with its load."""
    found = []
    for length in settings.choose((4096, 16384, 65536), (4096,)):
        forward, backward = (Case("ops", length, work, main_rounds(settings)) for work in (FORWARD, BACKWARD))
        group = entries(Case("ops", length), ["mm", "copy"])
        for mode in ("chunk", "window"):
            group += entries(forward, [f"{mode} orders", f"{mode} attention"])
            group += entries(backward, [f"{mode} attention"])
        found.append(Group("time", group))
    return found


def break_even_groups(settings: Settings) -> list[Group]:
    """One hash order and the position order, windows of 128 as in the default config, against exact attention."""
    lengths = settings.choose((64, 128, 192, 256, 320, 384, 512, 768, 1024), (128, 256, 384, 512))
    cases = [Case("break-even", length, work, rounds=1) for work in (FORWARD, BOTH) for length in lengths]
    return [Group("time", entries(case, ["ours default", "sdpa"])) for case in cases]


def growth_groups(settings: Settings) -> list[Group]:
    """A long line beside a shorter one, in turn."""
    lengths = settings.choose((16384, 131072), (16384, 65536))
    ends = sorted({lengths[0], lengths[-1]})
    return [
        Group("time", [Entry(Case("growth", length, work, main_rounds(settings)), rival) for length in ends])
        for work in (FORWARD, BOTH)
        for rival in OURS
    ]


def make(case: Case, rival: str) -> Run:
    """Anything of the sections above, ready to be called."""
    if case.section == "ops":
        return make_op(case, rival)
    result = BATCH * HEADS * case.length * SIZE * FLOAT  # out, or a gradient
    call = run_function(make_core(case, rival), case.length, case.work)
    return Run(call, bytes=result if case.work == FORWARD else 3 * result)


def make_op(case: Case, rival: str) -> Run:
    """One op, with what it cannot do without: products for visible pairs, inputs read and outputs written once."""
    if rival in ("mm", "copy"):
        return machine.make(case, rival)
    mode, op = rival.split()
    q = inputs(case.length, 1)[0]
    if op == "orders":
        return make_orders(case, mode)
    orders = our_orders(mode, q, case.rounds, case.causal)
    pairs = visible_pairs(orders)

    def attend(q, v):
        return ordered_attention(q, None, v, orders, causal=case.causal)

    tensors = 3 if case.work == FORWARD else 6  # q, v, out; the gradients of all three
    return Run(
        run_function(attend, case.length, case.work),
        flops=PRODUCTS_PER_PAIR[case.work] * SIZE * pairs,
        bytes=tensors * q.numel() * FLOAT,
        note=f"{pairs} visible pairs",
    )


def make_orders(case: Case, mode: str) -> Run:
    """Hash and sort: rotations are products, the rest is reading q and writing three numbers for every place."""
    q = inputs(case.length, 1)[0]
    rule = (
        old_num_buckets(case.length, CHUNK, case.length)
        if mode == "chunk"
        else default_num_buckets(case.length, WINDOW)
    )
    columns = sum(factors_of(rule)) // 2 * case.rounds
    rows = q.numel() // SIZE  # B·H·T

    def call() -> Orders:
        return our_orders(mode, q, case.rounds, case.causal)

    return Run(call, flops=2.0 * rows * SIZE * columns, bytes=(rows * SIZE + 3 * rows * case.rounds) * FLOAT)


def visible_pairs(orders: Orders) -> int:
    """Pairs that the windows or chunks of all places show, over all heads."""
    shown = int((orders.hi.long() - orders.lo.long() + 1).clamp(min=0).sum())
    return shown * (HEADS // orders.lo.shape[1])


SECTIONS: dict[str, Callable[[Settings], list[Group]]] = {
    "core": core_groups,
    "ops": op_groups,
    "break-even": break_even_groups,
    "growth": growth_groups,
}
