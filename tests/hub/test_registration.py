"""Auto classes: our config gives our classes, the built-in Reformer's gives the built-in's."""

import os
import subprocess
import sys
import textwrap

import pytest
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, TokenizersBackend
from transformers.models.auto import modeling_auto

import hf_reformer
from hf_reformer.configuration_reformer import ReformerConfig
from hf_reformer.hub.registration import AUTO_CLASSES, register
from hf_reformer.tokenization_reformer import ReformerByteTokenizer

TINY = {"hidden_size": 16, "num_attention_heads": 2, "attention_head_size": 8, "feed_forward_size": 16}
TINY |= {"max_position_embeddings": 64, "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [8, 8]}
TINY |= {"attn_layers": ["local", "lsh"]}

ALL_AUTO_CLASSES = [
    auto_class
    for name, auto_class in vars(modeling_auto).items()
    if name.startswith("AutoModel") and getattr(auto_class, "_model_mapping", None) is not None
]
KNOW_THE_BUILTIN = [cls for cls in ALL_AUTO_CLASSES if "reformer" in cls._model_mapping._model_mapping]


def by_name(auto_class):
    return auto_class.__name__


def tiny(auto_class, config_class=ReformerConfig):
    return config_class(**TINY, is_decoder=auto_class is AutoModelForCausalLM)


def builtin_tokenizer():
    vocab = {"<unk>": 0, "</s>": 1, "<pad>": 2, "▁": 3, "a": 4, "▁a": 5}
    return transformers.ReformerTokenizer(vocab=vocab, merges=[("▁", "a")], pad_token="<pad>")


# --- models


@pytest.mark.parametrize("auto_class", AUTO_CLASSES, ids=by_name)
def test_our_config_gives_our_class(auto_class, tmp_path):
    model = auto_class.from_config(tiny(auto_class))
    assert type(model) is AUTO_CLASSES[auto_class]
    model.save_pretrained(tmp_path)
    assert type(auto_class.from_pretrained(tmp_path)) is AUTO_CLASSES[auto_class]


@pytest.mark.parametrize("auto_class", KNOW_THE_BUILTIN, ids=by_name)
def test_the_builtin_config_gives_the_builtin_class(auto_class):
    model = auto_class.from_config(tiny(auto_class, transformers.ReformerConfig))
    assert type(model).__module__ == "transformers.models.reformer.modeling_reformer"


def test_no_auto_class_falls_through_to_the_builtin():
    assert KNOW_THE_BUILTIN
    assert set(KNOW_THE_BUILTIN) <= set(AUTO_CLASSES)


@pytest.mark.parametrize("auto_class", [c for c in ALL_AUTO_CLASSES if c not in AUTO_CLASSES], ids=by_name)
def test_what_we_lack_is_refused(auto_class):
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        auto_class.from_config(tiny(auto_class))


def test_trainer_and_model_card_find_our_names():
    assert "ReformerForCausalLM" in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()  # label smoothing
    from transformers.modelcard import TASK_MAPPING

    tasks = {
        "text-generation": "ReformerForCausalLM",
        "audio-classification": "ReformerForAudioClassification",
        "fill-mask": "ReformerForMaskedLM",
        "image-classification": "ReformerForImageClassification",
        "question-answering": "ReformerForQuestionAnswering",
        "text2text-generation": "ReformerForConditionalGeneration",
        "text-classification": "ReformerForSequenceClassification",
        "token-classification": "ReformerForTokenClassification",
    }
    for task, name in tasks.items():
        assert name in TASK_MAPPING[task].values()


def test_who_asks_by_the_model_type_takes_our_folders_for_causal_ones(tmp_path):
    """As lm-eval does, which looks among sequence-to-sequence models first."""
    model_type = ReformerConfig.model_type
    assert model_type not in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    assert modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] == "ReformerForCausalLM"
    ours = AUTO_CLASSES[transformers.AutoModelForSeq2SeqLM]
    ours(tiny(transformers.AutoModelForSeq2SeqLM)).save_pretrained(tmp_path)
    assert type(transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)) is ours
    assert AutoConfig.from_pretrained(tmp_path).architectures == [ours.__name__]
    assert ours in transformers.AutoModelForSeq2SeqLM._model_mapping.values()  # a name without a config harms no table


# --- configs and tokenizers


def test_a_saved_config_reloads_as_ours(tmp_path):
    config = tiny(AutoModel)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is ReformerConfig
    assert loaded.to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)}
    assert type(AutoConfig.for_model("hf_reformer")) is ReformerConfig


def test_a_builtin_config_reloads_as_builtin(tmp_path):
    transformers.ReformerConfig(**TINY).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is transformers.ReformerConfig


@pytest.mark.parametrize("contents", ["config and tokenizer", "config", "tokenizer"])
def test_our_folders_give_our_tokenizer(contents, tmp_path):
    if "config" in contents:
        tiny(AutoModel).save_pretrained(tmp_path)
    if "tokenizer" in contents:
        ReformerByteTokenizer().save_pretrained(tmp_path)
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is ReformerByteTokenizer


@pytest.mark.parametrize("config_class", [None, ReformerConfig, transformers.ReformerConfig])
def test_the_builtin_tokenizer_stays_the_builtin_tokenizer(config_class, tmp_path):
    builtin_tokenizer().save_pretrained(tmp_path)
    if config_class is not None:
        config_class(**TINY).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is transformers.ReformerTokenizer
    assert tokenizer("a a")["input_ids"] == [5, 5]


def test_a_model_of_ours_may_have_any_other_tokenizer(tmp_path):
    tiny(AutoModel).save_pretrained(tmp_path)
    TokenizersBackend(tokenizer_object=builtin_tokenizer().backend_tokenizer).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is TokenizersBackend
    assert tokenizer("a a")["input_ids"] == [5, 5]


# --- registering


def test_registering_again_changes_nothing():
    before = {auto_class: dict(auto_class._model_mapping._extra_content) for auto_class in AUTO_CLASSES}
    names = {auto_class: dict(auto_class._model_mapping._model_mapping) for auto_class in AUTO_CLASSES}
    register()
    assert before == {auto_class: dict(auto_class._model_mapping._extra_content) for auto_class in AUTO_CLASSES}
    assert names == {auto_class: dict(auto_class._model_mapping._model_mapping) for auto_class in AUTO_CLASSES}
    assert hf_reformer.__name__  # importing the package is what registered first


def test_before_the_package_is_imported_and_after_and_with_the_builtin_replaced(tmp_path):
    """In one fresh process, as what is done to the Auto classes must not outlive it."""
    tiny(AutoModel).save_pretrained(tmp_path / "ours")
    ReformerByteTokenizer().save_pretrained(tmp_path / "ours")
    transformers.ReformerConfig(**TINY).save_pretrained(tmp_path / "model")
    transformers.ReformerConfig(**TINY).save_pretrained(tmp_path / "with_tokenizer")
    builtin_tokenizer().save_pretrained(tmp_path / "with_tokenizer")
    code = """
        import sys
        import transformers
        from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer, TokenizersBackend

        folder = sys.argv[1]
        tokenizer = AutoTokenizer.from_pretrained(folder + "/ours")
        assert type(tokenizer) is TokenizersBackend
        assert tokenizer("é", "b")["input_ids"] == [197, 171, 1, 100]
        assert tokenizer.decode([197, 171, 1, 100], skip_special_tokens=True) == "éb"
        assert "hf_reformer" not in sys.modules

        import hf_reformer
        from hf_reformer.hub.registration import register

        assert type(AutoConfig.for_model("hf_reformer")) is hf_reformer.ReformerConfig
        assert type(AutoConfig.from_pretrained(folder + "/model")) is transformers.ReformerConfig
        for _ in range(2):
            register(replace_builtin=True)
        register()

        config = AutoConfig.from_pretrained(folder + "/model")
        assert type(config) is hf_reformer.ReformerConfig
        assert config.model_type == "hf_reformer"
        assert config.attention_mode == "chunk"
        assert type(AutoModel.from_config(config)) is hf_reformer.ReformerModel
        assert type(AutoModelForMaskedLM.from_config(config)) is hf_reformer.ReformerForMaskedLM
        assert type(AutoTokenizer.from_pretrained(folder + "/model")) is hf_reformer.ReformerByteTokenizer
        assert type(AutoTokenizer.from_pretrained(folder + "/with_tokenizer")) is transformers.ReformerTokenizer

        builtin = transformers.ReformerConfig.from_pretrained(folder + "/model")
        assert type(AutoModel.from_config(builtin)) is transformers.ReformerModel
    """
    source = os.path.dirname(os.path.dirname(hf_reformer.__file__))
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
