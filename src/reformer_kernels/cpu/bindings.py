"""Calls into the compiled library through its C interface: tensors become structures of pointers and strides.

Inputs are read where they lie, in any layout whose last dimension is contiguous; outputs and gradients are
(B, T, H, D) in memory, as projections want them.
"""

import ctypes

import torch

from hf_reformer.ops.layout import AttentionLayout
from hf_reformer.ops.prng import keep_threshold
from hf_reformer.ops.reference import pair_keys

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


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
    int: batch, heads, length, rounds, size, value_size, tile, before, after, bfloat16, dedup_pairs, causal, threads
    int: keep_threshold
    double: dropout_scale, key_scale
    pointer: out, top, mass
    strided: grad
    pointer: drift, query_grad, key_grad, value_grad
    pointer: paid, push, pushed, received
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


class Call:
    """What a call of the op is about, beside query, key and value."""

    def __init__(self, orders: AttentionLayout, causal: bool, mask, dropout: float, dropout_key, scale: float = 1.0):
        self.orders, self.causal, self.dropout, self.dropout_key = orders, causal, dropout, dropout_key
        self.scale = scale
        self.mask = None if mask is None or orders.dedup_pairs else mask.contiguous()


def _strided(x: torch.Tensor | None) -> _Strided:
    if x is None:
        return _Strided(None, 0, 0, 0)
    batch, head, token = (0 if size == 1 else step for size, step in zip(x.shape[:3], x.stride()[:3], strict=True))
    return _Strided(x.data_ptr(), batch, head, token)


def _pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _readable(*tensors: torch.Tensor | None, dtype: torch.dtype | None = None) -> list[torch.Tensor | None]:
    """In one dtype, their own if it can be, and in layouts that the kernel reads; copies only where they must be."""
    if dtype is None:
        dtypes = {x.dtype for x in tensors if x is not None}
        dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= DTYPES.keys() else torch.float32
    found = [None if x is None else x.detach().to(dtype) for x in tensors]
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in found]


def _line_like(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, 1 or H, R, T) → (B, H, R * T), a view where the rounds lie end to end."""
    end_to_end = x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]
    return (x if end_to_end else x.contiguous()).flatten(2).expand(-1, heads, -1)


def new_rows(like: torch.Tensor) -> torch.Tensor:
    """Float32 of the same shape (B, H, T, D), in memory (B, T, H, D)."""
    batch, heads, length, size = like.shape
    return like.new_empty(batch, length, heads, size, dtype=torch.float32).transpose(1, 2)


def _run(library: ctypes.CDLL, function: str, structure: ctypes.Structure) -> None:
    failure = getattr(library, function)(ctypes.byref(structure))
    if failure == 2:
        raise ValueError(f"{function}: a bucket lies outside of the number of buckets given.")
    if failure:
        raise MemoryError(f"{function}: no memory left for what the kernel works with.")


def _problem(query, key, value, call: Call, keep: list, **pointers) -> ctypes.Structure:
    """The structure the kernel reads; `keep` holds on to what it points at."""
    orders, (batch, heads, length, size) = call.orders, query.shape
    rounds = orders.perm.shape[2]
    line, lo, hi = (_line_like(x, heads) for x in (orders.perm, orders.window_start, orders.window_end))
    inverse = None
    if orders.dedup_pairs and rounds > 1:
        places = torch.empty(batch, orders.perm.shape[1], (rounds - 1) * length, dtype=torch.int32)
        inverse = places.expand(-1, heads, -1)
    draws: list[torch.Tensor | None] = [None, None]
    if call.dropout_key is not None:
        draws = [x.contiguous() for x in pair_keys(call.dropout_key, batch, heads, length)]
    keep += [query, key, value, line, lo, hi, inverse, *draws, *pointers.values()]
    named = {name: _strided(x) if name == "grad" else _pointer(x) for name, x in pointers.items()}
    return _Problem(
        *(_strided(x) for x in (query, key, value, line, lo, hi, inverse)),
        mask=_pointer(call.mask), query_draw=_pointer(draws[0]), key_draw=_pointer(draws[1]),
        batch=batch, heads=heads, length=length, rounds=rounds, size=size, value_size=value.shape[-1],
        tile=orders.block_size, before=orders.left_reach, after=orders.right_reach, bfloat16=DTYPES[query.dtype],
        dedup_pairs=orders.dedup_pairs, causal=call.causal, threads=torch.get_num_threads(),
        keep_threshold=min(keep_threshold(call.dropout), 2**31 - 1),
        dropout_scale=0.0 if call.dropout >= 1 else 1 / (1 - call.dropout), key_scale=call.scale, **named,
    )  # fmt: skip


def forward(query, key, value, call: Call, library: ctypes.CDLL):
    """Output (B, H, T, D) float32, and maximum and sum (B, H, T) of every row's softmax."""
    query, key, value = _readable(query, key, value)
    out, top, mass = new_rows(value), *(query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(2))
    keep: list = []
    if query.numel():
        _run(library, "hf_forward", _problem(query, key, value, call, keep, out=out, top=top, mass=mass))
    return out, top, mass


def received(query, key, call: Call, top, mass, paid, library: ctypes.CDLL) -> torch.Tensor:
    """What every token receives, (B, T) float32: the sum over heads and queries of weight * paid, (B, T)."""
    found = query.new_zeros(query.shape[:3], dtype=torch.float32)
    _sweep(query, key, call, library, top=top, mass=mass, paid=_numbers(paid), received=found)
    return found.sum(1)


def _sweep(query, key, call: Call, library: ctypes.CDLL, **pointers) -> None:
    query, key = _readable(query, key)
    keep: list = []
    if query.numel():
        few = query[..., :8]  # in the place of values, which nobody looks at
        _run(library, "hf_sweep", _problem(query, key, few, call, keep, **pointers))


def _numbers(x: torch.Tensor) -> torch.Tensor:
    return x.detach().float().contiguous()


def backward(query, key, value, call: Call, out, top, mass, grad, library: ctypes.CDLL, paid=None, push=None):
    """Gradients of query, key (None if shared) and value, float32.

    paid, push: (B, T), where what tokens receive has a gradient too, `push`.
    """
    query, key, value = _readable(query, key, value)
    (grad,) = _readable(grad.float())
    if not out.transpose(1, 2).is_contiguous():
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    grads = new_rows(query), None if key is None else new_rows(key), new_rows(value)
    more = {}
    if push is not None:
        more = {"paid": _numbers(paid), "push": _numbers(push), "pushed": torch.zeros_like(top)}
        _sweep(query, key, call, library, top=top, mass=mass, **more)
    keep: list = []
    if query.numel():
        problem = _problem(
            query, key, value, call, keep, out=out, top=top, mass=mass, grad=grad, drift=torch.empty_like(top),
            query_grad=grads[0], key_grad=grads[1], value_grad=grads[2], **more,
        )  # fmt: skip
        _run(library, "hf_backward", problem)
    return grads


def run_hashing(vectors, rotations, factors: list[int], library: ctypes.CDLL) -> torch.Tensor:
    if rotations.shape[-1] != sum(factors) // 2:
        raise ValueError(f"Rotations of {rotations.shape[-1]} columns don't fit bucket factors {factors}.")
    (vectors,), rotations = _readable(vectors), rotations.float().contiguous()
    batch, heads, length, size = vectors.shape
    rounds, columns = rotations.shape[2:]
    buckets = vectors.new_empty(batch, heads, rounds, length, dtype=torch.int32)
    counts = (ctypes.c_int64 * len(factors))(*factors)
    call = _Hashing(
        _strided(vectors), rotations.data_ptr(), ctypes.addressof(counts), batch, heads, length, rounds, size, columns,
        len(factors), DTYPES[vectors.dtype], torch.get_num_threads(), buckets.data_ptr(),
    )  # fmt: skip
    if buckets.numel():
        _run(library, "hf_hash", call)
    return buckets


def run_normals(keys: torch.Tensor, count: int, library: ctypes.CDLL) -> torch.Tensor:
    keys = keys.contiguous()
    values = keys.new_empty(keys.shape[0], count, dtype=torch.float32)
    if values.numel():
        call = _Normals(keys.data_ptr(), keys.shape[0], count, torch.get_num_threads(), values.data_ptr())
        _run(library, "hf_normals", call)
    return values


def run_sorting(buckets, mask, count: int, back: int, on: int, parts: int, library: ctypes.CDLL) -> list[torch.Tensor]:
    batch, heads, rounds, length = buckets.shape
    results = [torch.empty_like(buckets, memory_format=torch.contiguous_format) for _ in range(parts)]
    buckets = _line_like(buckets, heads)
    mask = None if mask is None else mask.contiguous()
    call = _Sorting(
        _strided(buckets), _pointer(mask), batch, heads, length, rounds, count, torch.get_num_threads(), back, on,
        *(x.data_ptr() for x in results),
    )  # fmt: skip
    if buckets.numel():
        _run(library, "hf_sort", call)
    return results
