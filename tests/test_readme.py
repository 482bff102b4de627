"""The README's code runs as it stands, and its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_reformer.ops.dispatch import unsupported_reason

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Where torchao is installed, transformers imports it, and it may tell of its own binaries and of torch's news.
FROM_TORCHAO = re.compile(r"torchao|Calling register_constant\(\) on Enum")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_quickstart_is_short():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 12


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run_as_they_stand(number, tmp_path):
    unsupported_reason("cpu")  # compiles the kernel, if that is still to be done, which is reported once
    file = tmp_path / "block.py"
    file.write_text(BLOCKS[number], encoding="utf-8")
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stderr.splitlines() if not FROM_TORCHAO.search(line)]
    assert not printed, "the first snippet a user tries prints no warning"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_local_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_named_files_and_targets_exist(page):
    makefile, text = ((path).read_text(encoding="utf-8") for path in (ROOT / "Makefile", page))
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), f"{page.name} names `make {target}`"
    for path in re.findall(r"\b((?:scripts|tests|src|benchmarks|experiments|dev)/[\w/]+\.py)\b", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_contributing_names_every_room():
    page, package = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), ROOT / "src" / "hf_reformer"
    rooms = {path.name for path in package.glob("*.py")} | {f"{path.parent.name}/" for path in package.glob("*/*.py")}
    tree = page[page.index("src/hf_reformer/") : page.index("src/reformer_kernels/")]
    assert set(re.findall(r"^  ([\w./]+)", tree, flags=re.MULTILINE)) == rooms - {"__main__.py"}


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_named_tests_exist(page):
    for file, name in re.findall(r"`(test_\w+\.py)::(\w+)`", page.read_text(encoding="utf-8")):
        (found,) = (ROOT / "tests").rglob(file)
        assert f"def {name}(" in found.read_text(encoding="utf-8"), f"{page.name} names {file}::{name}"
