"""All reversible layers as one Function, for graphs: a compiled training step then keeps what an eager one keeps.

Dynamo cannot follow the Function of a single layer, whose backward finds its streams in Python objects and
differentiates. So it puts the stack into its graph as one call that it does not look into, and AOTAutograd runs the
call to see what it computes, forward and backward. What decides that, and is no tensor, has to be told to dynamo.
"""

import contextlib
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.stateless import _reparametrize_module

from ..reversible.chunking import ChunkedBuffer, chunk_length_for
from ..reversible.grid import Grid
from ..reversible.recompute import autocast_again, autocast_state
from ..reversible.reversible import (
    GradientAccumulator,
    LayerStages,
    checksum,
    invert_attention_branch,
    invert_branch,
    residual_step,
    warn_if_inexact,
)
from .attention import Call


def supports_compiled_stack(layers: Any, call: Call) -> bool:
    """Whether a graph may hold the layers as one call: in training, as they were made, and in one process."""
    if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting() or torch.__version__ < "2.13":
        return False  # older dynamo hands no modules to such calls
    split = DistributedDataParallel._active_ddp_module is not None  # whose buckets dynamo makes graphs of their own
    return not split and call.shard is None and all(layer.is_unmodified() for layer in layers)


def compiled_stack(
    layers: Any, x1: torch.Tensor, x2: torch.Tensor, call: Call, grid: Grid
) -> tuple[torch.Tensor, ...]:
    """Both streams, (B, T, D) each, through all layers (an nn.ModuleList); for graphs only.

    Then come what the tokens receive in every layer, where the call asks for it.
    """
    told = {name: value for name, value in zip(Call._fields, call, strict=True) if value is not None}
    return _opaque(layers, x1, x2, told, grid.bits, _settings(layers))


def _settings(layers: Any) -> str:
    """All numbers, texts and flags of the layers and of their config: dynamo guards what goes in here."""
    holders = [layers[0].attention.config, *(module for layer in layers for module in layer.modules())]
    found = [value for holder in holders for value in vars(holder).values() if isinstance(value, _PLAIN)]
    return " ".join([value.hex() if isinstance(value, float) else str(value) for value in found])


_PLAIN = (bool, int, float, str)


@torch._dynamo.nonstrict_trace
def _opaque(layers, x1, x2, told, bits, settings):
    call = Call(**{**dict.fromkeys(Call._fields), **told})
    own = [dict(layer.named_parameters()) for layer in layers]
    tensors = [x for named in own for x in named.values()]
    return _Stack.apply(layers, [tuple(named) for named in own], call, Grid(x1.dtype, bits), x1, x2, *tensors)


class _Stack(torch.autograd.Function):
    """Saves the streams after the last layer, and rebuilds all others from them."""

    @staticmethod
    def forward(ctx, layers, names, call, grid, x1, x2, *tensors):
        ctx.layers, ctx.names, ctx.call, ctx.grid = layers, names, call, grid
        ctx.autocast = autocast_state(x1.device)
        before = checksum(x1), checksum(x2)
        told: list[torch.Tensor] = []
        for layer in layers:
            x1, x2, *more = residual_step(layer, x1, x2, layer.told(call), grid)
            told += more
        ctx.told = len(told)
        ctx.save_for_backward(*told, x1, x2, *before, *tensors)
        return x1, x2, *told

    @staticmethod
    @once_differentiable
    def backward(ctx, d1, d2, *grad_aux):
        told, (y1, y2, sum1, sum2, *tensors) = ctx.saved_tensors[: ctx.told], ctx.saved_tensors[ctx.told :]
        call, need = ctx.call, ctx.needs_input_grad[6:]
        grads: list[torch.Tensor | None] = []
        if call.key is not None:
            call = call._replace(key=_key_again(call.key, d1))
        for index, (layer, names) in reversed(list(enumerate(zip(ctx.layers, ctx.names, strict=True)))):
            first = len(tensors) - len(names)
            wanted = need[first : len(tensors)]
            leaves = [x.detach().requires_grad_(n) for x, n in zip(tensors[first:], wanted, strict=True)]
            del tensors[first:]
            totals = GradientAccumulator([x for x in leaves if x.requires_grad])
            again = partial(_again, layer, dict(zip(names, leaves, strict=True)), d1.device, ctx.autocast)
            stages = LayerStages(layer, layer.told(call), ctx.grid, (), again)
            size = chunk_length_for(y2, layer.chunk_size)
            y2, d1 = invert_branch(stages.g, size, y2, y1, d2, d1, totals, ChunkedBuffer(y2.shape[1]))
            own = told[index : index + 1], grad_aux[index : index + 1]
            y1, d2 = invert_attention_branch(stages, size, y1, y2, d1, d2, totals, ChunkedBuffer(y1.shape[1]), *own)
            found = iter(totals.result())
            grads = [next(found) if n else None for n in wanted] + grads
        grads = [d1, d2, *grads]
        told = next(i for i, grad in enumerate(grads) if ctx.needs_input_grad[4 + i] and grad is not None)
        grads[told] = _checked(grads[told], y1, y2, sum1, sum2, ctx.grid.bits)  # one that compilers cannot leave out
        return None, None, None, None, *grads


@contextlib.contextmanager
def _again(layer, tensors, device, autocast, part) -> Iterator[None]:
    with _reparametrize_module(layer, tensors), torch.enable_grad(), autocast_again(device, autocast):
        yield


# Two ops that compilers do not look into, named after this module: a copy of this file elsewhere registers its own.


def _key_again(key: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """The key, once there is `after`: so that masks are drawn again in backward, not kept from forward."""
    return key.clone()


def _checked(
    grad: torch.Tensor, x1: torch.Tensor, x2: torch.Tensor, sum1: torch.Tensor, sum2: torch.Tensor, bits: int
) -> torch.Tensor:
    """`grad`; warns where the rebuilt streams are not those whose checksums were taken."""
    warn_if_inexact((sum1, sum2), (x1, x2), Grid(x1.dtype, bits))
    return grad.clone()


_NAMESPACE = re.sub(r"\W", "_", __name__)
_key_again = torch.library.custom_op(f"{_NAMESPACE}::key_again", _key_again, mutates_args=())
_key_again.register_fake(lambda key, after: torch.empty_like(key))
_checked = torch.library.custom_op(f"{_NAMESPACE}::checked", _checked, mutates_args=())
_checked.register_fake(lambda grad, *others: torch.empty_like(grad))
