"""Angular LSH (paper, section 2): rotations, buckets, random exploration buckets. Nothing here is differentiable."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..compat import may_look_at
from .prng import EXPLORATION, ROTATIONS, fold, normal_rows

SMALLEST_NORM = 1e-12  # lower bound of divisors in normalization
SMALLEST_DIFFERENCE = 2.0**-16  # between entries of a unit vector and of the mean; less is rounding error


def bucket_factors(num_buckets: int | tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """Return bucket factors as a tuple, given one number or several."""
    return (num_buckets,) if isinstance(num_buckets, int) else tuple(num_buckets)


def num_buckets_total(num_buckets: int | tuple[int, ...] | list[int]) -> int:
    """Return the total number of buckets."""
    return math.prod(bucket_factors(num_buckets))


def window_rotations(
    key: torch.Tensor,
    layer: int,
    heads: int,
    head_size: int,
    num_hashes: int,
    num_buckets: int | tuple[int, ...],
    normals: Callable[[torch.Tensor, int, int], torch.Tensor] = normal_rows,
) -> torch.Tensor:
    """Draw Gaussian rotations, (H, D, R, sum(factors) / 2) float32, a function of (key, layer, round) and the entry.

    `normals`: `prng.normal_rows` or a faster replacement.
    """
    columns = sum(bucket_factors(num_buckets)) // 2
    values = normals(fold(key, layer, ROTATIONS), num_hashes, heads * head_size * columns)  # (R, H·D·columns)
    return values.view(num_hashes, heads, head_size, columns).permute(1, 2, 0, 3)


def seeded_rotations(
    seed: int, heads: int, head_size: int, num_hashes: int, num_buckets: int | tuple[int, ...], like: torch.Tensor
) -> torch.Tensor:
    """Draw the rotations of transformers' own Reformer with `hash_seed`, from a private generator.

    Their shape is that of `window_rotations`, with dtype and device of `like`. They are the same for every layer.
    """
    generator = torch.Generator(device=like.device).manual_seed(seed)
    shape = (heads, head_size, num_hashes, sum(bucket_factors(num_buckets)) // 2)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


class Centering(NamedTuple):
    """The mean that is subtracted from vectors before hashing, over the real tokens of their own sample.

    Attributes:
        causal: average over the real tokens so far; otherwise over all.
        mask: (B, T) bool, True for real tokens; None: all are real.
        samples: (B, T) int32, index of each token's sample in a packed sequence: 0, 1, … in order; None: one each.
        sums: (B, H, D) float64 (`sum_dtype`), if causal: `unit_sums` of earlier tokens; None: there are none.
        counts: (B) int64, number of real tokens in `sums`.
        share: of the mean that is subtracted.
    """

    causal: bool
    mask: torch.Tensor | None = None
    samples: torch.Tensor | None = None
    sums: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    share: float = 1.0


def unit_rows(vectors: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Normalize vectors, (B, H, T, D), to unit length, in at least float32; padding and nonfinite ones become 0."""
    vectors = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
    norm = vectors.norm(dim=-1, keepdim=True)
    if not (may_look_at(norm) and bool(norm.isfinite().all())):  # squares of large numbers overflow
        smaller = vectors / vectors.abs().amax(-1, keepdim=True)
        vectors = torch.where(norm.isfinite(), vectors, smaller)
        norm = torch.where(norm.isfinite(), norm, smaller.norm(dim=-1, keepdim=True))
    used = norm.isfinite() if mask is None else norm.isfinite() & mask[:, None, :, None]
    return torch.where(used, vectors / norm.clamp(min=SMALLEST_NORM), 0.0)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for sums over a sequence, to avoid drift over a million tokens: float64, if supported."""
    return torch.float32 if device.type == "mps" else torch.float64


def unit_sums(vectors: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Sum `unit_rows` over tokens, (B, H, T, D) → (B, H, D) float64 (`sum_dtype`); head by head, to save memory."""
    dtype = sum_dtype(vectors.device)
    return torch.cat([unit_rows(head, mask).sum(2, dtype=dtype) for head in vectors.split(1, dim=1)], dim=1)


@torch.no_grad()
def centered(vectors: torch.Tensor, centering: Centering) -> torch.Tensor:
    """Normalize vectors and subtract (a share of) their mean, a common component that does not tell them apart.

    Without centering, vectors with a large common component crowd into a few buckets (MagicPIG, Chen et al. 2025,
    subtracts the mean of its keys before hashing for this reason). Attention weights are not affected.

    Args:
        vectors: (B, H, T, D), as for `lsh_buckets`.

    Returns:
        (B, H, T, D) in at least float32. Exactly 0 for padding and for vectors that equal the mean up to rounding,
        such as the first token of a causal sample and its repetitions.
    """
    heads = range(vectors.shape[1])  # one at a time, to save memory
    return torch.cat([_centered_head(vectors[:, head : head + 1], centering, head) for head in heads], dim=1)


def _centered_head(vectors: torch.Tensor, centering: Centering, head: int) -> torch.Tensor:
    rows, mask, samples = unit_rows(vectors, centering.mask), centering.mask, centering.samples
    counts = torch.ones_like(rows[..., :1]) if mask is None else mask[:, None, :, None]
    dtype = sum_dtype(rows.device)
    if samples is None and not centering.causal:
        sums, counts = (x.sum(2, keepdim=True, dtype=dtype) for x in (rows, counts))
    else:
        sums, counts = (x.cumsum(2, dtype=dtype) for x in (rows, counts))
    if centering.sums is not None and centering.counts is not None:
        sums, counts = sums + centering.sums[:, head, None, None], counts + centering.counts[:, None, None, None]
    if samples is not None:
        sums, counts = (_within_samples(x, samples.contiguous(), centering.causal) for x in (sums, counts))
    rows = (rows - sums * (centering.share / counts.clamp(min=1))).to(rows.dtype)
    used = rows.abs().amax(-1, keepdim=True) >= SMALLEST_DIFFERENCE
    return torch.where(used if mask is None else used & mask[:, None, :, None], rows, 0.0)


def _within_samples(sums: torch.Tensor, samples: torch.Tensor, causal: bool) -> torch.Tensor:
    """Convert running sums, (B, H, T, D), to sums over each token's sample, (B, T); if causal, up to the token."""
    sums = torch.nn.functional.pad(sums, (0, 0, 1, 0))
    first, behind = torch.searchsorted(samples, samples), torch.searchsorted(samples, samples, right=True)
    behind = torch.arange(1, 1 + samples.shape[1], device=samples.device).expand_as(first) if causal else behind
    first, behind = (x[:, None, :, None].expand(-1, sums.shape[1], -1, sums.shape[3]) for x in (first, behind))
    return sums.gather(2, behind) - sums.gather(2, first)


@torch.no_grad()
def lsh_buckets(
    vectors: torch.Tensor,
    rotations: torch.Tensor,
    num_buckets: int | tuple[int, ...],
    centering: Centering | None = None,
) -> torch.Tensor:
    """Hash vectors by angular LSH (paper, section 2): h(x) = argmax([xR; -xR]) in every round, combined over factors.

    Args:
        vectors: (B, H, T, D), shared query/key vectors, not normalized.
        rotations: (H, D, R, sum(factors) / 2).
        centering: hash `centered(vectors, centering)`; None: the vectors themselves.

    Returns:
        (B, H, R, T) int32, buckets from 0 to the product of the factors - 1; the first factor varies fastest.
    """
    heads, head_size, num_hashes, columns = rotations.shape
    vectors = vectors if centering is None else centered(vectors, centering)
    dtype = torch.promote_types(vectors.dtype, rotations.dtype)
    vectors, flat = vectors.to(dtype), rotations.to(dtype).reshape(heads, head_size, num_hashes * columns)
    with torch.autocast(vectors.device.type, enabled=False):
        projected = torch.matmul(vectors, flat).unflatten(-1, (num_hashes, columns))  # (B, H, T, R, columns)
    buckets, stride, column = None, 1, 0
    for factor in bucket_factors(num_buckets):
        half = factor // 2
        part = projected[..., column : column + half]
        index = part.abs().argmax(dim=-1, keepdim=True)  # argmax over [x; -x]: the largest |x|, then its sign
        index = (index + half * (part.gather(-1, index) < 0)).squeeze(-1) * stride  # (B, H, T, R)
        buckets = index if buckets is None else buckets + index
        stride, column = stride * factor, column + half
    assert buckets is not None
    return buckets.to(torch.int32).transpose(-1, -2).contiguous()


def exploration_buckets(
    key: torch.Tensor, layer: int, heads: int, num_rounds: int, num_buckets: int, ranks: torch.Tensor
) -> torch.Tensor:
    """Draw random buckets, independent of content: (B, H, num_rounds, T) int32.

    `ranks`: (B, T) int32, the number of real tokens before each token. A bucket depends only on (key, layer, round,
    head, rank), so padding and the other sequences of a batch have no effect.
    """
    rounds = torch.arange(num_rounds, dtype=torch.int32, device=ranks.device)[:, None]
    head = torch.arange(heads, dtype=torch.int32, device=ranks.device)[:, None, None]
    draws = fold(key, layer, EXPLORATION, head, rounds, ranks[:, None, None, :])  # (B, H, num_rounds, T)
    return (draws.to(torch.int64) + 2**31).mul_(num_buckets).bitwise_right_shift_(32).to(torch.int32)


def legacy_num_buckets(length: int, chunk: int, max_positions: int) -> int | tuple[int, int]:
    """Return the legacy rule's number of buckets: a power of two near 2 * length / chunk, factorized if large."""
    bits = (2 * (length // chunk)).bit_length() - 1
    limit = 2 * max(int((max_positions // chunk) ** 0.5), chunk)
    return 2**bits if 2**bits <= limit else (2 ** (bits // 2), 2 ** (bits - bits // 2))
