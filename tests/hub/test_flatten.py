"""The exported code: flat, complete, the same every time, and refused where it could not be flat."""

import ast
import re
import sys

import pytest

from hf_reformer.hub import exporting
from hf_reformer.hub import flatten as flattening
from hf_reformer.hub.flatten import flatten

COPIER = re.compile(r"^\s*from\s+\.(\S+)\s+import", flags=re.MULTILINE)  # what the Hub's copier follows


def test_exported_code_is_flat_and_complete():
    files = exporting.code_files()
    assert files == exporting.code_files()
    for name, text in files.items():
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level]
        assert {node.level for node in nodes} <= {1}, name
        assert {f"{node.module}.py" for node in nodes} <= files.keys(), name
        assert [node.module for node in sorted(nodes, key=lambda node: node.lineno)] == COPIER.findall(text), name
    for reference in exporting.auto_map().values():
        module, name = reference.split(".")
        assert f"class {name}(" in files[f"{module}.py"]


def test_exported_code_needs_torch_and_transformers_alone():
    """At top level and in functions; kernels inside a `try`, which the Hub's check of imports passes over."""
    for file, text in exporting.code_files().items():
        tree = ast.parse(text)
        guarded = {node for block in ast.walk(tree) if isinstance(block, ast.Try) for node in ast.walk(block)}
        for node in ast.walk(tree):
            absolute = isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level)
            for name in [alias.name for alias in node.names] if absolute else []:
                module = name if isinstance(node, ast.Import) else node.module
                allowed = {"torch", "transformers", *sys.stdlib_module_names}
                allowed |= {"reformer_kernels"} if node in guarded else set()
                allowed |= (
                    {"huggingface_hub"} if file == "configuration_reformer.py" else set()
                )  # `strict` dataclasses
                assert module.split(".")[0] in allowed, f"{file}, line {node.lineno}: {module}"


def test_only_modelling_code_is_exported():
    rooms = {"ops", "reversible", "layers", "cache", "models"}
    modules = {path.stem for path in flattening.PACKAGE.rglob("*.py") if path.parent.name in rooms}
    modules |= {"configuration_reformer", "configuration_checks", "compat"}
    assert {name.removesuffix(".py") for name in exporting.code_files()} <= modules


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Writes modules of a package, by their dotted names, and flattens it from its module `entry`."""
    monkeypatch.setattr(flattening, "PACKAGE", tmp_path)

    def flat(**modules):
        for module, text in modules.items():
            file = tmp_path / f"{module.replace('__', '/')}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        return flatten({"room.entry"})

    return flat


def test_imports_are_rewritten_and_nothing_else(package):
    entry = '"""Doc."""\nfrom ..top import (\n    a,\n    b as c,  # why\n)\n\ndef f():\n    from .near import d\n'
    files = package(
        room__entry=entry, room__near="from ..other.far import e\n", other__far="e = 1\n", top="import os\n"
    )
    assert files == {
        "entry.py": entry.replace("..top", ".top"),
        "near.py": "from .far import e\n",
        "far.py": "e = 1\n",
        "top.py": "import os\n",
    }


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("from . import near", "names no module"),
        ("from .. import other", "names no module"),
        ("from ..other import near", "names no module"),
        ("from ....near import x", "names no module"),
        ('"""Take it\n    from .nowhere import x\n"""', "names no module"),
        ("from .near import x\nfrom ..other.near import x", r"near.* would both be exported as near\.py"),
        ("try:\n    import hf_reformer.ops\nexcept ImportError:\n    pass", "would need the package"),
        ("from hf_reformer.ops.lsh import x", "would need the package"),
    ],
)
def test_imports_that_cannot_be_flat_are_refused(entry, message, package):
    package(room__entry="")
    with pytest.raises(ValueError, match=message):
        package(room__entry=entry, room__near="x = 1", other__near="x = 2", other____init__="")
