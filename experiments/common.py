"""Code shared by experiments: models by width, a training loop that resumes, results as CSV rows, texts as bytes.

Interrupted sweeps resume: rows in the CSV are not recomputed, and a run that had started continues from its checkpoint
in `runs/experiments`. With `--short`, everything starts from scratch and is written to `runs/evidence-short`.
"""

import copy
import csv
import hashlib
import itertools
import json
import math
import os
import sys
import time
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from hf_reformer import ReformerConfig, ReformerForCausalLM
from hf_reformer.data.demo_corpus import clean_source, package_folder
from hf_reformer.layers import attention as attention_module
from hf_reformer.layers.attention import Hasher
from hf_reformer.ops.layout import AttentionLayout
from hf_reformer.ops.lsh import unit_rows
from hf_reformer.training.model_setup import parse_overrides

ROOT = Path(__file__).resolve().parents[1]
SHORT_DIR = ROOT / "runs" / "evidence-short"
Inputs = dict[str, torch.Tensor]


# --- arguments


@dataclass
class Options:
    short: bool = HfArg(default=False, help="a tiny version, without files; afresh, to runs/evidence-short")
    seeds: list[int] = field(default_factory=lambda: [0])
    overrides: str = HfArg(default="", help="fields of ReformerConfig: a=1,b=word")
    output_dir: Path | None = HfArg(default=None, help="of the CSV; default: experiments/results")
    picture: Path | None = HfArg(default=None, help="default: docs/images/evidence_NAME.png")
    threads: int = HfArg(default=0, help="of torch; 0: its default")


@dataclass
class TextOptions:
    train_file: Path | None = HfArg(default=None, help="text, read as bytes; default: source code that is installed")
    validation_file: Path | None = None
    validate_on: str = HfArg(default="train_tail", help="train_tail, to choose by; or validation_file, to report")
    tail: int = HfArg(default=60_000, help="bytes at the end of the training text that are never trained on")
    eval_rows: int = HfArg(default=16, help="sequences of an evaluation")


def parse(arguments_class: Any, short: Mapping[str, Any], argv: Sequence[str] | None = None) -> Any:
    """Parse the arguments of a script; `short` holds the defaults that `--short` changes."""
    doc = sys.modules[arguments_class.__module__].__doc__
    parser = HfArgumentParser(arguments_class, description=doc, formatter_class=RawDescriptionHelpFormatter)
    argv = sys.argv[1:] if argv is None else argv
    if "--short" in argv:
        parser.set_defaults(**short)
    (args,) = parser.parse_args_into_dataclasses(args=list(argv))
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


# --- results


class Results:
    """A CSV file to which every finished run adds a row; `keys` are the columns that identify a run.

    Several processes may share a sweep: each row is appended by a single write.
    """

    def __init__(self, file: Path, keys: Sequence[str], values: Sequence[str]):
        self.file, self.keys, self.columns = file, tuple(keys), [*keys, *values]
        if file.exists() and (found := next(csv.reader(file.open()), [])) != self.columns:
            raise SystemExit(f"{file} has the columns {found}, not {self.columns}. Move it away.")

    def rows(self) -> list[dict[str, str]]:
        if not self.file.exists():
            return []
        with self.file.open() as lines:
            return list(csv.DictReader(lines))

    def find(self, key: Mapping[str, Any]) -> list[dict[str, str]]:
        """Return the rows that match `key`, which may contain only some columns."""
        return [row for row in self.rows() if all(row[name] == str(value) for name, value in key.items())]

    def add(self, key: Mapping[str, Any], values: Mapping[str, Any], show: bool = True) -> None:
        row = {**key, **{name: _rounded(value) for name, value in values.items()}}
        if set(row) != set(self.columns):
            raise ValueError(f"A row has the columns {sorted(row)}, the file {sorted(self.columns)}.")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", newline="") as lines:
            writer = csv.DictWriter(lines, self.columns, lineterminator="\n")
            if not lines.tell():
                writer.writeheader()
            writer.writerow(row)
        if show:
            print(", ".join(f"{name} {row[name]}" for name in self.columns if row[name] != ""), flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.5g}"
    return value


class Experiment:
    """The results, checkpoints and figure of an experiment.

    `curve`: columns of its learning curves, if it keeps any: those that identify a run, and those of a point.
    """

    def __init__(
        self,
        name: str,
        args: Options,
        keys: Sequence[str],
        values: Sequence[str],
        curve: tuple[Sequence[str], Sequence[str]] | None = None,
    ):
        self.name, self.short = name, args.short
        folder = args.output_dir or (SHORT_DIR if args.short else ROOT / "experiments" / "results")
        default = folder / f"{name}.png" if args.short else ROOT / "docs" / "images" / f"evidence_{name}.png"
        self.picture = args.picture or default
        file, curves = folder / f"{name}.csv", folder / f"{name}_curves.csv"
        if args.short and args.output_dir is None:
            for old in (file, curves):
                old.unlink(missing_ok=True)
        self.results = Results(file, keys, values)
        self.curves = None if curve is None else Results(curves, *curve)

    def keep_curve(self, key: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> None:
        """Write the learning curve of a run to `curves`, unless it is there already."""
        if self.curves is not None and not self.curves.find(key):
            for point in points:
                self.curves.add(key, point, show=False)

    def curve(self, row: Mapping[str, Any]) -> list[list[float]]:
        """Return the learning curve of a run, a list per column; none if it was not kept. `row` may hold more."""
        assert self.curves is not None
        keys, values = self.curves.keys, self.curves.columns[len(self.curves.keys) :]
        points = self.curves.find({name: row[name] for name in keys})
        return [[float(point[name]) for point in points] for name in values] if points else []

    def checkpoint(self, key: Mapping[str, Any]) -> Path | None:
        """Return the checkpoint file of a run, whose name depends on all of `key`."""
        if self.short:
            return None
        text = json.dumps({name: str(value) for name, value in key.items()}, sort_keys=True)
        return ROOT / "runs" / "experiments" / self.name / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.pt"

    def figure(self, panels: int = 1, width: float = 5.0, height: float = 3.6) -> tuple[Any, list[Any]]:
        """Make a figure and its axes, side by side."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width * panels, height), layout="constrained")
        return figure, list(figure.subplots(1, panels, squeeze=False)[0])

    def save(self, figure: Any) -> None:
        self.picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(self.picture, dpi=90)
        print(f"{self.results.file}\n{self.picture}")


def table(rows: Sequence[Mapping[str, Any]], down: Sequence[str], across: str, value: str) -> str:
    """Format a Markdown table of means of `value`; with their spread if there are several: mean ± half the range."""
    groups: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in rows:
        if row[value] != "":
            cells = groups.setdefault(tuple(str(row[name]) for name in down), {})
            cells.setdefault(str(row[across]), []).append(float(row[value]))
    columns = list(dict.fromkeys(column for cells in groups.values() for column in cells))
    lines = [[*down, *(f"{across} {column}" for column in columns)], ["---"] * (len(down) + len(columns))]
    for name, cells in groups.items():
        lines.append([*name, *(_mean_and_spread(cells.get(column, [])) for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _mean_and_spread(numbers: list[float]) -> str:
    if not numbers:
        return ""
    mean, spread = sum(numbers) / len(numbers), (max(numbers) - min(numbers)) / 2
    return f"{mean:.4g} ± {spread:.2g}" if len(numbers) > 1 else f"{mean:.4g}"


# --- models


def make_config(length: int, hidden_size: int = 128, layers: Sequence[str] = (), **fields: Any) -> ReformerConfig:
    """Make the config of a causal byte model without dropout; `fields` may override anything."""
    heads = max(1, hidden_size // 64)
    base = {
        "vocab_size": 256, "hidden_size": hidden_size, "num_attention_heads": heads,
        "attention_head_size": hidden_size // heads, "feed_forward_size": 4 * hidden_size,
        "attn_layers": list(layers) or ["local", "lsh", "local", "lsh"], "max_position_embeddings": length,
        "position_embedding_type": "rotary", "initializer_range": 0.6 * hidden_size**-0.5,
        "hidden_dropout_prob": 0.0, "is_decoder": True, "pad_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    return ReformerConfig(**{**base, **fields})


def make_model(
    length: int,
    hidden_size: int = 128,
    layers: Sequence[str] = (),
    overrides: str = "",
    head: Any = None,
    **fields: Any,
) -> Any:
    """Make a new model of class `head` (default: a causal language model); see `make_config`."""
    fields = {**fields, **parse_overrides(overrides)}
    return (head or ReformerForCausalLM)(make_config(length, hidden_size, layers, **fields))


@contextmanager
def layer_config(model: Any, kind: str, **fields: Any) -> Iterator[None]:
    """Give the layers of a kind their own config, since `local_window` is a single number for all layers."""
    attentions = [layer.attention for layer in model.model.layers if layer.attention.kind == kind]
    before = [attention.config for attention in attentions]
    try:
        for attention in attentions:
            attention.config = copy.deepcopy(attention.config)
            for name, value in fields.items():
                setattr(attention.config, name, value)
        yield
    finally:
        for attention, config in zip(attentions, before, strict=True):
            attention.config = config


def see_all(model: Any) -> Any:
    """Return a context in which lsh layers see all previous tokens: exact attention with shared queries and keys."""
    return only_local(model, model.config.max_position_embeddings)


def only_local(model: Any, window: int) -> Any:
    """Return a context in which lsh layers see only the `window` previous tokens, and none by hashing."""
    fields = {"lsh_include_local": True, "local_window": window, "lsh_window": 1, "lsh_exploration_orders": 0}
    return layer_config(model, "lsh", **fields)


@contextmanager
def random_hashing() -> Iterator[None]:
    """Make lsh layers hash random vectors instead of their own within this context.

    They depend only on the rotations: new in every training step, the same when a reversible layer is recomputed.
    """
    original = Hasher.buckets

    def buckets(self: Any, vectors: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seed = int(self.rotations.double().sum().view(torch.int64)) % 2**63
        generator = torch.Generator(vectors.device).manual_seed(seed)
        batch, heads, length, size = vectors.shape
        noise = torch.randn(length, batch, heads, size, generator=generator, device=vectors.device)  # prefixes agree
        return original(self, noise.permute(1, 2, 0, 3).to(vectors.dtype).contiguous(), *args, **kwargs)

    with patch.object(Hasher, "buckets", buckets):
        yield


@contextmanager
def followed_center(momentum: float = 0.99) -> Iterator[None]:
    """Subtract a center per head, an exponential moving average in training, from unit vectors before hashing.

    It starts at zero and is fixed in evaluation. Needs `reversible=False`: a recomputed layer would use another one.
    """
    centers: dict[Any, torch.Tensor] = {}

    def buckets(self: Any, vectors: torch.Tensor, ctx: Any) -> torch.Tensor:
        units = unit_rows(vectors, ctx.mask)
        center = centers.get(self, units.new_zeros(units.shape[1], 1, units.shape[3]))
        if ctx.training:
            centers[self] = center.lerp(units.mean((0, 2))[:, None], 1 - momentum)
        return self.hasher(vectors, ctx).buckets(units - center, None)

    with patch.object(attention_module.ReformerAttention, "buckets", buckets):
        yield


@contextmanager
def hashing_of(change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Hash what `change` makes of unit vectors, (B, H, T, D) float64, within this context; causal models alone."""

    def buckets(self: Any, vectors: torch.Tensor, ctx: Any) -> torch.Tensor:
        changed = change(unit_rows(vectors, ctx.mask).double())
        return self.hasher(vectors, ctx).buckets(changed.to(vectors.dtype), None)

    with patch.object(attention_module.ReformerAttention, "buckets", buckets):
        yield


def running_mean(units: torch.Tensor) -> torch.Tensor:
    """Compute the mean of the tokens so far, (B, H, T, D)."""
    return units.cumsum(2) / torch.arange(1, units.shape[2] + 1, device=units.device)[:, None]


def scaled_hashing() -> Any:
    """Return a context in which every dimension is also divided by its standard deviation so far."""

    def scale(units: torch.Tensor) -> torch.Tensor:
        mean = running_mean(units)
        return (units - mean) / (running_mean(units.square()) - mean.square()).clamp(min=1e-6).sqrt()

    return hashing_of(scale)


def whitened_hashing(ridge: float = 0.1) -> Any:
    """Return a context in which all directions are given the same spread, by the covariance of the whole row.

    A hash of its own would have to follow the covariance of the tokens so far: this shows the most that could gain.
    `ridge`: added to the eigenvalues, as a share of the largest.
    """

    def whiten(units: torch.Tensor) -> torch.Tensor:
        apart = units - units.mean(2, keepdim=True)
        spread, axes = torch.linalg.eigh(apart.transpose(-1, -2) @ apart / units.shape[2])
        spread = spread.clamp(min=0) + ridge * spread[..., -1:]
        return (units - running_mean(units)) @ axes * spread.rsqrt()[:, :, None]

    return hashing_of(whiten)


@contextmanager
def sink_tokens(count: int) -> Iterator[None]:
    """Let every token in local and lsh layers also see the first `count` tokens of its row, within this context."""
    original = attention_module.window_layout

    def with_sinks(*args: Any, **kwargs: Any) -> AttentionLayout:
        layout = original(*args, **kwargs)
        rounds, length = layout.perm.shape[2:]
        token = torch.arange(length, dtype=torch.int32).expand(*layout.perm.shape[:2], 1, length)
        more = token, torch.full_like(token, rounds * length), rounds * length + token.clamp(max=count - 1)
        perm, start, end = (torch.cat(pair, dim=2) for pair in zip(layout[:3], more, strict=True))
        reach = {"left_reach": length - 1, "right_reach": layout.right_reach}
        return layout._replace(perm=perm, window_start=start, window_end=end, **reach)

    with patch.object(attention_module, "window_layout", with_sinks):
        yield


# --- training


def train(
    model: Any,
    batch: Callable[[torch.Generator], Inputs],
    steps: int,
    *,
    seed: int,
    learning_rate: float = 2e-3,
    warmup: int = 50,
    decay: bool = True,
    clip: float = 1.0,
    weight_decay: float = 0.01,
    checkpoint: Path | None = None,
    save_every: int = 100,
    watch: Callable[[int, dict[str, Any]], bool] | None = None,
    watch_every: int = 100,
    state: dict[str, Any] | None = None,
    name: str = "",
    bf16: bool = False,
) -> list[float]:
    """Train with AdamW, with warm-up and linear decay to a twentieth, and return the loss of every step.

    Args:
        batch: draws the next inputs, including labels, with a generator whose state is part of the checkpoint.
        checkpoint: file written every `save_every` steps and at the end; if it exists, training resumes from it.
        watch: called every `watch_every` steps with the step number and `state`; True ends training.
        state: state of `watch` and `batch`; part of the checkpoint.
        bf16: use a separate autocast context per forward; a longer one would reuse the weights it cast first.
    """
    state = {} if state is None else state
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    generator, losses, seconds, done = torch.Generator().manual_seed(seed), [], 0.0, False
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=False)
        model.load_state_dict(saved["model"])
        losses, seconds, done = saved["losses"], saved["seconds"], saved["done"]
        state.update(saved["state"])
        if not done:
            optimizer.load_state_dict(saved["optimizer"])
            generator.set_state(saved["generator"])
            torch.set_rng_state(saved["rng"])
    begin = time.perf_counter() - seconds
    bar = tqdm(initial=len(losses), total=steps, desc=name, mininterval=2, disable=done)
    model.train()
    while not done:
        step = len(losses)
        rate = min(1.0, (step + 1) / max(1, warmup)) * (max(0.05, 1 - step / steps) if decay else 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(**batch(generator)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
        step += 1
        bar.update()
        bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.4f}", refresh=False)
        done = step >= steps
        if watch is not None and (done or step % watch_every == 0):
            done = watch(step, state) or done
            model.train()
        if step % max(20, steps // 20) == 0 and not sys.stderr.isatty():
            mean, pace = sum(losses[-20:]) / len(losses[-20:]), (time.perf_counter() - begin) / step
            print(f"{name}: step {step}, loss {mean:.4f}, {pace:.3f} s a step", flush=True)
        if checkpoint is not None and (done or step % save_every == 0):
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            saved = {"model": model.state_dict(), "losses": losses, "state": state, "done": done}
            saved |= {"seconds": time.perf_counter() - begin}
            if not done:
                saved |= {"optimizer": optimizer.state_dict(), "generator": generator.get_state()}
                saved |= {"rng": torch.get_rng_state()}
            torch.save(saved, part := checkpoint.with_suffix(".part"))
            os.replace(part, checkpoint)
    bar.close()
    model.eval()
    return losses


# --- texts


def demo_text(size: int = 2**20) -> bytes:
    """Return source code of an installed package: a text that needs no download."""
    folder, text = package_folder("transformers"), bytearray()
    for path in sorted(folder.glob("models/*/modeling_*.py")):
        if len(text) >= size:
            break
        text += clean_source(path.read_text(encoding="utf-8"), max_bytes=2**15).encode()
    return bytes(text[:size])


def read_texts(args: TextOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """Read bytes for training and evaluation, 1-d uint8. The tail of the training text is never trained on."""
    text = demo_text() if args.train_file is None else args.train_file.read_bytes()
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    train, tail = data[: -args.tail], data[-args.tail :]
    if args.validate_on == "train_tail":
        return train, tail
    if args.validate_on != "validation_file" or args.validation_file is None:
        raise SystemExit("--validate_on train_tail, or validation_file with a --validation_file.")
    return train, torch.frombuffer(bytearray(args.validation_file.read_bytes()), dtype=torch.uint8)


def random_rows(data: torch.Tensor, rows: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Draw random stretches of a text, (rows, length) int64."""
    begin = torch.randint(0, len(data) - length + 1, (rows, 1), generator=generator)
    return data[begin + torch.arange(length)].long()


def even_rows(data: torch.Tensor, rows: int, length: int) -> torch.Tensor:
    """Return evenly spaced stretches of a text without overlap, at most `rows`, (rows, length) int64."""
    rows = max(1, min(rows, len(data) // length))
    begin = torch.linspace(0, len(data) - length, rows).long()[:, None]
    return data[begin + torch.arange(length)].long()


CELL = 8  # bytes of a record: a line "ab=37;" between two line breaks
UNKNOWN = 8  # bytes of a repeated passage needed to recognize it


def mix_far(ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Make distant tokens matter in rows of text: repeat passages, and state records that are queried later.

    Content of the first or second quarter of a row recurs two quarters later, at another position there, so that at
    least a quarter of the row lies between. In each of the two pairs of quarters, a passage (64 to 256 bytes; in short
    rows at most an eighth of the row) is repeated, in long rows one per KiB; and records (`ab=37;` on a separate line,
    with unique keys) are stated, one per 128 bytes of the row.

    Args:
        ids: (rows, T) int64 bytes, T a multiple of 256.

    Returns:
        The new rows; and the bytes whose answers are far away, (rows, T) bool: values of queried records, and repeated
        passages after their first 8 bytes.
    """
    rows, length = ids.shape
    if length % 256:
        raise ValueError(f"Rows of {length} bytes: their length must be a multiple of 256.")
    ids, far = ids.clone(), torch.zeros_like(ids, dtype=torch.bool)
    quarter, slot = length // 4, min(256, length // 8)
    slots, cells = quarter // slot, slot // CELL  # slots per quarter, cells per slot
    passages, records = max(1, slots // 2), length // 128
    keys = torch.rand(rows, 26 * 26, generator=generator).argsort(-1)  # distinct for every record of a row
    row = torch.arange(rows)[:, None, None]
    for first in (0, 1):
        stated, asked = (
            torch.rand(rows, slots, generator=generator).argsort(-1) * slot + quarter * (first + part)
            for part in (0, 2)
        )  # (rows, slots), in random order
        # Passages are in the first of these slots, each at its start.
        shortest = min(64, slot // 2)
        size = torch.randint(shortest, slot + 1, (rows, passages, 1), generator=generator)
        offset = torch.arange(slot).expand(rows, passages, slot)
        source, target = (x[:, :passages, None] + offset for x in (stated, asked))
        ids[row, target] = torch.where(offset < size, ids[row, source], ids[row, target])
        far[row, target] = (offset >= UNKNOWN) & (offset < size)
        # Records are in random cells of the others.
        key = keys[:, first * records :][:, :records]
        value = torch.randint(0, 100, (rows, records), generator=generator)
        line = torch.stack(
            [
                torch.full_like(key, 10), key // 26 + 97, key % 26 + 97, torch.full_like(key, ord("=")),
                value // 10 + 48, value % 10 + 48, torch.full_like(key, ord(";")), torch.full_like(key, 10),
            ],
            dim=-1,
        )  # (rows, records, 8)  # fmt: skip
        for begins, is_answer in ((stated, False), (asked, True)):
            free = (begins[:, passages:, None] + CELL * torch.arange(cells)).flatten(1)  # (rows, free cells)
            chosen = torch.rand(free.shape, generator=generator).argsort(-1)[:, :records]
            place = free.gather(1, chosen)[:, :, None] + torch.arange(CELL)  # (rows, records, 8)
            ids[row, place] = line
            far[row, place[..., 4:6]] = is_answer
    return ids, far


KEY_BYTES, VALUE_BYTES = (128, 64), (192, 16)  # the first, and how many: bytes removed from the text


def mix_recall(ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mix recall into rows of text: a key byte followed by its value, queried at least a quarter of the row later.

    In the first half of a row of T bytes, T / 32 keys (at most 64) are stated at random even positions. In its last
    quarter, each is queried three times.

    Args:
        ids: (rows, T) int64 bytes; those of 128 and above are replaced.

    Returns:
        The new rows; and the positions of the answers, (rows, T) bool.
    """
    rows, length = ids.shape
    ids, far, pairs = ids % 128, torch.zeros_like(ids, dtype=torch.bool), min(KEY_BYTES[1], length // 32)
    keys = KEY_BYTES[0] + torch.rand(rows, KEY_BYTES[1], generator=generator).argsort(-1)[:, :pairs]
    values = VALUE_BYTES[0] + torch.randint(0, VALUE_BYTES[1], (rows, pairs), generator=generator)
    for first, end, times in ((0, length // 2, 1), (3 * length // 4, length, 3)):
        order = torch.rand(rows, times * pairs, generator=generator).argsort(-1) % pairs
        slots = torch.rand(rows, (end - first) // 2, generator=generator).argsort(-1)[:, : times * pairs]
        place = first + 2 * slots
        ids.scatter_(1, place, keys.gather(1, order)).scatter_(1, place + 1, values.gather(1, order))
        if first:
            far.scatter_(1, place + 1, True)
    return ids, far


def text_rows(
    data: torch.Tensor, kind: str, rows: int, length: int, generator: torch.Generator, even: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of a text, "plain", "far" (`mix_far`) or "recall" (`mix_recall`), and where answers are far away."""
    ids = even_rows(data, rows, length) if even else random_rows(data, rows, length, generator)
    if kind in ("far", "recall"):
        return (mix_far if kind == "far" else mix_recall)(ids, generator)
    if kind != "plain":
        raise SystemExit(f"{kind}: texts are plain, far or recall.")
    return ids, torch.zeros_like(ids, dtype=torch.bool)


def text_batches(data: torch.Tensor, kind: str, rows: int, length: int) -> Callable[[torch.Generator], Inputs]:
    """Make the `batch` argument of `train` for a causal language model."""

    def batch(generator: torch.Generator) -> Inputs:
        ids, _ = text_rows(data, kind, rows, length, generator)
        return {"input_ids": ids, "labels": ids}

    return batch


def answer_batches(data: torch.Tensor, kind: str, rows: int, length: int) -> Callable[[torch.Generator], Inputs]:
    """Make the same with the loss on distant answers only. All batches have the same number of tokens.

    Row lengths are `length`, its half, its quarter, … down to the shortest that holds a distant answer (64 or 256
    bytes): what is learned on short rows holds on long ones.
    """
    shortest = 64 if kind == "recall" else 256
    halvings = max(n for n in range(length.bit_length()) if n == 0 or length % (shortest << n) == 0)

    def batch(generator: torch.Generator) -> Inputs:
        share = int(torch.randint(0, halvings + 1, (), generator=generator))
        ids, far = text_rows(data, kind, rows * 2**share, length // 2**share, generator)
        return {"input_ids": ids, "labels": ids.masked_fill(~far, -100)}

    return batch


def train_on_text(
    model: Any, data: torch.Tensor, key: Mapping[str, Any], experiment: Experiment, name: str
) -> list[float]:
    """Train on the text, length, rows, seed and steps in `key`, after `answer_steps` on distant answers only.

    Returns the loss of every step, of both phases. Checkpoints depend on all of `key` except the evaluation settings.
    """
    trained = {field: value for field, value in key.items() if field not in ("validated_on", "eval_rows")}
    like, rate = (key["text"], key["rows"], key["length"]), key["learning_rate"]
    answers: list[float] = []
    if key["answer_steps"]:
        first = {field: value for field, value in trained.items() if field != "steps"} | {"phase": "answers"}
        answers = train(
            model, answer_batches(data, *like), key["answer_steps"], seed=key["seed"] + 10**6, decay=False,
            learning_rate=rate, checkpoint=experiment.checkpoint(first), name=f"{name}, answers",
        )  # fmt: skip
    return answers + train(
        model, text_batches(data, *like), key["steps"], seed=key["seed"], learning_rate=rate,
        checkpoint=experiment.checkpoint(trained), name=name,
    )  # fmt: skip


def loss_points(losses: Sequence[float], every: int = 50) -> list[dict[str, float]]:
    """Return the mean of every `every` losses, and the last step of each: points of a learning curve."""
    groups = [losses[begin : begin + every] for begin in range(0, len(losses), every)]
    ends = [min(len(losses), end) for end in range(every, len(losses) + every, every)]
    return [{"step": end, "train_loss": sum(group) / len(group)} for end, group in zip(ends, groups, strict=True)]


@torch.no_grad()
def bits_per_byte(model: Any, ids: torch.Tensor, far: torch.Tensor, rows: int = 2, **inputs: Any) -> dict[str, float]:
    """Compute mean bits per byte given those before it: over all ("bits") and with distant answers ("far_bits")."""
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)
    for some, marked in zip(ids.split(rows), far.split(rows), strict=True):
        logits = model(some, **inputs).logits[:, :-1].float()
        nats = cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="none").double()
        mask = marked[:, 1:].flatten().double()
        sums += torch.stack([nats.sum(), torch.tensor(float(len(nats))), nats @ mask, mask.sum()])
    nats, count, far_nats, far_count = sums.tolist()
    far_bits = far_nats / far_count / math.log(2) if far_count else math.nan
    return {"bits": nats / count / math.log(2), "far_bits": far_bits}


def product(**axes: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """Yield every combination of the values, as dictionaries."""
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))
