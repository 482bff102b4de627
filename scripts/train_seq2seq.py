"""Train a Reformer encoder-decoder: translation, summarisation of long documents, any text to any other.

    # your own files: csv, tsv, json, jsonl or parquet, with one column of sources and one of targets
    python scripts/train_seq2seq.py --train_file train.csv --source_column document --target_column summary \\
        --metric rouge

    # a translation set of the Hub, on several GPUs, encoder and decoder sharing their weights
    accelerate launch scripts/train_seq2seq.py --dataset_name Helsinki-NLP/opus_books --dataset_config de-en \\
        --source_language de --target_language en --config_overrides tie_encoder_decoder=True

    # a model that was saved by one of these runs: train it further, or only let it write
    python scripts/train_seq2seq.py --model_name_or_path runs/seq2seq --train_file more.csv
    python scripts/train_seq2seq.py --model_name_or_path runs/seq2seq --write letter.txt

All options of `transformers.Seq2SeqTrainingArguments` work, `--resume_from_checkpoint last` and
`--generation_num_beams` included.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _models import (
    ModelArguments,
    SequentialEvalMixin,
    force_cpu_backend,
    make_model,
    make_tokenizer,
    train_and_save,
    write_model_card,
)
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

from hf_reformer.data.tables import read_examples, require

IGNORE = -100
METRICS = ("bleu", "chrf", "rouge", "none")
DEFAULTS = {
    "output_dir": "runs/seq2seq",
    "num_train_epochs": 5,
    "learning_rate": 1e-3,
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 16,
    "logging_steps": 10,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "predict_with_generate": True,
}


@dataclass
class DataArguments:
    """Where the pairs of texts come from."""

    dataset_name: str | None = field(default=None, metadata={"help": "A data set of the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Which of its configurations."})
    train_file: str | None = field(default=None, metadata={"help": "csv, tsv, json, jsonl or parquet file."})
    validation_file: str | None = field(default=None, metadata={"help": "Default: a part of the training data."})
    test_file: str | None = field(default=None, metadata={"help": "Judged at the end."})
    source_column: str = field(default="source", metadata={"help": "The texts to read."})
    target_column: str = field(default="target", metadata={"help": "The texts to write."})
    source_language: str | None = field(
        default=None, metadata={"help": "Of a column `translation`, which holds a text per language."}
    )
    target_language: str | None = field(default=None, metadata={"help": "The language to write."})
    source_prefix: str = field(default="", metadata={"help": "Put before every source."})
    max_source_length: int = field(default=4096, metadata={"help": "Longer sources are cut after so many tokens."})
    max_target_length: int = field(
        default=256, metadata={"help": "Longer targets are cut; nothing longer is written."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use so many pairs only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Judge on so many pairs only."})
    validation_fraction: float = field(default=0.1, metadata={"help": "Part of the training data to judge on."})
    metric: str = field(default="bleu", metadata={"help": "bleu and chrf, or rouge.", "choices": METRICS})
    write: str | None = field(default=None, metadata={"help": "A text file: at the end, write what belongs to it."})


def parse_arguments(argv: Sequence[str] | None) -> tuple[DataArguments, ModelArguments, Seq2SeqTrainingArguments]:
    """Read the command line; our defaults stand behind whatever is given there."""
    force_cpu_backend()
    parser = HfArgumentParser((DataArguments, ModelArguments, Seq2SeqTrainingArguments))
    parser.set_defaults(**DEFAULTS)
    return parser.parse_args_into_dataclasses(list(sys.argv[1:] if argv is None else argv))


def load_pairs(args: DataArguments, seed: int) -> DatasetDict:
    """Splits with the columns `source` and `target`; one of them is `validation`."""
    if args.dataset_name is not None:
        splits = load_dataset(args.dataset_name, args.dataset_config)
    else:
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        columns = args.source_column, args.target_column
        splits = DatasetDict(
            {split: read_examples(file, texts=columns) for split, file in files.items() if file is not None}
        )
    pairs = DatasetDict({split: two_columns(rows, args, split) for split, rows in splits.items()})
    if "validation" not in pairs and "train" in pairs:
        held_out = pairs["train"].train_test_split(test_size=args.validation_fraction, seed=seed)
        pairs = DatasetDict({**pairs, "train": held_out["train"], "validation": held_out["test"]})
    for split, rows in pairs.items():
        limit = args.max_train_samples if split == "train" else args.max_eval_samples
        if limit is not None and limit < len(rows):
            pairs[split] = rows.shuffle(seed=seed).select(range(limit))
    return pairs


def two_columns(rows: Dataset, args: DataArguments, split: str) -> Dataset:
    """Only `source` and `target`, as texts."""
    languages = args.source_language, args.target_language
    translations = "translation" in rows.column_names and all(languages)
    wanted = languages if translations else (args.source_column, args.target_column)
    if not translations and (absent := [name for name in wanted if name not in rows.column_names]):
        raise ValueError(
            f"The {split} data has no column {absent}; its columns are {rows.column_names}. Name them with "
            "--source_column and --target_column, or give --source_language and --target_language."
        )

    def choose(row: dict, index: int) -> dict[str, str]:
        cells = [((row["translation"] or {}) if translations else row).get(name) for name in wanted]
        for name, cell in zip(wanted, cells, strict=True):
            if not isinstance(cell, str | int | float):
                raise ValueError(
                    f"Row {index} of the {split} data has no text as `{name}`, but {cell!r}. Leave it out."
                )
        return {"source": args.source_prefix + str(cells[0]), "target": str(cells[1])}

    return rows.map(choose, with_indices=True, remove_columns=rows.column_names)


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> Dataset:
    """Columns `input_ids`, `attention_mask` and `labels`, which end with the end of the text."""

    def encode(batch: dict[str, list]) -> dict[str, list]:
        found = tokenizer(batch["source"], truncation=True, max_length=args.max_source_length)
        targets = tokenizer(batch["target"], add_special_tokens=False)["input_ids"]
        labels = [[*ids[: args.max_target_length - 1], tokenizer.eos_token_id] for ids in targets]
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"], "labels": labels}

    return rows.map(encode, batched=True, batch_size=64, remove_columns=rows.column_names, desc="Tokenising")


def score(metric: str, written: list[str], wanted: list[str]) -> dict[str, float]:
    """From 0 to 100: BLEU and chrF as sacrebleu has them, or ROUGE's F1, and the share of texts that are right."""
    scores = {
        "exact_match": 100 * float(np.mean([a.strip() == b.strip() for a, b in zip(written, wanted, strict=True)]))
    }
    if metric in ("bleu", "chrf"):
        import sacrebleu

        scores["bleu"] = sacrebleu.corpus_bleu(written, [wanted]).score
        scores["chrf"] = sacrebleu.corpus_chrf(written, [wanted]).score
    elif metric == "rouge":
        from rouge_score.rouge_scorer import RougeScorer

        names = ["rouge1", "rouge2", "rougeLsum"]
        scorer = RougeScorer(names, use_stemmer=True, split_summaries=False)
        found = [scorer.score(b, a) for a, b in zip(written, wanted, strict=True)]
        scores |= {name: 100 * float(np.mean([one[name].fmeasure for one in found])) for name in names}
    return scores


def texts_of(ids: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    ids = np.where(np.asarray(ids) == IGNORE, tokenizer.pad_token_id, ids)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


class OrderedTrainer(SequentialEvalMixin, Seq2SeqTrainer):
    """Seq2SeqTrainer whose predictions stand in the order of the data, each once."""

    @property
    def gather_function(self) -> Any:
        """Without the rows that fill up the last batch of several processes; Seq2SeqTrainer would keep them."""
        return self.accelerator.gather_for_metrics

    @gather_function.setter
    def gather_function(self, value: Any) -> None:
        pass


def make_trainer(pairs: DatasetDict, data: DataArguments, model_args: ModelArguments, args) -> Seq2SeqTrainer:
    """Tokenizer, model and data in a trainer that writes texts to judge."""

    def texts() -> Iterator[str]:
        for row in pairs["train"]:
            yield from (row["source"], row["target"])

    longest = max(data.max_source_length, data.max_target_length + 1)
    with args.main_process_first(desc="preparing the data"):
        tokenizer = make_tokenizer(model_args, texts() if "train" in pairs else [], longest)
        encoded = {split: tokenize(rows, tokenizer, data) for split, rows in pairs.items()}
    model = make_model(AutoModelForSeq2SeqLM, model_args, tokenizer, longest)
    args.generation_max_length = args.generation_max_length or data.max_target_length + 1  # and the start token

    def judge(found: EvalPrediction) -> dict[str, float]:
        return score(data.metric, texts_of(found.predictions, tokenizer), texts_of(found.label_ids, tokenizer))

    return OrderedTrainer(
        model=model,
        args=args,
        train_dataset=encoded.get("train"),
        eval_dataset=encoded.get("validation", encoded.get("test")),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=judge if args.predict_with_generate else None,
    )


def judge_splits(trainer: Seq2SeqTrainer, pairs: DatasetDict, data: DataArguments) -> dict[str, dict[str, float]]:
    """Write all texts of the splits but the training data into `predictions_SPLIT.jsonl`. Returns scores by split."""
    tokenizer: Any = trainer.processing_class
    scores = {}
    for split in pairs:
        if split == "train":
            continue
        output = trainer.predict(tokenize(pairs[split], tokenizer, data), metric_key_prefix=split)
        trainer.save_metrics(split, output.metrics)
        written = texts_of(output.predictions, tokenizer)
        scores[split] = score(data.metric, written, list(pairs[split]["target"]))
        if trainer.is_world_process_zero():
            rows = [{**row, "prediction": text} for row, text in zip(pairs[split], written, strict=True)]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            Path(trainer.args.output_dir, f"predictions_{split}.jsonl").write_text(lines, encoding="utf-8")
    return scores


def write(file: Path, folder: str, data: DataArguments, beams: int | None) -> None:
    """Print what the saved model writes for one file."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    text = data.source_prefix + file.read_text(encoding="utf-8")
    inputs = tokenizer(text, truncation=True, max_length=data.max_source_length, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    found = model.generate(**inputs, max_new_tokens=data.max_target_length, num_beams=beams or 1)
    print(tokenizer.decode(found[0], skip_special_tokens=True))


def check_arguments(data: DataArguments, args: Seq2SeqTrainingArguments) -> None:
    """Raise ValueError for what would only fail after training."""
    least = {"max_source_length": 1, "max_target_length": 2, "max_train_samples": 1, "max_eval_samples": 1}
    given = {name: getattr(data, name) for name in least}
    given |= {"generation_num_beams": args.generation_num_beams, "generation_max_length": args.generation_max_length}
    for name, value in given.items():
        smallest = {**least, "generation_num_beams": 1, "generation_max_length": 2}[name]
        if value is not None and value < smallest:
            raise ValueError(f"--{name} {value} must be at least {smallest}.")
    if not 0 < data.validation_fraction < 1:
        raise ValueError(f"--validation_fraction {data.validation_fraction} must lie between 0 and 1.")
    if args.predict_with_generate and data.metric != "none":
        require("rouge_score" if data.metric == "rouge" else "sacrebleu")


def check_file(file: Path) -> None:
    """Raise ValueError unless there is something to read in it."""
    if not file.is_file():
        raise ValueError(f"--write: there is no file `{file}`.")
    if not file.read_text(encoding="utf-8").strip():
        raise ValueError(f"--write: `{file}` is empty.")


def check_trained(name: str | None) -> None:
    """Raise ValueError unless it is an encoder-decoder that can write without training."""
    if name is None:
        raise ValueError("There is nothing to train on, and a new model writes noise. Give --model_name_or_path.")
    if not AutoConfig.from_pretrained(name).is_encoder_decoder:
        raise ValueError(f"`{name}` is no encoder-decoder, so its decoder would be new. Train it with --train_file.")


def main(argv: Sequence[str] | None = None) -> None:
    data, model_args, args = parse_arguments(argv)
    has_data = data.dataset_name is not None or any((data.train_file, data.validation_file, data.test_file))
    if not has_data and (data.write is None or model_args.model_name_or_path is None):
        raise SystemExit("Give --train_file, --dataset_name, or --model_name_or_path with --write. See --help.")
    trains = False
    if has_data:
        check_arguments(data, args)
        set_seed(args.seed)
        pairs = load_pairs(data, args.seed)
        trains = "train" in pairs
    if data.write is not None:
        check_file(Path(data.write))
    if not trains:
        check_trained(model_args.model_name_or_path)
    if has_data:
        trainer = make_trainer(pairs, data, model_args, args)
        if trains:
            train_and_save(trainer, args.resume_from_checkpoint)
        scores = judge_splits(trainer, pairs, data) if args.predict_with_generate else {}
        if trainer.is_world_process_zero():
            lines = [
                f"{split}: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()) for split, found in scores.items()
            ]
            print("\n".join(lines))
            write_model_card(trainer, "\n\n".join(lines), data.dataset_name or Path(str(data.train_file)).stem)
            print(f"Model, scores and what it wrote (predictions_*.jsonl) lie in {args.output_dir}")
    if data.write is not None and args.process_index == 0:
        folder = args.output_dir if trains else model_args.model_name_or_path
        write(Path(data.write), str(folder), data, args.generation_num_beams)


if __name__ == "__main__":
    main()
