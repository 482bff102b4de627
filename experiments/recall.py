"""Can lsh layers recall what lies far beyond every local window? A task of many key–value pairs, each queried later.

    python experiments/recall.py --seeds 0 1 2                             # lsh layers, and local ones instead
    python experiments/recall.py --start_length 128 --lengths 2048 4096    # a curriculum that doubles the length

A row of random tokens holds `pairs` keys, each followed by its value, at random positions in its first half. In its
last quarter every key recurs, in another order, and the model must predict the value. So at least a quarter of the row
lies between, and local layers can only guess: 1 / `values`. Shorter rows hold fewer pairs, one per 16 tokens.

Lsh layers hash as usual; or random vectors, as a control; or they see all previous tokens (`variants`). Training
starts at `start_length`. When rows of that length are recalled (`target`, or after `stage_steps`), the length doubles,
up to the longest of `lengths`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from common import (
    Experiment,
    Inputs,
    Options,
    make_model,
    parse,
    product,
    random_hashing,
    see_all,
    table,
    train,
)
from transformers import set_seed
from transformers.hf_argparser import HfArg

KEYS = (
    "layers", "seed", "steps", "start_length", "max_length", "tokens", "pairs", "values", "hidden_size",
    "local_window", "lsh_window", "num_hashes", "num_buckets", "exploration_orders", "learning_rate", "overrides",
    "variant", "length", "rounds",
)  # fmt: skip
SHORT = {
    "lengths": [128, 256], "start_length": 64, "steps": 30, "stage_steps": 10, "watch_every": 5, "tokens": 512,
    "pairs": 8, "hidden_size": 64, "local_window": 8, "lsh_window": 16, "eval_rows": 4,
}  # fmt: skip


@dataclass
class Arguments(Options):
    layers: list[str] = HfArg(default_factory=lambda: ["local,lsh", "local,local"], help="models, a layer list each")
    variants: list[str] = HfArg(
        default_factory=lambda: ["lsh"],
        help="what lsh layers see: lsh, random, exact; or by hashing with a share of the mean subtracted: lsh-0.5",
    )
    lengths: list[int] = HfArg(default_factory=lambda: [2048, 4096], help="of the rows that are judged")
    start_length: int = HfArg(default=128, help="of the first rows; the longest of --lengths: no curriculum")
    steps: int = HfArg(default=6000, help="at most")
    stage_steps: int = HfArg(default=3000, help="at most, before the length doubles")
    target: float = HfArg(default=0.98, help="accuracy at which the length doubles, and at which training ends")
    watch_every: int = 100
    tokens: int = HfArg(default=8192, help="of a batch")
    eval_rows: int = HfArg(default=16, help="of an evaluation")
    pairs: int = 64
    keys: int = HfArg(default=128, help="different keys")
    values: int = HfArg(default=64, help="different values")
    fillers: int = HfArg(default=32, help="different tokens without meaning")
    rounds: list[int] = HfArg(default_factory=lambda: [1, 2, 4, 8], help="hash rounds of the last evaluation")
    hidden_size: int = 128
    local_window: int = 32
    lsh_window: int = 32
    num_hashes: int = HfArg(default=4, help="hash rounds in training")
    num_buckets: int = HfArg(default=32, help="of a hash round")
    exploration_orders: int = 1
    learning_rate: float = 2e-3
    learn_all: bool = HfArg(default=False, help="predict every token, not the answers alone")


def draw(args: Arguments, rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw rows and labels (the answers, -100 elsewhere), (rows, length) each."""
    pairs, vocabulary = min(args.pairs, length // 16), args.keys + args.values
    ids = torch.randint(vocabulary, vocabulary + args.fillers, (rows, length), generator=generator)
    labels = torch.full_like(ids, -100)
    keys = torch.rand(rows, args.keys, generator=generator).argsort(-1)[:, :pairs]
    values = torch.randint(args.keys, vocabulary, (rows, pairs), generator=generator)
    order = torch.rand(rows, pairs, generator=generator).argsort(-1)
    asked = (keys.gather(1, order), values.gather(1, order))
    begin = 3 * length // 4
    for first, end, (key, value) in ((0, length // 2, (keys, values)), (begin, length, asked)):
        slots = torch.rand(rows, (end - first) // 2, generator=generator).argsort(-1)[:, :pairs]
        place = first + 2 * slots
        ids.scatter_(1, place, key).scatter_(1, place + 1, value)
        if first:
            labels.scatter_(1, place + 1, value)
    return ids, labels


@torch.no_grad()
def accuracy(model: Any, args: Arguments, length: int, rounds: int | None = None, seed: int = 10**6) -> float:
    """Compute the share of the values recalled in rows of this length, drawn with `seed`."""
    generator, hits, count = torch.Generator().manual_seed(seed), 0, 0
    model.eval()
    for _ in range(args.eval_rows):
        ids, labels = draw(args, 1, length, generator)
        guess, target = model(ids, num_hashes=rounds).logits[:, :-1].argmax(-1), labels[:, 1:]
        hits += (guess == target)[target != -100].sum().item()
        count += (target != -100).sum().item()
    return hits / count


def build(layers: str, variant: str, args: Arguments) -> Any:
    share = {"lsh_centering": float(variant.removeprefix("lsh-"))} if variant.startswith("lsh-") else {}
    return make_model(
        max(args.lengths), args.hidden_size, layers.split(","), args.overrides, local_window=args.local_window,
        vocab_size=args.keys + args.values + args.fillers, lsh_window=args.lsh_window, num_hashes=args.num_hashes,
        num_buckets=args.num_buckets, lsh_exploration_orders=args.exploration_orders, **share,
    )  # fmt: skip


def sees(model: Any, variant: str) -> AbstractContextManager:
    """Return the context in which lsh layers see what the variant specifies."""
    kind = variant.split("-")[0]
    return {"lsh": nullcontext, "random": random_hashing, "exact": lambda: see_all(model)}[kind]()


def learn(model: Any, args: Arguments, seed: int, checkpoint: Any = None, name: str = "") -> list[dict[str, float]]:
    """Train with the curriculum, and return all evaluations: step, length, accuracy."""
    state: dict[str, Any] = {"length": args.start_length, "stage_begin": 0, "history": []}

    def batch(generator: torch.Generator) -> Inputs:
        length = state["length"]
        ids, labels = draw(args, max(1, args.tokens // length), length, generator)
        return {"input_ids": ids, "labels": ids if args.learn_all else labels}

    def watch(step: int, state: dict[str, Any]) -> bool:
        length = state["length"]
        score = accuracy(model, args, length)
        state["history"].append({"step": step, "length": length, "accuracy": score})
        print(f"{name}: step {step}, length {length}, accuracy {score:.3f}", flush=True)
        if score < args.target and step - state["stage_begin"] < args.stage_steps:
            return False
        if length >= max(args.lengths):
            return score >= args.target
        state.update(length=min(2 * length, max(args.lengths)), stage_begin=step)
        return False

    train(
        model, batch, args.steps, seed=seed, learning_rate=args.learning_rate, decay=False, checkpoint=checkpoint,
        watch=watch, watch_every=args.watch_every, state=state, name=name,
    )  # fmt: skip
    return state["history"]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Arguments, SHORT, argv)
    reach, distance = max(x.count(",") + 1 for x in args.layers) * (args.local_window - 1), min(args.lengths) // 4
    if reach >= distance:
        raise SystemExit(f"Answers may lie {distance} tokens back, where local windows reach ({reach} in all).")
    experiment = Experiment(
        "recall", args, KEYS, ("accuracy", "steps_used"), curve=(KEYS[:-2], ("step", "length", "accuracy"))
    )
    fixed = {name: getattr(args, name) for name in KEYS if hasattr(args, name) and name != "rounds"}
    fixed |= {"max_length": max(args.lengths)}
    curves, rows = {}, []
    for choice in product(seed=args.seeds, layers=args.layers, variant=args.variants):
        key = {**fixed, **choice}
        wanted = [{**key, **more} for more in product(length=args.lengths, rounds=args.rounds)]
        name = ", ".join(map(str, choice.values()))
        if not all(map(experiment.results.find, wanted)):
            measure(key, wanted, args, experiment, name)
        rows += [row for one in wanted for row in experiment.results.find(one)]
        if curve := experiment.curve(key):
            curves[name] = curve
    print("\n" + table(rows, ["layers", "variant", "length"], "rounds", "accuracy"))
    plot(experiment, rows, curves)


def measure(
    key: dict[str, Any], wanted: list[dict[str, Any]], args: Arguments, experiment: Experiment, name: str
) -> None:
    """Train a model, and evaluate it on rows that training did not watch."""
    set_seed(key["seed"])
    model = build(key["layers"], key["variant"], args)
    with sees(model, key["variant"]):
        history = learn(model, args, key["seed"], experiment.checkpoint(key), name)
        experiment.keep_curve(key, history)
        for row in wanted:
            if not experiment.results.find(row):
                score = accuracy(model, args, row["length"], row["rounds"], seed=3 * 10**6)
                experiment.results.add(row, {"accuracy": score, "steps_used": history[-1]["step"]})


def plot(experiment: Experiment, rows: list[dict[str, str]], curves: dict[str, list[list[float]]]) -> None:
    figure, (left, right) = experiment.figure(2)
    for name, (steps, _, scores) in curves.items():
        left.plot(steps, scores, "--" if "lsh-" in name else "-", label=name)
    left.set(xlabel="training step (at every dip, the length doubles)", ylabel="accuracy", ylim=(-0.02, 1.02))
    left.legend(frameon=False, fontsize=7)
    for name in dict.fromkeys((row["layers"], row["variant"], row["length"]) for row in rows):
        some = [row for row in rows if (row["layers"], row["variant"], row["length"]) == name]
        rounds = sorted({int(row["rounds"]) for row in some})
        means = []
        for number in rounds:
            scores = [float(row["accuracy"]) for row in some if int(row["rounds"]) == number]
            means.append(sum(scores) / len(scores))
        right.plot(rounds, means, "o-" if name[1] == "lsh" else "o--", label=", ".join(name))
    right.set_xscale("log", base=2)
    right.set(xlabel="hash rounds", ylabel="accuracy", ylim=(-0.02, 1.02))
    right.set_xticks(rounds, [str(number) for number in rounds])
    right.legend(frameon=False, fontsize=7)
    experiment.save(figure)


if __name__ == "__main__":
    main()
