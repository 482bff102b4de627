"""Lookup of the newest members of every bucket, per head and hash round, in time independent of the length."""

import torch


class BucketChains:
    """The members of every bucket as a linked list, newest first, for every sequence, head and round (B, H, R).

    Attributes:
        newest: (B, H, R, buckets) int32, the newest member of every bucket.
        previous: (B, H, R, 1 + capacity) int32, at index 1 + t: the member before token t in its bucket.

    Both store 1 + the index of a token, or 0 for none: a chain ends at 0, where `previous` points to itself.
    """

    def __init__(self, rounds: tuple[int, ...], num_buckets: int, capacity: int, device: torch.device):
        self.newest = torch.zeros(*rounds, num_buckets, dtype=torch.int32, device=device)
        self.previous = torch.zeros(*rounds, 1 + capacity, dtype=torch.int32, device=device)

    def add(self, buckets: torch.Tensor, tokens: torch.Tensor) -> None:
        """Add new tokens: buckets (B, H, R, N) int32; tokens (B, N), their indices, ascending, or -1 for none."""
        tokens = tokens[:, None, None].expand_as(buckets).to(torch.int32)
        num_buckets, none = self.newest.shape[-1], torch.zeros_like(buckets[..., :1])
        buckets, order = torch.where(tokens >= 0, buckets, num_buckets).long().sort(dim=-1, stable=True)
        members = 1 + tokens.gather(-1, order)
        newest = torch.cat([self.newest, none], dim=-1)  # an extra bucket for unused entries
        begins = torch.ones_like(buckets, dtype=torch.bool)
        begins[..., 1:] = buckets[..., 1:] != buckets[..., :-1]
        previous = torch.where(begins, newest.gather(-1, buckets), members.roll(1, -1))
        previous = torch.where(members > 0, previous, 0)
        self.previous.scatter_(-1, members.long(), previous)
        self.newest.copy_(newest.scatter_reduce_(-1, buckets, members, "amax")[..., :-1])

    def last(self, buckets: torch.Tensor, window: int) -> torch.Tensor:
        """Return the newest `window` members of one bucket per round, (B, H, R) → (B, H, R * K) int64, padded with -1.

        K is the smaller of `window` and the capacity.
        """
        member = self.newest.gather(-1, buckets.long()[..., None])
        members, window = [member], min(window, self.previous.shape[-1] - 1)
        while len(members) < window:
            member = self.previous.gather(-1, member.long())
            members.append(member)
        return torch.cat(members, dim=-1).flatten(-2).long() - 1

    def remove(self, buckets: torch.Tensor, tokens: torch.Tensor) -> None:
        """Remove the newest tokens, given their buckets, (B, H, R, N), and their indices, (B, N), or -1 for none."""
        members = 1 + tokens[:, None, None].expand_as(buckets)
        previous = self.previous.gather(-1, members)
        previous = torch.where(members > 0, previous, torch.iinfo(torch.int32).max)
        self.newest.scatter_reduce_(-1, buckets.long(), previous, "amin")
