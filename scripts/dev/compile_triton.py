"""Compile the Triton kernels ahead of time, without a GPU, and show what they need: registers, stack, shared memory.

    python scripts/dev/compile_triton.py            # what users run: both head sizes, all dtypes, both rules
    python scripts/dev/compile_triton.py --short    # one small configuration of every kernel and dtype
    python scripts/dev/compile_triton.py --tiles 64,32,8,1 --kernels backward_keys    # try other tiles

Exits with status 1 if a kernel spills registers (a stack) or needs more shared memory than a small GPU gives a block.
One spill is known and let pass: the gradient of keys in float32 at head size 128 keeps up to four registers in memory,
with the smallest tiles there are.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_reformer.kernels.triton import backward, forward
from hf_reformer.kernels.triton.tiles import Tiles, choose_tiles

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_LIMIT = 99 * 1024  # bytes a block may have on sm_86, sm_89 and sm_120, the tightest of the supported GPUs
KNOWN_SPILL = 16  # bytes a thread
POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
KERNELS = {
    "forward": forward.forward_round,
    "backward_queries": backward.backward_queries_round,
    "backward_keys": backward.backward_keys_round,
    "invert_orders": forward.invert_orders,
}
INPUTS = {"query", "key", "value", "grad"}
INTEGERS = {
    "places",
    "total",
    "length",
    "heads",
    "order_heads",
    "rounds",
    "round",
    "threshold",
    "reach",
    "before",
    "after",
}
SINGLE = {"factor", "sums", "value_sums", "top", "mass", "drift"}
RESULTS = {"out", "target", "value_target"}
ONLY_EARLIER = {"place_of", "lowest_of", "highest_of"}


class Case(NamedTuple):
    """One specialisation of one kernel."""

    kernel: str
    arch: int
    dtype: torch.dtype
    size: int
    shared: bool
    windows: bool
    causal: bool = True
    dropout: bool = False
    earlier: int = 0


def constants_of(case: Case, tiles: Tiles) -> dict:
    if case.kernel == "invert_orders":
        return {"BLOCK": 1024}
    last = case.earlier > 0 or not case.windows
    return {
        "QUERIES": tiles.queries,
        "KEYS": tiles.keys,
        "SIZE": case.size,
        "VALUE_SIZE": case.size,
        "BLOCK": case.size,
        "VALUE_BLOCK": case.size,
        "SHARED": case.shared,
        "CAUSAL": case.causal,
        "PADDED": not case.windows,
        "COUNT_ONCE": case.windows,
        "DROPOUT": case.dropout,
        "EARLIER": case.earlier,
        "FIRST": case.earlier == 0,
        "LAST": last,
        **({} if case.shared else {"factor": None}),
        **({} if case.earlier else dict.fromkeys(ONLY_EARLIER)),
        **({"real": None} if case.windows else {}),
        **({} if case.dropout else {"dropout_key": None}),
    }


def type_of(name: str, case: Case) -> str:
    if name in INPUTS:
        return POINTER[case.dtype]
    if name in RESULTS:
        between = case.kernel != "backward_queries" and case.windows and not case.earlier
        return "*fp32" if between and name != "out" else POINTER[case.dtype]
    if name in SINGLE:
        return "*fp32"
    if name == "keep_scale":
        return "fp32"
    if name in INTEGERS:
        return "i32"
    return "*u8" if name == "real" else "*i32"


def compile_case(case: Case, tiles: Tiles):
    kernel = KERNELS[case.kernel]
    constants = constants_of(case, tiles)
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else type_of(name, case) for name in kernel.arg_names}
    pointers = [place for place, name in enumerate(kernel.arg_names) if signature[name].startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(place,): [["tt.divisibility", 16]] for place in pointers},
    )
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)


def needs(compiled) -> tuple[int, int, int]:
    """Registers per thread, bytes of stack per thread, bytes of shared memory per block."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack), compiled.metadata.shared


def default_cases(kernels: list[str], archs: list[int], dtypes: list[torch.dtype], short: bool) -> list[Case]:
    """The window rule where it costs most, in rounds with others before them and with dropout; and the rest."""
    found = []
    for kernel, arch, dtype in itertools.product(kernels, archs, dtypes):
        if kernel == "invert_orders":  # knows neither dtypes nor heads
            found += [Case(kernel, arch, dtype, 64, shared=True, windows=True)] if dtype == dtypes[0] else []
            continue
        for size in (64,) if short else (64, 128):
            for earlier in (2,) if short else (1, 2, 4):
                found.append(Case(kernel, arch, dtype, size, shared=True, windows=True, dropout=True, earlier=earlier))
            if not short:
                found.append(Case(kernel, arch, dtype, size, shared=False, windows=True))
                found.append(Case(kernel, arch, dtype, size, shared=True, windows=False, causal=False))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one configuration of every kernel, GPU and dtype")
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), choices=list(KERNELS))
    parser.add_argument("--archs", nargs="+", type=int, default=[80, 90])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--tiles", help="queries,keys,warps,stages instead of the package's choice")
    options = parser.parse_args()
    dtypes = [getattr(torch, name) for name in options.dtypes]
    failures = 0
    print("kernel            sm  dtype     size  keys    rule    dropout earlier  tiles            REG  STACK  shared")
    for case in default_cases(options.kernels, options.archs, dtypes, options.short):
        simple = case.kernel == "invert_orders"
        tiles = Tiles(1, 1, 4, 1) if simple else choose_tiles(case.kernel, case.dtype, case.size)
        if options.tiles:
            tiles = Tiles(*map(int, options.tiles.split(",")))
        registers, stack, shared = needs(compile_case(case, tiles))
        known = case[0] == "backward_keys" and case.dtype == torch.float32 and case.size == 128
        bad = stack > (KNOWN_SPILL if known else 0) or shared > SHARED_LIMIT
        failures += bad
        print(
            f"{case.kernel:17} {case.arch}  {str(case.dtype)[6:]:9} {case.size:4}  "
            f"{'shared' if case.shared else 'own':7} {'window' if case.windows else 'chunk':7} "
            f"{'yes' if case.dropout else 'no':7} {case.earlier:7}  {'{}x{} {}w {}s'.format(*tiles):15} "
            f"{registers:4}  {stack:5}  {shared:6} {'  <-- too much' if bad else ''}",
            flush=True,
        )
    print(f"{failures} configurations need too much" if failures else "all is well")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
