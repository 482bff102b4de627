"""The byte tokenizer: every text survives it, every id is where google/reformer-enwik8 expects it."""

import copy
import json
import pickle

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, TokenizersBackend

from hf_reformer.tokenization_reformer import VOCAB, ReformerByteTokenizer

TOKENIZER = ReformerByteTokenizer()
PAD, EOS, MASK, BOS = 0, 1, 258, 259
SPECIALS = ("<|pad|>", "<|eos|>", "<|mask|>", "<|bos|>")

any_text = st.text(st.characters(exclude_categories=["Cs"]))  # whatever UTF-8 can hold: surrogates it cannot
plain_text = any_text.filter(lambda text: not any(special in text for special in SPECIALS))
tricky_texts = [
    "",
    " ",
    "  leading and trailing  ",
    "\r\n\n\r\t",
    "\0a\0",
    "e\u0301 is not é",
    "\ufeffbyte order mark, \ufffd, \u2028 and \x85",
    "👩\u200d👩\u200d👧 漢字 שלום",
    "<s></s><pad><mask>[CLS] ##x ĠĠ",
    "<|pad|>a<|eos|> <|mask|> <|bos|>",
    "don't , stop .  ",
]


def for_any(*strategies, **named):
    """`given`, without a stopwatch: the first call of a tokenizer on a busy machine may take a while."""
    return lambda test: settings(deadline=None)(given(*strategies, **named)(test))


def bytes_of(text: str) -> list[int]:
    return [byte + 2 for byte in text.encode()]


# --- text → ids → text


@for_any(plain_text)
def test_ids_are_bytes_plus_two(text):
    assert TOKENIZER(text)["input_ids"] == bytes_of(text)


@for_any(any_text)
def test_any_text_survives(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


@pytest.mark.parametrize("text", tricky_texts)
def test_tricky_texts_survive(text):
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"], clean_up_tokenization_spaces=True) == text
    raw = TOKENIZER(text, split_special_tokens=True)["input_ids"]
    assert raw == bytes_of(text)
    assert TOKENIZER.decode(raw, skip_special_tokens=True) == text


def test_text_that_spells_a_special_token_is_that_token_unless_split():
    assert TOKENIZER("a<|mask|>")["input_ids"] == [*bytes_of("a"), MASK]
    split = ReformerByteTokenizer(split_special_tokens=True)
    assert split("a<|mask|>")["input_ids"] == bytes_of("a<|mask|>")


@for_any(st.lists(st.integers(0, 255)))
def test_bytes_that_are_not_utf8_become_replacement_characters(values):
    ids = [value + 2 for value in values]
    assert TOKENIZER.decode(ids) == bytes(values).decode("utf-8", errors="replace")


@for_any(st.lists(st.integers(-(2**70), 2**70) | st.integers(-3, 300)), st.booleans())
def test_decoding_never_raises_and_leaves_meaningless_ids_out(ids, skip):
    known = [i for i in ids if 0 <= i < len(TOKENIZER)]
    assert TOKENIZER.decode(ids, skip_special_tokens=skip) == TOKENIZER.decode(known, skip_special_tokens=skip)


def test_decoding_labels_and_single_ids():
    assert TOKENIZER.decode(np.array([-100, 74, 107, -100])) == "Hi"
    assert TOKENIZER.decode(74) == "H"
    assert TOKENIZER.decode(-100) == ""
    assert TOKENIZER.batch_decode([[74, EOS, PAD], [MASK, 107]], skip_special_tokens=True) == ["H", "i"]
    assert TOKENIZER.decode([BOS, 74, EOS, PAD]) == "<|bos|>H<|eos|><|pad|>"


# --- vocabulary


def test_vocabulary():
    assert len(TOKENIZER) == TOKENIZER.vocab_size == 260
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(260))
    assert TOKENIZER.get_vocab() == VOCAB
    assert (TOKENIZER.pad_token_id, TOKENIZER.eos_token_id, TOKENIZER.sep_token_id) == (PAD, EOS, EOS)
    assert (TOKENIZER.mask_token_id, TOKENIZER.bos_token_id) == (MASK, BOS)
    assert TOKENIZER.unk_token_id is TOKENIZER.cls_token_id is None
    assert TOKENIZER.model_input_names == ["input_ids", "attention_mask"]
    assert TOKENIZER.is_fast
    assert TOKENIZER.model_max_length > 10**20


def test_a_new_token_comes_after_everything():
    tokenizer = ReformerByteTokenizer(cls_token="<|cls|>", pad_token="[PAD]", extra_special_tokens=["<|x|>"])
    tokenizer.add_tokens(["whole"])
    assert sorted(tokenizer.convert_tokens_to_ids(["<|cls|>", "[PAD]", "<|x|>", "whole"])) == [260, 261, 262, 263]
    assert tokenizer("a whole<|mask|>é")["input_ids"] == [*bytes_of("a "), 263, MASK, *bytes_of("é")]
    assert tokenizer.decode(tokenizer("a whole<|cls|>b")["input_ids"], skip_special_tokens=True) == "a wholeb"


def test_there_is_nothing_to_train():
    with pytest.raises(NotImplementedError, match="256 bytes"):
        TOKENIZER.train_new_from_iterator(["text"], 300)


# --- where a token came from


@for_any(plain_text)
def test_offsets_point_at_the_character_a_byte_belongs_to(text):
    offsets = TOKENIZER(text, return_offsets_mapping=True)["offset_mapping"]
    expected = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]
    assert offsets == expected


@for_any(st.lists(st.sampled_from(["a", "é", "漢", " ", "👧", *SPECIALS])))
def test_offsets_around_special_tokens(parts):
    text = "".join(parts)
    encoded = TOKENIZER(text, return_offsets_mapping=True)
    assert len(encoded["offset_mapping"]) == len(encoded["input_ids"])
    for (start, end), token_id in zip(encoded["offset_mapping"], encoded["input_ids"], strict=True):
        token = text[start:end]
        is_special = token_id in (PAD, EOS, MASK, BOS)
        assert token in SPECIALS if is_special else token_id - 2 in token.encode() and len(token) == 1


def test_words():
    encoded = TOKENIZER("héé you")
    assert encoded.word_ids() == [0] * 5 + [1] * 4
    assert encoded.char_to_token(1) == 1
    assert encoded.token_to_chars(2) == (1, 2)


def test_words_given_one_by_one_can_be_kept_apart():
    glued = TOKENIZER(["ab", "c"], is_split_into_words=True)
    assert TOKENIZER.decode(glued["input_ids"]) == "abc"
    assert glued.word_ids() == [0, 0, 1]
    spaced = ReformerByteTokenizer(add_prefix_space=True)(["ab", "c"], is_split_into_words=True)
    assert TOKENIZER.decode(spaced["input_ids"]) == " ab c"
    assert spaced.word_ids() == [0, 0, 0, 1, 1]


# --- pairs, batches, limits


@for_any(plain_text, plain_text.filter(bool))
def test_a_pair_has_one_separator_and_fits_258_embeddings(first, second):
    encoded = TOKENIZER(first, second, return_offsets_mapping=True, return_token_type_ids=True)
    a, b = bytes_of(first), bytes_of(second)
    assert encoded["input_ids"] == [*a, EOS, *b]
    assert max(encoded["input_ids"]) < 258
    assert encoded.sequence_ids() == [0] * len(a) + [None] + [1] * len(b)
    assert encoded["token_type_ids"] == [0] * len(a) + [0] + [1] * len(b)
    assert encoded["offset_mapping"][len(a)] == (0, 0)
    for (start, end), token_id in zip(encoded["offset_mapping"][len(a) + 1 :], b, strict=True):
        assert token_id - 2 in second[start:end].encode()


def test_what_is_added_can_be_chosen():
    def ids(*texts, **kwargs):
        return ReformerByteTokenizer(**kwargs)(*texts)["input_ids"]

    a, b = bytes_of("a"), bytes_of("b")
    assert TOKENIZER("a", "b", add_special_tokens=False)["input_ids"] == a + b
    assert ids("a", add_bos_token=True, add_eos_token=True) == [BOS, *a, EOS]
    assert ids("a", "b", add_bos_token=True, add_eos_token=True) == [BOS, *a, EOS, *b, EOS]
    assert ids("a", "b", sep_token="<|sep|>") == [*a, 260, *b]
    assert ids("a", "b", sep_token=None) == a + b
    assert ids("a", bos_token=None, eos_token=None, add_bos_token=True, add_eos_token=True) == a
    assert TOKENIZER.num_special_tokens_to_add() == 0
    assert TOKENIZER.num_special_tokens_to_add(pair=True) == 1

    changed = ReformerByteTokenizer()
    changed.add_special_tokens({"sep_token": "<|sep|>"})
    changed.update_post_processor()
    assert changed("a", "b")["input_ids"] == [*a, 260, *b]
    changed.add_eos_token = True
    assert changed("a")["input_ids"] == [*a, EOS]


@pytest.mark.parametrize("side", ["left", "right"])
@for_any(texts=st.lists(plain_text, min_size=1, max_size=4))
def test_padding(side, texts):
    batch = TOKENIZER(texts, padding=True, padding_side=side, pad_to_multiple_of=4)
    width = len(batch["input_ids"][0])
    assert width % 4 == 0
    for text, ids, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        real, pads = bytes_of(text), width - len(bytes_of(text))
        assert ids == ([PAD] * pads + real if side == "left" else real + [PAD] * pads)
        assert mask == ([0] * pads + [1] * len(real) if side == "left" else [1] * len(real) + [0] * pads)
    assert TOKENIZER.batch_decode(batch["input_ids"], skip_special_tokens=True) == texts


def test_padding_side_of_the_tokenizer_and_tensors():
    left = ReformerByteTokenizer(padding_side="left")
    batch = left(["a", "bcd"], padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[PAD, PAD, 99], [100, 101, 102]]
    assert left.pad([{"input_ids": [9]}, {"input_ids": [8, 7]}])["input_ids"] == [[PAD, 9], [8, 7]]


@for_any(plain_text, st.integers(1, 8), st.sampled_from(["left", "right"]))
def test_truncation(text, limit, side):
    tokenizer = ReformerByteTokenizer(truncation_side=side)
    ids, whole = tokenizer(text, truncation=True, max_length=limit)["input_ids"], bytes_of(text)
    assert ids == (whole[:limit] if side == "right" else whole[max(0, len(whole) - limit) :])


def test_overflowing_windows_cover_a_long_context():
    question, context = "who?", "it was ÿ in the end"
    windows = TOKENIZER(
        question,
        context,
        truncation="only_second",
        max_length=12,
        stride=3,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert set(windows["overflow_to_sample_mapping"]) == {0}
    covered = set()
    for i, ids in enumerate(windows["input_ids"]):
        assert len(ids) <= 12
        assert ids[:5] == [*bytes_of(question), EOS]
        sequence_ids = windows.sequence_ids(i)
        for token, sequence in enumerate(sequence_ids):
            if sequence == 1:
                start, end = windows["offset_mapping"][i][token]
                assert ids[token] - 2 in context[start:end].encode()
                covered.update(range(start, end))
    assert covered == set(range(len(context)))


def test_empty_text_in_a_batch():
    assert TOKENIZER(["", "a"])["input_ids"] == [[], [99]]
    assert TOKENIZER("")["input_ids"] == []


# --- masking


def test_masking_leaves_specials_alone():
    mask = TOKENIZER("a", "b", return_special_tokens_mask=True)["special_tokens_mask"]
    assert mask == [0, 1, 0]
    mask = TOKENIZER.get_special_tokens_mask([BOS, 99, MASK, PAD, EOS], already_has_special_tokens=True)
    assert mask == [1, 0, 1, 1, 1]
    everywhere = {"mlm_probability": 1, "mask_replace_prob": 1, "random_replace_prob": 0}
    collator = DataCollatorForLanguageModeling(TOKENIZER, **everywhere)
    batch = collator([TOKENIZER("abc"), TOKENIZER("de")])
    assert batch["input_ids"].tolist() == [[MASK] * 3, [MASK, MASK, PAD]]
    assert batch["labels"].tolist() == [bytes_of("abc"), [*bytes_of("de"), -100]]


# --- what pipelines and generation ask for, with models that know nothing of us

BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 260}
UNPRINTABLE = [i for i in range(260) if not 33 <= i - 2 < 127]


def test_tokens_and_words_become_text():
    assert TOKENIZER.convert_tokens_to_string(TOKENIZER.tokenize("Zürich <|mask|>")) == "Zürich <|mask|>"
    assert TOKENIZER.convert_tokens_to_string(["Zürich", " ", "è"]) == "Zürich è"


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_token_classification(strategy):
    model = transformers.BertForTokenClassification(transformers.BertConfig(**BERT, num_labels=1)).eval()
    tagger = transformers.pipeline("token-classification", model, tokenizer=TOKENIZER, aggregation_strategy=strategy)
    text = "Anna war in Zürich"
    entities = tagger(text)
    if strategy == "none":
        assert "".join(text[e["start"] : e["end"]] for e in entities) == "Anna war in Züürich"  # ü is two bytes
    else:  # one label makes one entity of the whole
        assert [text[e["start"] : e["end"]] for e in entities] == [e["word"] for e in entities] == [text]


def test_fill_mask():
    model = transformers.BertForMaskedLM(transformers.BertConfig(**BERT)).eval()
    filler = transformers.pipeline("fill-mask", model, tokenizer=TOKENIZER)
    guesses = filler("Hé <|mask|>!", top_k=260)
    assert sorted(guess["token"] for guess in guesses) == list(range(260))
    assert [guess["sequence"] for guess in guesses if guess["token"] == ord("y") + 2] == ["Hé y!"]


def test_generation_stops_at_a_string():
    config = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=64, vocab_size=260, pad_token_id=PAD)
    model = transformers.GPT2LMHeadModel(config).eval()
    first = model.generate(**TOKENIZER("é", return_tensors="pt"), max_new_tokens=1, suppress_tokens=UNPRINTABLE)
    stop = TOKENIZER.decode(first[0, -1])
    more = {"max_new_tokens": 9, "suppress_tokens": UNPRINTABLE, "stop_strings": [stop], "tokenizer": TOKENIZER}
    assert TOKENIZER.decode(model.generate(**TOKENIZER("é", return_tensors="pt"), **more)[0]) == "é" + stop


# --- save, load, copy


def equal_in_use(one, other):
    texts = ["", "é <|mask|> whole<|cls|>\r\n", "漢 "]
    assert len(one) == len(other)
    assert one.get_vocab() == other.get_vocab()
    assert one.special_tokens_map == other.special_tokens_map
    assert one(texts)["input_ids"] == other(texts)["input_ids"]
    assert one("a", "b")["input_ids"] == other("a", "b")["input_ids"]
    assert one.decode(range(len(one))) == other.decode(range(len(other)))
    assert one.padding_side == other.padding_side
    assert one.chat_template == other.chat_template
    return True


CHANGES = {
    "plain": {},
    "sides": {"padding_side": "left", "truncation_side": "left", "model_max_length": 64},
    "around": {"add_bos_token": True, "add_eos_token": True},
    "tokens": {"cls_token": "<|cls|>", "sep_token": "<|sep|>", "pad_token": "<|eos|>"},
    "words": {"add_prefix_space": True},
    "chat": {"chat_template": "{% for m in messages %}{{ m.content }}<|eos|>{% endfor %}"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_save_and_load(change, tmp_path):
    tokenizer = ReformerByteTokenizer(**CHANGES[change])
    tokenizer.add_tokens(["whole"])
    for folder in (tmp_path / "once", tmp_path / "twice"):
        tokenizer.save_pretrained(folder)
        assert (folder / "tokenizer.json").is_file()
        assert json.loads((folder / "tokenizer_config.json").read_text())["tokenizer_class"] == "ReformerByteTokenizer"
        loaded = ReformerByteTokenizer.from_pretrained(folder)
        assert equal_in_use(tokenizer, loaded)
        assert loaded.model_max_length == tokenizer.model_max_length
        assert equal_in_use(tokenizer, TokenizersBackend.from_pretrained(folder))  # where this package is missing
        tokenizer = loaded


def test_loading_with_other_choices(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = ReformerByteTokenizer.from_pretrained(tmp_path, padding_side="left", add_eos_token=True, cls_token="[C]")
    assert loaded.padding_side == "left"
    assert loaded("a[C]")["input_ids"] == [99, 260, EOS]


@pytest.mark.parametrize("change", CHANGES)
def test_pickle_and_copy(change):
    tokenizer = ReformerByteTokenizer(**CHANGES[change])
    assert equal_in_use(tokenizer, pickle.loads(pickle.dumps(tokenizer)))
    assert equal_in_use(tokenizer, copy.deepcopy(tokenizer))


def test_a_folder_without_tokenizer_files_is_read_as_bytes(tmp_path):
    assert ReformerByteTokenizer.from_pretrained(tmp_path)("é")["input_ids"] == [197, 171]


def test_files_of_another_tokenizer_are_refused(tmp_path, builtin_tokenizer):
    builtin_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="another tokenizer"):
        ReformerByteTokenizer.from_pretrained(tmp_path)
    sentencepiece = tmp_path / "sentencepiece"
    sentencepiece.mkdir()
    (sentencepiece / "spiece.model").write_bytes(b"\0")
    with pytest.raises(ValueError, match="another tokenizer"):
        ReformerByteTokenizer.from_pretrained(sentencepiece)


def test_chat(tmp_path):
    pytest.importorskip("jinja2")
    tokenizer = ReformerByteTokenizer(chat_template=CHANGES["chat"]["chat_template"])
    messages = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "b"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "é<|eos|>b<|eos|>"
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(messages)["input_ids"] == [197, 171, EOS, 100, EOS]


@pytest.fixture
def builtin_tokenizer():
    vocab = {"<unk>": 0, "</s>": 1, "<pad>": 2, "▁": 3, "a": 4, "▁a": 5}
    return transformers.ReformerTokenizer(vocab=vocab, merges=[("▁", "a")], pad_token="<pad>")


# --- what the library's collators and pipelines make of it


@pytest.mark.filterwarnings("ignore:Random token replacement")
@pytest.mark.parametrize("side", ["right", "left"])
def test_whole_words_are_masked_whole(side):
    tokenizer = ReformerByteTokenizer(padding_side=side)
    hide = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, whole_word_mask=True, seed=0)
    texts = ["hello world, and more words to be hidden here", "Ärger über das\nschöne 漢字 Wörterbuch", "one"]
    encoded = [tokenizer(text, return_offsets_mapping=True) for text in texts]
    shown, hidden = 0, 0
    for _ in range(40):
        batch = hide([dict(x) for x in encoded])
        for labels, mask, x in zip(batch["labels"], batch["attention_mask"], encoded, strict=True):
            masked = labels[mask == 1] != -100
            assert not (labels[mask == 0] != -100).any()
            words = [[bool(masked[i]) for i, word in enumerate(x.word_ids()) if word == w] for w in set(x.word_ids())]
            assert all(len(set(word)) == 1 for word in words)
            hidden, shown = hidden + sum(word[0] for word in words), shown + sum(not word[0] for word in words)
    assert 0.2 < hidden / (hidden + shown) < 0.4


def test_offsets_survive_padding_and_still_cover_their_words():
    encoded = [TOKENIZER(text, return_offsets_mapping=True) for text in ("a bé", "c")]
    padded = TOKENIZER.pad([dict(x) for x in encoded], return_tensors="pt")
    assert padded["offset_mapping"].tolist() == [
        [[0, 1], [2, 2], [2, 3], [3, 4], [4, 4]],
        [[0, 1], [0, 0], [0, 0], [0, 0], [0, 0]],
    ]
    assert encoded[0]["offset_mapping"] == [(0, 1), (1, 2), (2, 3), (3, 4), (3, 4)]  # what it was given stays


def test_an_empty_text_has_integer_ids_and_pairs_of_offsets():
    encoded = TOKENIZER("", return_tensors="pt", return_offsets_mapping=True)
    assert encoded["input_ids"].shape == (0,) or encoded["input_ids"].shape == (1, 0)
    assert not encoded["input_ids"].is_floating_point()
    assert encoded["offset_mapping"].shape == (1, 0, 2)
    assert not TOKENIZER.pad([{"input_ids": []}], return_tensors="pt")["input_ids"].is_floating_point()
