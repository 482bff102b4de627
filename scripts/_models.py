"""What the training scripts share: the model that they begin with, its tokenizer, training, and the model card."""

import ast
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.modelcard import extract_hyperparameters_from_trainer

from hf_reformer import ReformerByteTokenizer, ReformerConfig
from hf_reformer.data.bpe_tokenizer import train_bpe_tokenizer
from hf_reformer.hub.model_card import model_card

SIZES = (
    "hidden_size", "attn_layers", "num_attention_heads", "attention_head_size", "feed_forward_size", "num_hashes",
    "position_embedding_type",
)  # fmt: skip


@dataclass
class ModelArguments:
    """A saved model to start from, or the sizes of a new one."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A saved model to start from."})
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "bytes; train (a byte-level BPE from the training texts); or a name or path. "
            "Default: the saved model's own, or train."
        },
    )
    tokenizer_vocab_size: int = field(default=8192, metadata={"help": "For --tokenizer train."})
    hidden_size: int = field(default=128, metadata={"help": "Width of the model."})
    attn_layers: list[str] = field(
        default_factory=lambda: ["local", "lsh", "local", "lsh"], metadata={"help": "Kind of every layer."}
    )
    num_attention_heads: int = field(default=2, metadata={"help": "Attention heads of every layer."})
    attention_head_size: int = field(default=64, metadata={"help": "Width of every head."})
    feed_forward_size: int = field(default=256, metadata={"help": "Width inside the feed-forward layers."})
    num_hashes: int = field(default=2, metadata={"help": "Hash rounds of the lsh layers."})
    position_embedding_type: str = field(default="rotary", metadata={"help": "axial, learned or rotary."})
    config_overrides: str | None = field(
        default=None, metadata={"help": 'Any other field of ReformerConfig: "lsh_window=64,reversible=False".'}
    )


class SequentialEvalMixin:
    """Beside a Trainer: it evaluates and predicts in the order of the data, also where it trains by length."""

    args: Any

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


def force_cpu_backend() -> None:
    """Before options are read: of several processes without an accelerator each would train alone, without a word."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def parse_overrides(text: str | None) -> dict[str, Any]:
    """`"a=1,b=(2,3),c=word"` as a dictionary."""

    def value(word: str) -> Any:
        try:
            return ast.literal_eval(word)
        except (SyntaxError, ValueError):
            return word

    found = re.findall(r"(\w+)\s*=\s*(\(.*?\)|\[.*?\]|[^,]*)", text or "")
    return {name: value(word.strip()) for name, word in found}


def make_tokenizer(args: ModelArguments, texts: Iterable[str], max_length: int) -> PreTrainedTokenizerBase:
    """The tokenizer that was asked for, told where to cut. `texts` are read only to learn one."""
    name = args.tokenizer or args.model_name_or_path or "train"
    if name == "train":
        return train_bpe_tokenizer(texts, args.tokenizer_vocab_size, max_length)
    tokenizer = ReformerByteTokenizer() if name == "bytes" else AutoTokenizer.from_pretrained(name)
    tokenizer.model_max_length = max_length
    return tokenizer


def check_fields(overrides: dict[str, Any], config: Any) -> None:
    """Raise ValueError for names that the config does not know."""
    if unknown := [name for name in overrides if not hasattr(config, name)]:
        raise ValueError(f"--config_overrides: {type(config).__name__} has no field {', '.join(unknown)}.")


def make_model(
    auto_class: Any, args: ModelArguments, tokenizer: PreTrainedTokenizerBase, max_length: int, **settings: Any
) -> PreTrainedModel:
    """The saved model under the head of `auto_class`, or a new one for sequences of up to `max_length` tokens.

    Args:
        settings: further fields of the config, such as labels.
    """
    overrides = parse_overrides(args.config_overrides)
    if args.model_name_or_path is not None:
        check_fields(overrides, AutoConfig.from_pretrained(args.model_name_or_path))
        config = AutoConfig.from_pretrained(args.model_name_or_path, **settings, **overrides)
        if len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens, but `{args.model_name_or_path}` knows only "
                f"{config.vocab_size}. Leave `--tokenizer` out to use the model's own."
            )
        return auto_class.from_pretrained(args.model_name_or_path, config=config, ignore_mismatched_sizes=True)
    check_fields(overrides, ReformerConfig())
    new: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": max_length,
        **{name: getattr(args, name) for name in SIZES},
        **{f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")},
        **settings,
        **overrides,
    }
    return auto_class.from_config(ReformerConfig(**new))


def train_and_save(trainer: Trainer, resume: str | None) -> None:
    """Train, then save the model, its tokenizer and the training figures. `resume`: a checkpoint, or "last"."""
    result = trainer.train(resume_from_checkpoint=True if resume in ("last", "true", "True") else resume)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()


def write_model_card(trainer: Trainer, scores: str, dataset: str, **metadata: Any) -> None:
    """Write a model card with our scores at its end; after training, save the record that it tells from, too."""
    tokenizer: Any = trainer.processing_class
    trained = trainer.state.global_step > 0
    if trained:
        trainer.save_state()  # again, with the last evaluation
    card = model_card(
        trainer.accelerator.unwrap_model(trainer.model),
        str(trainer.args.output_dir),
        tokenizer,
        trainer.state,
        with_code=False,
        dataset_name=dataset,
        training=extract_hyperparameters_from_trainer(trainer) if trained else None,
        notes=f"## Scores\n\n{scores}",
        **metadata,
    )
    card.save(Path(trainer.args.output_dir) / "README.md")
