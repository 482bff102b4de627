"""Attention cores of hf_reformer and the baselines: hash, sort, attention, combination of rounds, nothing else.

All take projected q, v of shape (B, H, T, D) in the projection's memory layout, i.e. (B, T, H, D) transposed, and
return the same shape. Queries are also the keys, and all compute the gradients of both inputs.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from hf_reformer.configuration_reformer import default_num_buckets
from hf_reformer.ops.dispatch import chunk_layout, lsh_buckets, window_layout, window_rotations, windowed_attention
from hf_reformer.ops.layout import AttentionLayout
from hf_reformer.ops.lsh import Centering, exploration_buckets, legacy_num_buckets, num_buckets_total
from hf_reformer.ops.prng import make_key

from .cases import BACKWARD, FORWARD, Case

BATCH, HEADS, SIZE, CHUNK, WINDOW = 1, 8, 64, 64, 96

Core = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # q, v: (B, H, T, D) → out, of the same shape


@functools.lru_cache(maxsize=2)  # the warm-up's length, and the measured one
def inputs(length: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Draw q, v and the gradient of the output, standard normal, (B, H, T, D): the same tensors for all."""
    torch.manual_seed(0)
    shape = BATCH, length, HEADS, SIZE
    return [torch.randn(shape, device=device, dtype=dtype).transpose(1, 2) for _ in range(3)]


def inputs_of(case: Case) -> list[torch.Tensor]:
    return inputs(case.length, case.device, case.torch_dtype)


def run_function(function: Core, case: Case, work: str) -> Callable[[], Any]:
    """Make a call of `function`: forward, backward only, or both. It returns the results, so that they are kept."""
    q, v, grad = inputs_of(case)
    if work == FORWARD:
        return torch.no_grad()(lambda: function(q, v))
    q, v = q.detach().requires_grad_(), v.detach().requires_grad_()
    if work == BACKWARD:
        out = function(q, v)
        return lambda: torch.autograd.grad(out, [q, v], grad, retain_graph=True)

    def both() -> Any:
        made = function(q, v)
        return made.detach(), torch.autograd.grad(made, [q, v], grad)

    return both


# --- hf_reformer


def num_buckets_for(mode: str, length: int, window: int = WINDOW) -> int | tuple[int, ...]:
    """Return the number of buckets for the length: in chunk mode by the legacy rule, as in transformers."""
    return legacy_num_buckets(length, CHUNK, length) if mode == "chunk" else default_num_buckets(length, window)


def make_layout(
    mode: str,
    q: torch.Tensor,
    rounds: int,
    causal: bool,
    *,
    window: int = WINDOW,
    position: bool = False,
    exploration: int = 0,
    centered: bool = True,
    backend: str = "auto",
) -> AttentionLayout:
    """Hash and sort in one of the attention modes, with newly drawn rotations as in training.

    `position` and `exploration` add rounds in window mode.
    """
    batch, heads, length, size = q.shape
    factors = num_buckets_for(mode, length, window)
    key = make_key(0, q.device)
    rotations = window_rotations(key, 0, heads, size, rounds, factors, q, backend)
    centering = Centering(causal) if mode == "window" and centered else None
    buckets = lsh_buckets(q, rotations, factors, centering, backend)  # (B, H, R, T)
    count = num_buckets_total(factors)
    if mode == "chunk":
        return chunk_layout(buckets, count, CHUNK, 1, 0, None, backend)
    groups = [position_group(batch, heads, length, window, q.device)] if position else []
    groups.append((buckets, count, window))
    if exploration:
        ranks = torch.arange(length, dtype=torch.int32, device=q.device)[None]
        explored = exploration_buckets(key, 0, heads, exploration, count, ranks)
        groups.append((explored.expand(batch, -1, -1, -1), count, window))
    return window_layout(groups, causal, None, backend=backend)


def position_group(
    batch: int, heads: int, length: int, window: int, device: torch.device
) -> tuple[torch.Tensor, int, int]:
    """Make the position order as an argument of `window_layout`."""
    return torch.zeros(batch, heads, 1, length, dtype=torch.int32, device=device), 1, window


def hf_reformer_core(mode: str, rounds: int, causal: bool, backend: str = "auto", **options: Any) -> Core:
    """Make the LSH core of hf_reformer."""

    def run(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        layout = make_layout(mode, q, rounds, causal, backend=backend, **options)
        return windowed_attention(q, None, v, layout, causal=causal, backend=backend)[0]

    return run


def hf_reformer_local_core(case: Case, window: int) -> Core:
    """Make the local core of hf_reformer; its keys are precomputed."""
    causal, key = case.causal, inputs_of(case)[0] * SIZE**-0.5

    def run(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = position_group(q.shape[0], 1, case.length, window, q.device)
        return windowed_attention(q, key, v, window_layout([group], causal, None), causal=causal)[0]

    return run


# --- baselines


class FixedOutput(torch.nn.Module):
    """A stand-in for a projection that returns a precomputed tensor."""

    tensor: torch.Tensor

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.tensor


def transformers_core(length: int, rounds: int, causal: bool, device: str = "cpu") -> Core:
    """Make a core from transformers' LSH attention without its projections."""
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import LSHSelfAttention

    buckets = num_buckets_for("chunk", length)
    config = ReformerConfig(
        hidden_size=HEADS * SIZE,
        num_attention_heads=HEADS,
        attention_head_size=SIZE,
        num_hashes=rounds,
        num_buckets=buckets if isinstance(buckets, int) else list(buckets),
        lsh_attn_chunk_length=CHUNK,
        is_decoder=causal,
        max_position_embeddings=length,
    )
    module: Any = LSHSelfAttention(config, layer_idx=0).eval().to(device)
    module.query_key, module.value = FixedOutput(), FixedOutput()

    def run(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        module.query_key.tensor, module.value.tensor = (x.transpose(1, 2).flatten(2) for x in (q, v))  # (B, T, H·D)
        out = module(module.query_key.tensor).hidden_states
        return out.unflatten(-1, (HEADS, SIZE)).transpose(1, 2)

    return run


def reformer_pytorch_core(rounds: int, causal: bool) -> Core:
    """Make a core from reformer-pytorch's LSH attention; lengths must be multiples of two chunks."""
    from reformer_pytorch.reformer_pytorch import LSHAttention

    module = LSHAttention(bucket_size=CHUNK, n_hashes=rounds, causal=causal).eval()

    def run(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return module(q.flatten(0, 1), v.flatten(0, 1))[0].unflatten(0, q.shape[:2])

    return run


def full_core(causal: bool) -> Core:
    """Make a core from torch's exact attention, with shared query and key."""
    return lambda q, v: F.scaled_dot_product_attention(q, q, v, is_causal=causal)


def flash_core(causal: bool) -> Core:
    """Make the same core with flash attention only; fails if that is unavailable."""

    def run(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, q, v, is_causal=causal)

    return run


@functools.cache
def flex_function(device: str) -> Callable[..., torch.Tensor]:
    """Return torch's flex attention; on a GPU compiled, once for all lengths but the first."""
    return torch.compile(flex_attention) if device == "cuda" else flex_attention


def flex_core(case: Case) -> Core:
    """Make causal sliding windows with torch's flex attention; they show as many positions as all rounds' windows."""
    window = WINDOW * case.rounds
    blocks = sliding_blocks(case.length, window, case.device)
    attend = flex_function(case.device)
    return lambda q, v: attend(q, q, v, block_mask=blocks)


def sliding_blocks(length: int, window: int, device: str, size: int = 128) -> BlockMask:
    """Make the mask of key blocks that each query block sees partly or fully, without a tensor of size T × T."""

    def visible(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (key > query - window)

    first = torch.arange(0, length, size, device=device)
    last = first + size - 1
    some = (first <= last[:, None]) & (last > first[:, None] - window)  # (query blocks, key blocks)
    full = (last <= first[:, None]) & (first > last[:, None] - window)
    numbers_and_indices = []
    for blocks in (some & ~full, full):
        order = blocks.int().argsort(dim=-1, descending=True, stable=True).int()
        numbers_and_indices += [blocks.sum(-1, dtype=torch.int32)[None, None], order[None, None]]
    return BlockMask.from_kv_blocks(*numbers_and_indices, BLOCK_SIZE=size, mask_mod=visible)


def local_core(causal: bool) -> Core:
    """Make a bound: torch's exact attention in chunks along the sequence, one back; no hash, no sort, one round."""

    def cut(x: torch.Tensor) -> torch.Tensor:
        """(B, H, T, D) → (B·(C - 1), H, 2·chunk, D): each chunk but the first, preceded by its predecessor."""
        return x.unfold(2, 2 * CHUNK, CHUNK).permute(0, 2, 1, 4, 3).flatten(0, 1)

    def run(q: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, heads, length, size = q.shape
        head = slice(CHUNK)  # the first chunk has no predecessor
        first = F.scaled_dot_product_attention(q[:, :, head], q[:, :, head], v[:, :, head], is_causal=causal)
        query = q[:, :, CHUNK:].unflatten(2, (-1, CHUNK)).transpose(1, 2).flatten(0, 1)  # (B·(C - 1), H, chunk, D)
        visible = torch.ones(CHUNK, 2 * CHUNK, dtype=torch.bool).tril(CHUNK) if causal else None
        rest = F.scaled_dot_product_attention(query, cut(q), cut(v), attn_mask=visible)
        rest = rest.unflatten(0, (batch, -1)).transpose(1, 2).reshape(batch, heads, length - CHUNK, size)
        return torch.cat([first, rest], dim=2)

    return run


def make_core(case: Case, impl: str) -> Core:
    """Make a core by name."""
    rounds, causal = case.rounds, case.causal
    makers: dict[str, Callable[[], Core]] = {
        "hf-reformer chunk": lambda: hf_reformer_core("chunk", rounds, causal),
        "hf-reformer window": lambda: hf_reformer_core("window", rounds, causal),
        "hf-reformer chunk torch": lambda: hf_reformer_core("chunk", rounds, causal, backend="torch"),
        "hf-reformer window torch": lambda: hf_reformer_core("window", rounds, causal, backend="torch"),
        "hf-reformer window triton": lambda: hf_reformer_core("window", rounds, causal, backend="triton"),
        "hf-reformer uncentered": lambda: hf_reformer_core("window", rounds, causal, centered=False),
        "hf-reformer default": lambda: hf_reformer_core("window", rounds, causal, window=128, position=True),
        "transformers": lambda: transformers_core(case.length, rounds, causal, case.device),
        "reformer-pytorch": lambda: reformer_pytorch_core(rounds, causal),
        "sdpa": lambda: full_core(causal),
        "flash": lambda: flash_core(causal),
        "flex": lambda: flex_core(case),
        "local": lambda: local_core(causal),
    }
    return makers[impl]()
