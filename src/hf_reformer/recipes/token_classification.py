"""Train a Reformer to label every word of a text: names of people and places, parts of speech.

    # column files as in CoNLL: one word per line, its label in the last column, an empty line between sentences
    hf-reformer train token-classification --train_file train.conll --validation_file validation.conll --baselines

    # json or parquet with lists of words and labels; a dataset on the Hub that names its labels
    hf-reformer train token-classification --train_file train.jsonl --text_column words --label_column tags
    hf-reformer train token-classification --dataset_name unimelb-nlp/wikiann --dataset_config_name en

    # a model saved by one of these runs: train it further, or only predict
    hf-reformer train token-classification --model_name_or_path runs/token-classification --train_file more.conll
    hf-reformer train token-classification --model_name_or_path runs/token-classification --test_file words.jsonl

Labels such as B-PER, I-PER and O mark entities, which seqeval scores; other labels are scored by accuracy. The first
token of a word carries its label. The result works in `pipeline("token-classification", model=folder,
aggregation_strategy="first")`. All options of `transformers.TrainingArguments` work, `--resume_from_checkpoint last`
included.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForTokenClassification,
    DataCollatorForTokenClassification,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from ..data.column_files import COLUMN_FORMATS, read_column_file
from ..data.columns import check_columns, check_distinct, labels_unknown
from ..data.packing import token_ids
from ..data.tables import cell_text, read_column
from ..models.losses import IGNORE
from ..training.classification import MATRIX_LABELS, class_names, draw_confusion_matrix, labels_as_written, shortened
from ..training.model_setup import SAVED_MODEL, ModelArguments, make_model, make_tokenizer, option, run_recipe
from ..training.pretraining import MaskedPretrainingArguments, pretrain
from ..training.reports import (
    Highlighted,
    format_table,
    format_tables,
    write_highlights,
    write_report,
    write_rows,
)
from ..training.token_classification import Tags, TagScores, entity_spans, most_frequent_labels
from ..training.trainers import GroupedTrainer, build_trainer, longest_first, predict_splits, train_and_save

logger = logging.get_logger(__name__)

DEFAULTS = {"output_dir": "runs/token-classification", "train_sampling_strategy": "group_by_length"}


@dataclass
class DataArguments(MaskedPretrainingArguments):
    """Where words and their labels come from."""

    train_file: str | None = option(
        None, "json, jsonl or parquet file of lists, or a column file: conll, iob, iob2, bio or txt."
    )
    task_name: str = option("ner", "The label column is this name followed by _tags.")
    text_column: str | None = option(
        None, "Lists of words; in a column file, a column number. Default: found by name, or the first.",
        aliases=["--text_column_name"],
    )  # fmt: skip
    label_column: str | None = option(
        None, "Lists of labels; in a column file, a column number. Default: found by name, or the last.",
        aliases=["--label_column_name"],
    )  # fmt: skip
    max_length: int = option(4096, "Longer texts are truncated to this many tokens.", aliases=["--max_seq_length"])
    baselines: bool = option(False, "Also score the label that each word has most often in training.")

    def check(self, model: ModelArguments, args: TrainingArguments) -> None:
        check_distinct({"--text_column": self.text_column, "--label_column": self.label_column})
        super().check(model, args)

    def read_file(self, file: str) -> Dataset:
        return read_column_file(file) if Path(file).suffix.lower() in COLUMN_FORMATS else super().read_file(file)


def find_word_columns(dataset: Dataset, args: DataArguments, split: str) -> tuple[str, str | None]:
    """Find the columns of words and labels, by the given or the usual names; None if there are no labels."""
    names = dataset.column_names
    numbered = names == [str(i) for i in range(1, len(names) + 1)]
    for given in (args.text_column, None if split.startswith("test") else args.label_column):
        if given is not None and given not in names:
            raise ValueError(f"There is no column `{given}`. The columns are {names}.")
    usual = ["1"] if numbered else ["tokens", "words"]
    text = args.text_column or next((name for name in usual if name in names), None)
    if text is None:
        raise ValueError(f"Which column holds the lists of words? The columns are {names}. Give --text_column.")
    usual = [names[-1]] if numbered else [f"{args.task_name}_tags", "tags", "labels", "label"]
    usual += [name for name in names if name.endswith("_tags")]
    label = args.label_column or next((name for name in usual if name in names and name != text), None)
    return text, label


class Sentences(NamedTuple):
    """The words of sentences, and their labels if known."""

    words: list[list[str]]
    tags: list[list[str]] | None

    def select(self, rows: Sequence[int]) -> "Sentences":
        """Select the sentences of some rows."""
        return Sentences([self.words[i] for i in rows], self.tags and [self.tags[i] for i in rows])


def read_sentences(dataset: Dataset, text: str, label: str | None, split: str) -> Sentences:
    """Read the words and labels of a split; a test split may have no labels.

    Raises:
        ValueError: words are missing or empty, or words and labels differ in number; the message names the row.
    """
    check_columns(dataset, split, [text], "Name it with --text_column.")
    if label not in dataset.column_names and split.startswith("test"):
        label = None
    if label is None and not split.startswith("test"):
        raise ValueError(
            f"Which column of the {split} data holds the labels? The columns are {dataset.column_names}. Give "
            "--label_column. To label words without labels, give them as --test_file."
        )
    check_columns(dataset, split, [label], "Name it with --label_column.")
    words = read_column(dataset, text)
    tags: list[Any] = [None] * len(words) if label is None else labels_as_written(dataset, label, False)
    unknown = labels_unknown(split, tags)
    found = []
    for row, (some, labels) in enumerate(zip(words, tags, strict=True)):
        where = f"Row {row} of the {split} data"
        if not isinstance(some, list) or not some:
            raise ValueError(
                f"{where} has no list of words as `{text}`, but {str(some)[:60]!r}. Leave it out, or write the words "
                'as a list: ["It", "works"].'
            )
        if wrong := [i for i, word in enumerate(some) if not isinstance(word, str) or not word]:
            found_there = f"{where}: word {wrong[0]} is {some[wrong[0]]!r}"
            raise ValueError(f"{found_there}, so no token can carry its label. Leave it out.")
        if unknown:
            continue
        if not isinstance(labels, list) or len(labels) != len(some):
            number = f"{len(labels)} labels" if isinstance(labels, list) else f"{str(labels)[:60]!r} as labels"
            raise ValueError(f"{where} has {len(some)} words, but {number}. Each word needs one.")
        names = [cell_text(tag) for tag in labels]
        if wrong := [i for i, name in enumerate(names) if not name]:
            raise ValueError(f"{where}: word {wrong[0]} has no label. Give it one, such as O.")
        found.append(names)
    return Sentences(words, None if unknown else found)


def names_of_labels(sentences: Sentences, dataset: Dataset, label: str, model_labels: list[str] | None) -> list[str]:
    """Return all label names: a saved model's if they cover the data, else a `ClassLabel`'s, else all that occur."""
    present = {tag for tags in sentences.tags or () for tag in tags}
    if model_labels and present <= set(model_labels):
        return model_labels
    if len(present) < 2:
        raise ValueError(f"All words of the training data have the same label, {sorted(present)}: nothing to learn.")
    if names := class_names(dataset.features[label]):
        return list(names)
    if all(map(str.isdecimal, present)):
        logger.warning(
            f"The labels in `{label}` are numbers without names, {shortened(sorted(present))}, so words are scored, "
            "and no entities. To score entities, write labels such as B-PER and O."
        )
    return sorted(present, key=lambda name: (name != "O", name.partition("-")[::-1]))


def check_known(sentences: Sentences, names: list[str], split: str) -> None:
    """Raise ValueError for labels that the model does not have."""
    for row, tags in enumerate(sentences.tags or ()):
        if unknown := sorted(set(tags) - set(names)):
            raise ValueError(
                f"Row {row} of the {split} data has labels that are not among those of training: {shortened(unknown)} "
                f"not in {shortened(names)}."
            )


def cut_off_label(names: Sequence[str], train: Sentences | None) -> str:
    """Return the label for words that are cut off: O or, if there is no O, the most frequent training label."""
    counts = Counter(tag for tags in (train and train.tags) or () for tag in tags)
    return "O" if "O" in names else max(names, key=counts.__getitem__)


def space_label(tags: Sequence[str], names: Sequence[str]) -> str:
    """Return the label of a space between two labeled words: I- if the second continues an entity, else O.

    If there is no such label, it is that of the first word.
    """
    inside = tags[1] if tags[1][:2] in ("I-", "E-", "L-") and tags[1][2:] == tags[0][2:] else "O"
    inside = f"I-{tags[1][2:]}" if f"I-{tags[1][2:]}" in names and inside != "O" else inside
    return inside if inside in names else tags[0]


def tokenize(
    sentences: Sentences, names: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int, split: str
) -> Dataset:
    """Make columns of inputs, `length`, `first` (the first token of every word, or -1) and `labels` (-100 elsewhere).

    In training, spaces that are tokens of their own, such as bytes, are labeled too, since pipelines treat them as
    words: they belong to the entity on both sides, or to none.
    """
    number = {name: i for i, name in enumerate(names)}

    def encode(batch: dict[str, list[int]]) -> dict[str, list]:
        some = sentences.select(batch["number"])
        encoded = tokenizer([" ".join(words) for words in some.words], truncation=True, max_length=max_length)
        columns: dict[str, list] = {**encoded, "length": [], "first": []}
        for row, (words, encoding) in enumerate(zip(some.words, encoded.encodings, strict=True)):
            text = np.flatnonzero(np.array(encoding.sequence_ids, dtype=float) == 0)
            starts = np.cumsum([0, *(len(word) + 1 for word in words)])[:-1]
            ends = np.array(encoding.offsets)[text, 1]
            place = np.searchsorted(ends, starts, side="right")  # of the first token that ends after the start
            first = np.append(text, -1)[np.minimum(place, len(text))]
            columns["length"].append(len(encoding.ids))
            columns["first"].append(first)
            if some.tags is not None:
                labels = np.full(len(encoding.ids), IGNORE)
                tags = np.array([number[tag] for tag in some.tags[row]])
                labels[first[first >= 0]] = tags[first >= 0]
                if split == "train":
                    before = np.searchsorted(ends, starts - 1, side="right")  # the token that holds the space
                    for i in np.flatnonzero(first[1:] >= 0) + 1:
                        if tuple(encoding.offsets[text[before[i]]]) == (starts[i] - 1, starts[i]):
                            labels[text[before[i]]] = number[space_label(some.tags[row][i - 1 : i + 1], names)]
                columns.setdefault("labels", []).append(labels)
        return columns

    numbers = Dataset.from_dict({"number": range(len(sentences.words))})
    found = numbers.map(encode, batched=True, batch_size=64, remove_columns=["number"], desc="Tokenizing")
    cut = [first.count(-1) for first in read_column(found, "first")]
    if any(cut):
        unused = "not learned" if split == "train" else "neither read nor scored"
        logger.warning(
            f"{np.count_nonzero(cut)} texts in the {split} data are truncated to --max_length {max_length} tokens; "
            f"{sum(cut)} words lie beyond it and are {unused}."
        )
    return found


def report(
    trainer: Trainer, scores: TagScores, sentences: dict[str, Sentences], encoded: Mapping[str, Dataset],
    args: DataArguments,
) -> None:  # fmt: skip
    """Write labels, plots and scores of all splits except the training data, with a baseline.

    Words that were cut off get `cut_off_label` and are not scored.
    """
    folder, names = Path(str(trainer.args.output_dir)), scores.names
    train = sentences.get("train")
    unread, tables, parts = cut_off_label(names, train), {}, []
    for split, output in predict_splits(trainer, encoded):
        words, true = sentences[split]
        order = np.argsort(read_column(encoded[split], "row"))
        firsts = encoded[split].select_columns("first").select(order)["first"][:]
        predicted = [
            [names[row[place]] if place >= 0 else unread for place in first]
            for row, first in zip(output, firsts, strict=True)
        ]

        def read(tags: Tags, firsts: Any = firsts) -> list[list[str]]:
            both = zip(tags, firsts, strict=True)
            return [[tag for tag, place in zip(*one, strict=True) if place >= 0] for one in both]

        rows = {"words": words, "predictions": predicted} | ({} if true is None else {"labels": true})
        write_rows(
            folder / f"predictions_{split}.jsonl",
            (dict(zip(rows, cells, strict=True)) for cells in zip(*rows.values(), strict=True)),
        )
        known = true if true is not None else [[] for _ in words]
        shown = (
            Highlighted(
                f"{i}",
                " ".join(some),
                entity_spans(some, tags, scores.entities) if tags else [],
                entity_spans(some, found, scores.entities),
            )
            for i, (some, tags, found) in enumerate(zip(words, known, predicted, strict=True))
        )
        write_highlights(folder / f"highlights_{split}.html", f"Labels: {split}", shown)
        if true is None:
            continue
        true, predicted = read(true), read(predicted)
        tables[split] = {"Reformer": scores.score(true, predicted)}
        if args.baselines and train is not None and train.tags is not None:
            usual = most_frequent_labels(train.words, train.tags, words)
            tables[split]["most frequent label of each word"] = scores.score(true, read(usual))
        parts.append(format_tables({split: tables[split]}, {split: words}, "sentences"))
        if entities := scores.by_entity(true, predicted):
            tables[f"{split}, by entity"] = entities
            parts.append(f"{split}, by entity\n\n{format_table(entities)}")
        if len(names) <= MATRIX_LABELS:
            number = {name: i for i, name in enumerate(names)}
            all_true, found = (np.array([number[x] for tags in some for x in tags]) for some in (true, predicted))
            file = folder / f"confusion_matrix_{split}.png"
            draw_confusion_matrix(file, names, all_true, found, f"{split}: {len(found)} words", normalize="true")
    write_report(trainer, tables, "\n\n".join(parts), args.describe() if "train" in sentences else None)


def run(data: DataArguments, model_args: ModelArguments, args: TrainingArguments) -> None:
    """Read the data, train, evaluate and report."""
    set_seed(args.seed)
    saved = model_args.model_name_or_path
    model_labels = None if saved is None else list(AutoConfig.from_pretrained(saved).id2label.values())
    with args.main_process_first(desc="preparing the data"):
        splits = data.read()
        first = next(iter(splits))
        found, encoded = {}, {}
        with data.naming_source(first):
            text, label = find_word_columns(splits[first], data, first)
        for split, rows in splits.items():
            with data.naming_source(split):
                found[split] = read_sentences(rows, text, label, split)
                if split == first:
                    trained = label is not None and split == "train"
                    names = names_of_labels(found[split], rows, str(label), model_labels) if trained else model_labels
                check_known(found[split], names, split)
        sizes = {split: len(some.words) for split, some in found.items()}
        groups = list(map(tuple, found["train"].words)) if "train" in found else None
        chosen = data.choose_rows(sizes, args.seed, groups)
        sentences = {split: found[source].select(rows) for split, (source, rows) in chosen.items()}
        texts = [" ".join(words) for words in sentences["train"].words] if "train" in sentences else []
        tokenizer = make_tokenizer(model_args, texts, data.max_length, offsets=True)
        for split, some in sentences.items():
            encoded[split] = tokenize(some, names, tokenizer, data.max_length, split)
            if split != "train":
                encoded[split] = longest_first(encoded[split])
    scores, trains = TagScores(names), "train" in sentences
    fields = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    pieces = token_ids(([text] for text in texts), tokenizer)
    model_args = pretrain(data, model_args, args, tokenizer, pieces, data.max_length)
    model = make_model(AutoModelForTokenClassification, model_args, tokenizer, data.max_length, trains, **fields)
    options: dict[str, Any] = {"data_collator": DataCollatorForTokenClassification(tokenizer)}
    options |= {"compute_metrics": scores, "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)}
    trainer = build_trainer(GroupedTrainer, model, args, tokenizer, encoded, **options)
    counts = ", ".join(f"{split} {len(some.words)}" for split, some in sentences.items())
    mean = np.mean(read_column(next(iter(encoded.values())), "length"))
    train_and_save(trainer, f"Sentences: {counts}; {mean:.0f} tokens on average. Labels: {shortened(names)}")
    report(trainer, scores, sentences, encoded, data)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with the given arguments, by default those of the process."""
    classes = (DataArguments, ModelArguments, TrainingArguments)
    run_recipe("token-classification", __doc__, classes, run, arguments, DEFAULTS, SAVED_MODEL)
