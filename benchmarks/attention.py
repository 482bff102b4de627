"""Time attention against other implementations, side by side in one process.

"Core" is what stands between the projections and the output: hash, sort, attention, combination of rounds. Every
repetition runs all rivals in turn, so that a busy machine slows them alike; medians and ratios to ours are printed and
written as CSV. Chunk rows follow the rivals' own rule (chunks of 64, one back). Window rows see as many places per
query (windows of 96, position order off) with as many hash rounds.

    python benchmarks/attention.py --lengths 1024 4096 --rounds 1 2 --output attention.csv
"""

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from hf_reformer.attention import old_num_buckets
from hf_reformer.attention_ops import ordered_attention
from hf_reformer.configuration_reformer import default_num_buckets
from hf_reformer.hashing import chunk_orders, lsh_buckets, product_of, window_orders, window_rotations
from hf_reformer.randomness import make_key

HEADS, SIZE, CHUNK, WINDOW = 8, 64, 64, 96
Core = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # q, v: (B, H, T, D) → out of the same shape


def ours(mode: str, length: int, rounds: int, causal: bool) -> Core:
    """Our core in one of the attention modes, without the position order."""
    key = make_key(0)
    if mode == "chunk":
        factors = old_num_buckets(length, CHUNK, length)
    else:
        factors = default_num_buckets(length, WINDOW)

    def run(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        buckets = lsh_buckets(q, window_rotations(key, 0, HEADS, SIZE, rounds, factors), factors)
        count = product_of(factors)
        if mode == "chunk":
            orders = chunk_orders(buckets, count, CHUNK, 1, 0, None)
        else:
            orders = window_orders([(buckets, count, WINDOW)], causal, None)
        return ordered_attention(q, None, v, orders, causal=causal)

    return run


def built_in(length: int, rounds: int, causal: bool) -> Core:
    """transformers' own LSH attention, its projections replaced by the identity."""
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    config = ReformerConfig(
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        attention_head_size=SIZE,
        num_hashes=rounds,
        num_buckets=old_num_buckets(length, CHUNK, length),
        lsh_attn_chunk_length=CHUNK,
        is_decoder=causal,
        max_position_embeddings=length,
    )
    module = LSHSelfAttention(config, layer_idx=0).eval()
    module.query_key = module.value = torch.nn.Identity()

    def run(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return module(q.transpose(1, 2).flatten(2)).hidden_states

    return run


def lucidrains(length: int, rounds: int, causal: bool) -> Core:
    """reformer-pytorch's LSH attention."""
    from reformer_pytorch.reformer_pytorch import LSHAttention

    module = LSHAttention(bucket_size=CHUNK, n_hashes=rounds, causal=causal).eval()

    def run(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return module(q.flatten(0, 1), v.flatten(0, 1))[0]

    return run


def full(causal: bool) -> Core:
    """torch's exact attention (SDPA)."""
    return lambda q, v: F.scaled_dot_product_attention(q, q, v, is_causal=causal)


def rivals(length: int, rounds: int, causal: bool, longest_full: int) -> dict[str, Core]:
    """Ours first; exact attention up to the length where it stops being fun."""
    found = {
        "ours, windows": ours("window", length, rounds, causal),
        "ours, chunks": ours("chunk", length, rounds, causal),
        "transformers": built_in(length, rounds, causal),
        "reformer-pytorch": lucidrains(length, rounds, causal),
    }
    return found | ({"full (SDPA)": full(causal)} if length <= longest_full else {})


def measure(cores: dict[str, Core], length: int, backward: bool, repeats: int) -> dict[str, float]:
    """Median seconds of each core, all run in turn `repeats` times after a warm-up."""
    torch.manual_seed(0)
    q, v, grad = (torch.randn(1, length, HEADS, SIZE).transpose(1, 2) for _ in range(3))
    q.requires_grad_(backward)
    v.requires_grad_(backward)
    times: dict[str, list[float]] = {name: [] for name in cores}
    for repeat in range(repeats + 1):
        for name, core in cores.items():
            start = time.perf_counter()
            with torch.set_grad_enabled(backward):
                out = core(q, v)
            if backward:
                torch.autograd.grad(out, [q, v], grad.reshape(out.shape), allow_unused=True)
            if repeat:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, nargs="+", default=[2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bidirectional", action="store_true")
    parser.add_argument("--longest_full", type=int, default=4096, help="longest input for exact attention")
    parser.add_argument("--output", type=Path, default=Path("attention.csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = [(length, r, back) for length in args.lengths for r in args.rounds for back in (False, True)]
    rows = []
    for length, rounds, backward in tqdm(cases, desc="cases"):
        cores = rivals(length, rounds, not args.bidirectional, args.longest_full)
        taken = measure(cores, length, backward, args.repeats)
        best = taken["ours, windows"]
        for name, seconds in taken.items():
            row = {"length": length, "rounds": rounds, "pass": "forward+backward" if backward else "forward"}
            rows.append(row | {"what": name, "ms": round(seconds * 1e3, 1), "ratio": round(seconds / best, 2)})
    with args.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"{HEADS} heads of {SIZE}, batch 1, float32, {args.threads} threads; ratio: time / ours, windows")
    for row in rows:
        print("{length:>7} {rounds} rounds  {pass:<17} {what:<17} {ms:>9.1f} ms  x {ratio}".format(**row))
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
