"""Check hf_reformer on a GPU and compare it with others there; downloads nothing, starts nothing after five minutes.

From the root of the repository, with the package and its `bench` extra installed:

    python -m benchmarks.gpu                            # results.csv, report.md and plots in runs/gpu
    python -m benchmarks.gpu --device cpu --tiny        # tests everything on a CPU in a minute; times are meaningless
    python -m benchmarks.gpu --only core step --minutes 3

The most important measurements come first; those that do not fit into the time are recorded as skipped. Rows are
written to results.csv group by group, as they are measured; out-of-memory and unsupported cases are recorded as such.
If a kernel leaves the GPU unusable for the process, the command restarts itself after that group.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging

from hf_reformer.ops.dispatch import select_backend

from . import checks, environment, rivals
from .cases import BOTH, FORWARD, INFERENCE, NEXT, STEP, Case, Entry, Group
from .models import LAYERS, ROUNDS
from .report import Page, write_report
from .results import Row, append
from .runner import DeviceLostError, Limits, Runner, carry_out
from .targets import Target, find_gpu_targets

MINUTES, CHECKS_SHARE = 5.0, 0.3  # when the last group may start, and the fraction of it at which the last check may
BUDGET, LONGEST = 1.0, 3.0  # seconds for a group's repetitions, and for one call of a single op
TINY_BUDGET = 0.01
SECTIONS = ("correctness", "core", "step", "causal", "classifier", "generation", "step-growth")
MILLION = 2**20

NOTES = """\
All numbers: batch 1, 8 heads of 64. Times are medians between CUDA events around calls in turn, back and forth, \
after a call each to warm up; in brackets the median ratio to the first of them. `*`: too slow to repeat, called \
once, cold. Memory is the most that torch's allocator held during a call beyond what it held before.

- Correctness: the same calls on `reference` in float64 from the same rounded inputs; whole models in float32.
- Cores are causal, from projected q and v, with two hash rounds and windows of 96 (without the order of positions). \
`hf-reformer window` is the backend that "auto" takes, named in the table above. `flash` is SDPA with its flash \
kernel alone; `sdpa`, in float32, whatever SDPA takes. `flex` is torch's flex attention, compiled, over sliding \
windows of 192 tokens, as many as both rounds show. transformers' Reformer and reformer-pytorch hash in chunks of 64.
- Models have 6 layers, hidden size 512, feed-forward 1024, no dropout; their training steps keep float32 weights \
under bfloat16 autocast with AdamW (BigBird's are in bfloat16 throughout: autocast breaks it). From 65536 tokens on, \
all others recompute their layers, as hf_reformer does at every length (but transformers' Reformer, which is \
reversible, too). What a token sees, and how the models are made: `benchmarks/rivals.py`. Mamba is left out: in \
PyTorch alone its backward loops over tokens in time that grows with the square of the length, and its own kernels \
must be compiled.
- The next token: bfloat16 weights, sixteen in a row. The step on a million tokens: residual streams in float32, at \
the width of the other steps and at that of `experiments/million_tokens.py`."""


def gpu_targets(rows: list[Row]) -> Iterable[tuple[str, list[Target]]]:
    return [("Goals", find_gpu_targets(rows))]


PAGE = Page("Benchmarks on a GPU", NOTES, gpu_targets)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="short sequences, two layers, hardly any repetition")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to measure")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"by then the last group begins ({MINUTES})")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--first", type=int, default=0, help="the group to begin with, in an earlier run's results")
    parser.add_argument("--spent", type=float, default=0.0, help="minutes that this earlier run took")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device. `--device cpu --tiny` tries everything on a CPU.")
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes}: must be more than 0.")
    return args


def core_groups(device: str, tiny: bool) -> list[Group]:
    """Return groups of cores over length; bfloat16 with forward and backward first."""
    lengths = (128, 256) if tiny else (4096, 16384, 32768, 65536, 262144)
    own = "hf-reformer window"
    taken = select_backend("auto", *(torch.zeros(1, 1, 1, 64, device=device),) * 2)
    known = [f"{own} {name}" for name in checks.backends(device) if name != taken and name in ("triton", "torch")]
    found = []
    for dtype in ("bfloat16", "float32"):
        impls = [own, *known, "flash" if dtype == "bfloat16" else "sdpa", "flex", "transformers", "reformer-pytorch"]
        for work in (BOTH, FORWARD):
            for length in lengths:
                case = Case(section="core", length=length, work=work, device=device, dtype=dtype)
                entries = [Entry(case, impl) for impl in impls]
                found.append(Group("time", entries, in_a_row=4))
                if work == BOTH and length in lengths[1::2]:
                    found.append(Group("memory", entries))
    return found


def model_groups(section: str, device: str, tiny: bool) -> list[Group]:
    """Return groups of training steps of whole models, in time and memory; or of generating one more token."""
    layers = 2 if tiny else LAYERS
    case = Case(section=section, length=0, work=STEP, rounds=ROUNDS, layers=layers, device=device, dtype="bfloat16")
    case = replace(case, causal=section != "classifier")
    impls: tuple[str, ...] = ("hf-reformer", "transformers", "full")
    if section == "causal":
        impls = (*rivals.CAUSAL, "mistral flex")
    elif section == "classifier":
        impls = tuple(impl for impl in rivals.CLASSIFIERS if impl != "mamba")
    if section == "generation":
        impls += ("hf-reformer recorded",) if device != "cpu" else ()  # runs a CUDA graph
        lengths, cases = (256,) if tiny else (1024, 16384, 65536, 262144), [replace(case, work=NEXT)]
    else:
        lengths, cases = (384 if section == "classifier" else 256,) if tiny else (16384, 65536), [case]
        cases += [replace(case, work=INFERENCE)] if section in ("causal", "classifier") else []
    found = []
    for length in lengths:
        for case in cases:
            known = set(impls)
            if device == "cpu" and case.work == INFERENCE:
                known.discard("mistral flex")  # would compile for half a minute
            entries = [Entry(replace(case, length=length), impl) for impl in impls if impl in known]
            found.append(Group("time", entries, layers, in_a_row=16 if section == "generation" else 1))
            if case.work == STEP:
                found.append(Group("memory", entries, layers))
    return found


def million_groups(device: str, tiny: bool) -> list[Group]:
    """Return groups of steps on a million tokens, and on a shorter sequence."""
    case = Case(section="step-growth", length=0, work=STEP, rounds=ROUNDS, device=device, dtype="bfloat16")
    case = replace(case, layers=2 if tiny else LAYERS)
    return [
        Group(quantity, [Entry(replace(case, length=length), impl)], 2 * LAYERS)
        for impl in ("hf-reformer 256 wide", "hf-reformer 512 wide")
        for length in ((256, 512) if tiny else (65536, MILLION))
        for quantity in ("time", "memory")
    ]


def plan(args: argparse.Namespace) -> list[Group]:
    """Return all groups of the named sections after the checks, most important first."""
    core = core_groups(args.device, args.tiny)
    first = sum(group.entries[0].case.work == BOTH and group.entries[0].case.dtype == "bfloat16" for group in core)
    step, causal, generation, classifier = (
        model_groups(name, args.device, args.tiny) for name in ("step", "causal", "generation", "classifier")
    )
    million = million_groups(args.device, args.tiny)
    groups = [*core[:first], *step, *causal, *generation, *million, *classifier, *core[first:]]
    return [group for group in groups if group.entries[0].case.section in args.only]


def measure_all(args: argparse.Namespace, path: Path) -> None:
    """Check, then measure, writing to the file group by group.

    Raises:
        DeviceLostError: carries the number of completed groups.
    """
    trial = " (a trial: its times say nothing about a GPU)" * (args.device == "cpu")
    begin = time.monotonic()
    facts = [("device", args.device + trial), *environment.facts(args.device).items()]
    threads = torch.get_num_threads() if args.device == "cpu" else 0
    if not args.first:
        append(path, [Row(section="machine", length=0, quantity="fact", impl=k, note=v) for k, v in facts])
    checking = checks.groups(args.device, 128 if args.tiny else 320) if "correctness" in args.only else []
    budget = TINY_BUDGET if args.tiny else BUDGET
    for groups, done, share in ((checking, 0, CHECKS_SHARE), (plan(args), len(checking), 1.0)):
        deadline = begin + 60 * (share * args.minutes - args.spent)
        runner = Runner(Limits(budget, LONGEST, deadline, in_process=True))
        try:
            carry_out(runner, [(group, threads) for group in groups], path, max(0, args.first - done))
        except DeviceLostError as error:
            raise DeviceLostError(done + error.done) from error


def start_again(args: argparse.Namespace, first: int, spent: float) -> None:
    """Continue in a new process after the group that left the GPU unusable."""
    print("The GPU cannot be used by this process any more. Going on in another one.", flush=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", args.device, "--only", *args.only]
    command += ["--minutes", str(args.minutes), "--output_dir", str(args.output_dir)] + ["--tiny"] * args.tiny
    os.execv(sys.executable, [*command, "--first", str(first), "--spent", str(spent)])


def main(arguments: list[str] | None = None) -> None:
    begin = time.monotonic()
    args = parse(arguments)
    path = args.output_dir / "results.csv"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if path.exists() and not args.first:
        path.replace(path.with_name("results_before.csv"))
    logging.set_verbosity_error()
    torch._dynamo.config.recompile_limit = 64  # flex attention is recompiled for dtypes, masks and directions
    try:
        measure_all(args, path)
    except DeviceLostError as error:
        start_again(args, error.done, args.spent + (time.monotonic() - begin) / 60)
    for made in write_report(path, args.output_dir, PAGE):
        print(made)


if __name__ == "__main__":
    main()
