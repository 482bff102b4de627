"""Train a Reformer to answer questions with spans of a document, which it reads whole, in one pass.

    # your own files with SQuAD's columns: question, context, answers (texts and their start positions)
    hf-reformer train question-answering --train_file train.parquet --validation_file validation.parquet --baselines

    # with questions that have no answer, as in SQuAD 2.0
    hf-reformer train question-answering --dataset_name rajpurkar/squad_v2 --version_2_with_negative

    # bytes instead of a vocabulary, documents of up to 16384 bytes
    hf-reformer train question-answering --train_file train.json --tokenizer bytes --max_length 16384

    # a model saved by one of these runs: train it further, or only predict
    hf-reformer train question-answering --model_name_or_path runs/question-answering --train_file more.json
    hf-reformer train question-answering --model_name_or_path runs/question-answering --test_file questions.json

SQuAD's own json files also work, and csv files with the answer as text, which is looked for in the document.
Scores are SQuAD's: exact match and F1, from 0 to 100. The result works in
`pipeline("long-document-question-answering", model=folder)`. All options of `transformers.TrainingArguments` work,
`--resume_from_checkpoint last` included.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import (
    AutoModelForQuestionAnswering,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from ..data.columns import check_columns, check_distinct, labels_unknown
from ..data.tables import cell_text, read_column
from ..models.losses import IGNORE
from ..training.cloze import cloze_examples, cut
from ..training.model_setup import (
    SAVED_MODEL,
    ModelArguments,
    for_pairs,
    make_model,
    make_tokenizer,
    option,
    run_recipe,
)
from ..training.pretraining import Objective, PretrainingArguments, pretrain_on
from ..training.question_answering import (
    Example,
    Reader,
    SpanCollator,
    SpanTrainer,
    baselines,
    draw_answers,
    gold_texts,
    score_answers,
    score_one,
)
from ..training.reports import Highlighted, format_tables, write_highlights, write_report, write_rows
from ..training.trainers import GroupedTrainer, build_trainer, longest_first, predict_splits, train_and_save

logger = logging.get_logger(__name__)

MOST_CLOZE = 100_000  # cloze questions; longer pre-training repeats them
DEFAULTS = {"output_dir": "runs/question-answering", "train_sampling_strategy": "group_by_length"}


@dataclass
class DataArguments(PretrainingArguments):
    """Where questions, documents and answers come from."""

    pretrain_steps: int = option(0, "First train this many steps on cloze questions made from the documents.")
    question_column: str = option("question", "The questions.")
    context_column: str = option("context", "The documents.")
    answers_column: str = option("answers", "Texts and their start positions, or a text to look for in the document.")
    version_2_with_negative: bool = option(False, "Allow questions without an answer, as in SQuAD 2.0.")
    null_score_diff_threshold: float = option(
        0.0, "Predict no answer if its log-probability exceeds that of the best answer by more than this."
    )
    max_length: int = option(
        4096, "Tokens of question and document together; longer documents are truncated.", aliases=["--max_seq_length"]
    )
    max_answer_length: int = option(64, "Maximum tokens of an answer; byte tokens need more.")
    n_best_size: int = option(3, "Answers to save for every question.")
    baselines: bool = option(False, "Also score whole documents, and the sentences most similar to the questions.")

    def check(self, model: ModelArguments, args: TrainingArguments) -> None:
        columns = {name: getattr(self, f"{name}_column") for name in ("question", "context", "answers")}
        check_distinct({f"--{name}_column": column for name, column in columns.items()})
        if args.label_smoothing_factor:
            raise ValueError("--label_smoothing_factor does nothing for places in a document. Leave it out.")
        super().check(model, args)

    def read_file(self, file: str) -> Dataset:
        """Read a split from a file; the articles of SQuAD's own JSON files become a row per question."""
        rows = super().read_file(file)
        if "data" not in rows.column_names or {self.question_column, self.context_column} & {*rows.column_names}:
            return rows
        try:
            return Dataset.from_list(list(_questions(read_column(rows, "data"))))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"`{file}` has a column `data`, as SQuAD's files have, but not their articles, paragraphs and qas "
                f"in it ({type(error).__name__}: {error}). Write a row per question instead."
            ) from error


def _questions(articles: list[Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of SQuAD's nested format, one per question."""
    for article in (one for some in articles for one in (some if isinstance(some, list) else [some])):
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = question.get("answers") or []
                both = {key: [answer[key] for answer in answers] for key in ("text", "answer_start")}
                row = {"id": question.get("id"), "context": paragraph["context"], "question": question["question"]}
                yield {**row, "answers": both}


def make_examples(dataset: Dataset, args: DataArguments, split: str) -> list[Example]:
    """Make the examples of a split.

    Answers that are not at their stated position are moved to their nearest occurrence.

    Raises:
        ValueError: a text is missing, or an answer is not in its document; the message names the row.
    """
    names = [args.question_column, args.context_column]
    known = args.answers_column in dataset.column_names or not split.startswith("test")
    advice = "Name them with --question_column, --context_column and --answers_column."
    check_columns(dataset, split, [*names, args.answers_column] if known else names, advice)
    questions, contexts = (read_column(dataset, name) for name in names)
    cells = read_column(dataset, args.answers_column) if known else [None] * len(dataset)
    ids = read_column(dataset, "id") if "id" in dataset.column_names else [None] * len(dataset)
    examples, moved = [], []
    for row, (number, *texts, cell) in enumerate(zip(ids, questions, contexts, cells, strict=True)):
        where = f"Row {row} of the {split} data"
        for name, text in zip(names, texts, strict=True):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{where} has no text as `{name}`, but {text!r}. Leave it out.")
        question, context = texts
        answers = []
        for text, start in _answers(cell, context, where):
            answer, place = find_answer(context, text, start, where)
            answers.append((answer, place))
            if start is not None and context[start : start + len(text)] != text:
                moved.append(row)
        examples.append(Example(cell_text(number) or str(row), question, context, answers if known else None))
    if labels_unknown(split, [example.answers for example in examples]):
        examples = [example._replace(answers=None) for example in examples]  # they are to be predicted
    none = next((row for row, x in enumerate(examples) if x.answers == []), None)
    if none is not None and not args.version_2_with_negative:
        raise ValueError(
            f"Row {none} of the {split} data has no answer. Leave it out, or give --version_2_with_negative."
        )
    if moved:
        logger.warning(
            f"{len(moved)} answers in the {split} data are not at their `answer_start`; the nearest occurrence is "
            f"used instead. The first one is in row {moved[0]}."
        )
    return examples


def _answers(cell: Any, context: str, where: str) -> list[tuple[str, int | None]]:
    """Return the answers of a cell and their stated start positions: from SQuAD's formats, a text, or nothing.

    SQuAD's formats may be written as JSON, as in a CSV file; but a text that occurs in the document is taken as text.
    """
    if isinstance(cell, str) and cell.lstrip()[:1] in ("{", "[") and cell.strip() not in context:
        with suppress(ValueError):
            cell = json.loads(cell)
    if isinstance(cell, str):
        return [(cell, None)] if cell.strip() else []
    try:
        if cell is None or isinstance(cell, list):
            pairs = [(one["text"], one.get("answer_start")) for one in cell or ()]
        else:
            texts, starts = cell["text"], cell.get("answer_start")
            pairs = list(zip(texts, [None] * len(texts) if starts is None else starts, strict=True))
        if not all(isinstance(text, str) and isinstance(start, int | None) for text, start in pairs):
            raise TypeError
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(
            f'{where} has the answers {str(cell)[:80]}, where {{"text": ["Paris"], "answer_start": [13]}} is expected.'
        ) from None
    return pairs


def find_answer(context: str, text: str, start: int | None, where: str) -> tuple[str, int]:
    """Return the answer without surrounding white space, and its position nearest to `start`.

    Raises:
        ValueError: the answer is empty, or not in the document.
    """
    answer = text.strip()
    if not answer:
        raise ValueError(f"{where} has an empty answer. For a question without an answer, give no text at all.")
    said = 0 if start is None else start + len(text) - len(text.lstrip())
    if said >= 0 and context.startswith(answer, said):
        return answer, said
    before, after = context.rfind(answer, 0, max(0, said) + len(answer) - 1), context.find(answer, max(0, said))
    places = [place for place in (before, after) if place >= 0]
    if not places:
        raise ValueError(
            f"{where} has the answer {answer[:80]!r}, which is not in its document. Answers are spans: copy it from "
            "there as it is written, or leave the row out."
        )
    return answer, min(places, key=lambda place: abs(place - said))


def check_questions(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, split: str
) -> None:
    """Raise ValueError for a question that leaves no room for a document. `examples` must be all rows of the split."""
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    asked = list(dict.fromkeys(example.question for example in examples))
    ids = tokenizer(asked, add_special_tokens=False, verbose=False)["input_ids"]
    sizes = dict(zip(asked, map(len, ids), strict=True))
    for row, example in enumerate(examples):
        if (size := sizes[example.question]) >= room:
            raise ValueError(
                f"Row {row} of the {split} data has a question of {size} tokens, which leaves no room for a document "
                f"in --max_length {max_length}. Raise it, or leave the row out."
            )


def tokenize(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, args: DataArguments, split: str, trains: bool
) -> Dataset:
    """Encode the examples of a split (`encode`); a warning reports documents that are cut off."""
    found = encode(examples, tokenizer, args.max_length, trains)
    if cut_off := sum(read_column(found, "cut_off")):
        ends = read_column(found, "end_positions") if "end_positions" in found.column_names else []
        logger.warning(
            f"{cut_off} documents of the {split} data are cut to --max_length {args.max_length} tokens; "
            f"{ends.count(IGNORE)} answers lie beyond it."
        )
    return found.remove_columns("cut_off")


def cloze_questions(
    documents: list[str], tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int
) -> Dataset:
    """Encode up to `count` cloze questions about passages of the documents, with at most `length` tokens each.

    Raises:
        ValueError: the documents have no sentences, or the questions leave no room for their answers.
    """
    examples = cloze_examples(cut(documents, tokenizer, length * 3 // 4), count, seed)
    sizes = tokenizer([x.question for x in examples], add_special_tokens=False, return_length=True)["length"]
    room = length - tokenizer.num_special_tokens_to_add(pair=True)
    rows = encode([x for x, size in zip(examples, sizes, strict=True) if size < room], tokenizer, length, trains=True)
    answered = np.flatnonzero(np.array(read_column(rows, "start_positions")) != IGNORE) if len(rows) else ()
    if not len(answered):
        raise ValueError(
            f"--pretrain_length {length} leaves no room for a question with its passage. Raise it (and --max_length)."
        )
    return rows.select(answered).remove_columns("cut_off")


def encode(examples: list[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, trains: bool) -> Dataset:
    """Make columns of inputs, `length` and, if known, `start_positions` and `end_positions`, -100 if cut off.

    For evaluation, also `char_starts` and `char_ends`, the characters that every token of the document stands for: -1
    outside the document, and of no width for white space. `cut_off`: whether the document was longer.
    """

    def columns_of(batch: dict[str, list[int]]) -> dict[str, list]:
        some = [examples[row] for row in batch["number"]]
        questions, contexts = [x.question for x in some], [x.context for x in some]
        encoded = tokenizer(questions, contexts, truncation="only_second", max_length=max_length)
        columns: dict[str, list] = {**encoded, "length": [], "cut_off": []}
        for example, encoding in zip(some, encoded.encodings, strict=True):
            inside = np.array(encoding.sequence_ids, dtype=float) == 1
            offsets = np.array(encoding.offsets)
            starts, ends = np.where(inside, offsets[:, 0], -1), np.where(inside, offsets[:, 1], -1)
            columns["length"].append(len(starts))
            columns["cut_off"].append(bool(encoding.overflowing))
            if example.answers is not None:
                first, last = _positions(example.answers, starts, ends)
                columns.setdefault("start_positions", []).append(first)
                columns.setdefault("end_positions", []).append(last)
            if not trains:
                for token in np.flatnonzero(inside):
                    if example.context[starts[token] : ends[token]].isspace():
                        ends[token] = starts[token]
                columns.setdefault("char_starts", []).append(starts)
                columns.setdefault("char_ends", []).append(ends)
        return columns

    numbers = Dataset.from_dict({"number": range(len(examples))})
    return numbers.map(columns_of, batched=True, batch_size=64, remove_columns=["number"], desc="Tokenizing")


def _positions(answers: list[tuple[str, int]], starts: np.ndarray, ends: np.ndarray) -> tuple[int, int]:
    """Return the first and last token of the first answer that is not cut off; 0 and 0 if there is no answer."""
    for text, start in answers:
        first, last = np.flatnonzero(ends > start), np.flatnonzero((starts >= 0) & (starts < start + len(text)))
        if len(first) and len(last) and first[0] <= last[-1] and ends.max() >= start + len(text):
            return int(first[0]), int(last[-1])
    return (IGNORE, IGNORE) if answers else (0, 0)


def report(
    trainer: Trainer, reader: Reader, examples: dict[str, list[Example]], encoded: Mapping[str, Dataset],
    args: DataArguments,
) -> None:  # fmt: skip
    """Write answers, plots and scores of all splits except the training data, with baselines."""
    folder, tables = Path(str(trainer.args.output_dir)), {}
    for split, (spans, scores) in predict_splits(trainer, encoded):
        some = examples[split]
        answers = [reader.answers(x.context, *found) for x, *found in zip(some, spans, scores, strict=True)]
        best = [found[0] for found in answers]
        write_rows(folder / f"predictions_{split}.jsonl", map(prediction, some, answers))
        texts = {example.id: answer.text for example, answer in zip(some, best, strict=True)}
        squad = folder / f"predictions_{split}.json"  # the format of SQuAD's own script
        if len(texts) == len(some):
            squad.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
        else:
            squad.unlink(missing_ok=True)  # left by an earlier run
            logger.warning(
                f"{len(some) - len(texts)} questions of the {split} data have the `id` of another one, so there is no "
                f"{squad.name}, which knows answers by their ids. All are in predictions_{split}.jsonl."
            )
        shown = (
            Highlighted(
                f"{x.question} → {answer.text or '(no answer)'} ({answer.score:.0%})",
                x.context,
                [(start, start + len(text), "") for text, start in x.answers or ()],
                [(answer.start, answer.end, "")] if answer.text else [],
            )
            for x, answer in zip(some, best, strict=True)
        )
        write_highlights(folder / f"highlights_{split}.html", f"Answers: {split}", shown)
        if all(x.answers is not None for x in some):
            tables[split] = {"Reformer": score_answers([x.text for x in best], [gold_texts(x) for x in some])}
            if args.baselines:
                tables[split] |= baselines(some, args.version_2_with_negative)
            draw_answers(folder / f"answers_{split}.png", some, best, f"{split}: {len(some)} questions")
    dataset = args.describe() if "train" in examples else None
    write_report(trainer, tables, format_tables(tables, examples, "questions"), dataset)


def prediction(example: Example, answers: Sequence[Any]) -> dict[str, Any]:
    """Make a line of predictions: the best answer, its position and probability, and further answers."""
    found = [{"answer": x.text, "start": x.start, "end": x.end, "score": round(x.score, 6)} for x in answers]
    row: dict[str, Any] = {"id": example.id, "question": example.question, **found[0], "others": found[1:]}
    if example.answers is not None:
        exact, f1 = score_one(answers[0].text, gold_texts(example))
        row |= {"true": gold_texts(example), "exact_match": exact, "f1": round(f1, 4)}
    return row


def run(data: DataArguments, model_args: ModelArguments, args: TrainingArguments) -> None:
    """Read the data, train, evaluate and report."""
    set_seed(args.seed)
    args.remove_unused_columns = False  # the collator needs them
    reader = Reader(data.null_score_diff_threshold if data.version_2_with_negative else None)
    found, encoded = {}, {}
    with args.main_process_first(desc="preparing the data"):
        for split, rows in data.read().items():
            with data.naming_source(split):
                found[split] = make_examples(rows, data, split)
        groups = [x.context for x in found.get("train", ())]
        chosen = data.choose_rows({split: len(some) for split, some in found.items()}, args.seed, groups)
        examples = {split: [found[source][i] for i in rows] for split, (source, rows) in chosen.items()}
        texts = list(dict.fromkeys(text for x in examples.get("train", []) for text in (x.question, x.context)))
        tokenizer = make_tokenizer(model_args, texts, data.max_length, offsets=True, pairs=True)
        for split, some in found.items():
            with data.naming_source(split):
                check_questions(some, tokenizer, data.max_length, split)
        for split, some in examples.items():
            encoded[split] = tokenize(some, tokenizer, data, split, trains=split == "train")
            if split != "train":
                encoded[split] = longest_first(encoded[split], len(reader.examples))
                reader.examples += some
    trains = "train" in examples
    collator = SpanCollator(tokenizer)

    def cloze(length: int) -> Objective:
        documents = list(dict.fromkeys(x.context for x in examples["train"]))
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        count = min(data.pretrain_steps * batch, MOST_CLOZE)
        rows = cloze_questions(documents, tokenizer, length, count, args.seed)
        return Objective(rows, GroupedTrainer, {"data_collator": collator}, {})

    model_args, head = for_pairs(model_args, tokenizer), AutoModelForQuestionAnswering
    model_args = pretrain_on(cloze, data, model_args, args, tokenizer, data.max_length, head)
    model = make_model(AutoModelForQuestionAnswering, model_args, tokenizer, data.max_length, trains)
    options = {"data_collator": collator, "compute_metrics": reader}
    trainer = build_trainer(SpanTrainer, model, args, tokenizer, encoded, **options)
    trainer.count, trainer.max_answer_length = data.n_best_size, data.max_answer_length
    counts = ", ".join(f"{split} {len(some)}" for split, some in examples.items())
    mean = np.mean(read_column(next(iter(encoded.values())), "length"))
    train_and_save(trainer, f"Questions: {counts}; {mean:.0f} tokens on average with their documents")
    report(trainer, reader, examples, encoded, data)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with the given arguments, by default those of the process."""
    classes = (DataArguments, ModelArguments, TrainingArguments)
    run_recipe("question-answering", __doc__, classes, run, arguments, DEFAULTS, SAVED_MODEL)
