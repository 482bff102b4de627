"""Whole models of the same size: hf_reformer's, transformers' Reformer, and a Transformer with exact attention."""

from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hf_reformer

VOCABULARY, HIDDEN, HEADS, HEAD_SIZE, FEED_FORWARD = 320, 512, 8, 64, 1024
LAYERS, ROUNDS = 6, 2
Cache = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values per layer, (B, H, T, D) each


def common(length: int, layers: int, causal: bool) -> dict[str, Any]:
    """Return the config fields shared by both Reformers, without dropout. The others are each package's defaults."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "attn_layers": [("local", "lsh")[i % 2] for i in range(layers)],
        "num_attention_heads": HEADS,
        "attention_head_size": HEAD_SIZE,
        "feed_forward_size": FEED_FORWARD,
        "max_position_embeddings": length,
        "num_hashes": ROUNDS,
        "hidden_dropout_prob": 0.0,
        "lsh_attention_probs_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "is_decoder": causal,
    }


def hf_reformer_config(length: int, layers: int, causal: bool, **changes: Any) -> hf_reformer.ReformerConfig:
    return hf_reformer.ReformerConfig(**common(length, layers, causal) | changes)


def hf_reformer_model(length: int, layers: int, causal: bool = True, **changes: Any) -> nn.Module:
    """Make the hf_reformer model, with the head for the direction."""
    config = hf_reformer_config(length, layers, causal, **changes)
    return hf_reformer.ReformerForCausalLM(config) if causal else hf_reformer.ReformerForMaskedLM(config)


def transformers_model(length: int, layers: int, causal: bool = True) -> nn.Module:
    """Make transformers' Reformer; in training, its axial shape must multiply to exactly the length."""
    bits = length.bit_length() - 1
    if length != 2**bits:
        raise ValueError(f"length {length}: transformers' Reformer is measured at powers of two only")
    config = transformers.ReformerConfig(
        **common(length, layers, causal),
        axial_pos_shape=[2 ** (bits // 2), 2 ** (bits - bits // 2)],
        axial_pos_embds_dim=[HIDDEN // 4, HIDDEN - HIDDEN // 4],
        use_cache=False,
    )
    head = transformers.ReformerModelWithLMHead if causal else transformers.ReformerForMaskedLM
    return head(config)


class FullLayer(nn.Module):
    """A pre-norm layer of a standard Transformer with torch's exact attention."""

    def __init__(self, causal: bool):
        super().__init__()
        self.causal = causal
        self.attention_norm, self.feed_forward_norm = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv_proj = nn.Linear(HIDDEN, 3 * HEADS * HEAD_SIZE, bias=False)
        self.o_proj = nn.Linear(HEADS * HEAD_SIZE, HIDDEN, bias=False)
        self.up_proj, self.down_proj = nn.Linear(HIDDEN, FEED_FORWARD), nn.Linear(FEED_FORWARD, HIDDEN)

    def forward(self, x: torch.Tensor, past: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Apply the layer to (B, T, D); with `past`, to the last token only, storing its key and value at the end."""
        q, k, v = self.qkv_proj(self.attention_norm(x)).unflatten(-1, (3, HEADS, HEAD_SIZE)).permute(2, 0, 3, 1, 4)
        if past is not None:
            past[0][:, :, -1:], past[1][:, :, -1:] = k, v
            k, v = past  # (B, H, T, D)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and past is None)
        x = x + self.o_proj(out.transpose(1, 2).flatten(2))
        return x + self.down_proj(F.relu(self.up_proj(self.feed_forward_norm(x))))


class FullModel(nn.Module):
    """A Transformer of the same size: as many layers, heads and features. Position embeddings are a fixed table."""

    def __init__(self, length: int, layers: int, causal: bool = True, checkpointing: bool = False):
        super().__init__()
        self.causal, self.checkpointing = causal, checkpointing
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.positions: torch.Tensor
        self.register_buffer("positions", torch.randn(length, HIDDEN), persistent=False)
        self.layers = nn.ModuleList(FullLayer(causal) for _ in range(layers))
        self.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Compute the mean loss of (B, T) tokens."""
        x = self.embed_tokens(input_ids) + self.positions[: input_ids.shape[1]]
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointing else layer(x)
        logits = self.lm_head(self.norm(x))
        if self.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def next_logits(self, token: torch.Tensor, past: Cache) -> torch.Tensor:
        """Compute the logits of a token, (1, 1), written to the last position of every layer's keys and values."""
        x = self.embed_tokens(token) + self.positions[past[0][0].shape[2] - 1]
        for layer, kept in zip(self.layers, past, strict=True):
            x = layer(x, kept)
        return self.lm_head(self.norm(x[:, -1]))
