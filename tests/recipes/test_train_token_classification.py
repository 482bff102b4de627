"""The token-classification recipe: column files and tables, scores of entities, whole runs, and bad inputs."""

import json
import random

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st
from transformers import pipeline

from hf_reformer import ReformerByteTokenizer
from hf_reformer.data.bpe_tokenizer import train_bpe_tokenizer
from hf_reformer.data.column_files import read_column_file
from hf_reformer.recipes import token_classification as recipe
from hf_reformer.training.token_classification import TagScores, entity_spans, marks_entities, most_frequent_labels

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = [
    *("--tokenizer", "train", "--tokenizer_vocab_size", "300", "--hidden_size", "16", "--attn_layers", "local", "lsh"),
    *("--num_attention_heads", "1", "--attention_head_size", "16", "--feed_forward_size", "16", "--num_hashes", "1"),
    *("--config_overrides", "lsh_window=16,local_window=16", "--max_length", "64", "--learning_rate", "2e-2"),
    *("--use_cpu", "--disable_tqdm", "True", "--logging_steps", "1", "--save_strategy", "no"),
]
PEOPLE, PLACES = ["Zoë", "Ida", "Max Müller"], ["Oslo", "東京", "New York"]


def sentence(row: int) -> tuple[list[str], list[str]]:
    draw = random.Random(row)
    words, tags = [], []
    for name, kind in ((draw.choice(PEOPLE), "PER"), ("lives in", ""), (draw.choice(PLACES), "LOC"), (".", "")):
        for i, word in enumerate(name.split()):
            words.append(word)
            tags.append(f"{'I' if i else 'B'}-{kind}" if kind else "O")
    return words, tags


def columns(rows) -> str:
    return "\n".join("".join(f"{w} x {t}\n" for w, t in zip(*sentence(row), strict=True)) for row in rows)


@pytest.fixture
def files(tmp_path):
    """train.conll and validation.jsonl."""
    (tmp_path / "train.conll").write_text("-DOCSTART- -X- O\n\n" + columns(range(24)), encoding="utf-8")
    rows = [dict(zip(("1", "3"), sentence(row), strict=True)) for row in range(30, 38)]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def arguments(folder, *more, out="out"):
    files = ["--train_file", str(folder / "train.conll"), "--validation_file", str(folder / "validation.jsonl")]
    return [*TINY, *files, "--output_dir", str(folder / out), *more]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("tokenizer", ["train", "bytes"])
def test_a_run_leaves_a_model_whose_pipeline_gives_the_same_labels(files, tokenizer):
    recipe.main(
        arguments(files, "--max_steps", "16", "--eval_strategy", "no", "--baselines", "--tokenizer", tokenizer)
    )
    out = files / "out"
    left = {"model.safetensors", "README.md", "predictions_validation.jsonl", "confusion_matrix_validation.png"}
    assert {*left, "highlights_validation.html"} <= {path.name for path in out.iterdir()}
    labeller = pipeline("token-classification", str(out), ignore_labels=[])
    for row in lines(out / "predictions_validation.jsonl"):
        assert len(row["words"]) == len(row["labels"]) == len(row["predictions"])
        tokens, start = labeller(" ".join(row["words"])), 0
        for word, label in zip(row["words"], row["predictions"], strict=True):
            assert next(x["entity"] for x in tokens if x["end"] > start) == label
            start += len(word) + 1
    scores = json.loads((out / "scores.json").read_text())
    assert set(scores["validation"]["Reformer"]) == {"precision", "recall", "f1", "accuracy"}
    assert scores["validation"]["most frequent label of each word"]["f1"] > 0.9
    assert set(scores["validation, by entity"]) == {"LOC", "PER"}
    assert json.loads((out / "config.json").read_text())["id2label"]["0"] == "O"
    assert "by entity" in (out / "README.md").read_text()


def test_a_saved_model_labels_words_without_labels_and_keeps_its_own(files):
    recipe.main(arguments(files, "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "4"))
    resumed = ["--max_steps", "6", "--resume_from_checkpoint", str(files / "out" / "checkpoint-4")]
    recipe.main(arguments(files, *resumed, out="resumed"))
    assert len({(files / run / "model.safetensors").read_bytes() for run in ("out", "resumed")}) == 1
    (files / "test.txt").write_text("Ida\nsings\n\nMax\n")
    saved = ["--model_name_or_path", str(files / "out"), "--use_cpu", "--max_length", "64"]
    recipe.main([*saved, "--test_file", str(files / "test.txt"), "--output_dir", str(files / "predicted")])
    rows = lines(files / "predicted" / "predictions_test.jsonl")
    assert [row["words"] for row in rows] == [["Ida", "sings"], ["Max"]]
    assert all(set(row) == {"words", "predictions"} for row in rows)
    (files / "train.conll").write_text("Ida x B-PER\n\nOslo x B-LOC\n")  # fewer labels, in another order
    recipe.main(arguments(files, "--max_steps", "1", *saved[:2], "--do_train", out="more"))
    configs = [json.loads((files / run / "config.json").read_text()) for run in ("out", "more")]
    assert configs[0]["id2label"] == configs[1]["id2label"]


# --- words and tokens

WORDS = st.lists(st.text("aé東.😀", min_size=1, max_size=4), min_size=1, max_size=8)
BPE = train_bpe_tokenizer(["a é 東 .a 😀 aé"] * 3, 300)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@given(WORDS, st.integers(3, 60))
def test_the_first_token_of_a_word_carries_its_label(kind, words, max_length):
    tokenizer = ReformerByteTokenizer() if kind == "bytes" else BPE
    names = ["O", *(str(i) for i in range(len(words)))]
    sentences = recipe.Sentences([words], [names[1:]])
    row = recipe.tokenize(sentences, names, tokenizer, max_length, "validation")[0]
    assert row["length"] == len(row["input_ids"]) <= max_length
    text, start = " ".join(words), 0
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    for number, (word, first) in enumerate(zip(words, row["first"], strict=True), start=1):
        if first >= 0:
            assert offsets[first][0] <= start < offsets[first][1] <= max(start + len(word), start + 1)
            assert row["labels"][first] == number
        start += len(word) + 1
    assert sum(label >= 0 for label in row["labels"]) == sum(first >= 0 for first in row["first"])
    assert row["first"][0] >= 0 or max_length < 4


def test_spaces_that_are_tokens_belong_to_the_entity_around_them():
    """A pipeline takes them for words."""
    words, tags = ["Max", "Lo", "in", "Rio", "now"], ["B-PER", "I-PER", "O", "B-LOC", "O"]
    names = ["O", "B-PER", "I-PER", "B-LOC"]
    for split, spaces in (("train", [2, 0, 0, 0]), ("validation", [-100] * 4)):
        row = recipe.tokenize(recipe.Sentences([words], [tags]), names, ReformerByteTokenizer(), 64, split)[0]
        assert [row["labels"][i] for i, character in enumerate(" ".join(words)) if character == " "] == spaces
    assert recipe.space_label(["NOUN", "VERB"], ["NOUN", "VERB"]) == "NOUN"


def test_words_behind_the_end_are_told(caplog):
    sentences = recipe.Sentences([["abc"] * 30], [["X"] * 30])
    row = recipe.tokenize(sentences, ["O", "X"], ReformerByteTokenizer(), 40, "train")[0]
    assert row["first"].count(-1) == 20
    assert "1 texts in the train data are truncated to --max_length 40 tokens; 20 words lie beyond it" in caplog.text


# --- scores


def test_scores_of_entities_and_of_words():
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-PER"]]
    found = [["B-PER", "O", "O", "B-LOC"], ["O", "B-PER"]]
    scores = TagScores(["O", "B-PER", "I-PER", "B-LOC"])
    assert scores.score(true, found) == pytest.approx(
        {"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "accuracy": 5 / 6}
    )
    assert scores.by_entity(true, found)["LOC"] == {"precision": 1, "recall": 1, "f1": 1, "number": 1}
    words = TagScores(["NOUN", "VERB"])
    assert not marks_entities(words.names)
    assert words.score([["NOUN", "VERB"]], [["NOUN", "NOUN"]]) == pytest.approx({"accuracy": 0.5, "f1": 1 / 3})
    assert words.by_entity(true, found) == {}
    assert entity_spans(["Max", "Müller", "ok"], ["B-PER", "I-PER", "O"], True) == [(0, 10, "PER")]


SPANS = st.lists(st.tuples(st.sampled_from("AB"), st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=5)


def tags_of(spans, scheme: str) -> list[str]:
    """Spans (type, size, words behind it) in BIO, BIOES or BILOU."""
    begin, inside, last, single = {"BIO": "BIIB", "BIOES": "BIES", "BILOU": "BILU"}[scheme]
    found = []
    for kind, size, gap in spans:
        marks = single if size == 1 else begin + inside * (size - 2) + last
        found += [f"{mark}-{kind}" for mark in marks] + ["O"] * gap
    return found


@given(SPANS, SPANS)
def test_entities_and_scores_are_the_same_in_every_scheme(true, found):
    seen = []
    for scheme in ("BIO", "BIOES", "BILOU"):
        a, b = tags_of(true, scheme), tags_of(found, scheme)
        a, b = (tags + ["O"] * (max(len(a), len(b)) - len(tags)) for tags in (a, b))
        names = sorted({*a, *b})
        scores = TagScores(names)
        entities = {name: x for name, x in scores.score([a], [b]).items() if name != "accuracy"}
        seen.append((entities, scores.by_entity([a], [b]), entity_spans(["w"] * len(a), a, True)))
    assert seen[0] == seen[1] == seen[2]
    assert [kind for *_, kind in seen[0][2]] == [kind for kind, *_ in true]


def test_words_that_are_cut_off_are_outside_or_what_is_most_frequent():
    train = recipe.Sentences([["a"] * 3], [["X", "Y", "Y"]])
    assert recipe.cut_off_label(["B-X", "O"], train) == "O"
    assert recipe.cut_off_label(["X", "Y"], train) == "Y"
    assert recipe.cut_off_label(["X", "Y"], None) == "X"


def test_the_baseline_knows_words():
    words, tags = [["a", "a", "a", "b"]], [["X", "Y", "Y", "X"]]
    assert most_frequent_labels(words, tags, [["a", "b", "new"]]) == [["Y", "X", "X"]]


# --- what people bring


def test_column_files(tmp_path):
    file = tmp_path / "t.conll"
    file.write_text("\ufeff# a comment of words\na\tA\n#\tO\n\n\n  \nb c\tB\n", encoding="utf-8")
    assert read_column_file(file).to_dict() == {"1": [["a", "#"], ["b c"]], "2": [["A", "O"], ["B"]]}
    for comment in ("# id 3", "# id", "#", "# id = 3"):  # of as many columns, or others; at the beginning, or later
        file.write_text(f"{comment}\na x O\n# x O\n\n{comment}\n# x O\nb\tx \t O\n")
        assert read_column_file(file).to_dict() == {
            "1": [["a", "#"], ["#", "b"]],
            "2": [["x"] * 2] * 2,
            "3": [["O"] * 2] * 2,
        }
    for text, words in (
        ("a B\nb\n", "line 2: there are 1 columns, but the first one has 2"),
        ("", "holds no words"),
        ("\n\n", "holds no words"),
        ("a\0 B\n", "NUL"),
        ("word " * 500_000, "line 1: there are 500,000 columns, but that is no list of words"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_column_file(file)
    file.write_bytes("é X\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not valid UTF-8 text"):
        read_column_file(file)


def test_columns_are_found_by_their_names():
    def found(names, split="train", **options):
        dataset = Dataset.from_dict({name: [["x"]] for name in names})
        return recipe.find_word_columns(dataset, recipe.DataArguments(**options), split)

    assert found(["id", "tokens", "pos_tags", "ner_tags"]) == ("tokens", "ner_tags")
    assert found(["id", "tokens", "pos_tags", "ner_tags"], task_name="pos") == ("tokens", "pos_tags")
    assert found(["words", "labels"]) == ("words", "labels")
    assert found(["1", "2", "3"]) == ("1", "3")
    assert found(["1", "2", "3"], label_column="2") == ("1", "2")
    assert found(["1"]) == ("1", None)
    with pytest.raises(ValueError, match=r"Which column.*--text_column"):
        found(["a", "b"])
    with pytest.raises(ValueError, match="no column `x`"):
        found(["tokens"], label_column="x")
    assert found(["tokens"], "test", label_column="x") == ("tokens", "x")  # which needs no labels
    rows = Dataset.from_dict({"tokens": [["a"]]})
    assert recipe.read_sentences(rows, "tokens", "x", "test") == ([["a"]], None)


def test_class_labels_keep_their_names_and_order(caplog):
    names = ["B-X", "O", "I-X"]
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))})
    rows = Dataset.from_dict({"tokens": [["a", "b"]] * 2, "ner_tags": [[1, 0], [1, 1]]}, features=features)
    sentences = recipe.read_sentences(rows, "tokens", "ner_tags", "train")
    assert sentences.tags == [["O", "B-X"], ["O", "O"]]
    assert recipe.names_of_labels(sentences, rows, "ner_tags", None) == names
    assert recipe.names_of_labels(sentences, rows, "ner_tags", ["B-X", "O"]) == ["B-X", "O"]
    ints = Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[1, 0]]})
    sentences = recipe.read_sentences(ints, "tokens", "ner_tags", "train")
    assert sentences.tags == [["1", "0"]]
    assert "numbers without names" not in caplog.text
    assert recipe.names_of_labels(sentences, ints, "ner_tags", None) == ["0", "1"]
    assert "numbers without names" in caplog.text


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tokens": ["a"], "tags": ["O", "O"]}, "Row 1 of the train data has 1 words, but 2 labels"),
        ({"tokens": [], "tags": []}, "Row 1 of the train data has no list of words"),
        ({"tokens": ["", "a"], "tags": ["O", "O"]}, "Row 1 of the train data: word 0 is ''"),
        ({"tokens": ["a", "b"], "tags": ["O", None]}, "Row 1 of the train data: word 1 has no label"),
        ({"tokens": ["a"], "tags": None}, "Row 1 of the train data has 1 words, but 'None' as labels"),
        ({"tokens": ["a"], "tags": ["O"]}, r"same label, \['O'\]"),
    ],
)
def test_rows_that_cannot_be_learnt_are_refused_with_file_and_row(tmp_path, row, words):
    rows = [{"tokens": ["x"], "tags": ["O"]}, row]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    with pytest.raises(ValueError, match=f"{words}.*train\\.jsonl"):
        recipe.main([*TINY, "--train_file", str(tmp_path / "train.jsonl"), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_label_column_of_numbers_is_refused():
    rows = Dataset.from_dict({"tokens": [["a"]], "tags": [3]})
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=f"Row 0 of the {split} data has 1 words, but '3' as labels"):
            recipe.read_sentences(rows, "tokens", "tags", split)


def test_labels_that_differ_between_files_are_refused(files):
    (files / "validation.jsonl").write_text(json.dumps({"1": ["a"], "3": ["B-DATE"]}) + "\n")
    with pytest.raises(ValueError, match=r"Row 0 of the validation data.*B-DATE.*validation\.jsonl"):
        recipe.main(arguments(files))
    (files / "validation.jsonl").write_text(json.dumps({"1": ["a"], "2": ["O"]}) + "\n")
    with pytest.raises(ValueError, match=r"no column \['3'\].*--label_column"):
        recipe.main(arguments(files))
    (files / "validation.csv").write_text("1,3\na,O\n")
    with pytest.raises(ValueError, match=r"no list of words.*validation\.csv"):
        recipe.main(arguments(files, "--validation_file", str(files / "validation.csv")))
