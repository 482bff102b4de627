"""The fused C++ kernels as torch ops: hashing, sorting, and ordered attention with its gradients, on a CPU."""

import ctypes
import functools
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from hf_reformer.ops.kernel_check import agrees
from hf_reformer.ops.layout import AttentionLayout, reach
from hf_reformer.ops.lsh import bucket_factors

from ..contract import check_places
from . import build
from .bindings import DTYPES, Call, backward, forward, new_rows, received, run_hashing, run_normals, run_sorting
from .decode import run_layers, run_step

logger = logging.getLogger(__name__)

# --- which library, and whether it may be trusted


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The best variant that compiles and agrees with the definition, or why there is none."""
    for variant in build.supported_variants():
        try:
            library = build.load_library(variant)
        except build.KernelBuildError as error:
            return str(error)
        with ThreadPoolExecutor(1) as fresh:  # a thread of its own knows nothing of the caller's grad mode or autocast
            if fresh.submit(agrees, library).result():
                return library
        logger.warning(
            "The %s attention kernel disagrees with its definition here and is not used. Please report this, with the "
            "processor's name.", variant
        )  # fmt: skip
    return "no compiled kernel agrees with its definition here"


def variant() -> str | None:
    """The compiled variant in use, or None."""
    library = _library()
    return None if isinstance(library, str) else Path(library._name).name.split("-")[1]


def unsupported_reason(*tensors: torch.Tensor) -> str | None:
    """Why this backend cannot serve query, value and perhaps key, (B, H, T, D), or None."""
    for x in tensors:
        if x.device.type != "cpu":
            return f"it runs on a CPU, not on {x.device.type}"
        if x.dtype not in (*DTYPES, torch.float16):
            return f"it knows float32, bfloat16 and float16, not {x.dtype}"
        if x.shape[-1] % 8:
            return f"head sizes must be multiples of 8, not {x.shape[-1]}"
    if torch._C._functorch.maybe_current_level() is not None:
        return "it has no rule for torch.func transforms"
    return _fault()


@torch.compiler.assume_constant_result
def _fault() -> str | None:
    """Why the library itself cannot be used, or None; the same all along, so dynamo need not look."""
    library = _library()
    return library if isinstance(library, str) else None


# --- torch ops

_TENSORS = (
    "Tensor query, Tensor? key, Tensor value, Tensor line, Tensor lo, Tensor hi, Tensor? mask, Tensor? dropout_key"
)
_NUMBERS = "SymInt tile, SymInt before, SymInt after, bool dedup_pairs, bool causal, float dropout, float scale"
_TENSOR_COUNT, _NUMBER_COUNT = (len(text.split(",")) for text in (_TENSORS, _NUMBERS))


def _call_of(line, lo, hi, mask, dropout_key, tile, before, after, dedup_pairs, causal, dropout, scale) -> Call:
    return Call(
        AttentionLayout(line, lo, hi, tile, before, after, dedup_pairs), causal, mask, dropout, dropout_key, scale
    )


@torch.library.custom_op(
    "hf_reformer::cpu_attention",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_TENSORS}, {_NUMBERS}) -> (Tensor, Tensor, Tensor)",
)
def _attention(query, key, value, *call):
    return forward(query, key, value, _call_of(*call), _loaded())


@torch.library.custom_op(
    "hf_reformer::cpu_attention_backward",
    mutates_args=(),
    device_types="cpu",
    schema=f"(Tensor out, Tensor top, Tensor mass, Tensor grad, {_TENSORS}, {_NUMBERS}) -> Tensor[]",
)
def _attention_backward(out, top, mass, grad, query, key, value, *call):
    """Gradients of query, value, and key if it is given."""
    found = backward(query, key, value, _call_of(*call), out, top, mass, grad, _loaded())
    of_query, of_key, of_value = found
    return [of_query, of_value] if of_key is None else [of_query, of_value, of_key]


@_attention.register_fake
def _(query, key, value, *_):
    rows = query.new_empty(query.shape[:3], dtype=torch.float32)
    return new_rows(value), rows, torch.empty_like(rows)


@_attention_backward.register_fake
def _(out, top, mass, grad, query, key, value, *_):
    return [new_rows(x) for x in (query, value, key) if x is not None]


def _save_for_backward(ctx, inputs, output):
    tensors, ctx.numbers = inputs[:_TENSOR_COUNT], inputs[_TENSOR_COUNT:]
    ctx.save_for_backward(*output, *tensors)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    others = (None,) * (_TENSOR_COUNT - 3 + _NUMBER_COUNT)
    if grad is None:
        return None, None, None, *others
    out, top, mass, *tensors = ctx.saved_tensors
    query, key, value = tensors[:3]
    of_query, of_value, *of_key = _attention_backward(out, top, mass, grad, *tensors, *ctx.numbers)
    return of_query.to(query.dtype), of_key[0].to(key.dtype) if of_key else None, of_value.to(value.dtype), *others


_attention.register_autograd(_differentiate, setup_context=_save_for_backward)


# The same, and what every token receives. An op of its own, so that nothing is added to graphs without it.


@torch.library.custom_op(
    "hf_reformer::cpu_attention_received",
    mutates_args=(),
    device_types="cpu",
    schema=f"({_TENSORS}, {_NUMBERS}, Tensor paid, Tensor? known) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _attention_received(query, key, value, *more):
    *numbers, paid, known = more
    call = _call_of(*numbers)
    out, top, mass = forward(query, key, value, call, _loaded())
    found = received(query, key, call, top, mass, paid, _loaded()) if known is None else known.clone()
    return out, top, mass, found


@torch.library.custom_op(
    "hf_reformer::cpu_attention_received_backward",
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor out, Tensor top, Tensor mass, Tensor grad, Tensor paid, Tensor push, "
    f"{_TENSORS}, {_NUMBERS}) -> Tensor[]",
)
def _attention_received_backward(out, top, mass, grad, paid, push, query, key, value, *call):
    found = backward(query, key, value, _call_of(*call), out, top, mass, grad, _loaded(), paid, push)
    return [x for x in (found[0], found[2], found[1]) if x is not None]


@_attention_received.register_fake
def _(query, key, value, *more):
    rows = query.new_empty(query.shape[:3], dtype=torch.float32)
    return new_rows(value), rows, torch.empty_like(rows), rows.new_empty(query.shape[0], query.shape[2])


@_attention_received_backward.register_fake
def _(out, top, mass, grad, paid, push, query, key, value, *_):
    return [new_rows(x) for x in (query, value, key) if x is not None]


def _save_received(ctx, inputs, output):
    tensors, ctx.numbers, paid = inputs[:_TENSOR_COUNT], inputs[_TENSOR_COUNT:-2], inputs[-2]
    ctx.save_for_backward(*output[:3], paid, *tensors)
    ctx.mark_non_differentiable(*output[1:3])
    ctx.set_materialize_grads(False)


def _differentiate_received(ctx, grad, _top, _mass, push):
    others = (None,) * (_TENSOR_COUNT - 3 + _NUMBER_COUNT + 2)
    if grad is None and push is None:
        return None, None, None, *others
    out, top, mass, paid, *tensors = ctx.saved_tensors
    query, key, value = tensors[:3]
    grad = torch.zeros_like(out) if grad is None else grad
    if push is None:
        found = _attention_backward(out, top, mass, grad, *tensors, *ctx.numbers)
    else:
        found = _attention_received_backward(out, top, mass, grad, paid, push, *tensors, *ctx.numbers)
    of_query, of_value, *of_key = found
    return of_query.to(query.dtype), of_key[0].to(key.dtype) if of_key else None, of_value.to(value.dtype), *others


_attention_received.register_autograd(_differentiate_received, setup_context=_save_received)


def _loaded() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f"the compiled CPU kernel cannot be used: {library}")
    return library


def windowed_attention(query, key, value, orders, *, causal, mask=None, dropout=0.0, dropout_key=None, scale=1.0):
    """`attention_ops.windowed_attention` in fused C++; see there. Accumulates in float32.

    Raises:
        ValueError: a line of more places than `kernels.MAX_PLACES`.
    """
    check_places(orders)
    out, *_ = _attention(
        query, key, value, *orders[:3], mask, dropout_key, *orders[3:], causal, float(dropout), float(scale)
    )
    return out.to(value.dtype)


def attention_received(
    query, key, value, orders, paid, known=None, *, causal, mask=None, dropout=0.0, dropout_key=None, scale=1.0
):
    """`received_attention.attention_received` in fused C++; see there."""
    check_places(orders)
    out, _, _, found = _attention_received(
        query,
        key,
        value,
        *orders[:3],
        mask,
        dropout_key,
        *orders[3:],
        causal,
        float(dropout),
        float(scale),
        paid,
        known,
    )
    return out.to(value.dtype), found


@torch.library.custom_op("hf_reformer::cpu_buckets", mutates_args=(), device_types="cpu")
def _buckets(vectors: torch.Tensor, rotations: torch.Tensor, factors: list[int]) -> torch.Tensor:
    return run_hashing(vectors, rotations, factors, _loaded())


@_buckets.register_fake
def _(vectors, rotations, factors):
    batch, heads, length = vectors.shape[:3]
    return vectors.new_empty(batch, heads, rotations.shape[2], length, dtype=torch.int32)


def lsh_buckets(vectors: torch.Tensor, rotations: torch.Tensor, num_buckets) -> torch.Tensor:
    """`hashing.lsh_buckets`, projections and argmax in one pass. Near-ties may fall differently."""
    return torch.ops.hf_reformer.cpu_buckets(vectors.detach(), rotations, list(bucket_factors(num_buckets)))


@torch.library.custom_op("hf_reformer::cpu_normals", mutates_args=(), device_types="cpu")
def _normals(keys: torch.Tensor, count: int) -> torch.Tensor:
    return run_normals(keys, count, _loaded())


@_normals.register_fake
def _(keys, count):
    return keys.new_empty(keys.shape[0], count, dtype=torch.float32)


def normal_rows(keys: torch.Tensor, count: int) -> torch.Tensor:
    """`randomness.normal_rows`, equal but for the last bits."""
    return torch.ops.hf_reformer.cpu_normals(keys, count)


@torch.library.custom_op("hf_reformer::cpu_sort", mutates_args=(), device_types="cpu")
def _sort(
    buckets: torch.Tensor, mask: torch.Tensor | None, count: int | None, back: int, on: int, parts: int
) -> list[torch.Tensor]:
    """The first `parts` of line, lo and hi: (B, H, R, T) int32, places counted within their round."""
    if count is None:
        count = int(buckets.max()) + 1 if buckets.numel() else 0
    return run_sorting(buckets, mask, count, back, on, parts, _loaded())


@_sort.register_fake
def _(buckets, mask, count, back, on, parts):
    return [buckets.new_empty(buckets.shape, dtype=torch.int32) for _ in range(parts)]


def bucket_windows(buckets: torch.Tensor, count: int | None, window: int, causal: bool, mask: torch.Tensor | None):
    """`hashing.bucket_windows` by counting."""
    back, on = reach(window, causal)
    return torch.ops.hf_reformer.cpu_sort(buckets, mask, count, back, on, 2 if causal else 3)


def sort_by_bucket(buckets: torch.Tensor, count: int, mask: torch.Tensor | None) -> torch.Tensor:
    """`hashing.sort_by_bucket` by counting."""
    return torch.ops.hf_reformer.cpu_sort(buckets, mask, count, 0, 0, 1)[0]


@torch.compiler.disable  # a trace cannot hold addresses
def step(query, key, value, vectors, kept, numbers, local_window: int, scale: float) -> torch.Tensor:
    """Keep new tokens and attend from each, as `cache_layers` and `listed_attention.gather_attention` do.

    Args:
        query, key, value: (B, H, T, D), query and key turned by position.
        vectors: (B, H, T, D) to be hashed; None in local layers.
        kept: the cache layer, with room for the tokens; its tensors are written to.
        numbers: (B, T) int64, the tokens' numbers in their rows, or -1: padding, which gives 0.

    Returns:
        (B, H, T, D) in value's dtype.
    """
    return run_step(query, key, value, vectors, kept, numbers, local_window, scale, _loaded()).to(value.dtype)


def token_step(
    x1: torch.Tensor, x2: torch.Tensor, layers: list[dict[str, Any]], rotary: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole layers for one new token of every row; see `steps.run_layers`."""
    return run_layers(x1, x2, layers, rotary, _loaded())
