"""Weights of eight bits by torchao: less memory, nearly the same answers, and adapters on top of them."""

import pytest
import torch
from conftest import SMALL_WINDOWS, make_ids, make_model, max_abs_diff
from transformers import AutoConfig, TorchAoConfig

from hf_reformer import ReformerForCausalLM, ReformerForSequenceClassification

pytest.importorskip("torchao")
from torchao.quantization import Int8WeightOnlyConfig, quantize_

IDS = make_ids(2, 70)
WIDE = {"hidden_size": 64, "attention_head_size": 32, "feed_forward_size": 128, "initializer_range": 0.02,
        "position_embedding_type": "axial"}  # fmt: skip
TOLERANCE = 0.02  # of the logits' norm: eight bits keep a weight to half a percent of its row's largest

classes = pytest.mark.parametrize("cls", [ReformerForCausalLM, ReformerForSequenceClassification])
ways = pytest.mark.parametrize("way", ["in place", "while loading"])


def make_float(cls, dtype=torch.float32, **overrides):
    return make_model(cls, dtype=dtype, **{**WIDE, **SMALL_WINDOWS, **overrides})


def make_quantised(cls, way, folder, dtype=torch.float32, **overrides):
    model = make_float(cls, dtype, **overrides)
    if way == "in place":
        quantize_(model, Int8WeightOnlyConfig())
        return model
    model.save_pretrained(folder)
    return cls.from_pretrained(folder, dtype=dtype, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))


def is_quantised(tensor: torch.Tensor) -> bool:
    return type(tensor.data) is not torch.Tensor


def size_of(model) -> int:
    """Bytes of the weights."""
    total = 0
    for parameter in model.parameters():
        parts = [parameter]
        if is_quantised(parameter):
            parts = [getattr(parameter, name) for name in parameter.data.__tensor_flatten__()[0]]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


def relative_gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@classes
@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eight_bits_are_enough(cls, way, dtype, tmp_path):
    expected = make_float(cls, dtype)
    model = make_quantised(cls, way, tmp_path, dtype)
    projections = [
        module for layer in model.model.layers for module in layer.modules() if hasattr(module, "in_features")
    ]
    assert len(projections) == 5 + 6
    assert all(is_quantised(module.weight) for module in projections)
    assert size_of(model) < (0.5 if dtype == torch.float32 else 0.7) * size_of(expected)
    logits = model(input_ids=IDS).logits
    assert 0 < relative_gap(logits, expected(input_ids=IDS).logits) <= TOLERANCE
    assert torch.equal(logits, model(input_ids=IDS).logits)


@classes
@ways
def test_the_answers_are_those_of_the_rounded_weights(cls, way, tmp_path):
    """So the gap to the float model is quantisation's, none of it the model's."""
    model, rounded = make_quantised(cls, way, tmp_path), make_float(cls)
    weights = {name: x.dequantize() if is_quantised(x) else x for name, x in model.state_dict().items()}
    rounded.load_state_dict(weights)
    assert relative_gap(model(input_ids=IDS).logits, rounded(input_ids=IDS).logits) <= 1e-5


@classes
def test_a_quantised_model_saves_and_loads(cls, tmp_path):
    model = make_quantised(cls, "while loading", tmp_path / "float")
    model.save_pretrained(tmp_path / "eight_bits")
    assert AutoConfig.from_pretrained(tmp_path / "eight_bits").quantization_config["quant_method"] == "torchao"
    again = cls.from_pretrained(tmp_path / "eight_bits")
    assert size_of(again) == size_of(model)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_quantised_model_generates(tmp_path):
    model = make_quantised(ReformerForCausalLM, "while loading", tmp_path)
    found = model.generate(IDS[:, :9], max_new_tokens=3, do_sample=False)
    for place in range(9, 12):
        assert torch.equal(found[:, place], model(found[:, :place]).logits[:, -1].argmax(-1))


@ways
def test_lora_trains_over_eight_bits(way, tmp_path):
    """On the reversible path: the same gradients as on the plain one, and none for the quantised weights."""
    peft = pytest.importorskip("peft")

    def gradients(reversible):
        base = make_quantised(ReformerForCausalLM, way, tmp_path, attn_layers=["local", "lsh", "full"])
        base.config.reversible = reversible
        torch.manual_seed(1)
        config = peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.3, init_lora_weights=False)
        model = peft.get_peft_model(base, config).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert all(("lora_" in name) == (p.grad is not None) for name, p in model.named_parameters())
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found, expected = gradients(True), gradients(False)
    assert len(found) == 3 * 2 * 2
    for name, grad in expected.items():
        assert grad.any()
        assert max_abs_diff(found[name], grad) <= 1e-6 * grad.abs().max().item()


def test_an_adapter_merges_into_eight_bits(tmp_path):
    peft = pytest.importorskip("peft")
    base = make_quantised(ReformerForCausalLM, "while loading", tmp_path)
    before = base(input_ids=IDS).logits
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    expected = model(input_ids=IDS).logits
    assert relative_gap(expected, before) > 2 * TOLERANCE
    assert relative_gap(model.merge_and_unload()(input_ids=IDS).logits, expected) <= TOLERANCE
