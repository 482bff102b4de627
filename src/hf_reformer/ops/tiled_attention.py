"""Ordered attention in pure PyTorch, on any device.

It works through the line in blocks of tiles: it gathers the rows of a block, forms the scores in tiles, combines
rounds by a running maximum and sum, and recomputes all scores in backward. Nothing of size length x keys is kept. It
is built from arithmetic rather than from masks: on a CPU, `where` and `masked_fill` cost twice as much as a matrix
product of the same size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .layout import AttentionLayout
from .prng import keep_threshold, pair_scramble
from .reference import MASKED_SCORE, SELF_SCORE, inverse_permutation, pair_keys, shared_key

MAX_LENGTH = 2**22  # tokens a row; beyond it float32 would no longer tell places apart
BLOCK_SCORES = 2**20  # scores worked on at a time: 4 MiB in float32, about what caches hold
HIDDEN_PENALTY = 1e9  # taken off the score of a pair that is not shown; beyond every real score
FLOOR = -1e8  # running maxima start here: above a hidden pair, below every shown one
LOG2_E = 1.4426950408889634  # queries are scaled by it: exp2 costs half of exp, and a tenth where it underflows


class _MaskRule(NamedTuple):
    """What a block needs to know beside tensors."""

    shared: bool
    causal: bool
    dropout: float


class _RowIndex(NamedTuple):
    """The line in terms of rows of the flattened (B, T, H) tensors: row = (b * T + token) * H + h; N rows in all."""

    row: torch.Tensor  # (B·H, R, T) int32, row at every place
    lo: torch.Tensor  # (B·H, R, T) int32
    hi: torch.Tensor
    place: torch.Tensor | None  # (R, N) float32, twice the place of every row; only where pairs count once
    centre: torch.Tensor | None  # (R, N) float32, lo + hi of every row, within its round
    width: torch.Tensor | None  # (R, N) float32, hi - lo + 1
    real: torch.Tensor | None  # (N) bool
    query_key: torch.Tensor | None  # (N) int32, random numbers for dropout
    key_key: torch.Tensor | None  # (N) int32


def _by_row(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, H, R, T) → (R, N)"""
    return x.permute(2, 0, 3, 1).reshape(x.shape[2], -1).to(dtype)


def _make_row_index(
    orders: AttentionLayout, heads: int, mask: torch.Tensor | None, dropout_key: torch.Tensor | None
) -> _RowIndex:
    line, lo, hi = (x.expand(-1, heads, -1, -1) for x in (orders.perm, orders.window_start, orders.window_end))
    batch, _, rounds, length = line.shape
    row_of_batch = torch.arange(batch, dtype=torch.int32, device=line.device)[:, None, None, None] * (length * heads)
    head = torch.arange(heads, dtype=torch.int32, device=line.device)[:, None, None]
    row = line * heads + row_of_batch + head
    place = centre = width = real = query_key = key_key = None
    if orders.dedup_pairs and rounds > 1:
        place_of = inverse_permutation(line)
        first = lo.gather(-1, place_of)
        last = hi.gather(-1, place_of)
        start = torch.arange(rounds, dtype=torch.int32, device=line.device)[:, None] * (2 * length)
        place = _by_row(place_of * 2, torch.float32)
        centre = _by_row(first + last - start, torch.float32)
        width = _by_row(last - first + 1, torch.float32)
    if mask is not None and not orders.dedup_pairs:
        real = mask[:, :, None].expand(-1, -1, heads).reshape(-1)
    if dropout_key is not None:
        by_query, by_key = pair_keys(dropout_key, batch, heads, length)
        query_key = by_query.transpose(1, 2).reshape(-1)
        key_key = by_key[None, :, None].expand(batch, length, heads).reshape(-1)
    row, lo, hi = (x.reshape(batch * heads, rounds, length) for x in (row, lo, hi))
    return _RowIndex(row, lo, hi, place, centre, width, real, query_key, key_key)


class _TileBlock(NamedTuple):
    """A rectangle of tiles of one round: n tiles of C queries, each with its K keys."""

    round: int
    query: torch.Tensor  # (n·C) int32 rows
    key: torch.Tensor  # (n·K) int32 rows
    target: torch.Tensor  # (n·C) int32 rows to write to; N for the filling of a last, partial tile
    hidden: torch.Tensor | None  # (n, C, K): above 0 where the pair is not shown by this round (window rule)
    shape: tuple[int, int, int]  # n, C, K


def _blocks(orders: AttentionLayout, rows: _RowIndex) -> Iterator[_TileBlock]:
    """Cut every round in blocks of about BLOCK_SCORES scores."""
    lines, rounds, length = rows.row.shape
    tile, before, after = orders.block_size, orders.left_reach, orders.right_reach
    tiles, keys = -(-length // tile), tile + before + after
    per_line = max(1, min(tiles, BLOCK_SCORES // (tile * keys)))
    per_block = max(1, BLOCK_SCORES // (tile * keys * tiles))
    device = rows.row.device
    query_place = torch.arange(tiles * tile, device=device)
    key_place = torch.arange(-before, tiles * tile + after, device=device)
    offset = torch.arange(tiles, dtype=torch.int32, device=device)[:, None] * tile - before
    for index in range(rounds):
        start = index * length
        inside = query_place.clamp(max=length - 1)
        query = rows.row[:, index, inside]  # (lines, tiles·C)
        target = torch.where(query_place < length, query, rows.row.numel() // rounds)
        if orders.dedup_pairs:
            key = rows.row[:, index, key_place.clamp(0, length - 1)]  # what is added at the ends is never shown
            first, last = rows.lo[:, index, inside], rows.hi[:, index, inside]
            last = torch.where(query_place < length, last, first - 1)  # the filling of a last tile sees nothing
            first, last = (x.unflatten(-1, (tiles, tile)) - (offset + start) for x in (first, last))
        else:
            key = rows.row.flatten(1)[:, (key_place + start) % (rounds * length)]
        key = key.unfold(-1, keys, tile)  # (lines, tiles, K), a view
        query, target = query.unflatten(-1, (tiles, tile)), target.unflatten(-1, (tiles, tile))
        for line in range(0, lines, per_block):
            for at in range(0, tiles, per_line):
                part = (slice(line, line + per_block), slice(at, at + per_line))
                hidden = _outside(first[part], last[part], keys) if orders.dedup_pairs else None
                shape = (query[part].shape[0] * query[part].shape[1], tile, keys)
                yield _TileBlock(
                    index, query[part].reshape(-1), key[part].reshape(-1), target[part].reshape(-1), hidden, shape
                )


def _outside(first: torch.Tensor, last: torch.Tensor, keys: int) -> torch.Tensor:
    """|2k - (first + last)| - (last - first): above 0 where key k of a tile lies outside first … last."""
    first, last = first.reshape(-1, first.shape[-1], 1).float(), last.reshape(-1, last.shape[-1], 1).float()
    twice = torch.arange(0, 2 * keys, 2, dtype=torch.float32, device=first.device)
    return (twice - (first + last)).abs_().sub_(last - first)


def _block_scores(block: _TileBlock, rows: _RowIndex, rule: _MaskRule, q: torch.Tensor, k: torch.Tensor, before: int):
    """Scores (n, C, K) in units of log 2, as the softmax sees them; and where they are fixed numbers, or None."""
    n, tile, keys = block.shape
    scores = torch.bmm(q.view(n, tile, -1), k.view(n, keys, -1).transpose(1, 2))
    if block.hidden is None:
        return _chunk_scores(scores, block, rows, rule)
    hidden = block.hidden
    for earlier in range(block.round):  # a pair counts in the first round that shows it
        place = rows.place[earlier].index_select(0, block.key).view(n, 1, keys)
        centre = rows.centre[earlier].index_select(0, block.query).view(n, tile, 1)
        width = rows.width[earlier].index_select(0, block.query).view(n, tile, 1)
        distance = place - centre
        hidden = torch.maximum(hidden, torch.sub(width, distance.abs_(), out=distance), out=hidden)
    if rule.shared:
        scores.diagonal(before, 1, 2).fill_(SELF_SCORE * LOG2_E)
    return scores.add_(hidden.clamp_(min=0), alpha=-HIDDEN_PENALTY), None


def _chunk_scores(scores: torch.Tensor, block: _TileBlock, rows: _RowIndex, rule: _MaskRule):
    """The older rule's order of fills: padding and future first, a token itself last."""
    n, tile, keys = block.shape
    query, key = block.query.view(n, tile, 1), block.key.view(n, 1, keys)  # rows of one head grow with the position
    hidden = query < key if rule.causal else None
    if rows.real is not None:
        padding = ~rows.real.index_select(0, block.key).view(n, 1, keys)
        hidden = padding.expand(n, tile, keys) if hidden is None else hidden | padding
    if hidden is not None:
        scores = scores.masked_fill_(hidden, MASKED_SCORE * LOG2_E)
    if rule.shared:
        itself = query == key
        scores = scores.masked_fill_(itself, SELF_SCORE * LOG2_E)
        hidden = itself if hidden is None else hidden | itself
    return scores, hidden


def _kept(block: _TileBlock, rows: _RowIndex, rule: _MaskRule, dtype: torch.dtype) -> torch.Tensor | None:
    """Dropout factors (n, C, K) of a block, or None."""
    if rows.query_key is None or rows.key_key is None:
        return None
    n, tile, keys = block.shape
    drawn = pair_scramble(
        rows.query_key.index_select(0, block.query).view(n, tile, 1),
        rows.key_key.index_select(0, block.key).view(n, 1, keys),
    )
    if rule.dropout >= 1:
        return torch.zeros(n, tile, keys, dtype=dtype, device=drawn.device)
    return (drawn >= min(keep_threshold(rule.dropout), 2**31 - 1)).to(dtype).mul_(1 / (1 - rule.dropout))


def _flat_rows(x: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) → (N, D) in at least float32, row = (b * T + token) * H + h; free for a projection's own layout."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.transpose(1, 2).reshape(-1, x.shape[-1]).to(dtype)


def _heads_of(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(N, D) → (B, H, T, D) of `like`'s dtype."""
    batch, heads, length = like.shape[:3]
    return rows.view(batch, length, heads, -1).transpose(1, 2).to(like.dtype)


class TiledAttention(torch.autograd.Function):
    """The pure-PyTorch backend; saves the inputs, the output and each row's maximum and sum."""

    @staticmethod
    def forward(query, key, value, orders, mask, dropout_key, rule):
        with torch.autocast(query.device.type, enabled=False):
            q, k, v = (_flat_rows(x) for x in (query, key, value))
            q = q * LOG2_E
            rows = _make_row_index(orders, query.shape[1], mask, dropout_key)
            total = q.shape[0] + 1  # one more row takes the filling of partial tiles
            out = v.new_zeros(total, v.shape[-1])
            top = q.new_full((total,), FLOOR if orders.dedup_pairs else 10 * MASKED_SCORE)
            mass = q.new_zeros(total)
            for block in _blocks(orders, rows):
                _forward_block(block, rows, rule, orders.left_reach, q, k, v, out, top, mass)
            mass = torch.where(mass > 0, mass, 1)
            return _heads_of(out.div_(mass[:, None])[:-1], value), top, mass

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, orders, mask, dropout_key, ctx.rule = inputs
        ctx.orders, tensors = orders[3:], orders[:3]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(query, key, value, mask, dropout_key, *tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        query, key, value, mask, dropout_key, line, lo, hi, out, top, mass = ctx.saved_tensors
        if grad is None:
            return (None,) * 7
        call = AttentionLayout(line, lo, hi, *ctx.orders), mask, dropout_key, ctx.rule
        return *tiled_gradients(query, key, value, *call, out, top, mass, grad), None, None, None, None


def tiled_gradients(query, key, value, orders, mask, dropout_key, rule, out, top, mass, grad, paid=None, push=None):
    """Gradients of query, key and value of `TiledAttention` by that of its output.

    paid, push: (B, T), where the sum over heads and queries of weight * paid has a gradient too, `push`.
    """
    with torch.autocast(query.device.type, enabled=False):
        q, k, v, flat_out, grad = (_flat_rows(x) for x in (query, key, value, out, grad))
        q = q * LOG2_E
        rows = _make_row_index(orders, query.shape[1], mask, dropout_key)
        drift = (flat_out * grad).sum(-1)  # sum over keys of weight times its gradient
        more = None
        if push is not None:
            more = _of_rows(paid, query), _of_rows(push, query)
            drift += more[0] * _sweep(orders, rows, rule, q, k, top, mass, push=more[1])
        grads = q.new_zeros(q.shape[0] + 1, q.shape[1]), torch.zeros_like(k), torch.zeros_like(v)
        for block in _blocks(orders, rows):
            _backward_block(block, rows, rule, orders.left_reach, q, k, v, grad, drift, top, mass, grads, more)
        dq, dk, dv = grads[0], grads[1].div_(LOG2_E), grads[2]
    return _heads_of(dq[:-1], query), _heads_of(dk, key), _heads_of(dv, value)


def tiled_received(query, key, orders, mask, rule, top, mass, paid) -> torch.Tensor:
    """What every token receives, (B, T): the sum over heads and queries of weight * paid, (B, T)."""
    with torch.autocast(query.device.type, enabled=False):
        q, k = _flat_rows(query) * LOG2_E, _flat_rows(key)
        rows = _make_row_index(orders, query.shape[1], mask, None)
        found = _sweep(orders, rows, rule, q, k, top, mass, paid=_of_rows(paid, query))
    return found.view(query.shape[0], query.shape[2], -1).sum(-1)


def _of_rows(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """(B, T) → (N) in at least float32."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    return x.to(dtype)[:, :, None].expand(-1, -1, query.shape[1]).reshape(-1)


def _sweep(orders, rows, rule, q, k, top, mass, paid=None, push=None) -> torch.Tensor:
    """Sums of weights before dropout, (N): of paid * weight over queries, or of weight * push over keys."""
    found = q.new_zeros(q.shape[0] + 1)
    for block in _blocks(orders, rows):
        n, tile, keys = block.shape
        query, key = q.index_select(0, block.query), k.index_select(0, block.key)
        weights, _ = _block_weights(block, rows, rule, query, key, orders.left_reach, top, mass)
        if push is None:
            share = paid.index_select(0, block.query).view(n, 1, tile)
            found.index_add_(0, block.key, torch.bmm(share, weights).view(-1))
        else:
            pushes = push.index_select(0, block.key).view(n, keys, 1)
            found.index_add_(0, block.target, torch.bmm(weights, pushes).view(-1))
    return found[:-1]


def _block_weights(block, rows, rule, query, key, before, top, mass):
    """Weights (n, C, K) before dropout, from every row's maximum and sum; and where scores are fixed, or None."""
    scores, fixed = _block_scores(block, rows, rule, query, key, before)
    share = mass.index_select(0, block.query).reciprocal_().view(*block.shape[:2], 1)
    return scores.sub_(top.index_select(0, block.query).view(share.shape)).exp2_().mul_(share), fixed


def _forward_block(block, rows, rule, before, q, k, v, out, top, mass) -> None:
    """Add a block's share to the running sums `out`, `mass` (relative to the running maximum `top`)."""
    n, tile, keys = block.shape
    scores, _ = _block_scores(block, rows, rule, q.index_select(0, block.query), k.index_select(0, block.key), before)
    old = top.index_select(0, block.target)
    new = torch.maximum(old, scores.amax(-1).view(-1))
    weights = scores.sub_(new.view(n, tile, 1)).exp2_()
    decay = (old - new).exp2_()
    total = mass.index_select(0, block.target).mul_(decay).add_(weights.sum(-1).view(-1))
    kept = _kept(block, rows, rule, weights.dtype)
    if kept is not None:
        weights.mul_(kept)
    shown = torch.bmm(weights, v.index_select(0, block.key).view(n, keys, -1)).view(n * tile, -1)
    target = block.target.long()
    out.index_copy_(0, target, out.index_select(0, target).mul_(decay[:, None]).add_(shown))
    top.index_copy_(0, target, new)
    mass.index_copy_(0, target, total)


def _backward_block(block, rows, rule, before, q, k, v, grad, drift, top, mass, grads, more=None) -> None:
    """Add a block's share to the gradients of q, k, v (Dao et al. 2022, section 3.1: D = rowsum(dO * O)).

    more: what every query pays, and the gradient of what every key receives, (N) each; or None.
    """
    n, tile, keys = block.shape
    dq, dk, dv = grads
    query, key = q.index_select(0, block.query), k.index_select(0, block.key)
    weights, fixed = _block_weights(block, rows, rule, query, key, before, top, mass)
    upstream = grad.index_select(0, block.query).view(n, tile, -1)
    values = v.index_select(0, block.key).view(n, keys, -1)
    slope = torch.bmm(upstream, values.transpose(1, 2))  # gradient of the weights
    kept = _kept(block, rows, rule, weights.dtype)
    used = weights
    if kept is not None:
        used = weights * kept
        slope.mul_(kept)
    if more is not None:
        paid, push = more[0].index_select(0, block.query), more[1].index_select(0, block.key)
        slope.addcmul_(paid.view(n, tile, 1), push.view(n, 1, keys))
    dv.index_add_(0, block.key, torch.bmm(used.transpose(1, 2), upstream).view(n * keys, -1))
    slope.sub_(drift.index_select(0, block.query).view(n, tile, 1)).mul_(weights)
    if fixed is not None:
        slope.masked_fill_(fixed, 0)
    elif rule.shared:
        slope.diagonal(before, 1, 2).zero_()
    dq.index_add_(0, block.target, torch.bmm(slope, key.view(n, keys, -1)).view(n * tile, -1))
    dk.index_add_(0, block.key, torch.bmm(slope.transpose(1, 2), query.view(n, tile, -1)).view(n * keys, -1))


def tiled_attention(query, key, value, orders, *, causal, mask, dropout, dropout_key) -> torch.Tensor:
    """`windowed_attention` in pure PyTorch, on any device."""
    key, rule = checked_rule(query, key, causal, dropout)
    return TiledAttention.apply(query, key, value, orders, mask, dropout_key, rule)[0]


def checked_rule(query, key, causal: bool, dropout: float) -> tuple[torch.Tensor, _MaskRule]:
    """The keys, also where they are shared, and the rule; raises ValueError for more rows than can be counted."""
    if query.shape[2] > MAX_LENGTH or query.shape[:3].numel() >= 2**31:
        raise ValueError(
            f"query of shape {tuple(query.shape)}: places are counted in float32 and rows in int32, which holds up to "
            f"{MAX_LENGTH} tokens a row and 2^31 rows x heads x tokens. Split the batch or the sequence."
        )
    rule = _MaskRule(key is None, causal, dropout)
    if key is None:
        key = shared_key(query.to(torch.promote_types(query.dtype, torch.float32)))
    return key, rule
