"""The command line on any terminal, with any prompt: text, or one line and an exit status, never a traceback."""

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cli import GREEDY, PROMPT, make_model, save
from transformers import TextStreamer

from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM, recipes
from reformer_cli import inputs, text_generation
from reformer_cli import main as command_line
from reformer_cli.main import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = make_model(seed=2)
    with torch.no_grad():
        model.lm_head.bias[2 + 0x80 :] -= 1e4  # and éèê, whose bytes come in pairs
    return save(tmp_path_factory.mktemp("model"), model)


@pytest.fixture
def line(capsys, monkeypatch):
    """Run a command line with these bytes as stdin; returns exit status, stdout and stderr."""

    def run(*argv, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8", newline="\n"))
        capsys.readouterr()
        status = main([str(argument) for argument in argv])
        return status, *capsys.readouterr()

    return run


def generate(folder, *more):
    return ["generate", "--model", str(folder), "--prompt", PROMPT, *GREEDY, *more]


def fails(result, *words):
    """One line and status 2."""
    status, out, err = result
    assert (status, out) == (2, "")
    assert err.startswith("hf-reformer: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words)


# ---- what is written ----


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
@pytest.mark.parametrize("stream", [[], ["--no_stream"]])
def test_a_text_is_whole_in_any_encoding(encoding, stream, folder, monkeypatch):
    text = "on a wide sea – ein Schiff, 海の上, café\n"
    monkeypatch.setattr(ReformerByteTokenizer, "decode", lambda self, *args, **options: text)
    monkeypatch.setattr(ReformerByteTokenizer, "batch_decode", lambda self, *args, **options: [text])
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding, newline="\n"))
    assert main(generate(folder, *stream, "--max_new_tokens", "1")) == 0
    assert out.getvalue() == (text + "\n").encode(encoding, errors="backslashreplace")


COMMANDS = {
    "generate": lambda folder, out: generate(folder),
    "generate, whole": lambda folder, out: generate(folder, "--no_stream"),
    "chat": lambda folder, out: ["chat", "--model", str(folder), *GREEDY],
    "env": lambda folder, out: ["env"],
    "export": lambda folder, out: ["export", "--model", str(folder), "--output", str(out)],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_that_is_gone_ends_a_command_quietly(command, folder, tmp_path, monkeypatch, capfd):
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    with open(write, "w", encoding="utf-8") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(COMMANDS[command](folder, tmp_path / "out")) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a device that is always full")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_ends_in_one_line(command, folder, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(COMMANDS[command](folder, tmp_path / "out")) == 2
    assert capfd.readouterr().err == "hf-reformer: [Errno 28] No space left on device\n"


def test_help_survives_a_reader_that_is_gone(monkeypatch, capfd):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(["generate", "--help"]) == 0
    assert capfd.readouterr().err == ""


def test_training_outlives_the_reader_of_its_output(tmp_path, monkeypatch, capfd):
    (tmp_path / "text.txt").write_text("again and again " * 40)
    tiny = ["--hidden_size", "16", "--attn_layers", "local", "--sequence_length", "64", "--max_steps", "2"]
    tiny += ["--use_cpu", "--train_file", str(tmp_path / "text.txt"), "--output_dir", str(tmp_path / "lm")]
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8", buffering=1) as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        assert main(["train", "language-model", *tiny]) == 0
    assert (tmp_path / "lm" / "scores.json").exists()
    assert capfd.readouterr().err.count("has stopped: ") == 1


@pytest.mark.parametrize("command", ["generate", "chat", "env"])
def test_closed_streams_are_named(command, folder, line, monkeypatch, capsys):
    argv = COMMANDS[command](folder, None)
    monkeypatch.setattr(sys, "stdout", None)
    assert main(argv) == 2
    assert "stdout is closed" in capsys.readouterr().err
    monkeypatch.undo()
    if command != "env":
        monkeypatch.setattr(sys, "stdin", None)
        assert main([word for word in argv if word not in ("--prompt", PROMPT)]) == 2
        assert "stdin is closed" in capsys.readouterr().err


@pytest.mark.slow
def test_without_docstrings_and_with_closed_streams(folder, tmp_path, line):
    """File numbers of closed streams must not go to files that are opened later."""
    command = [sys.executable, "-OO", "-W", "ignore", "-m", "hf_reformer", *generate(folder)]
    with open(tmp_path / "out", "wb") as out:
        done = subprocess.run(["sh", "-c", 'exec "$@" <&- 2>&-', "sh", *command], stdout=out, timeout=300)
    assert done.returncode == 0
    text = line(*generate(folder))[1]
    assert (tmp_path / "out").read_text(encoding="utf-8").endswith(text)  # the library complains before it


def test_help_without_docstrings(monkeypatch, capsys):
    monkeypatch.setattr(command_line.run_env, "__doc__", None)
    for argv in (["--help"], ["env", "--help"]):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 0


def test_ctrl_c_leaves_what_was_generated(folder, line, monkeypatch):
    put, seen = TextStreamer.put, []

    def interrupted(self, value):
        if len(seen) == 10:
            raise KeyboardInterrupt
        seen.append(value.flatten().tolist())
        put(self, value)

    with monkeypatch.context() as patch:
        patch.setattr(TextStreamer, "put", interrupted)
        status, out, err = line(*generate(folder))
    assert (status, err) == (130, "")
    new = [token for tokens in seen[1:] for token in tokens]
    assert out == ReformerByteTokenizer().decode(new, skip_special_tokens=True) + "\n"


# ---- what is read ----


def test_a_file_of_windows_is_the_same_text(folder, line, tmp_path):
    file, (command, *options) = tmp_path / "prompt.txt", generate(folder)
    options = [word for word in options if word not in ("--prompt", PROMPT)]
    expected = line(command, *options, "--prompt", "Hällo\n\nyou")
    assert expected[0] == 0
    plain, windows = "Hällo\n\nyou", "Hällo\r\n\r\nyou"
    for text in (plain, plain + "\n", windows, windows + "\r\n", "\ufeff" + windows, "\ufeff" + plain + "\n"):
        file.write_bytes(text.encode())
        assert line(command, *options, "--prompt_file", file) == expected
        assert line(command, *options, stdin=text.encode()) == expected
    under_lang_c = plain.encode().decode("ascii", "surrogateescape")
    assert line(command, *options, "--prompt", under_lang_c) == expected


def test_prompts_that_are_no_text_are_refused(folder, line, tmp_path):
    for data in (b"caf\xe9", "café".encode("utf-16"), b"\x1f\x8b\x08\x00"):
        (tmp_path / "prompt").write_bytes(data)
        fails(line("generate", "--model", folder, "--prompt_file", tmp_path / "prompt"), "prompt is not UTF-8")
        fails(line("generate", "--model", folder, stdin=data), "The prompt is not UTF-8")
    fails(line("generate", "--model", folder, "--prompt", "a\ud800"), "lone surrogate")
    fails(line("generate", "--model", folder, "--prompt_file", tmp_path), "directory")
    fails(line("generate", "--model", folder, "--prompt_file", ""), "No such file")
    (tmp_path / "prompt").write_bytes(b"a\0b\0\r")
    assert line("generate", "--model", folder, "--prompt_file", tmp_path / "prompt", *GREEDY)[0] == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission_end_in_one_line(folder, line, tmp_path):
    (tmp_path / "prompt").touch(0o000)
    fails(line("generate", "--model", folder, "--prompt_file", tmp_path / "prompt"), "Permission denied")


def test_endless_and_huge_prompts_are_refused_before_they_fill_the_memory(folder, line, tmp_path, monkeypatch):
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(600 * 2**20)
    fails(line("generate", "--model", folder, "--prompt_file", tmp_path / "huge"), "more than 67,108,864 characters")
    monkeypatch.setattr(inputs, "LONGEST", 1000)
    if Path("/dev/zero").exists():
        fails(line("generate", "--model", folder, "--prompt_file", "/dev/zero"), "more than 1,000 characters")
    fails(line("generate", "--model", folder, stdin=b"a" * 1001), "more than 1,000 characters")
    fails(line("chat", "--model", folder, stdin=b"a" * 1001), "more than 1,000 characters")
    assert line("generate", "--model", folder, *GREEDY, stdin=b"a" * 1000 + b"\n")[0] == 0


@pytest.mark.parametrize("text", ["x" * 99, "line\n" * 30, "café\n\n" * 20, ""])
def test_long_texts_are_tokenised_in_pieces(text, monkeypatch):
    tokenizer = ReformerByteTokenizer()
    monkeypatch.setattr(text_generation, "PIECE", 7)
    assert text_generation.token_ids(tokenizer, text) == tokenizer(text)["input_ids"]


def test_a_chat_on_a_terminal_goes_on_after_bytes_that_are_no_text(folder, tmp_path, monkeypatch, capsys):
    parent, own = pty.openpty()
    talk = tmp_path / "talk.jsonl"
    with open(own, encoding="utf-8") as terminal:
        os.write(parent, b"one\ncaf\xe9\ntwo\n/save " + str(talk).encode() + b"\n/quit\n")
        monkeypatch.setattr(sys, "stdin", terminal)
        assert main(["chat", "--model", folder, "--greedy", "--max_new_tokens", "2"]) == 0
    os.close(parent)
    assert "The line is not UTF-8: byte b'\\xe9' at position 3" in capsys.readouterr().err
    messages = [json.loads(text) for text in talk.read_text().splitlines()]
    assert [message["content"] for message in messages if message["role"] == "user"] == ["one", "two"]


# ---- numbers ----


def test_temperatures_near_0_take_the_most_likely_token(folder, line, tmp_path):
    common = ["generate", "--model", folder, "--prompt", PROMPT, "--max_new_tokens", "12"]
    expected = line(*common, "--greedy")
    for temperature in ("0", "1e-300", "1e-40", "1e-7"):
        assert line(*common, "--temperature", temperature) == expected
    model = make_model(seed=2)
    model.load_state_dict(ReformerForCausalLM.from_pretrained(folder).state_dict())
    model.generation_config.do_sample, model.generation_config.temperature = True, 1e-40
    common[2] = save(tmp_path, model)
    assert line(*common) == expected
    assert line(*common, "--temperature", "1", "--seed", "1") != expected


def test_numbers_that_no_distribution_has_are_refused(folder, line):
    for name, value in {"temperature": "nan", "top_p": "nan", "top_k": "-1"}.items():
        fails(line(*generate(folder)[:-3], f"--{name}", value), f"--{name} {value}")
    for name, value in (("temperature", "inf"), ("temperature", "-1e-9"), ("top_p", "1.5"), ("top_p", "-0.1")):
        fails(line(*generate(folder)[:-3], f"--{name}={value}"), f"--{name} {float(value)}")


# ---- what is wrong with a folder ----


DEEP = '{"a":' * 100_000 + "1" + "}" * 100_000
DAMAGE = {
    "config.json": {DEEP: "is not valid JSON", "[]": "must hold an object"},
    "tokenizer.json": {"{}": "The tokenizer in", "3": "The tokenizer in", DEEP: ""},
    "tokenizer_config.json": {"3": "The tokenizer in", DEEP: "The tokenizer in"},
}


@pytest.mark.parametrize("command", ["generate", "export"])
@pytest.mark.parametrize(("name", "content"), [(name, text) for name, texts in DAMAGE.items() for text in texts])
def test_damaged_files_of_a_model_end_in_one_line(command, name, content, tmp_path, line):
    folder = save(tmp_path / "model", make_model())
    (tmp_path / "model" / name).write_text(content)
    argv = {"generate": generate(folder), "export": ["export", "--model", folder, "--output", tmp_path / "out"]}
    fails(line(*argv[command]), DAMAGE[name][content])


def test_settings_that_cannot_be_computed_end_in_one_line(tmp_path, line):
    folder = save(tmp_path / "model", make_model())
    fails(line(*generate(folder, "--device", "meta")), "holds no numbers")
    fails(line("convert", folder, tmp_path / "out", "--fields", "[" * 100_000), "--fields is not valid JSON")
    (tmp_path / "fields.json").write_text('\ufeff{"nonsense": 1}', encoding="utf-8")
    assert "BOM" not in line("convert", folder, tmp_path / "out", "--fields", tmp_path / "fields.json")[2]
    (tmp_path / "model" / "generation_config.json").write_text('{"prefill_chunk_size": -1}')
    fails(line(*generate(folder)))


@pytest.mark.parametrize(
    "template",
    [
        *("{% import 'x' as x %}", "{{ 1 / 0 }}", "{% for i in range(1000000000) %}{% endfor %}"),
        *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ messages.nothing.there }}"),
        "{{ raise_exception('no') }}",
    ],
)
def test_errors_of_a_chat_template_are_told(template, tmp_path, line):
    folder = save(tmp_path, make_model(), template=template)
    fails(line("chat", "--model", folder, *GREEDY, stdin=b"Hello\n"), "The chat template raises an error")


def test_errors_that_nobody_foresaw_end_in_one_line(line, monkeypatch):
    def run_env(args):
        raise found

    monkeypatch.setattr(command_line, "run_env", run_env)
    for error, words in {
        RuntimeError("two\nlines"): ["RuntimeError: two lines (test_streams.py, line "],
        MemoryError(): ["MemoryError"],
        KeyError("step"): ["KeyError: 'step'"],
        SystemExit("Give --this."): ["hf-reformer: Give --this.\n"],
    }.items():
        found = error
        fails(line("env"), *words)


def test_a_run_that_lost_a_process_says_so(line, monkeypatch):
    class Recipe:
        def main(self, arguments):
            raise RuntimeError("[third_party/gloo/transport/tcp/pair.cc:537] Connection closed by peer")

    monkeypatch.setattr(recipes, "load_recipe", lambda name: Recipe())
    monkeypatch.setenv("WORLD_SIZE", "2")
    fails(line("train", "seq2seq"), "Another process of this run has ended", "--resume_from_checkpoint last")
