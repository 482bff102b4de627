"""Share a model as a directory or Hub repository that works without this package.

The directory contains the weights, the modeling code, and a config whose `auto_map` tells each Auto class where to
find its model in that code. `save_pretrained` and the Trainer do not write code.
"""

import copy
import json
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, create_branch, create_repo, snapshot_download, upload_folder
from huggingface_hub.utils import validate_repo_id
from torch.distributed.tensor import DTensor
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerState,
)

from ..configuration_reformer import ReformerConfig
from ..ops.dispatch import BACKENDS
from .flatten import flatten, short_name
from .model_card import model_card
from .model_folder import (
    MODEL_FILES,
    TOKENIZER_FILES,
    load_model,
    load_tokenizer,
    readable,
    saved_config,
    written_whole,
)
from .registration import AUTO_CLASSES, MODEL_CLASSES

# Files of a previous model in the same place, which the new model might not overwrite.
PROCESSOR_FILE = "preprocessor_config.json"
MODEL_FILE_PATTERNS = [PROCESSOR_FILE, *MODEL_FILES, *TOKENIZER_FILES, "additional_chat_templates/*"]
READ_FROM_HUB = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]

Source = PreTrainedModel | str | PathLike


def export(
    model: Source,
    folder: str | PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    processor: Any = None,
    state: TrainerState | None = None,
    name: str | None = None,
    overwrite: bool = False,
    **card: Any,
) -> Path:
    """Write a directory that `from_pretrained(folder, trust_remote_code=True)` loads without this package.

    Every Auto class that supports our models can load it, not only that of its own head. Weights keep their dtype. If
    the config names a compiled backend, the exported config contains "auto" instead.

    Args:
        model: one of our models; or a checkpoint directory or Hub repository, whose tokenizer, processor and
            `trainer_state.json` are then used as defaults.
        folder: the directory to write. It must be empty or not exist, unless `overwrite` is set.
        tokenizer: saved with the model.
        processor: a feature extractor or image processor, also saved with the model.
        state: `trainer.state`, for the scores on the model card.
        name: the name to load the model by, for the model card. Default: the name of the directory.
        overwrite: replace the model in a non-empty directory in one step; other files are kept.
        card: further fields of the model card, see `model_card`: `language`, `license`, `datasets`, `base_model`,
            `tags`, `dataset_name`, `notes`.

    Returns:
        The directory.

    Raises:
        FileExistsError: `folder` is a file or not empty.
        ValueError: the model cannot be exported, for example because of unmerged adapters or weights without values;
            the message says what to do first. Nothing is written.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file. Name a directory.")
    if isinstance(model, (str, PathLike)) and Path(model).resolve() == folder:
        raise ValueError(f"{folder} cannot be exported into itself. Name another directory.")
    if not overwrite and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} is not empty. Name another folder, or replace its contents: --overwrite, in Python "
            "`overwrite=True`."
        )
    loaded, tokenizer, state, processor = _loaded(model, tokenizer, state, processor)
    readme = model_card(loaded, name or folder.name, tokenizer, state, **card)
    with written_whole(folder, MODEL_FILE_PATTERNS) as new:
        _write(loaded, tokenizer, processor, new)
        readme.save(new / "README.md")
    return folder


def push_to_hub(
    model: Source,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    processor: Any = None,
    state: TrainerState | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model",
    **card: Any,
) -> CommitInfo:
    """Upload what `export` writes to a Hub repository, which is created if necessary.

    Files of a previously uploaded model, including its model card, are deleted or replaced.

    Args:
        model, tokenizer, processor, state, card: as in `export`; its errors are raised before anything is uploaded.
        repo_id: "user/name", or "name" for your own account.
        private: visibility of a new repository. Default: the owner's setting.
        token: access token. Default: the one from `hf auth login`.
        revision: the branch to upload to, created if necessary.
        commit_message: first line of the commit message.

    Raises:
        huggingface_hub.errors.HfHubHTTPError: the Hub rejects the request.
    """
    validate_repo_id(repo_id)
    loaded, tokenizer, state, processor = _loaded(model, tokenizer, state, processor)
    model_card(loaded, repo_id, tokenizer, state, **card)  # raises before a repository is created
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None:
        create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        return upload_folder(
            repo_id=repo_id,
            folder_path=export(loaded, scratch, tokenizer, processor=processor, state=state, name=repo_id, **card),
            commit_message=commit_message,
            token=token,
            revision=revision,
            delete_patterns=MODEL_FILE_PATTERNS,
        )


def read(source: str | PathLike) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, TrainerState | None, Any]:
    """Read model, tokenizer, Trainer state and processor of a checkpoint directory or Hub repository.

    All but the model are None if missing.

    Raises:
        ValueError: any of them cannot be read; the message says why.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=READ_FROM_HUB))
        except (OSError, ValueError) as error:
            raise ValueError(f"{source} is neither a directory nor a model that can be read from the Hub.") from error
    config = saved_config(folder)
    kind = config.get("model_type")
    if kind != ReformerConfig.model_type:
        advice = " `hf-reformer convert` converts it." if kind == "reformer" else ""
        raise ValueError(f"{folder} holds a model of type {kind!r}, not {ReformerConfig.model_type!r}.{advice}")
    names = config.get("architectures") or ["none"]
    name = str(names[0] if isinstance(names, list) else names)
    if name not in MODEL_CLASSES:
        raise ValueError(f"`architectures` in {folder}/config.json says {name}, none of {', '.join(MODEL_CLASSES)}.")
    model_class: Any = MODEL_CLASSES[name]
    with readable(source):
        model, report = load_model(model_class, folder)
    for kind in ("missing", "unexpected"):
        if keys := report[f"{kind}_keys"]:
            raise ValueError(f"The weights in {source} do not fit {name}: {min(keys)} is {kind}.")
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer_config.json").exists() else None
    return model, tokenizer, saved_state(folder), saved_processor(folder)


def saved_processor(folder: Path) -> Any:
    """Read a checkpoint's feature extractor or image processor, None if missing. Raises ValueError if damaged."""
    file = folder / PROCESSOR_FILE
    if not file.exists():
        return None
    try:
        sees = "image_processor_type" in json.loads(file.read_text(encoding="utf-8"))
        return (AutoImageProcessor if sees else AutoFeatureExtractor).from_pretrained(folder)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}. Repair or remove it.") from error


def saved_state(folder: Path) -> TrainerState | None:
    """Read the Trainer's state from a checkpoint, None if missing. Raises ValueError if invalid."""
    file = folder / "trainer_state.json"
    if not file.exists():
        return None
    try:
        state = TrainerState.load_from_json(str(file))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is no record of the Trainer: {error}. Repair or remove it.") from error
    entries = state.log_history if isinstance(state.log_history, list) else [None]
    numbers = [state.global_step, state.epoch or 0, state.train_batch_size or 0, state.best_global_step or 0]
    listed = all(isinstance(entry, dict) and _is_count(entry.get("step")) for entry in entries)
    if not listed or not all(map(_is_count, numbers)):
        raise ValueError(f"{file} is no record of the Trainer: its steps, or those of `log_history`, are no numbers.")
    return state


def _is_count(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 10**15


def check_model(model: Any) -> None:
    """Raise ValueError if the model could not be saved in an exported directory, or loaded from it."""
    if hasattr(model, "peft_config"):
        raise ValueError(
            "The model has adapters attached. Merge them, `model = model.merge_and_unload()`, or share only the "
            "adapter: `model.save_pretrained(folder)`."
        )
    tensors = model.state_dict() if isinstance(model, torch.nn.Module) else {}
    if sharded := [name for name, x in tensors.items() if isinstance(x, DTensor)]:
        raise ValueError(
            f"`{sharded[0]}` is distributed over processes. Save the full model with the Trainer, then export that "
            "checkpoint from one process."
        )
    if type(model) not in MODEL_CLASSES.values():
        raise ValueError(
            f"{type(model).__name__} cannot be exported, only {', '.join(MODEL_CLASSES)}, and no subclasses. Unwrap "
            "the model: `model.module` of DistributedDataParallel, `model._orig_mod` of torch.compile."
        )
    if model.base_model.sequence_group is not None:
        raise ValueError(
            "Sequence parallelism is enabled: every process would write. Call `model.enable_sequence_parallel(None)`, "
            "and export from one process."
        )
    if empty := [name for name, x in tensors.items() if x.is_meta]:
        raise ValueError(f"`{empty[0]}` has no values (meta device). Load the whole model, without `device_map`.")
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        if not quantizer.is_serializable():
            raise ValueError("Such quantized weights cannot be saved. Export the original, quantize it when loading.")
        return
    if quantized := [name for name, x in tensors.items() if type(x.data) is not torch.Tensor]:
        raise ValueError(
            f"`{quantized[0]}` is a {type(tensors[quantized[0]].data).__name__}, quantized in place without a record "
            "in the config. Export the original, or quantize with `from_pretrained(..., quantization_config=...)`."
        )
    with torch.device("meta"):  # the directory must hold what the class creates from the config
        from_config = type(model)(copy.deepcopy(model.config)).state_dict()
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    expected = {name: tuple(x.shape) for name, x in from_config.items()}
    if shapes != expected:
        name = min(name for name in shapes | expected if shapes.get(name) != expected.get(name))
        raise ValueError(
            f"The model does not match its config: `{name}` has the shape {shapes.get(name)}, but should have "
            f"{expected.get(name)}. Adapt the config, remove modules that were added (adapters), or gather weights "
            "that other processes hold."
        )


def _loaded(model: Any, tokenizer: Any, state: Any, processor: Any) -> tuple[Any, Any, Any, Any]:
    """Return the same four, read from a directory or repository if `model` names one; arguments take precedence."""
    if isinstance(model, (str, PathLike)):
        model, *saved = read(model)
        given = (tokenizer, state, processor)
        tokenizer, state, processor = (old if new is None else new for new, old in zip(given, saved, strict=True))
    check_model(model)
    return model, tokenizer, state, processor


def code_files() -> dict[str, str]:
    """Return file names and texts of the exported code: the modules of our classes, and everything they import."""
    classes = (ReformerConfig, *MODEL_CLASSES.values())
    return flatten({cls.__module__.partition(".")[2] for cls in classes})  # dotted names within the package


def auto_map() -> dict[str, str]:
    """Return the module and name of each Auto class's model in the exported code."""
    classes = {"AutoConfig": ReformerConfig, **{auto.__name__: cls for auto, cls in AUTO_CLASSES.items()}}
    return {auto: f"{short_name(cls.__module__)}.{cls.__name__}" for auto, cls in classes.items()}


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, processor: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    config = copy.deepcopy(model.config)
    config.auto_map = auto_map()
    if config.attention_backend not in BACKENDS:
        config.attention_backend = "auto"
    config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    for name, text in code_files().items():
        (folder / name).write_text(text, encoding="utf-8")
