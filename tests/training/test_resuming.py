"""Runs that are killed at any moment, or whose files are damaged, go on from their newest whole checkpoint."""

import functools
import json
import multiprocessing
import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from fuzzing import seeds
from safetensors.torch import load_file
from transformers import Trainer, TrainerState, TrainingArguments

from hf_reformer.data.demo_signals import handwritten_digits, seasonal_load, spoken_strings
from hf_reformer.recipes import load_recipe
from hf_reformer.training.trainers import checkpoint_damage, checkpoint_to_resume
from reformer_cli.main import main

pd = pytest.importorskip("pandas")
pytest.importorskip("evaluate")
pytestmark = pytest.mark.usefixtures("undrawn")

TINY = [
    *("--hidden_size", "16", "--attn_layers", "local", "lsh", "--num_attention_heads", "1", "--num_hashes", "1"),
    *("--attention_head_size", "16", "--feed_forward_size", "16"),
    *("--config_overrides", "lsh_window=16,local_window=8"),
    *("--per_device_train_batch_size", "4", "--use_cpu", "--disable_tqdm", "True"),
    *("--report_to", "none", "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "2"),
    *("--save_total_limit", "3", "--max_steps", "6"),
]
BYTES = ["--tokenizer", "bytes"]
OWN = {
    "language-model": ["--train_file", "book.txt", "--sequence_length", "64", *BYTES],
    "classification": ["--train_file", "table.csv", "--text_column", "source", "--label_column", "target", *BYTES],
    "seq2seq": ["--train_file", "table.csv", "--metric", "none", "--max_target_length", "8", *BYTES],
    "speech-recognition": ["--train_file", "speech.parquet", "--do_train"],  # whose data are varied in every epoch
    "image-classification": ["--train_file", "digits.parquet", "--do_train", "--flip"],
    "forecasting": ["--train_file", "load.csv", "--context_length", "24", "--prediction_length", "6"],
}
FILES_OF_RUNS = {
    "book.txt": lambda path: path.write_text("".join(f"Line {i} of a small book.\n" for i in range(200))),
    "table.csv": lambda path: words().to_csv(path, index=False),
    "speech.parquet": lambda path: spoken_strings(12, 1)["train"].to_parquet(path),
    "digits.parquet": lambda path: handwritten_digits()["train"].select(range(12)).to_parquet(path),
    "load.csv": lambda path: seasonal_load(60).to_csv(path),
}
FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


def words() -> "pd.DataFrame":
    found = ["".join(random.Random(i).choices("abc", k=9)) for i in range(40)]
    return pd.DataFrame({"source": found, "target": [word[0] for word in found]})


def run(recipe: str, folder: Path, out: str, *more: str) -> None:
    """A recipe, on files that are written at the first call."""
    for name in set(FILES_OF_RUNS) & set(OWN[recipe]):
        if not (folder / name).exists():
            FILES_OF_RUNS[name](folder / name)
    own = [str(folder / word) if word in FILES_OF_RUNS else word for word in OWN[recipe]]
    load_recipe(recipe).main([*TINY, *own, "--output_dir", str(folder / out), *more])


def checkpoints(folder: Path) -> dict[str, str | None]:
    """What is wrong with each checkpoint of a run."""
    return {path.name: checkpoint_damage(path) for path in sorted(folder.glob("checkpoint-*"))}


def same_model(a: Path, b: Path) -> bool:
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Killed(BaseException):
    """Like a signal, it is caught by no `except Exception`."""


def kill_while_saving(monkeypatch, name: str, *arguments) -> None:
    """A run that ends when half of this file of checkpoint-4 is written."""

    def dying(owner, method, file_of):
        real = getattr(owner, method)

        def saved(*args, **kwargs):
            real(*args, **kwargs)
            file = Path(file_of(*args))
            if (file.parent.name, file.name) == ("checkpoint-4", name):
                file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
                raise Killed

        patch.setattr(owner, method, saved)

    with monkeypatch.context() as patch:
        dying(Trainer, "save_model", lambda self, folder=".", *_: Path(folder, "model.safetensors"))
        dying(torch, "save", lambda value, file, *_: file)
        dying(TrainerState, "save_to_json", lambda self, file: file)
        with pytest.raises(Killed):
            run(*arguments)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The folder of a recipe's run of three whole checkpoints."""

    @functools.cache
    def make(recipe: str) -> Path:
        folder = tmp_path_factory.mktemp("run")
        run(recipe, folder, "out")
        assert checkpoints(folder / "out") == {"checkpoint-2": None, "checkpoint-4": None, "checkpoint-6": None}
        return folder / "out"

    return make


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("language-model", "model.safetensors"),
        ("classification", "optimizer.pt"),
        ("forecasting", "scheduler.pt"),
        pytest.param("seq2seq", "rng_state.pth", marks=pytest.mark.slow),
        pytest.param("speech-recognition", "trainer_state.json", marks=pytest.mark.slow),
        pytest.param("image-classification", "model.safetensors", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_while_saving_goes_on_from_the_checkpoint_before(
    recipe, name, tmp_path, whole_run, monkeypatch, caplog
):
    kill_while_saving(monkeypatch, name, recipe, tmp_path, "killed")
    damage = checkpoints(tmp_path / "killed")
    assert list(damage) == ["checkpoint-2", "checkpoint-4"]
    assert damage["checkpoint-2"] is None
    run(recipe, tmp_path, "killed", "--resume_from_checkpoint", "last")
    assert f"Skipping {tmp_path / 'killed' / 'checkpoint-4'}: {damage['checkpoint-4']}" in caplog.text
    assert same_model(whole_run(recipe), tmp_path / "killed")
    assert not any(checkpoints(tmp_path / "killed").values())


@pytest.mark.parametrize("recipe", ["language-model", "seq2seq"])
def test_a_run_killed_after_its_last_step_is_trained_no_further(recipe, tmp_path, whole_run):
    """With a rate that is not 0 at the end, a step more would change the weights."""
    out = Path(shutil.copytree(whole_run(recipe), tmp_path / "out"))
    (out / "model.safetensors").unlink()
    scheduler = torch.load(out / "checkpoint-6" / "scheduler.pt")
    torch.save(scheduler | {"last_epoch": 0}, out / "checkpoint-6" / "scheduler.pt")
    run(recipe, tmp_path, "out", "--resume_from_checkpoint", "last")
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 6
    assert same_model(whole_run(recipe), out)


@pytest.mark.parametrize("recipe", ["language-model", "classification"])
def test_evaluations_leave_training_as_it_is(recipe, tmp_path):
    options = ["--config_overrides", "lsh_window=16,local_window=8,hidden_dropout_prob=0.2", "--max_steps", "3"]
    (tmp_path / "few.txt").write_text("A line of a small book.\n" * 10)
    (tmp_path / "few.csv").write_text("source,target\n" + "abcab,a\nbcabc,b\ncabca,c\n" * 3)
    options += ["--validation_file", str(tmp_path / ("few.txt" if recipe == "language-model" else "few.csv"))]
    run(recipe, tmp_path, "without", *options, "--do_train")
    run(recipe, tmp_path, "with", *options, "--eval_strategy", "steps", "--eval_steps", "1")
    assert same_model(tmp_path / "with", tmp_path / "without")


@pytest.fixture(scope="module")
def whole(whole_run):
    return whole_run("language-model")


def last(folder: Path) -> str:
    return Path(checkpoint_to_resume(TrainingArguments(str(folder), resume_from_checkpoint="last", use_cpu=True))).name


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(name, whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "out"))
    assert last(folder) == "checkpoint-6"
    file = folder / "checkpoint-6" / name
    data = file.read_bytes()
    for size in sorted({0, 1, 9, 100, len(data) // 2, len(data.rstrip()) - 1}):
        file.write_bytes(data[:size])
        assert last(folder) == "checkpoint-4"
    file.write_bytes(data[: len(data) // 2] + b"\x00\xff" * 20 + data[len(data) // 2 + 40 :])
    assert last(folder) == "checkpoint-4" or name == "model.safetensors"  # whose weights have no checksum
    file.write_bytes(b"\xff" * 40 + data[40:])
    assert last(folder) == "checkpoint-4"
    file.unlink()
    assert last(folder) == "checkpoint-4"
    file.write_bytes(data)
    assert last(folder) == "checkpoint-6"


def test_records_of_other_runs_are_passed_over(whole, tmp_path):
    folder = Path(shutil.copytree(whole, tmp_path / "out"))
    for record in ("{}", "[]", "null", "3", '{"global_step": 4}', '{"no_such_field": 1}'):
        (folder / "checkpoint-6" / "trainer_state.json").write_text(record)
        assert last(folder) == "checkpoint-4"


def test_checkpoints_that_cannot_be_gone_on_from_are_refused_in_one_line(whole, tmp_path, capsys):
    folder = Path(shutil.copytree(whole, tmp_path / "out"))
    for path in folder.glob("checkpoint-*"):
        (path / "optimizer.pt").write_bytes(b"")
    for name, out, message in (
        ("last", folder, "contains no complete checkpoint"),
        ("last", tmp_path / "new", "contains no checkpoint"),
        (folder / "checkpoint-4", folder, "optimizer.pt is damaged"),
        (folder / "checkpoint-5", folder, "no such directory"),
    ):
        files = ["--train_file", str(whole.parent / "book.txt"), "--output_dir", str(out)]
        capsys.readouterr()
        assert main(["train", "language-model", *TINY, *files, "--resume_from_checkpoint", str(name)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"hf-reformer: --resume_from_checkpoint {name}: ")
        assert message in error


def test_weights_alone_can_be_gone_on_from(tmp_path):
    run("language-model", tmp_path, "out", "--save_only_model", "True")
    assert not any(checkpoints(tmp_path / "out").values())


def test_a_full_disk_leaves_the_older_checkpoints(tmp_path, monkeypatch, capsys):
    save, (soft, hard) = torch.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(value, file, **options):
        if "checkpoint-4/optimizer" in str(file):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
        save(value, file, **options)

    run("language-model", tmp_path, "other", "--max_steps", "1")
    arguments = [*TINY, *BYTES, "--train_file", str(tmp_path / "book.txt"), "--sequence_length", "64"]
    arguments += ["--output_dir", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        try:
            status = main(["train", "language-model", *arguments])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 2
    assert "checkpoint-4 could not be saved" in capsys.readouterr().err.splitlines()[-1]
    assert checkpoints(tmp_path / "out") == {"checkpoint-2": None}
    assert main(["train", "language-model", *arguments, "--resume_from_checkpoint", "last"]) == 0


def test_an_older_run_in_the_same_folder_is_not_mixed_with_a_new_one(tmp_path, monkeypatch):
    run("language-model", tmp_path, "out")
    kill_while_saving(monkeypatch, "optimizer.pt", "language-model", tmp_path, "out", "--learning_rate", "0.1")
    assert checkpoints(tmp_path / "out")["checkpoint-4"] is not None  # though the older record was whole


# ---- killed at random moments ----


def killed_run(recipe: str, folder: str, out: str, seconds: float, more: list[str]) -> None:
    """A run in a process of its own, which a signal ends after so many seconds, wherever it is."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if seconds:
        signal.setitimer(signal.ITIMER_REAL, seconds)
    run(recipe, Path(folder), out, *more)


@pytest.mark.slow
def test_fuzz_runs_killed_at_random_moments(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"hf_reformer.recipes.{name.replace('-', '_')}" for name in OWN])
    every_step = ["--save_steps", "1", "--save_total_limit", "2"]

    def start(recipe: str, out: str, seconds: float, *more: str) -> float | None:
        """The exit code."""
        arguments = (recipe, str(tmp_path), out, seconds, [*every_step, *more])
        process = context.Process(target=killed_run, args=arguments)
        process.start()
        process.join()
        return process.exitcode

    for recipe in OWN:
        assert start(recipe, recipe, 0) == 0
    for seed in seeds():
        draw = random.Random(seed)
        recipe, out = draw.choice(list(OWN)), tmp_path / "killed"
        shutil.rmtree(out, ignore_errors=True)
        code, reached = None, 0
        for seconds in (*(draw.uniform(0.1, 5) for _ in range(4)), 0):
            code = start(recipe, "killed", seconds, *(["--resume_from_checkpoint", "last"] if reached else []))
            assert code in (0, -signal.SIGALRM), f"seed {seed}"
            whole = [name for name, damage in checkpoints(out).items() if damage is None]
            newest = max((int(name.split("-")[1]) for name in whole), default=0)
            assert newest >= reached, f"seed {seed}: step {reached} was saved, and is lost"
            reached = newest
            if code == 0:
                break
        assert code == 0, f"seed {seed}"
        assert same_model(out, tmp_path / recipe), f"seed {seed}"
        ends = [json.loads((x / "trainer_state.json").read_text())["global_step"] for x in (out, tmp_path / recipe)]
        assert ends[0] == ends[1], f"seed {seed}"
