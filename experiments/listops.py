"""ListOps of the Long Range Arena (Tay et al. 2020, arXiv 2011.04006): evaluate nested lists of 500 to 2,000 tokens.

    python experiments/listops.py                                            # masked pre-training, then training
    python experiments/listops.py --pretraining_steps 0 --train_rows 10000
    python experiments/listops.py --validation_file listops.validation.parquet --eval_every 500

Rows follow the rules of its published generator, each made from the seed and its number: operators MIN, MAX, MED (an
even count: the mean of the middle two, rounded down) and SM (the sum modulo 10) with 2 to 10 arguments, each argument
a list with probability 1/4, at most 10 levels deep. Brackets that the generator adds for parsing are not tokens there
either. The paper reports 37.27 % for a Reformer.

A model first fills in masked tokens of the training rows, then learns the answer; both phases resume.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import Experiment, Inputs, Options, make_model, parse, table, train
from transformers import set_seed
from transformers.hf_argparser import HfArg

from hf_reformer import ReformerForMaskedLM, ReformerForSequenceClassification
from hf_reformer.data.tables import read_examples

OPERATORS: dict[str, Callable[[list[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": lambda values: int(median(values)),
    "[SM": lambda values: sum(values) % 10,
}
TOKENS = ["[PAD]", "[MASK]", *map(str, range(10)), *OPERATORS, "]"]
ID = {token: number for number, token in enumerate(TOKENS)}
PAD, MASK = 0, 1
GROUP = 8  # batches whose rows are drawn together and sorted by length; one of them is used
KEYS = (
    "layers", "seed", "steps", "pretraining_steps", "train_rows", "batch_size", "min_length", "max_length",
    "hidden_size", "local_window", "lsh_window", "num_hashes", "learning_rate", "overrides", "bf16", "judged",
    "rows_judged",
)  # fmt: skip
SHORT = {
    "steps": 6, "pretraining_steps": 4, "train_rows": 40, "batch_size": 4, "min_length": 30, "max_length": 120,
    "hidden_size": 64, "local_window": 32, "lsh_window": 32, "test_rows": 20, "eval_every": 3, "eval_rows": 8,
}  # fmt: skip


@dataclass
class Arguments(Options):
    layers: list[str] = HfArg(default_factory=lambda: ["local", "lsh", "local", "lsh"])
    steps: int = HfArg(default=5000, help="of training")
    pretraining_steps: int = HfArg(default=2000, help="with masked tokens")
    train_rows: int = HfArg(default=96_000, help="that are different; then they come again")
    test_rows: int = 2000
    batch_size: int = 16
    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_args: int = 10
    mask_probability: float = 0.15
    hidden_size: int = 128
    local_window: int = 64
    lsh_window: int = 64
    num_hashes: int = 2
    learning_rate: float = 1e-3
    bf16: bool = HfArg(default=False, help="autocast, which is faster on processors with instructions for it")
    eval_every: int = HfArg(default=500, help="steps between evaluations on held-out training rows")
    eval_rows: int = 200
    validation_file: Path | None = HfArg(default=None, help="also judge these rows; columns text and label")


def make_list(draw: random.Random, depth: int, args: Arguments, room: int) -> tuple[list[str], int] | None:
    """Make an argument, and return its tokens and value; None if it would have more than `room` tokens."""
    if depth >= args.max_depth or draw.random() > 0.25:
        value = draw.randrange(10)
        return ([str(value)], value) if room > 0 else None
    tokens, values = [""], []
    for _ in range(draw.randint(2, args.max_args)):
        argument = make_list(draw, depth + 1, args, room - len(tokens) - 1)
        if argument is None:
            return None
        tokens += argument[0]
        values.append(argument[1])
    tokens[0] = draw.choice(list(OPERATORS))
    return [*tokens, "]"], OPERATORS[tokens[0]](values)


def make_row(name: str, args: Arguments) -> tuple[list[str], int]:
    """Make the tokens and answer of the row with this name: the first list whose length is within the limits."""
    draw = random.Random(name)
    while True:
        row = make_list(draw, 1, args, args.max_length - 1)
        if row is not None and len(row[0]) > args.min_length:
            return row


def encode(tokens: Sequence[str]) -> torch.Tensor:
    return torch.tensor([ID[token] for token in tokens], dtype=torch.uint8)


def collate(rows: Sequence[torch.Tensor]) -> Inputs:
    """Pad rows on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=PAD).long()
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def mask_tokens(inputs: Inputs, probability: float, generator: torch.Generator) -> Inputs:
    """Mask some of the tokens, which become the labels."""
    ids = inputs["input_ids"]
    hidden = (torch.rand(ids.shape, generator=generator) < probability) & (ids != PAD)
    hidden[:, 0] |= ~hidden.any(-1)  # at least one
    return {**inputs, "input_ids": ids.masked_fill(hidden, MASK), "labels": ids.masked_fill(~hidden, -100)}


class Rows:
    """The rows of a split, made on demand and cached."""

    def __init__(self, split: str, seed: int, args: Arguments):
        self.make = cache(lambda number: self._make(f"{split} {seed} {number}", args))

    @staticmethod
    def _make(name: str, args: Arguments) -> tuple[torch.Tensor, int]:
        tokens, answer = make_row(name, args)
        return encode(tokens), answer

    def batch(self, numbers: Sequence[int]) -> Inputs:
        rows = [self.make(number) for number in numbers]
        return {**collate([ids for ids, _ in rows]), "labels": torch.tensor([answer for _, answer in rows])}


def read_rows(file: Path) -> tuple[Callable[[Sequence[int]], Inputs], int]:
    """Read a file's rows: return a function that makes a batch from row numbers, and the number of rows."""
    examples = read_examples(file)
    texts, answers = [encode(text.split()) for text in examples["text"]], torch.tensor([*map(int, examples["label"])])

    def batch(numbers: Sequence[int]) -> Inputs:
        return {**collate([texts[number] for number in numbers]), "labels": answers[list(numbers)]}

    return batch, len(texts)


@torch.no_grad()
def accuracy(model: Any, batch: Callable[[Sequence[int]], Inputs], count: int, size: int = 8) -> float:
    model.eval()
    hits = 0
    for numbers in torch.arange(count).split(size):
        inputs = batch(numbers.tolist())
        hits += (model(**inputs).logits.argmax(-1) == inputs["labels"]).sum().item()
    return hits / count


def build(head: Any, args: Arguments) -> Any:
    return make_model(
        args.max_length, args.hidden_size, args.layers, args.overrides, head=head, vocab_size=len(TOKENS),
        pad_token_id=PAD, is_decoder=False, num_labels=10, local_window=args.local_window, lsh_window=args.lsh_window,
        num_hashes=args.num_hashes,
    )  # fmt: skip


def learn(
    args: Arguments, seed: int, experiment: Experiment, key: dict[str, Any]
) -> tuple[Any, list[dict[str, float]]]:
    """Pre-train and train a model, and return it with its evaluations during training: step, accuracy."""
    set_seed(seed)
    rows, held_out = Rows("train", seed, args), Rows("held out", seed, args)

    def numbers(generator: torch.Generator) -> list[int]:
        """Draw the numbers of rows of similar lengths, so that there is little padding."""
        drawn = torch.randint(0, args.train_rows, (args.batch_size * GROUP,), generator=generator).tolist()
        begin = args.batch_size * int(torch.randint(0, GROUP, (), generator=generator))
        return sorted(drawn, key=lambda number: len(rows.make(number)[0]))[begin : begin + args.batch_size]

    def masked_batch(generator: torch.Generator) -> Inputs:
        inputs = collate([rows.make(number)[0] for number in numbers(generator)])
        return mask_tokens(inputs, args.mask_probability, generator)

    masked = build(ReformerForMaskedLM, args)
    if args.pretraining_steps:
        own = {name: value for name, value in key.items() if name != "steps"}
        train(
            masked, masked_batch, args.pretraining_steps, seed=seed, learning_rate=args.learning_rate,
            checkpoint=experiment.checkpoint({**own, "phase": "masked"}), name=f"masked, seed {seed}", bf16=args.bf16,
        )  # fmt: skip
    model = build(ReformerForSequenceClassification, args)
    model.model.load_state_dict(masked.model.state_dict())
    state: dict[str, Any] = {"history": []}

    def watch(step: int, state: dict[str, Any]) -> bool:
        score = accuracy(model, held_out.batch, args.eval_rows)
        state["history"].append({"step": step, "accuracy": score})
        print(f"seed {seed}: step {step}, accuracy {score:.3f} of {args.eval_rows} held-out rows", flush=True)
        return False

    train(
        model, lambda generator: rows.batch(numbers(generator)), args.steps, seed=seed + 10**6,
        learning_rate=args.learning_rate, checkpoint=experiment.checkpoint(key), watch=watch,
        watch_every=args.eval_every, state=state, name=f"classify, seed {seed}", bf16=args.bf16,
    )  # fmt: skip
    return model, state["history"]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Arguments, SHORT, argv)
    experiment = Experiment("listops", args, KEYS, ("accuracy",))
    fixed = {name: getattr(args, name) for name in KEYS if hasattr(args, name)} | {"layers": " ".join(args.layers)}
    rows, curves = [], {}
    for seed in args.seeds:
        key = {**fixed, "seed": seed}
        model, curves[seed] = learn(args, seed, experiment, key)
        judged = {"generated": (Rows("test", 0, args).batch, args.test_rows)}
        if args.validation_file is not None:
            judged[args.validation_file.stem] = read_rows(args.validation_file)
        for name, (batch, count) in judged.items():
            row = {**key, "judged": name, "rows_judged": count}
            if not experiment.results.find(row):
                experiment.results.add(row, {"accuracy": accuracy(model, batch, count)})
            rows += experiment.results.find(row)
    print("\n" + table(rows, ["layers", "steps"], "judged", "accuracy"))
    figure, (ax,) = experiment.figure()
    for seed, history in curves.items():
        ax.plot([x["step"] for x in history], [x["accuracy"] for x in history], label=f"seed {seed}")
    ax.axhline(0.3727, color="gray", linestyle="--", label="Reformer in Tay et al. 2020")
    ax.set(xlabel="training step", ylabel=f"accuracy on {args.eval_rows} held-out rows")
    ax.legend(frameon=False)
    experiment.save(figure)


if __name__ == "__main__":
    main()
