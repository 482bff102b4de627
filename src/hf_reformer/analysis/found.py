"""Measure how much of exact attention LSH attention covers."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..ops.gather_attention import visible_tokens
from ..ops.reference import SELF_SCORE, shared_key
from .lsh_stats import LayerView, bucket_balance_by_head, view_layers


class AttentionFound(NamedTuple):
    """Coverage of exact attention by one lsh layer, over the selected queries; per-head tensors, (H) float64 each.

    Mass is the exact softmax of the layer's own scores over all keys that a query may attend to. The local window is
    the window in position order; without a position order, it is the token itself.

    Attributes:
        layer: index of the layer; decoder layers follow those of the encoder.
        found: fraction of the total mass on pairs that are visible in any sort order.
        beyond: fraction of the total mass beyond the local window.
        hashed: fraction of `beyond` that the hash orders find; 1 if `beyond` is 0, as for the next three.
        more_local, random, best: the same for an equal number of other keys beyond the window: the nearest ones,
            random ones (in expectation), or those with the largest weights.
        keys: average number of keys per query that the hash orders add beyond the window.
        bucket_entropy, fullest_bucket: "entropy" and "largest" of `bucket_balance`.
    """

    layer: int
    found: torch.Tensor
    beyond: torch.Tensor
    hashed: torch.Tensor
    more_local: torch.Tensor
    random: torch.Tensor
    best: torch.Tensor
    keys: torch.Tensor
    bucket_entropy: torch.Tensor
    fullest_bucket: torch.Tensor


@torch.no_grad()
def attention_found(
    model: torch.nn.Module, inputs: Mapping[str, Any], queries: int = 256, **more: Any
) -> list[AttentionFound]:
    """Measure how much of exact attention each lsh layer covers, compared with simpler choices of as many keys.

    Args:
        model: any model of this package, in window or chunk mode. In training mode, `found` includes exploration
            orders.
        inputs: the model's inputs: `input_ids`, `attention_mask`, …
        queries: number of real tokens per sequence, evenly spaced, for which exact attention is computed. Memory grows
            with this number times the sequence length.
        more: other arguments of the model, such as `num_hashes`.

    Returns:
        One `AttentionFound` per layer that hashes; layers that see their whole input (chunk mode, short inputs) are
        omitted.

    Raises:
        ValueError: `queries` is less than 1.
    """
    if queries < 1:
        raise ValueError(f"`queries={queries}` leaves nothing to examine. Give at least 1.")
    views = view_layers(model, **{**inputs, **more})
    return [_layer_found(view, layer, queries) for layer, view in enumerate(views) if view.buckets is not None]


def format_found(layers: Sequence[AttentionFound]) -> str:
    """Format the result of `attention_found` as a table, one line per head."""
    names = AttentionFound._fields[1:]
    lines = ["layer  head  " + "  ".join(f"{name.replace('_', ' '):>5}" for name in names)]
    for layer in layers:
        for head, numbers in enumerate(torch.stack(layer[1:], dim=-1).tolist()):
            cells = (f"{x:{max(len(name), 5)}.3f}" for name, x in zip(names, numbers, strict=True))
            lines.append(f"{layer.layer:5}  {head:4}  " + "  ".join(cells))
    return "\n".join(lines)


def _layer_found(view: LayerView, layer: int, queries: int) -> AttentionFound:
    rows = [_row_sums(view, row, queries) for row in range(len(view.mask))]
    count, found, beyond, *shares, keys = torch.stack(rows).sum(0)
    hashed, more_local, random, best = (torch.where(beyond > 0, share / beyond, 1) for share in shares)
    balance = bucket_balance_by_head(view)
    means = found / count, beyond / count, hashed, more_local, random, best, keys / count
    return AttentionFound(layer, *means, balance["entropy"], balance["largest"])


def _row_sums(view: LayerView, row: int, queries: int) -> torch.Tensor:
    """Sum over the selected queries of a sequence: (8, H) float64, their number, then as in `AttentionFound`."""
    real = view.mask[row]
    tokens, rank = real.nonzero().squeeze(-1), real.cumsum(-1)
    count = min(queries, len(tokens))
    chosen = tokens[torch.arange(1, count + 1, device=tokens.device) * len(tokens) // max(count, 1) - 1]  # (Q)
    token = torch.arange(len(real), device=real.device)
    own = chosen[:, None] == token  # (Q, T)
    allowed = real & (token <= chosen[:, None]) if view.causal else real.expand_as(own)
    if view.samples is not None:
        allowed = allowed & (view.samples[row] == view.samples[row, chosen, None])

    query: Any = view.query
    query = query[row].to(torch.promote_types(query.dtype, torch.float32))  # (H, T, D)
    with torch.autocast(query.device.type, enabled=False):
        scores = query[:, chosen] @ shared_key(query).transpose(-1, -2)  # (H, Q, T)
    mass = scores.masked_fill(own, SELF_SCORE).masked_fill(~allowed, -torch.inf).softmax(-1)

    by_order = _shown_by_order(view, row, chosen)
    local, hashed = (by_order[[name.startswith(kind) for name in view.names]].any(0) for kind in ("position", "hash"))
    far = allowed & ~own & ~local  # (H, Q, T)
    hashed = hashed & far
    number, far_mass = hashed.sum(-1), mass * far
    step = rank - rank[chosen, None]  # (Q, T): distance in real tokens
    step = torch.where(far[0], 2 * step.abs() + (step > 0), 2 * len(real) + 1)  # all heads share the position order
    most = int(number.max()) if number.numel() else 0
    nearest = step.topk(most, largest=False).indices.expand(len(mass), -1, -1)

    def sum_of_first(weights: torch.Tensor) -> torch.Tensor:
        """Sum the first weights, as many as the hash orders show keys: (H, Q, most) → (H, Q)."""
        return torch.nn.functional.pad(weights.cumsum(-1), (1, 0)).gather(-1, number[..., None]).squeeze(-1)

    sums = [
        torch.ones_like(far_mass[..., 0]),
        (mass * by_order.any(0)).sum(-1),
        far_mass.sum(-1),
        (mass * hashed).sum(-1),
        sum_of_first(far_mass.gather(-1, nearest)),
        far_mass.sum(-1) * number / far.sum(-1).clamp(min=1),
        sum_of_first(far_mass.topk(most).values),
        number,
    ]
    return torch.stack([x.to(mass.dtype) for x in sums]).cpu().double().sum(-1)  # not every device supports float64


def _shown_by_order(view: LayerView, row: int, queries: torch.Tensor) -> torch.Tensor:
    """Mark the tokens in the windows of the given tokens in each sort order: (R, H, Q, T) bool."""
    perm, start, end = (x.expand(len(view.mask), view.heads, -1, -1)[row][None] for x in view.layout[:3])
    listed = visible_tokens(view.layout._replace(perm=perm, window_start=start, window_end=end), queries)[0]
    listed = listed.unflatten(-1, (len(view.names), -1)).movedim(-2, 0)  # (R, H, Q, width)
    length = perm.shape[-1]  # in chunk mode, the input was padded
    shown = torch.zeros(*listed.shape[:3], length + 1, dtype=torch.bool, device=listed.device)
    shown.scatter_(-1, torch.where(listed < 0, length, listed), True)
    return shown[..., : view.mask.shape[1]]
