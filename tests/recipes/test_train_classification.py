"""The classification recipe, run as people run it: on a csv, on a folder of texts, resumed, and wrongly."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from hf_reformer import (
    ReformerByteTokenizer,
    ReformerConfig,
    ReformerForMaskedLM,
    ReformerForSequenceClassification,
)
from hf_reformer.data.columns import Columns
from hf_reformer.recipes import classification as recipe
from hf_reformer.training.classification import METRIC_MODULE, SINGLE, Task
from hf_reformer.training.model_setup import ModelArguments, make_model, make_tokenizer, parse_overrides
from hf_reformer.training.trainers import EpochLengthSampler

pd = pytest.importorskip("pandas")
evaluate = pytest.importorskip("evaluate")
pytestmark = pytest.mark.usefixtures("undrawn")

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


def test_resumed_run_equals_uninterrupted_run(files):
    """4 batches an epoch, so the checkpoints lie inside the first epoch, inside the second, and behind odd lengths."""
    options = ["--per_device_train_batch_size", "16", "--save_strategy", "steps", "--save_steps", "1"]
    options += ["--num_train_epochs", "2", "--save_total_limit", "9", "--eval_strategy", "no"]
    recipe.main(arguments(files, *options, out="whole"))
    for stop in (2, 3, 5):
        checkpoint, out = str(files / "whole" / f"checkpoint-{stop}"), files / f"resumed{stop}"
        recipe.main(arguments(files, *options, "--resume_from_checkpoint", checkpoint, out=out.name))
        assert not (out / f"checkpoint-{stop}").exists()
        assert (files / "whole" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


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


def test_a_new_model_may_start_from_the_neighbors_of_its_tokens(files, monkeypatch):
    begun = []
    monkeypatch.setattr(recipe, "initialize_embeddings", lambda model, sequences, window: begun.append(len(sequences)))
    recipe.main(arguments(files, "--max_steps", "1"))
    assert not begun
    recipe.main(arguments(files, "--max_steps", "1", "--neighbor_init", "True"))
    assert begun == [43]  # a tenth of 48 is held out
    for other in (["--model_name_or_path", str(files / "out")], ["--pretrain_steps", "2"]):
        with pytest.raises(ValueError, match="--neighbor_init initializes a new model"):
            recipe.main(arguments(files, "--neighbor_init", "True", *other, out="again"))


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
    out = tmp_path / "out"
    assert ReformerConfig.from_pretrained(out).type_vocab_size == 2
    assert AutoTokenizer.from_pretrained(out)("a", "b")["token_type_ids"][-1] == 1


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


def test_the_demo_may_leave_out_evaluation(tmp_path, monkeypatch):
    corpus = DatasetDict({"train": Dataset.from_pandas(animals(8)), "validation": Dataset.from_pandas(animals(4))})
    monkeypatch.setattr(recipe, "installed_packages_corpus", lambda *_, **__: corpus)
    recipe.main(["--demo", "--do_eval", "False", "--max_steps", "1", "--output_dir", str(tmp_path), *TINY])
    assert "model.safetensors" in os.listdir(tmp_path)


@pytest.mark.slow
def test_demo_beats_the_most_frequent_label_by_far(tmp_path):
    command = [sys.executable, SCRIPT, "--demo", "--output_dir", str(tmp_path)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    scores = json.loads((tmp_path / "scores.json").read_text())["validation"]
    assert scores["Reformer"]["accuracy"] > 4 * scores["most frequent label"]["accuracy"]
    assert "both agree with the trained model" in result.stdout


# --- labels are what is written there


def prepared(path: Path, rows: list[dict], model_labels=None, model_problem_type=None, **options):
    """The splits and the task of a table; `path` says the format."""
    if path.suffix == ".csv":
        lines = [",".join(rows[0]), *(",".join(map(str, row.values())) for row in rows)]
        path.write_text("".join(line + "\n" for line in lines))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = recipe.DataArguments(**{"train_file": str(path), **options})
    return recipe.prepare_data(arguments, model_labels, 0, model_problem_type)


def labelled(labels: list, column: str = "label") -> list[dict]:
    return [{"text": f"text {i}", column: label} for i, label in enumerate(labels * 8)]


@pytest.mark.parametrize(
    ("labels", "problem_type", "names"),
    [
        (["007", "7", "01", "1"], None, ["01", "1", "007", "7"]),
        (["1.10", "1.1"], SINGLE, ["1.1", "1.10"]),
        (["1.1", "1.1.1"], None, ["1.1", "1.1.1"]),
        (["NA", "null", "None", "True", "nan", "inf"], None, ["NA", "None", "True", "inf", "nan", "null"]),
        (["²", "x", "9" * 5000], None, ["9" * 5000, "x", "²"]),
        (["1234567.0", "1234568.0"], SINGLE, ["1234567.0", "1234568.0"]),
    ],
)
def test_labels_keep_their_spelling(tmp_path, labels, problem_type, names):
    for suffix in (".csv", ".jsonl"):
        splits, task = prepared(tmp_path / f"t{suffix}", labelled(labels), problem_type=problem_type)
        assert task.label_names == names
        assert {task.label_names[i] for i in splits["train"]["labels"]} == set(names)


def test_numbers_of_json_stay_apart(tmp_path):
    names = prepared(tmp_path / "t.jsonl", labelled([1234567.5, 1234568.5, 3.0]), problem_type=SINGLE)[1].label_names
    assert set(names) == {"1234567.5", "1234568.5", "3"}


@pytest.mark.parametrize("column", ["label", "labels"])
def test_a_label_column_called_labels(tmp_path, column):
    rows = [{**row, "labels": "z"} if column == "label" else row for row in labelled(["b", "a"], column)]
    splits, task = prepared(tmp_path / "t.csv", rows)
    assert (task.columns.label, task.label_names) == (column, ["a", "b"])
    assert set(splits["train"]["labels"]) == {0, 1}


def test_multi_hot_rows_are_classes_by_position(tmp_path):
    rows = labelled([[0, 0, 1], [1, 0, 1], [0, 0, 0]])
    splits, task = prepared(tmp_path / "t.jsonl", rows, problem_type=None)
    assert task.label_names == ["0", "1", "2"]
    assert {tuple(x) for x in splits["train"]["labels"]} == {(0, 0, 1), (1, 0, 1), (0, 0, 0)}
    rows = labelled([[0, 3], [1], [1, 0]])  # but these are names
    splits, task = prepared(tmp_path / "t.jsonl", rows)
    assert task.label_names == ["0", "1", "3"]
    assert {tuple(x) for x in splits["train"]["labels"]} == {(1, 0, 1), (0, 1, 0), (1, 1, 0)}


def test_texts_of_digits_and_empty_texts(tmp_path):
    texts = ["0", "007", "1.50", ""]
    splits, task = prepared(tmp_path / "t.csv", [{"text": x, "label": "ab"[i % 2]} for i, x in enumerate(texts * 8)])
    assert {x for part in splits.values() for x in task.texts(part)[0]} == set(texts)


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (labelled(["inf", "1.0"]), {}, "label 'inf', but regression needs finite numbers"),
        (labelled(["good", "bad"]), {"problem_type": "regression"}, "label 'good', but regression needs"),
        (labelled(["a", "a"]), {}, "same label"),
        (labelled(["a", ""]), {}, "8 rows of the train data have no label; the first is row 1"),
        (labelled([["a", "b"], ["a"]]), {"problem_type": SINGLE}, "one a row"),
        (labelled([["a"], [None]]), {}, "empty label"),
        (labelled(["a", "b"])[:5], {}, r"--validation_fraction 0.1 of 5 rows"),
    ],
)
def test_labels_that_cannot_work_are_refused(tmp_path, rows, options, words):
    with pytest.raises(ValueError, match=words):
        prepared(tmp_path / "t.jsonl", rows, **options)


def test_a_test_file_without_labels_is_predicted_by_a_saved_model(tmp_path):
    for row in ({"text": "x"}, {"text": "x", "label": ""}):
        (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
        options = recipe.DataArguments(test_file=str(tmp_path / "t.jsonl"))
        splits, task = recipe.prepare_data(options, ["b", "a"], 0)
        assert task.label_names == ["b", "a"]
        assert "labels" not in splits["test"].column_names
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "x", "label": "c"}) + "\n")
    with pytest.raises(ValueError, match=r"Labels of the test data.*'c'"):  # and no new head answers at random
        recipe.prepare_data(options, ["b", "a"], 0)


def test_a_model_of_regression_goes_on_with_whole_numbers_and_says_so(tmp_path, caplog):
    rows = labelled(["1", "3"])
    assert prepared(tmp_path / "t.csv", rows)[1].problem_type == SINGLE
    assert (
        prepared(tmp_path / "t.csv", labelled(["1.0", "3.5"]), ["score"], "regression")[1].problem_type == "regression"
    )
    assert "taken as numbers" not in caplog.text
    assert prepared(tmp_path / "t.csv", rows, ["score"], "regression")[1].problem_type == "regression"
    assert "taken as numbers" in caplog.text


# --- a saved model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    config = {"vocab_size": 260, "hidden_size": 16, "num_attention_heads": 1, "attention_head_size": 16}
    config |= {"feed_forward_size": 16, "attn_layers": ["local", "lsh"], "max_position_embeddings": 64}
    ReformerForSequenceClassification(ReformerConfig(**config)).save_pretrained(folder / "classifier")
    ReformerForMaskedLM(ReformerConfig(**config)).save_pretrained(folder / "masked")
    return folder


def load(folder, overrides=None, **options):
    arguments = ModelArguments(model_name_or_path=str(folder), config_overrides=overrides)
    return make_model(AutoModelForSequenceClassification, arguments, ReformerByteTokenizer(), 64, **options)


@pytest.mark.parametrize(
    ("overrides", "tensor"),
    [
        ("hidden_size=32", "classifier.dense.bias"),
        ("attn_layers=[local]", "model.layers.1"),
        ("attn_layers=[lsh,lsh]", "model.layers.0.attention"),
        ("position_embedding_type=learned", "model.position_embeddings"),
    ],
)
def test_overrides_that_need_other_weights_are_refused(saved, overrides, tensor):
    overrides = overrides.replace("[local]", "['local']").replace("[lsh,lsh]", "['lsh','lsh']")
    with pytest.raises(ValueError, match=rf"--config_overrides.*lost or new.*{tensor}"):
        load(saved / "classifier", overrides)


def test_overrides_that_keep_all_weights_are_taken(saved):
    model = load(saved / "classifier", "lsh_window=16,hidden_dropout_prob=0.3")
    assert (model.config.lsh_window, model.config.hidden_dropout_prob) == (16, 0.3)


def test_a_new_head_is_told_and_never_evaluated_untrained(saved, caplog):
    labels = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    assert load(saved / "classifier", **labels).num_labels == 3
    told = "these weights are new: classifier.out_proj.bias (2,) → (3,), classifier.out_proj.weight (2, 16) → (3, 16)"
    assert told in caplog.text
    for folder, options in (("classifier", labels), ("masked", {})):
        with pytest.raises(ValueError, match=r"lacks classifier.*nothing is trained"):
            load(saved / folder, trains=False, **options)
    assert load(saved / "classifier", trains=False).num_labels == 2
    (saved / "letter.txt").write_text("a letter")
    with pytest.raises(ValueError, match=r"lacks classifier.*nothing is trained"):
        recipe.main(["--model_name_or_path", str(saved / "masked"), "--predict_file", str(saved / "letter.txt")])


def test_weights_that_contradict_their_config_are_refused(saved, tmp_path):
    shutil.copytree(saved / "classifier", tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "feed_forward_size": 24}))
    with pytest.raises(ValueError, match=r"feed_forward.* is \(.*but its config asks for"):
        load(tmp_path / "odd")


def test_a_tokenizer_without_padding_pads_with_its_separator(tmp_path):
    words = {word: number for number, word in enumerate(["<unk>", "<end>", "good", "bad"])}
    made = Tokenizer(WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<end>").save_pretrained(tmp_path)
    tokenizer = make_tokenizer(ModelArguments(tokenizer=str(tmp_path)), [], 64)
    assert tokenizer.pad_token_id == 1
    assert (
        make_model(
            AutoModelForSequenceClassification, ModelArguments(hidden_size=16), tokenizer, 64
        ).config.pad_token_id
        == 1
    )


# --- options


@pytest.mark.parametrize(
    "wrong",
    [
        *(("validation_fraction", x) for x in ("0", "1", "2", "-1", "nan")),
        *((name, "0") for name in ("max_train_samples", "max_eval_samples", "max_length", "train_length")),
        *(
            (name, "0")
            for name in ("early_stopping_patience", "hidden_size", "num_hashes", "gradient_accumulation_steps")
        ),
        *(("learning_rate", x) for x in ("-1", "nan", "inf")),
        ("num_train_epochs", "0"),
    ],
)
def test_numbers_that_cannot_work_are_refused_first(wrong):
    name, value = wrong
    with pytest.raises(ValueError, match=f"--{name} .*must be"):
        recipe.main(["--train_file", "nowhere.csv", f"--{name}", value])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--train_file", "x.csv", "--text_column", "a", "--label_column", "a"], "both name the column `a`"),
        (["--train_file", "x.csv", "--text_column", "a", "--text_pair_column", "a"], "both name the column `a`"),
        (["--validation_file", "x.csv"], "nothing to train on"),
        (["--test_file", "x.csv"], "nothing to train on"),
    ],
)
def test_options_that_cannot_work_are_refused_first(options, words):
    with pytest.raises(ValueError, match=words):
        recipe.main(options)
