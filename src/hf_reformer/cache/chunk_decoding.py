"""The older rule of decoding: which kept tokens one new token sees in chunk mode."""

import torch


def local_chunks(own: torch.Tensor, chunk: int, before: int) -> torch.Tensor:
    """Its own chunk of the sequence up to itself, and `before` whole chunks before it.

    own: (B) int64, number of the new token of every row. Returns (B, (before + 1) * chunk) int64; -1: none.
    """
    seen = own[:, None] - torch.arange((before + 1) * chunk, device=own.device)
    first = (own.div(chunk, rounding_mode="floor") - before) * chunk
    return torch.where(seen >= first[:, None], seen, -1).clamp(min=-1)


def hash_chunks(
    buckets: torch.Tensor,
    new: torch.Tensor,
    own: torch.Tensor,
    lengths: torch.Tensor,
    chunk: int,
    before: int,
    chunked: torch.Tensor,
) -> torch.Tensor:
    """In every round: the chunk of the sorted tokens that it falls into, and `before` chunks before that one.

    A round wraps around at its end, so that a token may come up several times. It counts as often as it does.

    Args:
        buckets: (B, H, R, T) int32, of all tokens, the new one included.
        new: (B, H, R, 1) int32, of the new token.
        own: (B) int64, its number, the last of its row.
        lengths: (B) int64, tokens of every row.
        chunked: (B) bool; False: it sees all tokens of its row, of which there are `chunk + 1` at most.

    Returns:
        (B, H, K) int64; -1: none.
    """
    place = torch.arange(buckets.shape[-1], device=own.device)
    there = (place < lengths[:, None])[:, None, None]  # (B, 1, 1, T)
    line = torch.where(there, buckets, torch.iinfo(buckets.dtype).max).sort(dim=-1, stable=True).indices
    at = ((buckets <= new) & there).sum(-1, keepdim=True) - 1  # (B, H, R, 1): the last of its bucket
    begin = (at.div(chunk, rounding_mode="floor") - before) * chunk
    shown = begin + torch.arange((before + 1) * chunk, device=own.device)
    seen = line.gather(-1, shown % lengths.clamp(min=1)[:, None, None, None]).flatten(-2)  # (B, H, K)
    seen = torch.nn.functional.pad(seen, (0, max(0, chunk + 1 - seen.shape[-1])), value=-1)
    number = torch.arange(seen.shape[-1], device=own.device)
    everything = torch.where(number <= own[:, None], number, -1)[:, None]  # (B, 1, K)
    return torch.where(chunked[:, None, None], seen, everything)
