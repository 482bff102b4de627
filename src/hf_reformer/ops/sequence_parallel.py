"""Sequence parallelism: processes share a sequence by exchanging heads (Jacobs et al. 2023, arXiv 2309.14509).

Every process holds a share of the tokens and, within attention, all tokens of a share of the heads. Sort orders and
windows are per head, so the result equals that of a single process.

Gradients follow torch's collectives: values that all processes compute, such as the loss, count once per process. The
mean over processes, as in DistributedDataParallel, is thus the gradient of a single process.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class SequenceShard(NamedTuple):
    """The part of a process in sequences that several processes share."""

    group: Any  # the processes that share a sequence; all get the same inputs
    rank: int  # rank of this process in the group
    size: int  # number of processes in the group
    length: int  # number of tokens of the whole sequence

    def first(self, rank: int) -> int:
        """Return the first token of a process's share; shares differ by at most one token."""
        small, longer = divmod(self.length, self.size)
        return rank * small + min(rank, longer)

    @property
    def begin(self) -> int:
        return self.first(self.rank)

    @property
    def end(self) -> int:
        return self.first(self.rank + 1)

    def shares(self) -> list[int]:
        """Return the number of tokens of every process."""
        return [self.first(rank + 1) - self.first(rank) for rank in range(self.size)]

    def own_heads(self, heads: int) -> slice:
        """Return the heads whose attention this process computes."""
        return slice(self.rank * heads // self.size, (self.rank + 1) * heads // self.size)


def make_sequence_shard(group: Any, length: int, heads: int) -> SequenceShard:
    """Make the shard of this process.

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
            f"Sequences must be shared by a `torch.distributed` process group, but got {type(group).__name__}. For "
            "a device mesh, pass `mesh.get_group()`."
            if member
            else "This process is not a member of the given sequence-parallel group. Give each process the group it "
            "belongs to: `torch.distributed.new_subgroups` returns it."
        )


def check_same_inputs(group: Any, device: torch.device, inputs: dict[str, Any]) -> None:
    """Raise ValueError unless all processes of the group have the same inputs."""
    mine = torch.tensor([_fingerprint(value) for value in inputs.values()], dtype=torch.int64, device=device)
    low, high = mine.clone(), mine.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group)
    dist.all_reduce(high, dist.ReduceOp.MAX, group)
    different = [f"`{name}`" for name, other in zip(inputs, (low != high).tolist(), strict=True) if other]
    if different:
        raise ValueError(
            f"Processes that share sequences were given different inputs: {', '.join(different)}. All of a group need "
            "the same: use `hf_reformer.training.distributed.SequenceParallelTrainer`, or a sampler that knows the "
            "groups."
        )


def _fingerprint(value: Any) -> int:
    """Compute an int64 that depends on shapes and values, but not on dtypes; the same in every process."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().reshape(-1).double()  # a float64 that depends on every value and its position
        total = flat @ torch.arange(1, len(flat) + 1, dtype=torch.float64, device=value.device)
        return hash((*value.shape, int(total.view(torch.int64))))
    if isinstance(value, dict):  # by name; a missing value is equal to None
        return hash(tuple(_fingerprint(value[key]) for key in sorted(value) if value[key] is not None))
    if isinstance(value, list | tuple):
        return hash(tuple(_fingerprint(x) for x in value))
    return hash(value) if isinstance(value, int | float) else 0


def broadcast(x: torch.Tensor, group: Any) -> torch.Tensor:
    """Return the x of the first process in the group."""
    x = x.clone()
    dist.broadcast(x, dist.get_global_rank(group, 0), group=group)
    return x


class _Exchange(torch.autograd.Function):
    """A linear map over all processes, whose gradient is given by the adjoint map."""

    @staticmethod
    def forward(ctx, x, exchange, adjoint):
        ctx.adjoint = adjoint
        return exchange(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.adjoint(grad), None, None


def _send(x: torch.Tensor, sizes: list[int], received_sizes: list[int], group: Any) -> torch.Tensor:
    received = x.new_empty(sum(received_sizes))
    dist.all_to_all_single(received, x.contiguous(), received_sizes, sizes, group=group)
    return received


def _sum(x: torch.Tensor, group: Any) -> torch.Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def _all_to_all(parts: Iterable[torch.Tensor], shapes: list[tuple], group: Any) -> list[torch.Tensor]:
    """Send part i to process i; return what each process sent, in the given shapes."""
    flat = [part.reshape(-1) for part in parts]
    sizes, received_sizes = [x.numel() for x in flat], [math.prod(shape) for shape in shapes]
    forth = partial(_send, sizes=sizes, received_sizes=received_sizes, group=group)
    back = partial(_send, sizes=received_sizes, received_sizes=sizes, group=group)
    received = _Exchange.apply(torch.cat(flat), forth, back)
    return [x.view(shape) for x, shape in zip(received.split(received_sizes), shapes, strict=True)]


def all_to_all_heads(x: torch.Tensor, shard: SequenceShard) -> torch.Tensor:
    """Exchange own tokens of all heads for all tokens of own heads: (B, H, own tokens, D) → (B, own heads, T, D)."""
    batch, heads, _, size = x.shape
    own = heads // shard.size
    shapes = [(batch, own, share, size) for share in shard.shares()]
    return torch.cat(_all_to_all(x.split(own, dim=1), shapes, shard.group), dim=2)


def all_to_all_tokens(x: torch.Tensor, shard: SequenceShard) -> torch.Tensor:
    """Exchange all tokens of own heads for own tokens of all heads: (B, own heads, T, D) → (B, H, own tokens, D)."""
    shape = (*x.shape[:2], shard.end - shard.begin, x.shape[3])
    return torch.cat(_all_to_all(x.split(shard.shares(), dim=2), [shape] * shard.size, shard.group), dim=1)


def gather_sequence(x: torch.Tensor, shard: SequenceShard | None) -> torch.Tensor:
    """Gather all tokens on every process: (B, own tokens, ...) → (B, T, ...)."""
    if shard is None:
        return x
    shapes = [(x.shape[0], share, *x.shape[2:]) for share in shard.shares()]
    return torch.cat(_all_to_all(x.expand(shard.size, *x.shape), shapes, shard.group), dim=1)


def all_reduce(x: torch.Tensor, shard: SequenceShard | None) -> torch.Tensor:
    """Sum x over all processes."""
    if shard is None:
        return x
    add = partial(_sum, group=shard.group)
    return _Exchange.apply(x, add, add)


def local_tokens(x: torch.Tensor | None, shard: SequenceShard | None) -> torch.Tensor | None:
    """Return this process's tokens, (B, T, ...) → (B, own tokens, ...); all of them without a shard."""
    return x if x is None or shard is None else x[:, shard.begin : shard.end]


def tokens_at(hidden: torch.Tensor, positions: torch.Tensor, shard: SequenceShard | None) -> torch.Tensor:
    """Gather states, (B, own tokens, D), at positions (B, N) of the whole sequence: (B, N, D), on every process."""
    index = positions if shard is None else positions - shard.begin
    inside = (index >= 0) & (index < hidden.shape[1])
    states = hidden.gather(1, index.clamp(0, hidden.shape[1] - 1)[..., None].expand(-1, -1, hidden.shape[2]))
    return states if shard is None else all_reduce(torch.where(inside[..., None], states, 0), shard)
