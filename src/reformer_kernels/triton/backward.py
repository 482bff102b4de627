"""Backward kernels of one round of every head: gradients of queries, and of keys and values.

Scores are recomputed, and weights follow from the saved maximum and sum of every token. There are two kernels, since
sums over keys belong to queries and sums over queries to keys: each accumulates its own in registers and writes rows
that no other program of the launch writes (every token occurs once in a round; rounds are launched one after another).
Without atomics, gradients are the same in every run. They are accumulated in float32 and converted to the inputs'
dtype in the last round.
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
    pair_products,
    queries_at,
    softmax_weights,
    store_rows,
    wrap,
)


class Saved(NamedTuple):
    """Results saved by the forward pass, and incoming gradients."""

    out: Any  # (B, T, H, value_size)
    grad_out: Any  # likewise: gradient of the output
    row_max: Any  # (B, H, T) float32: maximum of every query's scores
    row_sum: Any  # (B, H, T) float32: sum of every query's weights
    delta: Any  # (B, H, T) float32: sum of out * grad_out, written by the first launch of `backward_queries_round`
    query_weights: Any = None  # (B, T) float32; the last three are None if the attention mass has no gradient
    grad_mass: Any = None  # (B, T) float32: gradient of the attention mass
    mass_dot: Any = None  # (B, H, T) float32: sum of every query's weights times grad_mass


@triton.jit
def weights_and_grad_scores(
    products, grad_weights, delta, inputs, saved, at, queries, keys, numbers, QUERY_AXIS: tl.constexpr, kind
):
    """Compute weights after dropout and the gradients of scores (in natural units): two float32 tiles.

    products, grad_weights: `pair_products` of query and key, and of grad_out and value. delta: float32, by query.
    """
    weights = softmax_weights(products, inputs, saved.row_max, saved.row_sum, at, queries, keys, QUERY_AXIS, kind)
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
def backward_queries_round(inputs, saved, sums, target, numbers, length, round, kind):
    """Compute the gradient of a tile of queries; for shared query/key attention, only the queries' part of it.

    sums, target: (B, T, H, size), the gradient so far, in float32, and the new one.
    """
    at, pos, inside = locate(kind.queries, numbers, length, round)
    queries = queries_at(inputs, at, pos, kind)
    grads = load_rows(saved.grad_out, at, queries.token, kind.value_size, kind.value_block)
    if kind.first:
        outs = load_rows(saved.out, at, queries.token, kind.value_size, kind.value_block)
        delta = tl.sum(outs.to(tl.float32) * grads.to(tl.float32), axis=1)
        if kind.has_grad_mass:
            query_weights = load_numbers(saved.query_weights, at, queries.token)
            delta += query_weights * tl.load(saved.mass_dot + at.first_number + queries.token)
        tl.store(saved.delta + at.first_number + queries.token, delta, mask=inside)
        grad_queries = tl.zeros([kind.queries, kind.block], tl.float32)
    else:
        delta = tl.load(saved.delta + at.first_number + queries.token)
        grad_queries = load_rows(sums, at, queries.token, kind.size, kind.block)
    first, last = visible_range(queries, inside)
    for start in range(first, last + 1, kind.keys):
        keys = keys_at(inputs, at, start + tl.arange(0, kind.keys), kind)
        values = load_rows(inputs.value, at, keys.token, kind.value_size, kind.value_block)
        products = pair_products(queries.rows, keys.rows, 0)
        grad_weights = pair_products(grads, values, 0)
        _, grad_scores = weights_and_grad_scores(
            products, grad_weights, delta, inputs, saved, at, queries, keys, numbers, 0, kind
        )
        if kind.shared:
            grad_scores = grad_scores * keys.factor[None, :]
        grad_queries += matmul(grad_scores.to(keys.rows.dtype), keys.rows)
    store_rows(target, grad_queries, inside, at, queries.token, kind.size, kind.block)


@triton.jit
def positions_that_see(at, pos, inside, block_size, left_reach, right_reach, kind):
    """Return the first and last sorted position to which any of the positions `inside` (n) may be visible."""
    first = tl.min(pos, axis=0) - right_reach
    last = tl.max(tl.where(inside, pos, -FARTHEST), axis=0) + left_reach
    first, last = first - wrap(first, block_size), last - wrap(last, block_size) + block_size - 1
    if kind.dedup_pairs:
        first, last = tl.maximum(first, at.round * at.length), tl.minimum(last, (at.round + 1) * at.length - 1)
    return first, last


@triton.jit(do_not_specialize=["length", "round", "block_size", "left_reach", "right_reach"])
def backward_keys_round(
    inputs,
    saved,
    sums,
    target,
    value_sums,
    value_target,
    numbers,
    length,
    round,
    block_size,
    left_reach,
    right_reach,
    kind,
):
    """Compute gradients of a tile of keys and values over the queries to which it is visible.

    These are queries of this round (window rule), or of any round (chunk rule, whose windows wrap around).

    sums, target: (B, T, H, size), the gradient of keys (or queries if shared) so far, in float32, and the new one.
    value_sums, value_target: (B, T, H, value_size), likewise for values.
    block_size: reaches are relative to the ends of blocks of this many positions.
    """
    at, pos, inside = locate(kind.keys, numbers, length, round)
    keys = keys_at(inputs, at, pos, kind)
    values = load_rows(inputs.value, at, keys.token, kind.value_size, kind.value_block)
    grad_keys = tl.zeros([kind.keys, kind.block], tl.float32)
    grad_values = tl.zeros([kind.keys, kind.value_block], tl.float32)
    first, last = positions_that_see(at, pos, inside, block_size, left_reach, right_reach, kind)
    for start in range(first, last + 1, kind.queries):
        queries = queries_at(inputs, at, start + tl.arange(0, kind.queries), kind)
        grads = load_rows(saved.grad_out, at, queries.token, kind.value_size, kind.value_block)
        products = pair_products(queries.rows, keys.rows, 1)
        grad_weights = pair_products(grads, values, 1)
        delta = tl.load(saved.delta + at.first_number + queries.token)
        used, grad_scores = weights_and_grad_scores(
            products, grad_weights, delta, inputs, saved, at, queries, keys, numbers, 1, kind
        )
        grad_values += matmul(used.to(grads.dtype), grads)
        grad_keys += matmul(grad_scores.to(queries.rows.dtype), queries.rows)
    if kind.shared:  # key = query * factor: remove the component along the key, which normalization discards
        grad_keys = grad_keys * keys.factor[:, None]
        key_rows = load_rows(inputs.key, at, keys.token, kind.size, kind.block)  # loaded again to save registers
        single = key_rows.to(tl.float32)
        along_key = keys.factor * keys.factor * tl.sum(single * grad_keys, axis=1)
        grad_keys -= single * along_key[:, None]
    if kind.shared or not kind.first:
        grad_keys += load_rows(sums, at, keys.token, kind.size, kind.block)
    if not kind.first:
        grad_values += load_rows(value_sums, at, keys.token, kind.value_size, kind.value_block)
    store_rows(target, grad_keys, inside, at, keys.token, kind.size, kind.block)
    store_rows(value_target, grad_values, inside, at, keys.token, kind.value_size, kind.value_block)
