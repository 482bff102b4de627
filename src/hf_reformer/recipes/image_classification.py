"""Train a Reformer to classify images, from their pixels or patches.

    # a complete run without a download, in about two minutes on two cores
    hf-reformer train image-classification --demo

    # your own images: a folder with one sub-folder of images per label; or csv, jsonl or parquet with a column of
    # file names, of pixels (0 … 255; rows, or all pixels of a square in one list), or of `datasets.Image`
    hf-reformer train image-classification --train_file train.parquet --validation_file validation.parquet --baselines

    # large images, as patches of 16 × 16 pixels
    hf-reformer train image-classification --train_file photos --image_size 224 --patch_size 16

    # a model saved by one of these runs: train it further, or only predict
    hf-reformer train image-classification --model_name_or_path runs/image --train_file more.parquet
    hf-reformer train image-classification --model_name_or_path runs/image --predict_file picture.png

All options of `transformers.TrainingArguments` work, `--resume_from_checkpoint last` included.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.models.vit import ViTImageProcessorPil

from ..data.signals import picture, pictures
from ..hub.model_folder import check_own_files
from ..training.classification import Metrics, label_fields, shortened, task_of_model
from ..training.model_setup import (
    SAVED_MODEL,
    BackboneArguments,
    check_same_as_saved,
    load_trained,
    make_model,
    option,
    run_recipe,
)
from ..training.signal_classes import label_columns, label_splits, report_classes
from ..training.signal_options import LabelArguments, PictureArguments
from ..training.signals import AugmentingCollator, PictureCollator, SignalTrainer, in_memory, vary_picture
from ..training.trainers import build_trainer, longest_first, train_and_save

DEFAULTS = {
    "output_dir": "runs/image", "attn_layers": ["local", "lsh", "local", "lsh"], "hidden_dropout_prob": 0.1,
    "num_train_epochs": 10, "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "per_device_train_batch_size": 16,
}  # fmt: skip
DEMO = {
    "output_dir": "runs/demo-image", "baselines": True, "num_train_epochs": 8, "attn_layers": ["local", "lsh"],
    "hidden_size": 64, "attention_head_size": 32, "feed_forward_size": 128, "eval_strategy": "no", "augment": False,
    "learning_rate": 2e-3, "per_device_train_batch_size": 32,
    "config_overrides": "local_window=32,lsh_window=32",
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {**SAVED_MODEL, "--demo": DEMO}


@dataclass
class DataArguments(PictureArguments, LabelArguments):
    """Where the pictures come from."""

    kind_of_file = "picture"

    train_file: str | None = option(
        None, "csv, tsv, json, jsonl or parquet file, or a folder with one sub-folder of images per label."
    )
    patch_size: int | None = option(None, "Side of the square patches used as tokens. Default: 1, single pixels.")
    flip: bool = option(False, "Mirror half of the training images; use it if left and right do not matter.")

    def processor(self, model: BackboneArguments, first: Dataset) -> Any:
        """Make the image processor: that of the saved model, or one for the size of the pictures."""
        name = model.model_name_or_path
        if name is not None:
            if Path(name).is_dir():
                check_own_files(Path(name))
            found: Any = AutoImageProcessor.from_pretrained(name)
            self.check_size(name, found.size["height"], found.size["width"])
            check_same_as_saved(name, self, {"patch_size": AutoConfig.from_pretrained(name).patch_size})
            return found
        height, width = self.size(first)
        half = [0.5, 0.5, 0.5]
        return ViTImageProcessorPil(
            size={"height": height, "width": width}, image_mean=half, image_std=half, do_convert_rgb=True
        )

    def encode(self, dataset: Dataset, processor: Any) -> Dataset:
        """Make columns `pixel_values`, flattened, `length` and, if known, `labels`."""

        def rows() -> Iterator[dict[str, Any]]:
            for image in pictures(dataset, self.column(dataset)):
                values = np.asarray(processor(image)["pixel_values"][0], dtype=np.float32)
                yield {"pixel_values": values.reshape(-1), "length": 1}

        return in_memory(rows(), label_columns(dataset))


def predict_files(data: DataArguments, folder: str, args: TrainingArguments) -> None:
    """Print the most probable labels of pictures."""
    model = load_trained(AutoModelForImageClassification, folder)
    classifier = pipeline(
        "image-classification", model=model, image_processor=AutoImageProcessor.from_pretrained(folder)
    )
    for file in data.files_to_predict():
        print(f"\n{file}")
        for answer in classifier(picture(file), top_k=5):
            print(f"  {answer['score']:7.3f}  {answer['label']}")


def pixels(encoded: Dataset) -> np.ndarray:
    """Return the pixels (rows, numbers) of encoded pictures, for a simple model."""
    return np.stack([np.asarray(row["pixel_values"], dtype=np.float32) for row in encoded])


def run(data: DataArguments, model_args: BackboneArguments, args: TrainingArguments) -> bool:
    """Read the data, train, evaluate and report. Returns whether a model was trained."""
    set_seed(args.seed)
    model_labels, model_problem_type = task_of_model(model_args.model_name_or_path)
    with args.main_process_first(desc="preparing the data"):
        splits, task = label_splits(data, model_labels, args.seed, model_problem_type)
        processor = data.processor(model_args, next(iter(splits.values())))
        encoded = {}
        for split, part in splits.items():
            with data.naming_source(split):
                rows = data.encode(part, processor)
            encoded[split] = rows if split == "train" else longest_first(rows)
    metrics, trains = Metrics(task, None), "train" in splits
    fields, (height, width) = label_fields(task), (processor.size["height"], processor.size["width"])
    if model_args.model_name_or_path is None:
        patch = data.patch_size or 1
        rows, columns = -(-height // patch), -(-width // patch)
        grid = "axial_pos_shape" if model_args.position_embedding_type == "axial" else "rotary_shape"
        fields |= {"patch_size": patch}
        fields |= {} if model_args.position_embedding_type == "learned" else {grid: (rows, columns)}
        tokens = rows * columns
    else:
        tokens = height * width
    model = make_model(AutoModelForImageClassification, model_args, None, tokens, trains, **fields)
    shape = (3, height, width)
    collate = PictureCollator(shape)
    change = vary_picture(shape, data.augment, data.flip)
    augmenting = AugmentingCollator(collate, "pixel_values", change, args.seed) if data.augment or data.flip else None
    options = {"data_collator": collate, "compute_metrics": metrics, "callbacks": [augmenting] if augmenting else None}
    trainer = build_trainer(SignalTrainer, model, args, processor, encoded, **options)
    trainer.augmenting = augmenting
    counts = ", ".join(f"{split} {len(part)}" for split, part in splits.items())
    labels = shortened(task.label_names) if task.label_names else task.problem_type
    train_and_save(trainer, f"Images: {counts}; {height} × {width} pixels. Labels: {labels}")
    report_classes(trainer, metrics, splits, encoded, data, "pictures", pixels, "pixels + support vectors")
    return trains


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with the given arguments, by default those of the process."""
    classes = (DataArguments, BackboneArguments, TrainingArguments)
    run_recipe("image-classification", __doc__, classes, run, arguments, DEFAULTS, PRESETS, predict_files)
