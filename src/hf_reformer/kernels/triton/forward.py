"""Forward kernels: the inverse of the orders, and attention of one round of every line.

Rounds are launched one after another. Within a round every token stands once, so each program owns the rows it writes
and the running sums of a token pass from launch to launch without atomics: results are the same in every run.
"""

import triton
import triton.language as tl

from .pairs import (
    FARTHEST,
    FLOOR,
    LOG2_E,
    is_kept,
    is_shown,
    key_numbers,
    load_rows,
    locate,
    matmul,
    pair_scores,
    query_numbers,
    store_rows,
    wrap,
)


@triton.jit(do_not_specialize=["places", "length", "total"])
def invert_orders(line, lo, hi, place_of, lowest_of, highest_of, places, length, total, BLOCK: tl.constexpr):
    """By place → by token: where every token stands and what it sees there, all (B, H, R, T) int32.

    A program takes BLOCK of all `places`; length is T, total is R * T.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = at < places
    token = at - at % length + tl.load(line + at, mask=exists, other=0)
    tl.store(place_of + token, (at % total).to(tl.int32), mask=exists)
    tl.store(lowest_of + token, tl.load(lo + at, mask=exists, other=0), mask=exists)
    tl.store(highest_of + token, tl.load(hi + at, mask=exists, other=0), mask=exists)


@triton.jit
def seen_by(lo, hi, place, inside):
    """Places that n queries see, and the first and the last place that any of them sees; outside sees nothing."""
    lowest = tl.load(lo + place, mask=inside, other=1)
    highest = tl.load(hi + place, mask=inside, other=0)
    sees = lowest <= highest
    begin = tl.min(tl.where(sees, lowest, FARTHEST), axis=0)
    end = tl.max(tl.where(sees, highest, -FARTHEST), axis=0)
    return lowest, highest, begin, end


@triton.jit(do_not_specialize=["length", "heads", "order_heads", "rounds", "round", "threshold"])
def forward_round(
    query,  # (B, T, H, SIZE)
    key,
    value,  # (B, T, H, VALUE_SIZE)
    factor,  # (B, H, T) float32: shared keys are queries times this
    line,  # (B, order_heads, R, T)
    lo,
    hi,
    place_of,  # the same, by token; unused where EARLIER is 0
    lowest_of,
    highest_of,
    real,  # (B, T) uint8
    dropout_key,
    sums,  # (B, T, H, VALUE_SIZE) float32, weighted values so far, relative to the running maximum
    out,  # the same: the new sums, or after the LAST round the output
    top,  # (B, H, T) float32, running maximum of the scores
    mass,  # (B, H, T) float32, running sum of the weights
    length,
    heads,
    order_heads,
    rounds,
    round,
    threshold,
    keep_scale,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    SIZE: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    COUNT_ONCE: tl.constexpr,
    DROPOUT: tl.constexpr,
    EARLIER: tl.constexpr,  # rounds before this one in which a pair may have counted
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
):
    """Online softmax of a tile of queries over all that this round shows them (Dao et al. 2022, section 3.1)."""
    tile, batch, head, first_row, first_number, first_place = locate(QUERIES, length, heads, order_heads, rounds)
    line, lo, hi = line + first_place, lo + first_place, hi + first_place
    offset = tile * QUERIES + tl.arange(0, QUERIES)
    inside = offset < length
    token = tl.load(line + round * length + offset, mask=inside, other=0)
    lowest, highest, begin, end = seen_by(lo, hi, round * length + offset, inside)
    rows = load_rows(query, first_row, token, heads, SIZE, BLOCK)
    if DROPOUT:
        query_number = query_numbers(dropout_key, batch, head, token)
    if FIRST:
        maximum = tl.full([QUERIES], FLOOR, tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        shown_values = tl.zeros([QUERIES, VALUE_BLOCK], tl.float32)
    else:
        maximum = tl.load(top + first_number + token)
        total = tl.load(mass + first_number + token)
        shown_values = load_rows(sums, first_row, token, heads, VALUE_SIZE, VALUE_BLOCK)
    for start in range(begin, end + 1, KEYS):
        key_place = start + tl.arange(0, KEYS)
        key_token = tl.load(line + wrap(key_place, rounds * length))
        keys = load_rows(key, first_row, key_token, heads, SIZE, BLOCK)
        products = matmul(rows, tl.trans(keys)) * LOG2_E
        if SHARED:
            products = products * tl.load(factor + first_number + key_token)[None, :]
        shown = is_shown(
            lowest,
            highest,
            key_place,
            token,
            key_token,
            place_of + first_place if EARLIER else None,
            lowest_of + first_place if EARLIER else None,
            highest_of + first_place if EARLIER else None,
            length,
            0,
            EARLIER,
        )
        scores, _ = pair_scores(
            products,
            shown,
            token,
            key_token,
            real + batch.to(tl.int64) * length if PADDED else None,
            0,
            SHARED,
            CAUSAL,
            PADDED,
            COUNT_ONCE,
        )
        larger = tl.maximum(maximum, tl.max(scores, axis=1))
        decay = tl.exp2(maximum - larger)
        weights = tl.exp2(scores - larger[:, None])
        total = total * decay + tl.sum(weights, axis=1)
        if DROPOUT:
            kept = is_kept(query_number, key_numbers(dropout_key, key_token), threshold, 0)
            weights = tl.where(kept, weights, 0.0)
        values = load_rows(value, first_row, key_token, heads, VALUE_SIZE, VALUE_BLOCK)
        added = matmul(weights.to(values.dtype), values)
        shown_values = shown_values * decay[:, None] + added
        maximum = larger
    if LAST:
        total = tl.where(total > 0, total, 1.0)  # a token that sees nothing gives 0
        shown_values = shown_values * (keep_scale / total)[:, None]
    tl.store(top + first_number + token, maximum, mask=inside)
    tl.store(mass + first_number + token, total, mask=inside)
    store_rows(out, shown_values, inside, first_row, token, heads, VALUE_SIZE, VALUE_BLOCK)
