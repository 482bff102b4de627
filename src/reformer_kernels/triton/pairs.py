"""What the kernels share: where things lie, and what a pair of query and key comes to.

Rows: query, key, value, output and gradients lie as (B, T, H, D), as projections make them, so token t of head h of
sequence b is row (b * T + t) * H + h. Numbers of a token (maximum, sum, …) lie as (B, H, T), the layout as
(B, H or 1, R, T).

A vector of queries or keys becomes a row or a column of a tile by `along`: the kernels that loop over keys have
queries down (axis 0) and keys across (axis 1), the one that loops over queries has it the other way round.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .. import contract

LOG2_E = tl.constexpr(1.4426950408889634)  # scores are kept in units of log 2, for exp2
SELF = tl.constexpr(contract.SELF_SCORE * 1.4426950408889634)
MASKED = tl.constexpr(contract.MASKED_SCORE * 1.4426950408889634)
FLOOR = tl.constexpr(-1e30)  # running maxima start here: below every score, and finite, so differences stay numbers
FARTHEST = tl.constexpr(2**31 - 1)  # beyond every position
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
GOLDEN, MIX_1, MIX_2 = (tl.constexpr(x % 2**32) for x in (contract.GOLDEN, contract.MIX_1, contract.MIX_2))


class Inputs(NamedTuple):
    """Tensors that every kernel reads; None where its kind has no use for them."""

    query: Any  # (B, T, H, size)
    key: Any  # the same; of shared query/key attention the queries
    value: Any  # (B, T, H, value_size)
    factor: Any  # (B, H, T) float32: shared keys are queries times this
    perm: Any  # (B, H or 1, R, T) int32, as `layout.AttentionLayout` has them
    window_start: Any
    window_end: Any
    pos_of: Any  # the same by token: its sorted position and its window
    start_of: Any
    end_of: Any
    attention_mask: Any  # (B, T) uint8, 1 for real tokens
    dropout_key: Any  # (2) int32: the key, and the number of the first head


class Numbers(NamedTuple):
    """Numbers that are the same in every call of a model."""

    heads: Any
    layout_heads: Any
    rounds: Any
    threshold: Any  # random numbers below it are dropped
    keep_scale: Any  # what is kept is multiplied by this


class Kind(NamedTuple):
    """What a kernel is compiled for, beside dtypes; the last four fields differ from launch to launch."""

    size: int
    value_size: int
    block: int  # the sizes, padded to what a tensor core takes
    value_block: int
    shared: bool  # keys are made of the queries
    dedup_pairs: bool  # window rule
    causal: bool  # the future is filled (chunk rule)
    padded: bool  # padding is filled (chunk rule)
    dropout: bool
    has_grad_mass: bool = False
    queries: int = 0  # rows of a tile
    keys: int = 0
    first: bool = False  # this round is the first, or the last
    last: bool = False


class Head(NamedTuple):
    """One head of one sequence: its sizes, and where its parts of the tensors begin."""

    batch: Any
    head: Any
    heads: Any
    length: Any
    round: Any  # which this launch works on
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


# --- where things are


@triton.jit
def locate(TILE: tl.constexpr, numbers, length, round):
    """This program's head, the sorted positions of its tile (n), and which of them are inside the round (n)."""
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
    """(n, BLOCK): the rows of n tokens, zeros beyond SIZE."""
    column = tl.arange(0, BLOCK)[None, :]
    row = at.first_row + token.to(tl.int64) * at.heads
    if SIZE == BLOCK:
        rows = tl.load(x + row[:, None] * SIZE + column)
    else:
        rows = tl.load(x + row[:, None] * SIZE + column, mask=column < SIZE, other=0.0)
    return rows


@triton.jit
def store_rows(x, rows, inside, at, token, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write (n, BLOCK) rows to the tokens that are `inside` (n)."""
    column = tl.arange(0, BLOCK)[None, :]
    row = at.first_row + token.to(tl.int64) * at.heads
    tl.store(x + row[:, None] * SIZE + column, rows.to(x.dtype.element_ty), mask=inside[:, None] & (column < SIZE))


@triton.jit
def wrap(pos, positions):
    """pos modulo positions, 0 … positions - 1."""
    return (pos % positions + positions) % positions


@triton.jit
def queries_at(inputs, at, pos, kind):
    """The queries at n sorted positions. They and their windows may lie laps before the first or behind the last."""
    wrapped = wrap(pos, at.positions)
    token = tl.load(inputs.perm + at.first_pos + wrapped)
    window_start = tl.load(inputs.window_start + at.first_pos + wrapped) + (pos - wrapped)
    window_end = tl.load(inputs.window_end + at.first_pos + wrapped) + (pos - wrapped)
    rows = load_rows(inputs.query, at, token, kind.size, kind.block)
    return Queries(token, rows, window_start, window_end, query_draw(inputs, at, token) if kind.dropout else None)


@triton.jit
def keys_at(inputs, at, pos, kind):
    """The keys at n sorted positions, which may lie laps before the first or behind the last."""
    token = tl.load(inputs.perm + at.first_pos + wrap(pos, at.positions))
    factor = tl.load(inputs.factor + at.first_number + token) if kind.shared else None
    rows = load_rows(inputs.key, at, token, kind.size, kind.block)
    return Keys(token, rows, pos, factor, key_draw(inputs, token) if kind.dropout else None)


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


@triton.jit
def pair_products(query_rows, key_rows, QUERY_AXIS: tl.constexpr):
    """A tile of float32: the dot product of every query's row with every key's."""
    if QUERY_AXIS == 0:
        products = matmul(query_rows, tl.trans(key_rows))
    else:
        products = matmul(key_rows, tl.trans(query_rows))
    return products


@triton.jit
def load_numbers(x, at, token):
    """Numbers (B, T) of n tokens."""
    return tl.load(x + at.batch.to(tl.int64) * at.length + token)


# --- what a pair comes to


@triton.jit
def fill_fixed(
    x, masked: tl.constexpr, itself: tl.constexpr, inputs, at, queries, keys, QUERY_AXIS: tl.constexpr, kind
):
    """A tile of float32 with all pairs filled whose score is a fixed number.

    In the legacy rule's order: `masked` for the future and padding first, `itself` for a token itself last.
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
    """Scores of the softmax in units of log 2, from `pair_products` of query and key.

    -inf where the pair is not visible in this round, or (window rule) was visible in an earlier one.
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
        for _ in range(at.round):  # not unrolled: one kernel serves any number of rounds, with as many registers
            pos = along(tl.load(inputs.pos_of + by_token + keys.token), 1 - QUERY_AXIS)
            first = along(tl.load(inputs.start_of + by_token + queries.token), QUERY_AXIS)
            last = along(tl.load(inputs.end_of + by_token + queries.token), QUERY_AXIS)
            scores = tl.where((pos >= first) & (pos <= last), float("-inf"), scores)
            by_token += at.length
    return scores


@triton.jit
def softmax_weights(products, inputs, row_max, row_sum, at, queries, keys, QUERY_AXIS: tl.constexpr, kind):
    """A tile of weights before dropout, float32, from the saved maximum and sum of every query's scores."""
    scores = pair_scores(products, inputs, at, queries, keys, QUERY_AXIS, kind)
    number = at.first_number + queries.token
    share = 1 / tl.load(row_sum + number)
    return tl.exp2(scores - along(tl.load(row_max + number), QUERY_AXIS)) * along(share, QUERY_AXIS)


# --- dropout, bit for bit that of `prng`


@triton.jit
def fold(key, counter):
    """`prng.fold` on uint32."""
    x = (key ^ (counter * GOLDEN)) + 1
    x = (x ^ (x >> 16)) * MIX_1
    x = (x ^ (x >> 13)) * MIX_2
    return x ^ (x >> 16)


@triton.jit
def query_draw(inputs, at, token):
    """`reference.pair_keys` of the queries."""
    key = tl.load(inputs.dropout_key).to(tl.uint32, bitcast=True)
    head = at.head + tl.load(inputs.dropout_key + 1)
    key = fold(fold(key, at.batch.to(tl.uint32, bitcast=True)), head.to(tl.uint32, bitcast=True))
    return fold(key, token.to(tl.uint32, bitcast=True))


@triton.jit
def key_draw(inputs, token):
    """`reference.pair_keys` of the keys."""
    key = tl.load(inputs.dropout_key).to(tl.uint32, bitcast=True)
    return fold(fold(key, tl.full([], 2**32 - 1, tl.uint32)), token.to(tl.uint32, bitcast=True))


@triton.jit
def drop(x, queries, keys, numbers, QUERY_AXIS: tl.constexpr):
    """The tile after dropout (`prng.pair_scramble`)."""
    drawn = (along(queries.draw, QUERY_AXIS) ^ along(keys.draw, 1 - QUERY_AXIS)) * MIX_1
    drawn = (drawn ^ (drawn >> 15)) * MIX_2
    return x * tl.where(drawn.to(tl.int32, bitcast=True) >= numbers.threshold, numbers.keep_scale, 0.0)
