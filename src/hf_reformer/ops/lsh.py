"""Orders of tokens: angular LSH buckets, and the lines of places with their windows.

An *order* arranges the tokens of one head in a line and says which places every place sees. Laid end to end, the
orders form one line of `rounds * length` places. Both rules, windows and chunks, are such a line (`Orders`); one
attention op serves both. Nothing here carries gradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .prng import EXPLORATION, ROTATIONS, fold, normal_rows


class Orders(NamedTuple):
    """Rounds laid end to end: place p holds token `line[p]` and sees the places `lo[p] … hi[p]`.

    Places count within the flattened line of R * T places, modulo its length; `lo > hi` sees nothing.

    Attributes:
        line: (B, H, R, T) int32, the token at each place; every round is a permutation of the tokens.
        lo, hi: (B, H, R, T) int32; perhaps views of fewer numbers, so not to be written to.
        tile: queries are worked on in tiles of this many neighbouring places.
        before, after: no place of a tile sees further than `before` places ahead of the tile's first place or
            `after` places beyond its last.
        count_once: window rule. A pair shown by several rounds counts in the first of them only, and no window leaves
            its round. Otherwise (chunk rule) a pair counts as often as it is shown.
    """

    line: torch.Tensor
    lo: torch.Tensor
    hi: torch.Tensor
    tile: int
    before: int
    after: int
    count_once: bool


def factors_of(num_buckets: int | tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """Bucket factors as a tuple, whether given as one number or as several."""
    return (num_buckets,) if isinstance(num_buckets, int) else tuple(num_buckets)


def product_of(num_buckets: int | tuple[int, ...] | list[int]) -> int:
    """Number of buckets in all."""
    total = 1
    for factor in factors_of(num_buckets):
        total *= factor
    return total


def window_rotations(
    key: torch.Tensor,
    layer: int,
    heads: int,
    head_size: int,
    num_hashes: int,
    num_buckets: int | tuple[int, ...],
    normals: Callable = normal_rows,
) -> torch.Tensor:
    """Gaussian rotations (H, D, R, sum(factors) / 2), float32, a function of (key, layer, round) and of the place.

    `normals` does the work of `randomness.normal_rows`, faster.
    """
    columns = sum(factors_of(num_buckets)) // 2
    device = key.device
    rounds = fold(key, layer, ROTATIONS, torch.arange(num_hashes, dtype=torch.int32, device=device))  # (R)
    values = normals(rounds, heads * head_size * columns)  # (R, H·D·columns)
    return values.view(num_hashes, heads, head_size, columns).permute(1, 2, 0, 3)


def seeded_rotations(
    seed: int, heads: int, head_size: int, num_hashes: int, num_buckets: int | tuple[int, ...], like: torch.Tensor
) -> torch.Tensor:
    """The rotations transformers' own Reformer draws with `hash_seed`, from a private generator.

    Same shape as `window_rotations`, dtype and device of `like`, the same for every layer.
    """
    generator = torch.Generator(device=like.device).manual_seed(seed)
    shape = (heads, head_size, num_hashes, sum(factors_of(num_buckets)) // 2)
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
    for factor in factors_of(num_buckets):
        half = factor // 2
        part = projected[..., column : column + half]
        index = part.abs().argmax(dim=-1, keepdim=True)  # argmax over [x; -x]: the largest |x|, then its sign
        index = (index + half * (part.gather(-1, index) < 0)).squeeze(-1) * stride  # (B, H, T, R)
        buckets = index if buckets is None else buckets + index
        stride, column = stride * factor, column + half
    assert buckets is not None
    return buckets.to(torch.int32).transpose(-1, -2).contiguous()


def exploration_buckets(
    key: torch.Tensor, layer: int, heads: int, count: int, num_buckets: int, ranks: torch.Tensor
) -> torch.Tensor:
    """Buckets drawn at random per position, free of content: (B, H, count, T) int32.

    `ranks`: (B, T) int32, the number of real tokens before each token. The draw depends on (key, layer, order, head,
    rank) alone, so padding and the other rows of a batch change nothing.
    """
    orders = torch.arange(count, dtype=torch.int32, device=ranks.device)[:, None]
    head = torch.arange(heads, dtype=torch.int32, device=ranks.device)[:, None, None]
    draws = fold(key, layer, EXPLORATION, head, orders, ranks[:, None, None, :])  # (B, H, count, T)
    return (draws.to(torch.int64) + 2**31).mul_(num_buckets).bitwise_right_shift_(32).to(torch.int32)


@torch.no_grad()
def window_orders(
    buckets: list[tuple[torch.Tensor, int | None, int]],
    causal: bool,
    mask: torch.Tensor | None,
    tile: int = 32,
    sort: Callable | None = None,
) -> Orders:
    """Sort tokens by (bucket, position) and give every token its window inside its bucket.

    Args:
        buckets: groups of rounds: (buckets (B, H, R, T) int32, number of buckets if known, window). The position order
            is a group with one bucket. All share B, H and T (H may be 1 throughout).
        causal: a token sees itself and the `window - 1` places before it; otherwise `window // 2` on either side.
        mask: (B, T) bool, True for real tokens, or None. Padding stands at the end of the line and sees nothing.
        sort: does the work of `sorted_windows`, faster; gives tensors that may be written to.

    Returns:
        Orders with `count_once=True`; lo and hi never leave their round.
    """
    sort = sort or sorted_windows
    sorted_groups = [sort(group, count, window, causal, mask) for group, count, window in buckets]
    parts = zip(*sorted_groups, strict=True)
    line, lo, *hi = (part[0] if len(part) == 1 else torch.cat(part, dim=2) for part in parts)
    rounds, length = line.shape[2:]
    place = torch.arange(rounds * length, dtype=torch.int32, device=line.device).view(rounds, length)
    lo, last = lo.add_(place[:, :1]), hi[0].add_(place[:, :1]) if hi else place.expand_as(line)
    widest = max(window for *_, window in buckets)
    before, after = (torch.sym_min(far, length - 1) for far in reach(widest, causal))  # min, of traced lengths too
    return Orders(line, lo, last, torch.sym_min(tile, length), before, after, count_once=True)


def reach(window: int, causal: bool) -> tuple[int, int]:
    """How many places a token sees ahead of its own and behind it."""
    return (window - 1, 0) if causal else (window // 2, window // 2)


def sorted_windows(
    buckets: torch.Tensor, count: int | None, window: int, causal: bool, mask: torch.Tensor | None
) -> list[torch.Tensor]:
    """Line, lo and hi of a group of rounds, (B, H, R, T) int32, places counted within each round.

    Without hi if causal: a window then ends at its own place.
    """
    length = buckets.shape[-1]
    place = torch.arange(length, dtype=torch.int32, device=buckets.device)
    if mask is not None:
        buckets = torch.where(mask[:, None, None, :], buckets, torch.iinfo(torch.int32).max)
    if count == 1 and mask is None:
        line, first, last = place.expand_as(buckets), torch.zeros_like(buckets), torch.full_like(buckets, length - 1)
    else:
        values, line = torch.sort(buckets, dim=-1, stable=True)  # (B, H, R, T)
        border = values[..., 1:] != values[..., :-1]
        first = torch.nn.functional.pad(border * place[1:], (1, 0)).cummax(-1).values
        last = torch.nn.functional.pad(torch.where(border, place[:-1], length - 1), (0, 1), value=length - 1)
        last = last if causal else last.flip(-1).cummin(-1).values.flip(-1)
    back, on = reach(window, causal)
    lo = torch.maximum(first, place - back)
    real = None if mask is None else place < mask.sum(-1, dtype=torch.int32)[:, None, None, None]
    lo = lo if real is None else torch.where(real, lo, place + 1)
    if causal:
        return [line.to(torch.int32), lo]
    hi = torch.minimum(last, place + on)
    return [line.to(torch.int32), lo, hi if real is None else torch.where(real, hi, place)]


@torch.no_grad()
def chunk_orders(
    buckets: torch.Tensor,
    count: int,
    chunk: int,
    before: int,
    after: int,
    mask: torch.Tensor | None,
    sort: Callable | None = None,
) -> Orders:
    """The older rule: all rounds as one line, cut in chunks that see `before` and `after` neighbours, wrapping around.

    Args:
        buckets: (B, H, R, T) int32 (zeros for local attention, then R = 1); T is a multiple of `chunk`, or at most
            `chunk`, and then every token sees all.
        count: number of buckets; padding (mask False) sorts behind them.
        sort: does the work of `sorted_line`, faster.
    """
    rounds, length = buckets.shape[2:]
    place = torch.arange(rounds * length, dtype=torch.int32, device=buckets.device).view(rounds, length)
    if length <= chunk:
        line = place[:1].expand(*buckets.shape[:2], 1, length)
        return Orders(line, torch.zeros_like(line), torch.full_like(line, length - 1), length, 0, 0, count_once=False)
    line = (sort or sorted_line)(buckets, count, mask)
    lo = ((place // chunk - before) * chunk).expand_as(line)
    hi = ((place // chunk + after + 1) * chunk - 1).expand_as(line)
    return Orders(line, lo, hi, chunk, before * chunk, after * chunk, count_once=False)


def sorted_line(buckets: torch.Tensor, count: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Tokens sorted by (bucket, position), padding last: (B, H, R, T) int32."""
    if mask is not None:
        buckets = torch.where(mask[:, None, None, :], buckets, count)
    return torch.sort(buckets, dim=-1, stable=True).indices.to(torch.int32)
