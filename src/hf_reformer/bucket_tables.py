"""Per head and hash round, the newest members of every bucket, found in a time that no length changes."""

import torch


class BucketTables:
    """The newest members of every bucket: tables of `count` rings of 2 * `window` tokens, one a line (B, H, R).

    Twice the window, so that as many tokens may be taken back; where more were, the rings are filled anew.
    """

    def __init__(self, lines: tuple[int, ...], count: int, window: int, device: torch.device):
        self.window, self.count = window, count
        self.size = 2 * window
        shape = (*lines, count)
        self.rings = torch.zeros(*shape, self.size, dtype=torch.int32, device=device)
        self.added = torch.zeros(shape, dtype=torch.int32, device=device)  # members so far
        self.most = torch.zeros(shape, dtype=torch.int32, device=device)  # members there ever were

    def add(self, buckets: torch.Tensor, tokens: torch.Tensor) -> None:
        """Put tokens in, in order: buckets (B, H, R, N) int32 and tokens (B, N) int32, where -1 is none."""
        batch, heads, rounds, new = buckets.shape
        tokens = tokens[:, None, None].expand_as(buckets)
        buckets = torch.where(tokens >= 0, buckets, self.count).long()
        if new > 1:
            buckets, order = buckets.sort(dim=-1, stable=True)
            tokens = tokens.gather(-1, order)
        place = torch.arange(new, device=buckets.device)
        begins = torch.ones_like(buckets, dtype=torch.bool)
        begins[..., 1:] = buckets[..., 1:] != buckets[..., :-1]
        first = torch.where(begins, place, 0).cummax(-1).values
        rank = place - first  # among the new ones of its bucket
        numbers = torch.zeros(batch, heads, rounds, self.count + 1, dtype=torch.int32, device=buckets.device)
        numbers.scatter_add_(-1, buckets, torch.ones_like(buckets, dtype=torch.int32))
        behind = numbers.gather(-1, buckets) - rank  # itself and those that follow it into the ring
        before = torch.nn.functional.pad(self.added, (0, 1)).gather(-1, buckets)
        slot = buckets * self.size + (before + rank) % self.size
        stays = (behind <= self.size) & (buckets < self.count)
        line = torch.arange(batch * heads * rounds, device=buckets.device).view(batch, heads, rounds, 1)
        slot = slot + line * (self.count * self.size)
        self.rings.view(-1)[slot[stays]] = tokens[stays]
        self.added += numbers[..., :-1]
        self.most = torch.maximum(self.most, self.added)

    def last(self, buckets: torch.Tensor) -> torch.Tensor:
        """The newest `window` members of one bucket a table, (B, H, R) → (B, H, R * window) int64; -1: fewer."""
        index = buckets.long()[..., None]
        number = self.added.gather(-1, index) - 1 - torch.arange(self.window, device=index.device)  # (B, H, R, window)
        ring = self.rings.gather(-2, index[..., None].expand(*index.shape, self.size)).squeeze(-2)
        found = ring.gather(-1, (number % self.size).long())
        return torch.where(number >= 0, found, -1).flatten(-2).long()

    def remove(self, buckets: torch.Tensor, gone: torch.Tensor) -> bool:
        """Take back the tokens put in last: buckets (B, H, R, N), and which of them are gone, (B, N) bool.

        Returns:
            Whether the rings still hold every window; otherwise they have to be filled anew.
        """
        ones = gone[:, None, None].expand_as(buckets).to(torch.int32)
        self.added.scatter_add_(-1, buckets.long(), -ones)
        oldest = (self.added - self.window).clamp(min=0)
        return not bool(((self.added > 0) & (oldest < self.most - self.size)).any())
