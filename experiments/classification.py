"""How accurate is the classification recipe with its defaults, and do first tokens that are visible to all improve it?

    python experiments/classification.py --train_file train.parquet --validation_file validation.parquet
    python experiments/classification.py --train_file train.jsonl --variants defaults sinks random --seeds 0 1 2

    defaults    `hf-reformer train classification` with no other options
    sinks       the same, but every layer also sees the first four tokens of the text
    random      the same as defaults, but its lsh layers hash random vectors

Without a validation file, a tenth of the training texts is held out for evaluation, to choose by.
"""

import contextlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import Experiment, Options, demo_text, parse, product, random_hashing, sink_tokens, table
from transformers.hf_argparser import HfArg

from hf_reformer.recipes.classification import main as train_classification

VARIANTS: dict[str, Any] = {
    "defaults": contextlib.nullcontext,
    "sinks": lambda: sink_tokens(4),
    "random": random_hashing,
}
KEYS = ("data", "variant", "seed", "options", "judged_on")
SHORT = {
    "options": "--hidden_size 64 --num_train_epochs 1 --max_length 256 --tokenizer bytes",
    "variants": ["defaults", "sinks"],
}  # fmt: skip


@dataclass
class Arguments(Options):
    train_file: Path | None = HfArg(default=None, help="columns text and label; default: pieces of installed code")
    validation_file: Path | None = None
    variants: list[str] = field(default_factory=lambda: ["defaults"])
    options: str = HfArg(default="", help="of the recipe, besides the defaults")


def demo_file(folder: Path) -> Path:
    """Write a file of 64 pieces of code, labeled by whether they are in upper or lower case."""
    code = demo_text().decode(errors="ignore")
    rows = [code[64 * i : 64 * (i + 1)] for i in range(64)]
    cases = [{"text": row.upper() if i % 2 else row.lower(), "label": i % 2} for i, row in enumerate(rows)]
    file = folder / "cases.jsonl"
    file.write_text("\n".join(map(json.dumps, cases)))
    return file


def accuracy(variant: str, seed: int, args: Arguments) -> float:
    """Return the accuracy of one run of the recipe."""
    with tempfile.TemporaryDirectory() as folder, VARIANTS[variant]():
        options = ["--train_file", str(args.train_file or demo_file(Path(folder))), "--seed", str(seed)]
        if args.validation_file is not None:
            options += ["--validation_file", str(args.validation_file)]
        options += ["--output_dir", f"{folder}/model", "--save_strategy", "no", *args.options.split()]
        train_classification(options)
        scores = json.loads(Path(folder, "model", "validation_results.json").read_text())
    return scores["validation_accuracy"]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Arguments, SHORT, argv)
    experiment = Experiment("classification", args, KEYS, ("accuracy",))
    judged_on = "a tenth of train" if args.validation_file is None else args.validation_file.name
    data, rows = "demo" if args.train_file is None else args.train_file.name.split(".")[0], []
    for choice in product(seed=args.seeds, variant=args.variants):
        key = {"data": data, "options": args.options, "judged_on": judged_on} | choice
        if not experiment.results.find(key):
            experiment.results.add(key, {"accuracy": accuracy(choice["variant"], choice["seed"], args)})
        rows += experiment.results.find(key)
    print("\n" + table(rows, ["data", "variant"], "judged_on", "accuracy"))
    draw(experiment, experiment.results.rows())


def draw(experiment: Experiment, rows: list[dict[str, str]]) -> None:
    """Plot the accuracies of all runs so far."""
    figure, (ax,) = experiment.figure(width=7)

    def name_of(row: dict[str, str]) -> str:
        return f"{row['data']}\n{'validation file' if '.validation.' in row['judged_on'] else row['judged_on']}"

    names = list(dict.fromkeys(map(name_of, rows)))
    for variant, marker in zip(VARIANTS, "osx", strict=True):
        if some := [row for row in rows if row["variant"] == variant]:
            places = [names.index(name_of(row)) for row in some]
            ax.plot(places, [float(row["accuracy"]) for row in some], marker, label=variant, alpha=0.7)
    ax.set_xticks(range(len(names)), names)
    ax.set(ylabel="accuracy", ylim=(0, 1))
    ax.grid(axis="y", alpha=0.3)
    ax.legend(frameon=False)
    experiment.save(figure)


if __name__ == "__main__":
    main()
