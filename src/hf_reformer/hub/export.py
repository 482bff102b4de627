"""Share a model: as a folder, or a repository of the Hub, that works where this package is not installed, too.

Such a folder holds the weights, the code of the model beside them, and a config that says which Auto class finds what
in that code. A plain `save_pretrained` and the Trainer write no code.
"""

import copy
import fnmatch
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, create_branch, create_repo, snapshot_download, upload_folder
from huggingface_hub.utils import validate_repo_id
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from ..configuration_reformer import ReformerConfig
from ..ops.dispatch import BACKENDS
from .flatten import flatten, short_name
from .model_card import model_card
from .model_folder import check_sizes, readable, saved_config
from .registration import AUTO_CLASSES

MODEL_CLASSES = {cls.__name__: cls for cls in AUTO_CLASSES.values()}
# What another model may have left where a new one goes, and the new one need not write again.
MODEL_FILE_PATTERNS = [
    "model*.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
]
READ_FROM_HUB = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]

Source = PreTrainedModel | str | PathLike


def export(
    model: Source,
    folder: str | PathLike,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    state: TrainerState | None = None,
    name: str | None = None,
    overwrite: bool = False,
    **card: Any,
) -> Path:
    """Write a folder that `from_pretrained(folder, trust_remote_code=True)` reads without this package.

    Every Auto class that knows our models can read it, not only that of the head it has. Weights keep their dtype. A
    backend that is part of the package is not insisted on: the folder's config says "auto" in its place.

    Args:
        model: a model of ours; or a folder or repository of the Hub that holds one, such as a checkpoint of the
            Trainer. Its tokenizer and `trainer_state.json` are then taken along.
        folder: where to; it must be empty, or not be there.
        tokenizer: to be saved along.
        state: `trainer.state`, for the scores on the model card.
        name: by which people will load it, for the model card. Default: the folder's own.
        overwrite: write into a folder that is not empty. The model that may be in there is removed, other files stay.
        card: what else the model card tells, see `model_card`: `language`, `license`, `datasets`, `base_model`,
            `tags`, `dataset_name`, `notes`.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder is not empty, or no folder.
        ValueError: what cannot be exported, such as adapters that are not merged or weights without values; the
            message says what to do first. Nothing is written then.
    """
    folder = Path(folder).resolve()
    _check_folder(folder, overwrite, model)
    given, tokenizer, state = _given(model, tokenizer, state)
    check_model(given)
    readme = model_card(given, name or folder.name, tokenizer, state, **card)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as made:
        _write(given, tokenizer, Path(made))
        readme.save(Path(made, "README.md"))
        _move(Path(made), folder)
    return folder


def push_to_hub(
    model: Source,
    repo_id: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    state: TrainerState | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a model",
    **card: Any,
) -> CommitInfo:
    """Upload what `export` writes to a repository of the Hub, which is made if there is none.

    Files of the model that was there before are removed, as far as they are not replaced; its model card is replaced.

    Args:
        model, tokenizer, state, card: as `export` takes them.
        repo_id: "user/name", or "name" for your own.
        private: of a new repository; by default as its owner's settings say.
        token: by default that of `hf auth login`.
        revision: branch to upload to; made if there is none.
        commit_message: its first line.

    Raises:
        ValueError: as `export`, before anything is sent.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
    """
    validate_repo_id(repo_id)
    given, tokenizer, state = _given(model, tokenizer, state)
    check_model(given)
    model_card(given, repo_id, tokenizer, state, **card)  # raises before a repository is made
    repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    if revision is not None:
        create_branch(repo_id, branch=revision, token=token, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        return upload_folder(
            repo_id=repo_id,
            folder_path=export(given, made, tokenizer, state=state, name=repo_id, **card),
            commit_message=commit_message,
            token=token,
            revision=revision,
            delete_patterns=MODEL_FILE_PATTERNS,
        )


def read(source: str | PathLike) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None, TrainerState | None]:
    """Model, tokenizer and Trainer's state of a folder or a repository of the Hub; None for what it does not hold.

    Raises:
        ValueError: it holds no model of ours, or not all of its weights.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(source), allow_patterns=READ_FROM_HUB))
        except (OSError, ValueError) as error:
            raise ValueError(f"{source} is neither a folder nor a model that could be read from the Hub.") from error
    model_class: Any = _class_of(folder)
    with readable(source):
        model, report = model_class.from_pretrained(
            folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
        check_sizes(report)
    for what, verb in (("missing_keys", "lacks"), ("unexpected_keys", "holds more than")):
        if report[what]:
            raise ValueError(f"{source} {verb} the weights of {model_class.__name__}: {min(report[what])}.")
    tokenizer = AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer_config.json").exists() else None
    record = folder / "trainer_state.json"
    return model, tokenizer, TrainerState.load_from_json(str(record)) if record.exists() else None


def check_model(model: Any) -> None:
    """Raise ValueError for a model that an exported folder could not hold, or not load again."""
    if hasattr(model, "peft_config"):
        raise ValueError(
            "The model wears adapters, which are no part of its class. Merge them first, "
            "`model = model.merge_and_unload()`; or share the adapter alone: `model.save_pretrained(folder)`."
        )
    tensors = model.state_dict() if isinstance(model, torch.nn.Module) else {}
    if sharded := [name for name, x in tensors.items() if isinstance(x, DTensor)]:
        raise ValueError(
            f"`{sharded[0]}` is distributed over processes. Save the whole model with the Trainer, and export that "
            "folder from one process."
        )
    if type(model) not in MODEL_CLASSES.values():
        raise ValueError(
            f"{type(model).__name__} cannot be exported, only {', '.join(MODEL_CLASSES)} can, and no subclasses. "
            "Take the model out of what wraps it: `model.module` of DistributedDataParallel, `model._orig_mod` of "
            "torch.compile."
        )
    if model.base_model.sequence_group is not None:
        raise ValueError(
            "Processes share this model's sequences, and all of them would write. Call "
            "`model.enable_sequence_parallel(None)`, and export from one process."
        )
    if empty := [name for name, x in tensors.items() if x.is_meta]:
        raise ValueError(
            f"`{empty[0]}` has no values (it is on the meta device). Load the model whole, without `device_map`."
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        _check_weights(model, tensors)
    elif not quantizer.is_serializable():
        raise ValueError(
            "Weights quantised like this cannot be saved. Export the model as it was before; quantise when loading."
        )


def _check_weights(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """What is saved must be what the class makes of the config: else the folder would not load."""
    if quantised := [name for name, x in tensors.items() if type(x.data) is not torch.Tensor]:
        raise ValueError(
            f"`{quantised[0]}` is a {type(tensors[quantised[0]].data).__name__}, quantised in place, of which the "
            "config knows nothing. Export the model as it was before; or quantise it while loading, by "
            "`from_pretrained(..., quantization_config=...)`."
        )
    with torch.device("meta"):
        expected = type(model)(copy.deepcopy(model.config)).state_dict()
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    wanted = {name: tuple(x.shape) for name, x in expected.items()}
    if found != wanted:
        name = min(name for name in found | wanted if found.get(name) != wanted.get(name))
        raise ValueError(
            f"The model is not what {type(model).__name__} makes of its config: `{name}` has the shape "
            f"{found.get(name)}, by the config {wanted.get(name)}. Set the config to what the model is, undo what was "
            "put in (adapters), or gather what other processes hold."
        )


def _check_folder(folder: Path, overwrite: bool, source: Any) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file. Name a folder.")
    if isinstance(source, (str, PathLike)) and Path(source).resolve() == folder:
        raise ValueError(f"{folder} cannot be exported into itself. Name another folder.")
    if not overwrite and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty. Name another folder, or give `overwrite=True` (--overwrite).")


def _given(model: Any, tokenizer: Any, state: Any) -> tuple[Any, Any, Any]:
    """The three, from the folder or repository if one was given; what was given besides stands."""
    if not isinstance(model, (str, PathLike)):
        return model, tokenizer, state
    model, own_tokenizer, own_state = read(model)
    return model, own_tokenizer if tokenizer is None else tokenizer, own_state if state is None else state


def _class_of(folder: Path) -> type[PreTrainedModel]:
    """The model class by the folder's config."""
    config = saved_config(folder)
    kind = config.get("model_type")
    if kind != ReformerConfig.model_type:
        advice = " `hf-reformer convert` makes one of it." if kind == "reformer" else ""
        raise ValueError(f"{folder} holds a model of type {kind!r}, not {ReformerConfig.model_type!r}.{advice}")
    names = config.get("architectures") or ["none"]
    name = str(names[0] if isinstance(names, list) else names)
    if name not in MODEL_CLASSES:
        raise ValueError(
            f"`architectures` in {folder}/config.json says {name}. It must be a list of one of "
            f"{', '.join(MODEL_CLASSES)}."
        )
    return MODEL_CLASSES[name]


def code_files() -> dict[str, str]:
    """Names and texts of the files that are exported: those of our classes and of all that they import."""
    return flatten({_module_of(cls) for cls in (ReformerConfig, *MODEL_CLASSES.values())})


def _module_of(cls: type) -> str:
    """Dotted, within the package."""
    return cls.__module__.partition(".")[2]


def auto_map() -> dict[str, str]:
    """Where every Auto class finds its class in the code beside the weights."""
    classes = {"AutoConfig": ReformerConfig, **{auto.__name__: cls for auto, cls in AUTO_CLASSES.items()}}
    return {auto: f"{short_name(cls.__module__)}.{cls.__name__}" for auto, cls in classes.items()}


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    model.save_pretrained(folder)
    config = copy.deepcopy(model.config)
    config.auto_map = auto_map()
    if config.attention_backend not in BACKENDS:
        config.attention_backend = "auto"
    config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name, text in code_files().items():
        (folder / name).write_text(text, encoding="utf-8")


def _move(made: Path, folder: Path) -> None:
    """Put files in their place. The folder's earlier model goes only now that the new one is complete."""
    folder.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.is_file() and any(fnmatch.fnmatch(file.name, pattern) for pattern in MODEL_FILE_PATTERNS):
            file.unlink()
    for file in made.rglob("*"):
        if file.is_file():
            place = folder / file.relative_to(made)
            place.parent.mkdir(exist_ok=True)
            file.replace(place)


__all__ = ["export", "push_to_hub"]
