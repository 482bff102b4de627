"""Angular LSH (paper, section 2): rotations, buckets, and random exploration buckets. Nothing carries gradients."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from ..compat import may_look_at
from .prng import EXPLORATION, ROTATIONS, fold, normal_rows

SMALLEST_NORM = 1e-12  # that a vector is divided by
SMALLEST_DIFFERENCE = 2.0**-16  # of an entry of a unit vector from the mean's: less is rounding


def bucket_factors(num_buckets: int | tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """Bucket factors as a tuple, whether given as one number or as several."""
    return (num_buckets,) if isinstance(num_buckets, int) else tuple(num_buckets)


def num_buckets_total(num_buckets: int | tuple[int, ...] | list[int]) -> int:
    """Number of buckets in all."""
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
    """Gaussian rotations (H, D, R, sum(factors) / 2), float32, a function of (key, layer, round) and of the entry.

    `normals` does the work of `prng.normal_rows`, perhaps faster.
    """
    columns = sum(bucket_factors(num_buckets)) // 2
    values = normals(fold(key, layer, ROTATIONS), num_hashes, heads * head_size * columns)  # (R, H·D·columns)
    return values.view(num_hashes, heads, head_size, columns).permute(1, 2, 0, 3)


def seeded_rotations(
    seed: int, heads: int, head_size: int, num_hashes: int, num_buckets: int | tuple[int, ...], like: torch.Tensor
) -> torch.Tensor:
    """The rotations that transformers' own Reformer draws with `hash_seed`, from a private generator.

    Same shape as `window_rotations`, dtype and device of `like`, the same for every layer.
    """
    generator = torch.Generator(device=like.device).manual_seed(seed)
    shape = (heads, head_size, num_hashes, sum(bucket_factors(num_buckets)) // 2)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


class Centering(NamedTuple):
    """Which mean is taken off the vectors before they are hashed: that of the tokens of their own sample.

    Attributes:
        causal: of the real tokens so far; otherwise of all.
        mask: (B, T) bool, True for real tokens; None: all are.
        samples: (B, T) int32, which sample of a packed sequence a token belongs to, 0, 1, … in turn; None: one each.
        sums: (B, H, D) float64 (`sum_dtype`), causal: `unit_sums` of the tokens before these; None: there are none.
        counts: (B) int64, how many real tokens those are.
    """

    causal: bool
    mask: torch.Tensor | None = None
    samples: torch.Tensor | None = None
    sums: torch.Tensor | None = None
    counts: torch.Tensor | None = None


def unit_rows(vectors: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Vectors (B, H, T, D) at unit length, in at least float32; 0 for padding and for what is not finite."""
    vectors = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
    norm = vectors.norm(dim=-1, keepdim=True)
    if not (may_look_at(norm) and bool(norm.isfinite().all())):  # squares of large numbers are not finite
        smaller = vectors / vectors.abs().amax(-1, keepdim=True)
        vectors = torch.where(norm.isfinite(), vectors, smaller)
        norm = torch.where(norm.isfinite(), norm, smaller.norm(dim=-1, keepdim=True))
    used = norm.isfinite() if mask is None else norm.isfinite() & mask[:, None, :, None]
    return torch.where(used, vectors / norm.clamp(min=SMALLEST_NORM), 0.0)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Of sums over a sequence, so that a million tokens do not drift: float64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def unit_sums(vectors: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """`unit_rows` of (B, H, T, D) added up, (B, H, D) float64; head by head, to save memory."""
    dtype = sum_dtype(vectors.device)
    return torch.cat([unit_rows(head, mask).sum(2, dtype=dtype) for head in vectors.split(1, dim=1)], dim=1)


@torch.no_grad()
def centered(vectors: torch.Tensor, centering: Centering) -> torch.Tensor:
    """Unit vectors less their mean: what all of them share tells none of them apart.

    Hashed as they are, vectors with a large common direction crowd into a few buckets (MagicPIG, Chen et al. 2025,
    takes the mean off its keys before hashing for this reason). Attention weights are not touched.

    Args:
        vectors: (B, H, T, D), as `lsh_buckets` takes them.

    Returns:
        (B, H, T, D) in at least float32. Exactly 0 where a vector is the mean but for rounding, such as the first
        token of a causal sample and its repetitions, and for padding.
    """
    heads = range(vectors.shape[1])  # one after the other, to save memory
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
    rows = (rows - sums * (1 / counts.clamp(min=1))).to(rows.dtype)
    used = rows.abs().amax(-1, keepdim=True) >= SMALLEST_DIFFERENCE
    return torch.where(used if mask is None else used & mask[:, None, :, None], rows, 0.0)


def _within_samples(sums: torch.Tensor, samples: torch.Tensor, causal: bool) -> torch.Tensor:
    """From running sums (B, H, T, D) those over each token's own sample (B, T), causal: up to the token."""
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
    """Angular LSH (paper, section 2): h(x) = argmax([xR; -xR]) for every round, factors combined.

    Args:
        vectors: (B, H, T, D) shared query/key vectors, not normalized.
        rotations: (H, D, R, sum(factors) / 2).
        centering: hash them as `centered` returns them; None: as they are.

    Returns:
        (B, H, R, T) int32 buckets, 0 … product of the factors - 1; the first factor varies fastest.
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
    """Random buckets, independent of content: (B, H, num_rounds, T) int32.

    `ranks`: (B, T) int32, the number of real tokens before each token. A bucket depends on (key, layer, round, head,
    rank) alone, so padding and the other sequences of a batch change nothing.
    """
    rounds = torch.arange(num_rounds, dtype=torch.int32, device=ranks.device)[:, None]
    head = torch.arange(heads, dtype=torch.int32, device=ranks.device)[:, None, None]
    draws = fold(key, layer, EXPLORATION, head, rounds, ranks[:, None, None, :])  # (B, H, num_rounds, T)
    return (draws.to(torch.int64) + 2**31).mul_(num_buckets).bitwise_right_shift_(32).to(torch.int32)


def legacy_num_buckets(length: int, chunk: int, max_positions: int) -> int | tuple[int, int]:
    """The legacy rule by the input's length: a power of two near 2 * length / chunk, factorised if it is large."""
    bits = (2 * (length // chunk)).bit_length() - 1
    limit = 2 * max(int((max_positions // chunk) ** 0.5), chunk)
    return 2**bits if 2**bits <= limit else (2 ** (bits // 2), 2 ** (bits - bits // 2))
