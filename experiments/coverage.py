"""Does the coverage loss make attention reach all tokens, and does it help if the answer depends on all of them?

    python experiments/coverage.py                                        # a few minutes on two cores
    python experiments/coverage.py --train_file a.parquet --validation_file b.parquet --steps 200

Without files, the task is majority: a few marked tokens, each a 0 or a 1, are at random positions among random tokens;
which of the two is more frequent? A causal model answers at the last token. With files (columns `text` and `label`), a
bidirectional model predicts the label of each text.

For every seed, a model is trained with each weight of the coverage loss, on the same data from the same initial
weights. The output has a line per run, and finally the means over seeds.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Value

from hf_reformer import ReformerConfig, ReformerForSequenceClassification
from hf_reformer.data.bpe_tokenizer import train_bpe_tokenizer
from hf_reformer.data.tables import read_examples
from hf_reformer.ops.coverage import covered_fraction, mass_entropy
from hf_reformer.training.coverage_callback import attention_mass_by_layer

NOISE = 30  # number of meaningless tokens; the two marked ones follow
ZERO, ONE = NOISE, NOISE + 1
Batch = dict[str, torch.Tensor]


class Majority:
    """The task of deciding which of two marked tokens is in the majority."""

    vocab_size, num_labels, pad_token_id = NOISE + 2, 2, 0

    def __init__(self, arguments: argparse.Namespace):
        self.is_decoder = not arguments.bidirectional
        self.rows, self.length, self.marked = arguments.rows, arguments.length, arguments.marked

    def training(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield self.batch(self.rows, generator)

    def validation(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(10**6)
        return [self.batch(64, generator) for _ in range(4)]

    def batch(self, rows: int, generator: torch.Generator) -> Batch:
        tokens = torch.randint(1, NOISE, (rows, self.length), generator=generator)
        positions = torch.rand(rows, self.length, generator=generator).argsort(-1)[:, : self.marked]
        bits = torch.randint(0, 2, (rows, self.marked), generator=generator)
        return {
            "input_ids": tokens.scatter_(1, positions, ZERO + bits),
            "attention_mask": torch.ones_like(tokens),
            "labels": (2 * bits.sum(-1) > self.marked).long(),
        }


class Documents:
    """The task of predicting the label of a text."""

    is_decoder = False

    def __init__(self, arguments: argparse.Namespace):
        self.rows = arguments.rows
        files = arguments.train_file, arguments.validation_file
        self.train, held_out = (read_examples(file).cast_column("label", Value("int64")) for file in files)
        self.tokenizer = train_bpe_tokenizer(self.train["text"], 2000, arguments.length)
        self.vocab_size, self.pad_token_id = len(self.tokenizer), self.tokenizer.pad_token_id
        self.num_labels = max(self.train["label"]) + 1
        self.held_out = [self.batch(held_out[i : i + 10]) for i in range(0, len(held_out), 10)]

    def training(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            for rows in torch.randperm(len(self.train), generator=generator).split(self.rows):
                yield self.batch(self.train[rows.tolist()])

    def validation(self) -> list[Batch]:
        return self.held_out

    def batch(self, rows: dict[str, list]) -> Batch:
        encoded = self.tokenizer(rows["text"], padding=True, truncation=True, return_tensors="pt")
        return {**encoded, "labels": torch.tensor(rows["label"])}


def train(task: Majority | Documents, seed: int, weight: float, arguments: argparse.Namespace) -> Any:
    """Train one model."""
    torch.manual_seed(seed)
    config = ReformerConfig(
        vocab_size=task.vocab_size, pad_token_id=task.pad_token_id, hidden_size=64, num_attention_heads=2,
        attention_head_size=32, feed_forward_size=128, attn_layers=arguments.attn_layers, is_decoder=task.is_decoder,
        max_position_embeddings=arguments.length, lsh_window=arguments.window, local_window=arguments.window,
        hidden_dropout_prob=0.0, coverage_loss_weight=weight, initializer_range=arguments.initializer_range,
        num_labels=task.num_labels,
    )  # fmt: skip
    model = ReformerForSequenceClassification(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _, batch in zip(range(arguments.steps), task.training(seed), strict=False):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def evaluate(model: Any, task: Majority | Documents) -> dict[str, float]:
    """Compute means over the validation examples."""
    sums: Counter[str] = Counter()
    for batch in task.validation():
        out = model(**batch, output_coverage=False)
        mask, labels = batch["attention_mask"], batch["labels"]
        mass = attention_mass_by_layer(model, batch["input_ids"], attention_mask=mask)
        means = {
            "task loss": out.loss,
            "accuracy": (out.logits.argmax(-1) == labels).double().mean(),
            "tokens reached": covered_fraction(mass, mask).mean(),
            "entropy": mass_entropy(mass, mask).mean(),
        }
        sums.update({name: len(labels) * mean.item() for name, mean in means.items()}, examples=len(labels))
    examples = sums.pop("examples")
    return {name: total / examples for name, total in sums.items()}


def mass_percentiles(model: Any, batch: Batch) -> torch.Tensor:
    """Compute percentiles 0 to 100 of attention mass over the uniform share: means over layers and sequences."""
    masks, curves = batch["attention_mask"].bool(), []
    masses = attention_mass_by_layer(model, batch["input_ids"], attention_mask=batch["attention_mask"])
    for mass, mask in zip(masses.unbind(1), masks, strict=True):
        real = mass[:, mask].float()  # (layers, tokens)
        curves.append(torch.quantile(real * real.shape[1], torch.linspace(0, 1, 101), dim=1).mean(1))
    return torch.stack(curves).mean(0)


def draw(curves: dict[str, torch.Tensor], file: Path) -> None:
    """Plot the results of `mass_percentiles`, a line for each weight."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    ax = figure.subplots()
    for name, curve in curves.items():
        ax.plot(range(101), curve.clamp(min=1e-4), label=name)
    ax.axhline(0.1, color="gray", linestyle="--", linewidth=1)
    ax.set(
        yscale="log", xlabel="tokens, least attention received first (%)", ylabel="attention received / uniform share"
    )
    ax.legend(frameon=False)
    figure.savefig(file, dpi=120)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, nargs="+", default=[0.0, 0.1, 1.0], help="of the coverage loss")
    parser.add_argument("--attn_layers", nargs="+", default=["lsh", "lsh"], help="attention type of every layer")
    parser.add_argument("--window", type=int, default=32, help="window of lsh and local layers")
    parser.add_argument("--initializer_range", type=float, default=0.125, help="default: width^-0.5")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=16, help="examples of a training batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of an example; longer texts are truncated")
    parser.add_argument("--marked", type=int, default=9, help="marked tokens; odd, so that there is a majority")
    parser.add_argument("--bidirectional", action="store_true", help="use a bidirectional model for the majority task")
    parser.add_argument("--train_file", type=Path, help="texts and labels, instead of the task above")
    parser.add_argument("--validation_file", type=Path)
    parser.add_argument("--picture", type=Path, help="plot the attention received, for the first seed, to this file")
    arguments = parser.parse_args(argv)
    if arguments.marked % 2 == 0 or arguments.marked > arguments.length:
        parser.error(f"--marked {arguments.marked} must be odd and at most --length {arguments.length}.")
    for name in ("seeds", "steps", "rows", "length", "marked"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1.")
    if (arguments.train_file is None) != (arguments.validation_file is None):
        parser.error("Give --train_file and --validation_file together.")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    task = Majority(arguments) if arguments.train_file is None else Documents(arguments)
    means: list[str] = []
    curves: dict[str, torch.Tensor] = {}
    for weight in arguments.weights:
        runs = []
        for seed in range(arguments.seeds):
            model = train(task, seed, weight, arguments)
            runs.append(evaluate(model, task))
            curves.setdefault(f"weight {weight:g}", mass_percentiles(model, task.validation()[0]))
            print(format_line(f"weight {weight:g}, seed {seed}", runs[-1]), flush=True)
        mean = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
        means.append(format_line(f"weight {weight:g}, mean", mean))
    print(*means, sep="\n")
    if arguments.picture is not None:
        draw(curves, arguments.picture)


def format_line(name: str, numbers: dict[str, float]) -> str:
    return f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in numbers.items())


if __name__ == "__main__":
    main()
