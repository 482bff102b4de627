"""Saving, loading, initialisation: what comes back is bit for bit what was saved, under our own names."""

import json
import math
import re

import pytest
import torch
import transformers
from accelerate import init_empty_weights
from conftest import REPEATABLE, SMALL_WINDOWS, TINY, make_ids, make_model, max_abs_diff, tiny_config
from head_cases import TEXT_HEADS
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from hf_reformer import (
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForMultipleChoice,
    ReformerForTokenClassification,
    ReformerModel,
)

CLASSES = [ReformerModel, *TEXT_HEADS]
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
IDS = make_ids(2, 20)


def first_output(model) -> torch.Tensor:
    ids = IDS[None] if isinstance(model, ReformerForMultipleChoice) else IDS
    for weight in model.parameters():  # where weights lie in a file decides the last bit of a product
        weight.data = weight.data.clone()
    with torch.no_grad():
        return model.eval()(ids)[0]


def same_state(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


def weights_of(folder) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


# --- round trips


@every_class
@pytest.mark.parametrize("shard", ["50GB", "5KB"])
def test_what_is_loaded_is_what_was_saved(cls, shard, tmp_path, captured_warnings):
    model = make_model(cls)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "5KB")
    again, info = cls.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert same_state(again, model)
    assert torch.equal(first_output(again), first_output(model))
    assert not again.training
    assert not any(info.values()), info
    assert captured_warnings == []


@pytest.mark.parametrize("positions", ["axial", "learned", "rotary"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_model_loads_in_any_dtype_and_runs(dtype, positions, tmp_path):
    model = make_model(ReformerForCausalLM, dtype=torch.float32, position_embedding_type=positions)
    model.save_pretrained(tmp_path)
    again = ReformerForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in again.parameters()} == {dtype}
    logits = first_output(again)
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    loss = again.train()(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in again.parameters())
    again.save_pretrained(tmp_path / "again")
    assert same_state(ReformerForCausalLM.from_pretrained(tmp_path / "again", dtype="auto"), again)


def test_a_state_dict_goes_into_another_model():
    one, other = make_model(ReformerForCausalLM), make_model(ReformerForCausalLM, seed=1)
    other.load_state_dict(one.state_dict())
    assert torch.equal(first_output(one), first_output(other))


def test_a_saved_model_hashes_alike_everywhere(tmp_path):
    """Rotations are functions of the config, and no part of the weights."""
    model = make_model(ReformerModel, **SMALL_WINDOWS, hash_seed=17)
    model.save_pretrained(tmp_path)
    torch.manual_seed(123)
    again = ReformerModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(first_output(again), first_output(model))
    again.config.hash_seed = 18
    assert not torch.equal(first_output(again), first_output(model))


def test_no_code_is_saved(tmp_path):
    make_model(ReformerForCausalLM).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


# --- bodies and heads


@pytest.mark.parametrize("cls", CLASSES[1:], ids=lambda cls: cls.__name__)
def test_a_body_goes_in_and_out_of_every_head(cls, tmp_path):
    head = make_model(cls)
    head.save_pretrained(tmp_path / "head")
    body = ReformerModel.from_pretrained(tmp_path / "head", dtype=torch.float64)
    if cls is ReformerForCausalLM:  # the body's own config does not say what the head made of it
        assert body.config.is_decoder
    assert same_state(body, head.model)
    body.save_pretrained(tmp_path / "body")
    again, info = cls.from_pretrained(tmp_path / "body", dtype=torch.float64, output_loading_info=True)
    assert same_state(again.model, head.model)
    assert info["missing_keys"]
    assert not any(key.startswith("model.") for key in info["missing_keys"])
    assert not info["unexpected_keys"]


def test_a_head_goes_over_to_another(tmp_path):
    model = make_model(ReformerForMaskedLM)
    model.save_pretrained(tmp_path)
    other = ReformerForTokenClassification.from_pretrained(tmp_path, num_labels=4, dtype=torch.float64)
    assert same_state(other.model, model.model)
    assert other.classifier.out_features == 4


# --- names

EXPECTED_NAMES = {
    "model.embed_tokens.weight",
    "model.position_embeddings.weights.0",
    "model.position_embeddings.weights.1",
    "model.norm.weight",
    "model.norm.bias",
    "lm_head.weight",
    "lm_head.bias",
    *(
        f"model.layers.{i}.{part}_norm.{x}"
        for i in (0, 1)
        for part in ("attention", "feed_forward")
        for x in ("weight", "bias")
    ),
    *(
        f"model.layers.{i}.feed_forward.{part}_proj.{x}"
        for i in (0, 1)
        for part in ("up", "down")
        for x in ("weight", "bias")
    ),
    *(f"model.layers.0.attention.{part}_proj.weight" for part in "qkvo"),
    *(f"model.layers.1.attention.{part}_proj.weight" for part in ("qk", "v", "o")),
}


@pytest.mark.parametrize("cls", [ReformerForCausalLM, ReformerForMaskedLM])
def test_names_of_weights_are_those_that_others_rely_on(cls, tmp_path):
    model = make_model(cls, position_embedding_type="axial")
    assert model.state_dict().keys() == EXPECTED_NAMES
    model.save_pretrained(tmp_path)
    assert weights_of(tmp_path).keys() == EXPECTED_NAMES


def test_rotary_positions_have_no_weights():
    names = make_model(ReformerForCausalLM, position_embedding_type="rotary").state_dict().keys()
    assert names == {name for name in EXPECTED_NAMES if "position_embeddings" not in name}


def test_learned_positions_are_one_table(tmp_path):
    model = make_model(ReformerModel, position_embedding_type="learned")
    model.save_pretrained(tmp_path)
    assert weights_of(tmp_path)["position_embeddings.weight"].shape == (256, 16)


@pytest.mark.parametrize("auto", [False, True])
def test_a_folder_of_the_builtin_is_saved_again_under_our_names(auto, tmp_path):
    config = transformers.ReformerConfig(
        **TINY, axial_pos_shape=(16, 16), axial_pos_embds_dim=(4, 12), is_decoder=True, hash_seed=0
    )
    transformers.ReformerModelWithLMHead(config).save_pretrained(tmp_path / "builtin")
    model = ReformerForCausalLM.from_pretrained(tmp_path / "builtin", dtype=torch.float64)
    model.save_pretrained(tmp_path / "ours")
    assert weights_of(tmp_path / "ours").keys() == EXPECTED_NAMES
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["model_type"] == "hf_reformer"
    assert saved["architectures"] == ["ReformerForCausalLM"]
    load = AutoModelForCausalLM if auto else ReformerForCausalLM
    again = load.from_pretrained(tmp_path / "ours", dtype=torch.float64)
    assert type(again) is ReformerForCausalLM
    assert same_state(again, model)
    assert torch.equal(first_output(again), first_output(model))


# --- initialisation


def kinds_of_weights(model) -> dict[str, float]:
    """Standard deviation that every weight should have; 0 for biases, nan for norms, which are 1."""
    config = model.config
    expected = {}
    for name, parameter in model.named_parameters():
        if "position_embeddings.weights" in name:
            expected[name] = config.axial_norm_std
        elif re.search(r"norm\.weight$", name):
            expected[name] = math.nan
        else:
            expected[name] = 0.0 if name.endswith("bias") else config.initializer_range
        assert parameter.device.type == "cpu"
    return expected


def assert_initialised(model) -> None:
    for (name, parameter), std in zip(model.named_parameters(), kinds_of_weights(model).values(), strict=True):
        if math.isnan(std):
            assert (parameter == 1).all(), name
        elif std == 0:
            assert (parameter == 0).all(), name
        else:
            few = 6 / math.sqrt(parameter.numel())
            assert abs(parameter.mean().item()) < few * std, name
            assert abs(parameter.std().item() / std - 1) < few, name


@every_class
@pytest.mark.parametrize("positions", ["axial", "learned", "rotary"])
def test_every_weight_is_initialised(cls, positions):
    config = tiny_config(
        position_embedding_type=positions,
        initializer_range=0.5,
        axial_norm_std=2.0,
        hidden_size=64,
        feed_forward_size=64,
    )
    torch.manual_seed(0)
    assert_initialised(cls(config))


@every_class
def test_a_model_made_without_memory_is_initialised_alike(cls):
    """Meta device, then real memory, then `init_weights`: how large models are made."""
    config = tiny_config(position_embedding_type="axial", hidden_size=64, initializer_range=0.5, axial_norm_std=2.0)
    with torch.device("meta"):
        model = cls(config)
    assert all(p.device.type == "meta" for p in model.parameters())
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    torch.manual_seed(0)
    model.init_weights()
    assert_initialised(model)
    assert not list(model.buffers())


def test_what_a_folder_lacks_is_initialised(tmp_path):
    model = make_model(ReformerForMaskedLM, hidden_size=64)
    state = {name: x for name, x in model.state_dict().items() if "lm_head" not in name and "position" not in name}
    missing = model.state_dict().keys() - state.keys()
    model.save_pretrained(tmp_path, state_dict=state)
    torch.manual_seed(0)
    again, info = ReformerForMaskedLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == missing
    for name, std in kinds_of_weights(again).items():
        if name in missing and std > 0:
            parameter = again.get_parameter(name)
            assert abs(parameter.std().item() / std - 1) < 6 / math.sqrt(parameter.numel()), name


def test_the_meta_device_of_accelerate_serves():
    with init_empty_weights():
        model = AutoModel.from_config(tiny_config())
    assert all(p.device.type == "meta" for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == make_model(ReformerModel).num_parameters()


# --- resizing


@pytest.mark.parametrize("cls", [ReformerForCausalLM, ReformerForMaskedLM])
def test_tied_embeddings_are_one_weight_with_the_gradient_of_both_uses(cls, tmp_path):
    model, untied = (make_model(cls, **REPEATABLE, tie_word_embeddings=tie) for tie in (True, False))
    table = model.get_input_embeddings().weight
    assert model.lm_head.weight is table
    saved = untied.lm_head.weight.numel() - model.merge_streams.weight.numel()
    assert untied.num_parameters() - model.num_parameters() == saved
    model.train()(IDS, labels=IDS).loss.backward()
    both = table.grad.clone()
    for use in (model.lm_head, model.model.embed_tokens):
        use.weight = torch.nn.Parameter(table.detach().clone())
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        assert use.weight.grad.abs().max() > 0
        both -= use.weight.grad
        use.weight = table
    assert both.abs().max() <= 1e-10
    model.resize_token_embeddings(50)
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert same_state(again, model)


@pytest.mark.parametrize("size", [50, 33])
@pytest.mark.parametrize("cls", [ReformerForCausalLM, ReformerForMaskedLM])
def test_resizing_keeps_old_rows_and_the_bias(cls, size, tmp_path):
    model = make_model(cls)
    weight, bias, table = (
        x.detach().clone() for x in (model.lm_head.weight, model.lm_head.bias, model.model.embed_tokens.weight)
    )
    before = first_output(model) if size > 40 else None
    model.resize_token_embeddings(size)
    kept = min(size, 40)
    assert model.config.vocab_size == size
    assert model.lm_head.weight.shape == (size, 32)
    assert model.lm_head.bias.shape == (size,)
    assert model.model.embed_tokens.weight.shape == (size, 16)
    assert torch.equal(model.lm_head.weight[:kept], weight[:kept])
    assert torch.equal(model.lm_head.bias[:kept], bias[:kept])
    assert torch.equal(model.model.embed_tokens.weight[:kept], table[:kept])
    if before is not None:
        assert max_abs_diff(first_output(model)[..., :40], before) <= 1e-12
        model(IDS % size, labels=torch.full_like(IDS, size - 1)).loss.backward()  # new ids are known
        model.train()(torch.full_like(IDS, size - 1), labels=torch.full_like(IDS, size - 1)).loss.backward()
        model.save_pretrained(tmp_path)
        again = cls.from_pretrained(tmp_path, dtype=torch.float64)
        assert same_state(again, model)
    else:
        with pytest.raises(ValueError, match=f"vocab_size={size}"):
            model(torch.full_like(IDS, size))


def test_a_new_head_and_new_embeddings_can_be_put_in():
    model = make_model(ReformerForCausalLM)
    table, head = torch.nn.Embedding(40, 16).double(), torch.nn.Linear(32, 40).double()
    model.set_input_embeddings(table)
    model.set_output_embeddings(head)
    assert model.get_input_embeddings() is table is model.model.embed_tokens
    assert model.get_output_embeddings() is head
    assert first_output(model).shape == (2, 20, 40)
