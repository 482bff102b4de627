"""Chunking of token-wise functions: a few tokens are processed at a time (paper, section 3).

Intermediate results then stay in the processor's cache, and never exist for the whole sequence.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Elements in a chunk of a stream, over all sequences: enough for matrix products at full speed on a CPU.
CHUNK_ELEMENTS = 2**20

Tensors = list[torch.Tensor | None]


class Handoff:
    """A value for one receiver: `take()` returns and drops it, so its memory is freed once the receiver is done."""

    def __init__(self, value: Any):
        self._value = value

    def take(self) -> Any:
        value, self._value = self._value, None
        return value


def tokens_per_chunk(x: torch.Tensor, requested: int = 0) -> int:
    """Return the tokens per chunk of x, (B, T, ...): the requested number, or for 0 the fastest on its device."""
    if requested:
        return requested
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return max(x.shape[1], 1)
    return max(1, CHUNK_ELEMENTS // (x.shape[0] * math.prod(x.shape[2:])))


def token_chunks(size: int, *tensors: torch.Tensor | None) -> Iterator[tuple[int, list[Any]]]:
    """Yield chunks of at most `size` tokens: the position of the first token, and views of every tensor."""
    length = next(x.shape[1] for x in tensors if x is not None)
    if size >= length:
        yield 0, [*tensors]  # without `range`, which would specialize a traced graph to this length
        return
    for offset in range(0, length, size):
        yield offset, [None if x is None else x[:, offset : offset + size] for x in tensors]


class ChunkedBuffer:
    """Tensors, (B, T, ...), to be filled chunk by chunk: the given ones, or new ones. None stays None."""

    def __init__(self, length: int, *tensors: torch.Tensor):
        self.length = length
        self.tensors: Tensors = [*tensors]

    def put(self, offset: int, *chunks: torch.Tensor | None) -> None:
        if not self.tensors:
            self.tensors = [x if x is None or x.shape[1] == self.length else self._empty(x) for x in chunks]
        for buffer, chunk in zip(self.tensors, chunks, strict=True):
            if buffer is not None and chunk is not None and buffer is not chunk:
                buffer[:, offset : offset + chunk.shape[1]] = chunk

    def _empty(self, chunk: torch.Tensor) -> torch.Tensor:
        return chunk.new_empty(chunk.shape[0], self.length, *chunk.shape[2:])


def map_tokens(function: Callable[..., Tensors], size: int, *tensors: Any) -> Tensors:
    """Apply `function(offset, *chunks)` to all chunks and concatenate the results, (B, T, ...) each."""
    if size >= tensors[0].shape[1]:
        return function(0, *tensors)
    chunks = token_chunks(size, *tensors)
    if torch.is_grad_enabled():
        results = [function(offset, *some) for offset, some in chunks]
        return [None if parts[0] is None else torch.cat(parts, dim=1) for parts in zip(*results, strict=True)]
    buffer = ChunkedBuffer(tensors[0].shape[1])
    for offset, some in chunks:
        buffer.put(offset, *function(offset, *some))
    return buffer.tensors
