"""Flatten the modeling code into one directory, as the Hub's copier follows `from .name import x` only within one.

Every module that the exported classes depend on is written under its short name, with the module part of its relative
imports rewritten; the rest of the text is unchanged.
"""

import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# Matches lines, not syntax, like the copier: docstring text that looks like an import counts as one.
RELATIVE_IMPORT = re.compile(r"^(\s*from\s+)(\.+)([\w.]*)(?=\s+import\s)", flags=re.MULTILINE)
PACKAGE_IMPORT = re.compile(r"^\s*(?:from|import)\s+hf_reformer\b", flags=re.MULTILINE)


def flatten(entries: set[str]) -> dict[str, str]:
    """Return file names and texts of the flat directory.

    Args:
        entries: dotted names of modules within the package; everything that they import relatively is added.

    Raises:
        ValueError: two modules have the same short name, or a file imports a module from a subpackage, a name from a
            subpackage's `__init__`, or the package by its absolute name.
    """
    origins: dict[str, str] = {}
    files: dict[str, str] = {}
    waiting = sorted(entries)
    while waiting:
        module = waiting.pop()
        name = f"{short_name(module)}.py"
        if origins.setdefault(name, module) != module:
            raise ValueError(f"{module} and {origins[name]} would both be exported as {name}. Rename one of them.")
        if name not in files:
            files[name], imported = flat_imports(module, source_file(module).read_text(encoding="utf-8"))
            waiting += imported
    return files


def flat_imports(module: str, text: str) -> tuple[str, list[str]]:
    """Return a module's text with flat imports, and the dotted names (in the package) of the modules it imports."""
    if found := PACKAGE_IMPORT.search(text):
        raise ValueError(f"{module}: `{found[0].strip()}` would need the package. Use a relative import.")
    room, imported = module.split(".")[:-1], []

    def rewrite(found: re.Match) -> str:
        start, dots, name = found.groups()
        target = ".".join([*room[: len(room) - len(dots) + 1], *filter(None, [name])])
        if len(dots) > len(room) + 1 or not source_file(target).is_file():
            raise ValueError(f"{module}: `{found[0].strip()}` names no module. Import names from a module.")
        imported.append(target)
        return f"{start}.{short_name(target)}"

    return RELATIVE_IMPORT.sub(rewrite, text), imported


def source_file(module: str) -> Path:
    """Return the file of a module, given its dotted name within the package."""
    return PACKAGE / f"{module.replace('.', '/')}.py"


def short_name(module: str) -> str:
    """Return the last part of a dotted name: `ops.lsh` → `lsh`."""
    return module.rpartition(".")[2]
