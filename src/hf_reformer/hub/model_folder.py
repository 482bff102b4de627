"""Read checkpoint directories, with clear errors if they are damaged, and replace them atomically."""

import ctypes
import fnmatch
import json
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from ..models.pretrained import named_files

# Files of a model and its tokenizer, besides code, config.json and README.md; exact, as other names may start alike.
MODEL_FILES = ["model.safetensors", f"model-{'[0-9]' * 5}-of-{'[0-9]' * 5}.safetensors", "generation_config.json"]
MODEL_FILES += ["model.safetensors.index.json"]
TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "vocab.json"]
TOKENIZER_FILES += ["vocab.txt", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
TOKENIZER_FILES += ["chat_template.jinja", "chat_template.json", "additional_chat_templates"]
# Raised on reading weights that are damaged or do not match the config.
LOAD_ERRORS = (SafetensorError, pickle.UnpicklingError, EOFError, LookupError, RuntimeError, TypeError)


@contextmanager
def readable(source: Any) -> Iterator[None]:
    """Convert errors about an invalid config or weights into a ValueError with a clear message."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error
    except LOAD_ERRORS as error:
        raise ValueError(f"The weights in {source} are not those of its config.json, or damaged: {error}") from error


def check_own_files(folder: Path) -> None:
    """Raise ValueError if a directory links to a file elsewhere, or its config or index names one.

    In the Hub's cache, links to the repository's own blobs are allowed. Pipes and devices are also rejected.
    """
    own = [folder.resolve()]
    if own[0].parent.name == "snapshots":
        own.append(own[0].parents[1] / "blobs")
    templates = folder / "additional_chat_templates"
    files = [path for path in folder.iterdir() if not path.is_dir() or path == templates]
    for path in (*files, *(templates.iterdir() if templates.is_dir() else ()), *named_files(folder)):
        try:
            target = path.resolve()
        except RuntimeError as error:
            raise ValueError(f"{path} is a link to itself.") from error
        if not any(target.is_relative_to(place) for place in own):
            raise ValueError(
                f"{path} points to {target}, outside the directory, so it is not read. Copy that file into the "
                "directory if it belongs there."
            )
        if target.exists() and not target.is_file() and target != templates.resolve():
            raise ValueError(f"{path} is no file, but a pipe, a device or a directory. Remove it.")


def saved_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a checkpoint directory.

    Raises:
        ValueError: it is missing or not a JSON object, or the directory contains an adapter or files from elsewhere.
    """
    file = folder / "config.json"
    if folder.is_dir():
        check_own_files(folder)
    if (folder / "adapter_config.json").exists():
        what = "an adapter beside a model" if file.exists() else "only an adapter"
        raise ValueError(
            f"{folder} holds {what}. Load it onto its model, merge, and save the result: "
            "`PeftModel.from_pretrained(model, folder).merge_and_unload()`."
        )
    if not file.exists():
        raise ValueError(f"{folder} holds no model: there is no config.json.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, but must hold an object with the model's settings.")
    return found


def load_model(model_class: Any, source: Any, dtype: str = "auto", **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a model; also returns the loading report. Raises RuntimeError if shapes do not match the config."""
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = model_class.from_pretrained(source, dtype=dtype, **options)
    for key, saved, expected in sorted(report["mismatched_keys"]):
        raise RuntimeError(f"{key} has the shape {tuple(saved)}, where the config asks for {tuple(expected)}.")
    return model, report


def other_task(model: PreTrainedModel) -> str | None:
    """Return the class that saved a model if it is for another task: the weights may fit, but outputs are random."""

    def task(name: str) -> str | None:
        found = re.search(r"For[A-Z]\w*$", name)
        return found[0] if found else None

    loaded = type(model).__name__
    wanted = "ForCausalLM" if "LMHead" in loaded else task(loaded)
    saved = model.config.architectures or []
    return next((name for name in saved if task(name) not in (None, wanted)), None)


def load_tokenizer(source: Any, **options: Any) -> Any:
    """Load a checkpoint's tokenizer. Raises ValueError if its files are damaged."""
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:  # damaged files can raise any exception
        raise ValueError(
            f"The tokenizer in {source} cannot be read: {type(error).__name__}: {error}. Its files are damaged: save "
            "it again with `tokenizer.save_pretrained`."
        ) from error


@contextmanager
def written_whole(folder: Path, replaced: list[str] | None = None) -> Iterator[Path]:
    """Yield a directory to write into, which replaces `folder` as a whole if the block succeeds.

    If `folder` exists, its files are kept, except those that are written again or match a pattern in `replaced`: they
    are linked into the new directory, which is then exchanged with the old one. An empty current directory or mount
    point is filled file by file instead.

    Raises:
        OSError: the directory cannot be replaced: it is not empty, and the current one or a mount point.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    others = list(folder.iterdir()) if folder.exists() else []
    current = folder.exists() and Path.cwd().is_relative_to(folder)
    if others and current:
        raise OSError(f"{folder} is replaced as a whole, and cannot be while it is the current directory. Leave it.")
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        yield new
        for path in [path for path in new.rglob("*") if path.is_file()]:
            with open(path, "rb") as file:
                os.fsync(file.fileno())  # contents reach the disk before the name
        if folder.exists():
            shutil.copymode(folder, new)
        if not others and not current and not folder.is_mount():
            new.rename(folder)
        elif not others:
            for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):  # it makes this a model
                shutil.move(path, folder / path.name)
        else:
            for path in others:
                if not any(fnmatch.fnmatchcase(path.name, pattern) for pattern in replaced or []):
                    _link(path, new / path.name)
            _exchange(new, folder)


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or the files of a directory, to `target`, unless it exists.

    Copies if the file system does not support hard links. Raises OSError if only one of the two is a directory.
    """

    def link(source: Any, target: Any) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)

    if target.exists():
        if source.is_dir() != target.is_dir():
            raise OSError(f"{source} is in the way of a file of the model. Move it.")
    elif source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=link)
    else:
        link(source, target)


def _exchange(new: Path, folder: Path) -> None:
    """Swap two directories: atomically on Linux, else in two steps, undoing the first if the second fails."""
    libc = ctypes.CDLL(None, use_errno=True) if os.name == "posix" else None
    here, both_ways = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if hasattr(libc, "renameat2") and not libc.renameat2(here, os.fsencode(new), here, os.fsencode(folder), both_ways):
        return
    old = new.with_name("old")
    folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        old.rename(folder)
        raise


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress transformers' loading report; relevant problems are raised as errors."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
