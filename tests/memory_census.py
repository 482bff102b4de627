"""Memory of a training step: bytes of the storages that live, the same numbers in every run and on every machine."""

import torch

from hf_reformer import ReformerConfig, ReformerForCausalLM
from hf_reformer.analysis.memory import Census


def make(depth, path="reversible", **changes):
    """A narrow model: attention's own buffers are of a fixed size, and what grows with length outweighs them."""
    fields = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 1, "attention_head_size": 32}
    fields |= {"feed_forward_size": 64, "max_position_embeddings": 2**15, "num_buckets": (8, 16)}
    fields |= {"lsh_window": 32, "local_window": 32, "num_hidden_layers": depth, "reversible": path == "reversible"}
    torch.manual_seed(0)
    model = ReformerForCausalLM(ReformerConfig(**{**fields, **changes})).train()
    if path == "checkpointed":
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def loss_of(model, length):
    ids = torch.arange(length).remainder_(63).add_(1)[None]
    return model(input_ids=ids, labels=ids).loss


def size_of_gradients(model):
    return sum(p.numel() * p.element_size() for p in model.parameters())


def census_of(model, length):
    """Bytes that live after the forward, and at the peak of forward and backward."""
    with Census(*model.parameters()) as census:
        loss = loss_of(model, length)
        kept = census.now
        loss.backward()
    return kept, census.peak
