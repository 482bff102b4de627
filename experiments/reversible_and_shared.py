"""Do reversible layers, and sharing queries with keys, reduce quality? Loss curves of equal runs (paper, Figure 3).

    python experiments/reversible_and_shared.py --train_file book.txt --seeds 0 1 2

    reversible, plain   the default layers, recomputed in backward or stored: the curves must coincide
    shared, separate    all layers see all previous tokens, with shared (kind lsh) or separate (local) queries and keys

All use the same data and steps; each pair also uses the same random seeds. Columns are the mean training loss over
`every` steps, in bits per byte; the last row of a run holds the loss on the held-out text.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from common import (
    Experiment,
    Options,
    TextOptions,
    bits_per_byte,
    make_model,
    parse,
    product,
    read_texts,
    see_all,
    table,
    text_batches,
    text_rows,
    train,
)
from transformers import set_seed

KEYS = (
    "source", "variant", "seed", "length", "steps", "rows", "hidden_size", "num_layers", "learning_rate", "overrides",
    "validated_on", "step",
)  # fmt: skip
SHORT = {
    "length": 256, "steps": 20, "rows": 2, "hidden_size": 64, "num_layers": 2, "every": 5, "eval_rows": 2,
}  # fmt: skip
BITS = 1.4426950408889634  # per nat


@dataclass
class Arguments(TextOptions, Options):
    variants: list[str] = field(default_factory=lambda: ["reversible", "plain", "shared", "separate"])
    length: int = 1024
    steps: int = 600
    rows: int = 8
    hidden_size: int = 128
    num_layers: int = 4
    learning_rate: float = 2e-3
    every: int = 20


def build(variant: str, args: Arguments) -> tuple[Any, Any]:
    """Make a new model, and the context in which it must run."""
    layers = {"shared": ["lsh"], "separate": ["local"]}.get(variant, ["local", "lsh"]) * args.num_layers
    fields: dict[str, Any] = {"reversible": variant != "plain", "lsh_window": 32, "local_window": 32}
    if variant == "separate":
        fields["local_window"] = args.length
    if variant == "shared":
        fields["num_hashes"] = 1
    model = make_model(args.length, args.hidden_size, layers[: args.num_layers], args.overrides, **fields)
    return model, see_all(model) if variant == "shared" else contextlib.nullcontext()


def run(key: dict[str, Any], args: Arguments, experiment: Experiment, texts: Sequence[torch.Tensor]) -> None:
    set_seed(key["seed"])
    model, context = build(key["variant"], args)
    torch.manual_seed(key["seed"])  # different models have drawn different random numbers
    with context:
        losses = train(
            model, text_batches(texts[0], "plain", args.rows, args.length), args.steps, seed=key["seed"],
            learning_rate=args.learning_rate, checkpoint=experiment.checkpoint(key),
            name=f"{key['variant']}, seed {key['seed']}",
        )  # fmt: skip
        judged = text_rows(texts[1], "plain", args.eval_rows, args.length, torch.Generator(), even=True)
        bits = bits_per_byte(model, *judged)["bits"]
    for step in range(args.every, args.steps + 1, args.every):
        if not experiment.results.find({**key, "step": step}):
            loss = sum(losses[step - args.every : step]) / args.every * BITS
            end = bits if step + args.every > args.steps else float("nan")
            experiment.results.add({**key, "step": step}, {"train_bits": loss, "bits": end})


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Arguments, SHORT, argv)
    experiment = Experiment("reversible_and_shared", args, KEYS, ("train_bits", "bits"))
    texts, rows = read_texts(args), []
    fixed = {name: getattr(args, name) for name in KEYS if hasattr(args, name)}
    fixed |= {"source": "demo" if args.train_file is None else args.train_file.stem, "validated_on": args.validate_on}
    for choice in product(seed=args.seeds, variant=args.variants):
        key = {**fixed, **choice}
        if not experiment.results.find({**key, "step": args.steps // args.every * args.every}):
            run(key, args, experiment, texts)
        rows += experiment.results.find(key)
    print("\n" + table(rows, ["variant"], "length", "bits"))
    curves = {(row["variant"], row["seed"], row["step"]): float(row["train_bits"]) for row in rows}
    for one, other in (("reversible", "plain"), ("shared", "separate")):
        both = [at for name, *at in curves if name == one and (other, *at) in curves]
        gaps = [abs(curves[one, *at] - curves[other, *at]) for at in both]
        if gaps:
            print(f"largest gap between {one} and {other}: {max(gaps):.4f} bits per byte")
    draw(experiment, rows)


def draw(experiment: Experiment, rows: list[dict[str, str]]) -> None:
    figure, axes = experiment.figure(2)
    for ax, pair in zip(axes, (("reversible", "plain"), ("shared", "separate")), strict=True):
        for name, line, color in zip(pair, ("-", "--"), ("#0b5d7a", "#d1495b"), strict=True):
            for seed in dict.fromkeys(row["seed"] for row in rows):
                some = [row for row in rows if (row["variant"], row["seed"]) == (name, seed)]
                losses = [float(row["train_bits"]) for row in some]
                ax.plot([int(row["step"]) for row in some], losses, line, color=color, label=f"{name}, seed {seed}")
        ax.set(xlabel="step", ylabel="training loss, bits per byte")
        ax.legend(frameon=False, fontsize=7)
    experiment.save(figure)


if __name__ == "__main__":
    main()
