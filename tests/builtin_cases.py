"""Tiny models of transformers' own Reformer, ours with their weights, and the comparison of the two."""

import torch
import transformers
from conftest import max_abs_diff

import hf_reformer

TOLERANCE = 1e-10

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "attention_head_size": 16,
    "feed_forward_size": 48,
    "max_position_embeddings": 512,
    "axial_pos_shape": (16, 32),
    "axial_pos_embds_dim": (8, 24),
    "lsh_attn_chunk_length": 16,
    "local_attn_chunk_length": 8,
    "attn_layers": ["local", "lsh"],
    "initializer_range": 0.2,
    "hash_seed": 1,
}

# (the built-in's head, ours)
HEADS = {
    "ReformerModel": "ReformerModel",
    "ReformerModelWithLMHead": "ReformerForCausalLM",
    "ReformerForMaskedLM": "ReformerForMaskedLM",
    "ReformerForSequenceClassification": "ReformerForSequenceClassification",
    "ReformerForQuestionAnswering": "ReformerForQuestionAnswering",
}


def make_builtin(name: str = "ReformerModel", **overrides):
    fields = {**SMALL, **overrides}
    fields.setdefault("is_decoder", name == "ReformerModelWithLMHead")
    fields.setdefault("num_labels", 3 if name == "ReformerForSequenceClassification" else 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, name)(transformers.ReformerConfig(**fields)).double().eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if parameter.dim() == 1 and not key.startswith("lm_head"):  # fresh biases hide mistakes
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def convert(builtin, folder, name: str = "ReformerModel", **options):
    builtin.save_pretrained(folder)
    return getattr(hf_reformer, HEADS[name]).from_pretrained(folder, dtype=torch.float64, **options)


def pair(folder, name: str = "ReformerModel", **overrides):
    builtin = make_builtin(name, **overrides)
    return builtin, convert(builtin, folder, name)


def tensors(output) -> list[torch.Tensor]:
    return [x for x in output.values() if isinstance(x, torch.Tensor)]


@torch.no_grad()
def assert_equal_outputs(builtin, ours, ids, mask=None, **inputs) -> None:
    """Equal at real tokens, in every output that has a length; equal altogether in the others."""
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    expected = tensors(builtin(ids, attention_mask=mask, **inputs))
    found = tensors(ours(ids, attention_mask=mask, **inputs))
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        if a.shape[:2] == ids.shape:
            a, b = a[real], b[real]
        assert max_abs_diff(a, b) <= (TOLERANCE if b.dtype == torch.float64 else 1e-6)  # the built-in's causal loss
