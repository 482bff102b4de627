"""The cache of a causal Reformer: its layers, and what a model checks before it uses one."""

from typing import Any

from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..configuration_reformer import ReformerConfig
from .cache_layers import ChunkCacheLayer, ReformerCacheLayer, signatures

# What outputs and `generate` call a cache: since transformers 5.24 `cache`, before `past_key_values`.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class ReformerCache(Cache):
    """The cache of a causal Reformer, a layer for each of its own.

    Args:
        config: the model's.
        max_cache_len: tokens to allocate memory for at once; it grows when there are more.
    """

    def __init__(self, config: ReformerConfig, max_cache_len: int = 0, **options: Any):
        chunks = config.attention_mode == "chunk"
        layers: list[Any] = []
        for index, (kind, *_) in enumerate(signatures(config)):
            layer_class = ChunkCacheLayer if chunks and kind != "full" else ReformerCacheLayer
            layers.append(layer_class(config, index, max_cache_len))
        local = [layer for layer in layers if layer.kind == "local"]
        for layer in layers:  # no cycles among them, so that their memory goes with the last reference
            layer.sibling_local_layers = [] if layer.kind == "local" else local
        super().__init__(layers=layers, **options)


def to_reformer_cache(cache: Any, config: ReformerConfig) -> Cache:
    """A cache that a Reformer filled, or an empty one of the library's (dynamic or static) with its layers replaced.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(getattr(cache, "layers", None), list):
        if [layer.signature for layer in cache.layers if isinstance(layer, ReformerCacheLayer)] == signatures(config):
            return cache
        if not any(getattr(layer, "is_initialized", True) and layer.get_seq_length() for layer in cache.layers):
            capacity = max([getattr(layer, "max_cache_len", 0) for layer in cache.layers], default=0)
            cache.layers = ReformerCache(config, capacity).layers
            cache.layer_class_to_replicate = None
            return cache
    raise ValueError(
        f"The cache given, `past_key_values` or `cache`, is a {type(cache).__name__} that a Reformer did not fill: "
        "attention here reads no keys and values from outside. Give what an earlier call returned, or an empty cache. "
        "If prefix tuning made it, choose another kind of adapter: prompt tuning, or LoRA."
    )


def check_call(cache: Cache, batch: int, num_hashes: int, num_buckets: Any) -> None:
    """Before any layer writes to the cache.

    Raises:
        ValueError: its layers differ in their tokens, it holds other sequences, or its tokens were hashed otherwise.
    """
    layers: list[Any] = cache.layers
    seen = sorted({layer.seen_tokens for layer in layers})
    if len(seen) > 1:
        raise ValueError(
            f"The layers of the cache hold {seen} tokens: an earlier call was interrupted between them. Begin with a "
            "new cache."
        )
    if layers[0].seen_tokens and layers[0].batch_size != batch:
        raise ValueError(
            f"The input has {batch} sequences, but the cache has {layers[0].batch_size}. Give new tokens of each, or "
            "select sequences with `cache.reorder_cache(indices)`."
        )
    for layer in layers:
        if not layer.seen_tokens or layer.hasher is None:
            continue
        hashed_with = layer.hasher.rotations.shape[2], layer.hasher.num_buckets
        if (num_hashes, num_buckets or hashed_with[1]) != hashed_with:
            raise ValueError(
                f"num_hashes={num_hashes}, num_buckets={num_buckets} were given, but the tokens in the cache were "
                f"hashed with {hashed_with[0]} and {hashed_with[1]}. Keep them, or begin with a new cache."
            )


__all__ = ["ReformerCache"]
