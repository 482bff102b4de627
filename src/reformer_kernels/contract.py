"""What the backends share: the version of their interface, limits, and numbers that `hf_reformer.ops` defines."""

import torch

CONTRACT = 7  # of what hf_reformer.ops.dispatch calls; another number wherever that changes
MAX_POSITIONS = 2**29  # sorted positions of a head, so that a position that wraps around still fits in int32

# Those of hf_reformer.ops.reference and .prng; a test compares them.
SELF_SCORE, MASKED_SCORE = -1e5, -1e9
GOLDEN, MIX_1, MIX_2 = -1640531527, -2048144789, -1028477387


def check_positions(perm: torch.Tensor) -> None:
    """Raise ValueError for permutations (B, H, R, T) of more than MAX_POSITIONS sorted positions."""
    positions = perm.shape[2] * perm.shape[3]
    if positions > MAX_POSITIONS:
        raise ValueError(
            f"{positions} sorted positions (rounds x tokens) are more than {MAX_POSITIONS}. Split the sequence."
        )


def keep_threshold(dropout: float) -> int:
    """A pair is kept where its random int32 is at least this number (`hf_reformer.ops.prng.keep_threshold`)."""
    return min(round(dropout * 2**32), 2**32 - 1) - 2**31
