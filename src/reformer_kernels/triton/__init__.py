"""The GPU backend: Triton kernels, launched once per round.

It can be imported without Triton; call `unsupported_reason` before the first call.
"""

import importlib.util
import os

import torch

from ..attention_op import AttentionArgs
from ..contract import CacheTensors
from .torch_ops import attention, compute_dtype, decode_attention, lsh_buckets
from .verdicts import Subject, Verdict, fault, judge

__all__ = [
    "DECODED_DTYPES", "AttentionArgs", "CacheTensors", "Subject", "Verdict", "attention", "compute_dtype",
    "decode_attention", "fault", "judge", "lsh_buckets", "unsupported_reason",
]  # fmt: skip

MAX_HEAD_SIZE = 128
MIN_CAPABILITY = (8, 0)  # compute capability; the tiles are chosen for its shared memory and its bfloat16 products
DECODED_DTYPES = _DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported_reason(*tensors: torch.Tensor) -> str | None:
    """Return why tensors like these, (B, H, T, D), are not supported, or None. Integers only need to be on a GPU."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    for x in tensors:
        if x.is_floating_point() and x.dtype not in _DTYPES:
            return f"it knows float32, bfloat16 and float16, not {x.dtype}"
        if x.is_floating_point() and not 0 < x.shape[-1] <= MAX_HEAD_SIZE:
            return f"head sizes must be 1 to {MAX_HEAD_SIZE}, not {x.shape[-1]}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    device = tensors[0].device
    if device.type != "cuda":
        return f"it runs on a CUDA GPU, not on {device.type}"
    if torch.version.hip is not None:
        return "its kernels are compiled for NVIDIA GPUs alone, and this is an AMD GPU"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 or newer"
    return None
