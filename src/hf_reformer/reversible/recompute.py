"""Running a part of the model a second time just as the first: same parameters, flags, autocast, random numbers."""

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
    """Whether the reversible Function may run: recording a graph, not traced, not in a functorch transform.

    Nor in a CUDA graph: what it keeps of random generators cannot be read while one records.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not in_functorch_transform()
        and not in_graph_capture()
    )


def layer_tensors(layer: nn.Module) -> dict[str, torch.Tensor]:
    """Named parameters, and plain tensors that stand where a parameter was (FSDP1 keeps views there)."""
    tensors: dict[str, torch.Tensor] = dict(layer.named_parameters())
    for name, module in layer.named_modules():
        for key, value in module.__dict__.items():
            if isinstance(value, torch.Tensor) and value.requires_grad:
                tensors[f"{name}.{key}" if name else key] = value
    return tensors


def hooked_module(root: nn.Module, itself: bool = True) -> str | None:
    """What watches or changes a call of a module, or of those within it alone, in words; None: nothing does.

    What it does cannot be repeated in backward: it may be gone by then, or keep what it is given.
    """
    if has_global_hooks():
        return "hooks on all modules"
    for name, module in root.named_modules():
        own = vars(module)
        hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
        replaced = "forward" in own and "_hf_hook" not in own  # accelerate's, which move tensors between devices
        if (itself or module is not root) and (hooks or own["_backward_pre_hooks"] or replaced):
            return f"a hook on `{name}`" if name else f"a hook on a {type(module).__name__}"
    return None


# The default generators and the modules' settings are shared by all threads that walk one graph.
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
    """That state, without its cache: so the gradients of every use of a weight are added in the weight's precision."""
    return torch.autocast(device.type, dtype=state[1], enabled=state[0], cache_enabled=False)


class Settings:
    """The attributes in a dictionary as they are now, to be put back for a while; those that `counts(name, value)`."""

    def __init__(self, own: dict[str, Any], counts: Callable[[str, Any], bool]):
        self.own, self.counts = own, counts
        self.before = {name: _copy(value) for name, value in own.items() if counts(name, value)}

    def changed(self) -> dict[str, Any]:
        """What stands now where something else stood."""
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


_EMPTY: dict[type, Any] = {kind: kind() for kind in (dict, OrderedDict, list, set)}  # modules hold many of these


def _copy(value: Any) -> Any:
    if not isinstance(value, (dict, list, set)):  # faster than their union
        return value
    return copy.copy(value) if value or type(value) not in _EMPTY else _EMPTY[type(value)]


def _same(now: Any, before: Any) -> bool:
    """Whether a value is the same, or a copy whose entries are."""
    if now is before or type(now) is not type(before):
        return now is before
    if isinstance(now, dict):
        return now.keys() == before.keys() and all(_same(value, before[key]) for key, value in now.items())
    if isinstance(now, (list, tuple)):
        return len(now) == len(before) and all(map(_same, now, before))
    return isinstance(now, (int, float, str, set)) and now == before


def _settings_of(modules: tuple[nn.Module, ...]) -> list[Settings]:
    """All that modules compute by but tensors and the modules within: flags, hooks, an adapter's scale, configs."""
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
    """What parts of a layer ran under, to run them again just so: autocast, settings, foreign randomness if any.

    Our own randomness comes from keys. Modules put into a layer by others (adapters) may draw from the default
    generators; then, and only then, their state is kept.
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
        """The modules as they were: with their settings, and with other tensors where some are given."""
        if tuple(self.layer.modules()) != self.modules:
            raise RuntimeError(
                f"Modules within {type(self.layer).__name__} were added, removed or replaced after the forward, so it "
                "cannot be run again for the gradients. Call backward first."
            )
        with contextlib.ExitStack() as stack:
            stack.enter_context(_REPLAY_LOCK)  # before looking: another thread may have put back settings of its own
            changed = [(settings, now) for settings in self.settings if (now := settings.changed())]
            if tensors is None and not changed:
                stack.close()  # nothing shared is touched, so threads may go on side by side
            if tensors is not None:
                stack.enter_context(reparametrize_module(self.layer, tensors))
            for settings, now in changed:
                stack.callback(settings.put, now)
                settings.put({name: _copy(settings.before.get(name, _ABSENT)) for name in now})
            yield

    @contextlib.contextmanager
    def replay(self, part: Hashable = None) -> Iterator[None]:
        """A part of the layer as it ran, within `restored`."""
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
    """`function(x, *args)`, which uses `module`; backward runs it again instead of keeping what is inside.

    Unlike torch's checkpoint, with the parameters and settings of this forward: when backward comes they may be others
    (functional_call, `eval()`, another adapter). Not for a module with hooks (`hooked_module`).
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
