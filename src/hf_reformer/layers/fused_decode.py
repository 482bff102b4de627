"""Decode steps through whole layers in one call of the compiled kernel, for generation on a CPU.

Run module by module, small layers spend as much time between operations as in them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.activations import GELUActivation

from ..ops.dispatch import decode_kernel
from .cached_attention import cache_tensors
from .forward_context import ForwardContext

MAX_BATCH_SIZE = 8  # for larger batches, matrix products over the whole batch are faster
ACTIVATIONS = {nn.ReLU: False, GELUActivation: True}


def plan_fused_decode(layers: Any, ctx: ForwardContext, like: torch.Tensor, dtype: torch.dtype) -> Callable | None:
    """Make a function that runs both streams (B, 1, D) of one new token per sequence through the layers.

    Args:
        like: (B, T, D), the initial value of the streams.
        dtype: dtype of the streams.

    Returns:
        (x1, x2, …) → (y1, y2, empty list of reports), equivalent to the layers' modules; or None unless this is a
        decode step that the kernel supports: unmodified layers with float32 weights on a CPU.
    """
    if ctx.cache is None or like.shape[1] != 1 or like.shape[0] > MAX_BATCH_SIZE:
        return None
    if not like.is_cpu or dtype not in (torch.float64, torch.float32) or torch.is_grad_enabled():
        return None
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    steps: list[Any] = []
    for layer in layers:
        steps.append(_describe(layer, ctx.cache.layers))
        if steps[-1] is None:
            return None
    kernel = decode_kernel(layers[0].attention.backend, steps[0][0].keys)
    if not hasattr(kernel, "decode_layers"):
        return None

    def run(x1: torch.Tensor, x2: torch.Tensor, *unused: Any) -> tuple[torch.Tensor, torch.Tensor, list]:
        inputs = []
        for layer, (cache_layer, weights, options) in zip(layers, steps, strict=True):
            numbers = cache_layer.reserve(1, ctx.mask)
            tensors = cache_tensors(kernel, cache_layer, layer.attention.centering)
            inputs.append(kernel.DecodeLayer(weights, tensors, numbers, ctx.rotary, *options))
        streams = kernel.decode_layers(x1, x2, inputs)
        for (cache_layer, *_), new in zip(steps, inputs, strict=True):
            cache_layer.commit(new.indices)
        return *streams, []

    return run


def _describe(layer: Any, cache_layers: list) -> tuple[Any, dict[str, torch.Tensor | None], tuple] | None:
    """Collect a layer's cache, weights and options for `DecodeLayer`; None if the kernel does not support it."""
    if "expected_types" not in layer.__dict__ or not layer.is_unmodified():  # it may be a wrapper
        return None
    parts = layer._modules  # this runs for every token, and attribute access on modules is slow
    attention, feed_forward = parts["attention"], parts["feed_forward"]
    if attention.kind == "full" or attention.mode != "window":
        return None
    cache_layer, projections = cache_layers[attention.layer], attention._modules | feed_forward._modules
    norm, second_norm, act = parts["attention_norm"], parts["feed_forward_norm"], type(projections["act"])
    if not cache_layer.seen_tokens or cache_layer.keys.dtype != torch.float32:
        return None
    if act not in ACTIVATIONS or norm.eps != second_norm.eps:
        return None
    up_proj, down_proj = projections["up_proj"], projections["down_proj"]
    hidden, wide, inner = down_proj.out_features, up_proj.out_features, attention.heads * attention.head_size
    table = [  # name in the kernel, module, shape of its weight, name of its bias in the kernel
        ("attention_norm", norm, (hidden,), "attention_norm_bias"),
        ("feed_forward_norm", second_norm, (hidden,), "feed_forward_norm_bias"),
        ("query_proj", projections["qk_proj" if attention.kind == "lsh" else "q_proj"], (inner, hidden), None),
        ("value_proj", projections["v_proj"], (inner, hidden), None),
        ("out_proj", projections["o_proj"], (hidden, inner), None),
        ("up_proj", up_proj, (wide, hidden), "up_bias"),
        ("down_proj", down_proj, (hidden, wide), "down_bias"),
    ]
    if attention.kind != "lsh":
        table.append(("key_proj", projections["k_proj"], (inner, hidden), None))
    weights: dict[str, torch.Tensor | None] = {"key_proj": None}
    for name, module, shape, bias_name in table:
        weight, bias = module._parameters["weight"], module._parameters["bias"]
        if not _fits(weight, shape) or not (bias is None if bias_name is None else _fits(bias, shape[:1])):
            return None
        weights[name] = weight
        if bias_name is not None:
            weights[bias_name] = bias
    options = attention.turned_heads, ACTIVATIONS[act], norm.eps, cache_layer.local_reach, attention.scale
    return cache_layer, weights, options


def _fits(weight: torch.Tensor | None, shape: tuple[int, ...]) -> bool:
    if weight is None or weight.shape != shape or shape[0] % 4:
        return False
    return weight.dtype == torch.float32 and weight.is_cpu and weight.is_contiguous()
