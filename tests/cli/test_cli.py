"""The command line: it prints what `model.generate` returns, a chat runs every token once, mistakes are explained."""

import io
import json
import os
import pkgutil
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import SMALL_WINDOWS
from conftest import make_model as make_tiny
from reformer_pytorch import ReformerLM
from transformers import GPT2Config, GPT2LMHeadModel, T5Config, T5ForConditionalGeneration, TextStreamer

from hf_reformer import (
    ReformerByteTokenizer,
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForSequenceClassification,
)
from hf_reformer.hub import export
from reformer_cli.main import RECIPES, main, make_parser
from reformer_cli.measuring import PLOTS
from reformer_cli.text_generation import Conversation, load, special_ids

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] }}: {{ message['content'] }}{{ eos_token if message['role'] == 'assistant' else '' }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
WORDS = "on a wide, calm sea – ein Schiff, 海の上 – "  # characters of one, two and three bytes
PROMPT = "What is that?"
COMMANDS = re.findall(r"^ {4}(\w+) ", make_parser().format_help(), flags=re.MULTILINE)
GREEDY = ["--greedy", "--max_new_tokens", "24"]


def make_model(cls=ReformerForCausalLM, **overrides):
    sizes = {"vocab_size": 260, "position_embedding_type": "rotary", "eos_token_id": None, **SMALL_WINDOWS}
    return make_tiny(cls, dtype=torch.float32, **{**sizes, **overrides})


def save(folder, model, tokenizer=None, template=TEMPLATE):
    tokenizer = tokenizer or ReformerByteTokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("model"), make_model(seed=2))  # whose text is long


@pytest.fixture
def line(capsys, monkeypatch):
    """Run a command line with a text as stdin; returns exit status, stdout and stderr."""

    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        status = main([str(argument) for argument in argv])
        return status, *capsys.readouterr()

    return run


def continuation(folder, text, bos=True, **options):
    """The same by hand."""
    model, tokenizer = load(folder)
    ids = torch.tensor([[tokenizer.bos_token_id] * bos + tokenizer(text)["input_ids"]])
    settings = {"max_new_tokens": 24, "do_sample": False, **special_ids(model, tokenizer, *[259] * bos), **options}
    return tokenizer.batch_decode(model.generate(ids, **settings)[:, ids.shape[1] :], skip_special_tokens=True)


# ---- generate ----


@pytest.mark.parametrize("way", ["--prompt", "--prompt_file", "stdin"])
def test_greedy_text_is_that_of_the_model(folder, line, tmp_path, way):
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n", encoding="utf-8")
    prompt = {"--prompt": [way, PROMPT], "--prompt_file": [way, file], "stdin": []}[way]
    status, out, _ = line("generate", "--model", folder, *GREEDY, *prompt, stdin=PROMPT)
    assert (status, out) == (0, continuation(folder, PROMPT)[0] + "\n")


def test_streamed_text_is_the_whole_text(folder, line):
    common = ["generate", "--model", folder, "--prompt", PROMPT, *GREEDY[:-1], "150"]
    assert line(*common) == line(*common, "--no_stream") == line(*common, "--prefill_chunk_size", "5")
    assert len(line(*common)[1]) > 100


def test_bos_can_be_left_out(folder, line):
    _, out, _ = line("generate", "--model", folder, *GREEDY, "--prompt", PROMPT, "--no_bos")
    assert out == continuation(folder, PROMPT, bos=False)[0] + "\n"
    assert out != continuation(folder, PROMPT)[0] + "\n"
    assert line("generate", "--model", folder, *GREEDY, "--prompt", "")[0] == 0  # a text from nothing
    status, _, err = line("generate", "--model", folder, *GREEDY, "--prompt", "", "--no_bos")
    assert status == 2
    assert "prompt is empty" in err


def test_bos_that_the_model_does_not_know_is_left_out(tmp_path, line):
    folder = save(tmp_path, make_model(vocab_size=258))
    _, out, _ = line("generate", "--model", folder, *GREEDY, "--prompt", PROMPT)
    assert out == continuation(folder, PROMPT, bos=False)[0] + "\n"


def test_a_new_document_ends_the_text(tmp_path, line):
    model = make_model()
    torch.nn.init.constant_(model.lm_head.bias[259], 1e4)
    common = ["generate", "--model", save(tmp_path, model), *GREEDY, "--prompt", PROMPT, "--no_stream"]
    assert line(*common) == (0, "\n", "")


def test_samples_repeat_with_a_seed_and_several_are_set_apart(folder, line):
    common = ["generate", "--model", folder, "--prompt", PROMPT, "--max_new_tokens", "12"]
    first = line(*common, "--seed", "1", "--temperature", "0.9", "--top_p", "0.9", "--top_k", "20")
    assert first == line(*common, "--seed", "1", "--temperature", "0.9", "--top_p", "0.9", "--top_k", "20")
    torch.manual_seed(1)
    texts = continuation(folder, PROMPT, do_sample=True, num_return_sequences=3, max_new_tokens=12)
    assert line(*common, "--seed", "1", "--num_return_sequences", "3")[1] == "\n---\n".join(texts) + "\n"


def test_half_a_character_is_never_printed(capsys):
    tokenizer = ReformerByteTokenizer()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    streamer.put(torch.zeros(1, 3, dtype=torch.int64))
    printed = ""
    for token in tokenizer(WORDS)["input_ids"]:
        streamer.put(torch.tensor([token]))
        printed += capsys.readouterr().out
        assert WORDS.startswith(printed)
    streamer.end()
    assert printed + capsys.readouterr().out == WORDS + "\n"


def test_other_models_generate_too(tmp_path, line):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=16, n_layer=1, n_head=2, n_positions=40))
    folder = save(tmp_path, model)
    status, out, err = line("generate", "--model", folder, "--greedy", "--prompt", PROMPT)  # 14 tokens with bos
    assert (status, err) == (0, "")
    assert out == continuation(folder, PROMPT, max_new_tokens=26)[0] + "\n"
    turns = "one\ntwo\n"
    assert line("chat", "--model", folder, "--greedy", "--max_new_tokens", "3", stdin="a\n")[0] == 0
    status, _, err = line("chat", "--model", folder, "--greedy", "--max_new_tokens", "3", stdin=turns * 3)
    assert status == 2
    assert "covers 40 positions" in err


def test_folders_of_the_builtin_reformer_are_read_as_ours(tmp_path, line):
    sizes = {"vocab_size": 260, "hidden_size": 16, "num_attention_heads": 2, "attention_head_size": 8}
    positions = {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [4, 12], "max_position_embeddings": 128}
    chunks = {"attn_layers": ["local", "lsh"], "num_buckets": 4, "is_decoder": True, "feed_forward_size": 24}
    config = transformers.ReformerConfig(**sizes, **positions, **chunks, eos_token_id=1)
    folder = save(tmp_path, transformers.ReformerModelWithLMHead(config))
    assert isinstance(load(folder)[0], ReformerForCausalLM)
    status, out, err = line("generate", "--model", folder, *GREEDY, "--prompt", PROMPT)
    assert (status, out, err) == (0, continuation(folder, PROMPT)[0] + "\n", "")


# ---- chat ----


class Counting:
    """Counts the tokens that a model's forward sees."""

    def __init__(self, model):
        self.tokens = 0
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        self.tokens += kwargs["input_ids"].shape[1]


def whole(model, tokenizer, messages, **options):
    """The ids before the last answer, and the answer, from a call without a cache."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    options = {"do_sample": False, "use_cache": False, **special_ids(model, tokenizer), **options}
    out = model.generate(torch.tensor([ids]), **options)
    return out[0].tolist(), tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def ascii_model(**overrides):
    """A model that writes letters only, so that its answers are encoded again as the tokens that it gave."""
    model = make_model(**overrides)
    with torch.no_grad():
        model.lm_head.bias += -1e4
        model.lm_head.bias[2 + 97 : 2 + 123] += 1e4
    return model


@pytest.mark.parametrize("attn_layers", [["local", "lsh"], ["lsh", "full"]])
def test_a_chat_is_the_conversation_run_whole_and_runs_each_token_once(attn_layers, capsys):
    model, tokenizer = ascii_model(attn_layers=attn_layers), ReformerByteTokenizer()
    tokenizer.chat_template = TEMPLATE
    options = {"max_new_tokens": 10, "do_sample": False, **special_ids(model, tokenizer)}
    chat = Conversation(model, tokenizer, "Be brief.", **options)
    counting = Counting(model)
    answers = [chat.answer(text) for text in ("Hello", "What – is that?", "And that?")]
    seen = counting.tokens
    assert capsys.readouterr().out == "".join(answer + "\n" for answer in answers)
    assert chat.messages[0] == {"role": "system", "content": "Be brief."}
    for turn in range(3):
        ids, answer = whole(model, tokenizer, chat.messages[: 2 + 2 * turn], max_new_tokens=10)
        assert answer == answers[turn]
    assert seen == len(ids) - 1  # the last token is not run


def test_answers_that_are_encoded_differently_are_run_again(capsys):
    """Random bytes are no UTF-8: what the template says of them is not what the cache holds."""
    model, tokenizer = make_model(), ReformerByteTokenizer()
    tokenizer.chat_template = TEMPLATE
    for length in (4, 30):  # a local layer of window 6 can take back the one, not the other
        options = {"max_new_tokens": length, "do_sample": False, **special_ids(model, tokenizer)}
        chat = Conversation(model, tokenizer, **options)
        for text in ("Hello", "What is that?", "And that?"):
            answer = chat.answer(text)
            assert answer == whole(model, tokenizer, chat.messages[:-1], max_new_tokens=length)[1]


def test_chunks_have_no_cache_and_chat_all_the_same(capsys):
    model, tokenizer = make_model(attention_mode="chunk"), ReformerByteTokenizer()
    tokenizer.chat_template = TEMPLATE
    chat = Conversation(model, tokenizer, max_new_tokens=4, do_sample=False, **special_ids(model, tokenizer))
    for text in ("Hello", "And then?"):
        assert chat.answer(text) == whole(model, tokenizer, chat.messages[:-1], max_new_tokens=4)[1]


def test_the_chat_reads_turns_and_commands(folder, line, tmp_path):
    file = tmp_path / "talk.jsonl"
    turns = f"forgotten\n/reset\nHällo\n\nAgain\n/save {file}\n/quit\nnever read\n"
    status, out, err = line("chat", "--model", folder, *GREEDY, "--system", "Be brief.", stdin=turns)
    assert (status, err) == (0, "")
    messages = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in messages[:4:2]] == ["Be brief.", messages[2]["content"]]
    assert messages[1]["content"] == "Hällo"
    assert out.endswith(messages[2]["content"] + "\n" + messages[4]["content"] + "\n")
    assert line("chat", "--model", folder, *GREEDY, "--no_stream", "--system", "Be brief.", stdin=turns)[1] == out


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_a_failed_turn_does_not_end_the_chat(tmp_path, line, monkeypatch):
    folder = save(tmp_path, ascii_model(position_embedding_type="learned", max_position_embeddings=60))
    monkeypatch.setattr(io, "StringIO", Terminal)
    turns = f"Hello\n{'long ' * 20}\n/save /no/such/place\n/nonsense\nBye\n"
    status, out, err = line("chat", "--model", folder, "--greedy", "--max_new_tokens", "3", stdin=turns)
    assert status == 0
    assert len(out.replace("> ", "").split()) == 2
    first, second, third = err.splitlines()
    assert "max_position_embeddings" in first
    assert "/no/such/place" in second
    assert "/nonsense is not a command" in third


# ---- export ----


def test_export_makes_a_checkpoint_a_folder_for_the_hub(folder, line, tmp_path):
    out = tmp_path / "shared"
    metadata = ["--license", "mit", "--language", "en", "de", "--tags", "bytes", "--name", "ada/tiny"]
    status, printed, err = line("export", "--model", folder, "--output", out, *metadata)
    assert (status, err) == (0, "")
    assert f"hf upload ada/tiny {out}" in printed
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "license: mit" in card
    assert 'name = "ada/tiny"' in card
    again = tmp_path / "again"
    export(folder, again, name="ada/tiny", license="mit", language=["en", "de"], tags=["bytes"])
    assert {file.name: file.read_bytes() for file in out.iterdir()} == {
        file.name: file.read_bytes() for file in again.iterdir()
    }


def test_mistakes_of_export_end_in_one_line(folder, line, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for message, argv in {
        "not empty": ["--model", folder, "--output", tmp_path / "full"],
        "neither a directory nor": ["--model", tmp_path / "absent", "--output", tmp_path / "out"],
        "no identifier": ["--model", folder, "--output", tmp_path / "out", "--license", "Apache 2"],
    }.items():
        status, out, err = line("export", *argv)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert message in err
    assert {path.name for path in tmp_path.rglob("*")} == {"full", "mine"}
    assert line("export", "--model", folder, "--output", tmp_path / "full", "--overwrite")[0] == 0


# ---- convert ----


def small_builtin(folder):
    sizes = {"vocab_size": 260, "hidden_size": 16, "num_attention_heads": 2, "attention_head_size": 8}
    positions = {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [4, 12], "max_position_embeddings": 128}
    chunks = {"attn_layers": ["local", "lsh"], "num_buckets": 4, "is_decoder": True, "feed_forward_size": 24}
    return save(
        folder, transformers.ReformerModelWithLMHead(transformers.ReformerConfig(**sizes, **positions, **chunks))
    )


def test_convert_writes_a_folder_and_reports_what_changes(tmp_path, line):
    folder = small_builtin(tmp_path / "builtin")
    assert line("convert", folder, tmp_path / "converted") == (0, "", "")
    assert line("convert", tmp_path / "converted", tmp_path / "again", "--to", "builtin") == (0, "", "")
    converted, again = load(tmp_path / "converted")[0], load(tmp_path / "again")[0]
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in converted.state_dict().items())
    fields = tmp_path / "fields.json"
    fields.write_text('{"lsh_window": 48}')
    status, out, err = line(
        "convert", folder, tmp_path / "window", "--attention_mode", "window", "--fields", fields, "--no_lm_bias"
    )
    assert (status, err) == (0, "")
    assert "- Window mode: lsh_window=48" in out
    assert line("generate", "--model", tmp_path / "window", *GREEDY, "--prompt", PROMPT)[0] == 0


def test_a_folder_without_a_tokenizer_is_reported(tmp_path, line):
    make_model().save_pretrained(tmp_path / "bare")
    commands = {"export": ["--model", tmp_path / "bare", "--output", tmp_path / "exported"]}
    builtin = small_builtin(tmp_path / "builtin")
    for file in Path(builtin).glob("tokenizer*"):
        file.unlink()
    commands["convert"] = [builtin, tmp_path / "converted"]
    for command, argv in commands.items():
        status, out, err = line(command, *argv)
        assert (status, err) == (0, "")
        assert "There was no tokenizer" in out


def test_mistakes_of_convert_end_in_one_line(tmp_path, line):
    folder = small_builtin(tmp_path / "builtin")
    for message, argv in {
        "does not exist": [tmp_path / "absent", tmp_path / "out"],
        "not an empty folder": [folder, folder],
        "is not valid JSON": [folder, tmp_path / "out", "--fields", "{1}"],
        "must be a JSON object": [folder, tmp_path / "out", "--fields", Path(folder, "none.json")],
        "such as": [folder, tmp_path / "out", "--fields", "[1]"],
        "neither a JSON object nor a file": [folder, tmp_path / "out", "--fields", "absent.json"],
        "Name with `head`": [folder, tmp_path / "out", "--head", "ReformerForPoetry"],
        "cannot be read from the weights": [tmp_path / "weights.pt", tmp_path / "out"],
    }.items():
        Path(folder, "none.json").write_text("[]")
        torch.save(ReformerLM(20, 16, 1, 64, heads=2, dim_head=8).state_dict(), tmp_path / "weights.pt")
        status, out, err = line("convert", *argv)
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert message in err
        assert not (tmp_path / "out").exists()


# ---- train ----


def test_train_lists_the_recipes(line, capsys):
    for argv in (["train"], ["train", "--help"]):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 0
        printed = capsys.readouterr().out
        assert [text.split()[0] for text in printed.split("recipes:\n")[1].splitlines()] == list(RECIPES)
    with pytest.raises(SystemExit):
        main(["train", "poetry"])
    assert "'classification', 'language-model', 'seq2seq'" in capsys.readouterr().err


def test_train_runs_a_recipe_with_its_own_options(line, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "seq2seq", "--help"])
    assert end.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "--source_column SOURCE_COLUMN" in printed
    assert "--source-column" not in printed  # works, too
    assert "--dataset_config" in printed
    assert "default: None)" not in printed
    assert "intended for training/evaluation scripts. --do_eval" in printed  # depends on the files: no default
    (tmp_path / "text.txt").write_text("again and again " * 40)
    tiny = ["--hidden_size", "16", "--attn_layers", "local", "--sequence_length", "64", "--max_steps", "1"]
    tiny += ["--use_cpu", "--train_file", tmp_path / "text.txt", "--output_dir", tmp_path / "lm"]
    assert line("train", "language-model", *tiny)[0] == 0
    assert line("generate", "--model", tmp_path / "lm", *GREEDY, "--prompt", "again")[0] == 0


def test_mistakes_of_train_end_in_one_line(line, tmp_path, monkeypatch):
    (tmp_path / "data.csv").write_text("a,b\nx,y\n")
    files = ["--train_file", tmp_path / "data.csv", "--output_dir", tmp_path / "out"]
    for message, argv in {
        "no file": ["classification", "--train_file", tmp_path / "absent.csv"],
        "--text_column": ["classification", *files],
        "must be between 0 and 1": ["seq2seq", *files, "--validation_fraction", "2"],
    }.items():
        status, _, err = line("train", *argv)
        assert status == 2
        assert "Traceback" not in err
        last = err.splitlines()[-1]  # behind the progress bar of reading a table
        assert last.startswith("hf-reformer: ")
        assert message in last
    for name in ("recipes.classification", "training.classification"):
        monkeypatch.delitem(sys.modules, f"hf_reformer.{name}")
    for library in ("accelerate", "evaluate"):
        monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
        recipe = "seq2seq" if library == "accelerate" else "classification"
        message = f"hf-reformer: This needs `{library}`. In a clone: `pip install -e '.[train]'`.\n"
        assert line("train", recipe, *files) == (2, "", message)


# ---- mistakes, help, env ----


def test_positions_end_the_text_in_words(tmp_path, line, caplog):
    folder = save(tmp_path, make_model(position_embedding_type="axial", max_position_embeddings=20))
    common = ["generate", "--model", folder, "--greedy", "--no_bos"]
    status, _, err = line(*common, "--prompt", "x" * 20)
    assert status == 2
    assert "The input has 20 tokens, and the model covers 20 positions" in err
    assert line(*common, "--prompt", "x" * 15)[:2] == (
        0,
        continuation(folder, "x" * 15, False, max_new_tokens=5)[0] + "\n",
    )
    assert "The text ends here" in caplog.text
    folder = save(tmp_path, make_model(max_position_embeddings=20))  # rotary
    assert line(*common, "--max_new_tokens", "3", "--prompt", "x" * 20)[0] == 0


def mistakes(tmp_path):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "classifier", make_model(ReformerForSequenceClassification))
    save(tmp_path / "silent", make_model(), template=None)
    tiny = {"vocab_size": 260, "d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16, "d_kv": 8}
    save(tmp_path / "t5", T5ForConditionalGeneration(T5Config(**tiny)))
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    weights = Path(save(tmp_path / "cut", make_model()), "model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    good = str(save(tmp_path / "good", make_model()))
    Path(save(tmp_path / "null", make_model()), "config.json").write_text("null")
    return {
        "neither a directory nor": ["--model", tmp_path / "absent"],
        "there is no config.json": ["--model", tmp_path / "empty"],
        "has no tokenizer": ["--model", tmp_path / "gpt2"],
        "saved by ReformerForSequenceClassification": ["--model", tmp_path / "classifier"],
        "saved by ReformerForMaskedLM": ["--model", save(tmp_path / "masked", make_model(ReformerForMaskedLM))],
        "is an encoder-decoder": ["--model", tmp_path / "t5"],
        "no chat template": ["--model", tmp_path / "silent"],
        "or damaged": ["--model", tmp_path / "cut"],
        "holds a NoneType, but must hold an object": ["--model", tmp_path / "null"],
        "--system is not UTF-8": ["--model", good, "--system", "caf\udce9"],
        "device": ["--model", good, "--device", "nonsense"],
        "Leave out --top_k": ["--model", good, "--greedy", "--top_k", "3"],
    }


def test_mistakes_end_in_one_line(tmp_path, line):
    for message, argv in mistakes(tmp_path).items():
        status, out, err = line("chat", *argv, stdin="Hello\n")
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert message in err
        assert len(err) < 600
    needless = ["--prompt", "x", "--temperature", "0", "--top_p", "0.9"]
    latin = tmp_path / "latin.txt"
    latin.write_bytes("café".encode("latin-1"))
    for argv in (
        ["--prompt_file", tmp_path / "absent"],
        ["--prompt_file", latin],
        ["--prompt", "x", "--temperature", "-1"],
        needless,
    ):
        status, _, err = line("generate", "--model", tmp_path / "good", *argv)
        assert status == 2
        assert err.count("\n") == 1


def test_memory_prints_a_column_for_each_length(line, tmp_path):
    fields = '{"hidden_size": 32, "num_attention_heads": 1, "attn_layers": ["local", "lsh"]}'
    status, out, _ = line("memory", "--fields", fields, "--length", 256, 512, "--batch_size", 2)
    rows = {name: numbers for name, *numbers in map(str.split, out.splitlines())}
    assert status == 0
    assert rows["MiB"] == ["256", "512"]
    assert 0 < float(rows["total"][0]) < float(rows["total"][1])
    make_model().save_pretrained(tmp_path)
    status, out, _ = line("memory", "--model", tmp_path, "--length", 64, "--use_cache")
    assert status == 0
    assert "cache" in out
    assert "gradients" not in out
    for message, argv in {
        "no field num_hash": ["--fields", '{"num_hash": 3}'],
        "not for BertModel": ["--head", "BertModel"],
        "causal models": ["--use_cache"],
    }.items():
        status, out, err = line("memory", "--length", 64, *argv)
        assert (status, out) == (2, "")
        assert message in err


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=str,
)
def test_threads_do_not_wait_in_a_loop_for_long(line, monkeypatch, given, expected):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        line("--help")
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_demo_is_the_demo_of_classification(line, monkeypatch):
    ran = []
    recipe = SimpleNamespace(main=ran.append)
    monkeypatch.setattr("hf_reformer.recipes.load_recipe", {"classification": recipe}.__getitem__)
    assert line("demo") == (0, "", "")
    assert ran == [["--demo"]]


def test_bench_measures_beside_exact_attention(line):
    fields = '{"hidden_size": 32, "num_attention_heads": 1, "attn_layers": ["local", "lsh"]}'
    status, out, _ = line("bench", "--fields", fields, "--length", 64, 128, "--repeats", 1)
    assert status == 0
    rows = [row.split()[:2] for row in out.splitlines()[1:]]
    assert rows == [["64", "hf-reformer"], ["64", "exact"], ["128", "hf-reformer"], ["128", "exact"]]
    status, out, _ = line("bench", "--fields", fields, "--length", 64, "--repeats", 1, "--no_baseline")
    assert len(out.splitlines()) == 2


@pytest.mark.parametrize("kind", PLOTS)
def test_plot_draws_a_text(kind, line, folder, tmp_path):
    status, _, err = line("plot", "--model", folder, "--text", WORDS, "--kind", kind, "--output", tmp_path / "a.png")
    assert (status, err) == (0, "")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_plot_refuses_layers_and_heads_that_are_not_there(line, folder, tmp_path):
    for message, argv in {"--layer 7": ["--layer", 7], "--head 2": ["--head", 2]}.items():
        status, _, err = line("plot", "--model", folder, "--text", "x", "--output", tmp_path / "a.png", *argv)
        assert status == 2
        assert message in err


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([*command, "--help"])
    assert end.value.code == 0
    assert " ".join(["usage: hf-reformer", *command]) in capsys.readouterr().out


def test_the_command_is_installed():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert pkgutil.resolve_name(project["scripts"]["hf-reformer"]) is main


def test_env(line):
    status, out, _ = line("env")
    assert status == 0
    printed = dict(text.split(": ", 1) for text in out.splitlines())
    assert printed["torch"] == torch.__version__
    assert printed["compiled CPU kernel"].split(":")[0] in {"avx512", "avx2", "portable", "none"}
    assert printed["devices"].startswith("cpu")
