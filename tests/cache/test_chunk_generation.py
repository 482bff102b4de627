"""Generation with a cache in chunk mode: the built-in's rule for one row, and every row of a batch by itself."""

import pytest
import torch
from builtin_cases import pair
from conftest import OFFLOADED, make_ids, make_model, max_abs_diff
from torch.nn import functional as F
from transformers.models.reformer.modeling_reformer import LocalSelfAttention, LSHSelfAttention

from hf_reformer import ReformerForCausalLM
from hf_reformer.cache.cache import ReformerCache

CHUNKS = {"attention_mode": "chunk", "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 4, "hash_seed": 3}
MIXED = ["local", "lsh", "local", "lsh"]
LENGTH = 34
GREEDY = {"max_new_tokens": 20, "do_sample": False}


def make(**changes):
    fields = {"attn_layers": MIXED, "num_buckets": 8, "num_hashes": 2, "eos_token_id": None, **CHUNKS, **changes}
    return make_model(ReformerForCausalLM, **fields)


@pytest.fixture(scope="module")
def model():
    return make()


@torch.no_grad()
def run(model, ids, prompt: int, piece: int = 1, mask=None, kept=None, **inputs):
    """Logits of a prompt and of pieces on top of it, (B, T, V), and the cache; of our model or of the built-in."""
    name = "past_key_values" if isinstance(model, ReformerForCausalLM) else "past_buckets_states"
    if mask is not None:
        inputs["attention_mask"] = mask[:, :prompt]
    out = model(ids[:, :prompt], **{name: kept}, use_cache=True, **inputs)
    found = [out.logits]
    for at in range(prompt, ids.shape[1], piece):
        if mask is not None:
            inputs["attention_mask"] = mask[:, : at + piece]
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = mask.cumsum(-1)[:, at : at + piece] - 1
        out = model(ids[:, at : at + piece], **{name: out[name]}, use_cache=True, **inputs)
        found.append(out.logits)
    return torch.cat(found, dim=1), out[name]


# --- the rule

RULES = {
    "one round": {"num_hashes": 1},
    "factors, few tokens a bucket": {"num_hashes": 4, "num_buckets": [4, 8]},
    "local chunks longer": {"local_attn_chunk_length": 12},
    "no chunk before": {"lsh_num_chunks_before": 0, "local_num_chunks_before": 0, "num_hashes": 1},
    "two chunks before": {"lsh_num_chunks_before": 2, "local_num_chunks_before": 2},
    "lsh alone": {"attn_layers": ["lsh", "lsh"]},
    "local alone": {"attn_layers": ["local", "local"]},
}


@pytest.fixture
def repaired_builtin(monkeypatch):
    """Two slips of the built-in's steps, put right."""
    hash_vectors, retrieve = LSHSelfAttention._hash_vectors, LocalSelfAttention._retrieve_relevant_hidden_states

    def one_offset(self, vectors, num_hashes, mask, increase_num_buckets=False):
        """It tells by the largest kept bucket whether rounds are kept one number further apart, and may be wrong."""
        return hash_vectors(self, vectors, num_hashes, mask, increase_num_buckets=True)

    def from_the_start(states, chunk, before):
        """A first chunk before the sequence's start, which is a negative index to it, means the start."""
        return retrieve(states, chunk, min(before, states.shape[1] // chunk))

    monkeypatch.setattr(LSHSelfAttention, "_hash_vectors", one_offset)
    monkeypatch.setattr(LocalSelfAttention, "_retrieve_relevant_hidden_states", staticmethod(from_the_start))


@pytest.mark.parametrize("rule", RULES)
def test_steps_are_those_of_the_builtin(rule, tmp_path, repaired_builtin):
    fields = {"attn_layers": ["local", "lsh", "lsh"], "num_hashes": 2, "num_buckets": 8, **CHUNKS, **RULES[rule]}
    del fields["attention_mode"]
    builtin, ours = pair(tmp_path, "ReformerModelWithLMHead", **fields)
    for prompt in (3, 8, 21):  # less than a chunk, one, and several; and on into the second chunk from there
        ids = make_ids(1, min(prompt + 14, LENGTH), vocab=50, seed=prompt)
        assert max_abs_diff(run(ours, ids, prompt)[0], run(builtin, ids, prompt)[0]) <= 1e-9


def test_steps_are_those_of_the_builtin_as_it_is_in_float32(tmp_path):
    fields = {"lsh_attn_chunk_length": 8, "local_attn_chunk_length": 4, "attn_layers": MIXED, "num_buckets": 4}
    builtin, ours = pair(tmp_path, "ReformerModelWithLMHead", num_hashes=1, **fields)
    ids = make_ids(1, LENGTH, vocab=50)
    assert max_abs_diff(run(ours.float(), ids, 21)[0], run(builtin.float(), ids, 21)[0]) <= 1e-4


def test_the_builtin_generates_the_same(tmp_path):
    fields = {"lsh_attn_chunk_length": 8, "local_attn_chunk_length": 4, "num_buckets": 4, "eos_token_id": None}
    builtin, ours = pair(tmp_path, "ReformerModelWithLMHead", num_hashes=1, **fields)
    ids = make_ids(1, 11, vocab=50)
    assert torch.equal(ours.generate(ids, **GREEDY), builtin.generate(ids, **GREEDY))


@pytest.mark.parametrize("prompt", [9, 26])
def test_the_number_of_buckets_stays_that_of_the_prompt(prompt, tmp_path, repaired_builtin):
    fields = {"lsh_attn_chunk_length": 8, "local_attn_chunk_length": 4, "num_buckets": None, "num_hashes": 2}
    builtin, ours = pair(tmp_path, "ReformerModelWithLMHead", **fields)
    ids = make_ids(1, LENGTH, vocab=50)
    found, kept = run(ours, ids, prompt)
    assert max_abs_diff(found, run(builtin, ids, prompt)[0]) <= 1e-9
    assert kept.layers[1].hasher.num_buckets == builtin.config.num_buckets


def test_a_short_prompt_chooses_the_buckets_of_one_chunk():
    """The built-in breaks off when the first chunk is full."""
    found, kept = run(make(num_buckets=None), make_ids(1, LENGTH), 3)
    assert kept.layers[1].hasher.num_buckets == 2
    assert found.isfinite().all()


def test_the_prompt_is_an_ordinary_forward(model):
    ids = make_ids(2, LENGTH)
    with torch.no_grad():
        assert torch.equal(run(model, ids, LENGTH)[0], model(ids).logits)


def test_tokens_together_are_tokens_one_after_the_other(model):
    ids = make_ids(2, LENGTH)
    expected, _ = run(model, ids, 6)
    for piece in (2, 17):
        assert max_abs_diff(run(model, ids, 6, piece)[0], expected) <= 1e-12


# --- rows


@pytest.mark.parametrize("layers", [MIXED, ["lsh", "full", "local"]], ids=["mixed", "with full attention"])
@pytest.mark.parametrize("prompt", [5, 21])
def test_rows_of_a_batch_are_the_rows_alone(layers, prompt):
    model, ids = make(attn_layers=layers), make_ids(3, LENGTH)
    together, _ = run(model, ids, prompt)
    for row in range(3):
        assert max_abs_diff(together[row : row + 1], run(model, ids[row : row + 1], prompt)[0]) <= 1e-12


# Where chunks of a padded prompt are those of the prompt alone: kinds of layers, columns of the prompt, real ones of
# every row. Local chunks move with the padding, unless it is whole chunks; hash chunks see that a row ends elsewhere.
PADDED = {
    "within a chunk": (MIXED, 4, [4, 3, 1]),
    "hash chunks as many as alone": (["lsh", "lsh"], 16, [16, 14, 9]),
    "whole local chunks": (["local", "local"], 16, [16, 12, 4]),
}


@pytest.mark.parametrize("case", PADDED)
def test_rows_padded_on_the_left_are_the_rows_alone(case):
    layers, prompt, real = PADDED[case]
    model, ids = make(attn_layers=layers), make_ids(3, LENGTH)
    mask = torch.stack([F.pad(torch.ones(LENGTH - prompt + n, dtype=torch.long), (prompt - n, 0)) for n in real])
    places = (mask.cumsum(-1) - 1).clamp(min=0)[:, :prompt]
    together, _ = run(model, ids, prompt, mask=mask, position_ids=places)
    generated = model.generate(ids[:, :prompt], attention_mask=mask[:, :prompt], **GREEDY)
    for row, n in enumerate(real):
        alone = ids[row : row + 1, prompt - n :]
        assert max_abs_diff(together[row : row + 1, prompt - n :], run(model, alone, n)[0]) <= 1e-12
        assert torch.equal(generated[row, prompt - n :], model.generate(alone[:, :n], **GREEDY)[0])


def test_padding_among_the_new_tokens_changes_nothing(model):
    """A row may pause: its masked tokens are not kept."""
    ids, mask = make_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, [15, 23, 24]] = 0
    places = (mask.cumsum(-1) - 1)[:, :10]
    found, _ = run(model, ids, 10, mask=mask, position_ids=places)
    alone, _ = run(model, ids[:1, mask[0] == 1], 10)
    assert max_abs_diff(found[:1, mask[0] == 1], alone) <= 1e-12
    assert found.isfinite().all()


# --- what a cache can do

OPERATIONS = {
    "reorder": (lambda kept: kept.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (lambda kept: kept.batch_select_indices(torch.tensor([1])), [1]),
    "repeat": (lambda kept: kept.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "offload": (lambda kept: [(layer.offload(), layer.prefetch()) for layer in kept.layers], [0, 1, 2]),
    "record": (lambda kept: kept.activate_past_recording(), [0, 1, 2]),
}


@pytest.mark.parametrize("prompt", [5, 21])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name, prompt, model):
    change, rows = OPERATIONS[name]
    ids = make_ids(3, LENGTH)
    _, kept = run(model, ids[:, : prompt + 2], prompt)
    change(kept)
    found, _ = run(model, ids[rows, prompt + 2 :], 1, kept=kept)
    assert max_abs_diff(found, run(model, ids, prompt)[0][rows, prompt + 2 :]) <= 1e-12


@pytest.mark.parametrize("prompt", [5, 8, 21])
@pytest.mark.parametrize("recorded", [True, False])
def test_tokens_taken_back_leave_no_trace(recorded, prompt, model):
    ids = make_ids(2, LENGTH)
    _, kept = run(model, ids[:, :prompt], prompt)
    if recorded:
        kept.activate_past_recording()
    wrong = make_ids(2, 5, seed=1)
    run(model, wrong, 5, kept=kept)
    kept.crop(-5)
    found, kept = run(model, ids[:, prompt:], 1, kept=kept)
    assert max_abs_diff(found, run(model, ids, prompt)[0][:, prompt:]) <= 1e-12


def test_a_cache_begins_anew_after_reset_and_after_all_was_taken_back(model):
    ids = make_ids(2, LENGTH)
    expected, kept = run(model, ids, 21)
    kept.reset()
    assert torch.equal(run(model, ids, 21, kept=kept)[0], expected)
    _, kept = run(model, ids[:, :6], 6)
    kept.crop(-6)
    assert max_abs_diff(run(model, ids, 21, kept=kept)[0], expected) <= 1e-12


def test_a_local_layer_keeps_its_chunks_alone(model):
    _, kept = run(model, make_ids(1, 200), 150)
    assert [layer.capacity for layer in kept.layers][::2] == [16, 16]


def test_the_number_of_hashes_is_kept(model):
    ids = make_ids(1, LENGTH)
    found, kept = run(model, ids, 21, num_hashes=3)
    assert kept.layers[1].hasher.rotations.shape[2] == 3
    assert kept.layers[1].buckets.shape[2] == 3
    assert max_abs_diff(found, run(model, ids, 21)[0]) > 1e-3
    with pytest.raises(ValueError, match="hashed with 3"):
        model(ids[:, :1], past_key_values=kept)


# --- generate


@torch.no_grad()
def argmax_of_every_step(model, ids, steps: int, **options):
    out = model(ids, use_cache=True, **options)
    for _ in range(steps):
        last = out.logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, last], dim=1)
        out = model(last, past_key_values=out.past_key_values, use_cache=True, **options)
    return ids


FORMS = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    **OFFLOADED,
    "one beam": {"num_beams": 1},
}


@pytest.mark.parametrize("form", FORMS)
def test_greedy_in_every_form(form, model):
    ids = make_ids(3, 7)
    expected = argmax_of_every_step(model, ids, 20)
    assert len(set(expected[:, 7:].flatten().tolist())) > 5, "a model that repeats itself proves little"
    assert torch.equal(model.generate(ids, **GREEDY, **FORMS[form]), expected)


def test_greedy_with_another_number_of_hashes(model):
    ids = make_ids(2, 11)
    found = model.generate(ids, num_hashes=3, **GREEDY)
    assert torch.equal(found, argmax_of_every_step(model, ids, 20, num_hashes=3))


def test_beams_score_what_a_cache_of_each_would_give(model):
    ids = make_ids(2, 7)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3, "return_dict_in_generate": True}
    found = model.generate(ids, output_scores=True, **options)
    logits, _ = run(model, found.sequences, 7)
    chances = logits[:, 6:-1].log_softmax(-1).gather(-1, found.sequences[:, 7:, None])[..., 0].sum(-1)
    assert max_abs_diff(found.sequences_scores, chances / 8) <= 1e-5


@pytest.mark.parametrize("way", ["prompt lookup", "assistant"])
def test_guessed_tokens_change_nothing(way, model):
    options = {"prompt_lookup_num_tokens": 3} if way == "prompt lookup" else {"assistant_model": make(seed=1)}
    ids = make_ids(1, 5)
    assert torch.equal(model.generate(ids, **options, **GREEDY), model.generate(ids, **GREEDY))


def test_generation_from_embeddings(model):
    ids = make_ids(2, 11)
    found = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **GREEDY)
    assert torch.equal(found, model.generate(ids, **GREEDY)[:, 11:])


def test_a_cache_is_of_its_mode(model):
    kinds = [type(layer).__name__ for layer in ReformerCache(make(attn_layers=["lsh", "full", "local"]).config).layers]
    assert kinds == ["ChunkCacheLayer", "ReformerCacheLayer", "ChunkCacheLayer"]
