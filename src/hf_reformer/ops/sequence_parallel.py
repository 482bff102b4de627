"""One sequence over several processes, by exchanging heads (Jacobs et al. 2023, arXiv 2309.14509).

Every process holds a share of the tokens, and inside attention all tokens of a share of the heads. Sort orders
and windows belong to a head, so the result is that of one process.

Gradients follow torch's collectives: what all processes compute alike, such as the loss, counts once for each. So the
mean over the processes, as DistributedDataParallel takes it, is the gradient of one process.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class SequenceShard(NamedTuple):
    """A process's part of sequences of `length` tokens.

    Attributes:
        group: the processes that share a sequence; all are given the same inputs.
        rank, size: this process's number among them, and how many they are.
        length: tokens of the whole sequence.
    """

    group: Any
    rank: int
    size: int
    length: int

    def first(self, rank: int) -> int:
        """First token of a process's share; shares differ by at most one token."""
        small, longer = divmod(self.length, self.size)
        return rank * small + min(rank, longer)

    @property
    def begin(self) -> int:
        return self.first(self.rank)

    @property
    def end(self) -> int:
        return self.first(self.rank + 1)

    def shares(self) -> list[int]:
        """Number of tokens of every process."""
        return [self.first(rank + 1) - self.first(rank) for rank in range(self.size)]

    def own_heads(self, heads: int) -> slice:
        """The heads whose attention this process computes."""
        return slice(self.rank * heads // self.size, (self.rank + 1) * heads // self.size)


def make_sequence_shard(group: Any, length: int, heads: int) -> SequenceShard:
    """This process's part.

    Raises:
        ValueError: the heads cannot be divided evenly, or there are fewer tokens than processes.
    """
    size = dist.get_world_size(group)
    if heads % size:
        raise ValueError(
            f"{heads} attention heads cannot be shared evenly among {size} processes. Use a group whose size divides "
            "`num_attention_heads`."
        )
    if length < size:
        raise ValueError(
            f"The input has {length} tokens, fewer than the {size} processes that share it. Use a smaller group, or "
            "longer sequences."
        )
    return SequenceShard(group, dist.get_rank(group), size, length)


def check_group(group: Any) -> None:
    """Raise ValueError unless this process can share sequences within `group`."""
    if not isinstance(group, dist.ProcessGroup):
        member = group != dist.GroupMember.NON_GROUP_MEMBER
        raise ValueError(
            f"Sequences are shared by a `torch.distributed` process group, found {type(group).__name__}. Of a device "
            "mesh, give `mesh.get_group()`."
            if member
            else "This process is no member of the group that was to share sequences. Give every process the group "
            "that it is in: `torch.distributed.new_subgroups` returns it."
        )


def check_same_inputs(group: Any, device: torch.device, given: dict[str, Any]) -> None:
    """Raise ValueError unless all processes of the group were given the same, by the same names."""
    mine = torch.tensor([_fingerprint(value) for value in given.values()], dtype=torch.int64, device=device)
    low, high = mine.clone(), mine.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group)
    different = [f"`{name}`" for name, other in zip(given, (low != high).tolist(), strict=True) if other]
    if different:
        raise ValueError(
            f"Processes that share sequences were given different inputs: {', '.join(different)}. All of a group need "
            "the same: use `hf_reformer.distributed.SequenceParallelTrainer`, or a sampler that knows of the groups."
        )


def _fingerprint(value: Any) -> int:
    """An int64 that depends on shapes and numbers, not on their dtype; the same in every process."""
    if isinstance(value, torch.Tensor):
        return hash((*value.shape, int(_checksum(value).view(torch.int64))))
    if isinstance(value, dict):  # by name; what is None may be there or not
        return hash(tuple(_fingerprint(value[key]) for key in sorted(value) if value[key] is not None))
    if isinstance(value, list | tuple):
        return hash(tuple(_fingerprint(x) for x in value))
    return hash(value) if isinstance(value, int | float) else 0


def _checksum(x: torch.Tensor) -> torch.Tensor:
    """One float64 that depends on every number and on its place."""
    flat = x.detach().reshape(-1).double()
    return flat @ torch.arange(1, len(flat) + 1, dtype=torch.float64, device=x.device)


def broadcast(x: torch.Tensor, group: Any) -> torch.Tensor:
    """The x of the group's first process."""
    x = x.clone()
    dist.broadcast(x, dist.get_global_rank(group, 0), group=group)
    return x


def _all_to_all(parts: list[torch.Tensor], shapes: list[torch.Size], group: Any) -> list[torch.Tensor]:
    """Send part i to process i; what comes from each has the shape given."""
    sent = torch.cat([part.reshape(-1) for part in parts])
    sizes = [shape.numel() for shape in shapes]
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts], group=group)
    return [piece.view(shape) for piece, shape in zip(received.split(sizes), shapes, strict=True)]


def _all_to_all_heads(x: torch.Tensor, shard: SequenceShard) -> torch.Tensor:
    batch, heads, _, size = x.shape
    own = heads // shard.size
    shapes = [torch.Size((batch, own, share, size)) for share in shard.shares()]
    return torch.cat(_all_to_all(list(x.split(own, dim=1)), shapes, shard.group), dim=2)


def _all_to_all_tokens(x: torch.Tensor, shard: SequenceShard) -> torch.Tensor:
    batch, own, _, size = x.shape
    shapes = [torch.Size((batch, own, shard.end - shard.begin, size))] * shard.size
    return torch.cat(_all_to_all(list(x.split(shard.shares(), dim=2)), shapes, shard.group), dim=1)


def _summed(x: torch.Tensor, shard: SequenceShard) -> torch.Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=shard.group)
    return x


def _gathered(x: torch.Tensor, shard: SequenceShard) -> torch.Tensor:
    batch, _, *rest = x.shape
    shapes = [torch.Size((batch, share, *rest)) for share in shard.shares()]
    return torch.cat(_all_to_all([x] * shard.size, shapes, shard.group), dim=1)


def _scattered(x: torch.Tensor, shard: SequenceShard) -> torch.Tensor:
    """The sum of all processes' x, each its own tokens of it."""
    batch, _, *rest = x.shape
    shapes = [torch.Size((batch, shard.end - shard.begin, *rest))] * shard.size
    return torch.stack(_all_to_all(list(x.split(shard.shares(), dim=1)), shapes, shard.group)).sum(0)


class _Exchange(torch.autograd.Function):
    """A linear map over all processes; its gradient is that of the adjoint map."""

    @staticmethod
    def forward(ctx, x, shard, exchange, adjoint):
        ctx.shard, ctx.adjoint = shard, adjoint
        return exchange(x, shard)

    @staticmethod
    def backward(ctx, grad):
        return ctx.adjoint(grad, ctx.shard), None, None, None


def all_to_all_heads(x: torch.Tensor, shard: SequenceShard) -> torch.Tensor:
    """(B, H, own tokens, D) → (B, own heads, T, D)"""
    return _Exchange.apply(x, shard, _all_to_all_heads, _all_to_all_tokens)


def all_to_all_tokens(x: torch.Tensor, shard: SequenceShard) -> torch.Tensor:
    """(B, own heads, T, D) → (B, H, own tokens, D)"""
    return _Exchange.apply(x, shard, _all_to_all_tokens, _all_to_all_heads)


def local_tokens(x: torch.Tensor | None, shard: SequenceShard | None) -> torch.Tensor | None:
    """(B, T, ...) → (B, own tokens, ...); everything where nothing is shared."""
    return x if x is None or shard is None else x[:, shard.begin : shard.end]


def gather_sequence(x: torch.Tensor, shard: SequenceShard | None) -> torch.Tensor:
    """(B, own tokens, ...) → (B, T, ...), on every process."""
    return x if shard is None else _Exchange.apply(x, shard, _gathered, _scattered)


def all_reduce(x: torch.Tensor, shard: SequenceShard | None) -> torch.Tensor:
    """Every process's x added up."""
    return x if shard is None else _Exchange.apply(x, shard, _summed, _summed)


def tokens_at(hidden: torch.Tensor, places: torch.Tensor, shard: SequenceShard | None) -> torch.Tensor:
    """(B, own tokens, D) and places (B, N) in the whole sequence → (B, N, D), on every process."""
    begin, end = (0, hidden.shape[1]) if shard is None else (shard.begin, shard.end)
    found = hidden.gather(1, (places - begin).clamp(0, end - begin - 1)[..., None].expand(-1, -1, hidden.shape[2]))
    if shard is None:
        return found
    mine = (places >= begin) & (places < end)
    return all_reduce(torch.where(mine[..., None], found, 0), shard)
