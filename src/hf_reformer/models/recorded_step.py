"""Generation with a CUDA graph: a decode step is captured once and replayed for every further token."""

from typing import Any

import torch

from ..cache.cache import CACHE_NAME, to_reformer_cache
from .input_checks import check_inputs


class RecordedStep:
    """Decode steps on one cache. The first step runs normally; the second is captured and replayed from then on.

    A graph writes to the tensors that it was captured with. So the cache needs memory for all future tokens, and the
    step is captured again after sequences of the cache are selected, repeated or cropped.

    Args:
        model: a causal Reformer on a CUDA device, in window mode, without "full" layers.
        cache: a `ReformerCache(model.config, max_cache_len=...)` that holds a prompt.

    Raises:
        ValueError: a different kind of model.
    """

    def __init__(self, model: Any, cache: Any):
        if model.device.type != "cuda":
            raise ValueError(f"A CUDA graph records what a CUDA device does, but the model is on {model.device}.")
        if model.config.attention_mode != "window" or "full" in model.config.attn_layers:
            raise ValueError(
                "A CUDA graph has tensors of fixed shapes, but with `attention_mode='chunk'` and in 'full' layers "
                "they grow with the context. Call the model itself."
            )
        self.model, self.cache = model, to_reformer_cache(cache, model.config)
        self.layers: list[Any] = self.cache.layers
        self.is_warm = False
        self.graph: Any = None
        self.recorded: list[torch.Tensor] = []  # what the graph writes to; kept alive so that their ids are not reused
        self.path: list[Any] = []

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Process one more token per sequence, (B, 1) int64, without padding; returns logits (B, 1, V).

        Raises:
            ValueError: an invalid shape or dtype, an empty cache, or one without room.
        """
        self._check(input_ids)
        if not self.is_warm:  # this step compiles kernels
            self.is_warm = True
            return self._logits(input_ids)
        if self.graph is None or self.path != self._path():
            self._record(input_ids)
        self.input_ids.copy_(input_ids)
        self.graph.replay()
        for layer in self.layers:
            layer.seen_tokens += 1
            if layer.attention_mask is not None:
                layer.attention_mask = torch.nn.functional.pad(layer.attention_mask, (0, 1), value=True)
        return self.logits.clone()

    def _logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, **{CACHE_NAME: self.cache}).logits

    def _changed(self) -> list[torch.Tensor]:
        return [x for layer in self.layers for x in layer.changed_in_place()]

    def _path(self) -> list[Any]:
        """Return what determines a step's operations: the tensors it changes, and whether tokens were masked."""
        return [*map(id, self._changed()), *(layer.attention_mask is None for layer in self.layers)]

    def _check(self, input_ids: torch.Tensor) -> None:
        seen, batch = self.layers[0].seen_tokens, self.layers[0].batch_size
        if not seen or tuple(input_ids.shape) != (batch, 1):
            raise ValueError(
                f"`input_ids` have shape {tuple(input_ids.shape)}, and the cache holds {seen} tokens of {batch} "
                "sequences. Call the model with the prompt; from then on give one token for each sequence."
            )
        if not all(layer.has_room(1) for layer in self.layers):
            raise ValueError(
                f"The cache holds {seen} tokens and has no memory for another, which a CUDA graph cannot add. Create "
                "it with a larger `max_cache_len`."
            )
        check_inputs(self.model.config, input_ids, None, None, None, None, None, seen)

    def _record(self, input_ids: torch.Tensor) -> None:
        """Capture a step. This computes nothing, so the counters on the host are restored."""
        counted = [(layer.seen_tokens, layer.attention_mask) for layer in self.layers]
        recorded, path = self._changed(), self._path()
        ids, graph = input_ids.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._logits(ids)
        for layer, (seen, mask) in zip(self.layers, counted, strict=True):
            layer.seen_tokens, layer.attention_mask = seen, mask
        self.recorded, self.path, self.input_ids, self.graph, self.logits = recorded, path, ids, graph, logits


__all__ = ["RecordedStep"]
