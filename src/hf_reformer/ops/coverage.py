"""The coverage loss: how far the attention that tokens receive is from reaching all of them.

For every layer KL(received || target) = sum over tokens j of received[j] * log(received[j] / target[j]), with
0 * log 0 = 0. `received` is the share of attention that each real token gets, a mean over heads and real queries,
before dropout. The target is what evenly spread attention would give: 1 / n each, or in causal layers, where query i
of n spreads 1 / (i + 1) over the tokens 0 … i, (H(n) - H(j)) / n with the harmonic numbers H.
"""

from typing import NamedTuple

import torch

SMALLEST = torch.finfo(torch.float32).tiny  # what takes the place of 0 under a logarithm


class CoverageTarget(NamedTuple):
    """What the loss compares with. A sample packed into a row counts like a row of its own.

    Attributes:
        real: (B, T) bool.
        paid: (B, T), the share of each query: 1 / n for the n real tokens of its sample.
        target: (B, T), what each token would receive of evenly spread attention; 0 for padding.
        samples: () int64, how many samples hold a real token, but at least 1.
    """

    real: torch.Tensor
    paid: torch.Tensor
    target: torch.Tensor
    samples: torch.Tensor


def coverage_target(
    real: torch.Tensor, ranks: torch.Tensor, samples: torch.Tensor | None = None, causal: bool = False
) -> CoverageTarget:
    """By (B, T) bool, True for real tokens.

    Args:
        ranks: (B or 1, T), number of real tokens of its sample before each token.
        samples: (B, T), which of the samples of its row a token belongs to, None: every row is one.
    """
    dtype = torch.float32 if real.device.type == "mps" else torch.float64  # it has no float64
    length = real.shape[1]
    if samples is None:
        number = real.sum(-1, keepdim=True).expand_as(real)
    else:
        index = samples.long()
        number = torch.zeros_like(index).scatter_add_(1, index, real.long()).gather(1, index)
    ranks = ranks.long().expand_as(real)
    paid = real.to(dtype) / number.clamp(min=1)
    target = paid
    if causal:
        harmonic = torch.arange(1, length + 1, device=real.device, dtype=dtype).reciprocal().cumsum(0)
        harmonic = torch.nn.functional.pad(harmonic, (1, 0))
        target = paid * (harmonic[number] - harmonic[ranks])
    return CoverageTarget(real, paid, target, (real & (ranks == 0)).sum().clamp(min=1))


def coverage_loss(received: torch.Tensor, shares: CoverageTarget) -> torch.Tensor:
    """KL(received || target), the mean over samples: (..., B, T) → (...), in the dtype of the shares."""
    received = received.to(shares.target.dtype)
    target = torch.where(shares.target > 0, shares.target, 1)
    ratio = received.clamp(min=SMALLEST).log() - target.log()
    return (received * ratio).sum((-2, -1)) / shares.samples


def received_entropy(received: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Entropy of the attention received over that of all tokens receiving the same: (..., T) → (...), from 0 to 1.

    Args:
        received: shares of attention, which add up to 1 over the last dimension.
        mask: 1 for real tokens, broadcast to `received`. None: all.
    """
    count = _real(received, mask).sum(-1)
    entropy = torch.special.entr(received).sum(-1)
    return torch.where(count > 1, entropy / count.clamp(min=2).to(received.dtype).log(), 1)


def covered_fraction(received: torch.Tensor, mask: torch.Tensor | None = None, least: float = 0.1) -> torch.Tensor:
    """Share of the real tokens that receive at least `least` times the uniform share: (..., T) → (...).

    Arguments as for `received_entropy`.
    """
    real = _real(received, mask)
    count = real.sum(-1, keepdim=True).clamp(min=1)
    return (real & (received * count >= least)).sum(-1) / count[..., 0]


def _real(received: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if mask is None:
        return torch.ones_like(received, dtype=torch.bool)
    return (mask != 0).to(received.device).expand_as(received)
