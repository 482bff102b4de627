"""Counter-based random numbers: every draw is a function of a key and of the place where it is used.

Each training forward draws one integer key from torch's default generator. All random numbers within it (rotations,
exploration buckets, dropout masks) are hashed from that key and from (layer, site, sequence, head, position). A
recomputation, another backend or another process thus reproduces them without a generator.

All arithmetic is 32-bit integer arithmetic with wraparound, the same on every device.
"""

import math
import re
from typing import Any

import torch

from ..compat import in_graph_capture, may_look_at

# The purpose of a random number: the second counter of every draw.
ROTATIONS, EXPLORATION, ATTENTION_DROPOUT, OUTPUT_DROPOUT = 1, 2, 3, 4
HIDDEN_DROPOUT, FEED_FORWARD_DROPOUT, EMBEDDING_DROPOUT, FINAL_DROPOUT, CROSS_DROPOUT = 5, 6, 7, 8, 9

GOLDEN = -1640531527  # 2^32 / golden ratio, odd
MIX_1, MIX_2 = -2048144789, -1028477387  # multipliers of MurmurHash3's finalizer (A. Appleby, public domain)


def draw_key(device: torch.device | str | None = None) -> torch.Tensor:
    """Draw an int32 key of shape () from torch's default CPU generator and move it to `device`.

    During CUDA graph capture, the device's own generator is used, so that every replay draws another key.
    """
    if in_graph_capture():
        return torch.randint(-(2**31), 2**31, (), dtype=torch.int64, device=device).to(torch.int32)
    return torch.randint(-(2**31), 2**31, (), dtype=torch.int64).to(torch.int32).to(device, non_blocking=True)


def make_key(seed: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Make the int32 key of shape () for an integer seed (taken modulo 2^32)."""
    return torch.full((), (seed + 2**31) % 2**32 - 2**31, dtype=torch.int32, device=device)


def _logical_shift(x: Any, bits: int) -> Any:
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def mix(x: Any) -> Any:
    """Scramble int32 values, a tensor or an int, such that every input bit affects every output bit."""
    x = _wrap((x ^ _logical_shift(x, 16)) * MIX_1)
    x = _wrap((x ^ _logical_shift(x, 13)) * MIX_2)
    return x ^ _logical_shift(x, 16)


def fold(key: torch.Tensor, *counters: int | torch.Tensor) -> torch.Tensor:
    """Derive a key from `key` and counters (ints or int32 tensors), whose shapes broadcast. Order matters."""
    folded: Any = key
    if key.is_cpu and not key.dim() and may_look_at(key):  # ints are mixed ten times as fast
        folded = int(key)
    for counter in counters:
        folded = mix(_wrap((folded ^ _wrap(counter * GOLDEN)) + 1))
    return folded if isinstance(folded, torch.Tensor) else torch.tensor(folded, dtype=torch.int32, device="cpu")


def _wrap(value: Any) -> Any:
    """Wrap an int around to int32; tensors do so themselves."""
    return value if isinstance(value, torch.Tensor) else (value + 2**31) % 2**32 - 2**31


def normal(key: torch.Tensor) -> torch.Tensor:
    """Draw a standard normal float32 number for every key (Box and Muller 1958)."""
    radius = ((_logical_shift(fold(key, 1), 8)).float() + 1) * 2.0**-24  # (0, 1]
    angle = (_logical_shift(fold(key, 2), 8)).float() * (2.0**-24 * 2 * math.pi)
    return torch.sqrt(-2 * torch.log(radius)) * torch.cos(angle)


def normal_rows(key: torch.Tensor, rows: int, count: int) -> torch.Tensor:
    """Draw (rows, count) standard normal float32 numbers, functions of the int32 key of shape (), row and column."""
    row, column = (torch.arange(n, dtype=torch.int32, device=key.device) for n in (rows, count))
    return normal(fold(key, row[:, None], column))


def pair_scramble(query_key: torch.Tensor, key_key: torch.Tensor) -> torch.Tensor:
    """Combine int32 numbers of queries and keys to one for every pair; cheap, for large numbers of pairs."""
    x = (query_key ^ key_key) * MIX_1
    x = (x ^ _logical_shift(x, 15)) * MIX_2
    return x


def keep_threshold(p: float) -> int:
    """Return the threshold below which a signed 32-bit random number drops its pair, with probability p."""
    return min(round(p * 2**32), 2**32) - 2**31


def dropout(x: torch.Tensor, p: float, key: torch.Tensor | None, offset: int = 0) -> torch.Tensor:
    """Apply dropout whose mask is a function of (key, row, position, feature).

    Args:
        x: (B, T, D), of any floating-point dtype.
        p: dropout probability, rounded to a multiple of 2^-16.
        key: int32 key of shape (); with `None` (evaluation), x is returned.
        offset: position of x[:, 0] in its sequence, for callers that process chunks.

    Returns:
        (B, T, D), x with dropped entries set to zero and the others divided by the fraction kept.
    """
    dropped = round(p * 2**16)
    if key is None or dropped == 0:
        return x
    if dropped >= 2**16:
        return x * 0
    batch, length, width = x.shape
    draw = _mask_as_op if torch.compiler.is_compiling() else dropout_mask
    return x * draw(key, batch, length, width, dropped, offset).to(x.dtype).mul_(2**16 / (2**16 - dropped))


def dropout_mask(key: torch.Tensor, batch: int, length: int, width: int, dropped: int, offset: int) -> torch.Tensor:
    """Make the mask of `dropout`, (B, T, D) bool, True for kept entries; a fraction of `dropped` / 2^16 is False."""
    rows = torch.arange(batch, dtype=torch.int32, device=key.device)[:, None]
    positions = torch.arange(offset, offset + length, dtype=torch.int32, device=key.device)
    words = torch.arange((width + 1) // 2, dtype=torch.int32, device=key.device)
    bits = pair_scramble(fold(key, rows, positions)[..., None], fold(key, words))  # (B, T, D / 2)
    bits = (bits ^ _logical_shift(bits, 16)).view(torch.int16)[..., :width]  # two numbers of 16 bits each
    return bits >= dropped - 2**15


# Compilers would recompute the hash in every loop that reads the mask, and take minutes; an op is opaque to them.
# It is named after this module, so that a copy of this file elsewhere registers its own op.
_mask_as_op = torch.library.custom_op(re.sub(r"\W", "_", __name__) + "::dropout_mask", dropout_mask, mutates_args=())


@_mask_as_op.register_fake
def _(key, batch, length, width, dropped, offset):
    return key.new_empty(batch, length, width, dtype=torch.bool)
