"""Run notebooks and save their outputs, except for anything specific to this machine or time.

python dev/run_notebooks.py                                    # all of them
python dev/run_notebooks.py notebooks/01_quickstart.ipynb      # some

These are dropped: progress bars and warnings (stderr, widgets), run times, the Python version, and image colors beyond
256. Cells tagged `skip-execution` are left unchanged. tests/test_notebooks.py checks what is kept.
"""

import argparse
import base64
import os
import re
import resource
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
PROGRESS = re.compile(r"<div>\s*<progress.*?</div>", re.DOTALL)  # shown by the Trainer above its table


def kept(outputs: list[nbformat.NotebookNode]) -> Iterator[nbformat.NotebookNode]:
    """Yield the outputs for readers: no warnings, no progress bars, small images."""
    for output in outputs:
        data = output.get("data", {})
        if "text/html" in data:
            data["text/html"] = PROGRESS.sub("", data["text/html"]).strip()
        if "image/png" in data:
            data["image/png"] = smaller(data["image/png"])
        is_bar = data.get("text/html") == "" or any("widget" in kind for kind in data)
        if output.get("name") != "stderr" and not is_bar:
            yield output


def smaller(picture: str) -> str:
    """Reduce a base64 PNG to at most 256 colors."""
    buffer = BytesIO()
    image = Image.open(BytesIO(base64.b64decode(picture))).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def run(file: Path) -> None:
    """Run a notebook in its folder, offline, on one thread, and save it with its outputs."""
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=1800, record_timing=False, coalesce_streams=True).execute(cwd=file.parent)
    notebook.metadata = nbformat.from_dict(METADATA)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = list(kept(cell.outputs))
    nbformat.write(notebook, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(NOTEBOOKS.glob("*.ipynb")))
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    spent = 0.0
    for file in parser.parse_args().notebooks:
        run(file)
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        now = used.ru_utime + used.ru_stime
        print(f"{file.name}: {now - spent:.0f} s of processor time, {file.stat().st_size / 1000:.0f} kB", flush=True)
        spent = now


if __name__ == "__main__":
    main()
