"""Functions shared by the kernels: memory layout, and the scores and weights of pairs of queries and keys.

Query, key, value, output and gradients are stored as (B, T, H, D), like projections, so token t of head h of sequence
b is row (b * T + t) * H + h. Scalars per token (maximum, sum, …) are stored as (B, H, T), the layout as
(B, H or 1, R, T).

`along` makes a vector of queries or keys a row or a column of a tile: kernels that loop over keys have queries on axis
0 and keys on axis 1; those that loop over queries have them the other way round.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import contract

LOG2_E = tl.constexpr(1.4426950408889634)  # scores are kept in units of log 2, for exp2
SELF = tl.constexpr(contract.SELF_SCORE * 1.4426950408889634)
MASKED = tl.constexpr(contract.MASKED_SCORE * 1.4426950408889634)
FLOOR = tl.constexpr(-1e30)  # initial running maximum: below every score, and finite, so that differences are not NaN
FARTHEST = tl.constexpr(2**31 - 1)  # beyond every position
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
GOLDEN, MIX_1, MIX_2 = (tl.constexpr(x % 2**32) for x in (contract.GOLDEN, contract.MIX_1, contract.MIX_2))


class Inputs(NamedTuple):
    """Tensors that every kernel reads; None if its kind does not need them."""

    query: Any  # (B, T, H, size)
    key: Any  # likewise; for shared query/key attention, the queries
    value: Any  # (B, T, H, value_size)
    factor: Any  # (B, H, T) float32: shared keys are queries times this
    perm: Any  # (B, H or 1, R, T) int32, as in `layout.AttentionLayout`
    window_start: Any
    window_end: Any
    pos_of: Any  # sorted position and window by token, likewise
    start_of: Any
    end_of: Any
    attention_mask: Any  # (B, T) uint8, 1 for real tokens
    dropout_key: Any  # (2) int32: the key, and the index of the first head


class Numbers(NamedTuple):
    """Scalars that are the same in every call of a model."""

    heads: Any
    layout_heads: Any
    rounds: Any
    threshold: Any  # random numbers below it are dropped
    keep_scale: Any  # kept values are multiplied by this


class Kind(NamedTuple):
    """Compile-time constants of a kernel besides dtypes; the last four fields vary between launches."""

    size: int
    value_size: int
    block: int  # the sizes, padded for tensor cores
    value_block: int
    shared: bool  # keys are computed from queries
    dedup_pairs: bool  # window rule
    causal: bool  # future tokens get a constant score (chunk rule)
    padded: bool  # padding gets a constant score (chunk rule)
    dropout: bool
    has_grad_mass: bool = False
    queries: int = 0  # queries and keys of a tile
    keys: int = 0
    first: bool = False  # whether this round is the first or the last
    last: bool = False


class Head(NamedTuple):
    """One head of one sequence: sizes, and offsets of its parts of the tensors."""

    batch: Any
    head: Any
    heads: Any
    length: Any
    round: Any  # the round of this launch
    positions: Any  # R * T
    first_row: Any
    first_number: Any
    first_pos: Any


class Queries(NamedTuple):
    """Vectors of n queries, each at one sorted position."""

    token: Any
    rows: Any  # (n, block)
    window_start: Any
    window_end: Any
    draw: Any  # random number, or None


class Keys(NamedTuple):
    """Vectors of n keys, each at one sorted position."""

    token: Any
    rows: Any  # (n, block)
    pos: Any
    factor: Any  # shared keys are queries times this, or None
    draw: Any


# --- memory layout


@triton.jit
def locate(TILE: tl.constexpr, numbers, length, round):
    """Return this program's head, the sorted positions of its tile (n), and which are inside the round (n)."""
    tiles = tl.cdiv(length, TILE)
    program = tl.program_id(0)
    index = program // tiles
    batch, head = index // numbers.heads, index % numbers.heads
    positions = numbers.rounds * length
    first_row = batch.to(tl.int64) * length * numbers.heads + head
    first_number = index.to(tl.int64) * length
    first_pos = (batch * numbers.layout_heads + head % numbers.layout_heads).to(tl.int64) * positions
    at = Head(batch, head, numbers.heads, length, round, positions, first_row, first_number, first_pos)
    offset = program % tiles * TILE + tl.arange(0, TILE)
    return at, round * length + offset, offset < length


@triton.jit
def load_rows(x, at, token, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Load the rows of n tokens, (n, BLOCK), zero beyond SIZE."""
    column = tl.arange(0, BLOCK)[None, :]
    row = at.first_row + token.to(tl.int64) * at.heads
    if SIZE == BLOCK:
        rows = tl.load(x + row[:, None] * SIZE + column)
    else:
        rows = tl.load(x + row[:, None] * SIZE + column, mask=column < SIZE, other=0.0)
    return rows


@triton.jit
def store_rows(x, rows, inside, at, token, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Store rows, (n, BLOCK), of tokens that are `inside` (n)."""
    column = tl.arange(0, BLOCK)[None, :]
    row = at.first_row + token.to(tl.int64) * at.heads
    tl.store(x + row[:, None] * SIZE + column, rows.to(x.dtype.element_ty), mask=inside[:, None] & (column < SIZE))


@triton.jit
def wrap(pos, positions):
    """Return pos modulo positions, in 0 … positions - 1."""
    return (pos % positions + positions) % positions


@triton.jit
def queries_at(inputs, at, pos, kind):
    """Load the queries at n sorted positions. They and their windows may lie whole laps outside of 0 … R * T - 1."""
    wrapped = wrap(pos, at.positions)
    token = tl.load(inputs.perm + at.first_pos + wrapped)
    window_start = tl.load(inputs.window_start + at.first_pos + wrapped) + (pos - wrapped)
    window_end = tl.load(inputs.window_end + at.first_pos + wrapped) + (pos - wrapped)
    rows = load_rows(inputs.query, at, token, kind.size, kind.block)
    return Queries(token, rows, window_start, window_end, query_draw(inputs, at, token) if kind.dropout else None)


@triton.jit
def keys_at(inputs, at, pos, kind):
    """Load the keys at n sorted positions, which may lie whole laps outside of 0 … R * T - 1."""
    token = tl.load(inputs.perm + at.first_pos + wrap(pos, at.positions))
    factor = tl.load(inputs.factor + at.first_number + token) if kind.shared else None
    rows = load_rows(inputs.key, at, token, kind.size, kind.block)
    return Keys(token, rows, pos, factor, key_draw(inputs, token) if kind.dropout else None)


@triton.jit
def along(x, AXIS: tl.constexpr):
    """Reshape a vector (n) to a column (n, 1) on axis 0, or to a row (1, n) on axis 1."""
    return tl.expand_dims(x, 1 - AXIS)


@triton.jit
def matmul(a, b):
    """Compute a @ b in float32; of float32 inputs by three TF32 products (19 bits), almost without loss."""
    if INTERPRETED:  # the interpreter would multiply bfloat16 bits as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def pair_products(query_rows, key_rows, QUERY_AXIS: tl.constexpr):
    """Compute the dot products of all query rows with all key rows, a float32 tile."""
    if QUERY_AXIS == 0:
        products = matmul(query_rows, tl.trans(key_rows))
    else:
        products = matmul(key_rows, tl.trans(query_rows))
    return products


@triton.jit
def load_numbers(x, at, token):
    """Load the scalars, (B, T), of n tokens."""
    return tl.load(x + at.batch.to(tl.int64) * at.length + token)


# --- scores and weights


@triton.jit
def fill_fixed(
    x, masked: tl.constexpr, itself: tl.constexpr, inputs, at, queries, keys, QUERY_AXIS: tl.constexpr, kind
):
    """Fill the pairs of a float32 tile whose score is a constant.

    In the order of the legacy rule: first `masked` for the future and padding, then `itself` for the token itself.
    """
    query, key = along(queries.token, QUERY_AXIS), along(keys.token, 1 - QUERY_AXIS)
    if kind.causal:
        x = tl.where(query < key, masked, x)
    if kind.padded:
        real = tl.load(inputs.attention_mask + at.batch.to(tl.int64) * at.length + keys.token)
        x = tl.where(along(real, 1 - QUERY_AXIS) == 0, masked, x)
    if kind.shared:
        x = tl.where(query == key, itself, x)
    return x


@triton.jit
def pair_scores(products, inputs, at, queries, keys, QUERY_AXIS: tl.constexpr, kind):
    """Compute scores in units of log 2 from `pair_products` of query and key.

    They are -inf for pairs that are not visible in this round, or (window rule) were visible in an earlier one.
    """
    scores = products * LOG2_E
    if kind.shared:
        scores = scores * along(keys.factor, 1 - QUERY_AXIS)
    scores = fill_fixed(scores, MASKED, SELF, inputs, at, queries, keys, QUERY_AXIS, kind)
    pos = along(keys.pos, 1 - QUERY_AXIS)
    visible = (pos >= along(queries.window_start, QUERY_AXIS)) & (pos <= along(queries.window_end, QUERY_AXIS))
    scores = tl.where(visible, scores, float("-inf"))
    if kind.dedup_pairs and not kind.first:
        by_token = at.first_pos
        for _ in range(at.round):  # not unrolled: one kernel, with the same registers, for any number of rounds
            pos = along(tl.load(inputs.pos_of + by_token + keys.token), 1 - QUERY_AXIS)
            first = along(tl.load(inputs.start_of + by_token + queries.token), QUERY_AXIS)
            last = along(tl.load(inputs.end_of + by_token + queries.token), QUERY_AXIS)
            scores = tl.where((pos >= first) & (pos <= last), float("-inf"), scores)
            by_token += at.length
    return scores


@triton.jit
def softmax_weights(products, inputs, row_max, row_sum, at, queries, keys, QUERY_AXIS: tl.constexpr, kind):
    """Compute weights before dropout, a float32 tile, from the saved maximum and sum of every query."""
    scores = pair_scores(products, inputs, at, queries, keys, QUERY_AXIS, kind)
    number = at.first_number + queries.token
    share = 1 / tl.load(row_sum + number)
    return tl.exp2(scores - along(tl.load(row_max + number), QUERY_AXIS)) * along(share, QUERY_AXIS)


# --- dropout, bitwise equal to that of `prng`


@triton.jit
def fold(key, counter):
    """Compute `prng.fold` on uint32."""
    x = (key ^ (counter * GOLDEN)) + 1
    x = (x ^ (x >> 16)) * MIX_1
    x = (x ^ (x >> 13)) * MIX_2
    return x ^ (x >> 16)


@triton.jit
def query_draw(inputs, at, token):
    """Compute `reference.pair_keys` of the queries."""
    key = tl.load(inputs.dropout_key).to(tl.uint32, bitcast=True)
    head = at.head + tl.load(inputs.dropout_key + 1)
    key = fold(fold(key, at.batch.to(tl.uint32, bitcast=True)), head.to(tl.uint32, bitcast=True))
    return fold(key, token.to(tl.uint32, bitcast=True))


@triton.jit
def key_draw(inputs, token):
    """Compute `reference.pair_keys` of the keys."""
    key = tl.load(inputs.dropout_key).to(tl.uint32, bitcast=True)
    return fold(fold(key, tl.full([], 2**32 - 1, tl.uint32)), token.to(tl.uint32, bitcast=True))


@triton.jit
def drop(x, queries, keys, numbers, QUERY_AXIS: tl.constexpr):
    """Apply dropout to a tile (`prng.pair_scramble`)."""
    drawn = (along(queries.draw, QUERY_AXIS) ^ along(keys.draw, 1 - QUERY_AXIS)) * MIX_1
    drawn = (drawn ^ (drawn >> 15)) * MIX_2
    return x * tl.where(drawn.to(tl.int32, bitcast=True) >= numbers.threshold, numbers.keep_scale, 0.0)
