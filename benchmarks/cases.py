"""Measurements: a `Case` holds the shapes; a section's maker turns it and an implementation's name into a `Run`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

FORWARD, BACKWARD, BOTH, STEP = "forward", "backward", "forward+backward", "training step"
NEXT, PREFILL, INFERENCE = "next token", "prompt", "inference"
WARM_UP_LENGTH, WARM_UP_LAYERS = 512, 2


@dataclass(frozen=True, kw_only=True)
class Case:
    """One setup, the same for time and memory, in this process or another."""

    section: str
    length: int
    work: str = FORWARD  # the work of one call
    rounds: int = 2
    causal: bool = True
    layers: int = 0  # of a whole model; 0 for single ops
    device: str = "cpu"  # or "cuda"
    dtype: str = "float32"  # of tensors and inference; training steps keep float32 weights and use autocast

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def warm_up(self) -> "Case":
        """Return a small version of the case."""
        return replace(self, length=min(self.length, WARM_UP_LENGTH), layers=min(self.layers, WARM_UP_LAYERS))


class Run(NamedTuple):
    """A function to call and its minimum work: floating-point operations in products, bytes read and written.

    For a core, `bytes` is the size of its results only.
    """

    call: Callable[[], Any]
    flops: float = 0.0
    bytes: float = 0.0
    note: str = ""


class Entry(NamedTuple):
    """An implementation applied to a case."""

    case: Case
    impl: str


class Group(NamedTuple):
    """Entries measured together; ratios are to the first.

    Attributes:
        scale: time allowed for a call, in units of a single op's.
        in_a_row: number of calls timed together; the time is per call.
    """

    quantity: str  # "time", "memory", or "check": whether a call agrees with the definition
    entries: list[Entry]
    scale: float = 1.0
    in_a_row: int = 1


class Settings(NamedTuple):
    """Command-line settings for the size of a run."""

    lengths: list[int] | None
    rounds: list[int]
    short: bool

    @property
    def main_rounds(self) -> int:
        """Return the number of rounds at which everything is measured."""
        return 2 if 2 in self.rounds else self.rounds[0]

    def choose(self, long: Iterable[int], short: Iterable[int]) -> list[int]:
        """Choose a section's lengths: those from the command line, else its own."""
        return sorted(self.lengths or (short if self.short else long))

    def ends(self, long: Iterable[int], short: Iterable[int]) -> list[int]:
        """Return the shortest and the longest of these lengths."""
        lengths = self.choose(long, short)
        return sorted({lengths[0], lengths[-1]})
