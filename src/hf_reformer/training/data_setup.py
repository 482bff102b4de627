"""Data of a recipe: its options and their checks, the splits to read, and held-out data.

The options have the names they have in transformers' example scripts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, DatasetDict
from transformers.utils import logging

from ..data.columns import hold_out, splits_of
from ..data.tables import read_examples, read_named_dataset, read_text
from .model_setup import ACTIONS, option

logger = logging.get_logger(__name__)


@dataclass
class SplitArguments:
    """Where the examples of every split come from, and how many of them to use. Recipes add options of their own.

    `sources` are options, besides a dataset and files, that name training data; `held_out` are the parts that are
    taken from the training data if no data is given for them.
    """

    sources: ClassVar[tuple[str, ...]] = ()
    held_out: ClassVar[tuple[str, ...]] = ("validation",)

    dataset_name: str | None = option(None, "A dataset on the Hub, or a folder that `datasets.load_dataset` can read.")
    dataset_config_name: str | None = option(None, "The configuration of the dataset.", aliases=["--dataset_config"])
    train_file: str | None = option(None, "csv, tsv, json, jsonl or parquet file.")
    validation_file: str | None = option(None, "Default: that of the dataset, else a part of the training data.")
    test_file: str | None = option(None, "Data to predict at the end; needs no labels.")
    max_train_samples: int | None = option(None, "Use at most this many training examples.")
    max_eval_samples: int | None = option(None, "Evaluate on at most this many examples.")
    max_predict_samples: int | None = option(None, "Predict at most this many test examples, the first ones.")
    validation_fraction: float = option(0.1, "Fraction of the training data held out if there is no validation data.")

    wanted: tuple[str, ...] | None = field(default=None, init=False)  # parts among ACTIONS; None: those with data

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the data that the run uses: any of train, validation and test."""
        if self.wanted is not None:
            return self.wanted
        names = {"train": self._given("train_file"), "test": self.test_file}
        names["validation"] = names["train"] or self.validation_file
        return tuple(part for part in ACTIONS if names[part])

    def _given(self, file: str) -> list[str]:
        """Return the options that name data for a split: its file, a dataset, or the recipe's own sources."""
        return [name for name in (file, "dataset_name", *self.sources) if getattr(self, name)]

    def check(self, model: Any, args: Any) -> None:
        """Check the options and decide what to do; call this before anything is read.

        If no action is requested, the given data decide: train and evaluate on training data, predict a test file.
        Afterwards, `args.do_train`, `do_eval` and `do_predict` say what is done.

        Raises:
            SystemExit: there is nothing to do.
            ValueError: the options contradict each other, or some are missing.
        """
        options = ", ".join(f"--{name}" for name in ("train_file", "dataset_name", *self.sources))
        requested = tuple(part for part, action in ACTIONS.items() if getattr(args, action))
        self.wanted = requested or tuple(part for part in self.parts if getattr(args, ACTIONS[part]) is not False)
        for part, action in ACTIONS.items():
            setattr(args, action, part in self.wanted)
        if not self.wanted and not self.has_inputs():
            raise SystemExit(
                f"Give {options}, or --model_name_or_path with a file to evaluate or predict. See --help."
            )
        if len(given := self._given("train_file")) > 1:
            raise ValueError(f"Give {' or '.join(f'--{name}' for name in given)}, not both: each is training data.")
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ValueError("--dataset_config_name is the configuration of a dataset. Give --dataset_name as well.")
        if args.do_train and not given:
            raise ValueError(f"--do_train: there is nothing to train on. Give {options}.")
        if model.model_name_or_path is None and not args.do_train:
            what = "Nothing is trained here" if given else "There is nothing to train on"
            way = "--do_train" if given else options
            raise ValueError(f"{what}, and a new model answers at random. Give {way} or --model_name_or_path.")
        if args.do_eval and not args.do_train and not self._given("validation_file"):
            raise ValueError(
                "--do_eval without --do_train needs a --validation_file: only the training run knows which part of "
                "the training data was held out."
            )
        if args.do_predict and not self._given("test_file"):
            raise ValueError("--do_predict: there is no test data. Give a --test_file, or leave the option out.")
        if not args.do_train and (idle := [x for x in ("resume_from_checkpoint", "push_to_hub") if getattr(args, x)]):
            raise ValueError(
                f"--{idle[0]} belongs to training, and nothing is trained here. Leave it out, or give --do_train."
            )

    def has_inputs(self) -> bool:
        """Whether there is something to predict besides the splits, by an option `--predict_file` of the recipe."""
        return getattr(self, "predict_file", None) is not None

    def read_source(self) -> Mapping[str, Dataset]:
        """Read all splits of the dataset, or of another source of the recipe; none if there are only files."""
        if self.dataset_name is None:
            return {}
        return read_named_dataset(self.dataset_name, self.dataset_config_name)

    def read_file(self, file: str) -> Dataset:
        """Read a split from a file."""
        return read_examples(file)

    def read(self) -> DatasetDict:
        """Read the splits of all `parts`: `train`, `validation`, `test`, or several such as `validation_matched`.

        Splits that are to be held out of the training data are not included.

        Raises:
            ValueError: a split is missing or has no rows.
        """
        source, splits = self.read_source(), DatasetDict()
        for part in self.parts:
            file = getattr(self, f"{part}_file")
            if file is not None:
                found = {part: self.read_file(file)}
            else:
                found = {name: source[name] for name in splits_of(part, source)}
            if not found and (part not in self.held_out or "train" not in splits):
                raise ValueError(
                    f"The data has no split `{part}`; its splits are {', '.join(source)}. Give --{part}_file, or what "
                    f"to do without --{ACTIONS[part]}."
                )
            splits.update(found)
        if empty := [split for split, rows in splits.items() if not len(rows)]:
            raise ValueError(f"The {', '.join(empty)} data holds no row. Leave it out.")
        return splits

    @contextmanager
    def naming_source(self, split: str) -> Iterator[None]:
        """Add the source of a split to any ValueError about its rows."""
        try:
            yield
        except ValueError as error:
            file = getattr(self, f"{split.split('_')[0]}_file")
            source = f"`{file}`" if file is not None else f"the split `{split}` of `{self.dataset_name}`"
            raise ValueError(f"{error} (This is {source}.)" if file or self.dataset_name else str(error)) from error

    def complete(
        self, splits: DatasetDict, seed: int, label_column: str | None = None, groups: Sequence[Any] | None = None
    ) -> DatasetDict:
        """Hold out validation data if there is none, and limit every split to the requested number of samples.

        Training rows of the same group in `groups` stay together (`hold_out`).
        """
        has_validation = any(split.startswith("validation") for split in splits)
        if "train" in splits and "validation" in self.parts and not has_validation:
            held_out = hold_out(splits["train"], label_column, self.validation_fraction, seed, groups)
            splits = DatasetDict({**held_out, **splits, "train": held_out["train"]})
            size = len(splits["validation"])
            logger.warning(f"There is no validation data: {size} of the training examples are held out for it.")
        limits = {"train": self.max_train_samples, "test": self.max_predict_samples}
        for split, dataset in splits.items():
            part = split.split("_")[0]
            limit = limits.get(part, self.max_eval_samples)
            if limit is not None and limit < len(dataset):
                shuffled = dataset if part == "test" else dataset.shuffle(seed=seed)
                splits[split] = shuffled.select(range(limit))
        return splits

    def choose_rows(
        self, sizes: Mapping[str, int], seed: int, groups: Sequence[Any] | None = None
    ) -> dict[str, tuple[str, list[int]]]:
        """Apply `complete` to splits of these sizes; return, by split, where its rows are from and their numbers."""
        numbers = {split: Dataset.from_dict({"row": range(size)}) for split, size in sizes.items()}
        chosen = self.complete(DatasetDict(numbers), seed, groups=groups)
        return {split: (split if split in sizes else "train", rows["row"][:]) for split, rows in chosen.items()}

    def describe(self) -> str:
        """Name the data that was evaluated and trained on, for the model card.

        Local files and folders are named by the last part of their path, so that the public card reveals no more.
        """
        trained = self._names("train_file")
        measured = trained if self.validation_file is None else self._names("validation_file")
        return measured if measured == trained else f"{measured} (trained on {trained})"

    def _names(self, file: str) -> str:
        value = getattr(self, self._given(file)[0])
        names = value if isinstance(value, list) else [str(value)]
        return ", ".join(Path(name).name if Path(name).exists() else name for name in names)


@dataclass
class SplitsAndFileArguments(SplitArguments):
    """`SplitArguments`, and a text file to predict at the end, with or without any other data."""

    predict_file: str | None = option(None, "A text file to predict at the end.")

    def check(self, model: Any, args: Any) -> None:
        super().check(model, args)
        if self.predict_file is None:
            return
        if not Path(self.predict_file).is_file():
            raise ValueError(f"--predict_file: there is no file `{self.predict_file}` with texts to predict.")
        if not read_text(self.predict_file).strip():
            raise ValueError(f"--predict_file: `{self.predict_file}` is empty, so there are no texts to predict.")
