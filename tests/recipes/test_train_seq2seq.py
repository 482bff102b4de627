"""The encoder-decoder's recipe: on a csv, on translations, resumed, evaluated, and wrongly."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast, Seq2SeqTrainingArguments

from hf_reformer import ReformerByteTokenizer, ReformerConfig, ReformerForMaskedLM
from hf_reformer.data import packing
from hf_reformer.recipes import seq2seq as recipe
from hf_reformer.training.model_setup import ModelArguments, parse_arguments

pd = pytest.importorskip("pandas")
pytestmark = pytest.mark.usefixtures("undrawn")

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY = [
    *("--tokenizer", "bytes", "--hidden_size", "16", "--attn_layers", "local", "--num_attention_heads", "1"),
    *("--attention_head_size", "16", "--feed_forward_size", "16", "--config_overrides", "tie_encoder_decoder=True"),
    *("--max_source_length", "32", "--max_target_length", "8", "--use_cpu", "--disable_tqdm", "True"),
    *("--logging_steps", "1", "--metric", "none", "--max_steps", "2", "--report_to", "none"),
]
COLUMNS = ["--source_column", "document", "--target_column", "summary", "--validation_fraction", "0.25"]


def parse(argv):
    classes = recipe.DataArguments, ModelArguments, Seq2SeqTrainingArguments
    return parse_arguments("seq2seq", None, classes, argv, recipe.DEFAULTS)


@pytest.fixture
def files(tmp_path):
    """train.csv and test.jsonl: words and their first letters."""
    draw = random.Random(0)
    words = ["".join(draw.choice("abc") for _ in range(draw.randint(3, 9))) for _ in range(24)]
    table = pd.DataFrame({"document": words, "summary": [word[0] for word in words]})
    table.to_csv(tmp_path / "train.csv", index=False)
    rows = [{"translation": {"de": word, "en": word[0]}} for word in words[:4]]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_csv_leaves_everything_behind(files, capsys):
    (files / "letter.txt").write_text("abc")
    out = ["--output_dir", str(files / "out"), "--predict_file", str(files / "letter.txt")]
    out += ["--label_smoothing_factor", "0.1"]
    recipe.main([*TINY, "--train_file", str(files / "train.csv"), *COLUMNS, *out])
    assert "validation: exact_match" in capsys.readouterr().out
    names = {path.name for path in (files / "out").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "README.md", "predictions_validation.jsonl"} <= names
    rows = [json.loads(line) for line in (files / "out" / "predictions_validation.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(row["target"] == row["source"][0] for row in rows)
    model = AutoModelForSeq2SeqLM.from_pretrained(files / "out")
    assert model.config.tie_encoder_decoder
    card = (files / "out" / "README.md").read_text()
    assert "text2text-generation" in card
    assert "exact_match" in card
    assert "name: train.csv\n" in card
    assert f"{files}/train.csv" not in card


def test_pre_training_writes_masked_texts_again(files, monkeypatch):
    options = ["--pretrain_steps", "1", "--pretrain_length", "8", "--learning_rate", "0", "--mlm_probability", "0.5"]
    batches = []
    collate = packing.MaskingCollator.__call__
    monkeypatch.setattr(
        packing.MaskingCollator, "__call__", lambda *given: batches.append(collate(*given)) or batches[-1]
    )
    recipe.main(
        [*TINY, *options, "--train_file", str(files / "train.csv"), *COLUMNS, "--output_dir", str(files / "out")]
    )
    weights = [load_file(files / "out" / name / "model.safetensors") for name in ("_pretrained", ".")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for batch in batches:
        hidden = batch["input_ids"] != batch["labels"]
        assert 0 < hidden.sum() < hidden.numel()
        assert (batch["labels"] >= 0).all()


def test_a_saved_model_is_evaluated_on_translations(files):
    columns = ["--source_column", "document", "--target_column", "summary"]
    recipe.main([*TINY, "--train_file", str(files / "train.csv"), *columns, "--output_dir", str(files / "out")])
    languages = ["--source_language", "de", "--target_language", "en", "--generation_num_beams", "2"]
    saved = ["--model_name_or_path", str(files / "out"), "--output_dir", str(files / "evaluated")]
    recipe.main([*saved, *languages, *TINY[2:], "--test_file", str(files / "test.jsonl")])
    rows = (files / "evaluated" / "predictions_test.jsonl").read_text().splitlines()
    assert [json.loads(row)["source"] for row in rows] == list(pd.read_csv(files / "train.csv")["document"][:4])


def test_texts_are_evaluated_in_their_own_order(files):
    options = ["--train_file", str(files / "train.csv"), "--source_column", "document", "--target_column", "summary"]
    by_length = ["--train_sampling_strategy", "group_by_length", "--output_dir", str(files / "out")]
    data, model, args = parse([*TINY, *options, *by_length])
    trainer, _ = recipe.make_trainer(recipe.load_pairs(data, args.seed), data, model, args)
    rows = [
        row[row >= 0].tolist()
        for batch in trainer.get_test_dataloader(trainer.eval_dataset)
        for row in batch["labels"]
    ]
    assert rows == trainer.eval_dataset["labels"]


def test_scores():
    predictions, targets = ["the cat sat on the mat", "a dog"], ["the cat sat on the mat", "a dog runs"]
    assert recipe.score("none", predictions, targets) == {"exact_match": 50.0}
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    for metric, names in (("bleu", {"bleu", "chrf"}), ("rouge", {"rouge1", "rouge2", "rougeLsum"})):
        scores, perfect = recipe.score(metric, predictions, targets), recipe.score(metric, targets, targets)
        assert scores.keys() == perfect.keys() == names | {"exact_match"}
        for name in names:
            assert perfect[name] == pytest.approx(100)
            assert 0 < scores[name] < 100


def test_mistakes_are_explained(files):
    with pytest.raises(SystemExit, match="--train_file"):
        recipe.main([])
    with pytest.raises(ValueError, match="--source_column"):
        recipe.main([*TINY, "--train_file", str(files / "train.csv"), "--output_dir", str(files / "out")])
    evaluation = [*TINY[2:], "--validation_file", str(files / "train.csv"), "--output_dir", str(files / "out")]
    evaluation += ["--source_column", "document", "--target_column", "summary"]
    with pytest.raises(ValueError, match="nothing to train on"):
        recipe.main(evaluation)
    ReformerForMaskedLM(ReformerConfig(num_hidden_layers=1, hidden_size=16)).save_pretrained(files / "masked")
    with pytest.raises(ValueError, match="no encoder-decoder"):
        recipe.main([*evaluation, "--model_name_or_path", str(files / "masked")])
    (files / "header.csv").write_text("source,target\n")
    with pytest.raises(ValueError, match="holds no row"):
        recipe.main([*TINY, "--train_file", str(files / "header.csv"), "--output_dir", str(files / "out")])


def test_errors_come_before_training_not_after(files, monkeypatch):
    options = [*TINY, "--train_file", str(files / "train.csv"), "--source_column", "document"]
    options += ["--target_column", "summary", "--output_dir", str(files / "out")]
    (files / "blank.txt").write_text("\n")
    for more, words in (
        (["--max_target_length", "1"], "max_target_length 1 must be at least 2"),
        (["--max_source_length", "0"], "max_source_length 0"),
        (["--max_eval_samples", "0"], "max_eval_samples 0"),
        (["--generation_num_beams", "0"], "generation_num_beams 0"),
        (["--validation_fraction", "1"], "validation_fraction"),
        (["--predict_file", str(files / "absent.txt")], "no file"),
        (["--write", str(files / "blank.txt")], "is empty"),
        (["--config_overrides", "tie_encoder_decodr=True"], "no field tie_encoder_decodr"),
    ):
        with pytest.raises(ValueError, match=words):
            recipe.main([*options, *more])
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match="pip install"):
        recipe.main([*options, "--metric", "bleu"])
    assert not (files / "out").exists()


def test_cells_are_read_as_they_stand(files):
    (files / "odd.csv").write_text("source,target\n007,0\nNA,1.50\n")
    data, _, args = parse(["--validation_file", str(files / "odd.csv"), "--use_cpu"])
    rows = recipe.load_pairs(data, args.seed)["validation"]
    assert rows["source"][:] == ["007", "NA"]
    assert rows["target"][:] == ["0", "1.50"]
    for cell in (None, ["a", "list"]):
        pd.DataFrame({"source": ["a", "b"], "target": [cell, cell]}).to_parquet(files / "odd.parquet")
        data, _, args = parse(["--validation_file", str(files / "odd.parquet"), "--use_cpu"])
        with pytest.raises(ValueError, match="Row 0 of the validation data has no text as `target`"):
            recipe.load_pairs(data, args.seed)


@pytest.mark.parametrize("numbers", [[2, 4], [0.5, 1.5], ["007", "7"], [1, "x"]])
def test_numbers_are_texts(files, numbers):
    rows = [{"source": x, "target": x} for x in numbers]
    (files / "n.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, _, args = parse(["--validation_file", str(files / "n.jsonl"), "--use_cpu"])
    pairs = recipe.load_pairs(data, args.seed)["validation"]
    assert pairs["source"][:] == pairs["target"][:] == list(map(str, numbers))
    assert len(recipe.tokenize(pairs, ReformerByteTokenizer(), data)) == 2


def test_a_test_file_without_targets_is_predicted(files):
    columns = ["--source_column", "document", "--target_column", "summary"]
    rows = [{"document": x} for x in ("abc", "", "ca")]  # the empty one is alone in its batch
    (files / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [
        "--test_file",
        str(files / "test.jsonl"),
        "--per_device_eval_batch_size",
        "1",
        "--max_eval_samples",
        "3",
    ]
    run = [*TINY, "--train_file", str(files / "train.csv"), *columns, "--output_dir", str(files / "out"), *options]
    recipe.main(run)
    predictions = [json.loads(line) for line in (files / "out" / "predictions_test.jsonl").read_text().splitlines()]
    assert [row["source"] for row in predictions] == ["abc", "", "ca"]
    assert all(set(row) == {"source", "prediction"} for row in predictions)
    assert set(json.loads((files / "out" / "scores.json").read_text())) == {"validation"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--source_column", "a", "--target_column", "a"], "both name the column `a`"),
        (["--source_language", "de", "--target_language", "de"], "both name the column `de`"),
        (["--source_language", "de"], "Give both --source_lang"),
    ],
)
def test_one_column_is_not_source_and_target(options, words):
    with pytest.raises(ValueError, match=words):
        recipe.main(["--train_file", "nowhere.csv", *options])


@pytest.mark.parametrize("special", [{"eos_token": "<end>"}, {"sep_token": "<end>"}, {}])
def test_a_tokenizer_without_padding(files, special):
    """As GPT-2's and, with a token between texts alone, older ones: that token ends a target and pads."""
    words = {word: number for number, word in enumerate(["<unk>", "<end>", *"abc"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special).save_pretrained(files / "tok")
    columns = ["--source_column", "document", "--target_column", "summary"]
    argv = [*TINY, "--train_file", str(files / "train.csv"), *columns, "--tokenizer", str(files / "tok")]
    data, model, args = parse([*argv, "--output_dir", str(files / "out")])
    pairs = recipe.load_pairs(data, args.seed)
    if not special:
        with pytest.raises(ValueError, match="add_special_tokens"):
            recipe.make_trainer(pairs, data, model, args)
        return
    trainer, encoded = recipe.make_trainer(pairs, data, model, args)
    assert trainer.processing_class.pad_token_id == 1
    assert {row[-1] for row in encoded["train"]["labels"]} == {1}
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_evaluate_every_text_once(files):
    """The last batch has fewer texts than the processes would take."""
    options = ["--train_file", str(files / "train.csv"), "--source_column", "document", "--target_column", "summary"]
    options += ["--validation_fraction", "0.25", "--per_device_eval_batch_size", "2"]
    options += ["--output_dir", str(files / "out")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(SCRIPTS / "train_seq2seq.py"), *TINY, *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("results are in") == 1
    rows = [json.loads(line) for line in (files / "out" / "predictions_validation.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(row["target"] == row["source"][0] for row in rows)
