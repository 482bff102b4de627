"""The rules of the package's layout, read from its source: who may import whom, and what survives the trip to the Hub.

Nothing is imported here but the standard library and pytest, so a broken package still gets these messages.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

# What a file may import besides the standard library and the files before it. The first two kinds travel to the Hub.
TORCH = "travels, knows torch alone"
MODEL = "travels, knows torch and transformers"
STAYS = "stays in the package"

# The one list: a file imports only from files above its own line. A new file gets a line here.
ORDER = [
    ("configuration_reformer", MODEL),
    ("randomness", TORCH),
    ("hashing", TORCH),
    ("reference", TORCH),
    ("bucket_tables", TORCH),
    ("kernels", STAYS),  # a folder: its files import each other freely
    ("tiled_attention", TORCH),
    ("attention_ops", TORCH),
    ("attention_mass", TORCH),
    ("coverage", TORCH),
    ("replay", TORCH),
    ("slices", TORCH),
    ("reversible", TORCH),
    ("losses", TORCH),
    ("sharding", TORCH),
    ("positions", MODEL),
    ("listed_attention", TORCH),
    ("chunk_decoding", TORCH),
    ("exact_attention", MODEL),
    ("attention", MODEL),
    ("cross_attention", MODEL),
    ("feed_forward", MODEL),
    ("token_step", MODEL),
    ("layers", MODEL),
    ("outputs", MODEL),
    ("whole_stack", MODEL),
    ("cache_layers", MODEL),
    ("cache", MODEL),
    ("inputs", MODEL),
    ("modeling_reformer", MODEL),
    ("language_models", MODEL),
    ("heads_text", MODEL),
    ("heads_media", MODEL),
    ("seq2seq", MODEL),
    ("tokenization_reformer", STAYS),
    ("adapters", STAYS),
    ("pipelines", STAYS),
    ("registration", STAYS),
    ("text_generation", STAYS),
    ("model_card", STAYS),
    ("hub", STAYS),
    ("convert_trax", STAYS),
    ("convert_reformer_pytorch", STAYS),
    ("convert", STAYS),
    ("data", STAYS),
    ("distributed", STAYS),
    ("visualize", STAYS),
    ("coverage_callback", STAYS),
    ("__init__", STAYS),
    ("cli", STAYS),
    ("__main__", STAYS),
]
PLACE = {name: place for place, (name, _) in enumerate(ORDER)}
KIND = dict(ORDER)

LIBRARIES = {TORCH: {"torch"}, MODEL: {"torch", "transformers"}}
LIBRARIES_OF_ONE_FILE = {("configuration_reformer", "huggingface_hub.dataclasses")}  # `strict` checks the fields
KNOWS_KERNELS = "attention_ops"

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "src" / "hf_reformer"
TEXT_FOLDERS = ("src", "scripts", "tests", "notebooks", "benchmarks", "docs", ".ci")
HOME_DIRECTORY = re.compile(
    r"(?<![\w.~-])/(?:home|Users)/[\w.-]+|(?<![\w.~/-])/(?:root)(?![\w.-])|\b[A-Za-z]:\\+Users\\+\w+"
)


@dataclass(frozen=True)
class Import:
    """One import statement, its target as Python resolves it: `from ..hashing import x` is `hf_reformer.ops.lsh`."""

    line: int
    statement: str
    target: str
    names: tuple[str, ...]
    relative: bool
    flat: bool
    guarded: bool

    @property
    def top(self) -> str:
        return self.target.split(".")[0]

    @property
    def places(self) -> set[str]:
        """The entries of ORDER that the statement reaches for; empty for imports from outside the package."""
        first, *rest = self.target.split(".")
        if first != "hf_reformer":
            return set()
        if rest:
            return {rest[0]}
        return {name if is_module(name) else "__init__" for name in self.names} or {"__init__"}


@dataclass(frozen=True)
class Source:
    """A file of the package: `path` is relative to src/hf_reformer."""

    path: str
    text: str

    @property
    def place(self) -> str:
        return Path(self.path).parts[0].removesuffix(".py")

    @property
    def travels(self) -> bool:
        return KIND.get(self.place) in LIBRARIES

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, filename=self.path)

    @cached_property
    def imports(self) -> list[Import]:
        folder = ["hf_reformer", *Path(self.path).parts[:-1]]
        found = []
        for node, guarded in walk_with_guard(self.tree):
            statement = ast.unparse(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else ""
            if isinstance(node, ast.Import):
                found += [Import(node.lineno, statement, name.name, (), False, False, guarded) for name in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = folder[: len(folder) - node.level + 1] if node.level else []
                target = ".".join([*base, *filter(None, [node.module])])
                flat = node.level == 1 and node.module is not None and "." not in node.module
                names = tuple(name.name for name in node.names)
                found.append(Import(node.lineno, statement, target, names, node.level > 0, flat, guarded))
        return found

    def problem(self, line: int, message: str) -> str:
        return f"src/hf_reformer/{self.path}:{line}: {message}"


def is_module(name: str) -> bool:
    return name in PLACE or (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir()


def walk_with_guard(node: ast.AST, guarded: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below this one, and whether it stands in the body of a `try`."""
    for field, value in ast.iter_fields(node):
        inside = guarded or (isinstance(node, ast.Try) and field == "body")
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child, inside
                yield from walk_with_guard(child, inside)


# ---- the rules: each takes a file and returns its problems ----


def has_a_place(source: Source) -> list[str]:
    if source.place in PLACE:
        return []
    message = f"`{source.place}` is in no order. Give it a line in ORDER (tests/test_layout.py), below all it imports."
    return [source.problem(1, message)]


def imports_from_its_left(source: Source) -> list[str]:
    problems = []
    for found in source.imports:
        for place in sorted(found.places):
            if place not in PLACE:
                message = f"`{found.statement}` names `{place}`, which is in no order. Give it a line in ORDER."
            elif place == source.place == "kernels" or PLACE[place] < PLACE.get(source.place, len(ORDER)):
                continue
            else:
                message = (
                    f"`{found.statement}`: `{place}` does not come before `{source.place}`. Move what both need "
                    "to the left, or change ORDER (tests/test_layout.py) if a new order still has one direction."
                )
            problems.append(source.problem(found.line, message))
    return problems


def imports_siblings_flat(source: Source) -> list[str]:
    return [
        source.problem(found.line, f"`{found.statement}`: the Hub's copier follows only `from .name import x`.")
        for found in source.imports
        if source.travels and found.relative and not found.flat
    ]


def imports_few_libraries(source: Source) -> list[str]:
    """In a `try:` and under TYPE_CHECKING as well: what a traveller needs is torch and transformers, nothing else."""
    if not source.travels:
        return []
    libraries = LIBRARIES[KIND[source.place]]
    allowed = libraries | sys.stdlib_module_names | {"hf_reformer"}  # the package has a rule of its own, below
    message = f"this file imports only {' and '.join(sorted(libraries))}, the standard library and its siblings."
    return [
        source.problem(found.line, f"`{found.statement}`: {message}")
        for found in source.imports
        if found.top not in allowed and (source.place, found.target) not in LIBRARIES_OF_ONE_FILE
    ]


def reaches_the_package_guarded(source: Source) -> list[str]:
    problems = []
    for found in source.imports:
        if not source.travels or found.relative or found.top != "hf_reformer":
            continue
        if source.place != KNOWS_KERNELS:
            message = f"`{found.statement}`: only {KNOWS_KERNELS}.py may import hf_reformer by name. Use `from .name`."
            problems.append(source.problem(found.line, message))
        elif not found.guarded:
            message = f"`{found.statement}` stands outside a `try:`, so a copy on the Hub would need the package."
            problems.append(source.problem(found.line, message))
    return problems


def leaves_kernels_to_attention_ops(source: Source) -> list[str]:
    if source.place in {"kernels", KNOWS_KERNELS}:
        return []
    return [
        source.problem(found.line, f"`{found.statement}`: only {KNOWS_KERNELS}.py knows that kernels exist.")
        for found in source.imports
        if "kernels" in found.places
    ]


def keeps_annotations_alive(source: Source) -> list[str]:
    """Configuration, modules, models and heads: transformers reads their annotations while it runs."""
    message = (
        "`from __future__ import annotations` switches the config's type checks off and breaks AutoModel.register. "
        "Write the annotations so that they hold as they are."
    )
    return [
        source.problem(found.line, message)
        for found in source.imports
        if KIND.get(source.place) == MODEL and found.target == "__future__" and "annotations" in found.names
    ]


def has_no_text_like_an_import(source: Source) -> list[str]:
    """The Hub's copier reads lines, not Python: a docstring's line that starts with `from .` counts as an import."""
    if not source.travels:
        return []
    real = {found.line for found in source.imports if found.relative}
    problems = []
    for match in re.finditer(r"^\s*((?:from|import)\s+\.)", source.text, flags=re.MULTILINE):
        line = source.text.count("\n", 0, match.start(1)) + 1
        if line not in real:
            message = "this text starts like a relative import, and the Hub's copier takes it for one. Reword it."
            problems.append(source.problem(line, message))
    return problems


def never_reseeds(source: Source) -> list[str]:
    """Generators of one's own may be seeded; torch's global one is the caller's."""
    problems = []
    full_names = {"torch": "torch"}  # local name → what it stands for
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            full_names |= {name.asname: name.name for name in node.names if name.asname}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            full_names |= {name.asname or name.name: f"{node.module}.{name.name}" for name in node.names}
    for node in ast.walk(source.tree):
        if not isinstance(node, (ast.Name, ast.Attribute)):
            continue
        first, *rest = dotted_name(node).split(".")
        name = ".".join([full_names.get(first, first), *rest])
        if re.fullmatch(r"torch\.(.+\.)?(manual_)?seed(_all)?", name):
            message = f"`{name}` reseeds the global generator. Draw from it as dropout does, or use randomness.py."
            problems.append(source.problem(node.lineno, message))
    return problems


def dotted_name(node: ast.AST) -> str:
    """`a.b.c` of such an expression, "" for any other: `torch.Generator().manual_seed` has no dotted name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (start := dotted_name(node.value)):
        return f"{start}.{node.attr}"
    return ""


def home_directories(path: str, text: str) -> list[str]:
    return [
        f"{path}:{number}: `{match.group()}` is a directory of one machine. Take the path from the caller."
        for number, line in enumerate(text.splitlines(), start=1)
        for match in HOME_DIRECTORY.finditer(line)
    ]


RULES = [
    has_a_place,
    imports_from_its_left,
    imports_siblings_flat,
    imports_few_libraries,
    reaches_the_package_guarded,
    leaves_kernels_to_attention_ops,
    keeps_annotations_alive,
    has_no_text_like_an_import,
    never_reseeds,
]


# ---- the rules hold in this repository ----


def package_files() -> list[Source]:
    return [
        Source(path.relative_to(PACKAGE).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def text_files() -> Iterator[tuple[str, str]]:
    """What the repository holds by way of text, but not what tools have written into it."""
    inside = [path for folder in TEXT_FOLDERS for path in (REPOSITORY / folder).rglob("*")]
    for path in sorted([*REPOSITORY.glob("*"), *inside]):
        generated = any(part.endswith((".egg-info", "__pycache__", ".ipynb_checkpoints")) for part in path.parts)
        if path.is_file() and not generated:
            try:
                yield path.relative_to(REPOSITORY).as_posix(), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # not text


def test_the_package_is_found():
    assert (PACKAGE / "py.typed").exists()
    assert package_files()


def test_the_order_names_every_file_once():
    assert len(PLACE) == len(ORDER)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file(rule):
    problems = [problem for source in package_files() for problem in rule(source)]
    assert not problems, "\n" + "\n".join(problems)


def test_no_file_names_a_home_directory():
    problems = [problem for path, text in text_files() for problem in home_directories(path, text)]
    assert not problems, "\n" + "\n".join(problems)


# ---- and each rule can fail ----

BAD = [
    (has_a_place, "newcomer.py", "x = 1", 1),
    (has_a_place, "sub/hashing.py", "x = 1", 1),
    (imports_from_its_left, "hashing.py", "import torch\nfrom .attention import x", 2),
    (imports_from_its_left, "hashing.py", "def f():\n    from .hub import x", 2),
    (imports_from_its_left, "hashing.py", "try:\n    import hf_reformer.hub.export\nexcept ImportError:\n    pass", 2),
    (imports_from_its_left, "hashing.py", "from .newcomer import x", 1),
    (imports_from_its_left, "hub.py", "from hf_reformer import ReformerConfig", 1),
    (imports_from_its_left, "hub.py", "from . import cli", 1),
    (imports_from_its_left, "kernels/cpu/op.py", "from ...attention_ops import x", 1),
    (imports_from_its_left, "kernels/cpu/op.py", "from hf_reformer import layers", 1),
    (imports_siblings_flat, "layers.py", "from . import hashing", 1),
    (imports_siblings_flat, "layers.py", "if 1:\n    from .kernels.cpu import x", 2),
    (imports_siblings_flat, "layers.py", "try:\n    from .. import x\nexcept ImportError:\n    pass", 2),
    (imports_few_libraries, "layers.py", "import einops", 1),
    (imports_few_libraries, "layers.py", "def f():\n    import numpy as np", 2),
    (imports_few_libraries, "layers.py", "from huggingface_hub.dataclasses import strict", 1),
    (imports_few_libraries, "configuration_reformer.py", "from huggingface_hub import hf_hub_download", 1),
    (imports_few_libraries, "reversible.py", "import math\nfrom transformers import Cache", 2),
    (imports_few_libraries, "attention_ops.py", "try:\n    import triton\nexcept ImportError:\n    pass", 2),
    (reaches_the_package_guarded, "layers.py", "import hf_reformer", 1),
    (reaches_the_package_guarded, "layers.py", "try:\n    import reformer_kernels.contract\nfinally: 0", 2),
    (reaches_the_package_guarded, "attention_ops.py", "from hf_reformer import kernels", 1),
    (reaches_the_package_guarded, "attention_ops.py", "try: 0\nfinally: import hf_reformer", 2),
    (leaves_kernels_to_attention_ops, "registration.py", "from .kernels import cpu", 1),
    (leaves_kernels_to_attention_ops, "__init__.py", "from . import kernels", 1),
    (leaves_kernels_to_attention_ops, "cli.py", "def f():\n    from reformer_kernels.cpu.torch_ops import x", 2),
    (keeps_annotations_alive, "configuration_reformer.py", "from __future__ import annotations", 1),
    (keeps_annotations_alive, "heads_text.py", '"""Heads."""\nfrom __future__ import annotations', 2),
    (has_no_text_like_an_import, "layers.py", '"""Take it\n    from .hashing, please.\n"""', 2),
    (has_no_text_like_an_import, "layers.py", 'x = """\n\nfrom .a.b import c\n"""', 3),
    (has_no_text_like_an_import, "layers.py", 'x = """\nimport .a\n"""', 2),
    (never_reseeds, "data.py", "import torch\ntorch.manual_seed(0)", 2),
    (never_reseeds, "kernels/triton/op.py", "import torch\ntorch.seed()", 2),
    (never_reseeds, "layers.py", "import torch as t\nt.cuda.manual_seed_all(0)", 2),
    (never_reseeds, "layers.py", "from torch import manual_seed as fix\nfix(0)", 2),
    (never_reseeds, "layers.py", "from torch import random\nrandom.manual_seed(0)", 2),
    (never_reseeds, "layers.py", "import torch\ntorch.default_generator.manual_seed(0)", 2),
]

GOOD = [
    ("hashing.py", "from __future__ import annotations\nimport math\nimport torch\nfrom .randomness import fold"),
    ("configuration_reformer.py", "from huggingface_hub.dataclasses import strict\nfrom transformers import x"),
    ("attention_ops.py", "try:\n    from reformer_kernels.contract import cpu\nexcept ImportError:\n    cpu = None"),
    (
        "attention_ops.py",
        "def load():\n    try:\n        import reformer_kernels.contract as k\n    except ImportError: 0",
    ),
    ("layers.py", "def f():\n    from .hashing import (\n        x,\n    )\n    # from .a comment\n    return x"),
    ("layers.py", '"""Taken from .hashing, not at the start of a line."""'),
    ("layers.py", "import torch\ng = torch.Generator().manual_seed(0)\ng.seed()\ntorch.initial_seed()"),
    ("kernels/cpu/op.py", "import numpy\n\nfrom ...hashing import x\nfrom ..csrc import y\nfrom . import z"),
    (
        "hub.py",
        "import hf_reformer.models.modeling_reformer\nfrom hf_reformer import layers\nfrom . import registration",
    ),
    ("__init__.py", "from .visualize import plot\nfrom . import registration"),
    ("cli.py", "from . import __version__\nfrom hf_reformer import ReformerConfig"),
]


@pytest.mark.parametrize(("rule", "path", "text", "line"), BAD)
def test_a_bad_file_is_caught(rule, path, text, line):
    problems = rule(Source(path, text))
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"src/hf_reformer/{path}:{line}: ")


@pytest.mark.parametrize(("path", "text"), GOOD)
def test_a_good_file_passes(path, text):
    assert [problem for rule in RULES for problem in rule(Source(path, text))] == []


def test_every_rule_has_a_bad_example():
    assert {rule for rule, *_ in BAD} == set(RULES)


HOMES = ["x = '/{}/ada/runs'".format("home"), "/{}/x".format("root"), "file:///{}/ada".format("Users")]
HOMES += [r"C:\{}\ada".format("Users"), "a=/{}".format("root")]


@pytest.mark.parametrize("text", HOMES)
def test_a_home_directory_is_caught(text):
    assert home_directories("docs/x.md", f"fine\n{text}")[0].startswith("docs/x.md:2: ")


@pytest.mark.parametrize("text", ["~/.cache", "docs/home/page", "/rooted", "a.org/home/page", "sqrt/root", "/homes"])
def test_an_ordinary_path_passes(text):
    assert home_directories("docs/x.md", text) == []
