"""Encoder-decoder: exact gradients, shared weights, generation, losses, and what of it other models read."""

import copy

import pytest
import torch
import torch.distributed as dist
from conftest import OFFLOADED, REPEATABLE, SMALL_WINDOWS, TINY, make_ids, make_model, max_abs_diff, relative_error
from datasets import Dataset
from huggingface_hub.errors import StrictDataclassError
from memory_census import Census
from processes import run_in_processes
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForTextEncoding,
    DataCollatorForSeq2Seq,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
)
from transformers.modeling_outputs import BaseModelOutput

from hf_reformer import (
    ReformerByteTokenizer,
    ReformerConfig,
    ReformerForCausalLM,
    ReformerForConditionalGeneration,
    ReformerForMaskedLM,
    ReformerForSequenceClassification,
    ReformerModel,
)
from hf_reformer.cache.cache import CACHE_NAME

SOURCE, TARGET = make_ids(3, 30), make_ids(3, 21, seed=1)
MASK = torch.ones_like(SOURCE)
MASK[0, :7], MASK[1, 22:] = 0, 0
LABELS = TARGET.masked_fill(torch.arange(21) >= torch.tensor([[21], [14], [9]]), -100)
KINDS = {"attn_layers": ["local", "lsh", "full"]}
EITHER = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def make(seed=0, **overrides):
    return make_model(ReformerForConditionalGeneration, seed=seed, **{**SMALL_WINDOWS, **KINDS, **overrides})


def backward(model, seed=0, repeats=1, **inputs):
    """Loss and gradients of a training step."""
    torch.manual_seed(seed)
    model.train().zero_grad()
    inputs = {"input_ids": SOURCE, "attention_mask": MASK, "labels": LABELS, **inputs}
    losses = [model(**inputs).loss for _ in range(repeats)]
    sum(losses).backward()
    return sum(losses).detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_step(found, expected, tolerance):
    assert max_abs_diff(found[0], expected[0]) <= tolerance * expected[0].abs().item()
    assert relative_error(found[1], expected[1]) <= tolerance


# ---- training: one gradient, whatever the path


@EITHER
@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)], ids=str)
def test_reversible_is_plain(tied, repeats, dtype, tolerance):
    """With dropout and fresh rotations, a source without a token, and two forwards before one backward."""
    mask = MASK.clone()
    mask[2] = 0
    fields = {"tie_encoder_decoder": tied, "dtype": dtype, "hidden_dropout_prob": 0.1}
    reversible, plain = (
        backward(make(reversible=way, **fields), repeats=repeats, attention_mask=mask) for way in (True, False)
    )
    assert len(plain[1]) == len(list(make(**fields).parameters()))
    assert_same_step(reversible, plain, tolerance)


def test_checkpointed_and_sliced_are_plain():
    plain, checkpointed = make(reversible=False), make(reversible=False)
    checkpointed.activation_checkpointing_enable()
    expected = backward(plain)
    assert_same_step(backward(checkpointed), expected, 1e-10)
    assert_same_step(backward(make(chunk_size_feed_forward=5, chunk_size_lm_head=7)), expected, 1e-10)
    for attention in ("eager", "sdpa"):
        model = make()
        model.set_attn_implementation(attention)
        assert {layer.cross_attention.config._attn_implementation for layer in model.decoder.layers} == {attention}
        assert_same_step(backward(model), expected, 1e-10)


def test_chunk_mode():
    """In both; only the encoder looks at chunks to come."""
    chunks = {f"{kind}_attn_chunk_length": 4 for kind in ("lsh", "local")} | {"lsh_num_chunks_after": 1}
    fields = {"attention_mode": "chunk", "position_embedding_type": "rotary", "hash_seed": 1, **chunks}
    reversible, plain = (make(reversible=way, **fields) for way in (True, False))
    assert_same_step(backward(reversible), backward(plain), 1e-10)
    assert reversible.model.layers[1].attention.after == 1
    assert reversible.decoder.layers[1].attention.after == 0
    found = reversible.eval().generate(SOURCE, attention_mask=MASK, max_new_tokens=20, do_sample=False)
    assert found.shape[0] == 3


@pytest.mark.parametrize("reversible", [True, False])
def test_gradients_of_given_encoder_states(reversible):
    """Exactly what differences say, for rows that attend to all, some and none of the source."""
    model = make(attn_layers=["full", "full"], decoder_attn_layers=["full"], reversible=reversible, **REPEATABLE)
    model.train()
    states = torch.randn(3, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 6, [0, 1, 1, 0, 1, 0], [0] * 6])

    def loss(x):
        outputs = BaseModelOutput(last_hidden_state=x)
        return model(encoder_outputs=outputs, attention_mask=mask, labels=LABELS[:, :5]).loss

    states.requires_grad_()
    (grad,) = torch.autograd.grad(loss(states), states)
    direction = torch.randn(states.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        step = 1e-4 * direction
        difference = (loss(states + step) - loss(states - step)) / 2e-4
    assert (grad * direction).sum().item() == pytest.approx(difference.item(), rel=1e-5)
    assert grad[0].abs().min() > 0
    assert not grad[mask == 0].any()


@EITHER
def test_frozen_parts(tied):
    """Training the cross-attention alone, or the encoder alone, gives their part of the whole gradient."""
    whole = backward(make(tie_encoder_decoder=tied))[1]
    for part in ("cross_attention", "model."):
        model = make(tie_encoder_decoder=tied)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part in name)
        found = backward(model)[1]
        assert found
        assert relative_error(found, {name: whole[name] for name in whole if part in name}) <= 1e-10


# ---- what encoder and decoder share


def untied_twin(tied):
    """The same function, all parameters of its own but the embeddings."""
    config = copy.deepcopy(tied.config)
    config.tie_encoder_decoder = False
    twin = ReformerForConditionalGeneration(config).to(torch.float64)
    twin.load_state_dict(tied.state_dict())
    return twin


def test_tied_gradients_are_the_sum_of_both_uses():
    tied = make(tie_encoder_decoder=True, **REPEATABLE)
    loss, found = backward(tied)
    expected_loss, uses = backward(untied_twin(tied))
    assert max_abs_diff(loss, expected_loss) <= 1e-12
    assert len(found) < len(uses)
    others = {
        source: name for name, source in tied._tied_weights_keys.items() if source != "model.embed_tokens.weight"
    }
    for name, grad in found.items():
        other = uses[others[name]] if name in others else 0
        assert max_abs_diff(grad, uses[name] + other) <= 1e-12


def test_the_parameter_count_drops_by_what_is_shared():
    untied, tied = (make(tie_encoder_decoder=tied, position_embedding_type="axial") for tied in (False, True))
    encoder = untied.model
    shared = sum(p.numel() for part in (encoder.layers, encoder.position_embeddings) for p in part.parameters())
    assert untied.num_parameters() - tied.num_parameters() == shared
    own = {name for name, _ in tied.named_parameters() if name.startswith("decoder.")}
    assert own == {n for n in own if "cross_attention" in n or n.startswith("decoder.norm.")}
    assert tied.decoder.layers[0].attention.q_proj.weight is tied.model.layers[0].attention.q_proj.weight
    assert tied.model.layers[0].attention.causal is False
    assert tied.decoder.layers[0].attention.causal is True


@EITHER
@pytest.mark.parametrize("words", [False, True], ids=["own head", "tied head"])
def test_saving_and_loading(tied, words, tmp_path, captured_warnings):
    model = make(tie_encoder_decoder=tied, tie_word_embeddings=words)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == {name for name, _ in model.named_parameters()}
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(loaded) is ReformerForConditionalGeneration
    assert loaded.num_parameters() == model.num_parameters()
    assert loaded.config.to_dict() == model.config.to_dict() | {"_name_or_path": str(tmp_path)}
    with torch.no_grad():
        a, b = (m(SOURCE, MASK, TARGET).logits for m in (model, loaded))
    assert max_abs_diff(a, b) <= 1e-12  # weights that lie elsewhere in memory may be summed in another order
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    assert not [text for text in captured_warnings if "slower" not in text]


def test_the_encoder_of_a_folder(tmp_path, captured_warnings):
    model = make(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.get_encoder()(SOURCE, MASK).last_hidden_state
        for load in (ReformerModel, AutoModel, AutoModelForTextEncoding):
            encoder = load.from_pretrained(tmp_path)
            assert type(encoder) is ReformerModel
            assert max_abs_diff(encoder(SOURCE, MASK).last_hidden_state, expected) <= 1e-12
    assert not [text for text in captured_warnings if "slower" not in text]
    head = ReformerForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(head.model.norm.weight, model.model.norm.weight)
    model.get_encoder().save_pretrained(tmp_path / "encoder")
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "encoder").norm.weight, model.model.norm.weight)


def test_a_decoder_that_lost_weights_is_told_of(tmp_path, captured_warnings):
    make(decoder_attn_layers=["local"] * 3).save_pretrained(tmp_path)
    ReformerForConditionalGeneration.from_pretrained(tmp_path, decoder_attn_layers=["local"] * 2)
    assert any("decoder.layers.2" in text and "UNEXPECTED" in text for text in captured_warnings)


def test_a_masked_language_model_warms_an_encoder_decoder_up(tmp_path):
    masked = make_model(ReformerForMaskedLM, **SMALL_WINDOWS, **KINDS)
    masked.save_pretrained(tmp_path)
    model = ReformerForConditionalGeneration.from_pretrained(tmp_path, tie_encoder_decoder=True)
    for name, weight in masked.model.layers.state_dict().items():
        assert torch.equal(model.model.layers.get_parameter(name), weight)
        assert model.decoder.layers.get_parameter(name) is model.model.layers.get_parameter(name)
    assert model.generate(SOURCE, max_new_tokens=3).shape[0] == 3


def test_a_folder_of_different_stacks_is_not_tied(tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="encoder and decoder differ"):
        ReformerForConditionalGeneration.from_pretrained(tmp_path, tie_encoder_decoder=True)
    make(tie_encoder_decoder=True).save_pretrained(tmp_path)
    assert ReformerForConditionalGeneration.from_pretrained(tmp_path, tie_encoder_decoder=False).num_parameters()


@pytest.mark.parametrize("words", [False, True], ids=["own head", "tied head"])
def test_new_tokens(words):
    model = make(tie_encoder_decoder=True, tie_word_embeddings=words)
    model.resize_token_embeddings(50)
    assert model.decoder.embed_tokens.weight is model.model.embed_tokens.weight
    assert model(torch.full((1, 4), 49), labels=torch.full((1, 3), 49)).logits.shape == (1, 3, 50)


def test_copies_share_as_well():
    model = copy.deepcopy(make(tie_encoder_decoder=True))
    assert model.decoder.layers[1].attention.qk_proj.weight is model.model.layers[1].attention.qk_proj.weight
    assert model.num_parameters() == make(tie_encoder_decoder=True).num_parameters()


def test_depths_may_differ():
    model = make(attn_layers=["local", "lsh"], decoder_attn_layers=["lsh", "full", "local"])
    kinds = [[layer.attention.kind for layer in part.layers] for part in (model.model, model.decoder)]
    assert kinds == [["local", "lsh"], ["lsh", "full", "local"]]
    plain = make(attn_layers=["local", "lsh"], decoder_attn_layers=["lsh", "full", "local"], reversible=False)
    assert_same_step(backward(model), backward(plain), 1e-10)


# ---- memory


def census(depth, reversible=True, source=2048, target=512):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 1, "attention_head_size": 32}
    sizes |= {"feed_forward_size": 64, "max_position_embeddings": 2**14, "lsh_window": 32, "local_window": 32}
    config = ReformerConfig(
        attn_layers=["local"], decoder_attn_layers=["local"] * depth, reversible=reversible, **sizes
    )
    model = ReformerForConditionalGeneration(config).train()
    ids = torch.arange(source).remainder_(63).add_(1)[None]
    with Census(*model.parameters()) as found:
        model(ids, labels=ids[:, :target]).loss.backward()
    return found.peak - sum(p.numel() * p.element_size() for p in model.parameters())


def test_the_peak_is_flat_in_the_decoder_s_depth():
    assert census(12) <= 1.02 * census(4)
    assert census(12, reversible=False) > 1.5 * census(4, reversible=False)


def test_a_long_source_and_a_short_target():
    assert 0 < census(2, source=2**14, target=16) < 200 * 2**20


# ---- attention over the source


def test_the_target_sees_real_tokens_of_the_source_alone():
    model = make(hidden_dropout_prob=0.0)
    with torch.no_grad():
        whole = model(SOURCE, MASK, TARGET).logits
        for row in range(3):
            real = MASK[row].bool()
            alone = model(SOURCE[row : row + 1, real], decoder_input_ids=TARGET[row : row + 1]).logits
            assert max_abs_diff(alone, whole[row : row + 1]) <= 1e-10
        other = model(SOURCE.masked_fill(MASK == 0, 3), MASK, TARGET).logits
    assert max_abs_diff(other, whole) == 0


def test_an_empty_source_is_no_source():
    model = make()
    with torch.no_grad():
        empty = model(SOURCE, torch.zeros_like(MASK), TARGET).logits
        for layer in model.decoder.layers:
            layer.cross_attention.o_proj.weight.zero_()
        without = model(SOURCE, MASK, TARGET).logits
    assert max_abs_diff(empty, without) <= 1e-12


def test_nothing_comes_from_later_targets():
    model, other = make(), TARGET.clone()
    other[:, 11:] = 5
    with torch.no_grad():
        a, b = (model(SOURCE, MASK, ids).logits for ids in (TARGET, other))
    assert max_abs_diff(a[:, :11], b[:, :11]) <= 1e-10
    assert max_abs_diff(a[:, 11:], b[:, 11:]) > 1e-3


def test_states_and_attentions_of_both():
    model = make(decoder_attn_layers=["local", "lsh"])
    with torch.no_grad():
        expected = model(SOURCE, MASK, TARGET)
        found = model(SOURCE, MASK, TARGET, output_hidden_states=True, output_attentions=True)
    assert max_abs_diff(found.logits, expected.logits) <= 1e-10
    assert [x.shape[1] for x in found.encoder_hidden_states] == [30] * 4
    assert [x.shape[1] for x in found.decoder_hidden_states] == [21] * 3
    assert [tuple(x.shape) for x in found.encoder_attentions] == [(3, 2, 30, 30)] * 3
    assert [tuple(x.shape) for x in found.decoder_attentions] == [(3, 2, 21, 21)] * 2
    assert [tuple(x.shape) for x in found.cross_attentions] == [(3, 2, 21, 30)] * 2
    assert max_abs_diff(found.encoder_last_hidden_state, expected.encoder_last_hidden_state) <= 1e-10
    for weights in found.cross_attentions:
        assert max_abs_diff(weights.sum(-1), torch.ones(3, 2, 21)) <= 1e-12
        assert not (weights * (MASK == 0)[:, None, None]).any()
    sparse = model(SOURCE, MASK, TARGET, output_attentions="sparse")
    assert max_abs_diff(sparse.decoder_attentions[1].dense(21), found.decoder_attentions[1]) <= 1e-12
    assert max_abs_diff(sparse.cross_attentions[0], found.cross_attentions[0]) <= 1e-12
    asked = make(decoder_attn_layers=["local", "lsh"])
    asked.config.output_hidden_states = True
    assert len(asked(SOURCE, MASK, TARGET).decoder_hidden_states) == 3
    tuples = model(SOURCE, MASK, TARGET, return_dict=False)
    assert max_abs_diff(tuples[0], expected.logits) <= 1e-10


# ---- the loss


def test_the_loss_is_of_labels_as_they_stand():
    model = make()
    outputs = model(SOURCE, MASK, labels=LABELS)
    expected = torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), LABELS.flatten())
    assert outputs.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    counted = model(SOURCE, MASK, labels=LABELS, num_items_in_batch=torch.tensor(7)).loss
    assert counted.item() == pytest.approx(expected.item() * (LABELS != -100).sum().item() / 7, rel=1e-12)
    nothing = model(SOURCE, MASK, labels=torch.full_like(LABELS, -100)).loss
    assert nothing.item() == 0
    chunked = make(chunk_size_lm_head=4, **REPEATABLE, lsh_exploration_orders=0).train()(SOURCE, MASK, labels=LABELS)
    assert chunked.logits is None
    assert chunked.loss.item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_decoder_s_input_is_shifted_labels():
    model = make(decoder_start_token_id=3)
    shifted = model.prepare_decoder_input_ids_from_labels(LABELS)
    assert shifted[:, 0].tolist() == [3] * 3
    assert torch.equal(shifted[:, 1:], LABELS[:, :-1].masked_fill(LABELS[:, :-1] == -100, 0))
    with torch.no_grad():
        a, b = model(SOURCE, MASK, labels=LABELS).logits, model(SOURCE, MASK, shifted).logits
        embeds = model.get_input_embeddings()
        c = model(inputs_embeds=embeds(SOURCE), attention_mask=MASK, decoder_inputs_embeds=embeds(shifted)).logits
    assert torch.equal(a, b)
    assert torch.equal(a, c)


def trained(folder, **arguments):
    rows = [{"input_ids": SOURCE[i, : 20 + i].tolist(), "labels": TARGET[i, : 9 + i].tolist()} for i in (0, 1, 2, 0)]
    model = make(dtype=torch.float32, **REPEATABLE, lsh_exploration_orders=0)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.generation_config.update(max_new_tokens=8, do_sample=False)
    common = {"max_steps": 2, "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1, "report_to": "none"}
    common |= {"lr_scheduler_type": "constant", "max_grad_norm": 0, "save_strategy": "no", "disable_tqdm": True}
    common |= {"predict_with_generate": True, "per_device_train_batch_size": 4, "use_cpu": True, **arguments}
    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(str(folder), **common),
        data_collator=DataCollatorForSeq2Seq(ReformerByteTokenizer(), model=model),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    return trainer


def test_the_trainer(tmp_path):
    """Accumulated steps are whole ones, vanishing label smoothing is none, and predictions are what generate gives."""
    whole = trained(tmp_path)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    for arguments in (
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"label_smoothing_factor": 1e-9},
        {"label_smoothing_factor": 1e-9, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ):
        other = trained(tmp_path, **arguments)
        found = [entry["loss"] for entry in other.state.log_history if "loss" in entry]
        assert found == pytest.approx(losses, rel=1e-5)
        for p, q in zip(other.model.parameters(), whole.model.parameters(), strict=True):
            assert max_abs_diff(p.detach(), q.detach()) <= 1e-5
    predicted = whole.predict(whole.eval_dataset)
    model = whole.model.eval()
    for row, tokens in zip(whole.eval_dataset, torch.tensor(predicted.predictions), strict=True):
        alone = model.generate(torch.tensor([row["input_ids"]]))[0]
        assert torch.equal(alone, tokens[: len(alone)])
    with torch.no_grad():
        batch = whole.data_collator([dict(row) for row in whole.eval_dataset])
        assert predicted.metrics["test_loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-5)


# ---- generation

GREEDY = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0}
FORMS = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    **OFFLOADED,
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 5},
    "prompt": {"decoder_input_ids": make_ids(3, 6, seed=2)},
    "masked prompt": {
        "decoder_input_ids": torch.tensor([[0, 0, 0, 4, 5], [0, 6, 7, 8, 9], [0, 0, 7, 8, 9]]),
        "decoder_attention_mask": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]]),
    },
}


@pytest.fixture(scope="module")
def model():
    return make(seed=4, eos_token_id=None, decoder_attn_layers=["lsh", "local", "full", "lsh"])


@pytest.mark.parametrize("form", FORMS)
def test_a_cache_changes_nothing(form, model):
    found = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        options = {**GREEDY, **FORMS[form], "use_cache": use_cache}
        if not use_cache:
            options.pop("cache_implementation", None)
        found.append(model.generate(SOURCE, attention_mask=MASK, **options))
    assert torch.equal(*found)
    assert len(set(found[0].flatten().tolist())) > 5, "a model that repeats itself proves little"


def test_rows_of_a_batch_are_the_rows_alone(model):
    together = model.generate(SOURCE, attention_mask=MASK, **GREEDY)
    for row in range(3):
        alone = model.generate(SOURCE[row : row + 1, MASK[row].bool()], **GREEDY)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("sizes", [(1,) * 21, (7, 1, 1, 12), (21,)], ids=str)
def test_any_pieces_give_what_one_forward_gives(sizes, model):
    with torch.no_grad():
        expected = model(SOURCE, MASK, TARGET).logits
        encoded = model.get_encoder()(SOURCE, MASK)
        kept, found = EncoderDecoderCache(DynamicCache(), DynamicCache()), []
        for piece in TARGET.split(sizes, dim=1):
            out = model(None, MASK, piece, encoder_outputs=encoded, **{CACHE_NAME: kept})
            found.append(out.logits)
    assert max_abs_diff(torch.cat(found, dim=1), expected) <= 1e-10
    assert getattr(out, CACHE_NAME) is kept
    assert [tuple(layer.keys.shape) for layer in kept.cross_attention_cache.layers] == [(3, 2, 30, 8)] * 4


def test_the_source_is_read_once(model, monkeypatch):
    calls = []
    for module in (model.model, *(layer.cross_attention.k_proj for layer in model.decoder.layers)):
        forward = module.forward

        def counting(*args, forward=forward, **kwargs):
            calls.append(forward)
            return forward(*args, **kwargs)

        monkeypatch.setattr(module, "forward", counting)
    model.generate(SOURCE, attention_mask=MASK, **GREEDY)
    assert len(calls) == len(set(calls)) == 1 + len(model.decoder.layers)


def test_a_cache_that_was_reset_reads_the_new_source(model):
    kept = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with torch.no_grad():
        for source in (SOURCE, make_ids(3, 17, seed=5)):
            kept.reset()
            found = model(source, decoder_input_ids=TARGET, **{CACHE_NAME: kept}).logits
            assert max_abs_diff(found, model(source, decoder_input_ids=TARGET).logits) <= 1e-10
        with pytest.raises(ValueError, match="another source"):
            model(SOURCE, decoder_input_ids=TARGET, **{CACHE_NAME: kept})


def test_guessed_tokens_change_nothing(model):
    source, expected = SOURCE[:1, 7:], model.generate(SOURCE[:1, 7:], **GREEDY)
    assert torch.equal(model.generate(source, prompt_lookup_num_tokens=3, **GREEDY), expected)


def test_scores_and_attentions_while_generating(model):
    options = {**GREEDY, "return_dict_in_generate": True, "output_attentions": True, "output_logits": True}
    found = model.generate(SOURCE, attention_mask=MASK, **options)
    with torch.no_grad():
        whole = model(SOURCE, MASK, found.sequences[:, :-1], output_attentions=True)
    assert max_abs_diff(torch.stack(found.logits, dim=1), whole.logits) <= 1e-5  # `generate` casts to float32
    steps = torch.cat([step[2] for step in found.cross_attentions], dim=2)
    assert max_abs_diff(steps, whole.cross_attentions[2]) <= 1e-10
    assert len(found.encoder_attentions) == 3


# ---- compiled, on several processes


@pytest.mark.slow
@EITHER
def test_one_graph_trains_the_same(tied):
    model = make(tie_encoder_decoder=tied, attn_layers=["local", "lsh"], **REPEATABLE)
    expected = backward(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    model.zero_grad()
    loss = compiled(input_ids=SOURCE, attention_mask=MASK, labels=LABELS).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    assert_same_step((loss.detach(), found), expected, 1e-9)


@pytest.mark.slow
def test_compiled_parts_train_the_same():
    model = make(attn_layers=["local", "lsh"], **REPEATABLE)
    expected = backward(model)
    model.compile_layers(backend="aot_eager")
    assert model.decoder.layers[0].has_compiled_parts
    assert_same_step(backward(model), expected, 1e-10)


def rows_of(rank):
    return {"input_ids": make_ids(2, 25 + rank, seed=rank), "labels": make_ids(2, 12, seed=5 + rank)}


def one_of_both(tied):
    return make(tie_encoder_decoder=tied, dtype=torch.float32, **REPEATABLE).train()


def gradients_in_a_process() -> dict:
    found = {}
    for tied in (False, True):
        model = DistributedDataParallel(one_of_both(tied))
        model(**rows_of(dist.get_rank())).loss.backward()
        found["ddp", tied] = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
        model = one_of_both(tied)
        groups = [*model.model.layers, *model.decoder.layers]
        for group in zip(model.model.layers, model.decoder.layers, strict=True) if tied else groups:
            fully_shard(list(group) if tied else group)
        fully_shard(model)
        model(**rows_of(dist.get_rank())).loss.backward()
        found["fsdp2", tied] = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return found


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_give_the_mean():
    expected = {}
    for tied in (False, True):
        first, second = (backward(one_of_both(tied), attention_mask=None, **rows_of(rank))[1] for rank in range(2))
        expected[tied] = {name: (first[name] + second[name]) / 2 for name in first}
    for found in run_in_processes(gradients_in_a_process, 2):
        for (_, tied), grads in found.items():
            assert relative_error(grads, expected[tied]) <= 1e-5


# ---- what cannot be


def test_what_a_config_refuses():
    for fields, words in (
        ({"is_decoder": True}, "is_decoder"),
        ({"tie_encoder_decoder": True, "decoder_attn_layers": ["lsh"]}, "tie_encoder_decoder"),
        ({"decoder_attn_layers": []}, "decoder_attn_layers"),
        ({"decoder_attn_layers": ["loca"]}, "decoder_attn_layers"),
        ({"pad_token_id": None}, "decoder_start_token_id"),
        ({"decoder_start_token_id": 40}, "decoder_start_token_id"),
    ):
        with pytest.raises((ValueError, StrictDataclassError), match=words):
            ReformerConfig(**TINY, is_encoder_decoder=True, **fields)
    config = ReformerConfig(**TINY, is_encoder_decoder=True, pad_token_id=None, bos_token_id=5)
    assert config.decoder_start_token_id == 5
    for cls in (ReformerForMaskedLM, ReformerForCausalLM):
        with pytest.raises((ValueError, StrictDataclassError), match="is_encoder_decoder"):
            cls(config)


def test_what_a_forward_refuses(model):
    encoded = BaseModelOutput(last_hidden_state=torch.zeros(3, 30, 32, dtype=torch.float64))
    narrow = BaseModelOutput(last_hidden_state=torch.zeros(3, 30, 16, dtype=torch.float64))
    for inputs, words in (
        ({"input_ids": SOURCE}, "DataCollatorForSeq2Seq"),
        ({"input_ids": SOURCE, "labels": TARGET + 40}, "classes"),
        ({"input_ids": SOURCE, "labels": TARGET, "decoder_input_ids": TARGET[:, :4]}, "target for each"),
        ({"input_ids": SOURCE, "labels": TARGET, "position_ids": torch.arange(30)[None]}, "position ids"),
        ({"input_ids": SOURCE, "labels": TARGET[:2]}, "2 targets"),
        ({"input_ids": SOURCE, "labels": TARGET[0]}, "length of the target"),
        ({"input_ids": SOURCE, "labels": TARGET[:, :0]}, "length of the target"),
        ({"encoder_outputs": encoded, "attention_mask": (MASK - 1) * 1e9, "labels": TARGET}, "other than 0 and 1"),
        ({"encoder_outputs": encoded, "attention_mask": MASK[:, :9], "labels": TARGET}, "attention_mask"),
        ({"encoder_outputs": narrow, "labels": TARGET}, "both residual streams"),
        ({"encoder_outputs": {"last_hidden_state": encoded[0]}, "labels": TARGET}, "is dict"),
        ({"encoder_outputs": (), "labels": TARGET}, "is tuple"),
        ({"input_ids": SOURCE, "labels": TARGET, CACHE_NAME: DynamicCache()}, "keeps two"),
    ):
        with pytest.raises(ValueError, match=words):
            model(**inputs)
    with pytest.raises(ValueError, match="cannot share"):
        model.enable_sequence_parallel("a group")
    with pytest.raises(ValueError, match="continuous batching"):
        model.init_continuous_batching()


# ---- it learns


def reversals(rows, generator, longest=12):
    """Texts of 6 … 12 letters with their masks, and as labels the same texts reversed, behind them the end (1)."""
    lengths = torch.randint(6, longest + 1, (rows, 1), generator=generator)
    letters = torch.randint(2, 22, (rows, longest + 1), generator=generator)
    place = torch.arange(longest + 1)
    turned = letters.gather(1, (lengths - 1 - place).clamp(min=0))
    labels = torch.where(place < lengths, turned, torch.where(place == lengths, 1, -100))
    return {"input_ids": letters * (place < lengths), "attention_mask": (place < lengths).long(), "labels": labels}


def share_of_right_texts(model, rows):
    labels = rows["labels"]
    found = model.eval().generate(
        rows["input_ids"], attention_mask=rows["attention_mask"], max_new_tokens=labels.shape[1], do_sample=False
    )[:, 1:]
    found = torch.nn.functional.pad(found, (0, labels.shape[1] - found.shape[1]))
    return ((found == labels) | (labels == -100)).all(-1).float().mean().item()


@pytest.mark.slow
@EITHER
def test_it_learns_to_reverse(tied):
    """99 of 100 texts, all letters right: after 800 steps, tied or untied, with these seeds."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 22, "hidden_size": 64, "num_attention_heads": 4, "attention_head_size": 16}
    sizes |= {"feed_forward_size": 128, "attn_layers": ["local", "lsh"], "max_position_embeddings": 32}
    sizes |= {"lsh_window": 16, "local_window": 16, "num_buckets": 2, "hidden_dropout_prob": 0.0}
    sizes |= {"position_embedding_type": "axial", "axial_pos_shape": (4, 8), "initializer_range": 0.02}
    model = ReformerForConditionalGeneration(ReformerConfig(**sizes, tie_encoder_decoder=tied))
    generator, best = torch.Generator().manual_seed(1), 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / 100) * (1 - (n + 1) / 2000))
    for step in range(1, 1401):
        model.train()(**reversals(64, generator)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 200 == 0 and (best := share_of_right_texts(model, reversals(200, generator))) >= 0.99:
            break
    assert best >= 0.99


# --- coverage


def dense_coverage(model, inputs) -> torch.Tensor:
    """The coverage losses of all layers from the weights of attention, which the model gives as matrices."""
    out = model(**inputs, output_attentions=True)
    source, target = inputs["attention_mask"].bool(), torch.ones_like(inputs["labels"], dtype=torch.bool)

    def loss(weights, queries, keys, causal):
        share = queries.double() / queries.sum(-1, keepdim=True).clamp(min=1)
        received = torch.einsum("bhts,bt->bs", weights, share) / weights.shape[1]
        even = queries.double()[:, :, None] * keys[:, None, :]
        even = even.tril() if causal else even
        even = torch.einsum("bts,bt->bs", even / even.sum(-1, keepdim=True).clamp(min=1), share)
        ratio = received.clamp(min=1e-300) / even.clamp(min=1e-300)
        return torch.where(received > 0, received * ratio.log(), 0).sum(-1).mean()

    encoder = [loss(w, source, source, False) for w in out.encoder_attentions]
    own = [loss(w, target, target, True) for w in out.decoder_attentions]
    cross = [loss(w, target, source, False) for w in out.cross_attentions]
    return torch.stack([*encoder, *(a + b for a, b in zip(own, cross, strict=True))])


@pytest.mark.parametrize("reversible", [True, False])
def test_coverage_counts_encoder_decoder_and_what_the_source_receives(reversible):
    model = make_model(
        ReformerForConditionalGeneration,
        **SMALL_WINDOWS,
        coverage_loss_weight=0.5,
        reversible=reversible,
        hidden_dropout_prob=0.0,
        resample_rotations=False,
        lsh_exploration_orders=0,
    ).train()
    mask = torch.ones(2, 23, dtype=torch.long)
    mask[1, 15:] = 0
    inputs = {"input_ids": make_ids(2, 23), "attention_mask": mask, "labels": make_ids(2, 11, seed=1)}
    out, dense = model(**inputs), dense_coverage(model, inputs)
    assert max_abs_diff(out.coverage_loss, dense) < 1e-10
    plain = model(**inputs, output_coverage=False).loss
    assert abs(out.loss - plain - 0.5 * dense.sum()).item() < 1e-10
    wanted = list(model.parameters())
    found = torch.autograd.grad(out.loss, wanted, allow_unused=True)
    expected = torch.autograd.grad(plain + 0.5 * dense.sum(), wanted, allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or max_abs_diff(a, b) <= 1e-8 * max(1, b.abs().max().item())


def test_coverage_of_a_batch_is_the_mean_over_its_rows():
    """Whatever pads the targets; a row without a target counts nothing."""
    model = make(coverage_loss_weight=0.5)
    with torch.no_grad():
        padded = model(SOURCE, MASK, labels=LABELS).coverage_loss
        lengths = (LABELS != -100).sum(-1).tolist()
        rows = [
            model(SOURCE[i : i + 1], MASK[i : i + 1], labels=LABELS[i : i + 1, :length]).coverage_loss
            for i, length in enumerate(lengths)
        ]
        assert max_abs_diff(padded, torch.stack(rows).mean(0)) <= 1e-12
        nothing = LABELS.clone()
        nothing[2] = -100
        found = model(SOURCE, MASK, labels=nothing).coverage_loss
        decoder = slice(len(model.model.layers), None)
        assert max_abs_diff(found[decoder], torch.stack(rows[:2]).mean(0)[decoder]) <= 1e-12


def test_coverage_beside_given_states_and_other_losses(captured_warnings):
    model = make(coverage_loss_weight=0.5)
    whole = model(SOURCE, MASK, labels=LABELS)
    states = model.model(SOURCE, MASK)
    given = model(encoder_outputs=states, attention_mask=MASK, labels=LABELS)
    assert torch.equal(given.loss, whole.loss)
    alone = model(encoder_outputs=(states[0],), attention_mask=MASK, labels=LABELS)
    assert torch.equal(alone.coverage_loss, whole.coverage_loss[len(states.coverage_loss) :])
    assert model(SOURCE, MASK, labels=LABELS, use_cache=True).coverage_loss is None
    assert model(SOURCE, MASK, decoder_input_ids=TARGET).loss is None
    assert not any("coverage" in text for text in captured_warnings)
    assert model.train()(SOURCE, MASK, decoder_input_ids=TARGET).loss is None
    assert any("add" in text and "coverage_loss" in text for text in captured_warnings)


@EITHER
def test_missing_weights_are_told_and_made_anew(tied, tmp_path):
    model = make(tie_encoder_decoder=tied, initializer_range=0.3)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    kept = load_file(file)
    parts = ("decoder.layers.0.cross_attention", "lm_head", "model.layers.1.feed_forward.up", "decoder.norm")
    lost = {name for name in kept if name.startswith(parts)}
    assert len(lost) >= 10
    save_file({name: x for name, x in kept.items() if name not in lost}, file, metadata={"format": "pt"})
    loaded, told = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert lost <= set(told["missing_keys"])
    named = loaded.state_dict()
    assert all(named[name].isfinite().all() for name in named)
    for name in lost:
        if named[name].dim() == 2:
            assert 0.2 < named[name].std() < 0.4, name
        else:
            assert (named[name] == (1 if "norm.weight" in name else 0)).all(), name


def test_attentions_and_states_keep_their_gradients():
    model = make()
    out = model(SOURCE, labels=LABELS, output_attentions=True, output_hidden_states=True)
    fields = ["encoder_attentions", "decoder_attentions", "cross_attentions"]
    fields += ["encoder_hidden_states", "decoder_hidden_states"]
    for name in fields:
        for x in out[name]:
            x.retain_grad()
    out.loss.backward()
    for name in fields:
        assert all(x.grad is not None and x.grad.any() for x in out[name]), name
