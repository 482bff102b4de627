"""The GPU backend of ordered attention: Triton kernels, a launch for every round.

Triton is imported on the first call, so this package can be imported where Triton is missing; ask `unsupported_reason` first.
"""

import importlib.util
import os

import torch

from hf_reformer.ops.layout import AttentionLayout

from ..contract import check_places

MAX_HEAD_SIZE = 128
MIN_CAPABILITY = (8, 0)  # compute capability; the tiles are chosen for its shared memory and its bfloat16 products
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unsupported_reason(*tensors: torch.Tensor) -> str | None:
    """Why this backend cannot serve query, value and perhaps key, (B, H, T, D), or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    for x in tensors:
        if x.dtype not in _DTYPES:
            return f"it knows float32, bfloat16 and float16, not {x.dtype}"
        if not 0 < x.shape[-1] <= MAX_HEAD_SIZE:
            return f"head sizes must be 1 to {MAX_HEAD_SIZE}, not {x.shape[-1]}"
    if torch._C._functorch.maybe_current_level() is not None:
        return "it has no rule for torch.func transforms"
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


def windowed_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    orders: AttentionLayout,
    *,
    causal: bool,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    dropout_key: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attention_ops.windowed_attention` on a GPU; see there. Accumulates in float32.

    Args:
        query, key, value: (B, H, T, D) that `unsupported_reason` has nothing against; value's D may differ from the others'.
            Inputs of several dtypes are computed in float32.

    Returns:
        (B, H, T, D) in value's dtype.

    Raises:
        ValueError: a line of more places than `kernels.MAX_PLACES`.
    """
    check_places(orders)
    from .torch_ops import attend

    return attend(query, key, value, orders, causal, mask, dropout, dropout_key)


def attention_received(
    query, key, value, orders, paid, known=None, *, causal, mask=None, dropout=0.0, dropout_key=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`received_attention.attention_received` on a GPU; see there."""
    check_places(orders)
    from .torch_ops import attend_received

    return attend_received(query, key, value, orders, paid, known, causal, mask, dropout, dropout_key)
