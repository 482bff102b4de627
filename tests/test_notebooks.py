"""Notebooks are kept with what they print and draw, and with nothing that tells of the machine or the day."""

import json
import re
import tempfile
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
MOST_BYTES = 300_000
AGAIN = "Run `python dev/run_notebooks.py` on it."
FOLDER = Path(tempfile.gettempdir(), "model")
MACHINE_PATH = re.compile(r"(?<![\w/.:])/(?:tmp|var|home|root|usr|opt|mnt|Users|work|private)/[\w.-]+")


def problems(notebook):
    """What is wrong with the outputs of a notebook."""
    count = 0
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] != "code":
            continue
        skipped = "skip-execution" in cell["metadata"].get("tags", [])
        count += not skipped
        if cell["execution_count"] != (None if skipped else count):
            yield f"cell {number} was not run in its turn"
        if cell["metadata"].keys() - {"tags"}:
            yield f"cell {number} has the metadata {sorted(cell['metadata'])}"
        for output in cell["outputs"]:
            if output["output_type"] == "error" or output.get("name") == "stderr":
                yield f"cell {number} has an error or a warning"
            if found := MACHINE_PATH.search("".join(output.get("text", json.dumps(output.get("data", ""))))):
                yield f"cell {number} prints the path {found[0]}"
    if notebook["metadata"].get("language_info", {}).keys() - {"name"}:
        yield "the metadata hold the version of Python"


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_outputs_are_kept_small_and_of_no_machine(file):
    assert not list(problems(json.loads(file.read_text(encoding="utf-8")))), AGAIN
    assert file.stat().st_size < MOST_BYTES, f"{AGAIN} Or draw fewer or smaller pictures."


def code(count=1, outputs=(), **metadata):
    return {"cell_type": "code", "execution_count": count, "metadata": metadata, "outputs": list(outputs)}


def printed(text, name="stdout"):
    return {"output_type": "stream", "name": name, "text": [text]}


@pytest.mark.parametrize(
    "cell",
    [
        code(None),
        code(2),
        code(1, tags=["skip-execution"]),
        code(1, execution={"iopub.execute_input": "2026-01-01"}),
        code(1, [printed("slow", "stderr")]),
        code(1, [{"output_type": "error", "evalue": "1 / 0"}]),
        code(1, [printed(f"saved in {FOLDER}")]),
        code(1, [{"output_type": "execute_result", "data": {"text/plain": [f"Path('{FOLDER}')"]}}]),
    ],
)
def test_a_bad_cell_is_caught(cell):
    assert len(list(problems({"cells": [cell], "metadata": {}}))) == 1


@pytest.mark.parametrize(
    "cell",
    [
        code(1, [printed("and/or, https://a.org/tmp/x, sympy/core/tmp/y.py")]),
        code(None, tags=["skip-execution"]),
        {"cell_type": "markdown", "metadata": {}, "source": []},
    ],
)
def test_a_good_cell_passes(cell):
    assert not list(problems({"cells": [cell], "metadata": {}}))
