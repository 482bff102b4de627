"""Runs of transformers' Trainer that must agree: accumulated, smoothed, resumed, checkpointed, compiled."""

import os
from unittest import mock

import pytest
import torch
from conftest import REPEATABLE, SMALL_WINDOWS, make_ids, make_model, max_abs_diff, needs_fullgraph
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from hf_reformer import (
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
)

COUNTING = [ReformerForCausalLM, ReformerForMaskedLM, ReformerForTokenClassification]  # a target for every token
HEADS = [*COUNTING, ReformerForSequenceClassification, ReformerForQuestionAnswering, ReformerForMultipleChoice]
LABELLED = [cls for cls in HEADS if cls is not ReformerForQuestionAnswering]
FAST = [ReformerForCausalLM, ReformerForSequenceClassification]  # one that counts targets, and one that does not
two_heads = pytest.mark.parametrize("cls", FAST, ids=lambda cls: cls.__name__)
heads = pytest.mark.parametrize(
    "cls",
    [pytest.param(cls, marks=() if cls in FAST else pytest.mark.slow) for cls in HEADS],
    ids=lambda cls: cls.__name__,
)
RANDOM = {
    "hidden_dropout_prob": 0.2,
    "lsh_attention_probs_dropout_prob": 0.1,
    "local_attention_probs_dropout_prob": 0.1,
    "resample_rotations": True,
}


@pytest.fixture(autouse=True)
def _environment_as_before():
    """Some arguments of the Trainer are handed on in environment variables."""
    with mock.patch.dict(os.environ):
        yield


def make_row(cls, index: int) -> dict:
    """Rows of 4 to 21 tokens; the share of them that are targets differs too."""
    length = 4 + index * 7 % 18
    ids = make_ids(length, seed=index)
    if cls in COUNTING:
        labels = ids % 3 if cls is ReformerForTokenClassification else ids
        targets = (make_ids(length, seed=index + 100) % (2 + index % 3) != 0) | (torch.arange(length) < 2)
        return {"input_ids": ids.tolist(), "labels": torch.where(targets, labels, -100).tolist()}
    if cls is ReformerForQuestionAnswering:
        return {"input_ids": ids.tolist(), "start_positions": index % 3, "end_positions": length - 1}
    if cls is ReformerForMultipleChoice:
        return {"input_ids": [ids.tolist(), ids[:3].tolist(), ids.flip(0).tolist()], "labels": index % 3}
    return {"input_ids": ids.tolist(), "labels": index % 3}


def make_rows(cls, count: int = 16) -> Dataset:
    return Dataset.from_list([make_row(cls, index) for index in range(count)])


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    ids = [row["input_ids"] for row in rows]
    several = isinstance(ids[0][0], list)
    batch = {"input_ids": pad([choice for choices in ids for choice in choices] if several else ids, 0)}
    if several:
        batch["input_ids"] = batch["input_ids"].unflatten(0, (len(rows), -1))
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    for name in rows[0].keys() - {"input_ids"}:
        values = [row[name] for row in rows]
        batch[name] = pad(values, -100) if isinstance(values[0], list) else torch.tensor(values)
    return batch


def make_head(cls, **overrides):
    return make_model(cls, **{**SMALL_WINDOWS, "num_labels": 3, "dtype": torch.float32, **overrides})


def make_trainer(model, folder, rows=None, **arguments) -> Trainer:
    defaults = {
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    rows = make_rows(type(model)) if rows is None else rows
    arguments = TrainingArguments(str(folder), **{**defaults, **arguments})
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate)


def train(model, folder, rows=None, resume=None, **arguments) -> Trainer:
    trainer = make_trainer(model, folder, rows, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Trainer, name: str = "loss") -> list[float]:
    values = [entry[name] for entry in trainer.state.log_history if name in entry]
    assert values
    return values


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach() for p in trainer.model.parameters()]


def assert_same_training(a: Trainer, b: Trainer, tolerance: float = 1e-5) -> None:
    """Losses, gradient norms and weights, to rounding."""
    for name in ("loss", "grad_norm"):
        assert logged(a, name) == pytest.approx(logged(b, name), rel=tolerance)
    for x, y in zip(weights(a), weights(b), strict=True):
        assert max_abs_diff(x, y) <= tolerance


def assert_equal_weights(a: Trainer, b: Trainer) -> None:
    assert all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


PLAIN_STEPS = {"optim": "sgd", "max_grad_norm": 1e9, "train_sampling_strategy": "sequential", "num_train_epochs": 1}


# --- accumulation


@heads
def test_one_batch_of_eight_trains_as_eight_batches_of_one(cls, tmp_path):
    whole, parts = (
        train(
            make_head(cls, **REPEATABLE),
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            **PLAIN_STEPS,
        )
        for size in (8, 1)
    )
    assert len(logged(whole)) == len(logged(parts)) == 2
    assert_same_training(whole, parts)
    assert max(max_abs_diff(p, q) for p, q in zip(weights(whole), make_head(cls).parameters(), strict=True)) > 1e-3


@pytest.mark.parametrize("cls", COUNTING, ids=lambda cls: cls.__name__)
def test_the_loss_of_a_step_is_the_mean_over_all_its_targets(cls, tmp_path):
    model, rows = make_head(cls, **REPEATABLE, lsh_exploration_orders=0), make_rows(cls, 8)
    batch = collate([rows[index] for index in range(8)])
    with torch.no_grad():
        expected = model(**batch).loss.item()
    trainer = train(
        model, tmp_path, rows, per_device_train_batch_size=1, gradient_accumulation_steps=8, max_steps=1, **PLAIN_STEPS
    )
    assert logged(trainer) == pytest.approx([expected], rel=1e-5)


# --- label smoothing


@pytest.mark.parametrize(
    ("cls", "parts"),
    [
        pytest.param(ReformerForCausalLM, 1, marks=pytest.mark.slow),
        *(pytest.param(cls, 2, marks=() if cls is ReformerForCausalLM else pytest.mark.slow) for cls in LABELLED),
    ],
)
def test_vanishing_label_smoothing_is_none(cls, parts, tmp_path):
    smoothed, plain = (
        train(
            make_head(cls, **RANDOM),
            tmp_path,
            per_device_train_batch_size=4 // parts,
            gradient_accumulation_steps=parts,
            label_smoothing_factor=epsilon,
            **PLAIN_STEPS,
        )
        for epsilon in (1e-9, 0.0)
    )
    assert_same_training(smoothed, plain)


# --- resuming


def assert_resuming_changes_nothing(cls, folder, rows, **arguments) -> None:
    """Eight steps of two rows, five to an epoch, cut after the third and after the sixth."""
    common = {"per_device_train_batch_size": 2, "max_steps": 8, "save_strategy": "steps", "save_steps": 3, **arguments}
    through = train(make_head(cls, **RANDOM), folder, rows, **common)
    for step in (3, 6):
        torch.manual_seed(step)
        fresh = make_head(cls, seed=step, **RANDOM)
        resumed = train(fresh, folder / "resumed", rows, resume=str(folder / f"checkpoint-{step}"), **common)
        assert resumed.state.global_step == 8
        assert_equal_weights(resumed, through)
        assert logged(resumed)[step:] == logged(through)[step:]


@heads
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(cls, tmp_path):
    assert_resuming_changes_nothing(cls, tmp_path, make_rows(cls, 10))


@two_heads
def test_a_resumed_run_over_a_stream_ends_where_the_uninterrupted_one_does(cls, tmp_path):
    assert_resuming_changes_nothing(cls, tmp_path, make_rows(cls, 10).to_iterable_dataset().repeat(2))


def test_a_resumed_run_with_accumulation_ends_where_the_uninterrupted_one_does(tmp_path):
    cls = ReformerForCausalLM
    assert_resuming_changes_nothing(cls, tmp_path, make_rows(cls, 20), gradient_accumulation_steps=2)


def test_resampling_and_dropout_are_felt(tmp_path):
    """Else the tests of resuming would show little."""
    for fields in ({**RANDOM, **REPEATABLE}, {**RANDOM, "resample_rotations": False}):
        a, b = (train(make_head(ReformerForCausalLM, **f), tmp_path, max_steps=2) for f in (RANDOM, fields))
        assert logged(a) != logged(b)


# --- the same run again


@pytest.fixture
def _nondeterminism_afterwards():
    """Full determinism is a setting of the whole process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_nondeterminism_afterwards")
@pytest.mark.parametrize(
    ("cls", "backend"),
    [
        (ReformerForCausalLM, "auto"),
        pytest.param(ReformerForSequenceClassification, "torch", marks=pytest.mark.slow),
        *(pytest.param(cls, "auto", marks=pytest.mark.slow) for cls in HEADS if cls is not ReformerForCausalLM),
    ],
)
def test_full_determinism(cls, backend, tmp_path):
    runs = [
        train(
            make_head(cls, attention_backend=backend, **RANDOM),
            tmp_path,
            max_steps=2,
            seed=seed,
            full_determinism=True,
        )
        for seed in (1, 1, 2)
    ]
    assert torch.are_deterministic_algorithms_enabled()
    assert_equal_weights(*runs[:2])
    assert logged(runs[0]) == logged(runs[1]) != logged(runs[2])


@heads
def test_evaluating_again_gives_the_same_number(cls, tmp_path):
    trainer = make_trainer(make_head(cls, **RANDOM), tmp_path, max_steps=2)
    first = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == first
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after != first
    assert trainer.evaluate()["eval_loss"] == after


# --- batches


@heads
def test_batches_of_like_lengths(cls, tmp_path):
    rows, widths = make_rows(cls, 64), []
    trainer = make_trainer(
        make_head(cls), tmp_path, rows, train_sampling_strategy="group_by_length", num_train_epochs=1
    )
    trainer.model.register_forward_pre_hook(
        lambda module, args, inputs: widths.append(inputs["input_ids"].shape[-1]), with_kwargs=True
    )
    trainer.train()
    assert len(logged(trainer)) == len(widths) == 16
    assert all(torch.tensor(logged(trainer)).isfinite())
    if cls is not ReformerForMultipleChoice:  # there the sampler takes the number of choices for the length
        assert sum(widths) < 16 * 15
        assert max(widths) == 21


@pytest.mark.parametrize("reversible", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_batch_that_does_not_fit_leaves_no_trace(reversible, tmp_path):
    """Memory runs out in backward if the layers are reversible, else in forward."""

    def run(size, limit):
        model = make_head(ReformerForCausalLM, reversible=reversible, **REPEATABLE)

        def use_up_memory(module, args):
            if args[0].shape[0] > limit and torch.is_grad_enabled():
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

        model.model.layers[0].attention.v_proj.register_forward_pre_hook(use_up_memory)
        arguments = {**PLAIN_STEPS, "per_device_train_batch_size": size, "auto_find_batch_size": size > limit}
        return train(model, tmp_path, **arguments)

    reduced, smaller = run(5, limit=4), run(4, limit=4)
    assert reduced.state.train_batch_size == 4
    assert_equal_weights(reduced, smaller)


# --- other ways through the layers


@heads
def test_gradient_checkpointing_trains_alike(cls, tmp_path):
    plain = train(make_head(cls, **RANDOM), tmp_path, optim="sgd", max_steps=3)
    for reentrant in (True, False):
        checkpointed = train(
            make_head(cls, **RANDOM),
            tmp_path,
            optim="sgd",
            max_steps=3,
            activation_checkpointing=True,
            activation_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        assert checkpointed.model.model.gradient_checkpointing
        assert logged(plain)[0] == logged(checkpointed)[0]
        assert_same_training(plain, checkpointed)


# --- compiled


@pytest.fixture
def _compiled_anew():
    """Nothing known of earlier tests, nothing kept for later ones, and the generator of eager mode."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._inductor.config.patch(fallback_random=True):
        yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_compiled_anew")
@pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__)
@needs_fullgraph
def test_dynamo_sees_a_training_step_as_one_graph(cls):
    model = make_head(cls, **RANDOM).train()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    rows = make_rows(cls, 6)
    for some in (rows.select(range(4)), rows.select(range(4, 6))):
        torch.manual_seed(0)
        expected = model(**collate(list(some))).loss
        torch.manual_seed(0)
        assert max_abs_diff(whole(**collate(list(some))).loss, expected) <= 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("_compiled_anew")
@pytest.mark.parametrize(
    ("cls", "backend", "fields"),
    [
        (ReformerForCausalLM, "aot_eager", RANDOM),
        (ReformerForSequenceClassification, "aot_eager", RANDOM),
        (ReformerForCausalLM, "inductor", REPEATABLE),
        (ReformerForSequenceClassification, "inductor", RANDOM),
    ],
    ids=["language model, aot_eager", "classifier, aot_eager", "language model, inductor", "classifier, inductor"],
)
def test_compiled_training_is_close_to_eager(cls, backend, fields, tmp_path):
    """Batches differ in length, so shapes are compiled once as given and once for all."""
    common = {"optim": "sgd", "max_steps": 4, "train_sampling_strategy": "sequential"}
    eager = train(make_head(cls, **fields), tmp_path, **common)
    compiled = train(make_head(cls, **fields), tmp_path, **common, torch_compile=True, torch_compile_backend=backend)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_same_training(eager, compiled, tolerance=1e-4)
    evaluated = compiled.evaluate()["eval_loss"]
    assert evaluated == pytest.approx(eager.evaluate()["eval_loss"], rel=1e-4)
