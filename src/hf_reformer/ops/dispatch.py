"""Windowed attention, the one op behind local and LSH attention, and what layers need to lay it out: by any backend.

Everything here takes `backend`: `config.attention_backend`. "torch" and "reference" are pure PyTorch. "cpu" and
"triton" are the compiled kernels of `reformer_kernels`, which may be missing.
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

    # A copy of this file that came with a model may meet kernels of another version.
    KERNELS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton} if CONTRACT == 9 else {}
except ImportError:  # a model loaded with trust_remote_code, without the package
    KERNELS = {}

logger = logging.getLogger(__name__)

MAX_EMPTY = 2**14  # buckets that counting tokens may find empty

KERNEL_OF_DEVICE = {"cpu": "cpu", "cuda": "triton"}

BACKENDS: dict[str, Callable[..., Any]] = {"torch": tiled_attention, "reference": reference_attention}


# --- the choice of a backend


def resolve_backend(choice: str = "auto") -> str:
    """`config.attention_backend`, or the environment variable HF_REFORMER_BACKEND, which overrules it.

    Raises:
        ValueError: no such backend.
    """
    choice = os.environ.get("HF_REFORMER_BACKEND", choice)
    if choice != "auto" and choice not in BACKENDS and choice not in KERNELS:
        raise ValueError(
            f"attention backend {choice!r} is unknown. Choose 'auto' or one of {sorted([*BACKENDS, *KERNELS])} "
            "(config.attention_backend, or the environment variable HF_REFORMER_BACKEND)."
        )
    return choice


def select_backend(choice: str, *tensors: torch.Tensor) -> str:
    """The backend that serves query, value and perhaps key, (B, H, T, D).

    "auto" is the compiled kernel of a CPU or a CUDA GPU where it can be used, else "torch". Of a GPU, that is found
    out at first use (`check_triton`); an explicit "triton" is taken unseen.

    Raises:
        ValueError: no such backend, or it cannot serve these tensors.
    """
    choice = resolve_backend(choice)
    if choice == "auto":
        if torch.onnx.is_in_onnx_export():  # ONNX knows torch's operations alone
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
    """Why a backend of `KERNELS` cannot serve tensors like these, (B, H, T, D), or None."""
    reason = KERNELS[backend].unsupported_reason(*tensors)
    if reason is None and in_functorch_transform():
        return "it has no rule for torch.func transforms"
    return _library_fault() if reason is None and backend == "cpu" else reason


@torch.compiler.assume_constant_result
def _library_fault() -> str | None:
    """Why the compiled library itself cannot be used, or None; it does not change, so dynamo need not look."""
    return check_library()


@functools.cache
def check_library() -> str | None:
    """Compile, load and check the CPU kernels, once a process; why they cannot be used, or None."""
    return KERNELS["cpu"].choose_library(partial(agrees, KERNELS["cpu"]), agrees.__module__)


def _triton_fault(*tensors: torch.Tensor) -> str | None:
    """Why Triton's kernels cannot serve tensors like these on their GPU, or None; nothing compiles for integers."""
    floats = [x for x in tensors if x.is_floating_point()]
    if not floats:
        return None
    dtype = KERNELS["triton"].compute_dtype(*floats)
    sizes = (operator.index(x.shape[-1]) for x in (floats[0], floats[min(1, len(floats) - 1)]))  # no symbols
    return _constant_triton_fault(floats[0].device.index or 0, str(dtype).removeprefix("torch."), *sizes)


@torch.compiler.assume_constant_result
def _constant_triton_fault(*subject: Any) -> str | None:
    return check_triton(*subject)


@functools.cache
def check_triton(index: int, dtype: str, size: int, value_size: int) -> str | None:
    """Why Triton's kernels are not used on a GPU for a dtype and head sizes, or None.

    Another process checks them (`kernel_check.triton_agrees`), once for each of their versions: the verdict is kept
    on disk. So nothing of it runs in this process, whatever it traces, captures or differentiates.
    """
    kernels = KERNELS["triton"]
    return kernels.fault(kernels.Subject(f"cuda:{index}", dtype, size, value_size), agrees.__module__)


def describe_backends(dtype: str = "float32", size: int = 64) -> dict[str, str]:
    """What "auto" takes on every device for a dtype and head size, and why it is not the compiled kernel."""
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
    """The module of `KERNELS` whose `decode_attention` serves a cache of keys like these, (B, H, capacity, D).

    None inside of a trace, and where there is none.
    """
    if torch.compiler.is_compiling():
        return None
    name = select_backend(choice, cached_keys)
    return KERNELS[name] if name in KERNELS and cached_keys.dtype in KERNELS[name].DECODED_DTYPES else None


def transform_needs_reference() -> bool:
    """Whether a torch.func transform runs that takes plain operations: all but `grad` and `vjp` alone.

    Memory is then that of a matrix of weights.
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
    """One softmax per token over everything in its windows, each pair counted as `layout` says.

    Args:
        query, value: (B, H, T, D) floating. Half precision is accumulated in float32.
        key: the same, or None for shared query/key attention: keys are then the queries scaled to unit length
            (`reference.shared_key`), and a token attends to itself only where nothing else is visible.
        layout: of `window_layout` or `chunk_layout`, batch B (heads H or 1).
        causal, mask: used by the chunk rule alone, whose softmax keeps the future and padding with a score of -1e9.
            mask: (B, T) bool, True for real tokens. In window mode `layout` has both built in.
        dropout, dropout_key: dropout on the attention weights, a function of (dropout_key, row, head, query, key).
        scale: scores are query @ key^T * scale; shared keys have their own.
        query_weights: (B, T), the weight of every query in the attention mass. No gradient passes to it.

    Returns:
        (B, H, T, D) in value's dtype; a token with empty windows gets 0. And with `query_weights` the attention mass,
        (B, T) in at least float32, else None: mass[j] is the sum over heads and queries i of
        P[i, j] * query_weights[i], with the weights P before dropout. Gradients pass through it.
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
            if not values_are_known() or math.isfinite(row_sum.sum()):  # NaN where it read what is not finite
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
    """Whether no tensor holds NaN or infinity, nor numbers so large that their sum is infinite."""
    sums = [x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors if x is not None]
    return bool(torch.stack([x.double() if x.is_cpu else x for x in sums]).isfinite().all())


def contain_nonfinite(
    attend: Callable[..., tuple[torch.Tensor, Any]],
    reach: Callable[[torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
) -> tuple[torch.Tensor, Any]:
    """`attend(query, key, value)`, an attention, where NaN and infinity reach those tokens alone that see them.

    In sums over tiles or matrices they would reach all, as 0 * NaN is NaN. Finite inputs give what `attend` gives. On
    a CPU they are looked at first; a CUDA device, which would have to be waited for, does the same with whatever
    comes. In compiled graphs and under vmap nothing is done.

    Args:
        attend: gives (B, H, T, D), and perhaps its weights, (B, H, T, S) or sparse, or the attention mass, (B, S).
        reach: which queries see any of some keys, (B, H, S) bool → (B, H or 1, T).
        query: (B, H, T, D); key, value: (B, H, S, D); key may be None, then queries are the keys.
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
    """Of every row (..., D), in magnitude: (...); NaN where there is one."""
    return torch.linalg.vector_norm(x.detach(), torch.inf, dim=-1)


# --- the functions of `rotary`, `lsh` and `layout`, by the compiled kernels where they serve


def rotate(x: torch.Tensor, tables: CosAndSin | None, heads: int | None = None, backend: str = "auto") -> torch.Tensor:
    """`rotary.rotate`, the same in all backends but for the last bits. None: no tables, no turn."""
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
    """`lsh.lsh_buckets`. Near-ties may fall differently in different backends."""
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
    """`lsh.window_rotations` for vectors like `like`, (B, H, T, D); equal in all backends but for the last bits."""
    normals = KERNELS["cpu"].normal_rows if select_backend(backend, like) == "cpu" else normal_rows
    return window_rotations_in_torch(key, layer, heads, head_size, num_hashes, num_buckets, normals)


def window_layout(
    groups: Sequence[tuple[torch.Tensor, int | None, int]],
    causal: bool,
    mask: torch.Tensor | None,
    block_size: int = 32,
    backend: str = "auto",
) -> AttentionLayout:
    """`layout.window_layout`, the same in all backends."""
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
    """`layout.chunk_layout`, the same in all backends."""
    sort = _sorter(backend, buckets)
    return chunk_layout_in_torch(buckets, num_buckets, chunk, chunks_before, chunks_after, mask, sort)


def _sorter(backend: str, buckets: torch.Tensor) -> Sort | None:
    return _sort_by_kernel if select_backend(backend, buckets) == "cpu" else None


def _sort_by_kernel(
    groups: Sequence[torch.Tensor], mask: torch.Tensor | None, counts: Sequence[int | None], *rest: Any
) -> list[torch.Tensor]:
    """It counts the members of every bucket: not where most are empty, as those of many samples are."""
    most = MAX_EMPTY + 4 * groups[0].shape[-1]
    if all(x.dtype == torch.int32 and (count or 0) <= most for x, count in zip(groups, counts, strict=True)):
        counts = [-1 if count is None else count for count in counts]
        return KERNELS["cpu"].sort_by_bucket(groups, mask, counts, *rest)
    return sort_by_bucket(groups, mask, counts, *rest)
