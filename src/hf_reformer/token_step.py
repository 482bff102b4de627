"""One more token through a whole layer, in one call of the compiled kernel: generation on a CPU.

Module by module, a small layer's step spends as long between its operations as in them.
"""

from typing import Any

import torch
from torch import nn
from transformers.activations import GELUActivation

from .attention import Call
from .attention_ops import compiled_layer_step

MOST_ROWS = 8  # with more, matrix products of the whole batch are faster
ACTIVATIONS = {nn.ReLU: False, GELUActivation: True}


def token_step(layer: Any, x1: torch.Tensor, x2: torch.Tensor, call: Call) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(y1, y2) of a layer for one new token of every row, (B, 1, D) each, as its modules give them.

    None where that is not what is asked for, or where there is anything but what the kernel knows: float32 weights as
    they were made, on a CPU.
    """
    attention, kept = layer.attention, None if call.cache is None else call.cache.layers[layer.attention.layer]
    if kept is None or not kept.columns or x2.shape[1] != 1 or x2.shape[0] > MOST_ROWS:
        return None
    if x2.device.type != "cpu" or x2.dtype not in (torch.float64, torch.float32):
        return None
    plain = attention.mode == "window" and attention.kind in ("lsh", "local") and call.attentions is None
    if not plain or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return None
    weights = _weights(layer)
    step = compiled_layer_step(attention.backend, kept.keys)
    if step is None or weights is None:
        return None
    numbers = kept.make_room(1, call.mask, None if attention.kind == "local" else kept.buckets.shape[:3])
    config = attention.config
    window = config.local_window if kept.include_local else 0
    gelu, epsilon = ACTIVATIONS[type(layer.feed_forward.act)], layer.attention_norm.eps
    found = step(x1, x2, weights, kept, numbers, call.rotary, gelu, epsilon, window, attention.scale)
    kept.count(numbers)
    return found


def _weights(layer: Any) -> dict[str, torch.Tensor | None] | None:
    """By the names of the kernel; None where it cannot take them."""
    attention, feed_forward, shared = layer.attention, layer.feed_forward, layer.attention.kind == "lsh"
    norm, second_norm = layer.attention_norm, layer.feed_forward_norm
    if type(feed_forward.act) not in ACTIVATIONS or norm.eps != second_norm.eps or not layer.is_as_made():
        return None
    names = ("qk_proj", "v_proj", "o_proj") if shared else ("q_proj", "v_proj", "o_proj", "k_proj")
    projections = [attention._modules[name]._parameters for name in names]
    up, down = feed_forward.up_proj._parameters, feed_forward.down_proj._parameters
    hidden, wide = feed_forward.down_proj.out_features, feed_forward.up_proj.out_features
    inner = attention.heads * attention.head_size
    found = {
        "attention_norm": (norm.weight, (hidden,)),
        "attention_norm_bias": (norm.bias, (hidden,)),
        "feed_forward_norm": (second_norm.weight, (hidden,)),
        "feed_forward_norm_bias": (second_norm.bias, (hidden,)),
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
    return (
        weight is not None
        and weight.shape == shape
        and shape[0] % 4 == 0
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.is_contiguous()
    )
