"""What the kernels share: rows of a tensor, places of a line, and what a pair of query and key comes to.

Rows: query, key, value, output and gradients lie as (B, T, H, D), as projections make them, so token t of head h of
row b is row (b * T + t) * H + h. Numbers of a token (maximum, sum, …) lie as (B, H, T), orders as (B, H or 1, R, T).

A vector of queries or keys becomes a row or a column of a tile by `along`; in the kernels that loop over keys queries
go down (axis 0) and keys across (axis 1), in the one that loops over queries it is the other way round.
"""

import os

import triton
import triton.language as tl

from ...randomness import _GOLDEN, _MIX_1, _MIX_2
from ...reference import MASKED_SCORE, SELF_SCORE

LOG2_E = tl.constexpr(1.4426950408889634)  # scores are kept in units of log 2, for exp2
SELF = tl.constexpr(SELF_SCORE * 1.4426950408889634)
MASKED = tl.constexpr(MASKED_SCORE * 1.4426950408889634)
FLOOR = tl.constexpr(-1e30)  # running maxima start here: below every score, and finite, so differences stay numbers
FARTHEST = tl.constexpr(2**31 - 1)  # beyond every place
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
GOLDEN, MIX_1, MIX_2 = (tl.constexpr(x % 2**32) for x in (_GOLDEN, _MIX_1, _MIX_2))


# --- where things are


@triton.jit
def locate(TILE: tl.constexpr, length, heads, order_heads, rounds):
    """This program's tile and the starts of its head: (tile, b, h, first row, first number, first place)."""
    tiles = tl.cdiv(length, TILE)
    program = tl.program_id(0)
    line = program // tiles
    batch, head = line // heads, line % heads
    first_row = batch.to(tl.int64) * length * heads + head
    first_number = line.to(tl.int64) * length
    first_place = (batch * order_heads + head % order_heads).to(tl.int64) * rounds * length
    return program % tiles, batch, head, first_row, first_number, first_place


@triton.jit
def row_pointers(x, first_row, token, heads, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """(n, BLOCK) pointers to the rows of n tokens; only the first SIZE columns exist."""
    row = first_row + token.to(tl.int64) * heads
    return x + row[:, None] * SIZE + tl.arange(0, BLOCK)[None, :]


@triton.jit
def load_rows(x, first_row, token, heads, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """(n, BLOCK): the rows of n tokens, zeros beyond SIZE."""
    pointers = row_pointers(x, first_row, token, heads, SIZE, BLOCK)
    if SIZE == BLOCK:
        rows = tl.load(pointers)
    else:
        rows = tl.load(pointers, mask=tl.arange(0, BLOCK)[None, :] < SIZE, other=0.0)
    return rows


@triton.jit
def store_rows(x, rows, inside, first_row, token, heads, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write (n, BLOCK) rows to the tokens that are `inside` (n)."""
    pointers = row_pointers(x, first_row, token, heads, SIZE, BLOCK)
    exists = inside[:, None] & (tl.arange(0, BLOCK)[None, :] < SIZE)
    tl.store(pointers, rows.to(x.dtype.element_ty), mask=exists)


@triton.jit
def wrap(place, total):
    """place modulo total, 0 … total - 1."""
    return (place % total + total) % total


@triton.jit
def along(x, AXIS: tl.constexpr):
    """A vector (n) as a column (n, 1) on axis 0, or as a row (1, n) on axis 1."""
    return tl.expand_dims(x, 1 - AXIS)


@triton.jit
def matmul(a, b):
    """a @ b in float32; of float32 as three products of 19-bit numbers, which lose next to nothing."""
    if INTERPRETED:  # it multiplies the bits of bfloat16 as if they were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


# --- what a pair comes to


@triton.jit
def is_shown(
    lowest,  # (queries) places that the queries see in this round
    highest,
    key_place,  # (keys)
    query_token,  # (queries)
    key_token,  # (keys)
    place_of,  # pointers to (R, T) of this head, by token: place, and places seen
    lowest_of,
    highest_of,
    length,
    QUERY_AXIS: tl.constexpr,
    EARLIER: tl.constexpr,
):
    """Whether this round shows a pair, and none of the EARLIER rounds (a pair counts once): a tile of bool."""
    key_place = along(key_place, 1 - QUERY_AXIS)
    shown = (key_place >= along(lowest, QUERY_AXIS)) & (key_place <= along(highest, QUERY_AXIS))
    for earlier in tl.static_range(EARLIER):
        place = along(tl.load(place_of + earlier * length + key_token), 1 - QUERY_AXIS)
        first = along(tl.load(lowest_of + earlier * length + query_token), QUERY_AXIS)
        last = along(tl.load(highest_of + earlier * length + query_token), QUERY_AXIS)
        shown = shown & ((place < first) | (place > last))
    return shown


@triton.jit
def pair_scores(
    products,  # tile of float32, in units of log 2
    shown,  # tile of bool
    query_token,
    key_token,
    real,  # pointer to (T) of this row, 1 for real tokens
    QUERY_AXIS: tl.constexpr,
    SHARED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    COUNT_ONCE: tl.constexpr,
):
    """Scores as the softmax sees them, and where they are free to move: shown, and not one of the fixed scores.

    The chunk rule's fills come in the older implementation's order: future and padding first, a token itself last.
    """
    query = along(query_token, QUERY_AXIS)
    key = along(key_token, 1 - QUERY_AXIS)
    free = shown
    if not COUNT_ONCE:
        if CAUSAL:
            products = tl.where(query < key, MASKED, products)
            free = free & (query >= key)
        if PADDED:
            exists = along(tl.load(real + key_token), 1 - QUERY_AXIS) != 0
            products = tl.where(exists, products, MASKED)
            free = free & exists
    if SHARED:
        products = tl.where(query == key, SELF, products)
        free = free & (query != key)
    return tl.where(shown, products, float("-inf")), free


# --- dropout, bit for bit that of `randomness`


@triton.jit
def fold(key, counter):
    """`randomness.fold` on uint32."""
    x = (key ^ (counter * GOLDEN)) + 1
    x = (x ^ (x >> 16)) * MIX_1
    x = (x ^ (x >> 13)) * MIX_2
    return x ^ (x >> 16)


@triton.jit
def query_numbers(dropout_key, batch, head, token):
    """`reference.pair_keys` of the queries."""
    key = tl.load(dropout_key).to(tl.uint32, bitcast=True)
    key = fold(fold(key, batch.to(tl.uint32, bitcast=True)), head.to(tl.uint32, bitcast=True))
    return fold(key, token.to(tl.uint32, bitcast=True))


@triton.jit
def key_numbers(dropout_key, token):
    """`reference.pair_keys` of the keys."""
    key = tl.load(dropout_key).to(tl.uint32, bitcast=True)
    return fold(fold(key, tl.full([], 2**32 - 1, tl.uint32)), token.to(tl.uint32, bitcast=True))


@triton.jit
def is_kept(query_number, key_number, threshold, QUERY_AXIS: tl.constexpr):
    """Whether dropout keeps a pair (`randomness.pair_scramble`): a tile of bool."""
    x = (along(query_number, QUERY_AXIS) ^ along(key_number, 1 - QUERY_AXIS)) * MIX_1
    x = (x ^ (x >> 15)) * MIX_2
    return x.to(tl.int32, bitcast=True) >= threshold
