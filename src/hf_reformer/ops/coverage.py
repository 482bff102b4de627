"""The coverage loss: how far the attention mass is from covering all tokens.

For every layer KL(mass || target) = sum over tokens j of mass[j] * log(mass[j] / target[j]), with 0 * log 0 = 0. The
attention mass is the share of attention that each real token receives, a mean over heads and real queries, before
dropout. The target is the mass of evenly spread attention: 1 / n each, or in causal layers, where query i of n spreads
1 / (i + 1) over the tokens 0 … i, (H(n) - H(j)) / n with the harmonic numbers H.
"""

from typing import NamedTuple

import torch

TINY = torch.finfo(torch.float32).tiny  # replaces 0 in logarithms


class CoverageTarget(NamedTuple):
    """The target of the coverage loss. A packed sample counts as a sequence of its own."""

    query_weights: torch.Tensor  # (B, T), weight of each query: 1 / n for the n real tokens of its sample
    target: torch.Tensor  # (B, T), the mass of evenly spread attention; 0 for padding
    samples: torch.Tensor  # () int64, number of samples with a real token, at least 1


def coverage_target(
    real: torch.Tensor, ranks: torch.Tensor, samples: torch.Tensor | None = None, causal: bool = False
) -> CoverageTarget:
    """Compute the target of a batch.

    Args:
        real: (B, T) bool, True for real tokens.
        ranks: (B or 1, T), number of real tokens before each token in its sample.
        samples: (B, T), index of each token's sample in a packed sequence; None: one sample per sequence.
    """
    dtype = torch.float32 if real.device.type == "mps" else torch.float64  # MPS has no float64
    length = real.shape[1]
    if samples is None:
        number = real.sum(-1, keepdim=True).expand_as(real)
    else:
        index = samples.long()
        number = torch.zeros_like(index).scatter_add_(1, index, real.long()).gather(1, index)
    ranks = ranks.long().expand_as(real)
    query_weights = real.to(dtype) / number.clamp(min=1)
    target = query_weights
    if causal:
        harmonic = torch.arange(1, length + 1, device=real.device, dtype=dtype).reciprocal().cumsum(0)
        harmonic = torch.nn.functional.pad(harmonic, (1, 0))
        target = query_weights * (harmonic[number] - harmonic[ranks])
    return CoverageTarget(query_weights, target, (real & (ranks == 0)).sum().clamp(min=1))


def coverage_loss(mass: torch.Tensor, target: CoverageTarget) -> torch.Tensor:
    """Compute KL(mass || target), averaged over samples: (..., B, T) → (...), in the dtype of the target."""
    mass = mass.to(target.target.dtype)
    even = torch.where(target.target > 0, target.target, 1)
    ratio = mass.clamp(min=TINY).log() - even.log()
    return (mass * ratio).sum((-2, -1)) / target.samples


def mass_entropy(mass: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Compute the entropy of the attention mass relative to that of uniform mass: (..., T) → (...), from 0 to 1.

    Args:
        mass: shares of attention, which sum to 1 over the last dimension.
        mask: 1 for real tokens, broadcast to `mass`; None: all are real.
    """
    count = _real(mass, mask).sum(-1)
    entropy = torch.special.entr(mass).sum(-1)
    return torch.where(count > 1, entropy / count.clamp(min=2).to(mass.dtype).log(), 1)


def covered_fraction(mass: torch.Tensor, mask: torch.Tensor | None = None, least: float = 0.1) -> torch.Tensor:
    """Compute the fraction of real tokens that receive at least `least` times uniform mass: (..., T) → (...).

    Arguments as for `mass_entropy`.
    """
    real = _real(mass, mask)
    count = real.sum(-1, keepdim=True).clamp(min=1)
    return (real & (mass * count >= least)).sum(-1) / count[..., 0]


def _real(mass: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return torch.ones_like(mass, dtype=torch.bool)
    return (mask != 0).to(mass.device).expand_as(mass)
