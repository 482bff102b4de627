"""The classification recipe, run as people run it: on a csv, on a folder of texts, resumed, and wrongly."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from hf_reformer import ReformerByteTokenizer
from hf_reformer.data.tables import Columns
from hf_reformer.recipes import classification as recipe
from hf_reformer.training.classification import METRIC_MODULE, SINGLE, Task
from hf_reformer.training.model_setup import parse_overrides
from hf_reformer.training.trainers import EpochLengthSampler

pd = pytest.importorskip("pandas")
evaluate = pytest.importorskip("evaluate")

SCRIPT = str(Path(__file__).resolve().parents[2] / "scripts" / "train_classification.py")
TINY = [
    *("--tokenizer", "train", "--tokenizer_vocab_size", "300", "--hidden_size", "16", "--attn_layers", "local", "lsh"),
    *("--num_attention_heads", "1", "--attention_head_size", "16", "--feed_forward_size", "16", "--num_hashes", "1"),
    *("--config_overrides", "lsh_window=16,local_window=8", "--max_length", "64", "--learning_rate", "1e-2"),
    *("--use_cpu", "--disable_tqdm", "True", "--logging_steps", "1"),
]
WORDS = {"cat": "meow purr whisker claw", "dog": "bark fetch bone tail"}
FILLING = ["the", "a", "of", "and", "to", "in", "is", "it", "on", "for", "with", "as", "was", "at", "by"]


def sentence(label: str, length: int, draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS[label].split() if draw.random() < 0.5 else FILLING) for _ in range(length))


def animals(count: int, seed: int = 0) -> "pd.DataFrame":
    """Sentences of very different lengths about cats and dogs, in turn."""
    draw = random.Random(seed)
    labels = [sorted(WORDS)[row % 2] for row in range(count)]
    return pd.DataFrame({"text": [sentence(label, draw.randint(4, 20), draw) for label in labels], "label": labels})


@pytest.fixture
def files(tmp_path):
    """A folder with train.csv and validation.csv."""
    animals(48).to_csv(tmp_path / "train.csv", index=False)
    animals(12, seed=1).to_csv(tmp_path / "validation.csv", index=False)
    return tmp_path


def arguments(folder: Path, *more: str, train: str = "train.csv", out: str = "out") -> list[str]:
    return [*TINY, "--train_file", str(folder / train), "--output_dir", str(folder / out), *more]


@pytest.mark.slow
def test_csv_from_the_command_line_leaves_everything_behind(files):
    command = [sys.executable, SCRIPT, *arguments(files, "--num_train_epochs", "6")]
    command += ["--validation_file", str(files / "validation.csv"), "--baselines"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=files, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "| Reformer " in result.stdout
    assert "| TF-IDF + logistic regression " in result.stdout
    assert "| most frequent label " in result.stdout
    out = files / "out"
    names = {"config.json", "model.safetensors", "tokenizer.json", "README.md", "confusion_matrix_validation.png"}
    assert names <= {file.name for file in out.iterdir()}
    assert json.loads((out / "config.json").read_text())["id2label"] == {"0": "cat", "1": "dog"}
    assert "TF-IDF" in (out / "README.md").read_text()
    scores = json.loads((out / "scores.json").read_text())["validation"]
    predictions = pd.read_csv(out / "predictions_validation.csv")
    agreement = (predictions["label"] == predictions["prediction"]).mean()
    assert scores["Reformer"]["accuracy"] == pytest.approx(agreement)
    assert scores["most frequent label"]["accuracy"] == 0.5
    assert agreement > 0.9


def test_predictions_are_in_the_order_of_the_data_and_equal_a_reloaded_pipeline(files):
    from transformers import pipeline

    recipe.main(arguments(files, "--validation_file", str(files / "validation.csv"), "--max_steps", "4"))
    texts, predictions = animals(12, seed=1), pd.read_csv(files / "out" / "predictions_validation.csv")
    assert list(predictions["label"]) == list(texts["label"])
    answers = pipeline("text-classification", model=str(files / "out"))(list(texts["text"]), truncation=True)
    assert [answer["label"] for answer in answers] == list(predictions["prediction"])
    for answer, probability in zip(answers, predictions["probability"], strict=True):
        assert answer["score"] == pytest.approx(probability, abs=1e-4)


def test_text_folder_without_validation_data_and_test_folder(tmp_path, capsys):
    for row, (text, label) in enumerate(animals(40).itertuples(index=False)):
        for split in ("train", "test"):
            file = tmp_path / split / label / f"{row}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    options = ["--test_file", str(tmp_path / "test"), "--max_steps", "2", "--validation_fraction", "0.2"]
    recipe.main([*arguments(tmp_path, *options, train="train"), "--tokenizer", "bytes"])
    assert "train 32, validation 8, test 40" in capsys.readouterr().out
    assert list(pd.read_csv(tmp_path / "out" / "predictions_validation.csv")["label"]).count("cat") == 4
    predictions = pd.read_csv(tmp_path / "out" / "predictions_test.csv")
    assert [path.split("/")[0] for path in predictions["path"]] == list(predictions["label"])


def test_test_file_without_labels_is_predicted(files):
    animals(6).drop(columns="label").to_csv(files / "test.csv", index=False)
    recipe.main(arguments(files, "--test_file", str(files / "test.csv"), "--max_steps", "1"))
    predictions = pd.read_csv(files / "out" / "predictions_test.csv")
    assert "label" not in predictions
    assert set(predictions["prediction"]) <= {"cat", "dog"}
    assert len(predictions) == 6


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_resumed_run_equals_uninterrupted_run(files, stop):
    """4 batches an epoch, so the checkpoints lie inside the first epoch, inside the second, and behind odd lengths."""
    options = ["--per_device_train_batch_size", "16", "--save_strategy", "steps", "--save_steps", "1"]
    options += ["--num_train_epochs", "2", "--save_total_limit", "9", "--eval_strategy", "no"]
    recipe.main(arguments(files, *options, out="whole"))
    checkpoint = str(files / "whole" / f"checkpoint-{stop}")
    recipe.main(arguments(files, *options, "--resume_from_checkpoint", checkpoint, out="resumed"))
    assert not (files / "resumed" / f"checkpoint-{stop}").exists()
    whole, resumed = ((files / run / "model.safetensors").read_bytes() for run in ("whole", "resumed"))
    assert whole == resumed


def test_last_checkpoint_is_found(files):
    options = ["--save_strategy", "steps", "--save_steps", "1", "--eval_strategy", "no"]
    recipe.main(arguments(files, *options, "--max_steps", "2"))
    recipe.main(arguments(files, *options, "--max_steps", "3", "--resume_from_checkpoint", "last"))
    state = json.loads((files / "out" / "trainer_state.json").read_text())
    assert state["global_step"] == 3


def test_saved_model_is_fine_tuned_with_its_own_labels_and_then_only_evaluated(files, capsys):
    validation = ["--validation_file", str(files / "validation.csv")]
    recipe.main(arguments(files, *validation, "--max_steps", "2"))
    saved = ["--model_name_or_path", str(files / "out"), "--use_cpu", "--disable_tqdm", "True", "--max_length", "64"]
    animals(16).sort_values("label", ascending=False).to_json(files / "more.jsonl", orient="records", lines=True)
    more = ["--train_file", str(files / "more.jsonl"), "--output_dir", str(files / "tuned"), "--max_steps", "1"]
    recipe.main([*saved, *more])
    config = json.loads((files / "tuned" / "config.json").read_text())
    assert config["id2label"] == {"0": "cat", "1": "dog"}
    assert config["vocab_size"] == 300

    recipe.main([*saved, *validation, "--output_dir", str(files / "evaluated")])
    assert not (files / "evaluated" / "model.safetensors").exists()
    evaluated, trained = (pd.read_csv(files / run / "predictions_validation.csv") for run in ("evaluated", "out"))
    assert evaluated.equals(trained)

    (files / "letter.txt").write_text("the bark of a bone")
    for flag in ("--predict_file", "--classify"):  # and its old name
        capsys.readouterr()
        recipe.main([*saved, flag, str(files / "letter.txt")])
        assert {"cat", "dog"} <= set(capsys.readouterr().out.split())


def test_saved_model_predicts_a_test_file_and_a_letter_without_training(files, capsys):
    (files / "letter.txt").write_text("the bark of a bone")
    recipe.main(arguments(files, "--max_steps", "1"))
    saved = ["--model_name_or_path", str(files / "out"), "--use_cpu", "--output_dir", str(files / "evaluated")]
    saved += ["--max_length", "64", "--predict_file", str(files / "letter.txt")]
    recipe.main([*saved, "--test_file", str(files / "validation.csv")])
    assert len(pd.read_csv(files / "evaluated" / "predictions_test.csv")) == 12
    assert {"cat", "dog"} <= set(capsys.readouterr().out.split("letter.txt")[-1].split())


def test_errors_come_before_training_not_after(files):
    for more, words in (
        (["--predict_file", str(files / "absent.txt")], "no file"),
        (["--max_train_samples", "0"], "max_train_samples 0 must be at least 1"),
        (["--validation_fraction", "1"], "must be between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=words):
            recipe.main(arguments(files, *more))
    assert not (files / "out").exists()


def test_numbers_are_regression(tmp_path):
    table = animals(32)
    table["score"] = [0.25 * text.split().count("meow") for text in table["text"]]
    table.drop(columns="label").to_csv(tmp_path / "train.csv", index=False)
    recipe.main(arguments(tmp_path, "--max_steps", "2", "--baselines"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "regression"
    predictions = pd.read_csv(tmp_path / "out" / "predictions_validation.csv")
    assert predictions["prediction"].dtype == predictions["label"].dtype == float
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())["validation"]
    assert set(scores["Reformer"]) == {"pearsonr", "spearmanr"}
    assert scores["mean of train"]["pearsonr"] == 0
    expected = predictions["label"].corr(predictions["prediction"])
    assert scores["Reformer"]["pearsonr"] == pytest.approx(expected, abs=1e-4)


def test_lists_are_several_labels(tmp_path):
    table = animals(32)
    table["label"] = [[label, "long"] if len(text) > 50 else [label] for text, label in table.itertuples(index=False)]
    table.to_json(tmp_path / "train.jsonl", orient="records", lines=True)
    recipe.main(arguments(tmp_path, "--max_steps", "2", "--baselines", train="train.jsonl"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert list(config["id2label"].values()) == ["cat", "dog", "long"]
    labels = pd.read_csv(tmp_path / "out" / "predictions_validation.csv")["label"]
    assert set(labels) <= {"cat", "dog", "cat|long", "dog|long"}


def test_pairs_of_texts(tmp_path):
    table = animals(24)
    table["premise"], table["hypothesis"] = table["text"], table["text"].str.upper()
    table.drop(columns="text").to_csv(tmp_path / "train.csv", index=False)
    recipe.main(arguments(tmp_path, "--max_steps", "2", "--baselines"))
    assert len(pd.read_csv(tmp_path / "out" / "predictions_validation.csv")) > 0


def test_training_texts_are_cut_into_chunks_that_keep_their_label():
    dataset = Dataset.from_dict({"text": ["one " * 50, "two"], "labels": [1, 0]})
    task = Task(Columns("text", None, "label"), SINGLE, ["a", "b"])
    tokenizer = ReformerByteTokenizer(model_max_length=180)
    chunks = recipe.tokenize(dataset, task, tokenizer, chunk=64)
    assert list(chunks["labels"]) == [1, 1, 1, 1, 0]
    assert list(chunks["length"]) == [64, 64, 64, 8, 3]
    assert list(recipe.tokenize(dataset, task, tokenizer)["length"]) == [180, 3]


def test_glue_tasks_are_read_from_the_hub_by_name(monkeypatch, tmp_path):
    import datasets
    from datasets import ClassLabel, DatasetDict, Features, Value

    label = ClassLabel(names=["entailment", "neutral", "contradiction"])
    features = Features(premise=Value("string"), hypothesis=Value("string"), label=label, idx=Value("int32"))

    def part(count, known=True):
        columns = {"premise": ["a"] * count, "hypothesis": ["b"] * count, "idx": list(range(count))}
        return Dataset.from_dict({**columns, "label": [i % 3 if known else -1 for i in range(count)]}, features)

    asked = []
    parts = {"train": 12, "validation_matched": 6, "validation_mismatched": 9}
    glue = DatasetDict({name: part(count) for name, count in parts.items()}, test_matched=part(3, known=False))
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked.append(names) or glue)
    recipe.main([*TINY, "--task_name", "mnli", "--max_steps", "1", "--output_dir", str(tmp_path)])
    assert asked == [("nyu-mll/glue", "mnli")]
    assert len(pd.read_csv(tmp_path / "predictions_validation_mismatched.csv")) == 9
    assert set(json.loads((tmp_path / "scores.json").read_text())) == {"validation_matched", "validation_mismatched"}

    def offline(*names):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ConnectionError, match="--demo"):
        recipe.main([*TINY, "--task_name", "mnli", "--output_dir", str(tmp_path)])


def test_mistakes_are_explained(files):
    with pytest.raises(ValueError, match=r"no column `txt`.*`text`, `label`"):
        recipe.main(arguments(files, "--text_column", "txt"))
    (files / "data.xlsx").touch()
    with pytest.raises(ValueError, match="unknown extension"):
        recipe.main(arguments(files, train="data.xlsx"))

    unusual = animals(6)
    unusual.loc[3, "label"] = "bird"
    unusual.to_csv(files / "unusual.csv", index=False)
    with pytest.raises(ValueError, match=r"Labels of the validation data.*bird.*cat.*dog"):
        recipe.main(arguments(files, "--validation_file", str(files / "unusual.csv")))
    unusual.loc[3, "label"] = None
    unusual.to_csv(files / "unusual.csv", index=False)
    with pytest.raises(ValueError, match=r"1 rows of the validation data have no label.*row 3"):
        recipe.main(arguments(files, "--validation_file", str(files / "unusual.csv")))
    unusual.drop(columns="label").to_csv(files / "unusual.csv", index=False)
    with pytest.raises(ValueError, match="--label_column"):
        recipe.main(arguments(files, train="unusual.csv"))
    with pytest.raises(ValueError, match=r"validation data has no column.*label"):
        recipe.main(arguments(files, "--validation_file", str(files / "unusual.csv")))
    with pytest.raises(SystemExit, match="--demo"):
        recipe.main([])


def test_overrides_are_read_as_python_values():
    assert parse_overrides("a=1, b=(2, 3),c=[4,5],d=word,e=0.5,f=None") == {
        "a": 1, "b": (2, 3), "c": [4, 5], "d": "word", "e": 0.5, "f": None,
    }  # fmt: skip
    assert parse_overrides(None) == {}


def test_metrics_agree_with_their_definitions():
    def score(name, predictions, references, **options):
        module = evaluate.load(METRIC_MODULE, name)
        return module.compute(predictions=predictions, references=references, **options)[name]

    assert score("accuracy", [0, 1, 1], [0, 1, 0]) == pytest.approx(2 / 3)
    assert score("accuracy", [[0, 1], [1, 1]], [[0, 1], [1, 0]]) == 0.5
    assert score("f1", [0, 1, 1], [0, 1, 0], average="binary") == pytest.approx(2 / 3)
    assert score("f1", [[0, 1], [1, 1]], [[0, 1], [1, 0]], average="micro") == pytest.approx(0.8)
    assert score("matthews_correlation", [0, 1, 0, 1], [0, 1, 0, 1]) == 1
    assert score("pearsonr", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1)
    assert score("spearmanr", [1.0, 2.0, 9.0], [1.0, 4.0, 5.0]) == pytest.approx(1)
    assert score("pearsonr", [1.0, 1.0], [2.0, 4.0]) == 0
    with pytest.raises(ValueError, match=r"no metric 'bleu'.*accuracy"):
        score("bleu", [0], [0])


def test_metrics_load_offline_with_an_empty_cache(tmp_path):
    code = f"""
import evaluate
for name in ("accuracy", "f1", "matthews_correlation", "pearsonr", "spearmanr"):
    print(evaluate.load({METRIC_MODULE!r}, name).compute(predictions=[0, 1, 1], references=[0, 1, 0]))
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment).stdout
    assert [list(eval(line)) for line in printed.splitlines()] == [
        ["accuracy"], ["f1"], ["matthews_correlation"], ["pearsonr"], ["spearmanr"]
    ]  # fmt: skip


def test_order_of_batches_depends_on_seed_and_epoch_alone():
    lengths = [random.Random(0).randint(1, 100) for _ in range(64)]
    sampler = EpochLengthSampler(4, lengths, seed=1)
    first = list(sampler)
    torch.rand(7)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == first != second
    assert sorted(first) == list(range(64))


@pytest.mark.multi_process
@pytest.mark.slow
def test_two_processes_give_the_predictions_of_one(files):
    command = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "hf_reformer", "train", "classification"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    options = ["--validation_file", str(files / "validation.csv"), "--max_steps", "4"]
    command += arguments(files, *options, "--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "2")
    result = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, cwd=files, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("The results are in") == 1
    predictions = pd.read_csv(files / "out" / "predictions_validation.csv")
    assert list(predictions["label"]) == list(animals(12, seed=1)["label"])


@pytest.mark.slow
def test_demo_beats_the_most_frequent_label_by_far(tmp_path):
    command = [sys.executable, SCRIPT, "--demo", "--output_dir", str(tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    scores = json.loads((tmp_path / "scores.json").read_text())["validation"]
    assert scores["Reformer"]["accuracy"] > 4 * scores["most frequent label"]["accuracy"]
    assert "both agree with the trained model" in result.stdout
