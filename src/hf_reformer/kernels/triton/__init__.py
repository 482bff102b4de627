"""The GPU backend of ordered attention: Triton kernels for one round of one line at a time.

Triton is imported on the first call, so this package can be imported where Triton is missing; ask `why_not` first.
"""

import importlib.util
import os

import torch

from ...hashing import Orders

LARGEST_HEAD = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_DEVICE = (8, 0)  # compute capability; the tiles are chosen for its shared memory and its bfloat16 products

__all__ = ["ordered_attention", "why_not"]


def why_not(query: torch.Tensor, value: torch.Tensor) -> str | None:
    """A sentence that says why the kernels cannot serve these tensors (B, H, T, D), or None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed."
    for name, x in (("query", query), ("value", value)):
        if x.dtype not in DTYPES:
            return f"The Triton kernels compute in float32, bfloat16 and float16, and {name} is {x.dtype}."
        if not 0 < x.shape[-1] <= LARGEST_HEAD:
            return f"The Triton kernels take head sizes from 1 to {LARGEST_HEAD}, and {name}'s is {x.shape[-1]}."
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if query.device.type != "cuda":
        return f"The Triton kernels run on a CUDA GPU, and the tensors are on {query.device.type}."
    if torch.version.hip is not None:
        return "The Triton kernels have been compiled for NVIDIA GPUs alone, and this is an AMD GPU."
    if torch.cuda.get_device_capability(query.device) < OLDEST_DEVICE:
        return "The Triton kernels need a GPU of compute capability 8.0 or newer."
    return None


def ordered_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    orders: Orders,
    *,
    causal: bool,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    dropout_key: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attention_ops.ordered_attention` on tensors that `why_not` has nothing against: (B, H, T, D) → (B, H, T, D)."""
    from .operator import attend

    return attend(query, key, value, orders, causal, mask, dropout, dropout_key)
