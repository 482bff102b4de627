"""Benchmark tiles of the Triton kernels on this machine's GPU, and print the resulting entries of `triton/tiles.py`.

    python dev/tune_triton.py                                # both precisions, heads of 64 and 128, 16384 tokens
    python dev/tune_triton.py --sizes 64 --precisions half
    TRITON_INTERPRET=1 python dev/tune_triton.py --tiny      # on a CPU, to test that it runs; times are meaningless

Tiles are changed for one kernel at a time. Candidates that do not compile or run out of resources are skipped. Models
are not tuned at run time: the only purpose is to fill the table.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import torch

from hf_reformer.ops.bucket_tables import BucketChains
from hf_reformer.ops.layout import window_layout
from hf_reformer.ops.lsh import lsh_buckets
from hf_reformer.ops.prng import make_key
from reformer_kernels.attention_op import AttentionArgs
from reformer_kernels.contract import CacheTensors
from reformer_kernels.triton import decode_launch, hash_launch, launch
from reformer_kernels.triton.tiles import Tiles, choose_tiles

KERNELS = ("forward", "backward_queries", "backward_keys", "hash", "decode")
DTYPES = {"half": torch.bfloat16, "single": torch.float32}


def candidates(tiny: bool) -> list[Tiles]:
    if tiny:
        return [Tiles(16, 16, 4, 1), Tiles(32, 16, 4, 1)]
    return [Tiles(*tiles) for tiles in itertools.product((16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3))]


def inputs_of(dtype: torch.dtype, size: int, length: int, device: str) -> AttentionArgs:
    """Make a causal call of an lsh layer in training: shared keys, two hash rounds and the position order, dropout."""
    generator = torch.Generator().manual_seed(0)
    query, value = (torch.randn(1, 8, length, size, generator=generator).to(device, dtype) for _ in range(2))
    buckets = torch.randint(0, max(2, length // 64), (1, 8, 2, length), generator=generator).int().to(device)
    layout = window_layout([(buckets[:, :, :1] * 0, 1, 128), (buckets, None, 64)], True, None)
    key = make_key(0, device)
    return AttentionArgs(query, None, value, *layout[:3], None, key, None, *layout[3:], True, 0.1, size**-0.5)


def call_of(kernel: str, args: AttentionArgs, times: int) -> Callable[[], object]:
    """Return the function to time for a kernel, callable `times` times; other tiles change little else in it."""
    if kernel == "hash":
        heads, size = args.query.shape[1], args.query.shape[3]
        rotations = torch.randn(heads, size, 2, 64, device=args.query.device)
        return lambda: hash_launch.run_hashing(
            args.query, rotations, [128], True, True, None, None, None, None
        )  # fmt: skip
    if kernel == "decode":
        return decode_step(args.query, args.value, times)
    if kernel == "forward":
        return lambda: launch.run_forward(launch.prepare(args))
    prepared = launch.prepare(args)
    out, row_max, row_sum, _ = launch.run_forward(prepared)
    return lambda: launch.run_backward(prepared, out, row_max, row_sum, out, None)


def decode_step(keys: torch.Tensor, values: torch.Tensor, times: int) -> Callable[[], object]:
    """Return a step for the last token, callable `times` times: two hash rounds of windows of 64, and the last 128."""
    (batch, heads, length, size), device = keys.shape, keys.device
    rotations, sums = (torch.randn(*shape, device=device) for shape in ((heads, size, 2, 64), (batch, heads, size)))
    buckets = lsh_buckets(keys, rotations, 128)
    chains = BucketChains((batch, heads, 2), 128, length, device)
    chains.add(buckets[..., :-1], torch.arange(length - 1, device=device).expand(batch, -1))
    token, value = keys[:, :, -1:], values[:, :, -1:]
    index, sums = torch.full((batch, 1), length - 1, device=device), sums.double()
    newest = [chains.newest.clone() for _ in range(times)]  # a step writes to it; copied before timing starts

    def call() -> torch.Tensor:
        kept = buckets, newest.pop(), chains.previous, rotations, (128,), 64, sums
        cache = CacheTensors(keys, values, *kept)
        return decode_launch.run_decode_attention(token, token, value, token, index, cache, 128, size**-0.5)

    return call


def milliseconds(call: Callable[[], object], repeats: int, device: str) -> float:
    times = []
    for _ in range(repeats + 1):
        wait(device)
        begin = time.perf_counter()
        call()
        wait(device)
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[1:])


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(kernel: str, dtype: torch.dtype, size: int, options: argparse.Namespace) -> list[tuple[float, Tiles]]:
    """Time all candidates that run; fastest first."""
    found = []
    args = inputs_of(dtype, size, options.length, options.device)
    for tiles in candidates(options.tiny):

        def choose(name, *rest, tiles=tiles):
            return tiles if name == kernel else choose_tiles(name, *rest)

        with (
            mock.patch.object(launch, "choose_tiles", choose),
            mock.patch.object(hash_launch, "choose_tiles", choose),
            mock.patch.object(decode_launch, "choose_tiles", choose),
        ):
            try:
                call = call_of(kernel, args, options.repeats + 1)
                found.append((milliseconds(call, options.repeats, options.device), tiles))
            except Exception as error:  # too large for this GPU, or for its compiler
                print(f"{kernel} {tiles}: {type(error).__name__}", file=sys.stderr)
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[64, 128], help="head sizes")
    parser.add_argument("--precisions", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--length", type=int, default=16384, help="tokens")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="few tokens and candidates")
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cpu" and not options.tiny:
        parser.error("there is no CUDA GPU. To see that this runs: TRITON_INTERPRET=1 and --tiny.")
    if options.tiny:
        options.length, options.repeats = 40, 1
    print(f"# compute capability {launch.capability_of(torch.device(options.device))}, torch {torch.__version__}")
    for precision, kernel in itertools.product(options.precisions, options.kernels):
        if kernel in ("hash", "decode") and precision == "half":
            continue  # always computes in float32
        for size in options.sizes:
            times = measure(kernel, DTYPES[precision], size, options)
            now = choose_tiles(kernel, DTYPES[precision], size, launch.capability_of(torch.device(options.device)))
            of_now = next((f"{ms:.3f} ms" for ms, tiles in times if tiles == now), "not among the candidates")
            best = f"{times[0][1]}, {times[0][0]:.3f} ms" if times else "none runs"
            print(f"{precision} {kernel} {size}: {best}; now {now}, {of_now}", flush=True)


if __name__ == "__main__":
    main()
