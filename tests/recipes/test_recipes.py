"""The registry of recipes: scripts and `hf-reformer train NAME` run the same `main`, also without the repository."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from hf_reformer.recipes import load_recipe
from reformer_cli.main import RECIPES

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {name: f"train_{name.replace('-', '_')}" for name in RECIPES} | {"language-model": "train_lm"}


def test_every_recipe_has_a_script():
    assert {path.stem for path in (ROOT / "scripts").glob("*.py")} == {SCRIPTS[name] for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_a_script_is_its_recipe(name):
    script = runpy.run_path(str(ROOT / "scripts" / f"{SCRIPTS[name]}.py"))
    assert script["main"] is load_recipe(name).main
    assert f"hf-reformer train {name}" in script["__doc__"]


@pytest.mark.parametrize("name", RECIPES)
def test_help_shows_examples_and_options(name, capsys):
    with pytest.raises(SystemExit) as end:
        load_recipe(name).main(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert f"usage: hf-reformer train {name}" in printed
    assert f"hf-reformer train {name} --model_name_or_path" in printed
    assert "--resume_from_checkpoint" in printed.split("options:")[1]


@pytest.mark.slow
def test_recipes_need_no_repository_and_no_network(tmp_path):
    """As a module, from a copy of the package alone, in an empty folder, and metrics with an empty cache."""
    (tmp_path / "site").mkdir()
    (tmp_path / "empty").mkdir()
    for package in ("hf_reformer", "reformer_cli", "reformer_kernels"):
        (tmp_path / "site" / package).symlink_to(ROOT / "src" / package)
    (tmp_path / "table.csv").write_text("text,label\n" + "again,a\nand again,b\n" * 20)
    command = [sys.executable, "-m", "hf_reformer", "train", "classification", "--train_file", "../table.csv"]
    command += ["--hidden_size", "16", "--attn_layers", "local", "--tokenizer", "bytes", "--max_steps", "1"]
    paths = {"PYTHONPATH": str(tmp_path / "site"), "HF_HOME": str(tmp_path / "cache")}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **paths}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path / "empty", env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    (out,) = (tmp_path / "empty" / "runs").iterdir()
    assert (out / "model.safetensors").exists()
    assert {"accuracy", "f1"} <= set(json.loads((out / "scores.json").read_text())["validation"]["Reformer"])
