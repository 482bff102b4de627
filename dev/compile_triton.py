"""Compile the Triton kernels ahead of time, without a GPU, and show what they need: registers, stack, shared memory.

    python dev/compile_triton.py           # both rules, most expensive calls, in bfloat16 and float32
    python dev/compile_triton.py --all     # every kind of call, and float16
    python dev/compile_triton.py --kernels backward_keys --tiles 64,32,8,1    # try other tiles

The package's own launches are compiled instead of run, for GPUs that need not be present. Exits with status 1 if a
kernel spills registers to memory (its stack) or needs more shared memory than a small GPU has per block.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from hf_reformer.ops.bucket_tables import BucketChains
from hf_reformer.ops.layout import chunk_layout, window_layout
from hf_reformer.ops.prng import make_key
from reformer_kernels.attention_op import AttentionArgs
from reformer_kernels.contract import CacheTensors
from reformer_kernels.triton import decode_launch, hash_launch, launch
from reformer_kernels.triton.tiles import Tiles, choose_tiles

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_LIMIT = 99 * 1024  # bytes per block on sm_86, sm_89 and sm_120, the tightest of the supported GPUs
# With this many registers per thread, one more block fits on a multiprocessor. To reach it, the assembler chooses to
# spill a few in some of the cheaper kinds of call: it has registers left, so no tile is too large.
OF_ALL, GIVEN_UP = (128, 168), 32  # registers and bytes per thread
STEPS = {"attend_to_cache": (*OF_ALL, 48)}  # five blocks of 8 warps


class Case(NamedTuple):
    """One kind of call."""

    arch: int
    dtype: torch.dtype
    size: int
    rule: str = "window"
    rounds: int = 2
    heads: int = 2
    shared: bool = True
    dropout: float = 0.1


class Needs(NamedTuple):
    """Resources of a compiled kernel."""

    registers: int  # per thread
    stack: int  # bytes per thread
    shared: int  # bytes per block

    def too_much(self, kernel: str) -> bool:
        allowed = GIVEN_UP if self.registers in STEPS.get(kernel, OF_ALL) else 0
        return self.stack > allowed or self.shared > SHARED_LIMIT


def absent_driver(arch: int) -> SimpleNamespace:
    """Make a stand-in for the driver of a GPU that is not present."""
    return SimpleNamespace(
        get_current_device=lambda: arch,  # compiled kernels are cached per device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
    )


def launches_of(case: Case, kernels: list[str]) -> Iterator[tuple[str, dict, Needs]]:
    """Yield the name, arguments and needs of every kernel that a call and its backward launch."""
    length, shape = 64, (1, case.heads, 64, case.size)
    query, value = (torch.zeros(shape, dtype=case.dtype) for _ in range(2))
    mask = torch.ones(1, length, dtype=torch.bool)
    buckets = torch.zeros(1, case.heads, case.rounds, length, dtype=torch.int32)
    if case.rule == "window":
        layout = window_layout([(buckets, 1, 8)], True, mask)
    else:
        layout = chunk_layout(buckets, 1, 16, 1, 0, mask)
    dropout_key, query_weights = make_key(0) if case.dropout else None, torch.ones(1, length)
    args = AttentionArgs(
        query, None if case.shared else query, value, *layout[:3], mask, dropout_key, query_weights,
        *layout[3:], True, case.dropout, 1.0,
    )  # fmt: skip
    launched = []

    def compile_instead(kernel, grid):
        def run(*args, **options):
            if kernel.__name__.removesuffix("_round") in kernels:
                launched.append((kernel.__name__, options, kernel.warmup(*args, grid=grid, **options)))

        return run

    triton.runtime.driver.set_active(absent_driver(case.arch))
    rotations, samples = torch.zeros(case.heads, case.size, case.rounds, 16), torch.zeros(1, length, dtype=torch.int32)
    with (
        mock.patch.object(JITFunction, "__getitem__", compile_instead),
        mock.patch.object(launch, "capability_of", return_value=divmod(case.arch, 10)),
        mock.patch.object(hash_launch, "capability_of", return_value=divmod(case.arch, 10)),
        mock.patch.object(decode_launch, "capability_of", return_value=divmod(case.arch, 10)),
    ):
        for causal, of in itertools.product((True, False), (None, samples)):
            hash_launch.run_hashing(query, rotations, [32], True, causal, mask, of, None, None)
        for cache in caches_of(case, rotations):
            token, index = query[:, :, :1], torch.zeros(1, 1, dtype=torch.int64)
            vectors = None if cache.rotations is None else token
            decode_launch.run_decode_attention(token, token, token, vectors, index, cache, 128, 1.0)
        launch_args = launch.prepare(args)
        out, row_max, row_sum, mass = launch.run_forward(launch_args)
        for grad_mass in (None, mass):
            launch.run_backward(launch_args, out, row_max, row_sum, out, grad_mass)
    seen = set()
    for name, options, compiled in launched:
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            yield name.removesuffix("_round"), options, needs_of(compiled)


def caches_of(case: Case, rotations: torch.Tensor) -> list[CacheTensors]:
    """Make the caches of a local layer and of an lsh layer."""
    rows, rounds, capacity = (1, case.heads), (1, case.heads, case.rounds), 256
    keys = torch.zeros(*rows, capacity, case.size, dtype=case.dtype)
    chains = BucketChains(rounds, 32, capacity, keys.device)
    buckets, sums = torch.zeros(*rounds, capacity, dtype=torch.int32), torch.zeros(*rows, case.size).double()
    of_buckets = buckets, chains.newest, chains.previous, rotations, (4, 8), 64, sums
    return [CacheTensors(keys, keys), CacheTensors(keys, keys, *of_buckets)]


def needs_of(compiled) -> Needs:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return Needs(int(registers), int(stack), compiled.metadata.shared)


def cases_of(archs: list[int], dtypes: list[torch.dtype], sizes: list[int], every: bool) -> list[Case]:
    """Return the costliest kinds of call: shared query/key and dropout; window rounds preceded by other rounds."""
    cases = []
    for arch, dtype, size in itertools.product(archs, dtypes, sizes):
        case = Case(arch, dtype, size)
        # Triton specializes on the constant 1: one head and one round take another path through its compiler.
        cases += [case, case._replace(rule="chunk", rounds=1, heads=1)]
        if every:
            for rule, shared, dropout in itertools.product(["window", "chunk"], [True, False], [0.0, 0.1]):
                cases.append(case._replace(rule=rule, rounds=3, shared=shared, dropout=dropout))
    return cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["forward", "backward_queries", "backward_keys", "sweep_queries", "sweep_keys", "invert_permutations"]
    names += ["sum_tiles", "hash_tokens", "place_tokens", "attend_to_cache"]
    parser.add_argument("--all", action="store_true", help="every kind of call and dtype; takes ten minutes")
    parser.add_argument("--kernels", nargs="+", default=names, choices=names)
    parser.add_argument("--archs", nargs="+", type=int, default=[80, 90], help="compute capabilities, times ten")
    parser.add_argument("--dtypes", nargs="+")
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128], help="head sizes")
    parser.add_argument("--tiles", help="queries,keys,warps,stages instead of the package's choice")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        parser.error("the interpreter compiles nothing; unset TRITON_INTERPRET")
    dtypes = options.dtypes or (["bfloat16", "float16", "float32"] if options.all else ["bfloat16", "float32"])
    choose = (lambda *_: Tiles(*map(int, options.tiles.split(",")))) if options.tiles else choose_tiles
    failures = 0
    print(
        "kernel              sm  dtype     size  keys    rule    dropout round   tiles            REG  STACK  shared"
    )
    cases = cases_of(options.archs, [getattr(torch, name) for name in dtypes], options.sizes, options.all)
    with (
        mock.patch.object(launch, "choose_tiles", choose),
        mock.patch.object(hash_launch, "choose_tiles", choose),
        mock.patch.object(decode_launch, "choose_tiles", choose),
    ):
        for case in cases:
            for name, arguments, needs in launches_of(case, options.kernels):
                too_much = needs.too_much(name)
                failures += too_much
                kind, tiles = arguments.get("kind"), ""
                if kind is not None:
                    tiles = f"{kind.queries.value}x{kind.keys.value} {arguments['num_warps']}w "
                    tiles += f"{arguments['num_stages']}s"
                elif "num_warps" in arguments:
                    tiles = f"{arguments.get('TILE', '')}x{arguments.get('COLUMNS', '')} {arguments['num_warps']}w "
                    tiles += f"{arguments['num_stages']}s"
                print(
                    f"{name:19} {case.arch}  {str(case.dtype)[6:]:9} {case.size:4}  "
                    f"{'shared' if case.shared else 'own':7} {case.rule:7} {'yes' if case.dropout else 'no':7} "
                    f"{'first' if kind is not None and kind.first.value else 'later':7} {tiles:15} "
                    f"{needs.registers:4}  {needs.stack:5}  {needs.shared:6}{'  <-- too much' * too_much}",
                    flush=True,
                )
    print(f"{failures} kernels need too much" if failures else "all is well")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
