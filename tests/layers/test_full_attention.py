"""Layers of exact attention go through the library's attention interface, whichever implementation is chosen."""

import pytest
import torch
from conftest import make_ids, make_model, max_abs_diff
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

from hf_reformer import ReformerForCausalLM, ReformerModel
from hf_reformer.layers.full_attention import eager_attention

IDS = make_ids(3, 33)
MASK = torch.ones(3, 33, dtype=torch.long)
MASK[0, :9], MASK[1, 25:] = 0, 0
POSITIONS = torch.cat([torch.arange(12), torch.arange(21)]).expand(3, -1)
KINDS = {"full": ["full", "full"], "mixed": ["lsh", "full", "local"]}


def make(cls, implementation: str, **changes):
    model = make_model(cls, **changes)
    model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("layers", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(
    "inputs", [{}, {"attention_mask": MASK}, {"position_ids": POSITIONS}], ids=["whole", "padded", "packed"]
)
def test_eager_and_sdpa_agree(inputs, causal, layers):
    found = []
    for implementation in ("eager", "sdpa"):
        model = make(ReformerModel, implementation, attn_layers=layers, is_decoder=causal)
        hidden = model(IDS, **inputs).last_hidden_state
        real = hidden[inputs["attention_mask"].bool()] if "attention_mask" in inputs else hidden
        real.square().sum().backward()
        found.append((real.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    assert max_abs_diff(found[0][0], found[1][0]) < 1e-10
    assert max_abs_diff(found[0][1], found[1][1]) < 1e-8 * found[0][1].abs().max().item()


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_both_continue_a_cache(masked):
    mask, found = MASK if masked else torch.ones_like(MASK), []
    for implementation in ("eager", "sdpa"):
        model, kept = make(ReformerForCausalLM, implementation, attn_layers=["full"]), None
        for begin, end in ((0, 20), (20, 21), (21, 33)):
            out = model(IDS[:, begin:end], attention_mask=mask[:, :end], past_key_values=kept, use_cache=True)
            kept = out.past_key_values
            found.append(out.logits[mask[:, begin:end].bool()])
    for eager, sdpa in zip(found[:3], found[3:], strict=True):
        assert max_abs_diff(eager, sdpa) < 1e-10


def test_an_implementation_of_ones_own_is_called():
    called = []

    def mine(module, *args, **how):
        called.append(module.layer)
        return eager_attention(module, *args, **how)

    AttentionInterface.register("mine", mine)
    model = make(ReformerModel, "mine", attn_layers=["local", "full", "lsh", "full"])
    expected = make(ReformerModel, "sdpa", attn_layers=["local", "full", "lsh", "full"])
    assert max_abs_diff(model(IDS).last_hidden_state, expected(IDS).last_hidden_state) < 1e-10
    assert called == [1, 3]


def test_the_choice_is_made_while_loading(tmp_path):
    make_model(ReformerModel, attn_layers=["full"]).save_pretrained(tmp_path)
    assert ReformerModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
    model = ReformerModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    with pytest.raises((ValueError, ImportError), match=r"[Ff]lash"):
        ReformerModel.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(
    "inputs", [{}, {"attention_mask": MASK}, {"position_ids": POSITIONS}], ids=["whole", "padded", "packed"]
)
def test_dropout_is_that_of_the_matrix_of_weights(inputs, causal, backend):
    """By the op of the other layers, whose memory is not the square of the length; values and gradients."""
    found = []
    for look in (False, True):
        changes = {"local_attention_probs_dropout_prob": 0.3, "is_decoder": causal, "attention_backend": backend}
        model = make_model(ReformerModel, attn_layers=["full", "full"], dtype=torch.float32, **changes).train()
        torch.manual_seed(0)
        hidden = model(IDS, output_attentions=look, **inputs).last_hidden_state
        real = hidden[inputs["attention_mask"].bool()] if "attention_mask" in inputs else hidden
        real.square().mean().backward()
        found.append((real.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
    assert max_abs_diff(found[0][0], found[1][0]) < 1e-4
    assert max_abs_diff(found[0][1], found[1][1]) < 1e-4 * found[0][1].abs().max().item()


def test_no_matrix_of_weights_exists_for_dropout():
    """Nor for a mask of ones, which hides nothing."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                Largest.size = max(Largest.size, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    length = 1500
    ids, mask = make_ids(1, length), torch.ones(1, length, dtype=torch.long)
    for changes in ({"local_attention_probs_dropout_prob": 0.3}, {}):
        fields = {"attn_layers": ["full"], "dtype": torch.float32, "attention_backend": "torch", **changes}
        model = make_model(ReformerForCausalLM, max_position_embeddings=length, **fields).train()
        Largest.size = 0
        with Largest():
            model(ids, attention_mask=mask, labels=ids).loss.backward()
        assert 0 < Largest.size < length**2
