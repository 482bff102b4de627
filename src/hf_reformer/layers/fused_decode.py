"""A decode step through whole layers in one call of the compiled kernel: generation on a CPU.

Module by module, a small layer's step spends as long between its operations as in them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import GELUActivation

from ..ops.dispatch import decode_kernel
from .cached_attention import cache_tensors
from .forward_context import ForwardContext

MAX_BATCH_SIZE = 8  # with more, matrix products of the whole batch are faster
ACTIVATIONS = {nn.ReLU: False, GELUActivation: True}


def plan_fused_decode(layers: Any, ctx: ForwardContext, like: torch.Tensor, dtype: torch.dtype) -> Callable | None:
    """What takes both streams (B, 1, D) of one new token per sequence through the layers, as their modules would.

    Args:
        like: (B, T, D), what the streams begin with.
        dtype: that of the streams.

    Returns:
        (x1, x2, …) → (y1, y2, reports, of which there are none); or None unless this is a decode step with everything
        that the kernel knows: unmodified layers with float32 weights on a CPU.
    """
    if ctx.cache is None or like.shape[1] != 1 or like.shape[0] > MAX_BATCH_SIZE:
        return None
    if not like.is_cpu or dtype not in (torch.float64, torch.float32):
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    steps = []
    for layer in layers:
        step = _describe(layer, ctx.cache.layers)
        if step is None:
            return None
        steps.append(step)
    kernel = decode_kernel(layers[0].attention.backend, steps[0][0].keys)
    if kernel is None:
        return None

    def run(x1: torch.Tensor, x2: torch.Tensor, *unused: Any) -> tuple[torch.Tensor, torch.Tensor, list]:
        inputs = []
        for cache_layer, weights, options in steps:
            rounds = None if cache_layer.buckets is None else cache_layer.buckets.shape[:3]
            numbers = cache_layer.reserve(1, ctx.mask, rounds)
            inputs.append(kernel.DecodeLayer(weights, cache_tensors(kernel, cache_layer), numbers, *options))
        streams = kernel.decode_layers(x1, x2, inputs, ctx.rotary)
        for (cache_layer, _, _), layer in zip(steps, inputs, strict=True):
            cache_layer.commit(layer.indices)
        return *streams, []

    return run


def _describe(layer: Any, cache_layers: list) -> tuple[Any, dict[str, torch.Tensor | None], tuple] | None:
    """A layer's cache, weights and options, as the kernel's `DecodeLayer` takes them; None if it cannot."""
    if "expected_types" not in layer.__dict__ or not layer.is_unmodified():  # a wrapper, perhaps
        return None
    parts = layer._modules  # every token comes here, and a module's attributes take their time
    attention, feed_forward = parts["attention"], parts["feed_forward"]
    norm, second_norm = parts["attention_norm"], parts["feed_forward_norm"]
    act = type(feed_forward._modules["act"])
    cache_layer = cache_layers[attention.layer]
    if attention.kind == "full" or attention.mode != "window":
        return None
    if (
        not cache_layer.seen_tokens
        or cache_layer.keys.dtype != torch.float32
        or act not in ACTIVATIONS
        or norm.eps != second_norm.eps
    ):
        return None
    weights = _weights(attention, feed_forward, norm._parameters, second_norm._parameters)
    if weights is None:
        return None
    return cache_layer, weights, (ACTIVATIONS[act], norm.eps, cache_layer.local_reach, attention.scale)


def _weights(
    attention: Any, feed_forward: Any, norm: dict, second_norm: dict
) -> dict[str, torch.Tensor | None] | None:
    """By the names of the kernel; None where it cannot take them."""
    shared = attention.kind == "lsh"
    names = ("qk_proj", "v_proj", "o_proj") if shared else ("q_proj", "v_proj", "o_proj", "k_proj")
    projections = [attention._modules[name]._parameters for name in names]
    up_proj, down_proj = feed_forward._modules["up_proj"], feed_forward._modules["down_proj"]
    up, down = up_proj._parameters, down_proj._parameters
    hidden, wide, inner = down_proj.out_features, up_proj.out_features, attention.heads * attention.head_size
    found = {
        "attention_norm": (norm["weight"], (hidden,)),
        "attention_norm_bias": (norm["bias"], (hidden,)),
        "feed_forward_norm": (second_norm["weight"], (hidden,)),
        "feed_forward_norm_bias": (second_norm["bias"], (hidden,)),
        "query_proj": (projections[0]["weight"], (inner, hidden)),
        "value_proj": (projections[1]["weight"], (inner, hidden)),
        "out_proj": (projections[2]["weight"], (hidden, inner)),
        "up_proj": (up["weight"], (wide, hidden)),
        "up_bias": (up["bias"], (wide,)),
        "down_proj": (down["weight"], (hidden, wide)),
        "down_bias": (down["bias"], (hidden,)),
    }
    if not shared:
        found["key_proj"] = projections[3]["weight"], (inner, hidden)
    biased = any(parameters["bias"] is not None for parameters in projections)
    fit = not biased and all(_fits(weight, shape) for weight, shape in found.values())
    return {"key_proj": None, **{name: weight for name, (weight, _) in found.items()}} if fit else None


def _fits(weight: torch.Tensor | None, shape: tuple[int, ...]) -> bool:
    if weight is None or weight.shape != shape or shape[0] % 4:
        return False
    return weight.dtype == torch.float32 and weight.is_cpu and weight.is_contiguous()
