"""The Triton kernels as torch ops, and those of generation. Triton is imported on the first call."""

import torch

from ..attention_op import AttentionArgs, register_attention
from ..contract import CacheTensors, check_fits


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


def decode_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, vectors: torch.Tensor | None, indices: torch.Tensor,
    cache: CacheTensors, local_window: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Write new tokens to the cache and attend from each, as `reformer_kernels.cpu.decode_attention` does.

    The device is not waited for. Not for a trace, which would not see what is written.
    """
    from .decode_launch import run_decode_attention

    check_fits(cache, query, indices)
    capacity = cache.keys.shape[2]
    # A ring holds the windows of so many tokens at once; what is kept by buckets is no ring.
    piece = query.shape[2] if cache.newest is not None else capacity - min(local_window, capacity) + 1
    parts = []
    with torch.cuda.device_of(query):
        for first in range(0, query.shape[2], piece):
            own = slice(first, first + piece)
            some_query, some_key, some_value = (x[:, :, own] for x in (query, key, value))
            hashed = None if vectors is None else vectors[:, :, own]
            inputs = some_query, some_key, some_value, hashed, indices[:, own]
            parts.append(run_decode_attention(*inputs, cache, local_window, scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
