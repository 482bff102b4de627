"""The feed-forward branch, the layer norm at the start of every branch, and keyed dropout."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..configuration_reformer import ReformerConfig
from ..ops.prng import FEED_FORWARD_DROPOUT, HIDDEN_DROPOUT, dropout, fold


class LayerNorm(nn.LayerNorm):
    """LayerNorm that accepts any floating dtype, such as that of the residual streams; outputs its weight's dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype))


class Dropout(nn.Dropout):
    """Keyed dropout (`prng.dropout`), controlled by `p` and `training` alone, as in `nn.Dropout`."""

    @property
    def rate(self) -> float:
        return self.p if self.training else 0.0

    def forward(self, x: torch.Tensor, key: torch.Tensor | None, offset: int = 0) -> torch.Tensor:  # type: ignore[override]
        """Apply dropout to (B, T, D) if a `key` is given. `offset`: position of x[:, 0] in its sequence."""
        return dropout(x, self.rate, key, offset)


class FeedForward(nn.Module):
    """Two projections with an activation between them, and dropout after each."""

    def __init__(self, config: ReformerConfig):
        super().__init__()
        self.dropout = Dropout(config.hidden_dropout_prob)
        self.act = ACT2FN[config.hidden_act]
        self.up_proj = nn.Linear(config.hidden_size, config.feed_forward_size)
        self.down_proj = nn.Linear(config.feed_forward_size, config.hidden_size)

    def forward(self, x: torch.Tensor, key: torch.Tensor | None, offset: int = 0) -> torch.Tensor:
        """Map (B, T, D) to (B, T, D); `key` and `offset` as in `AttentionProjections.output`."""
        x = self.up_proj(x)
        x = self.dropout(x, key if key is None else fold(key, HIDDEN_DROPOUT), offset)
        x = self.down_proj(self.act(x))
        return self.dropout(x, key if key is None else fold(key, FEED_FORWARD_DROPOUT), offset)
