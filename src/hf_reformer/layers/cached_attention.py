"""Local and LSH attention of new tokens to cached tokens and each other: `prefill` for many, `decode` for few.

In window mode, results equal those of one forward pass over all tokens. Chunk mode follows the legacy decoding rule
(`cache_layers.ChunkCacheLayer`).
"""

from typing import Any

import torch

from ..ops.dispatch import decode_kernel, windowed_attention
from ..ops.gather_attention import SparseAttention, concat_queries, gather_attention
from ..ops.lsh import bucket_factors
from .forward_context import ForwardContext

MAX_DECODE_TOKENS = 8  # up to this many new tokens, each is looked up separately
DECODE_COST_RATIO = 16  # cost of looking up one token, in tokens of one forward pass over all


def prefers_decode(attention: Any, new_tokens: int, ctx: ForwardContext) -> bool:
    """Whether to look up this many new tokens one by one, because it is faster or the only way."""
    if attention.mode == "chunk" or ctx.want_weights or new_tokens <= MAX_DECODE_TOKENS:
        return True
    seen = ctx.cache.layers[attention.layer].seen_tokens
    return attention.kind == "lsh" and new_tokens * DECODE_COST_RATIO <= seen


def prefill(
    attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, vectors: Any, ctx: ForwardContext
) -> tuple[torch.Tensor, None]:
    """Process many new tokens at once, with windows over cached and new tokens; only new tokens are queries.

    Args:
        attention: a `ReformerAttention`.
        query, key, value: (B, H, N, D) of the new tokens, query and key with rotary positions applied.
        vectors: (B, H, N, D), to be hashed; None in local layers.

    Returns:
        The attention output, (B, H, N, D), and None in place of weights.
    """
    cache_layer, new, group = ctx.cache.layers[attention.layer], value.shape[2], attention.heads
    if vectors is None:
        keys, values, numbers = cache_layer.last_tokens(min(cache_layer.seen_tokens, cache_layer.local_window - 1))
        old, mask = keys.shape[2], None
        if ctx.mask is not None or cache_layer.attention_mask is not None:
            real = numbers.new_ones(value.shape[0], new) if ctx.mask is None else ctx.mask
            mask = torch.cat([numbers >= 0, real.bool()], dim=-1)
        cache_layer.append(key, value, None, ctx.mask)
        queries, keys, values = (torch.cat(x, dim=2) for x in ((keys, query), (keys, key), (values, value)))
        buckets, tokens = None, torch.arange(old, old + new, device=value.device).expand(value.shape[0], -1)
    else:
        buckets = attention.buckets(vectors, ctx)
        tokens = cache_layer.append(key, value, buckets, ctx.mask)
        keys, values, buckets, mask = cache_layer.all_tokens()
        queries = keys
        # A few heads at a time, so that tensors over the context are no larger than tensors over the input.
        group = max(1, attention.heads * new // keys.shape[2])
    first = torch.where(tokens >= 0, tokens, keys.shape[2]).amin(-1)[:, None, None, None]
    tokens, outputs = tokens.clamp(min=0)[:, None, :, None], []
    for head in range(0, attention.heads, group):
        some = slice(head, head + group)
        layout = attention.layout(None if buckets is None else buckets[:, some], mask, ctx, values[:, some])
        old_query = layout.perm < first
        layout = layout._replace(window_start=torch.where(old_query, layout.window_end + 1, layout.window_start))
        out, _ = windowed_attention(
            queries[:, some], keys[:, some] if vectors is None else None, values[:, some], layout,
            causal=True, mask=mask, scale=attention.scale, backend=attention.backend,
        )  # fmt: skip
        outputs.append(out.gather(2, tokens.expand(-1, out.shape[1], -1, out.shape[3])))
    return torch.cat(outputs, dim=1), None


def cache_tensors(kernel: Any, cache_layer: Any, share: float) -> Any:
    """Collect the tensors of a cache layer that the decode functions of `reformer_kernels.cpu` read and write.

    `share`: of the mean that is subtracted before hashing.
    """
    hasher, chains = cache_layer.hasher, cache_layer.chains
    if hasher is None:
        return kernel.CacheTensors(cache_layer.keys, cache_layer.values)
    window = min(cache_layer.lsh_window, chains.previous.shape[-1] - 1)  # as in `last`: the kernel allocates this much
    return kernel.CacheTensors(
        cache_layer.keys, cache_layer.values, cache_layer.buckets, chains.newest, chains.previous, hasher.rotations,
        bucket_factors(hasher.num_buckets), window, cache_layer.sums, share,
    )  # fmt: skip


def decode(
    attention: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, vectors: Any, ctx: ForwardContext
) -> tuple[torch.Tensor, SparseAttention | None]:
    """Process new tokens one by one, looking up each in the cache: no tensor grows with the context.

    The arguments are those of `prefill`.

    Returns:
        The attention output, (B, H, N, D), and the weights if `ctx` requests them, else None.
    """
    cache_layer = ctx.cache.layers[attention.layer]
    windows = attention.mode == "window"
    kernel = decode_kernel(attention.backend, cache_layer.keys) if windows and not ctx.want_weights else None
    if kernel is not None:
        numbers = cache_layer.reserve(value.shape[2], ctx.mask)
        options = cache_tensors(kernel, cache_layer, attention.centering), cache_layer.local_reach, attention.scale
        out = kernel.decode_attention(query, key, value, vectors, numbers, *options)
        cache_layer.commit(numbers)
        return out, None
    outputs = []
    for column in range(value.shape[2]):
        own = slice(column, column + 1)
        mask = None if ctx.mask is None else ctx.mask[:, own]
        buckets = None if vectors is None else attention.buckets(vectors[:, :, own], ctx._replace(mask=mask))
        number = cache_layer.append(key[:, :, own], value[:, :, own], buckets, mask)[:, 0]
        visible = cache_layer.visible_tokens(number, buckets)[:, :, None]
        scale = attention.scale if vectors is None else None
        inputs = query[:, :, own], cache_layer.keys, cache_layer.values, visible, number[:, None], scale
        outputs.append(gather_attention(*inputs, dedup_pairs=windows))
    if not ctx.want_weights:
        return torch.cat([out for out, _ in outputs], dim=2), None
    out, weights = concat_queries(outputs)
    return out, weights._replace(tokens=cache_layer.input_positions(weights.tokens))
