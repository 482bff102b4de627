"""Train a Reformer to generate images: a causal language model over gray values, scored in bits per dimension.

    # a complete run without a download, in about two minutes on two cores
    hf-reformer train image-generation --demo

    # your own images: a folder of folders, or csv, jsonl or parquet with a column of file names, of pixels or of
    # `datasets.Image`
    hf-reformer train image-generation --train_file train.parquet --validation_file validation.parquet --baselines

    # a model saved by one of these runs: train it further, or only evaluate and generate
    hf-reformer train image-generation --model_name_or_path runs/drawing --validation_file validation.parquet

All options of `transformers.TrainingArguments` work, `--resume_from_checkpoint last` included.
"""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed

from ..data.signals import pictures
from ..data.tables import read_column
from ..training.model_setup import BackboneArguments, make_model, option, run_recipe
from ..training.reports import format_tables, write_report, write_rows
from ..training.signal_options import PictureArguments
from ..training.signals import in_memory
from ..training.trainers import RecipeMixin, SequentialEvalMixin, build_trainer, train_and_save

VALUES = 256
START = VALUES  # the token before the first pixel
DEFAULTS = {
    "output_dir": "runs/drawing", "attn_layers": ["local", "lsh", "local", "lsh"], "hidden_dropout_prob": 0.0,
    "num_train_epochs": 5, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "config_overrides": "local_window=64",
}  # fmt: skip
DEMO = {
    "output_dir": "runs/demo-drawing", "baselines": True, "num_train_epochs": 10, "attn_layers": ["local", "local"],
    "hidden_size": 64, "attention_head_size": 32, "feed_forward_size": 128, "eval_strategy": "no",
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "--demo": DEMO,
    "--model_name_or_path": {"learning_rate": 3e-4, "num_train_epochs": 2, "config_overrides": None},
}


@dataclass
class DataArguments(PictureArguments):
    """Where the pictures come from."""

    train_file: str | None = option(None, "csv, tsv, json, jsonl or parquet file, or a folder of folders of images.")
    draw_samples: int = option(16, "Images to generate at the end.")

    def size_of(self, name: str, saved: Any, first: Dataset) -> tuple[int, int]:
        """Return the height and width of the pictures of the saved model `name`."""
        if saved.grid_width is None:  # learned positions only know the number of pixels
            size = self.size(first)
            if size[0] * size[1] + 1 != saved.max_position_embeddings:
                raise ValueError(
                    f"The pictures are {size[0]} × {size[1]}; `{name}` draws {saved.max_position_embeddings - 1} "
                    "pixels. Give --image_size, the side of the pictures that it was trained on."
                )
            return size
        axial = saved.position_embedding_type == "axial"  # its grid has one more row, for the start token
        height, width = (saved.axial_pos_shape[0] - 1, saved.grid_width) if axial else saved.rotary_shape
        self.check_size(name, height, width)
        return height, width

    def encode(self, dataset: Dataset, size: tuple[int, int]) -> Dataset:
        """Make a column `input_ids`: the start token, then the gray values, row by row, of pictures of this size."""

        def rows() -> Any:
            for image in pictures(dataset, self.column(dataset)):
                gray = image.convert("L")
                gray = gray if gray.size == size[::-1] else gray.resize(size[::-1])
                yield {"input_ids": np.concatenate([[START], np.asarray(gray).reshape(-1)]).astype(np.int64)}

        return in_memory(rows())


class DrawingTrainer(RecipeMixin, SequentialEvalMixin, Trainer):
    """A Trainer whose predictions are the nats (rows) of every picture."""

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, ...]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(input_ids=inputs["input_ids"]).logits[:, :-1].float()
        targets = inputs["labels"][:, 1:]
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").sum(1)
        return nats.mean() / targets.shape[1], nats, inputs["labels"][:, 0]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(np.stack([np.asarray(row["input_ids"], dtype=np.int64) for row in rows]))
    labels = ids.clone()
    labels[:, 0] = -100  # the start token is not a pixel
    return {"input_ids": ids, "labels": labels}


def bits_per_dimension(prediction: Any, pixels: int) -> dict[str, float]:
    """`compute_metrics` for the Trainer."""
    return {"bits_per_dimension": float(np.mean(prediction.predictions)) / pixels / math.log(2)}


def baseline_bits(train: np.ndarray, pictures: np.ndarray, size: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Compute bits per dimension of PNG files, and of a histogram of every pixel's values in the training data."""
    from PIL import Image

    files = 0
    for picture in pictures.astype(np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(picture.reshape(size)).save(buffer, format="PNG", optimize=True)
        files += len(buffer.getvalue())
    counts = np.full((VALUES, train.shape[1]), 1 / VALUES)
    np.add.at(counts, (train, np.arange(train.shape[1])[None]), 1.0)
    bits = -np.log2(counts / counts.sum(0))
    found = bits[pictures, np.arange(pictures.shape[1])[None]].mean()
    return {
        "png": {"bits_per_dimension": 8 * files / pictures.size},
        "histogram of every pixel": {"bits_per_dimension": float(found)},
    }


@torch.no_grad()
def draw_pictures(model: Any, count: int, size: tuple[int, int]) -> np.ndarray:
    """Generate gray values (count, height, width), sampled pixel by pixel from the model's distribution."""
    ids = torch.full((count, 1), START, device=model.device)
    pixels = size[0] * size[1]
    drawn = model.generate(
        ids, max_new_tokens=pixels, min_new_tokens=pixels, do_sample=True, top_k=0, suppress_tokens=[START]
    )
    return drawn[:, 1:].unflatten(1, size).cpu().numpy()


def write_sheet(file: Path, drawn: np.ndarray) -> None:
    """Plot pictures (count, height, width) on one sheet."""
    count = len(drawn)
    columns = math.ceil(math.sqrt(count))
    figure = Figure(figsize=(columns, -(-count // columns)), layout="constrained")
    for axes, picture in zip(figure.subplots(-(-count // columns), columns, squeeze=False).flat, drawn, strict=False):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
    for axes in figure.axes:
        axes.set_axis_off()
    figure.savefig(file, dpi=120)


def run(data: DataArguments, model_args: BackboneArguments, args: TrainingArguments) -> None:
    """Read the data, train, evaluate, draw and report."""
    set_seed(args.seed)
    saved = (
        None if model_args.model_name_or_path is None else AutoConfig.from_pretrained(model_args.model_name_or_path)
    )
    with args.main_process_first(desc="preparing the data"):
        splits = data.complete(data.read(), args.seed)
        first = next(iter(splits.values()))
        size = data.size(first) if saved is None else data.size_of(str(model_args.model_name_or_path), saved, first)
        encoded = {}
        for split, part in splits.items():
            with data.naming_source(split):
                encoded[split] = data.encode(part, size)
    pixels, trains = size[0] * size[1], "train" in splits
    fields: dict[str, Any] = {}
    if saved is None:
        fields = {"vocab_size": VALUES + 1, "bos_token_id": START, "eos_token_id": None, "pad_token_id": None}
        axial = model_args.position_embedding_type == "axial"
        fields |= {"is_decoder": True, **({"axial_pos_shape": (size[0] + 1, size[1])} if axial else {})}
        fields |= {"rotary_shape": size} if model_args.position_embedding_type == "rotary" else {}
    model = make_model(AutoModelForCausalLM, model_args, None, pixels + 1, trains, **fields)
    options = {"data_collator": collate, "compute_metrics": lambda found: bits_per_dimension(found, pixels)}
    trainer = build_trainer(DrawingTrainer, model, args, None, encoded, **options)
    counts = ", ".join(f"{split} {len(part)}" for split, part in splits.items())
    train_and_save(trainer, f"Images: {counts}; {size[0]} × {size[1]} gray pixels")
    report(trainer, splits, encoded, data, size)


def report(
    trainer: Trainer, splits: Any, encoded: Mapping[str, Dataset], data: DataArguments, size: tuple[int, int]
) -> None:
    """Write bits per dimension of every picture and overall, with baselines, and generated pictures."""
    folder, tables, trained = Path(str(trainer.args.output_dir)), {}, "train" in splits

    def values(split: str) -> np.ndarray:
        return np.stack(read_column(encoded[split], "input_ids"))[:, 1:]

    pixels = size[0] * size[1]
    for split, dataset in encoded.items():
        if split == "train":
            continue
        output = trainer.predict(dataset, metric_key_prefix=split)
        trainer.save_metrics(split, output.metrics)
        if trainer.is_world_process_zero():
            bits = np.asarray(output.predictions) / pixels / math.log(2)
            tables[split] = {"Reformer": {"bits_per_dimension": float(bits.mean())}}
            if data.baselines and trained:
                tables[split] |= baseline_bits(values("train"), values(split), size)
            rows = ({"row": row, "bits_per_dimension": round(float(x), 5)} for row, x in enumerate(bits))
            write_rows(folder / f"predictions_{split}.jsonl", rows)
    if trainer.is_world_process_zero():
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        write_sheet(folder / "drawn.png", draw_pictures(model.eval(), data.draw_samples, size))
    write_report(trainer, tables, format_tables(tables, splits, "pictures"), data.describe() if trained else None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with the given arguments, by default those of the process."""
    classes = (DataArguments, BackboneArguments, TrainingArguments)
    run_recipe("image-generation", __doc__, classes, run, arguments, DEFAULTS, PRESETS)
