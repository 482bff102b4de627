"""Sums of the weights alone, one round of every head: over queries the attention mass, over keys what its gradient
needs.

Weights are those before dropout, computed again from the saved maximum and sum of every token, as in backward.
"""

import triton
import triton.language as tl

from .backward import positions_that_see
from .forward import visible_range
from .pairs import along, keys_at, load_numbers, load_rows, locate, matmul, queries_at, softmax_weights


@triton.jit(do_not_specialize=["length", "round"])
def sweep_queries_round(
    inputs,  # `pairs.Inputs`
    row_max,  # (B, H, T) float32: maximum of every query's scores
    row_sum,  # (B, H, T) float32: sum of its weights
    grad_mass,  # (B, T) float32
    mass_dot,  # (B, H, T) float32: the sum of every query's weights * grad_mass, so far and new
    numbers,  # `pairs.Numbers`
    length,
    round,
    kind,  # `pairs.Kind`
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Over all that is visible to a tile of queries in this round."""
    at, pos, inside = locate(QUERIES, numbers, length, round)
    queries = queries_at(inputs, at, pos, kind)
    query_rows = load_rows(inputs.query, at, queries.token, kind.size, kind.block)
    total = tl.zeros([QUERIES], tl.float32)
    first, last = visible_range(queries, inside)
    for start in range(first, last + 1, KEYS):
        keys = keys_at(inputs, at, start + tl.arange(0, KEYS), kind)
        key_rows = load_rows(inputs.key, at, keys.token, kind.size, kind.block)
        products = matmul(query_rows, tl.trans(key_rows))
        weights = softmax_weights(products, inputs, row_max, row_sum, at, queries, keys, round, 0, FIRST, kind)
        total += tl.sum(weights * along(load_numbers(grad_mass, at, keys.token), 1), axis=1)
    if not FIRST:
        total += tl.load(mass_dot + at.first_number + queries.token)
    tl.store(mass_dot + at.first_number + queries.token, total, mask=inside)


@triton.jit(do_not_specialize=["length", "round", "block_size", "left_reach", "right_reach"])
def sweep_keys_round(
    inputs,  # `pairs.Inputs`
    row_max,  # (B, H, T) float32: maximum of every query's scores
    row_sum,  # (B, H, T) float32: sum of its weights
    query_weights,  # (B, T) float32
    mass,  # (B, H, T) float32: the sum over queries of weight * query_weights, so far and new
    numbers,  # `pairs.Numbers`
    length,
    round,
    block_size,  # as in `backward_keys_round`
    left_reach,
    right_reach,
    kind,  # `pairs.Kind`
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Over the queries to which a tile of keys is visible, as in `backward_keys_round`."""
    at, pos, inside = locate(KEYS, numbers, length, round)
    keys = keys_at(inputs, at, pos, kind)
    key_rows = load_rows(inputs.key, at, keys.token, kind.size, kind.block)
    total = tl.zeros([KEYS], tl.float32)
    first, last = positions_that_see(pos, inside, round, length, block_size, left_reach, right_reach, kind)
    for start in range(first, last + 1, QUERIES):
        queries = queries_at(inputs, at, start + tl.arange(0, QUERIES), kind)
        query_rows = load_rows(inputs.query, at, queries.token, kind.size, kind.block)
        products = matmul(key_rows, tl.trans(query_rows))
        weights = softmax_weights(products, inputs, row_max, row_sum, at, queries, keys, round, 1, FIRST, kind)
        total += tl.sum(weights * along(load_numbers(query_weights, at, queries.token), 1), axis=1)
    if not FIRST:
        total += tl.load(mass + at.first_number + keys.token)
    tl.store(mass + at.first_number + keys.token, total, mask=inside)
