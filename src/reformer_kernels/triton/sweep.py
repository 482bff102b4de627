"""Sums of weights in one round of every head: over queries for the attention mass, over keys for its gradient.

Weights are those before dropout, recomputed from the saved maximum and sum of every token, as in backward.
"""

import triton
import triton.language as tl

from .backward import positions_that_see
from .forward import visible_range
from .pairs import along, keys_at, load_numbers, locate, pair_products, queries_at, softmax_weights


@triton.jit(do_not_specialize=["length", "round"])
def sweep_queries_round(inputs, row_max, row_sum, grad_mass, mass_dot, numbers, length, round, kind):
    """Sum weights * grad_mass over all keys visible to a tile of queries in this round.

    row_max, row_sum: (B, H, T) float32, maximum of every query's scores and sum of its weights.
    grad_mass: (B, T) float32.
    mass_dot: (B, H, T) float32, the sum for every query, updated in place.
    """
    at, pos, inside = locate(kind.queries, numbers, length, round)
    queries = queries_at(inputs, at, pos, kind)
    total = tl.zeros([kind.queries], tl.float32)
    first, last = visible_range(queries, inside)
    for start in range(first, last + 1, kind.keys):
        keys = keys_at(inputs, at, start + tl.arange(0, kind.keys), kind)
        products = pair_products(queries.rows, keys.rows, 0)
        weights = softmax_weights(products, inputs, row_max, row_sum, at, queries, keys, 0, kind)
        total += tl.sum(weights * along(load_numbers(grad_mass, at, keys.token), 1), axis=1)
    if not kind.first:
        total += tl.load(mass_dot + at.first_number + queries.token)
    tl.store(mass_dot + at.first_number + queries.token, total, mask=inside)


@triton.jit(do_not_specialize=["length", "round", "block_size", "left_reach", "right_reach"])
def sweep_keys_round(
    inputs, row_max, row_sum, query_weights, mass, numbers, length, round, block_size, left_reach, right_reach, kind
):
    """Sum weights * query_weights over the queries to which a tile of keys is visible, as in `backward_keys_round`.

    query_weights: (B, T) float32.
    mass: (B, H, T) float32, the sum for every key, updated in place.
    """
    at, pos, inside = locate(kind.keys, numbers, length, round)
    keys = keys_at(inputs, at, pos, kind)
    total = tl.zeros([kind.keys], tl.float32)
    first, last = positions_that_see(at, pos, inside, block_size, left_reach, right_reach, kind)
    for start in range(first, last + 1, kind.queries):
        queries = queries_at(inputs, at, start + tl.arange(0, kind.queries), kind)
        products = pair_products(queries.rows, keys.rows, 1)
        weights = softmax_weights(products, inputs, row_max, row_sum, at, queries, keys, 1, kind)
        total += tl.sum(weights * along(load_numbers(query_weights, at, queries.token), 1), axis=1)
    if not kind.first:
        total += tl.load(mass + at.first_number + keys.token)
    tl.store(mass + at.first_number + keys.token, total, mask=inside)
