"""From tensors to kernel launches: `run_forward` and `run_backward` without autograd."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from ...hashing import Orders
from ...randomness import keep_threshold
from . import backward, forward
from .tiles import Tiles, choose_tiles


class Call(NamedTuple):
    """What all launches of one call have in common."""

    tensors: dict  # arguments that are tensors or None
    numbers: dict  # arguments that are numbers or constants
    orders: Orders
    shape: tuple[int, int, int, int]  # B, H, T, R
    dtype: torch.dtype

    def tiles(self, kernel: str) -> Tiles:
        size = max(self.numbers["BLOCK"], self.numbers["VALUE_BLOCK"])
        return choose_tiles(kernel, self.dtype, size)

    def of_round(self, index: int) -> dict:
        """All arguments of one round."""
        earlier = index if self.orders.count_once else 0
        return {**self.tensors, **self.numbers, "round": index, "EARLIER": earlier, "FIRST": index == 0}

    def programs(self, rows: int) -> tuple[int]:
        batch, heads, length, _ = self.shape
        return (triton.cdiv(length, rows) * batch * heads,)


def empty_rows(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(B, H, T, D), uninitialised, in memory (B, T, H, D): the layout of a projection."""
    batch, heads, length, size = shape
    return torch.empty(batch, length, heads, size, dtype=dtype, device=device).transpose(1, 2)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) in memory (B, T, H, D); no copy if it lies so already."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def block_of(size: int) -> int:
    """A head size padded to what a tensor core takes."""
    return max(16, triton.next_power_of_2(size))


def key_factor(query: torch.Tensor) -> torch.Tensor:
    """(B, H, T) float32: `reference.shared_key` is the query times this."""
    size = query.shape[-1]
    mean = torch.linalg.vector_norm(query, dim=-1, dtype=torch.float32).square() / size
    return (torch.rsqrt(mean + 1e-6) * size**-0.5).contiguous()


def by_token(orders: Orders) -> dict:
    """Place and places seen of every token, for telling what earlier rounds show; None where nobody asks."""
    rounds, length = orders.line.shape[2:]
    names = ("place_of", "lowest_of", "highest_of")
    if not orders.count_once or rounds == 1:
        return dict.fromkeys(names)
    found = {name: torch.empty_like(orders.line) for name in names}
    places, block = orders.line.numel(), 1024
    programs = (triton.cdiv(places, block),)
    forward.invert_orders[programs](
        *orders[:3], **found, places=places, length=length, total=rounds * length, BLOCK=block
    )
    return found


def prepare(query, key, value, orders: Orders, mask, dropout_key, causal: bool, dropout: float) -> Call:
    batch, heads, length, size = query.shape
    query, value = as_rows(query), as_rows(value)
    line, lo, hi = (x.expand(batch, -1, -1, -1).contiguous() for x in orders[:3])
    orders = orders._replace(line=line, lo=lo, hi=hi)
    padded = mask is not None and not orders.count_once
    tensors = {
        "query": query,
        "key": query if key is None else as_rows(key),
        "value": value,
        "factor": key_factor(query) if key is None else None,
        "line": orders.line,
        "lo": orders.lo,
        "hi": orders.hi,
        **by_token(orders),
        "real": mask.contiguous().view(torch.uint8) if padded else None,
        "dropout_key": dropout_key,
    }
    numbers = {
        "length": length,
        "heads": heads,
        "order_heads": orders.line.shape[1],
        "rounds": orders.line.shape[2],
        "threshold": min(keep_threshold(dropout), 2**31 - 1),
        "keep_scale": 1 / (1 - dropout) if dropout < 1 else 0.0,
        "SIZE": size,
        "VALUE_SIZE": value.shape[-1],
        "BLOCK": block_of(size),
        "VALUE_BLOCK": block_of(value.shape[-1]),
        "SHARED": key is None,
        "CAUSAL": causal,
        "PADDED": padded,
        "COUNT_ONCE": orders.count_once,
        "DROPOUT": dropout_key is not None,
    }
    return Call(tensors, numbers, orders, (batch, heads, length, orders.line.shape[2]), query.dtype)


def launch(kernel, call: Call, tiles: Tiles, rows: int, arguments: dict) -> None:
    kernel[call.programs(rows)](
        **arguments, QUERIES=tiles.queries, KEYS=tiles.keys, num_warps=tiles.warps, num_stages=tiles.stages
    )


def run_forward(
    query, key, value, orders, mask, dropout_key, causal, dropout
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D) in value's dtype, and every token's maximum and sum (B, H, T) float32, in units of log 2."""
    with torch.cuda.device_of(query):
        call = prepare(query, key, value, orders, mask, dropout_key, causal, dropout)
        batch, heads, length, rounds = call.shape
        shape = (batch, heads, length, value.shape[-1])
        out = empty_rows(shape, value.dtype, value.device)
        sums = _accumulator(out, rounds > 1)
        top, mass = (torch.empty(shape[:3], dtype=torch.float32, device=value.device) for _ in range(2))
        tiles = call.tiles("forward")
        for index in range(rounds):
            last = index == rounds - 1
            own = {"sums": sums, "out": out if last else sums, "top": top, "mass": mass, "LAST": last}
            launch(forward.forward_round, call, tiles, tiles.queries, {**call.of_round(index), **own})
    return out, top, mass


def run_backward(
    query, key, value, orders, mask, dropout_key, causal, dropout, out, top, mass, grad
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Gradients of query, key (None in shared query/key attention) and value, in their dtype."""
    with torch.cuda.device_of(query):
        call = prepare(query, key, value, orders, mask, dropout_key, causal, dropout)
        rounds = call.shape[3]
        several, shared = rounds > 1, key is None
        dq, dk, dv = (None if x is None else empty_rows(x.shape, x.dtype, x.device) for x in (query, key, value))
        query_sums = _accumulator(dq, several or shared)
        key_sums = query_sums if shared else _accumulator(dk, several)
        value_sums = _accumulator(dv, several)
        saved = {"grad": as_rows(grad), "top": top, "mass": mass, "drift": torch.empty_like(top)}
        tiles = call.tiles("backward_queries")
        for index in range(rounds):
            last = index == rounds - 1 and not shared  # the keys' part of a shared query is added below
            own = {**saved, "out": as_rows(out), "sums": query_sums, "target": dq if last else query_sums}
            launch(backward.backward_queries_round, call, tiles, tiles.queries, {**call.of_round(index), **own})
        tiles = call.tiles("backward_keys")
        orders = call.orders
        reach = {
            # Windows reach `before` and `after` from every place, chunks from the ends of a chunk.
            "reach": 1 if orders.count_once else orders.tile,
            "before": orders.before,
            "after": orders.after,
        }
        for index in range(rounds):
            last = index == rounds - 1
            own = {
                **saved,
                **reach,
                "sums": key_sums,
                "target": (dq if shared else dk) if last else key_sums,
                "value_sums": value_sums,
                "value_target": dv if last else value_sums,
            }
            launch(backward.backward_keys_round, call, tiles, tiles.keys, {**call.of_round(index), **own})
    return dq, dk, dv


def _accumulator(result: torch.Tensor, needed: bool) -> torch.Tensor:
    """Where a sum in float32 gathers before it is written to `result`, which serves itself if it is float32."""
    if not needed or result.dtype == torch.float32:
        return result
    return empty_rows(result.shape, torch.float32, result.device)
