"""Windowed attention, the op behind local and LSH attention, and the functions that make its layout, for any backend.

Functions here take `backend`, which is `config.attention_backend`. "torch" and "reference" are pure PyTorch; "cpu" and
"triton" are the compiled kernels of `reformer_kernels`, which may not be installed.
"""

import functools
import logging
import math
import operator
import os
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch

from ..compat import functorch_levels, in_forward_mode, in_functorch_transform, may_look_at, values_are_known
from .kernel_check import agrees
from .layout import AttentionLayout, Sort, sees_any, sort_by_bucket
from .layout import chunk_layout as chunk_layout_in_torch
from .layout import window_layout as window_layout_in_torch
from .lsh import Centering, bucket_factors
from .lsh import lsh_buckets as lsh_buckets_in_torch
from .lsh import window_rotations as window_rotations_in_torch
from .prng import normal_rows
from .reference import windowed_attention as reference_attention
from .rotary import CosAndSin
from .rotary import rotate as rotate_in_torch
from .tiled_attention import tiled_attention

try:
    from reformer_kernels import cpu, triton
    from reformer_kernels.contract import CONTRACT

    # A copy of this file that is shipped with a model may find another version of the kernels.
    KERNELS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton} if CONTRACT == 10 else {}
except ImportError:  # a model loaded with trust_remote_code, without the package
    KERNELS = {}

logger = logging.getLogger(__name__)

MAX_EMPTY = 2**14  # maximum number of empty buckets for counting sort

KERNEL_OF_DEVICE = {"cpu": "cpu", "cuda": "triton"}

BACKENDS: dict[str, Callable[..., Any]] = {"torch": tiled_attention, "reference": reference_attention}


# --- backend selection


def resolve_backend(choice: str = "auto") -> str:
    """Return `choice`, or the value of the environment variable HF_REFORMER_BACKEND, which takes precedence.

    Raises:
        ValueError: there is no such backend.
    """
    choice = os.environ.get("HF_REFORMER_BACKEND", choice)
    if choice != "auto" and choice not in BACKENDS and choice not in KERNELS:
        raise ValueError(
            f"attention backend {choice!r} is unknown. Choose 'auto' or one of {sorted([*BACKENDS, *KERNELS])} "
            "(config.attention_backend, or the environment variable HF_REFORMER_BACKEND)."
        )
    return choice


def select_backend(choice: str, *tensors: torch.Tensor) -> str:
    """Select the backend for query, value and optionally key, (B, H, T, D).

    "auto" selects the compiled kernel of a CPU or CUDA GPU if it can be used, else "torch". GPU kernels are checked at
    first use (`check_triton`), but not if "triton" is selected explicitly.

    Raises:
        ValueError: there is no such backend, or it does not support these tensors.
    """
    choice = resolve_backend(choice)
    if choice == "auto":
        if torch.onnx.is_in_onnx_export():  # ONNX supports only torch's operations
            return "torch"
        kernel = KERNEL_OF_DEVICE.get(tensors[0].device.type)
        if kernel not in KERNELS:
            return "torch"
        reason = unsupported_reason(kernel, *tensors)
        if reason is None and kernel == "triton":
            reason = _triton_fault(*tensors)
        if reason is not None and not torch.compiler.is_compiling():
            _warn_once(reason)
        return kernel if reason is None else "torch"
    if choice in KERNELS and (reason := unsupported_reason(choice, *tensors)):
        raise ValueError(f"attention backend {choice!r} cannot be used here: {reason}. Choose 'auto', or 'torch'.")
    return choice


def unsupported_reason(backend: str, *tensors: torch.Tensor) -> str | None:
    """Return why a backend of `KERNELS` does not support tensors like these, (B, H, T, D), or None if it does."""
    reason = KERNELS[backend].unsupported_reason(*tensors)
    if reason is None and in_functorch_transform():
        return "it has no rule for torch.func transforms"
    return _library_fault() if reason is None and backend == "cpu" else reason


@torch.compiler.assume_constant_result
def _library_fault() -> str | None:
    """Return why the compiled library cannot be used, or None; a constant, so that dynamo need not trace it."""
    return check_library()


@functools.cache
def check_library() -> str | None:
    """Compile, load and check the CPU kernels, once per process; return why they cannot be used, or None."""
    return KERNELS["cpu"].choose_library(partial(agrees, KERNELS["cpu"]), agrees.__module__)


def _triton_fault(*tensors: torch.Tensor) -> str | None:
    """Return why the Triton kernels cannot be used for tensors like these, or None; integers need no compiling."""
    floats = [x for x in tensors if x.is_floating_point()]
    if not floats:
        return None
    dtype = KERNELS["triton"].compute_dtype(*floats)
    sizes = (operator.index(x.shape[-1]) for x in (floats[0], floats[min(1, len(floats) - 1)]))  # not symbolic
    return _constant_triton_fault(floats[0].device.index or 0, str(dtype).removeprefix("torch."), *sizes)


@torch.compiler.assume_constant_result
def _constant_triton_fault(*subject: Any) -> str | None:
    return check_triton(*subject)


@functools.cache
def check_triton(index: int, dtype: str, size: int, value_size: int) -> str | None:
    """Return why the Triton kernels are not used on a GPU for a dtype and head sizes, or None.

    Another process checks them (`kernel_check.triton_agrees`), once per version of the kernels; the verdict is stored
    on disk. The check thus cannot interfere with tracing, graph capture or autograd in this process.
    """
    kernels = KERNELS["triton"]
    return kernels.fault(kernels.Subject(f"cuda:{index}", dtype, size, value_size), agrees.__module__)


def describe_backends(dtype: str = "float32", size: int = 64) -> dict[str, str]:
    """Return what "auto" selects on every device for a dtype and head size, and why if it is not a compiled kernel."""
    found = {}
    for device in ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]:
        kernel = KERNEL_OF_DEVICE[torch.device(device).type]
        reason: str | None = "the package reformer_kernels does not fit"
        if kernel in KERNELS:
            like = torch.empty(1, 1, 1, size, dtype=getattr(torch, dtype), device=device)
            reason = unsupported_reason(kernel, like) or (_triton_fault(like) if kernel == "triton" else None)
        found[device] = kernel if reason is None else f"torch: {reason}"
    return found if torch.cuda.is_available() else {**found, "cuda": "none: no CUDA device"}


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("Attention runs in pure PyTorch, several times slower than compiled: %s.", reason)


def decode_kernel(choice: str, cached_keys: torch.Tensor) -> Any:
    """Return the module of `KERNELS` whose `decode_attention` supports cached keys like these, (B, H, capacity, D).

    Returns None while tracing, or if there is no such module.
    """
    if torch.compiler.is_compiling():
        return None
    name = select_backend(choice, cached_keys)
    return KERNELS[name] if name in KERNELS and cached_keys.dtype in KERNELS[name].DECODED_DTYPES else None


def transform_needs_reference() -> bool:
    """Whether a torch.func transform is active that needs plain operations: any but a single `grad` or `vjp`.

    Attention then needs memory for the dense matrix of weights.
    """
    return not torch.compiler.is_compiling() and (in_forward_mode() or functorch_levels() not in ([], ["Grad"]))


# --- attention


def windowed_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    layout: AttentionLayout,
    *,
    causal: bool,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    dropout_key: torch.Tensor | None = None,
    scale: float = 1.0,
    query_weights: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute attention: one softmax per token over everything in its windows, counting pairs as `layout` specifies.

    Args:
        query, value: (B, H, T, D), floating point. Half precision is accumulated in float32.
        key: like `query`, or None for shared query/key attention: keys are then the queries scaled to unit length
            (`reference.shared_key`), and a token attends to itself only if nothing else is visible.
        layout: result of `window_layout` or `chunk_layout` for batch size B (heads H or 1).
        causal, mask: only used by the chunk rule, whose softmax keeps future tokens and padding with a score of -1e9.
            mask: (B, T) bool, True for real tokens. In window mode both are part of `layout`.
        dropout, dropout_key: dropout on the attention weights, a function of (dropout_key, row, head, query, key).
        scale: scores are query @ key^T * scale; shared keys have their own scale.
        query_weights: (B, T), the weight of every query in the attention mass. It receives no gradient.

    Returns:
        The output, (B, H, T, D) in value's dtype, 0 for tokens with empty windows; and with `query_weights` the
        attention mass, (B, T) in at least float32, else None: mass[j] is the sum over heads and queries i of
        P[i, j] * query_weights[i], where P are the weights before dropout. It is differentiable.
    """
    if dropout_key is None or dropout == 0:
        dropout, dropout_key = 0.0, None
    if query_weights is not None:
        query_weights = query_weights.detach().to(torch.promote_types(query.dtype, torch.float32))
    name = select_backend(backend, *(x for x in (query, value, key) if x is not None))
    reach = partial(sees_any, layout=layout, causal=causal, mask=mask)
    if name in KERNELS:
        kernel = KERNELS[name].attention
        rest = *layout[:3], mask, dropout_key, query_weights, *layout[3:], causal, dropout, scale
        if name == "cpu":
            out, _, row_sum, mass = kernel(query, key, value, *rest)
            if not values_are_known() or math.isfinite(row_sum.sum()):  # NaN if nonfinite values were read
                return out.to(value.dtype), None if query_weights is None else mass

        def attend(query: torch.Tensor, key: Any, value: torch.Tensor) -> tuple[torch.Tensor, Any]:
            out, _, _, mass = kernel(query, key, value, *rest)
            return out.to(value.dtype), None if query_weights is None else mass

        return contain_nonfinite(attend, reach, query, key, value)
    if name == "torch" and transform_needs_reference():
        name = "reference"
    options: dict[str, Any] = {"causal": causal, "mask": mask, "dropout": dropout, "dropout_key": dropout_key}
    run = partial(BACKENDS[name], layout=layout, scale=scale, query_weights=query_weights, **options)
    return contain_nonfinite(run, reach, query, key, value)


def all_finite(*tensors: torch.Tensor | None) -> bool:
    """Whether no tensor contains NaN or infinity, or numbers so large that their sum is infinite."""
    sums = [x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors if x is not None]
    return bool(torch.stack([x.double() if x.is_cpu else x for x in sums]).isfinite().all())


def contain_nonfinite(
    attend: Callable[..., tuple[torch.Tensor, Any]],
    reach: Callable[[torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
) -> tuple[torch.Tensor, Any]:
    """Call `attend(query, key, value)` such that NaN and infinity only affect tokens that attend to them.

    Sums over tiles or matrices would spread them to all tokens, since 0 * NaN is NaN. The result for finite inputs is
    that of `attend`. On a CPU, inputs are checked first; on CUDA, where a check would synchronize, they are always
    masked. In compiled graphs and under vmap nothing is done.

    Args:
        attend: returns (B, H, T, D), and optionally its weights, (B, H, T, S) or sparse, or attention mass, (B, S).
        reach: which queries see any of the given keys, (B, H, S) bool → (B, H or 1, T).
        query: (B, H, T, D).
        key, value: (B, H, S, D); without `key`, queries are the keys.
    """
    unknown = not values_are_known() or query.device.type == "meta"
    if unknown or (may_look_at(query) and all_finite(query, key, value)):
        return attend(query, key, value)
    with torch.no_grad():
        bad_query, bad_value = (~largest_entry(x).isfinite() for x in (query, value))
        bad_key = bad_query if key is None else ~largest_entry(key).isfinite()
        spoiled = bad_query | reach(bad_value | bad_key)  # (B, H, T)
    query, value = (torch.where(bad[..., None], 0, x) for bad, x in ((bad_query, query), (bad_value, value)))
    out, report = attend(query, None if key is None else torch.where(bad_key[..., None], 0, key), value)
    if isinstance(report, torch.Tensor):
        if report.dim() == 2:
            report = torch.where(spoiled.any(-1).any(-1, keepdim=True), torch.nan, report)
        else:
            report = torch.where(spoiled[..., None], torch.nan, report)
    elif report is not None:
        report = report._replace(weights=torch.where(spoiled[..., None], torch.nan, report.weights))
    return torch.where(spoiled[..., None], torch.nan, out), report


def largest_entry(x: torch.Tensor) -> torch.Tensor:
    """Return the largest magnitude in every row, (..., D) → (...); NaN for rows that contain NaN."""
    return torch.linalg.vector_norm(x.detach(), torch.inf, dim=-1)


# --- functions of `rotary`, `lsh` and `layout`, by compiled kernels if supported


def rotate(x: torch.Tensor, tables: CosAndSin | None, heads: int | None = None, backend: str = "auto") -> torch.Tensor:
    """Call `rotary.rotate`, equal in all backends up to rounding. Without tables, x is returned."""
    if tables is None or heads == 0:
        return x
    if resolve_backend(backend) in ("auto", "cpu") and "cpu" in KERNELS and _kernel_rotates(x):
        return KERNELS["cpu"].rotate(x, *tables, x.shape[1] if heads is None else heads, False)
    return rotate_in_torch(x, tables, heads)


def _kernel_rotates(x: torch.Tensor) -> bool:
    if x.dtype not in (torch.float32, torch.bfloat16) or torch.onnx.is_in_onnx_export() or in_forward_mode():
        return False
    return unsupported_reason("cpu", x) is None


def lsh_buckets(
    vectors: torch.Tensor,
    rotations: torch.Tensor,
    num_buckets: int | tuple[int, ...],
    centering: Centering | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Call `lsh.lsh_buckets`. Backends may resolve near-ties differently."""
    name = select_backend(backend, vectors)
    if name not in KERNELS:
        return lsh_buckets_in_torch(vectors, rotations, num_buckets, centering)
    factors, center = list(bucket_factors(num_buckets)), centering or Centering(causal=False)
    return KERNELS[name].lsh_buckets(vectors.detach(), rotations, factors, centering is not None, *center)


def window_rotations(
    key: torch.Tensor,
    layer: int,
    heads: int,
    head_size: int,
    num_hashes: int,
    num_buckets: int | tuple[int, ...],
    like: torch.Tensor,
    backend: str = "auto",
) -> torch.Tensor:
    """Call `lsh.window_rotations` for vectors like `like`, (B, H, T, D); equal in all backends up to rounding."""
    normals = KERNELS["cpu"].normal_rows if select_backend(backend, like) == "cpu" else normal_rows
    return window_rotations_in_torch(key, layer, heads, head_size, num_hashes, num_buckets, normals)


def window_layout(
    groups: Sequence[tuple[torch.Tensor, int | None, int]],
    causal: bool,
    mask: torch.Tensor | None,
    block_size: int = 32,
    backend: str = "auto",
) -> AttentionLayout:
    """Call `layout.window_layout`, equal in all backends."""
    return window_layout_in_torch(groups, causal, mask, block_size, _sorter(backend, groups[0][0]))


def chunk_layout(
    buckets: torch.Tensor,
    num_buckets: int,
    chunk: int,
    chunks_before: int,
    chunks_after: int,
    mask: torch.Tensor | None,
    backend: str = "auto",
) -> AttentionLayout:
    """Call `layout.chunk_layout`, equal in all backends."""
    sort = _sorter(backend, buckets)
    return chunk_layout_in_torch(buckets, num_buckets, chunk, chunks_before, chunks_after, mask, sort)


def _sorter(backend: str, buckets: torch.Tensor) -> Sort | None:
    return _sort_by_kernel if select_backend(backend, buckets) == "cpu" else None


def _sort_by_kernel(
    groups: Sequence[torch.Tensor], mask: torch.Tensor | None, counts: Sequence[int | None], *rest: Any
) -> list[torch.Tensor]:
    """Sort by counting the members of every bucket, unless most buckets are empty, as with many packed samples."""
    most = MAX_EMPTY + 4 * groups[0].shape[-1]
    if all(x.dtype == torch.int32 and (count or 0) <= most for x, count in zip(groups, counts, strict=True)):
        counts = [-1 if count is None else count for count in counts]
        return KERNELS["cpu"].sort_by_bucket(groups, mask, counts, *rest)
    return sort_by_bucket(groups, mask, counts, *rest)
