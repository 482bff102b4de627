"""Functions that treat every token alike, on a few tokens at a time (paper, section 3: chunking).

What such a function computes in between then stays in the processor's cache, and never exists for the whole sequence.
"""

import math
from collections.abc import Callable, Iterator

import torch

CHUNK_ELEMENTS = (
    2**20
)  # numbers in a slice of a stream, all rows together: enough for matrix products at full speed on a CPU

Tensors = list[torch.Tensor | None]


def chunk_length_for(x: torch.Tensor, asked: int = 0) -> int:
    """Tokens per slice of x, (B, T, ...): as asked, or where 0 is asked what is fastest on its device."""
    whole = x.device.type != "cpu" or torch.compiler.is_compiling()
    return asked or (max(x.shape[1], 1) if whole else max(1, CHUNK_ELEMENTS // (x.shape[0] * math.prod(x.shape[2:]))))


def token_chunks(size: int, *tensors: torch.Tensor | None) -> Iterator[tuple[int, Tensors]]:
    """First token and views of `size` tokens, (B, size, ...), of every tensor but None; the last may be shorter."""
    length = next(x.shape[1] for x in tensors if x is not None)
    if size >= length:
        yield 0, [*tensors]  # not by `range`, which would fix the length that a graph is traced with
        return
    for first in range(0, length, size):
        yield first, [None if x is None else x[:, first : first + size] for x in tensors]


class ChunkedBuffer:
    """Tensors (B, T, ...) that are filled slice by slice: those given, or new ones. None stays None."""

    def __init__(self, length: int, *tensors: torch.Tensor):
        self.length = length
        self.tensors: Tensors = [*tensors]

    def put(self, first: int, *pieces: torch.Tensor | None) -> None:
        if not self.tensors:
            self.tensors = [x if x is None or x.shape[1] == self.length else _room(x, self.length) for x in pieces]
        for joined, piece in zip(self.tensors, pieces, strict=True):
            if joined is not piece:
                joined[:, first : first + piece.shape[1]] = piece


def _room(x: torch.Tensor, length: int) -> torch.Tensor:
    return x.new_empty(x.shape[0], length, *x.shape[2:])


def map_tokens(function: Callable[..., Tensors], size: int, *tensors: torch.Tensor) -> Tensors:
    """`function(first, *slices)` of all slices, joined: (B, T, ...) each."""
    if size >= tensors[0].shape[1]:
        return function(0, *tensors)
    slices = token_chunks(size, *tensors)
    if torch.is_grad_enabled():
        found = [function(first, *pieces) for first, pieces in slices]
        return [None if parts[0] is None else torch.cat(parts, dim=1) for parts in zip(*found, strict=True)]
    joined = ChunkedBuffer(tensors[0].shape[1])
    for first, pieces in slices:
        joined.put(first, *function(first, *pieces))
    return joined.tensors
