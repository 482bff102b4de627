"""What a recipe reads: options for its data, their checks, the splits of files, and what is held out."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from datasets import DatasetDict
from transformers.utils import logging

from ..data.tables import hold_out, read_examples, read_text
from .model_setup import ModelArguments, option

logger = logging.get_logger(__name__)


@dataclass
class FileArguments:
    """Files of examples, and how many of them to use. A recipe adds options of its own.

    `sources` are options, besides files, that name data to train on.
    """

    sources: ClassVar[tuple[str, ...]] = ()

    train_file: str | None = option(
        None, "csv, tsv, json, jsonl or parquet file, or a folder with one sub-folder of texts per label."
    )
    validation_file: str | None = option(None, "Default: a part of the training data.")
    test_file: str | None = option(None, "Predicted at the end.")
    max_train_samples: int | None = option(None, "Use at most this many training examples.")
    max_eval_samples: int | None = option(None, "Evaluate on at most this many examples.")
    validation_fraction: float = option(0.1, "Part of the training data to evaluate on, without a --validation_file.")
    predict_file: str | None = option(None, "A text file to predict at the end.")

    def check(self, model: ModelArguments) -> bool:
        """Whether there is data; if not, a saved model predicts a file. To be called before anything is read.

        Raises:
            SystemExit: there is nothing to do.
            ValueError: an option would fail only after training.
        """
        train = (*self.sources, "train_file")
        has_data = any(getattr(self, name) for name in (*train, "validation_file", "test_file"))
        options = ", ".join(f"--{name}" for name in train)
        if not has_data and (self.predict_file is None or model.model_name_or_path is None):
            raise SystemExit(f"Give {options}, or --model_name_or_path with --predict_file. See --help.")
        if model.model_name_or_path is None and not any(getattr(self, name) for name in train):
            raise ValueError(
                f"There is nothing to train on, and a new model answers at random. Give {options} or "
                "--model_name_or_path."
            )
        if self.predict_file is not None and not Path(self.predict_file).is_file():
            raise ValueError(f"--predict_file: there is no file `{self.predict_file}` with texts to predict.")
        if self.predict_file is not None and not read_text(self.predict_file).strip():
            raise ValueError(f"--predict_file: `{self.predict_file}` is empty, so there are no texts to predict.")
        return has_data

    def read_files(self) -> DatasetDict:
        """The splits that have a file."""
        files = {"train": self.train_file, "validation": self.validation_file, "test": self.test_file}
        return DatasetDict({split: read_examples(file) for split, file in files.items() if file is not None})

    def complete(self, splits: DatasetDict, seed: int, label_column: str | None = None) -> DatasetDict:
        """Hold out validation data of the training data if there is none, and keep at most the samples asked for."""
        if empty := [split for split, dataset in splits.items() if not len(dataset)]:
            raise ValueError(f"The {', '.join(empty)} data holds no row. Leave it out.")
        if "train" in splits and not any(split.startswith("validation") for split in splits):
            held_out = hold_out(splits["train"], label_column, self.validation_fraction, seed)
            splits = DatasetDict({**held_out, **splits, "train": held_out["train"]})
            size = len(splits["validation"])
            logger.warning(f"There is no validation data: {size} of the training examples are held out for it.")
        for split, dataset in splits.items():
            limit = self.max_train_samples if split == "train" else self.max_eval_samples
            if limit is not None and limit < len(dataset):
                splits[split] = dataset.shuffle(seed=seed).select(range(limit))
        return splits
