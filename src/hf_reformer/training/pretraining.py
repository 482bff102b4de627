"""Pre-training on the texts of a task, such as by masked tokens, before training on the task itself."""

from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ..data.packing import MaskingCollator, causal_lm_collator, packed_dataset
from .data_setup import SplitArguments
from .model_setup import ModelArguments, make_model, option
from .trainers import PRETRAINED, STATE, LanguageModelTrainer, build_trainer, train_and_save


@dataclass
class PretrainingArguments(SplitArguments):
    """Options of a recipe that can begin with pre-training."""

    pretrain_steps: int = option(0, "First train this many steps of language modeling on the training texts.")
    pretrain_length: int = option(512, "Tokens per sequence in pretraining.")
    pretrain_learning_rate: float = option(2e-3, "Learning rate in pretraining.")

    def check(self, model: ModelArguments, args: TrainingArguments) -> None:
        super().check(model, args)
        if self.pretrain_steps and model.model_name_or_path is not None:
            raise ValueError("--pretrain_steps makes a new model. Leave it out, or --model_name_or_path.")
        if self.pretrain_steps and not args.do_train:
            raise ValueError("--pretrain_steps belongs to training, and nothing is trained here. Leave it out.")
        resumed = args.resume_from_checkpoint
        if resumed and Path(resumed).parent.name == PRETRAINED and not self.pretrain_steps:
            raise ValueError(
                f"--resume_from_checkpoint: {resumed} is a checkpoint of pre-training, and this run has none. Give "
                "--pretrain_steps as before, or leave the option out to begin from the start."
            )


@dataclass
class MaskedPretrainingArguments(PretrainingArguments):
    """Options of a recipe whose model has an encoder, which is pre-trained on masked texts."""

    mlm_probability: float = option(0.15, "Share of tokens to mask in pretraining.")


class Objective(NamedTuple):
    """What pre-training learns from: a dataset, for a Trainer with a collator and so on (`parts`) and `options`."""

    dataset: Dataset
    trainer: type[Trainer]
    parts: dict[str, Any]
    options: dict[str, Any]


def pretrain(
    data: PretrainingArguments,
    model_args: ModelArguments,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    pieces: Iterable[list[int]],
    max_length: int,
    head: Any = AutoModelForMaskedLM,
) -> ModelArguments:
    """Pre-train a language model on pieces of token ids; see `pretrain_on`.

    Args:
        head: determines the objective. `AutoModelForMaskedLM`: predict masked tokens; `AutoModelForCausalLM`: predict
            the next token; `AutoModelForSeq2SeqLM`: write the whole text given a masked one (denoising).

    Raises:
        ValueError: the pieces are too short, the tokenizer has no mask token, or a resumed run has no pre-trained
            model.
    """

    def language_modeling(length: int) -> Objective:
        sequences = packed_dataset(pieces, length, "--pretrain_length")
        parts: dict[str, Any] = {"data_collator": causal_lm_collator}
        if isinstance(data, MaskedPretrainingArguments):
            denoises = head is AutoModelForSeq2SeqLM
            collator = MaskingCollator(tokenizer, data.mlm_probability, args.seed, whole=denoises)
            parts = {"data_collator": collator, "callbacks": [collator]}
        options = {"train_sampling_strategy": "random", "remove_unused_columns": True}  # all are of one length
        return Objective(sequences, LanguageModelTrainer, parts, options)

    return pretrain_on(language_modeling, data, model_args, args, tokenizer, max_length, head)


def pretrain_on(
    make_objective: Callable[[int], Objective],
    data: PretrainingArguments,
    model_args: ModelArguments,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    head: Any,
) -> ModelArguments:
    """Pre-train a model with this head and return `model_args` that start from it.

    Without `pretrain_steps`, `model_args` are returned unchanged. The model is saved below the output directory of the
    run. A resumed run continues its pre-training, or uses the result of it.

    Args:
        make_objective: called with the maximum number of tokens per row, unless there is nothing left to train.

    Raises:
        ValueError: a resumed run has no pre-trained model, or whatever `make_objective` raises.
    """
    if not data.pretrain_steps:
        return model_args
    folder = Path(str(args.output_dir), PRETRAINED)
    result = replace(model_args, model_name_or_path=str(folder), config_overrides=None)
    resumed = args.resume_from_checkpoint
    if resumed is not None and Path(resumed).parent.name != PRETRAINED:
        if not (folder / "config.json").is_file():
            raise ValueError(f"--resume_from_checkpoint {resumed}: there is no pre-trained model in {folder}.")
        return result
    if (
        resumed is not None
        and TrainerState.load_from_json(str(Path(resumed, STATE))).global_step >= data.pretrain_steps
    ):
        with args.main_process_first(desc="taking the pre-trained model"):
            if args.process_index == 0:
                done = replace(result, model_name_or_path=resumed)
                make_model(head, done, tokenizer, max_length).save_pretrained(folder)
                tokenizer.save_pretrained(folder)
        args.resume_from_checkpoint = None
        set_seed(args.seed)
        return result
    length = min(data.pretrain_length, max_length)
    with args.main_process_first(desc="preparing the pre-training"):
        objective = make_objective(length)
    options: Any = copy(args)
    options.output_dir, options.max_steps = str(folder), data.pretrain_steps
    options.learning_rate, options.label_smoothing_factor = data.pretrain_learning_rate, 0.0
    options.eval_strategy, options.load_best_model_at_end, options.push_to_hub = "no", False, False
    for name, value in objective.options.items():
        setattr(options, name, value)
    model = make_model(head, model_args, tokenizer, max_length)
    splits = {"train": objective.dataset}
    trainer = build_trainer(objective.trainer, model, options, tokenizer, splits, **objective.parts)
    train_and_save(trainer, f"Pre-training: {len(objective.dataset):,} sequences of up to {length} tokens")
    trainer.accelerator.wait_for_everyone()
    args.resume_from_checkpoint = None
    set_seed(args.seed)  # the task starts from the same random state, whether or not pre-training was resumed
    return result
