"""The Trainers of the recipes."""

import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors import safe_open
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Trainer, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from ..data.tables import read_column
from ..models.losses import IGNORE
from ..models.pretrained import check_torch_file
from .found_callback import AttentionFoundCallback, has_hashing_layers

logger = logging.get_logger(__name__)

PRETRAINED = "_pretrained"  # below the output directory; names that begin with _ are not pushed to the Hub
STATE = "trainer_state.json"  # the Trainer's record of the run, the last file of a checkpoint


def force_cpu_backend() -> None:
    """Make several processes without an accelerator train together; call this before creating `TrainingArguments`.

    Otherwise each of them would silently train alone.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")


def build_trainer(
    trainer_class: Any, model: Any, args: Any, tokenizer: Any, splits: Mapping[str, Any], **options: Any
) -> Any:
    """Build a Trainer that trains on the split `train` and evaluates the validation splits, never the test data.

    Without training data, it evaluates test splits if there is no validation split. If the model has LSH layers,
    evaluations log what hashing finds (`AttentionFoundCallback`).
    """
    evaluated = {split: part for split, part in splits.items() if split.startswith("validation")}
    if "train" not in splits:  # then no choice depends on the evaluation
        evaluated = evaluated or dict(splits)
    options["train_dataset"] = splits.get("train")
    options["eval_dataset"] = evaluated if len(evaluated) > 1 else next(iter(evaluated.values()), None)
    trainer = trainer_class(model=model, args=args, processing_class=tokenizer, **options)
    if has_hashing_layers(model):
        trainer.add_callback(AttentionFoundCallback(trainer))
    return trainer


def train_and_save(trainer: Trainer, data_summary: str) -> None:
    """Print a summary; if there is training data, train and save the model, its tokenizer and the metrics."""
    model: Any = trainer.model
    if trainer.is_world_process_zero():
        layers = ", ".join(getattr(model.config, "attn_layers", [model.config.model_type]))
        print(f"{data_summary}\nParameters: {model.num_parameters():,}; layers: {layers}")
    if trainer.train_dataset is None:
        return
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if wrong := next((name for name, x in model.named_parameters() if not x.isfinite().all()), None):
        raise ValueError(_diverged(f"`{wrong}`", math.nan))
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """Return the checkpoint that `--resume_from_checkpoint` names; `last` is the newest complete one of the run.

    If the run has none yet, `last` is the newest complete one of its pre-training.

    Raises:
        ValueError: the named checkpoint is incomplete or damaged, or there is none.
    """
    name = args.resume_from_checkpoint
    if not name or name not in ("last", "true", "True", True):
        if name and (damage := checkpoint_damage(Path(name))):
            raise ValueError(
                f"--resume_from_checkpoint {name}: {damage}. Name another checkpoint, or `last`: the newest whole one."
            )
        return name or None
    found = False
    for folder in (Path(args.output_dir), Path(args.output_dir, PRETRAINED)):
        steps = {_step(path): path for path in folder.glob("checkpoint-*") if _step(path) is not None}
        found = found or bool(steps)
        for step in sorted(steps, reverse=True):
            if (damage := checkpoint_damage(steps[step])) is None:
                return str(steps[step])
            if args.process_index == 0:
                logger.warning(f"Skipping {steps[step]}: {damage}.")
    raise ValueError(
        f"--resume_from_checkpoint {name}: {args.output_dir} contains no {'complete ' if found else ''}checkpoint. "
        "Omit the option to start from the beginning."
    )


def checkpoint_damage(folder: Path) -> str | None:
    """Describe what is wrong with a checkpoint that is incomplete or damaged; None if it is intact."""
    if not folder.is_dir():
        return "there is no such directory"
    if not (folder / STATE).is_file():
        return f"it was not saved to its end: {STATE}, its last file, is missing"
    missing = [name for name in ("optimizer*", "scheduler.pt", "rng_state*.pth") if not any(folder.glob(name))]
    missing = [] if len(missing) == 3 else missing  # --save_only_model
    missing += [] if any(folder.glob("*model*")) else ["file of weights"]
    if missing and not (folder / "latest").is_file():  # written by DeepSpeed, whose files have other names
        return f"there is no {', '.join(missing)}"
    for file in sorted(folder.rglob("*")):
        try:
            if file == folder / STATE:
                step = TrainerState.load_from_json(str(file)).global_step
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass  # opening checks the sizes in the header against the file
            elif file.suffix in (".bin", ".pt", ".pth"):
                if part := zipfile.ZipFile(file).testzip():
                    return f"{file.name} is damaged: the checksum of {part} is another"
                check_torch_file(file)
        except Exception as error:  # whatever the readers raise for damaged bytes
            return f"{file.name} is damaged: {error}"
    return f"{STATE} is of step {step}" if _step(folder) not in (step, None) else None


def _step(checkpoint: Path) -> int | None:
    found = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    return None if found is None else int(found[1])


def longest_first(dataset: Dataset, first: int = 0) -> Dataset:
    """Sort by length, so that batches need little padding; the column `row` holds the old order, from `first` on."""
    order = np.argsort(-np.asarray(read_column(dataset, "length")), kind="stable")
    return dataset.select(order).add_column("row", order + first)


def predict_splits(trainer: Trainer, encoded: Mapping[str, Dataset]) -> Iterator[tuple[str, Any]]:
    """Predict all splits except the training data and save their metrics; yield predictions in the main process.

    Predictions are sorted by the column `row` if there is one (`longest_first`). Every process must exhaust the
    iterator.
    """
    for split, dataset in encoded.items():
        if split != "train":
            output = trainer.predict(dataset, metric_key_prefix=split)
            loss = output.metrics.get(f"{split}_loss", 0.0)
            if not math.isfinite(loss):
                raise ValueError(_diverged(f"`{split}_loss`", loss))
            trainer.save_metrics(split, output.metrics)
            if trainer.is_world_process_zero():
                found: Any = output.predictions
                if "row" in dataset.column_names:
                    order = np.argsort(read_column(dataset, "row"))
                    found = tuple(x[order] for x in found) if isinstance(found, tuple) else found[order]
                yield split, found


class WholeCheckpointsMixin:
    """Makes a Trainer write a checkpoint's `trainer_state.json` last, and remove one that it fails to save."""

    args: Any
    accelerator: Any

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        trainer: Any = self
        folder = Path(trainer._get_output_dir(trial), f"checkpoint-{trainer.state.global_step}")
        if self.args.should_save:  # left by an earlier run
            (folder / STATE).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        except Exception as error:
            if checkpoint_damage(folder) is None:
                raise
            if self.args.should_save:
                shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"{folder} could not be saved and was removed: {error}. Free some disk space, then resume from the "
                "previous checkpoint with --resume_from_checkpoint last."
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()  # every process saves its own


class FiniteLossMixin:
    """Makes a Trainer stop when a loss is not finite, before saving anything, and log only what JSON can represent.

    Other numbers that are not finite, such as the norm of gradients that overflowed in float16, are logged as None.
    """

    args: Any
    model: Any

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        library: Any = super()
        loss = library.training_step(*args, **kwargs)
        if not bool(loss.isfinite().all()):
            raise ValueError(_diverged("The training loss", float(loss)))
        return loss

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        numbers = {name: x for name, x in logs.items() if isinstance(x, float) and not math.isfinite(x)}
        for name, x in numbers.items():
            if name.endswith("loss"):
                raise ValueError(_diverged(f"`{name}`", x))
        library: Any = super()
        library.log({**logs, **dict.fromkeys(numbers)}, *args, **kwargs)


def _diverged(name: str, value: float) -> str:
    return (
        f"{name} is {value}, not finite: the model has diverged, so the run stops and saves nothing more. Lower "
        "--learning_rate, set --max_grad_norm 1, or train in float32 or bfloat16."
    )


class RecipeMixin(WholeCheckpointsMixin, FiniteLossMixin):
    """What all Trainers of the recipes share. They write no model card: `reports.write_report` does."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing; the Trainer calls this before pushing to the Hub."""

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run an epoch unless all steps are done: a run resumed from its last checkpoint would train one step more."""
        library: Any = super()
        trainer: Any = self
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
        else:
            library._run_epoch(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate without changing torch's random state (a loader draws a seed), so that resumed runs agree."""
        library: Any = super()
        with torch.random.fork_rng(devices=[]):
            return library.evaluation_loop(*args, **kwargs)


class SequentialEvalMixin:
    """Makes a Trainer evaluate and predict in the order of the data, even if it groups training batches by length."""

    args: Any

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler | None:
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None


class EpochLengthSampler(LengthGroupedSampler):
    """Groups texts of similar length, in an order that depends only on the seed and the epoch.

    A resumed run thus sees the batches of an uninterrupted one, and all processes of a run agree on them.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate at the start of every epoch."""
        self.generator = torch.Generator().manual_seed(self.seed + epoch)


class GroupedTrainer(RecipeMixin, SequentialEvalMixin, Trainer):
    """A Trainer that uses `EpochLengthSampler` if `train_sampling_strategy` is "group_by_length"."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochLengthSampler(batch, read_column(self.train_dataset, "length"), seed)


class LanguageModelTrainer(RecipeMixin, Trainer):
    """A Trainer that evaluates sequence by sequence and gives `compute_metrics` the nats and targets of each.

    Bytes per token differ between texts, so every split has its own entry in `metrics`.
    """

    metrics: Mapping[str, Any] = {}

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate with the metrics of the split that `metric_key_prefix` names; for `eval`, those of validation."""
        validation = [metric for split, metric in self.metrics.items() if split.startswith("validation")]
        self.compute_metrics = self.metrics.get(metric_key_prefix.removeprefix("eval_"), next(iter(validation), None))
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        tokenizer: Any = self.processing_class
        training_collator = self.data_collator
        self.data_collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORE)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training_collator

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the mean nats per target of the batch, and the nats (B) and target counts (B) of its sequences."""
        unwrapped: Any = self.model
        options = {"logits_to_keep": 1} if unwrapped.can_generate() else {}  # then the loss never holds all logits
        losses = []
        with torch.no_grad(), self.compute_loss_context_manager():
            for i in range(len(inputs["labels"])):
                sequence = {name: value[i : i + 1] for name, value in inputs.items()}
                losses.append(model(**sequence, num_items_in_batch=1, **options).loss.float())
        counts = (inputs["labels"] != IGNORE).sum(-1)
        nats = torch.stack(losses)
        return nats.sum() / counts.sum().clamp(min=1), nats, counts


class SequentialSeq2SeqTrainer(RecipeMixin, SequentialEvalMixin, Seq2SeqTrainer):
    """A Seq2SeqTrainer whose predictions are in the order of the data, without duplicates."""

    # Drops the duplicates that fill the last batch of several processes; Seq2SeqTrainer would set one that keeps them.
    gather_function = property(lambda self: self.accelerator.gather_for_metrics, lambda self, value: None)

    def prediction_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if inputs.get("labels") is None:  # None if targets are unknown
            inputs = {name: x for name, x in inputs.items() if name != "labels"}
        return super().prediction_step(model, inputs, *args, **kwargs)
