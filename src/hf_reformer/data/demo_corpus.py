"""A corpus for demonstrations: source files of the installed packages, without a download."""

import hashlib
import importlib
import importlib.util
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .tables import require

if TYPE_CHECKING:
    from datasets import DatasetDict

# Packages that `hf_reformer[train]` installs, directly or not.
CORPUS_PACKAGES = (
    "torch", "transformers", "sympy", "pandas", "scipy", "sklearn", "networkx", "numpy", "matplotlib", "fontTools",
    "huggingface_hub", "datasets",
)  # fmt: skip
# A line names a package when it contains one of these, in upper or lower case, or one of the usual aliases.
_NAMES = (
    "torch", "transformers", "sympy", "pandas", "scipy", "sklearn", "scikit", "networkx", "numpy", "matplotlib",
    "fonttools", "font tools", "huggingface", "hugging face", "hf_", "datasets",
)  # fmt: skip
_ALIAS = re.compile(r"\b(?:np|pd|nx|plt|mpl)\b|\b(?:nn|F|tm|sp)\.")
_LICENCE = re.compile(r"copyright|licen[sc]e|spdx|all rights reserved|authors?:|@author", re.IGNORECASE)
_IMPORT = re.compile(r"\s*(>>>|\.\.\.)?\s*(from\s+[\w.]+\s+import\b|import\s)")
_FOREIGN_FOLDER = re.compile(r"vendor|extern|third_party", re.IGNORECASE)


def package_folder(name: str) -> Path | None:
    """Return the folder of the installed package `name`, without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def corpus_file(path: str) -> Path:
    """Return the file on this machine for a `path` of `installed_packages_corpus`."""
    folder = package_folder(path.split("/")[0])
    if folder is None:
        raise FileNotFoundError(f"`{path}` belongs to a package that is not installed here.")
    return folder.parent / path


def names_a_package(line: str) -> bool:
    """Whether a line mentions any package of `CORPUS_PACKAGES`, by name or by its usual alias."""
    lowered = line.lower()
    return any(name in lowered for name in _NAMES) or _ALIAS.search(line) is not None


def clean_source(text: str, max_bytes: int | None = None) -> str:
    """Remove from a Python file what names its package, and cut it after `max_bytes`.

    Removed are: the comments before the first line of code (license headers); every line about licenses or authors;
    every import statement, also in doctests and over several lines; and every line that names *any* package of
    `CORPUS_PACKAGES` or its usual alias (`np.`, `pd.`, `plt.` …). The rule is the same for all files, so what is
    missing does not identify the package either. Runs of blank lines shrink to one.
    """
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    cleaned: list[str] = []
    bytes_left = float("inf") if max_bytes is None else max_bytes
    for line in map(str.rstrip, _without_imports(lines[first:])):
        if names_a_package(line) or _LICENCE.search(line) or not (line or (cleaned and cleaned[-1])):
            continue
        bytes_left -= len(line.encode()) + 1
        if bytes_left < 0:
            break
        cleaned.append(line)
    return "\n".join(cleaned) + "\n"


def _without_imports(lines: Iterable[str]) -> Iterator[str]:
    """Skip import statements up to their closing parenthesis or their last continuation line."""
    open_parentheses, continued = 0, False
    for line in lines:
        if open_parentheses > 0 or continued or _IMPORT.match(line):
            code = line.split("#")[0].rstrip()
            open_parentheses = max(0, open_parentheses + code.count("(") - code.count(")"))
            continued = code.endswith("\\")
        else:
            yield line


class _NearDuplicates:
    """Remembers documents by their lines and recognizes one that shares half of them with an earlier one."""

    def __init__(self) -> None:
        self.documents_with: defaultdict[str, list[int]] = defaultdict(list)
        self.sizes: list[int] = []

    def add(self, text: str) -> bool:
        """Remember `text` and return True, or return False when it is a near-duplicate."""
        lines = {line for line in map(str.strip, text.splitlines()) if len(line) >= 16}
        shared = Counter(document for line in lines for document in self.documents_with.get(line, ()))
        if any(n >= min(len(lines), self.sizes[document]) / 2 for document, n in shared.items()):
            return False
        for line in lines:
            self.documents_with[line].append(len(self.sizes))
        self.sizes.append(len(lines))
        return True


def _documents_by_directory(
    name: str, limit: int, min_bytes: int, max_bytes: int, files_per_directory: int, seed: int, seen: _NearDuplicates
) -> list[list[dict[str, str]]]:
    """Read up to `limit` cleaned documents of one package, grouped by directory; none if it is not installed."""
    root = package_folder(name)
    if root is None:
        return []

    def rank(path: Path) -> bytes:
        """Sort key that shuffles; depends only on the seed and relative path, so it is the same on every machine."""
        return hashlib.sha256(f"{seed}:{path.relative_to(root).as_posix()}".encode()).digest()

    directories: defaultdict[Path, list[Path]] = defaultdict(list)
    for file in root.rglob("*.py"):
        if not _FOREIGN_FOLDER.search(file.relative_to(root).as_posix()) and file.stat().st_size >= min_bytes:
            directories[file.parent].append(file)
    groups: list[list[dict[str, str]]] = []
    for directory in sorted(directories, key=rank):
        group: list[dict[str, str]] = []
        for file in sorted(directories[directory], key=rank):
            text = clean_source(file.read_text(encoding="utf-8", errors="replace"), max_bytes)
            if len(text.encode()) >= min_bytes and seen.add(text):
                group.append({"text": text, "label": name, "path": file.relative_to(root.parent).as_posix()})
            if len(group) == min(files_per_directory, limit):
                break
        groups += [group] if group else []
        limit -= len(group)
        if limit == 0:
            break
    return groups


def installed_packages_corpus(
    packages: Sequence[str] | None = None,
    num_packages: int = 8,
    files_per_package: int = 200,
    validation_fraction: float = 0.2,
    min_bytes: int = 2048,
    max_bytes: int = 16384,
    files_per_directory: int = 12,
    seed: int = 0,
) -> "DatasetDict":
    """Make a corpus of long documents for classification without a download: source files, labeled by package.

    Of `packages` (default: `CORPUS_PACKAGES`), at most `num_packages` with the most usable files are taken, with an
    equal number of documents each. Documents are cleaned by `clean_source`, cut at `max_bytes`, and dropped when they
    are shorter than `min_bytes` or share half of their lines with another document. A directory is used either for
    training or for validation. The result depends only on the arguments and the installed versions.

    Returns:
        A `DatasetDict` with `train` and `validation`, and columns `text`, `label` (a `ClassLabel`) and `path`.
    """
    datasets = require("datasets")
    seen = _NearDuplicates()
    documents = {
        name: _documents_by_directory(name, files_per_package, min_bytes, max_bytes, files_per_directory, seed, seen)
        for name in packages or CORPUS_PACKAGES
    }
    sizes = {name: sum(map(len, groups)) for name, groups in documents.items() if len(groups) > 1}
    names = sorted(sizes, key=lambda name: -sizes[name])[:num_packages]
    if len(names) < 2:
        raise ValueError(
            f"Only {len(names)} of the packages {list(packages or CORPUS_PACKAGES)} are installed with usable source "
            "files; a classification corpus needs at least two. Name others with `packages=`."
        )
    validation_size = max(1, round(validation_fraction * min(sizes[name] for name in names)))
    parts: dict[str, tuple[list, list]] = {name: ([], []) for name in names}
    for name, (train, validation) in parts.items():
        for group in documents[name]:
            (validation if len(validation) < validation_size else train).extend(group)
    train_size = min(len(train) for train, _ in parts.values())
    rows = {
        "train": [row for train, _ in parts.values() for row in train[:train_size]],
        "validation": [row for _, validation in parts.values() for row in validation[:validation_size]],
    }
    text = datasets.Value("string")
    features = datasets.Features(text=text, label=datasets.ClassLabel(names=names), path=text)
    return datasets.DatasetDict({split: datasets.Dataset.from_list(part, features) for split, part in rows.items()})
