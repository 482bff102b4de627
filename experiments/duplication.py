"""Learn to copy: the duplication task of the paper (section 5.1), a test of whether LSH attention can learn.

A sequence is 0 w 0 w with a random word w. The model predicts the second w, each symbol of which occurred half the
sequence earlier. Only hashing can find it: the position order is off and the windows are short. Prints the accuracy
with full attention and with 1, 2, 4 and 8 hash rounds at evaluation, per seed, next to the paper's Table 2.

    python experiments/duplication.py --train_with 2 --seeds 0 1 2                  # 128 tokens: minutes
    python experiments/duplication.py --length 1024 --window 96 --chunk 64 --hidden_size 256 --num_attention_heads 4 \\
        --steps 20000 --attention_modes window chunk                                # the paper's table

Full attention (`--train_with 0`) is that of an LSH layer whose windows, or whose only chunk, show all previous tokens.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import Experiment, Inputs, Options, layer_config, parse, product, table, train
from transformers import set_seed
from transformers.hf_argparser import HfArg

from hf_reformer import ReformerConfig, ReformerForCausalLM
from hf_reformer.training.model_setup import parse_overrides

FULL = 0  # represented as a number of rounds
ROUNDS = (FULL, 8, 4, 2, 1)
# Kitaev, Kaiser and Levskaya 2020 (arXiv 2001.04451), Table 2: percent by training rounds, for ROUNDS.
PAPER = {
    FULL: (100, 94.8, 92.5, 76.9, 52.5),
    4: (0.8, 100, 99.9, 99.4, 91.9),
    2: (0.8, 100, 99.9, 98.1, 86.8),
    1: (0.8, 99.9, 99.6, 94.8, 77.9),
}
KEYS = (
    "attention_mode", "trained_with", "seed", "length", "steps", "target", "symbols", "window", "chunk", "num_buckets",
    "hidden_size", "num_attention_heads", "batch_size", "learning_rate", "overrides", "evaluated_with",
)  # fmt: skip
SHORT = {
    "train_with": [0, 2], "length": 64, "symbols": 15, "window": 8, "chunk": 8, "hidden_size": 64, "steps": 60,
    "evaluate_every": 20, "num_attention_heads": 1, "learning_rate": 3e-3, "seeds": [0],
}  # fmt: skip


@dataclass
class Arguments(Options):
    attention_mode: str = HfArg(default="window", help="window or chunk")
    attention_modes: list[str] = HfArg(default_factory=list, help="several of them, one after the other")
    train_with: list[int] = HfArg(default_factory=lambda: [0, 4, 2, 1], help="hash rounds; 0: full attention")
    steps: int = HfArg(default=5000, help="maximum number of training steps")
    target: float = HfArg(
        default=0.99,
        help="stop when 4 rounds (if full attention is trained: that) reach this accuracy; above 1: never",
    )
    evaluate_every: int = 500
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    length: int = 128
    symbols: int = HfArg(default=127, help="size of the alphabet of w")
    window: int = HfArg(default=24, help="window mode: positions a token sees in each sort order")
    chunk: int = HfArg(default=16, help="chunk mode: chunk length, looking one chunk back")
    num_buckets: int = HfArg(
        default=0, help="0: 2 length / chunk in chunk mode, else a power of two of length / window"
    )
    hidden_size: int = 128
    num_attention_heads: int = 2
    batch_size: int = 16
    learning_rate: float = 1e-3


def make_model(args: Arguments, rounds: int = 2) -> ReformerForCausalLM:
    buckets = 2 * args.length // args.chunk
    if args.attention_mode == "window":
        buckets = 2 ** (args.length // args.window).bit_length()
    config = {
        "vocab_size": args.symbols + 1, "attn_layers": ["lsh"], "attention_mode": args.attention_mode,
        "hidden_size": args.hidden_size, "num_attention_heads": args.num_attention_heads,
        "attention_head_size": args.hidden_size // args.num_attention_heads, "feed_forward_size": 2 * args.hidden_size,
        "num_hashes": max(1, rounds), "num_buckets": args.num_buckets or buckets, "lsh_window": args.window,
        "lsh_include_local": False, "lsh_attn_chunk_length": args.chunk, "hidden_dropout_prob": 0.0,
        "max_position_embeddings": args.length, "position_embedding_type": "learned", "is_decoder": True,
        "pad_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return ReformerForCausalLM(ReformerConfig(**{**config, **parse_overrides(args.overrides)}))


@contextlib.contextmanager
def attention_of(model: ReformerForCausalLM, rounds: int) -> Any:
    """Make the model use full attention within this context if `rounds` is FULL."""
    attention: Any = model.model.layers[0].attention
    if rounds != FULL:
        yield
    elif attention.mode == "chunk":
        with patch.object(attention, "chunk", model.config.max_position_embeddings):
            yield
    else:
        every = {"lsh_include_local": True, "local_window": model.config.max_position_embeddings}
        with layer_config(model, "lsh", **every, lsh_exploration_orders=0):
            yield


def draw(args: Arguments, rows: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw sequences 0 w 0 w and their labels, -100 outside the second w: (rows, length) each."""
    half = args.length // 2
    word = torch.randint(1, args.symbols + 1, (rows, half - 1), generator=generator)
    word = torch.nn.functional.pad(word, (1, 0))  # 0 w
    labels = torch.cat([torch.full_like(word, -100), word], dim=1)
    labels[:, half] = -100
    return torch.cat([word, word], dim=1), labels


@torch.no_grad()
def accuracy(model: ReformerForCausalLM, args: Arguments, rounds: int) -> float:
    """Compute the accuracy on the second w, with the given number of hash rounds or with full attention."""
    ids, labels = draw(args, 64, torch.Generator().manual_seed(12345))
    model.eval()
    with attention_of(model, rounds):
        logits = torch.cat([model(some, num_hashes=max(1, rounds)).logits for some in ids.split(16)])
    guess, targets = logits[:, :-1].argmax(-1), labels[:, 1:]
    return (guess == targets)[targets != -100].float().mean().item()


def learn(args: Arguments, seed: int, rounds: int = 2, checkpoint: Path | None = None) -> tuple[int, dict[int, float]]:
    """Train one model, and return the steps used and the accuracy by number of rounds."""
    set_seed(seed)
    model, name = make_model(args, rounds), "full attention" if rounds == FULL else f"{rounds} rounds"

    def batch(generator: torch.Generator) -> Inputs:
        ids, labels = draw(args, args.batch_size, generator)
        return {"input_ids": ids, "labels": labels}

    def watch(step: int, state: dict[str, Any]) -> bool:
        return accuracy(model, args, FULL if rounds == FULL else 4) >= args.target

    with attention_of(model, rounds):
        losses = train(
            model, batch, args.steps, seed=seed, learning_rate=args.learning_rate, warmup=0, decay=True,
            clip=float("inf"), weight_decay=0.0, watch=watch, watch_every=args.evaluate_every, checkpoint=checkpoint,
            name=f"{args.attention_mode}, {name}, seed {seed}",
        )  # fmt: skip
    return len(losses), {number: accuracy(model, args, number) for number in ROUNDS}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Arguments, SHORT, argv)
    experiment = Experiment("duplication", args, KEYS, ("accuracy", "steps_used"))
    rows = []
    for choice in product(
        attention_mode=args.attention_modes or [args.attention_mode], seed=args.seeds, trained_with=args.train_with
    ):
        own = replace(args, attention_mode=choice["attention_mode"])
        key = {name: getattr(own, name) for name in KEYS if hasattr(own, name)} | choice
        key["chunk"] = args.chunk if own.attention_mode == "chunk" else 0  # windows have none
        wanted = [{**key, "evaluated_with": number} for number in ROUNDS]
        if not all(map(experiment.results.find, wanted)):
            steps, found = learn(own, key["seed"], key["trained_with"], experiment.checkpoint(key))
            for row in wanted:
                if not experiment.results.find(row):
                    experiment.results.add(row, {"accuracy": found[row["evaluated_with"]], "steps_used": steps})
        rows += [row for one in wanted for row in experiment.results.find(one)]
    print("\n" + table(rows, ["attention_mode", "trained_with"], "evaluated_with", "accuracy"))
    print(f"0: full attention\n\nthe paper, percent by evaluation with {ROUNDS}:")
    print(*(f"trained with {rounds}: {shares}" for rounds, shares in PAPER.items()), sep="\n")
    plot(experiment, rows)


def plot(experiment: Experiment, rows: list[dict[str, str]]) -> None:
    """Plot our accuracies and the paper's as tables."""
    tables: dict[str, dict[tuple[int, int], float]] = {}
    cells = ("attention_mode", "length", "trained_with", "evaluated_with")
    for mode, length, trained, evaluated in dict.fromkeys(tuple(row[name] for name in cells) for row in rows):
        same = [row for row in rows if tuple(row[name] for name in cells) == (mode, length, trained, evaluated)]
        mean = sum(float(row["accuracy"]) for row in same) / len(same)
        tables.setdefault(f"{mode}s, {length} tokens", {})[int(trained), int(evaluated)] = mean
    tables["paper"] = {(t, e): x / 100 for t, shares in PAPER.items() for e, x in zip(ROUNDS, shares, strict=True)}
    figure, axes = experiment.figure(len(tables), width=4)
    for ax, (title, shares) in zip(axes, tables.items(), strict=True):
        trainings = sorted({trained for trained, _ in shares}, key=list(PAPER).index)
        ax.imshow([[shares[t, e] for e in ROUNDS] for t in trainings], vmin=0, vmax=1, cmap="Blues", aspect="auto")
        for down, trained in enumerate(trainings):
            for across, evaluated in enumerate(ROUNDS):
                share = shares[trained, evaluated]
                color = "white" if share > 0.6 else "black"
                ax.text(across, down, f"{100 * share:.1f}", ha="center", va="center", color=color)
        ax.set_xticks(range(len(ROUNDS)), [str(number or "full") for number in ROUNDS])
        ax.set_yticks(range(len(trainings)), [str(number or "full") for number in trainings])
        ax.set(title=title, xlabel="rounds in evaluation", ylabel="rounds in training")
    experiment.save(figure)


if __name__ == "__main__":
    main()
