"""Measure the time of a training step or a forward pass on this machine."""

import statistics
import time
from typing import Any

import torch

from ..configuration_reformer import ReformerConfig
from .memory import MODELS, default_class, example_inputs


def measure_seconds(
    config: ReformerConfig,
    batch_size: int,
    length: int,
    training: bool = True,
    *,
    model_class: Any = None,
    repeats: int = 3,
    device: str | torch.device = "cpu",
) -> float:
    """Measure the median time of a step of a newly initialized model in seconds, after a warm-up step.

    Args:
        training: time forward, backward and an AdamW update; otherwise a forward pass without gradients.
        model_class: as in `estimate_memory`.
    """
    model_class = default_class(config) if model_class is None else model_class
    with torch.random.fork_rng():
        model = model_class(config).to(device).train(training)
        inputs = {name: x.to(device) for name, x in example_inputs(model, batch_size, length, training).items()}
        optimizer = torch.optim.AdamW(model.parameters()) if training else None
        times = [_seconds(model, inputs, optimizer) for _ in range(repeats + 1)]
    return statistics.median(times[1:])


def _seconds(model: Any, inputs: dict[str, Any], optimizer: Any) -> float:
    begin = time.perf_counter()
    with torch.set_grad_enabled(optimizer is not None):
        out = model(**inputs)
    if optimizer is not None:
        optimizer.zero_grad()
        (out.last_hidden_state.sum() if type(model) is MODELS["ReformerModel"] else out.loss).backward()
        optimizer.step()
    if out[0].device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - begin
