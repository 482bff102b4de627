"""Registration of the attention op with torch: schema, fake kernels and autograd formulas shared by all backends."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch


class AttentionArgs(NamedTuple):
    """The inputs of the op, see `hf_reformer.ops.dispatch.windowed_attention` and `layout.AttentionLayout`.

    key: None for shared query/key attention. dropout_key: None for no dropout. query_weights: None if the attention
    mass is not needed.
    """

    query: torch.Tensor
    key: torch.Tensor | None
    value: torch.Tensor
    perm: torch.Tensor
    window_start: torch.Tensor
    window_end: torch.Tensor
    mask: torch.Tensor | None
    dropout_key: torch.Tensor | None
    query_weights: torch.Tensor | None
    block_size: int
    left_reach: int
    right_reach: int
    dedup_pairs: bool
    causal: bool
    dropout: float
    scale: float


_TYPES = {torch.Tensor: "Tensor", torch.Tensor | None: "Tensor?", int: "SymInt", bool: "bool", float: "float"}
_INPUTS = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in AttentionArgs.__annotations__.items())
_NUM_TENSORS = AttentionArgs._fields.index("block_size")


def empty_rows(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Allocate an uninitialized tensor with the shape of `like`, (B, H, T, D), laid out as (B, T, H, D)."""
    batch, heads, length, size = like.shape
    return like.new_empty(batch, length, heads, size, dtype=dtype).transpose(1, 2)


def register_attention(
    backend: str, forward: Callable[..., Any], backward: Callable[..., Any], dtype_of: Callable[..., torch.dtype],
    device_types: str | Sequence[str] | None = None,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:  # fmt: skip
    """Register `reformer_kernels::<backend>_attention` and its backward.

    Args:
        forward: takes the fields of `AttentionArgs`; returns the output, (B, H, T, D), the maximum and sum of every
            row's softmax, (B, H, T) float32, and the attention mass, (B, T) float32, or an empty tensor without
            `query_weights`. On a CPU the sum is NaN in rows whose tiles contain NaN or infinity.
        backward: takes the output, row maxima and sums, the gradients of output and mass (or None), and then the same
            as `forward`; returns the gradients of query, value and, unless it is None, key.
        dtype_of: takes query, key and value; returns the dtype of outputs and gradients.
    """
    name = f"reformer_kernels::{backend}_attention"
    op = torch.library.custom_op(
        name, forward, mutates_args=(), device_types=device_types,
        schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    )  # fmt: skip
    backward_op = torch.library.custom_op(
        f"{name}_backward", backward, mutates_args=(), device_types=device_types,
        schema=f"(Tensor out, Tensor row_max, Tensor row_sum, Tensor grad_out, Tensor? grad_mass, {_INPUTS})"
        " -> Tensor[]",
    )  # fmt: skip

    @op.register_fake
    def _(*inputs):
        query, key, value, *_ = args = AttentionArgs(*inputs)
        rows = query.new_empty(query.shape[:3], dtype=torch.float32)
        mass = rows.new_empty(0 if args.query_weights is None else (query.shape[0], query.shape[2]))
        return empty_rows(value, dtype_of(query, key, value)), rows, torch.empty_like(rows), mass

    @backward_op.register_fake
    def _(out, row_max, row_sum, grad_out, grad_mass, query, key, value, *_):
        return [empty_rows(x, dtype_of(query, key, value)) for x in (query, value, key) if x is not None]

    def setup_context(ctx, inputs, output):
        tensors, ctx.numbers = inputs[:_NUM_TENSORS], inputs[_NUM_TENSORS:]
        *saved, mass = output
        ctx.save_for_backward(*saved, *tensors)
        ctx.mark_non_differentiable(*saved[1:], *([] if mass.numel() else [mass]))
        ctx.set_materialize_grads(False)

    def differentiate(ctx, grad_out, _row_max, _row_sum, grad_mass):
        unused = (None,) * (len(AttentionArgs._fields) - 3)
        if grad_out is None and grad_mass is None:
            return None, None, None, *unused
        out, row_max, row_sum, *tensors = ctx.saved_tensors
        query, key, value = tensors[:3]
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        grad_query, grad_value, *grad_key = backward_op(
            out, row_max, row_sum, grad_out, grad_mass, *tensors, *ctx.numbers
        )
        return (
            grad_query.to(query.dtype), grad_key[0].to(key.dtype) if grad_key else None, grad_value.to(value.dtype),
            *unused,
        )  # fmt: skip

    op.register_autograd(differentiate, setup_context=setup_context)
    return op
