"""What the backends share: the version of their interface, limits, and numbers that `hf_reformer.ops` defines."""

from typing import NamedTuple

import torch

CONTRACT = 9  # of what hf_reformer.ops.dispatch calls; another number wherever that changes
MAX_POSITIONS = 2**29  # sorted positions of a head, so that a position that wraps around still fits in int32

# Those of hf_reformer.ops.reference and .prng; a test compares them.
SELF_SCORE, MASKED_SCORE = -1e5, -1e9
GOLDEN, MIX_1, MIX_2 = -1640531527, -2048144789, -1028477387


class CacheTensors(NamedTuple):
    """What a layer's cache holds. The kernels write new tokens to its tensors.

    Attributes:
        keys, values: (B, H, capacity, D) contiguous, by a token's index modulo the capacity.
        buckets: (B, H, R, capacity) int32; this and the following are those of LSH layers alone.
        newest, previous: of `bucket_tables.BucketChains`.
        rotations: (H, D, R, sum(factors) / 2) float32.
        factors: bucket factors.
        window: newest members of every bucket that a token attends to.
        sums: (B, H, D) float64, the unit vectors so far, added up; None: vectors are hashed without a mean taken off.
    """

    keys: torch.Tensor
    values: torch.Tensor
    buckets: torch.Tensor | None = None
    newest: torch.Tensor | None = None
    previous: torch.Tensor | None = None
    rotations: torch.Tensor | None = None
    factors: tuple[int, ...] = ()
    window: int = 0
    sums: torch.Tensor | None = None


def check_positions(perm: torch.Tensor) -> None:
    """Raise ValueError for permutations (B, H, R, T) of more than MAX_POSITIONS sorted positions."""
    positions = perm.shape[2] * perm.shape[3]
    if positions > MAX_POSITIONS:
        raise ValueError(
            f"{positions} sorted positions (rounds x tokens) are more than {MAX_POSITIONS}. Split the sequence."
        )


def keep_threshold(dropout: float) -> int:
    """A pair is kept where its random int32 is at least this number (`hf_reformer.ops.prng.keep_threshold`)."""
    return min(round(dropout * 2**32), 2**32 - 1) - 2**31


def check_fits(cache: CacheTensors, query: torch.Tensor, indices: torch.Tensor) -> None:
    """Raise ValueError unless the cache holds as many rows as there are new queries (B, H, T, D), indices (B, T)."""
    batch, heads, length, size = query.shape
    if cache.keys.shape[:2] != (batch, heads) or cache.keys.shape[3] != size or indices.shape != (batch, length):
        raise ValueError(f"A cache of {tuple(cache.keys.shape)} cannot take tokens of {tuple(query.shape)}.")
