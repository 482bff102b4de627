"""The C++ kernels as torch ops on a CPU: tensors are passed to the library as structures of pointers and strides.

Inputs are read in place, in any layout whose last dimension is contiguous. Outputs and gradients are laid out as
(B, T, H, D), like projections.
"""

import ctypes
from collections.abc import Sequence
from ctypes import byref
from typing import Any

import torch

from ..attention_op import AttentionArgs, empty_rows, register_attention
from ..contract import check_positions, keep_threshold
from .library import AttentionParams, HashParams, NormalParams, RotateParams, SortParams, Strided, current_library

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def strided(x: torch.Tensor | None) -> ctypes.Structure:
    if x is None:
        return Strided(None, 0, 0, 0)
    batch, head, token = (0 if size == 1 else step for size, step in zip(x.shape[:3], x.stride()[:3], strict=True))
    return Strided(x.data_ptr(), batch, head, token)


def pointer(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def readable(*tensors: torch.Tensor | None, dtype: torch.dtype | None = None) -> list[Any]:
    """Convert tensors to one dtype, their own if supported, and to a readable layout, without needless copies."""
    if dtype is None:
        dtypes = {x.dtype for x in tensors if x is not None}
        dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= DTYPES.keys() else torch.float32
    converted = [None if x is None else x.detach().to(dtype) for x in tensors]
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in converted]


def _end_to_end(x: torch.Tensor) -> torch.Tensor:
    """Flatten rounds, (B, 1 or H, R, T) → (B, 1 or H, R * T); a view if they are contiguous."""
    is_view = x.stride(-1) == 1 and x.stride(-2) == x.shape[-1]
    return (x if is_view else x.contiguous()).flatten(2)


def _numbers(x: torch.Tensor) -> torch.Tensor:
    return x.detach().float().contiguous()


def _call(
    function: str, args: AttentionArgs, grad_out: torch.Tensor | None = None, **pointers: torch.Tensor | None
) -> None:
    """Call a function of the library with the op's inputs, `grad_out` and further `pointers` to tensors."""
    if not args.query.numel():
        return
    query, key, value = readable(args.query, args.key, args.value)
    (batch, heads, length, size), rounds = query.shape, args.perm.shape[2]
    sorted_positions = [_end_to_end(x) for x in (args.perm, args.window_start, args.window_end)]
    inverse = mask = None
    if not args.dedup_pairs:
        mask = None if args.mask is None else args.mask.contiguous()
    elif rounds > 1:
        inverse = torch.empty(batch, args.perm.shape[1], (rounds - 1) * length, dtype=torch.int32)
    dropout_key, *first_head = (0,) if args.dropout_key is None else args.dropout_key.reshape(-1).tolist()
    params = AttentionParams(
        *map(strided, (query, key, value, *sorted_positions, inverse)), mask=pointer(mask), grad_out=strided(grad_out),
        batch=batch, heads=heads, length=length, rounds=rounds, size=size, value_size=value.shape[-1],
        block_size=args.block_size, left_reach=args.left_reach, right_reach=args.right_reach,
        bfloat16=DTYPES[query.dtype], dedup_pairs=args.dedup_pairs, causal=args.causal,
        threads=torch.get_num_threads(), dropout=args.dropout_key is not None, dropout_key=dropout_key,
        first_head=sum(first_head), keep_threshold=keep_threshold(args.dropout),
        dropout_scale=0.0 if args.dropout >= 1 else 1 / (1 - args.dropout), key_scale=args.scale,
        **{name: pointer(x) for name, x in pointers.items()},
    )  # fmt: skip
    getattr(current_library(), function)(byref(params))


def forward(*inputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the output, (B, H, T, D) float32, softmax maximum and sum of every row, (B, H, T), and attention mass.

    Raises:
        ValueError: there are more sorted positions than `contract.MAX_POSITIONS`.
    """
    args = AttentionArgs(*inputs)
    check_positions(args.perm)
    query = args.query
    out = empty_rows(args.value, torch.float32)
    row_max, row_sum = (query.new_empty(query.shape[:3], dtype=torch.float32) for _ in range(2))
    _call("hf_forward", args, out=out, row_max=row_max, row_sum=row_sum)
    if args.query_weights is None:
        return out, row_max, row_sum, row_max.new_empty(0)
    mass, weights = torch.zeros_like(row_max), _numbers(args.query_weights)
    _call("hf_sweep", args, row_max=row_max, row_sum=row_sum, query_weights=weights, mass=mass)
    return out, row_max, row_sum, mass.sum(1)


def backward(
    out: torch.Tensor, row_max: torch.Tensor, row_sum: torch.Tensor, grad_out: torch.Tensor,
    grad_mass: torch.Tensor | None, *inputs: Any,
) -> list[torch.Tensor]:  # fmt: skip
    """Compute float32 gradients of query, value and, unless shared, key, from those of the output and the mass."""
    args, (grad_out,) = AttentionArgs(*inputs), readable(grad_out.float())
    grads = [empty_rows(x, torch.float32) for x in (args.query, args.value, args.key) if x is not None]
    pointers = {"row_max": row_max, "row_sum": row_sum}
    if grad_mass is not None and args.query_weights is not None:
        pointers |= {"query_weights": _numbers(args.query_weights), "grad_mass": _numbers(grad_mass)}
        pointers["mass_dot"] = torch.zeros_like(row_max)
        _call("hf_sweep", args, **pointers)
    pointers |= dict(zip(("grad_query", "grad_value", "grad_key"), grads, strict=False))
    pointers |= {"out": out.transpose(1, 2).contiguous(), "delta": torch.empty_like(row_max)}
    _call("hf_backward", args, grad_out, **pointers)
    return grads


attention = register_attention("cpu", forward, backward, lambda *_: torch.float32, device_types="cpu")


@torch.library.custom_op("reformer_kernels::cpu_lsh_buckets", mutates_args=(), device_types="cpu")
def lsh_buckets(
    vectors: torch.Tensor, rotations: torch.Tensor, factors: list[int], centered: bool, causal: bool,
    mask: torch.Tensor | None, samples: torch.Tensor | None, sums: torch.Tensor | None, counts: torch.Tensor | None,
    share: float,
) -> torch.Tensor:  # fmt: skip
    """Compute buckets, (B, H, R, T) int32, like `lsh.lsh_buckets`, except that near-ties may differ.

    The arguments after `centered` are the fields of `lsh.Centering`.

    Raises:
        ValueError: rotations do not match the factors, or samples are not numbered 0, 1, … in order.
    """
    if rotations.shape[-1] != sum(factors) // 2:
        raise ValueError(f"Rotations of {rotations.shape[-1]} columns don't fit bucket factors {factors}.")
    (vectors,), rotations = readable(vectors), rotations.float().contiguous()
    batch, heads, length, size = vectors.shape
    rounds, columns = rotations.shape[2:]
    buckets = vectors.new_empty(batch, heads, rounds, length, dtype=torch.int32)
    factor_array = (ctypes.c_int64 * len(factors))(*factors)
    dtypes = torch.bool, torch.int32, torch.float64, torch.int64
    given = zip((mask, samples, sums, counts), dtypes, strict=True)
    center = [None if x is None else x.to(dtype).contiguous() for x, dtype in given]
    if samples is not None and samples.numel():
        step = samples.diff(dim=-1, prepend=samples.new_zeros(batch, 1))
        if samples[:, 0].any() or (step < 0).any() or (step > 1).any():
            raise ValueError("The samples of a packed sequence must be numbered 0, 1, … in turn.")
    params = HashParams(
        strided(vectors), rotations.data_ptr(), ctypes.addressof(factor_array), batch, heads, length, rounds, size,
        columns, len(factors), DTYPES[vectors.dtype], torch.get_num_threads(), centered, causal, *map(pointer, center),
        share, buckets.data_ptr(),
    )  # fmt: skip
    if buckets.numel():
        current_library().hf_hash(byref(params))
    return buckets


@lsh_buckets.register_fake
def _(vectors, rotations, factors, centered, causal, mask, samples, sums, counts, share):
    batch, heads, length = vectors.shape[:3]
    return vectors.new_empty(batch, heads, rotations.shape[2], length, dtype=torch.int32)


@torch.library.custom_op("reformer_kernels::cpu_normal_rows", mutates_args=(), device_types="cpu")
def normal_rows(key: torch.Tensor, rows: int, count: int) -> torch.Tensor:
    """Draw (rows, count) float32 numbers, equal to `prng.normal_rows` up to rounding."""
    values = key.new_empty(rows, count, dtype=torch.float32)
    if values.numel():
        params = NormalParams(key.data_ptr(), rows, count, torch.get_num_threads(), values.data_ptr())
        current_library().hf_normals(byref(params))
    return values


@normal_rows.register_fake
def _(key, rows, count):
    return key.new_empty(rows, count, dtype=torch.float32)


@torch.library.custom_op("reformer_kernels::cpu_sort_by_bucket", mutates_args=(), device_types="cpu")
def sort_by_bucket(
    groups: Sequence[torch.Tensor], mask: torch.Tensor | None, counts: Sequence[int], left_reaches: Sequence[int],
    right_reaches: Sequence[int], outputs: int,
) -> list[torch.Tensor]:  # fmt: skip
    """Return the first `outputs` of perm, window_start and window_end, like `layout.sort_by_bucket`.

    counts: -1 if the number of buckets is unknown.
    """
    batch, heads, _, length = groups[0].shape
    rounds = sum(buckets.shape[2] for buckets in groups)
    results = [groups[0].new_empty(batch, heads, rounds, length) for _ in range(outputs)]
    pointers, mask, first = [x.data_ptr() for x in results], None if mask is None else mask.contiguous(), 0
    for buckets, count, *reaches in zip(groups, counts, left_reaches, right_reaches, strict=True):
        if buckets.numel():
            flat = _end_to_end(buckets)  # possibly a copy, which must live until the call returns
            params = SortParams(
                strided(flat), pointer(mask), batch, heads, length, buckets.shape[2], rounds, first,
                int(buckets.max()) + 1 if count < 0 else count, torch.get_num_threads(), *reaches, *pointers,
            )  # fmt: skip
            current_library().hf_sort(byref(params))
        first += buckets.shape[2]
    return results


@sort_by_bucket.register_fake
def _(groups, mask, counts, left_reaches, right_reaches, outputs):
    batch, heads, _, length = groups[0].shape
    rounds = sum(buckets.shape[2] for buckets in groups)
    return [groups[0].new_empty(batch, heads, rounds, length, dtype=torch.int32) for _ in range(outputs)]


@torch.library.custom_op("reformer_kernels::cpu_rotate", mutates_args=(), device_types="cpu")
def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, turned_heads: int, inverse: bool) -> torch.Tensor:
    """Compute `rotary.rotate` of (B, H, T, D), float32 or bfloat16, or with `inverse` its inverse (its gradient).

    cos, sin: (B or 1, 1, T, D) float32.

    Raises:
        ValueError: the tables have another shape.
    """
    if cos.shape != sin.shape or cos.shape not in ((n, 1, *x.shape[2:]) for n in (1, x.shape[0])):
        raise ValueError(f"Tables of shape {tuple(cos.shape)}, {tuple(sin.shape)} don't fit vectors {tuple(x.shape)}.")
    (x,), (cos, sin) = readable(x), readable(cos, sin, dtype=torch.float32)
    (batch, heads, length, size), out = x.shape, empty_rows(x, x.dtype)
    cos, sin = cos.contiguous(), sin.contiguous()
    params = RotateParams(
        strided(x), cos.data_ptr(), sin.data_ptr(), batch, heads, length, size, cos.shape[0], turned_heads, inverse,
        DTYPES[x.dtype], torch.get_num_threads(), out.data_ptr(),
    )  # fmt: skip
    if x.numel():
        current_library().hf_rotate(byref(params))
    return out


@rotate.register_fake
def _(x, cos, sin, turned_heads, inverse):
    return empty_rows(x, x.dtype)


def _keep_tables(ctx, inputs, output):
    _, cos, sin, ctx.turned_heads, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _turn_back(ctx, grad):
    return rotate(grad, *ctx.saved_tensors, ctx.turned_heads, not ctx.inverse), None, None, None, None


rotate.register_autograd(_turn_back, setup_context=_keep_tables)
