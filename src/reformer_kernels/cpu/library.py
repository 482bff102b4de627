"""The compiled library: its structures as ctypes sees them, how it is loaded, and which variant is in use."""

import ctypes
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import build

logger = logging.getLogger(__name__)


class Strided(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "head", "token"))]


def _structure(name: str, fields: str) -> type[ctypes.Structure]:
    """A ctypes structure from lines "kind: names", in the order of csrc/params.hpp."""
    kinds = {"strided": Strided, "pointer": ctypes.c_void_p, "int": ctypes.c_int64, "double": ctypes.c_double}
    pairs = []
    for line in fields.strip().splitlines():
        kind, names = line.split(":")
        pairs += [(field.strip(), kinds[kind.strip()]) for field in names.split(",")]
    return type(name, (ctypes.Structure,), {"_fields_": pairs})


AttentionParams = _structure(
    "AttentionParams",
    """
    strided: query, key, value, perm, window_start, window_end, inverse
    pointer: mask
    int: batch, heads, length, rounds, size, value_size, block_size, left_reach, right_reach
    int: bfloat16, dedup_pairs, causal, threads, dropout, dropout_key, first_head, keep_threshold
    double: dropout_scale, key_scale
    pointer: out, row_max, row_sum
    strided: grad_out
    pointer: delta, grad_query, grad_key, grad_value
    pointer: query_weights, grad_mass, mass_dot, mass
    """,
)
HashParams = _structure(
    "HashParams",
    """
    strided: vectors
    pointer: rotations, factors
    int: batch, heads, length, rounds, size, columns, num_factors, bfloat16, threads
    pointer: buckets
    """,
)
NormalParams = _structure("NormalParams", "pointer: keys\n int: rows, count, threads\n pointer: values")
SortParams = _structure(
    "SortParams",
    """
    strided: buckets
    pointer: mask
    int: batch, heads, length, rounds, num_buckets, threads, left_reach, right_reach
    pointer: perm, window_start, window_end
    """,
)
DecodeParams = _structure(
    "DecodeParams",
    """
    strided: query, key, value, vectors
    pointer: rotations, factors, indices, keys, values, buckets, newest, previous
    int: batch, heads, length, size, rounds, columns, num_factors, num_buckets, window, local_window, capacity
    int: bfloat16, threads
    double: scale
    pointer: out
    """,
)
LayerParams = _structure(
    "LayerParams",
    """
    pointer: attention_norm, attention_norm_bias, feed_forward_norm, feed_forward_norm_bias
    pointer: query_proj, key_proj, value_proj, out_proj, up_proj, up_bias, down_proj, down_bias
    pointer: cosines, sines, attention
    int: hidden, feed_forward, gelu, float64, rotary_rows
    double: epsilon
    pointer: x1, x2
    """,
)
StackParams = _structure("StackParams", "pointer: layers\n int: count")

FUNCTIONS = {
    "hf_forward": AttentionParams, "hf_backward": AttentionParams, "hf_sweep": AttentionParams, "hf_hash": HashParams,
    "hf_normals": NormalParams, "hf_sort": SortParams, "hf_decode_attention": DecodeParams,
    "hf_decode_layers": StackParams,
}  # fmt: skip


def _raise_error(code: int, function: Any, arguments: Any) -> None:
    if code == 2:
        raise ValueError(f"{function.__name__}: a bucket lies outside of the number of buckets given.")
    if code:
        raise MemoryError(f"{function.__name__}: no memory left for what the kernel works with.")


def load_library(variant: str) -> ctypes.CDLL:
    """The compiled variant, ready to be called.

    Raises:
        build.KernelBuildError: it cannot be compiled or loaded, or its structures are not those of this file.
    """
    library = build.load_library(variant)
    library.hf_sizeof.restype = ctypes.c_int64
    structures: list[type[ctypes.Structure]] = [Strided, *FUNCTIONS.values(), LayerParams]
    for structure in structures:
        compiled, expected = library.hf_sizeof(structure.__name__.encode()), ctypes.sizeof(structure)
        if compiled != expected:
            raise build.KernelBuildError(
                f"the compiled kernels do not fit this package: their {structure.__name__} has {compiled} bytes, "
                f"not {expected}"
            )
    for name, structure in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.POINTER(structure)], ctypes.c_int
        function.errcheck = _raise_error
    return library


_library: ctypes.CDLL | None = None


def choose_library(agrees: Callable[[ctypes.CDLL], bool]) -> str | None:
    """Use the best variant that compiles and `agrees` with the definitions. Returns why there is none, or None."""
    global _library
    for variant in build.supported_variants():
        try:
            library = load_library(variant)
        except build.KernelBuildError as error:
            return str(error)
        with ThreadPoolExecutor(1) as fresh:  # a thread of its own: the caller's grad mode and autocast don't matter
            if fresh.submit(agrees, library).result():
                _library = library
                return None
        logger.warning(
            "The %s attention kernel disagrees with its definition here and is not used. Please report this, with the "
            "processor's name.", variant
        )  # fmt: skip
    return "no compiled kernel agrees with its definition here"


def current_library() -> ctypes.CDLL:
    """The variant in use; without `choose_library`, the best one that compiles.

    Raises:
        RuntimeError: there is none.
    """
    reason = choose_library(lambda library: True) if _library is None else None
    if _library is None:
        raise RuntimeError(f"the compiled CPU kernel cannot be used: {reason}")
    return _library


def current_variant() -> str:
    """The name of the variant in use."""
    library = current_library()
    library.hf_variant.restype = ctypes.c_char_p
    return library.hf_variant().decode()
