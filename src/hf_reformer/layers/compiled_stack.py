"""All reversible layers as one autograd Function, so that compiled training steps save no more than eager ones.

Dynamo cannot trace the Function of a single layer, whose backward takes its streams from Python objects and calls
autograd. So the stack enters the graph as one opaque call, which AOTAutograd traces forward and backward. Everything
that determines its result and is not a tensor has to be an argument.
"""

import contextlib
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..compat import active_ddp_module, nonstrict_trace, reparametrize_module
from ..reversible.chunking import Handoff, tokens_per_chunk
from ..reversible.grid import Grid
from ..reversible.recompute import autocast_again, autocast_state
from ..reversible.reversible import LayerStages, checksum, invert_layer, residual_step, warn_if_inexact
from .forward_context import AttentionReport, ForwardContext


def supports_compiled_stack(layers: Any, ctx: ForwardContext) -> bool:
    """Whether a graph may contain the layers as one call: compiled, unmodified, and in a single process."""
    if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting() or torch.__version__ < "2.13":
        return False  # older versions of dynamo cannot pass modules to opaque calls
    split = active_ddp_module() is not None  # dynamo splits the graph at DDP's buckets
    return not split and ctx.shard is None and all(layer.is_unmodified() for layer in layers)


def compiled_stack(
    layers: Any, x1: torch.Tensor, x2: torch.Tensor, ctx: ForwardContext, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor, list[AttentionReport]]:
    """Run both streams, (B, T, D) each, through all layers (an nn.ModuleList); only while compiling.

    Returns:
        Both streams and one report per layer with its attention mass, if requested.
    """
    fields = {name: value for name, value in zip(ctx._fields, ctx, strict=True) if value is not None}
    x1, x2, *masses = _opaque(layers, x1, x2, fields, grid.bits, _settings(layers))
    return x1, x2, [AttentionReport(mass=mass) for mass in masses]


def _settings(layers: Any) -> str:
    """Collect all numbers, strings and flags of the layers and their config in a string, for dynamo to guard on."""
    holders = [layers[0].attention.config, *(module for layer in layers for module in layer.modules())]
    plain = [
        value for holder in holders for value in vars(holder).values() if isinstance(value, (bool, int, float, str))
    ]
    return " ".join([value.hex() if isinstance(value, float) else str(value) for value in plain])


@nonstrict_trace
def _opaque(layers, x1, x2, fields, bits, settings):
    ctx = ForwardContext(**{**dict.fromkeys(ForwardContext._fields), **fields})
    parameters = [dict(layer.named_parameters()) for layer in layers]
    tensors = [x for named in parameters for x in named.values()]
    return _Stack.apply(layers, [tuple(named) for named in parameters], ctx, Grid(x1.dtype, bits), x1, x2, *tensors)


class _Stack(torch.autograd.Function):
    """Runs all layers; saves only the streams after the last one and reconstructs the others in backward."""

    @staticmethod
    def forward(fn, layers, names, ctx, grid, x1, x2, *tensors):
        fn.layers, fn.names, fn.ctx, fn.grid = layers, names, ctx, grid
        fn.autocast = autocast_state(x1.device)
        before = checksum(x1), checksum(x2)
        masses: list[torch.Tensor] = []
        for layer in layers:
            x1, x2, mass, *_ = residual_step(layer, x1, x2, ctx.for_layer(layer.attention.layer), grid)
            masses += [] if mass is None else [mass]
        fn.save_for_backward(x1, x2, *before, *tensors)
        return x1, x2, *masses

    @staticmethod
    @once_differentiable
    def backward(fn, d1, d2, *grad_masses):
        y1, y2, sum1, sum2, *tensors = fn.saved_tensors
        ctx, need = fn.ctx, fn.needs_input_grad[6:]
        grads: list[Any] = []
        if ctx.key is not None:
            ctx = ctx._replace(key=_key_again(ctx.key, d1))
        for index, (layer, names) in reversed(list(enumerate(zip(fn.layers, fn.names, strict=True)))):
            first = len(tensors) - len(names)
            needed = need[first : len(tensors)]
            leaves = [x.detach().requires_grad_(n) for x, n in zip(tensors[first:], needed, strict=True)]
            del tensors[first:]
            again = partial(_again, layer, dict(zip(names, leaves, strict=True)), d1.device, fn.autocast)
            stages = LayerStages(layer, ctx.for_layer(layer.attention.layer), fn.grid, again)
            size, outputs = tokens_per_chunk(y2, layer.chunk_size), Handoff((y1, y2, False))
            report = AttentionReport(mass=grad_masses[index] if grad_masses else None)
            y1, y2, d1, d2, layer_grads = invert_layer(stages, (), size, outputs, d1, d2, report, leaves, needed)
            grads = layer_grads + grads
        grads = [d1, d2, *grads]
        checked = next(i for i, grad in enumerate(grads) if fn.needs_input_grad[4 + i] and grad is not None)
        grads[checked] = _checked(grads[checked], y1, y2, sum1, sum2, fn.grid.bits)  # compilers must not drop it
        return None, None, None, None, *grads


@contextlib.contextmanager
def _again(layer, tensors, device, autocast, stage) -> Iterator[None]:
    with reparametrize_module(layer, tensors), torch.enable_grad(), autocast_again(device, autocast):
        yield


# Two ops opaque to compilers, named after this module, so that a copy of this file can register its own.
_NAMESPACE = re.sub(r"\W", "_", __name__)


@torch.library.custom_op(f"{_NAMESPACE}::key_again", mutates_args=())
def _key_again(key: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return the key, with a dependency on `after`, so that masks are redrawn in backward instead of being saved."""
    return key.clone()


@torch.library.custom_op(f"{_NAMESPACE}::checked", mutates_args=())
def _checked(
    grad: torch.Tensor, x1: torch.Tensor, x2: torch.Tensor, sum1: torch.Tensor, sum2: torch.Tensor, bits: int
) -> torch.Tensor:
    """Return `grad`; warn if the checksums of the reconstructed streams differ from the given ones."""
    warn_if_inexact((sum1, sum2), (x1, x2), Grid(x1.dtype, bits))
    return grad.clone()


for _op in (_key_again, _checked):
    _op.register_fake(lambda like, *others: torch.empty_like(like))
