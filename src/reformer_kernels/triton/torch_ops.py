"""The Triton kernels as torch ops, and the functions for generation. Triton is imported at the first call."""

import torch

from ..attention_op import AttentionArgs, register_attention
from ..contract import CacheTensors, check_fits


def compute_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Return the dtype of the tensors, float32 if they differ."""
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
    share: float,
) -> torch.Tensor:  # fmt: skip
    """Compute buckets, (B, H, R, T) int32, like `lsh.lsh_buckets`, except that near-ties may differ.

    The arguments after `centered` are the fields of `lsh.Centering`.

    Raises:
        ValueError: rotations do not match the factors.
    """
    from .hash_launch import run_hashing

    if rotations.shape[-1] != sum(factors) // 2:
        raise ValueError(f"Rotations of {rotations.shape[-1]} columns don't fit bucket factors {factors}.")
    with torch.cuda.device_of(vectors):
        return run_hashing(vectors, rotations, factors, centered, causal, mask, samples, sums, counts, share)


@lsh_buckets.register_fake
def _(vectors, rotations, factors, centered, causal, mask, samples, sums, counts, share):
    batch, heads, length = vectors.shape[:3]
    return vectors.new_empty(batch, heads, rotations.shape[2], length, dtype=torch.int32)


def decode_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, vectors: torch.Tensor | None, indices: torch.Tensor,
    cache: CacheTensors, local_window: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Write new tokens to the cache and compute their attention, like `reformer_kernels.cpu.decode_attention`.

    Does not synchronize. Must not be traced, since a trace would miss the writes.
    """
    from .decode_launch import run_decode_attention

    check_fits(cache, query, indices)
    capacity = cache.keys.shape[2]
    # A ring buffer holds the windows of this many tokens at once; LSH layers have no ring buffer.
    piece = query.shape[2] if cache.newest is not None else capacity - min(local_window, capacity) + 1
    parts = []
    with torch.cuda.device_of(query):
        for first in range(0, query.shape[2], piece):
            own = slice(first, first + piece)
            q, k, v = (x[:, :, own] for x in (query, key, value))
            hashed = None if vectors is None else vectors[:, :, own]
            parts.append(run_decode_attention(q, k, v, hashed, indices[:, own], cache, local_window, scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
