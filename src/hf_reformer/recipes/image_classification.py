"""Train a Reformer to classify pictures, from their pixels or from patches of them.

    # a complete run without a download, in about two minutes on two cores
    hf-reformer train image-classification --demo

    # your own pictures: a folder with one sub-folder of pictures per label; or csv, jsonl or parquet with a column of
    # file names, of pixels (0 … 255; rows, or all of a square in one list), or of `datasets.Image`
    hf-reformer train image-classification --train_file train.parquet --validation_file validation.parquet --baselines

    # large pictures by patches of 16 pixels
    hf-reformer train image-classification --train_file photos --image_size 224 --patch_size 16

    # a model that was saved by one of these runs: train it further, or only predict
    hf-reformer train image-classification --model_name_or_path runs/image --train_file more.parquet
    hf-reformer train image-classification --model_name_or_path runs/image --predict_file picture.png

All options of `transformers.TrainingArguments` work, `--resume_from_checkpoint last` included.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TrainingArguments,
    pipeline,
    set_seed,
)
from transformers.models.vit import ViTImageProcessorPil

from ..data.demo_signals import handwritten_digits
from ..data.signals import IMAGE_COLUMNS, PICTURES, find_signal_column, picture, pictures
from ..hub.model_folder import check_own_files
from ..training.classification import Metrics, shortened, task_of_model
from ..training.model_setup import SAVED_MODEL, BackboneArguments, load_trained, make_model, option, parse_arguments
from ..training.signals import (
    AugmentingCollator,
    PictureCollator,
    SignalArguments,
    SignalTrainer,
    in_memory,
    label_columns,
    label_fields,
    label_splits,
    report_classes,
    vary_picture,
)
from ..training.trainers import build_trainer, longest_first, train_and_save

DEFAULTS = {
    "output_dir": "runs/image", "attn_layers": ["local", "lsh", "local", "lsh"], "hidden_dropout_prob": 0.1,
    "num_train_epochs": 10, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "per_device_train_batch_size": 32,
}  # fmt: skip
DEMO = {
    "output_dir": "runs/demo-image", "baselines": True, "num_train_epochs": 8, "attn_layers": ["local", "lsh"],
    "hidden_size": 64, "attention_head_size": 32, "feed_forward_size": 128, "eval_strategy": "no", "augment": False,
    "config_overrides": "local_window=32,lsh_window=32",
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {**SAVED_MODEL, "--demo": DEMO}


@dataclass
class DataArguments(SignalArguments):
    """Where the pictures come from."""

    sources = ("demo",)
    suffixes = PICTURES

    demo: bool = option(False, "Complete run without a download: handwritten digits of scikit-learn.")
    train_file: str | None = option(
        None, "csv, tsv, json, jsonl or parquet file, or a folder with one sub-folder of pictures per label."
    )
    image_column: str | None = option(None, "Pictures, pixels, or names of files. Default: found by its name or kind.")
    image_size: int | None = option(
        None, "Height and width that pictures are resized to. Default: those of the first."
    )
    patch_size: int = option(1, "Side of the squares that are tokens; 1: pixels.")
    flip: bool = option(False, "Mirror half of the training pictures: where left and right mean nothing.")
    predict_file: str | None = option(None, "A picture, or a folder of them, to classify at the end.")

    def read_source(self) -> Mapping[str, Dataset]:
        return handwritten_digits() if self.demo else super().read_source()

    def describe(self) -> str:
        return "handwritten digits of scikit-learn" if self.demo else super().describe()

    def has_inputs(self) -> bool:
        return self.predict_file is not None

    def check(self, model: BackboneArguments, args: Any) -> None:
        super().check(model, args)
        if self.predict_file is not None and not self.files_to_predict():
            raise ValueError(f"--predict_file: there is no picture `{self.predict_file}`, nor a folder of them.")

    def files_to_predict(self) -> list[str]:
        """Pictures that --predict_file names."""
        path = Path(self.predict_file or "")
        files = [path] if path.is_file() else sorted(x for x in path.rglob("*") if x.suffix.lower() in PICTURES)
        return [str(file) for file in files if self.predict_file is not None]

    def column(self, dataset: Dataset) -> str:
        return find_signal_column(dataset, self.image_column, IMAGE_COLUMNS, "--image_column")

    def processor(self, model: BackboneArguments, first: Dataset | None) -> Any:
        """What prepares pictures for the model: that of a saved model, or one of the data's size."""
        if model.model_name_or_path is not None:
            if Path(model.model_name_or_path).is_dir():
                check_own_files(Path(model.model_name_or_path))
            return AutoImageProcessor.from_pretrained(model.model_name_or_path)
        height = width = self.image_size
        if height is None:
            width, height = next(pictures(first, self.column(first))).size
        half = [0.5, 0.5, 0.5]
        return ViTImageProcessorPil(
            size={"height": height, "width": width}, image_mean=half, image_std=half, do_convert_rgb=True
        )

    def encode(self, dataset: Dataset, processor: Any) -> Dataset:
        """Columns `pixel_values`, all of a picture in one row, and `length`; and `labels`, if they are known."""

        def rows() -> Iterator[dict[str, Any]]:
            for image in pictures(dataset, self.column(dataset)):
                values = np.asarray(processor(image)["pixel_values"][0], dtype=np.float32)
                yield {"pixel_values": values.reshape(-1), "length": 1}

        return in_memory(rows(), label_columns(dataset))


def predict_files(files: Sequence[str], folder: str) -> None:
    """Print the most probable labels of pictures."""
    model = load_trained(AutoModelForImageClassification, folder)
    classifier = pipeline(
        "image-classification", model=model, image_processor=AutoImageProcessor.from_pretrained(folder)
    )
    for file in files:
        print(f"\n{file}")
        for answer in classifier(picture(file), top_k=5):
            print(f"  {answer['score']:7.3f}  {answer['label']}")


def pixels(encoded: Dataset) -> np.ndarray:
    """(rows, numbers): what a simple model sees."""
    return np.stack([np.asarray(row["pixel_values"], dtype=np.float32) for row in encoded])


def run(data: DataArguments, model_args: BackboneArguments, args: TrainingArguments) -> bool:
    """Read the data, train, evaluate and report. Returns whether a model was trained."""
    set_seed(args.seed)
    model_labels, model_problem_type = task_of_model(model_args.model_name_or_path)
    with args.main_process_first(desc="preparing the data"):
        splits, task = label_splits(data, data.column, model_labels, args.seed, model_problem_type)
        processor = data.processor(model_args, next(iter(splits.values())))
        encoded = {}
        for split, part in splits.items():
            with data.naming_source(split):
                rows = data.encode(part, processor)
            encoded[split] = rows if split == "train" else longest_first(rows)
    metrics, trains = Metrics(task, None), "train" in splits
    fields, (height, width) = label_fields(task), (processor.size["height"], processor.size["width"])
    if model_args.model_name_or_path is None:
        rows, columns = -(-height // data.patch_size), -(-width // data.patch_size)
        grid = "axial_pos_shape" if model_args.position_embedding_type == "axial" else "rotary_shape"
        fields |= {"patch_size": data.patch_size}
        fields |= {} if model_args.position_embedding_type == "learned" else {grid: (rows, columns)}
        tokens = rows * columns
    else:
        tokens = height * width
    model = make_model(AutoModelForImageClassification, model_args, None, tokens, trains, **fields)
    shape = (3, height, width)
    collate = PictureCollator(shape)
    change = vary_picture(shape, data.flip)
    augmenting = AugmentingCollator(collate, "pixel_values", change, args.seed) if data.augment or data.flip else None
    options = {"data_collator": collate, "compute_metrics": metrics, "callbacks": [augmenting] if augmenting else None}
    trainer = build_trainer(SignalTrainer, model, args, processor, encoded, **options)
    trainer.augmenting = augmenting
    counts = ", ".join(f"{split} {len(part)}" for split, part in splits.items())
    labels = shortened(task.label_names) if task.label_names else task.problem_type
    train_and_save(trainer, f"Pictures: {counts}; {height} × {width} pixels. Labels: {labels}")
    report_classes(trainer, metrics, splits, encoded, data, "pictures", pixels, "pixels + support vectors")
    return trains


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with these arguments, by default those of the process."""
    classes = (DataArguments, BackboneArguments, TrainingArguments)
    data, model_args, args = parse_arguments("image-classification", __doc__, classes, arguments, DEFAULTS, PRESETS)
    data.check(model_args, args)
    trained = bool(data.parts) and run(data, model_args, args)
    if data.predict_file is not None and args.process_index == 0:
        predict_files(data.files_to_predict(), args.output_dir if trained else model_args.model_name_or_path)
