"""Attention of single new tokens over tokens that are kept, each found by its number."""

import torch

from .reference import SELF_SCORE


def attend_to_tokens(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tokens: torch.Tensor,
    own: torch.Tensor,
    scale: float | None,
    count_once: bool = True,
) -> torch.Tensor:
    """One softmax per head over the tokens listed.

    Args:
        query: (B, H, D), of one token a row.
        keys, values: (B, H, C, D) contiguous; token t stands in slot t % C.
        tokens: (B, H or 1, K) int64; negative: none.
        own: (B) int64, the query's own token.
        scale: of the scores; None for shared query/key attention, whose `keys` are queries (`reference.shared_key`).
        count_once: whether a token that is listed several times counts once; otherwise so many times.

    Returns:
        (B, H, D) in the dtype of `values`. Where nothing is listed it is meaningless, but finite.
    """
    batch, heads, slots, size = keys.shape
    tokens = tokens.expand(-1, heads, -1)
    tokens = tokens.sort(-1).values if count_once else tokens
    listed = tokens >= 0
    if count_once:
        listed[..., 1:] &= tokens[..., 1:] != tokens[..., :-1]
    line = torch.arange(batch * heads, device=keys.device).view(batch, heads, 1) * slots
    rows = (line + tokens.remainder(slots)).flatten()
    shape = (batch, heads, tokens.shape[-1], size)
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        key = keys.reshape(-1, size).index_select(0, rows).view(shape).to(dtype)
        value = values.reshape(-1, size).index_select(0, rows).view(shape).to(dtype)
        scores = (key @ query.to(dtype)[..., None]).squeeze(-1)
        if scale is None:
            scores = scores * torch.rsqrt(key.square().mean(-1) + 1e-6) * size**-0.5
            scores = scores.masked_fill(tokens == own[:, None, None], SELF_SCORE)
        else:
            scores = scores * scale
        scores = scores.masked_fill(~listed, torch.finfo(dtype).min)
        return (scores.softmax(-1)[..., None, :] @ value).squeeze(-2).to(values.dtype)
