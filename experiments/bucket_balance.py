"""Do tokens spread over the buckets of a default model, before and after training?

    python experiments/bucket_balance.py --train_file book.txt --validation_file end.txt --validate_on validation_file

Models are causal byte models with the defaults of `ReformerConfig()`, except for width, kind of position embeddings,
`--length` and `--overrides`.
For every lsh layer: the entropy of a token's bucket (1: all equally full, 0: one holds all), and the size of the
largest bucket as a multiple of an even share, averaged over heads, rounds and sequences.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from common import (
    Experiment,
    Options,
    TextOptions,
    even_rows,
    followed_center,
    parse,
    product,
    read_texts,
    scaled_hashing,
    table,
    text_batches,
    train,
    whitened_hashing,
)
from transformers import set_seed
from transformers.hf_argparser import HfArg

from hf_reformer import ReformerConfig, ReformerForCausalLM
from hf_reformer.analysis import bucket_balance, view_layer
from hf_reformer.training.model_setup import parse_overrides

KEYS = (
    "source", "hidden_size", "positions", "seed", "length", "rows", "learning_rate", "overrides", "validated_on",
    "eval_rows", "center", "steps", "layer",
)  # fmt: skip
SHORT = {"widths": [128], "positions": ["rotary", "axial"], "steps": 3, "length": 512, "rows": 1, "eval_rows": 2}


@dataclass
class Arguments(TextOptions, Options):
    widths: list[int] = field(default_factory=lambda: [128, 256])
    positions: list[str] = field(default_factory=lambda: ["axial", "learned", "rotary"])
    center: str = HfArg(
        default="mean",
        help="mean of the tokens so far; followed: one that training follows; scaled: the mean, and every dimension "
        "is divided by its standard deviation so far; whitened: the mean, and all directions get the same spread",
    )
    steps: int = HfArg(default=600, help="of training; layers are judged before and after")
    length: int = HfArg(default=4096, help="of the sequences, and max_position_embeddings")
    rows: int = HfArg(default=1, help="sequences of a batch")
    learning_rate: float = 1e-3


def build(hidden_size: int, positions: str, args: Arguments) -> ReformerForCausalLM:
    fields = {"hidden_size": hidden_size, "position_embedding_type": positions, "is_decoder": True, "vocab_size": 256}
    fields |= {"max_position_embeddings": args.length, **parse_overrides(args.overrides)}
    return ReformerForCausalLM(ReformerConfig(**fields, pad_token_id=None, eos_token_id=None))


def balance(model: ReformerForCausalLM, ids: torch.Tensor) -> dict[int, dict[str, float]]:
    """Compute the bucket entropy and the largest bucket of every lsh layer, by layer number."""
    kinds, numbers = model.config.attn_layers, {}
    for layer in (number for number, kind in enumerate(kinds) if kind == "lsh"):
        found = bucket_balance(view_layer(model.eval(), ids, layer))
        numbers[layer] = {"entropy": found["entropy"], "fullest": found["largest"]}
    return numbers


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Arguments, SHORT, argv)
    centers = {
        "mean": nullcontext,
        "followed": followed_center,
        "scaled": scaled_hashing,
        "whitened": whitened_hashing,
    }
    if args.center not in centers:
        raise SystemExit(f"--center {args.center}: one of {', '.join(centers)}.")
    with centers[args.center]():
        measure(args)


def measure(args: Arguments) -> None:
    experiment = Experiment("bucket_balance", args, KEYS, ("entropy", "fullest"))
    (text, held_out), rows = read_texts(args), []
    ids = even_rows(held_out, args.eval_rows, args.length)
    fixed = {name: getattr(args, name) for name in KEYS if hasattr(args, name) and name not in ("steps", "positions")}
    fixed |= {"source": "demo" if args.train_file is None else args.train_file.stem, "validated_on": args.validate_on}
    for choice in product(seed=args.seeds, hidden_size=args.widths, positions=args.positions):
        key = {**fixed, **choice}
        set_seed(key["seed"])
        model = build(key["hidden_size"], key["positions"], args)
        for steps in (0, args.steps):
            if not experiment.results.find({**key, "steps": steps}):
                if steps:
                    name = f"{key['positions']}, width {key['hidden_size']}"
                    checkpoint = experiment.checkpoint({**key, "steps": steps})
                    train(
                        model, text_batches(text, "plain", args.rows, args.length), steps, seed=key["seed"],
                        learning_rate=args.learning_rate, checkpoint=checkpoint, name=name,
                    )  # fmt: skip
                for layer, numbers in balance(model, ids).items():
                    experiment.results.add({**key, "steps": steps, "layer": layer}, numbers)
            rows += experiment.results.find({**key, "steps": steps})
    for value in ("entropy", "fullest"):
        print(f"\n{value}\n{table(rows, ['hidden_size', 'positions', 'steps'], 'layer', value)}")
    draw(experiment, rows)


def draw(experiment: Experiment, rows: list[dict[str, str]]) -> None:
    """Plot the results: a color per kind of positions, a marker per width; dashed before training."""
    figure, axes = experiment.figure(2)
    kinds, widths = (list(dict.fromkeys(row[name] for row in rows)) for name in ("positions", "hidden_size"))
    for ax, value, goal in zip(axes, ("entropy", "fullest"), (0.85, 4), strict=True):
        for name in dict.fromkeys((row["hidden_size"], row["positions"], row["steps"]) for row in rows):
            width, kind, steps = name
            some = [row for row in rows if (row["hidden_size"], row["positions"], row["steps"]) == name]
            layers = sorted({int(row["layer"]) for row in some})
            means = []
            for layer in layers:
                numbers = [float(row[value]) for row in some if row["layer"] == str(layer)]
                means.append(sum(numbers) / len(numbers))
            ax.plot(
                layers, means, "--" if steps == "0" else "-", color=f"C{kinds.index(kind)}",
                marker="os^v"[widths.index(width) % 4], label=f"width {width}, {kind}, {steps} steps",
            )  # fmt: skip
        ax.axhline(goal, color="gray", linewidth=1)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set(xlabel="LSH layer", ylabel="entropy" if value == "entropy" else "fullest bucket / even share")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=7)
    experiment.save(figure)


if __name__ == "__main__":
    main()
