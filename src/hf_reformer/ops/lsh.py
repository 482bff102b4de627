"""Angular LSH (paper, section 2): rotations, buckets, and random exploration buckets. Nothing carries gradients."""

import math
from collections.abc import Callable

import torch

from .prng import EXPLORATION, ROTATIONS, fold, normal_rows


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
    normals: Callable[[torch.Tensor, int], torch.Tensor] = normal_rows,
) -> torch.Tensor:
    """Gaussian rotations (H, D, R, sum(factors) / 2), float32, a function of (key, layer, round) and of the entry.

    `normals` does the work of `prng.normal_rows`, perhaps faster.
    """
    columns = sum(bucket_factors(num_buckets)) // 2
    device = key.device
    rounds = fold(key, layer, ROTATIONS, torch.arange(num_hashes, dtype=torch.int32, device=device))  # (R)
    values = normals(rounds, heads * head_size * columns)  # (R, H·D·columns)
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


@torch.no_grad()
def lsh_buckets(vectors: torch.Tensor, rotations: torch.Tensor, num_buckets: int | tuple[int, ...]) -> torch.Tensor:
    """Angular LSH (paper, section 2): h(x) = argmax([xR; -xR]) for every round, factors combined.

    Args:
        vectors: (B, H, T, D) shared query/key vectors, not normalised, not rotated by position.
        rotations: (H, D, R, sum(factors) / 2).

    Returns:
        (B, H, R, T) int32 buckets, 0 … product of the factors - 1; the first factor varies fastest.
    """
    heads, head_size, num_hashes, columns = rotations.shape
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
