"""Memory of a training step: bytes of the storages that live, the same numbers in every run and on every machine."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_reformer import ReformerConfig, ReformerForCausalLM


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


class Census(TorchDispatchMode):
    """Bytes of the storages that operations have returned and that still live: `now`, and their `peak`."""

    def __init__(self, *ignored):
        super().__init__()
        self.alive = {x.untyped_storage()._cdata: 0 for x in ignored}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.count(x.untyped_storage())
        return out

    def count(self, storage):
        name = storage._cdata
        if name not in self.alive:
            self.alive[name] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, name)

    def forget(self, name):
        self.now -= self.alive.pop(name)


def census_of(model, length):
    """Bytes that live after the forward, and at the peak of forward and backward."""
    with Census(*model.parameters()) as census:
        loss = loss_of(model, length)
        kept = census.now
        loss.backward()
    return kept, census.peak
