"""Conversion of checkpoints: bit for bit between transformers' own Reformer and ours, else with what changes told."""

import gzip
import json
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from builtin_cases import HEADS, TOLERANCE, assert_equal_outputs, make_builtin, tensors
from conftest import make_ids, make_model, max_abs_diff
from reformer_pytorch import ReformerLM
from reformer_pytorch import reformer_pytorch as original
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_reformer
from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM, ReformerForMaskedLM
from hf_reformer.hub.convert import convert, to_builtin, to_window
from hf_reformer.hub.convert.conversion import read
from hf_reformer.hub.convert.reformer_pytorch import from_reformer_pytorch
from hf_reformer.hub.convert.trax import from_trax, read_pickle
from hf_reformer.hub.registration import AUTO_CLASSES, register
from hf_reformer.models.pretrained import LEGACY_LM_HEAD_BIAS

CHUNKS = {
    "local_window": 128,  # the default, of which conversion says nothing
    "attention_mode": "chunk",
    "hash_seed": 1,
    "num_buckets": 4,
}
CHUNKS |= {"lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8}


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_files(one, other):
    """Weights bit for bit, and every field of the config."""
    assert weights(one).keys() == weights(other).keys()
    for key, value in weights(one).items():
        assert value.dtype == weights(other)[key].dtype
        assert torch.equal(value, weights(other)[key])
    assert json.loads((one / "config.json").read_text()) == json.loads((other / "config.json").read_text())


# ---- loading what transformers 4 wrote ----


def older_folder(folder, name, both: bool, kind: str):
    """A folder as transformers 4.15 left it: fill values among the weights, the head's bias by its other name too."""
    builtin = make_builtin(name, num_buckets=8)
    builtin.save_pretrained(folder)
    state = weights(folder)
    for layer in range(2):
        prefix = f"reformer.encoder.layers.{layer}.attention.self_attention."
        for fill in ("mask_value_float16", "mask_value_float32", "self_mask_value_float16", "self_mask_value_float32"):
            state[prefix + fill] = torch.tensor(-1e4)
    bias = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state["lm_head.decoder.bias"] = bias
    if not both:
        del state["lm_head.bias"]
    if kind == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return builtin, bias


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("both", [True, False], ids=["two biases", "the other bias"])
@pytest.mark.parametrize("name", ["ReformerModelWithLMHead", "ReformerForMaskedLM"])
def test_folders_of_transformers_4_are_read_with_the_bias_that_counted(name, both, kind, tmp_path, captured_warnings):
    builtin, bias = older_folder(tmp_path / "old", name, both, kind)
    captured_warnings.clear()
    cls = getattr(hf_reformer, HEADS[name])
    ours, info = cls.from_pretrained(tmp_path / "old", dtype=torch.float64, output_loading_info=True)
    assert captured_warnings == []
    assert not any(info.values()), info
    assert torch.equal(ours.lm_head.bias, bias)
    assert ours.lm_head.bias.requires_grad
    ids = make_ids(2, 40, vocab=50)
    with torch.no_grad():
        assert max_abs_diff(ours(ids).logits, builtin(ids).logits + bias) <= TOLERANCE
    assert convert(tmp_path / "old", tmp_path / "new") == []
    assert torch.equal(cls.from_pretrained(tmp_path / "new", dtype=torch.float64).lm_head.bias, bias)


def test_the_bias_can_be_left_out(tmp_path):
    builtin, _ = older_folder(tmp_path / "old", "ReformerModelWithLMHead", True, "bin")
    (note,) = convert(tmp_path / "old", tmp_path / "new", lm_bias=False)
    assert "bias is 0" in note
    ours = ReformerForCausalLM.from_pretrained(tmp_path / "new", dtype=torch.float64)
    assert_equal_outputs(builtin, ours, make_ids(2, 40, vocab=50))
    with pytest.raises(ValueError, match="no language-model head"):
        convert(tmp_path / "old", tmp_path / "body", head="ReformerModel", lm_bias=False)


@pytest.fixture
def replaced_builtin():
    register(replace_builtin=True)
    yield
    del CONFIG_MAPPING._extra_content["reformer"]


@pytest.mark.parametrize("name", HEADS)
def test_replacing_the_builtin_reads_every_head_without_a_murmur(name, tmp_path, captured_warnings, replaced_builtin):
    builtin = make_builtin(name, num_buckets=8)
    builtin.save_pretrained(tmp_path)
    assert_equal_outputs(builtin, builtin, make_ids(2, 40, vocab=50))  # says once that it pads
    captured_warnings.clear()
    ours = getattr(hf_reformer, HEADS[name])
    auto_classes = [auto_class for auto_class, model_class in AUTO_CLASSES.items() if model_class is ours]
    assert auto_classes
    for auto_class in auto_classes:
        model, info = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert type(model) is ours
        assert not any(info.values()), info
        assert_equal_outputs(builtin, model, make_ids(2, 40, vocab=50))
    assert captured_warnings == []


# ---- transformers' own Reformer, there and back ----


@pytest.mark.parametrize("axial", [True, False], ids=["axial", "learned"])
@pytest.mark.parametrize("name", HEADS)
def test_the_builtin_there_and_back(name, axial, tmp_path, captured_warnings):
    builtin = make_builtin(name, num_buckets=8, axial_pos_embds=axial)
    builtin.save_pretrained(tmp_path / "builtin")
    captured_warnings.clear()
    assert convert(tmp_path / "builtin", tmp_path / "ours") == []
    assert convert(tmp_path / "ours", tmp_path / "again", to="builtin") == []
    assert convert(tmp_path / "again", tmp_path / "ours_again") == []
    assert_same_files(tmp_path / "builtin", tmp_path / "again")
    assert_same_files(tmp_path / "ours", tmp_path / "ours_again")
    again, info = getattr(transformers, name).from_pretrained(tmp_path / "again", output_loading_info=True)
    assert captured_warnings == []
    assert not any(info.values()), info
    ours = getattr(hf_reformer, HEADS[name]).from_pretrained(tmp_path / "ours")
    assert ours.dtype == again.dtype == torch.float64
    ids = make_ids(2, 100, vocab=50)
    assert_equal_outputs(builtin, ours, ids)
    with torch.no_grad():
        for found, expected in zip(tensors(again(ids)), tensors(builtin(ids)), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", HEADS)
def test_ours_there_and_back(name, tmp_path):
    ours = make_model(
        getattr(hf_reformer, HEADS[name]), **CHUNKS, classifier_pooling="first", is_decoder="WithLMHead" in name
    )
    ours.save_pretrained(tmp_path / "ours")
    lm = hasattr(ours, "lm_head")
    notes = convert(tmp_path / "ours", tmp_path / "builtin", to="builtin")
    left_out = lm and LEGACY_LM_HEAD_BIAS not in weights(tmp_path / "builtin")  # by transformers 5.0 to 5.23
    assert [note for note in notes if "leave it out of the logits" in note] == notes
    assert len(notes) == left_out
    convert(tmp_path / "builtin", tmp_path / "again")
    for key, value in weights(tmp_path / "ours").items():
        assert torch.equal(weights(tmp_path / "again")[key], value)
    builtin = getattr(transformers, name).from_pretrained(tmp_path / "builtin")
    if left_out:
        torch.nn.init.zeros_(ours.lm_head.bias)
    assert_equal_outputs(builtin, ours, make_ids(2, 50))


def test_a_model_of_chunk_mode_can_be_converted_whatever_else_is_left_to_the_defaults():
    _, notes = to_builtin(ReformerForMaskedLM(hf_reformer.ReformerConfig(attention_mode="chunk")))
    assert [note for note in notes if "no field" in note] == []


def test_generation_settings_travel_along(tmp_path):
    builtin = make_builtin("ReformerModelWithLMHead", num_buckets=8)
    builtin.generation_config.num_beams = 3
    builtin.save_pretrained(tmp_path / "builtin")
    convert(tmp_path / "builtin", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "again", to="builtin")
    for folder in ("ours", "again"):
        assert json.loads((tmp_path / folder / "generation_config.json").read_text())["num_beams"] == 3


INEXPRESSIBLE = {
    "knows chunks alone": {"attention_mode": "window"},
    "local and lsh layers alone": {"attn_layers": ["full", "lsh"]},
    "rotary": {"position_embedding_type": "rotary"},
    "not two axes": {"axial_pos_shape": [4, 8, 8], "axial_pos_embds_dim": [4, 4, 8]},
    "merges the streams": {"tie_word_embeddings": True},
    "no token types": {"type_vocab_size": 2},
}


@pytest.mark.parametrize("message", INEXPRESSIBLE)
def test_what_the_builtin_cannot_express_is_refused(message):
    with pytest.raises(ValueError, match=message):
        to_builtin(make_model(ReformerForMaskedLM, **{**CHUNKS, **INEXPRESSIBLE[message]}))


def test_heads_and_pooling_that_the_builtin_lacks_are_refused():
    with pytest.raises(ValueError, match="no counterpart of ReformerForTokenClassification"):
        to_builtin(make_model(hf_reformer.ReformerForTokenClassification, **CHUNKS))
    with pytest.raises(ValueError, match="classifies by the first token"):
        to_builtin(make_model(hf_reformer.ReformerForSequenceClassification, **CHUNKS))


def test_what_the_builtin_has_no_field_for_is_told():
    _, notes = to_builtin(make_model(hf_reformer.ReformerModel, **CHUNKS, resample_rotations=False))
    assert notes == ["The built-in has no field for: resample_rotations=False."]
    made, _ = to_builtin(
        make_model(hf_reformer.ReformerModel, **{**CHUNKS, "attn_layers": ["lsh"], "local_attn_chunk_length": None})
    )
    assert made(make_ids(1, 30)).last_hidden_state.isfinite().all()


# ---- folders ----


def test_the_head_is_the_saved_one_or_the_named_one(tmp_path):
    make_builtin("ReformerModelWithLMHead", num_buckets=8).save_pretrained(tmp_path / "lm")
    (note,) = convert(tmp_path / "lm", tmp_path / "body", head="ReformerModel")
    assert "Left out" in note
    assert "lm_head" in note
    assert json.loads((tmp_path / "body" / "config.json").read_text())["architectures"] == ["ReformerModel"]
    with pytest.raises(ValueError, match=r"not a ReformerForQuestionAnswering: missing_keys are \['qa_outputs"):
        convert(tmp_path / "lm", tmp_path / "qa", head="ReformerForQuestionAnswering")
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    (tmp_path / "lm" / "config.json").write_text(json.dumps({**config, "architectures": None}))
    with pytest.raises(ValueError, match="Name with `head`"):
        convert(tmp_path / "lm", tmp_path / "out")
    assert convert(tmp_path / "lm", tmp_path / "out", head="ReformerForCausalLM") == []
    assert not (tmp_path / "qa").exists()


def test_tokenizers_travel_along(tmp_path):
    make_builtin("ReformerModelWithLMHead", num_buckets=8, vocab_size=260).save_pretrained(tmp_path / "builtin")
    tokenizer = ReformerByteTokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "builtin")
    (tmp_path / "builtin" / "notes.txt").write_text("stays")
    convert(tmp_path / "builtin", tmp_path / "ours")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert type(again) is ReformerByteTokenizer
    assert again.chat_template == tokenizer.chat_template
    assert not (tmp_path / "ours" / "notes.txt").exists()


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    make_builtin(num_buckets=8).save_pretrained(tmp_path / "builtin")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        convert(tmp_path / "builtin", tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["file"]
    (tmp_path / "empty").mkdir()
    assert convert(tmp_path / "builtin", tmp_path / "empty") == []


def mistakes(folder):
    make_builtin(num_buckets=8).save_pretrained(folder / "good")
    make_model(hf_reformer.ReformerModel).save_pretrained(folder / "window")
    (folder / "nothing").mkdir()
    (folder / "other").mkdir()
    (folder / "other" / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "cut").mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / "cut" / file).write_bytes((folder / "good" / file).read_bytes()[:900])
    (folder / "text").write_text("some text")
    torch.save({"epoch": 3}, folder / "no_state.pt")
    torch.save({0: torch.zeros(2)}, folder / "numbered.pt")
    torch.save(torch.zeros(2), folder / "tensor.pt")
    (folder / "cut.gz").write_bytes(b"\x1f\x8b\x08" + bytes(range(100)))
    (folder / "marks").write_bytes(b"(" * 10 + b".")
    (folder / "list").mkdir()
    (folder / "list" / "config.json").write_text("[1]")
    return {
        "does not exist": ("absent", {}),
        "no config.json": ("nothing", {}),
        "type 'gpt2'": ("other", {}),
        "config.json is not valid JSON": ("cut", {}),
        "holds a list, but must hold an object": ("list", {}),
        "no pickle of Trax": ("text", {}),
        "cut.gz is no pickle of Trax": ("cut.gz", {}),
        "checkpoint of reformer-pytorch": ("marks", {"kind": "reformer-pytorch"}),
        "no_state.pt holds no state dict": ("no_state.pt", {}),
        "numbered.pt holds no state dict": ("numbered.pt", {}),
        "tensor.pt holds no state dict": ("tensor.pt", {}),
        "is unknown": ("good", {"to": "gpt2"}),
        "Choose one of": ("good", {"kind": "gpt2"}),
        "is for folders": ("no_state.pt", {"head": "ReformerModel"}),
        "pass fields only for window mode": ("good", {"fields": {"hidden_size": 3}}),
        "window mode already": ("window", {"attention_mode": "window"}),
        "cannot be turned into chunks": ("window", {"attention_mode": "chunk"}),
        "no fields of ReformerConfig": ("good", {"attention_mode": "window", "fields": {"windows": 3}}),
        "Window mode cannot be made": ("good", {"attention_mode": "window", "fields": {"num_buckets": 3}}),
        "knows chunks alone": ("good", {"attention_mode": "window", "to": "builtin"}),
    }


def test_mistakes_are_told_and_write_nothing(tmp_path):
    for message, (source, options) in mistakes(tmp_path).items():
        with pytest.raises((ValueError, OSError), match=message):
            convert(tmp_path / source, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()


# ---- window mode ----


def test_window_mode_keeps_the_weights_and_shows_what_chunks_showed(tmp_path):
    ours = make_model(
        ReformerForCausalLM, **{**CHUNKS, "lsh_attn_chunk_length": 16, "local_num_chunks_before": 2, "num_hashes": 3}
    )
    ours.save_pretrained(tmp_path / "chunk")
    notes = convert(tmp_path / "chunk", tmp_path / "window", attention_mode="window")
    assert "lsh_window=24, local_window=20" in notes[0]
    made = ReformerForCausalLM.from_pretrained(tmp_path / "window")
    assert made.config.attention_mode == "window"
    assert (made.config.lsh_window, made.config.local_window, made.config.num_buckets) == (24, 20, 8)
    assert (made.config.hash_seed, made.config.num_hashes) == (1, 3)
    for key, value in ours.state_dict().items():
        assert torch.equal(made.state_dict()[key], value)
    ids = make_ids(1, 100)
    with torch.no_grad():
        whole, short = made(ids).logits, made(ids[:, :60]).logits
        assert max_abs_diff(whole[:, :60], short) <= 1e-10  # window mode's own promise, which chunks don't keep
        assert max_abs_diff(whole, ours(ids).logits) > 1e-3


def test_window_mode_of_short_inputs_without_hashing_is_chunk_mode():
    """Where local chunks and windows both show all that came before, nothing changes at all."""
    ours = make_model(ReformerForCausalLM, **{**CHUNKS, "attn_layers": ["local", "local"]})
    made, _ = to_window(ours)
    assert (made.config.lsh_window, made.config.local_window) == (12, 12)
    ids = make_ids(2, 12)
    with torch.no_grad():
        assert max_abs_diff(made(ids).logits, ours(ids).logits) <= 1e-10


def test_bidirectional_windows_show_as_many_places_as_chunks():
    made, _ = to_window(make_model(ReformerForMaskedLM, **CHUNKS, lsh_num_chunks_after=1))
    assert (made.config.lsh_window, made.config.local_window) == (24, 16)


def test_fields_of_window_mode_can_be_given():
    made, notes = to_window(make_model(ReformerForCausalLM, **CHUNKS), {"lsh_window": 11, "num_buckets": 6})
    assert (made.config.lsh_window, made.config.local_window, made.config.num_buckets) == (11, 12, 6)
    assert "num_buckets=6 (were 4)" in notes[0]


def test_a_field_cannot_keep_window_mode_from_being_made():
    made, _ = to_window(make_model(ReformerForCausalLM, **CHUNKS), {"attention_mode": "chunk"})
    assert made.config.attention_mode == "window"


# ---- reformer-pytorch ----

SIZES = {"heads": 2, "dim_head": 8, "bucket_size": 8, "n_hashes": 2, "max_seq_len": 64, "causal": True}
POSITIONS = {
    "rotary": {},
    "absolute": {"absolute_position_emb": True},
    "axial": {"axial_position_emb": True, "emb_dim": 8},
    "fixed, tied head": {"fixed_position_emb": True, "weight_tie_embedding": True},
    "full attention": {"use_full_attn": True, "absolute_position_emb": True},
    "full attention, rotary ignored": {"use_full_attn": True},
    "one value head": {"absolute_position_emb": True, "one_value_head": True, "weight_tie": True},
}


def make_original(**arguments):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ReformerLM(20, 16, 2, random_rotations_per_head=True, **{**SIZES, **arguments}).double().eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "toqk" in key:
                    parameter *= 3  # so that attention is far from uniform
                elif parameter.dim() == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model


def same_rotations(ours):
    """`torch.randn` as reformer-pytorch shall find it: the rotations that `ours` draws, for every row of the batch."""
    config, draw = ours.config, torch.randn

    def randn(*shape, **options):
        if "generator" in options:
            return draw(*shape, **options)
        rows, size, rounds, half = shape[0]
        generator = torch.Generator().manual_seed(config.hash_seed)
        drawn = draw(config.num_attention_heads, size, rounds, half, generator=generator, dtype=torch.float64)
        if config.position_embedding_type == "rotary":  # pairs are neighbors there
            drawn = drawn.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        return drawn.repeat(rows // config.num_attention_heads, 1, 1, 1)

    return mock.patch.object(torch, "randn", randn)


def our_keys(x, p=2, dim=-1):
    """Our normalisation of keys, with 1e-6 under the root, in the scale of converted weights."""
    return x / (x.pow(2).sum(dim, keepdim=True) + 1e-6 * x.shape[dim] ** 2).sqrt()


def both_streams(theirs, ours, ids, normalise):
    """Both models' residual streams (B, T, 2 D) and logits."""
    seen = {}
    theirs.reformer.layers.register_forward_hook(lambda module, args, out: seen.update(theirs=out))
    ours.model.norm.register_forward_pre_hook(lambda module, args: seen.update(ours=args[0]))
    with torch.no_grad(), same_rotations(ours), mock.patch.object(original.F, "normalize", normalise):
        logits = theirs(ids), ours(ids, num_buckets=ids.shape[1] // 8).logits
    return seen["theirs"], seen["ours"], *logits


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_streams_are_those_of_reformer_pytorch(positions, causal):
    """With the same rotations: to rounding with our normalisation of keys, to about 1e-6 with theirs."""
    arguments = {**SIZES, **POSITIONS[positions], "causal": causal}
    theirs = make_original(**arguments)
    ours, _ = from_reformer_pytorch(theirs.state_dict(), arguments)
    ours.config.hash_seed = 1
    for length in (64, 32):
        ids = make_ids(2, length, vocab=20, seed=length)
        exactly = 1e-6 if positions == "rotary" else 1e-10  # its angles are float32
        for normalise, tolerance in ((our_keys, exactly), (original.F.normalize, 1e-4)):
            expected, found, *_ = both_streams(theirs, ours, ids, normalise)
            assert max_abs_diff(found, expected) <= tolerance


def test_logits_are_those_of_reformer_pytorch_times_a_number_of_each_token():
    arguments = {**SIZES, "absolute_position_emb": True}
    theirs = make_original(**arguments)
    ours, notes = from_reformer_pytorch(theirs.state_dict(), arguments)
    ours.config.hash_seed = 1
    streams, _, expected, found = both_streams(theirs, ours, make_ids(2, 64, vocab=20), our_keys)
    common = ours.lm_head(ours.model.norm.bias)
    x1, x2 = streams.chunk(2, dim=-1)
    factor = ((x1 + x2) / 2).std(-1, correction=0) / streams.std(-1, correction=0)
    assert 0.8 < factor.min() < factor.max() <= 1
    assert max_abs_diff(found - common, (expected - common) * factor[..., None]) <= 1e-4  # eps of the norms
    agree = (found.argmax(-1) == expected.argmax(-1)).float().mean()
    assert agree > 0.9
    assert "multiplied by a positive number" in notes[0]


WITHOUT_COUNTERPART = {
    "use_scale_norm": {"use_scale_norm": True},
    "use_rezero": {"use_rezero": True},
    "ff_glu": {"ff_glu": True},
    "num_mem_kv": {"num_mem_kv": 2},
    "pkm_layers": {"pkm_layers": (1,)},
    "n_local_attn_heads": {"n_local_attn_heads": 1},
    "return_embeddings": {"return_embeddings": True},
}


@pytest.mark.parametrize("name", WITHOUT_COUNTERPART)
def test_what_has_no_counterpart_is_refused(name):
    model = make_original(**WITHOUT_COUNTERPART[name])
    with pytest.raises(ValueError, match=f"`{name}` has no counterpart"):
        from_reformer_pytorch(model.state_dict(), {**SIZES, **WITHOUT_COUNTERPART[name]})
    if name != "n_local_attn_heads":  # leaves no trace in the weights
        with pytest.raises(ValueError, match=f"`{name}` has no counterpart"):
            from_reformer_pytorch(model.state_dict(), SIZES)


def test_arguments_of_reformer_pytorch_are_checked():
    state = make_original().state_dict()
    for message, arguments in {
        r"\['bucket_size'\] cannot be read": {**SIZES, "bucket_size": None},
        "`max_seq_len` cannot be read": {**SIZES, "max_seq_len": None},
        "`dim_head=16` contradicts": {**SIZES, "dim_head": 16},
        r"\['buckets'\] are no arguments": {**SIZES, "buckets": 8},
        "must be a name": {**SIZES, "ff_activation": "Swosh"},
    }.items():
        given = {name: value for name, value in arguments.items() if value is not None}
        with pytest.raises(ValueError, match=message):
            from_reformer_pytorch(state, given)
    with pytest.raises(ValueError, match="occurs 0 times"):
        from_reformer_pytorch({"weight": torch.zeros(2)}, SIZES)


def test_shapes_tell_what_they_can_and_notes_the_rest(tmp_path):
    model = make_original(absolute_position_emb=True, causal=False).float()
    torch.save({"step": 1, "model": {f"module.net.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pt")
    given = {"causal": False, "bucket_size": 8, "n_hashes": 2, "heads": 2, "full_attn_thres": 32, "ff_dropout": 0.1}
    notes = convert(tmp_path / "w.pt", tmp_path / "ours", fields=given)
    assert any("up to `full_attn_thres=32`" in note for note in notes)
    ours = ReformerForMaskedLM.from_pretrained(tmp_path / "ours")
    assert ours.dtype == torch.float32
    assert (ours.config.hidden_dropout_prob, ours.config.hidden_act) == (0.1, "gelu")
    assert (ours.config.max_position_embeddings, ours.config.attention_head_size) == (64, 8)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "w.safetensors")
    assert type(read(tmp_path / "w.safetensors", "reformer-pytorch", None, given)[0]) is ReformerForMaskedLM


def test_a_bias_that_attention_cannot_reach_is_told():
    arguments = {**SIZES, "heads": 1, "absolute_position_emb": True}
    _, notes = from_reformer_pytorch(make_original(**arguments).state_dict(), arguments)
    assert any("`to_out.bias` is kept but for" in note for note in notes)


# ---- Trax ----


def to_trax(builtin, chunked: bool):
    """The built-in's weights as Trax holds them: heads apart, matrices from left to right, four parts a layer."""
    config, state = builtin.config, {key: value.numpy() for key, value in builtin.state_dict().items()}
    heads, size, hidden = config.num_attention_heads, config.attention_head_size, config.hidden_size

    def pair(name, dense=False):
        weight = state[name + ".weight"]
        return (weight.T if dense else weight, state[name + ".bias"])

    layers = []
    for i, kind in enumerate(config.attn_layers):
        name = f"reformer.encoder.layers.{i}."
        inputs = ("query_key", "value") if kind == "lsh" else ("query", "key", "value")
        attention = []
        for projection in inputs:
            matrix = state[f"{name}attention.self_attention.{projection}.weight"]
            attention.append(np.stack([matrix[h * size : (h + 1) * size].T for h in range(heads)]))
        out = state[f"{name}attention.output.dense.weight"]
        attention.append(np.stack([out[:, h * size : (h + 1) * size].T for h in range(heads)]))
        assert attention[0].shape == (heads, hidden, size)
        inner = (
            pair(f"{name}feed_forward.layer_norm"),
            pair(f"{name}feed_forward.dense.dense", dense=True),
            (),
            (),
            pair(f"{name}feed_forward.output.dense", dense=True),
        )
        inner = ((), (), inner, ()) if chunked else inner
        layers += [((pair(f"{name}attention.layer_norm"),), tuple(attention)), (), (((), ((), (), inner)),), ()]
    positions = [state[f"reformer.embeddings.position_embeddings.weights.{axis}"][None] for axis in (0, 1)]
    head = (state["lm_head.decoder.weight"].T, state["lm_head.bias"])
    words = state["reformer.embeddings.word_embeddings.weight"]
    return {
        "step": 5,
        "weights": [
            (),
            words,
            (),
            tuple(positions),
            (),
            layers,
            (),
            pair("reformer.encoder.layer_norm"),
            (),
            head,
        ],
    }


TRAX_FIELDS = {"num_hashes": 1, "num_buckets": 8, "lsh_attn_chunk_length": 16, "local_attn_chunk_length": 8}


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked feed-forward", "whole"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("compress", [gzip.compress, bytes], ids=["gzip", "plain"])
def test_trax_weights_are_read(chunked, protocol, compress, tmp_path):
    builtin = make_builtin("ReformerModelWithLMHead", num_buckets=8, layer_norm_eps=1e-6)
    bias = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        builtin.lm_head.bias.copy_(bias)
    (tmp_path / "model.pkl").write_bytes(compress(pickle.dumps(to_trax(builtin, chunked), protocol=protocol)))
    notes = convert(tmp_path / "model.pkl", tmp_path / "ours", fields={**TRAX_FIELDS, "hash_seed": 1})
    assert "token 0 is put in front" in notes[0]
    ours = ReformerForCausalLM.from_pretrained(tmp_path / "ours")
    for name in ("axial_pos_shape", "axial_pos_embds_dim", "max_position_embeddings", "feed_forward_size"):
        assert getattr(ours.config, name) == getattr(builtin.config, name)
    ids = make_ids(2, 60, vocab=50)
    with torch.no_grad():
        assert max_abs_diff(ours(ids).logits, builtin(ids).logits + bias) <= TOLERANCE


class History:
    """What Trax's trainer keeps beside the weights, an object of a class of its own."""

    def __init__(self):
        self._values = {"train": {"loss": [(1, 2.5)]}}


def flat(tree):
    """A tree's arrays in their order, as Trax has written them since June 2020."""
    return [array for part in tree for array in flat(part)] if isinstance(tree, (list, tuple)) else [tree]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("layout", ["weights", "flat_weights"])
def test_what_the_trainer_of_trax_wrote_is_read(layout, protocol, tmp_path):
    tree = to_trax(make_builtin("ReformerModelWithLMHead", num_buckets=8), chunked=True)["weights"]
    record = {"step": 1, "slots": {1, 2}, "history": History(), "state": (), "version_timestamp": "Jan-13-2020"}
    record |= {"weights": tree} if layout == "weights" else {"flat_weights": flat(tree), "input_signature": History}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(record, protocol=protocol))
    found, _ = from_trax(read_pickle(tmp_path / "model.pkl"), TRAX_FIELDS)
    expected, _ = from_trax(tree, TRAX_FIELDS)
    assert found.config.to_dict() == expected.config.to_dict()
    for key, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key


def test_weights_that_trax_wrote_elsewhere_are_asked_for():
    with pytest.raises(ValueError, match=r"no weights.*\.weights\.npy\.gz.*pickle"):
        from_trax({"step": 5, "flat_weights": 2, "slots": 2}, TRAX_FIELDS)


def test_trax_weights_are_checked():
    tree = to_trax(make_builtin("ReformerModelWithLMHead"), chunked=False)
    lsh = {name: value for name, value in TRAX_FIELDS.items() if name != "num_buckets"}
    for message, given, fields in (
        ("num_buckets", tree, lsh),
        ("`hidden_size=7` contradicts the weights: 32", tree, {**TRAX_FIELDS, "hidden_size": 7}),
        (r"\['num_hash'\] are no fields", tree, {**TRAX_FIELDS, "num_hash": 1}),
        ("laid out", {"weights": tree["weights"][:5]}, TRAX_FIELDS),
        ("laid out", [[1]], TRAX_FIELDS),
        ("laid out", [np.zeros(3)] * 10, TRAX_FIELDS),
        ("positions are not axial", [*tree["weights"][:3], np.zeros((1, 512, 32)), *tree["weights"][4:]], TRAX_FIELDS),
    ):
        with pytest.raises(ValueError, match=message):
            from_trax(given, fields)


class Dangerous:
    def __reduce__(self):
        return os.system, ("echo run",)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_runs_no_code(protocol, tmp_path):
    good = {"a": [np.arange(6, dtype=np.float32).reshape(2, 3), np.float32(2)], "b": OrderedDict(c=(1, "x", None))}
    (tmp_path / "good").write_bytes(pickle.dumps(good, protocol=protocol))
    found = read_pickle(tmp_path / "good")
    assert np.array_equal(found["a"][0], good["a"][0])
    assert found["b"]["c"] == good["b"]["c"]
    for bad in (Dangerous(), torch.zeros(2), {"weights": [eval]}):
        (tmp_path / "bad").write_bytes(pickle.dumps(bad, protocol=protocol))
        with pytest.raises(ValueError, match=r"found a `(posix|nt|torch|builtins|__builtin__)\."):
            from_trax(read_pickle(tmp_path / "bad"), TRAX_FIELDS)


# ---- the page ----

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


@pytest.mark.slow
def test_the_page_shows_what_its_code_prints(capsys, monkeypatch):
    monkeypatch.chdir(PAGE.parents[1])
    (code,) = re.findall(
        r"```python\n((?:(?!```).)*to_window.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    verbosity = transformers.logging.get_verbosity()
    with torch.random.fork_rng(devices=[]):
        exec(compile(code, "docs/checkpoints.md", "exec"), {})
    transformers.logging.set_verbosity(verbosity)
    chunks, average, most = map(float, re.findall(r"\d+\.\d{3,4}", capsys.readouterr().out))
    assert abs(average - chunks) < 0.03
    assert most < chunks + 0.1


def test_the_page_names_tests_that_exist():
    named = re.findall(r"(test_\w+\.py)::(test_\w+)", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 20
    for file, test in named:
        (found,) = Path(__file__).parents[1].rglob(file)
        assert f"def {test}(" in found.read_text(encoding="utf-8")
