"""Bad input gives a clear error that names what was found and what to do, or a defined result: never a crash deep
inside, never NaN."""

import re

import pytest
import torch
from conftest import SMALL_WINDOWS, VOCAB, make_ids, make_model, max_abs_diff, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from hf_reformer import (
    ReformerForCausalLM,
    ReformerForConditionalGeneration,
    ReformerForMaskedLM,
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
    ReformerModel,
)

IDS = make_ids(2, 12)
EMBEDS = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
POSITIONS = torch.arange(12)[None].expand(2, -1)

# (class, labels of the right shape and kind, whether labels of -100 mean "no target")
HEADS = [
    (ReformerForCausalLM, {"labels": IDS}),
    (ReformerForMaskedLM, {"labels": IDS}),
    (ReformerForSequenceClassification, {"labels": torch.tensor([0, 1])}),
    (ReformerForTokenClassification, {"labels": IDS % 2}),
    (
        ReformerForQuestionAnswering,
        {"start_positions": torch.tensor([0, 3]), "end_positions": torch.tensor([1, 11])},
    ),
    (ReformerForMultipleChoice, {"labels": torch.tensor([0])}),
]
heads = pytest.mark.parametrize(("cls", "labels"), HEADS, ids=[cls.__name__ for cls, _ in HEADS])
MODES = {
    "window": SMALL_WINDOWS,
    "chunk": {"attention_mode": "chunk", "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4, "hash_seed": 0},
}


def shaped_for(cls, x: torch.Tensor) -> torch.Tensor:
    """The two rows as one question with two choices, for the head that wants it so."""
    return x[None] if cls is ReformerForMultipleChoice else x


# --- what the backbone takes

BAD = [
    ({}, "exactly one of `input_ids` and `inputs_embeds`"),
    ({"input_ids": IDS, "inputs_embeds": EMBEDS}, "exactly one of `input_ids` and `inputs_embeds`"),
    ({"input_ids": IDS[:0]}, r"\(0, 12\).*empty.*at least one row"),
    ({"input_ids": IDS[:, :0], "output_attentions": True}, r"\(2, 0\).*empty.*at least one row and token"),
    ({"inputs_embeds": EMBEDS[:, :0], "output_sorting": True}, r"inputs_embeds.*\(2, 0, 16\).*empty"),
    ({"input_ids": IDS[0]}, r"\(12,\).*\(batch, length\)"),
    ({"input_ids": IDS[None]}, r"\(1, 2, 12\).*\(batch, length\)"),
    ({"inputs_embeds": EMBEDS[0]}, r"\(12, 16\).*\(batch, length, hidden_size\)"),
    ({"inputs_embeds": EMBEDS[..., :5]}, r"5 wide.*hidden_size=16"),
    ({"input_ids": IDS.float()}, r"`input_ids` has dtype torch.float32.*int64"),
    ({"input_ids": IDS > 3}, r"`input_ids` has dtype torch.bool.*int64"),
    ({"input_ids": IDS.byte()}, r"`input_ids` has dtype torch.uint8.*int64"),
    ({"input_ids": IDS - 20}, rf"input_ids.*from -\d+ to.*vocab_size={VOCAB}.*tokenizer"),
    ({"input_ids": IDS + VOCAB}, rf"input_ids.*vocab_size={VOCAB}.*0 … {VOCAB - 1}.*resize_token_embeddings"),
    ({"input_ids": make_ids(1, 257)}, r"axial_pos_shape=\(16, 16\)` covers 256.*257 tokens.*rotary"),
    ({"input_ids": IDS, "attention_mask": torch.ones(2, 13)}, r"attention_mask.*\(2, 13\).*\(2, 12\)"),
    ({"input_ids": IDS, "attention_mask": torch.ones(1, 12)}, r"attention_mask.*\(1, 12\).*\(2, 12\)"),
    ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 12, 12)}, r"attention_mask.*\(2, 1, 12, 12\).*\(2, 12\)"),
    ({"input_ids": IDS, "attention_mask": torch.full((2, 12), 2)}, r"attention_mask.*0 and 1.*1 for real tokens"),
    ({"input_ids": IDS, "attention_mask": torch.full((2, 12), -1e4)}, r"attention_mask.*additive masks"),
    ({"input_ids": IDS, "attention_mask": torch.full((2, 12), torch.nan)}, r"attention_mask.*0 and 1"),
    ({"input_ids": IDS, "position_ids": POSITIONS[:, :5]}, r"position_ids.*\(2, 5\).*\(2, 12\)"),
    ({"input_ids": IDS, "position_ids": POSITIONS.float()}, r"`position_ids` has dtype torch.float32.*int64"),
    ({"input_ids": IDS, "position_ids": POSITIONS + 250}, r"position_ids.*from 250 to 261.*0 … 255"),
    ({"input_ids": IDS, "position_ids": POSITIONS - 1}, r"position_ids.*from -1 to 10.*0 … 255"),
    ({"input_ids": IDS, "num_hashes": 0}, r"num_hashes=0.*at least 1"),
    ({"input_ids": IDS, "num_hashes": 1.5}, r"num_hashes=1.5.*whole number"),
    ({"input_ids": IDS, "num_buckets": 5}, r"num_buckets=5.*even.*\[16, 32\]"),
    ({"input_ids": IDS, "num_buckets": [4, 3]}, r"num_buckets=\[4, 3\].*even"),
    ({"input_ids": IDS, "num_buckets": 4.0}, r"num_buckets=4.0.*even"),
    ({"input_ids": IDS, "output_attentions": "dense"}, r"output_attentions='dense'.*True, False or \"sparse\""),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("inputs", "message"), BAD)
def test_bad_input_is_named_with_its_remedy(inputs, message, mode):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make_model(ReformerModel, position_embedding_type="axial", **MODES[mode])(**inputs)


@heads
def test_heads_refuse_bad_input_in_the_same_words(cls, labels):
    model = make_model(cls, position_embedding_type="axial")
    for inputs in ({"input_ids": IDS[:0]}, {"input_ids": IDS + VOCAB}, {"input_ids": make_ids(2, 300)}):
        with pytest.raises(ValueError, match=r"empty|vocab_size=40|covers 256"):
            model(input_ids=shaped_for(cls, inputs["input_ids"]))
    with pytest.raises(ValueError, match=r"exactly one of|inputs of shape"):
        model()


@pytest.mark.parametrize("kind", ["axial", "learned", "rotary"])
def test_only_rotary_positions_have_no_end(kind):
    model = make_model(ReformerModel, position_embedding_type=kind, max_position_embeddings=16)
    assert model(make_ids(1, 16)).last_hidden_state.isfinite().all()
    if kind == "rotary":
        assert model(make_ids(1, 100)).last_hidden_state.isfinite().all()
    else:
        with pytest.raises(ValueError, match=r"covers 16 positions but the input has 17 tokens"):
            model(make_ids(1, 17))


@pytest.mark.parametrize("kind", ["axial", "learned"])
def test_padding_needs_no_positions(kind):
    """A row padded beyond what the positions cover still equals the row alone."""
    model = make_model(ReformerModel, position_embedding_type=kind, max_position_embeddings=16)
    ids = make_ids(1, 16)
    padded, mask = torch.nn.functional.pad(ids, (9, 5)), torch.nn.functional.pad(torch.ones_like(ids), (9, 5))
    found = model(padded, attention_mask=mask).last_hidden_state[:, 9:25]
    assert max_abs_diff(found, model(ids).last_hidden_state) <= 1e-10
    mask[0, 0] = 1
    with pytest.raises(ValueError, match="17 tokens"):
        model(padded, attention_mask=mask)


def test_ids_may_be_int32():
    model = make_model(ReformerModel)
    assert torch.equal(model(IDS.int())[0], model(IDS)[0])
    assert torch.equal(model(IDS, position_ids=POSITIONS.int())[0], model(IDS)[0])


@pytest.mark.parametrize("kind", ["bool", "int8", "int64", "float32", "float64"])
def test_masks_of_any_type_serve(kind):
    model = make_model(ReformerModel)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    assert torch.equal(model(IDS, mask.to(getattr(torch, kind)))[0], model(IDS, mask)[0])


def test_positions_may_be_given_once_for_all_rows():
    model = make_model(ReformerModel)
    assert torch.equal(model(IDS, position_ids=POSITIONS[:1] + 5)[0], model(IDS, position_ids=POSITIONS + 5)[0])


def test_embeddings_of_another_dtype_serve():
    model = make_model(ReformerModel, dtype=torch.float32)
    expected = model(inputs_embeds=EMBEDS.float())[0]
    assert expected.dtype == torch.float32
    assert max_abs_diff(model(inputs_embeds=EMBEDS)[0], expected) < 1e-5
    assert max_abs_diff(model(inputs_embeds=EMBEDS.bfloat16())[0], expected) < 0.5


def test_unknown_arguments_of_the_library_pass():
    model = make_model(ReformerForCausalLM)
    assert torch.equal(model(IDS, use_cache=True, past_key_values=None, token_type_ids=None).logits, model(IDS).logits)


# --- rows without a single real token


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("training", [True, False])
@heads
def test_a_row_of_padding_stays_finite(cls, labels, training, mode):
    model = make_model(cls, **MODES[mode]).train(training)
    mask = torch.ones_like(IDS)
    mask[1] = 0
    out = model(shaped_for(cls, IDS), attention_mask=shaped_for(cls, mask), **labels)
    assert all(x.isfinite().all() for x in out.values() if isinstance(x, torch.Tensor))
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("layers", [["local"], ["lsh"], ["full"], ["local", "lsh", "full"]], ids=str)
def test_nothing_but_padding_stays_finite(layers, causal):
    model = make_model(ReformerModel, attn_layers=layers, is_decoder=causal)
    out = model(IDS, attention_mask=torch.zeros_like(IDS)).last_hidden_state
    assert out.isfinite().all()
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_row_of_padding_changes_no_other_row():
    model = make_model(ReformerModel)
    mask = torch.ones_like(IDS)
    mask[1] = 0
    assert max_abs_diff(model(IDS, attention_mask=mask)[0][:1], model(IDS[:1])[0]) <= 1e-10


# --- labels


@pytest.mark.parametrize("training", [True, False])
@heads
def test_a_loss_without_a_target_is_zero_with_zero_gradients(cls, labels, training):
    model = make_model(cls).train(training)
    nothing = {name: torch.full_like(x, -100) for name, x in labels.items()}
    loss = model(shaped_for(cls, IDS), **nothing).loss
    assert loss.item() == 0
    loss.backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("count", [0, torch.tensor(0)], ids=str)
@pytest.mark.parametrize("cls", [ReformerForCausalLM, ReformerForMaskedLM, ReformerForTokenClassification])
def test_a_count_of_no_targets_is_zero_too(cls, count):
    """The Trainer counts the targets of a whole step, which may be none."""
    loss = make_model(cls).train()(IDS, labels=torch.full_like(IDS, -100), num_items_in_batch=count).loss
    assert loss.item() == 0


def test_one_token_has_no_next_token():
    assert make_model(ReformerForCausalLM)(IDS[:, :1], labels=IDS[:, :1]).loss.item() == 0


@heads
@pytest.mark.parametrize("training", [True, False])
def test_labels_out_of_range_are_named(cls, labels, training):
    model = make_model(cls).train(training)
    for wrong in (-1, 40):
        if cls is ReformerForQuestionAnswering:  # a position outside the input is an answer that was cut away
            assert model(IDS, **{name: torch.full_like(x, wrong) for name, x in labels.items()}).loss.item() == 0
            continue
        bad = {name: x.clone() for name, x in labels.items()}
        bad["labels"].view(-1)[-1] = wrong
        if cls is ReformerForCausalLM:
            bad = {"shift_labels": bad["labels"]}
        with pytest.raises(ValueError, match=rf"labels reach from .*{wrong}.*classes.*-100"):
            model(shaped_for(cls, IDS), **bad)


@heads
def test_labels_of_a_wrong_shape_are_named(cls, labels):
    model = make_model(cls)
    for bad in (
        {name: x.repeat(2, *[1] * (x.dim() - 1)) for name, x in labels.items()},
        {name: x[..., None, None].expand(*x.shape, 2, 3) for name, x in labels.items()},
    ):
        with pytest.raises(ValueError, match=r"labels have shape \("):
            model(shaped_for(cls, IDS), **bad)


@heads
@pytest.mark.parametrize("training", [True, False])
def test_labels_of_any_integer_type_serve(cls, labels, training):
    model = make_model(cls, hidden_dropout_prob=0.0, resample_rotations=False, lsh_exploration_orders=0)
    model.train(training)
    expected = model(shaped_for(cls, IDS), **labels).loss
    for dtype in (torch.int32, torch.int16):
        found = model(shaped_for(cls, IDS), **{name: x.to(dtype) for name, x in labels.items()}).loss
        assert torch.equal(found, expected)


@heads
@pytest.mark.parametrize("kind", ["float32", "bool"])
def test_labels_that_are_no_classes_are_named(cls, labels, kind):
    if cls is ReformerForSequenceClassification and kind == "float32":
        return  # floats are several labels a row there
    if cls is ReformerForQuestionAnswering and kind == "bool":
        return  # positions 0 and 1
    with pytest.raises(ValueError, match=rf"labels have dtype torch.{kind}.*labels.long"):
        make_model(cls)(shaped_for(cls, IDS), **{name: x.to(getattr(torch, kind)) for name, x in labels.items()})


def test_a_span_needs_both_ends():
    with pytest.raises(ValueError, match="both `start_positions` and `end_positions`"):
        make_model(ReformerForQuestionAnswering)(IDS, start_positions=torch.tensor([0, 1]))


def test_several_labels_a_row_need_one_number_for_each():
    model = make_model(ReformerForSequenceClassification, num_labels=3)
    with pytest.raises(ValueError, match=r"labels have shape \(2, 2\).*multi_label_classification.*\(2, 3\)"):
        model(IDS, labels=torch.rand(2, 2))


@pytest.mark.parametrize("shape", [(12,), (2, 12)])
def test_multiple_choice_names_the_shape_it_needs(shape):
    model = make_model(ReformerForMultipleChoice)
    with pytest.raises(ValueError, match=re.escape(f"(batch, choices, length, …), found {shape}")):
        model(make_ids(*shape))
    with pytest.raises(ValueError, match=re.escape(f"(batch, choices, length, …), found {(*shape, 16)}")):
        model(inputs_embeds=torch.randn(*shape, 16))
    with pytest.raises(ValueError, match="found None"):
        model()


def test_multiple_choice_wants_a_mask_of_its_own_shape():
    with pytest.raises(ValueError, match="attention_mask"):
        make_model(ReformerForMultipleChoice)(IDS[None], attention_mask=torch.ones(2, 12))


# --- heads and directions


def test_a_causal_language_model_is_causal_whatever_its_config_says():
    config = tiny_config(is_decoder=False)
    model = ReformerForCausalLM(config).eval()
    assert model.config.is_decoder
    assert not config.is_decoder
    changed = IDS.clone()
    changed[:, -1] = IDS[:, -1] % 39 + 1
    assert max_abs_diff(model(changed).logits[:, :-1], model(IDS).logits[:, :-1]) <= 1e-5


def test_a_masked_language_model_refuses_to_be_causal():
    with pytest.raises(ValueError, match=r"is_decoder=True.*Set it to False, or use ReformerForCausalLM"):
        ReformerForMaskedLM(tiny_config(is_decoder=True))


# --- texts without a token


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_an_empty_text_alone_is_classified_as_beside_others(mode, pooling):
    model = make_model(ReformerForSequenceClassification, classifier_pooling=pooling, **MODES[mode])
    alone = model(input_ids=torch.zeros(1, 0), attention_mask=torch.zeros(1, 0)).logits  # as torch.tensor([[]]) is
    for length in (1, 5, 30):
        ids = torch.cat([make_ids(1, length), torch.zeros(1, length, dtype=torch.int64)])
        mask = (ids != 0).long()
        assert max_abs_diff(model(input_ids=ids, attention_mask=mask).logits[1:], alone) < 1e-12
    assert alone.isfinite().all()


def test_no_answer_lies_in_an_empty_text():
    model, nowhere = make_model(ReformerForQuestionAnswering), torch.zeros(2, dtype=torch.int64)
    assert model(input_ids=IDS[:, :0]).start_logits.shape == (2, 0)
    with pytest.raises(ValueError, match="no token"):
        model(input_ids=IDS[:, :0], start_positions=nowhere, end_positions=nowhere)


@pytest.mark.parametrize(("cls", "labels"), [head for head in HEADS if head[0] is not ReformerForQuestionAnswering])
def test_batches_of_empty_texts_train_every_parameter(cls, labels):
    model = make_model(cls, **SMALL_WINDOWS).train()
    given = {name: x[..., :0] if x.dim() == 2 else x for name, x in labels.items()}
    out = model(input_ids=shaped_for(cls, IDS[:, :0]), **given)
    assert out.loss.isfinite()
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_hidden_states_of_an_empty_text_are_empty():
    out = make_model(ReformerModel)(inputs_embeds=EMBEDS[:, :0], output_hidden_states=True)
    assert out.last_hidden_state.shape == (2, 0, 32)
    assert {x.shape for x in out.hidden_states} == {(2, 0, 16)}


def test_an_empty_source_alone_writes_what_it_writes_beside_others():
    model = make_model(ReformerForConditionalGeneration, **SMALL_WINDOWS)
    beside = torch.cat([make_ids(1, 7), torch.zeros(1, 7, dtype=torch.int64)])
    for options in ({}, {"num_beams": 2}, {"use_cache": False}):
        together = model.generate(beside, attention_mask=(beside != 0).long(), max_new_tokens=4, **options)
        alone = model.generate(IDS[:1, :0], attention_mask=IDS[:1, :0], max_new_tokens=4, **options)
        assert torch.equal(alone, together[1:])


# --- a device that works behind the host is not waited for

LOOKING = ["ops.dispatch", "models.input_checks", "models.modeling_reformer", "models.losses", "models.decoder"]
LOOKING += ["cache.cache_layers", "ops.lsh", "ops.prng"]


class NobodyWaits(TorchDispatchMode):
    """Raises where a value is read, as for a CUDA device it would be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
def test_no_forward_backward_or_step_waits_for_a_device(monkeypatch, mode):
    """The same values as where a CPU is looked at."""
    fields = {"attn_layers": ["local", "lsh", "full"], "reversible": False, "attention_backend": "torch"}
    model = make_model(ReformerForCausalLM, is_decoder=True, **fields, **MODES[mode])
    ids, mask = make_ids(2, 40), torch.ones(2, 40, dtype=torch.int64)
    mask[0, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)

    def run_all():
        model.train()
        model.zero_grad()
        torch.manual_seed(0)
        out = model(ids, attention_mask=mask, position_ids=positions, labels=ids * mask - 100 * (1 - mask))
        out.loss.backward()
        found = [out.loss, *[p.grad for p in model.parameters() if p.grad is not None]]
        model.eval()
        for given in (mask, None):
            cache, before = None, 0
            for end in (20, 21, 22, 40):
                kwargs = {} if given is None else {"attention_mask": given[:, :end]}
                with torch.no_grad():
                    out = model(ids[:, before:end], past_key_values=cache, use_cache=True, **kwargs)
                found.append(out.logits * (1 if given is None else given[:, before:end, None]))
                cache, before = out.past_key_values, end
        return found

    expected = run_all()
    for name in LOOKING:
        monkeypatch.setattr(f"hf_reformer.{name}.may_look_at", lambda x: False)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: pytest.fail("waited for"))
    with NobodyWaits():
        found = run_all()
    assert all(max_abs_diff(a, b) <= 1e-10 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["axial", "learned"])
def test_on_a_device_padding_beyond_the_positions_is_no_reason_to_wait(monkeypatch, kind):
    model = make_model(ReformerModel, position_embedding_type=kind, max_position_embeddings=16, axial_pos_shape=(4, 4))
    ids, mask = make_ids(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[:, 12:] = 0
    expected = model(ids, attention_mask=mask).last_hidden_state
    for name in LOOKING:
        monkeypatch.setattr(f"hf_reformer.{name}.may_look_at", lambda x: False)
    with NobodyWaits():
        found = model(ids, attention_mask=mask).last_hidden_state
    assert max_abs_diff(found[:, :12], expected[:, :12]) <= 1e-10
    mask[0, 12:17] = 1
    with pytest.raises(RuntimeError, match="covers 16 positions"):
        model(ids, attention_mask=mask)


def test_bad_values_on_a_device_are_refused_when_it_comes_to_them(monkeypatch):
    model, mask = make_model(ReformerModel), torch.full((2, 12), 2)
    monkeypatch.setattr("hf_reformer.models.input_checks.may_look_at", lambda x: False)
    with pytest.raises(RuntimeError, match=r"attention_mask.*0 and 1"):
        model(IDS, attention_mask=mask)
