"""Column files, as in CoNLL: one word per line with its labels in columns, and an empty line between sentences."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from .tables import open_text, require

if TYPE_CHECKING:
    from datasets import Dataset

COLUMN_FORMATS = (".conll", ".iob", ".iob2", ".bio", ".txt")
_MOST_COLUMNS = 100


def read_column_file(path: str | Path) -> "Dataset":
    """Read a row per sentence, with a list of words or labels per column; the columns are named "1", "2", …

    Columns are separated by tabs, or else by white space. Lines that begin with -DOCSTART- and comments are left out.
    A comment begins with # and has a different number of columns; or it precedes a sentence, begins with # and white
    space, and does not end with a label that occurs in other lines.

    Raises:
        ValueError: a line has a different number of columns, or the file is empty or not text.
    """
    with open_text(path) as file:
        lines = [line.rstrip("\n") for line in file]
    rows = [[cell.strip(" ") for cell in line.split("\t")] if "\t" in line else line.split() for line in lines]
    known = [cells for cells in rows if any(cells) and not cells[0].startswith(("#", "-DOCSTART-"))]
    known = known or [cells for cells in rows if any(cells) and not cells[0].startswith("-DOCSTART-")]
    columns, labels = len(known[0]) if known else 0, {cells[-1] for cells in known}
    sentences: list[list[list[str]]] = []  # columns, then words
    words: list[list[str]] = []
    for number, (line, cells) in enumerate(zip(lines, rows, strict=True), start=1):
        if not any(cells) or line.startswith("-DOCSTART-"):
            if words:
                sentences.append(list(map(list, zip(*words, strict=True))))
            words = []
            continue
        before_sentence = not words and re.match(r"#\s", line) and cells[-1] not in labels
        if line.startswith("#") and (len(cells) != columns or before_sentence):
            continue
        if len(cells) != columns or columns > _MOST_COLUMNS:
            said = f"the first one has {columns}" if columns <= _MOST_COLUMNS else "that is no list of words"
            raise ValueError(
                f"`{path}`, line {number}: there are {len(cells):,} columns, but {said}. A line holds a word and its "
                "labels, and an empty line ends a sentence."
            )
        words.append(cells)
    if words:
        sentences.append(list(map(list, zip(*words, strict=True))))
    if not sentences:
        raise ValueError(f"`{path}` holds no words. Leave it out.")
    names = range(1, len(sentences[0]) + 1)
    return require("datasets").Dataset.from_dict({str(i): [one[i - 1] for one in sentences] for i in names})
