"""Reading a checkpoint directory: its config, and clear errors if it is damaged or inconsistent."""

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoTokenizer
from transformers.utils import logging

# Raised while reading weights that are damaged or do not match the config.
LOAD_ERRORS = (SafetensorError, pickle.UnpicklingError, EOFError, LookupError, RuntimeError, TypeError)


@contextmanager
def readable(source: Any) -> Iterator[None]:
    """Turn errors about a wrong config or wrong weights into a ValueError that says so."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(str(error)) from error
    except LOAD_ERRORS as error:
        raise ValueError(f"The weights in {source} are not those of its config.json, or damaged: {error}") from error


def saved_config(folder: Path) -> dict[str, Any]:
    """The contents of a checkpoint directory's config.json; ValueError if it is missing or holds no JSON object."""
    file = folder / "config.json"
    if not file.exists() and (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds only an adapter. Load it onto its model, merge, and save the result: "
            "`PeftModel.from_pretrained(model, folder).merge_and_unload()`."
        )
    if not file.exists():
        raise ValueError(f"{folder} holds no model: there is no config.json.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds a {type(found).__name__}, but must hold an object with the model's settings.")
    return found


def load_model(model_class: Any, source: Any, dtype: str = "auto", **options: Any) -> tuple[Any, dict[str, Any]]:
    """A checkpoint's model and the loading report; RuntimeError if weights have other sizes than the config says."""
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = model_class.from_pretrained(source, dtype=dtype, **options)
    for key, saved, expected in sorted(report["mismatched_keys"]):
        raise RuntimeError(f"{key} has the shape {tuple(saved)}, where the config asks for {tuple(expected)}.")
    return model, report


def load_tokenizer(source: Any, **options: Any) -> Any:
    """A checkpoint's tokenizer; ValueError if its files are damaged."""
    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:  # whatever was raised on the way
        raise ValueError(
            f"The tokenizer in {source} cannot be read: {type(error).__name__}: {error}. Its files are damaged: save "
            "it again by `tokenizer.save_pretrained`."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """No loading report of the library; what matters in it is raised as an error."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
