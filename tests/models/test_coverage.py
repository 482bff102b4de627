"""The coverage loss: its definition by hand, its gradients on every path, what heads and the Trainer make of it."""

import copy
import math
import pickle
import runpy
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import pytest
import torch
from conftest import REPEATABLE, SMALL_WINDOWS, make_ids, make_model, max_abs_diff, tiny_config
from transformers import Trainer, TrainingArguments

from hf_reformer import (
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
    ReformerModel,
)
from hf_reformer.analysis.lsh_stats import attention_mass
from hf_reformer.analysis.plots import plot_attention_mass
from hf_reformer.ops.coverage import coverage_loss, coverage_target, covered_fraction, mass_entropy
from hf_reformer.training.coverage_callback import CoverageCallback, attention_mass_by_layer

LENGTH = 40
IDS, MASK = make_ids(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
MASK[0, :7], MASK[1, 25:29] = 0, 0
LABELS = IDS.where(MASK == 1, -100)
DROPOUT = {"lsh_attention_probs_dropout_prob": 0.2, "local_attention_probs_dropout_prob": 0.2}
QUIET = {**REPEATABLE, **dict.fromkeys(DROPOUT, 0.0), "classifier_dropout": 0.0}  # two forwards in training agree
MODES = {
    "window": {**SMALL_WINDOWS, **DROPOUT, "attn_layers": ["local", "lsh", "full", "lsh"]},
    "chunk": {
        **DROPOUT,
        "attention_mode": "chunk",
        "num_buckets": 4,
        "lsh_attn_chunk_length": 16,
        "local_attn_chunk_length": 16,
        "position_embedding_type": "learned",
    },
}


def make(cls=ReformerForCausalLM, mode="window", **changes):
    return make_model(cls, **{**MODES[mode], "coverage_loss_weight": 0.3, **changes})


def step(model, *, alone=False, **inputs):
    """Outputs and gradients; `alone`: of the coverage loss without the task's."""
    torch.manual_seed(3)
    model.zero_grad()
    out = model(**{"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, **inputs})
    (out.coverage_loss.sum() if alone else out.loss).backward()
    return out, [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def assert_equal(found, expected, tolerance=1e-10):
    for a, b in zip(found, expected, strict=True):
        assert max_abs_diff(a, b) <= tolerance * max(1, b.abs().max().item())


# --- the definition


def loss_by_hand(weights: torch.Tensor, mask: torch.Tensor, causal: bool) -> float:
    """Of one layer's weights (B, H, T, T), in Python's own numbers."""
    losses = []
    for row, real in zip(weights.tolist(), mask, strict=True):
        real = real.nonzero().flatten().tolist()
        n = len(real)
        for j, token in enumerate(real):
            received = sum(head[query][token] for head in row for query in real) / (len(row) * n)
            target = sum(1 / (i + 1) for i in range(j, n)) / n if causal else 1 / n
            losses.append(received * math.log(received / target) if received > 0 else 0.0)
    return sum(losses) / len(mask)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_what_the_weights_say(mode, causal, training):
    model = make(ReformerModel, mode, is_decoder=causal).train(training)
    torch.manual_seed(3)
    out = model(IDS, attention_mask=MASK)
    torch.manual_seed(3)
    attentions = model(IDS, attention_mask=MASK, output_attentions=True).attentions
    expected = [loss_by_hand(weights, MASK, causal) for weights in attentions]
    assert max_abs_diff(out.coverage_loss, torch.tensor(expected, dtype=torch.float64)) <= 1e-12
    assert min(expected) > 0


@pytest.mark.parametrize("causal", [True, False])
def test_evenly_spread_attention_has_none(causal):
    real = MASK.bool()
    ranks = (real.cumsum(-1) - 1).clamp(min=0)
    shares = coverage_target(real, ranks, causal=causal)
    assert max_abs_diff(shares.target.sum(-1), torch.ones(2)) <= 1e-12
    seen = real[:, None, :] & real[:, :, None]
    seen = seen.tril() if causal else seen
    weights = seen.double() / seen.sum(-1, keepdim=True).clamp(min=1)
    received = torch.einsum("bij,bi->bj", weights, shares.query_weights)
    assert max_abs_diff(received, shares.target) <= 1e-12
    assert coverage_loss(received, shares).abs() <= 1e-12


def test_what_nobody_sees_has_finite_gradients():
    received = torch.tensor([[0.0, 1.0]], requires_grad=True)
    shares = coverage_target(torch.ones(1, 2, dtype=torch.bool), torch.arange(2)[None])
    loss = coverage_loss(received, shares)
    assert loss.item() == pytest.approx(math.log(2))
    (grad,) = torch.autograd.grad(loss, received)
    assert grad.isfinite().all()
    assert grad[0, 0] < 0 < grad[0, 1]  # a token that receives nothing asks for more


def test_gradients_are_those_of_finite_differences():
    model = make(
        ReformerModel, hidden_size=4, attention_head_size=2, feed_forward_size=4, attn_layers=["local", "lsh"]
    ).train()
    embeds = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()

    def forward(embeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return model(inputs_embeds=embeds).coverage_loss

    torch.autograd.gradcheck(forward, embeds, eps=1e-5, atol=1e-5, rtol=1e-4, nondet_tol=1e-12)


# --- every path


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cls", [ReformerForCausalLM, ReformerForMaskedLM])
@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_every_path_has_the_same_gradients(mode, cls, alone):
    model = make(cls, mode).train()
    out, expected = step(model, alone=alone)
    plain, checkpointed = copy.deepcopy(model), copy.deepcopy(model)
    plain.config.reversible = False
    checkpointed.activation_checkpointing_enable()
    runs = [(plain, {}), (checkpointed, {}), (plain, {"output_attentions": True})]
    runs += [(plain, {"output_attentions": "sparse"}), (model, {"output_hidden_states": True})]
    for other, inputs in runs:
        found, grads = step(other, alone=alone, **inputs)
        assert_equal([found.coverage_loss, *grads], [out.coverage_loss, *expected])


@pytest.mark.parametrize("mode", MODES)
def test_the_kernel_agrees_with_the_definition(mode):
    found = make(mode=mode).train().float()
    expected = make(mode=mode, attention_backend="reference").train().float()
    (out, grads), (wanted, wanted_grads) = step(found), step(expected)
    assert_equal([out.coverage_loss, *grads], [wanted.coverage_loss, *wanted_grads], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("foreign", [False, True], ids=["whole stack", "layers"])
def test_one_graph(foreign):
    torch._dynamo.reset()
    model, eager = (make(attn_layers=["local", "lsh"]).train().float() for _ in range(2))
    if foreign:  # then layers are checkpointed one by one
        for each in (model, eager):
            each.model.layers[0].feed_forward.register_forward_hook(lambda module, args, output: 2 * output)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    out = compiled(input_ids=IDS, attention_mask=MASK, labels=LABELS)
    out.loss.backward()
    wanted, expected = step(eager)
    assert_equal([out.coverage_loss, *(p.grad for p in model.parameters())], [wanted.coverage_loss, *expected], 1e-5)
    torch._dynamo.reset()


def test_autocast():
    model = make().train().float()
    with torch.autocast("cpu", torch.bfloat16):
        out, found = step(model)
    wanted, _ = step(model)
    assert out.coverage_loss.dtype == torch.float32
    assert_equal([out.coverage_loss], [wanted.coverage_loss], 0.05)
    assert all(grad.isfinite().all() for grad in found)


# --- rows and samples


def test_rows_alone_have_the_mean():
    model = make(ReformerModel, **QUIET, lsh_exploration_orders=0)
    both = model(IDS, attention_mask=MASK).coverage_loss
    rows = [model(ids[real == 1][None]).coverage_loss for ids, real in zip(IDS, MASK, strict=True)]
    assert max_abs_diff(both, sum(rows) / 2) <= 1e-12


def test_a_row_of_padding_counts_nothing():
    model, mask = make(ReformerModel), MASK.clone()
    mask[1] = 0
    found = model(IDS, attention_mask=mask).coverage_loss
    assert max_abs_diff(found, model(IDS[:1], attention_mask=MASK[:1]).coverage_loss) <= 1e-12


@pytest.mark.parametrize("causal", [True, False])
def test_packed_samples_count_like_rows(causal):
    model = make(ReformerModel, is_decoder=causal)
    first, second = IDS[:1, :15], IDS[1:, :25]
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None]
    packed = model(torch.cat([first, second], dim=1), position_ids=positions).coverage_loss
    alone = [model(ids).coverage_loss for ids in (first, second)]
    assert max_abs_diff(packed, sum(alone) / 2) <= 1e-12


# --- heads and outputs

HEADS = {
    ReformerForCausalLM: {"labels": LABELS},
    ReformerForMaskedLM: {"labels": LABELS},
    ReformerForTokenClassification: {"labels": (IDS % 2).where(MASK == 1, -100)},
    ReformerForSequenceClassification: {"labels": torch.tensor([0, 1])},
    ReformerForQuestionAnswering: {"start_positions": torch.tensor([8, 1]), "end_positions": torch.tensor([9, 4])},
    ReformerForMultipleChoice: {"labels": torch.tensor([1])},
}


@pytest.mark.parametrize("cls", HEADS)
@pytest.mark.parametrize("training", [True, False])
def test_heads_add_it_to_their_loss(cls, training):
    model, inputs = make(cls, **QUIET).train(training), {"input_ids": IDS, "attention_mask": MASK}
    if cls is ReformerForMultipleChoice:
        inputs = {name: value[None] for name, value in inputs.items()}
    out = model(**inputs, **HEADS[cls])
    without = model(**inputs, **HEADS[cls], output_coverage=False)
    assert without.coverage_loss is None
    assert out.coverage_loss.shape == (4,)
    assert (out.loss - without.loss).item() == pytest.approx(0.3 * out.coverage_loss.sum().item(), rel=1e-6)
    unlabelled = model(**inputs)
    assert unlabelled.loss is None
    assert torch.equal(unlabelled.coverage_loss, out.coverage_loss)
    again = pickle.loads(pickle.dumps(unlabelled))
    assert torch.equal(again["coverage_loss"], out.coverage_loss)


def test_without_a_weight_nothing_is_computed_unless_asked_for():
    model = make(coverage_loss_weight=0.0, **QUIET)
    out = model(IDS, labels=LABELS)
    assert out.coverage_loss is None
    assert "coverage_loss" not in out
    told = model(IDS, labels=LABELS, output_coverage=True)
    assert told.coverage_loss.shape == (4,)
    assert torch.equal(told.loss, out.loss)


@pytest.mark.parametrize("cls", [ReformerForCausalLM, ReformerForMaskedLM, ReformerForTokenClassification])
def test_accumulated_batches_come_to_the_whole(cls):
    model = make(cls, **QUIET).train()
    labels = IDS % 2 if cls is ReformerForTokenClassification else IDS
    whole = model(IDS, labels=labels).loss
    number = labels[:, 1:].numel() if cls is ReformerForCausalLM else labels.numel()
    rows = [model(IDS[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=number).loss for i in range(2)]
    assert max_abs_diff(sum(rows), whole) <= 1e-10


def test_a_cache_and_coverage_exclude_each_other():
    model = make()
    assert model(IDS, use_cache=True).coverage_loss is None
    with pytest.raises(ValueError, match="needs all tokens of a sequence at once"):
        model(IDS, use_cache=True, output_coverage=True)
    assert model.generate(IDS[:, :8], max_new_tokens=3, pad_token_id=0).shape == (2, 11)


@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan])
def test_impossible_weights_are_refused(weight):
    with pytest.raises(Exception, match="coverage_loss_weight"):
        make(coverage_loss_weight=weight)


# --- it does what it is for


def test_training_on_it_alone_reaches_more_tokens():
    model = make(ReformerModel, attn_layers=["lsh", "lsh"], **QUIET, is_decoder=False).float().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model(IDS, attention_mask=MASK).coverage_loss.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_numbers_of_received_attention():
    received = torch.tensor([[0.5, 0.5, 0, 0], [0.25, 0.25, 0.25, 0.25], [0.98, 0.01, 0.01, 0]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    entropy = mass_entropy(received, mask)
    assert entropy[:2].tolist() == pytest.approx([1, 1])
    assert 0 < entropy[2] < 0.2
    assert covered_fraction(received, mask).tolist() == pytest.approx([1, 1, 1 / 3])
    assert covered_fraction(received[2]).tolist() == pytest.approx(1 / 4)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"input_ids": IDS[index % 2], "labels": IDS[index % 2]}


def test_the_trainer_trains_and_evaluates(tmp_path):
    arguments = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, eval_strategy="steps",
        eval_steps=1, logging_steps=1, disable_tqdm=True, save_strategy="no", per_device_eval_batch_size=3,
    )  # fmt: skip
    trainer = Trainer(make().float(), arguments, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    found = trainer.predict(Rows())
    assert found.predictions.shape == (4, LENGTH, 40)
    assert math.isfinite(found.metrics["test_loss"])


def test_the_callback_logs_how_far_attention_reaches(tmp_path):
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True)
    model = make(coverage_loss_weight=0.0).float()
    trainer = Trainer(model, arguments, eval_dataset=Rows())
    trainer.add_callback(CoverageCallback(trainer))
    trainer.evaluate()
    logs = trainer.state.log_history[-1]
    received = attention_mass_by_layer(model.eval(), IDS)
    for name, number in (("eval_received_entropy", mass_entropy), ("eval_reached_share", covered_fraction)):
        layers = number(received).mean(-1)
        assert logs[name] == pytest.approx(layers.mean().item(), rel=1e-5)
        assert [logs[f"{name}_layer_{i}"] for i in range(4)] == pytest.approx(layers.tolist(), rel=1e-5)
    with pytest.raises(ValueError, match="at least 1"):
        CoverageCallback(trainer, batches=0)


def test_the_callback_counts_packed_samples_and_leaves_out_empty_rows(tmp_path):
    model = make(coverage_loss_weight=0.0, is_decoder=True).float()
    callback = CoverageCallback(Trainer(model, TrainingArguments(tmp_path, report_to=[], use_cpu=True)))
    samples = IDS.view(-1, 8)

    def numbers(batch):
        return torch.stack(list(callback.layer_numbers(model, batch).values()))

    packed = {"input_ids": IDS, "position_ids": torch.arange(8).repeat(2, LENGTH // 8)}
    expected = numbers({"input_ids": samples})
    assert max_abs_diff(numbers(packed), expected) < 1e-5
    padded = {"input_ids": torch.cat([samples, samples[:1]]), "attention_mask": torch.ones(11, 8, dtype=torch.long)}
    padded["attention_mask"][10] = 0
    assert max_abs_diff(numbers(padded), expected) < 1e-5
    config = tiny_config(is_encoder_decoder=True)
    with pytest.raises(ValueError, match="encoder-decoder"):
        CoverageCallback(SimpleNamespace(model=SimpleNamespace(config=config)))


def test_what_layers_receive_is_what_their_weights_say():
    model = make(coverage_loss_weight=0.0)
    received = attention_mass_by_layer(model, IDS, attention_mask=MASK)
    attentions = model(IDS, attention_mask=MASK, output_attentions="sparse").attentions
    expected = torch.stack([attention_mass(x, MASK).mean(1) for x in attentions])
    assert max_abs_diff(received, expected) <= 1e-12
    with pytest.raises(ValueError, match="holds no ReformerModel"):
        attention_mass_by_layer(torch.nn.Linear(1, 1), IDS)


@pytest.mark.parametrize("causal", [True, False])
def test_a_picture_shows_the_target(causal):
    matplotlib.use("Agg")
    attention = make(ReformerModel, is_decoder=causal)(IDS, attention_mask=MASK, output_attentions=True).attentions[0]
    axes = plot_attention_mass(attention, row=1, mask=MASK, causal=causal)
    target = axes.lines[-1].get_ydata()
    assert target.sum() == pytest.approx(1)
    assert (target[25:29] == 0).all()
    assert (target[0] > 2 * target[-1]) == causal
    plt.close(axes.figure)


# --- the experiment


def test_the_experiment_runs_on_both_tasks(tmp_path, capsys):
    main = runpy.run_path(str(Path(__file__).parents[2] / "experiments" / "coverage.py"))["main"]
    small = ["--seeds", "2", "--steps", "2", "--rows", "2", "--length", "32", "--window", "8", "--weights", "0", "1"]
    main([*small, "--bidirectional", "--picture", str(tmp_path / "received.png")])
    texts = tmp_path / "texts.csv"
    texts.write_text("text,label\n" + "".join(f"{'long ' * number},{number % 2}\n" for number in range(1, 8)))
    main([*small, "--train_file", str(texts), "--validation_file", str(texts)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * (4 + 2)
    assert all("tokens reached" in line for line in lines)
    assert (tmp_path / "received.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        main(["--marked", "4"])
