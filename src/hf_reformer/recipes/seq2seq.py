"""Train a Reformer encoder-decoder: translation, summarisation of long documents, any text to any other.

    # your own files: csv, tsv, json, jsonl or parquet, with a column of sources and one of targets
    hf-reformer train seq2seq --train_file train.csv --source_column document --target_column summary --metric rouge

    # a translation set on the Hub, on several GPUs; encoder and decoder share their weights
    accelerate launch -m hf_reformer train seq2seq --dataset_name Helsinki-NLP/opus_books --dataset_config de-en \\
        --source_language de --target_language en --config_overrides tie_encoder_decoder=True

    # a model that was saved by one of these runs: train it further, or only predict
    hf-reformer train seq2seq --model_name_or_path runs/seq2seq --train_file more.csv
    hf-reformer train seq2seq --model_name_or_path runs/seq2seq --predict_file letter.txt

All options of `transformers.Seq2SeqTrainingArguments` work, `--resume_from_checkpoint last` and
`--generation_num_beams` included.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)
from transformers.hf_argparser import HfArg

from ..data.tables import check_columns, limit_samples, read_examples, read_hub_dataset, require
from ..models.losses import IGNORE
from ..training.model_setup import ModelArguments, make_model, make_tokenizer, parse_arguments
from ..training.reports import write_report
from ..training.trainers import SequentialSeq2SeqTrainer, train_and_save

DEFAULTS = {"output_dir": "runs/seq2seq", "predict_with_generate": True}


@dataclass
class DataArguments:
    """Where the pairs of texts come from."""

    dataset_name: str | None = HfArg(default=None, help="A data set on the Hub.")
    dataset_config: str | None = HfArg(default=None, help="Its configuration.")
    train_file: str | None = HfArg(default=None, help="csv, tsv, json, jsonl or parquet file.")
    validation_file: str | None = HfArg(default=None, help="Default: a part of the training data.")
    test_file: str | None = HfArg(default=None, help="Evaluated at the end.")
    source_column: str = HfArg(default="source", help="The input texts.")
    target_column: str = HfArg(default="target", help="The texts to generate.")
    source_language: str | None = HfArg(
        default=None, help="Of a column `translation`, which holds a text per language."
    )
    target_language: str | None = HfArg(default=None, help="The language to generate.")
    source_prefix: str = HfArg(default="", help="Put before every source.")
    max_source_length: int = HfArg(default=4096, help="Longer sources are truncated to this many tokens.")
    max_target_length: int = HfArg(default=256, help="Longer targets are truncated; nothing longer is generated.")
    max_train_samples: int | None = HfArg(default=None, help="Use at most this many pairs.")
    max_eval_samples: int | None = HfArg(default=None, help="Evaluate on at most this many pairs.")
    validation_fraction: float = HfArg(default=0.1, help="Part of the training data to evaluate on.")
    metric: str = HfArg(
        default="bleu", help="bleu and chrf, or rouge.", metadata={"choices": ("bleu", "chrf", "rouge", "none")}
    )
    predict_file: str | None = HfArg(
        default=None, help="A text file to generate the target of at the end.", aliases=["--write"]
    )


def load_pairs(args: DataArguments, seed: int) -> DatasetDict:
    """Splits with the columns `source` and `target`; one of them is `validation`."""
    if args.dataset_name is not None:
        splits = read_hub_dataset(args.dataset_name, args.dataset_config)
    else:
        files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
        columns = args.source_column, args.target_column
        splits = {split: read_examples(file, texts=columns) for split, file in files.items() if file is not None}
    pairs = DatasetDict({split: select_columns(dataset, args, split) for split, dataset in splits.items()})
    if "validation" not in pairs and "train" in pairs:
        held_out = pairs["train"].train_test_split(test_size=args.validation_fraction, seed=seed)
        pairs = DatasetDict({**pairs, "train": held_out["train"], "validation": held_out["test"]})
    limit_samples(pairs, args.max_train_samples, args.max_eval_samples, seed)
    return pairs


def select_columns(dataset: Dataset, args: DataArguments, split: str) -> Dataset:
    """Only `source` and `target`, as texts."""
    names = args.source_language, args.target_language
    translations = "translation" in dataset.column_names and all(names)
    if not translations:
        names = args.source_column, args.target_column
        check_columns(
            dataset, split, names,
            " Name them with --source_column and --target_column, or give --source_language and --target_language.",
        )  # fmt: skip

    def select(row: dict, index: int) -> dict[str, str]:
        cells = [((row["translation"] or {}) if translations else row).get(name) for name in names]
        for name, cell in zip(names, cells, strict=True):
            if not isinstance(cell, str | int | float):
                raise ValueError(
                    f"Row {index} of the {split} data has no text as `{name}`, but {cell!r}. Leave it out."
                )
        return {"source": args.source_prefix + str(cells[0]), "target": str(cells[1])}

    return dataset.map(select, with_indices=True, remove_columns=dataset.column_names)


def tokenize(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> Dataset:
    """Columns `input_ids`, `attention_mask` and `labels`, which end with the eos token."""

    def encode(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(batch["source"], truncation=True, max_length=args.max_source_length)
        targets = tokenizer(batch["target"], add_special_tokens=False)["input_ids"]
        labels = [[*ids[: args.max_target_length - 1], tokenizer.eos_token_id] for ids in targets]
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}

    return pairs.map(encode, batched=True, batch_size=64, remove_columns=pairs.column_names, desc="Tokenizing")


def score(metric: str, predictions: list[str], targets: list[str]) -> dict[str, float]:
    """From 0 to 100: the share of exact matches, and BLEU and chrF by sacrebleu, or ROUGE's F1."""
    pairs = list(zip(predictions, targets, strict=True))
    scores = {"exact_match": 100 * float(np.mean([a.strip() == b.strip() for a, b in pairs]))}
    if metric in ("bleu", "chrf"):
        sacrebleu = require("sacrebleu")
        scores["bleu"] = sacrebleu.corpus_bleu(predictions, [targets]).score
        scores["chrf"] = sacrebleu.corpus_chrf(predictions, [targets]).score
    elif metric == "rouge":
        names = ["rouge1", "rouge2", "rougeLsum"]
        scorer = require("rouge_score.rouge_scorer").RougeScorer(names, use_stemmer=True, split_summaries=False)
        rouge = [scorer.score(target, prediction) for prediction, target in pairs]
        scores |= {name: 100 * float(np.mean([one[name].fmeasure for one in rouge])) for name in names}
    return scores


def decode(ids: Any, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of padded ids."""
    ids = np.where(np.asarray(ids) == IGNORE, tokenizer.pad_token_id, ids)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def make_trainer(
    pairs: DatasetDict, data: DataArguments, model_args: ModelArguments, args: Seq2SeqTrainingArguments
) -> Seq2SeqTrainer:
    """Tokenizer, model and data in a trainer that evaluates generated texts."""

    def texts() -> Iterator[str]:
        for row in pairs["train"]:
            yield from (row["source"], row["target"])

    max_length = max(data.max_source_length, data.max_target_length + 1)
    with args.main_process_first(desc="preparing the data"):
        tokenizer = make_tokenizer(model_args, texts() if "train" in pairs else [], max_length)
        encoded = {split: tokenize(dataset, tokenizer, data) for split, dataset in pairs.items()}
    model = make_model(AutoModelForSeq2SeqLM, model_args, tokenizer, max_length)
    args.generation_max_length = args.generation_max_length or data.max_target_length + 1  # and the start token

    def compute_metrics(output: EvalPrediction) -> dict[str, float]:
        return score(data.metric, decode(output.predictions, tokenizer), decode(output.label_ids, tokenizer))

    return SequentialSeq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=encoded.get("train"),
        eval_dataset=encoded.get("validation", encoded.get("test")),
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        compute_metrics=compute_metrics if args.predict_with_generate else None,
    )


def evaluate_splits(trainer: Seq2SeqTrainer, pairs: DatasetDict, data: DataArguments) -> dict[str, dict[str, float]]:
    """Write the generated texts of all splits but the training data into `predictions_SPLIT.jsonl`; return scores."""
    tokenizer: Any = trainer.processing_class
    scores = {}
    for split, dataset in pairs.items():
        if split == "train":
            continue
        output = trainer.predict(tokenize(dataset, tokenizer, data), metric_key_prefix=split)
        trainer.save_metrics(split, output.metrics)
        predictions = decode(output.predictions, tokenizer)
        scores[split] = score(data.metric, predictions, list(dataset["target"]))
        if trainer.is_world_process_zero():
            rows = [{**row, "prediction": text} for row, text in zip(dataset, predictions, strict=True)]
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            Path(trainer.args.output_dir, f"predictions_{split}.jsonl").write_text(lines, encoding="utf-8")
    return scores


def predict_file(file: Path, folder: str, data: DataArguments, beams: int | None) -> None:
    """Print what the saved model generates for one file."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    text = data.source_prefix + file.read_text(encoding="utf-8")
    inputs = tokenizer(text, truncation=True, max_length=data.max_source_length, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    ids = model.generate(**inputs, max_new_tokens=data.max_target_length, num_beams=beams or 1)
    print(tokenizer.decode(ids[0], skip_special_tokens=True))


def check_arguments(data: DataArguments, args: Seq2SeqTrainingArguments) -> None:
    """Raise ValueError for what would otherwise fail only after training."""
    smallest = {
        "max_source_length": 1, "max_target_length": 2, "max_train_samples": 1, "max_eval_samples": 1,
        "generation_num_beams": 1, "generation_max_length": 2,
    }  # fmt: skip
    values = vars(args) | vars(data)
    for name, least in smallest.items():
        if values[name] is not None and values[name] < least:
            raise ValueError(f"--{name} {values[name]} must be at least {least}.")
    if not 0 < data.validation_fraction < 1:
        raise ValueError(f"--validation_fraction {data.validation_fraction} must be between 0 and 1.")
    if args.predict_with_generate and data.metric != "none":
        require("rouge_score" if data.metric == "rouge" else "sacrebleu")


def check_file(file: Path) -> None:
    """Raise ValueError unless the file has a text."""
    if not file.is_file():
        raise ValueError(f"--predict_file: there is no file `{file}`.")
    if not file.read_text(encoding="utf-8").strip():
        raise ValueError(f"--predict_file: `{file}` is empty.")


def check_trained(name: str | None) -> None:
    """Raise ValueError unless the model is an encoder-decoder, so that it can generate without training."""
    if name is None:
        raise ValueError(
            "There is nothing to train on, and a new model generates noise. Give --train_file or --model_name_or_path."
        )
    if not AutoConfig.from_pretrained(name).is_encoder_decoder:
        raise ValueError(f"`{name}` is no encoder-decoder, so its decoder would be new. Train it with --train_file.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with these arguments, by default those of the process."""
    data, model_args, args = parse_arguments(
        (DataArguments, ModelArguments, Seq2SeqTrainingArguments),
        arguments,
        DEFAULTS,
        {},
        prog="hf-reformer train seq2seq",
        description=__doc__,
    )
    has_data = data.dataset_name is not None or any((data.train_file, data.validation_file, data.test_file))
    if not has_data and (data.predict_file is None or model_args.model_name_or_path is None):
        raise SystemExit("Give --train_file, --dataset_name, or --model_name_or_path with --predict_file. See --help.")
    trains = False
    if has_data:
        check_arguments(data, args)
        set_seed(args.seed)
        pairs = load_pairs(data, args.seed)
        trains = "train" in pairs
    if data.predict_file is not None:
        check_file(Path(data.predict_file))
    if not trains:
        check_trained(model_args.model_name_or_path)
    if has_data:
        trainer = make_trainer(pairs, data, model_args, args)
        if trains:
            train_and_save(trainer, args.resume_from_checkpoint)
        scores = evaluate_splits(trainer, pairs, data) if args.predict_with_generate else {}
        if trainer.is_world_process_zero():
            lines = [
                f"{split}: " + ", ".join(f"{k} {v:.2f}" for k, v in values.items()) for split, values in scores.items()
            ]
            write_report(trainer, scores, "\n\n".join(lines), data.dataset_name or Path(str(data.train_file)).stem)
    if data.predict_file is not None and args.process_index == 0:
        folder = args.output_dir if trains else model_args.model_name_or_path
        predict_file(Path(data.predict_file), str(folder), data, args.generation_num_beams)
