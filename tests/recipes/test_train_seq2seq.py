"""The encoder-decoder's script: on a csv, on translations, resumed, judged, and wrongly."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM

from hf_reformer import ReformerConfig, ReformerForMaskedLM

pd = pytest.importorskip("pandas")
pytest.importorskip("datasets")
pytest.importorskip("accelerate")

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY = [
    *("--tokenizer", "bytes", "--hidden_size", "16", "--attn_layers", "local", "--num_attention_heads", "1"),
    *("--attention_head_size", "16", "--feed_forward_size", "16", "--config_overrides", "tie_encoder_decoder=True"),
    *("--max_source_length", "32", "--max_target_length", "8", "--use_cpu", "--disable_tqdm", "True"),
    *("--logging_steps", "1", "--metric", "none", "--max_steps", "2", "--report_to", "none"),
]


@pytest.fixture(scope="session")
def script():
    """The script as a module. Its neighbours in `scripts/` are found as when Python runs it."""
    sys.path.insert(0, str(SCRIPTS))
    try:
        import train_seq2seq
    finally:
        sys.path.remove(str(SCRIPTS))
    return train_seq2seq


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


def test_a_csv_leaves_everything_behind(script, files, capsys):
    columns = ["--source_column", "document", "--target_column", "summary", "--validation_fraction", "0.25"]
    (files / "letter.txt").write_text("abc")
    out = ["--output_dir", str(files / "out"), "--write", str(files / "letter.txt"), "--label_smoothing_factor", "0.1"]
    script.main([*TINY, "--train_file", str(files / "train.csv"), *columns, *out])
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


def test_a_saved_model_judges_translations(script, files):
    columns = ["--source_column", "document", "--target_column", "summary"]
    script.main([*TINY, "--train_file", str(files / "train.csv"), *columns, "--output_dir", str(files / "out")])
    languages = ["--source_language", "de", "--target_language", "en", "--generation_num_beams", "2"]
    saved = ["--model_name_or_path", str(files / "out"), "--output_dir", str(files / "judged")]
    script.main([*saved, *languages, *TINY[2:], "--test_file", str(files / "test.jsonl")])
    rows = (files / "judged" / "predictions_test.jsonl").read_text().splitlines()
    assert [json.loads(row)["source"] for row in rows] == list(pd.read_csv(files / "train.csv")["document"][:4])


def test_texts_are_judged_in_their_own_order(script, files):
    given = ["--train_file", str(files / "train.csv"), "--source_column", "document", "--target_column", "summary"]
    by_length = ["--train_sampling_strategy", "group_by_length", "--output_dir", str(files / "out")]
    data, model, args = script.parse_arguments([*TINY, *given, *by_length])
    trainer = script.make_trainer(script.load_pairs(data, args.seed), data, model, args)
    rows = [
        row[row >= 0].tolist()
        for batch in trainer.get_test_dataloader(trainer.eval_dataset)
        for row in batch["labels"]
    ]
    assert rows == trainer.eval_dataset["labels"]


def test_scores(script):
    written, wanted = ["the cat sat on the mat", "a dog"], ["the cat sat on the mat", "a dog runs"]
    assert script.score("none", written, wanted) == {"exact_match": 50.0}
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    for metric, names in (("bleu", {"bleu", "chrf"}), ("rouge", {"rouge1", "rouge2", "rougeLsum"})):
        found, perfect = script.score(metric, written, wanted), script.score(metric, wanted, wanted)
        assert found.keys() == perfect.keys() == names | {"exact_match"}
        for name in names:
            assert perfect[name] == pytest.approx(100)
            assert 0 < found[name] < 100


def test_what_it_refuses(script, files):
    with pytest.raises(SystemExit, match="--train_file"):
        script.main([])
    with pytest.raises(ValueError, match="--source_column"):
        script.main([*TINY, "--train_file", str(files / "train.csv"), "--output_dir", str(files / "out")])
    judge = [*TINY[2:], "--validation_file", str(files / "train.csv"), "--output_dir", str(files / "out")]
    judge += ["--source_column", "document", "--target_column", "summary"]
    with pytest.raises(ValueError, match="nothing to train on"):
        script.main(judge)
    ReformerForMaskedLM(ReformerConfig(num_hidden_layers=1, hidden_size=16)).save_pretrained(files / "masked")
    with pytest.raises(ValueError, match="no encoder-decoder"):
        script.main([*judge, "--model_name_or_path", str(files / "masked")])
    (files / "header.csv").write_text("source,target\n")
    with pytest.raises(ValueError, match="holds no row"):
        script.main([*TINY, "--train_file", str(files / "header.csv"), "--output_dir", str(files / "out")])


def test_what_would_fail_after_training_is_refused_before(script, files, monkeypatch):
    given = [*TINY, "--train_file", str(files / "train.csv"), "--source_column", "document"]
    given += ["--target_column", "summary", "--output_dir", str(files / "out")]
    (files / "blank.txt").write_text("\n")
    for more, words in (
        (["--max_target_length", "1"], "max_target_length 1 must be at least 2"),
        (["--max_source_length", "0"], "max_source_length 0"),
        (["--max_eval_samples", "0"], "max_eval_samples 0"),
        (["--generation_num_beams", "0"], "generation_num_beams 0"),
        (["--validation_fraction", "1"], "validation_fraction"),
        (["--write", str(files / "absent.txt")], "no file"),
        (["--write", str(files / "blank.txt")], "is empty"),
        (["--config_overrides", "tie_encoder_decodr=True"], "no field tie_encoder_decodr"),
    ):
        with pytest.raises(ValueError, match=words):
            script.main([*given, *more])
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ImportError, match="pip install"):
        script.main([*given, "--metric", "bleu"])
    assert not (files / "out").exists()


def test_cells_are_read_as_they_stand(script, files):
    (files / "odd.csv").write_text("source,target\n007,0\nNA,1.50\n")
    data, _, args = script.parse_arguments(["--validation_file", str(files / "odd.csv"), "--use_cpu"])
    rows = script.load_pairs(data, args.seed)["validation"]
    assert rows["source"][:] == ["007", "NA"]
    assert rows["target"][:] == ["0", "1.50"]
    for cell in (None, ["a", "list"]):
        pd.DataFrame({"source": ["a", "b"], "target": [cell, cell]}).to_parquet(files / "odd.parquet")
        data, _, args = script.parse_arguments(["--validation_file", str(files / "odd.parquet"), "--use_cpu"])
        with pytest.raises(ValueError, match="Row 0 of the validation data has no text as `target`"):
            script.load_pairs(data, args.seed)


@pytest.mark.slow
@pytest.mark.multi_process
def test_two_processes_judge_every_text_once(files):
    """More places in the last batch than texts are left."""
    options = ["--train_file", str(files / "train.csv"), "--source_column", "document", "--target_column", "summary"]
    options += [
        "--validation_fraction",
        "0.25",
        "--output_dir",
        str(files / "out"),
        "--per_device_eval_batch_size",
        "2",
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(SCRIPTS / "train_seq2seq.py"), *TINY, *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("lie in") == 1
    rows = [json.loads(line) for line in (files / "out" / "predictions_validation.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert all(row["target"] == row["source"][0] for row in rows)
