"""The question-answering recipe: SQuAD's columns and scores, places of answers, whole runs, and bad inputs."""

import json
import random

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, pipeline

from hf_reformer import ReformerByteTokenizer
from hf_reformer.data.bpe_tokenizer import train_bpe_tokenizer
from hf_reformer.recipes import question_answering as recipe
from hf_reformer.training.question_answering import (
    Example,
    Reader,
    baselines,
    exact_match,
    f1,
    kind_of_question,
    score_answers,
)

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = [
    *("--tokenizer", "train", "--tokenizer_vocab_size", "300", "--hidden_size", "16", "--attn_layers", "local", "lsh"),
    *("--num_attention_heads", "1", "--attention_head_size", "16", "--feed_forward_size", "16", "--num_hashes", "1"),
    *("--config_overrides", "lsh_window=16,local_window=16", "--max_length", "128", "--learning_rate", "1e-2"),
    *("--use_cpu", "--disable_tqdm", "True", "--logging_steps", "1", "--save_strategy", "no"),
]
NAMES = ["Zoë", "Ömer", "Ida", "Max"]
PLACES = ["Zürich", "Oslo", "東京", "Rio"]


def example(row: int, **changes) -> dict:
    """A question to a short document with letters of one, two and three bytes."""
    draw = random.Random(row)
    name, place = draw.choice(NAMES), draw.choice(PLACES)
    context = f"{'So it is. ' * draw.randint(0, 4)}{name} lives in {place}. “Yes”, they say."
    answers = {"text": [place], "answer_start": [context.index(place)]}
    row = {"id": f"q{row}", "title": "t", "context": context, "question": f"Where is {name}?", "answers": answers}
    return {**row, **changes}


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path):
    """train.jsonl and validation.jsonl."""
    write(tmp_path / "train.jsonl", [example(row) for row in range(32)])
    write(tmp_path / "validation.jsonl", [example(row) for row in range(40, 48)])
    return tmp_path


def arguments(folder, *more, out="out"):
    files = ["--train_file", str(folder / "train.jsonl"), "--validation_file", str(folder / "validation.jsonl")]
    return [*TINY, *files, "--output_dir", str(folder / out), *more]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("tokenizer", ["train", "bytes"])
def test_a_run_leaves_a_model_whose_pipeline_gives_the_same_answers(files, tokenizer):
    recipe.main(arguments(files, "--max_steps", "8", "--baselines", "--tokenizer", tokenizer))
    out = files / "out"
    left = {"model.safetensors", "README.md", "predictions_validation.jsonl", "predictions_validation.json"}
    assert {*left, "highlights_validation.html", "answers_validation.png"} <= {path.name for path in out.iterdir()}
    rows, reader = lines(out / "predictions_validation.jsonl"), pipeline("long-document-question-answering", str(out))
    assert reader.model.config.type_vocab_size == 2
    assert set(reader.tokenizer("a", "b")["token_type_ids"]) == {0, 1}
    for number, row in enumerate(rows):
        asked = example(40 + number)
        assert row["id"] == asked["id"]
        assert row["answer"] == asked["context"][row["start"] : row["end"]]
        answer = reader(asked["question"], asked["context"])
        assert (answer["answer"], answer["start"]) == (row["answer"], row["start"])
        assert answer["score"] == pytest.approx(row["score"], abs=1e-4)
    scores = json.loads((out / "scores.json").read_text())["validation"]
    assert scores["Reformer"]["f1"] == pytest.approx(100 * np.mean([row["f1"] for row in rows]), abs=0.01)
    assert len(scores) == 3
    assert "exact_match" in (out / "README.md").read_text()


def test_a_resumed_run_ends_where_the_whole_one_does(files):
    options = ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "4", "--do_train"]
    options += ["--per_device_train_batch_size", "8"]
    recipe.main(arguments(files, *options))
    resumed = ["--resume_from_checkpoint", str(files / "out" / "checkpoint-4")]
    recipe.main(arguments(files, *options, *resumed, out="resumed"))
    assert len({(files / run / "model.safetensors").read_bytes() for run in ("out", "resumed")}) == 1


@pytest.mark.slow
def test_it_learns(files):
    options = ["--max_steps", "160", "--per_device_train_batch_size", "8", "--learning_rate", "2e-2"]
    recipe.main(arguments(files, *options, "--eval_strategy", "no"))
    assert json.loads((files / "out" / "scores.json").read_text())["validation"]["Reformer"]["f1"] > 60


def test_questions_without_an_answer(files):
    """With a threshold that none reaches and one that all reach."""
    none = {"answers": {"text": [], "answer_start": []}}
    write(files / "train.jsonl", [example(row, **(none if row % 2 else {})) for row in range(16)])
    write(files / "validation.jsonl", [example(row, **(none if row % 2 else {})) for row in range(8)])
    with pytest.raises(ValueError, match=r"Row 1 of the train data has no answer.*--version_2.*train\.jsonl"):
        recipe.main(arguments(files))
    for threshold, empty in (("1e9", False), ("-1e9", True)):
        options = ["--max_steps", "1", "--version_2_with_negative", "--baselines"]
        recipe.main(arguments(files, *options, f"--null_score_diff_threshold={threshold}", out=threshold))
        rows = lines(files / threshold / "predictions_validation.jsonl")
        assert {row["answer"] == "" for row in rows} == {empty}
        scores = json.loads((files / threshold / "scores.json").read_text())["validation"]
        assert set(scores["Reformer"]) == {"exact_match", "f1", "HasAns_exact", "HasAns_f1", "NoAns_f1"}
        assert scores["Reformer"]["NoAns_f1"] == 100 * empty
        assert scores["no answer"]["f1"] == 50


def test_a_test_file_needs_no_answers(files):
    recipe.main(arguments(files, "--max_steps", "1"))
    rows = [{key: x for key, x in example(row).items() if key in ("question", "context")} for row in range(3)]
    test = ["--test_file", write(files / "test.jsonl", rows), "--use_cpu", "--max_length", "128"]
    recipe.main([*test, "--model_name_or_path", str(files / "out"), "--output_dir", str(files / "predicted")])
    assert [row["id"] for row in lines(files / "predicted" / "predictions_test.jsonl")] == ["0", "1", "2"]
    assert json.loads((files / "predicted" / "scores.json").read_text()) == {}


# --- scores


def test_scores_are_those_of_squad():
    assert exact_match("The  Eiffel-Tower!", "eiffeltower") == 1
    assert f1("a cat sat", "the cat ran") == 0.5
    assert f1("", "the") == 1  # neither has a word
    golds = [["Paris", "in Paris"], [], ["ten"]]
    assert score_answers(["in paris", "", "nine"], golds) == pytest.approx(
        {"exact_match": 200 / 3, "f1": 200 / 3, "HasAns_exact": 50, "HasAns_f1": 50, "NoAns_f1": 100}
    )
    assert set(score_answers(["x"], [["x"]])) == {"exact_match", "f1"}


@given(st.text("aB .,the", max_size=12), st.text("aB .,the", max_size=12))
def test_f1_is_symmetric_and_at_least_the_exact_match(a, b):
    assert f1(a, b) == pytest.approx(f1(b, a))
    assert exact_match(a, b) <= f1(a, b) <= 1
    assert f1(a, a) == exact_match(a, a) == 1


def test_baselines_and_kinds_of_questions():
    some = [Example("0", "Where does Ida live?", "Max sings. Ida and Max live in Rio.", [("Rio", 31)])]
    scores = baselines(some, version_2=False)
    assert scores["the whole document"]["f1"] < scores["the sentence most similar to the question (TF-IDF)"]["f1"]
    assert baselines([Example("0", "?", "!", [("!", 0)])], version_2=True) == {}
    kinds = ["Who is it?", "To whom?", "How many are there?", "How?", "Name it."]
    assert list(map(kind_of_question, kinds)) == ["who", "who", "how many", "how", "other"]


# --- places of answers


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@given(
    st.text("aé東 \n.“😀", min_size=1, max_size=30).filter(str.strip),
    st.integers(0, 29),
    st.integers(1, 8),
    st.integers(6, 60),
)
def test_tokens_of_an_answer_stand_for_it(kind, context, start, length, max_length):
    text = context[start : start + length]
    if not text.strip():
        return
    tokenizer = ReformerByteTokenizer() if kind == "bytes" else BPE
    answer, place = recipe.find_answer(context, text, start, "")
    assert context[place : place + len(answer)] == answer == text.strip()
    args = recipe.DataArguments(max_length=max_length)
    found = recipe.tokenize([Example("0", "?", context, [(answer, place)])], tokenizer, args, "validation", False)[0]
    starts, ends = found["char_starts"], found["char_ends"]
    assert len(starts) == len(ends) == found["length"] <= max_length
    first, last = found["start_positions"], found["end_positions"]
    if first == -100:
        assert last == -100
        assert max(ends) < len(context.rstrip())  # cut off
        return
    assert context[starts[first] : ends[last]].strip().startswith(answer[:1])
    assert starts[first] <= place < ends[first]
    assert starts[last] < place + len(answer) <= ends[last]


BPE = train_bpe_tokenizer(["a é 東 “a” 😀 aé"] * 3, 300)


def test_an_answer_is_found_again_at_the_nearest_place():
    context = "one two one two one"
    assert recipe.find_answer(context, "two", 4, "") == ("two", 4)
    assert recipe.find_answer(context, "two", 6, "") == ("two", 4)
    assert recipe.find_answer(context, "two", 10, "") == ("two", 12)
    assert recipe.find_answer(context, "one", None, "") == ("one", 0)
    assert recipe.find_answer(context, " one", 7, "") == ("one", 8)
    assert recipe.find_answer(context, "one", -5, "") == ("one", 0)
    assert recipe.find_answer(context, "one", 999, "") == ("one", 16)
    for wrong, words in (("three", "not in its document"), (" ", "empty answer")):
        with pytest.raises(ValueError, match=f"here has .*{words}|here has an {words}"):
            recipe.find_answer(context, wrong, 0, "here")


def test_answers_that_moved_are_told(caplog):
    rows = [example(0), example(1)]
    rows[1]["answers"]["answer_start"] = [0]
    recipe.make_examples(Dataset.from_list(rows), recipe.DataArguments(), "train")
    assert "1 answers in the train data are not at their `answer_start`" in caplog.text
    assert "row 1" in caplog.text


def test_documents_that_are_cut_are_told(caplog):
    long = example(0, context="x" * 300 + " Rio", answers={"text": ["Rio"], "answer_start": [301]})
    some = recipe.make_examples(Dataset.from_list([long]), recipe.DataArguments(), "train")
    args = recipe.DataArguments(max_length=64)
    assert recipe.tokenize(some, ReformerByteTokenizer(), args, "train", True)["start_positions"] == [-100]
    assert "1 documents of the train data are cut to --max_length 64 tokens; 1 answers lie beyond it" in caplog.text
    some = [some[0]._replace(question="why " * 20)]
    with pytest.raises(ValueError, match=r"Row 0 of the train data has a question of 80 tokens.*leaves no room"):
        recipe.check_questions(some, ReformerByteTokenizer(), 64, "train")


def test_the_reader_ranks_no_answer():
    spans = np.array([[[0, 0], [0, 3], [4, 7], [0, 0]]])
    scores = np.log(
        np.array([[0.2, 0.5, 0.1, 0.0]]) + 0.0, where=[[True, True, True, False]], out=np.full((1, 4), -np.inf)
    )
    for threshold, best in ((None, "one"), (0.0, "one"), (-2.0, "")):
        answers = Reader(threshold).answers("one two", spans[0], scores[0])
        assert answers[0].text == best
        assert {answer.text for answer in answers} == {"one", "two"} | ({""} if threshold is not None else set())


# --- what people bring


def test_squads_own_files_and_csv(tmp_path):
    asked = [example(row) for row in range(4)]
    answers = [[{"text": x["answers"]["text"][0], "answer_start": x["answers"]["answer_start"][0]}] for x in asked]
    paragraphs = [
        {"context": x["context"], "qas": [{"id": x["id"], "question": x["question"], "answers": some}]}
        for x, some in zip(asked, answers, strict=True)
    ]
    paragraphs[0]["qas"][0]["is_impossible"] = False
    nested = {"version": "v2.0", "data": [{"title": "t", "paragraphs": paragraphs}] * 2}
    args = recipe.DataArguments()
    expected = recipe.make_examples(Dataset.from_list(asked), args, "train")
    for value in (nested, {"data": nested["data"]}):
        (tmp_path / "squad.json").write_text(json.dumps(value), encoding="utf-8")
        assert recipe.make_examples(args.read_file(str(tmp_path / "squad.json")), args, "train") == expected * 2
    (tmp_path / "other.json").write_text(json.dumps({"data": [{"x": 1}]}))
    with pytest.raises(ValueError, match="not their articles"):
        args.read_file(str(tmp_path / "other.json"))
    table = "id,question,context,answers\n" + "".join(
        f'{x["id"]},{x["question"]},"{x["context"]}",{x["answers"]["text"][0]}\n' for x in asked
    )
    (tmp_path / "t.csv").write_text("\ufeff" + table, encoding="utf-8")
    assert recipe.make_examples(args.read_file(str(tmp_path / "t.csv")), args, "train") == expected


@pytest.mark.parametrize("text", ["[1]", "{}", "[sic]", '{"text": 1}', '["a"]'])
def test_an_answer_in_brackets_is_a_text_where_the_document_has_it(text):
    rows = Dataset.from_list([{"question": "?", "context": f"As in {text}.", "answers": text}])
    assert recipe.make_examples(rows, recipe.DataArguments(), "train")[0].answers == [(text, 6)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"answers": {"text": ["Mars"], "answer_start": [0]}},
            "Row 2 of the train data has the answer 'Mars'.*not in",
        ),
        ({"answers": {"text": [""], "answer_start": [0]}}, "Row 2 .*empty answer"),
        ({"answers": {"text": ["a", "b"], "answer_start": [0]}}, r"Row 2 .*has the answers.*\"answer_start\": \[13\]"),
        ({"answers": {"text": "Rio", "answer_start": 3}}, "Row 2 .*has the answers"),
        ({"context": " "}, "Row 2 .*no text as `context`"),
        ({"question": None}, "Row 2 .*no text as `question`"),
    ],
)
def test_rows_that_cannot_be_learnt_are_refused_with_file_and_row(files, changes, words):
    write(files / "train.jsonl", [example(0), example(1), example(2, **changes)])
    with pytest.raises(ValueError, match=f"{words}.*train\\.jsonl"):
        recipe.main(arguments(files))
    assert not (files / "out" / "model.safetensors").exists()


def test_files_that_cannot_be_read_are_refused(files):
    rows = json.dumps(example(0), ensure_ascii=False) + "\n"
    for text, words in (
        (b"", "is empty"),
        (rows.encode().replace(b"lives", b"li\0es"), "character 45 is NUL"),
        (rows.replace("東京", "é").encode("cp1252", "replace"), "not valid UTF-8 text"),
        (rows.replace('"title"', '"id"').encode(), r"several values called \['id'\]"),
        (rows.replace('"context"', '"text"').encode(), "no column .*context.*--context_column"),
        (("x" * 3_000_000).encode(), "line 1, is not valid JSON"),
    ):
        (files / "train.jsonl").write_bytes(text)
        with pytest.raises(ValueError, match=words):
            recipe.main(arguments(files))


def test_label_smoothing_is_refused():
    with pytest.raises(ValueError, match="--label_smoothing_factor does nothing"):
        recipe.main(["--train_file", "nowhere.json", "--label_smoothing_factor", "0.1"])


def test_a_long_line_is_a_long_document(files):
    context = "So it is. " * 100_000 + "Ida lives in Rio."
    some = [example(0, context=context, answers={"text": ["Rio"], "answer_start": [context.index("Rio")]})]
    data = recipe.DataArguments(train_file=write(files / "long.jsonl", some))
    assert recipe.make_examples(data.read()["train"], data, "train")[0].answers == [("Rio", 1_000_013)]


def test_a_tokenizer_of_the_run_is_the_pipelines(files):
    recipe.main(arguments(files, "--max_steps", "1", "--eval_strategy", "no"))
    assert AutoTokenizer.from_pretrained(files / "out").model_max_length == 128
