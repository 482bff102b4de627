"""Forward kernels: inverse permutations, and attention of one round of every head.

Rounds are launched one after another. Every token occurs once in a round, so each program owns the rows it writes, and
running sums are passed from launch to launch without atomics: results are the same in every run.
"""

import triton
import triton.language as tl

from .pairs import (
    FARTHEST,
    FLOOR,
    drop,
    keys_at,
    load_rows,
    locate,
    matmul,
    pair_products,
    pair_scores,
    queries_at,
    store_rows,
)


@triton.jit(do_not_specialize=["positions", "length", "total"])
def invert_permutations(
    perm, window_start, window_end, pos_of, start_of, end_of, positions, length, total, BLOCK: tl.constexpr
):
    """Compute every token's sorted position and window from those by sorted position, all (B, H or 1, R, T) int32.

    A program processes BLOCK of all `positions`; length is T, total is R * T.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = at < positions
    token = at - at % length + tl.load(perm + at, mask=exists, other=0)
    tl.store(pos_of + token, (at % total).to(tl.int32), mask=exists)
    tl.store(start_of + token, tl.load(window_start + at, mask=exists, other=0), mask=exists)
    tl.store(end_of + token, tl.load(window_end + at, mask=exists, other=0), mask=exists)


@triton.jit
def visible_range(queries, inside):
    """Return the first and last sorted position visible to any query `inside` (n); first > last if there is none."""
    sees = inside & (queries.window_start <= queries.window_end)
    first = tl.min(tl.where(sees, queries.window_start, FARTHEST), axis=0)
    last = tl.max(tl.where(sees, queries.window_end, -FARTHEST), axis=0)
    return first, last


@triton.jit(do_not_specialize=["length", "round"])
def forward_round(inputs, sums, out, row_max, row_sum, numbers, length, round, kind):
    """Update the online softmax of a tile of queries with all keys visible in this round (Dao et al. 2022, sec. 3.1).

    sums: (B, T, H, value_size) float32, sum of weighted values so far, relative to the running maximum.
    out: the new sums, or the output after the last round.
    row_max, row_sum: (B, H, T) float32, running maximum of scores and running sum of weights.
    """
    at, pos, inside = locate(kind.queries, numbers, length, round)
    queries = queries_at(inputs, at, pos, kind)
    number = at.first_number + queries.token
    if kind.first:
        maximum = tl.full([kind.queries], FLOOR, tl.float32)
        total = tl.zeros([kind.queries], tl.float32)
        weighted = tl.zeros([kind.queries, kind.value_block], tl.float32)
    else:
        maximum = tl.load(row_max + number)
        total = tl.load(row_sum + number)
        weighted = load_rows(sums, at, queries.token, kind.value_size, kind.value_block)
    first, last = visible_range(queries, inside)
    for start in range(first, last + 1, kind.keys):
        keys = keys_at(inputs, at, start + tl.arange(0, kind.keys), kind)
        products = pair_products(queries.rows, keys.rows, 0)
        scores = pair_scores(products, inputs, at, queries, keys, 0, kind)
        larger = tl.maximum(maximum, tl.max(scores, axis=1))
        decay = tl.exp2(maximum - larger)
        weights = tl.exp2(scores - larger[:, None])
        total = total * decay + tl.sum(weights, axis=1)
        if kind.dropout:
            weights = drop(weights, queries, keys, numbers, 0)
        values = load_rows(inputs.value, at, keys.token, kind.value_size, kind.value_block)
        weighted = weighted * decay[:, None] + matmul(weights.to(values.dtype), values)
        maximum = larger
    if kind.last:
        total = tl.where(total == 0, 1.0, total)  # tokens with empty windows get 0
        weighted = weighted / total[:, None]
    tl.store(row_max + number, maximum, mask=inside)
    tl.store(row_sum + number, total, mask=inside)
    store_rows(out, weighted, inside, at, queries.token, kind.value_size, kind.value_block)
