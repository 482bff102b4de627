"""Launches of the kernels of a generation step."""

import torch
import triton

from ..contract import MAX_POSITIONS, CacheTensors
from .decoding import attend_to_cache, place_tokens
from .launch import block_of, capability_of
from .tiles import choose_tiles


def run_decode_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, vectors: torch.Tensor | None, indices: torch.Tensor,
    cache: CacheTensors, local_window: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """Run `decode_attention`; the ring buffer of a local layer must hold the windows of all new tokens."""
    batch, heads, length, size = query.shape
    capacity = cache.keys.shape[2]
    query, key, value, indices = (x.detach().contiguous() for x in (query, key, value, indices))
    vectors = None if vectors is None else vectors.detach().contiguous()
    rounds = 0 if cache.rotations is None else cache.rotations.shape[2]
    window, columns = min(cache.window, capacity), sum(cache.factors) // 2
    num_buckets = 0 if cache.newest is None else cache.newest.shape[-1]
    chains = torch.empty(batch, heads, length, rounds, window, dtype=torch.int32, device=query.device)
    out = torch.empty_like(value)
    block = block_of(size)
    tile, at_once, warps, stages = choose_tiles("decode", torch.float32, block, capability_of(query.device))
    options = {"SIZE": size, "BLOCK": block, "HASHED": rounds > 0, "num_warps": warps, "num_stages": stages}
    place_tokens[(batch * heads,)](
        key, value, vectors, indices, cache.keys, cache.values, cache.buckets, cache.newest, cache.previous,
        cache.rotations, cache.sums, chains, heads, length, capacity, rounds, columns, num_buckets, window,
        cache.share, ROUNDS=triton.next_power_of_2(max(1, rounds)), COLUMNS=at_once, FACTORS=cache.factors,
        CENTERED=cache.sums is not None, **options,
    )  # fmt: skip
    attend_to_cache[(batch * heads * length,)](
        query, indices, cache.keys, cache.values, cache.buckets, chains, out, heads, length, capacity, rounds, window,
        min(local_window, MAX_POSITIONS), scale, TILE=tile, **options,
    )  # fmt: skip
    return out
