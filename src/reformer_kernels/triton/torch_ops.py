"""The Triton kernels as a torch op. Triton is imported on the first call."""

import torch

from ..attention_op import AttentionArgs, register_attention


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """The dtype of the tensors, float32 if they have several."""
    dtypes = {x.dtype for x in tensors if x is not None}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _forward(*inputs):
    from .launch import prepare, run_forward

    args = AttentionArgs(*inputs)
    with torch.cuda.device_of(args.query):
        return run_forward(prepare(args))


def _backward(out, row_max, row_sum, grad_out, grad_mass, *inputs):
    from .launch import prepare, run_backward

    args = AttentionArgs(*inputs)
    with torch.cuda.device_of(out):
        return run_backward(prepare(args), out, row_max, row_sum, grad_out, grad_mass)


attention = register_attention("triton", _forward, _backward, compute_dtype)
