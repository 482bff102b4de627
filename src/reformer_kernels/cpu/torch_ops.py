"""The C++ kernels as torch ops on a CPU: hashing, sorting, and attention with its gradients."""

import torch

from ..attention_op import AttentionArgs, register_attention
from . import bindings
from .library import current_library


def _forward(*inputs):
    return bindings.forward(AttentionArgs(*inputs), current_library())


def _backward(out, row_max, row_sum, grad_out, grad_mass, *inputs):
    return bindings.backward(out, row_max, row_sum, grad_out, grad_mass, AttentionArgs(*inputs), current_library())


attention = register_attention("cpu", _forward, _backward, lambda *_: torch.float32, device_types="cpu")


@torch.library.custom_op("reformer_kernels::cpu_lsh_buckets", mutates_args=(), device_types="cpu")
def lsh_buckets(vectors: torch.Tensor, rotations: torch.Tensor, factors: list[int]) -> torch.Tensor:
    return bindings.lsh_buckets(vectors, rotations, factors, current_library())


@lsh_buckets.register_fake
def _(vectors, rotations, factors):
    batch, heads, length = vectors.shape[:3]
    return vectors.new_empty(batch, heads, rotations.shape[2], length, dtype=torch.int32)


@torch.library.custom_op("reformer_kernels::cpu_normal_rows", mutates_args=(), device_types="cpu")
def normal_rows(keys: torch.Tensor, count: int) -> torch.Tensor:
    return bindings.normal_rows(keys, count, current_library())


@normal_rows.register_fake
def _(keys, count):
    return keys.new_empty(keys.shape[0], count, dtype=torch.float32)


@torch.library.custom_op("reformer_kernels::cpu_sort_by_bucket", mutates_args=(), device_types="cpu")
def sort_by_bucket(
    buckets: torch.Tensor, mask: torch.Tensor | None, num_buckets: int | None, left_reach: int, right_reach: int,
    outputs: int,
) -> list[torch.Tensor]:  # fmt: skip
    return bindings.sort_by_bucket(buckets, mask, num_buckets, left_reach, right_reach, outputs, current_library())


@sort_by_bucket.register_fake
def _(buckets, mask, num_buckets, left_reach, right_reach, outputs):
    return [buckets.new_empty(buckets.shape, dtype=torch.int32) for _ in range(outputs)]
