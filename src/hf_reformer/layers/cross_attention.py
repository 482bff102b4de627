"""Cross-attention: exact attention of a decoder's tokens over the encoder's last hidden state."""

from typing import Any, NamedTuple

import torch
from torch import nn

from ..configuration_reformer import ReformerConfig
from ..ops.prng import CROSS_DROPOUT, dropout, fold
from ..ops.received_attention import exact_received
from .full_attention import eager_attention, exact_attention


class Source(NamedTuple):
    """What a decoder's layers are told of the source. Carries no gradients: the encoder's states come beside it.

    Attributes:
        mask: (B, S) bool, True for real tokens of the source; None: all are.
        cache: the library's cache, to which every layer writes the source's keys and values once; or None.
        attentions: where every layer puts its weights, (B, H, T, S); None: nobody asks for them.
    """

    mask: torch.Tensor | None
    cache: Any = None
    attentions: list[torch.Tensor] | None = None


class CrossAttention(nn.Module):
    """Queries of the target, keys and values of the source: `project(x)`, then `forward`, then `merge`."""

    def __init__(self, config: ReformerConfig, layer: int):
        super().__init__()
        self.layer, self.config = layer, config
        self.heads, self.head_size = config.num_attention_heads, config.attention_head_size
        self.scale = self.head_size**-0.5
        self.output_dropout = config.hidden_dropout_prob
        inner = self.heads * self.head_size
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, inner, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, inner, bias=False)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) normalised stream → queries (B, T, H * head_size)."""
        return self.q_proj(x)

    def forward(
        self, query: torch.Tensor, states: torch.Tensor, source: Source, paid: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Queries (B, T, H * head_size), the encoder's states (B, S, 2 D) → (B, T, H * head_size).

        A row whose source is empty gets 0. With `paid`, (B, T), also what every token of the source receives, (B, S)
        (`received_attention.exact_received`).
        """
        query, (keys, values) = self._heads(query), self._keys_and_values(states, source)
        allowed = some = None
        if source.mask is not None:
            some = source.mask.any(-1, keepdim=True)[:, None]  # (B, 1, 1)
            allowed = source.mask[:, None, None] | ~some[:, None]  # (B, 1, 1, S), never without any
        if source.attentions is None:
            out = exact_attention(self, query, keys, values, allowed).transpose(1, 2)
        else:
            out, weights = eager_attention(self, query, keys, values, allowed, self.scale)
            source.attentions.append(weights if some is None else torch.where(some[:, None], weights, 0))
        out = out.flatten(2)
        found = [out if some is None else torch.where(some, out, 0)]
        if paid is not None:
            received = exact_received(query, keys, paid, allowed, scale=self.scale)
            found.append(received if source.mask is None else torch.where(source.mask, received, 0))
        return found

    def merge(self, mixed: torch.Tensor, key: torch.Tensor | None, first: int = 0) -> torch.Tensor:
        """(B, T, H * head_size) → (B, T, D); `key` and `first` as `ReformerAttention.merge` takes them."""
        key = None if key is None else fold(key, CROSS_DROPOUT)
        return dropout(self.o_proj(mixed), self.output_dropout, key, first)

    def _keys_and_values(self, states: torch.Tensor, source: Source) -> tuple[torch.Tensor, torch.Tensor]:
        kept = source.cache
        if kept is not None and len(kept.layers) > self.layer:
            return kept.layers[self.layer].keys, kept.layers[self.layer].values
        keys, values = self._heads(self.k_proj(states)), self._heads(self.v_proj(states))
        if kept is not None:
            kept.update(keys.detach(), values.detach(), self.layer)
        return keys, values

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, self.head_size)).transpose(1, 2)  # (B, H, T, head_size)
