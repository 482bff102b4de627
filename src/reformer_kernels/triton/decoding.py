"""Generation kernels: new tokens are written to a cache and attend to the tokens in their windows.

Two launches are used, since results of one are visible to all threads of the next. The members of a token's buckets
(`hf_reformer.ops.bucket_tables`) are passed from one to the other as lists.
"""

import triton
import triton.language as tl

from .hashing import SMALLEST_DIFFERENCE, unit_length
from .pairs import FLOOR, LOG2_E, SELF


@triton.jit
def bucket_of(
    vector, rotations, head, rounds, round, columns, SIZE: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    FACTORS: tl.constexpr,
):  # fmt: skip
    """Compute the bucket of a vector (BLOCK) in one round, a scalar."""
    d = tl.arange(0, BLOCK)[:, None]
    turn = rotations + ((head * SIZE + d).to(tl.int64) * rounds + round) * columns
    bucket, stride = 0, 1
    for factor in tl.static_range(len(FACTORS)):
        half = FACTORS[factor] // 2
        best, index = -1.0, 0
        for start in range(0, half, COLUMNS):
            c = start + tl.arange(0, COLUMNS)
            there = tl.load(turn + c[None, :], mask=(d < SIZE) & (c < half)[None, :], other=0.0)
            turned = tl.sum(vector[:, None] * there, axis=0)
            lengths = tl.where(c < half, tl.abs(turned), -1.0)
            largest, where = tl.max(lengths, axis=0), tl.argmax(lengths, axis=0)
            signed = tl.sum(tl.where(c == start + where, turned, 0.0), axis=0)
            index = tl.where(largest > best, start + where + tl.where(signed < 0, half, 0), index)
            best = tl.maximum(best, largest)
        bucket += index * stride
        stride *= FACTORS[factor]
        turn += half
    return bucket


@triton.jit(do_not_specialize=["length", "capacity", "rounds", "columns", "num_buckets", "window"])
def place_tokens(
    key, value, vectors, indices, keys, values, buckets, newest, previous, rotations, sums, chains, heads, length,
    capacity, rounds, columns, num_buckets, window, share, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    ROUNDS: tl.constexpr, COLUMNS: tl.constexpr, FACTORS: tl.constexpr, HASHED: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """Write the new tokens of one head of one sequence to the cache, one after another.

    key, value, vectors: (B, H, N, SIZE), for N new tokens; vectors are hashed.
    indices: (B, N) int64, the tokens' indices in their sequences; negative for padding.
    keys … sums: the fields of `contract.CacheTensors`.
    share: of the mean that is subtracted before hashing.
    chains: (B, H, N, R, window) int32, for every token 1 + the newest members of its buckets, itself first; 0: none.
    ROUNDS: R, padded to a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    d, lane = tl.arange(0, BLOCK), tl.arange(0, ROUNDS)
    real, exists = d < SIZE, lane < rounds
    for n in range(length):
        index = tl.load(indices + batch * length + n)
        if index >= 0:
            new = (row * length + n) * SIZE + d
            slot = (row * capacity + index % capacity) * SIZE + d
            tl.store(keys + slot, tl.load(key + new, mask=real).to(keys.dtype.element_ty), mask=real)
            tl.store(values + slot, tl.load(value + new, mask=real).to(values.dtype.element_ty), mask=real)
            if HASHED:
                vector = tl.load(vectors + new, mask=real, other=0.0).to(tl.float32)
                if CENTERED:
                    vector = tl.sum(unit_length(vector[None, :]), axis=0)
                    total = tl.load(sums + row * SIZE + d, mask=real, other=0.0) + vector.to(tl.float64)
                    tl.debug_barrier()  # all threads must have read, since several hold the same elements
                    tl.store(sums + row * SIZE + d, total, mask=real)
                    vector = (vector.to(tl.float64) - total * (share / (index + 1).to(tl.float64))).to(tl.float32)
                    differs = tl.max(tl.abs(vector), axis=0) >= SMALLEST_DIFFERENCE
                    vector = tl.where(differs, vector, 0.0)
                own = tl.zeros([ROUNDS], tl.int32)
                for round in range(rounds):
                    bucket = bucket_of(vector, rotations, head, rounds, round, columns, SIZE, BLOCK, COLUMNS, FACTORS)
                    own = tl.where(lane == round, bucket, own)
                table = row * rounds + lane
                begin = newest + table * num_buckets + own
                links = previous + table * (1 + capacity)
                chain = chains + ((row * length + n) * rounds + lane) * window
                itself = tl.zeros([ROUNDS], tl.int32) + (1 + index).to(tl.int32)
                member = tl.load(begin, mask=exists, other=0)
                tl.debug_barrier()
                tl.store(begin, itself, mask=exists)
                tl.store(links + itself, member, mask=exists)
                tl.store(buckets + table * capacity + index, own, mask=exists)
                tl.store(chain, itself, mask=exists)
                for i in range(1, window):
                    tl.store(chain + i, member, mask=exists)
                    member = tl.load(links + member, mask=exists, other=0)
                tl.debug_barrier()  # the next token reads what was written


@triton.jit
def attend_more(
    maximum, total, weighted, query, token, seen, row, index, keys, values, capacity, scale, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Update the online softmax of one query (1, BLOCK) with more tokens (n) of its head, those `seen` (n)."""
    d = tl.arange(0, BLOCK)[None, :]
    at = (row * capacity + token % capacity)[:, None] * SIZE + d
    there = seen[:, None] & (d < SIZE)
    rows = tl.load(keys + at, mask=there, other=0.0).to(tl.float32)
    scores = tl.sum(rows * query, axis=1) * scale
    if SHARED:
        scores *= tl.rsqrt(tl.sum(rows * rows, axis=1) / SIZE + 1e-6)
    scores *= LOG2_E
    if SHARED:
        scores = tl.where(token == index, SELF, scores)
    scores = tl.where(seen, scores, float("-inf"))
    larger = tl.maximum(maximum, tl.max(scores, axis=0))
    decay, weights = tl.exp2(maximum - larger), tl.exp2(scores - larger)
    rows = tl.load(values + at, mask=there, other=0.0).to(tl.float32)
    weighted = weighted * decay + tl.sum(rows * weights[:, None], axis=0)
    return larger, total * decay + tl.sum(weights, axis=0), weighted


@triton.jit(do_not_specialize=["length", "capacity", "rounds", "window", "local_window"])
def attend_to_cache(
    query, indices, keys, values, buckets, chains, out, heads, length, capacity, rounds, window, local_window, scale,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, HASHED: tl.constexpr,
):  # fmt: skip
    """Compute attention of one new token to the last `local_window` tokens and to further ones listed in its chains.

    query, out: (B, H, N, SIZE); the output of padding is 0.
    """
    new = tl.program_id(0).to(tl.int64)
    row, n = new // length, new % length
    d, offset = tl.arange(0, BLOCK), tl.arange(0, TILE)
    index = tl.load(indices + row // heads * length + n)
    maximum = tl.full([], FLOOR, tl.float32)
    total = tl.zeros([], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    vector = tl.load(query + new * SIZE + d, mask=d < SIZE, other=0.0).to(tl.float32)[None, :]
    if index >= 0:
        first = tl.maximum(index - local_window + 1, 0)
        for start in range(first, index + 1, TILE):
            token = start + offset
            maximum, total, weighted = attend_more(
                maximum, total, weighted, vector, token, token <= index, row, index, keys, values, capacity, scale,
                SIZE, BLOCK, HASHED,
            )  # fmt: skip
        if HASHED:
            for round in range(rounds):
                for link in range(0, window, TILE):
                    at = link + offset
                    chain = chains + (new * rounds + round) * window
                    member = tl.load(chain + at, mask=at < window, other=0)
                    token = (member - 1).to(tl.int64)
                    seen = (member > 0) & (token < first)
                    for earlier in range(round):  # its chain lists the bucket from the chain's end on
                        table = buckets + (row * rounds + earlier) * capacity
                        same = tl.load(table + token, mask=seen, other=-1) == tl.load(table + index)
                        end = tl.load(chains + (new * rounds + earlier) * window + window - 1)
                        seen = seen & ~(same & (member >= end))
                    maximum, total, weighted = attend_more(
                        maximum, total, weighted, vector, token, seen, row, index, keys, values, capacity, scale,
                        SIZE, BLOCK, HASHED,
                    )  # fmt: skip
    weighted = weighted / tl.where(total == 0, 1.0, total)
    tl.store(out + new * SIZE + d, weighted.to(out.dtype.element_ty), mask=d < SIZE)
