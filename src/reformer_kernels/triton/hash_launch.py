"""Launches of the hashing kernels, and sums of the vectors outside of each tile."""

import torch
import triton

from .hashing import hash_tokens, sum_tiles
from .launch import as_rows, block_of, capability_of
from .tiles import choose_tiles

UNIT = 2.0**-32  # resolution of sums of unit vectors as integers, which do not depend on the order


def counts_of(
    mask: torch.Tensor | None, samples: torch.Tensor | None, counts: torch.Tensor | None, causal: bool,
    like: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Return the number of tokens in the mean of each token, (B, T) int64; `like`: (B, H, T, D)."""
    batch, _, length, _ = like.shape
    real = torch.ones(batch, length, dtype=torch.bool, device=like.device) if mask is None else mask
    so_far = real.cumsum(-1) + (0 if counts is None else counts[:, None])
    if samples is None:
        return so_far if causal else so_far[:, -1:].expand(-1, length)
    first, behind = torch.searchsorted(samples, samples), torch.searchsorted(samples, samples, right=True)
    behind = torch.arange(1, 1 + length, device=like.device).expand_as(first) if causal else behind
    so_far = torch.nn.functional.pad(so_far, (1, 0))
    return so_far.gather(-1, behind) - so_far.gather(-1, first)


def sums_outside(
    heads: torch.Tensor, tails: torch.Tensor, samples: torch.Tensor | None, sums: torch.Tensor | None, tile: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute `before` and `behind` of `hash_tokens` from the sums of `sum_tiles`, (B, H, tiles, D) each."""

    def running(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad((x.double() / UNIT).round().long().cumsum(2), (0, 0, 1, 0))

    tails = running(tails)
    before, heads = tails[:, :, :-1], tails if samples is None else running(heads)
    earlier = None if sums is None else sums[:, :, None]
    if samples is None:
        behind = heads[:, :, -1:] - heads[:, :, 1:]
    else:
        begins, ends = samples[:, ::tile].contiguous(), samples[:, tile - 1 :: tile]
        ends = ends if samples.shape[1] % tile == 0 else torch.cat([ends, samples[:, -1:]], dim=-1)
        first = torch.searchsorted(samples, begins)
        last = torch.searchsorted(samples, ends.contiguous(), right=True) - 1
        at, end = (x.div(tile, rounding_mode="floor")[:, None, :, None] for x in (first, last))
        before = before - tails.gather(2, at.expand_as(before))
        behind = heads.gather(2, (end + 1).expand_as(before)) - heads[:, :, 1:]
        earlier = None if earlier is None else earlier * (first == 0)[:, None, :, None]
    before, behind = before.double() * UNIT, behind.double() * UNIT
    before = before if earlier is None else before + earlier
    return before.float().contiguous(), behind.float().contiguous()


def run_hashing(
    vectors: torch.Tensor, rotations: torch.Tensor, factors: list[int], centered: bool, causal: bool,
    mask: torch.Tensor | None, samples: torch.Tensor | None, sums: torch.Tensor | None, counts: torch.Tensor | None,
    share: float,
) -> torch.Tensor:  # fmt: skip
    """Compute buckets, (B, H, R, T) int32; arguments are those of `torch_ops.lsh_buckets`."""
    batch, heads, length, size = vectors.shape
    rounds, columns = rotations.shape[2:]
    buckets = torch.empty(batch, heads, rounds, length, dtype=torch.int32, device=vectors.device)
    if not buckets.numel():
        return buckets
    vectors, rotations = as_rows(vectors.detach()), rotations.float().contiguous()
    samples = None if samples is None else samples.contiguous()
    block = block_of(size)
    tile, at_once, warps, stages = choose_tiles("hash", torch.float32, block, capability_of(vectors.device))
    grid = (batch * heads * triton.cdiv(length, tile),)
    of_tile = {"SIZE": size, "BLOCK": block, "TILE": tile, "MASKED": mask is not None, "PACKED": samples is not None}
    of_tile |= {"num_warps": warps, "num_stages": stages}
    real = None if mask is None else mask.contiguous().view(torch.uint8)
    before = behind = shares = None
    if centered:
        head_sums = torch.empty(batch, heads, triton.cdiv(length, tile), size, device=vectors.device)
        tail_sums = head_sums if samples is None else torch.empty_like(head_sums)
        sum_tiles[grid](vectors, real, samples, head_sums, tail_sums, heads, length, **of_tile)
        before, behind = sums_outside(head_sums, tail_sums, samples, sums, tile)
        shares = (share / counts_of(mask, samples, counts, causal, vectors).clamp(min=1)).float().contiguous()
    column, stride = 0, 1
    for factor in factors:
        hash_tokens[grid](
            vectors, real, samples, before, behind, shares, rotations, buckets, heads, length, rounds, columns, column,
            factor // 2, stride, COLUMNS=at_once, CENTERED=centered, CAUSAL=causal, **of_tile,
        )  # fmt: skip
        column, stride = column + factor // 2, stride * factor
    return buckets
