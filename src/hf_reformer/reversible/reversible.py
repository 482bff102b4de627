"""Reversible residual layers (Gomez et al. 2017; paper, section 3) with bitwise exact reconstruction.

y1 = x1 + f(x2), y2 = x2 + g(y1). The streams lie on a fixed grid: the embeddings and all branch outputs are rounded to
multiples of 2^-k before they are added, so that additions are exact and subtractions undo them. Rounding has the
gradient of the identity. Backward rebuilds each layer's inputs from its outputs, so memory does not grow with depth.

One autograd Function per layer takes the two streams, the layer's parameters and all other differentiable tensors as
inputs and *returns* their gradients, so wrappers that observe parameters (DDP, FSDP2, adapters) see a normal graph.
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

from ..compat import (
    current_graph_task_id,
    has_gradient_hooks,
    in_fake_mode,
    in_graph_capture,
    may_look_at,
    parametrization_cache_enabled,
    version_of,
    will_engine_execute,
)
from .chunking import ChunkedBuffer, Handoff, Tensors, map_tokens, token_chunks, tokens_per_chunk
from .grid import Grid, add_rounded, subtract_rounded
from .recompute import ReplayState, autocast_again, autocast_state, hooked_module, layer_tensors, recomputed

StageContext = Callable[[Hashable], AbstractContextManager]  # the context of a part of a layer, given its name


class LayerStages:
    """The token-wise parts of a layer, called by name on chunks of tokens, each in the `context` of its name."""

    def __init__(self, layer: Any, ctx: Any, grid: Grid, context: StageContext):
        self.layer, self.ctx, self.grid, self.context = layer, ctx, grid, context

    def __call__(self, name: str, offset: int, x: torch.Tensor) -> Any:
        with self.context((name, offset)):
            return getattr(self.layer, name)(x, self.ctx, offset)


def residual_step(
    layer: Any,
    x1: torch.Tensor,
    x2: torch.Tensor,
    ctx: Any,
    grid: Grid,
    states: Sequence[torch.Tensor] = (),
    context: StageContext | None = None,
) -> tuple[Any, ...]:
    """Compute the equations of a layer, as used by every path through a stack; returns (y1, y2, *report).

    Args:
        layer: has the methods `qkv_projection(x2, ctx, offset)`, which returns a list; `attend(Handoff of that list,
            ctx, *states)`, which returns a tuple of the mixed values and further reports (tensors or None);
            `output_projection(mixed, ctx, offset)`; and `feed_forward_branch(y1, ctx, offset)`, where `offset` is the
            position of a chunk's first token. `chunk_size`: tokens per chunk, 0 for an automatic number; otherwise,
            the plain path recomputes the feed-forward branch in backward.
        x1, x2: (B, T, D), streams in the grid's dtype.
        ctx: further inputs, passed to all parts unchanged.
        states: further differentiable tensors for `attend` (encoder states).
        context: returns the context manager of a part, given its name. Default: the current autocast state.
    """
    stages = LayerStages(layer, ctx, grid, context or _current_autocast(x2.device))
    size = tokens_per_chunk(x2, layer.chunk_size)
    recompute = 0 < layer.chunk_size < x2.shape[1] and hooked_module(layer, itself=False) is None
    projected = Handoff(map_tokens(partial(stages, "qkv_projection"), size, x2))
    with stages.context("attend"):
        mixed, *report = layer.attend(projected, ctx, *states)

    def add_attention(offset: int, x: torch.Tensor, mixed: torch.Tensor) -> Tensors:
        return [add_rounded(x, stages("output_projection", offset, mixed), grid)]

    (y1,) = map_tokens(add_attention, size, x1, mixed)
    del mixed

    def add_feed_forward(offset: int, x: torch.Tensor, y: torch.Tensor) -> Tensors:
        g = partial(stages, "feed_forward_branch", offset)
        return [add_rounded(x, recomputed(layer, g, y) if recompute else g(y), grid)]

    (y2,) = map_tokens(add_feed_forward, size, x2, y1)
    return y1, y2, *report


def _current_autocast(device: torch.device) -> StageContext:
    if torch.compiler.is_compiling() or not torch.is_autocast_enabled(device.type):
        return lambda stage: nullcontext()
    return lambda stage: autocast_again(device, autocast_state(device))


class StreamHandoff:
    """The transfer of reconstructed streams between layers in backward; one instance per forward call of a stack."""

    def __init__(self, grid: Grid, depth: int):
        self.grid, self.depth = grid, depth
        self._pending: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._originals: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._link: tuple[int, tuple[torch.Tensor, torch.Tensor], tuple[int, int]] | None = None

    def enter(self, index: int, x1: torch.Tensor, x2: torch.Tensor) -> None:
        """Check that layer `index` gets the output of layer `index - 1`; if it was replaced, keep the original.

        Raises:
            RuntimeError: the streams were modified in place.
        """
        link, self._link = self._link, None
        if link is None or link[0] != index - 1:
            return  # the first layer, or a recomputation by an outer checkpoint wrapper
        previous, streams, versions = link
        if any(version_of(x) != version for x, version in zip(streams, versions, strict=True)):
            raise RuntimeError(
                f"The residual stream after layer {previous} was modified in place, so it cannot be reconstructed. "
                "Use an out-of-place operation, or `config.reversible=False`."
            )
        if not all(_same_storage(a, b) for a, b in zip(streams, (x1, x2), strict=True)):
            self._originals[previous] = streams

    def leave(self, index: int, y1: torch.Tensor, y2: torch.Tensor) -> None:
        last = index == self.depth - 1
        self._link = None if last else (index, (y1.detach(), y2.detach()), (version_of(y1), version_of(y2)))

    def put(self, index: int, streams: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._pending[current_graph_task_id(), index] = streams

    def take(self, index: int) -> tuple[torch.Tensor, torch.Tensor, bool]:
        """Return the outputs of layer `index`, and whether they may be overwritten.

        Raises:
            RuntimeError: they have not been reconstructed.
        """
        streams = self._pending.pop((current_graph_task_id(), index), None)
        if index in self._originals:
            return *self._originals[index], False
        if streams is None:
            raise RuntimeError(
                f"A gradient reached reversible layer {index} without passing through layer {index + 1}, so "
                "its outputs are unknown. Take the plain path: `output_hidden_states=True` or `reversible=False`."
            )
        return *streams, True


def _same_storage(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())


def checksum(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32).sum(dtype=torch.int64)


class ReversibleFunction(torch.autograd.Function):
    """One layer of a reversible stack: `residual_step`, saving no activations except the output of the last layer.

    `apply(layer, ctx, handoff, index, names, x1, x2, *states, *tensors)`: `index` is the position of the layer in the
    stack of `handoff`; `names` and `tensors` are those of `layer_tensors(layer)`; the rest is as for `residual_step`.
    """

    @staticmethod
    def forward(fn, layer, ctx, handoff, index, names, x1, x2, *tensors):
        state = ReplayState(layer, x1.device)
        handoff.enter(index, x1, x2)
        bottom = index == 0 or not any(fn.needs_input_grad[5:7])  # the last layer that backward reaches
        fn.checksums = (checksum(x1), checksum(x2)) if bottom else None
        fn.size = tokens_per_chunk(x2, layer.chunk_size)
        states = tensors[: len(tensors) - len(names)]
        y1, y2, *report = residual_step(layer, x1, x2, ctx, handoff.grid, states, state.record)
        report = [x if x is None else x.detach() for x in report]  # compiled parts record a graph, which is cut here
        handoff.leave(index, y1, y2)
        fn.layer, fn.ctx, fn.handoff, fn.index, fn.names, fn.state = layer, ctx, handoff, index, names, state
        fn.set_materialize_grads(False)
        fn.save_for_backward(*tensors, *((y1, y2) if index == handoff.depth - 1 else ()))
        return y1, y2, *report

    @staticmethod
    @once_differentiable
    def backward(fn, d1, d2, *grad_report):
        tensors, handoff, index = list(fn.saved_tensors), fn.handoff, fn.index
        if index == handoff.depth - 1:
            outputs = Handoff((tensors.pop(-2), tensors.pop(), False))
        else:
            outputs = Handoff(handoff.take(index))
        need = fn.needs_input_grad[7:]
        count = len(tensors) - len(fn.names)
        states = [x.detach().requires_grad_(needed) for x, needed in zip(tensors[:count], need, strict=False)]
        parameters, swap = _parameters(fn, tensors[count:], need[count:])
        stages = LayerStages(fn.layer, fn.ctx, handoff.grid, fn.state.replay)
        leaves = [*states, *parameters]
        with fn.state.restored(swap):
            x1, x2, d1, d2, grads = invert_layer(stages, states, fn.size, outputs, d1, d2, grad_report, leaves, need)
        if fn.checksums is not None:
            warn_if_inexact(fn.checksums, (x1, x2), handoff.grid)
        elif any(node is not None and will_engine_execute(node) for node, _ in fn.next_functions[:2]):
            handoff.put(index - 1, (x1, x2))
        return *[None] * 5, d1, d2, *grads


class GradientAccumulator:
    """Sums of the gradients of a layer's parameters over chunks and branches."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.tensors = tensors
        self.sums: Tensors = [None] * len(tensors)
        self.owned = [False] * len(tensors)

    def differentiate(self, outputs: list, grads: Tensors, inputs: Tensors) -> Tensors:
        """Return the inputs' gradients and accumulate the parameters'. `outputs` are tensors or edges of the graph."""
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out is not None and grad is not None]
        if not pairs:
            return [None] * len(inputs)
        leaves = [*(x for x in inputs if x is not None), *self.tensors]
        roots, root_grads = zip(*pairs, strict=True)
        _reject_external_leaves(roots, leaves)
        leaf_grads = iter(torch.autograd.grad(roots, leaves, root_grads, allow_unused=True))
        input_grads = [None if x is None else next(leaf_grads) for x in inputs]
        for index, grad in enumerate(leaf_grads):
            total = self.sums[index]
            if grad is None:
                continue
            if total is None:
                self.sums[index] = grad  # possibly shared with another parameter
            elif self.owned[index]:
                total.add_(grad)
            else:
                self.sums[index] = total.to(torch.promote_types(grad.dtype, torch.float32)) + grad
                self.owned[index] = True
        return input_grads

    def result(self) -> Tensors:
        return [None if x is None else x.to(like.dtype) for x, like in zip(self.sums, self.tensors, strict=True)]


def _reject_external_leaves(roots, known: list[torch.Tensor]) -> None:
    """Raise RuntimeError if the graph of a part of a layer has a leaf whose gradient would be lost."""
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
    """Return the edge at which backward enters the graph of x, without keeping x itself alive."""
    return get_gradient_edge(x) if x is not None and x.requires_grad else None


def invert_layer(
    stages: LayerStages, states: Sequence[Any], size: int, outputs: Handoff, d1: Any, d2: Any,
    grad_report: Sequence[Any], leaves: list[torch.Tensor], need: Sequence[bool],
) -> tuple[Any, Any, Any, Any, Tensors]:  # fmt: skip
    """Invert a layer and return x1, x2, their gradients, and those of the leaves, None for leaves that need none.

    outputs: y1, y2, and whether they may be overwritten. Tensors as large as a stream are freed as early as possible,
    since training reaches its peak memory here.
    """
    y1, y2, reusable = outputs.take()
    totals = GradientAccumulator([x for x, n in zip(leaves, need, strict=True) if n])
    x2, d1 = _invert_branch(stages, "feed_forward_branch", size, y2, y1, d2, d1, totals, reusable)
    del y2
    x1, d2 = _invert_attention_branch(stages, states, size, y1, x2, d1, d2, totals, reusable, grad_report)
    grads = iter(totals.result())
    return x1, x2, d1, d2, [next(grads) if n else None for n in need]


def _invert_branch(
    stages: LayerStages, name: str, size: int, y: Any, inputs: Any, grad: Any, base: Any,
    totals: GradientAccumulator, reusable: bool,
) -> list[Any]:  # fmt: skip
    """Invert y = x + branch(inputs): return x, possibly in y's memory, and `base` plus the gradient of `inputs`."""
    x, step = ChunkedBuffer(y.shape[1], *[y] * reusable), ChunkedBuffer(y.shape[1])
    for offset, (y_chunk, chunk, grad_chunk, base_chunk) in token_chunks(size, y, inputs, grad, base):
        leaf = chunk.detach().requires_grad_()
        out = stages(name, offset, leaf)
        x_chunk = subtract_rounded(y_chunk, out.detach(), stages.grid, in_place=reusable)
        if not reusable:
            x.put(offset, x_chunk)
        grad_chunk = None if grad_chunk is None else grad_chunk.to(out.dtype)
        (leaf_grad,) = totals.differentiate([out if out.requires_grad else None], [grad_chunk], [leaf])
        step.put(offset, _sum(base_chunk, leaf_grad))
    return x.tensors + step.tensors


def _invert_attention_branch(
    stages: LayerStages, states: Sequence[Any], size: int, y1: Any, x2: Any, d1: Any, d2: Any,
    totals: GradientAccumulator, reusable: bool, grad_report: Sequence[Any],
) -> list[Any]:  # fmt: skip
    """Invert y1 = x1 + f(x2): return x1, and d2 plus x2's gradient from those of y1 and the report."""
    projected, graphs = ChunkedBuffer(x2.shape[1]), []
    for offset, (chunk,) in token_chunks(size, x2):
        leaf = chunk.detach().requires_grad_()
        outputs = stages("qkv_projection", offset, leaf)
        projected.put(offset, *(None if x is None else x.detach() for x in outputs))
        graphs.append((leaf, [_edge(x) for x in outputs]))
    inputs = [None if x is None else x.detach().requires_grad_() for x in projected.tensors]
    del projected, outputs
    with stages.context("attend"):
        mixed, *report = stages.layer.attend(Handoff(list(inputs)), stages.ctx, *states)
    edges, mixed = [_edge(x) for x in (mixed, *report)], mixed.detach()
    del report
    x1, d_mixed = _invert_branch(stages, "output_projection", size, y1, mixed, d1, None, totals, reusable)
    del mixed
    grads = totals.differentiate(edges, [d_mixed, *grad_report], inputs)
    del d_mixed, edges, inputs
    step = ChunkedBuffer(x2.shape[1])
    for (offset, (_, base, *chunks)), (leaf, edges) in zip(token_chunks(size, x2, d2, *grads), graphs, strict=True):
        (leaf_grad,) = totals.differentiate(edges, chunks, [leaf])
        step.put(offset, _sum(base, leaf_grad))
    return [x1, *step.tensors]


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b


def _parameters(fn, saved: list[torch.Tensor], need) -> tuple[list[torch.Tensor], dict[str, torch.Tensor] | None]:
    """Return the parameters to differentiate with respect to, and tensors to swap into the layer, or None.

    The saved tensors are not the layer's own under functional_call, an outer checkpoint or saved-tensor hooks. Some
    may have been frozen or unfrozen since, as when another adapter is activated. Hooks on a tensor would see every
    partial gradient instead of the sum.
    """
    now = layer_tensors(fn.layer)
    own = all(now.get(name) is tensor for name, tensor in zip(fn.names, saved, strict=True))
    trained = all(tensor.requires_grad == needed for tensor, needed in zip(saved, need, strict=True))
    if own and trained and not any(map(has_gradient_hooks, saved)):
        return saved, None
    saved = [tensor.detach().requires_grad_(needed) for tensor, needed in zip(saved, need, strict=True)]
    return saved, dict(zip(fn.names, saved, strict=True))


# Pending results of CUDA devices: whether a reconstruction was wrong, when that is known, the grid's limit.
_PENDING: list[tuple[torch.Tensor, Any, float]] = []


def warn_if_inexact(before: tuple[torch.Tensor, ...], streams: tuple[torch.Tensor, ...], grid: Grid) -> None:
    """Warn if the checksums of streams differ from `before`; on CUDA one step later, without synchronization.

    Does not warn of NaN and infinity, which the loss shows.
    """
    same = (checksum(streams[0]) == before[0]) & (checksum(streams[1]) == before[1])
    if may_look_at(same):
        if not bool(same) and all(bool(x.isfinite().all()) for x in streams):
            _warn_of_inexact_gradients(grid.limit)
    elif not in_graph_capture() and not in_fake_mode():
        finite = torch.stack([x.sum() for x in streams]).isfinite().all()
        known = torch.cuda.Event()
        wrong = (finite & ~same).to("cpu", non_blocking=True)
        known.record()
        reported: list[tuple[torch.Tensor, Any, float]] = []
        waiting: list[tuple[torch.Tensor, Any, float]] = []
        for pending in _PENDING:
            (reported if pending[1].query() else waiting).append(pending)
        _PENDING[:] = [*waiting, (wrong, known, grid.limit)]
        for found, _, limit in reported:
            if bool(found):
                _warn_of_inexact_gradients(limit)


def _warn_of_inexact_gradients(limit: float) -> None:
    warnings.warn(
        "A reversible stack did not reconstruct its input exactly: the residual streams left the range "
        f"|x| <= {limit:g} of their grid, or a layer does not compute the same thing twice. Gradients are "
        'inexact, in half precision wrong. Use `residual_precision="float64"`, a smaller `initializer_range` or '
        "learning rate, or `reversible=False`.",
        RuntimeWarning,
        stacklevel=3,
    )


def needs_plain_path(layer: nn.Module) -> str | None:
    """Return why `layer` cannot be rerun under identical conditions, or None if it can.

    It cannot if its submodules have hooks, or if its parameters may differ by then: FSDP2 wraps submodules, or weights
    are computed from others (torch's parametrizations) and cached by `parametrize.cached()`.
    """
    for m in layer.modules():
        if m is not layer and type(m).__name__.startswith("FSDP") and hasattr(m, "unshard"):
            return "FSDP2 on modules within the layers"
        if parametrization_cache_enabled() and hasattr(m, "parametrizations"):
            return "weights of a parametrization cache"
    return hooked_module(layer, itself=False)
