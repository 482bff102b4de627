"""Attention layouts: the order of tokens in every round, and the sorted positions that every token attends to.

A *round* is one sort order of the tokens of a head. All rounds are concatenated to `rounds * length` sorted positions.
Both rules, windows and chunks, have this form (`AttentionLayout`), so one attention op serves both. Nothing here is
differentiable.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

NO_LIMIT = 2**30  # a window that shows everything: heads have at most half as many positions, which are int32

Sort = Callable[
    [Sequence[torch.Tensor], torch.Tensor | None, Sequence[int | None], Sequence[int], Sequence[int], int],
    list[torch.Tensor],
]


class AttentionLayout(NamedTuple):
    """The order and windows of tokens: `perm[p]` attends to the sorted positions `window_start[p] … window_end[p]`.

    Sorted positions p run through all R * T, modulo that number; a window that ends before it starts is empty.

    Attributes:
        perm: (B, H, R, T) int32, the token at each sorted position; every round is a permutation of the tokens.
        window_start, window_end: (B, H, R, T) int32; possibly expanded views, so do not write to them.
        block_size: queries are processed in blocks of this many neighboring sorted positions.
        left_reach, right_reach: no window of a block begins more than `left_reach` positions before the block's first
            position, or ends more than `right_reach` positions after its last.
        dedup_pairs: window rule: a pair that is visible in several rounds only counts in the first of them, and no
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
    groups: Sequence[tuple[torch.Tensor, int | None, int]],
    causal: bool,
    mask: torch.Tensor | None,
    block_size: int = 32,
    sort: Sort | None = None,
) -> AttentionLayout:
    """Sort tokens by (bucket, position) and give every token its window inside its bucket.

    Args:
        groups: groups of rounds: (buckets (B, H, R, T) int32, number of buckets if known, window). Sorting by position
            is a group with one bucket. All share B, H and T (H may be 1 throughout). int64: buckets of many samples.
        causal: a window is the token itself and the `window - 1` positions before it; otherwise, `window // 2`
            positions on either side.
        mask: (B, T) bool, True for real tokens, or None. Padding is sorted last and has empty windows.
        sort: a faster replacement of `sort_by_bucket`.

    Returns:
        AttentionLayout with `dedup_pairs=True`; windows never leave their round.
    """
    fixed = sort is None and torch.compiler.is_exporting()  # pure PyTorch, in a graph for any length
    buckets, counts, windows = zip(*groups, strict=True)
    lefts, rights = zip(*(window_extent(window, causal) for window in windows), strict=True)
    outputs = 2 if causal else 3  # causal windows end at their own positions
    perm, start, *ends = (sort or sort_by_bucket)(buckets, mask, counts, lefts, rights, outputs)
    rounds, length = perm.shape[2:]
    last = ends[0] if ends else _sorted_positions(rounds, length, perm.device).expand_as(perm)
    left, right = max(lefts), max(rights)
    if not fixed:
        block_size, left, right = (
            torch.sym_min(size, most) for size, most in ((block_size, length), (left, length - 1), (right, length - 1))
        )
    return AttentionLayout(perm, start, last, block_size, left, right, dedup_pairs=True)


def window_extent(window: int, causal: bool) -> tuple[int, int]:
    """Return the number of sorted positions that a window reaches to the left and to the right of its token."""
    window = min(window, NO_LIMIT)
    return (window - 1, 0) if causal else (window // 2, window // 2)


def sort_by_bucket(
    groups: Sequence[torch.Tensor],
    mask: torch.Tensor | None,
    counts: Sequence[int | None],
    left_reaches: Sequence[int],
    right_reaches: Sequence[int],
    outputs: int,
) -> list[torch.Tensor]:
    """Return the first `outputs` of perm, window_start and window_end for all groups, (B, H, R, T) int32 each.

    Tokens are sorted by (bucket, position), padding last. A window extends by the group's reach to either side within
    its bucket; sorted positions are numbered through all rounds.

    Args:
        groups: buckets of the rounds of each group, (B, H, rounds of the group, T).
        counts, left_reaches, right_reaches: for each group, number of buckets if known, and reach of its windows.
    """
    each = zip(groups, counts, left_reaches, right_reaches, strict=True)
    found = [_sort_group(buckets, mask, count, left, right, outputs) for buckets, count, left, right in each]
    parts = zip(*found, strict=True)
    perm, *bounds = (part[0] if len(part) == 1 else torch.cat(part, dim=2) for part in parts)
    if len(groups) == 1 and groups[0].shape[2] == 1:
        return [perm, *bounds]
    rounds, length = perm.shape[2:]
    before = _sorted_positions(rounds, length, perm.device)[:, :1]
    return [perm, *(bound + before for bound in bounds)]


def _sorted_positions(rounds: int, length: int, device: torch.device) -> torch.Tensor:
    return torch.arange(rounds * length, dtype=torch.int32, device=device).view(rounds, length)


def _sort_group(
    buckets: torch.Tensor,
    mask: torch.Tensor | None,
    num_buckets: int | None,
    left_reach: int,
    right_reach: int,
    outputs: int,
) -> list[torch.Tensor]:
    """Sort one group like `sort_by_bucket`, but with sorted positions numbered within each round."""
    length = buckets.shape[-1]
    sorted_pos = torch.arange(length, dtype=torch.int32, device=buckets.device)
    if mask is not None:
        buckets = torch.where(mask[:, None, None, :], buckets, torch.iinfo(buckets.dtype).max)
    if num_buckets == 1 and mask is None:
        perm, first = sorted_pos.expand_as(buckets), torch.zeros_like(buckets)
        last = torch.full_like(buckets, length - 1)
    elif torch.onnx.is_in_onnx_export():
        perm, first, last = _sort_in_onnx(buckets, mask, num_buckets)
        if outputs == 1:
            return [perm.to(torch.int32)]
    else:
        values, perm = torch.sort(buckets, dim=-1, stable=True)  # (B, H, R, T)
        if outputs == 1:
            return [perm.to(torch.int32)]
        begins = values != values.roll(1, dims=-1)  # 0 is correct for the first position in any case
        first = (begins * sorted_pos).cummax(-1).values
        if outputs == 3:
            last = torch.where(values != values.roll(-1, dims=-1), sorted_pos, length - 1)  # likewise for the last
            last = last.flip(-1).cummin(-1).values.flip(-1)
    start = torch.maximum(first, sorted_pos - left_reach)
    real = None if mask is None else sorted_pos < mask.sum(-1, dtype=torch.int32)[:, None, None, None]
    start = start if real is None else torch.where(real, start, sorted_pos + 1)
    if outputs < 3:
        return [perm.to(torch.int32), start][:outputs]
    end = torch.minimum(last, sorted_pos + right_reach)
    return [perm.to(torch.int32), start, end if real is None else torch.where(real, end, sorted_pos)]


def _sort_in_onnx(buckets: torch.Tensor, mask: torch.Tensor | None, num_buckets: int | None) -> list[torch.Tensor]:
    """Return perm and the bounds of every token's bucket, for ONNX, which has neither stable sort nor cummax."""
    if num_buckets is None:
        raise ValueError(
            "Samples packed into a row by `position_ids` cannot be exported to ONNX, which cannot sort a variable "
            "number of samples. Export without `position_ids`, or with `torch.export`."
        )
    buckets, length = buckets.long(), buckets.shape[-1]
    if mask is not None:
        buckets = torch.where(mask[:, None, None, :], buckets, num_buckets)  # padding gets an extra last bucket
    numbers = buckets * length + torch.arange(length, device=buckets.device)  # all distinct
    perm = torch.sort(numbers, dim=-1).indices
    counts = torch.zeros(*buckets.shape[:-1], num_buckets + 1, dtype=torch.int64, device=buckets.device)
    counts = counts.scatter_add(-1, buckets, torch.ones_like(buckets))
    ends, values = counts.cumsum(-1), buckets.gather(-1, perm)
    bounds = (ends - counts, ends - 1)
    return [perm, *(x.gather(-1, values).to(torch.int32) for x in bounds)]


@torch.no_grad()
def chunk_layout(
    buckets: torch.Tensor,
    num_buckets: int,
    chunk: int,
    chunks_before: int,
    chunks_after: int,
    mask: torch.Tensor | None,
    sort: Sort | None = None,
) -> AttentionLayout:
    """Make the layout of the legacy rule: concatenated rounds, cut into chunks that attend to neighbors, cyclically.

    Args:
        buckets: (B, H, R, T) int32 (zeros for local attention, with R = 1); T is a multiple of `chunk`, or at most
            `chunk`, in which case all tokens attend to all.
        num_buckets: number of buckets; padding (mask False) is sorted after them.
        sort: a faster replacement of `sort_by_bucket`.
    """
    rounds, length = buckets.shape[2:]
    sorted_pos = _sorted_positions(rounds, length, buckets.device)
    if length <= chunk:
        perm = sorted_pos[:1].expand(*buckets.shape[:2], 1, length)
        return AttentionLayout(
            perm, torch.zeros_like(perm), torch.full_like(perm, length - 1), length, 0, 0, dedup_pairs=False
        )
    (perm,) = (sort or sort_by_bucket)([buckets], mask, [num_buckets], [0], [0], 1)
    start = ((sorted_pos // chunk - chunks_before) * chunk).expand_as(perm)
    end = ((sorted_pos // chunk + chunks_after + 1) * chunk - 1).expand_as(perm)
    return AttentionLayout(perm, start, end, chunk, chunks_before * chunk, chunks_after * chunk, dedup_pairs=False)


@torch.no_grad()
def sees_any(
    tokens: torch.Tensor, layout: AttentionLayout, causal: bool, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Find the tokens that attend to any of `tokens`, (B, H, T) bool → (B, H, T) bool, in time linear in the length.

    causal, mask: as in `dispatch.windowed_attention`, for the chunk rule; what they mask does not count.
    """
    heads, length = tokens.shape[1], layout.perm.shape[-1]
    perm = layout.perm.expand(-1, heads, -1, -1).long()  # (B, H, R, T)
    if layout.dedup_pairs:
        flags = tokens[:, :, None].expand_as(perm).gather(-1, perm).flatten(2)
        sums = torch.nn.functional.pad(flags.cumsum(-1), (1, 0))  # (B, H, 1 + R·T): how many lie before a position
        bounds = (layout.window_start, layout.window_end + 1)
        before, up_to = (sums.gather(-1, x.expand_as(perm).flatten(2).long()) for x in bounds)
        seen = (up_to > before).view_as(perm)
    else:  # causal: the first of them in a token's chunk or neighboring chunks must not lie after the token
        tokens = tokens if mask is None else tokens & mask[:, None]
        number = torch.arange(length, device=perm.device)
        first = torch.where(tokens, number, length)[:, :, None].expand_as(perm).gather(-1, perm)
        first = first.flatten(2).unflatten(-1, (-1, layout.block_size)).amin(-1)  # (B, H, chunks)
        left, right = (x // layout.block_size for x in (layout.left_reach, layout.right_reach))
        first = torch.stack([first.roll(shift, -1) for shift in range(-right, left + 1)]).amin(0)
        seen = first.repeat_interleave(layout.block_size, -1).view_as(perm) <= (perm if causal else length - 1)
    return torch.zeros_like(seen).scatter(-1, perm, seen).any(2)
