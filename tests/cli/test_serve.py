"""`hf-reformer serve`: an OpenAI client gets what the model generates, and a conversation is computed once."""

import functools
import re
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL_WINDOWS, make_model

from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM, ReformerForMaskedLM
from reformer_cli.main import main

openai = pytest.importorskip("openai")
serving = pytest.importorskip("reformer_cli.serving")

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MESSAGES = [{"role": "user", "content": "Was that a ship – ein Schiff?"}]
GREEDY = {"temperature": 0, "max_tokens": 12}


def save(folder, cls=ReformerForCausalLM, template=TEMPLATE):
    tokenizer = ReformerByteTokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": 260, "eos_token_id": None, **SMALL_WINDOWS, "local_window": 200}
    make_model(cls, seed=2, dtype=torch.float32, position_embedding_type="learned", **sizes).save_pretrained(folder)
    return str(folder)


class Running:
    """A server on a free port of the loopback address, and its client."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = {"device": "cpu", "dtype": "auto", "trust_remote_code": False, "conversations": 2}
        self.server = serving.make_server(folder, "127.0.0.1", port, log_level="error", **options)
        self.name = folder
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        end = time.monotonic() + 60
        while not self.server.started and time.monotonic() < end:
            time.sleep(0.05)
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    def stop(self):
        self.client.close()
        self.server.should_exit = True
        self.thread.join(30)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    running = Running(save(tmp_path_factory.mktemp("model")))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def model(running):
    return ReformerForCausalLM.from_pretrained(running.name).eval()


def generated(model, prompt, tokens=12):
    ids = torch.tensor([ReformerByteTokenizer()(prompt)["input_ids"]])
    options = {"eos_token_id": 1, "pad_token_id": 0, "do_sample": False, "max_new_tokens": tokens}
    return ReformerByteTokenizer().decode(model.generate(ids, **options)[0, ids.shape[1] :], skip_special_tokens=True)


def prompt_of(messages):
    return "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant: "


def test_completions_are_what_the_model_generates(running, model):
    client, options = running.client, {"model": running.name, "prompt": "It was", **GREEDY}
    whole = client.completions.create(**options)
    assert whole.choices[0].text == generated(model, "It was")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (6, 12)
    parts = [chunk.choices[0].text for chunk in client.completions.create(stream=True, **options)]
    assert len(list(filter(None, parts))) > 1
    assert "".join(parts).strip("\ufffd") == whole.choices[0].text.strip("\ufffd")  # half a character at the end


def test_the_block_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    save("runs/chat")
    running = Running("runs/chat")
    try:
        exec(compile(block.replace("http://127.0.0.1:8000/v1", str(running.client.base_url)), "docs", "exec"), {})
    finally:
        running.stop()
    assert capsys.readouterr().out


def test_the_model_is_listed(running):
    assert [model.id for model in running.client.models.list()] == [running.name]


def test_a_conversation_is_computed_once(running, model, monkeypatch):
    """Every turn equals one without a cache; and only new tokens go through the model."""
    fed, forward = [], ReformerForCausalLM.forward

    @functools.wraps(forward)
    def counting(self, **inputs):
        fed.append(inputs["input_ids"].shape[1])
        return forward(self, **inputs)

    monkeypatch.setattr(ReformerForCausalLM, "forward", counting)
    messages = list(MESSAGES)
    for _ in range(3):
        fed.clear()
        out = running.client.chat.completions.create(model=running.name, messages=messages, **GREEDY)
        answer, computed = out.choices[0].message.content, sum(fed)
        if len(messages) == 1:
            assert computed == out.usage.prompt_tokens + 11
        else:
            assert computed < out.usage.prompt_tokens - 20
        assert answer == generated(model, prompt_of(messages))
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]


def test_two_conversations_do_not_mix(running, model):
    both = [[{"role": "user", "content": text}] for text in ("One ship.", "Quite another thing, at sea.")]
    for _ in range(2):
        for messages in both:
            stream = running.client.chat.completions.create(
                model=running.name, messages=messages, stream=True, **GREEDY
            )
            answer = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            expected = generated(model, prompt_of(messages))
            assert answer.rstrip("\ufffd") == expected.rstrip("\ufffd")
            messages += [{"role": "assistant", "content": expected}, {"role": "user", "content": "Yes?"}]


def test_a_client_is_told_what_is_wrong(running, tmp_path):
    create = running.client.chat.completions.create
    with pytest.raises(openai.BadRequestError, match="256 positions"):
        create(model=running.name, messages=[{"role": "user", "content": "x" * 300}])
    with pytest.raises(openai.BadRequestError, match="pinned"):
        create(model="another", messages=MESSAGES)
    for more in ({"n": 2}, {"logprobs": True}):
        with pytest.raises(openai.BadRequestError, match="Leave out n and logprobs"):
            create(model=running.name, messages=MESSAGES, **more)
    for more in ({"n": 2}, {"logprobs": 0}):
        with pytest.raises(openai.BadRequestError, match="Leave out n and logprobs"):
            running.client.completions.create(model=running.name, prompt="It was", **more)
    long = running.client.completions.create(model=running.name, prompt="y" * 250, temperature=0)
    assert long.usage.completion_tokens <= 6  # as many as there are positions


def test_a_model_without_a_template_completes(tmp_path):
    running = Running(save(tmp_path / "plain", template=None))
    try:
        assert running.client.completions.create(model=running.name, prompt="It was", **GREEDY).choices[0].text
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            running.client.chat.completions.create(model=running.name, messages=MESSAGES)
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            running.client.responses.create(model=running.name, input="It was")
    finally:
        running.stop()


def test_a_prompt_is_continued_as_by_the_command_line(capsys):
    """By a model whose tokenizer was trained: it begins a text, but does not end the prompt."""
    example = str(Path(__file__).parents[2] / "examples" / "models" / "crime_and_punishment")
    prompt = "Raskolnikov opened the door and"
    main(["generate", "--model", example, "--prompt", prompt, "--greedy", "--max_new_tokens", "12", "--no_stream"])
    printed = capsys.readouterr().out
    running = Running(example)
    try:
        answer = running.client.completions.create(model=example, prompt=prompt, **GREEDY).choices[0].text
    finally:
        running.stop()
    assert answer.strip()
    assert answer.strip() in printed


def test_mistakes_are_refused_before_anything_is_served(tmp_path, capsys, monkeypatch):
    masked = save(tmp_path / "masked", ReformerForMaskedLM)
    assert main(["serve", "--model", masked]) == 2
    assert "only causal language models generate" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if it were not installed
    assert main(["serve", "--model", masked]) == 2
    assert "`uvicorn`" in capsys.readouterr().err
