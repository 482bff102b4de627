"""Token types: an embedding that tells the two texts of a pair apart."""

import inspect

import pytest
import torch
from conftest import make_ids, make_model, max_abs_diff
from head_cases import IDS, MASK, TEXT_HEADS, inputs_of, make_head

from hf_reformer import (
    ReformerByteTokenizer,
    ReformerForCausalLM,
    ReformerForConditionalGeneration,
    ReformerForMultipleChoice,
    ReformerModel,
)
from hf_reformer.training.model_setup import ModelArguments, for_pairs, parse_overrides

HEADS = [cls for cls in TEXT_HEADS if cls is not ReformerForCausalLM]
TYPES = (torch.arange(20) >= 9).long().expand(3, -1).contiguous()  # of a pair


def with_types(cls, **overrides):
    """A head whose token types, which begin at zero, differ."""
    model = make_head(cls, type_vocab_size=2, **overrides)
    table = model.base_model.token_type_embeddings.weight
    torch.nn.init.normal_(table[1], generator=torch.Generator().manual_seed(7))
    return model


def shaped_for(cls, types):
    return types[None] if cls is ReformerForMultipleChoice else types


@pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__)
def test_every_head_takes_them_and_learns_them(cls):
    model, inputs = with_types(cls), inputs_of(cls)
    zeros, types = (shaped_for(cls, x) for x in (torch.zeros_like(IDS), TYPES))
    labels = TEXT_HEADS[cls]
    without = model(**inputs, **labels).loss
    assert model(**inputs, **labels, token_type_ids=zeros).loss == without  # zeros are the default
    loss = model(**inputs, **labels, token_type_ids=types).loss
    assert abs(loss - without) > 1e-6
    loss.backward()
    grad = model.base_model.token_type_embeddings.weight.grad
    assert (grad != 0).any(-1).tolist() == [False, True]  # type 0 stays zero


def test_a_new_model_is_the_one_without_types():
    plain, typed = make_model(ReformerModel), make_model(ReformerModel, type_vocab_size=2)
    typed.load_state_dict(plain.state_dict(), strict=False)
    assert max_abs_diff(typed(IDS, token_type_ids=TYPES)[0], plain(IDS)[0]) == 0


def test_without_a_table_they_are_ignored():
    model = make_model(ReformerModel)
    assert max_abs_diff(model(IDS, token_type_ids=TYPES + 5)[0], model(IDS)[0]) == 0


@pytest.mark.parametrize("mode", ["window", "chunk"])
def test_a_type_adds_its_vector_to_the_embedding(mode):
    chunks = {"attention_mode": "chunk", "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4, "hash_seed": 0}
    model = with_types(ReformerModel, **(chunks if mode == "chunk" else {}))
    embeds = model.embed_tokens(IDS) + model.token_type_embeddings(TYPES)
    expected = model(inputs_embeds=embeds, attention_mask=MASK)[0]
    assert max_abs_diff(model(IDS, MASK, token_type_ids=TYPES)[0][MASK != 0], expected[MASK != 0]) < 1e-10


def test_rows_of_a_batch_are_the_rows_alone():
    model = with_types(ReformerModel)
    together = model(IDS, MASK, token_type_ids=TYPES)[0]
    alone = model(IDS[2:, 5:], token_type_ids=TYPES[2:, 5:])[0]  # padded on the left
    assert max_abs_diff(together[2:, 5:], alone) < 1e-10


def test_reversible_is_plain():
    losses, grads = [], []
    for reversible in (True, False):
        model = with_types(HEADS[0], reversible=reversible).train()
        torch.manual_seed(0)
        loss = model(**inputs_of(HEADS[0]), **TEXT_HEADS[HEADS[0]], token_type_ids=TYPES).loss
        loss.backward()
        losses.append(loss)
        grads.append(model.model.token_type_embeddings.weight.grad)
    assert losses[0] == losses[1]
    assert max_abs_diff(*grads) < 1e-10


def test_saving_and_loading(tmp_path):
    model = with_types(HEADS[0])
    model.save_pretrained(tmp_path)
    again = HEADS[0].from_pretrained(tmp_path, dtype=torch.float64)
    inputs = inputs_of(HEADS[0])
    expected = model(**inputs, token_type_ids=TYPES).logits
    assert max_abs_diff(again(**inputs, token_type_ids=TYPES).logits, expected) == 0


def test_the_source_of_an_encoder_decoder_has_types_and_its_target_none():
    model = make_model(ReformerForConditionalGeneration, type_vocab_size=2)
    torch.nn.init.normal_(model.model.token_type_embeddings.weight[1], generator=torch.Generator().manual_seed(7))
    assert not hasattr(model.decoder, "token_type_embeddings")
    target = make_ids(3, 6, seed=1)
    with_them = model(IDS, labels=target, token_type_ids=TYPES)
    assert with_them.loss != model(IDS, labels=target).loss
    states = model.model(IDS, token_type_ids=TYPES)
    assert model(encoder_outputs=states, labels=target).loss == with_them.loss
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": 2}
    written = model.generate(IDS, token_type_ids=TYPES, **settings)
    assert torch.equal(written, model.generate(encoder_outputs=states, **settings))
    assert "token_type_ids" in inspect.signature(model.forward).parameters  # so the Trainer keeps the column


@pytest.mark.parametrize(
    ("types", "words"),
    [
        (TYPES * 2, r"`token_type_ids` hold others than 0 … 1, and `type_vocab_size=2`"),
        (TYPES - 1, r"`token_type_ids` hold others than 0 … 1"),
        (TYPES[:1], r"`token_type_ids` has shape \(1, 20\).*\(3, 20\)"),
        (TYPES[:, :7], r"`token_type_ids` has shape \(3, 7\).*\(3, 20\)"),
        (TYPES.float(), r"`token_type_ids` has dtype torch.float32"),
    ],
)
def test_wrong_types_are_refused(types, words):
    with pytest.raises(ValueError, match=words):
        make_model(ReformerModel, type_vocab_size=2)(IDS, token_type_ids=types)


def test_causal_language_models_have_none(tmp_path):
    make_model(ReformerModel, type_vocab_size=2).save_pretrained(tmp_path)
    model = ReformerForCausalLM.from_pretrained(tmp_path)
    assert model.config.type_vocab_size == 0
    assert not hasattr(model.model, "token_type_embeddings")


@pytest.mark.parametrize(
    ("names", "pad_type", "size"), [([], 0, 0), (["token_type_ids"], 0, 2), (["token_type_ids"], 3, 4)]
)
def test_recipes_of_pairs_take_the_types_that_the_tokenizer_tells(names, pad_type, size):
    tokenizer = ReformerByteTokenizer(model_input_names=["input_ids", "attention_mask", *names])
    tokenizer._pad_token_type_id = pad_type
    options = for_pairs(ModelArguments(config_overrides="lsh_window=64"), tokenizer).config_overrides
    assert parse_overrides(options) == {"lsh_rotary": 0.5, "lsh_window": 64} | (
        {"type_vocab_size": size} if size else {}
    )
    alone = for_pairs(ModelArguments(), tokenizer, comparing=False).config_overrides
    assert alone == (f"type_vocab_size={size}" if size else None)
    saved = ModelArguments(model_name_or_path="folder")
    assert for_pairs(saved, tokenizer) == saved
