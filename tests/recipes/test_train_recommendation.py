"""The recommendation recipe: tables of interactions, what is held out, ranks and scores, whole runs, bad inputs."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_reformer.data.interactions import find_interaction_columns, read_histories, read_interactions, read_titles
from hf_reformer.recipes import recommendation as recipe
from hf_reformer.training.recommendation import (
    MISSED,
    UNKNOWN,
    baseline_ranks,
    baseline_scorers,
    item_tokenizer,
    nearby_order,
    ranks_of,
    scores_at,
)

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = [
    *("--hidden_size", "16", "--attn_layers", "local", "--num_attention_heads", "1", "--attention_head_size", "16"),
    *("--feed_forward_size", "16", "--use_cpu", "--disable_tqdm", "True", "--save_strategy", "no"),
    *("--max_length", "12", "--top_k", "5", "2"),
]


def users(count: int = 12) -> dict[str, list[str]]:
    """Users who went on from item to item, around a circle of 15; the first one had a single item."""
    draw = random.Random(0)
    starts = [(draw.randrange(15), draw.randint(4, 14)) for _ in range(count)]
    return {
        "u0": ["3"],
        **{f"u{i + 1}": [str((a + n) % 15) for n in range(length)] for i, (a, length) in enumerate(starts)},
    }


def write_inter(path, histories) -> str:
    rows = [(user, item, 1000 + n) for user, items in histories.items() for n, item in enumerate(items)]
    random.Random(1).shuffle(rows)
    text = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    path.write_text(text + "".join(f"{user}\t{item}\t3.5\t{time}\n" for user, item, time in rows))
    return str(path)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def files(tmp_path):
    """a.inter and a.item."""
    write_inter(tmp_path / "a.inter", users())
    titles = "".join(f'{i}\tThe "{i}"\n' for i in range(15))
    (tmp_path / "a.item").write_text("item_id:token\tmovie_title:token_seq\n" + titles)
    return tmp_path


def arguments(folder, *more, out="out"):
    return [*TINY, "--train_file", str(folder / "a.inter"), "--output_dir", str(folder / out), *more]


def test_a_run_leaves_a_model_that_recommends_what_the_report_says(files):
    recipe.main(arguments(files, "--item_file", str(files / "a.item"), "--max_steps", "6", "--baselines"))
    out = files / "out"
    left = {"model.safetensors", "README.md", "predictions_validation.jsonl", "recommendations_validation.png"}
    assert left <= {path.name for path in out.iterdir()}
    rows, had = lines(out / "predictions_validation.jsonl"), users()
    assert sorted(row["user_id"] for row in rows) == sorted(user for user, items in had.items() if len(items) > 1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    for row in rows:
        history = had[row["user_id"]][:-1]
        assert row["true"]["item_id"] == had[row["user_id"]][-1]
        assert [item["item_id"] for item in row["last"]] == history[-5:]
        best = [item["item_id"] for item in row["recommended"]]
        assert not {*best} & {*history}
        assert all(item["title"] == f'The "{item["item_id"]}"' for item in row["recommended"])
        if row["rank"] <= 5:
            assert best[int(row["rank"]) - 1] == row["true"]["item_id"]
        inputs = tokenizer(" ".join(history[-11:]), return_tensors="pt")
        if len(history) < 12:  # what is read begins with <s>
            options = {"max_new_tokens": 1, "num_beams": len(best), "num_return_sequences": len(best)}
            written = model.generate(**inputs, **options)[:, -1]
            assert tokenizer.convert_ids_to_tokens(written) == best
    scores = json.loads((out / "scores.json").read_text())["validation"]
    assert list(scores["Reformer"]) == ["hr@2", "ndcg@2", "mrr@2", "hr@5", "ndcg@5", "mrr@5"]
    assert scores["Reformer"] == pytest.approx(scores_at(np.array([row["rank"] for row in rows]), [2, 5]))
    assert len(scores) == 4


def test_a_saved_model_recommends_to_the_users_of_a_file(files):
    recipe.main(arguments(files, "--item_file", str(files / "a.item"), "--max_steps", "1", "--eval_strategy", "no"))
    asked = [
        {"user_id": "new", "item_ids": [1, 2]},
        {"user_id": "none", "item_ids": []},
        {"user_id": 7, "item_ids": [99]},
    ]
    saved = ["--model_name_or_path", str(files / "out"), "--predict_file", write(files / "users.jsonl", asked)]
    recipe.main([*TINY, *saved, "--output_dir", str(files / "predicted")])
    rows = lines(files / "predicted" / "predictions_predict.jsonl")
    assert [row["user_id"] for row in rows] == ["new", "none", "7"]
    assert all(len(row["recommended"]) == 5 and "title" in row["recommended"][0] for row in rows)
    assert not {"1", "2"} & {item["item_id"] for item in rows[0]["recommended"]}
    assert json.loads((files / "predicted" / "scores.json").read_text()) == {}


def test_a_resumed_run_ends_where_the_whole_one_does(files):
    options = ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "4", "--do_train"]
    options += ["--per_device_train_batch_size", "2", "--item_dropout", "0.5", "--reorder", "3"]
    recipe.main(arguments(files, *options))
    resumed = ["--resume_from_checkpoint", str(files / "out" / "checkpoint-4")]
    recipe.main(arguments(files, *options, *resumed, out="resumed"))
    assert len({(files / run / "model.safetensors").read_bytes() for run in ("out", "resumed")}) == 1


@pytest.mark.slow
def test_it_learns(files):
    recipe.main(arguments(files, "--max_steps", "150", "--learning_rate", "2e-2", "--eval_strategy", "no"))
    assert json.loads((files / "out" / "scores.json").read_text())["validation"]["Reformer"]["hr@2"] > 0.8


# --- what is held out


def loaded(files, *parts, **options):
    data = recipe.DataArguments(train_file=str(files / "a.inter"), **options)
    data.wanted = parts
    return recipe.load_users(data)


@pytest.mark.parametrize("parts", [("train", "validation"), ("train", "validation", "test"), ("train", "test")])
def test_what_is_held_out_is_never_seen_before(files, parts):
    train, held = loaded(files, *parts)
    whole = users()
    assert set(held) == {*parts} - {"train"}
    seen = {user: list(items) for user, items in train.items()}
    for split in [part for part in ("validation", "test") if part in parts]:
        for user in held[split]:
            assert user.history == seen[user.id]
            assert user.target not in user.history
            seen[user.id].append(user.target)
    assert seen == whole
    ids = {id: number for number, id in enumerate(["x", "y", "z", *map(str, range(15))])}
    tokens = recipe.encode_training(list(train.values()), item_tokenizer([*ids][3:], 12), 12)
    targets = [[label for label in row if label != -100] for row in tokens["labels"]]
    assert sum(map(len, targets)) == sum(map(len, train.values()))
    for user, items in train.items():
        if len(items) < 12:
            assert [ids[item] for item in items] in targets, user


def test_a_validation_file_names_the_next_item(files):
    whole = users()
    rows = [{"user_id": "u1", "target_item_id": 14}, {"user_id": "new", "item_ids": ["2", "3"], "target_item_id": "4"}]
    rows += [{"user_id": "u2", "target_item_id": whole["u2"][0]}]  # had before
    train, held = loaded(files, "train", "validation", validation_file=write(files / "v.jsonl", rows))
    assert train == whole
    had_before = "14" in whole["u1"]
    expected = [] if had_before else [("u1", whole["u1"], "14")]
    assert held["validation"] == [*expected, ("new", ["2", "3"], "4")]
    later = write_inter(files / "later.inter", {"u1": ["x", "y"]})
    assert loaded(files, "train", "validation", validation_file=later)[1]["validation"] == [
        ("u1", [*whole["u1"], "x"], "y")
    ]


# --- tables


def test_all_forms_of_a_table_are_one(tmp_path):
    whole = users(4)
    rows = [
        {"userId": user, "movieId": int(item), "time": 50 + n}
        for user, items in whole.items()
        for n, item in enumerate(items)
    ]
    random.Random(3).shuffle(rows)
    by_user = [{"user_id": u, "item_ids": x[::-1], "timestamps": [*range(len(x))][::-1]} for u, x in whole.items()]
    csv = "userId,movieId,time\n" + "".join(
        f"{x['userId']},{x['movieId']},2024-05-01 12:{x['time'] - 50:02}:00\n" for x in rows
    )
    (tmp_path / "c.csv").write_text("\ufeff" + csv)
    nested = "user_id,item_ids\n"
    nested += "".join(f'{user},"{json.dumps(list(map(int, items)))}"\n' for user, items in whole.items())
    (tmp_path / "n.csv").write_text(nested)
    paths = [write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.json", by_user), tmp_path / "c.csv"]
    paths += [tmp_path / "n.csv", write_inter(tmp_path / "a.inter", whole)]
    for path in paths:
        table = read_interactions(path)
        found = read_histories(table, find_interaction_columns(table), "train")
        assert {user: found.items[user] for user in sorted(found.items)} == whole, path


def test_ties_and_repeats_and_ids(tmp_path, caplog):
    rows = [("a", 1.0, 5), ("a", "x y", 5), ("a", 1, 7), ("a", "0", 1)]
    table = read_interactions(
        write(tmp_path / "a.jsonl", [dict(zip(("user", "item", "time"), r, strict=True)) for r in rows])
    )
    assert read_histories(table, find_interaction_columns(table), "train").items == {"a": ["0", "1.0", "x y", "1"]}
    rows = [{"user": 1.0, "item": item, "time": time} for item, time in ((7, 5), (8, 5), (7, 9), (9, 1))]
    table = read_interactions(write(tmp_path / "b.jsonl", rows))
    assert read_histories(table, find_interaction_columns(table), "train").items == {"1": ["9", "7", "8"]}
    assert "1 interactions of the train data are with an item that the user had before" in caplog.text
    tokenizer = item_tokenizer(["x y", "z"], 8)
    assert tokenizer("x y\nz\nnew")["input_ids"] == [1, 3, 4, 2]
    tokenizer.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("z\nx y")["input_ids"] == [1, 4, 3]
    assert item_tokenizer(["12", "7"], 8)("7  12")["input_ids"] == [1, 4, 3]


def test_titles(tmp_path):
    (tmp_path / "i.csv").write_text("movieId,title\n1, A  film \n2,\n")
    assert read_titles(str(tmp_path / "i.csv")) == {"1": "A film"}
    (tmp_path / "j.csv").write_text("movieId,year\n1,2\n")
    with pytest.raises(ValueError, match=r"must have the columns `item_id` and `title`; its columns are `movieId`"):
        read_titles(str(tmp_path / "j.csv"))


# --- ranks and scores


@given(st.lists(st.integers(0, 3), min_size=2, max_size=9), st.data())
def test_ranks_are_those_of_sorting(scores, data):
    target = data.draw(st.integers(0, len(scores) - 1))
    places = [place for place, score in enumerate(sorted(scores, reverse=True), 1) if score == scores[target]]
    assert ranks_of(np.array([scores], float), np.array([target]))[0] == np.mean(places)


def test_scores_are_counted_by_hand():
    found = scores_at(np.array([1, 3, 10, MISSED]), [1, 3])
    assert found == pytest.approx(
        {
            "hr@1": 1 / 4,
            "ndcg@1": 1 / 4,
            "mrr@1": 1 / 4,
            "hr@3": 2 / 4,
            "ndcg@3": (1 + 1 / 2) / 4,
            "mrr@3": (4 / 3) / 4,
        }
    )


def test_baselines_are_counted_by_hand():
    histories = [np.array(x) for x in ([0, 1, 2], [0, 1, 3], [1, 3])]
    popularity, knn, near = baseline_scorers(histories, 5).values()
    had = np.array([0, 1])
    assert popularity(had).tolist() == [2, 3, 1, 2, 0]
    assert near(had) == pytest.approx([2, 1, 1.5, 2.5, 0], abs=1e-6)  # half as much by the item before
    users_of = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 1, 1], [0, 0, 0]], float)
    norms = np.maximum(np.linalg.norm(users_of, axis=1), 1)
    cosine = (users_of @ users_of.T) / norms / norms[:, None]
    assert knn(had) == pytest.approx(cosine[had].sum(0), abs=1e-6)
    assert baseline_ranks(near, [had, had], np.array([2, UNKNOWN])).tolist() == [2, MISSED]


def test_a_saved_model_keeps_its_embeddings_and_a_new_one_may_begin_at_random(files, monkeypatch):
    begun = []
    monkeypatch.setattr(recipe, "initialize_embeddings", lambda model, histories, window: begun.append(len(histories)))
    recipe.main(arguments(files, "--max_steps", "1"))
    assert begun == [len(users())]
    saved = ["--model_name_or_path", str(files / "out"), "--do_train"]
    recipe.main(arguments(files, *saved, "--max_steps", "1", out="again"))
    recipe.main(arguments(files, "--neighbor_init", "False", "--max_steps", "1", out="random"))
    assert len(begun) == 1


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=4),
       st.sampled_from([0.0, 0.5, 1.0, 3.0, 20.0]))  # fmt: skip
def test_items_move_among_their_neighbors_alone(rows, distance):
    """Before and behind them nothing moves, and no item gets further than `distance`."""
    items = torch.zeros(len(rows), max(map(sum, rows)), dtype=torch.bool)
    for row, (before, count, _) in zip(items, rows, strict=True):
        row[before : before + count] = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        order = nearby_order(items, distance)
    places = torch.arange(items.shape[1]).expand(items.shape)
    assert torch.equal(order.sort(dim=1).values, places)
    assert torch.equal(items.gather(1, order), items)
    assert torch.equal(order[~items], places[~items])
    assert not ((order - places).abs() > distance).any()


def test_items_do_move():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        order = nearby_order(torch.ones(1, 1000, dtype=torch.bool), 5.0)
    moves = (order - torch.arange(1000)).abs()
    assert 0.5 < moves.float().mean() < 2.5
    assert 3 <= moves.max() <= 5


def test_a_trainer_ranks_all_but_what_the_user_had(files, monkeypatch):
    """Against a plain forward of the saved model."""
    recipe.main(arguments(files, "--max_steps", "1", "--eval_strategy", "no"))
    model, tokenizer = (x.from_pretrained(files / "out") for x in (AutoModelForCausalLM, AutoTokenizer))
    row = lines(files / "out" / "predictions_validation.jsonl")[0]
    history = users()[row["user_id"]][:-1]
    ids = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(history)][-12:]
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    scores[:3] = -torch.inf
    scores[tokenizer.convert_tokens_to_ids(history)] = -torch.inf
    target = tokenizer.convert_tokens_to_ids(row["true"]["item_id"])
    assert row["rank"] == int((scores > scores[target]).sum()) + 1
    assert row["recommended"][0]["score"] == pytest.approx(float(scores.max()), abs=1e-3)


# --- what cannot work


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (
            [{"user": 1, "item": 2, "time": 3}, {"user": None, "item": 2, "time": 3}],
            r"Row 1 .*no id as `user`.*a\.jsonl",
        ),
        ([{"user": 1, "item": " ", "time": 3}], r"Row 0 .*no id as `item`.*a\.jsonl"),
        ([{"user": 1, "item": 2, "time": "soon"}], r"Row 0 .*'soon' as `time`, where a number or a date.*a\.jsonl"),
        ([{"user": 1, "item": [1, 2], "time": [3]}], r"Row 0 .*2 items in `item`, but in `time` 1.*a\.jsonl"),
        ([{"user": 1, "item": "[1, 2", "time": None}], r"Row 0 .*not valid JSON.*a\.jsonl"),
        ([{"who": 1, "item": 2}], r"Which column holds the users.*`who`, `item`.*--user_column.*a\.jsonl"),
        ([{"user": 1, "x": 2}], r"Which column holds the items.*--item_column"),
        (
            [{"user": 1, "item": 2, "time": 3}, {"user": 2, "item": 2, "time": 3}],
            "No user has two items.*--user_column",
        ),
        (
            [{"user": 1, "item": item, "time": item} for item in ("<s>", "b", "c")],
            "name as a special token|no id|'<s>'",
        ),
    ],
)
def test_tables_that_cannot_be_learnt_are_refused_with_file_and_row(tmp_path, rows, words):
    train = ["--train_file", write(tmp_path / "a.jsonl", rows), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=words):
        recipe.main([*TINY, *train])
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_files_that_are_no_tables(tmp_path):
    for text, words in (
        (b"", "holds no row"),
        (b"user_id:token\titem_id:token\n1\t2\t3\n", r"line 2: there are 3 cells.*names 2 columns.*Tabs"),
        (b"user_id:token\tuser_id:token\n1\t2\n", r"several columns called \['user_id'\]"),
        (b"user_id:token\titem_id:token\n1\t\0\n", "NUL"),
        (b"user_id:token\titem_id:token\n1\t\xe9\n", "not valid UTF-8 text"),
    ):
        (tmp_path / "a.inter").write_bytes(text)
        with pytest.raises(ValueError, match=words):
            recipe.main([*TINY, "--train_file", str(tmp_path / "a.inter")])


def test_unknown_items_are_told_and_missed(files, caplog):
    rows = [{"user_id": "u1", "item_ids": ["new"], "target_item_id": "newer"}]
    unknown = ["--validation_file", write(files / "v.jsonl", rows)]
    with pytest.raises(ValueError, match=r"No item to be recommended.*'newer'.*v\.jsonl"):
        recipe.main(arguments(files, *unknown))
    rows.append({"user_id": "u0", "item_ids": [], "target_item_id": "5"})
    write(files / "v.jsonl", rows)
    recipe.main(arguments(files, *unknown, "--max_steps", "1", "--baselines"))
    assert "1 of 2 items to be recommended in the validation data were not in the training data" in caplog.text
    assert lines(files / "out" / "predictions_validation.jsonl")[0]["rank"] is None
    assert json.loads((files / "out" / "scores.json").read_text())["validation"]["popularity"]["hr@5"] <= 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--tokenizer", "bytes"], "what is read here are items"),
        (["--top_k", "0"], "--top_k 0: give numbers of at least 1"),
        (["--max_length", "1"], "--max_length 1 leaves no item"),
        (["--item_dropout", "1"], "item_dropout 1.0 must be"),
        (["--reorder", "-1"], "reorder -1.0 must be"),
        (["--reorder", "inf"], "reorder inf must be"),
        (["--item_file", "nowhere.csv"], "--item_file: there is no file"),
        (["--predict_file", "nowhere.csv"], "--predict_file: there is no file"),
        (["--user_column", "a", "--item_column", "a"], "both name the column"),
    ],
)
def test_options_that_cannot_work(files, options, words):
    with pytest.raises(ValueError, match=words):
        recipe.main(arguments(files, *options))
