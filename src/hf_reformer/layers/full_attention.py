"""Exact attention by the library's attention interface: `attn_implementation="sdpa"` (the default) or `"eager"`."""

from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..ops.layout import AttentionLayout, window_layout


def exact_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    causal: bool = False,
) -> torch.Tensor:
    """One softmax per query over all keys that it may see, (B, H, T, D) → (B, H, T, D).

    Args:
        module: has `config`, which names the implementation, and the `scale` of scores.
        query: (B, H, T, D); key, value: (B, H, S, D).
        allowed: bool, broadcast to (B, 1, T, S); None: all, or with `causal` those up to the query's own place. A
            query that may see nothing gets what is of no use.
    """
    config: Any = module.config
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention)
    out, _ = attend(module, query, key, value, allowed, scaling=module.scale, is_causal=causal)
    return out.transpose(1, 2)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    is_causal: bool = False,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain computation, (B, T, H, D) and the weights (B, H, T, S), as the interface has it."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is None and is_causal:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    return (weights @ value).transpose(1, 2), weights


def make_attention_mask(
    mask: torch.Tensor | None, samples: torch.Tensor | None, length: int, causal: bool, device: torch.device
) -> torch.Tensor | None:
    """Which tokens of its sequence each may see, as `exact_attention` takes it.

    mask: (B, T) bool, real tokens; samples: (B, T), of which sample of a packed row a token is.
    """
    if mask is None and samples is None:
        return None
    allowed = torch.ones(1, 1, length if causal else 1, length, dtype=torch.bool, device=device)
    allowed = allowed.tril() if causal else allowed
    if mask is not None:
        allowed = allowed & mask[:, None, None, :]
    if samples is not None:
        allowed = allowed & (samples[:, None, :, None] == samples[:, None, None, :])
    return allowed


def dense_layout(
    value: torch.Tensor, causal: bool, mask: torch.Tensor | None, samples: torch.Tensor | None
) -> AttentionLayout:
    """Windows that show every real token of the same sample: exact attention as the op of the other layers."""
    batch, _, length, _ = value.shape
    position = torch.zeros(batch, 1, 1, length, dtype=torch.int32, device=value.device)
    position = position if samples is None else samples[:, None, None, :]
    window = length if causal else 2 * length
    return window_layout([(position, 1 if samples is None else None, window)], causal, mask)
