"""Folders of transformers' own Reformer: every head reads them without a murmur and gives the built-in's numbers.

Both run in float64, where they agree to 1e-10; in float32 the built-in itself is 4e-4 away from float64. `hash_seed`
makes both draw the same rotations; nothing is patched.

Only real tokens are compared. At masked positions the older rule's output is meaningless: all scores there may be
-1e9, whose spacing in float64 is 1e-7, so that not even the built-in itself reproduces it to 1e-10 when sums come in
another order.
"""

import itertools

import pytest
import torch
from builtin_cases import HEADS, SMALL, TOLERANCE, assert_equal_outputs, convert, make_builtin, pair, tensors
from conftest import make_ids, max_abs_diff
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import hf_reformer
from hf_reformer import ReformerConfig, ReformerForCausalLM, ReformerForMaskedLM, ReformerModel


def random_mask(*shape: int, seed: int = 0) -> torch.Tensor:
    mask = (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.2).long()
    mask[:, 0] = 1
    return mask


# --- the rule of attention

SHAPES = {
    "short": 7,
    "one chunk": 8,
    "between the chunk lengths": 13,
    "one lsh chunk": 16,
    "two chunks": 32,
    "no multiple": 101,
    "longer": 257,
}


@pytest.mark.parametrize("is_decoder", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("layers", [["local", "lsh"], ["lsh"], ["local"]], ids=str)
@pytest.mark.parametrize(
    ("num_hashes", "num_buckets"),
    [(1, None), (2, (4, 8)), (4, 16), (2, None)],
    ids=["1-None", "2-4x8", "4-16", "2-None"],
)
def test_attention_is_that_of_the_builtin(is_decoder, layers, num_hashes, num_buckets, tmp_path):
    if layers == ["local"] and num_buckets is not None:
        return  # no hashing there
    after = {} if is_decoder else {"lsh_num_chunks_after": 1, "local_num_chunks_after": 1}
    builtin, ours = pair(
        tmp_path,
        attn_layers=layers,
        is_decoder=is_decoder,
        num_hashes=num_hashes,
        num_buckets=num_buckets if num_buckets is None or isinstance(num_buckets, int) else list(num_buckets),
        **after,
    )
    for length in SHAPES.values():
        ids = make_ids(2, length, vocab=50, seed=length)
        for mask in (None, random_mask(2, length), *([torch.ones_like(ids)] if length == 13 else [])):
            # the built-in writes the number of buckets that it chose into its config, where a later call finds it
            builtin = make_builtin(**builtin_fields(builtin)) if num_buckets is None else builtin
            assert_equal_outputs(builtin, ours, ids, mask)


def builtin_fields(builtin) -> dict:
    names = (*SMALL, "is_decoder", "num_hashes", "lsh_num_chunks_after", "local_num_chunks_after")
    return {name: getattr(builtin.config, name) for name in names}


@pytest.mark.slow
@given(
    layers=st.lists(st.sampled_from(["local", "lsh"]), min_size=1, max_size=3),
    is_decoder=st.booleans(),
    rounds=st.integers(1, 4),
    num_buckets=st.sampled_from([2, 6, 16, [2, 4], [4, 8], [2, 2, 4]]),
    chunks=st.tuples(st.sampled_from([4, 6, 16]), st.sampled_from([4, 6, 16])),
    around=st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)),
    length=st.integers(1, 150),
    masked=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150)
def test_attention_is_that_of_the_builtin_in_many_shapes(
    layers, is_decoder, rounds, num_buckets, chunks, around, length, masked, seed, tmp_path_factory
):
    fields = {
        "attn_layers": layers,
        "is_decoder": is_decoder,
        "num_hashes": rounds,
        "num_buckets": num_buckets,
        "hash_seed": seed,
        "lsh_attn_chunk_length": chunks[0],
        "local_attn_chunk_length": chunks[1],
        "lsh_num_chunks_before": around[0],
        "local_num_chunks_before": around[1],
        "lsh_num_chunks_after": 0 if is_decoder else around[2],
        "local_num_chunks_after": 0 if is_decoder else around[3],
    }
    builtin, ours = pair(tmp_path_factory.mktemp("builtin"), **fields)
    ids = make_ids(2, length, vocab=50, seed=seed)
    assert_equal_outputs(builtin, ours, ids, random_mask(2, length, seed=seed) if masked else None)


@pytest.mark.parametrize("padding", [(0, 30), (30, 0)], ids=["right", "left"])
def test_padded_rows_are_those_of_the_builtin(padding, tmp_path):
    builtin, ours = pair(tmp_path, num_hashes=2, num_buckets=8, is_decoder=True)
    ids = make_ids(2, 60, vocab=50)
    padded, mask = F.pad(ids, padding), F.pad(torch.ones_like(ids), padding)
    mask[0] = 1  # a row without padding beside one with it
    assert_equal_outputs(builtin, ours, padded, mask)


def test_numbers_of_rounds_and_buckets_of_a_call_are_those_of_the_builtin(tmp_path):
    builtin, ours = pair(tmp_path, num_buckets=8)
    ids = make_ids(2, 101, vocab=50)
    assert_equal_outputs(builtin, ours, ids, num_hashes=3)


@pytest.mark.parametrize("axial", [True, False], ids=["axial", "learned"])
def test_positions_are_those_of_the_builtin(axial, tmp_path):
    builtin, ours = pair(tmp_path, axial_pos_embds=axial, num_buckets=8)
    for length in (5, 60, 512):
        assert_equal_outputs(builtin, ours, make_ids(2, length, vocab=50))
    ids = make_ids(2, 32, vocab=50)  # a multiple of the chunks, without which the built-in takes no position ids
    for places in (torch.arange(7, 39), torch.arange(32).flip(0)):
        assert_equal_outputs(builtin, ours, ids, position_ids=places[None].expand(2, -1))


def test_embeddings_in_place_of_ids_are_those_of_the_builtin(tmp_path):
    builtin, ours = pair(tmp_path, num_buckets=8)
    embeds = torch.randn(2, 48, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (model(inputs_embeds=embeds).last_hidden_state for model in (ours, builtin))
    assert max_abs_diff(found, expected) <= TOLERANCE


def test_gradients_are_those_of_the_builtin(tmp_path):
    """In training, without dropout: its reversible layers and ours, up to the grid of ours."""
    quiet = {
        "hidden_dropout_prob": 0.0,
        "lsh_attention_probs_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "num_buckets": 8,
        "axial_pos_shape": (8, 8),
    }
    builtin, ours = pair(tmp_path, "ReformerForMaskedLM", **quiet)
    ids = make_ids(2, 64, vocab=50)
    losses = [model.train()(ids, labels=ids).loss for model in (builtin, ours)]
    assert max_abs_diff(losses[0], losses[1]) <= 1e-9
    for loss in losses:
        loss.backward()
    embeds = [model.get_input_embeddings().weight.grad for model in (builtin, ours)]
    heads = builtin.lm_head.decoder.weight.grad, ours.lm_head.weight.grad
    last = (
        builtin.reformer.encoder.layers[1].attention.self_attention.query_key.weight.grad,
        ours.model.layers[1].attention.qk_proj.weight.grad,
    )
    for expected, found in (embeds, heads, last):
        assert max_abs_diff(found, expected) <= 1e-8


# --- heads


def size_without_bias(model) -> int:
    """The built-in's language-model heads hold a bias that they don't use: until 5.23 their only one, now a second."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("lm_head") or p.dim() > 1)


@pytest.mark.parametrize("name", HEADS)
def test_every_head_reads_a_folder_of_the_builtin_without_a_murmur(name, tmp_path, captured_warnings):
    builtin = make_builtin(name, num_buckets=8)
    captured_warnings.clear()  # what the built-in has to say of itself
    ours, info = convert(builtin, tmp_path, name, output_loading_info=True)
    assert captured_warnings == []
    assert not any(info.values()), info
    assert not ours.training
    assert {p.dtype for p in ours.parameters()} == {torch.float64}
    assert size_without_bias(ours) == size_without_bias(builtin)
    for length in (9, 100):
        ids = make_ids(2, length, vocab=50)
        assert_equal_outputs(builtin, ours, ids)
        mask = torch.ones_like(ids)
        mask[1, length - 4 :] = 0
        assert_equal_outputs(builtin, ours, ids, mask)


def labels_of(name: str, ids: torch.Tensor) -> dict:
    if name == "ReformerForSequenceClassification":
        return {"labels": torch.tensor([0, 2])}
    if name == "ReformerForQuestionAnswering":
        return {"start_positions": torch.tensor([0, 5]), "end_positions": torch.tensor([3, 8])}
    return {"labels": ids}


@pytest.mark.parametrize("name", list(HEADS)[1:])
def test_losses_are_those_of_the_builtin(name, tmp_path):
    builtin, ours = pair(tmp_path, name, num_buckets=8)
    ids = make_ids(2, 50, vocab=50)
    assert_equal_outputs(builtin, ours, ids, **labels_of(name, ids))


@pytest.mark.parametrize("name", HEADS)
def test_a_converted_model_saves_and_loads_as_ours(name, tmp_path, captured_warnings):
    builtin, ours = pair(tmp_path / "builtin", name, num_buckets=8)
    captured_warnings.clear()
    ours.save_pretrained(tmp_path / "ours")
    again, info = type(ours).from_pretrained(tmp_path / "ours", dtype=torch.float64, output_loading_info=True)
    assert captured_warnings == []
    assert not any(info.values()), info
    assert type(again.config) is ReformerConfig
    assert again.config.attention_mode == "chunk"
    ids = make_ids(2, 100, vocab=50)
    with torch.no_grad():
        outputs = [tensors(model(ids))[0] for model in (builtin, ours, again)]
    assert max_abs_diff(outputs[0], outputs[1]) <= TOLERANCE
    assert torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize(
    ("source", "target"), list(itertools.product(["ReformerModelWithLMHead", "ReformerForMaskedLM"], HEADS))
)
def test_heads_of_the_builtin_share_their_body(source, target, tmp_path):
    if target == "ReformerForMaskedLM" and source == "ReformerModelWithLMHead":
        return  # causal
    builtin = make_builtin(source, num_buckets=8)
    builtin.save_pretrained(tmp_path)
    cls = getattr(hf_reformer, HEADS[target])
    ours, info = cls.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    body = ours if target == "ReformerModel" else ours.model
    assert not any(key.startswith("model.") for key in info["missing_keys"])
    ids = make_ids(2, 40, vocab=50)
    builtin.reformer.config.is_decoder = body.config.is_decoder  # a causal head makes the body causal
    for layer in builtin.reformer.encoder.layers:
        layer.attention.self_attention.is_decoder = body.config.is_decoder
    assert_equal_outputs(builtin.reformer, body, ids)


@pytest.mark.parametrize("name", ["ReformerModelWithLMHead", "ReformerForMaskedLM"])
def test_the_bias_of_the_head_is_added(name, tmp_path):
    """As transformers 4 did, under which the known checkpoints were made; from 5.0 to 5.23 it is left out."""
    builtin = make_builtin(name, num_buckets=8)
    builtin.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    used = "lm_head.decoder.bias"  # since 5.24
    key = used if used in state else "lm_head.bias"
    bias = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected_bias = bias - state[key]
    save_file({**state, key: bias}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours = getattr(hf_reformer, HEADS[name]).from_pretrained(tmp_path, dtype=torch.float64)
    ids = make_ids(2, 40, vocab=50)
    with torch.no_grad():
        assert max_abs_diff(ours(ids).logits, builtin(ids).logits + expected_bias) <= TOLERANCE


def test_a_converted_model_generates_what_the_builtin_generates(tmp_path):
    builtin, ours = pair(tmp_path, "ReformerModelWithLMHead", num_buckets=8, eos_token_id=None)
    ids = make_ids(2, 12, vocab=50)
    options = {"max_new_tokens": 12, "do_sample": False, "use_cache": False}
    assert torch.equal(ours.generate(ids, **options), builtin.generate(ids, **options))


# --- what the older rule did with its config, and ours does not


def test_the_number_of_buckets_is_chosen_anew_for_every_input(tmp_path):
    """The built-in keeps the choice of its first call, so that an answer hangs on what was asked before."""
    _, ours = pair(tmp_path, num_buckets=None)
    long, short = make_ids(1, 257, vocab=50), make_ids(1, 100, vocab=50)
    with torch.no_grad():
        first = ours(short).last_hidden_state
        ours(long)
        assert torch.equal(ours(short).last_hidden_state, first)
    assert ours.config.num_buckets is None


def test_without_a_seed_evaluation_still_repeats_itself(tmp_path):
    _, ours = pair(tmp_path, num_buckets=8, hash_seed=None)
    ids = make_ids(1, 100, vocab=50)
    with torch.no_grad():
        assert torch.equal(ours(ids).last_hidden_state, ours(ids).last_hidden_state)


@pytest.mark.parametrize("resample", [True, False])
def test_training_draws_fresh_rotations_unless_told_not_to(resample, tmp_path):
    builtin = make_builtin(
        num_buckets=8, hash_seed=None, hidden_dropout_prob=0.0, local_attention_probs_dropout_prob=0.0
    )
    ours = convert(builtin, tmp_path, resample_rotations=resample)
    ids = make_ids(1, 100, vocab=50)
    evaluated = ours(ids).last_hidden_state
    first, second = (ours.train()(ids).last_hidden_state for _ in range(2))
    assert torch.equal(first, second) is not resample
    assert (max_abs_diff(first, evaluated) <= 1e-9) is not resample


def test_a_converted_model_trains_at_any_length(tmp_path):
    """The built-in asks for the one length that its axial positions make."""
    for cls, name in ((ReformerForCausalLM, "ReformerModelWithLMHead"), (ReformerForMaskedLM, "ReformerForMaskedLM")):
        _, ours = pair(tmp_path / name, name, num_buckets=None, hash_seed=None)
        assert type(ours) is cls
        for length in (1, 5, 16, 17, 100):
            ids = make_ids(2, length, vocab=50)
            ours.train()(ids, labels=ids).loss.backward()
            assert all(p.grad.isfinite().all() for p in ours.parameters())


def test_the_body_alone_reads_a_folder_whose_head_it_lacks(tmp_path):
    builtin = make_builtin("ReformerForQuestionAnswering", num_buckets=8)
    builtin.save_pretrained(tmp_path)
    body = ReformerModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert_equal_outputs(builtin.reformer, body, make_ids(2, 40, vocab=50))
