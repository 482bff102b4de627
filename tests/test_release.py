"""What a release is made of agrees with itself: versions, workflows, forms."""

import re
from pathlib import Path

import pytest
import yaml

import hf_reformer

ROOT = Path(__file__).parents[1]
FORMS = sorted(path for path in (ROOT / ".github").rglob("*.yml"))


def read(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_version_is_the_same_everywhere():
    assert read("CITATION.cff")["version"] == hf_reformer.__version__
    assert f"\n## [{hf_reformer.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.name)
def test_workflows_and_forms_are_whole(form):
    """Every step does one thing, every target of make is there, and whoever publishes says to whom."""
    content, makefile = read(form), (ROOT / "Makefile").read_text(encoding="utf-8")
    if form.parent.name != "workflows":
        assert "body" in content or form.name == "config.yml"
        return
    for job in content["jobs"].values():
        for step in job["steps"]:
            assert len({"uses", "run"} & set(step)) == 1
            for targets in re.findall(r"\bmake ((?:[a-z-]+ ?)+)", step.get("run", "")):
                for target in targets.split():
                    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"make {target}"
        if any("gh-action-pypi-publish" in step.get("uses", "") for step in job["steps"]):
            assert job["permissions"] == {"id-token": "write"}
            assert job["environment"]


def test_workflows_try_every_python_that_is_promised():
    promised = re.search(r'requires-python = ">=3\.(\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tried = read(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert tried == [f"3.{minor}" for minor in range(int(promised[1]), 15)]
