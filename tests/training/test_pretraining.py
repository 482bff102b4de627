"""Pre-training by masked tokens before a task: what the task starts from, and runs that are killed in between."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments

from hf_reformer.recipes import classification as recipe
from hf_reformer.training.model_setup import ModelArguments
from hf_reformer.training.pretraining import PretrainingArguments

pytest.importorskip("evaluate")
pytestmark = pytest.mark.usefixtures("undrawn")

TINY = [
    *("--tokenizer", "bytes", "--hidden_size", "16", "--attn_layers", "local", "--num_attention_heads", "1"),
    *("--attention_head_size", "16", "--feed_forward_size", "16", "--use_cpu", "--disable_tqdm", "True"),
    *("--config_overrides", "local_window=8,hidden_dropout_prob=0.1", "--max_steps", "4", "--do_train"),
    *("--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "9", "--pretrain_length", "16"),
]


@pytest.fixture
def run(tmp_path):
    rows = [{"text": "".join(random.Random(i).choices("abc ", k=30)), "label": "xy"[i % 2]} for i in range(24)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(out: str, *more: str) -> dict[str, torch.Tensor]:
        recipe.main([*TINY, "--train_file", str(tmp_path / "train.jsonl"), "--output_dir", str(tmp_path / out), *more])
        return load_file(tmp_path / out / "model.safetensors")

    return run


def test_the_task_starts_from_the_pre_trained_encoder(run, tmp_path):
    task = run("out", "--pretrain_steps", "2", "--learning_rate", "0")
    pretrained = load_file(tmp_path / "out" / "_pretrained" / "model.safetensors")
    shared = [name for name in task if name.startswith("model.")]
    assert len(shared) > 5
    assert all(torch.equal(task[name], pretrained[name]) for name in shared)
    assert (tmp_path / "out" / "_pretrained" / "checkpoint-2").is_dir()
    other = run("longer", "--pretrain_steps", "3", "--learning_rate", "0")
    assert not all(torch.equal(task[name], other[name]) for name in shared)


def test_a_killed_run_ends_where_the_whole_one_does(run, tmp_path):
    """While pre-training, in between, and in the task."""
    options = ["--pretrain_steps", "4", "--lr_scheduler_type", "constant"]  # a step too many would be seen
    whole = run("out", *options)
    for done in (["_pretrained/checkpoint-2"], ["_pretrained/checkpoint-4"], ["_pretrained", "checkpoint-2"]):
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        for name in done:
            shutil.copytree(tmp_path / "out" / name, tmp_path / "killed" / name)
        resumed = run("killed", *options, "--resume_from_checkpoint", "last")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), done


def test_a_checkpoint_of_pre_training_needs_its_steps(tmp_path):
    args = TrainingArguments(str(tmp_path), do_train=True, use_cpu=True)
    args.resume_from_checkpoint = str(tmp_path / "_pretrained" / "checkpoint-2")
    with pytest.raises(ValueError, match=r"checkpoint of pre-training.*--pretrain_steps as before"):
        PretrainingArguments(train_file="x.csv").check(ModelArguments(), args)
    PretrainingArguments(train_file="x.csv", pretrain_steps=4).check(ModelArguments(), args)


def test_what_cannot_be_pre_trained_is_refused(run, tmp_path):
    for more, words in (
        (["--pretrain_steps", "1", "--model_name_or_path", "x"], "--pretrain_steps makes a new model"),
        (["--pretrain_steps", "-1"], "--pretrain_steps -1 must be at least 0"),
        (["--pretrain_steps", "1", "--pretrain_length", "1"], "--pretrain_length 1 must be at least 2"),
        (["--pretrain_steps", "1", "--pretrain_length", "4000"], "Lower --pretrain_length"),
    ):
        with pytest.raises(ValueError, match=words):
            run("out", *more)
    run("plain")
    with pytest.raises(ValueError, match="no pre-trained model"):
        run("plain", "--pretrain_steps", "1", "--resume_from_checkpoint", "last")
