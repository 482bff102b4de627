"""The modelling code as one flat directory, which is all that the Hub's copier follows.

The copier follows `from .name import x` between files that lie side by side. So every module that the exported classes
are made of is written under its own short name, with its relative imports rewritten; nothing else of the text changes.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parents[1]


class RelativeImport(NamedTuple):
    """A statement `from .module import names`, over lines `first` to `last`; `module` is dotted within the package."""

    first: int
    last: int
    module: str
    names: str


def relative_imports(module: str, text: str) -> list[RelativeImport]:
    """The relative imports of a module, given by its dotted name within the package.

    Raises:
        ValueError: a statement takes a module from a room, or names from a room's `__init__`, which has no place in a
            flat directory.
    """
    room, found = module.split(".")[:-1], []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        target = ".".join([*room[: len(room) - node.level + 1], *filter(None, [node.module])])
        if not source_file(target).is_file():
            raise ValueError(
                f"{module}, line {node.lineno}: `{target or '.'}` is no module. Import names from a module."
            )
        names = ", ".join(name.name + (f" as {name.asname}" if name.asname else "") for name in node.names)
        found.append(RelativeImport(node.lineno, node.end_lineno or node.lineno, target, names))
    return found


def source_file(module: str) -> Path:
    """The file of a module, given by its dotted name within the package."""
    return PACKAGE / f"{module.replace('.', '/')}.py"


def flatten(entries: set[str]) -> dict[str, str]:
    """File names and texts of the flat directory.

    Args:
        entries: modules to begin with, dotted within the package; all that they import relatively comes along.

    Raises:
        ValueError: two modules have one short name, or an import cannot be flattened.
    """
    files: dict[str, str] = {}
    origins: dict[str, str] = {}
    waiting = sorted(entries)
    while waiting:
        module = waiting.pop()
        name = f"{short_name(module)}.py"
        if origins.setdefault(name, module) != module:
            raise ValueError(f"{module} and {origins[name]} would both become {name}. Rename one of them.")
        if name in files:
            continue
        text = source_file(module).read_text(encoding="utf-8")
        imports, lines = relative_imports(module, text), text.splitlines(keepends=True)
        for first, last, target, names in sorted(imports, reverse=True):
            indent = re.match(r"\s*", lines[first - 1])[0]  # type: ignore[index]  # it always matches
            lines[first - 1 : last] = [f"{indent}from .{short_name(target)} import {names}\n"]
            waiting.append(target)
        files[name] = "".join(lines)
    return files


def short_name(module: str) -> str:
    """`ops.lsh` → `lsh`"""
    return module.rpartition(".")[2]
