"""Forward kernels: the inverse of the orders, and attention of one round of every line.

Rounds are launched one after another. Within a round every token stands once, so each program owns the rows it writes
and the running sums of a token pass from launch to launch without atomics: results are the same in every run.
"""

import triton
import triton.language as tl

from .pairs import FARTHEST, FLOOR, drop, keys_at, load_rows, locate, matmul, pair_scores, queries_at, store_rows


@triton.jit(do_not_specialize=["places", "length", "total"])
def invert_orders(line, lo, hi, place_of, lowest_of, highest_of, places, length, total, BLOCK: tl.constexpr):
    """By place → by token: where every token stands and what it sees there, all (B, H or 1, R, T) int32.

    A program takes BLOCK of all `places`; length is T, total is R * T.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = at < places
    token = at - at % length + tl.load(line + at, mask=exists, other=0)
    tl.store(place_of + token, (at % total).to(tl.int32), mask=exists)
    tl.store(lowest_of + token, tl.load(lo + at, mask=exists, other=0), mask=exists)
    tl.store(highest_of + token, tl.load(hi + at, mask=exists, other=0), mask=exists)


@triton.jit
def first_and_last_seen(queries, inside):
    """The first and the last place that any of the queries `inside` (n) sees; first > last if none sees any."""
    sees = inside & (queries.lowest <= queries.highest)
    first = tl.min(tl.where(sees, queries.lowest, FARTHEST), axis=0)
    last = tl.max(tl.where(sees, queries.highest, -FARTHEST), axis=0)
    return first, last


@triton.jit(do_not_specialize=["length", "round"])
def forward_round(
    inputs,  # `pairs.Inputs`
    sums,  # (B, T, H, value_size) float32: weighted values so far, relative to the running maximum
    out,  # (B, T, H, value_size): the new sums, or after the LAST round the output
    top,  # (B, H, T) float32: running maximum of the scores
    mass,  # (B, H, T) float32: running sum of the weights
    numbers,  # `pairs.Numbers`
    length,
    round,
    kind,  # `pairs.Kind`
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """Online softmax of a tile of queries over all that this round shows them (Dao et al. 2022, section 3.1)."""
    at, place, inside = locate(QUERIES, numbers, length, round)
    queries = queries_at(inputs, at, place, kind)
    number = at.first_number + queries.token
    query_rows = load_rows(inputs.query, at, queries.token, kind.size, kind.block)
    if FIRST:
        maximum = tl.full([QUERIES], FLOOR, tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        weighted = tl.zeros([QUERIES, kind.value_block], tl.float32)
    else:
        maximum = tl.load(top + number)
        total = tl.load(mass + number)
        weighted = load_rows(sums, at, queries.token, kind.value_size, kind.value_block)
    first, last = first_and_last_seen(queries, inside)
    for start in range(first, last + 1, KEYS):
        keys = keys_at(inputs, at, start + tl.arange(0, KEYS), kind)
        key_rows = load_rows(inputs.key, at, keys.token, kind.size, kind.block)
        products = matmul(query_rows, tl.trans(key_rows))
        scores = pair_scores(products, inputs, at, queries, keys, round, 0, FIRST, kind)
        larger = tl.maximum(maximum, tl.max(scores, axis=1))
        decay = tl.exp2(maximum - larger)
        weights = tl.exp2(scores - larger[:, None])
        total = total * decay + tl.sum(weights, axis=1)
        if kind.dropout:
            weights = drop(weights, queries, keys, numbers, 0)
        values = load_rows(inputs.value, at, keys.token, kind.value_size, kind.value_block)
        weighted = weighted * decay[:, None] + matmul(weights.to(values.dtype), values)
        maximum = larger
    if LAST:
        total = tl.where(total == 0, 1.0, total)  # a token that sees nothing gives 0
        weighted = weighted / total[:, None]
    tl.store(top + number, maximum, mask=inside)
    tl.store(mass + number, total, mask=inside)
    store_rows(out, weighted, inside, at, queries.token, kind.value_size, kind.value_block)
