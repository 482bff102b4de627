"""Running a part of the model a second time just as the first: same parameters, flags, autocast, random numbers."""

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..compat import in_functorch_transform, reparametrize_module, version_of


def can_reverse() -> bool:
    """Whether the reversible Function may run: recording a graph, not traced, not in a functorch transform."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not in_functorch_transform()
    )


def layer_tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Named parameters, and plain tensors that stand where a parameter was (FSDP1 keeps views there)."""
    tensors: dict[str, torch.Tensor] = dict(layer.named_parameters())
    for name, module in layer.named_modules():
        for key, value in module.__dict__.items():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                tensors[f"{name}.{key}" if name else key] = value
    return tensors


# The default generators and the modules' training flags are shared by all threads that walk one graph.
_REPLAY_LOCK = threading.RLock()


def _generator_state(device: torch.device) -> tuple[torch.Tensor, ...]:
    states = (torch.get_rng_state(),)
    return (*states, torch.cuda.get_rng_state(device)) if device.type == "cuda" else states


def _set_generator_state(states: tuple[torch.Tensor, ...], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def autocast_state(device: torch.device) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def autocast_again(device: torch.device, state: tuple[bool, torch.dtype]) -> torch.autocast:
    """That state, without its cache: so the gradients of every use of a weight are added in the weight's precision."""
    return torch.autocast(device.type, dtype=state[1], enabled=state[0], cache_enabled=False)


class ReplayState:
    """What parts of a layer ran under, to run them again just so: autocast, training flags, foreign randomness if any.

    Our own randomness comes from keys. Modules put into a layer by others (adapters) may draw from the default
    generators; then, and only then, their state is kept.
    """

    def __init__(self, layer: nn.Module, device: torch.device):
        self.layer, self.device = layer, device
        self.autocast = autocast_state(device)
        self.modules = tuple(layer.modules())
        self.training = tuple(module.training for module in self.modules)
        self.states: dict[Hashable, tuple[torch.Tensor, ...] | None] = {}

    @contextlib.contextmanager
    def record(self, part: Hashable = None) -> Iterator[None]:
        before = _generator_state(self.device)
        recording = torch.is_grad_enabled() or getattr(self.layer, "has_compiled_parts", False)
        with autocast_again(self.device, self.autocast), torch.set_grad_enabled(recording):
            yield
        after = _generator_state(self.device)
        drawn = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        self.states[part] = before if drawn else None

    @contextlib.contextmanager
    def replay(self, tensors: dict[str, torch.Tensor] | None, part: Hashable = None) -> Iterator[None]:
        if tuple(self.layer.modules()) != self.modules:
            raise RuntimeError(
                f"Modules within {type(self.layer).__name__} were added, removed or replaced after the forward, so it "
                "cannot be run again for the gradients. Call backward first."
            )
        state = self.states[part]
        with contextlib.ExitStack() as stack:
            stack.enter_context(_REPLAY_LOCK)  # before looking: another thread may have flipped flags for its replay
            flipped = [
                (m, m.training) for m, was in zip(self.modules, self.training, strict=True) if m.training != was
            ]
            if state is None and not flipped and tensors is None:
                stack.close()  # nothing shared is touched, so threads may go on side by side
            if tensors is not None:
                stack.enter_context(reparametrize_module(self.layer, tensors))
            if state is not None:
                stack.callback(_set_generator_state, _generator_state(self.device), self.device)
                _set_generator_state(state, self.device)
            for module, now in flipped:
                stack.callback(setattr, module, "training", now)
                module.training = not now
            stack.enter_context(torch.enable_grad())
            stack.enter_context(autocast_again(self.device, self.autocast))
            yield


def recomputed(module: nn.Module, function: Callable, x: torch.Tensor, *args: Any) -> torch.Tensor:
    """`function(x, *args)`, which uses `module`; backward runs it again instead of keeping what is inside.

    Unlike torch's checkpoint, with the parameters and training flags of this forward: when backward comes they may be
    others (functional_call, `eval()`).
    """
    if not can_reverse():
        traced = torch.is_grad_enabled() and torch.compiler.is_compiling()
        return checkpoint(function, x, *args, use_reentrant=False) if traced else function(x, *args)
    conditions, tensors = ReplayState(module, x.device), layer_tensors(module)
    versions = [version_of(tensor) for tensor in tensors.values()]

    def run(*args):
        if versions != [version_of(tensor) for tensor in tensors.values()]:
            raise RuntimeError("A parameter was modified in place between forward and backward. Call backward first.")
        with conditions.replay(tensors) if conditions.states else conditions.record():
            return function(*args)

    return checkpoint(run, x, *args, use_reentrant=False, preserve_rng_state=False)
