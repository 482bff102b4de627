"""How much attention every token receives, together with attention itself: exact, and differentiable.

What token j receives is the sum over heads and queries i of P[i, j] * paid[i], where P are the weights before dropout.
A weight's gradient then has a further term, paid[i] * push[j], where `push` is the gradient of what is received. So
every backend gives both by what it does anyway: sums over weights that it computes again from each row's maximum and
sum.
"""

from functools import partial

import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from .layout import AttentionLayout
from .reference import attention_with_weights
from .tiled_attention import TiledAttention, checked_rule, tiled_gradients, tiled_received

MAX_SCORES = 2**24


def received_by_definition(query, key, value, orders, paid, known=None, **how) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_received` by the dense reference, plain autograd."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = (None if x is None else x.to(torch.promote_types(x.dtype, dtype)) for x in (query, key, value))
        out, weights = attention_with_weights(q, k, v, orders, **how)
        return out.to(value.dtype), received_from(weights, paid)


def received_from(weights: torch.Tensor, paid: torch.Tensor) -> torch.Tensor:
    """Weights (B, H, N, S) and shares (B, N) of the queries → what every key receives, (B, S)."""
    return torch.einsum("bhns,bn->bs", weights, paid.to(weights.dtype))


class _TiledReceived(torch.autograd.Function):
    """The pure-PyTorch backend: attention, and sums over the same tiles."""

    @staticmethod
    def forward(query, key, value, orders, mask, dropout_key, rule, paid, known):
        out, top, mass = TiledAttention.forward(query, key, value, orders, mask, dropout_key, rule)
        if known is None:
            known = tiled_received(query, key, orders, mask, rule, top, mass, paid)
        return out, known.clone(), top, mass

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, orders, mask, dropout_key, ctx.rule, paid, _ = inputs
        ctx.orders, tensors = orders[3:], orders[:3]
        out, _, *sums = output
        ctx.mark_non_differentiable(*sums)
        ctx.save_for_backward(query, key, value, mask, dropout_key, paid, *tensors, out, *sums)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, push, *_):
        query, key, value, mask, dropout_key, paid, line, lo, hi, out, top, mass = ctx.saved_tensors
        if grad is None and push is None:
            return (None,) * 9
        grad = torch.zeros_like(out) if grad is None else grad
        call = AttentionLayout(line, lo, hi, *ctx.orders), mask, dropout_key, ctx.rule
        return *tiled_gradients(query, key, value, *call, out, top, mass, grad, paid, push), *(None,) * 6


def _by_tiles(query, key, value, orders, paid, known=None, *, causal, mask, dropout, dropout_key):
    key, rule = checked_rule(query, key, causal, dropout)
    out, received, *_ = _TiledReceived.apply(query, key, value, orders, mask, dropout_key, rule, paid, known)
    return out, received


BACKENDS = {"torch": _by_tiles, "reference": received_by_definition}


def exact_received(
    query: torch.Tensor,
    key: torch.Tensor,
    paid: torch.Tensor,
    allowed: torch.Tensor | None,
    causal: bool = False,
    scale: float = 1.0,
) -> torch.Tensor:
    """What every key receives where each query attends to all keys it may see: full layers, cross-attention.

    A few queries at a time, whose weights are computed again in backward: memory grows with the longer of the two.

    Args:
        query: (B, H, T, D); key: (B, H, S, D); paid: (B, T), 0 for padding.
        allowed: bool, broadcast to (B, 1, T, S); None: all, or with `causal` those up to the query's own place.

    Returns:
        (B, S) in at least float32.
    """
    batch, heads, length, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    if allowed is None and causal:
        places = torch.arange(max(length, key.shape[2]), device=query.device)
        allowed = (places[:length, None] >= places[: key.shape[2]])[None, None]
    with torch.autocast(query.device.type, enabled=False):
        query, key = query.to(dtype) * scale, key.to(dtype)
        total = query.new_zeros(batch, key.shape[2])
        size = length if torch.compiler.is_compiling() else max(1, MAX_SCORES // (batch * heads * key.shape[2]))
        for first in range(0, length, size):
            own = slice(first, first + size)
            seen = allowed if allowed is None or allowed.shape[2] == 1 else allowed[:, :, own]
            run = partial(_received_of_some, seen=seen, paid=paid[:, own].to(dtype))
            again = size < length and torch.is_grad_enabled()
            args = query[:, :, own], key
            total = total + (checkpoint(run, *args, use_reentrant=False) if again else run(*args))
    return total


def _received_of_some(query, key, seen, paid) -> torch.Tensor:
    scores = query @ key.transpose(-1, -2)
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return received_from(scores.softmax(-1), paid)
