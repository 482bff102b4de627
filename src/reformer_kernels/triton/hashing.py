"""Hashing kernels: find the largest projection of every token, without writing projections to memory.

Vectors may be normalized and centered by the mean of their sample (`hf_reformer.ops.lsh.centered`). Within its own
tile, a program sums them by a product with a matrix of zeros and ones; the sums before and after the tile are those of
whole tiles, accumulated by `hash_launch.sums_outside`.
"""

import triton
import triton.language as tl

from .pairs import matmul

SMALLEST_NORM = tl.constexpr(1e-12)  # both as in `lsh`
SMALLEST_DIFFERENCE = tl.constexpr(2.0**-16)
LARGEST = tl.constexpr(3.4028234663852886e38)  # largest finite float32


@triton.jit
def tokens_of(heads, length, TILE: tl.constexpr):
    """Return this program's sequence, head, tile index and the tokens of the tile."""
    tiles = tl.cdiv(length, TILE)
    program = tl.program_id(0)
    index, tile = program // tiles, program % tiles
    return index // heads, index % heads, tile, tile * TILE + tl.arange(0, TILE)


@triton.jit
def vectors_of(vectors, batch, head, heads, length, token, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Load vectors of n tokens, (n, BLOCK) float32, from (B, T, H, SIZE); 0 beyond the sequence and beyond SIZE."""
    column = tl.arange(0, BLOCK)[None, :]
    row = (batch.to(tl.int64) * length + token) * heads + head
    inside = (token < length)[:, None] & (column < SIZE)
    return tl.load(vectors + row[:, None] * SIZE + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def unit_length(rows):
    """Normalize rows to unit length, nonfinite ones to 0; rows too large to be squared are scaled first."""
    norm = tl.sqrt(tl.sum(rows * rows, axis=1))
    if tl.max(tl.where(norm <= LARGEST, 0, 1), axis=0) > 0:
        largest = tl.max(tl.abs(rows), axis=1)
        rows = tl.where((norm <= LARGEST)[:, None], rows, rows / largest[:, None])
        norm = tl.sqrt(tl.sum(rows * rows, axis=1))
    return tl.where((norm <= LARGEST)[:, None], rows / tl.maximum(norm, SMALLEST_NORM)[:, None], 0.0)


@triton.jit
def real_tokens(mask, batch, length, token, MASKED: tl.constexpr):
    """Whether each of n tokens is inside the sequence and not padding."""
    real = token < length
    if MASKED:
        real = real & (tl.load(mask + batch.to(tl.int64) * length + token, mask=real, other=0) != 0)
    return real


@triton.jit(do_not_specialize=["length"])
def sum_tiles(
    vectors, mask, samples, head_sums, tail_sums, heads, length, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Sum a tile's unit vectors that are in the sample of its first token, and those in the sample of its last.

    samples: (B, T) int32. head_sums, tail_sums: (B, H, tiles, SIZE) float32; only head_sums is written unless PACKED.
    """
    batch, head, tile, token = tokens_of(heads, length, TILE)
    rows = unit_length(vectors_of(vectors, batch, head, heads, length, token, SIZE, BLOCK))
    rows = tl.where(real_tokens(mask, batch, length, token, MASKED)[:, None], rows, 0.0)
    column = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * SIZE + column
    if PACKED:
        first_sample = samples + batch.to(tl.int64) * length
        sample = tl.load(first_sample + token, mask=token < length, other=-1)
        first = tl.load(first_sample + tile * TILE)
        last = tl.load(first_sample + tl.minimum(tile * TILE + TILE, length) - 1)
        tail = tl.sum(tl.where((sample == last)[:, None], rows, 0.0), axis=0)
        tl.store(tail_sums + at, tail, mask=column < SIZE)
        rows = tl.where((sample == first)[:, None], rows, 0.0)
    tl.store(head_sums + at, tl.sum(rows, axis=0), mask=column < SIZE)


@triton.jit(do_not_specialize=["length", "rounds", "columns", "column", "half", "stride"])
def hash_tokens(
    vectors, mask, samples, before, behind, shares, rotations, buckets, heads, length, rounds, columns, column, half,
    stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr, CENTERED: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Compute the buckets of a tile of tokens in all rounds for one factor, and add them to those of earlier factors.

    before, behind: (B, H, tiles, SIZE) float32, sums of unit vectors of the first token's sample before the tile, and
        of the last token's sample after it.
    shares: (B, T) float32, the share of the mean that is subtracted / number of tokens in it.
    rotations: (H, SIZE, R, columns) float32; this factor's are `half` columns, half its buckets, from `column` on.
    buckets: (B, H, R, T) int32; this factor's are multiplied by `stride`.
    """
    batch, head, tile, token = tokens_of(heads, length, TILE)
    rows = vectors_of(vectors, batch, head, heads, length, token, SIZE, BLOCK)
    inside = token < length
    if CENTERED:
        real = real_tokens(mask, batch, length, token, MASKED)
        rows = tl.where(real[:, None], unit_length(rows), 0.0)
        first_number = batch.to(tl.int64) * length
        d = tl.arange(0, BLOCK)
        at = tl.program_id(0).to(tl.int64) * SIZE + d
        in_front = tl.load(before + at, mask=d < SIZE, other=0.0)[None, :]
        seen = (token >= 0)[:, None] & (token >= 0)[None, :]
        if CAUSAL:
            seen = token[:, None] >= token[None, :]
        if PACKED:
            sample = tl.load(samples + first_number + token, mask=inside, other=-1)
            seen = seen & (sample[:, None] == sample[None, :])
            first = tl.load(samples + first_number + tile * TILE)
            in_front = tl.where((sample == first)[:, None], in_front, 0.0)
        sums = matmul(seen.to(tl.float32), rows) + in_front
        if not CAUSAL:
            at_end = tl.load(behind + at, mask=d < SIZE, other=0.0)[None, :]
            if PACKED:
                last = tl.load(samples + first_number + tl.minimum(tile * TILE + TILE, length) - 1)
                at_end = tl.where((sample == last)[:, None], at_end, 0.0)
            sums += at_end
        rows -= sums * tl.load(shares + first_number + token, mask=inside, other=0.0)[:, None]
        differs = tl.max(tl.abs(rows), axis=1) >= SMALLEST_DIFFERENCE
        rows = tl.where((real & differs)[:, None], rows, 0.0)
    d = tl.arange(0, BLOCK)[:, None]
    for round in range(rounds):
        best = tl.full([TILE], -1.0, tl.float32)
        bucket = tl.zeros([TILE], tl.int32)
        turn = rotations + ((head * SIZE + d).to(tl.int64) * rounds + round) * columns + column
        for start in range(0, half, COLUMNS):
            c = start + tl.arange(0, COLUMNS)[None, :]
            turned = matmul(rows, tl.load(turn + c, mask=(d < SIZE) & (c < half), other=0.0))
            lengths = tl.where(c < half, tl.abs(turned), -1.0)
            largest = tl.max(lengths, axis=1)
            where = tl.argmax(lengths, axis=1)
            signed = tl.sum(tl.where(c == start + where[:, None], turned, 0.0), axis=1)
            bucket = tl.where(largest > best, start + where + tl.where(signed < 0, half, 0), bucket)
            best = tl.maximum(best, largest)
        number = ((batch * heads + head).to(tl.int64) * rounds + round) * length + token
        if column > 0:
            bucket = bucket * stride + tl.load(buckets + number, mask=inside, other=0)
        tl.store(buckets + number, bucket, mask=inside)
