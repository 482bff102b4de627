"""The CPU backend: C++ kernels, compiled at first use, called through ctypes and registered as torch ops."""

import torch

from ..attention_op import AttentionArgs
from ..contract import CacheTensors
from . import bindings
from .bindings import attention, lsh_buckets, normal_rows, rotate, sort_by_bucket
from .decode import DecodeLayer, decode_attention, decode_layers
from .library import choose_library, current_variant

__all__ = [
    "DECODED_DTYPES", "AttentionArgs", "CacheTensors", "DecodeLayer", "attention", "bindings", "choose_library",
    "current_variant", "decode_attention", "decode_layers", "lsh_buckets", "normal_rows", "rotate", "sort_by_bucket",
    "unsupported_reason",
]  # fmt: skip

DECODED_DTYPES = tuple(bindings.DTYPES)  # cache dtypes that `decode_attention` supports


def unsupported_reason(*tensors: torch.Tensor) -> str | None:
    """Return why tensors like these, (B, H, T, D), are not supported, or None. Integers only need to be on a CPU."""
    for x in tensors:
        if x.device.type != "cpu":
            return f"it runs on a CPU, not on {x.device.type}"
        if x.is_floating_point() and x.dtype not in (*bindings.DTYPES, torch.float16):
            return f"it knows float32, bfloat16 and float16, not {x.dtype}"
        if x.is_floating_point() and x.shape[-1] % 8:
            return f"head sizes must be multiples of 8, not {x.shape[-1]}"
    return None
