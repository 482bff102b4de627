"""Sections on attention: whole cores vs. baselines, single ops vs. the machine's rates, break-even, growth."""

from collections.abc import Sequence

from hf_reformer.ops.dispatch import windowed_attention
from hf_reformer.ops.layout import AttentionLayout
from hf_reformer.ops.lsh import bucket_factors

from . import environment
from .attention_impls import BATCH, HEADS, SIZE, inputs, make_core, make_layout, num_buckets_for, run_function
from .cases import BACKWARD, BOTH, FORWARD, Case, Entry, Group, Run, Settings

HF_REFORMER = ["hf-reformer chunk", "hf-reformer window"]
REFORMERS = [*HF_REFORMER, "transformers", "reformer-pytorch"]
BOUNDS = ["local", "sdpa"]  # independent of the number of rounds
TORCH_BACKEND = ["hf-reformer chunk torch", "hf-reformer window torch"]
MIDDLE = 4096  # at this length everything is measured: both directions, and the bounds with every number of rounds
LONGEST_SDPA, LONGEST_OTHER_ROUNDS = 65536, 16384
FLOAT = 4  # bytes
FLOPS_PER_PAIR = {FORWARD: 4 * SIZE, BACKWARD: 10 * SIZE}  # operations in matrix products per visible pair


def entries(case: Case, impls: Sequence[str]) -> list[Entry]:
    return [Entry(case, impl) for impl in impls]


def bounds(length: int) -> list[str]:
    return BOUNDS if length <= LONGEST_SDPA else BOUNDS[:1]


def core_groups(settings: Settings) -> list[Group]:
    """Return groups for time and memory of whole cores: causal at all lengths, bidirectional at one."""
    main = settings.main_rounds
    lengths = settings.choose((512, 1024, 4096, 16384, 65536, 131072), (1024, 4096, 16384))
    found = []
    for length in lengths:
        for rounds in settings.rounds:
            if rounds != main and length > LONGEST_OTHER_ROUNDS and not settings.lengths:
                continue
            impls = REFORMERS + (TORCH_BACKEND if rounds == main else [])
            impls = impls + (bounds(length) if rounds == main or length <= MIDDLE else [])
            for work in (FORWARD, BOTH):
                case = Case(section="core", length=length, work=work, rounds=rounds)
                found.append(Group("time", entries(case, impls)))
    for work in (FORWARD, BOTH) if MIDDLE in lengths else ():
        case = Case(section="core", length=MIDDLE, work=work, rounds=main, causal=False)
        found.append(Group("time", entries(case, [*REFORMERS, *BOUNDS])))
    for length in settings.choose((1024, 4096, 16384, 65536), (16384,)):
        impls = REFORMERS + bounds(length)
        for work in (BOTH,) if settings.short else (FORWARD, BOTH):
            case = Case(section="core", length=length, work=work, rounds=main)
            found.append(Group("memory", entries(case, impls)))
    return found


def centering_groups(settings: Settings) -> list[Group]:
    """Return groups for the cost of subtracting the mean from vectors before hashing."""
    cases = [
        Case(section="centering", length=length, work=work, rounds=settings.main_rounds, causal=causal)
        for length in settings.choose((4096, 16384), (4096,))
        for causal in (True, False)
        for work in (FORWARD, BOTH)
    ]
    return [Group("time", entries(case, ["hf-reformer uncentered", "hf-reformer window"])) for case in cases]


def op_groups(settings: Settings) -> list[Group]:
    """Return groups of single ops, alternating with the machine's own rates, which change with its load."""
    found = []
    for length in settings.choose((4096, 16384, 65536), (4096,)):
        forward, backward = (
            Case(section="ops", length=length, work=work, rounds=settings.main_rounds) for work in (FORWARD, BACKWARD)
        )
        group = entries(forward, ["mm", "copy"])
        for mode in ("chunk", "window"):
            group += entries(forward, [f"{mode} layout", f"{mode} attention"])
            group += entries(backward, [f"{mode} attention"])
        found.append(Group("time", group))
    return found


def break_even_groups(settings: Settings) -> list[Group]:
    """Return groups of one hash round plus the position order, windows of 128 as by default, and exact attention."""
    lengths = settings.choose((128, 192, 256, 320, 384, 512, 768, 1024), (128, 256, 384, 512))
    cases = [
        Case(section="break-even", length=length, work=work, rounds=1)
        for work in (FORWARD, BOTH)
        for length in lengths
    ]
    return [Group("time", entries(case, ["hf-reformer default", "sdpa"])) for case in cases]


def growth_groups(settings: Settings) -> list[Group]:
    """Return groups of a long and a shorter sequence, in alternation."""
    found = []
    for work in (FORWARD, BOTH):
        cases = [
            Case(section="growth", length=length, work=work, rounds=settings.main_rounds)
            for length in settings.ends((16384, 131072), (16384, 65536))
        ]
        found += [Group("time", [Entry(case, impl) for case in cases]) for impl in HF_REFORMER]
    return found


def make_core_run(case: Case, impl: str) -> Run:
    """Make the run of a whole core; `bytes` counts its results only: out, and the gradients of q and v."""
    result = BATCH * HEADS * case.length * SIZE * case.torch_dtype.itemsize
    call = run_function(make_core(case, impl), case, case.work)
    return Run(call, bytes=result if case.work == FORWARD else 3 * result)


def make_op(case: Case, impl: str) -> Run:
    """Make the run of one op, with its minimum work: products of visible pairs; reading inputs, writing outputs."""
    if impl in environment.RATES:
        return environment.make(case, impl)
    mode, op = impl.split()
    if op == "layout":
        return make_layout_run(case, mode)
    q, *_ = inputs(case.length)
    layout = make_layout(mode, q, case.rounds, case.causal)
    pairs = visible_pairs(layout)

    def attend(q, v):
        return windowed_attention(q, None, v, layout, causal=case.causal)[0]

    tensors = 3 if case.work == FORWARD else 6  # q, v, out; and the gradients of all three
    return Run(
        run_function(attend, case, case.work),
        flops=FLOPS_PER_PAIR[case.work] * pairs,
        bytes=tensors * q.numel() * FLOAT,
        note=f"{pairs} visible pairs",
    )


def make_layout_run(case: Case, mode: str) -> Run:
    """Make a hash-and-sort run: products for rotations; q is read, three numbers per sorted position are written."""
    q, *_ = inputs(case.length)
    columns = sum(bucket_factors(num_buckets_for(mode, case.length))) // 2 * case.rounds
    rows = q.numel() // SIZE  # B·H·T

    def call() -> AttentionLayout:
        return make_layout(mode, q, case.rounds, case.causal)

    return Run(call, flops=2.0 * rows * SIZE * columns, bytes=(rows * SIZE + 3 * rows * case.rounds) * FLOAT)


def visible_pairs(layout: AttentionLayout) -> int:
    """Count the pairs in all windows or chunks, over all heads."""
    pairs = int((layout.window_end.long() - layout.window_start.long() + 1).clamp(min=0).sum())
    return pairs * (HEADS // layout.window_start.shape[1])
