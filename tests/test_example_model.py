"""The small model in `examples/models` is what its card says."""

import math
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_reformer  # noqa: F401

FOLDER = Path(__file__).parents[1] / "examples" / "models" / "crime_and_punishment"
SENTENCE = "He went slowly down the stairs and out into the street, and he did not look at the people who passed him."


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


def bits_per_byte(model, tokenizer, text):
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        nats = model(input_ids=ids, labels=ids).loss * (ids.shape[1] - 1)
    return nats.item() / math.log(2) / len(text.encode())


def test_the_folder_is_small_and_half_precise(model):
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 6e6
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert int(re.search(r"of ([\d,]+) parameters", card)[1].replace(",", "")) == model.num_parameters()


def test_its_tokenizer_begins_a_text_and_leaves_its_end_open(tokenizer):
    ids = tokenizer("It was")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids[1:]) == "It was"


def test_it_knows_english(model, tokenizer):
    """New prose is expected, the same words in another order are not, nor is another language."""
    prose = bits_per_byte(model, tokenizer, SENTENCE)
    assert prose < 2.2
    assert bits_per_byte(model, tokenizer, " ".join(sorted(SENTENCE.split()))) > prose + 1
    assert (
        bits_per_byte(model, tokenizer, "Er ging langsam die Treppe hinunter und auf die Straße hinaus.") > prose + 1
    )


def test_it_writes_words(model, tokenizer):
    torch.manual_seed(0)
    inputs = tokenizer("Raskolnikov opened the door and", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=60)[0], skip_special_tokens=True)
    common = {"the", "and", "he", "was", "to", "a", "of", "in", "his", "that", "had", "it", "her", "him", "not"}
    assert len(common & set(re.findall(r"[a-z]+", text.lower()))) >= 4
