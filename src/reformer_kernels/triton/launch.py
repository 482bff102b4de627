"""From tensors to kernel launches: `run_forward` and `run_backward` without autograd."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hf_reformer.ops.layout import AttentionLayout
from hf_reformer.ops.prng import keep_threshold

from .backward import Saved, backward_keys_round, backward_queries_round
from .forward import forward_round, invert_orders
from .pairs import Inputs, Kind, Numbers
from .sweep import sweep_keys_round, sweep_queries_round
from .tiles import choose_tiles


class Call(NamedTuple):
    """What all launches of one call have in common."""

    inputs: Inputs
    numbers: Numbers
    kind: Kind
    orders: AttentionLayout

    @property
    def rounds(self) -> int:
        return self.orders.perm.shape[2]


def empty_rows(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(B, H, T, D), uninitialised, in memory (B, T, H, D): the layout of a projection."""
    batch, heads, length, size = shape
    return torch.empty(batch, length, heads, size, dtype=dtype, device=device).transpose(1, 2)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D) in memory (B, T, H, D), at an address that is a multiple of 16; no copy if it lies so already.

    The address, because Triton compiles another kernel for other ones, and equal inputs must give equal bits.
    """
    x = x.transpose(1, 2).contiguous()
    return (x if x.data_ptr() % 16 == 0 else x.clone()).transpose(1, 2)


def block_of(size: int) -> int:
    """A head size padded to what a tensor core takes."""
    return max(16, triton.next_power_of_2(size))


def key_factor(query: torch.Tensor) -> torch.Tensor:
    """(B, H, T) float32: `reference.shared_key` is the query times this."""
    size = query.shape[-1]
    mean = torch.linalg.vector_norm(query, dim=-1, dtype=torch.float32).square() / size
    return (torch.rsqrt(mean + 1e-6) * size**-0.5).contiguous()


def by_token(orders: AttentionLayout) -> dict[str, torch.Tensor | None]:
    """Place and places seen of every token, for telling what earlier rounds show; None where nobody asks."""
    names = ("place_of", "lowest_of", "highest_of")
    rounds, length = orders.perm.shape[2:]
    if not orders.dedup_pairs or rounds == 1:
        return dict.fromkeys(names)
    found = {name: torch.empty_like(orders.perm) for name in names}
    places, block = orders.perm.numel(), 1024
    sizes = {"places": places, "length": length, "total": rounds * length}
    invert_orders[(triton.cdiv(places, block),)](*orders[:3], **found, **sizes, BLOCK=block)
    return found


def with_first_head(key: torch.Tensor | None) -> torch.Tensor | None:
    """A dropout key as `reference.pair_keys` takes it, (2) always."""
    return key if key is None or key.dim() else torch.stack([key, torch.zeros_like(key)])


def prepare(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor,
    line: torch.Tensor,
    lo: torch.Tensor,
    hi: torch.Tensor,
    mask: torch.Tensor | None,
    dropout_key: torch.Tensor | None,
    tile: int,
    before: int,
    after: int,
    dedup_pairs: bool,
    causal: bool,
    dropout: float,
) -> Call:
    """The arguments of `operator.triton_attention`, as the kernels take them."""
    batch, heads, _, size = query.shape
    value_size = value.shape[-1]
    query, value = as_rows(query), as_rows(value)
    line, lo, hi = (x.expand(batch, -1, -1, -1).contiguous() for x in (line, lo, hi))
    orders = AttentionLayout(line, lo, hi, tile, before, after, dedup_pairs)
    padded = mask is not None and not dedup_pairs
    inputs = Inputs(
        query,
        query if key is None else as_rows(key),
        value,
        key_factor(query) if key is None else None,
        line,
        lo,
        hi,
        **by_token(orders),
        real=mask.contiguous().view(torch.uint8) if padded else None,
        dropout_key=with_first_head(dropout_key),
    )
    keep_scale = 1 / (1 - dropout) if dropout < 1 else 0.0
    threshold = min(keep_threshold(dropout), 2**31 - 1)
    kind = Kind(
        size,
        value_size,
        block_of(size),
        block_of(value_size),
        shared=key is None,
        dedup_pairs=dedup_pairs,
        causal=causal and not dedup_pairs,
        padded=padded,
        dropout=dropout_key is not None,
    )
    return Call(inputs, Numbers(heads, line.shape[1], line.shape[2], threshold, keep_scale), kind, orders)


def launch(kernel, name: str, call: Call, index: int, **own) -> None:
    """Launch `kernel` for round `index`; `name` is what `tiles.choose_tiles` calls it, `own` its own arguments."""
    batch, heads, length, _ = call.inputs.query.shape
    queries, keys, warps, stages = choose_tiles(
        name, call.inputs.query.dtype, max(call.kind.block, call.kind.value_block)
    )
    tiles = triton.cdiv(length, keys if name.endswith("_keys") else queries)
    kernel[(batch * heads * tiles,)](
        inputs=call.inputs, numbers=call.numbers, length=length, round=index, **own,
        kind=Kind(*map(tl.constexpr, call.kind)), QUERIES=queries, KEYS=keys, FIRST=index == 0,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip


def run_forward(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output (B, H, T, D) in value's dtype, and every token's maximum and sum (B, H, T) float32, in units of log 2."""
    value = call.inputs.value
    out = empty_rows(value.shape, value.dtype, value.device)
    sums = _accumulator(out, call.rounds > 1)
    top, mass = (torch.empty(value.shape[:3], dtype=torch.float32, device=value.device) for _ in range(2))
    for index in range(call.rounds):
        last = index == call.rounds - 1
        own = {"sums": sums, "out": out if last else sums, "top": top, "mass": mass, "LAST": last}
        launch(forward_round, "forward", call, index, **own)
    return out, top, mass


def windows_of(orders: AttentionLayout) -> dict[str, int]:
    """Windows reach `before` and `after` from every place, chunks from the ends of a chunk."""
    return {
        "reach": 1 if orders.dedup_pairs else orders.block_size,
        "before": orders.left_reach,
        "after": orders.right_reach,
    }


def run_received(call: Call, top: torch.Tensor, mass: torch.Tensor, paid: torch.Tensor) -> torch.Tensor:
    """What every token receives, (B, T) float32: the sum over heads and queries of weight * paid, (B, T)."""
    own = {"top": top, "mass": mass, "paid": paid.contiguous(), "received": torch.empty_like(top)}
    for index in range(call.rounds):
        launch(sweep_keys_round, "sweep_keys", call, index, **own, **windows_of(call.orders))
    return own["received"].sum(1)


def _pushes(call: Call, top: torch.Tensor, mass: torch.Tensor, push: torch.Tensor) -> torch.Tensor:
    """(B, H, T) float32: the sum over keys of weight * push, (B, T)."""
    own = {"top": top, "mass": mass, "push": push, "pushes": torch.empty_like(top)}
    for index in range(call.rounds):
        launch(sweep_queries_round, "sweep_queries", call, index, **own)
    return own["pushes"]


def run_backward(
    call: Call,
    out: torch.Tensor,
    top: torch.Tensor,
    mass: torch.Tensor,
    grad: torch.Tensor,
    paid: torch.Tensor | None = None,
    push: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Gradients of query, value and, unless it is shared, key, in their dtype; `grad` is that of `out`.

    paid, push: (B, T) float32, where what tokens receive has a gradient too, `push`.
    """
    several, shared = call.rounds > 1, call.kind.shared
    dq, dk, dv = (empty_rows(x.shape, x.dtype, x.device) for x in call.inputs[:3])
    query_sums = _accumulator(dq, several or shared)
    key_sums = query_sums if shared else _accumulator(dk, several)
    value_sums = _accumulator(dv, several)
    more: tuple = ()
    if paid is not None and push is not None:
        paid, push = paid.contiguous(), push.contiguous()
        more = paid, push, _pushes(call, top, mass, push)
        call = call._replace(kind=call.kind._replace(pushed=True))
    saved = Saved(as_rows(out), as_rows(grad), top, mass, torch.empty_like(top), *more)
    for index in range(call.rounds):
        last = index == call.rounds - 1 and not shared  # the keys' part of a shared query is added below
        own = {"saved": saved, "sums": query_sums, "target": dq if last else query_sums}
        launch(backward_queries_round, "backward_queries", call, index, **own)
    for index in range(call.rounds):
        last = index == call.rounds - 1
        own = {
            "saved": saved,
            "sums": key_sums,
            "target": (dq if shared else dk) if last else key_sums,
            "value_sums": value_sums,
            "value_target": dv if last else value_sums,
        }
        launch(backward_keys_round, "backward_keys", call, index, **own, **windows_of(call.orders))
    return [dq, dv] if shared else [dq, dv, dk]


def _accumulator(result: torch.Tensor, needed: bool) -> torch.Tensor:
    """Where a sum in float32 gathers before it is written to `result`, which serves itself if it is float32."""
    if not needed or result.dtype == torch.float32:
        return result
    return empty_rows(result.shape, torch.float32, result.device)
