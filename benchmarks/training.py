"""Whole training steps (forward, loss, backward and optimizer), compared with other models and with the floor."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from . import environment
from .attention_impls import hf_reformer_core, hf_reformer_local_core, run_function
from .cases import BOTH, FORWARD, STEP, Case, Entry, Group, Run, Settings
from .models import LAYERS, ROUNDS, VOCABULARY, FullModel, hf_reformer_config, hf_reformer_model, transformers_model

CHECKPOINTS_FROM = 65536  # number of tokens from which others recompute their layers
HALF = "bf16"
MIDDLE = 4096  # both directions are measured at this length
NARROW = {"hidden_size": 256, "num_attention_heads": 4, "feed_forward_size": 512}  # of experiments/million_tokens.py


def step_case(section: str, length: int, layers: int = LAYERS, causal: bool = True) -> Case:
    return Case(section=section, length=length, work=STEP, rounds=ROUNDS, causal=causal, layers=layers)


def step_groups(settings: Settings) -> list[Group]:
    """Return groups of steps of six layers, together with the components of the floor."""
    lengths = settings.choose((1024, 4096, 16384, 65536), (16384,))
    cases = [step_case("step", length) for length in lengths]
    found = []
    for case in [*cases, step_case("step", MIDDLE, causal=False)] if MIDDLE in lengths else cases:
        impls = ["hf-reformer", "attention part", "mm", "transformers", "full"]
        impls += [] if settings.short else ["hf-reformer torch"]
        found.append(Group("time", [Entry(case, impl) for impl in impls], LAYERS))
    for case in cases:
        impls = ["hf-reformer", "transformers", "full"]
        if settings.short or case.length >= CHECKPOINTS_FROM:
            impls.remove("full")  # takes as long as the time measurement above
        found.append(Group("memory", [Entry(case, impl) for impl in impls], LAYERS))
    return found


def depth_groups(settings: Settings) -> list[Group]:
    """Return groups of steps of models of growing depth."""
    found = []
    for length in settings.choose((4096,), (2048,)):
        for layers in (2, 8) if settings.short else (2, 4, 8, 16):
            case = step_case("depth", length, layers)
            entries = [Entry(case, impl) for impl in ("hf-reformer", "hf-reformer plain", "transformers", "full")]
            found += [Group(quantity, entries, layers) for quantity in ("time", "memory")]
    return found


def growth_groups(settings: Settings) -> list[Group]:
    """Return a group of hf_reformer steps on a long and a shorter sequence, in alternation."""
    cases = [step_case("step-growth", length) for length in settings.ends((16384, 131072), (4096, 16384))]
    return [Group("time", [Entry(case, "hf-reformer") for case in cases], LAYERS)]


def coverage_groups(settings: Settings) -> list[Group]:
    """Return groups of hf_reformer steps with and without the coverage loss, in alternation."""
    cases = [step_case("coverage", length) for length in settings.choose((4096, 16384), (4096,))]
    return [
        Group("time", [Entry(case, impl) for impl in ("hf-reformer", "hf-reformer coverage")], LAYERS)
        for case in cases
    ]


def autocast_groups(settings: Settings) -> list[Group]:
    """Return groups of steps in float32 and bfloat16 autocast, for which some processors have instructions."""
    cases = [step_case("autocast", length) for length in settings.choose((4096, 16384), (4096,))]
    impls = ["hf-reformer", f"hf-reformer {HALF}", "full", f"full {HALF}"]
    return [Group("time", [Entry(case, impl) for impl in impls], LAYERS) for case in cases]


def make(case: Case, impl: str) -> Run:
    """Make the run of a training step on random tokens, or of a component of the floor."""
    if impl.endswith(HALF):
        case, impl = replace(case, dtype="bfloat16"), impl.removesuffix(f" {HALF}")
    if impl in environment.RATES:
        return environment.make(case, impl)
    if impl == "attention part":
        pairs = case.layers // 2
        return Run(attention_part(case), note=f"one local and one lsh layer, forward twice and backward; {pairs} such")
    torch.manual_seed(0)
    makers: dict[str, Callable[..., nn.Module]] = {
        "hf-reformer": hf_reformer_model,
        "hf-reformer torch": partial(hf_reformer_model, attention_backend="torch"),
        "hf-reformer plain": partial(hf_reformer_model, reversible=False),
        "hf-reformer coverage": partial(hf_reformer_model, coverage_loss_weight=0.1),
        "hf-reformer 256 wide": partial(hf_reformer_model, residual_precision="float32", **NARROW),
        "hf-reformer 512 wide": partial(hf_reformer_model, residual_precision="float32"),
        "transformers": transformers_model,
        "full": partial(FullModel, checkpointing=case.length >= CHECKPOINTS_FROM),
    }
    model = makers[impl](case.length, case.layers, case.causal).train().to(case.device)
    note = "recomputes its layers" if getattr(model, "checkpointing", False) else ""
    flops = dense_flops(model, case.length) if impl == "hf-reformer" else 0.0
    tokens = torch.randint(2, VOCABULARY, (1, case.length), device=case.device)
    return Run(training_step(model, case, tokens, tokens), flops=flops, note=note)


def training_step(model: nn.Module, case: Case, tokens: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """Make a step: forward, loss, backward, AdamW. The optimizer state exists before: memory is that of the step only.

    Forward and loss run under autocast unless the case is float32.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()

    def call() -> None:
        with torch.autocast(case.device, case.torch_dtype, enabled=case.dtype != "float32"):
            loss = model(input_ids=tokens, labels=labels)
        loss = loss if isinstance(loss, torch.Tensor) else loss.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def dense_flops(model: nn.Module, length: int) -> float:
    """Count operations of a reversible step's dense products: 2 forward, 2 recomputed (except head), 4 backward."""
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            total += (6 if "lm_head" in name else 8) * module.weight.numel() * length
    return total


def attention_part(case: Case) -> Callable[[], None]:
    """Make the minimum attention work of a reversible step of one local and one lsh layer with the default config."""
    config: Any = hf_reformer_config(case.length, 2, case.causal)
    explored = config.lsh_exploration_orders
    lsh = hf_reformer_core(
        "window", case.rounds, case.causal, window=config.lsh_window, position=True, exploration=explored
    )
    cores = [lsh, hf_reformer_local_core(case, config.local_window)]
    runs = [run_function(core, case, work) for core in cores for work in (FORWARD, BOTH)]

    def call() -> None:
        for run in runs:
            run()

    return call
