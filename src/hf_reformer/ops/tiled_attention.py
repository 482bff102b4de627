"""Windowed attention in pure PyTorch, on any device.

Sorted positions are processed in blocks of tiles: the rows of a block are gathered, scores are computed in tiles,
rounds are combined by a running maximum and sum, and all scores are recomputed in backward. Nothing of size
length x keys is stored. Arithmetic is used instead of masks, since on a CPU `where` and `masked_fill` cost twice as
much as a matrix product of the same size.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from ..compat import in_vmap
from .layout import AttentionLayout
from .prng import keep_threshold, pair_scramble
from .reference import MASKED_SCORE, SELF_SCORE, inverse_permutation, pair_keys, shared_key, windowed_attention

MAX_LENGTH = 2**22  # tokens of a sequence; beyond it, float32 cannot distinguish positions
BLOCK_SCORES = 2**20  # scores processed at a time: 4 MiB in float32, about the size of caches
MASK_PENALTY = 1e30  # times the distance to the window, subtracted from scores of invisible pairs; exceeds all scores
FLOOR = -1e8  # initial running maximum: above every masked score, below every visible one
LOG2_E = 1.4426950408889634  # scale of queries: exp2 costs half as much as exp, and a tenth if it underflows


class _Rule(NamedTuple):
    """The settings of a call other than tensors."""

    shared: bool
    causal: bool
    dropout: float


class _Rows(NamedTuple):
    """Inputs as N rows of the flattened (B, T, H) tensors: row = (b * T + token) * H + h."""

    query: torch.Tensor  # (N, D), scaled by LOG2_E
    key: torch.Tensor  # (N, D)
    layout: AttentionLayout
    rule: _Rule
    row: torch.Tensor  # (B·H, R, T) int32, the row at every sorted position
    window_start: torch.Tensor  # (B·H, R, T) int32
    window_end: torch.Tensor
    sorted_pos: torch.Tensor | None  # (R, N) float32, twice the sorted position of every row; only if pairs count once
    center: torch.Tensor | None  # (R, N) float32, window_start + window_end of every row, within its round
    width: torch.Tensor | None  # (R, N) float32, window_end - window_start + 1
    mask: torch.Tensor | None  # (N) bool
    query_key: torch.Tensor | None  # (N) int32, random numbers for dropout
    key_key: torch.Tensor | None  # (N) int32


def _make_rows(query, key, layout: AttentionLayout, mask, dropout_key, rule: _Rule) -> _Rows:
    heads = query.shape[1]
    perm, start, end = (x.expand(-1, heads, -1, -1) for x in layout[:3])
    batch, _, rounds, length = perm.shape
    row_of_batch = torch.arange(batch, dtype=torch.int32, device=perm.device)[:, None, None, None] * (length * heads)
    head = torch.arange(heads, dtype=torch.int32, device=perm.device)[:, None, None]
    row = perm * heads + row_of_batch + head
    sorted_pos = center = width = query_key = key_key = None
    if layout.dedup_pairs and rounds > 1:
        inverse = inverse_permutation(perm)
        first, last = start.gather(-1, inverse), end.gather(-1, inverse)
        twice_begin = torch.arange(rounds, dtype=torch.int32, device=perm.device)[:, None] * (2 * length)
        by_row = (inverse * 2, first + last - twice_begin, last - first + 1)  # (B, H, R, T) each
        sorted_pos, center, width = (x.permute(2, 0, 3, 1).reshape(rounds, -1).to(torch.float32) for x in by_row)
    if dropout_key is not None:
        by_query, by_key = pair_keys(dropout_key, batch, heads, length)
        query_key = by_query.transpose(1, 2).reshape(-1)
        key_key = _repeat_heads(by_key.expand(batch, -1), heads)
    mask = None if mask is None or layout.dedup_pairs else _repeat_heads(mask, heads)
    row, start, end = (x.reshape(batch * heads, rounds, length) for x in (row, start, end))
    q, k = _flat_rows(query) * LOG2_E, _flat_rows(key)
    return _Rows(q, k, layout, rule, row, start, end, sorted_pos, center, width, mask, query_key, key_key)


def _flat_rows(x: torch.Tensor) -> torch.Tensor:
    """Flatten (B, H, T, D) → (N, D), in at least float32; without a copy for the layout of projections."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.transpose(1, 2).reshape(-1, x.shape[-1]).to(dtype)


def _unflatten_rows(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Unflatten (N, D) → (B, H, T, D), in the dtype of `like`."""
    batch, heads, length = like.shape[:3]
    return rows.view(batch, length, heads, -1).transpose(1, 2).to(like.dtype)


def _repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat for all heads, (B, T) → (N)."""
    return x[:, :, None].expand(-1, -1, heads).reshape(-1)


class _Block(NamedTuple):
    """A block of n tiles of one round, with C queries and K keys each."""

    round: int
    query: torch.Tensor  # (n·C) int32 rows
    key: torch.Tensor  # (n·K) int32 rows
    target: torch.Tensor  # (n·C) int32 rows to write to; N for the padding of a last, partial tile
    masked: torch.Tensor | None  # (n, C, K): positive for pairs that are not visible in this round (window rule)
    shape: tuple[int, int, int]  # n, C, K
    q: torch.Tensor  # (n, C, D)
    k: torch.Tensor  # (n, K, D)

    def of_queries(self, x: torch.Tensor) -> torch.Tensor:
        """Gather the queries of the block, (N, D) or (N) → (n, C, D or 1)."""
        return x.index_select(0, self.query).view(*self.shape[:2], -1)

    def of_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Gather the keys of the block, (N, D) → (n, K, D) or (N) → (n, 1, K)."""
        rows = x.index_select(0, self.key)
        return rows.view(self.shape[0], 1, -1) if x.dim() == 1 else rows.view(self.shape[0], self.shape[2], -1)


def _blocks(rows: _Rows) -> Iterator[_Block]:
    """Divide every round into blocks of about BLOCK_SCORES scores."""
    layout, (heads, rounds, length) = rows.layout, rows.row.shape
    tile, left, right = layout.block_size, layout.left_reach, layout.right_reach
    whole = torch.compiler.is_exporting()  # graphs for any batch and length: no loops over them, no single tile
    tiles, keys = length // tile + 2 if whole else -(-length // tile), tile + left + right
    per_head = tiles if whole else max(1, min(tiles, BLOCK_SCORES // (tile * keys)))
    per_block = heads if whole else max(1, BLOCK_SCORES // (tile * keys * tiles))
    corners = [(0, 0)] if whole else [(i, j) for i in range(0, heads, per_block) for j in range(0, tiles, per_head)]
    device = rows.row.device
    query_pos = torch.arange(tiles * tile, device=device)
    key_pos = torch.arange(-left, tiles * tile + right, device=device)
    offset = torch.arange(tiles, dtype=torch.int32, device=device)[:, None] * tile - left
    for round_index in range(rounds):
        begin = round_index * length
        inside = query_pos.clamp(max=length - 1)
        query = rows.row[:, round_index, inside]  # (heads, tiles·C)
        target = torch.where(query_pos < length, query, rows.row.numel() // rounds)
        if layout.dedup_pairs:
            key = rows.row[:, round_index, key_pos.clamp(0, length - 1)]  # padding at the ends is not visible
            first, last = rows.window_start[:, round_index, inside], rows.window_end[:, round_index, inside]
            last = torch.where(query_pos < length, last, first - 1)  # the padding of a last tile has empty windows
            first, last = (x.unfold(-1, tile, tile) - (offset + begin) for x in (first, last))
        else:
            key = rows.row.flatten(1)[:, (key_pos + begin) % (rounds * length)]
        key = key.unfold(-1, keys, tile)  # (heads, tiles, K), a view
        query, target = (x.unfold(-1, tile, tile) for x in (query, target))  # (heads, tiles, C)
        for head, at in corners:
            part = (slice(head, head + per_block), slice(at, at + per_head))
            masked = _outside(first[part], last[part], keys) if layout.dedup_pairs else None
            n = query[part].shape[0] * query[part].shape[1]
            query_rows, key_rows, target_rows = (x[part].reshape(-1) for x in (query, key, target))
            q = rows.query.index_select(0, query_rows).view(n, tile, -1)
            k = rows.key.index_select(0, key_rows).view(n, keys, -1)
            yield _Block(round_index, query_rows, key_rows, target_rows, masked, (n, tile, keys), q, k)


def _outside(first: torch.Tensor, last: torch.Tensor, keys: int) -> torch.Tensor:
    """Return |2k - (first + last)| - (last - first), positive if key k of a tile lies outside first … last."""
    first, last = (x.reshape(-1, x.shape[-1], 1).float() for x in (first, last))
    twice = torch.arange(0, 2 * keys, 2, dtype=torch.float32, device=first.device)
    return (twice - (first + last)).abs_().sub_(last - first)


def _block_scores(block: _Block, rows: _Rows) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute scores, (n, C, K), in units of log 2, and a mask of those that are constants, or None."""
    scores = torch.bmm(block.q, block.k.transpose(1, 2))
    if block.masked is None:
        return _chunk_scores(scores, block, rows)
    masked = block.masked
    if rows.sorted_pos is not None and rows.center is not None and rows.width is not None:
        for earlier in range(block.round):  # a pair counts in the first round in which it is visible
            distance = block.of_keys(rows.sorted_pos[earlier]) - block.of_queries(rows.center[earlier])
            width = block.of_queries(rows.width[earlier])
            masked = torch.maximum(masked, torch.sub(width, distance.abs_(), out=distance), out=masked)
    if rows.rule.shared and torch.compiler.is_exporting():  # no writes to views
        _, tile, keys = block.shape
        is_self = torch.ones(tile, keys, dtype=torch.bool, device=scores.device)
        is_self = is_self.triu(rows.layout.left_reach).tril(rows.layout.left_reach)
        scores = torch.where(is_self, SELF_SCORE * LOG2_E, scores)
    elif rows.rule.shared:
        scores.diagonal(rows.layout.left_reach, 1, 2).fill_(SELF_SCORE * LOG2_E)
    return scores.add_(masked.clamp_(min=0), alpha=-MASK_PENALTY), None


def _chunk_scores(scores: torch.Tensor, block: _Block, rows: _Rows) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fill constants in the order of the legacy rule: padding and the future first, the token itself last."""
    n, tile, keys = block.shape
    query, key = block.query.view(n, tile, 1), block.key.view(n, 1, keys)  # rows of a head increase with the position
    masked = query < key if rows.rule.causal else None
    if rows.mask is not None:
        padding = ~block.of_keys(rows.mask)
        masked = padding.expand(n, tile, keys) if masked is None else masked | padding
    if masked is not None:
        scores = scores.masked_fill_(masked, MASKED_SCORE * LOG2_E)
    if rows.rule.shared:
        is_self = query == key
        scores = scores.masked_fill_(is_self, SELF_SCORE * LOG2_E)
        masked = is_self if masked is None else masked | is_self
    return scores, masked


def _block_weights(block: _Block, rows: _Rows, row_max, row_sum) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute weights before dropout, (n, C, K), from row maxima and sums, and a mask of constant scores, or None."""
    scores, fixed = _block_scores(block, rows)
    return scores.sub_(block.of_queries(row_max)).exp2_().mul_(block.of_queries(row_sum).reciprocal_()), fixed


def _dropout_scale(block: _Block, rows: _Rows, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the dropout factors of a block, (n, C, K), or None."""
    if rows.query_key is None or rows.key_key is None:
        return None
    drawn, dropout = pair_scramble(block.of_queries(rows.query_key), block.of_keys(rows.key_key)), rows.rule.dropout
    if dropout >= 1:
        return torch.zeros_like(drawn, dtype=dtype)
    return (drawn >= min(keep_threshold(dropout), 2**31 - 1)).to(dtype).mul_(1 / (1 - dropout))


class TiledAttention(torch.autograd.Function):
    """The pure-PyTorch backend, which saves the inputs, the output and the maximum and sum of each row.

    With `query_weights`, (B, T), it also returns the attention mass.
    """

    @staticmethod
    def forward(query, key, value, layout, mask, dropout_key, rule, query_weights):
        batch, heads, length, _ = query.shape
        with torch.autocast(query.device.type, enabled=False):
            rows, v = _make_rows(query, key, layout, mask, dropout_key, rule), _flat_rows(value)
            total = v.shape[0] + 1  # an extra row for the padding of partial tiles
            out = v.new_zeros(total, v.shape[-1])
            row_max = rows.query.new_full((total,), FLOOR if layout.dedup_pairs else 10 * MASKED_SCORE)
            row_sum = rows.query.new_zeros(total)
            for block in _blocks(rows):
                _forward_block(block, rows, v, out, row_max, row_sum)
            row_sum = torch.where(row_sum > 0, row_sum, 1)
            mass = None
            if query_weights is not None:
                mass = _weight_sums(rows, row_max, row_sum, query_weights=_repeat_heads(query_weights, heads))
                mass = mass.view(batch, length, heads).sum(-1)
            return _unflatten_rows(out.div_(row_sum[:, None])[:-1], value), row_max, row_sum, mass

    @staticmethod
    def setup_context(ctx, inputs, output):
        query, key, value, layout, mask, dropout_key, ctx.rule, query_weights = inputs
        out, row_max, row_sum, _ = output
        ctx.numbers = layout[3:]
        ctx.mark_non_differentiable(row_max, row_sum)
        ctx.save_for_backward(query, key, value, mask, dropout_key, query_weights, *layout[:3], out, row_max, row_sum)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _row_max, _row_sum, grad_mass):
        query, key, value, mask, dropout_key, query_weights, *tensors, out, row_max, row_sum = ctx.saved_tensors
        if grad_out is None and grad_mass is None:
            return (None,) * 8
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        if in_vmap():  # `torch.func.jacrev`
            layout = AttentionLayout(*tensors, *ctx.numbers)
            inputs = query, key, value, layout, mask, dropout_key, query_weights
            return *_dense_backward(ctx.rule, *inputs, grad_out, grad_mass), *(None,) * 5
        with torch.autocast(query.device.type, enabled=False):
            layout = AttentionLayout(*tensors, *ctx.numbers)
            rows = _make_rows(query, key, layout, mask, dropout_key, ctx.rule)
            v, flat_out, grad = (_flat_rows(x) for x in (value, out, grad_out))
            delta = (flat_out * grad).sum(-1)  # sum over keys of weight times its gradient
            of_mass = None
            if grad_mass is not None:
                of_mass = [_repeat_heads(x, query.shape[1]) for x in (query_weights, grad_mass)]
                delta += of_mass[0] * _weight_sums(rows, row_max, row_sum, grad_mass=of_mass[1])
            dq = rows.query.new_zeros(row_max.shape[0], rows.query.shape[1])
            dk, dv = torch.zeros_like(rows.key), torch.zeros_like(v)
            for block in _blocks(rows):
                _backward_block(block, rows, v, grad, delta, row_max, row_sum, (dq, dk, dv), of_mass)
            dk.div_(LOG2_E)
        grads = (_unflatten_rows(x, like) for x, like in ((dq[:-1], query), (dk, key), (dv, value)))
        return *grads, *(None,) * 5


def _dense_backward(rule, query, key, value, layout, mask, dropout_key, query_weights, grad_out, grad_mass):
    """Compute gradients of query, key and value by plain operations, which vmap supports."""

    def attend(query, key, value):
        options = {"causal": rule.causal, "mask": mask, "dropout": rule.dropout, "dropout_key": dropout_key}
        options |= {"query_weights": query_weights, "shared": rule.shared}
        out, mass = windowed_attention(query, key, value, layout, **options)
        return out if grad_mass is None else (out, mass)

    backward = torch.func.vjp(attend, query, key, value)[1]
    return backward(grad_out if grad_mass is None else (grad_out, grad_mass))


def _weight_sums(rows: _Rows, row_max, row_sum, query_weights=None, grad_mass=None) -> torch.Tensor:
    """Sum query_weights * weight over queries or weight * grad_mass over keys, with weights before dropout; (N)."""
    sums = torch.zeros_like(row_sum)
    for block in _blocks(rows):
        weights, _ = _block_weights(block, rows, row_max, row_sum)
        if query_weights is not None:
            by_query = block.of_queries(query_weights).view(block.shape[0], 1, -1)
            sums.index_add_(0, block.key, torch.bmm(by_query, weights).view(-1))
        else:
            by_key = block.of_keys(grad_mass).view(block.shape[0], -1, 1)
            sums.index_add_(0, block.target, torch.bmm(weights, by_key).view(-1))
    return sums[:-1]


def _forward_block(block: _Block, rows: _Rows, v, out, row_max, row_sum) -> None:
    """Add a block to the running sums `out` and `row_sum`, which are relative to the running maximum `row_max`."""
    n, tile, _ = block.shape
    scores, _ = _block_scores(block, rows)
    old = row_max.index_select(0, block.target)
    new = torch.maximum(old, scores.amax(-1).view(-1))
    weights = scores.sub_(new.view(n, tile, 1)).exp2_()
    decay = (old - new).exp2_()
    total = row_sum.index_select(0, block.target).mul_(decay).add_(weights.sum(-1).view(-1))
    dropout_scale = _dropout_scale(block, rows, weights.dtype)
    if dropout_scale is not None:
        weights.mul_(dropout_scale)
    weighted = torch.bmm(weights, block.of_keys(v)).view(n * tile, -1)
    target = block.target.long()
    out.index_copy_(0, target, out.index_select(0, target).mul_(decay[:, None]).add_(weighted))
    row_max.index_copy_(0, target, new)
    row_sum.index_copy_(0, target, total)


def _backward_block(block: _Block, rows: _Rows, v, grad, delta, row_max, row_sum, grads, of_mass) -> None:
    """Add a block to the gradients of q, k, v (Dao et al. 2022, section 3.1: D = rowsum(dO * O)).

    of_mass: query weights of the attention mass, and the gradient of every key's mass, (N) each; or None.
    """
    dq, dk, dv = grads
    weights, fixed = _block_weights(block, rows, row_max, row_sum)
    grad_out = block.of_queries(grad)
    grad_scores = torch.bmm(grad_out, block.of_keys(v).transpose(1, 2))  # first those of the weights
    dropout_scale = _dropout_scale(block, rows, weights.dtype)
    used = weights
    if dropout_scale is not None:
        used = weights * dropout_scale
        grad_scores.mul_(dropout_scale)
    if of_mass is not None:
        grad_scores.addcmul_(block.of_queries(of_mass[0]), block.of_keys(of_mass[1]))
    dv.index_add_(0, block.key, torch.bmm(used.transpose(1, 2), grad_out).flatten(0, 1))
    grad_scores.sub_(block.of_queries(delta)).mul_(weights)
    if fixed is not None:
        grad_scores.masked_fill_(fixed, 0)
    elif rows.rule.shared:
        grad_scores.diagonal(rows.layout.left_reach, 1, 2).zero_()
    dq.index_add_(0, block.target, torch.bmm(grad_scores, block.k).flatten(0, 1))
    dk.index_add_(0, block.key, torch.bmm(grad_scores.transpose(1, 2), block.q).flatten(0, 1))


def tiled_attention(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    layout: AttentionLayout,
    *,
    causal: bool,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    dropout_key: torch.Tensor | None = None,
    scale: float = 1.0,
    query_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Any]:
    """Compute `dispatch.windowed_attention` in pure PyTorch, on any device.

    Raises:
        ValueError: there are more than MAX_LENGTH tokens, or 2^31 or more rows.
    """
    exporting = torch.compiler.is_exporting()  # graphs have dynamic sizes
    if not exporting and (query.shape[2] > MAX_LENGTH or query.shape[:3].numel() >= 2**31):
        raise ValueError(
            f"query of shape {tuple(query.shape)}: positions are counted in float32 and rows in int32, which holds up "
            f"to {MAX_LENGTH} tokens a sequence and 2^31 rows x heads x tokens. Split the batch or the sequence."
        )
    if key is None:
        rule, key = _Rule(True, causal, dropout), shared_key(query.to(torch.promote_types(query.dtype, torch.float32)))
    else:
        rule, key = _Rule(False, causal, dropout), key if scale == 1 else key * scale
    out, _, _, mass = TiledAttention.apply(query, key, value, layout, mask, dropout_key, rule, query_weights)
    return out, mass
