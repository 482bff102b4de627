"""Train a Reformer to recommend the next item to every user, from their history of items.

    # RecBole's files: user_id:token, item_id:token, timestamp:float; titles from a table of items
    hf-reformer train recommendation --train_file ml-100k.inter --item_file ml-100k.item --baselines

    # csv, json or parquet: one row per interaction, or a list of items per user
    hf-reformer train recommendation --train_file orders.csv --user_column customer --item_column sku --top_k 5 10 20

    # every user's next item in a separate file, in a column target_item_id or as the last item there
    hf-reformer train recommendation --train_file train.jsonl --validation_file validation.jsonl

    # the last item of every user is held out for the test, the one before for validation
    hf-reformer train recommendation --train_file orders.csv --do_train --do_eval --do_predict

    # a model saved by one of these runs: recommend to the users in a file, including new ones
    hf-reformer train recommendation --model_name_or_path runs/recommendation --predict_file users.jsonl

Without a --validation_file, the last item of every user is held out. All items are ranked except those the user had.
Scores are hit rate, NDCG and MRR of the first k. The vocabulary of the saved model is the items: after
`AutoTokenizer` has read "12 907" (items, oldest first), `generate` returns the next items. All options of
`transformers.TrainingArguments` work, `--resume_from_checkpoint last` included.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from ..data.interactions import find_interaction_columns, read_histories, read_interactions, read_titles
from ..data.packing import cut_windows
from ..data.tables import read_column
from ..training.data_setup import SplitArguments
from ..training.model_setup import ModelArguments, make_model, make_tokenizer, option, run_recipe
from ..training.neighbors import initialize_embeddings
from ..training.recommendation import (
    MISSED,
    NEAR,
    SPECIAL,
    UNKNOWN,
    ItemCollator,
    RankScores,
    RecommendationTrainer,
    User,
    baseline_ranks,
    baseline_scorers,
    draw_recommendations,
    generation_settings,
    item_tokenizer,
    scores_at,
)
from ..training.reports import format_tables, write_report, write_rows
from ..training.trainers import build_trainer, longest_first, predict_splits, train_and_save

logger = logging.get_logger(__name__)

DEFAULTS = {
    "tokenizer": "items", "output_dir": "runs/recommendation", "remove_unused_columns": False,
    "attn_layers": ["local", "local"], "attention_head_size": 32, "num_train_epochs": 12, "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine", "warmup_steps": 0.05, "weight_decay": 0.05, "adam_beta2": 0.98,
    "per_device_train_batch_size": 8, "train_sampling_strategy": "group_by_length",
}  # fmt: skip
FIELDS = {  # of a new model's config
    "tie_word_embeddings": True, "hidden_dropout_prob": 0.2, "local_window": 32,
    "reversible": False,  # two narrow layers store few activations
}  # fmt: skip
PRESETS = {"--model_name_or_path": {"tokenizer": None, "learning_rate": 3e-4, "num_train_epochs": 3}}
TITLES = "item_titles.json"  # in the model's folder


@dataclass
class DataArguments(SplitArguments):
    """Where interactions of users with items come from."""

    held_out: ClassVar[tuple[str, ...]] = ("validation", "test")

    predict_file: str | None = option(None, "Users and their items; at the end, recommend the next items to them.")
    item_file: str | None = option(None, "A table with the columns item_id and title.")
    user_column: str | None = option(None, "Default: found by name.")
    item_column: str | None = option(None, "Items or lists of items. Default: found by name.")
    time_column: str | None = option(None, "Default: found by name; without one, the rows are in order of time.")
    max_length: int = option(128, "Maximum items of a history; of longer histories, only the last ones are used.")
    item_dropout: float = option(0.1, "Fraction of history items hidden from the input in training.")
    reorder: float = option(5.0, "Maximum number of places by which items are randomly moved in training.")
    neighbor_init: bool = option(
        True, "Initialize a new model with similar embeddings for items that share neighbors."
    )
    top_k: list[int] = option([10], "Numbers of recommendations (k) to score; predictions have the largest k.")
    baselines: bool = option(False, "Also score popularity, item-kNN and co-occurrence.")

    def _given(self, file: str) -> list[str]:
        """Also accept training data for the test split, which can be held out of it."""
        held_out = file == "test_file" and "train" in (self.wanted or ())
        return super()._given(file) or (super()._given("train_file") if held_out else [])

    def check(self, model: ModelArguments, args: TrainingArguments) -> None:
        if model.tokenizer in ("bytes", "train"):
            raise ValueError(
                f"--tokenizer {model.tokenizer}: what is read here are items, not texts. Leave the option out."
            )
        super().check(model, args)
        if min(self.top_k, default=0) < 1:
            raise ValueError(f"--top_k {' '.join(map(str, self.top_k))}: give numbers of at least 1.")
        self.top_k = sorted({*self.top_k})
        if self.max_length < 2:
            raise ValueError(
                f"--max_length {self.max_length} leaves no item to predict another one from. Give 2 or more."
            )
        for name in ("predict_file", "item_file"):
            if (file := getattr(self, name)) is not None and not Path(file).is_file():
                raise ValueError(f"--{name}: there is no file `{file}`.")

    def read_file(self, file: str) -> Dataset:
        return read_interactions(file)

    def read(self) -> DatasetDict:
        """Read the splits, and the training data even if nothing is trained: it tells which items users had."""
        splits = super().read()
        if "train" not in splits and self.train_file is not None:
            splits["train"] = self.read_file(self.train_file)
        elif "train" not in splits and "train" in (source := self.read_source()):
            splits["train"] = source["train"]
        return splits


def load_users(data: DataArguments) -> tuple[dict[str, list[str]], dict[str, list[User]]]:
    """Read the training histories, and the users of every other split with all the items they had before, in order.

    Raises:
        ValueError: the tables cannot be read as interactions, or there is nothing to hold out.
    """
    splits = dict(data.read())
    if data.predict_file is not None:
        splits["predict"] = data.read_file(data.predict_file)
    known: dict[str, list[str]] = {}
    given: dict[str, list[User]] = {}
    for split, rows in sorted(splits.items(), key=lambda x: x[0] != "train"):
        with data.naming_source(split):
            named = {"user": data.user_column, "item": data.item_column, "time": data.time_column}
            if split != "train":  # other splits may have other columns
                named = {kind: name for kind, name in named.items() if name in rows.column_names}
            found, targets = read_histories(rows, find_interaction_columns(rows, **named), split)
            if split == "train":
                known = found
            else:
                given[split] = list(_join(known, found, targets, split))
    train = {user: list(items) for user, items in known.items()}
    held: dict[str, list[User]] = {}
    for split in ("test", "validation"):  # the last item is for the test
        if split in data.parts and not any(name.startswith(split) for name in splits):
            held[split] = [User(user, had[:-1], had.pop()) for user, had in train.items() if len(had) > 1]
            if not held[split]:
                raise ValueError(
                    f"No user has two items, so none can be held out for the {split} data. Is --user_column right? Or "
                    f"give a --{split}_file."
                )
            if short := len(train) - len(held[split]):
                logger.warning(f"{short} users have a single item, which is not held out: they only train.")
    return train, {**{split: held[split] for split in ("validation", "test") if split in held}, **given}


def _join(
    known: Mapping[str, list[str]], found: Mapping[str, list[str]], targets: Mapping[str, str], split: str
) -> Any:
    """Yield the users of a file with the items they had there and in the training data, and the item to recommend."""
    again = 0
    for user, items in found.items():
        target = targets.get(user)
        if target is None and split != "predict" and items:
            *items, target = items
        history = list(dict.fromkeys([*known.get(user, ()), *items]))
        if target is None or target not in history:
            yield User(user, history, target)
        else:
            again += 1
    if again:
        logger.warning(
            f"{again} users in the {split} data have a target item that they already had; these users are left out."
        )


def warn_unknown(users: Sequence[User], tokenizer: PreTrainedTokenizerBase, split: str) -> None:
    """Warn about items that are not in the vocabulary.

    Raises:
        ValueError: none of the items to be recommended is in the vocabulary.
    """
    vocab = tokenizer.get_vocab()
    targets = [user.target for user in users if user.target is not None]
    unknown = [target for target in targets if target not in vocab]
    if unknown and len(unknown) == len(targets):
        raise ValueError(
            f"No item to be recommended in the {split} data was in the training data (the first one is "
            f"{unknown[0]!r}). Do both write items in the same way?"
        )
    if unknown:
        logger.warning(
            f"{len(unknown)} of {len(targets)} items to be recommended in the {split} data were not in the training "
            f"data, {unknown[0]!r} among them. Nothing can recommend them: they count as missed."
        )
    if before := sum(item not in vocab for user in users for item in user.history):
        logger.warning(f"{before} items that users of the {split} data had are unknown to the model.")


def encode_training(histories: Sequence[list[str]], tokenizer: Any, length: int) -> Dataset:
    """Cut windows of at most `length` tokens in which every item is a target once, after a quarter of earlier ones."""
    columns: dict[str, list] = {"input_ids": [], "labels": [], "length": []}
    for items in histories:
        ids = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(items)]
        for window, labels in cut_windows(ids, length, max(1, length // 4)):
            for name, value in zip(columns, (window, labels, len(window)), strict=True):
                columns[name].append(value)
    return Dataset.from_dict(columns)


def encode_users(users: Sequence[User], tokenizer: Any, length: int) -> Dataset:
    """Make columns of every user's last items, all items they `had`, the `target` or UNKNOWN, and the `length`."""
    vocab, rows = tokenizer.get_vocab(), []
    for user in users:
        had = tokenizer.convert_tokens_to_ids(user.history)
        ids = [tokenizer.bos_token_id, *had][-length:]
        target = vocab.get(user.target, UNKNOWN)
        rows.append({"input_ids": ids, "had": sorted({*had, *ids}), "target": target, "length": len(ids)})
    return Dataset.from_list(rows)


def item_numbers(items: Sequence[str], tokenizer: Any) -> np.ndarray:
    """Convert items to numbers starting from 0, leaving out those that are not in the vocabulary."""
    ids = np.array(tokenizer.convert_tokens_to_ids(list(items)), dtype=np.int64)
    return ids[ids >= len(SPECIAL)] - len(SPECIAL)


def report(
    trainer: Trainer, train: Sequence[list[str]], users: dict[str, list[User]], encoded: Mapping[str, Dataset],
    titles: Mapping[str, str], args: DataArguments,
) -> None:  # fmt: skip
    """Write the recommendations for all users, a plot and scores of every split, and the scores of baselines."""
    folder, tables = Path(str(trainer.args.output_dir)), {}
    tokenizer: Any = trainer.processing_class
    first, vocab = len(SPECIAL), tokenizer.get_vocab()
    count, words = len(vocab) - first, sorted(vocab, key=vocab.get)

    histories = [item_numbers(items, tokenizer) for items in train]
    scorers = baseline_scorers(histories, count) if args.baselines and train else {}
    for split, (ranks, items, scores) in predict_splits(trainer, encoded):
        some = users[split]
        rows = (prediction(*one, words, titles) for one in zip(some, ranks, items, scores, strict=True))
        write_rows(folder / f"predictions_{split}.jsonl", rows)
        targets = np.array([vocab[user.target] - first if user.target in vocab else UNKNOWN for user in some])
        if all(user.target is not None for user in some):
            had = [item_numbers(user.history, tokenizer) for user in some]
            all_ranks = {"Reformer": np.asarray(ranks)}
            all_ranks |= {name: baseline_ranks(scorer, had, targets) for name, scorer in scorers.items()}
            tables[split] = {name: scores_at(one, args.top_k) for name, one in all_ranks.items()}
            popularity = np.bincount(np.concatenate([*histories, np.empty(0, np.int64)]).astype(int), minlength=count)
            best = np.where(items == UNKNOWN, UNKNOWN, items - first)
            file = folder / f"recommendations_{split}.png"
            draw_recommendations(file, all_ranks, popularity, targets, best, f"{split}: {len(some)} users")
    dataset = args.describe() if trainer.train_dataset is not None else None
    write_report(trainer, tables, format_tables(tables, users, "users"), dataset)


def prediction(
    user: User, rank: float, items: np.ndarray, scores: np.ndarray, words: Sequence[str], titles: Mapping[str, str]
) -> dict[str, Any]:
    """Make a line of predictions: the items recommended to a user, with titles and log-probabilities."""

    def named(item: str) -> dict[str, Any]:
        return {"item_id": item, "title": titles[item]} if item in titles else {"item_id": item}

    best = [(words[item], score) for item, score in zip(items.tolist(), scores.tolist(), strict=True) if item >= 0]
    row: dict[str, Any] = {"user_id": user.id, "last": [named(item) for item in user.history[-5:]]}
    if user.target is not None:
        row |= {"true": named(user.target), "rank": None if rank == MISSED else float(rank)}
    return {**row, "recommended": [{**named(item), "score": round(score, 4)} for item, score in best]}


def read_all_titles(data: DataArguments, model: ModelArguments) -> dict[str, str]:
    """Read the titles of the item file, or else those saved with the model."""
    if data.item_file is not None:
        return read_titles(data.item_file)
    saved = Path(model.model_name_or_path or "", TITLES)
    return json.loads(saved.read_text(encoding="utf-8")) if model.model_name_or_path and saved.is_file() else {}


def run(data: DataArguments, model_args: ModelArguments, args: TrainingArguments) -> None:
    """Read the data, train, evaluate and report."""
    set_seed(args.seed)
    encoded = {}
    with args.main_process_first(desc="preparing the data"):
        titles = read_all_titles(data, model_args)
        train, users = load_users(data)
        names = {"train": list(train), **{split: list(range(len(some))) for split, some in users.items()}}
        numbered = DatasetDict({split: Dataset.from_dict({"name": some}) for split, some in names.items()})
        chosen = {split: read_column(rows, "name") for split, rows in data.complete(numbered, args.seed).items()}
        histories = [train[user] for user in chosen.pop("train")]
        users = {split: [users[split][number] for number in numbers] for split, numbers in chosen.items()}
        if model_args.tokenizer == "items":
            items = dict.fromkeys(item for items in histories for item in items)
            tokenizer: Any = item_tokenizer(list(items), data.max_length)
        else:
            tokenizer = make_tokenizer(model_args, (), data.max_length)
        trains = bool(args.do_train)
        if trains:
            encoded["train"] = encode_training(histories, tokenizer, data.max_length)
        for split, some in users.items():
            with data.naming_source(split):
                warn_unknown(some, tokenizer, split)
            encoded[split] = longest_first(encode_users(some, tokenizer, data.max_length))
    fields = FIELDS if model_args.model_name_or_path is None else {}
    model = make_model(AutoModelForCausalLM, model_args, tokenizer, data.max_length, trains, **fields)
    if trains and model_args.model_name_or_path is None and data.neighbor_init:
        initialize_embeddings(model, [item_numbers(x, tokenizer) + len(SPECIAL) for x in histories], NEAR)
    model.generation_config.update(**generation_settings(tokenizer))
    options = {"data_collator": ItemCollator(tokenizer), "compute_metrics": RankScores(data.top_k)}
    judged = {split: rows for split, rows in encoded.items() if split != "predict"} or encoded
    trainer = build_trainer(RecommendationTrainer, model, args, tokenizer, judged, **options)
    trainer.count, trainer.item_dropout, trainer.reorder = data.top_k[-1], data.item_dropout, data.reorder
    interactions = sum(map(len, histories))
    sizes = "".join(f"; {split}: {len(some)} users" for split, some in users.items())
    train_and_save(
        trainer, f"{interactions} interactions of {len(histories)} users with {len(tokenizer)} items{sizes}."
    )
    if titles and trains and trainer.is_world_process_zero():
        (Path(str(args.output_dir)) / TITLES).write_text(json.dumps(titles, ensure_ascii=False), encoding="utf-8")
    report(trainer, histories, users, encoded, titles, data)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with the given arguments, by default those of the process."""
    classes = (DataArguments, ModelArguments, TrainingArguments)
    run_recipe("recommendation", __doc__, classes, run, arguments, DEFAULTS, PRESETS)
