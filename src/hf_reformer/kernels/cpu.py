"""The fused C++ kernels as torch ops: hashing, sorting, and ordered attention with its gradients, on a CPU.

Inputs are read where they lie, in any layout whose last dimension is contiguous; outputs and gradients are
(B, T, H, D) in memory, as projections want them.
"""

import ctypes
import functools
import logging
from concurrent.futures import ThreadPoolExecutor

import torch

from .. import hashing
from ..hashing import Orders, factors_of
from ..randomness import keep_threshold, make_key
from ..reference import attention_with_weights, pair_keys, shared_key
from . import build, check_places

logger = logging.getLogger(__name__)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class _Strided(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token"))]


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A ctypes structure from "kind: names" lines, in the order of csrc/problem.hpp."""
    kinds = {"strided": _Strided, "pointer": ctypes.c_void_p, "int": ctypes.c_int64, "double": ctypes.c_double}
    pairs = []
    for line in fields.strip().splitlines():
        kind, names = line.split(":")
        pairs += [(field.strip(), kinds[kind.strip()]) for field in names.split(",")]
    return type(name, (ctypes.Structure,), {"_fields_": pairs})


_Problem = _structure(
    "_Problem",
    """
    strided: query, key, value, line, lo, hi, inverse
    pointer: mask, query_draw, key_draw
    int: batch, heads, length, rounds, size, value_size, before, after, bfloat16, count_once, causal, threads
    int: keep_threshold
    double: dropout_scale, key_scale
    pointer: out, top, mass
    strided: grad
    pointer: drift, query_grad, key_grad, value_grad
    """,
)
_Hashing = _structure(
    "_Hashing",
    """
    strided: vectors
    pointer: rotations, factors
    int: batch, heads, length, rounds, size, columns, num_factors, bfloat16, threads
    pointer: buckets
    """,
)
_Normals = _structure(
    "_Normals",
    """
    pointer: keys
    int: rows, count, threads
    pointer: values
    """,
)
_Sorting = _structure(
    "_Sorting",
    """
    strided: buckets
    pointer: mask
    int: batch, heads, length, rounds, count, threads, back, on
    pointer: line, lo, hi
    """,
)


# --- which library, and whether it may be trusted


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The best variant that compiles and agrees with the pure-PyTorch op, or why there is none."""
    reason = "no variant runs here"
    for variant in build.supported_variants():
        try:
            library = build.load_library(variant)
        except build.CannotBuild as error:
            logger.warning("attention runs in pure PyTorch, several times slower than compiled: %s", error)
            return str(error)
        with ThreadPoolExecutor(1) as fresh:  # a thread of its own knows nothing of the caller's grad mode or autocast
            if fresh.submit(_agrees, library).result():
                return library
        reason = f"the {variant} kernel disagrees with the pure-PyTorch op on this machine"
        logger.warning("%s; it is not used. Please report this, with the processor's name.", reason)
    return reason


def why_not(query: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why this backend cannot serve such tensors (B, H, T, D), or None."""
    if query.device.type != "cpu":
        return f"it runs on a CPU, not on {query.device.type}"
    if query.dtype not in (*_DTYPES, torch.float16):
        return f"it knows float32, bfloat16 and float16, not {query.dtype}"
    if query.shape[-1] % 8 or value.shape[-1] % 8:
        return f"head sizes must be multiples of 8, not {query.shape[-1]} and {value.shape[-1]}"
    if torch._C._functorch.maybe_current_level() is not None:
        return "it has no rule for torch.func transforms"
    library = _library()
    return library if isinstance(library, str) else None


def _agrees(library: ctypes.CDLL) -> bool:
    """Compare both rules, forward and backward, with the pure-PyTorch op on small inputs that use every mask."""
    generator = torch.Generator().manual_seed(0)
    query, value, grad = (torch.randn(2, 2, 192, 24, generator=generator) for _ in range(3))
    mask = torch.rand(2, 192, generator=generator) > 0.1
    buckets = torch.randint(0, 3, (2, 2, 2, 192), generator=generator).int()
    windows = hashing.window_orders([(buckets * 0, 1, 20), (buckets, 3, 90)], True, mask)
    for orders in (windows, hashing.chunk_orders(buckets, 3, 64, 1, 0, mask)):
        for key in (None, shared_key(query)):
            call = _Call(orders, True, mask, 0.3, make_key(0), 1.0 if key is None else 0.5)
            out, top, mass = _forward(query, key, value, call, library)
            found = [out, *_backward(query, key, value, call, out, top, mass, grad, library)]
            inputs = [x.detach().requires_grad_() for x in (query, value) + (() if key is None else (key,))]
            expected, _ = attention_with_weights(
                inputs[0], None if key is None else 0.5 * inputs[2], inputs[1], orders,
                causal=True, mask=mask, dropout=0.3, dropout_key=make_key(0),
            )  # fmt: skip
            grads = torch.autograd.grad(expected, inputs, grad)
            wanted = [expected, grads[0], None if key is None else grads[2], grads[1]]
            for a, b in zip(found, wanted, strict=True):
                if b is not None and not torch.allclose(a, b, rtol=1e-4, atol=1e-4):
                    return False
    return True


# --- attention


class _Call:
    """What a call of the op is about, beside query, key and value."""

    def __init__(self, orders: Orders, causal: bool, mask, dropout: float, dropout_key, scale: float = 1.0):
        self.orders, self.causal, self.dropout, self.dropout_key = orders, causal, dropout, dropout_key
        self.scale = scale
        self.mask = None if mask is None or orders.count_once else mask.contiguous()


def _strided(x: torch.Tensor | None) -> _Strided:
    if x is None:
        return _Strided(None, 0, 0, 0)
    batch, head, token = (0 if size == 1 else step for size, step in zip(x.shape[:3], x.stride()[:3], strict=True))
    return _Strided(x.data_ptr(), batch, head, token)


def _pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _readable(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """In one dtype and in layouts that the kernel reads; copies only where they must be."""
    dtypes = {x.dtype for x in tensors if x is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= _DTYPES.keys() else torch.float32
    found = [None if x is None else x.detach().to(dtype) for x in tensors]
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in found]


def _line_like(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, 1 or H, R, T) → (B, H, R * T), a view where the rounds lie end to end."""
    end_to_end = x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]
    return (x if end_to_end else x.contiguous()).flatten(2).expand(-1, heads, -1)


def _new_rows(like: torch.Tensor) -> torch.Tensor:
    """Float32 of the same shape (B, H, T, D), in memory (B, T, H, D)."""
    batch, heads, length, size = like.shape
    return like.new_empty(batch, length, heads, size, dtype=torch.float32).transpose(1, 2)


def _run(library: ctypes.CDLL, function: str, structure: ctypes.Structure) -> None:
    if getattr(library, function)(ctypes.byref(structure)):
        raise MemoryError(f"{function}: no memory left for the kernel's tiles")


def _problem(query, key, value, call: _Call, keep: list, **pointers) -> ctypes.Structure:
    """The structure the kernel reads; `keep` holds on to what it points at."""
    orders, (batch, heads, length, size) = call.orders, query.shape
    rounds = orders.line.shape[2]
    line, lo, hi = (_line_like(x, heads) for x in (orders.line, orders.lo, orders.hi))
    inverse = None
    if orders.count_once and rounds > 1:
        places = torch.empty(batch, orders.line.shape[1], (rounds - 1) * length, dtype=torch.int32)
        inverse = places.expand(-1, heads, -1)
    draws: list[torch.Tensor | None] = [None, None]
    if call.dropout_key is not None:
        draws = [x.contiguous() for x in pair_keys(call.dropout_key, batch, heads, length)]
    keep += [query, key, value, line, lo, hi, inverse, *draws, *pointers.values()]
    named = {name: _strided(x) if name == "grad" else _pointer(x) for name, x in pointers.items()}
    return _Problem(
        *(_strided(x) for x in (query, key, value, line, lo, hi, inverse)),
        *(_pointer(x) for x in (call.mask, *draws)),
        batch, heads, length, rounds, size, value.shape[-1], orders.before, orders.after,
        _DTYPES[query.dtype], orders.count_once, call.causal, torch.get_num_threads(),
        min(keep_threshold(call.dropout), 2**31 - 1), 0.0 if call.dropout >= 1 else 1 / (1 - call.dropout),
        call.scale, **named,
    )  # fmt: skip


def _forward(query, key, value, call: _Call, library: ctypes.CDLL):
    """Output (B, H, T, D) float32, and maximum and sum (B, H, T) of every row's softmax."""
    query, key, value = _readable(query, key, value)
    out, top, mass = _new_rows(value), *(torch.empty(query.shape[:3]) for _ in range(2))
    keep: list = []
    if query.numel():
        _run(library, "hf_forward", _problem(query, key, value, call, keep, out=out, top=top, mass=mass))
    return out, top, mass


def _backward(query, key, value, call: _Call, out, top, mass, grad, library: ctypes.CDLL):
    """Gradients of query, key (None if shared) and value, float32."""
    query, key, value = _readable(query, key, value)
    (grad,) = _readable(grad.float())
    if not out.transpose(1, 2).is_contiguous():
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    grads = _new_rows(query), None if key is None else _new_rows(key), _new_rows(value)
    keep: list = []
    if query.numel():
        problem = _problem(
            query, key, value, call, keep, out=out, top=top, mass=mass, grad=grad, drift=torch.empty_like(top),
            query_grad=grads[0], key_grad=grads[1], value_grad=grads[2],
        )  # fmt: skip
        _run(library, "hf_backward", problem)
    return grads


# --- torch ops


@torch.library.custom_op("hf_reformer::cpu_attention", mutates_args=(), device_types="cpu")
def _attention(
    query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor,
    line: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, before: int, after: int, count_once: bool, causal: bool,
    mask: torch.Tensor | None, dropout: float, dropout_key: torch.Tensor | None, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    orders = Orders(line, lo, hi, 0, before, after, count_once)
    return _forward(query, key, value, _Call(orders, causal, mask, dropout, dropout_key, scale), _loaded())


@torch.library.custom_op("hf_reformer::cpu_attention_backward", mutates_args=(), device_types="cpu")
def _attention_backward(
    query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor,
    line: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, before: int, after: int, count_once: bool, causal: bool,
    mask: torch.Tensor | None, dropout: float, dropout_key: torch.Tensor | None, scale: float,
    out: torch.Tensor, top: torch.Tensor, mass: torch.Tensor, grad: torch.Tensor,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of query, value, and key if it is given."""
    orders = Orders(line, lo, hi, 0, before, after, count_once)
    call = _Call(orders, causal, mask, dropout, dropout_key, scale)
    of_query, of_key, of_value = _backward(query, key, value, call, out, top, mass, grad, _loaded())
    return [of_query, of_value] if of_key is None else [of_query, of_value, of_key]


def _loaded() -> ctypes.CDLL:
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f"the compiled CPU kernel cannot be used: {library}")
    return library


@_attention.register_fake
def _(query, key, value, *_):
    rows = query.new_empty(query.shape[:3], dtype=torch.float32)
    return _new_rows(value), rows, torch.empty_like(rows)


@_attention_backward.register_fake
def _(query, key, value, *_):
    return [_new_rows(x) for x in (query, value, key) if x is not None]


def _save_for_backward(ctx, inputs, output):
    tensors = (*inputs[:6], inputs[10], inputs[12], *output)
    ctx.save_for_backward(*tensors)
    ctx.rule = inputs[6:10], inputs[11], inputs[13]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    query, key, value, line, lo, hi, mask, dropout_key, *results = ctx.saved_tensors
    rule, dropout, scale = ctx.rule
    if grad is None:
        return (None,) * 14
    of_query, of_value, *of_key = torch.ops.hf_reformer.cpu_attention_backward(
        query, key, value, line, lo, hi, *rule, mask, dropout, dropout_key, scale, *results, grad
    )
    of_key = of_key[0].to(key.dtype) if of_key else None
    return of_query.to(query.dtype), of_key, of_value.to(value.dtype), *(None,) * 11


_attention.register_autograd(_differentiate, setup_context=_save_for_backward)


def ordered_attention(query, key, value, orders, *, causal, mask=None, dropout=0.0, dropout_key=None, scale=1.0):
    """`attention_ops.ordered_attention` in fused C++; see there. Accumulates in float32.

    Raises:
        ValueError: a line of more places than `kernels.LONGEST`.
    """
    check_places(orders)
    out, *_ = torch.ops.hf_reformer.cpu_attention(
        query, key, value, orders.line, orders.lo, orders.hi, orders.before, orders.after, orders.count_once, causal,
        mask, dropout, dropout_key, scale,
    )  # fmt: skip
    return out.to(value.dtype)


@torch.library.custom_op("hf_reformer::cpu_buckets", mutates_args=(), device_types="cpu")
def _buckets(vectors: torch.Tensor, rotations: torch.Tensor, factors: list[int]) -> torch.Tensor:
    (vectors,), rotations = _readable(vectors), rotations.float().contiguous()
    batch, heads, length, size = vectors.shape
    rounds, columns = rotations.shape[2:]
    buckets = torch.empty(batch, heads, rounds, length, dtype=torch.int32)
    counts = (ctypes.c_int64 * len(factors))(*factors)
    call = _Hashing(
        _strided(vectors), rotations.data_ptr(), ctypes.addressof(counts), batch, heads, length, rounds, size, columns,
        len(factors), _DTYPES[vectors.dtype], torch.get_num_threads(), buckets.data_ptr(),
    )  # fmt: skip
    if buckets.numel():
        _run(_loaded(), "hf_hash", call)
    return buckets


@_buckets.register_fake
def _(vectors, rotations, factors):
    batch, heads, length = vectors.shape[:3]
    return vectors.new_empty(batch, heads, rotations.shape[2], length, dtype=torch.int32)


def lsh_buckets(vectors: torch.Tensor, rotations: torch.Tensor, num_buckets) -> torch.Tensor:
    """`hashing.lsh_buckets`, projections and argmax in one pass. Near-ties may fall differently."""
    return torch.ops.hf_reformer.cpu_buckets(vectors.detach(), rotations, list(factors_of(num_buckets)))


@torch.library.custom_op("hf_reformer::cpu_normals", mutates_args=(), device_types="cpu")
def _normals(keys: torch.Tensor, count: int) -> torch.Tensor:
    keys = keys.contiguous()
    values = torch.empty(keys.shape[0], count)
    if values.numel():
        call = _Normals(keys.data_ptr(), keys.shape[0], count, torch.get_num_threads(), values.data_ptr())
        _run(_loaded(), "hf_normals", call)
    return values


@_normals.register_fake
def _(keys, count):
    return keys.new_empty(keys.shape[0], count, dtype=torch.float32)


def normal_rows(keys: torch.Tensor, count: int) -> torch.Tensor:
    """`randomness.normal_rows`, equal but for the last bits."""
    return torch.ops.hf_reformer.cpu_normals(keys, count)


@torch.library.custom_op("hf_reformer::cpu_sort", mutates_args=(), device_types="cpu")
def _sort(
    buckets: torch.Tensor, mask: torch.Tensor | None, count: int, back: int, on: int, parts: int
) -> list[torch.Tensor]:
    """The first `parts` of line, lo and hi: (B, H, R, T) int32, places counted within their round."""
    batch, heads, rounds, length = buckets.shape
    results = [torch.empty(buckets.shape, dtype=torch.int32) for _ in range(parts)]
    buckets = _line_like(buckets, heads)
    mask = None if mask is None else mask.contiguous()
    call = _Sorting(
        _strided(buckets), _pointer(mask), batch, heads, length, rounds, count, torch.get_num_threads(), back, on,
        *(x.data_ptr() for x in results),
    )  # fmt: skip
    if buckets.numel():
        _run(_loaded(), "hf_sort", call)
    return results


@_sort.register_fake
def _(buckets, mask, count, back, on, parts):
    return [buckets.new_empty(buckets.shape, dtype=torch.int32) for _ in range(parts)]


def sorted_windows(buckets: torch.Tensor, count: int, window: int, causal: bool, mask: torch.Tensor | None):
    """`hashing.sorted_windows` by counting."""
    back, on = hashing.reach(window, causal)
    return torch.ops.hf_reformer.cpu_sort(buckets, mask, count, back, on, 2 if causal else 3)


def sorted_line(buckets: torch.Tensor, count: int, mask: torch.Tensor | None) -> torch.Tensor:
    """`hashing.sorted_line` by counting."""
    return torch.ops.hf_reformer.cpu_sort(buckets, mask, count, 0, 0, 1)[0]
