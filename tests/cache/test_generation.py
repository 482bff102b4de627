"""`generate` in all its forms gives what it gives without a cache."""

import pytest
import torch
from conftest import OFFLOADED, SMALL_WINDOWS, make_ids, make_model
from transformers import DynamicCache, TextStreamer

from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM
from hf_reformer.cache.cache import CACHE_NAME

NEW = 16
IDS = make_ids(3, 20)
MASK = torch.ones(3, 20, dtype=torch.long)
MASK[0, :7], MASK[1, :3] = 0, 0
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
FORMS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    **OFFLOADED,
    "prompt in pieces": {"prefill_chunk_size": 7},
    "one beam": {"num_beams": 1},
}
BEAMS = {
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "beams with a penalty": {"num_beams": 2, "repetition_penalty": 1.3},
}


@pytest.fixture(scope="module")
def model():
    return make_model(
        ReformerForCausalLM,
        seed=2,
        **{**SMALL_WINDOWS, "attn_layers": ["local", "lsh", "full", "lsh"], "eos_token_id": None},
    )


@pytest.fixture(scope="module")
def expected(model):
    found = model.generate(IDS, attention_mask=MASK, use_cache=False, **GREEDY)
    assert len(set(found[:, 20:].flatten().tolist())) > 5, "a model that repeats itself proves little"
    return found


@pytest.mark.parametrize("form", FORMS)
def test_greedy_in_every_form(form, model, expected):
    assert torch.equal(model.generate(IDS, attention_mask=MASK, **GREEDY, **FORMS[form]), expected)


@pytest.mark.parametrize("form", BEAMS)
def test_beams(form, model):
    found, whole = (
        model.generate(IDS, attention_mask=MASK, use_cache=use, **GREEDY, **BEAMS[form]) for use in (True, False)
    )
    assert torch.equal(found, whole)


def test_rows_of_a_batch_are_the_rows_alone(model, expected):
    for row, length in enumerate(MASK.sum(-1).tolist()):
        alone = model.generate(IDS[row : row + 1, 20 - length :], **GREEDY)
        assert torch.equal(alone[0], expected[row, 20 - length :])


@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
def test_guessed_tokens_change_nothing(way, model, expected):
    other = make_model(ReformerForCausalLM, seed=1, **{**SMALL_WINDOWS, "eos_token_id": None})
    options = {"prompt_lookup_num_tokens": 3} if way == "prompt lookup" else {"assistant_model": other}
    found = model.generate(IDS[:1, 7:], **GREEDY, **options)
    assert torch.equal(found[0], expected[0, 7:])


def test_an_assistant_may_guess_more_tokens_than_its_window(model, expected):
    assistant = make_model(ReformerForCausalLM, seed=5, **{**SMALL_WINDOWS, "attn_layers": ["local"]}).eval()
    assistant.generation_config.num_assistant_tokens = 20
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0
    found = model.generate(IDS[2:], assistant_model=assistant, **GREEDY)
    assert torch.equal(found[0], expected[2, : found.shape[1]])


def test_a_static_cache_and_a_prompt_in_pieces(model, expected):
    options = {"cache_implementation": "static", "prefill_chunk_size": 7}
    assert torch.equal(model.generate(IDS, attention_mask=MASK, **options, **GREEDY), expected)


@pytest.mark.parametrize("given", ["all tokens", "new tokens"])
def test_a_returned_cache_is_continued(given, model, expected):
    options = {**GREEDY, "max_new_tokens": 10, "return_dict_in_generate": True}
    first = model.generate(IDS, attention_mask=MASK, **options)
    assert isinstance(first.past_key_values, DynamicCache)
    assert first.past_key_values.get_seq_length() == 29
    ids = first.sequences if given == "all tokens" else first.sequences[:, 29:]
    mask = torch.cat([MASK, torch.ones(3, 10, dtype=torch.long)], dim=-1)
    found = model.generate(
        ids, attention_mask=mask, past_key_values=first.past_key_values, **{**GREEDY, "max_new_tokens": NEW - 10}
    )
    assert torch.equal(found[:, -(NEW - 10) :], expected[:, -(NEW - 10) :])


def test_what_is_returned_has_the_library_s_shapes(model):
    options = {"output_logits": True, "output_scores": True, "output_hidden_states": True}
    found = model.generate(
        IDS, attention_mask=MASK, return_dict_in_generate=True, **options, **{**GREEDY, "max_new_tokens": 3}
    )
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    assert [len(states) for states in found.hidden_states] == [layers + 1] * 3
    assert [states[0].shape for states in found.hidden_states] == [(3, 20, width), (3, 1, width), (3, 1, width)]
    assert [x.shape for x in found.logits] == [(3, model.config.vocab_size)] * 3


def test_sampling_draws_the_same_with_and_without_a_cache(model):
    found = []
    for use in (True, False):
        torch.manual_seed(0)
        options = {"do_sample": True, "top_k": 10, "temperature": 1.5, "num_return_sequences": 2}
        found.append(
            model.generate(IDS, attention_mask=MASK, use_cache=use, max_new_tokens=12, pad_token_id=0, **options)
        )
    assert torch.equal(*found)


def test_streaming_and_stopping(capsys):
    tokenizer = ReformerByteTokenizer()
    model = make_model(ReformerForCausalLM, vocab_size=len(tokenizer), eos_token_id=None)
    ids = tokenizer("a text", return_tensors="pt").input_ids
    found = model.generate(ids, streamer=TextStreamer(tokenizer), **GREEDY)
    assert capsys.readouterr().out.strip("\n") == tokenizer.decode(found[0]).strip("\n")
    word = tokenizer.decode(found[0, 10:12])
    if "\ufffd" not in word and word:
        stopped = model.generate(ids, stop_strings=[word], tokenizer=tokenizer, **GREEDY)
        assert stopped.shape[1] <= found.shape[1]


def test_generation_says_nothing(model, recwarn, caplog, capsys):
    model.generate(IDS, attention_mask=MASK, **GREEDY)
    assert not [warning for warning in recwarn if "pkg_resources" not in str(warning.message)]
    assert not caplog.records
    assert capsys.readouterr() == ("", "")


def test_what_generation_cannot_do_is_refused(model):
    with pytest.raises(ValueError, match="quantized"):
        model.generate(IDS, cache_implementation="quantized", **GREEDY)
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate_batch([IDS[0].tolist()], **GREEDY)


CHUNKS = {"attention_mode": "chunk", "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8, "hash_seed": 0}


@pytest.mark.parametrize("look", [{}, {"output_attentions": True}], ids=["", "attentions"])
@pytest.mark.parametrize("mode", [{}, CHUNKS], ids=["window", "chunk"])
def test_a_model_that_writes_its_own_padding_id_generates_as_ever(mode, look):
    """The library would mask such tokens where it guesses a mask, and a cache holds them as they were."""
    layers = ["local", "lsh", "full"]
    model = make_model(ReformerForCausalLM, attn_layers=layers, eos_token_id=None, **SMALL_WINDOWS, **mode)
    with torch.no_grad():
        model.lm_head.bias[0] += 6
    ids, options = IDS[:1], {**GREEDY, "return_dict_in_generate": True}
    plain = model.generate(ids, **options).sequences
    assert (plain[:, ids.shape[1] :] == 0).any()
    for how in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(ids, **options, **how, **look).sequences, plain), how
    begun = model.generate(ids, **{**options, "max_new_tokens": 10}, **look)
    cache = {CACHE_NAME: getattr(begun, CACHE_NAME)}
    rest = model.generate(begun.sequences, **{**options, "max_new_tokens": NEW - 10}, **look, **cache)
    assert torch.equal(rest.sequences, plain)
