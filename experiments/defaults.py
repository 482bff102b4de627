"""Which defaults let a model of any width learn? A sweep over fields of the config.

    python experiments/defaults.py --settings "" initializer_range=0.05 initializer_range=0.05,num_hashes=4
    python experiments/defaults.py --tasks majority --widths 64 128 --seeds 0 1 2

Models are `ReformerConfig(hidden_size=…)` with the fields of a setting, and the defaults otherwise. `lm` is a causal
byte model, evaluated in bits per byte; `majority` is a bidirectional classifier of sequences in which a few tokens at
random positions are 0 or 1 and the label is their majority (`coverage.Majority`), evaluated by accuracy.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from common import (
    Experiment,
    Options,
    TextOptions,
    bits_per_byte,
    parse,
    product,
    read_texts,
    table,
    text_batches,
    text_rows,
    train,
)
from coverage import Majority
from transformers import set_seed
from transformers.hf_argparser import HfArg

from hf_reformer import ReformerConfig, ReformerForCausalLM, ReformerForSequenceClassification
from hf_reformer.training.model_setup import parse_overrides

KEYS = (
    "task", "hidden_size", "setting", "seed", "steps", "length", "rows", "learning_rate", "source", "validated_on",
)  # fmt: skip
SHORT = {"widths": [64, 128], "settings": ["", "initializer_range=0.1"], "steps": 6, "length": 256, "rows": 2}


@dataclass
class Arguments(TextOptions, Options):
    settings: list[str] = HfArg(default_factory=lambda: [""], help="fields of a model: a=1,b=word")
    tasks: list[str] = HfArg(default_factory=lambda: ["lm", "majority"], help="lm, majority or both")
    widths: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    steps: int = 300
    length: int = 1024
    rows: int = HfArg(default=8, help="sequences of a batch")
    marked: int = HfArg(default=33, help="majority: how many tokens count")
    learning_rate: float = 1e-3


def run(
    key: dict[str, Any], args: Arguments, experiment: Experiment, texts: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Train and evaluate one model."""
    set_seed(key["seed"])
    fields = {"hidden_size": key["hidden_size"], "max_position_embeddings": args.length, "pad_token_id": None}
    fields |= parse_overrides(args.overrides) | parse_overrides(key["setting"])
    options: dict[str, Any] = {"seed": key["seed"], "learning_rate": args.learning_rate}
    options |= {
        "checkpoint": experiment.checkpoint(key),
        "name": " ".join(str(value) for value in list(key.values())[:4]),
    }
    if key["task"] == "lm":
        model: Any = ReformerForCausalLM(ReformerConfig(**{"vocab_size": 256, "is_decoder": True, **fields}))
        losses = train(model, text_batches(texts[0], "plain", args.rows, args.length), args.steps, **options)
        judged = text_rows(texts[1], "plain", args.eval_rows, args.length, torch.Generator(), even=True)
        score = bits_per_byte(model, *judged)["bits"]
    else:
        sizes = {"bidirectional": True, "rows": args.rows, "length": args.length, "marked": args.marked}
        task = Majority(argparse.Namespace(**sizes))
        model = ReformerForSequenceClassification(ReformerConfig(**{"vocab_size": task.vocab_size, **fields}))
        losses = train(model, lambda generator: task.batch(args.rows, generator), args.steps, **options)
        with torch.no_grad():
            hits = [model(**batch).logits.argmax(-1) == batch["labels"] for batch in task.validation()]
        score = torch.cat(hits).float().mean().item()
    return {"score": score, "train_loss": sum(losses[-50:]) / len(losses[-50:])}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Arguments, SHORT, argv)
    experiment = Experiment("defaults", args, KEYS, ("score", "train_loss"))
    texts, rows = read_texts(args), []
    fixed = {name: getattr(args, name) for name in KEYS if hasattr(args, name)}
    fixed |= {"source": "demo" if args.train_file is None else args.train_file.stem, "validated_on": args.validate_on}
    settings = [",".join(filter(None, (args.overrides, setting))) for setting in args.settings]
    for choice in product(seed=args.seeds, task=args.tasks, hidden_size=args.widths, setting=settings):
        key = {**choice, **fixed}
        if not experiment.results.find(key):
            experiment.results.add(key, run(key, args, experiment, texts))
        rows += experiment.results.find(key)
    print("\nbits per byte (lm) and accuracy (majority)\n" + table(rows, ["task", "setting"], "hidden_size", "score"))
    figure, axes = experiment.figure(len(args.tasks))
    for ax, task in zip(axes, args.tasks, strict=True):
        for setting in settings:
            some = [row for row in rows if (row["task"], row["setting"]) == (task, setting)]
            scores = [float(row["score"]) for row in some]
            ax.plot([row["hidden_size"] for row in some], scores, "o", label=setting or "defaults")
        ax.set(xlabel="width", ylabel="bits per byte" if task == "lm" else "accuracy", title=task)
        ax.legend(frameon=False, fontsize=7)
    experiment.save(figure)


if __name__ == "__main__":
    main()
