"""How does the time of a training step grow with the length, at a constant number of tokens (paper, Figure 5)?

    python experiments/step_time.py                        # 65,536 tokens per step: 64 × 1k to 1 × 64k
    python experiments/step_time.py --tokens 16384 --lengths 1024 4096 16384

A step is forward, backward and AdamW of a byte model whose layers are all of kind lsh, or all of kind full (exact
attention with torch's `scaled_dot_product_attention`). The number of buckets depends on the length, as by default.
A kind that took more than `max_seconds` for a step is not measured at greater lengths. `ratio` is the time over that
of the shortest length.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from common import Experiment, Options, make_model, parse, table
from transformers import set_seed
from transformers.hf_argparser import HfArg

KEYS = ("kind", "length", "tokens", "hidden_size", "num_layers", "window", "num_hashes", "threads_used", "overrides")
SHORT = {"lengths": [512, 1024, 2048], "tokens": 2048, "num_layers": 2, "hidden_size": 64, "repeats": 2}


@dataclass
class Arguments(Options):
    kinds: list[str] = HfArg(default_factory=lambda: ["lsh", "full"], help="lsh, full or local")
    lengths: list[int] = field(default_factory=lambda: [2**k for k in range(10, 17)])
    tokens: int = HfArg(default=2**16, help="of a step")
    repeats: int = HfArg(default=3, help="steps measured, after one that is not")
    max_seconds: float = 120.0
    num_layers: int = 2
    hidden_size: int = 256
    window: int = 128
    num_hashes: int = 2


def step_seconds(kind: str, length: int, args: Arguments) -> list[float]:
    """Measure the seconds of every step after a warm-up."""
    set_seed(0)
    model = make_model(
        length, args.hidden_size, [kind] * args.num_layers, args.overrides, lsh_window=args.window,
        local_window=args.window, num_hashes=args.num_hashes,
    ).train()  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, 256, (max(1, args.tokens // length), length), generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(args.repeats + 1):
        begin = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Arguments, SHORT, argv)
    experiment = Experiment("step_time", args, KEYS, ("seconds", "fastest", "ratio"))
    fixed = {name: getattr(args, name) for name in KEYS if hasattr(args, name)}
    fixed |= {"threads_used": torch.get_num_threads()}
    rows = []
    for kind in args.kinds:
        shortest = None
        for length in sorted(args.lengths):
            key = {**fixed, "kind": kind, "length": length}
            if not experiment.results.find(key):
                seconds = step_seconds(kind, length, args)
                median = statistics.median(seconds)
                ratio = median / (median if shortest is None else shortest)
                experiment.results.add(key, {"seconds": median, "fastest": min(seconds), "ratio": ratio})
            (row,) = experiment.results.find(key)
            rows.append(row)
            shortest = shortest or float(row["seconds"])
            if float(row["seconds"]) > args.max_seconds:
                break
    for value in ("seconds", "ratio"):
        print(f"\n{value}\n{table(rows, ['kind'], 'length', value)}")
    figure, (ax,) = experiment.figure()
    alike = experiment.results.find(fixed)  # those of earlier runs, too
    for kind in dict.fromkeys(row["kind"] for row in alike):
        points = sorted((int(row["length"]), float(row["seconds"])) for row in alike if row["kind"] == kind)
        ax.plot(*zip(*points, strict=True), "o-", label="exact attention" if kind == "full" else kind)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="length", ylabel=f"seconds per step of {args.tokens:,} tokens")
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)
    experiment.save(figure)


if __name__ == "__main__":
    main()
