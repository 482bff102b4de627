"""Reversible residual layers (Gomez et al. 2017; paper, section 3) whose reconstruction is exact, bit for bit.

y1 = x1 + f(x2), y2 = x2 + g(y1). The streams live on a fixed grid: the embeddings and every branch output are rounded
to multiples of 2^-k before they are added, so that additions are exact and subtractions undo them. Rounding has the
gradient of the identity. Backward rebuilds each layer's inputs from its outputs, so memory does not grow with depth.

One autograd Function per layer takes the two streams, the layer's parameters and whatever else carries gradients as
inputs and *returns* their gradients. So wrappers that watch parameters (DDP, FSDP2, adapters) see an ordinary graph.
"""

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils.checkpoint import checkpoint


class Grid(NamedTuple):
    """The number format of the residual streams: a dtype, and the exponent of its grid of multiples of 2^-bits.

    Sums are exact while |stream| <= `limit`. `bits=None` does not round (evaluation).
    """

    dtype: torch.dtype
    bits: int | None

    @property
    def limit(self) -> float:
        mantissa = {torch.float64: 53, torch.float32: 24}[self.dtype]
        return float("inf") if self.bits is None else 2.0 ** (mantissa - self.bits)


def choose_grid(precision: str, weight_dtype: torch.dtype, rounded: bool) -> Grid:
    """The streams' grid for `residual_precision` ("float64" or "float32") and the dtype of the model's weights."""
    if weight_dtype == torch.float64:  # tests: finer, so that finite differences see through it
        return Grid(torch.float64, 40 if rounded else None)
    if precision == "float64":
        return Grid(torch.float64, 32 if rounded else None)
    return Grid(torch.float32, 16 if rounded else None)


class _Round(torch.autograd.Function):
    """Cast to the streams' dtype and round to the grid; the gradient passes unchanged."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, grid):
        scale = 2.0**grid.bits
        scaled = x.to(grid.dtype) * scale
        return scaled.round_().mul_(1 / scale).add_(0.0)  # + 0.0: -0 becomes +0, so equal numbers have equal bits

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype), None


def to_stream(x: torch.Tensor, grid: Grid) -> torch.Tensor:
    """x in the streams' dtype, on the grid."""
    return x.to(grid.dtype) if grid.bits is None else _Round.apply(x, grid)


def residual_step(layer: Any, x1: torch.Tensor, x2: torch.Tensor, call: Any, grid: Grid, extra=()):
    """The layer's equations, for every path: (y1, y2)."""
    y1 = x1 + to_stream(layer.f(x2, call, *extra), grid)
    y2 = x2 + to_stream(layer.g(y1, call), grid)
    return y1.view_as(y1), y2  # a view, so that hooks on y1 see the same gradient on every path


class Chain:
    """Hands reconstructed streams from layer to layer during backward. One per forward call of a stack."""

    def __init__(self, grid: Grid, depth: int):
        self.grid, self.depth = grid, depth
        self._pending: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._link: tuple[int, tuple[torch.Tensor, torch.Tensor], tuple[int, int]] | None = None

    def enter(self, index: int, x1: torch.Tensor, x2: torch.Tensor) -> None:
        """Check that layer `index` gets what layer `index - 1` gave; if something replaced it, keep the original."""
        link, self._link = self._link, None
        if link is None or link[0] != index - 1:
            return  # the first layer, or a recomputation by somebody's checkpoint wrapper
        previous, given, versions = link
        if any(x._version != version for x, version in zip(given, versions, strict=True)):
            raise RuntimeError(
                f"The residual stream after layer {previous} was modified in place, so it cannot be reconstructed. "
                "Use an out-of-place operation, or `config.reversible=False`."
            )
        if not all(_same_storage(a, b) for a, b in zip(given, (x1, x2), strict=True)):
            self._kept[previous] = given

    def leave(self, index: int, y1: torch.Tensor, y2: torch.Tensor) -> None:
        last = index == self.depth - 1
        self._link = None if last else (index, (y1.detach(), y2.detach()), (y1._version, y2._version))

    def put(self, index: int, streams: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._pending[torch._C._current_graph_task_id(), index] = streams

    def take(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        found = self._pending.pop((torch._C._current_graph_task_id(), index), None)
        if index in self._kept:
            return self._kept[index]
        if found is None:
            raise RuntimeError(
                f"A gradient reached reversible layer {index} without passing through layer {index + 1}, so "
                "its outputs are unknown. Take the plain path: `output_hidden_states=True` or `reversible=False`."
            )
        return found


def _same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())


def _checksum(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32).sum(dtype=torch.int64)


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


class _Conditions:
    """What a branch ran under, to run it again just so: autocast, training flags, and foreign randomness if any.

    Our own randomness comes from keys. Modules put into a layer by others (adapters) may draw from the default
    generators; then, and only then, their state is kept.
    """

    def __init__(self, layer: nn.Module, device: torch.device):
        self.layer, self.device = layer, device
        self.autocast = (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type))
        self.training = tuple(module.training for module in layer.modules())
        self.states: list[tuple[torch.Tensor, ...] | None] = []

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        before = _generator_state(self.device)
        enabled, dtype = self.autocast
        with torch.autocast(self.device.type, dtype=dtype, enabled=enabled, cache_enabled=False):
            yield
        after = _generator_state(self.device)
        drawn = any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        self.states.append(before if drawn else None)

    @contextlib.contextmanager
    def replay(self, branch: int, tensors: dict[str, torch.Tensor] | None) -> Iterator[None]:
        state, (enabled, dtype) = self.states[branch], self.autocast
        modules = list(self.layer.modules())
        with contextlib.ExitStack() as stack:
            stack.enter_context(_REPLAY_LOCK)  # before looking: another thread may have flipped flags for its replay
            flipped = [(m, m.training) for m, was in zip(modules, self.training, strict=True) if m.training != was]
            if state is None and not flipped and tensors is None:
                stack.close()  # nothing shared is touched, so threads may go on side by side
            if tensors is not None:
                stack.enter_context(_reparametrize_module(self.layer, tensors))
            if state is not None:
                stack.callback(_set_generator_state, _generator_state(self.device), self.device)
                _set_generator_state(state, self.device)
            for module, now in flipped:
                stack.callback(setattr, module, "training", now)
                module.training = not now
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(self.device.type, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield


def recomputed(module: nn.Module, function: Callable, x: torch.Tensor, *args: Any) -> torch.Tensor:
    """`function(x, *args)`, which uses `module`; backward runs it again instead of keeping what is inside.

    Unlike torch's checkpoint, with the parameters and training flags of this forward: when backward comes they may be
    others (functional_call, `eval()`).
    """
    if not can_reverse():
        traced = torch.is_grad_enabled() and torch.compiler.is_compiling()
        return checkpoint(function, x, *args, use_reentrant=False) if traced else function(x, *args)
    conditions, tensors = _Conditions(module, x.device), layer_tensors(module)

    def run(*args):
        with conditions.replay(0, tensors) if conditions.states else conditions.record():
            return function(*args)

    return checkpoint(run, x, *args, use_reentrant=False, preserve_rng_state=False)


class _ReversibleLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, chain, index, call, names, extras, x1, x2, *tensors):
        conditions = _Conditions(layer, x1.device)
        chain.enter(index, x1, x2)
        bottom = index == 0 or not any(ctx.needs_input_grad[6:8])  # the last layer that backward comes to
        ctx.checksums = (_checksum(x1), _checksum(x2)) if bottom else None
        extra = tensors[:extras]
        with conditions.record():
            y1 = x1 + to_stream(layer.f(x2, call, *extra), chain.grid)
        with conditions.record():
            y2 = x2 + to_stream(layer.g(y1, call), chain.grid)
        chain.leave(index, y1, y2)
        ctx.layer, ctx.chain, ctx.index, ctx.call = layer, chain, index, call
        ctx.conditions, ctx.names, ctx.extras = conditions, names, extras
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *((y1, y2) if index == chain.depth - 1 else ()))
        return y1, y2

    @staticmethod
    @once_differentiable
    def backward(ctx, d1, d2):
        saved, chain, index = ctx.saved_tensors, ctx.chain, ctx.index
        if index == chain.depth - 1:
            *tensors, y1, y2 = saved
        else:
            tensors, (y1, y2) = list(saved), chain.take(index)
        need = ctx.needs_input_grad[8:]
        extra = [_leaf(x, wanted) for x, wanted in zip(tensors[: ctx.extras], need, strict=False)]
        parameters, swap = _parameters(ctx, tensors[ctx.extras :], need[ctx.extras :])
        wanted = [p for p, n in zip(parameters, need[ctx.extras :], strict=True) if n]
        wanted_extra = [x for x, n in zip(extra, need, strict=False) if n]

        def rerun(which: int, branch: Callable, stream: torch.Tensor) -> tuple[torch.Tensor, Callable]:
            """Run f or g again: its output, and what gives the gradients of its stream and of `inputs` then."""
            with ctx.conditions.replay(which, swap):
                stream = stream.detach().requires_grad_()
                out = to_stream(branch(stream), chain.grid)
            edge = get_gradient_edge(out) if out.requires_grad else None  # without the output, which can go

            def differentiate(grad: torch.Tensor | None, inputs: list) -> list[torch.Tensor | None]:
                if grad is None or edge is None:
                    return [None] * (1 + len(inputs))
                return list(torch.autograd.grad(edge, [stream, *inputs], grad, allow_unused=True))

            return out.detach(), differentiate

        # Every tensor as large as a stream goes as soon as it can: this is where training needs most memory.
        out, differentiate = rerun(1, lambda s: ctx.layer.g(s, ctx.call), y1)
        x2 = y2 - out
        del y2, out
        step, *grads_g = differentiate(d2, wanted)
        d1 = _sum(d1, step)
        del step, differentiate
        out, differentiate = rerun(0, lambda s: ctx.layer.f(s, ctx.call, *extra), x2)
        x1 = y1 - out
        del y1, out
        step, *grads_f = differentiate(d1, wanted_extra + wanted)
        d2 = _sum(d2, step)
        del step, differentiate
        if ctx.checksums is not None:
            _warn_if_inexact(ctx.checksums, (x1, x2), chain.grid)
        elif any(node is not None and torch._C._will_engine_execute_node(node) for node, _ in ctx.next_functions[:2]):
            chain.put(index - 1, (x1, x2))
        count = len(wanted_extra)
        grads = iter(grads_f[:count] + [_sum(a, b) for a, b in zip(grads_g, grads_f[count:], strict=True)])
        return (None,) * 6 + (d1, d2) + tuple(next(grads) if n else None for n in need)


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b


def _leaf(x: Any, wanted: bool) -> Any:
    return x.detach().requires_grad_(wanted) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _parameters(ctx, saved: list[torch.Tensor], need) -> tuple[list[torch.Tensor], dict[str, torch.Tensor] | None]:
    """The tensors to differentiate by, and what to swap into the layer where the saved ones are not its own.

    They differ under functional_call, an outer checkpoint, or saved-tensor hooks.
    """
    now = layer_tensors(ctx.layer)
    if all(now.get(name) is tensor for name, tensor in zip(ctx.names, saved, strict=True)):
        return saved, None
    saved = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(saved, need, strict=True)]
    return saved, dict(zip(ctx.names, saved, strict=True))


def _warn_if_inexact(before: tuple[torch.Tensor, ...], streams: tuple[torch.Tensor, ...], grid: Grid) -> None:
    if bool((_checksum(streams[0]) == before[0]) & (_checksum(streams[1]) == before[1])):
        return
    warnings.warn(
        "A reversible stack did not reconstruct its input exactly: the residual streams left the range "
        f"|x| <= {grid.limit:g} of their grid, or a layer does not compute the same thing twice. Gradients are "
        'inexact, in half precision wrong. Use `residual_precision="float64"`, a smaller `initializer_range` or '
        "learning rate, or `reversible=False`.",
        RuntimeWarning,
        stacklevel=2,
    )


def wrapped_inside(layer: nn.Module) -> bool:
    """Whether FSDP2 wraps modules within `layer`; their parameters change identity, so take the plain path."""
    return any(
        m is not layer and type(m).__name__.startswith("FSDP") and hasattr(m, "unshard") for m in layer.modules()
    )


def can_reverse() -> bool:
    """Whether the reversible Function may run: recording a graph, not traced, not in a functorch transform."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch._C._functorch.maybe_current_level() is None
    )


def reversible_step(
    layer: nn.Module, x1: torch.Tensor, x2: torch.Tensor, call: Any, chain: Chain, index: int, extra=()
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer of a reversible stack: the values of `residual_step`, with nothing kept but the last layer's output.

    Args:
        layer: has `f(x2, call, *extra)` and `g(y1, call)`.
        x1, x2: (B, T, D) streams of `chain.grid`'s dtype.
        call: what the layer needs beside tensors with gradients; handed to f and g as it is.
        extra: further tensors with gradients for f (encoder states).
    """
    tensors = layer_tensors(layer)
    return _ReversibleLayer.apply(
        layer, chain, index, call, tuple(tensors), len(extra), x1, x2, *extra, *tensors.values()
    )
