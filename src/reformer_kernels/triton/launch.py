"""Kernel launches: `run_forward` and `run_backward`, without autograd."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..attention_op import AttentionArgs, empty_rows
from ..contract import check_positions, keep_threshold
from .backward import Saved, backward_keys_round, backward_queries_round
from .forward import forward_round, invert_permutations
from .pairs import Inputs, Kind, Numbers
from .sweep import sweep_keys_round, sweep_queries_round
from .tiles import choose_tiles
from .torch_ops import compute_dtype


class LaunchArgs(NamedTuple):
    """Arguments shared by all launches of one call."""

    inputs: Inputs
    numbers: Numbers
    kind: Kind
    windows: dict[str, int]  # reaches are relative to every position (window rule) or to the ends of chunks
    rounds: int
    query_weights: torch.Tensor | None
    scale: float  # scale of the keys, which is already applied


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Lay out (B, H, T, D) as (B, T, H, D) in memory, aligned to 16 bytes; copies only if needed.

    The alignment matters since Triton compiles another kernel for other addresses, and equal inputs must give equal
    bits.
    """
    x = x.transpose(1, 2).contiguous()
    return (x if x.data_ptr() % 16 == 0 else x.clone()).transpose(1, 2)


def block_of(size: int) -> int:
    """Pad a head size to one that tensor cores support."""
    return max(16, triton.next_power_of_2(size))


def capability_of(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a GPU; for a CPU, which interprets kernels, the lowest one supported."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def key_factor(query: torch.Tensor) -> torch.Tensor:
    """Return the factors by which queries are multiplied in `reference.shared_key`, (B, H, T) float32."""
    size = query.shape[-1]
    mean = torch.linalg.vector_norm(query, dim=-1, dtype=torch.float32).square() / size
    return (torch.rsqrt(mean + 1e-6) * size**-0.5).contiguous()


def by_token(perm: torch.Tensor, window_start: torch.Tensor, window_end: torch.Tensor) -> list[torch.Tensor]:
    """Return sorted position, window start and end by token, which tell if pairs are visible in earlier rounds."""
    rounds, length = perm.shape[2:]
    inverse = [torch.empty_like(perm) for _ in range(3)]
    positions, block = perm.numel(), 1024
    grid = (triton.cdiv(positions, block),)
    invert_permutations[grid](
        perm, window_start, window_end, *inverse, positions, length, rounds * length, BLOCK=block
    )
    return inverse


def prepare(args: AttentionArgs) -> LaunchArgs:
    """Convert the op's arguments to those of the kernels.

    Raises:
        ValueError: there are more sorted positions than `contract.MAX_POSITIONS`.
    """
    check_positions(args.perm)
    batch, heads, _, size = args.query.shape
    dtype, shared = compute_dtype(args.query, args.key, args.value), args.key is None
    query, value = as_rows(args.query.to(dtype)), as_rows(args.value.to(dtype))
    key = query if args.key is None else as_rows(args.key.to(dtype) * args.scale)
    layout = [x.expand(batch, -1, -1, -1).contiguous() for x in (args.perm, args.window_start, args.window_end)]
    layout_heads, rounds = args.perm.shape[1:3]
    inverse = by_token(*layout) if args.dedup_pairs and rounds > 1 else [None] * 3
    mask, dropout_key = None if args.dedup_pairs else args.mask, args.dropout_key
    if dropout_key is not None and not dropout_key.dim():  # without the index of the first head
        dropout_key = torch.stack([dropout_key, torch.zeros_like(dropout_key)])
    factor = key_factor(query) if shared else None
    real = None if mask is None else mask.contiguous().view(torch.uint8)
    inputs = [query, key, value, factor, *layout, *inverse, real, dropout_key]
    keep_scale = 1 / (1 - args.dropout) if args.dropout < 1 else 0.0
    kind = Kind(
        size, value.shape[-1], block_of(size), block_of(value.shape[-1]), shared, args.dedup_pairs,
        causal=args.causal and not args.dedup_pairs, padded=mask is not None, dropout=dropout_key is not None,
    )  # fmt: skip
    windows = {"left_reach": args.left_reach, "right_reach": args.right_reach}
    windows["block_size"] = 1 if args.dedup_pairs else args.block_size
    numbers = Numbers(heads, layout_heads, rounds, keep_threshold(args.dropout), keep_scale)
    return LaunchArgs(Inputs(*inputs), numbers, kind, windows, rounds, args.query_weights, args.scale)


def launch(kernel: Any, name: str, args: LaunchArgs, index: int, **options: Any) -> None:
    """Launch `kernel` for round `index`; `name`: its name in `tiles.choose_tiles`; `options`: its own arguments."""
    batch, heads, length, _ = args.inputs.query.shape
    query, widest = args.inputs.query, max(args.kind.block, args.kind.value_block)
    queries, keys, warps, stages = choose_tiles(name, query.dtype, widest, capability_of(query.device))
    last = name == "forward" and index == args.rounds - 1  # the last round is special only for this kernel
    kind = args.kind._replace(queries=queries, keys=keys, first=index == 0, last=last)
    grid = (batch * heads * triton.cdiv(length, keys if name.endswith("_keys") else queries),)
    options |= {"inputs": args.inputs, "numbers": args.numbers, "length": length, "round": index}
    kernel[grid](**options, kind=Kind(*map(tl.constexpr, kind)), num_warps=warps, num_stages=stages)


def run_forward(args: LaunchArgs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute output, (B, H, T, D), row maxima (in units of log 2) and sums, (B, H, T), and attention mass, (B, T)."""
    value = args.inputs.value
    out = empty_rows(value, value.dtype)
    sums = _accumulator(out, args.rounds > 1)
    row_max, row_sum = (torch.empty(value.shape[:3], dtype=torch.float32, device=value.device) for _ in range(2))
    rows = {"row_max": row_max, "row_sum": row_sum}
    for index in range(args.rounds):
        last = index == args.rounds - 1
        launch(forward_round, "forward", args, index, sums=sums, out=out if last else sums, **rows)
    if args.query_weights is None:
        return out, row_max, row_sum, row_max.new_empty(0)
    mass, weights = torch.empty_like(row_max), args.query_weights.float().contiguous()
    for index in range(args.rounds):
        launch(sweep_keys_round, "sweep_keys", args, index, **rows, query_weights=weights, mass=mass, **args.windows)
    return out, row_max, row_sum, mass.sum(1)


def run_backward(
    args: LaunchArgs, out: torch.Tensor, row_max: torch.Tensor, row_sum: torch.Tensor, grad_out: torch.Tensor,
    grad_mass: torch.Tensor | None,
) -> list[torch.Tensor]:  # fmt: skip
    """Compute gradients of query, value and, unless it is shared, key, from those of output and attention mass."""
    several, shared = args.rounds > 1, args.kind.shared
    grad_query, grad_key, grad_value = (empty_rows(x, x.dtype) for x in args.inputs[:3])
    query_sums = _accumulator(grad_query, several or shared)
    key_sums = query_sums if shared else _accumulator(grad_key, several)
    value_sums = _accumulator(grad_value, several)
    of_mass: tuple = ()
    if grad_mass is not None and args.query_weights is not None:
        weights, grad_mass = (x.float().contiguous() for x in (args.query_weights, grad_mass))
        of_mass = weights, grad_mass, (mass_dot := torch.empty_like(row_max))
        rows = {"row_max": row_max, "row_sum": row_sum, "grad_mass": grad_mass, "mass_dot": mass_dot}
        for index in range(args.rounds):
            launch(sweep_queries_round, "sweep_queries", args, index, **rows)
        args = args._replace(kind=args.kind._replace(has_grad_mass=True))
    saved = Saved(as_rows(out), as_rows(grad_out), row_max, row_sum, torch.empty_like(row_max), *of_mass)
    for index in range(args.rounds):
        last = index == args.rounds - 1 and not shared  # the keys' part of a shared query is added below
        target = grad_query if last else query_sums
        launch(backward_queries_round, "backward_queries", args, index, saved=saved, sums=query_sums, target=target)
    for index in range(args.rounds):
        last = index == args.rounds - 1
        options = {"saved": saved, "sums": key_sums, "value_sums": value_sums, **args.windows}
        target, value_target = (grad_query if shared else grad_key, grad_value) if last else (key_sums, value_sums)
        launch(backward_keys_round, "backward_keys", args, index, target=target, value_target=value_target, **options)
    return [grad_query, grad_value] if shared else [grad_query, grad_value, grad_key * args.scale]


def _accumulator(result: torch.Tensor, needed: bool) -> torch.Tensor:
    """Return a float32 buffer for sums before they are written to `result`, or `result` itself if it suffices."""
    return empty_rows(result, torch.float32) if needed and result.dtype != torch.float32 else result
