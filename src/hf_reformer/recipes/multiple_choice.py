"""Train a Reformer to choose the correct one of several endings of a text, or answers to a question.

    # your own files with SWAG's columns: sent1, sent2, ending0, ending1 …, label
    hf-reformer train multiple-choice --train_file train.csv --validation_file validation.csv --baselines

    # other columns: a text, a list of choices, the index of the correct one
    hf-reformer train multiple-choice --dataset_name Rowan/hellaswag --context_column ctx --endings_column endings

    # a model saved by one of these runs: train it further, or only predict
    hf-reformer train multiple-choice --model_name_or_path runs/multiple-choice --train_file more.csv
    hf-reformer train multiple-choice --model_name_or_path runs/multiple-choice --test_file questions.csv

All questions have the same number of choices, at least two. All options of `transformers.TrainingArguments` work,
`--resume_from_checkpoint last` included.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from scipy.special import softmax
from transformers import (
    AutoModelForMultipleChoice,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from ..data.columns import check_columns, check_distinct, labels_unknown
from ..data.packing import token_ids
from ..data.tables import cell_text, read_column
from ..training.model_setup import (
    SAVED_MODEL,
    ModelArguments,
    for_pairs,
    make_model,
    make_tokenizer,
    option,
    run_recipe,
)
from ..training.pretraining import MaskedPretrainingArguments, pretrain
from ..training.reports import format_tables, write_report, write_rows
from ..training.similarity import word_similarity
from ..training.trainers import GroupedTrainer, build_trainer, longest_first, predict_splits, train_and_save

logger = logging.get_logger(__name__)

DEFAULTS = {"output_dir": "runs/multiple-choice", "train_sampling_strategy": "group_by_length"}


@dataclass
class DataArguments(MaskedPretrainingArguments):
    """Where questions and choices come from."""

    context_column: str = option("sent1", "The texts, or questions.")
    start_column: str | None = option(None, "What every choice begins with. Default: sent2, if there is one.")
    ending_prefix: str = option("ending", "The choices are in columns named by this prefix and 0, 1, ….")
    endings_column: str | None = option(None, "A column of lists of choices, instead of --ending_prefix.")
    label_column: str = option("label", "The index of the correct choice, from 0.")
    max_length: int = option(
        1024, "Tokens of text and choice together; longer ones are truncated.", aliases=["--max_seq_length"]
    )
    baselines: bool = option(False, "Also score random guessing and the choice most similar to the text.")

    def check(self, model: ModelArguments, args: TrainingArguments) -> None:
        names = ("context_column", "start_column", "endings_column", "label_column")
        check_distinct({f"--{name}": getattr(self, name) for name in names})
        super().check(model, args)


class Question(NamedTuple):
    """A text and its choices. `label`: the number of the correct one; None: unknown."""

    context: str
    choices: list[str]
    label: int | None


def read_questions(dataset: Dataset, args: DataArguments, split: str) -> list[Question]:
    """Read the questions of a split; a test split may have no labels.

    Raises:
        ValueError: a text is missing, there are fewer than two choices, their number differs between rows, or a label
            is not the number of a choice; the message names the row.
    """
    names = dataset.column_names
    start_column = args.start_column or ("sent2" if "sent2" in names else None)
    label_column = args.label_column if args.label_column in names or not split.startswith("test") else None
    columns = [args.context_column, start_column, args.endings_column, label_column]
    check_columns(dataset, split, columns, "Name them with --context_column, --start_column and --label_column.")
    labels: list[Any] = [None] * len(dataset) if label_column is None else read_column(dataset, label_column)
    unknown = labels_unknown(split, labels)
    starts = [""] * len(dataset) if start_column is None else read_column(dataset, start_column)
    rows = zip(read_column(dataset, args.context_column), starts, _choices(dataset, args, split), labels, strict=True)
    questions: list[Question] = []
    for row, (context, start, choices, label) in enumerate(rows):
        where = f"Row {row} of the {split} data"
        size = len(questions[0].choices) if questions else max(2, len(choices))
        if len(choices) != size:
            raise ValueError(
                f"{where} has {len(choices)} choices, not {size}. All questions need as many, at least two."
            )
        for text in (context, *choices):
            if not isinstance(text, str | int | float) or not str(cell_text(text) or "").strip():
                raise ValueError(f"{where} holds {text!r}, where a text or a choice belongs. Leave it out.")
        beginning = cell_text(start) or ""
        texts = [f"{beginning} {cell_text(choice)}".strip() for choice in choices]
        questions.append(Question(str(cell_text(context)), texts, None if unknown else _label(label, size, where)))
    return questions


def _choices(dataset: Dataset, args: DataArguments, split: str) -> list[list[Any]]:
    """Return the choices of every row, from one column of lists or several columns."""
    if args.endings_column is not None:
        return [cell if isinstance(cell, list) else [cell] for cell in read_column(dataset, args.endings_column)]
    pattern = re.compile(re.escape(args.ending_prefix) + r"(\d+)")
    numbers = sorted(int(match[1]) for name in dataset.column_names if (match := pattern.fullmatch(name)))
    if len(numbers) < 2:
        raise ValueError(
            f"The {split} data has no columns {args.ending_prefix}0 and {args.ending_prefix}1; its columns are "
            f"{dataset.column_names}. Name them with --ending_prefix, or a column of lists with --endings_column."
        )
    columns = [read_column(dataset, f"{args.ending_prefix}{number}") for number in numbers]
    return list(map(list, zip(*columns, strict=True)))


def _label(cell: Any, size: int, where: str) -> int:
    """Parse the number of the correct choice."""
    whole = isinstance(cell, float) and cell.is_integer()
    text = str(int(cell) if whole else cell).strip()
    if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) >= size:
        raise ValueError(
            f"{where} has the label {cell!r}, where the number of a choice belongs, from 0 to {size - 1}. Correct it, "
            "or leave the row out."
        )
    return int(text)


def tokenize(questions: list[Question], tokenizer: PreTrainedTokenizerBase, max_length: int, split: str) -> Dataset:
    """Make columns of inputs, with a list per choice, the `length` of the longest choice and, if known, `label`."""

    def encode(batch: dict[str, list[int]]) -> dict[str, list]:
        some = [questions[row] for row in batch["number"]]
        pairs = [(question.context, choice) for question in some for choice in question.choices]
        encoded = tokenizer(*map(list, zip(*pairs, strict=True)), truncation=True, max_length=max_length)
        size = len(some[0].choices)
        columns = {name: [x[i : i + size] for i in range(0, len(pairs), size)] for name, x in encoded.items()}
        columns["length"] = [max(map(len, ids)) for ids in columns["input_ids"]]
        cut = (
            [bool(encoding.overflowing) for encoding in encoded.encodings] if encoded.is_fast else [False] * len(pairs)
        )
        columns["cut"] = [any(cut[i : i + size]) for i in range(0, len(pairs), size)]
        if some[0].label is not None:
            columns["label"] = [question.label for question in some]
        return columns

    numbers = Dataset.from_dict({"number": range(len(questions))})
    found = numbers.map(encode, batched=True, batch_size=64, remove_columns=["number"], desc="Tokenizing")
    if cut := sum(read_column(found, "cut")):
        logger.warning(f"{cut} questions of the {split} data are cut to --max_length {max_length} tokens.")
    return found.remove_columns("cut")


@dataclass
class ChoiceCollator:
    """Makes batches of shape (rows, choices, length), with labels if known; transformers' collator needs labels."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        names = [name for name in self.tokenizer.model_input_names if name in rows[0]]
        flat = {name: [one for row in rows for one in row[name]] for name in names}
        padded = self.tokenizer.pad(flat, return_tensors="pt")
        batch = {name: x.view(len(rows), -1, x.shape[1]) for name, x in padded.items()}
        return batch | ({"labels": torch.tensor([row["label"] for row in rows])} if "label" in rows[0] else {})


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` for the Trainer: the share of questions whose correct choice has the highest score."""
    right = np.asarray(prediction.predictions).argmax(-1) == np.asarray(prediction.label_ids)
    return {"accuracy": float(right.mean())}


def baselines(questions: list[Question]) -> dict[str, dict[str, float]]:
    """Compute the accuracy of guessing, and of choosing what is most similar to the text (TF-IDF)."""
    found = {"guessing": {"accuracy": 1 / len(questions[0].choices)}}
    similarity = word_similarity(text for question in questions for text in (question.context, *question.choices))
    if similarity is None:
        return found
    right = [int(similarity(x.context, x.choices).argmax()) == x.label for x in questions]
    return found | {"the choice most similar to the text (TF-IDF)": {"accuracy": float(np.mean(right))}}


def draw_choices(file: Path, questions: list[Question], logits: np.ndarray, title: str) -> None:
    """Plot the rank of the correct choice, and the accuracy by confidence."""
    labels = np.array([question.label for question in questions])
    size = logits.shape[1]
    places = (logits > np.take_along_axis(logits, labels[:, None], 1)).sum(-1)
    probabilities = softmax(logits, axis=-1).max(-1)
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(range(1, size + 1), np.bincount(places, minlength=size) / len(labels), label="model")
    left.axhline(1 / size, color="black", linestyle=":", label="random guessing")
    left.set(xlabel="rank of the correct choice", ylabel="share of questions", title=title, xticks=range(1, size + 1))
    left.legend()
    bins = np.linspace(1 / size, 1, 9)
    number = np.clip(np.digitize(probabilities, bins) - 1, 0, len(bins) - 2)
    points = [(probabilities[number == i].mean(), (places[number == i] == 0).mean(), (number == i).sum())
              for i in range(len(bins) - 1) if (number == i).any()]  # fmt: skip
    sure, correct, count = zip(*points, strict=True)
    right.plot([1 / size, 1], [1 / size, 1], color="black", linestyle=":", label="perfect calibration")
    right.scatter(sure, correct, s=20 + 400 * np.array(count) / len(labels), alpha=0.7, label="questions")
    right.set(xlabel="probability of the chosen answer", ylabel="accuracy", ylim=(-0.05, 1.05))
    right.legend()
    figure.savefig(file, dpi=120)


def report(
    trainer: Trainer, questions: Mapping[str, list[Question]], encoded: Mapping[str, Dataset], args: DataArguments
) -> None:
    """Write choices, plots and scores of all splits except the training data, with baselines."""
    folder, tables = Path(str(trainer.args.output_dir)), {}
    for split, logits in predict_splits(trainer, encoded):
        some, probabilities, chosen = questions[split], softmax(logits, axis=-1), logits.argmax(-1)
        known = some[0].label is not None
        write_rows(
            folder / f"predictions_{split}.jsonl",
            (
                {"row": row, "prediction": int(best), "choice": question.choices[best]}
                | ({"label": question.label} if known else {})
                | {"probabilities": [round(float(p), 6) for p in all_of_them]}
                for row, (question, best, all_of_them) in enumerate(zip(some, chosen, probabilities, strict=True))
            ),
        )
        if known:
            labels = np.array([question.label for question in some])
            tables[split] = {"Reformer": {"accuracy": float((chosen == labels).mean())}}
            if args.baselines:
                tables[split] |= baselines(some)
            draw_choices(folder / f"choices_{split}.png", some, logits, f"{split}: {len(some)} questions")
    dataset = args.describe() if "train" in questions else None
    write_report(trainer, tables, format_tables(tables, questions, "questions"), dataset)


def run(data: DataArguments, model_args: ModelArguments, args: TrainingArguments) -> None:
    """Read the data, train, evaluate and report."""
    set_seed(args.seed)
    found, encoded = {}, {}
    with args.main_process_first(desc="preparing the data"):
        for split, rows in data.read().items():
            with data.naming_source(split):
                found[split] = read_questions(rows, data, split)
        groups = [question.context for question in found.get("train", ())]
        chosen = data.choose_rows({split: len(some) for split, some in found.items()}, args.seed, groups)
        questions = {split: [found[source][i] for i in rows] for split, (source, rows) in chosen.items()}
        texts = [text for question in questions.get("train", []) for text in (question.context, *question.choices)]
        tokenizer = make_tokenizer(model_args, texts, data.max_length, pairs=True)
        for split, some in questions.items():
            encoded[split] = tokenize(some, tokenizer, data.max_length, split)
            if split != "train":
                encoded[split] = longest_first(encoded[split])
    trains = "train" in questions
    pieces = token_ids(([text] for text in texts), tokenizer)
    model_args = pretrain(data, for_pairs(model_args, tokenizer), args, tokenizer, pieces, data.max_length)
    model = make_model(AutoModelForMultipleChoice, model_args, tokenizer, data.max_length, trains)
    options = {"data_collator": ChoiceCollator(tokenizer), "compute_metrics": accuracy}
    trainer = build_trainer(GroupedTrainer, model, args, tokenizer, encoded, **options)
    counts = ", ".join(f"{split} {len(some)}" for split, some in questions.items())
    size = len(next(iter(questions.values()))[0].choices)
    mean = np.mean(read_column(next(iter(encoded.values())), "length"))
    train_and_save(trainer, f"Questions: {counts}; {size} choices, of at most {mean:.0f} tokens on average")
    report(trainer, questions, encoded, data)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with the given arguments, by default those of the process."""
    classes = (DataArguments, ModelArguments, TrainingArguments)
    run_recipe("multiple-choice", __doc__, classes, run, arguments, DEFAULTS, SAVED_MODEL)
