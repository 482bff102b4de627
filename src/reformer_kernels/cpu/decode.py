"""Calls of the compiled library for generation, which add new tokens to a cache."""

import ctypes
from ctypes import byref
from typing import Any, NamedTuple

import torch

from ..contract import MAX_POSITIONS, CacheTensors, check_fits
from .bindings import DTYPES, pointer, readable, strided
from .library import DecodeParams, LayerParams, StackParams, current_library


class DecodeLayer(NamedTuple):
    """The weights, cache and settings of a layer for `decode_layers`.

    Attributes:
        weights: float32, contiguous, named as in `library.LayerParams`; `key_proj` is None for shared query/key.
        cache: the cache of the layer.
        indices: (B, 1) int64, the new tokens' indices in their sequences, or -1 for padding.
        rotary: cos and sin, (B or 1, 1, 1, head size) float32; None: no rotary positions.
        turned_heads: number of heads that rotary positions rotate, starting from the first.
        gelu: whether the activation is GELU, otherwise ReLU.
        epsilon: epsilon of both layer norms.
        local_window, scale: as for `decode_attention`.
    """

    weights: dict[str, Any]
    cache: CacheTensors
    indices: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor] | None
    turned_heads: int
    gelu: bool
    epsilon: float
    local_window: int
    scale: float


def _decode_params(cache: CacheTensors, indices: torch.Tensor, local_window: int, scale: float) -> Any:
    """Set all parameters except the new tokens' vectors and the output; the result keeps indices and factors alive."""
    batch, heads, capacity, size = cache.keys.shape
    indices, factors = indices.contiguous(), cache.factors
    factor_array = (ctypes.c_int64 * max(1, len(factors)))(*factors)
    params = DecodeParams(
        rotations=pointer(cache.rotations), factors=ctypes.addressof(factor_array), indices=indices.data_ptr(),
        keys=cache.keys.data_ptr(), values=cache.values.data_ptr(), buckets=pointer(cache.buckets),
        sums=pointer(cache.sums), newest=pointer(cache.newest), previous=pointer(cache.previous),
        batch=batch, heads=heads, length=indices.shape[1], size=size, columns=sum(factors) // 2,
        rounds=0 if cache.rotations is None else cache.rotations.shape[2], num_factors=len(factors),
        num_buckets=0 if cache.newest is None else cache.newest.shape[-1], window=min(cache.window, capacity),
        local_window=min(local_window, MAX_POSITIONS), capacity=capacity, bfloat16=DTYPES[cache.keys.dtype],
        threads=torch.get_num_threads(), scale=scale, share=cache.share,
    )  # fmt: skip
    params.tensors = indices, factor_array
    return params


@torch.compiler.disable  # graphs cannot contain addresses
def decode_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, vectors: torch.Tensor | None, indices: torch.Tensor,
    cache: CacheTensors, local_window: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Write new tokens to the cache and compute their attention, like `cache_layers` and `gather_attention`.

    Args:
        query, key, value: (B, H, T, D), with query and key rotated by position.
        vectors: (B, H, T, D), the vectors to hash; None in local layers.
        indices: (B, T) int64, the tokens' indices in their sequences, or -1 for padding, whose output is 0.
        local_window: number of last tokens, including itself, that a token attends to whatever their buckets.
        scale: factor of the scores.

    Returns:
        (B, H, T, D) in value's dtype.
    """
    batch, heads, length, size = query.shape
    check_fits(cache, query, indices)
    rows = readable(query, key, value, vectors, dtype=cache.keys.dtype)
    out = query.new_empty(batch, heads, length, size, dtype=torch.float32)
    params = _decode_params(cache, indices, local_window, scale)
    params.query, params.key, params.value, params.vectors = map(strided, rows)
    params.out = out.data_ptr()
    current_library().hf_decode_attention(byref(params))
    return out.to(value.dtype)


def decode_layers(x1: torch.Tensor, x2: torch.Tensor, layers: list[DecodeLayer]) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one new token of every sequence through whole layers, using and updating their caches.

    Args:
        x1, x2: residual streams, (B, 1, D), float64 or float32.

    Returns:
        The streams after the layers.
    """
    x1, x2 = (x.clone(memory_format=torch.contiguous_format) for x in (x1, x2))  # kernels add to them in place
    stack, kept = (LayerParams * len(layers))(), []
    for params, layer in zip(stack, layers, strict=True):
        attention = _decode_params(layer.cache, layer.indices, layer.local_window, layer.scale)
        cosines, sines = [x.contiguous() for x in layer.rotary] if layer.rotary else (None, None)
        kept += [attention, cosines, sines]
        for name, weight in layer.weights.items():
            setattr(params, name, pointer(weight))
        params.cosines, params.sines = pointer(cosines), pointer(sines)
        params.rotary_rows, params.turned_heads = 0 if cosines is None else cosines.shape[0], layer.turned_heads
        params.attention, params.x1, params.x2 = ctypes.addressof(attention), x1.data_ptr(), x2.data_ptr()
        params.hidden, params.feed_forward = x1.shape[-1], layer.weights["up_bias"].numel()
        params.gelu, params.float64, params.epsilon = layer.gelu, x1.dtype == torch.float64, layer.epsilon
    current_library().hf_decode_layers(byref(StackParams(ctypes.addressof(stack), len(layers))))
    return x1, x2
