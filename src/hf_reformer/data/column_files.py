"""Column files, as of CoNLL: a word a line with its labels in columns, and an empty line between sentences."""

from pathlib import Path
from typing import TYPE_CHECKING

from .tables import open_text, require

if TYPE_CHECKING:
    from datasets import Dataset

COLUMN_FORMATS = (".conll", ".iob", ".iob2", ".bio", ".txt")
_MOST_COLUMNS = 100


def read_column_file(path: str | Path) -> "Dataset":
    """A row per sentence, with a list of words or labels per column; the columns are called "1", "2", …

    Columns are separated by tabs, or else by white space. Lines that begin with -DOCSTART- are left out, and so are
    lines that begin with # and have another number of columns, which are comments.

    Raises:
        ValueError: a line has another number of columns; the file is empty or no text.
    """
    sentences: list[list[list[str]]] = []  # columns, then words
    words: list[list[str]] = []
    columns = None
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            cells = line.rstrip("\n").split("\t") if "\t" in line else line.split()
            if not line.strip() or line.startswith("-DOCSTART-"):
                if words:
                    sentences.append(list(map(list, zip(*words, strict=True))))
                words = []
                continue
            if line.startswith("#") and len(cells) != columns and (columns is not None or len(cells) != 2):
                continue
            columns = len(cells) if columns is None else columns
            if len(cells) != columns or columns > _MOST_COLUMNS:
                said = f"the first one has {columns}" if columns <= _MOST_COLUMNS else "that is no list of words"
                raise ValueError(
                    f"`{path}`, line {number}: there are {len(cells):,} columns, but {said}. A line holds a word and "
                    "its labels, and an empty line ends a sentence."
                )
            words.append(cells)
    if words:
        sentences.append(list(map(list, zip(*words, strict=True))))
    if not sentences:
        raise ValueError(f"`{path}` holds no words. Leave it out.")
    names = range(1, len(sentences[0]) + 1)
    return require("datasets").Dataset.from_dict({str(i): [one[i - 1] for one in sentences] for i in names})
