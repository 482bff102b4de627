"""Sums of the weights alone, one round of every line: over queries what tokens receive, over keys what their gradient
needs.

Weights are those before dropout, computed again from the saved maximum and sum of every token, as in backward.
"""

import triton
import triton.language as tl

from .backward import places_that_see
from .forward import first_and_last_seen
from .pairs import along, keys_at, load_rows, locate, matmul, numbers_of, pair_scores, queries_at


@triton.jit
def weights_of(
    products, inputs, top, mass, at, queries, keys, round, QUERY_AXIS: tl.constexpr, FIRST: tl.constexpr, kind
):
    """A tile of weights before dropout, float32."""
    scores = pair_scores(products, inputs, at, queries, keys, round, QUERY_AXIS, FIRST, kind)
    number = at.first_number + queries.token
    share = along(1 / tl.load(mass + number), QUERY_AXIS)
    return tl.exp2(scores - along(tl.load(top + number), QUERY_AXIS)) * share


@triton.jit(do_not_specialize=["length", "round"])
def sweep_queries_round(
    inputs,  # `pairs.Inputs`
    top,  # (B, H, T) float32: maximum of every query's scores
    mass,  # (B, H, T) float32: sum of its weights
    push,  # (B, T) float32
    pushes,  # (B, H, T) float32: the sum of every query's weights * push, so far and new
    numbers,  # `pairs.Numbers`
    length,
    round,
    kind,  # `pairs.Kind`
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Over all that this round shows a tile of queries."""
    at, place, inside = locate(QUERIES, numbers, length, round)
    queries = queries_at(inputs, at, place, kind)
    query_rows = load_rows(inputs.query, at, queries.token, kind.size, kind.block)
    found = tl.zeros([QUERIES], tl.float32)
    first, last = first_and_last_seen(queries, inside)
    for start in range(first, last + 1, KEYS):
        keys = keys_at(inputs, at, start + tl.arange(0, KEYS), kind)
        key_rows = load_rows(inputs.key, at, keys.token, kind.size, kind.block)
        products = matmul(query_rows, tl.trans(key_rows))
        weights = weights_of(products, inputs, top, mass, at, queries, keys, round, 0, FIRST, kind)
        found += tl.sum(weights * along(numbers_of(push, at, keys.token), 1), axis=1)
    if not FIRST:
        found += tl.load(pushes + at.first_number + queries.token)
    tl.store(pushes + at.first_number + queries.token, found, mask=inside)


@triton.jit(do_not_specialize=["length", "round", "reach", "before", "after"])
def sweep_keys_round(
    inputs,  # `pairs.Inputs`
    top,  # (B, H, T) float32: maximum of every query's scores
    mass,  # (B, H, T) float32: sum of its weights
    paid,  # (B, T) float32
    received,  # (B, H, T) float32: the sum over queries of weight * paid, so far and new
    numbers,  # `pairs.Numbers`
    length,
    round,
    reach,  # as in `backward_keys_round`
    before,
    after,
    kind,  # `pairs.Kind`
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Over the queries that see a tile of keys, as in `backward_keys_round`."""
    at, place, inside = locate(KEYS, numbers, length, round)
    keys = keys_at(inputs, at, place, kind)
    key_rows = load_rows(inputs.key, at, keys.token, kind.size, kind.block)
    found = tl.zeros([KEYS], tl.float32)
    first, last = places_that_see(place, inside, round, length, reach, before, after, kind)
    for start in range(first, last + 1, QUERIES):
        queries = queries_at(inputs, at, start + tl.arange(0, QUERIES), kind)
        query_rows = load_rows(inputs.query, at, queries.token, kind.size, kind.block)
        products = matmul(key_rows, tl.trans(query_rows))
        weights = weights_of(products, inputs, top, mass, at, queries, keys, round, 1, FIRST, kind)
        found += tl.sum(weights * along(numbers_of(paid, at, queries.token), 1), axis=1)
    if not FIRST:
        found += tl.load(received + at.first_number + keys.token)
    tl.store(received + at.first_number + keys.token, found, mask=inside)
