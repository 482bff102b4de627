"""lm-evaluation-harness: its `hf` model, given one of ours, computes what our model computes."""

from pathlib import Path

import pytest
import torch
from conftest import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_reformer import ReformerByteTokenizer, ReformerForCausalLM

huggingface = pytest.importorskip("lm_eval.models.huggingface")
instance = pytest.importorskip("lm_eval.api.instance")

EXAMPLE = Path(__file__).parents[2] / "examples" / "models" / "crime_and_punishment"
PAIRS = [("He went slowly down the stairs and", " went out into the street."), ("It was", " a hot day.")]
TEXT = "He went slowly down the stairs and out into the street."


@pytest.fixture(scope="module", params=["bytes", "trained"])
def model_and_tokenizer(request):
    if request.param == "bytes":
        tokenizer = ReformerByteTokenizer()
        config = {"vocab_size": len(tokenizer), "dtype": torch.float32, "eos_token_id": 1, "is_decoder": True}
        return make_model(ReformerForCausalLM, **config), tokenizer
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype="float32").eval()
    return model, AutoTokenizer.from_pretrained(EXAMPLE)


def harness(model_and_tokenizer, **options):
    model, tokenizer = model_and_tokenizer
    return huggingface.HFLM(pretrained=model, tokenizer=tokenizer, **options)


def asked(kind, *arguments):
    return [instance.Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


@torch.no_grad()
def log_probabilities(model, ids, first):
    """Of the tokens from number `first` on, given all before; and whether each is the likeliest."""
    logs = model(torch.tensor([ids])).logits[0, first - 1 : -1].log_softmax(-1)
    target = torch.tensor(ids[first:])
    return logs.gather(1, target[:, None]).sum().item(), bool((logs.argmax(-1) == target).all())


@pytest.mark.parametrize("batch_size", [1, 2])
def test_likelihoods_of_continuations(model_and_tokenizer, batch_size):
    model, tokenizer = model_and_tokenizer
    found = harness(model_and_tokenizer, batch_size=batch_size).loglikelihood(asked("loglikelihood", *PAIRS))
    for (context, more), (total, greedy) in zip(PAIRS, found, strict=True):
        ids, before = tokenizer(context + more)["input_ids"], len(tokenizer(context)["input_ids"])
        expected, likeliest = log_probabilities(model, ids, before)
        assert total == pytest.approx(expected, rel=1e-4)
        assert greedy == likeliest


def test_likelihoods_of_whole_texts(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    lm = harness(model_and_tokenizer, batch_size=1, add_bos_token=False)  # it puts one there itself
    (found,) = lm.loglikelihood_rolling(asked("loglikelihood_rolling", (TEXT,)))
    ids = [tokenizer.bos_token_id, *tokenizer(TEXT, add_special_tokens=False)["input_ids"]]
    assert found == pytest.approx(log_probabilities(model, ids, 1)[0], rel=1e-4)


def test_texts_that_are_generated(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    options = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    (found,) = harness(model_and_tokenizer, batch_size=1).generate_until(asked("generate_until", (TEXT, options)))
    inputs = tokenizer(TEXT, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert found == tokenizer.decode(out, skip_special_tokens=True).split("\n\n")[0]
