"""The chat recipe: messages, what of them is learned, choices, runs that `hf-reformer chat` talks to, bad inputs."""

import io
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_reformer import ReformerByteTokenizer, ReformerConfig
from hf_reformer.data.bpe_tokenizer import train_bpe_tokenizer
from hf_reformer.data.conversations import (
    CHAT_TEMPLATE,
    conversation_windows,
    encode_conversation,
    read_conversations,
    set_chat_template,
)
from hf_reformer.training.chat import Choice, accuracy, make_choices, rank_of_first, rank_replies, tfidf_ranks

pytest.importorskip("trl")

from hf_reformer.recipes import chat as recipe
from reformer_cli.main import main as command_line

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = [
    *("--tokenizer", "bytes", "--hidden_size", "16", "--attn_layers", "local", "lsh", "--num_attention_heads", "1"),
    *("--attention_head_size", "16", "--feed_forward_size", "16", "--num_hashes", "1", "--max_length", "64"),
    *("--config_overrides", "lsh_window=16,local_window=16", "--use_cpu", "--disable_tqdm", "True"),
    *("--save_strategy", "no", "--max_choices", "3", "--choices", "3", "--learning_rate", "1e-2"),
]
TINY_MODEL = {
    "hidden_size": 16, "attn_layers": ["local", "lsh"], "num_attention_heads": 1, "attention_head_size": 16,
    "feed_forward_size": 16, "num_hashes": 1, "is_decoder": True,
}  # fmt: skip
WORDS = ["Zoë", "rain", "東京", "yes", "no", "tea"]


def talk(row: int, turns: int = 4, system: bool = False) -> list[dict]:
    draw = random.Random(row)
    messages = [{"role": "system", "content": "Be brief."}] if system else []
    for turn in range(turns):
        content = f"{draw.choice(WORDS)} {row} {draw.choice(WORDS)}?"
        messages.append({"role": ("user", "assistant")[turn % 2], "content": content})
    return messages


def write(path, conversations, **more) -> str:
    lines = (json.dumps({"messages": messages, **more}) + "\n" for messages in conversations)
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def files(tmp_path):
    """train.jsonl and validation.jsonl."""
    write(tmp_path / "train.jsonl", [talk(row, 2 + row % 5, row % 3 == 0) for row in range(12)])
    write(tmp_path / "validation.jsonl", [talk(row) for row in range(20, 25)])
    return tmp_path


def arguments(folder, *more, out="out"):
    files = ["--train_file", str(folder / "train.jsonl"), "--validation_file", str(folder / "validation.jsonl")]
    return [*TINY, *files, "--output_dir", str(folder / out), *more]


def tokenizers() -> dict:
    made = {"bytes": ReformerByteTokenizer(), "bpe": train_bpe_tokenizer([f"user\nassistant\n{WORDS}"] * 3, 300)}
    for tokenizer in made.values():
        set_chat_template(tokenizer)
    return made


TOKENIZERS = tokenizers()


def test_pre_training_learns_whole_conversations(files):
    options = ["--pretrain_steps", "1", "--pretrain_length", "16", "--learning_rate", "0", "--max_steps", "1"]
    recipe.main(arguments(files, *options))
    weights = [load_file(files / "out" / name / "model.safetensors") for name in ("_pretrained", ".")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_run_leaves_a_model_that_the_command_line_talks_to(files, monkeypatch, capsys):
    recipe.main(
        arguments(files, "--max_steps", "4", "--baselines", "--tokenizer", "train", "--tokenizer_vocab_size", "280")
    )
    out = files / "out"
    left = {
        "model.safetensors",
        "README.md",
        "replies_validation.png",
        "dialogue_validation.jsonl",
        "learning_curve.png",
    }
    assert left <= {path.name for path in out.iterdir()}
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    written = [json.loads(line) for line in (out / "dialogue_validation.jsonl").read_text().splitlines()]
    assert [x["content"] for x in written[::2]] == [x["content"] for x in talk(20)[::2]]
    scores = json.loads((out / "scores.json").read_text())["validation"]
    assert set(scores["Reformer"]) == {"bits per byte", "reply of 3"}
    assert set(scores["words of the last turns (TF-IDF)"]) == {"reply of 3"}

    nats = num_bytes = 0.0  # against plain forwards of the saved model
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    for row in range(20, 25):
        ids, said = encode_conversation(talk(row), tokenizer)
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        own = torch.tensor(said[1:])
        nats -= float(log_p.gather(-1, torch.tensor(ids[1:])[:, None])[own].sum())
        num_bytes += sum(len(x["content"].encode()) for x in talk(row)[1::2])
        assert len(ids) <= 64
    assert scores["Reformer"]["bits per byte"] == pytest.approx(nats / num_bytes / math.log(2), abs=1e-4)

    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello?\n/save " + str(files / "talk.jsonl") + "\n"))
    assert command_line(["chat", "--model", str(out), "--max_new_tokens", "5", "--greedy"]) == 0
    saved = [json.loads(line) for line in (files / "talk.jsonl").read_text().splitlines()]
    assert [x["role"] for x in saved] == ["user", "assistant"]
    assert saved[1]["content"].strip() == capsys.readouterr().out.strip()


def test_a_resumed_run_ends_where_the_whole_one_does(files):
    options = ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "4", "--do_train"]
    options += ["--per_device_train_batch_size", "2"]
    recipe.main(arguments(files, *options))
    resumed = ["--resume_from_checkpoint", str(files / "out" / "checkpoint-4")]
    recipe.main(arguments(files, *options, *resumed, out="resumed"))
    assert len({(files / run / "model.safetensors").read_bytes() for run in ("out", "resumed")}) == 1


def test_a_saved_model_is_evaluated_without_training(files):
    recipe.main(arguments(files, "--max_steps", "1"))
    saved = ["--model_name_or_path", str(files / "out"), "--validation_file", str(files / "validation.jsonl")]
    more = ["--use_cpu", "--max_length", "64", "--max_choices", "3", "--choices", "3"]
    recipe.main([*saved, *more, "--output_dir", str(files / "evaluated")])
    found = [json.loads((files / out / "scores.json").read_text()) for out in ("out", "evaluated")]
    assert found[0]["validation"]["Reformer"] == pytest.approx(found[1]["validation"]["Reformer"], abs=1e-5)
    assert not (files / "evaluated" / "model.safetensors").exists()


@pytest.mark.slow
def test_it_learns(files):
    same = [[{"role": "user", "content": w}, {"role": "assistant", "content": w[::-1]}] for w in WORDS * 4]
    write(files / "train.jsonl", same)
    write(files / "validation.jsonl", same[: len(WORDS)])
    recipe.main(arguments(files, "--max_steps", "200", "--eval_strategy", "no"))
    assert json.loads((files / "out" / "scores.json").read_text())["validation"]["Reformer"]["reply of 3"] == 1


# --- what is learned


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(st.lists(st.text("aZ é東\n?", min_size=1, max_size=8).filter(str.strip), min_size=2, max_size=6), st.booleans())
def test_exactly_what_the_assistant_says_is_learnt(kind, contents, system):
    tokenizer = TOKENIZERS[kind]
    messages = [{"role": "system", "content": "Be é."}] if system else []
    messages += [{"role": ("user", "assistant")[i % 2], "content": text.strip()} for i, text in enumerate(contents)]
    ids, said = encode_conversation(messages, tokenizer)
    runs, before = [], False
    for token, own in zip(ids, said, strict=True):
        if own:
            runs = [*runs[:-1], [*runs[-1], token]] if before else [*runs, [token]]
        before = own
    expected = [message["content"] + tokenizer.eos_token for message in messages if message["role"] == "assistant"]
    assert [tokenizer.decode(run) for run in runs] == expected
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    if messages[-1]["role"] == "assistant":  # what is asked for later is what came before in training
        asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert ids[: len(asked)] == asked
        assert said[len(asked) :] == [True] * (len(ids) - len(asked))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=3), st.integers(2, 40))
def test_every_token_of_the_assistant_is_a_target_once(rows, length):
    tokenizer, some = TOKENIZERS["bytes"], [talk(row, 2 + row % 4) for row in rows]
    windows = conversation_windows(some, tokenizer, 2 * length)
    found = [token for labels in windows["labels"] for token in labels if token != -100]
    encoded = [encode_conversation(messages, tokenizer) for messages in some]
    assert found == [token for ids, said in encoded for token, own in zip(ids, said, strict=True) if own]
    for ids, labels in zip(windows["input_ids"], windows["labels"], strict=True):
        assert len(ids) == len(labels) <= 2 * length
        assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))


def test_trl_learns_those_targets(files, monkeypatch):
    trainers = []
    monkeypatch.setattr(recipe, "train_and_save", lambda trainer, summary: trainers.append(trainer))
    monkeypatch.setattr(recipe, "report", lambda *args: None)
    recipe.main(arguments(files))
    trainer = trainers[0]
    some = [talk(row, 2 + row % 5, row % 3 == 0) for row in range(12)]
    windows = conversation_windows(some, trainer.processing_class, 64)
    assert trainer.train_dataset["labels"][:] == windows["labels"]
    batch = next(iter(trainer.get_train_dataloader()))
    assert {*batch} >= {"input_ids", "labels", "attention_mask"}
    model = trainer.model.eval()
    with torch.no_grad():
        loss, plain = trainer.compute_loss(model, dict(batch)), model(**batch).loss
    assert float(loss) == pytest.approx(float(plain), abs=1e-5)


# --- choices


def test_choices_hold_the_true_reply_and_those_of_other_conversations():
    some = [talk(row, 6) for row in range(8)]
    choices = make_choices(some, 5, 10, seed=0)
    assert len(choices) == 10
    assert choices == make_choices(some, 5, 10, seed=0)
    for before, candidates, elsewhere in choices:
        assert elsewhere
        for other in elsewhere:
            whole = next(one for one in some if one[: len(other)] == other)
            assert whole[len(other)]["role"] == "assistant"
            assert not {message["content"] for message in whole} & {*candidates}
        messages = next(one for one in some if one[: len(before)] == before)
        assert messages[len(before)] == {"role": "assistant", "content": candidates[0]}
        assert len({*candidates}) == 5
        own = {message["content"] for message in messages}
        assert not own & {*candidates[1:]}
    assert make_choices(some[:1], 2, 10, seed=0) == []
    assert make_choices([talk(1), talk(1)], 2, 10, seed=0) != []
    assert accuracy(np.array([1, 1.5, 2, 3])) == 1.5 / 4
    assert rank_of_first(np.array([1.0, 2.0, 1.0])) == 2.5
    alike = [
        [{"role": "user", "content": f"about {w} {w}"}, {"role": "assistant", "content": f"{w} it is"}] for w in WORDS
    ]
    assert accuracy(tfidf_ranks(make_choices(alike, 4, 6, seed=0), alike)) == 1
    assert tfidf_ranks([], [[{"role": "user", "content": "?"}]]) is None


class Echo:
    """A model of bytes that likes the letter q, and any byte that was there before a little more."""

    device = torch.device("cpu")

    def __init__(self, liking: float):
        self.favorite = liking * torch.nn.functional.one_hot(torch.tensor(BYTES("q")["input_ids"][0]), len(BYTES))

    def __call__(self, input_ids, attention_mask, logits_to_keep):
        before = torch.nn.functional.one_hot(input_ids, len(BYTES)).cumsum(1) > 0
        return SimpleNamespace(logits=(self.favorite + 1.0 * before)[:, -logits_to_keep:])


BYTES = ReformerByteTokenizer(chat_template=CHAT_TEMPLATE)


@pytest.mark.parametrize("liking", [0.0, 8.0])
@pytest.mark.parametrize("length", [24, 1024])
@pytest.mark.parametrize("elsewhere", [[], [[{"role": "user", "content": word}] for word in ("abc", "klm")]])
def test_a_reply_is_chosen_that_the_conversation_makes_likelier_not_one_that_is_always_likely(
    liking, length, elsewhere
):
    before = [{"role": "user", "content": "xyz! xyz!"}]
    ranks, bits = rank_replies(Echo(liking), BYTES, [Choice(before, ["zyx", "qqq", "klm"], elsewhere)], length)
    assert ranks == [1]
    assert bits[0] > 0


def test_bits_of_a_true_reply_are_those_of_its_bytes_and_end_given_what_was_said():
    model = AutoModelForCausalLM.from_config(ReformerConfig(**{**TINY_MODEL, "vocab_size": len(BYTES)})).eval()
    before = talk(3, turns=3)
    _, bits = rank_replies(model, BYTES, [Choice(before, ["yes 猫", "no"], [])], 512)
    ids, spoken = encode_conversation([*before, {"role": "assistant", "content": "yes 猫"}], BYTES)
    with torch.no_grad():
        nats = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])
    last = torch.tensor(spoken[1:]) & (torch.arange(1, len(ids)) >= len(ids) - len("yes 猫".encode()) - 1)
    assert bits[0] == pytest.approx(-nats[last].sum().item() / len("yes 猫".encode()) / math.log(2), rel=1e-5)


# --- what people bring


def read(*conversations, words=()):
    return read_conversations(Dataset.from_dict({"messages": list(conversations)}), "messages", "train", words)


def test_messages_that_can_be_mended(caplog):
    user, assistant = {"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Yes."}
    expected = [{"role": "user", "content": "Hi"}, assistant]
    assert read([user, assistant]) == [expected]
    assert read(json.dumps([user, assistant])) == [expected]
    assert read([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]) == [expected]
    assert not caplog.text
    both = {"role": "user", "content": "Hi\nHi"}
    assert read([user, {"role": "assistant", "content": None}, user, assistant]) == [[both, assistant]]
    assert "1 messages without content are left out (train data; the first one is in row 0)" in caplog.text
    assert "1 messages follow another one of the same role and are joined" in caplog.text
    assert read([user, assistant], [user]) == [expected]
    assert (
        "1 conversations without a message of the assistant are left out (train data; the first one is in row 1)"
        in (caplog.text)
    )


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([{"role": "bot", "content": "Hi"}], r"Row 0 of the train data, message 0: the role 'bot' is none of.*Rename"),
        ([*talk(0), {"role": "system", "content": "x"}], "message 4 is the system's, which can only be the first"),
        ([{"role": "user", "content": "Hi"}], "The assistant says nothing in the train data"),
        ([{"role": "user", "content": "a<|eos|>"}, *talk(0)[1:]], r"message 0 spells <\|eos\|>, a special token"),
        ([{"role": "user"}, {"who": "x"}], r"Row 0 .* as `messages`, where \[\{\"role\""),
        ([], "Row 0 .* as `messages`, where"),
        ("[{", "Row 0 .* as `messages`, where"),
    ],
)
def test_messages_that_cannot_be_learnt_are_refused_with_file_and_row(files, messages, words):
    (files / "train.jsonl").write_text(json.dumps({"messages": messages}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"{words}.*train\\.jsonl"):
        recipe.main(arguments(files))
    assert not (files / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--choices", "1"], "--choices 1 leaves nothing to choose from"),
        (["--max_length", "2"], "--max_length 2 must be"),
        (["--assistant_only_loss", "False"], "--assistant_only_loss False: this recipe trains"),
        (["--packing", "True"], "--packing and --padding_free are not supported"),
        (["--messages_column", "x"], r"no column \['x'\].*--messages_column.*train\.jsonl"),
        (["--config_overrides", "tie_word_embeddings=True"], "tie_word_embeddings"),
    ],
)
def test_options_that_cannot_work(files, options, words):
    with pytest.raises(ValueError, match=words):
        recipe.main(arguments(files, *options))


def test_tied_weights_are_refused_before_anything_is_computed(files, monkeypatch):
    monkeypatch.setattr(recipe, "pretrain", None)  # nothing is read or computed before
    monkeypatch.setattr(recipe, "load_conversations", None)
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        recipe.main(arguments(files, "--config_overrides", "tie_word_embeddings=True", "--pretrain_steps", "2"))
    assert not (files / "out").exists()


def test_templates_of_others():
    tokenizer = ReformerByteTokenizer(eos_token=None)
    if tokenizer.eos_token is None:
        with pytest.raises(ValueError, match="no eos token"):
            set_chat_template(tokenizer)
    tokenizer = ReformerByteTokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="does not mark the assistant"):
        set_chat_template(tokenizer)
