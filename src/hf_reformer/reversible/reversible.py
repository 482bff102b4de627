"""Reversible residual layers (Gomez et al. 2017; paper, section 3) whose reconstruction is exact, bit for bit.

y1 = x1 + f(x2), y2 = x2 + g(y1). The streams live on a fixed grid: the embeddings and every branch output are rounded
to multiples of 2^-k before they are added, so that additions are exact and subtractions undo them. Rounding has the
gradient of the identity. Backward rebuilds each layer's inputs from its outputs, so memory does not grow with depth.

One autograd Function per layer takes the two streams, the layer's parameters and whatever else carries gradients as
inputs and *returns* their gradients. So wrappers that watch parameters (DDP, FSDP2, adapters) see an ordinary graph.
"""

import warnings
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils import parametrize

from .chunking import ChunkedBuffer, Tensors, chunk_length_for, map_tokens, token_chunks
from .grid import Grid, to_stream
from .recompute import ReplayState, autocast_again, autocast_state, layer_tensors, recomputed


class LayerStages:
    """The parts of a layer as the paths run them. All but `attend` treat every token alike, so they work on slices."""

    def __init__(self, layer: Any, call: Any, grid: Grid, extra, during: Callable[[Hashable], AbstractContextManager]):
        self.layer, self.call, self.grid, self.extra = layer, call, grid, extra
        self.during = during

    def project(self, first: int, x2: torch.Tensor) -> Tensors:
        with self.during(("project", first)):
            return self.layer.project(x2, self.call, first)

    def attend(self, projected: Tensors, known: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
        """What attention gives; then what the layer tells of it besides, if it does, which may be `known` by now."""
        with self.during("attend"):
            told = {"known": [x.detach() for x in known]} if known else {}
            found = self.layer.attend(projected, self.call, *self.extra, **told)
            return [*found] if isinstance(found, tuple) else [found]

    def merge(self, first: int, mixed: torch.Tensor) -> torch.Tensor:
        """f(x2) = merge(attend(project(x2))), on the grid."""
        with self.during(("merge", first)):
            return to_stream(self.layer.merge(mixed, self.call, first), self.grid)

    def g(self, first: int, y1: torch.Tensor) -> torch.Tensor:
        with self.during(("g", first)):
            return to_stream(self.layer.g(y1, self.call, first), self.grid)


def _as_now(device: torch.device) -> Callable[[Hashable], AbstractContextManager]:
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled(device.type):
        return lambda part: nullcontext()
    return lambda part: autocast_again(device, autocast_state(device))


def residual_step(
    layer: Any, x1: torch.Tensor, x2: torch.Tensor, call: Any, grid: Grid, extra=(), during=None
) -> tuple[torch.Tensor, ...]:
    """The layer's equations, for every path: (y1, y2), or (y1, y2, *told).

    Args:
        layer: has `project(x2, call, first)`, `attend(projected, call, *extra)`, `merge(mixed, call, first)` and
            `g(y1, call, first)`, where `first` is the position of a slice's first token, and `chunk_size`: tokens of
            a slice, 0 for an automatic number. Where it is given, the plain path recomputes g in backward. `attend`
            may return a tuple: its result, and small tensors that the layer tells. Run again, it is given these as
            `known`, a list, and only their gradients count.
        x1, x2: (B, T, D) streams of the grid's dtype.
        during: context of a part of the layer, by its name.
    """
    stages = LayerStages(layer, call, grid, extra, during or _as_now(x2.device))
    size = chunk_length_for(x2, layer.chunk_size)
    again = 0 < layer.chunk_size < x2.shape[1]
    mixed, *told = stages.attend(map_tokens(stages.project, size, x2))
    (y1,) = map_tokens(lambda first, x, mixed: [x + stages.merge(first, mixed)], size, x1, mixed)
    del mixed

    def feed_forward(first: int, x: torch.Tensor, y: torch.Tensor) -> Tensors:
        g = partial(stages.g, first)
        return [x + (recomputed(layer, g, y) if again else g(y))]

    (y2,) = map_tokens(feed_forward, size, x2, y1)
    return y1, y2, *told


class StreamHandoff:
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

    def take(self, index: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Outputs of layer `index`, and whether they may be overwritten."""
        found = self._pending.pop((torch._C._current_graph_task_id(), index), None)
        if index in self._kept:
            return *self._kept[index], False
        if found is None:
            raise RuntimeError(
                f"A gradient reached reversible layer {index} without passing through layer {index + 1}, so "
                "its outputs are unknown. Take the plain path: `output_hidden_states=True` or `reversible=False`."
            )
        return *found, True


def _same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())


def checksum(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32).sum(dtype=torch.int64)


class _ReversibleLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, chain, index, call, names, extras, x1, x2, *tensors):
        conditions = ReplayState(layer, x1.device)
        chain.enter(index, x1, x2)
        bottom = index == 0 or not any(ctx.needs_input_grad[6:8])  # the last layer that backward comes to
        ctx.checksums = (checksum(x1), checksum(x2)) if bottom else None
        ctx.size = chunk_length_for(x2, layer.chunk_size)
        y1, y2, *told = residual_step(layer, x1, x2, call, chain.grid, tensors[:extras], conditions.record)
        told = [x.detach() for x in told]  # where the layer is recorded for one artefact
        chain.leave(index, y1, y2)
        ctx.layer, ctx.chain, ctx.index, ctx.call = layer, chain, index, call
        ctx.conditions, ctx.names, ctx.extras = conditions, names, extras
        ctx.set_materialize_grads(False)
        ctx.told = len(told)
        ctx.save_for_backward(*told, *tensors, *((y1, y2) if index == chain.depth - 1 else ()))
        return y1, y2, *told

    @staticmethod
    @once_differentiable
    def backward(ctx, d1, d2, *grad_aux):
        saved, chain, index = ctx.saved_tensors, ctx.chain, ctx.index
        told, saved = saved[: ctx.told], saved[ctx.told :]
        if index == chain.depth - 1:
            *tensors, y1, y2 = saved
            ours = False
        else:
            tensors, (y1, y2, ours) = list(saved), chain.take(index)
        need = ctx.needs_input_grad[8:]
        extra = [_leaf(x, wanted) for x, wanted in zip(tensors[: ctx.extras], need, strict=False)]
        parameters, swap = _parameters(ctx, tensors[ctx.extras :], need[ctx.extras :])
        stages = LayerStages(ctx.layer, ctx.call, chain.grid, extra, partial(ctx.conditions.replay, swap))
        totals = GradientAccumulator([x for x, n in zip([*extra, *parameters], need, strict=True) if n])
        size = ctx.size
        # Every tensor as large as a stream goes as soon as it can: this is where training needs most memory.
        x2, d1 = invert_branch(stages.g, size, y2, y1, d2, d1, totals, ChunkedBuffer(y2.shape[1], *[y2] * ours))
        del y2
        x1, d2 = invert_attention_branch(
            stages, size, y1, x2, d1, d2, totals, ChunkedBuffer(y1.shape[1], *[y1] * ours), told, grad_aux
        )
        del y1
        if ctx.checksums is not None:
            warn_if_inexact(ctx.checksums, (x1, x2), chain.grid)
        elif any(node is not None and torch._C._will_engine_execute_node(node) for node, _ in ctx.next_functions[:2]):
            chain.put(index - 1, (x1, x2))
        grads = iter(totals.result())
        return (None,) * 6 + (d1, d2) + tuple(next(grads) if n else None for n in need)


class GradientAccumulator:
    """Gradients of a layer's parameters, added up over slices and branches."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.tensors = tensors
        self.sums: Tensors = [None] * len(tensors)
        self.owned = [False] * len(tensors)

    def differentiate(self, outputs: list, grads: Tensors, inputs: Tensors) -> Tensors:
        """The inputs' gradients; those of the parameters are added. `outputs` are tensors or edges of the graph."""
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out is not None and grad is not None]
        if not pairs:
            return [None] * len(inputs)
        wanted = [x for x in inputs if x is not None]
        roots, given = zip(*pairs, strict=True)
        _reject_external_leaves(roots, wanted + self.tensors)
        found = torch.autograd.grad(roots, wanted + self.tensors, given, allow_unused=True)
        for index, grad in enumerate(found[len(wanted) :]):
            if grad is not None:
                self._add(index, grad)
        steps = iter(found)
        return [None if x is None else next(steps) for x in inputs]

    def _add(self, index: int, grad: torch.Tensor) -> None:
        total = self.sums[index]
        if total is None:
            self.sums[index] = grad  # perhaps shared with another parameter
        elif self.owned[index]:
            total.add_(grad)
        else:
            self.sums[index] = total.to(torch.promote_types(grad.dtype, torch.float32)) + grad
            self.owned[index] = True

    def result(self) -> Tensors:
        return [None if x is None else x.to(like.dtype) for x, like in zip(self.sums, self.tensors, strict=True)]


def _reject_external_leaves(roots, known: list[torch.Tensor]) -> None:
    """Raise RuntimeError if the graph of a part of a layer ends in a tensor whose gradient nobody would return."""
    seen = {get_gradient_edge(x).node for x in known}
    waiting = [root.grad_fn if isinstance(root, torch.Tensor) else root.node for root in roots]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            raise RuntimeError(
                f"A trainable tensor of shape {tuple(node.variable.shape)} comes into a reversible layer from outside,"
                " perhaps by a hook, and would get no gradient. Make it a parameter of a module in the layer, or set "
                "`config.reversible=False`."
            )
        waiting += [parent for parent, _ in node.next_functions]


def _edge(x: torch.Tensor | None):
    """Where backward enters x's graph: without x itself, which can go."""
    return get_gradient_edge(x) if x is not None and x.requires_grad else None


def invert_branch(
    branch: Callable, size: int, y, given, grad, base, totals: GradientAccumulator, x: ChunkedBuffer
) -> Tensors:
    """Undo y = x + branch(given): `x`, and the gradient of `given` by that of y, added to `base`."""
    step = ChunkedBuffer(y.shape[1])
    for first, (y_slice, piece, grad_slice, base_slice) in token_chunks(size, y, given, grad, base):
        leaf = piece.detach().requires_grad_()
        out = branch(first, leaf)
        x.put(first, y_slice - out.detach())
        (found,) = totals.differentiate([out if out.requires_grad else None], [grad_slice], [leaf])
        step.put(first, _sum(base_slice, found))
    return x.tensors + step.tensors


def invert_attention_branch(
    stages: LayerStages,
    size: int,
    y1,
    x2,
    d1,
    d2,
    totals: GradientAccumulator,
    x1: ChunkedBuffer,
    told=(),
    grad_aux=(),
) -> Tensors:
    """Undo y1 = x1 + f(x2): x1, and the gradient of x2 by that of y1 and of what the layer told, added to d2."""
    projected, graphs = ChunkedBuffer(x2.shape[1]), []
    for first, (piece,) in token_chunks(size, x2):
        leaf = piece.detach().requires_grad_()
        outputs = stages.project(first, leaf)
        projected.put(first, *(None if x is None else x.detach() for x in outputs))
        graphs.append((leaf, [_edge(x) for x in outputs]))
    inputs = [None if x is None else x.detach().requires_grad_() for x in projected.tensors]
    del projected, outputs
    mixed, *again = stages.attend(list(inputs), told)
    edges, mixed = [_edge(mixed), *(_edge(x) for x in again)], mixed.detach()
    del again
    _, d_mixed = invert_branch(stages.merge, size, y1, mixed, d1, None, totals, x1)
    del mixed
    grads = totals.differentiate(edges, [d_mixed, *grad_aux], inputs)
    del d_mixed, edges, inputs
    step = ChunkedBuffer(x2.shape[1])
    for (first, (_, base, *slices)), (leaf, edges) in zip(token_chunks(size, x2, d2, *grads), graphs, strict=True):
        (found,) = totals.differentiate(edges, slices, [leaf])
        step.put(first, _sum(base, found))
    return x1.tensors + step.tensors


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b


def _leaf(x: Any, wanted: bool) -> Any:
    return x.detach().requires_grad_(wanted) if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _parameters(ctx, saved: list[torch.Tensor], need) -> tuple[list[torch.Tensor], dict[str, torch.Tensor] | None]:
    """The tensors to differentiate by, and what to swap into the layer where the saved ones cannot serve.

    They are not its own under functional_call, an outer checkpoint, or saved-tensor hooks. And hooks on a tensor would
    see each of its partial gradients, where they are meant for the sum.
    """
    now = layer_tensors(ctx.layer)
    own = all(now.get(name) is tensor for name, tensor in zip(ctx.names, saved, strict=True))
    frozen = [name for name, x, wanted in zip(ctx.names, saved, need, strict=True) if wanted and not x.requires_grad]
    if own and frozen:
        raise RuntimeError(
            f"`{frozen[0]}` of a reversible layer was trained in forward and is frozen now, in backward: perhaps "
            "another adapter was made active, and layers would be run again with that one. Call backward first."
        )
    if own and not any(tensor._backward_hooks for tensor in saved):
        return saved, None
    saved = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(saved, need, strict=True)]
    return saved, dict(zip(ctx.names, saved, strict=True))


def warn_if_inexact(before: tuple[torch.Tensor, ...], streams: tuple[torch.Tensor, ...], grid: Grid) -> None:
    if bool((checksum(streams[0]) == before[0]) & (checksum(streams[1]) == before[1])):
        return
    if not all(bool(x.isfinite().all()) for x in streams):
        return  # the loss tells of NaN and infinity
    warnings.warn(
        "A reversible stack did not reconstruct its input exactly: the residual streams left the range "
        f"|x| <= {grid.limit:g} of their grid, or a layer does not compute the same thing twice. Gradients are "
        'inexact, in half precision wrong. Use `residual_precision="float64"`, a smaller `initializer_range` or '
        "learning rate, or `reversible=False`.",
        RuntimeWarning,
        stacklevel=2,
    )


def needs_plain_path(layer: nn.Module) -> bool:
    """Whether parameters of `layer` may be others when it runs again: FSDP2 wraps modules within it, or it computes
    weights from others (torch's parametrizations) and keeps them in `parametrize.cached()`."""
    return any(
        (m is not layer and type(m).__name__.startswith("FSDP") and hasattr(m, "unshard"))
        or (parametrize._cache_enabled and hasattr(m, "parametrizations"))
        for m in layer.modules()
    )


def reversible_step(
    layer: nn.Module, x1: torch.Tensor, x2: torch.Tensor, call: Any, chain: StreamHandoff, index: int, extra=()
) -> tuple[torch.Tensor, ...]:
    """One layer of a reversible stack: the values of `residual_step`, with nothing kept but the last layer's output.

    Args:
        layer, x1, x2: as there.
        call: what the layer needs beside tensors with gradients; handed to its parts as it is.
        extra: further tensors with gradients for `attend` (encoder states).
    """
    tensors = layer_tensors(layer)
    return _ReversibleLayer.apply(
        layer, chain, index, call, tuple(tensors), len(extra), x1, x2, *extra, *tensors.values()
    )
