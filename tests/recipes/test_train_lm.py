"""The language-modelling recipe: how it packs texts, what it scores, and whole runs as people start them."""

import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_reformer import ReformerByteTokenizer, ReformerConfig, ReformerForCausalLM, ReformerForMaskedLM, ReformerModel
from hf_reformer.data import packing
from hf_reformer.recipes import language_model as recipe

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    *("--hidden_size", "16", "--attn_layers", "local", "lsh", "--num_attention_heads", "1", "--num_hashes", "1"),
    *("--attention_head_size", "16", "--feed_forward_size", "32", "--sequence_length", "64"),
    *("--config_overrides", "lsh_window=16,local_window=8", "--learning_rate", "1e-2"),
    *("--per_device_train_batch_size", "4", "--use_cpu", "--disable_tqdm", "True", "--logging_steps", "2"),
]
BYTES = ReformerByteTokenizer()


def prose(words: int, seed: int = 0) -> str:
    """Lines of few words, with letters of two and three bytes among them."""
    draw = random.Random(seed)
    known = ["the", "naïve", "café", "is", "“open”", "and", "closed", "again"]
    lines = [" ".join(draw.choice(known) for _ in range(8)) for _ in range(words // 8)]
    return "\n".join(lines) + "\n"


@pytest.fixture
def files(tmp_path):
    """A folder with a.txt, b.txt and validation.txt."""
    for name, words, seed in (("a", 1600, 1), ("b", 400, 2), ("validation", 160, 3)):
        (tmp_path / f"{name}.txt").write_text(prose(words, seed), encoding="utf-8")
    return tmp_path


def arguments(folder: Path, *more: str, out: str = "out") -> list[str]:
    texts = ["--train_file", str(folder / "a.txt"), str(folder / "b.txt")]
    texts += ["--validation_file", str(folder / "validation.txt")]
    return [*TINY, *texts, "--output_dir", str(folder / out), *more]


def bits_of(folder: Path) -> float:
    return json.loads((folder / "scores.json").read_text())["Reformer"]


def test_packing_concatenates_all_texts(files, monkeypatch):
    monkeypatch.setattr(packing, "READ_SIZE", 300)
    documents = packing.read_documents([str(files / "a.txt"), str(files / "b.txt")])
    rows = list(packing.pack(packing.token_ids(documents, BYTES), 64))
    assert {len(row["input_ids"]) for row in rows} == {64}
    tokens = [token for row in rows for token in row["input_ids"]]
    expected = []
    for name in ("a", "b"):
        expected += [BYTES.bos_token_id, *BYTES((files / f"{name}.txt").read_text(encoding="utf-8"))["input_ids"]]
    assert tokens == expected[: len(tokens)]
    assert len(expected) - len(tokens) < 64


def test_streamed_sequences_are_those_in_memory_in_another_order(files):
    names = [str(files / "a.txt"), str(files / "b.txt")]
    whole = [
        tuple(row["input_ids"])
        for row in packing.packed_dataset(packing.token_ids(packing.read_documents(names), BYTES), 64)
    ]
    stream = packing.packed_stream(lambda: packing.read_documents(names), BYTES, 64, seed=0)
    streamed = [tuple(row["input_ids"]) for row in stream]
    assert streamed != whole
    assert sorted(streamed) == sorted(whole)


def test_tables_give_a_document_per_row(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "one"}\n{"text": null}\n{"text": "<|pad|>"}\n')
    documents = packing.read_documents([str(tmp_path / "t.jsonl")])
    bos = BYTES.bos_token_id
    tokens = [token for ids in packing.token_ids(documents, BYTES) for token in ids]
    assert tokens == [bos, *BYTES("one")["input_ids"], bos, bos, *(byte + 2 for byte in b"<|pad|>")]


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 40), st.integers(1, 39), st.lists(st.text(max_size=60), min_size=1, max_size=3))
def test_every_token_is_scored_once_with_its_context(length, context, documents):
    if context >= length or not any(documents):
        return
    tokens = []
    for row in packing.scoring_windows(documents, BYTES, length, context):
        scored = [position for position, label in enumerate(row["labels"]) if label != -100]
        assert scored == list(range(scored[0], len(row["labels"])))
        assert scored[0] >= 1
        tokens += [row["labels"][position] for position in scored]
        assert [row["input_ids"][position] for position in scored] == [row["labels"][position] for position in scored]
        assert len(row["input_ids"]) <= length
    assert tokens == [byte + 2 for text in documents for byte in text.encode()]


def test_held_out_text_is_the_end():
    documents = ["one\n" * 10, "two\n" * 10, "three\n" * 10]
    train, held_out = packing.hold_out_end(documents, 0.6)
    assert "".join(train + held_out) == "".join(documents)
    assert sum(map(len, held_out)) == pytest.approx(0.6 * 140, abs=4)
    assert held_out[0].startswith("two")
    assert packing.hold_out_end(["no end of line"], 0.5) == (["no end "], ["of line"])


def test_score_is_the_code_length_of_the_text(files):
    """Against the negative log-likelihood computed from the logits of one row, by a model reloaded."""
    text = (files / "validation.txt").read_text(encoding="utf-8")
    long = str(len(text.encode()) + 1)
    recipe.main(arguments(files, "--max_steps", "4", "--eval_length", long, "--eval_strategy", "no"))
    model = ReformerForCausalLM.from_pretrained(files / "out").eval()
    ids = torch.tensor([[BYTES.bos_token_id, *BYTES(text)["input_ids"]]])
    with torch.no_grad():
        log_p = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
    assert bits_of(files / "out") == pytest.approx(-log_p.sum().item() / math.log(2) / len(text.encode()), abs=1e-4)


def test_score_depends_neither_on_the_batch_nor_on_the_run(files):
    recipe.main(arguments(files, "--max_steps", "2"))
    scores = {bits_of(files / "out")}
    saved = ["--model_name_or_path", str(files / "out"), "--validation_file", str(files / "validation.txt")]
    saved += ["--sequence_length", "64", "--use_cpu", "--disable_tqdm", "True"]
    for size in ("1", "5"):
        out = files / f"evaluated{size}"
        recipe.main([*saved, "--output_dir", str(out), "--per_device_eval_batch_size", size])
        scores.add(bits_of(out))
    assert max(scores) - min(scores) < 1e-5


@pytest.mark.parametrize(
    "tokenizer", [pytest.param(("bytes",), marks=pytest.mark.slow), ("train", "--tokenizer_vocab_size", "280")]
)
def test_learns_to_predict(files, tokenizer):
    recipe.main(arguments(files, "--tokenizer", *tokenizer, "--num_train_epochs", "3", "--baselines"))
    scores = json.loads((files / "out" / "scores.json").read_text())
    assert scores["Reformer"] < 3  # one letter after the other, without regard to what came before: 3.9
    assert any("xz" in name for name in scores)
    left = {"config.json", "model.safetensors", "tokenizer.json", "README.md", "learning_curve.png", "scores.json"}
    assert left <= {file.name for file in (files / "out").iterdir()}
    assert "bits per byte" in (files / "out" / "README.md").read_text()


@pytest.mark.slow
def test_a_masked_model_learns_to_fill_in(files):
    run = arguments(files, "--masked", "--num_train_epochs", "4", "--learning_rate", "2e-2")
    recipe.main([*run, "--mlm_probability", "0.3"])
    assert bits_of(files / "out") < 4
    config = json.loads((files / "out" / "config.json").read_text())
    assert config["architectures"] == ["ReformerForMaskedLM"]
    assert config["type_vocab_size"] == 2  # so that it may be fine-tuned on pairs of texts
    assert "token_type_ids" in AutoTokenizer.from_pretrained(files / "out")("one", "two")
    history = json.loads((files / "out" / "trainer_state.json").read_text())["log_history"]
    last = [entry["eval_bits_per_masked_byte"] for entry in history if "eval_bits_per_masked_byte" in entry][-1]
    assert last == pytest.approx(bits_of(files / "out"), abs=1e-6)  # the same tokens are hidden every time


@pytest.mark.parametrize("kind", ["--streaming", "--masked"])
def test_a_resumed_stream_or_masked_model_goes_on_where_it_was(files, kind):
    stream = [kind, "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "3", "--do_train"]
    recipe.main(arguments(files, *stream, "--max_steps", "6", "--save_total_limit", "5"))
    resumed = str(files / "out" / "checkpoint-3")
    recipe.main(arguments(files, *stream, "--max_steps", "6", "--resume_from_checkpoint", resumed, out="again"))
    assert len({(files / run / "model.safetensors").read_bytes() for run in ("out", "again")}) == 1


def test_masks_depend_on_sequence_epoch_and_seed_alone():
    rows = [{"input_ids": BYTES(prose(40, seed))["input_ids"][:64]} for seed in range(3)]
    collator = packing.MaskingCollator(BYTES, 0.3, seed=1)
    first = collator(rows)
    torch.rand(3)
    again = collator(rows[::-1])
    for name in ("input_ids", "labels"):
        assert torch.equal(first[name], again[name].flip(0))
    hidden = first["labels"] != -100
    assert 0.2 < hidden.float().mean() < 0.4
    assert torch.equal(
        torch.where(hidden, first["labels"], first["input_ids"]), torch.tensor([x["input_ids"] for x in rows])
    )
    collator.epoch = 1
    assert not torch.equal(collator(rows)["labels"], first["labels"])
    assert not torch.equal(packing.MaskingCollator(BYTES, 0.3, seed=2)(rows)["labels"], first["labels"])


def test_a_tokenizer_without_padding(files):
    """As GPT-2's: it pads with its separator, which is learned all the same."""
    words = {word: number for number, word in enumerate(["<unk>", "<end>", "the", "is", "and"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<end>").save_pretrained(
        files / "words"
    )
    recipe.main(arguments(files, "--tokenizer", str(files / "words"), "--max_steps", "1", "--eval_strategy", "no"))
    assert ReformerForCausalLM.from_pretrained(files / "out").config.pad_token_id == 1
    assert packing.causal_lm_collator([{"input_ids": [1, 2]}])["labels"].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give --train_file"),
        (["--train_file", "nowhere.txt"], "no file nowhere.txt"),
        (["--train_file", __file__, "--dataset_name", "x/y"], "not both"),
        (["--train_file", __file__, "--streaming"], "--max_steps"),
        (["--train_file", __file__, "--streaming", "--max_steps", "1"], "--validation_file"),
        (["--train_file", __file__, "--eval_context", "1024"], "--eval_context"),
        (["--train_file", __file__, "--sequence_length", "1", "--eval_length", "8"], "length 1 is too short"),
        (["--train_file", __file__, "--sequence_length", "0", "--eval_length", "8"], "length 0 is too short"),
        (["--train_file", __file__, "--masked", "--mlm_probability", "0"], "--mlm_probability 0.0 must be above 0"),
        (["--train_file", __file__, "--validation_fraction", "1"], "--validation_fraction 1.0 must be between"),
    ],
)
def test_bad_arguments_are_reported_before_anything_is_read(arguments, message):
    with pytest.raises((SystemExit, ValueError), match=message):
        recipe.main(arguments)


@pytest.mark.parametrize("streaming", [False, True])
def test_texts_that_are_too_short(tmp_path, streaming):
    short = str(tmp_path / "short.txt")
    Path(short).write_text("a short text")
    more = ["--validation_file", short, "--streaming", "--max_steps", "1"] if streaming else []
    with pytest.raises(ValueError, match="single sequence of 64 tokens"):
        recipe.main([*TINY, "--train_file", short, "--output_dir", str(tmp_path / "out"), *more])


def hub_folder(folder: Path, *splits: str) -> str:
    """A dataset of 40 rows a split, as it lies on the Hub."""
    for split in splits:
        rows = (json.dumps({"text": f"{split} {i} it rained.\n"}) + "\n" for i in range(40))
        (folder / f"{split}.jsonl").write_text("".join(rows))
    return str(folder)


@pytest.mark.parametrize("splits", [("train",), ("train", "test"), ("train", "validation", "test")])
def test_a_data_set_without_validation_data_gives_the_end_of_its_training_texts(tmp_path, splits):
    options = recipe.TextArguments(dataset_name=hub_folder(tmp_path, *splits))
    texts = recipe.load_texts(options)
    train, held_out = texts["train"], texts["validation"]
    assert held_out
    whole = "".join(f"train {i} it rained.\n" for i in range(40))
    if "validation" in splits:
        assert ("".join(train), held_out[0]) == (whole, "validation 0 it rained.\n")
    else:
        assert "".join(train + held_out) == whole
    options.streaming = True
    if "validation" in splits:
        assert recipe.load_texts(options) == {"validation": held_out}
    else:
        with pytest.raises(ValueError, match=r"no split `validation`.*--validation_file"):
            recipe.load_texts(options)


def test_a_data_set_without_training_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="no split `train`"):
        recipe.load_texts(recipe.TextArguments(dataset_name=hub_folder(tmp_path, "validation")))


def test_a_file_that_is_no_text_is_refused_before_a_stream_gets_there(files):
    (files / "b.txt").write_bytes("café".encode("latin-1"))
    stream = ["--streaming", "--max_steps", "1"]
    with pytest.raises(ValueError, match=r"b\.txt` is not valid UTF-8 text: byte 0xe9 at position 3"):
        recipe.main(arguments(files, *stream))
    assert not (files / "out").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_files_are_json(files):
    wild = [
        "--learning_rate",
        "1e30",
        "--max_grad_norm",
        "0",
        "--lr_scheduler_type",
        "constant",
        "--warmup_steps",
        "0",
    ]
    wild += ["--max_steps", "6", "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "1"]
    with pytest.raises(ValueError, match=r"is nan, not finite.*--learning_rate"):
        recipe.main(arguments(files, *wild))
    assert not (files / "out" / "model.safetensors").exists()
    for file in files.rglob("*.json"):
        json.loads(file.read_text(), parse_constant=pytest.fail)


def test_a_model_without_its_head_is_not_evaluated(files):
    config = {"hidden_size": 16, "attn_layers": ["local"], "vocab_size": 260}
    ReformerModel(ReformerConfig(**config)).save_pretrained(files / "bare")
    bare = ["--model_name_or_path", str(files / "bare"), "--tokenizer", "bytes", "--use_cpu"]
    with pytest.raises(ValueError, match=r"lacks lm_head.*nothing is trained"):
        recipe.main([*bare, "--validation_file", str(files / "validation.txt"), "--output_dir", str(files / "out")])


@pytest.mark.parametrize("masked", [False, True])
def test_a_masked_model_is_not_evaluated_as_a_causal_one_nor_the_other_way_round(files, masked, caplog):
    """Their weights have the same names."""
    config = {"hidden_size": 16, "attn_layers": ["local"], "vocab_size": 260, "num_attention_heads": 1}
    saved_class, other = [ReformerForCausalLM, ReformerForMaskedLM][:: -1 if masked else 1]
    saved_class(ReformerConfig(**config)).save_pretrained(files / "saved")
    saved = ["--model_name_or_path", str(files / "saved"), "--tokenizer", "bytes", "--use_cpu"]
    saved += ["--sequence_length", "64", "--output_dir", str(files / "out")]
    saved += ["--validation_file", str(files / "validation.txt")]
    with pytest.raises(ValueError, match=rf"saved by {saved_class.__name__}.*would be random.*--masked"):
        recipe.main([*saved, *([] if masked else ["--masked"])])
    recipe.main([*saved, *(["--masked"] if masked else [])])
    more = ["--train_file", str(files / "b.txt"), "--max_steps", "1"]
    recipe.main([*saved, *more, *([] if masked else ["--masked"])])
    assert f"saved by {saved_class.__name__} and is trained on as {other.__name__}" in caplog.text


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("recipe_name", ["language-model", "classification"])
def test_two_processes_end_where_one_does(files, recipe_name):
    """Under `accelerate launch`, with half of each batch in each process: as good a model as that of one process."""
    config = ROOT / "examples" / "accelerate" / "ddp.yaml"
    if recipe_name == "language-model":
        options = arguments(files, "--max_steps", "60", "--eval_strategy", "no", "--save_strategy", "no")
    else:
        from test_train_classification import TINY as CLASSIFY
        from test_train_classification import animals

        animals(96).to_csv(files / "train.csv", index=False)
        animals(32, seed=1).to_csv(files / "validation.csv", index=False)
        options = [*CLASSIFY, "--train_file", str(files / "train.csv"), "--num_train_epochs", "6"]
        options += ["--validation_file", str(files / "validation.csv"), "--per_device_train_batch_size", "4"]
        options += ["--output_dir", str(files / "out")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    results = []
    for launch, batch_size in (([], "4"), (["-m", "accelerate.commands.launch", "--config_file", str(config)], "2")):
        command = [sys.executable, *launch, "-m", "hf_reformer", "train", recipe_name, *options]
        command += ["--per_device_train_batch_size", batch_size]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=files, env=environment)
        assert result.returncode == 0, result.stderr[-3000:]
        reports = re.findall(f"results are in {re.escape(str(files / 'out'))}", result.stdout)
        assert len(reports) == 1  # two processes that do not know of each other would both print it
        results.append(json.loads((files / "out" / "scores.json").read_text()))
    if recipe_name == "language-model":
        assert results[1]["Reformer"] == pytest.approx(results[0]["Reformer"], abs=0.05)
    else:
        assert min(scores["validation"]["Reformer"]["accuracy"] for scores in results) > 0.9
