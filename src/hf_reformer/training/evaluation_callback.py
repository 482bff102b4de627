"""Base class of callbacks that log a few numbers of every layer after each evaluation."""

from abc import ABC, abstractmethod
from itertools import islice
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

INPUTS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_type_ids")
SIGNALS = ("input_values", "input_features", "pixel_values", "past_values", "past_observed_mask", "past_time_features",
           "future_time_features")  # fmt: skip


class EvaluationCallback(TrainerCallback, ABC):
    """Runs the first batches of an evaluation again, in evaluation mode, and logs numbers of the model's layers.

    Each number is logged as a mean over layers, under its name in `names`, and for every layer, with the suffix
    `_layer_0`, … With several evaluation sets, the names include the set's, as the Trainer's own do: `eval_dev_…`.
    """

    names: tuple[str, ...]

    def __init__(self, trainer: Trainer, batches: int = 1):
        if batches < 1:
            raise ValueError(f"`batches={batches}` leaves nothing to look at. Give at least 1.")
        self.trainer, self.batches = trainer, batches

    @abstractmethod
    def layer_numbers(self, model: torch.nn.Module, batch: dict[str, Any]) -> dict[int, torch.Tensor]:
        """Return the numbers that `names` lists, (len(names)), by layer number, for a batch on the model's device."""

    def judge(self, layers: dict[int, list[float]], step: int) -> None:
        """Hook for subclasses that act on the logged numbers of each layer."""

    def on_evaluate(
        self, args: Any, state: Any, control: Any, model: Any = None, eval_dataloader: Any = None, metrics: Any = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        if model is None or eval_dataloader is None:
            return
        training = model.training
        model.eval()
        try:
            with torch.random.fork_rng(devices=[]):  # a loader draws a seed, which must not affect training
                batches = list(islice(eval_dataloader, self.batches))
            batches = [batch for batch in batches if 0 not in getattr(batch.get("input_ids"), "shape", ())]
            found = [self.layer_numbers(model, _on_device(batch, args.device)) for batch in batches]
        finally:
            model.train(training)
        layers = {
            layer: torch.stack([numbers[layer] for numbers in found if layer in numbers]).mean(0).tolist()
            for layer in sorted(set().union(*found))
        }
        if not layers:
            return
        logs, losses = {}, (name for name in metrics or () if name.startswith("eval_") and name.endswith("_loss"))
        prefix = next(losses, "eval_loss").removesuffix("loss")
        for i, name in enumerate(self.names):
            name = prefix + name.removeprefix("eval_")
            logs[name] = sum(numbers[i] for numbers in layers.values()) / len(layers)
            logs |= {f"{name}_layer_{layer}": numbers[i] for layer, numbers in layers.items()}
        self.trainer.log(logs)
        self.judge(layers, state.global_step)


def _on_device(batch: Any, device: torch.device) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
