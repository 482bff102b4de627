"""Python blocks of the docs that need a model, data or the Hub: they run as they stand where such things lie."""

import importlib.util
import itertools
import re
from pathlib import Path

import datasets
import pandas as pd
import pytest
import torch
from builtin_cases import make_builtin
from conftest import make_model

from hf_reformer import (
    ReformerByteTokenizer,
    ReformerForCausalLM,
    ReformerForMultipleChoice,
    ReformerForSequenceClassification,
)
from hf_reformer.hub import export
from reformer_cli.main import main

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"<!-- run by `test_prepared_blocks\.py::\w+` -->\n```python\n(.*?)```", flags=re.DOTALL)
SENTENCES = "We propose a model. It is small. In it, tokens are sorted. We show that it is fast."


def blocks_of(page):
    return BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs blocks in an empty folder, one after the other; gives the names they have made."""
    monkeypatch.chdir(tmp_path)

    def run_blocks(*blocks):
        names = {"__name__": "__main__"}
        with torch.random.fork_rng(devices=[]):
            for block in blocks:
                exec(compile(block, "a block of the docs", "exec"), names)
        return names

    return run_blocks


def save(model, folder):
    model.save_pretrained(folder)
    ReformerByteTokenizer().save_pretrained(folder)


def bytes_model(cls, **fields):
    return make_model(cls, dtype=torch.float32, vocab_size=len(ReformerByteTokenizer()), eos_token_id=1, **fields)


def test_the_card_of_the_example_model(run, tmp_path):
    """Its text is cut out of a file, a trained model becomes the folder, and the folder writes."""
    card = (ROOT / "examples" / "models" / "crime_and_punishment" / "README.md").read_text(encoding="utf-8")
    write, cut, keep = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    book = "\r\n".join(f"line {number}: a story" for number in range(100))
    marks = "*** START OF THE PROJECT GUTENBERG EBOOK X ***", "*** END OF THE PROJECT GUTENBERG EBOOK X ***"
    text = f"\ufeffA preface\r\n{marks[0]}\r\n\r\n{book}\r\n\r\n{marks[1]}\r\nLicense ***\r\n"
    (tmp_path / "pg2554.txt").write_bytes(text.encode())
    run(cut)
    parts = [(tmp_path / f"crime_and_punishment.{part}.txt").read_text() for part in ("train", "validation")]
    book = book.replace("\r\n", "\n")
    assert book.startswith("".join(parts))
    assert [100 * len(part) / len(book) for part in parts] == pytest.approx([90, 5], abs=0.2)
    save(bytes_model(ReformerForCausalLM, is_decoder=True), tmp_path / "runs" / "novel")
    run(keep)
    run(write)


def test_a_model_of_the_hub(run, tmp_path):
    export(bytes_model(ReformerForCausalLM, is_decoder=True), tmp_path / "your-name" / "model")
    (block,) = blocks_of("hub.md")
    assert type(run(block)["model"]).__name__ == "ReformerForCausalLM"


def test_a_checkpoint_of_the_builtin(run, tmp_path):
    builtin = make_builtin("ReformerModelWithLMHead")
    builtin.save_pretrained(tmp_path / "google" / "reformer-crime-and-punishment")
    (block,) = blocks_of("checkpoints.md")
    assert run(block)["model"].config.attention_mode == "chunk"


@pytest.mark.slow
def test_an_export_to_onnx(run, tmp_path):
    for needed in ("onnxscript", "onnxruntime"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    save(bytes_model(ReformerForSequenceClassification), tmp_path / "runs" / "mine")
    names = run(*blocks_of("exporting.md"))
    with torch.no_grad():
        expected = names["model"](names["ids"]).logits
    assert torch.allclose(torch.from_numpy(names["logits"]), expected, atol=1e-4)


def test_trees_on_the_words_that_texts_share(run, tmp_path, capsys):
    pairs = itertools.product("abcd", repeat=2)
    rows = [{"question": f"What is {x}?", "sentence": f"{y} is good.", "label": int(x == y)} for x, y in pairs]
    for split in ("train", "validation"):
        pd.DataFrame(rows * 10).to_parquet(tmp_path / f"{split}.parquet")
    overlap = next(block for block in blocks_of("applications.md") if "def overlap" in block)
    run(overlap)
    assert float(capsys.readouterr().out) == 1.0  # the only word that tells them apart is the one they share


def test_a_choice(run, tmp_path, capsys):
    save(bytes_model(ReformerForMultipleChoice), tmp_path / "runs" / "multiple-choice")
    run(next(block for block in blocks_of("applications.md") if "MultipleChoice" in block))
    assert re.fullmatch(r"She opened .+\n", capsys.readouterr().out)


def test_recommendations(run, tmp_path, capsys):
    items = ["12", "907", "33", *map(str, range(100, 117))]
    table = [{"user": u, "item": items[(u + n) % 20], "time": n} for u in range(20) for n in range(6)]
    pd.DataFrame(table).to_csv(tmp_path / "train.csv", index=False)
    options = {"train_file": "train.csv", "output_dir": "runs/recommendation", "max_steps": 1, "hidden_size": 32}
    options |= {"attention_head_size": 16, "feed_forward_size": 32, "report_to": "none", "use_cpu": True}
    main(["train", "recommendation", *(word for name, x in options.items() for word in (f"--{name}", str(x)))])
    capsys.readouterr()
    run(next(block for block in blocks_of("applications.md") if "num_beams" in block))
    recommended = re.findall(r"'(\w+)'", capsys.readouterr().out)
    assert len(set(recommended)) == len(recommended) > 1
    assert set(recommended) <= set(items) - {"12", "907", "33"}


def test_pairs_for_summaries(run, tmp_path):
    pd.DataFrame({"source": [SENTENCES] * 3}).to_parquet(tmp_path / "train.parquet")
    run(*blocks_of("seq2seq.md"))
    pairs = pd.read_parquet(tmp_path / "pairs.parquet")
    assert len(pairs) == 36
    for source, target in zip(pairs.source, pairs.target, strict=True):
        assert target in source
        assert target.startswith("We ") or "We " not in source


@pytest.mark.slow
def test_a_benchmark_of_the_harness(run, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    rows = [{"text": "He went slowly down the stairs and out into the street.", "domain": None}] * 2
    known = datasets.DatasetDict(test=datasets.Dataset.from_list(rows))
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: known)  # the task's own, from the Hub
    (block,) = blocks_of("generation.md")
    run(block.replace("examples/models", str(ROOT / "examples" / "models")))
    assert float(re.search(r"'perplexity,none': (?:np\.float64\()?([\d.]+)", capsys.readouterr().out)[1]) > 1
