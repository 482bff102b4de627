"""The feed-forward branch, the layer norm that every branch begins with, and dropout by keys."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..configuration_reformer import ReformerConfig
from ..ops.prng import FEED_FORWARD_DROPOUT, HIDDEN_DROPOUT, dropout, fold


class LayerNorm(nn.LayerNorm):
    """LayerNorm that takes its input in any dtype, such as the residual streams', and answers in its weight's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype))


class Dropout(nn.Dropout):
    """Dropout by a key (`prng.dropout`). `p` and `training` are where every tool looks for them, and count alone."""

    @property
    def rate(self) -> float:
        return self.p if self.training else 0.0

    def forward(self, x: torch.Tensor, key: torch.Tensor | None, offset: int = 0) -> torch.Tensor:  # type: ignore[override]
        """(B, T, D) → (B, T, D); no `key`, no dropout. `offset`: position of x[:, 0] in its sequence."""
        return dropout(x, self.rate, key, offset)


class FeedForward(nn.Module):
    """Two projections with dropout before and after."""

    def __init__(self, config: ReformerConfig):
        super().__init__()
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.act = ACT2FN[config.hidden_act]
        self.up_proj = nn.Linear(config.hidden_size, config.feed_forward_size)
        self.down_proj = nn.Linear(config.feed_forward_size, config.hidden_size)

    def forward(self, x: torch.Tensor, key: torch.Tensor | None, offset: int = 0) -> torch.Tensor:
        """(B, T, D) → (B, T, D); `key` and `offset` as those of `ReformerAttention.output`."""
        x = self.up_proj(x)
        x = self.dropout(x, key if key is None else fold(key, HIDDEN_DROPOUT), offset)
        x = self.down_proj(self.act(x))
        return self.dropout(x, key if key is None else fold(key, FEED_FORWARD_DROPOUT), offset)
