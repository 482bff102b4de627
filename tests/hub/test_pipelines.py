"""Pipelines: those of transformers over long texts, ours that finds answers in them, and sentence embeddings."""

import itertools
import random
import re
import string

import pytest
import torch
from conftest import SMALL_WINDOWS, make_model, max_abs_diff
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, BertForQuestionAnswering, ByT5Tokenizer, PreTrainedTokenizerFast, pipeline
from transformers.modeling_outputs import QuestionAnsweringModelOutput

import hf_reformer
from hf_reformer import LongDocumentQuestionAnswering, ReformerByteTokenizer, ReformerForQuestionAnswering, register
from hf_reformer.data.bpe_tokenizer import train_bpe_tokenizer
from hf_reformer.hub.pipelines import TASK, best_spans

SENTENCE = "Zürich liegt am See, 408 m ü. M. – viele fahren Velo. "
LONG = (SENTENCE * 70)[:3001]  # characters; some more bytes
LENGTHS = (3001, 1234, 17)
LABELS = {"id2label": {0: "contradiction", 1: "entailment"}, "label2id": {"contradiction": 0, "entailment": 1}}


def long_model(name: str, **overrides):
    sizes = {"dtype": torch.float32, "vocab_size": 300, "max_position_embeddings": 4096, **SMALL_WINDOWS, **LABELS}
    return make_model(getattr(hf_reformer, name), **{**sizes, **overrides})


def save(folder, model, tokenizer=None) -> str:
    model.save_pretrained(folder)
    (tokenizer or ReformerByteTokenizer(model_max_length=4096)).save_pretrained(folder)
    return str(folder)


# --- the library's own


PIPELINES = {  # the head, what a call is given, and what makes it cut a text that is too long
    "feature-extraction": ("ReformerModel", {}, {"truncation": True}),
    "fill-mask": ("ReformerForMaskedLM", {}, {"tokenizer_kwargs": {"truncation": True}}),
    "text-classification": ("ReformerForSequenceClassification", {"top_k": None}, {"truncation": True}),
    "text-generation": (
        "ReformerForCausalLM",
        {"max_new_tokens": 3, "do_sample": False},
        {"handle_long_generation": "hole"},
    ),
    "token-classification": ("ReformerForTokenClassification", {}, {}),
    "zero-shot-classification": ("ReformerForSequenceClassification", {"candidate_labels": ["a", "b"]}, {}),
}


def same(a, b) -> bool:
    """Equal, numbers to 1e-5."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b if isinstance(a, (str, int)) else abs(a - b) < 1e-5


@pytest.mark.parametrize("task", PIPELINES)
def test_long_texts_alone_and_in_a_batch(task, tmp_path, captured_warnings):
    name, arguments, _ = PIPELINES[task]
    pipe = pipeline(task, model=save(tmp_path, long_model(name)))
    assert type(pipe.model) is getattr(hf_reformer, name)
    assert type(pipe.tokenizer) is ReformerByteTokenizer
    texts = [LONG[:length] + "<|mask|>" for length in LENGTHS]
    alone = [pipe(text, **arguments) for text in texts]
    batched = pipe(texts, batch_size=3, **arguments)
    assert len(batched) == len(texts)
    for text, one, other in zip(texts, alone, batched, strict=True):
        assert one
        if task == "feature-extraction":  # padding is part of what it returns
            length = len(pipe.tokenizer(text)["input_ids"])
            assert len(one[0]) == length
            other = [other[0][:length]]
        assert same(one, other)
    assert not captured_warnings


@pytest.mark.parametrize("task", PIPELINES)
def test_a_text_beyond_the_positions_is_refused_or_cut(task, tmp_path, captured_warnings):
    name, arguments, cut = PIPELINES[task]
    model = long_model(name, position_embedding_type="axial")
    save(tmp_path, model, ReformerByteTokenizer())  # knows of no limit
    text = "<|mask|>" + "x" * 5000
    with pytest.raises(ValueError, match=r"covers .*40(95|96)"):
        pipeline(task, model=str(tmp_path))(text, **arguments)
    ReformerByteTokenizer(model_max_length=4096).save_pretrained(tmp_path)
    assert pipeline(task, model=str(tmp_path))(text, **arguments, **cut)
    assert not [message for message in captured_warnings if "longer than the specified maximum" not in message]


# --- the search for spans


def spans_one_by_one(starts, ends, inside, offsets, count, max_length):
    """What `best_spans` has to find, from all pairs of tokens."""
    spans = [
        (first, last, starts[first] + ends[last])
        for first in range(len(starts))
        for last in range(first, min(first + max_length, len(starts)))
        if all(inside[first : last + 1]) and starts[first] + ends[last] > -float("inf")
    ]
    found = []
    for first, last, score in sorted(spans, key=lambda span: (-span[2], span[0], span[1])):
        apart = [offsets[last][1] <= offsets[a][0] or offsets[b][1] <= offsets[first][0] for a, b, _ in found]
        if all(apart) and len(found) < count:
            found.append((first, last, score))
    return found


@settings(max_examples=150)
@given(st.data())
def test_the_search_finds_what_trying_all_spans_finds(data):
    length = data.draw(st.integers(1, 14))
    score = st.sampled_from([-float("inf"), 0.0, 1.0, 2.0, 3.0])  # with many ties
    starts, ends = (data.draw(st.lists(score, min_size=length, max_size=length)) for _ in range(2))
    inside = data.draw(st.lists(st.sampled_from([True, True, True, False]), min_size=length, max_size=length))
    shared = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))  # the character before
    characters = [sum(not same for same in shared[1 : i + 1]) for i in range(length)]
    offsets = [(character, character + 1) for character in characters]
    count, max_length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    if any(a == b and x != y for a, b, x, y in zip(characters, characters[1:], inside, inside[1:], strict=False)):
        inside = [True] * length  # a character lies in the document or it does not
    tensors = (torch.tensor(starts).double(), torch.tensor(ends).double(), torch.tensor(inside))
    found = list(best_spans(*tensors, offsets, count, max_length))
    assert found == spans_one_by_one(starts, ends, inside, offsets, count, max_length)


def test_the_search_over_64k_tokens():
    length = 2**16  # all pairs at once would be 32 GiB
    generator = torch.Generator().manual_seed(0)
    starts, ends = torch.rand(2, length, generator=generator).double()
    starts[50_000], ends[50_127], ends[50_128] = 5, 5, 9
    offsets = [(token, token + 1) for token in range(length)]
    found = list(best_spans(starts, ends, torch.ones(length, dtype=torch.bool), offsets, 5, 128))
    assert found[0] == (50_000, 50_127, 10)
    assert len(found) == 5


# --- answers


def bpe_tokenizer(token_types: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = train_bpe_tokenizer([SENTENCE], vocab_size=290)
    if token_types:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>")
    return tokenizer


TOKENIZERS = {
    "bytes": ReformerByteTokenizer,
    "bytes with a first token": lambda: ReformerByteTokenizer(add_bos_token=True, add_eos_token=True),
    "bpe": bpe_tokenizer,
    "bpe with token types": lambda: bpe_tokenizer(token_types=True),
}


def make_reader(tokenizer=None, **overrides) -> LongDocumentQuestionAnswering:
    model = long_model("ReformerForQuestionAnswering", **overrides)
    return LongDocumentQuestionAnswering(model, tokenizer or ReformerByteTokenizer())


def let_it_choose(reader, monkeypatch, starts, ends) -> None:
    """Make the model score the tokens in `starts` and `ends`, dicts by place, and all others 0."""

    def forward(input_ids, **kwargs):
        scores = torch.zeros(2, *input_ids.shape)
        for row, chosen in zip(scores, (starts, ends), strict=True):
            for place in chosen.keys() & set(range(row.shape[1])):
                row[:, place] = chosen[place]
        return QuestionAnsweringModelOutput(start_logits=scores[0], end_logits=scores[1])

    monkeypatch.setattr(reader.model, "forward", forward)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_an_answer_is_what_stands_at_its_place_in_the_document(kind, monkeypatch):
    reader = make_reader(TOKENIZERS[kind]())
    context = "Größe: 1,5 €\u2003–  日本語 🙂🙂 e\u0301nde"
    encoded = reader.tokenizer("Wie groß? ", context)
    offsets, sequences = encoded[0].offsets, encoded.sequence_ids()
    solid = [i for i, (a, b) in enumerate(offsets) if sequences[i] == 1 and context[a:b].strip()]
    pairs = list(itertools.combinations_with_replacement(solid, 2))
    for first, last in random.Random(0).sample(pairs, 40):
        let_it_choose(reader, monkeypatch, {first: 50}, {last: 50})
        answer = reader("Wie groß? ", context)
        assert answer["answer"] == context[offsets[first][0] : offsets[last][1]].strip()
        assert answer["answer"] == context[answer["start"] : answer["end"]]
        assert answer["score"] == pytest.approx(1)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_batch_are_answered_as_alone(kind, side, captured_warnings):
    tokenizer = TOKENIZERS[kind]()
    tokenizer.padding_side = side
    reader = make_reader(tokenizer)
    inputs = [{"question": "q" * (i + 1), "context": LONG[:length]} for i, length in enumerate(LENGTHS)]
    options = {"top_k": 4, "max_answer_length": 9, "handle_impossible_answer": True}
    alone = [reader(one, **options) for one in inputs]
    assert same(alone, reader(inputs, batch_size=3, **options))
    assert same(alone, list(reader((one for one in inputs), batch_size=2, **options)))
    for one, answers in zip(inputs, alone, strict=True):
        scores = [answer["score"] for answer in answers]
        assert len(answers) == 4
        assert scores == sorted(scores, reverse=True)
        spans = sorted((answer["start"], answer["end"]) for answer in answers if answer["answer"])
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        for answer in answers:
            assert answer["answer"] == one["context"][answer["start"] : answer["end"]].strip()
            assert len(tokenizer(answer["answer"], add_special_tokens=False)["input_ids"]) <= 9
    assert not captured_warnings


def test_question_separator_white_space_and_padding_are_no_answers(monkeypatch):
    reader = make_reader()
    question, context = "what", " ab "  # tokens: 4, the separator, 4, then padding beside the longer row
    high = dict.fromkeys([0, 1, 2, 3, 4, 5, 8, *range(9, 40)], 50.0)
    let_it_choose(reader, monkeypatch, {**high, 6: 1}, {**high, 7: 1})
    for answer in (reader(question, context), reader(question, [context, context * 9], batch_size=2)[0]):
        assert (answer["answer"], answer["start"], answer["end"]) == ("ab", 1, 3)


def test_no_answer_is_the_first_token(monkeypatch):
    reader = make_reader()
    let_it_choose(reader, monkeypatch, {0: 3, 6: 2}, {0: 3, 7: 2})
    nothing, found = reader("what", "abcd", top_k=2, handle_impossible_answer=True)
    assert nothing == {"score": nothing["score"], "start": 0, "end": 0, "answer": ""}
    assert found["answer"] == "bc"
    e = torch.tensor([3.0, 2, 0, 0, 0]).softmax(-1).tolist()  # of the first token and the document's four
    assert (nothing["score"], found["score"]) == pytest.approx((e[0] ** 2, e[1] ** 2))
    assert reader("what", "abcd", handle_impossible_answer=True) == nothing
    assert reader("what", "abcd") == found
    let_it_choose(reader, monkeypatch, {0: 1, 6: 2}, {0: 1, 7: 2})
    assert reader("what", "abcd", handle_impossible_answer=True)["answer"] == "bc"


def test_questions_and_documents_in_every_form():
    reader = make_reader()
    alone = [[reader(question, context) for context in ("first", "second one")] for question in ("q", "who?")]
    assert reader(question="q", context="first") == alone[0][0]
    assert reader({"question": "q", "context": "first"}) == alone[0][0]
    assert same(reader([{"question": "q", "context": "first", "id": 7}]), [alone[0][0]])
    assert same(reader(["q", "who?"], ["first", "second one"]), [alone[0][0], alone[1][1]])
    assert same(reader(["q", "who?"], "second one"), [alone[0][1], alone[1][1]])
    assert same(reader("who?", ("first", "second one")), alone[1])
    assert reader(["q"], ["first"]) == [alone[0][0]]
    assert reader([]) == []


def test_what_cannot_be_answered_is_refused():
    reader = make_reader()
    for question, context in (("", "text"), ("q", ""), ("q", " \n")):
        with pytest.raises(ValueError, match="is empty"):
            reader(question, context)
    with pytest.raises(ValueError, match="2 questions and 3 documents"):
        reader(["q"] * 2, ["text"] * 3)
    for inputs in (
        (3,),
        ("q",),
        ({"question": "q"},),
        ("q", 3),
        ([3], ["text"]),
        ([{"question": "q", "context": 1}],),
    ):
        with pytest.raises(TypeError, match=r"An input is|must be a string"):
            reader(*inputs)
    for name in ("top_k", "max_answer_length"):
        with pytest.raises(ValueError, match=f"`{name}=0`"):
            reader("q", "text", **{name: 0})
    with pytest.raises(TypeError, match="max_answer_len"):
        reader("q", "text", max_answer_len=3)


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_are_refused_and_not_taken_for_no_answer(score):
    reader = make_reader()
    torch.nn.init.constant_(reader.model.qa_outputs.bias, score)
    for options in ({}, {"top_k": 3}, {"handle_impossible_answer": True}):
        with pytest.raises(ValueError, match="NaN or infinite"):
            reader("who?", "text", **options)


@pytest.mark.parametrize("positions", ["axial", "learned", "rotary"])
def test_an_input_beyond_the_positions_is_refused(positions, captured_warnings):
    reader = make_reader(position_embedding_type=positions, max_position_embeddings=64)
    reader.tokenizer.model_max_length = 20  # which is about training, not about what the model can read
    assert reader("q", "x" * 62)["answer"]
    if positions == "rotary":
        assert reader("q", "x" * 3000)["answer"]
    else:
        with pytest.raises(ValueError, match=r"65 tokens, 1 of them the question's.* positions for 64\. Shorten"):
            reader("q", "x" * 63)
    assert not captured_warnings


def test_models_and_tokenizers_that_cannot_serve_are_refused():
    model = make_model(ReformerForQuestionAnswering)
    for tokenizer in (None, ByT5Tokenizer()):
        with pytest.raises(ValueError, match="Give a fast tokenizer"):
            LongDocumentQuestionAnswering(model, tokenizer)
    with pytest.raises(ValueError, match="AutoModelForQuestionAnswering"):
        LongDocumentQuestionAnswering(make_model(hf_reformer.ReformerModel), ReformerByteTokenizer())


def test_other_models_may_answer():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForQuestionAnswering(BertConfig(vocab_size=300, max_position_embeddings=100, **sizes)).eval()
    reader = LongDocumentQuestionAnswering(model, bpe_tokenizer())
    answers = reader("Wo?", [SENTENCE, SENTENCE[:30]], batch_size=2)
    assert same(answers, [reader("Wo?", SENTENCE), reader("Wo?", SENTENCE[:30])])
    with pytest.raises(ValueError, match="positions for 100"):
        reader("Wo?", SENTENCE * 9)


def test_a_folder_is_all_it_needs(tmp_path, captured_warnings):
    register()  # again, which changes nothing
    folder = save(tmp_path / "first", long_model("ReformerForQuestionAnswering"))
    reader = pipeline(TASK, model=folder)
    assert type(reader) is LongDocumentQuestionAnswering
    assert type(reader.model) is ReformerForQuestionAnswering
    answer = reader(question="Wo?", context=LONG)
    reader.save_pretrained(tmp_path / "second")
    assert not list((tmp_path / "second").glob("*.py"))  # nor would `trust_remote_code` be asked for
    assert pipeline(TASK, model=str(tmp_path / "second"))("Wo?", LONG) == answer
    assert not captured_warnings


def numbers_in_letters(rng: random.Random, length: int, found: bool) -> tuple[str, str]:
    """A text of letters with one number in it, or none, and that number."""
    answer = "".join(rng.choices(string.digits, k=rng.randint(2, 6))) if found else ""
    at = rng.randrange(1, length)
    letters = "".join(rng.choices(string.ascii_lowercase + "éß ", k=length))
    return letters[:at] + answer + letters[at:], answer


@pytest.mark.slow
def test_a_trained_model_finds_the_answer_in_a_long_document():
    rng, tokenizer, question = random.Random(0), ReformerByteTokenizer(), "Which number?"
    small = {"vocab_size": 260, "attn_layers": ["local"], "local_window": 16, "position_embedding_type": "rotary"}
    model = make_model(ReformerForQuestionAnswering, dtype=torch.float32, initializer_range=0.1, **small).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=300)
    for _ in range(300):
        texts, answers = zip(*(numbers_in_letters(rng, 40, found=row > 0) for row in range(16)), strict=True)
        encoded = tokenizer([question] * 16, list(texts), return_tensors="pt", padding=True)
        spans = [re.search(r"\d+|$", text).span() for text in texts]
        labels = [
            [encoded.char_to_token(row, place, 1) if answers[row] else 0 for place in (start, end - 1)]
            for row, (start, end) in enumerate(spans)
        ]
        starts, ends = torch.tensor(labels).unbind(-1)
        optimizer.zero_grad()
        model(**encoded, start_positions=starts, end_positions=ends).loss.backward()
        optimizer.step()
        schedule.step()
    reader = LongDocumentQuestionAnswering(model.eval(), tokenizer, handle_impossible_answer=True)
    for length in (100, 1000, 5000):
        text, answer = numbers_in_letters(rng, length, found=True)
        found = reader(question, text)
        assert (found["answer"], found["start"]) == (answer, text.index(answer))
    assert reader(question, numbers_in_letters(rng, 100, found=False)[0])["answer"] == ""


# --- sentence-transformers


def test_sentence_transformers_embeds_long_documents(tmp_path, captured_warnings):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    model, tokenizer = long_model("ReformerModel"), ReformerByteTokenizer()
    transformer = Transformer(save(tmp_path / "model", model, tokenizer))
    width = 2 * model.config.hidden_size
    encoder = sentence_transformers.SentenceTransformer(modules=[transformer, Pooling(width, "mean")], device="cpu")
    texts = [LONG[:length] for length in LENGTHS]
    together = encoder.encode(texts, batch_size=3, convert_to_tensor=True)
    alone = torch.stack([encoder.encode(text, convert_to_tensor=True) for text in texts])
    with torch.no_grad():
        by_hand = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    assert max_abs_diff(together, alone) < 1e-5
    assert max_abs_diff(together, torch.stack(by_hand)) < 1e-5
    assert encoder.get_embedding_dimension() == together.shape[1] == width

    encoder.save(str(tmp_path / "saved"))
    for folder in ("saved", "model"):  # a folder of the model alone is pooled the same
        loaded = sentence_transformers.SentenceTransformer(str(tmp_path / folder), device="cpu")
        assert max_abs_diff(loaded.encode(texts, convert_to_tensor=True), together) < 1e-5
    assert sentence_transformers.SentenceTransformer(str(tmp_path / "saved")).get_embedding_dimension() == width
    assert not captured_warnings
