"""Does choosing keys by content pay off? Compares byte language models with lsh layers and others of the same size.

    python experiments/attention_variants.py --train_file book.txt --seeds 0 1 2
    python experiments/attention_variants.py --train_file book.txt --validation_file end.txt \\
        --validate_on validation_file --seeds 0 1 2

Local layers stay unchanged, with small windows. The lsh layers are replaced by:

    exact          lsh layers that see all previous tokens: exact attention with shared queries and keys
    full           exact attention with separate queries and keys (kind "full")
    local          local layers that see as many keys as an lsh layer: local window + rounds × lsh window
    local-shared   the same, with shared queries and keys
    lsh            lsh layers as configured
    lsh-0.5        lsh layers that subtract this share of the mean before hashing (`lsh_centering=0.5`)
    version-0.1    lsh layers as in version 0.1: rotary positions, vectors hashed with their mean
    followed       lsh layers that subtract a running mean updated in training; with --overrides reversible=False
    sinks          lsh layers; every layer also sees the first four tokens of the sequence
    random         lsh layers that hash random vectors: the control

The text is plain, or distant tokens matter in it: passages are repeated and records queried at least a quarter of the
sequence later (`common.mix_far`), or recall is mixed in (`common.mix_recall`). In that case, `--answer_steps` steps on
the distant answers only come first. Bits per byte are averaged over all bytes, and over those with a distant answer.
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
    followed_center,
    loss_points,
    make_model,
    only_local,
    parse,
    product,
    random_hashing,
    read_texts,
    see_all,
    sink_tokens,
    table,
    text_rows,
    train_on_text,
)
from transformers import set_seed
from transformers.hf_argparser import HfArg

VARIANTS = ("exact", "full", "local", "local-shared", "lsh", "lsh-0.5", "version-0.1", "random", "followed", "sinks")
KEYS = (
    "source", "text", "variant", "seed", "length", "steps", "answer_steps", "rows", "hidden_size", "layers",
    "local_window", "lsh_window", "num_hashes", "learning_rate", "overrides", "validated_on", "eval_rows",
)  # fmt: skip
SHORT = {
    "length": 512, "steps": 20, "rows": 2, "hidden_size": 64, "local_window": 16, "lsh_window": 16, "eval_rows": 2,
    "variants": ["exact", "local", "lsh", "random"], "texts": ["far"],
}  # fmt: skip


@dataclass
class Arguments(TextOptions, Options):
    variants: list[str] = field(default_factory=lambda: ["exact", "local", "lsh", "version-0.1", "random"])
    texts: list[str] = HfArg(default_factory=lambda: ["plain", "far"], help="plain, far, recall")
    length: int = 4096
    steps: int = 600
    answer_steps: int = HfArg(
        default=0, help="before them, in which the far answers alone are learned; not plain text"
    )
    rows: int = HfArg(default=2, help="sequences of a batch")
    hidden_size: int = 128
    layers: list[str] = field(default_factory=lambda: ["local", "lsh", "local", "lsh"])
    local_window: int = 32
    lsh_window: int = 32
    num_hashes: int = 2
    learning_rate: float = 2e-3


def build(variant: str, args: Arguments) -> tuple[Any, contextlib.ExitStack]:
    """Make a new model, and the context in which it must run."""
    layers, fields, contexts = list(args.layers), {}, contextlib.ExitStack()
    swap = {"full": "full", "local": "local"}.get(variant, "lsh")
    lsh_layers = [i for i, kind in enumerate(layers) if kind == "lsh"]
    layers = [swap if i in lsh_layers else kind for i, kind in enumerate(layers)]
    if variant == "version-0.1":
        fields |= {"lsh_centering": False, "lsh_rotary": 1.0}
    elif variant.startswith("lsh-"):
        fields |= {"lsh_centering": float(variant.removeprefix("lsh-"))}
    model = make_model(
        args.length, args.hidden_size, layers, args.overrides, local_window=args.local_window,
        lsh_window=args.lsh_window, num_hashes=args.num_hashes, **fields,
    )  # fmt: skip
    keys = args.local_window + args.num_hashes * args.lsh_window
    if variant == "exact":
        contexts.enter_context(see_all(model))
    elif variant == "local-shared":
        contexts.enter_context(only_local(model, keys))
    elif variant == "random":
        contexts.enter_context(random_hashing())
    elif variant == "followed":
        contexts.enter_context(followed_center())
    elif variant == "sinks":
        contexts.enter_context(sink_tokens(4))
    elif variant == "local":
        for i in lsh_layers:
            attention = model.model.layers[i].attention
            attention.config = type(model.config)(**{**model.config.to_dict(), "local_window": keys})
    return model, contexts


def run(
    key: dict[str, Any], args: Arguments, experiment: Experiment, texts: Sequence[torch.Tensor]
) -> dict[str, float]:
    """Train and evaluate one model."""
    set_seed(key["seed"])
    model, contexts = build(key["variant"], args)
    with contexts:
        losses = train_on_text(
            model, texts[0], key, experiment, name=f"{key['text']}, {key['variant']}, seed {key['seed']}"
        )
        experiment.keep_curve(key, loss_points(losses))
        judged = text_rows(
            texts[1], key["text"], args.eval_rows, args.length, torch.Generator().manual_seed(12345), even=True
        )
        return {**bits_per_byte(model, *judged), "train_loss": sum(losses[-50:]) / len(losses[-50:])}


def draw(experiment: Experiment, rows: list[dict[str, str]], args: Arguments) -> None:
    panels = [(text, "bits") for text in args.texts] + [(text, "far_bits") for text in args.texts if text != "plain"]
    curves = {tuple(row[name] for name in KEYS): points for row in rows if (points := experiment.curve(row))}
    figure, axes = experiment.figure(len(panels) + bool(curves), width=4)
    for ax, (text, value) in zip(axes, panels, strict=False):
        for place, variant in enumerate(args.variants):
            numbers = [float(row[value]) for row in rows if row["text"] == text and row["variant"] == variant]
            ax.plot([place] * len(numbers), numbers, "o", color="#0b5d7a" if variant == "lsh" else "#d1495b")
        ax.set_xticks(range(len(args.variants)), args.variants, rotation=30, ha="right")
        ax.set(title=f"{text} text, {'all bytes' if value == 'bits' else 'far answers'}", ylabel="bits per byte")
        ax.grid(axis="y", alpha=0.3)
    if curves:
        for key, points in curves.items():
            of = dict(zip(KEYS, key, strict=True))
            label = f"{of['text']}, {of['variant']}" if len(args.texts) > 1 else of["variant"]
            color, style = f"C{args.variants.index(of['variant'])}", "-" if of["text"] == args.texts[0] else "--"
            known = label in axes[-1].get_legend_handles_labels()[1]
            axes[-1].plot(*points, style, color=color, label=None if known else label, linewidth=1)
        begin = f", from step {args.answer_steps} on of all bytes" if args.answer_steps else ""
        axes[-1].set(title=f"training loss{begin}", xlabel="step", ylabel="nats per predicted token")
        axes[-1].legend(frameon=False, fontsize=7)
    experiment.save(figure)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Arguments, SHORT, argv)
    experiment = Experiment(
        "attention_variants", args, KEYS, ("bits", "far_bits", "train_loss"), curve=(KEYS, ("step", "train_loss"))
    )
    texts, rows = read_texts(args), []
    fixed = {name: getattr(args, name) for name in KEYS if hasattr(args, name)}
    fixed |= {"layers": " ".join(args.layers), "source": "demo" if args.train_file is None else args.train_file.stem}
    fixed["validated_on"] = args.validate_on

    def key_of(text: str, **choice: Any) -> dict[str, Any]:
        return {**fixed, "text": text, "answer_steps": 0 if text == "plain" else args.answer_steps, **choice}

    for choice in product(seed=args.seeds, text=args.texts, variant=args.variants):
        key = key_of(**choice)
        if not experiment.results.find(key):
            experiment.results.add(key, run(key, args, experiment, texts))
    for choice in product(text=args.texts, variant=args.variants):
        rows += experiment.results.find(key_of(**choice))  # of all seeds so far
    for value in ("bits", "far_bits"):
        print(f"\n{value}\n{table(rows, ['text', 'variant'], 'length', value)}")
    draw(experiment, rows, args)


if __name__ == "__main__":
    main()
