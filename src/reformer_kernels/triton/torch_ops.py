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


@torch.library.custom_op("reformer_kernels::triton_lsh_buckets", mutates_args=())
def lsh_buckets(
    vectors: torch.Tensor, rotations: torch.Tensor, factors: list[int], centered: bool, causal: bool,
    mask: torch.Tensor | None, samples: torch.Tensor | None, sums: torch.Tensor | None, counts: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Buckets (B, H, R, T) int32, as `lsh.lsh_buckets`; near-ties may fall differently.

    What follows `centered` are the fields of `lsh.Centering`.

    Raises:
        ValueError: rotations and factors contradict each other.
    """
    from .hash_launch import run_hashing

    if rotations.shape[-1] != sum(factors) // 2:
        raise ValueError(f"Rotations of {rotations.shape[-1]} columns don't fit bucket factors {factors}.")
    with torch.cuda.device_of(vectors):
        return run_hashing(vectors, rotations, factors, centered, causal, mask, samples, sums, counts)


@lsh_buckets.register_fake
def _(vectors, rotations, factors, centered, causal, mask, samples, sums, counts):
    batch, heads, length = vectors.shape[:3]
    return vectors.new_empty(batch, heads, rotations.shape[2], length, dtype=torch.int32)
