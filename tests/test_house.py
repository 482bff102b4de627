"""Rules of the source that neither ruff nor import-linter (pyproject.toml) can express; nothing of it is imported."""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDERS = ("src", "scripts", "tests", "notebooks", "benchmarks", "experiments", "dev", "docs", ".ci")
HOME_DIRECTORY = re.compile(
    r"(?<![\w.~-])/(?:home|Users)/[\w.-]+|(?<![\w.~/-])/(?:root)(?![\w.-])|\b[A-Za-z]:\\+Users\\+\w+"
)


def postponed_annotations(text):
    """transformers reads annotations while it runs: the config's type checks and AutoModel.register depend on them."""
    return re.findall(r"^from __future__ import .*annotations", text, flags=re.MULTILINE)


def text_like_an_import(text):
    """The Hub's copier reads lines, not Python: a docstring's line that looks like an import counts as one."""
    real = {node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    lines = enumerate(text.splitlines(), start=1)
    return [line for number, line in lines if re.match(r"\s*(from|import)\s+\.", line) and number not in real]


def reseeding(text):
    """Generators of one's own may be seeded; torch's global one is the caller's. Draw from it, or use ops/prng.py."""
    tree = ast.parse(text)
    full_names = {"torch": "torch"}  # local name → what it stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            full_names |= {name.asname: name.name for name in node.names if name.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            full_names |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    names = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, (ast.Name, ast.Attribute))]
    names = [re.sub(r"^\w+", lambda found: full_names.get(found[0], found[0]), name) for name in names]
    return [name for name in names if re.fullmatch(r"torch\.([\w.]+\.)?(manual_)?seed(_all)?", name)]


def unannotated(text):
    """Public functions and methods are annotated, except kernels of Triton and the methods of autograd Functions."""
    bodies, found = [ast.parse(text).body], []
    for body in bodies:
        for node in body:
            public = isinstance(node, (ast.ClassDef, ast.FunctionDef)) and re.match("__init__|[^_]", node.name)
            if public and isinstance(node, ast.ClassDef):
                bodies += [node.body] if "autograd.Function" not in str([*map(ast.unparse, node.bases)]) else []
            elif public and not any("jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                args = [node.args.vararg, *node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                args = [arg for arg in [*args, node.args.kwarg] if arg and arg.arg not in ("self", "cls")]
                if any(arg.annotation is None for arg in args) or (not node.returns and node.name != "__init__"):
                    found.append(node.name)
    return found


def home_directories(text):
    """Paths of one machine come from the caller."""
    return [found[0] for found in HOME_DIRECTORY.finditer(text)]


RULES = {
    postponed_annotations: "src/hf_reformer",
    text_like_an_import: "src/hf_reformer",
    reseeding: "src",
    unannotated: "src",
    home_directories: "",
}


def texts(folder):
    """Relative path and text of the files below a folder, or of the whole repository but what tools have written."""
    inside = [path for name in FOLDERS for path in (REPOSITORY / name).rglob("*")]
    for path in [*REPOSITORY.glob("*"), *inside] if not folder else (REPOSITORY / folder).rglob("*.py"):
        generated = any(part.endswith((".egg-info", "__pycache__", ".ipynb_checkpoints")) for part in path.parts)
        if path.is_file() and not generated:
            try:
                yield path.relative_to(REPOSITORY).as_posix(), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # not text


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule):
    files = dict(texts(RULES[rule]))
    assert len(files) > 30
    problems = [f"{path}: `{found}`. {rule.__doc__}" for path, text in files.items() for found in rule(text)]
    assert not problems, "\n" + "\n".join(problems)


BAD = [
    (postponed_annotations, '"""Heads."""\nfrom __future__ import annotations'),
    (text_like_an_import, '"""Take it\n    from .hashing, please.\n"""'),
    (text_like_an_import, 'x = """\nimport .a\n"""'),
    (reseeding, "import torch\ntorch.manual_seed(0)"),
    (reseeding, "import torch\ntorch.seed()"),
    (reseeding, "import torch as t\nt.cuda.manual_seed_all(0)"),
    (reseeding, "from torch import manual_seed as fix\nfix(0)"),
    (reseeding, "from torch import random\nrandom.manual_seed(0)"),
    (reseeding, "import torch\ntorch.default_generator.manual_seed(0)"),
    (unannotated, "def f(x) -> int: 0"),
    (unannotated, "def f(x: int): 0"),
    (unannotated, "class A:\n    def __init__(self, *args): 0"),
    (home_directories, "x = '/{}/ada/runs'".format("home")),
    (home_directories, "file:///{}/ada".format("Users")),
    (home_directories, r"C:\{}\ada".format("Users")),
    (home_directories, "a=/{}".format("root")),
]
GOOD = [
    (
        text_like_an_import,
        '"""Taken from .hashing, not at the start."""\nfrom .a import (\n    b,\n)\n# from .a comment',
    ),
    (reseeding, "import torch\ng = torch.Generator().manual_seed(0)\ng.seed()\ntorch.initial_seed()"),
    (unannotated, "class A:\n    def __init__(self, x: int): 0\n    def _f(x): 0\nclass _B:\n    def f(x): 0"),
    (unannotated, "@triton.jit\ndef kernel(x): 0\ndef f(x: int, *, y: int = 0, **options: int) -> int: 0"),
    *((home_directories, path) for path in ("~/.cache", "docs/home/page", "/rooted", "a.org/home/page", "/homes")),
]


@pytest.mark.parametrize(("rule", "text"), BAD)
def test_a_bad_text_is_caught(rule, text):
    assert len(rule(text)) == 1


@pytest.mark.parametrize(("rule", "text"), GOOD)
def test_a_good_text_passes(rule, text):
    assert not rule(text)
