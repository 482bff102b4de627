"""Parts that the recipes share: what is evaluated while training, tokenizers that tell places, highlighted texts."""

import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, CanineTokenizer, Trainer

from hf_reformer.data.bpe_tokenizer import train_bpe_tokenizer
from hf_reformer.training import trainers
from hf_reformer.training.model_setup import ModelArguments, make_tokenizer
from hf_reformer.training.reports import Highlighted, write_highlights

SOURCE = Path(trainers.__file__).parent


@pytest.mark.parametrize(
    ("splits", "evaluated"),
    [
        (["train", "test"], None),
        (["train", "validation", "test"], "validation"),
        (["train", "validation_a", "validation_b", "test"], ["validation_a", "validation_b"]),
        (["test"], "test"),
        (["validation", "test"], "validation"),
    ],
)
def test_test_data_are_never_evaluated_while_training(monkeypatch, splits, evaluated):
    monkeypatch.setattr(trainers, "has_hashing_layers", lambda model: False)
    made = trainers.build_trainer(SimpleNamespace, None, None, None, {split: split for split in splits})
    found = made.eval_dataset
    assert (list(found) if isinstance(found, dict) else found) == evaluated


def test_every_split_is_evaluated_with_its_own_metrics(monkeypatch):
    """Texts differ in bytes per token."""
    trainer = object.__new__(trainers.LanguageModelTrainer)
    monkeypatch.setattr(Trainer, "evaluate", lambda self, *args: self.compute_metrics)
    trainer.metrics = {"test": "of test", "validation_a": "of a", "validation_b": "of b"}
    used = {prefix: trainer.evaluate(metric_key_prefix=prefix) for prefix in ("eval", "eval_validation_b", "test")}
    assert used == {"eval": "of a", "eval_validation_b": "of b", "test": "of test"}
    trainer.metrics = {"test": "of test"}
    assert trainer.evaluate() is None


def test_nothing_of_training_is_float64_on_the_device():
    """MPS has none."""
    for file in [*SOURCE.glob("*.py"), *(SOURCE.parent / "recipes").glob("*.py")]:
        assert not re.search(r"torch\.float64|torch\.double|\.double\(", file.read_text(encoding="utf-8")), file


def test_a_tokenizer_that_tells_places_pads_and_truncates_on_the_right(tmp_path):
    train_bpe_tokenizer(["a b c"] * 3, 300).save_pretrained(tmp_path / "left")
    left = AutoTokenizer.from_pretrained(tmp_path / "left", padding_side="left", truncation_side="left")
    left.save_pretrained(tmp_path / "left")
    args = ModelArguments(tokenizer=str(tmp_path / "left"))
    assert make_tokenizer(args, (), 8).padding_side == "left"
    tokenizer = make_tokenizer(args, (), 8, offsets=True)
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "right")
    CanineTokenizer().save_pretrained(tmp_path / "slow")
    slow = ModelArguments(tokenizer=str(tmp_path / "slow"))
    assert not make_tokenizer(slow, (), 8).is_fast
    with pytest.raises(ValueError, match="CanineTokenizer does not tell which characters"):
        make_tokenizer(slow, (), 8, offsets=True)


def marked(page: str, kind: str) -> str:
    """The characters of the text that have a class, behind the heading."""
    page = page.partition("</h3>")[2]
    page = re.sub(r"<sup>.*?</sup>", "", page)
    return "".join(re.findall(rf"<span class='[^']*{kind}[^']*'>([^<]*)</span>", page))


SPANS = st.lists(st.tuples(st.integers(0, 39), st.integers(1, 9)), max_size=6)


@given(SPANS, SPANS)
def test_highlights_are_the_characters_of_the_spans(true, predicted):
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 50)))
    spans = [[(start, start + size, "") for start, size in some] for some in (true, predicted)]
    file = Path("highlights.html")
    with pytest.MonkeyPatch.context() as patch:
        pages: list[str] = []
        patch.setattr(Path, "write_text", lambda self, page, **options: pages.append(page))
        write_highlights(file, "t", [Highlighted("h", text, *spans)])
    for kind, some in zip(("true", "predicted"), spans, strict=True):
        assert marked(pages[0], kind) == "".join(x for i, x in enumerate(text) if any(a <= i < b for a, b, _ in some))


def test_many_spans_take_no_long_time_and_only_the_first_texts_are_made(tmp_path):
    spans = [(2 * i, 2 * i + 1, "X") for i in range(20_000)]
    start = time.perf_counter()
    write_highlights(tmp_path / "h.html", "t", [Highlighted("h", "x" * 40_000, spans, spans)])
    assert time.perf_counter() - start < 20  # minutes if every piece looks at all spans
    asked = []
    write_highlights(tmp_path / "h.html", "t", (asked.append(i) or Highlighted("h", "x", [], []) for i in range(500)))
    assert len(asked) == 100
