"""What every recipe takes from the command line: the options of transformers' own example scripts."""

import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from hf_reformer.recipes import load_recipe
from hf_reformer.training.data_setup import SplitArguments
from hf_reformer.training.model_setup import ModelArguments, arguments_of_file, parse_arguments
from reformer_cli.main import RECIPES

pytestmark = pytest.mark.usefixtures("undrawn")
TINY = [
    *("--hidden_size", "16", "--attn_layers", "local", "--num_attention_heads", "1"),
    *("--attention_head_size", "16", "--feed_forward_size", "16", "--use_cpu", "--disable_tqdm", "True"),
    *("--max_steps", "1", "--save_strategy", "no"),
]
BYTES = ["--tokenizer", "bytes"]
OWN = {
    "classification": BYTES,
    "language-model": [*BYTES, "--sequence_length", "16"],
    "seq2seq": [
        *BYTES,
        "--source_column",
        "text",
        "--target_column",
        "label",
        "--metric",
        "none",
        "--max_target_length",
        "8",
    ],
    "question-answering": [
        *BYTES,
        "--question_column",
        "text",
        "--context_column",
        "words",
        "--answers_column",
        "label",
    ],
    "token-classification": [*BYTES, "--text_column", "list", "--label_column", "labels"],
    "multiple-choice": [*BYTES, "--context_column", "text", "--endings_column", "list", "--label_column", "number"],
    "recommendation": ["--tokenizer", "items", "--top_k", "2"],
    "chat": [*BYTES, "--max_length", "64", "--max_choices", "0"],
    "speech-recognition": [],
    "audio-classification": [],
    "image-classification": [],
    "image-generation": ["--draw_samples", "1"],
    "forecasting": [],
}
DECIMAL = re.compile(r"-?\d+\.\d+(?:e[-+]\d+)?")
SIGNALS = [name for name in OWN if name.startswith(("speech", "audio", "image", "forecast"))]


def example(recipe: str, row: int) -> dict:
    draw = random.Random(row)
    if recipe == "recommendation":
        return {"user_id": row % 20, "item_ids": draw.sample(range(30), 4)}
    if recipe == "chat":
        said = zip(("user", "assistant"), draw.choices(("Hello.", "Yes.", "No."), k=2), strict=True)
        return {"messages": [{"role": role, "content": content} for role, content in said]}
    if recipe in SIGNALS:
        tone = [round(8000 * math.sin(i * (1 + row % 2))) for i in range(400 + row)]
        signal = {"audio": tone, "sampling_rate": 4000, "pixels": [draw.randrange(256) for _ in range(16)]}
        steps = [float(row % 5 + i) for i in range(6)]
        return {**signal, "label": "xy"[row % 2], "text": "ab"[row % 2], "obs_a": steps[:4], "fut_a": steps[4:]}
    answers = {"words": "x or y", "list": ["x", "y"], "labels": ["X", "Y"], "number": row % 2}
    return {"text": " ".join(draw.choices("abcdef", k=9)), "label": "xy"[row % 2], **answers}


@pytest.fixture(params=RECIPES)
def recipe(request):
    return request.param


@pytest.fixture
def folder(recipe, tmp_path):
    """A dataset of three splits, as it lies on the Hub: train.jsonl, validation.jsonl and test.jsonl."""
    data = tmp_path / "data"
    data.mkdir()
    for split, first, rows in (("train", 0, 24), ("validation", 30, 6), ("test", 40, 4)):
        lines = (json.dumps(example(recipe, row)) + "\n" for row in range(first, first + rows))
        (data / f"{split}.jsonl").write_text("".join(lines))
    return data


def run(recipe: str, folder: Path, *more: str, out: str = "out") -> set[str]:
    """Names of the files that a tiny run leaves."""
    load_recipe(recipe).main([*TINY, *OWN[recipe], "--output_dir", str(folder.parent / out), *more])
    return {path.name for path in (folder.parent / out).iterdir()}


def scored(folder: Path, out: str = "out") -> list[str]:
    """The splits of the report, or the models of a language model's."""
    return sorted(json.loads((folder.parent / out / "scores.json").read_text()))


SPLITS = {"language-model": {"validation": "Reformer", "test": "Reformer, test"}}


def expected(recipe: str, *splits: str) -> list[str]:
    return sorted(SPLITS.get(recipe, {}).get(split, split) for split in splits)


class Hub:
    """What the Trainer calls; it keeps the files of the last upload."""

    files: dict[str, bytes] = {}

    def create_repo(self, name, **_):
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, folder_path, **_):
        Hub.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir() if path.is_file()}


def test_what_is_said_is_done_and_nothing_else_on_a_folder_that_is_a_data_set(recipe, folder, monkeypatch):
    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    encoder = recipe not in ("language-model", "seq2seq", "chat", "recommendation", *SIGNALS)
    more = ["--pretrain_steps", "1", "--pretrain_length", "8"] if encoder else []
    left = run(recipe, folder, "--dataset_name", str(folder), "--do_train", "--push_to_hub", *more)
    assert ("_pretrained" in left) == encoder
    assert scored(folder) == []
    assert {"model.safetensors", "README.md", "scores.json"} <= set(Hub.files)
    assert ("tokenizer.json" in Hub.files) == (recipe not in SIGNALS)
    hears_or_sees = recipe in SIGNALS and recipe not in ("forecasting", "image-generation")
    assert ("preprocessor_config.json" in Hub.files) == hears_or_sees
    assert b"- hf_reformer\n" in Hub.files["README.md"]  # the card of the report, not the Trainer's
    saved = ["--model_name_or_path", str(folder.parent / "out"), "--dataset_name", str(folder)]
    out = run(recipe, folder, *saved, "--do_eval", "--do_predict", out="evaluated")
    assert "model.safetensors" not in out
    assert scored(folder, "evaluated") == expected(recipe, "validation", "test")


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize(
    "recipe",
    ["question-answering", "token-classification", "multiple-choice", *sorted(set(SIGNALS) - {"image-generation"})],
)
def test_two_processes_predict_every_row_once(recipe, folder):
    """The last batch has fewer rows than the processes would take."""
    data = ["--dataset_name", str(folder)]
    numbers = ["--loss", "mae"] if recipe == "forecasting" else []  # distributions are drawn from by every process
    run(recipe, folder, *data, "--do_train", *numbers)
    options = [*TINY, *OWN[recipe], *data, "--model_name_or_path", str(folder.parent / "out"), "--do_eval"]
    options += ["--do_predict", "--per_device_eval_batch_size", "2", "--max_eval_samples", "5"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "hf_reformer", "train", recipe, *options, "--output_dir", str(folder.parent / "two")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("results are in") == 1
    load_recipe(recipe).main([*options, "--output_dir", str(folder.parent / "one")])
    for split in ("validation", "test"):
        one, two = (next((folder.parent / x).glob(f"predictions_{split}.*")).read_text() for x in ("one", "two"))
        assert DECIMAL.sub("", one) == DECIMAL.sub("", two)
        numbers = ([float(x) for x in DECIMAL.findall(text)] for text in (one, two))
        assert next(numbers) == pytest.approx(next(numbers), abs=1e-3)


@pytest.mark.parametrize("recipe", ["seq2seq"])
def test_nothing_said_means_train_and_evaluate_and_predict_a_test_file(recipe, folder):
    files = ["--train_file", str(folder / "train.jsonl"), "--test_file", str(folder / "test.jsonl")]
    run(recipe, folder, *files, "--max_predict_samples", "3")
    assert scored(folder) == ["test", "validation"]
    lines = (folder.parent / "out" / "predictions_test.jsonl").read_text().splitlines()
    rows = [json.loads(line)["text"] for line in (folder / "test.jsonl").read_text().splitlines()]
    assert [json.loads(line)["source"] for line in lines] == rows[:3]  # the first ones


def test_a_file_of_arguments_is_the_same_command(tmp_path):
    values = {"attn_layers": ["local", "lsh"], "max_steps": 1, "learning_rate": 1e-3, "predict_file": None}
    values |= {
        "do_eval": True,
        "train_file": "a b.csv",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "label_column": "-x",
    }
    words = ["--attn_layers", "local", "lsh", "--max_steps", "1", "--learning_rate", "1e-3", "--do_eval"]
    words += ["--train_file", "a b.csv", "--lr_scheduler_kwargs", '{"num_cycles": 2}', "--label_column=-x"]
    (tmp_path / "a.json").write_text(json.dumps(values))
    (tmp_path / "a.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))
    parsed = [parse(*words), parse(str(tmp_path / "a.json")), parse(str(tmp_path / "a.yaml"))]
    assert parsed[0][0].train_file == "a b.csv"
    for data, model, args in parsed[1:]:
        assert (data, model) == parsed[0][:2]
        different = {k for k, x in args.to_dict().items() if x != parsed[0][2].to_dict()[k]}
        assert different <= {"logging_dir"}


@pytest.mark.parametrize(
    ("text", "words"),
    [("[1]", "must hold an object"), ("{", "cannot be read"), ("", "cannot be read|must hold an object")],
)
def test_a_file_of_arguments_that_is_none(tmp_path, text, words):
    for suffix in (".json", ".yaml"):
        (tmp_path / f"a{suffix}").write_text(text)
        with pytest.raises(ValueError, match=words):
            arguments_of_file(tmp_path / f"a{suffix}")
    with pytest.raises(ValueError, match="no file"):
        load_recipe("seq2seq").main([str(tmp_path / "absent.json")])
    (tmp_path / "a.json").write_text('{"learning_rat_": 1}')
    with pytest.raises(ValueError, match="learning_rat_"):
        load_recipe("seq2seq").main([str(tmp_path / "a.json")])


def test_options_that_cannot_work_are_refused_before_anything_is_read(recipe):
    train, saved = ["--train_file", "nowhere.csv"], ["--model_name_or_path", "nowhere"]
    for options, words in (
        (["--do_train", *saved, "--validation_file", "x.csv"], "nothing to train on"),
        (["--do_eval", *train], "Nothing is trained here"),
        (["--do_eval", *train, *saved], "--do_eval without --do_train needs a --validation_file"),
        (["--do_predict", *train, *saved], "--do_predict: there is no test data"),
        ([*train, "--dataset_name", "a/b"], "not both"),
        ([*train, "--dataset_config", "a"], "--dataset_config_name is the configuration"),
        (["--validation_file", "x.csv", *saved, "--push_to_hub"], "--push_to_hub belongs to training"),
        ([*train, "--max_predict_samples", "0"], "max_predict_samples 0 must be at least 1"),
        ([*train, "--report_to", "nobody"], "nobody"),
        ([*train, "--do_train", "--load_best_model_at_end"], "strategy"),
    ):
        with pytest.raises(ValueError, match=words):
            load_recipe(recipe).main(options)


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_read(recipe):
    with pytest.raises(ImportError, match=r"--report_to.*wandb"):
        load_recipe(recipe).main(["--train_file", "nowhere.csv", "--report_to", "wandb"])


def test_a_data_set_without_the_split_is_named(recipe, folder):
    (folder / "test.jsonl").unlink()
    if recipe != "recommendation":  # which holds out test data, too
        with pytest.raises(ValueError, match="no split `test`"):
            run(recipe, folder, "--dataset_name", str(folder), "--do_train", "--do_predict")
    (folder / "validation.jsonl").unlink()
    data = SplitArguments(dataset_name=str(folder))
    data.wanted = ("validation",)
    with pytest.raises(ValueError, match="no split `validation`"):
        data.read()


def test_a_folder_that_is_no_data_set(recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"cannot be read by datasets.*--train_file"):
        load_recipe(recipe).main(["--dataset_name", str(tmp_path / "empty"), *OWN[recipe], "--use_cpu"])


def parse(*words: str):
    classes = load_recipe("classification").DataArguments, ModelArguments, transformers.TrainingArguments
    return parse_arguments("classification", None, classes, words, {"output_dir": "x", "use_cpu": True})


def test_actions_are_chosen_by_flags():
    """`TrainingArguments` alone evaluates whenever its evaluation strategy is not "no", which is our default."""

    def actions(*words: str):
        *_, args = parse(*words)
        return args.do_train, args.do_eval, args.do_predict, str(args.eval_strategy.value)

    assert actions() == (None, None, None, "epoch")
    assert actions("--do-train") == (True, None, None, "no")
    assert actions("--do_train", "--eval_strategy", "epoch") == (True, True, None, "epoch")
    assert actions("--do_train", "--do_eval", "True") == (True, True, None, "epoch")
    assert actions("--do_predict", "--do_eval", "False") == (None, False, True, "no")
    assert actions("--do_eval", "False") == (None, False, None, "no")
    for more in ([], ["--do_train"]):
        with pytest.raises(ValueError, match="--eval_strategy steps evaluates, and --do_eval False does not"):
            parse("--do_eval", "False", "--eval_strategy", "steps", *more)
