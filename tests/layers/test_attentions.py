"""Attention weights: as the definition has them, whoever gives them, and without a change of what is computed."""

import pytest
import torch
from attention_cases import cases, make_case
from conftest import SMALL_WINDOWS, make_ids, make_model, max_abs_diff
from hypothesis import given, settings

from hf_reformer import ReformerForCausalLM, ReformerModel
from hf_reformer.ops.gather_attention import SparseAttention, attention_with_sparse_weights
from hf_reformer.ops.reference import attention_with_weights

KINDS = ["local", "lsh", "full", "lsh"]
IDS, MASK = make_ids(3, 40), torch.ones(3, 40, dtype=torch.long)
MASK[0, :9], MASK[2, 30:] = 0, 0
MODES = {
    "window": {**SMALL_WINDOWS, "attn_layers": KINDS},
    "chunk": {"attention_mode": "chunk", "attn_layers": ["local", "lsh"], "hash_seed": 0, "num_buckets": 4},
}
STEPS = [20, 1, 1, 6, 1, 11]


@settings(max_examples=150, deadline=None)
@given(cases)
def test_lists_equal_the_definition(drawn):
    case = make_case(drawn)
    query, key, value = case.inputs
    key = None if case.shared else key
    out, attention = attention_with_sparse_weights(query, key, value, case.layout, scale=case.scale, **case.options)
    expected, weights = attention_with_weights(query, key, value, case.layout, **case.options)
    assert max_abs_diff(out, expected) <= 1e-10
    assert max_abs_diff(attention.dense(query.shape[2]), weights) <= 1e-10


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("mode", MODES)
def test_looking_changes_nothing(mode, causal, mask):
    model = make_model(ReformerModel, **MODES[mode], is_decoder=causal).eval()
    plain = model(IDS, attention_mask=mask).last_hidden_state
    seen = model(IDS, attention_mask=mask, output_attentions=True)
    listed = model(IDS, attention_mask=mask, output_attentions="sparse").attentions
    real = slice(None) if mask is None else mask.bool()
    assert max_abs_diff(seen.last_hidden_state[real], plain[real]) <= 1e-10
    assert len(seen.attentions) == len(listed) == model.config.num_hidden_layers
    for weights, sparse in zip(seen.attentions, listed, strict=True):
        assert weights.shape == (3, model.config.num_attention_heads, 40, 40)
        assert max_abs_diff(sparse.dense(40)[1], weights[1]) <= 1e-10
        rows = weights.transpose(1, 2)[real]  # (rows, H, 40) or (3, 40, H, 40)
        assert (rows.sum(-1) - 1).abs().max() <= 1e-10
        assert not (causal and weights[1].triu(1).any())
        if mask is not None:
            hidden = (mask == 0)[:, None, None].expand_as(weights).transpose(1, 2)[real]
            assert not rows[hidden].any()


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@torch.no_grad()
def test_steps_see_what_the_whole_sees(mask):
    model = make_model(ReformerForCausalLM, **MODES["window"]).eval()
    whole, kept, at = model(IDS, attention_mask=mask, output_attentions=True).attentions, None, 0
    for new in STEPS:
        part = None if mask is None else mask[:, : at + new]
        options = {"past_key_values": kept, "use_cache": True, "output_attentions": True}
        found = model(IDS[:, at : at + new], attention_mask=part, **options)
        kept, real = found.past_key_values, torch.ones(3, new) if mask is None else mask[:, at : at + new]
        for weights, expected in zip(found.attentions, whole, strict=True):
            assert weights.shape[2:] == (new, at + new)
            rows = expected[:, :, at : at + new, : at + new]
            assert max_abs_diff(weights.transpose(1, 2)[real == 1], rows.transpose(1, 2)[real == 1]) <= 1e-10
        at += new


@pytest.mark.parametrize("mode", MODES)
def test_generation_gives_the_library_s_shapes(mode):
    model = make_model(ReformerForCausalLM, **MODES[mode]).eval()
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(IDS, **options)
    found = model.generate(IDS, output_attentions=True, return_dict_in_generate=True, **options)
    assert torch.equal(found.sequences, plain)
    shapes = [[tuple(layer.shape) for layer in step] for step in found.attentions]
    layers = model.config.num_hidden_layers
    assert shapes == [[(3, 2, *size)] * layers for size in ((40, 40), (1, 41), (1, 42))]


def test_gradients_pass_through_the_weights_and_are_those_of_a_call_without_them():
    model = make_model(ReformerForCausalLM, **MODES["window"], hidden_dropout_prob=0.2, resample_rotations=False)
    model.config.lsh_attention_probs_dropout_prob = model.config.local_attention_probs_dropout_prob = 0.3
    found = []
    for look in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        out = model.train()(IDS, labels=IDS, output_attentions=look)
        for weights in out.attentions or []:
            weights.retain_grad()
        out.loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(weights.grad.abs().sum() > 0 for weights in out.attentions)
    assert all(max_abs_diff(a, b) <= 1e-10 for a, b in zip(*found, strict=True))


def test_what_cannot_be_looked_at_says_so():
    model = make_model(ReformerModel).train()
    model.gradient_checkpointing = True
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(IDS, output_attentions=True)


def test_a_token_listed_twice_adds_up():
    attention = SparseAttention(torch.tensor([[[[0, 2, 2, -1]]]]), torch.tensor([[[[0.5, 0.25, 0.25, 0.0]]]]))
    assert attention.dense(3).flatten().tolist() == [0.5, 0.0, 0.5]
