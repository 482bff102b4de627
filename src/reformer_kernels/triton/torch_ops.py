"""The op as torch sees it: `hf_reformer::triton_attention`, with rules for tracing and for autograd."""

import torch

from hf_reformer.ops.layout import AttentionLayout

from .launch import empty_rows, prepare, run_backward, run_forward, run_received

_TENSORS = (
    "Tensor query, Tensor? key, Tensor value, Tensor line, Tensor lo, Tensor hi, Tensor? mask, Tensor? dropout_key"
)
_NUMBERS = "SymInt tile, SymInt before, SymInt after, bool dedup_pairs, bool causal, float dropout"
_TENSOR_COUNT, _NUMBER_COUNT = (len(text.split(",")) for text in (_TENSORS, _NUMBERS))


@torch.library.custom_op(
    "hf_reformer::triton_attention", mutates_args=(), schema=f"({_TENSORS}, {_NUMBERS}) -> (Tensor, Tensor, Tensor)"
)
def triton_attention(*inputs):
    """Output (B, H, T, D), and the maximum and the sum of every token's scores (B, H, T), float32, for backward.

    Query, key (or None) and value: (B, H, T, D) of one dtype; orders and mask as `hashing.AttentionLayout` and
    `attention_ops.windowed_attention` have them; dropout_key: () int32, None if and only if dropout is 0.
    """
    with torch.cuda.device_of(inputs[0]):
        return run_forward(prepare(*inputs))


@triton_attention.register_fake
def _(query, key, value, *_):
    out = empty_rows(value.shape, value.dtype, value.device)
    return out, *(torch.empty(query.shape[:3], dtype=torch.float32, device=value.device) for _ in range(2))


@torch.library.custom_op(
    "hf_reformer::triton_attention_backward",
    mutates_args=(),
    schema=f"(Tensor out, Tensor top, Tensor mass, Tensor grad, {_TENSORS}, {_NUMBERS}) -> Tensor[]",
)
def triton_attention_backward(out, top, mass, grad, *inputs):
    """Gradients of query, value and, unless it is None, key. It has no autograd rule: a second derivative raises."""
    with torch.cuda.device_of(out):
        return run_backward(prepare(*inputs), out, top, mass, grad)


@triton_attention_backward.register_fake
def _(out, top, mass, grad, query, key, value, *_):
    return [empty_rows(x.shape, x.dtype, x.device) for x in (query, value, key) if x is not None]


def _setup_context(ctx, inputs, output):
    tensors, ctx.numbers = inputs[:_TENSOR_COUNT], inputs[_TENSOR_COUNT:]
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    out, top, mass, *tensors = ctx.saved_tensors
    dq, dv, *dk = triton_attention_backward(out, top, mass, grad, *tensors, *ctx.numbers)
    return dq, dk[0] if dk else None, dv, *(None,) * (_TENSOR_COUNT - 3 + _NUMBER_COUNT)


triton_attention.register_autograd(_backward, setup_context=_setup_context)


def attend(
    query, key, value, orders: AttentionLayout, causal: bool, mask, dropout: float, dropout_key
) -> torch.Tensor:
    """`kernels.triton.windowed_attention`; inputs of several dtypes are computed in float32."""
    dtype = value.dtype
    if any(x is not None and x.dtype != dtype for x in (query, key)):
        query, key, value = (None if x is None else x.float() for x in (query, key, value))
    out, _, _ = triton_attention(
        query, key, value, *orders[:3], mask, dropout_key, *orders[3:], causal, float(dropout)
    )
    return out.to(dtype)


# The same, and what every token receives. An op of its own, so that nothing is added to graphs without it.


@torch.library.custom_op(
    "hf_reformer::triton_attention_received",
    mutates_args=(),
    schema=f"({_TENSORS}, {_NUMBERS}, Tensor paid, Tensor? known) -> (Tensor, Tensor, Tensor, Tensor)",
)
def triton_attention_received(*inputs):
    """Beside what `triton_attention` gives: (B, T) float32, by the shares `paid` (B, T) float32 of the queries.

    `known` is that result, where it was computed before.
    """
    *attention, paid, known = inputs
    with torch.cuda.device_of(paid):
        call = prepare(*attention)
        out, top, mass = run_forward(call)
        return out, top, mass, run_received(call, top, mass, paid) if known is None else known.clone()


@triton_attention_received.register_fake
def _(query, key, value, *_):
    sums = [torch.empty(query.shape[:3], dtype=torch.float32, device=value.device) for _ in range(2)]
    received = sums[0].new_empty(query.shape[0], query.shape[2])
    return empty_rows(value.shape, value.dtype, value.device), *sums, received


@torch.library.custom_op(
    "hf_reformer::triton_attention_received_backward",
    mutates_args=(),
    schema="(Tensor out, Tensor top, Tensor mass, Tensor grad, Tensor paid, Tensor push, "
    f"{_TENSORS}, {_NUMBERS}) -> Tensor[]",
)
def triton_attention_received_backward(out, top, mass, grad, paid, push, *inputs):
    """Gradients of query, value and, unless it is None, key; `push` is that of what is received."""
    with torch.cuda.device_of(out):
        return run_backward(prepare(*inputs), out, top, mass, grad, paid, push)


@triton_attention_received_backward.register_fake
def _(out, top, mass, grad, paid, push, query, key, value, *_):
    return [empty_rows(x.shape, x.dtype, x.device) for x in (query, value, key) if x is not None]


def _save_received(ctx, inputs, output):
    tensors, ctx.numbers, paid = inputs[:_TENSOR_COUNT], inputs[_TENSOR_COUNT:-2], inputs[-2]
    ctx.save_for_backward(*output[:3], paid, *tensors)
    ctx.mark_non_differentiable(*output[1:3])
    ctx.set_materialize_grads(False)


def _backward_received(ctx, grad, _top, _mass, push):
    none = (None,) * (_TENSOR_COUNT - 3 + _NUMBER_COUNT + 2)
    if grad is None and push is None:
        return None, None, None, *none
    out, top, mass, paid, *tensors = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    if push is None:
        dq, dv, *dk = triton_attention_backward(out, top, mass, grad, *tensors, *ctx.numbers)
    else:
        found = triton_attention_received_backward(out, top, mass, grad, paid, push, *tensors, *ctx.numbers)
        dq, dv, *dk = found
    return dq, dk[0] if dk else None, dv, *none


triton_attention_received.register_autograd(_backward_received, setup_context=_save_received)


def attend_received(
    query, key, value, orders: AttentionLayout, paid, known, causal: bool, mask, dropout: float, dropout_key
) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.triton.attention_received`; inputs of several dtypes are computed in float32."""
    dtype = value.dtype
    if any(x is not None and x.dtype != dtype for x in (query, key)):
        query, key, value = (None if x is None else x.float() for x in (query, key, value))
    out, _, _, received = triton_attention_received(
        query, key, value, *orders[:3], mask, dropout_key, *orders[3:], causal, float(dropout), paid, known
    )
    return out.to(dtype), received
