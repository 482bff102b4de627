"""Backward kernels of one round of every head: gradients of queries, and of keys and values.

Scores are computed again from the saved maximum and sum of every token. Two kernels, because sums over keys belong to
queries and sums over queries belong to keys: each keeps its own in registers and writes rows that no other program of
the launch writes (within a round every token stands once; rounds are launched one after another). No atomics, so
gradients are the same in every run. Gradients gather in float32 and turn to the inputs' dtype in the last round.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .forward import visible_range
from .pairs import (
    FARTHEST,
    along,
    drop,
    fill_fixed,
    keys_at,
    load_numbers,
    load_rows,
    locate,
    matmul,
    queries_at,
    softmax_weights,
    store_rows,
    wrap,
)


class Saved(NamedTuple):
    """What the forward left, and what came back."""

    out: Any  # (B, T, H, value_size)
    grad_out: Any  # the same: gradient of the output
    row_max: Any  # (B, H, T) float32: maximum of every query's scores
    row_sum: Any  # (B, H, T) float32: sum of its weights
    delta: Any  # (B, H, T) float32: sum of out * grad_out, written by the first launch of `backward_queries_round`
    query_weights: Any = None  # (B, T) float32; these three are None where the attention mass has no gradient
    grad_mass: Any = None  # (B, T) float32: that gradient
    mass_dot: Any = None  # (B, H, T) float32: the sum of every query's weights times it


@triton.jit
def weights_and_grad_scores(
    products,  # tiles of float32: query @ key
    grad_weights,  # and grad_out @ value
    delta,  # (queries) float32
    inputs,
    saved,
    at,
    queries,
    keys,
    numbers,
    round,
    QUERY_AXIS: tl.constexpr,
    FIRST: tl.constexpr,
    kind,
):
    """Weights after dropout, and the gradients of the scores (in natural units): two tiles of float32."""
    weights = softmax_weights(
        products, inputs, saved.row_max, saved.row_sum, at, queries, keys, round, QUERY_AXIS, FIRST, kind
    )
    used = weights
    if kind.dropout:
        used = drop(weights, queries, keys, numbers, QUERY_AXIS)
        grad_weights = drop(grad_weights, queries, keys, numbers, QUERY_AXIS)
    if kind.has_grad_mass:
        query_weights = load_numbers(saved.query_weights, at, queries.token)
        grad_mass = load_numbers(saved.grad_mass, at, keys.token)
        grad_weights += along(query_weights, QUERY_AXIS) * along(grad_mass, 1 - QUERY_AXIS)
    grad_scores = weights * (grad_weights - along(delta, QUERY_AXIS))
    return used, fill_fixed(grad_scores, 0.0, 0.0, inputs, at, queries, keys, QUERY_AXIS, kind)


@triton.jit(do_not_specialize=["length", "round"])
def backward_queries_round(
    inputs,  # `pairs.Inputs`
    saved,  # `Saved`
    sums,  # (B, T, H, size) float32: gradient so far
    target,  # (B, T, H, size): the same, new
    numbers,  # `pairs.Numbers`
    length,
    round,
    kind,  # `pairs.Kind`
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Gradient of a tile of queries; of shared query/key attention only the queries' part of it."""
    at, pos, inside = locate(QUERIES, numbers, length, round)
    queries = queries_at(inputs, at, pos, kind)
    query_rows = load_rows(inputs.query, at, queries.token, kind.size, kind.block)
    grads = load_rows(saved.grad_out, at, queries.token, kind.value_size, kind.value_block)
    if FIRST:
        outs = load_rows(saved.out, at, queries.token, kind.value_size, kind.value_block)
        delta = tl.sum(outs.to(tl.float32) * grads.to(tl.float32), axis=1)
        if kind.has_grad_mass:
            query_weights = load_numbers(saved.query_weights, at, queries.token)
            delta += query_weights * tl.load(saved.mass_dot + at.first_number + queries.token)
        tl.store(saved.delta + at.first_number + queries.token, delta, mask=inside)
        grad_queries = tl.zeros([QUERIES, kind.block], tl.float32)
    else:
        delta = tl.load(saved.delta + at.first_number + queries.token)
        grad_queries = load_rows(sums, at, queries.token, kind.size, kind.block)
    first, last = visible_range(queries, inside)
    for start in range(first, last + 1, KEYS):
        keys = keys_at(inputs, at, start + tl.arange(0, KEYS), kind)
        key_rows = load_rows(inputs.key, at, keys.token, kind.size, kind.block)
        values = load_rows(inputs.value, at, keys.token, kind.value_size, kind.value_block)
        _, grad_scores = weights_and_grad_scores(
            matmul(query_rows, tl.trans(key_rows)), matmul(grads, tl.trans(values)), delta,
            inputs, saved, at, queries, keys, numbers, round, 0, FIRST, kind,
        )  # fmt: skip
        if kind.shared:
            grad_scores = grad_scores * keys.factor[None, :]
        grad_queries += matmul(grad_scores.to(key_rows.dtype), key_rows)
    store_rows(target, grad_queries, inside, at, queries.token, kind.size, kind.block)


@triton.jit
def positions_that_see(pos, inside, round, length, block_size, left_reach, right_reach, kind):
    """First and last sorted position to which any of the positions `inside` (n) may be visible."""
    first = tl.min(pos, axis=0) - right_reach
    last = tl.max(tl.where(inside, pos, -FARTHEST), axis=0) + left_reach
    first, last = first - wrap(first, block_size), last - wrap(last, block_size) + block_size - 1
    if kind.dedup_pairs:
        first, last = tl.maximum(first, round * length), tl.minimum(last, (round + 1) * length - 1)
    return first, last


@triton.jit(do_not_specialize=["length", "round", "block_size", "left_reach", "right_reach"])
def backward_keys_round(
    inputs,  # `pairs.Inputs`
    saved,  # `Saved`
    sums,  # (B, T, H, size) float32: gradient so far of the keys, or of the queries if they are the keys
    target,  # (B, T, H, size): the same, new
    value_sums,  # (B, T, H, value_size) float32: and of the values
    value_target,
    numbers,  # `pairs.Numbers`
    length,
    round,
    block_size,  # reach counts from the ends of blocks of so many positions
    left_reach,
    right_reach,
    kind,  # `pairs.Kind`
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Gradients of a tile of keys and values, over the queries to which the tile is visible: those of this round
    (window rule), or of any round (chunk rule, whose windows wrap around).
    """
    at, pos, inside = locate(KEYS, numbers, length, round)
    keys = keys_at(inputs, at, pos, kind)
    key_rows = load_rows(inputs.key, at, keys.token, kind.size, kind.block)
    values = load_rows(inputs.value, at, keys.token, kind.value_size, kind.value_block)
    grad_keys = tl.zeros([KEYS, kind.block], tl.float32)
    grad_values = tl.zeros([KEYS, kind.value_block], tl.float32)
    first, last = positions_that_see(pos, inside, round, length, block_size, left_reach, right_reach, kind)
    for start in range(first, last + 1, QUERIES):
        queries = queries_at(inputs, at, start + tl.arange(0, QUERIES), kind)
        query_rows = load_rows(inputs.query, at, queries.token, kind.size, kind.block)
        grads = load_rows(saved.grad_out, at, queries.token, kind.value_size, kind.value_block)
        used, grad_scores = weights_and_grad_scores(
            matmul(key_rows, tl.trans(query_rows)), matmul(values, tl.trans(grads)),
            tl.load(saved.delta + at.first_number + queries.token),
            inputs, saved, at, queries, keys, numbers, round, 1, FIRST, kind,
        )  # fmt: skip
        grad_values += matmul(used.to(grads.dtype), grads)
        grad_keys += matmul(grad_scores.to(query_rows.dtype), query_rows)
    if kind.shared:  # key = query * factor: take out the part along the key, which a unit length does not pass on
        grad_keys = grad_keys * keys.factor[:, None]
        key_rows = load_rows(inputs.key, at, keys.token, kind.size, kind.block)  # again: registers are dear
        single = key_rows.to(tl.float32)
        along_key = keys.factor * keys.factor * tl.sum(single * grad_keys, axis=1)
        grad_keys -= single * along_key[:, None]
    if kind.shared or not FIRST:
        grad_keys += load_rows(sums, at, keys.token, kind.size, kind.block)
    if not FIRST:
        grad_values += load_rows(value_sums, at, keys.token, kind.value_size, kind.value_block)
    store_rows(target, grad_keys, inside, at, keys.token, kind.size, kind.block)
    store_rows(value_target, grad_values, inside, at, keys.token, kind.value_size, kind.value_block)
