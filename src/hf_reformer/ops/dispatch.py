"""Ordered attention, the one op behind local and LSH attention, and the choice of a backend for it."""

import functools
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

from .layout import AttentionLayout, bucket_windows, sort_by_bucket
from .lsh import lsh_buckets
from .prng import normal_rows
from .received_attention import BACKENDS as WITH_MASS
from .reference import windowed_attention as reference_attention
from .tiled_attention import tiled_attention

try:
    from reformer_kernels import triton as _triton
    from reformer_kernels.contract import CONTRACT
    from reformer_kernels.cpu import torch_ops as _cpu

    # A copy of this file that came with a model may meet a package of another age.
    KERNELS: dict[str, ModuleType] = {"cpu": _cpu, "triton": _triton} if CONTRACT == 3 else {}
except ImportError:  # this file travels alone: a model loaded with trust_remote_code, without the package
    KERNELS = {}

logger = logging.getLogger(__name__)

BACKENDS: dict[str, Callable[..., torch.Tensor]] = {"torch": tiled_attention, "reference": reference_attention}


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

    "auto" is the compiled kernel on a CPU where it can be used, else "torch".

    Raises:
        ValueError: no such backend, or it cannot serve these tensors.
    """
    choice = resolve_backend(choice)
    if choice == "auto":
        if "cpu" not in KERNELS or tensors[0].device.type != "cpu":
            return "torch"
        reason = KERNELS["cpu"].unsupported_reason(*tensors)
        if reason is not None and not torch.compiler.is_compiling():
            _warn_once(reason)
        return "cpu" if reason is None else "torch"
    if choice in KERNELS and (reason := KERNELS[choice].unsupported_reason(*tensors)):
        raise ValueError(f"attention backend {choice!r} cannot be used here: {reason}. Choose 'auto', or 'torch'.")
    return choice


@functools.cache
def _warn_once(reason: str) -> None:
    logger.warning("Attention runs in pure PyTorch, several times slower than compiled: %s.", reason)


class HashingBackend(NamedTuple):
    """What a backend brings for making orders.

    Attributes:
        lsh_buckets: `hashing.lsh_buckets`, or a faster one.
        sort_windows, sort_line: for the `sort` of `window_layout` and `chunk_layout`.
        normals: for those of `window_rotations`.
    """

    lsh_buckets: Callable
    sort_windows: Callable
    sort_line: Callable
    normals: Callable


def hashing_backend(choice: str, vectors: torch.Tensor) -> HashingBackend:
    """Those of the backend that serves `vectors` (B, H, T, D)."""
    if select_backend(choice, vectors, vectors) == "cpu":
        kernel = KERNELS["cpu"]
        return HashingBackend(kernel.lsh_buckets, kernel.bucket_windows, kernel.sort_by_bucket, kernel.normal_rows)
    return HashingBackend(lsh_buckets, bucket_windows, sort_by_bucket, normal_rows)


def compiled_step(choice: str, kept: torch.Tensor) -> Callable | None:
    """`kernels.cpu.step` where it serves tensors like `kept` (B, H, T, D), and nothing is traced; else None."""
    if torch.compiler.is_compiling():
        return None
    name = select_backend(choice, kept)
    served = name == "cpu" and kept.dtype in (torch.float32, torch.bfloat16)
    return KERNELS["cpu"].step if served else None


def compiled_token_step(choice: str, kept: torch.Tensor) -> Callable | None:
    """`kernels.cpu.token_step` where it serves tensors like `kept` (B, H, T, D), else None."""
    return KERNELS["cpu"].token_step if select_backend(choice, kept) == "cpu" and kept.dtype == torch.float32 else None


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
            (`reference.shared_key`), and a token sees itself only where it sees nothing else.
        layout: of `window_layout` or `chunk_layout`, batch B (heads H or 1).
        causal, mask: used by the chunk rule alone, whose softmax keeps the future and padding with a score of -1e9.
            mask: (B, T) bool, True for real tokens. In window mode `layout` has both built in.
        scale: scores are query @ key^T * scale; shared keys have their own.
        dropout, dropout_key: dropout on the attention weights, a function of (dropout_key, row, head, query, key).
        query_weights: (B, T), the weight of every query in the attention mass. No gradient passes to it.

    Returns:
        (B, H, T, D) in value's dtype; a token that sees nothing gets 0. And with `query_weights` the attention mass,
        (B, T) in at least float32, else None: mass[j] is the sum over heads and queries i of
        P[i, j] * query_weights[i], with the weights P before dropout. Gradients pass through it.
    """
    if dropout_key is None or dropout == 0:
        dropout, dropout_key = 0.0, None
    name = select_backend(backend, *(x for x in (query, value, key) if x is not None))
    options = {"causal": causal, "mask": mask, "dropout": dropout, "dropout_key": dropout_key}
    if name == "cpu":  # without a scaled copy of the keys
        options["scale"] = scale
    elif key is not None and scale != 1:
        key = key * scale
    if query_weights is None:
        attend = KERNELS[name].windowed_attention if name in KERNELS else BACKENDS[name]
        return attend(query, key, value, layout, **options), None
    query_weights = query_weights.detach().to(torch.promote_types(query.dtype, torch.float32))
    attend = KERNELS[name].attention_received if name in KERNELS else WITH_MASS[name]
    return attend(query, key, value, layout, query_weights, **options)
