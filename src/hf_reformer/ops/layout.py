"""Attention layouts: how tokens are sorted in every round, and which sorted positions every token attends to.

A *round* is one sort order of the tokens of a head. All rounds end to end are one sequence of `rounds * length` sorted
positions. Both rules, windows and chunks, are such a sequence (`AttentionLayout`), so one attention op serves both.
Nothing here carries gradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class AttentionLayout(NamedTuple):
    """Sorted position p holds token `perm[p]`, whose window is the sorted positions `window_start[p] … window_end[p]`.

    Sorted positions count through all R * T, modulo that number; a window that ends before it starts is empty.

    Attributes:
        perm: (B, H, R, T) int32, the token at each sorted position; every round is a permutation of the tokens.
        window_start, window_end: (B, H, R, T) int32; perhaps views of fewer numbers, so not to be written to.
        block_size: queries are processed in blocks of this many neighbouring sorted positions.
        left_reach, right_reach: no window of a block begins more than `left_reach` positions before the block's first
            position, or ends more than `right_reach` positions behind its last.
        dedup_pairs: window rule. A pair that is visible in several rounds counts in the first of them only, and no
            window leaves its round. Otherwise (chunk rule) a pair counts as often as it is visible.
    """

    perm: torch.Tensor
    window_start: torch.Tensor
    window_end: torch.Tensor
    block_size: int
    left_reach: int
    right_reach: int
    dedup_pairs: bool


@torch.no_grad()
def window_layout(
    buckets: list[tuple[torch.Tensor, int | None, int]],
    causal: bool,
    mask: torch.Tensor | None,
    tile: int = 32,
    sort: Callable | None = None,
) -> AttentionLayout:
    """Sort tokens by (bucket, position) and give every token its window inside its bucket.

    Args:
        buckets: groups of rounds: (buckets (B, H, R, T) int32, number of buckets if known, window). The position order
            is a group with one bucket. All share B, H and T (H may be 1 throughout).
        causal: a token sees itself and the `window - 1` places before it; otherwise `window // 2` on either side.
        mask: (B, T) bool, True for real tokens, or None. Padding stands at the end of the line and sees nothing.
        sort: does the work of `bucket_windows`, faster; gives tensors that may be written to.

    Returns:
        AttentionLayout with `dedup_pairs=True`; lo and hi never leave their round.
    """
    sort = sort or bucket_windows
    sorted_groups = [sort(group, count, window, causal, mask) for group, count, window in buckets]
    parts = zip(*sorted_groups, strict=True)
    line, lo, *hi = (part[0] if len(part) == 1 else torch.cat(part, dim=2) for part in parts)
    rounds, length = line.shape[2:]
    place = torch.arange(rounds * length, dtype=torch.int32, device=line.device).view(rounds, length)
    lo, last = lo.add_(place[:, :1]), hi[0].add_(place[:, :1]) if hi else place.expand_as(line)
    widest = max(window for *_, window in buckets)
    before, after = (torch.sym_min(far, length - 1) for far in reach(widest, causal))  # min, of traced lengths too
    return AttentionLayout(line, lo, last, torch.sym_min(tile, length), before, after, dedup_pairs=True)


def reach(window: int, causal: bool) -> tuple[int, int]:
    """How many places a token sees ahead of its own and behind it."""
    return (window - 1, 0) if causal else (window // 2, window // 2)


def bucket_windows(
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
def chunk_layout(
    buckets: torch.Tensor,
    count: int,
    chunk: int,
    before: int,
    after: int,
    mask: torch.Tensor | None,
    sort: Callable | None = None,
) -> AttentionLayout:
    """The older rule: all rounds as one line, cut in chunks that see `before` and `after` neighbours, wrapping around.

    Args:
        buckets: (B, H, R, T) int32 (zeros for local attention, then R = 1); T is a multiple of `chunk`, or at most
            `chunk`, and then every token sees all.
        count: number of buckets; padding (mask False) sorts behind them.
        sort: does the work of `sort_by_bucket`, faster.
    """
    rounds, length = buckets.shape[2:]
    place = torch.arange(rounds * length, dtype=torch.int32, device=buckets.device).view(rounds, length)
    if length <= chunk:
        line = place[:1].expand(*buckets.shape[:2], 1, length)
        return AttentionLayout(
            line, torch.zeros_like(line), torch.full_like(line, length - 1), length, 0, 0, dedup_pairs=False
        )
    line = (sort or sort_by_bucket)(buckets, count, mask)
    lo = ((place // chunk - before) * chunk).expand_as(line)
    hi = ((place // chunk + after + 1) * chunk - 1).expand_as(line)
    return AttentionLayout(line, lo, hi, chunk, before * chunk, after * chunk, dedup_pairs=False)


def sort_by_bucket(buckets: torch.Tensor, count: int, mask: torch.Tensor | None) -> torch.Tensor:
    """Tokens sorted by (bucket, position), padding last: (B, H, R, T) int32."""
    if mask is not None:
        buckets = torch.where(mask[:, None, None, :], buckets, count)
    return torch.sort(buckets, dim=-1, stable=True).indices.to(torch.int32)
