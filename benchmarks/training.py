"""Whole training steps: forward, loss, backward and optimiser, against whole models and against the floor."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_reformer.attention_ops import order_makers, ordered_attention
from hf_reformer.hashing import Orders, window_orders

from . import machine
from .cases import (
    BOTH,
    FORWARD,
    Case,
    Entry,
    Group,
    Run,
    Settings,
    our_core,
    position_group,
    run_function,
)
from .models import ROUNDS, VOCABULARY, FullModel, built_in_model, our_config, our_model

STEP = "training step"
LAYERS = 6
CHECKPOINTS_FROM = 65536  # tokens from which the exact Transformer recomputes its layers
RIVALS = ["ours", "ours torch", "built-in", "full"]


def step_groups(settings: Settings) -> list[Group]:
    """Steps of six layers, in one group with what makes up the floor."""
    found = []
    for length in settings.choose((1024, 4096, 16384, 65536), (16384,)):
        case = Case("step", length, STEP, ROUNDS, layers=LAYERS)
        entries = [Entry(case, rival) for rival in ("ours", "attention part", "mm", *RIVALS[1:])]
        found.append(Group("time", entries, allowed=LAYERS))
        memory = RIVALS[:1] + RIVALS[2:]
        if settings.short or length >= CHECKPOINTS_FROM:
            memory.remove("full")  # as long to run as for the time above
        found.append(Group("memory", [Entry(case, rival) for rival in memory], allowed=LAYERS))
    return found


def depth_groups(settings: Settings) -> list[Group]:
    """Steps of models of growing depth."""
    length = settings.choose((4096,), (1024,))[0]
    found = []
    for layers in (2, 6) if settings.short else (2, 4, 8, 16):
        case = Case("depth", length, STEP, ROUNDS, layers=layers)
        entries = [Entry(case, rival) for rival in ("ours", "ours plain", "built-in", "full")]
        found += [Group(quantity, entries, allowed=layers) for quantity in ("time", "memory")]
    return found


def growth_groups(settings: Settings) -> list[Group]:
    """Our step on a long line beside a shorter one, in turn."""
    lengths = settings.choose((16384, 131072), (4096, 16384))
    cases = [Case("step growth", length, STEP, ROUNDS, layers=LAYERS) for length in {lengths[0], lengths[-1]}]
    return [Group("time", [Entry(case, "ours") for case in sorted(cases, key=lambda c: c.length)], allowed=LAYERS)]


def make(case: Case, rival: str) -> Run:
    """One training step on random tokens, or a part of the floor."""
    if rival == "mm":
        return machine.make(case, rival)
    if rival == "attention part":
        return Run(
            attention_part(case), note=f"one local and one lsh layer, forward twice and backward, x{case.layers // 2}"
        )
    torch.manual_seed(0)
    model = make_model(case, rival).train()
    note = "recomputes its layers" if getattr(model, "checkpointing", False) else ""
    return Run(training_step(model, case.length), flops=dense_flops(model, case.length), note=note)


def make_model(case: Case, rival: str) -> nn.Module:
    makers: dict[str, Callable[..., nn.Module]] = {
        "ours": our_model,
        "ours torch": partial(our_model, attention_backend="torch"),
        "ours plain": partial(our_model, reversible=False),
        "built-in": built_in_model,
        "full": partial(FullModel, checkpointing=case.length >= CHECKPOINTS_FROM),
    }
    return makers[rival](case.length, case.layers, case.causal)


def training_step(model: nn.Module, length: int) -> Callable[[], None]:
    """Forward, loss, backward, AdamW. The optimiser's state exists beforehand: memory counts the step alone."""
    tokens = torch.randint(2, VOCABULARY, (1, length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()

    def call() -> None:
        loss = model(input_ids=tokens, labels=tokens)
        loss = loss if isinstance(loss, torch.Tensor) else loss.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def dense_flops(model: nn.Module, length: int) -> float:
    """Operations of a reversible step's dense products: 2 forward, 2 recomputed (but for the head), 4 backward."""
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            total += (6 if "lm_head" in name else 8) * module.weight.numel() * length
    return total


def attention_part(case: Case) -> Callable[[], None]:
    """What attention a reversible step of one local and one lsh layer cannot do without, as in the default config."""
    config: Any = our_config(case.length, 2, case.causal)
    explored = config.lsh_exploration_orders
    lsh = our_core("window", case.rounds, case.causal, window=config.lsh_window, position=True, exploration=explored)
    cores = [lsh, our_local(config.local_window, case.causal)]
    runs = [run_function(core, case.length, work) for core in cores for work in (FORWARD, BOTH)]

    def call() -> None:
        for run in runs:
            run()

    return call


def our_local(window: int, causal: bool) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Our local core, (B, H, T, D); the key is a tensor of its own, here the scaled query."""

    def run(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, _, length, size = q.shape
        group = position_group(batch, 1, length, window)
        orders: Orders = window_orders([group], causal, None, sort=order_makers("auto", q)[1])
        return ordered_attention(q, q * size**-0.5, v, orders, causal=causal)

    return run


SECTIONS: dict[str, Callable[[Settings], list[Group]]] = {
    "step": step_groups,
    "depth": depth_groups,
    "step growth": growth_groups,
}
