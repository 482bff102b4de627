"""Statistics of LSH attention: buckets, visible pairs, attention mass."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..models.modeling_reformer import ReformerModel
from ..models.outputs import ReformerModelOutput
from ..ops.gather_attention import AttentionWeights, SparseAttention, visible_tokens
from ..ops.layout import AttentionLayout


class LayerView(NamedTuple):
    """The sort orders of one layer in one forward pass.

    Attributes:
        kind: "local", "lsh" or "full".
        causal: whether attention is causal.
        names: the sort orders: "position", "hash 1", …, "exploration 1", …
        heads, layout, mask, vectors, buckets, num_buckets, samples, query: as in `forward_context.Sorting`.
    """

    kind: str
    causal: bool
    heads: int
    layout: AttentionLayout
    names: tuple[str, ...]
    mask: torch.Tensor
    vectors: torch.Tensor | None
    buckets: torch.Tensor | None
    num_buckets: int
    samples: torch.Tensor | None = None
    query: torch.Tensor | None = None

    @property
    def orders(self) -> AttentionLayout:
        """Deprecated alias of `layout`."""
        return self.layout


def view_layer(model: torch.nn.Module, input_ids: torch.Tensor, layer: int, **inputs: Any) -> LayerView:
    """Run the model and record how one of its layers sorted the tokens.

    Args:
        model: any model of this package. In training mode, the view includes the rotations drawn for this forward
            pass, and exploration orders.
        input_ids: (B, T) int64.
        layer: zero-based index of the layer; decoder layers follow those of the encoder.
        inputs: other arguments of the model, such as `attention_mask` or `num_hashes`.

    Raises:
        ValueError: there is no such layer; or a cache is given, in which case a forward pass sorts only some of the
            tokens.
    """
    views = view_layers(model, input_ids=input_ids, **inputs)
    check_index(layer=(layer, len(views)))
    return views[layer]


@torch.no_grad()
def view_layers(model: torch.nn.Module, **inputs: Any) -> list[LayerView]:
    """Run the model once and record how each of its layers sorted the tokens; see `view_layer`."""
    stacks = [module for module in model.modules() if isinstance(module, ReformerModel)]
    check_index(layer=(0, sum(len(stack.layers) for stack in stacks)))
    for name in ("cache", "past_key_values"):
        if inputs.get(name) is not None:
            raise ValueError(f"`{name}` holds tokens that this forward does not sort. Give all tokens at once.")
    outputs = stack_outputs(model, stacks, output_sorting=True, **inputs)
    return [
        _view(layer.attention, sorting)
        for stack, output in zip(stacks, outputs, strict=True)
        for layer, sorting in zip(stack.layers, output.sorting or (), strict=True)
    ]


def _view(attention: Any, sorting: Any) -> LayerView:
    rounds = 0 if sorting.buckets is None else sorting.buckets.shape[2]
    position = sorting.buckets is None or (attention.mode == "window" and attention.config.lsh_include_local)
    names = ["position"] * position + [f"hash {i + 1}" for i in range(rounds)]
    names += [f"exploration {i + 1}" for i in range(sorting.layout.perm.shape[2] - len(names))]
    layout, heads, *rest = sorting
    return LayerView(attention.kind, attention.causal, heads, layout, tuple(names), *rest)


def stack_outputs(model: torch.nn.Module, stacks: Sequence[ReformerModel], **inputs: Any) -> list[ReformerModelOutput]:
    """Run the model and return the outputs of the given stacks, regardless of what its head returns."""
    outputs: dict[torch.nn.Module, ReformerModelOutput] = {}
    hooks = [stack.register_forward_hook(lambda stack, _, output: outputs.update({stack: output})) for stack in stacks]
    try:
        model(**{**inputs, "return_dict": True})
    finally:
        for hook in hooks:
            hook.remove()
    return [outputs[stack] for stack in stacks]


def bucket_sizes(view: LayerView) -> torch.Tensor:
    """Count the real tokens in every bucket: (B, H, R, num_buckets) int64."""
    buckets = buckets_of(view).long()
    sizes = buckets.new_zeros(*buckets.shape[:3], view.num_buckets)
    return sizes.scatter_add_(-1, buckets, view.mask[:, None, None].expand_as(buckets).long())


def bucket_balance(view: LayerView) -> dict[str, float]:
    """Measure how evenly tokens are spread over buckets, for logging: means over sequences, heads and rounds.

    Returns:
        "largest": size of the largest bucket, relative to an even share; "used": fraction of non-empty buckets;
        "entropy": normalized entropy of the bucket distribution, 1 if all buckets are equally full, 0 if all tokens
        share one.
    """
    return {name: heads.mean().item() for name, heads in bucket_balance_by_head(view).items()}


def bucket_balance_by_head(view: LayerView) -> dict[str, torch.Tensor]:
    """Compute `bucket_balance` per head, (H) float64 each; sequences that consist of padding are ignored."""
    sizes = bucket_sizes(view)[view.mask.any(-1)].cpu().double()
    share = sizes / sizes.sum(-1, keepdim=True).clamp(min=1)
    entropy = torch.special.entr(share).sum(-1) / torch.log(torch.tensor(view.num_buckets).double())
    numbers = {"largest": share.amax(-1) * view.num_buckets, "used": (sizes > 0).double().mean(-1), "entropy": entropy}
    return {name: value.mean((0, 2)) for name, value in numbers.items()}


def round_agreement(view: LayerView, neighbors: int = 8, queries: int = 256) -> torch.Tensor:
    """Compute the fraction of nearest neighbors that share a bucket in any of the first 1, 2, …, R rounds.

    Args:
        neighbors: number of nearest neighbors, by angle, among the real tokens of the same sequence and head.
        queries: number of tokens per sequence, evenly spaced, whose neighbors are used.

    Returns:
        (R) float64, non-decreasing: more rounds can only add pairs that share a bucket.
    """
    buckets, vectors, length = buckets_of(view), view.vectors, view.mask.shape[1]
    chosen = torch.linspace(0, length - 1, min(queries, length), device=vectors.device).long()
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    near = unit[:, :, chosen] @ unit.transpose(-1, -2)  # (B, H, Q, T)
    other = view.mask[:, None, :] & (chosen[:, None] != torch.arange(length, device=chosen.device))
    near = near.masked_fill(~(other & view.mask[:, chosen, None])[:, None], -torch.inf)
    cosine, token = near.topk(min(neighbors, length), dim=-1)  # (B, H, Q, neighbors)
    pair = cosine > -torch.inf
    theirs = buckets[:, :, :, None, :].expand(-1, -1, -1, len(chosen), -1)
    theirs = theirs.gather(-1, token[:, :, None].expand(-1, -1, buckets.shape[2], -1, -1))
    together = (theirs == buckets[:, :, :, chosen, None]).cummax(2).values & pair[:, :, None]
    return together.sum((0, 1, 3, 4)).double() / pair.sum().clamp(min=1)


def attention_mass(attention: AttentionWeights, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Compute the share of all attention that each token receives: (B, H, length), which sums to 1 for each head.

    Args:
        attention: one layer's output of `output_attentions`: `SparseAttention`, or weights (B, H, T, length).
        mask: (B, T), 1 for real tokens; attention from other tokens is ignored. Needed only in chunk mode, where
            padding also attends.
    """
    tokens, weights, length = as_lists(attention, mask)
    mass = weights.new_zeros(*weights.shape[:2], length)
    mass = mass.scatter_add(-1, tokens.clamp(min=0).flatten(2), weights.flatten(2))
    return mass / weights.detach().sum(-1).round().sum(-1, keepdim=True).clamp(min=1)


def visible_pairs(view: LayerView, row: int = 0, head: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return all pairs in a head's windows, including duplicates.

    Returns:
        Query, key, and the index in `names` of the sort order whose window contains the pair, (N) int64 each.
    """
    check_index(row=(row, len(view.mask)), head=(head, view.heads))
    real, layout = view.mask[row], view.layout
    perm, start, end = (x.expand(len(view.mask), view.heads, -1, -1)[row, head][None, None] for x in layout[:3])
    own = layout._replace(perm=perm, window_start=start, window_end=end)
    tokens = visible_tokens(own)[0, 0]  # (T, R * width)
    order = torch.arange(len(view.names), device=tokens.device).repeat_interleave(tokens.shape[1] // len(view.names))
    query = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(tokens)
    real = torch.nn.functional.pad(real, (0, len(tokens) - len(real)))  # in chunk mode, the input was padded
    visible = (tokens >= 0) & real[query] & real[tokens.clamp(min=0)]
    visible = visible & (tokens <= query) if view.causal else visible
    return query[visible], tokens[visible], order.expand_as(tokens)[visible]


def buckets_of(view: LayerView) -> torch.Tensor:
    if view.buckets is None:
        reason = f"is a {view.kind} layer" if view.kind != "lsh" else "saw an input no longer than its chunk"
        raise ValueError(f"There are no buckets: the layer {reason}. Only lsh layers hash; view one of these.")
    return view.buckets


def check_index(**indices: tuple[int, int]) -> None:
    """Raise ValueError, naming the argument, unless each index is at least 0 and below its count."""
    for name, (index, count) in indices.items():
        if not 0 <= index < count:
            allowed = f"0 to {count - 1} are possible" if count else "the model has none of this package's layers"
            raise ValueError(f"`{name}={index}` does not exist: {allowed}.")


def as_lists(attention: AttentionWeights, mask: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return the fields of `SparseAttention`, with attention from padding zeroed, and the number of key tokens."""
    if isinstance(attention, torch.Tensor):
        tokens = torch.arange(attention.shape[-1], device=attention.device).expand(attention.shape)
        attention = SparseAttention(tokens, attention)
    tokens, weights = attention
    if mask is not None:
        weights = weights * mask[:, None, -weights.shape[2] :, None].bool()
    return tokens, weights, max(tokens.shape[2], int(tokens.max()) + 1)
