"""Layers of exact attention go through the library's attention interface, whichever implementation is chosen."""

import pytest
import torch
from conftest import make_ids, make_model, max_abs_diff
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
