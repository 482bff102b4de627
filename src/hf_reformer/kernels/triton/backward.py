"""Backward kernels of one round of every line: gradients of queries, and of keys and values.

Scores are computed again from the saved maximum and sum of every token. Two kernels, because sums over keys belong to
queries and sums over queries belong to keys: each keeps its own in registers and writes rows that no other program of
the launch writes (within a round every token stands once; rounds are launched one after another). No atomics, so
gradients are the same in every run. Gradients gather in float32 and turn to the inputs' dtype in the last round.
"""

import triton
import triton.language as tl

from .forward import seen_by
from .pairs import (
    FARTHEST,
    LOG2_E,
    along,
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


@triton.jit
def slopes(
    products,  # tiles of float32: query @ key in units of log 2
    grad_weights,  # and grad @ value
    shown,
    query_token,
    key_token,
    top,  # (queries) float32
    mass,
    drift,
    real,
    query_number,  # (queries), (keys) uint32; unused without dropout
    key_number,
    threshold,
    keep_scale,
    QUERY_AXIS: tl.constexpr,
    SHARED: tl.constexpr,
    CAUSAL: tl.constexpr,
    PADDED: tl.constexpr,
    COUNT_ONCE: tl.constexpr,
    DROPOUT: tl.constexpr,
):
    """Weights after dropout, and the gradients of the scores (in natural units): two tiles of float32."""
    scores, free = pair_scores(
        products, shown, query_token, key_token, real, QUERY_AXIS, SHARED, CAUSAL, PADDED, COUNT_ONCE
    )
    weights = tl.exp2(scores - along(top, QUERY_AXIS)) * along(1 / mass, QUERY_AXIS)
    used = weights
    if DROPOUT:
        kept = tl.where(is_kept(query_number, key_number, threshold, QUERY_AXIS), keep_scale, 0.0)
        used = weights * kept
        grad_weights = grad_weights * kept
    slope = weights * (grad_weights - along(drift, QUERY_AXIS))
    if SHARED or not COUNT_ONCE:
        slope = tl.where(free, slope, 0.0)
    return used, slope


@triton.jit(do_not_specialize=["length", "heads", "order_heads", "rounds", "round", "threshold"])
def backward_queries_round(
    query,  # inputs as in `forward_round`
    key,
    value,
    factor,
    line,
    lo,
    hi,
    place_of,
    lowest_of,
    highest_of,
    real,
    dropout_key,
    out,  # (B, T, H, VALUE_SIZE)
    grad,  # the same: gradient of the output
    top,  # (B, H, T) float32, as the forward left them
    mass,
    drift,  # (B, H, T) float32, sum of out * grad: written in the FIRST round, read in the others
    sums,  # (B, T, H, SIZE) float32, gradient so far
    target,  # the same, new
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
    EARLIER: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Gradient of a tile of queries; of shared query/key attention only the queries' part of it."""
    tile, batch, head, first_row, first_number, first_place = locate(QUERIES, length, heads, order_heads, rounds)
    line, lo, hi = line + first_place, lo + first_place, hi + first_place
    offset = tile * QUERIES + tl.arange(0, QUERIES)
    inside = offset < length
    token = tl.load(line + round * length + offset, mask=inside, other=0)
    lowest, highest, begin, end = seen_by(lo, hi, round * length + offset, inside)
    rows = load_rows(query, first_row, token, heads, SIZE, BLOCK)
    grads = load_rows(grad, first_row, token, heads, VALUE_SIZE, VALUE_BLOCK)
    maximum = tl.load(top + first_number + token)
    total = tl.load(mass + first_number + token)
    if FIRST:
        outs = load_rows(out, first_row, token, heads, VALUE_SIZE, VALUE_BLOCK)
        drifts = tl.sum(outs.to(tl.float32) * grads.to(tl.float32), axis=1)
        tl.store(drift + first_number + token, drifts, mask=inside)
        grad_rows = tl.zeros([QUERIES, BLOCK], tl.float32)
    else:
        drifts = tl.load(drift + first_number + token)
        grad_rows = load_rows(sums, first_row, token, heads, SIZE, BLOCK)
    query_number = query_numbers(dropout_key, batch, head, token) if DROPOUT else None
    for start in range(begin, end + 1, KEYS):
        key_place = start + tl.arange(0, KEYS)
        key_token = tl.load(line + wrap(key_place, rounds * length))
        keys = load_rows(key, first_row, key_token, heads, SIZE, BLOCK)
        values = load_rows(value, first_row, key_token, heads, VALUE_SIZE, VALUE_BLOCK)
        products = matmul(rows, tl.trans(keys)) * LOG2_E
        if SHARED:
            scale = tl.load(factor + first_number + key_token)[None, :]
            products = products * scale
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
        _, slope = slopes(
            products,
            matmul(grads, tl.trans(values)),
            shown,
            token,
            key_token,
            maximum,
            total,
            drifts,
            real + batch.to(tl.int64) * length if PADDED else None,
            query_number,
            key_numbers(dropout_key, key_token) if DROPOUT else None,
            threshold,
            keep_scale,
            0,
            SHARED,
            CAUSAL,
            PADDED,
            COUNT_ONCE,
            DROPOUT,
        )
        if SHARED:
            slope = slope * scale
        grad_rows += matmul(slope.to(keys.dtype), keys)
    store_rows(target, grad_rows, inside, first_row, token, heads, SIZE, BLOCK)


@triton.jit(
    do_not_specialize=["length", "heads", "order_heads", "rounds", "round", "threshold", "reach", "before", "after"]
)
def backward_keys_round(
    query,  # inputs as in `forward_round`
    key,
    value,
    factor,
    line,
    lo,
    hi,
    place_of,
    lowest_of,
    highest_of,
    real,
    dropout_key,
    grad,  # (B, T, H, VALUE_SIZE)
    top,  # (B, H, T) float32
    mass,
    drift,
    sums,  # (B, T, H, SIZE) float32, gradient so far of the keys, or of the queries if they are the keys
    target,  # the same, new
    value_sums,  # (B, T, H, VALUE_SIZE) float32, and of the values
    value_target,
    length,
    heads,
    order_heads,
    rounds,
    round,
    threshold,
    keep_scale,
    reach,  # tile of places to which `before` and `after` refer
    before,
    after,
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
    EARLIER: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Gradients of a tile of keys and values, over the queries that see the tile: those of this round (window rule),
    or of any round (chunk rule, whose windows wrap around).
    """
    tile, batch, head, first_row, first_number, first_place = locate(KEYS, length, heads, order_heads, rounds)
    line, lo, hi = line + first_place, lo + first_place, hi + first_place
    offset = tile * KEYS + tl.arange(0, KEYS)
    inside = offset < length
    token = tl.load(line + round * length + offset, mask=inside, other=0)
    key_place = tl.where(inside, round * length + offset, -FARTHEST)  # the next round's places are not this tile's
    keys = load_rows(key, first_row, token, heads, SIZE, BLOCK)
    values = load_rows(value, first_row, token, heads, VALUE_SIZE, VALUE_BLOCK)
    if SHARED:
        scale = tl.load(factor + first_number + token)
    key_number = key_numbers(dropout_key, token) if DROPOUT else None
    grad_keys = tl.zeros([KEYS, BLOCK], tl.float32)
    grad_values = tl.zeros([KEYS, VALUE_BLOCK], tl.float32)
    begin = round * length + tile * KEYS
    end = begin + tl.minimum(KEYS, length - tile * KEYS) - 1 + before
    begin = begin - after
    begin, end = begin - wrap(begin, reach), end - wrap(end, reach) + reach - 1
    if COUNT_ONCE:
        begin, end = tl.maximum(begin, round * length), tl.minimum(end, (round + 1) * length - 1)
    for start in range(begin, end + 1, QUERIES):
        query_place = start + tl.arange(0, QUERIES)
        wrapped = wrap(query_place, rounds * length)
        laps = query_place - wrapped
        query_token = tl.load(line + wrapped)
        rows = load_rows(query, first_row, query_token, heads, SIZE, BLOCK)
        grads = load_rows(grad, first_row, query_token, heads, VALUE_SIZE, VALUE_BLOCK)
        products = matmul(keys, tl.trans(rows)) * LOG2_E
        if SHARED:
            products = products * scale[:, None]
        shown = is_shown(
            tl.load(lo + wrapped) + laps,
            tl.load(hi + wrapped) + laps,
            key_place,
            query_token,
            token,
            place_of + first_place if EARLIER else None,
            lowest_of + first_place if EARLIER else None,
            highest_of + first_place if EARLIER else None,
            length,
            1,
            EARLIER,
        )
        used, slope = slopes(
            products,
            matmul(values, tl.trans(grads)),
            shown,
            query_token,
            token,
            tl.load(top + first_number + query_token),
            tl.load(mass + first_number + query_token),
            tl.load(drift + first_number + query_token),
            real + batch.to(tl.int64) * length if PADDED else None,
            query_numbers(dropout_key, batch, head, query_token) if DROPOUT else None,
            key_number,
            threshold,
            keep_scale,
            1,
            SHARED,
            CAUSAL,
            PADDED,
            COUNT_ONCE,
            DROPOUT,
        )
        grad_values += matmul(used.to(grads.dtype), grads)
        grad_keys += matmul(slope.to(rows.dtype), rows)
    if SHARED:  # key = query * factor: take out the part along the key, which a unit length does not pass on
        grad_keys = grad_keys * scale[:, None]
        single = load_rows(key, first_row, token, heads, SIZE, BLOCK).to(tl.float32)  # again: registers are dear
        grad_keys -= single * (scale * scale * tl.sum(single * grad_keys, axis=1))[:, None]
    if SHARED or not FIRST:
        grad_keys += load_rows(sums, first_row, token, heads, SIZE, BLOCK)
    if not FIRST:
        grad_values += load_rows(value_sums, first_row, token, heads, VALUE_SIZE, VALUE_BLOCK)
    store_rows(target, grad_keys, inside, first_row, token, heads, SIZE, BLOCK)
    store_rows(value_target, grad_values, inside, first_row, token, heads, VALUE_SIZE, VALUE_BLOCK)
