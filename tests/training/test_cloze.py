"""Cloze questions: answers where they are said to be, questions of the words beside them, and whole runs."""

import json
import random
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from hf_reformer import ReformerByteTokenizer
from hf_reformer.data.bpe_tokenizer import train_bpe_tokenizer
from hf_reformer.models.losses import IGNORE
from hf_reformer.recipes import question_answering as recipe
from hf_reformer.training.cloze import AROUND, LONGEST, cloze_examples, cut

pytestmark = pytest.mark.usefixtures("undrawn")
TEXT = "Zoë Ädler lives in Zürich, by the lake. Dr. Max sells 1,000 apples! “Yes”, they say in 東京. No."


@given(st.lists(st.text("ab .,!é東\n", max_size=80), min_size=1, max_size=4), st.integers(0, 9))
def test_answers_are_spans_and_questions_the_words_beside_them(passages, seed):
    passages.append("a b é")
    found = cloze_examples(passages, 20, seed)
    assert len(found) == 20
    for example in found:
        ((answer, start),) = example.answers
        assert example.context in passages
        assert answer == answer.strip() != ""
        assert example.context[start : start + len(answer)] == answer
        assert len(answer.split()) <= LONGEST
        before, after = example.context[:start], example.context[start + len(answer) :]
        words = example.question.removesuffix("?").split(" ")
        assert 1 <= len(words) <= 2 * AROUND[1]
        assert any(  # in their order, the answer left out
            _in_order(words[:n], before) and _in_order(words[n:], after) for n in range(len(words) + 1)
        )


def _in_order(words, text) -> bool:
    for word in words:
        place = text.find(word)
        if place < 0:
            return False
        text = text[place + len(word) :]
    return True


def test_questions_keep_to_a_sentence_and_answers_cross_no_punctuation():
    for example in cloze_examples([TEXT], 300, 0):
        ((answer, _),) = example.answers
        assert not set(answer) & set(" !“”") - {" "}
        assert "," not in answer.replace("1,000", "")
        assert not ("Max" in example.question and "Zürich" in example.question)
    answers = {example.answers[0][0] for example in cloze_examples([TEXT], 300, 0)}
    assert {"Zürich", "lives in Zürich", "1,000", "Ädler"} < answers


def test_frequent_words_do_not_begin_or_end_answers():
    nouns = [f"noun{i}" for i in range(80)]
    draw = random.Random(0)
    text = " ".join(f"The {draw.choice(nouns)} of the {draw.choice(nouns)} ran." for _ in range(200))
    for example in cloze_examples([text], 200, 1):
        words = example.answers[0][0].lower().split()
        assert words[0] != "the" != words[-1]
    assert any(" of the " in example.answers[0][0] for example in cloze_examples([text], 200, 1))


def test_the_seed_decides_all():
    assert cloze_examples([TEXT], 20, 1) == cloze_examples([TEXT], 20, 1) != cloze_examples([TEXT], 20, 2)
    assert cloze_examples([TEXT], 20, 1)[:10] == cloze_examples([TEXT], 10, 1)


@pytest.mark.parametrize(
    "tokenizer", [ReformerByteTokenizer(), train_bpe_tokenizer([TEXT], 300)], ids=["bytes", "bpe"]
)
def test_passages_are_the_document(tokenizer):
    for length in (1, 7, 1000):
        passages = cut([TEXT, "x" * 20], tokenizer, length)
        assert "".join(passages) == TEXT + "x" * 20
        assert (
            max(len(tokenizer(passage, add_special_tokens=False)["input_ids"]) for passage in passages) <= length + 8
        )


@pytest.mark.parametrize(
    "tokenizer", [ReformerByteTokenizer(), train_bpe_tokenizer([TEXT], 300)], ids=["bytes", "bpe"]
)
def test_rows_hold_their_answers(tokenizer):
    length = 96
    rows = recipe.cloze_questions([TEXT, TEXT.lower()], tokenizer, length, 60, 0)
    assert 20 < len(rows) <= 60
    answers = {example.answers[0][0] for text in (TEXT, TEXT.lower()) for example in cloze_examples([text], 500, 0)}
    for row in rows:
        ids, first, last = row["input_ids"], row["start_positions"], row["end_positions"]
        assert len(ids) == row["length"] <= length
        assert IGNORE not in (first, last)
        assert tokenizer.decode(ids[first : last + 1]).strip(" “”.,!") in answers


TINY = [
    *("--tokenizer", "bytes", "--hidden_size", "16", "--attn_layers", "local", "--num_attention_heads", "1"),
    *("--attention_head_size", "16", "--feed_forward_size", "16", "--use_cpu", "--disable_tqdm", "True"),
    *("--config_overrides", "local_window=16,hidden_dropout_prob=0.1", "--max_steps", "4", "--do_train"),
    *("--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "9", "--pretrain_length", "128"),
    *("--lr_scheduler_type", "constant"),  # a step too many would be seen
]


@pytest.fixture
def run(tmp_path):
    rows = [{"question": "Who sells?", "context": f"{TEXT} {number} more.", "answers": "Max"} for number in range(24)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(out: str, *more: str) -> dict[str, torch.Tensor]:
        recipe.main([*TINY, "--train_file", str(tmp_path / "train.jsonl"), "--output_dir", str(tmp_path / out), *more])
        return load_file(tmp_path / out / "model.safetensors")

    return run


def test_a_killed_run_ends_where_the_whole_one_does(run, tmp_path):
    """While pre-training, in between, and in the task, whose head pre-training has trained, too."""
    whole = run("out", "--pretrain_steps", "4")
    for done in (["_pretrained/checkpoint-2"], ["_pretrained/checkpoint-4"], ["_pretrained", "checkpoint-2"]):
        shutil.rmtree(tmp_path / "killed", ignore_errors=True)
        for name in done:
            shutil.copytree(tmp_path / "out" / name, tmp_path / "killed" / name)
        resumed = run("killed", "--pretrain_steps", "4", "--resume_from_checkpoint", "last")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), done
    still = run("still", "--pretrain_steps", "4", "--learning_rate", "0")
    pretrained = load_file(tmp_path / "still" / "_pretrained" / "model.safetensors")
    assert still.keys() == pretrained.keys()
    assert all(torch.equal(still[name], pretrained[name]) for name in still)


def test_what_leaves_no_room_is_refused():
    with pytest.raises(ValueError, match=r"--pretrain_length 20 leaves no room"):
        recipe.cloze_questions(["aaaaa bbbbb ccccc ddddd"], ReformerByteTokenizer(), 20, 1, 0)
    for documents, length in ((["Yes.", "Oh no!"], 64), ([TEXT], 4)):
        with pytest.raises(ValueError, match=r"sentences of three words or more.*or omit --pretrain_steps"):
            recipe.cloze_questions(documents, ReformerByteTokenizer(), length, 10, 0)
