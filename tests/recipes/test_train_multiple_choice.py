"""The multiple-choice recipe: SWAG's columns and others, whole runs, and bad inputs."""

import json
import random

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoModelForMultipleChoice, AutoTokenizer

from hf_reformer import ReformerByteTokenizer
from hf_reformer.recipes import multiple_choice as recipe

pd = pytest.importorskip("pandas")
pytestmark = pytest.mark.usefixtures("undrawn")

TINY = [
    *("--tokenizer", "bytes", "--hidden_size", "16", "--attn_layers", "local", "lsh", "--num_attention_heads", "1"),
    *("--attention_head_size", "16", "--feed_forward_size", "16", "--num_hashes", "1", "--learning_rate", "1e-2"),
    *("--config_overrides", "lsh_window=16,local_window=16", "--max_length", "64", "--use_cpu"),
    *("--disable_tqdm", "True", "--logging_steps", "1", "--save_strategy", "no"),
]


def example(row: int, choices: int = 3) -> dict:
    """The right ending repeats the first word."""
    draw = random.Random(row)
    words = draw.sample(["cat", "dog", "cow", "hen", "bee", "ant"], choices)
    label = draw.randrange(choices)
    endings = {f"ending{i}": f"{word} sleeps" for i, word in enumerate(words)}
    return {"sent1": f"{words[label]} runs.", "sent2": "The", **endings, "label": label}


@pytest.fixture
def files(tmp_path):
    """train.csv and validation.jsonl."""
    pd.DataFrame([example(row) for row in range(24)]).to_csv(tmp_path / "train.csv", index=False)
    rows = (json.dumps(example(row)) + "\n" for row in range(30, 38))
    (tmp_path / "validation.jsonl").write_text("".join(rows))
    return tmp_path


def arguments(folder, *more, out="out"):
    files = ["--train_file", str(folder / "train.csv"), "--validation_file", str(folder / "validation.jsonl")]
    return [*TINY, *files, "--output_dir", str(folder / out), *more]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_run_leaves_a_model_that_chooses_the_same_when_it_is_reloaded(files):
    recipe.main(arguments(files, "--max_steps", "4", "--baselines"))
    out = files / "out"
    left = {"model.safetensors", "README.md", "predictions_validation.jsonl", "choices_validation.png"}
    assert left <= {path.name for path in out.iterdir()}
    model, tokenizer = AutoModelForMultipleChoice.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    rows = lines(out / "predictions_validation.jsonl")
    for number, row in enumerate(rows):
        asked = example(30 + number)
        choices = [f"The {asked[f'ending{i}']}" for i in range(3)]
        inputs = tokenizer([asked["sent1"]] * 3, choices, padding=True, return_tensors="pt")
        assert inputs["token_type_ids"].max() == 1 < model.config.type_vocab_size
        probabilities = model(**{name: x[None] for name, x in inputs.items()}).logits[0].softmax(-1)
        assert row["probabilities"] == pytest.approx(probabilities.tolist(), abs=1e-4)
        assert (row["prediction"], row["choice"]) == (int(probabilities.argmax()), choices[row["prediction"]])
        assert row["label"] == asked["label"]
    scores = json.loads((out / "scores.json").read_text())["validation"]
    assert scores["Reformer"]["accuracy"] == np.mean([row["prediction"] == row["label"] for row in rows])
    assert scores["guessing"]["accuracy"] == pytest.approx(1 / 3)
    assert scores["the choice most similar to the text (TF-IDF)"]["accuracy"] == 1


def test_a_resumed_run_ends_where_the_whole_one_does_and_predicts_a_test_file(files):
    recipe.main(arguments(files, "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"))
    resumed = ["--max_steps", "4", "--resume_from_checkpoint", str(files / "out" / "checkpoint-2")]
    recipe.main(arguments(files, *resumed, out="resumed"))
    assert len({(files / run / "model.safetensors").read_bytes() for run in ("out", "resumed")}) == 1
    for number, labels in enumerate(([], [-1] * 3, [""] * 3)):
        table = pd.DataFrame([example(row) for row in range(3)]).drop(columns="label")
        table.assign(**({"label": labels} if labels else {})).to_csv(files / "test.csv", index=False)
        saved = ["--model_name_or_path", str(files / "out"), "--use_cpu", "--test_file", str(files / "test.csv")]
        recipe.main([*saved, "--output_dir", str(files / str(number))])
        rows = lines(files / str(number) / "predictions_test.jsonl")
        assert [row["row"] for row in rows] == [0, 1, 2]
        assert all("label" not in row for row in rows)


@pytest.mark.slow
def test_it_learns(files):
    pd.DataFrame([example(row) for row in range(400)]).to_csv(files / "train.csv", index=False)
    recipe.main(arguments(files, "--max_steps", "300", "--eval_strategy", "no"))
    assert json.loads((files / "out" / "scores.json").read_text())["validation"]["Reformer"]["accuracy"] > 0.6


@pytest.mark.parametrize("choices", [2, 3, 6])
def test_any_number_of_choices_in_columns_or_a_list(choices):
    rows = [example(row, choices) for row in range(4)]
    found = recipe.read_questions(Dataset.from_list(rows), recipe.DataArguments(), "train")
    assert [len(question.choices) for question in found] == [choices] * 4
    lists = [
        {"q": x["sent1"], "a": [f"The {x[f'ending{i}']}" for i in range(choices)], "right": str(x["label"])}
        for x in rows
    ]
    args = recipe.DataArguments(context_column="q", endings_column="a", label_column="right")
    assert recipe.read_questions(Dataset.from_list(lists), args, "train") == found
    encoded = recipe.tokenize(found, ReformerByteTokenizer(), 64, "train")
    assert [len(ids) for ids in encoded["input_ids"]] == [choices] * 4
    assert encoded["label"][:] == [x["label"] for x in rows]


def test_more_than_ten_endings_are_in_the_order_of_their_numbers():
    row = {f"ending{i}": str(i) for i in (10, 2, 0, 1, *range(3, 10))}
    rows = Dataset.from_list([{"sent1": "a", **row, "label": 10}])
    assert recipe.read_questions(rows, recipe.DataArguments(), "train")[0].choices == [str(i) for i in range(11)]


def test_texts_that_are_cut_are_told(caplog):
    some = [recipe.Question("x" * 100, ["a", "b"], 0)]
    assert recipe.tokenize(some, ReformerByteTokenizer(), 32, "train")["length"] == [32]
    assert "1 questions of the train data are cut to --max_length 32 tokens" in caplog.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label": 3}, r"Row 2 .*label '?3'?, .*from 0 to 2"),
        ({"label": "b"}, "Row 2 .*label 'b'"),
        ({"label": None}, "Row 2 .*label"),
        ({"ending1": ""}, "Row 2 .*holds ''"),
        ({"sent1": None}, "Row 2 .*holds None"),
    ],
)
def test_rows_that_cannot_be_learnt_are_refused_with_file_and_row(files, changes, words):
    rows = [example(0), example(1), {**example(2), **changes}]
    (files / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=f"{words}.*validation\\.jsonl"):
        recipe.main(arguments(files))
    assert not (files / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        ({"sent1": ["a"], "ending0": ["b"], "label": [0]}, {}, "no columns ending0 and ending1.*--endings_column"),
        ({"sent1": ["a"], "ending0": ["b"], "ending1": ["c"]}, {}, r"no column \['label'\]"),
        ({"text": ["a"], "ending0": ["b"], "ending1": ["c"], "label": [0]}, {}, r"no column \['sent1'\]"),
        ({"sent1": ["a"], "e": [["b"]], "label": [0]}, {"endings_column": "e"}, "has 1 choices, not 2"),
        ({"sent1": ["a"] * 2, "e": [["b", "c"], ["b"]], "label": [0, 0]}, {"endings_column": "e"}, "Row 1 .* not 2"),
    ],
)
def test_tables_that_cannot_be_learnt_are_refused(columns, options, words):
    with pytest.raises(ValueError, match=words):
        recipe.read_questions(Dataset.from_dict(columns), recipe.DataArguments(**options), "train")
