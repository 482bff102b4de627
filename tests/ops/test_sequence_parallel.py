"""A sequence shared by several processes gives what one process gives: outputs, losses, gradients; in less memory."""

import copy
from functools import cache
from io import BytesIO

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL_WINDOWS, make_ids, make_model, max_abs_diff
from memory_census import Census
from processes import run_in_processes
from transformers import TrainingArguments

from hf_reformer import (
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
    ReformerModel,
)
from hf_reformer.training.distributed import RepeatedBatches, SequenceParallelTrainer

LENGTH = 67  # no multiple of anything
IDS = make_ids(2, LENGTH)
RIGHT = torch.arange(LENGTH) < torch.tensor([[LENGTH], [41]])  # the second row is padded on the right
LEFT = RIGHT.flip(-1)
PACKED = torch.cat([torch.arange(20), torch.arange(30), torch.arange(LENGTH - 50)])[None].expand(2, -1)
CLASSES = torch.tensor([2, 0])
SIZES = {"num_attention_heads": 4, "classifier_dropout": 0.0, "num_labels": 3, **SMALL_WINDOWS}
DROPOUT = {
    "hidden_dropout_prob": 0.1,
    "lsh_attention_probs_dropout_prob": 0.2,
    "local_attention_probs_dropout_prob": 0.2,
}
CHUNKS = {"attention_mode": "chunk", "lsh_attn_chunk_length": 16, "local_attn_chunk_length": 16}
ENDS = {"start_positions": CLASSES, "end_positions": CLASSES + 50}
PADDED, BEFORE = {"attention_mask": RIGHT.long()}, {"attention_mask": LEFT.long()}

# name: class, config, inputs
CASES = {
    "causal language model": (ReformerForCausalLM, DROPOUT, {"labels": IDS}),
    "padded on the left": (ReformerForCausalLM, DROPOUT, {"labels": IDS.where(LEFT, -100), **BEFORE}),
    "packed samples": (ReformerForCausalLM, DROPOUT, {"labels": IDS, "position_ids": PACKED}),
    "axial positions": (ReformerForCausalLM, {"position_embedding_type": "axial"}, {"labels": IDS}),
    "rotary in lsh layers": (ReformerForCausalLM, {"lsh_rotary": 1.0}, {"labels": IDS}),
    "rotary in a head of lsh layers": (ReformerForCausalLM, {"lsh_rotary": 0.1}, {"labels": IDS}),
    "chunks": (ReformerForCausalLM, {**CHUNKS, **DROPOUT}, {"labels": IDS}),
    "a full layer": (ReformerForCausalLM, {"attn_layers": ["full", "lsh"], **DROPOUT}, {"labels": IDS}),
    "plain path": (ReformerForCausalLM, {"reversible": False, **DROPOUT}, {"labels": IDS}),
    "coverage": (ReformerForCausalLM, {"coverage_loss_weight": 0.5, **DROPOUT}, {"labels": IDS, **PADDED}),
    "coverage, one direction free": (ReformerForMaskedLM, {"coverage_loss_weight": 0.5}, {"labels": IDS}),
    "masked language model": (ReformerForMaskedLM, DROPOUT, {"labels": IDS.where(IDS > 20, -100)}),
    "mean pooling": (ReformerForSequenceClassification, DROPOUT, {"labels": CLASSES, **PADDED}),
    "last token": (ReformerForSequenceClassification, {"is_decoder": True}, {"labels": CLASSES, **PADDED}),
    "first token": (ReformerForSequenceClassification, {"classifier_pooling": "first"}, {"labels": CLASSES, **BEFORE}),
    "token classification": (ReformerForTokenClassification, DROPOUT, {"labels": IDS % 3}),
    "question answering": (ReformerForQuestionAnswering, DROPOUT, ENDS),
}


def outcome(name: str, group=None) -> dict[str, torch.Tensor]:
    """Loss and gradients of a training step, and every output of an evaluation."""
    cls, config, inputs = CASES[name]
    model = make_model(cls, **SIZES, **config)
    model.enable_sequence_parallel(group)
    step = model.train() if group is None else torch.nn.parallel.DistributedDataParallel(model.train())
    torch.manual_seed(5 if group is None else 5 + dist.get_rank())  # the first process's draws count
    loss = step(IDS, **inputs).loss
    loss.backward()
    found = {"loss": loss.detach()} | {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
    with torch.no_grad():
        evaluated = model.eval()(IDS, **inputs)
        found |= {f"evaluated {key}": value for key, value in evaluated.items()}
        if "logits_to_keep" in cls.forward.__code__.co_varnames:
            inputs = {key: value for key, value in inputs.items() if key != "labels"}
            found["last logits"] = model(IDS, logits_to_keep=3, **inputs).logits
            half = model(IDS[:, :34], logits_to_keep=17, labels=IDS[:, :34])  # as many as a process of two has tokens
            found |= {"half the logits": half.logits, "loss beside half the logits": half.loss}
            found["chosen logits"] = model(IDS, logits_to_keep=torch.tensor([0, 40]), **inputs).logits
    return found


def outcomes_in_a_group() -> dict[str, dict[str, torch.Tensor]]:
    return {name: outcome(name, dist.group.WORLD) for name in CASES}


@cache
def outcomes_of(size: int) -> list[dict[str, dict[str, torch.Tensor]]]:
    return run_in_processes(outcomes_in_a_group, size)


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow)])
def shared(request):
    return outcomes_of(request.param)


@pytest.mark.multi_process
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_those_of_one_process(name, shared):
    expected = outcome(name)
    for found in shared:
        assert found[name].keys() == expected.keys()
        for key, value in expected.items():
            assert max_abs_diff(found[name][key], value) <= 1e-10, key
    assert expected["loss"] > 0


def peaks_and_states(length: int, seed: int) -> tuple[int, torch.Tensor]:
    """Bytes of a training step's activations at their peak; and an evaluation's hidden states of own tokens."""
    model = make_model(ReformerForCausalLM, num_attention_heads=4, attention_head_size=16, hidden_size=64,
                       max_position_embeddings=length, num_buckets=32, dtype=torch.float32)  # fmt: skip
    model.enable_sequence_parallel(dist.group.WORLD)
    ids = make_ids(1, length, seed=seed)
    with Census(*model.parameters()) as census:
        model.train()(ids, labels=ids).loss.backward()
    with torch.no_grad():
        return census.peak, model.eval().model(ids).last_hidden_state


@pytest.mark.slow
@pytest.mark.multi_process
def test_memory_falls_with_the_number_of_processes():
    peaks = {}
    for size in (1, 2, 4):
        found = run_in_processes(peaks_and_states, size, 4099, 0)
        peaks[size] = max(peak for peak, _ in found)
        states = torch.cat([states for _, states in found], dim=1)
        if size == 1:
            whole = states
        assert max_abs_diff(states, whole) <= 1e-4
    assert peaks[2] <= 0.6 * peaks[1]
    assert peaks[4] <= 0.36 * peaks[1]


# what the processes' inputs differ in: what each of the two is given
DIFFERING = {
    "labels": ({"labels": IDS}, {"labels": IDS.flip(0)}),
    "input_ids": ({}, {"input_ids": IDS + 100}),
    "attention_mask": ({"attention_mask": RIGHT}, {"attention_mask": 2 * RIGHT}),
    "num_hashes": ({"num_hashes": 1}, {"num_hashes": 0}),
    "logits_to_keep": ({"logits_to_keep": 3}, {}),
    "train() or eval()": ({"training": True}, {"training": False}),
    "no_grad()": ({"grad": True}, {"grad": False}),
}


def refusals() -> list[str]:
    model = make_model(ReformerModel)
    model.enable_sequence_parallel(dist.group.WORLD)
    with pytest.raises(ValueError, match="were given different inputs"):
        model(make_ids(1, 50, seed=dist.get_rank()))
    with pytest.raises(ValueError, match="were given different inputs"):
        model(make_ids(2, 50).roll(dist.get_rank(), dims=0))  # the same rows in another order
    with pytest.raises(ValueError, match="were given different inputs"):
        model(make_ids(1, 50), torch.ones(1, 50) if dist.get_rank() else None)
    with pytest.raises(ValueError, match="were given different inputs"):
        model(make_ids(1, 50).reshape(1 + dist.get_rank(), -1))  # the same numbers in another shape
    for what, differing in DIFFERING.items():
        head = make_model(ReformerForCausalLM)
        head.enable_sequence_parallel(dist.group.WORLD)
        inputs = {"input_ids": IDS, **differing[dist.get_rank()]}
        head.train(inputs.pop("training", False))
        with torch.set_grad_enabled(inputs.pop("grad", True)), pytest.raises(ValueError) as error:
            head(**inputs)
        assert f"were given different inputs: `{what}`. " in str(error.value)
    bad = IDS.clone()
    bad[0, 2] = 99  # in the share of one process alone: the other does not wait for it
    with pytest.raises(ValueError, match="labels reach from 0 to 99"):
        head.train()(IDS, labels=bad)
    strangers = [dist.new_group([rank]) for rank in range(2)][1 - dist.get_rank()]
    mesh = dist.init_device_mesh("cpu", (2,))
    for group, message in ((strangers, "not a member of the given"), (mesh, "but got DeviceMesh"), (2, "but got int")):
        with pytest.raises(ValueError, match=message):
            model.enable_sequence_parallel(group)
    three_heads = make_model(ReformerModel, num_attention_heads=3)
    three_heads.enable_sequence_parallel(dist.group.WORLD)
    messages = []
    for refusing, length in ((model, 1), (three_heads, 50)):
        with pytest.raises(ValueError) as error:
            refusing(make_ids(1, length))
        messages.append(str(error.value))
    return messages


@pytest.mark.slow
@pytest.mark.multi_process
def test_what_cannot_be_shared_is_refused():
    for few_tokens, three_heads in run_in_processes(refusals, 2):
        assert "1 tokens, fewer than the 2 processes" in few_tokens
        assert "3 attention heads cannot be shared evenly among 2 processes" in three_heads


@pytest.fixture
def group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_copies_share_nothing(group_of_one):
    model = make_model(ReformerForCausalLM, **SIZES)
    model.enable_sequence_parallel(group_of_one)
    file = BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert copied.model.sequence_group is None
        assert torch.equal(copied(IDS).logits, model(IDS).logits)
    assert model.model.sequence_group is group_of_one


# --- with the Trainer


def test_batches_are_repeated_whole():
    sampler = RepeatedBatches(range(5), batch_size=2, times=2)
    assert list(sampler) == [0, 1, 0, 1, 2, 3, 2, 3, 4, 0, 4, 0]
    assert len(sampler) == 12


def trained(folder: str, sequence_parallel_size: int) -> dict[str, torch.Tensor]:
    """Weights after an epoch of 4 steps on 8 rows, and the loss of an evaluation."""

    def model_init():
        return make_model(ReformerForCausalLM, dtype=torch.float32, **SIZES, **DROPOUT)

    rows = [{"input_ids": ids, "labels": ids} for ids in make_ids(8, 40)]
    arguments = TrainingArguments(
        folder, use_cpu=True, per_device_train_batch_size=2, per_device_eval_batch_size=3, num_train_epochs=1,
        learning_rate=1e-2, save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no", seed=3,
    )  # fmt: skip
    trainer = SequenceParallelTrainer(
        None, arguments, model_init=model_init, train_dataset=rows, eval_dataset=rows[:5],
        sequence_parallel_size=sequence_parallel_size,
    )  # fmt: skip
    trainer.train()
    assert (trainer.model.model.sequence_group is None) == (sequence_parallel_size == 1)
    assert trainer.state.global_step == 4
    found = {name: p.detach() for name, p in trainer.model.named_parameters()}
    found["loss"] = torch.tensor(trainer.evaluate()["eval_loss"])
    found["predictions"] = torch.tensor(trainer.predict(rows[:5]).predictions)
    return found


@pytest.mark.slow
@pytest.mark.multi_process
def test_the_trainer_trains_as_in_one_process(tmp_path):
    expected = trained(str(tmp_path), 1)
    for found in run_in_processes(trained, 2, str(tmp_path), 2):
        for name, value in expected.items():
            assert max_abs_diff(found[name], value) <= 1e-4, name


def test_groups_must_divide_the_processes(tmp_path):
    with pytest.raises(ValueError, match="sequence_parallel_size=2 does not divide the 1 processes"):
        trained(str(tmp_path), 2)
