"""ReformerConfig: defaults, saving and loading, every rule it checks, and that nobody changes it."""

import copy
import json
import time

import pytest
import torch
import transformers
from conftest import REPEATABLE, SMALL_WINDOWS, TINY, make_ids, make_model, max_abs_diff, tiny_config
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

import hf_reformer
from hf_reformer import ReformerConfig, ReformerForCausalLM, ReformerModel, configuration_reformer
from hf_reformer.cache.cache import CACHE_NAME
from hf_reformer.configuration_reformer import from_builtin


def contents(config) -> dict:
    """What a config says, without the folder that it was read from; sequences as lists."""
    fields = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def reload(config, folder, **overrides):
    config.save_pretrained(folder)
    return AutoConfig.from_pretrained(folder, **overrides)


# --- defaults


def test_the_default_config_is_silent(captured_warnings):
    ReformerConfig()
    assert captured_warnings == []


def test_defaults():
    config = ReformerConfig()
    assert config.model_type == "hf_reformer"
    assert config.attention_mode == "window"
    assert config.attn_layers == ("local", "lsh") * 3
    assert config.num_hidden_layers == 6
    assert config.num_buckets == 32
    assert config.position_embedding_type == "rotary"
    assert config.axial_pos_embds is False
    assert config.lsh_centering
    assert config.lsh_rotary == 1
    assert config.initializer_range == 0.0375
    assert config.axial_pos_shape == (64, 64)
    assert config.axial_pos_embds_dim == (64, 192)
    assert (config.lsh_window, config.local_window, config.lsh_exploration_orders) == (128, 128, 1)
    assert config.lsh_include_local
    assert config.reversible
    assert config.residual_precision == "float64"


def test_the_number_of_layers_alternates_kinds():
    assert tiny_config(attn_layers=None, num_hidden_layers=3).attn_layers == ("local", "lsh", "local")
    assert ReformerConfig(attn_layers=["full"]).num_hidden_layers == 1


@pytest.mark.parametrize(
    ("is_decoder", "given", "pooling"),
    [(False, None, "mean"), (True, None, "last"), (True, "mean", "mean"), (False, "first", "first")],
)
def test_pooling_follows_the_direction_unless_given(is_decoder, given, pooling):
    assert tiny_config(is_decoder=is_decoder, classifier_pooling=given).pooling == pooling


# --- what follows from other fields


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_initial_weights_follow_the_width(width):
    """Products with vectors of variance 1 have a variance of 0.36 at every width."""
    config = ReformerConfig(hidden_size=width)
    assert config.initializer_range**2 * width == pytest.approx(0.36, rel=0.01)
    assert ReformerConfig(hidden_size=width, initializer_range=0.02).initializer_range == 0.02


def test_a_model_of_version_0_1_computes_as_it_did(tmp_path):
    """Its config.json knows nothing of centering."""
    tiny_config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    assert saved["lsh_centering"] is True
    del saved["lsh_centering"]
    file.write_text(json.dumps(saved))
    for config in (
        ReformerConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        ReformerConfig(**saved),
    ):
        assert config.lsh_centering is False
    assert ReformerConfig.from_pretrained(tmp_path, lsh_centering=True).lsh_centering is True


@torch.no_grad()
def test_a_share_of_the_mean_between_none_and_all(tmp_path):
    logits = {}
    for share in (True, 1.0, 0.5, 0.0, False):
        config = tiny_config(lsh_centering=share)
        config.save_pretrained(tmp_path)
        assert ReformerConfig.from_pretrained(tmp_path).lsh_centering == share
        torch.manual_seed(0)
        logits[str(share)] = ReformerModel(config).eval()(make_ids(2, 200)).last_hidden_state
    assert torch.equal(logits["True"], logits["1.0"])
    assert torch.equal(logits["False"], logits["0.0"])
    assert not torch.equal(logits["0.5"], logits["True"])
    assert not torch.equal(logits["0.5"], logits["False"])


# --- positions


@given(max_positions=st.integers(1, 2**22), hidden_size=st.integers(2, 600))
def test_default_axes_cover_every_position(max_positions, hidden_size):
    config = tiny_config(max_position_embeddings=max_positions, hidden_size=hidden_size)
    rows, columns = config.axial_pos_shape
    assert max_positions <= rows * columns <= max(4, 2 * max_positions)
    assert sum(config.axial_pos_embds_dim) == hidden_size


@pytest.mark.parametrize(
    ("shape", "dims"), [([256], [16]), ([16, 16], [4, 12]), ([4, 8, 8], [2, 4, 10]), ([256], None), ([4, 8, 8], None)]
)
def test_any_number_of_axes(shape, dims):
    model = make_model(ReformerModel, axial_pos_shape=shape, axial_pos_embds_dim=dims)
    assert len(model.config.axial_pos_embds_dim) == len(shape)
    weights = [weight.expand(*shape, -1) for weight in model.position_embeddings.weights]
    expected = torch.cat(weights, dim=-1).reshape(256, 16)
    assert torch.equal(model.position_embeddings(torch.arange(256)[None])[0], expected)
    assert model(make_ids(1, 256)).last_hidden_state.isfinite().all()


def test_the_older_flag_chooses_learned_positions():
    config = tiny_config(axial_pos_embds=False)
    assert config.position_embedding_type == "learned"
    assert isinstance(ReformerModel(config).position_embeddings, torch.nn.Embedding)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "rotary"),
        ({"axial_pos_shape": [16, 16]}, "axial"),
        ({"axial_pos_embds_dim": [4, 12]}, "axial"),
        ({"axial_pos_embds": True}, "axial"),
        ({"axial_pos_embds": False}, "learned"),
        ({"axial_pos_embds": False, "axial_pos_shape": [16, 16]}, "learned"),
        ({"attention_mode": "chunk"}, "axial"),
        ({"attention_mode": "chunk", "axial_pos_embds": False}, "learned"),
        ({"attention_mode": "chunk", "position_embedding_type": "rotary"}, "rotary"),
    ],
)
def test_the_kind_of_positions_follows_the_fields_of_axial_ones_and_the_mode(fields, expected):
    assert tiny_config(**fields).position_embedding_type == expected


@pytest.mark.parametrize("kind", ["axial", "learned", "rotary"])
def test_the_flag_follows_the_kind_of_positions(kind, tmp_path):
    config = tiny_config(position_embedding_type=kind)
    assert config.axial_pos_embds is (kind == "axial")
    assert contents(reload(config, tmp_path)) == contents(config)


# --- what contradicts itself

BAD = [
    ({"num_buckets": 7}, "num_buckets=7", "even number"),
    ({"num_buckets": 0}, "num_buckets=0", "even number"),
    ({"num_buckets": [4, 5]}, r"num_buckets=\(4, 5\)", r"\[16, 32\]"),
    ({"num_buckets": []}, r"num_buckets=\(\)", "Choose"),
    ({"num_buckets": [65536, 65536]}, r"makes 4294967296 buckets", "max_position_embeddings / lsh_window"),
    ({"attn_layers": ["local", "global"]}, r"\['global'\]", "'local', 'lsh', 'full'"),
    ({"attn_layers": []}, "empty", "at least one layer"),
    ({"attn_layers": ["lsh"], "num_hidden_layers": 2}, "num_hidden_layers=2.*1 layers", "only one of the two"),
    ({"position_embedding_type": "absolute"}, "position_embedding_type='absolute'", "'axial', 'learned', 'rotary'"),
    (
        {"position_embedding_type": "rotary", "axial_pos_embds": True},
        "axial_pos_embds=True.*'rotary'",
        "`position_embedding_type` alone",
    ),
    (
        {"position_embedding_type": "axial", "axial_pos_embds": False},
        "axial_pos_embds=False.*'axial'",
        "`position_embedding_type` alone",
    ),
    ({"position_embedding_type": "rotary", "attention_head_size": 7}, "attention_head_size=7", "even size"),
    ({"axial_pos_embds_dim": [4, 4]}, r"\(4, 4\).*8.*hidden_size=16", "leave the field out"),
    ({"axial_pos_embds_dim": [16, 0]}, r"\(16, 0\)", "positive"),
    ({"axial_pos_embds_dim": [4, 4, 8]}, r"2 axes.*\(4, 4, 8\).* 3", "every axis"),
    ({"axial_pos_shape": [8, 8]}, r"\(8, 8\).*64.*max_position_embeddings=256", "Enlarge.*rotary"),
    ({"axial_pos_shape": [0, 5]}, r"axial_pos_shape=\(0, 5\)", "at least 1.*Leave the field out"),
    ({"axial_pos_shape": []}, r"\(\).*0 axes", "every axis"),
    ({"attention_mode": "sparse"}, "attention_mode='sparse'", "'window', 'chunk'"),
    ({"residual_precision": "bfloat16"}, "residual_precision='bfloat16'", "'float64', 'float32'"),
    ({"classifier_pooling": "max"}, "classifier_pooling='max'", "'mean', 'last', 'first'"),
    ({"problem_type": "ranking"}, "problem_type='ranking'", "'regression'"),
    ({"vocab_size": 0}, "vocab_size=0", "at least 1"),
    ({"num_hashes": 0}, "num_hashes=0", "at least 1"),
    ({"lsh_window": 0}, "lsh_window=0", "at least 1"),
    ({"local_window": -3}, "local_window=-3", "at least 1"),
    ({"max_position_embeddings": 0}, "max_position_embeddings=0", "at least 1"),
    ({"lsh_exploration_orders": -1}, "lsh_exploration_orders=-1", "not be negative"),
    ({"chunk_size_feed_forward": -1}, "chunk_size_feed_forward=-1", "not be negative"),
    ({"chunk_size_lm_head": -1}, "chunk_size_lm_head=-1", "not be negative"),
    ({"attention_mode": "chunk", "lsh_attn_chunk_length": None}, "lsh_attn_chunk_length=None", "at least 1"),
    ({"attention_mode": "chunk", "lsh_num_chunks_before": -1}, "lsh_num_chunks_before=-1", "not be negative"),
    ({"hidden_dropout_prob": 1.5}, "hidden_dropout_prob=1.5", "between 0 and 1"),
    ({"lsh_centering": 1.5}, "lsh_centering=1.5", "between 0 and 1"),
    ({"lsh_centering": -0.5}, "lsh_centering=-0.5", "between 0 and 1"),
    ({"lsh_centering": float("nan")}, "lsh_centering=nan", "between 0 and 1"),
    ({"local_attention_probs_dropout_prob": -0.1}, "probs_dropout_prob=-0.1", "between 0 and 1"),
    (
        {"attention_mode": "chunk", "is_decoder": True, "lsh_num_chunks_after": 1},
        "lsh_num_chunks_after=1.*to come",
        "Set it to 0, or `is_decoder=False`",
    ),
    (
        {"attention_mode": "chunk", "is_decoder": True, "local_num_chunks_after": 2},
        "local_num_chunks_after=2.*to come",
        "Set it to 0",
    ),
]


NAN, INF = float("nan"), float("inf")
TOO_MANY_LABELS = {str(i): "a" for i in range(2**18 + 1)}
ABSURD = [
    {"num_hashes": 10**6},
    {"num_hashes": 1000, "num_buckets": 1024},
    {"num_buckets": 2**24},
    {"num_buckets": 2**20},
    {"num_buckets": [2**15, 4]},
    {"num_buckets": [2] * 100_000},
    {"lsh_exploration_orders": 10**6},
    {"num_hidden_layers": 10**9},
    {"num_hidden_layers": -(10**9)},
    {"attn_layers": ["lsh"] * 10**5},
    {"decoder_attn_layers": ["lsh"] * 10**5},
    {"num_labels": 10**6},
    {"num_labels": -1},
    {"num_labels": "7"},
    {"num_labels": 2.5},
    {"num_labels": True},
    {"id2label": TOO_MANY_LABELS},
    {"id2label": [1, 2]},
    {"id2label": {"x": "a"}},
    {"label2id": 5},
    {"vocab_size": 10**12},
    {"vocab_size": 10**400},
    {"hidden_size": 10**9},
    {"hidden_size": 10**6, "feed_forward_size": 10**7},
    {"num_attention_heads": 10**9},
    {"attention_head_size": 10**9},
    {"feed_forward_size": 10**12},
    {"max_position_embeddings": 10**18},
    {"max_position_embeddings": 10**5000},
    {"axial_pos_shape": [2] * 10**5, "axial_pos_embds_dim": [1] * 10**5},
    {"axial_pos_shape": [10**400, 1], "axial_pos_embds_dim": [8, 8]},
    {"eos_token_id": [1] * 10**5},
    {"pad_token_id": 10**30},
    {"chunk_size_feed_forward": True},
    {"chunk_size_feed_forward": 10**30},
    {"attention_mode": "chunk", "lsh_num_chunks_before": 10**9},
    {"attention_mode": "chunk", "lsh_attn_chunk_length": 10**9},
    {"attention_mode": "chunk", "lsh_attn_chunk_length": 10_007, "local_attn_chunk_length": 10_009},
    *({"layer_norm_eps": value} for value in (NAN, INF, -1.0, True, "1e-5")),
    *({"rope_theta": value} for value in (NAN, INF, -1.0, 0, 1e-300, True)),
    *({name: value} for name in ("initializer_range", "axial_norm_std") for value in (NAN, INF, -1.0, 1e300)),
    *({"hidden_dropout_prob": value} for value in (NAN, INF, True, "0.1")),
    {"hidden_act": "nonsense"},
    {"dtype": "nonsense"},
    {"dtype": "load"},
    {"torch_dtype": "load"},
]


@pytest.mark.parametrize("fields", ABSURD, ids=["-".join(fields) for fields in ABSURD])
def test_an_absurd_config_is_refused_before_anything_of_its_size_is_made(fields):
    begin = time.monotonic()
    with pytest.raises(StrictDataclassError, match="|".join([*fields, "dtype", "parameters"])):
        tiny_config(**fields)
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize("window", [10**9, 2**31, 2**32 + 1, 2**40, 10**30])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_windows_without_limit_see_everything(backend, window):
    """In one forward and step by step."""
    ids, windows = make_ids(1, 40), ("lsh_window", "local_window")
    few = {"attention_backend": backend, "num_buckets": 4, "dtype": torch.float32}
    expected, model = (make_model(ReformerForCausalLM, **few, **dict.fromkeys(windows, w)) for w in (100, window))
    with torch.no_grad():
        whole = expected(ids).logits
        assert max_abs_diff(model(ids).logits, whole) < 1e-5
        cache = model(ids[:, :38], use_cache=True)[CACHE_NAME]
        for i in (38, 39):
            step = model(ids[:, i : i + 1], use_cache=True, **{CACHE_NAME: cache}).logits
            assert max_abs_diff(step[:, 0], whole[:, i]) < 1e-4
    assert model.config.lsh_window == model.config.local_window == min(window, 2**30)


@pytest.mark.parametrize("call", [{"num_hashes": 10**6}, {"num_buckets": 2**18}, {"num_buckets": [2] * 10**5}])
def test_a_call_cannot_ask_for_more_than_a_config(call):
    with pytest.raises(ValueError, match=next(iter(call))):
        make_model(ReformerModel, num_buckets=4)(make_ids(1, 5), **call)


@pytest.mark.parametrize(("fields", "found", "remedy"), BAD, ids=[str(fields) for fields, *_ in BAD])
def test_a_contradiction_is_named_with_its_remedy(fields, found, remedy):
    with pytest.raises(Exception, match=f"(?s){found}") as caught:
        tiny_config(**fields)
    assert caught.match(f"(?s){remedy}")
    assert isinstance(caught.value, (ValueError, TypeError)) or "Validation" in type(caught.value).__name__


@pytest.mark.parametrize(
    "fields",
    [{"hidden_size": "16"}, {"hidden_size": 16.0}, {"reversible": 1}, {"num_buckets": 4.0}, {"num_hashes": None}],
)
def test_a_wrong_type_is_refused(fields):
    (name,) = fields
    with pytest.raises(Exception, match=name):
        tiny_config(**fields)


def test_whole_numbers_serve_as_floats():
    config = tiny_config(hidden_dropout_prob=0, lsh_attention_probs_dropout_prob=1, axial_norm_std=2, rope_theta=500)
    assert config.rope_theta == 500


def test_a_causal_model_refuses_chunks_to_come_whatever_its_config_says():
    config = tiny_config(attention_mode="chunk", lsh_num_chunks_after=1)
    with pytest.raises(Exception, match="lsh_num_chunks_after=1"):
        ReformerForCausalLM(config)


def test_what_a_stack_does_not_use_is_not_checked():
    tiny_config(attention_mode="chunk", is_decoder=True, attn_layers=["local"], lsh_num_chunks_after=1)
    tiny_config(is_decoder=True, lsh_num_chunks_after=1)  # window mode has no chunks
    tiny_config(position_embedding_type="rotary", axial_pos_shape=[2, 2])


# --- saving and loading

UNUSUAL = [
    {},
    {"num_buckets": [4, 8], "num_hashes": 3, "hash_seed": 5},
    {"axial_pos_shape": [4, 8, 8], "axial_pos_embds_dim": [2, 4, 10]},
    {"position_embedding_type": "rotary", "attn_layers": ["full", "lsh"], "is_decoder": True},
    {"attention_mode": "chunk", "lsh_num_chunks_after": 1, "classifier_pooling": "first"},
    {"num_labels": 5, "problem_type": "multi_label_classification", "eos_token_id": [1, 2], "bos_token_id": 3},
    {"reversible": False, "residual_precision": "float32", "attention_backend": "torch", "classifier_dropout": 0.3},
    {"max_position_embeddings": 2**19},
]


@pytest.mark.parametrize("fields", UNUSUAL, ids=str)
def test_saving_and_loading_gives_an_equal_config(fields, tmp_path):
    config = tiny_config(**fields)
    again = reload(config, tmp_path)
    assert type(again) is ReformerConfig
    assert contents(again) == contents(config)
    assert contents(ReformerConfig(**config.to_dict())) == contents(config)
    assert contents(copy.deepcopy(config)) == contents(config)
    again.save_pretrained(tmp_path / "again")
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, tmp_path / "again"))
    assert first == second


@pytest.mark.parametrize(
    ("fields", "overrides", "expected"),
    [
        ({}, {"attn_layers": ["lsh"]}, {"attn_layers": ("lsh",), "num_hidden_layers": 1}),
        ({}, {"num_hidden_layers": 4}, {"attn_layers": ("local", "lsh") * 2, "num_hidden_layers": 4}),
        ({"axial_pos_embds": True}, {"position_embedding_type": "rotary"}, {"axial_pos_embds": False}),
        ({}, {"position_embedding_type": "axial"}, {"axial_pos_embds": True}),
        ({}, {"axial_pos_embds": True}, {"position_embedding_type": "axial"}),
        ({}, {"axial_pos_embds": False}, {"position_embedding_type": "learned"}),
        ({}, {"num_buckets": [2, 8]}, {"num_buckets": (2, 8)}),
        ({}, {"num_labels": 7, "num_hashes": 5}, {"num_labels": 7, "num_hashes": 5}),
        ({"lsh_window": 64}, {"lsh_window": 8}, {"lsh_window": 8, "num_buckets": 4}),  # saved buckets stay
    ],
)
def test_fields_given_to_from_pretrained_take_part(fields, overrides, expected, tmp_path):
    config = reload(tiny_config(**fields), tmp_path, **overrides)
    assert {name: getattr(config, name) for name in expected} == expected
    assert contents(reload(config, tmp_path)) == contents(config)


@pytest.mark.parametrize(
    ("overrides", "told"), [({"max_position_embeddings": 65536}, True), ({"num_hashes": 3}, False), ({}, False),
                            ({"max_position_embeddings": 65536, "num_buckets": 8}, False)]
)  # fmt: skip
def test_buckets_that_stay_as_saved_are_told(overrides, told, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(configuration_reformer.logger, "warning_once", heard.append)
    config = reload(tiny_config(), tmp_path, **overrides)
    assert config.num_buckets == overrides.get("num_buckets", 2)
    assert [line for line in heard if "would have (16, 32)" in line] == heard
    assert bool(heard) == told


@pytest.mark.parametrize("overrides", [{"num_buckets": 3}, {"max_position_embeddings": 10**6}, {"attn_layers": ["x"]}])
def test_fields_given_to_from_pretrained_are_checked(overrides, tmp_path):
    with pytest.raises(Exception, match=next(iter(overrides))):
        reload(tiny_config(position_embedding_type="axial"), tmp_path, **overrides)


def test_unused_arguments_are_handed_back(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    config, unused = ReformerConfig.from_pretrained(tmp_path, return_unused_kwargs=True, num_hashes=3, nothing=1)
    assert config.num_hashes == 3
    assert unused == {"nothing": 1}


# --- nobody changes it


@pytest.mark.parametrize("mode", ["window", "chunk"])
@pytest.mark.parametrize("cls", ["ReformerModel", "ReformerForCausalLM", "ReformerForSequenceClassification"])
def test_a_call_changes_nothing_in_the_config(cls, mode):
    small = {"lsh_attn_chunk_length": 8, "local_attn_chunk_length": 4} if mode == "chunk" else SMALL_WINDOWS
    model = make_model(getattr(hf_reformer, cls), attention_mode=mode, **small)
    before = contents(model.config)
    ids = make_ids(2, 30)
    model(ids, num_hashes=3, num_buckets=[2, 4])
    model.train()(ids, attention_mask=torch.ones_like(ids))[0].sum().backward()
    if cls == "ReformerForCausalLM":
        model(ids, labels=ids).loss.backward()
        model.eval().generate(ids, max_new_tokens=2, do_sample=False)
    if cls == "ReformerForSequenceClassification":
        model(ids, labels=torch.zeros(2, dtype=torch.long)).loss.backward()
    assert contents(model.config) == before


def test_models_leave_the_callers_config_alone():
    config = tiny_config()
    before = contents(config)
    model = ReformerForCausalLM(config)
    assert model.config.is_decoder
    assert contents(config) == before
    config.is_decoder = True
    ReformerForCausalLM(config)
    ReformerModel(config)
    assert contents(config) == {**before, "is_decoder": True}


@given(seed=st.none() | st.integers(-(2**40), 2**80))
def test_any_whole_number_is_a_seed(seed):
    model = make_model(ReformerModel, hash_seed=seed, **REPEATABLE)
    assert model(make_ids(1, 5)).last_hidden_state.isfinite().all()


# --- configs of transformers' own Reformer


def test_a_silent_builtin_config_means_the_builtins_defaults():
    builtin = contents(transformers.ReformerConfig())
    ours = contents(ReformerConfig.from_dict({"model_type": "reformer"}))
    assert ours["model_type"] == "hf_reformer"
    for name, value in builtin.items():
        if name != "model_type":
            assert ours[name] == value, name
    assert ours["attention_mode"] == "chunk"
    assert ours["classifier_pooling"] == "first"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_buckets": [4, 8], "hash_seed": 3, "num_hashes": 4, "is_decoder": True, "eos_token_id": 5},
        {"axial_pos_embds": False, "max_position_embeddings": 77},
        {"attn_layers": ["lsh"], "lsh_num_chunks_after": 1, "lsh_attn_chunk_length": 32, "chunk_size_lm_head": 3},
        {"axial_pos_shape": [8, 8], "num_labels": 4},  # fewer than max_position_embeddings, as the built-in allows
    ],
    ids=str,
)
def test_a_folder_of_the_builtin_gives_our_config(fields, tmp_path):
    size = {**TINY, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [4, 12], **fields}
    builtin = transformers.ReformerConfig(**size)
    builtin.save_pretrained(tmp_path)
    config = ReformerConfig.from_pretrained(tmp_path)
    ours = contents(config)
    for name, value in contents(builtin).items():
        if name not in ("model_type", "transformers_version"):
            assert ours[name] == value, name
    assert config.position_embedding_type == ("learned" if fields.get("axial_pos_embds") is False else "axial")
    assert contents(reload(config, tmp_path / "ours")) == contents(config)


def test_our_own_configs_pass_untranslated():
    fields = tiny_config().to_dict()
    assert from_builtin(fields) == fields


def test_translation_leaves_the_dictionary_alone():
    fields = {"model_type": "reformer", "architectures": ["ReformerModelWithLMHead"]}
    before = copy.deepcopy(fields)
    assert from_builtin(fields)["architectures"] == ["ReformerForCausalLM"]
    assert fields == before


def test_fresh_axial_positions_do_not_drown_the_tokens():
    model = ReformerModel(ReformerConfig(hidden_size=64, position_embedding_type="axial"))
    spread = [weight.std().item() for weight in model.position_embeddings.weights]
    assert max(spread) <= 2 * model.embed_tokens.weight.std().item()
    assert ReformerConfig.from_dict({"model_type": "reformer"}).axial_norm_std == 1.0
