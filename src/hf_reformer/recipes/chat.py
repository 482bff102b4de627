"""Train a Reformer to reply in conversations, with trl's SFTTrainer; the loss covers only the assistant's messages.

    # one row per conversation: messages, a list of {"role": "user" or "assistant", "content": …}
    hf-reformer train chat --train_file talks.jsonl --validation_file more.jsonl --baselines
    hf-reformer chat --model runs/chat

    # bytes instead of a vocabulary; conversations of up to 8192 bytes at a time
    hf-reformer train chat --train_file talks.parquet --tokenizer bytes --max_length 8192

    # first a language model, then conversations
    hf-reformer train language-model --train_file books.txt --tokenizer train --output_dir runs/lm
    hf-reformer train chat --model_name_or_path runs/lm --train_file talks.jsonl

    # a model saved by one of these runs, evaluated on other conversations
    hf-reformer train chat --model_name_or_path runs/chat --validation_file other.jsonl

A tokenizer without a chat template gets one, which is saved with it. Scores are bits per byte of the assistant's
messages, and how often the true reply is, of ten, the one that the conversation makes likelier than the others; the
others are from other conversations. All options of `trl.SFTConfig`, and so of `transformers.TrainingArguments`, work,
`--resume_from_checkpoint last` included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, set_seed
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from ..data.bpe_tokenizer import SPECIAL
from ..data.columns import check_columns
from ..data.conversations import (
    Messages,
    beginnings,
    conversation_windows,
    encode_conversation,
    read_conversations,
    set_chat_template,
)
from ..training.bits_per_byte import compressor_baselines
from ..training.chat import (
    ReplyBits,
    accuracy,
    draw_replies,
    make_choices,
    rank_replies,
    replies,
    tfidf_ranks,
)
from ..training.model_setup import ModelArguments, make_model, make_tokenizer, option, parse_overrides, run_recipe
from ..training.pretraining import PretrainingArguments, pretrain
from ..training.reports import draw_learning_curve, format_tables, write_report, write_rows
from ..training.trainers import LanguageModelTrainer, build_trainer, train_and_save

logger = logging.get_logger(__name__)

DEFAULTS = {
    "output_dir": "runs/chat", "tokenizer_vocab_size": 2048, "hidden_size": 256, "num_attention_heads": 4,
    "feed_forward_size": 512, "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "weight_decay": 0.1,
    "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "max_length": 1024, "assistant_only_loss": True,
    "bf16": False, "activation_checkpointing": False,  # not needed: layers are reversible
}  # fmt: skip
PRESETS = {"--model_name_or_path": {"learning_rate": 3e-4, "num_train_epochs": 3}}
TURNS = 4  # user messages in the sample dialogue


@dataclass
class DataArguments(PretrainingArguments):
    """Where conversations come from, and how replies are evaluated."""

    messages_column: str = option("messages", "Lists of messages, each with a role and content.")
    choices: int = option(10, "Number of replies from which the model must pick the true one.")
    max_choices: int = option(200, "Pick the true reply in at most this many random cases; 0: never.")
    baselines: bool = option(False, "Also score the choice by TF-IDF similarity, and general-purpose compressors.")

    def check(self, model: ModelArguments, args: Any) -> None:
        super().check(model, args)
        if self.choices < 2:
            raise ValueError(f"--choices {self.choices} leaves nothing to choose from. Give at least 2.")
        if args.max_length is None or args.max_length < 8:
            raise ValueError(f"--max_length {args.max_length} must be a number of at least 8 tokens.")
        if not args.assistant_only_loss:
            raise ValueError(
                "--assistant_only_loss False: this recipe trains and evaluates on replies only. Leave the option "
                "out; to train on whole texts, see `hf-reformer train language-model`."
            )
        if args.packing or args.padding_free:
            raise ValueError("--packing and --padding_free are not supported here. Leave them out.")
        name, overrides = model.model_name_or_path, parse_overrides(model.config_overrides)
        ties = name is not None and AutoConfig.from_pretrained(name).tie_word_embeddings
        if args.do_train and overrides.get("tie_word_embeddings", ties):
            raise ValueError(
                "trl multiplies hidden states by the weight of the head, which a model with `tie_word_embeddings` "
                "does not. Leave the override out, or train another model."
            )


class ChatTrainer(LanguageModelTrainer, SFTTrainer):
    """trl's SFTTrainer, with evaluation of one conversation at a time."""


def load_conversations(data: DataArguments, seed: int, words: Sequence[str]) -> dict[str, list[Messages]]:
    """Read the conversations of every split."""
    found = {}
    for split, rows in data.read().items():
        with data.naming_source(split):
            check_columns(rows, split, [data.messages_column], "Name it by --messages_column.")
            found[split] = read_conversations(rows, data.messages_column, split, words)
    sizes = {split: len(some) for split, some in found.items()}
    chosen = data.choose_rows(sizes, seed, beginnings(found.get("train", ())))
    return {split: [found[source][i] for i in rows] for split, (source, rows) in chosen.items()}


def sample_dialogue(model: Any, tokenizer: Any, messages: Messages, length: int) -> Messages:
    """Generate the model's own replies to the user's messages in a conversation, up to `length` tokens in all."""
    said: Messages = [message for message in messages[:1] if message["role"] == "system"]
    for message in [message for message in messages if message["role"] == "user"][:TURNS]:
        said.append(message)
        prompt: Any = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)
        room = length - inputs["input_ids"].shape[1]
        if room < 1:
            return said[:-1]
        options = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": min(200, room)}
        out = model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
        answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        said.append({"role": "assistant", "content": answer.strip()})
    return said


def report(
    trainer: Trainer, conversations: dict[str, list[Messages]], splits: dict[str, Dataset],
    metrics: dict[str, ReplyBits], data: DataArguments,
) -> None:  # fmt: skip
    """Write scores, a plot and a sample dialogue of every split except the training data, with baselines."""
    folder, tables, args = Path(str(trainer.args.output_dir)), {}, trainer.args
    tokenizer: Any = trainer.processing_class
    length: int = args.max_length  # type: ignore[attr-defined]
    seen = [text for messages in conversations.get("train", []) for text in replies(messages)]
    for split in metrics:
        some = conversations[split]
        prefix = "eval" if split == "validation" else split
        bits = trainer.evaluate(splits[split], metric_key_prefix=prefix)[f"{prefix}_bits_per_byte"]
        tables[split] = {"Reformer": {"bits per byte": bits}}
        if not trainer.is_world_process_zero():
            continue
        model: Any = trainer.accelerator.unwrap_model(trainer.model).eval()
        if data.baselines:
            texts = [f"{text}\n" for messages in some for text in replies(messages)]
            xz = compressor_baselines([f"{text}\n" for text in seen], texts)
            tables[split] |= {name: {"bits per byte": value} for name, value in xz.items()}
        choices = make_choices(some, data.choices, data.max_choices, args.seed)
        if choices:
            name = f"reply of {data.choices}"
            own, reply_bits = rank_replies(model, tokenizer, choices, length)
            ranks = {"Reformer": own}
            words = tfidf_ranks(choices, [*conversations.get("train", []), *some]) if data.baselines else None
            if words is not None:
                ranks["words of the last turns (TF-IDF)"] = words
            for model_name, found in ranks.items():
                tables[split].setdefault(model_name, {})[name] = accuracy(found)
            title = f"{split}: {len(choices)} replies"
            draw_replies(folder / f"replies_{split}.png", choices, reply_bits, ranks, title)
        elif data.max_choices:
            logger.warning(f"The {split} data has too few replies to offer {data.choices} choices.")
        written = sample_dialogue(model, tokenizer, some[0], length)
        write_rows(folder / f"dialogue_{split}.jsonl", written)
    if trainer.is_world_process_zero() and "validation" in metrics:
        draw_learning_curve(trainer, "bits_per_byte", metrics["validation"].bits_per_nat)
    dataset = data.describe() if "train" in conversations else None
    write_report(trainer, tables, format_tables(tables, conversations, "conversations"), dataset)


def run(data: DataArguments, model_args: ModelArguments, args: Any) -> None:
    """Read the data, train, evaluate and report."""
    set_seed(args.seed)
    splits, metrics = {}, {}
    with args.main_process_first(desc="preparing the data"):
        is_new = (model_args.tokenizer or model_args.model_name_or_path or "train") == "train"
        tokenizer = None if is_new else make_tokenizer(model_args, (), args.max_length)
        words = list(SPECIAL.values()) if tokenizer is None else tokenizer.all_special_tokens
        conversations = load_conversations(data, args.seed, words)
        if tokenizer is None:
            texts = (f"{x['role']}\n{x['content']}" for messages in conversations["train"] for x in messages)
            tokenizer = make_tokenizer(model_args, texts, args.max_length, causal=True)
        set_chat_template(tokenizer)
        for split, some in conversations.items():
            windows = conversation_windows(some, tokenizer, args.max_length)
            if split == "train":  # trl inspects the messages of the first row
                windows["messages"] = [some[0]] * len(windows["labels"])
            else:
                metrics[split] = ReplyBits(some, windows["labels"])
            splits[split] = Dataset.from_dict(windows)
    trains = "train" in splits
    if trains:  # on users' messages too
        pieces = (encode_conversation(messages, tokenizer)[0] for messages in conversations["train"])
        model_args = pretrain(data, model_args, args, tokenizer, pieces, args.max_length, AutoModelForCausalLM)
    model = make_model(AutoModelForCausalLM, model_args, tokenizer, args.max_length, trains)
    trainer_class = ChatTrainer if trains else LanguageModelTrainer
    trainer = build_trainer(trainer_class, model, args, tokenizer, splits)
    trainer.metrics = metrics
    counts = ", ".join(f"{split} {len(some)}" for split, some in conversations.items())
    sizes = "".join(f"; {split}: {one.num_bytes:,} bytes of replies" for split, one in metrics.items())
    train_and_save(trainer, f"Conversations: {counts}{sizes}.")
    report(trainer, conversations, splits, metrics, data)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with the given arguments, by default those of the process."""
    run_recipe("chat", __doc__, (DataArguments, ModelArguments, SFTConfig), run, arguments, DEFAULTS, PRESETS)
