"""Reading a checkpoint directory: its config, and errors in words where it is damaged or does not fit."""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging

# What reading weights raises where they are damaged, or not those of the config.
LOAD_ERRORS = (SafetensorError, pickle.UnpicklingError, EOFError, LookupError, RuntimeError, TypeError)


@contextmanager
def readable(source: Any) -> Iterator[None]:
    """Turn what reading a folder raises, where its config or weights are wrong, into a ValueError that says so."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error
    except LOAD_ERRORS as error:
        raise ValueError(f"The weights in {source} are not those of its config.json, or damaged: {error}") from error


def saved_config(folder: Path) -> dict[str, Any]:
    """What a model's folder says in its config.json.

    Raises:
        ValueError: there is none, or it holds no object.
    """
    file = folder / "config.json"
    if not file.exists() and (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds an adapter alone. Load it onto its model, merge, and save that: "
            "`PeftModel.from_pretrained(model, folder).merge_and_unload()`."
        )
    if not file.exists():
        raise ValueError(f"{folder} holds no model: there is no config.json.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{file} holds a {type(found).__name__}, where an object with the model's settings is needed."
        )
    return found


def check_sizes(report: dict[str, Any]) -> None:
    """Raise RuntimeError where weights were left out since their sizes are not the config's."""
    for key, saved, wanted in sorted(report["mismatched_keys"]):
        raise RuntimeError(f"{key} has the shape {tuple(saved)}, where the config asks for {tuple(wanted)}.")


@contextmanager
def quiet() -> Iterator[None]:
    """No report of loading: what matters of it becomes an error."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
