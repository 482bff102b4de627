"""Evaluations log what hashing finds, and warn of buckets that stay uneven."""

import pytest
import torch
from conftest import SMALL_WINDOWS, make_ids, make_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from hf_reformer import ReformerForCausalLM, ReformerForConditionalGeneration, ReformerForSequenceClassification
from hf_reformer.analysis import attention_found
from hf_reformer.training.coverage_callback import CoverageCallback
from hf_reformer.training.found_callback import AttentionFoundCallback
from hf_reformer.training.trainers import build_trainer

IDS = make_ids(6, 50)


class Rows(Dataset):
    def __len__(self):
        return len(IDS)

    def __getitem__(self, index):
        return {"input_ids": IDS[index], "labels": IDS[index]}


def make(cls=ReformerForCausalLM, **overrides):
    overrides = {**SMALL_WINDOWS, "attn_layers": ["local", "lsh", "lsh"], "dtype": torch.float32, **overrides}
    return make_model(cls, **{"is_decoder": cls is ReformerForCausalLM, **overrides})


def make_trainer(model, folder, callback=True, **arguments):
    defaults = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 6,
        "max_steps": 2,
        "save_strategy": "no",
    }
    defaults |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    trainer = Trainer(model, TrainingArguments(folder, **{**defaults, **arguments}), None, Rows(), Rows())
    if callback:
        trainer.add_callback(AttentionFoundCallback(trainer))
    return trainer


def test_logs_are_what_the_analysis_finds(tmp_path):
    trainer = make_trainer(make(), tmp_path)
    trainer.model.train()
    trainer.evaluate()
    logs = trainer.state.log_history[-1]
    found = attention_found(trainer.model.eval(), {"input_ids": IDS[:4]}, queries=64)
    assert [x.layer for x in found] == [1, 2]
    fields = {"attention_found": "found", "bucket_entropy": "bucket_entropy", "fullest_bucket": "fullest_bucket"}
    for name, field in fields.items():
        expected = [getattr(x, field).mean().item() for x in found]
        assert [logs[f"eval_{name}_layer_{x.layer}"] for x in found] == pytest.approx(expected, rel=1e-4)
        assert logs[f"eval_{name}"] == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_pairs_are_looked_at_with_their_token_types(tmp_path):
    model = make(ReformerForSequenceClassification, type_vocab_size=2)
    torch.nn.init.normal_(model.model.token_type_embeddings.weight[1], std=3)
    types = (torch.arange(50) >= 20).long()
    rows = [{"input_ids": ids, "token_type_ids": types, "labels": 1} for ids in IDS]
    trainer = make_trainer(model, tmp_path)
    trainer.eval_dataset = rows
    trainer.evaluate()
    batch = {"input_ids": IDS[:4], "token_type_ids": types.expand(4, -1)}
    found, without = (attention_found(model, x, queries=64) for x in (batch, {"input_ids": IDS[:4]}))
    logged = [trainer.state.log_history[-1][f"eval_bucket_entropy_layer_{x.layer}"] for x in found]
    assert logged == pytest.approx([x.bucket_entropy.mean().item() for x in found], rel=1e-4)
    assert logged != pytest.approx([x.bucket_entropy.mean().item() for x in without], rel=1e-2)


def test_several_evaluation_sets_are_told_apart(tmp_path):
    trainer = make_trainer(make(), tmp_path)
    trainer.evaluate({"near": Rows(), "far": Rows()})
    logged = {name for logs in trainer.state.log_history for name in logs if "bucket_entropy" in name}
    layers = ("", "_layer_1", "_layer_2")
    assert logged == {f"eval_{data}_bucket_entropy{layer}" for data in ("near", "far") for layer in layers}


def test_training_is_the_same_with_and_without_it(tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    weights = []
    for callback in (False, True):
        trainer = make_trainer(make(), tmp_path, callback, **arguments)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*weights)


def test_a_layer_whose_buckets_stay_uneven_is_warned_of_once(tmp_path, caplog):
    callback = AttentionFoundCallback(make_trainer(make(), tmp_path))
    uneven, even = {1: [0.9, 0.3, 4.0], 2: [0.9, 0.8, 1.5]}, {1: [0.9, 0.8, 1.5], 2: [0.9, 0.8, 1.5]}

    def warned(*evaluations):
        caplog.clear()
        for step, layers in evaluations:
            callback.judge(layers, step)
        return caplog.messages

    assert not warned((0, uneven), (0, uneven))  # two sets of data
    assert not warned((10, even), (20, uneven))
    (message,) = warned((30, uneven), (40, uneven))
    assert message.startswith("Layer 1 ")
    assert not warned((50, even), (60, uneven), (70, uneven))


def test_encoders_and_decoders_are_looked_at(tmp_path):
    trainer = make_trainer(make(ReformerForConditionalGeneration, is_encoder_decoder=True), tmp_path)
    trainer.evaluate()
    logs = trainer.state.log_history[-1]
    assert {f"eval_attention_found_layer_{i}" for i in (1, 2, 4, 5)} < set(logs)
    callback = AttentionFoundCallback(trainer)
    labels = IDS[:2].clone()
    expected = callback.layer_numbers(trainer.model, {"input_ids": IDS[:2], "labels": labels})
    padding = torch.full((2, 9), -100)
    found = callback.layer_numbers(
        trainer.model, {"input_ids": IDS[:2], "labels": torch.cat([labels, padding], dim=1)}
    )
    for layer in (4, 5):
        assert found[layer].tolist() == pytest.approx(expected[layer].tolist(), rel=1e-3)


def test_it_works_beside_the_coverage_callback_compiled_and_in_half_precision(tmp_path):
    trainer = make_trainer(make(), tmp_path, bf16=True, torch_compile=True, torch_compile_backend="eager")
    trainer.add_callback(CoverageCallback(trainer))
    trainer.train()
    trainer.evaluate()
    logs = {name: x for entry in trainer.state.log_history for name, x in entry.items()}
    assert 0 < logs["eval_attention_found"] <= 1
    assert 0 < logs["eval_received_entropy"] <= 1


def test_recipes_use_it_where_the_model_hashes(tmp_path):
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    for layers, expected in ((["local", "lsh"], True), (["local", "full"], False)):
        trainer = build_trainer(Trainer, make(attn_layers=layers), arguments, None, {"train": Rows()})
        callbacks = [type(callback) for callback in trainer.callback_handler.callbacks]
        assert (AttentionFoundCallback in callbacks) == expected
    with pytest.raises(ValueError, match="the model has none"):
        AttentionFoundCallback(trainer)
    with pytest.raises(ValueError, match="at least 1"):
        AttentionFoundCallback(make_trainer(make(), tmp_path), batches=0)
