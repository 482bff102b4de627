"""Train a Reformer encoder-decoder: translation, summarization of long documents, any other text-to-text task.

    # your own files: csv, tsv, json, jsonl or parquet, with a column of sources and one of targets
    hf-reformer train seq2seq --train_file train.csv --source_column document --target_column summary --metric rouge

    # a translation dataset on the Hub, on several GPUs; encoder and decoder share weights
    accelerate launch -m hf_reformer train seq2seq \\
        --dataset_name Helsinki-NLP/opus_books --dataset_config_name de-en --source_lang de --target_lang en \\
        --config_overrides tie_encoder_decoder=True

    # a model saved by one of these runs: train it further, or only predict
    hf-reformer train seq2seq --model_name_or_path runs/seq2seq --train_file more.csv
    hf-reformer train seq2seq --model_name_or_path runs/seq2seq --predict_file letter.txt

All options of `transformers.Seq2SeqTrainingArguments` work, `--resume_from_checkpoint last` and
`--generation_num_beams` included.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainingArguments,
    set_seed,
)

from ..data.columns import check_columns, check_distinct
from ..data.packing import token_ids
from ..data.tables import cell_text, read_column, read_text, require
from ..models.losses import IGNORE
from ..training.data_setup import SplitsAndFileArguments
from ..training.model_setup import ModelArguments, load_trained, make_model, make_tokenizer, option, parse_arguments
from ..training.pretraining import MaskedPretrainingArguments, pretrain
from ..training.reports import write_report, write_rows
from ..training.trainers import SequentialSeq2SeqTrainer, build_trainer, predict_splits, train_and_save

DEFAULTS = {"output_dir": "runs/seq2seq", "predict_with_generate": True}


@dataclass
class DataArguments(MaskedPretrainingArguments, SplitsAndFileArguments):
    """Where the pairs of texts come from."""

    source_column: str = option("source", "The input texts.")
    target_column: str = option("target", "The texts to generate.")
    source_lang: str | None = option(
        None, "In a column `translation`, which holds one text per language.", aliases=["--source_language"]
    )
    target_lang: str | None = option(None, "The language to generate, likewise.", aliases=["--target_language"])
    source_prefix: str = option("", "Text to prepend to every source.")
    max_source_length: int = option(4096, "Longer sources are truncated to this many tokens.")
    max_target_length: int = option(256, "Longer targets are truncated, and nothing longer is generated.")
    metric: str = option("bleu", "bleu and chrf, or rouge.", choices=("bleu", "chrf", "rouge", "none"))
    predict_file: str | None = option(None, "A text file whose target is generated at the end.", aliases=["--write"])

    def check(self, model: ModelArguments, args: TrainingArguments) -> None:
        check_distinct({"--source_column": self.source_column, "--target_column": self.target_column})
        check_distinct({"--source_lang": self.source_lang, "--target_lang": self.target_lang})
        if (self.source_lang is None) != (self.target_lang is None):
            raise ValueError("Give both --source_lang and --target_lang, or neither.")
        super().check(model, args)


def load_pairs(args: DataArguments, seed: int) -> DatasetDict:
    """Read splits with the columns `source` and `target`, holding out validation data if there is none."""
    pairs = DatasetDict()
    for split, dataset in args.read().items():
        with args.naming_source(split):
            pairs[split] = select_columns(dataset, args, split)
    return args.complete(pairs, seed, groups=read_column(pairs["train"], "source") if "train" in pairs else None)


def select_columns(dataset: Dataset, args: DataArguments, split: str) -> Dataset:
    """Keep only `source` and `target`, as texts; only `source` for a test split without targets."""
    names: tuple[str | None, ...] = (args.source_lang, args.target_lang)
    translations = "translation" in dataset.column_names and all(names)
    if not translations:
        names = args.source_column, args.target_column
        if split.startswith("test") and args.target_column not in dataset.column_names:
            names = names[:1]
        advice = "Name them with --source_column and --target_column, or give --source_lang and --target_lang."
        check_columns(dataset, split, names, advice)

    def select(row: dict, index: int) -> dict[str, str]:
        cells = [((row["translation"] or {}) if translations else row).get(name) for name in names]
        for name, cell in zip(names, cells, strict=True):
            if cell is None or isinstance(cell, list | dict | bytes):
                raise ValueError(
                    f"Row {index} of the {split} data has no text as `{name}`, but {cell!r}. Leave it out."
                )
        texts = [cell_text(cell) or "" for cell in cells]
        return dict(zip(features, [args.source_prefix + texts[0], *texts[1:]], strict=True))

    columns = ("source", "target")[: len(names)]
    features = Features({name: Value("string") for name in columns})  # whatever columns of these names held
    return dataset.map(select, with_indices=True, remove_columns=dataset.column_names, features=features)


def tokenize(pairs: Dataset, tokenizer: PreTrainedTokenizerBase, args: DataArguments) -> Dataset:
    """Make columns `input_ids`, `attention_mask` and, if targets are known, `labels`, which end with the eos token."""

    def encode(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(batch["source"], truncation=True, max_length=args.max_source_length)
        found = {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]}
        if "target" in batch:
            targets = tokenizer(batch["target"], add_special_tokens=False)["input_ids"]
            found["labels"] = [[*ids[: args.max_target_length - 1], tokenizer.eos_token_id] for ids in targets]
        return found

    return pairs.map(encode, batched=True, batch_size=64, remove_columns=pairs.column_names, desc="Tokenizing")


def score(metric: str, predictions: list[str], targets: list[str]) -> dict[str, float]:
    """Compute scores from 0 to 100: the share of exact matches, and BLEU and chrF by sacrebleu, or ROUGE's F1."""
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


def decode(ids: Any, tokenizer: Any) -> list[str]:
    """Decode padded ids to texts."""
    ids = np.where(np.asarray(ids) == IGNORE, tokenizer.pad_token_id, ids)
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


def make_trainer(
    pairs: DatasetDict, data: DataArguments, model_args: ModelArguments, args: Seq2SeqTrainingArguments
) -> tuple[Seq2SeqTrainer, dict[str, Dataset]]:
    """Make a Trainer that evaluates generated texts; also return the tokenized splits."""
    max_length = max(data.max_source_length, data.max_target_length + 1)

    def texts() -> Iterator[str]:
        return (text for row in pairs.get("train", []) for text in (row["source"], row["target"]))

    with args.main_process_first(desc="preparing the data"):
        tokenizer = make_tokenizer(model_args, texts(), max_length)
        if tokenizer.eos_token is None:
            if tokenizer.sep_token is None:
                raise ValueError(
                    "The tokenizer has no token that ends a target. Give it one: "
                    '`tokenizer.add_special_tokens({"eos_token": "</s>"})`, then save it.'
                )
            tokenizer.eos_token = tokenizer.sep_token
        encoded = {split: tokenize(dataset, tokenizer, data) for split, dataset in pairs.items()}
    pieces = token_ids(([text] for text in texts()), tokenizer)
    model_args = pretrain(data, model_args, args, tokenizer, pieces, max_length, AutoModelForSeq2SeqLM)
    model = make_model(AutoModelForSeq2SeqLM, model_args, tokenizer, max_length, trains="train" in pairs)
    args.generation_max_length = args.generation_max_length or data.max_target_length + 1  # and the start token

    def compute_metrics(output: EvalPrediction) -> dict[str, float]:
        return score(data.metric, decode(output.predictions, tokenizer), decode(output.label_ids, tokenizer))

    options: dict[str, Any] = {"data_collator": DataCollatorForSeq2Seq(tokenizer, model=model)}
    options |= {"compute_metrics": compute_metrics if args.predict_with_generate else None}
    return build_trainer(SequentialSeq2SeqTrainer, model, args, tokenizer, encoded, **options), encoded


def run(data: DataArguments, model_args: ModelArguments, args: Seq2SeqTrainingArguments) -> bool:
    """Read the data, train, evaluate and report. Returns whether a model was trained."""
    set_seed(args.seed)
    pairs = load_pairs(data, args.seed)
    if "train" not in pairs:
        check_trained(model_args.model_name_or_path)
    trainer, encoded = make_trainer(pairs, data, model_args, args)
    train_and_save(trainer, "Pairs: " + ", ".join(f"{split} {len(part)}" for split, part in pairs.items()))
    scores = {}
    for split, ids in predict_splits(trainer, encoded) if args.predict_with_generate else ():
        predictions = decode(ids, trainer.processing_class)
        if "target" in pairs[split].column_names:
            scores[split] = score(data.metric, predictions, read_column(pairs[split], "target"))
        rows = [{**row, "prediction": text} for row, text in zip(pairs[split], predictions, strict=True)]
        write_rows(Path(args.output_dir, f"predictions_{split}.jsonl"), rows)
    summary = [f"{split}: " + ", ".join(f"{k} {v:.2f}" for k, v in row.items()) for split, row in scores.items()]
    write_report(trainer, scores, "\n\n".join(summary), data.describe() if "train" in pairs else None)
    return "train" in pairs


def predict_file(file: Path, folder: str, data: DataArguments, beams: int | None) -> None:
    """Print what the saved model generates for one file."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = load_trained(AutoModelForSeq2SeqLM, folder).eval()
    text = data.source_prefix + read_text(file)
    inputs = tokenizer(text, truncation=True, max_length=data.max_source_length, return_tensors="pt")
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    ids = model.generate(**inputs, max_new_tokens=data.max_target_length, num_beams=beams or 1)
    print(tokenizer.decode(ids[0], skip_special_tokens=True))


def check_trained(name: str | None) -> None:
    """Raise ValueError unless the model is an encoder-decoder, so that it can generate without training."""
    if name is None:
        raise ValueError(
            "There is nothing to train on, and a new model generates noise. Give --train_file or --model_name_or_path."
        )
    if not AutoConfig.from_pretrained(name).is_encoder_decoder:
        raise ValueError(f"`{name}` is no encoder-decoder, so its decoder would be new. Train it with --train_file.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with the given arguments, by default those of the process."""
    classes = (DataArguments, ModelArguments, Seq2SeqTrainingArguments)
    data, model_args, args = parse_arguments("seq2seq", __doc__, classes, arguments, DEFAULTS)
    data.check(model_args, args)
    has_data = bool(data.parts)
    if not has_data:
        check_trained(model_args.model_name_or_path)
    elif args.predict_with_generate and data.metric != "none":
        require("rouge_score" if data.metric == "rouge" else "sacrebleu")
    trained = has_data and run(data, model_args, args)
    if data.predict_file is not None and args.process_index == 0:
        folder = args.output_dir if trained else model_args.model_name_or_path
        predict_file(Path(data.predict_file), str(folder), data, args.generation_num_beams)
