"""What LSH attention does, in numbers: buckets, who sees whom, attention received."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from ..layers.attention import ReformerAttention
from ..ops.coverage import covered_fraction as covered_fraction
from ..ops.coverage import mass_entropy as mass_entropy
from ..ops.gather_attention import SparseAttention, visible_tokens
from ..ops.layout import AttentionLayout
from ..ops.lsh import num_buckets_total


class LayerView(NamedTuple):
    """How one layer arranged its tokens in one forward.

    Attributes:
        kind: "local", "lsh" or "full".
        causal: whether tokens see only what is before them.
        heads: H. AttentionLayout that are the same for all heads are kept once.
        orders: lines and windows, as the attention op got them; in chunk mode of the padded input.
        names: what each of the orders is: "position", "hash 1", …, "exploration 1", …
        mask: (B, T) bool, True for real tokens.
        vectors: (B, H, T, D), what was hashed; None where nothing was.
        buckets: (B, H, R, T) int32, the bucket of every token in every hash round; None as above.
        num_buckets: how many buckets there are in a round; 0 as above.
    """

    kind: str
    causal: bool
    heads: int
    orders: AttentionLayout
    names: tuple[str, ...]
    mask: torch.Tensor
    vectors: torch.Tensor | None
    buckets: torch.Tensor | None
    num_buckets: int


@torch.no_grad()
def view_layer(model: torch.nn.Module, input_ids: torch.Tensor, layer: int, **inputs: Any) -> LayerView:
    """Run the model and keep how one of its layers arranged the tokens.

    Args:
        model: any model of this package. In training mode rotations are this forward's own, and there are exploration
            orders.
        input_ids: (B, T) int64.
        layer: number of the layer, from 0.
        inputs: what else the model takes, `attention_mask` or `num_hashes`, for example.

    Raises:
        ValueError: there is no such layer; or a cache is given, by which a forward sorts its tokens only in part.
    """
    found = [module for module in model.modules() if isinstance(module, ReformerAttention)]
    _check_number("layer", layer, len(found))
    for name in ("cache", "past_key_values"):
        if inputs.get(name) is not None:
            raise ValueError(f"`{name}` holds tokens that this forward does not sort. Give all tokens at once.")
    attention = found[layer]
    if attention.kind == "full":  # which makes no orders unless its weights are asked for
        inputs["output_attentions"] = "sparse"
    with recorded(attention, "_over", "_buckets") as calls:
        model(input_ids, **inputs)
    (orders, _, _, value, call, *_), _ = calls["_over"]
    (vectors, *_), buckets = calls.get("_buckets", ((None,), None))
    mask = torch.ones_like(input_ids, dtype=torch.bool) if call.mask is None else call.mask
    count = 0 if buckets is None else num_buckets_total(attention._num_buckets(call))
    rounds, total = 0 if buckets is None else buckets.shape[2], orders.perm.shape[2]
    first = int(buckets is None or (attention.mode == "window" and attention.config.lsh_include_local))
    names = ["position"] * first + [f"hash {i + 1}" for i in range(rounds)]
    names += [f"exploration {i + 1}" for i in range(total - len(names))]
    about = attention.kind, attention.causal, value.shape[1]
    return LayerView(*about, orders, tuple(names), mask.bool(), vectors, buckets, count)


@contextmanager
def recorded(module: Any, *names: str) -> Iterator[dict[str, tuple[tuple, Any]]]:
    """While this lasts, the latest call of each of the module's methods: its arguments and its result."""
    calls: dict[str, tuple[tuple, Any]] = {}

    def record(name: str, method: Any, *args: Any) -> Any:
        result = method(*args)
        calls[name] = args, result
        return result

    for name in names:
        setattr(module, name, partial(record, name, getattr(module, name)))
    try:
        yield calls
    finally:
        for name in names:
            delattr(module, name)  # the class's own is back


def bucket_sizes(view: LayerView) -> torch.Tensor:
    """How many real tokens every bucket holds, (B, H, R, num_buckets) int64."""
    buckets = _buckets_of(view).long()
    sizes = buckets.new_zeros(*buckets.shape[:3], view.num_buckets)
    return sizes.scatter_add_(-1, buckets, view.mask[:, None, None].expand_as(buckets).long())


def bucket_balance(view: LayerView) -> dict[str, float]:
    """How evenly tokens spread over buckets, for logs; means over rows, heads and rounds.

    Returns:
        "largest": tokens in the largest bucket, as a multiple of an even share; "used": share of buckets that hold any
        token; "entropy": that of the bucket of a token, 1 if all are equally full and 0 if all tokens share one.
    """
    sizes = bucket_sizes(view).double()
    share = sizes / sizes.sum(-1, keepdim=True).clamp(min=1)
    entropy = torch.special.entr(share).sum(-1) / torch.log(torch.tensor(view.num_buckets).double())
    numbers = {"largest": share.amax(-1) * view.num_buckets, "used": (sizes > 0).double(), "entropy": entropy}
    return {name: value.mean().item() for name, value in numbers.items()}


def round_agreement(view: LayerView, neighbours: int = 8, queries: int = 256) -> torch.Tensor:
    """Share of near neighbours that hashing brings together: in one of the first round, of the first two, and so on.

    Args:
        neighbours: how many real tokens of the same row and head, of the smallest angles, count as near.
        queries: for how many tokens of a row, evenly spaced, they are looked for.

    Returns:
        (R) float64, never falling: the more rounds, the more pairs share a bucket somewhere.
    """
    buckets, vectors, length = _buckets_of(view), view.vectors, view.mask.shape[1]
    chosen = torch.linspace(0, length - 1, min(queries, length), device=vectors.device).long()
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    near = unit[:, :, chosen] @ unit.transpose(-1, -2)  # (B, H, Q, T)
    other = view.mask[:, None, :] & (chosen[:, None] != torch.arange(length, device=chosen.device))
    near = near.masked_fill(~(other & view.mask[:, chosen, None])[:, None], -torch.inf)
    cosine, token = near.topk(min(neighbours, length), dim=-1)  # (B, H, Q, neighbours)
    pair = cosine > -torch.inf
    theirs = buckets[:, :, :, None, :].expand(-1, -1, -1, len(chosen), -1)
    theirs = theirs.gather(-1, token[:, :, None].expand(-1, -1, buckets.shape[2], -1, -1))
    together = (theirs == buckets[:, :, :, chosen, None]).cummax(2).values & pair[:, :, None]
    return together.sum((0, 1, 3, 4)).double() / pair.sum().clamp(min=1)


def received_attention(attention: SparseAttention | torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The share of all attention that every token gets, (B, H, length); each head's add up to 1.

    Args:
        attention: one layer's, as `output_attentions` gives it: `SparseAttention`, or weights (B, H, T, length).
        mask: (B, T), 1 for real tokens: attention paid by others does not count. Needed in chunk mode alone, where
            padding attends too.
    """
    tokens, weights = _as_lists(attention, mask)
    length = _columns(attention)
    received = weights.new_zeros(*weights.shape[:2], length)
    received = received.scatter_add(-1, tokens.clamp(min=0).flatten(2), weights.flatten(2))
    return received / weights.detach().sum(-1).round().sum(-1, keepdim=True).clamp(min=1)


def seen_pairs(view: LayerView, row: int = 0, head: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All pairs that a head's windows show, as often as they are shown.

    Returns:
        Query, key, and the number (of `names`) of the order that shows them, (N) int64 each.
    """
    real = _real_tokens(view, row, head)
    whole = view.orders
    line, lo, hi = (
        x.expand(len(view.mask), view.heads, -1, -1)[row, head][None, None]
        for x in (whole.perm, whole.window_start, whole.window_end)
    )
    tokens = visible_tokens(whole._replace(perm=line, window_start=lo, window_end=hi))[0, 0]  # (T, R * width)
    order = torch.arange(len(view.names), device=tokens.device).repeat_interleave(tokens.shape[1] // len(view.names))
    query = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
    is_real = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device).index_fill(0, real, True)
    shown = (tokens >= 0) & is_real[query] & is_real[tokens.clamp(min=0)]
    shown = shown & (tokens <= query) if view.causal else shown
    return query[shown], tokens[shown], order.expand_as(tokens)[shown]


def _buckets_of(view: LayerView) -> torch.Tensor:
    if view.buckets is None:
        reason = f"is a {view.kind} layer" if view.kind != "lsh" else "saw an input no longer than its chunk"
        raise ValueError(f"There are no buckets: the layer {reason}. Only lsh layers hash; view one of these.")
    return view.buckets


def _real_tokens(view: LayerView, row: int, head: int) -> torch.Tensor:
    """Positions of the real tokens of a row."""
    _check_number("row", row, len(view.mask))
    _check_number("head", head, view.heads)
    return view.mask[row].nonzero().squeeze(-1)


def _check_number(name: str, number: int, count: int) -> None:
    if not 0 <= number < count:
        allowed = f"0 to {count - 1} are possible" if count else "the model has none of this package's layers"
        raise ValueError(f"`{name}={number}` does not exist: {allowed}.")


def _as_lists(attention: SparseAttention | torch.Tensor, mask: torch.Tensor | None) -> SparseAttention:
    """Weights as lists, those of padding's own attention 0."""
    if isinstance(attention, torch.Tensor):
        tokens = torch.arange(attention.shape[-1], device=attention.device).expand(attention.shape)
        attention = SparseAttention(tokens, attention)
    if mask is None:
        return attention
    real = mask[:, None, -attention.weights.shape[2] :, None].bool()
    return SparseAttention(attention.tokens, attention.weights * real)


def _columns(attention: SparseAttention | torch.Tensor) -> int:
    """How many tokens may be attended to."""
    if isinstance(attention, torch.Tensor):
        return attention.shape[-1]
    return max(attention.tokens.shape[2], int(attention.tokens.max()) + 1)
