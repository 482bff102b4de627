"""Calls of the compiled library for tokens that come one by one, on top of a cache layer."""

import ctypes
from typing import Any

import torch

from hf_reformer.ops.lsh import bucket_factors

from .bindings import DTYPES, _pointer, _readable, _run, _strided, _structure

_Step = _structure(
    "_Step",
    """
    strided: query, key, value, vectors
    pointer: rotations, factors, numbers, keys, values, buckets, newest, previous
    int: batch, heads, length, size, rounds, columns, num_factors, count, window, local_window, room, bfloat16
    int: threads
    double: scale
    pointer: out
    """,
)
_LayerStep = _structure(
    "_LayerStep",
    """
    pointer: attention_norm, attention_norm_bias, feed_forward_norm, feed_forward_norm_bias
    pointer: query_proj, key_proj, value_proj, out_proj, up_proj, up_bias, down_proj, down_bias
    pointer: cosines, sines, step
    int: hidden, feed_forward, gelu, float64, turns
    double: epsilon
    pointer: x1, x2
    """,
)
_LayerSteps = _structure("_LayerSteps", "pointer: layers\n int: count")


def _step(kept, numbers: torch.Tensor, hashed: bool, local_window: int, scale: float, keep: list) -> Any:
    """New tokens of these numbers, (B, T), on top of `kept`: all but their vectors and where the result goes.

    `keep` holds on to what the structure points at.
    """
    batch, heads, _, size = kept.keys.shape
    numbers = numbers.contiguous()
    rotations, newest, previous, count, window, rounds = None, None, None, 0, 0, 0
    factors: tuple[int, ...] = ()
    if hashed:
        rotations, factors, window = kept.rotations, bucket_factors(kept.num_buckets), kept.window
        newest, previous = kept.tables.newest, kept.tables.previous
        count, rounds = newest.shape[-1], rotations.shape[2]
    numbers_of_factors = (ctypes.c_int64 * max(1, len(factors)))(*factors)
    keep += [numbers, numbers_of_factors]
    return _Step(
        rotations=_pointer(rotations), factors=ctypes.addressof(numbers_of_factors), numbers=numbers.data_ptr(),
        keys=kept.keys.data_ptr(), values=kept.values.data_ptr(), buckets=_pointer(kept.buckets),
        newest=_pointer(newest), previous=_pointer(previous),
        batch=batch, heads=heads, length=numbers.shape[1], size=size, rounds=rounds, columns=sum(factors) // 2,
        num_factors=len(factors), count=count, window=window, local_window=local_window, room=kept.room,
        bfloat16=DTYPES[kept.keys.dtype], threads=torch.get_num_threads(), scale=scale,
    )  # fmt: skip


def run_step(
    query, key, value, vectors, kept, numbers: torch.Tensor, local_window: int, scale: float, library: ctypes.CDLL
) -> torch.Tensor:
    """New tokens, (B, H, T, D) each, on top of `kept` (a cache layer, which is written to); (B, H, T, D) float32."""
    batch, heads, length, size = query.shape
    if kept.keys.shape != (batch, heads, kept.room, size) or numbers.shape != (batch, length):
        raise ValueError(f"A cache of {tuple(kept.keys.shape)} cannot take tokens of {tuple(query.shape)}.")
    query, key, value, vectors = _readable(query, key, value, vectors, dtype=kept.keys.dtype)
    out = query.new_empty(batch, heads, length, size, dtype=torch.float32)
    keep: list = []
    step = _step(kept, numbers, vectors is not None, local_window, scale, keep)
    step.query, step.key, step.value, step.vectors = (_strided(x) for x in (query, key, value, vectors))
    step.out = out.data_ptr()
    _run(library, "hf_step", step)
    return out


def run_layers(
    x1: torch.Tensor, x2: torch.Tensor, layers: list[dict[str, Any]], rotary: tuple[torch.Tensor, torch.Tensor] | None,
    library: ctypes.CDLL,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """One new token of every row through layers, on top of what each has kept, which is written to.

    Args:
        x1, x2: streams (B, 1, D), float64 or float32.
        layers: of each, `kept`, the cache layer; `numbers` (B, 1) of the token; `weights`, float32 and contiguous, by
            their names in the structure, `key_proj` None: shared query/key attention; `gelu`, or else relu; `epsilon`
            of both norms; `local_window`; `scale` of the scores.
        rotary: cos and sin, (B or 1, 1, 1, head size) float32; None: positions turn nothing.

    Returns:
        The streams behind the layers.
    """
    x1, x2 = (x.clone(memory_format=torch.contiguous_format) for x in (x1, x2))  # the kernel adds to them in place
    keep: list = [x.contiguous() for x in rotary or ()]
    cosines, sines = keep or (None, None)
    turns = 0 if cosines is None else cosines.shape[0]
    calls = (_LayerStep * len(layers))()
    for call, layer in zip(calls, layers, strict=True):
        weights = layer["weights"]
        hashed = weights["key_proj"] is None
        step = _step(layer["kept"], layer["numbers"], hashed, layer["local_window"], layer["scale"], keep)
        keep.append(step)
        for name, weight in weights.items():
            setattr(call, name, _pointer(weight))
        call.cosines, call.sines, call.turns = _pointer(cosines), _pointer(sines), turns
        call.step, call.x1, call.x2 = ctypes.addressof(step), x1.data_ptr(), x2.data_ptr()
        call.hidden, call.feed_forward = x1.shape[-1], weights["up_bias"].numel()
        call.gelu, call.float64, call.epsilon = layer["gelu"], x1.dtype == torch.float64, layer["epsilon"]
    _run(library, "hf_layers", _LayerSteps(ctypes.addressof(calls), len(layers)))
    return x1, x2
