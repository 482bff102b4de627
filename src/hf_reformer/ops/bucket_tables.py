"""Per head and hash round, the newest members of every bucket, found in a time that no length changes."""

import torch


class BucketChains:
    """The members of every bucket as chains from the newest back, a table for every line (B, H, R).

    Attributes:
        newest: (B, H, R, buckets) int32, every bucket's newest member.
        previous: (B, H, R, 1 + room) int32, at 1 + t: the member before token t in its bucket.

    Both hold 1 + the number of a token, 0 for none, so that a chain ends where `previous` leads from 0 to 0.
    """

    def __init__(self, lines: tuple[int, ...], count: int, room: int, device: torch.device):
        self.newest = torch.zeros(*lines, count, dtype=torch.int32, device=device)
        self.previous = torch.zeros(*lines, 1 + room, dtype=torch.int32, device=device)

    def add(self, buckets: torch.Tensor, tokens: torch.Tensor) -> None:
        """Put new tokens in: buckets (B, H, R, N) int32; tokens (B, N), their numbers, rising, or -1: none."""
        tokens = tokens[:, None, None].expand_as(buckets).to(torch.int32)
        count, none = self.newest.shape[-1], torch.zeros_like(buckets[..., :1])
        buckets, order = torch.where(tokens >= 0, buckets, count).long().sort(dim=-1, stable=True)
        members = 1 + tokens.gather(-1, order)
        newest = torch.cat([self.newest, none], dim=-1)  # one more bucket takes what is none
        begins = torch.ones_like(buckets, dtype=torch.bool)
        begins[..., 1:] = buckets[..., 1:] != buckets[..., :-1]
        before = torch.where(begins, newest.gather(-1, buckets), members.roll(1, -1))
        before = torch.where(members > 0, before, 0)
        self.previous.scatter_(-1, members.long(), before)
        self.newest = newest.scatter_reduce_(-1, buckets, members, "amax")[..., :-1].contiguous()

    def last(self, buckets: torch.Tensor, window: int) -> torch.Tensor:
        """The newest `window` members of one bucket a table, (B, H, R) → (B, H, R * K) int64; -1: fewer.

        K is `window`, or the room for tokens where that is less.
        """
        member = self.newest.gather(-1, buckets.long()[..., None])
        found, window = [member], min(window, self.previous.shape[-1] - 1)
        while len(found) < window:
            member = self.previous.gather(-1, member.long())
            found.append(member)
        return torch.cat(found, dim=-1).flatten(-2).long() - 1

    def remove(self, buckets: torch.Tensor, tokens: torch.Tensor) -> None:
        """Take back the newest tokens: buckets (B, H, R, N) and their numbers (B, N), or -1: none."""
        members = 1 + tokens[:, None, None].expand_as(buckets)
        before = self.previous.gather(-1, members)
        before = torch.where(members > 0, before, torch.iinfo(torch.int32).max)
        self.newest.scatter_reduce_(-1, buckets.long(), before, "amin")
