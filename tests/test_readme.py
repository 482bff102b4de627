"""The code of README and docs runs as it stands, their commands exist, and their links lead somewhere."""

import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from experiment_scripts import load_experiment

from hf_reformer.ops.dispatch import unsupported_reason
from reformer_cli.main import RECIPES, main, make_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Where torchao is installed, transformers imports it, and it may tell of its own binaries and of torch's news.
FROM_TORCHAO = re.compile(r"torchao|Calling register_constant\(\) on Enum")
PROGRESS = re.compile(r"^$|^Loading weights: ")
DOCS = sorted((ROOT / "docs").rglob("*.md"))
CARDS = sorted((ROOT / "examples" / "models").rglob("README.md"))
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")), *CARDS, *DOCS]
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_quickstart_is_short():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 12


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run_as_they_stand(number, tmp_path):
    unsupported_reason("cpu")  # compiles the kernel, if that is still to be done, which is reported once
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    file = tmp_path / "block.py"
    file.write_text(BLOCKS[number], encoding="utf-8")
    done = subprocess.run([sys.executable, file], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    printed = [
        line for line in done.stderr.splitlines() if not FROM_TORCHAO.search(line) and not PROGRESS.search(line)
    ]
    assert not printed, "the first snippet a user tries prints no warning"


RUN_ELSEWHERE = re.compile(r"<!-- run by `(test_\w+\.py)::\w+` -->\n```python\n")
BLOCK = re.compile(r"```python\n(.*?)```", flags=re.DOTALL)


def blocks_of(page):
    """Line and text of the Python blocks of a page but those whose comment names the test that runs them."""
    text = RUN_ELSEWHERE.sub("```text\n", page.read_text(encoding="utf-8"))
    return [(text[: found.start(1)].count("\n"), found[1]) for found in BLOCK.finditer(text)]


PAGES_WITH_CODE = [page for page in DOCS if blocks_of(page)]
FIGURES = {"checkpoints.md": 12, "generation.md": 2}  # pages whose text gives what the last block prints


def section_at(page, line):
    """The text around a line, from its heading to the next one, without code."""
    begin = 0
    for section in re.split(r"^(?=## )", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        begin += section.count("\n")
        if line < begin:
            return BLOCK.sub("", section)


def test_the_docs_have_code():
    assert sum(len(blocks_of(page)) for page in PAGES_WITH_CODE) > 15


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=lambda p: p.name)
def test_python_blocks_of_the_docs_run(page, tmp_path, monkeypatch, captured_warnings):
    """A page's blocks one after the other, as a reader would; a block that README has as well runs above."""
    unsupported_reason("cpu")
    if "sentence_transformers" in page.read_text(encoding="utf-8"):
        pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]):
        for line, block in blocks_of(page):
            if block not in BLOCKS:
                with contextlib.redirect_stdout(io.StringIO()) as printed:
                    exec(compile("\n" * line + block, page.name, "exec"), names)
    assert not captured_warnings
    if page.name in FIGURES:
        figures, shown = re.findall(r"-?\d+\.\d+", printed.getvalue()), section_at(page, line)
        assert len(figures) == FIGURES[page.name]
        assert all(figure in shown for figure in figures)


def shell_lines(page):
    """The lines of shell blocks; a backslash joins two, and `$name` stands for what a line before it sets."""
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL):
        text = block.replace("\\\n", " ")
        for name, value in reversed(
            re.findall(r'^(\w+)="([^"]*)"', text, flags=re.MULTILINE)
        ):  # may name earlier ones
            text = text.replace(f"${name}", value.replace("\n", " "))
        yield from text.splitlines()


def commands_of(page):
    """What follows `hf-reformer`, in words, without comments."""
    for line in shell_lines(page):
        if line.startswith("hf-reformer "):
            yield shlex.split(line, comments=True)[1:]


def test_commands_of_the_pages_take_their_options():
    commands = [(page, words) for page in PAGES for words in commands_of(page)]
    assert len(commands) > 30
    helps = {}
    for page, words in commands:
        told = f"{page.name}: hf-reformer {shlex.join(words)}"
        if words[0] != "train":
            try:
                make_parser().parse_args(words)
            except SystemExit as end:
                raise AssertionError(told) from end
            continue
        recipe, options = words[1], [word for word in words if word.startswith("--")]
        assert recipe in RECIPES, told
        if recipe not in helps:
            with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
                main(["train", recipe, "--help"])
            helps[recipe] = set(re.findall(r"--\w+", printed.getvalue()))
        assert set(options) <= helps[recipe], f"{told}: no {set(options) - helps[recipe]}"


RUN_BY_PYTHON = re.compile(r"python (?:scripts/train_(\w+)\.py|experiments/(\w+)\.py|-m benchmarks\.(\w+))([^;]*)")


def test_commands_of_the_repository_take_their_options(monkeypatch):
    """Those of scripts, experiments and benchmarks."""
    found, helps = set(), {}
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(sys, "argv", ["script", "--help"])
    for page in PAGES:
        for line in shell_lines(page):
            found |= {(page.name, *command) for command in RUN_BY_PYTHON.findall(re.sub(r"\s#.*", "", line))}
    assert len(found) > 40
    for page, script, experiment, benchmark, options in found:
        name = script or experiment or benchmark
        if name not in helps:
            with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
                if script:
                    main(["train", {"lm": "language-model"}.get(script, script.replace("_", "-")), "--help"])
                elif experiment:
                    load_experiment(experiment).main()
                else:
                    importlib.import_module(f"benchmarks.{benchmark}").main()
            helps[name] = set(re.findall(r"--\w+", printed.getvalue()))
        unknown = set(re.findall(r"(?<!\S)--\w+", options)) - helps[name]
        assert not unknown, f"{page}: {name} has no {unknown}"


def anchors_of(page):
    """What `#…` can name on a page, in its order."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return [re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_two_headings_of_a_page_have_one_anchor(page):
    twice = {anchor for anchor in anchors_of(page) if anchors_of(page).count(anchor) > 1}
    assert not twice, f"{page.name} has these headings twice, so a link leads to the first alone: {twice}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_local_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        file = (page.parent / target) if target else page
        assert "://" in link or file.exists(), f"{page.name} links to {link}"
        if anchor and "://" not in link and file.suffix == ".md":
            assert anchor in anchors_of(file), f"{page.name} links to {link}"


def test_the_site_has_every_page_and_leaves_it_nowhere():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    named = re.findall(r"[\w/]+\.md", str(site["nav"]))
    assert sorted(named) == sorted(page.relative_to(ROOT / "docs").as_posix() for page in DOCS)
    for page in DOCS:
        for link in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            inside = (page.parent / link).resolve().is_relative_to(ROOT / "docs")
            assert "://" in link or inside, f"{page.name} links to {link}, which the site does not have"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
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


@pytest.mark.parametrize("page", DOCS, ids=lambda p: p.name)
def test_named_tests_exist(page):
    for file, name in re.findall(r"`(test_\w+\.py)::(\w+)`", page.read_text(encoding="utf-8")):
        (found,) = (ROOT / "tests").rglob(file)
        assert f"def {name}(" in found.read_text(encoding="utf-8"), f"{page.name} names {file}::{name}"
