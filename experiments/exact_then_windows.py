"""How much does a model trained with exact attention lose when hashing chooses the keys instead?

    python experiments/exact_then_windows.py --train_file book.txt
    python experiments/exact_then_windows.py --train_file book.txt --validation_file end.txt \\
        --validate_on validation_file --seeds 0 1 2

A byte language model is trained while its lsh layers see all previous tokens (shared queries and keys). Then they are
evaluated with their windows, in `rounds` hash rounds. A row of the CSV is a way to choose keys and a number of rounds:

    exact      all previous tokens
    lsh, lsh-uncentered   hashing as configured, and without subtracting the mean (`lsh_centering=False`)
    lsh-0.75   hashing with this share of the mean subtracted (`lsh_centering=0.75`)
    lsh-unrotated   hashing of vectors before they are rotated by position, with the mean subtracted
    lsh-whitened   hashing with the mean subtracted and all directions given the same spread
    random     hashing of random vectors
    local      no hashing, but as many more keys in the local window: rounds × lsh window
    none       the local window only

`loss` is the loss compared to exact attention, in bits per byte. `found` is the share of the exact softmax's mass
beyond the local window that falls on the chosen keys, `best` the share that the best choice of as many keys would
find, averaged over layers and heads (`hf_reformer.analysis.attention_found`).
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from common import (
    Experiment,
    Options,
    TextOptions,
    bits_per_byte,
    hashing_of,
    make_model,
    only_local,
    parse,
    product,
    random_hashing,
    read_texts,
    running_mean,
    see_all,
    table,
    text_rows,
    train_on_text,
    whitened_hashing,
)
from transformers import set_seed
from transformers.hf_argparser import HfArg

from hf_reformer.analysis import attention_found

KEYS = (
    "source", "text", "seed", "length", "steps", "answer_steps", "rows", "hidden_size", "layers", "local_window",
    "lsh_window", "num_buckets", "learning_rate", "overrides", "validated_on", "eval_rows", "keys_by", "rounds",
)  # fmt: skip
VALUES = ("bits", "far_bits", "loss", "far_loss", "found", "best")
ONCE = ("exact", "none")  # rounds make no difference
LABELS = {
    "exact": "exact attention", "none": "the local window alone", "lsh": "hashed",
    "lsh-uncentered": "hashed with their mean", "lsh-0.5": "hashed with half of their mean",
    "lsh-0.75": "hashed with a quarter of their mean", "lsh-whitened": "hashed, whitened",
    "lsh-unrotated": "hashed before rotation",
    "random": "random vectors hashed", "local": "as many more local keys",
}  # fmt: skip
SHORT = {
    "length": 512, "steps": 20, "rows": 2, "hidden_size": 64, "local_window": 16, "lsh_window": 16, "eval_rows": 2,
    "texts": ["far"], "num_buckets": 16, "rounds": [1, 4],
}  # fmt: skip


@dataclass
class Arguments(TextOptions, Options):
    texts: list[str] = HfArg(default_factory=lambda: ["plain", "far"], help="plain, far, recall")
    keys_by: list[str] = field(default_factory=lambda: ["lsh", "lsh-uncentered", "random", "local"])
    rounds: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    length: int = 1024
    steps: int = 1000
    answer_steps: int = HfArg(
        default=0, help="before them, in which the far answers alone are learned; not plain text"
    )
    rows: int = HfArg(default=8, help="sequences of a batch")
    hidden_size: int = 128
    layers: list[str] = field(default_factory=lambda: ["local", "lsh", "local", "lsh"])
    local_window: int = HfArg(default=32, help="in training that of local layers alone")
    lsh_window: int = HfArg(default=16, help="in evaluation; in training lsh layers see all")
    num_buckets: int = 32
    learning_rate: float = 2e-3


@contextmanager
def keys_chosen(model: Any, by: str, rounds: int, args: Arguments) -> Iterator[dict[str, int]]:
    """Make lsh layers see the chosen keys within this context, and yield the extra inputs that a forward needs."""
    with contextlib.ExitStack() as contexts:
        if by == "exact":
            contexts.enter_context(see_all(model))
        elif by in ("local", "none"):
            more = 0 if by == "none" else rounds * args.lsh_window
            contexts.enter_context(only_local(model, args.local_window + more))
        elif by == "random":
            contexts.enter_context(random_hashing())
        elif by == "lsh-whitened":
            contexts.enter_context(whitened_hashing())
        elif by.startswith("lsh-"):
            share = 0.0 if by in ("lsh-uncentered", "lsh-unrotated") else float(by.removeprefix("lsh-"))
            if by == "lsh-unrotated":
                contexts.enter_context(hashing_of(lambda units: units - running_mean(units)))
            for layer in model.model.layers:
                if layer.attention.kind == "lsh":
                    contexts.enter_context(patch.object(layer.attention, "centering", share))
        yield {"num_hashes": 1 if by in ("exact", "local", "none") else rounds}


def mass_found(model: Any, ids: torch.Tensor, by: str, rounds: int, args: Arguments) -> dict[str, float]:
    """Compute shares of exact attention's mass beyond the local window, averaged over layers and heads (see above)."""
    if by in ONCE:
        return {"found": float(by == "exact"), "best": math.nan}
    with keys_chosen(model, "lsh" if by == "local" else by, rounds, args):  # "local": as many keys as hashing shows
        layers = attention_found(model.eval(), {"input_ids": ids}, num_hashes=rounds)
    shares = {"found": "more_local" if by == "local" else "hashed", "best": "best"}
    return {name: torch.stack([getattr(x, share) for x in layers]).mean().item() for name, share in shares.items()}


def evaluate(model: Any, judged: Any, by: str, rounds: int, args: Arguments) -> dict[str, float]:
    with keys_chosen(model, by, rounds, args) as inputs:
        return bits_per_byte(model, *judged, **inputs)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Arguments, SHORT, argv)
    experiment = Experiment("exact_then_windows", args, KEYS, VALUES)
    texts, rows = read_texts(args), []
    fixed = {name: getattr(args, name) for name in KEYS if hasattr(args, name) and name not in ("keys_by", "rounds")}
    fixed |= {"layers": " ".join(args.layers), "source": "demo" if args.train_file is None else args.train_file.stem}
    choices = [(by, 0) for by in ONCE] + [(by, rounds) for rounds in args.rounds for by in args.keys_by]
    for choice in product(seed=args.seeds, text=args.texts):
        key = {**fixed, **choice, "validated_on": args.validate_on}
        key["answer_steps"] = 0 if choice["text"] == "plain" else args.answer_steps
        wanted = [{**key, "keys_by": by, "rounds": rounds} for by, rounds in choices]
        if not all(map(experiment.results.find, wanted)):
            measure(key, wanted, args, experiment, texts)
        rows += [row for one in wanted for row in experiment.results.find(one)]
    for value in ("loss", "far_loss", "found", "best"):
        print(f"\n{value}\n{table(rows, ['text', 'keys_by'], 'rounds', value)}")
    draw(experiment, rows, args)


def measure(
    key: dict[str, Any],
    wanted: list[dict[str, Any]],
    args: Arguments,
    experiment: Experiment,
    texts: Sequence[torch.Tensor],
) -> None:
    """Train a model, and evaluate it in all the wanted ways."""
    set_seed(key["seed"])
    model = make_model(
        args.length, args.hidden_size, args.layers, args.overrides, local_window=args.local_window,
        lsh_window=args.lsh_window, num_buckets=args.num_buckets, num_hashes=1, lsh_exploration_orders=0,
    )  # fmt: skip
    trained = {name: value for name, value in key.items() if name != "lsh_window"}
    with see_all(model):
        train_on_text(model, texts[0], trained, experiment, name=f"{key['text']}, seed {key['seed']}")
    generator = torch.Generator().manual_seed(12345)
    judged = text_rows(texts[1], key["text"], args.eval_rows, args.length, generator, even=True)
    exact = evaluate(model, judged, "exact", 0, args)
    for row in wanted:
        if not experiment.results.find(row):
            bits = evaluate(model, judged, row["keys_by"], row["rounds"], args)
            losses = {"loss": bits["bits"] - exact["bits"], "far_loss": bits["far_bits"] - exact["far_bits"]}
            found = mass_found(model, judged[0][:4], row["keys_by"], row["rounds"], args)
            experiment.results.add(row, {**bits, **losses, **found})


def draw(experiment: Experiment, rows: list[dict[str, str]], args: Arguments) -> None:
    """Plot the loss on all bytes and on distant answers, and the mass found, for every text."""
    panels = [
        (text, value)
        for text in args.texts
        for value in ("loss", "far_loss", "found")
        if (text, value) != ("plain", "far_loss")
    ]
    figure, axes = experiment.figure(len(panels), width=4)
    for ax, (text, value) in zip(axes, panels, strict=True):
        for by in dict.fromkeys(row["keys_by"] for row in rows):
            some = [row for row in rows if (row["text"], row["keys_by"]) == (text, by)]
            if by not in ONCE:
                ax.plot(args.rounds, means(some, value, args.rounds), "o-", label=LABELS[by])
            elif value != "found":
                (mean,) = means(some, value, [0])
                ax.axhline(mean, color="gray", linestyle=":" if by == "none" else "-", label=LABELS[by])
        if value == "found":
            some = [row for row in rows if (row["text"], row["keys_by"]) == (text, "lsh")]
            if some:
                ax.plot(args.rounds, means(some, "best", args.rounds), ":", color="gray", label="the best keys")
            ax.set(ylabel="share of attention found", ylim=(0, 1))
        else:
            ax.set_ylabel("bits per byte above exact attention")
        what = {"loss": "all bytes", "far_loss": "far answers", "found": f"rows of {args.length} bytes"}[value]
        ax.set_xscale("log", base=2)
        ax.set_xticks(args.rounds, [str(number) for number in args.rounds])
        ax.set(title=f"{text} text, {what}", xlabel="hash rounds")
    lines = {line.get_label(): line for ax in axes for line in ax.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    experiment.save(figure)


def means(rows: list[dict[str, str]], value: str, rounds: Sequence[int]) -> list[float]:
    """Compute the means of a column over seeds, by number of rounds."""
    groups = [[float(row[value]) for row in rows if row["rounds"] == str(number)] for number in rounds]
    return [sum(group) / len(group) for group in groups]


if __name__ == "__main__":
    main()
