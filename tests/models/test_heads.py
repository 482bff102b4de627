"""The task heads: losses computed by hand, accumulation, pooling, outputs, and generation without a cache."""

import pytest
import torch
from conftest import REPEATABLE, VOCAB, make_ids, make_model, max_abs_diff
from head_cases import ENDS, HEADS, HOLES, IDS, MASK, STARTS, heads, inputs_of, make_head, text_heads
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_reformer import (
    ReformerForAudioClassification,
    ReformerForCausalLM,
    ReformerForCTC,
    ReformerForMaskedLM,
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTimeSeriesPrediction,
    ReformerForTokenClassification,
    ReformerModel,
    ReformerModelWithLMHead,
)
from hf_reformer.models.heads_text import pool
from hf_reformer.models.losses import chunked_cross_entropy, cross_entropy

SIGNAL_TOKENS = {  # (B, T, D): frames of recordings, patches of two series each
    ReformerForAudioClassification: (3, 10, 16),
    ReformerForCTC: (3, 10, 16),
    ReformerForTimeSeriesPrediction: (6, 7, 16),
}
LANGUAGE_MODELS = [ReformerForCausalLM, ReformerForMaskedLM]

language_models = pytest.mark.parametrize("cls", LANGUAGE_MODELS, ids=lambda cls: cls.__name__)


def mean_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """By hand: minus the mean log-probability of the targets."""
    real = labels != -100
    return -logits[real].log_softmax(-1).gather(-1, labels[real][:, None]).mean()


@heads
def test_attentions_are_passed_on(cls):
    out = make_head(cls).eval()(**inputs_of(cls), output_attentions=True)
    assert len(out.attentions) == make_head(cls).config.num_hidden_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_pass_through_the_hidden_states_returned(dtype):
    model = make_head(ReformerForSequenceClassification, **REPEATABLE).to(dtype)
    inputs, found = inputs_of(ReformerForSequenceClassification), []
    for keep in (False, True):
        model.zero_grad()
        out = model(**inputs, labels=torch.tensor([1, 0, 2]), output_hidden_states=keep)
        for state in out.hidden_states or ():
            state.retain_grad()
        out.loss.backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(state.dtype == dtype and state.grad.abs().sum() > 0 for state in out.hidden_states)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    assert all(max_abs_diff(a, b) <= tolerance for a, b in zip(*found, strict=True))


# --- losses


@text_heads
def test_the_loss_is_that_of_computing_by_hand(cls):
    model, labels = make_head(cls), HEADS[cls]
    out = model(**inputs_of(cls), **labels)
    if cls is ReformerForCausalLM:
        expected = mean_cross_entropy(out.logits[:, :-1], HOLES[:, 1:])
    elif cls is ReformerForQuestionAnswering:
        start = mean_cross_entropy(out.start_logits, STARTS)
        expected = (start + mean_cross_entropy(out.end_logits, torch.tensor([4, -100, 19]))) / 2
    else:
        expected = mean_cross_entropy(out.logits, labels["labels"])
    assert max_abs_diff(out.loss, expected) <= 1e-12
    if cls is not ReformerForMultipleChoice:
        assert out.loss > 0


@heads
def test_training_reaches_every_weight(cls):
    """Forward, loss and backward; and the loss in training is that of evaluation, where nothing is random."""
    model = make_head(cls, **REPEATABLE, lsh_exploration_orders=0)
    expected = model(**inputs_of(cls), **HEADS[cls]).loss
    loss = model.train()(**inputs_of(cls), **HEADS[cls]).loss
    assert max_abs_diff(loss, expected) <= 1e-9
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    untouched = {name for name, p in model.named_parameters() if p.grad.abs().max() < 1e-15}
    same_for_all = {  # what adds the same to all that a softmax compares
        ReformerForMultipleChoice: {"classifier.out_proj.bias"},
        ReformerForQuestionAnswering: {"qa_outputs.bias", "model.norm.bias"},
    }
    assert untouched == same_for_all.get(cls, set())


@pytest.mark.parametrize(
    ("num_labels", "labels", "kind"),
    [
        (1, torch.tensor([0.5, -1.0, 2.0]), "regression"),
        (1, torch.tensor([[0.5], [-1.0], [2.0]]), "regression"),
        (1, torch.tensor([1, 0, 2]), "regression"),
        (2, torch.tensor([[0.5, 1.0], [-1.0, 0.0], [2.0, 0.0]]), "regression"),
        (3, torch.tensor([0, 2, 1]), "single_label_classification"),
        (3, torch.tensor([[0], [2], [1]]), "single_label_classification"),
        (3, torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]]), "multi_label_classification"),
    ],
)
@pytest.mark.parametrize("said", [True, False])
def test_the_problem_type_chooses_the_loss(num_labels, labels, kind, said):
    if kind == "regression" and num_labels > 1 and not said:
        return  # cannot be told from several labels a row
    model = make_head(ReformerForSequenceClassification, num_labels=num_labels, problem_type=kind if said else None)
    out = model(IDS, MASK, labels=labels)
    if kind == "regression":
        expected = (out.logits - labels.reshape(out.logits.shape)).square().mean()
    elif kind == "single_label_classification":
        expected = mean_cross_entropy(out.logits, labels.flatten())
    else:
        p = out.logits.sigmoid()
        expected = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    assert max_abs_diff(out.loss, expected) <= 1e-6  # labels are float32
    assert model.config.problem_type == (kind if said else None)


@pytest.mark.parametrize("cls", [*LANGUAGE_MODELS, ReformerForTokenClassification], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("kind", ["int", "tensor"])
def test_accumulating_small_batches_equals_one_large_batch(cls, kind):
    model = make_head(cls, **REPEATABLE).train()
    ids = make_ids(8, 15)
    labels = torch.where(make_ids(8, 15, seed=1) % 4 == 0, -100, ids if cls in LANGUAGE_MODELS else ids % 3)
    targets = labels[:, 1:] if cls is ReformerForCausalLM else labels
    count = (targets != -100).sum()
    count = int(count) if kind == "int" else count

    def run(size):
        model.zero_grad()
        losses = [
            model(ids[at : at + size], labels=labels[at : at + size], num_items_in_batch=count).loss
            for at in range(0, 8, size)
        ]
        sum(losses).backward()
        return sum(losses).detach(), [p.grad.clone() for p in model.parameters()]

    whole, grads = run(8)
    parts, grads_of_parts = run(2)
    assert max_abs_diff(whole, parts) <= 1e-10
    assert all(max_abs_diff(a, b) <= 1e-10 for a, b in zip(grads, grads_of_parts, strict=True))
    assert max_abs_diff(whole, model(ids, labels=labels).loss) <= 1e-10  # without a count: the mean


@heads
def test_a_head_says_whether_its_loss_counts_items(cls):
    import inspect

    counts = "num_items_in_batch" in inspect.signature(cls.forward).parameters
    assert getattr(cls, "accepts_loss_kwargs", True) is counts


# --- the language-model loss in chunks


@pytest.mark.parametrize("ignored", ["some", "most", "all"])
@pytest.mark.parametrize("chunk", [0, 1, 7, 59, 60, 1000])
def test_a_chunked_loss_equals_the_whole(chunk, ignored):
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(8, 30).double()
    hidden = torch.randn(60, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 30, (60,), generator=generator)
    labels[torch.arange(60) % 6 < {"some": 1, "most": 5, "all": 6}[ignored]] = -100
    wanted = [hidden, *head.parameters()]
    whole = cross_entropy(head(hidden), labels)
    expected = torch.autograd.grad(whole, wanted)
    loss = chunked_cross_entropy(hidden, head, labels, 30, chunk)
    assert max_abs_diff(loss, whole) <= 1e-12
    for a, b in zip(torch.autograd.grad(loss, wanted), expected, strict=True):
        assert max_abs_diff(a, b) <= 1e-12


def test_logits_are_computed_only_for_targets_if_these_are_few():
    head, rows = torch.nn.Linear(8, 30), []
    head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    labels = torch.full((60,), -100)
    labels[[3, 17, 40]] = 5
    chunked_cross_entropy(torch.randn(60, 8, requires_grad=True), head, labels, 30).backward()
    assert rows == [3]


def test_a_chunked_loss_uses_the_weights_of_its_own_forward():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 30).double()
    hidden, labels = torch.randn(60, 8, dtype=torch.float64), torch.randint(0, 30, (60,))
    others = {name: torch.randn_like(p).requires_grad_() for name, p in head.named_parameters()}

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head

        def forward(self, chunk):
            return chunked_cross_entropy(hidden, self.head, labels, 30, chunk)

    weights = {f"head.{name}": p for name, p in others.items()}
    found = [
        torch.autograd.grad(torch.func.functional_call(Loss(), weights, (chunk,)), list(others.values()))
        for chunk in (7, 60)
    ]
    for a, b in zip(*found, strict=True):
        assert max_abs_diff(a, b) <= 1e-12


@pytest.mark.parametrize("autocast", [False, True])
@language_models
def test_chunks_of_logits_change_neither_loss_nor_gradients(cls, autocast):
    def run(chunk):
        model = make_head(cls, **REPEATABLE, chunk_size_lm_head=chunk, dtype=torch.float32).train()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(IDS, MASK, labels=HOLES).loss
        loss.backward()
        return loss.detach(), [p.grad for p in model.parameters()]

    whole, grads = run(0)
    assert whole.dtype == torch.float32
    for chunk in (1, 7, 60):
        loss, others = run(chunk)
        assert max_abs_diff(loss, whole) <= 1e-5
        for a, b in zip(others, grads, strict=True):
            assert max_abs_diff(a, b) <= (2e-2 if autocast else 1e-5) * max(1, b.abs().max().item())


class LargestTensor(TorchDispatchMode):
    """Notes the largest number of elements of any tensor that an operation gives."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


@language_models
def test_training_never_holds_the_logits_of_the_whole_sequence(cls):
    model = make_model(
        cls, vocab_size=5000, dtype=torch.float32, chunk_size_lm_head=16, attn_layers=["local"], local_window=4
    ).train()
    ids = make_ids(2, 128)
    with LargestTensor() as seen:
        out = model(ids, labels=ids)
        out.loss.backward()
    assert out.logits is None
    assert seen.largest < 2 * 128 * 5000 / 4
    assert seen.largest >= 5000 * 32  # the head's weight


@language_models
def test_logits_are_none_in_training_with_labels_alone(cls):
    model = make_head(cls)
    assert model(IDS, labels=IDS).logits is not None
    model.train()
    assert model(IDS).logits is not None
    assert model(IDS).loss is None
    assert model(IDS, labels=IDS).logits is None


def test_labels_may_come_shifted():
    for training in (False, True):
        model = make_head(ReformerForCausalLM, **REPEATABLE).train(training)
        shifted = F.pad(HOLES[:, 1:], (0, 1), value=-100)
        assert torch.equal(model(IDS, labels=HOLES).loss, model(IDS, shift_labels=shifted).loss)


@pytest.mark.parametrize("padding", [(0, 9), (9, 0), (3, 4)])
def test_padding_does_not_change_the_loss_of_a_span(padding):
    model, ids = make_head(ReformerForQuestionAnswering), make_ids(2, 13)
    starts, ends = torch.tensor([0, 7]), torch.tensor([12, 8])
    alone = model(ids, torch.ones_like(ids), start_positions=starts, end_positions=ends)
    padded = model(
        F.pad(ids, padding),
        F.pad(torch.ones_like(ids), padding),
        start_positions=starts + padding[0],
        end_positions=ends + padding[0],
    )
    assert max_abs_diff(padded.loss, alone.loss) <= 1e-10
    assert torch.equal(padded.start_logits.argmax(-1), alone.start_logits.argmax(-1) + padding[0])


def test_a_span_that_ends_on_padding_was_cut_away():
    model, mask = make_head(ReformerForQuestionAnswering), MASK
    found = model(IDS, mask, start_positions=STARTS, end_positions=torch.tensor([4, 17, 19])).loss
    assert max_abs_diff(found, model(IDS, mask, start_positions=STARTS, end_positions=ENDS).loss) == 0


@pytest.mark.parametrize(
    ("keep", "places"),
    [
        (0, range(20)),
        (1, [19]),
        (5, range(15, 20)),
        (torch.tensor([3, 0, 19]), [3, 0, 19]),
        (torch.arange(20).flip(0), range(19, -1, -1)),
    ],
    ids=str,
)
def test_logits_to_keep(keep, places):
    model = make_head(ReformerForCausalLM)
    whole = model(IDS, MASK, labels=HOLES)
    kept = model(IDS, MASK, labels=HOLES, logits_to_keep=keep)
    assert max_abs_diff(kept.logits, whole.logits[:, list(places)]) <= 1e-12
    assert max_abs_diff(kept.loss, whole.loss) <= 1e-12  # the loss is of all positions all the same


# --- pooling


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
def test_pooling_looks_at_real_tokens(pooling):
    hidden = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 0], [1, 0, 1, 0, 0, 0]])
    expected = []
    for row, real in zip(hidden, mask.bool(), strict=True):
        tokens = row[real]
        expected.append({"mean": tokens.mean(0), "last": tokens[-1], "first": tokens[0]}[pooling])
    assert max_abs_diff(pool(hidden, mask, pooling), torch.stack(expected)) <= 1e-6
    assert max_abs_diff(pool(hidden, None, pooling), pool(hidden, torch.ones(3, 6), pooling)) <= 1e-6


def test_the_mean_of_a_long_half_precision_sequence_is_right():
    hidden = torch.full((1, 70_001, 2), 3.0)
    for dtype in (torch.bfloat16, torch.float16):
        assert pool(hidden.to(dtype), torch.ones(1, 70_001), "mean").tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize("pooling", [None, "mean", "last", "first"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("cls", [ReformerForSequenceClassification, ReformerForMultipleChoice])
def test_padding_does_not_change_a_classification(cls, causal, pooling):
    model = make_head(cls, is_decoder=causal, classifier_pooling=pooling)
    ids = make_ids(2, 13)
    alone = model(**inputs_of(cls, ids, torch.ones_like(ids))).logits
    for padding in ((0, 9), (9, 0), (3, 4)):
        padded = inputs_of(cls, F.pad(ids, padding), F.pad(torch.ones_like(ids), padding))
        assert max_abs_diff(model(**padded).logits, alone) <= 1e-10


# --- outputs


@heads
def test_a_tuple_holds_what_the_dictionary_holds(cls):
    model = make_head(cls)
    for extra in ({}, HEADS[cls], {"output_hidden_states": True}):
        named = model(**inputs_of(cls), **extra)
        plain = model(**inputs_of(cls), **extra, return_dict=False)
        assert type(plain) is tuple
        assert len(plain) == len(named)
        for a, b in zip(plain, named.values(), strict=True):
            assert (
                all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
                if isinstance(a, tuple)
                else torch.equal(a, b)
            )


@heads
def test_the_config_may_ask_for_tuples(cls):
    named = make_head(cls)(**inputs_of(cls), **HEADS[cls])
    plain = make_head(cls, return_dict=False)(**inputs_of(cls), **HEADS[cls])
    assert type(plain) is tuple
    assert torch.equal(plain[0], named.loss)
    assert torch.equal(make_head(cls, return_dict=False)(**inputs_of(cls), return_dict=True).to_tuple()[0], named[1])


@pytest.mark.parametrize("cls", [ReformerModel, *HEADS], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_hidden_states_are_one_more_than_layers_and_carry_gradients(cls, training):
    model = make_head(cls, attn_layers=["local", "lsh", "full"], hidden_dropout_prob=0.0).train(training)
    states = model(**inputs_of(cls), output_hidden_states=True).hidden_states
    assert len(states) == 4
    shape = SIGNAL_TOKENS.get(cls, (3, 20, 16))
    assert all(state.shape == shape and state.dtype == torch.float64 for state in states)
    weight = next(model.get_input_embeddings().parameters())
    for index, state in enumerate(states):
        (grad,) = torch.autograd.grad(state.square().sum(), weight, retain_graph=True)
        assert grad.any(), index
    assert model(**inputs_of(cls)).hidden_states is None


def test_hidden_states_lead_to_the_last_one():
    model = make_head(ReformerModel, **REPEATABLE).train()
    out = model(IDS, output_hidden_states=True)
    for state in out.hidden_states:
        state.retain_grad()
    out.last_hidden_state.square().sum().backward()
    assert all(state.grad is None or state.grad.isfinite().all() for state in out.hidden_states)
    assert max_abs_diff(out.last_hidden_state, model(IDS).last_hidden_state) == 0  # the same values on either path
    quiet = make_head(ReformerModel, output_hidden_states=True)
    assert len(quiet(IDS).hidden_states) == 3  # by the config


@text_heads
def test_embeddings_may_be_given_instead_of_ids(cls):
    model = make_head(cls)
    inputs = inputs_of(cls)
    expected = model(**inputs, **HEADS[cls])
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    found = model(**inputs, **HEADS[cls])
    assert all(torch.equal(a, b) for a, b in zip(found.to_tuple(), expected.to_tuple(), strict=True))


# --- positions


@pytest.mark.parametrize("kind", ["axial", "learned", "rotary"])
def test_positions_are_those_given(kind):
    exact = {"local_window": 40} if kind == "rotary" else {}  # hashing sees where tokens stand
    model = make_head(ReformerModel, position_embedding_type=kind, **exact)
    places = torch.arange(20)[None]
    assert torch.equal(model(IDS, position_ids=places)[0], model(IDS)[0])
    moved = model(IDS, position_ids=places + 30)[0]
    if kind == "rotary":  # only differences of positions matter; angles are float32
        assert max_abs_diff(moved, model(IDS)[0]) <= 1e-3
    else:
        assert max_abs_diff(moved, model(IDS)[0]) > 1e-3
    assert max_abs_diff(model(IDS, position_ids=places * 3)[0], model(IDS)[0]) > 1e-3


@pytest.mark.parametrize("kind", ["axial", "learned", "rotary"])
def test_positions_follow_the_mask_under_left_padding(kind):
    model = make_head(ReformerModel, position_embedding_type=kind)
    places = (MASK.cumsum(-1) - 1).clamp(min=0)
    found, expected = model(IDS, MASK)[0], model(IDS, MASK, position_ids=places)[0]
    assert max_abs_diff(found[MASK.bool()], expected[MASK.bool()]) == 0


# --- generation, every step a full forward


def argmax_by_hand(model, ids: torch.Tensor, steps: int) -> torch.Tensor:
    for _ in range(steps):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("mode", ["window", "chunk"])
@torch.no_grad()
def test_greedy_generation_is_the_argmax_of_every_step(mode):
    model = make_model(
        ReformerForCausalLM, attention_mode=mode, hash_seed=0, lsh_attn_chunk_length=8, eos_token_id=None
    )
    ids = make_ids(2, 11)
    expected = argmax_by_hand(model, ids, 8)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False), expected)
    if mode == "window":  # the older rule of decoding is another one: tests/test_chunk_generation.py
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), expected)


@torch.no_grad()
def test_a_left_padded_batch_generates_what_its_rows_generate_alone():
    model = make_head(ReformerForCausalLM, eos_token_id=None)
    ids = make_ids(3, 12)
    lengths = [12, 5, 1]
    mask = torch.stack([F.pad(torch.ones(length, dtype=torch.long), (12 - length, 0)) for length in lengths])
    together = model.generate(ids * mask, attention_mask=mask, max_new_tokens=7, do_sample=False)
    for row, length in enumerate(lengths):
        alone = argmax_by_hand(model, ids[row : row + 1, 12 - length :], 7)
        assert torch.equal(together[row, 12 - length :], alone[0])


def test_generation_warns_of_right_padding(captured_warnings):
    """The library takes the logits of the last place, which is padding then."""
    model = make_head(ReformerForCausalLM, eos_token_id=None)
    ids = make_ids(2, 9)
    model.generate(F.pad(ids, (0, 4)), attention_mask=F.pad(torch.ones_like(ids), (0, 4)), max_new_tokens=1)
    assert any("right-padding was detected" in message for message in captured_warnings)


def test_generation_from_embeddings_is_that_from_their_tokens():
    model = make_head(ReformerForCausalLM, eos_token_id=None)
    found = model.generate(inputs_embeds=model.get_input_embeddings()(IDS), max_new_tokens=4, do_sample=False)
    assert torch.equal(found, model.generate(IDS, max_new_tokens=4, do_sample=False)[:, IDS.shape[1] :])


def test_training_and_evaluation_generate_alike_without_dropout():
    model = make_head(ReformerForCausalLM, **REPEATABLE, lsh_exploration_orders=0, eos_token_id=None)
    ids = make_ids(1, 9)
    expected = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(model.train().generate(ids, max_new_tokens=3, do_sample=False), expected)


# --- names


def test_the_older_name_of_the_causal_language_model():
    assert ReformerModelWithLMHead is ReformerForCausalLM


@heads
def test_others_find_the_modules_by_their_names(cls):
    model = make_head(cls)
    names = {name for name, _ in model.named_modules()}
    assert {"model", "model.embed_tokens", "model.layers", "model.norm"} <= names
    assert {f"model.layers.0.attention.{p}_proj" for p in "qkvo"} <= names
    assert {f"model.layers.1.attention.{p}_proj" for p in ("qk", "v", "o")} <= names
    assert model.base_model is model.model
    if cls in LANGUAGE_MODELS:
        assert model.get_output_embeddings() is model.lm_head
        assert model.lm_head.weight.shape == (VOCAB, 32)
