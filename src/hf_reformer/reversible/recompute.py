"""Recomputation of parts of the model under identical parameters, flags, autocast state and random numbers."""

import contextlib
import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..compat import (
    GLOBAL_HOOKS,
    has_global_hooks,
    in_functorch_transform,
    in_graph_capture,
    reparametrize_module,
    values_are_known,
    version_of,
)


def can_reverse() -> bool:
    """Whether the reversible Function may run: autograd is recording, without tracing or a functorch transform.

    It cannot run during CUDA graph capture, when the state of random generators cannot be read.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not in_functorch_transform()
        and not in_graph_capture()
    )


def layer_tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Return named parameters, and plain tensors in place of parameters (FSDP1 puts views there)."""
    tensors: dict[str, torch.Tensor] = dict(layer.named_parameters())
    for name, module in layer.named_modules():
        for key, value in module.__dict__.items():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                tensors[f"{name}.{key}" if name else key] = value
    return tensors


def hooked_module(root: nn.Module, itself: bool = True) -> str | None:
    """Describe what observes or changes calls of a module and its submodules, or of these only; None if nothing does.

    Hooks cannot be repeated in backward: they may be removed by then, or keep their arguments.
    """
    if has_global_hooks():
        return "hooks on all modules"
    for name, module in root.named_modules():
        own = vars(module)
        hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
        replaced = "forward" in own and "_hf_hook" not in own  # accelerate's hooks move tensors between devices
        if (itself or module is not root) and (hooks or own["_backward_pre_hooks"] or replaced):
            return f"a hook on `{name}`" if name else f"a hook on a {type(module).__name__}"
    return None


# The default generators and the modules' settings are shared by all threads that traverse one graph.
_REPLAY_LOCK = threading.RLock()
_ABSENT = object()


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
    """Return autocast with this state but no cache, so that a weight's gradients are summed in its precision."""
    return torch.autocast(device.type, dtype=state[1], enabled=state[0], cache_enabled=False)


class Settings:
    """A snapshot of the attributes in a dictionary for which `counts(name, value)`, to be restored temporarily."""

    def __init__(self, own: dict[str, Any], counts: Callable[[str, Any], bool]):
        self.own, self.counts = own, counts
        self.before = {name: _copy(value) for name, value in own.items() if counts(name, value)}

    def changed(self) -> dict[str, Any]:
        """Return the current values of attributes that have changed."""
        now, before = self.own, self.before
        changed = {name: now.get(name, _ABSENT) for name, x in before.items() if not _same(now.get(name, _ABSENT), x)}
        added = now.keys() - before.keys()
        return changed | {name: now[name] for name in added if self.counts(name, now[name])}

    def put(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if value is _ABSENT:
                self.own.pop(name, None)
            else:
                self.own[name] = value


_EMPTY: dict[type, Any] = {kind: kind() for kind in (dict, OrderedDict, list, set)}  # modules have many of these


def _copy(value: Any) -> Any:
    if not isinstance(value, (dict, list, set)):  # faster than their union
        return value
    return copy.copy(value) if value or type(value) not in _EMPTY else _EMPTY[type(value)]


def _same(now: Any, before: Any) -> bool:
    """Whether a value is the same object, or a copy with the same entries."""
    if now is before or type(now) is not type(before):
        return now is before
    if isinstance(now, dict):
        return now.keys() == before.keys() and all(_same(value, before[key]) for key, value in now.items())
    if isinstance(now, (list, tuple)):
        return len(now) == len(before) and all(map(_same, now, before))
    return isinstance(now, (int, float, str, set)) and now == before


def _settings_of(modules: tuple[nn.Module, ...]) -> list[Settings]:
    """Snapshot what modules use besides tensors and submodules: flags, hooks, the scale of an adapter, configs."""
    configs = {id(config): config for m in modules if hasattr(config := vars(m).get("config"), "__dict__")}
    return [
        *(Settings(vars(m), lambda name, value: name not in ("_parameters", "_modules") and not _is_tensor(value))
          for m in modules),
        *(Settings(vars(config), lambda name, value: not isinstance(value, dict)) for config in configs.values()),
        Settings(GLOBAL_HOOKS, lambda name, value: name.startswith("_global_")),
    ]  # fmt: skip


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


class ReplayState:
    """The state in which parts of a layer ran, to rerun them in it: autocast, settings and generator states if used.

    Our own random numbers come from keys. Third-party modules in a layer (adapters) may use the default generators;
    only then are their states stored.
    """

    def __init__(self, layer: nn.Module, device: torch.device):
        self.layer, self.device = layer, device
        self.autocast = autocast_state(device)
        self.modules = tuple(layer.modules())
        self.settings = _settings_of(self.modules)
        self.states: dict[Hashable, tuple[torch.Tensor, ...] | None] = {}

    @contextlib.contextmanager
    def record(self, part: Hashable = None) -> Iterator[None]:
        before = _generator_state(self.device)
        recording = torch.is_grad_enabled() or getattr(self.layer, "has_compiled_parts", False)
        with autocast_again(self.device, self.autocast), torch.set_grad_enabled(recording):
            yield
        after = _generator_state(self.device)
        drawn = values_are_known() and any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        self.states[part] = before if drawn else None

    @contextlib.contextmanager
    def restored(self, tensors: dict[str, torch.Tensor] | None) -> Iterator[None]:
        """Restore the modules' settings temporarily, and replace their tensors if `tensors` is given."""
        if tuple(self.layer.modules()) != self.modules:
            raise RuntimeError(
                f"Modules within {type(self.layer).__name__} were added, removed or replaced after the forward, so it "
                "cannot be run again for the gradients. Call backward first."
            )
        with contextlib.ExitStack() as stack:
            stack.enter_context(_REPLAY_LOCK)  # before comparing: another thread may have restored settings
            changed = [(settings, now) for settings in self.settings if (now := settings.changed())]
            if tensors is None and not changed:
                stack.close()  # nothing shared is changed, so threads may run in parallel
            if tensors is not None:
                stack.enter_context(reparametrize_module(self.layer, tensors))
            for settings, now in changed:
                stack.callback(settings.put, now)
                settings.put({name: _copy(settings.before.get(name, _ABSENT)) for name in now})
            yield

    @contextlib.contextmanager
    def replay(self, part: Hashable = None) -> Iterator[None]:
        """Return a context to rerun a part of the layer as it ran; to be used within `restored`."""
        state = self.states[part]
        with contextlib.ExitStack() as stack:
            if state is not None:
                stack.enter_context(_REPLAY_LOCK)
                stack.callback(_set_generator_state, _generator_state(self.device), self.device)
                _set_generator_state(state, self.device)
            stack.enter_context(torch.enable_grad())
            stack.enter_context(autocast_again(self.device, self.autocast))
            yield


def recomputed(module: nn.Module, function: Callable, x: torch.Tensor, *args: Any) -> torch.Tensor:
    """Call `function(x, *args)`, which uses `module`; backward recomputes it instead of storing intermediate results.

    Unlike torch's checkpoint, this uses the parameters and settings of the forward pass, which may have changed by the
    time of backward (functional_call, `eval()`, another adapter). Not for modules with hooks (`hooked_module`).
    """
    if not can_reverse():
        traced = torch.is_grad_enabled() and torch.compiler.is_compiling()
        return checkpoint(function, x, *args, use_reentrant=False) if traced else function(x, *args)
    conditions, tensors = ReplayState(module, x.device), layer_tensors(module)
    versions = [version_of(tensor) for tensor in tensors.values()]

    def run(*args):
        if versions != [version_of(tensor) for tensor in tensors.values()]:
            raise RuntimeError("A parameter was modified in place between forward and backward. Call backward first.")
        if not conditions.states:
            with conditions.record():
                return function(*args)
        with conditions.restored(tensors), conditions.replay():
            return function(*args)

    return checkpoint(run, x, *args, use_reentrant=False, preserve_rng_state=False)
