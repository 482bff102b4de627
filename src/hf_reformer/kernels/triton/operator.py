"""The op as torch sees it: `hf_reformer::triton_attention`, with rules for tracing and for autograd."""

import torch

from ...hashing import Orders
from .launch import empty_rows, run_backward, run_forward


@torch.library.custom_op("hf_reformer::triton_attention", mutates_args=())
def triton_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    line: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_key: torch.Tensor | None,
    tile: int,
    before: int,
    after: int,
    count_once: bool,
    causal: bool,
    dropout: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D), and the maximum and the sum of every token's scores (B, H, T), float32, for backward."""
    orders = Orders(line, lo, hi, tile, before, after, count_once)
    return run_forward(query, key, value, orders, mask, dropout_key, causal, dropout)


@triton_attention.register_fake
def _(query, key, value, *_):
    out = empty_rows((*query.shape[:3], value.shape[-1]), value.dtype, value.device)
    return out, *(torch.empty(query.shape[:3], dtype=torch.float32, device=value.device) for _ in range(2))


@torch.library.custom_op("hf_reformer::triton_attention_backward", mutates_args=())
def triton_attention_backward(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    line: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_key: torch.Tensor | None,
    out: torch.Tensor,
    top: torch.Tensor,
    mass: torch.Tensor,
    grad: torch.Tensor,
    tile: int,
    before: int,
    after: int,
    count_once: bool,
    causal: bool,
    dropout: float,
) -> list[torch.Tensor]:
    """Gradients of query, value and, unless it is None, key. It has no autograd rule: a second derivative raises."""
    orders = Orders(line, lo, hi, tile, before, after, count_once)
    dq, dk, dv = run_backward(query, key, value, orders, mask, dropout_key, causal, dropout, out, top, mass, grad)
    return [dq, dv] if dk is None else [dq, dv, dk]


@triton_attention_backward.register_fake
def _(query, key, value, *_):
    inputs = [query, value] if key is None else [query, value, key]
    return [empty_rows(x.shape, x.dtype, x.device) for x in inputs]


def _setup_context(ctx, inputs, output):
    tensors, ctx.numbers = inputs[:8], inputs[8:]
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad, *_):
    dq, dv, *dk = triton_attention_backward(*ctx.saved_tensors, grad, *ctx.numbers)
    return dq, dk[0] if dk else None, dv, *(None,) * 11


triton_attention.register_autograd(_backward, setup_context=_setup_context)


def attend(query, key, value, orders, causal, mask, dropout, dropout_key) -> torch.Tensor:
    """`kernels.triton.ordered_attention`; inputs of several dtypes are computed in the widest."""
    if dropout_key is None or dropout == 0:
        dropout, dropout_key = 0.0, None
    dtype, wide = value.dtype, torch.promote_types(query.dtype, value.dtype)
    query, value = query.to(wide), value.to(wide)
    key = None if key is None else key.to(wide)
    out, _, _ = triton_attention(
        query, key, value, *orders[:3], mask, dropout_key, *orders[3:], causal, float(dropout)
    )
    return out.to(dtype)
