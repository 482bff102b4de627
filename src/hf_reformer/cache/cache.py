"""The cache of a causal Reformer, and the checks made before a model uses one."""

from contextlib import nullcontext
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..configuration_reformer import ReformerConfig
from .cache_layers import ChunkCacheLayer, ReformerCacheLayer, signatures

# The name of the cache in outputs and `generate`: `cache` since transformers 5.24, `past_key_values` before.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class ReformerCache(Cache):
    """The cache of a causal Reformer, one cache layer per model layer.

    Args:
        config: the model's config.
        max_cache_len: number of tokens to allocate memory for in advance; the cache grows beyond that if needed.
    """

    def __init__(self, config: ReformerConfig, max_cache_len: int = 0, **options: Any):
        chunks = config.attention_mode == "chunk"
        layers: list[Any] = []
        for index, (kind, *_) in enumerate(signatures(config)):
            layer_class = ChunkCacheLayer if chunks and kind != "full" else ReformerCacheLayer
            layers.append(layer_class(config, index, max_cache_len))
        local = [layer for layer in layers if layer.kind == "local"]
        for layer in layers:  # no reference cycles, so that memory is freed with the last reference
            layer.sibling_local_layers = [] if layer.kind == "local" else local
        super().__init__(layers=layers, **options)


def to_reformer_cache(cache: Any, config: ReformerConfig) -> Cache:
    """Return a Reformer's cache as is, or an empty transformers cache (dynamic or static) with its layers replaced.

    Raises:
        ValueError: the cache is neither, or an earlier update of it was interrupted.
    """
    if isinstance(getattr(cache, "layers", None), list):
        if [layer.signature for layer in cache.layers if isinstance(layer, ReformerCacheLayer)] == signatures(config):
            _check_whole(cache.layers)
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


def _check_whole(layers: list[Any]) -> None:
    seen = sorted({layer.seen_tokens for layer in layers})
    if len(seen) > 1:
        raise ValueError(
            f"The layers of the cache hold {seen} tokens: an earlier call was interrupted between them. Begin with a "
            "new cache."
        )
    if any(layer.half_done for layer in layers) or len({layer.selections for layer in layers}) > 1:
        raise ValueError(
            "The cache was left half changed: an earlier call with it, or a change of its sequences, was interrupted. "
            "Begin with a new cache, or call `cache.reset()`."
        )


def check_call(cache: Cache, batch: int, num_hashes: int, num_buckets: Any) -> None:
    """Check the arguments of a call against the cache before any layer writes to it.

    Raises:
        ValueError: the cache has another batch size, or its tokens were hashed with other settings.
    """
    layers: list[Any] = cache.layers
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


def whole_step(cache: Any) -> Any:
    """Return a context for a call, first layer to output: if it is interrupted, the cache is rejected afterwards.

    When nested, the outermost counts: cached tokens are of no use to a caller that got no output.
    """
    return nullcontext() if cache is None or torch.compiler.is_compiling() else WholeStep(cache)


def begin_writing(cache: Any) -> None:
    """Mark the cache as being written: it is rejected from now on unless its `whole_step` completes."""
    if not torch.compiler.is_compiling():  # a graph updates the cache at its end
        cache.layers[0].half_done = True


class WholeStep:
    """The context manager of `whole_step`."""

    def __init__(self, cache: Any):
        self.cache = getattr(cache, "self_attention_cache", cache)  # one of the two of an encoder-decoder
        self.is_outermost = False

    def __enter__(self) -> None:
        if not getattr(self.cache, "in_step", False):
            self.is_outermost = self.cache.in_step = True

    def __exit__(self, error: Any, *_: Any) -> None:
        if self.is_outermost:
            self.cache.in_step = False
            if error is None and self.cache.layers:
                self.cache.layers[0].half_done = False


__all__ = ["ReformerCache"]
