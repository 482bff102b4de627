"""Convert checkpoints of other Reformers to ours, ours to transformers' own, and chunk mode to window mode."""

import shutil
import zipfile
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file

from ...configuration_reformer import ReformerConfig, from_builtin
from ...models.pretrained import BUILTIN_NAMES, LEGACY_LM_HEAD_BIAS, check_torch_file
from ..model_folder import LOAD_ERRORS, TOKENIZER_FILES, load_model, saved_config, written_whole
from ..registration import MODEL_CLASSES
from .reformer_pytorch import from_reformer_pytorch
from .trax import from_trax, read_pickle

FOLDERS = ("builtin", "hf_reformer")
KINDS = (*FOLDERS, "reformer-pytorch", "trax")
HEADS = {name: cls for name, cls in MODEL_CLASSES.items() if name != "ReformerForConditionalGeneration"}
BUILTIN_HEADS = {name: getattr(transformers, name) for name in HEADS if hasattr(transformers, name)}
BUILTIN_HEADS["ReformerForCausalLM"] = transformers.ReformerModelWithLMHead
COPIED = [*TOKENIZER_FILES, "tokenizer.*.json", "tokenization_*.py"]
DERIVED_FIELDS = {"attention_mode", "position_embedding_type", "classifier_pooling", "num_hidden_layers"}  # no loss
DERIVED_FIELDS |= {"lsh_centering", "lsh_rotary"}  # no effect: chunk mode hashes without them
SIGNAL_FIELDS = {  # no effect: no head of the built-in reads signals
    "frame_size", "frame_stride", "frame_transform", "gain_window", "num_input_features", "ctc_loss_reduction",
    "ctc_zero_infinity",
    "num_channels", "patch_size", "prediction_length", "context_length", "patch_length", "input_size", "mix_series",
    "num_time_features", "scaling", "series_mean", "series_std", "series_names", "predicted_series",
    "relative_positions", "loss", "distribution_output", "linear_skip", "individual_skip",
    "num_parallel_samples",
}  # fmt: skip
READ_ERRORS = (OSError, MemoryError, StrictDataclassError, zipfile.BadZipFile, *LOAD_ERRORS)


def convert(
    source: str | Path,
    output: str | Path,
    kind: str | None = None,
    to: str = "hf_reformer",
    head: str | None = None,
    attention_mode: str | None = None,
    fields: dict[str, Any] | None = None,
    lm_bias: bool = True,
) -> list[str]:
    """Convert a checkpoint to a model folder and return the remaining differences, one line each.

    Tokenizer files in the source folder are copied. Everything is checked before anything is written.

    Args:
        source: a folder of transformers' own Reformer or of ours, or a file of reformer-pytorch (a state dict saved by
            `torch.save` or safetensors) or of Trax (a pickle, compressed or not).
        output: a folder that is empty or does not exist.
        kind: format of `source`: "builtin", "reformer-pytorch", "trax" or "hf_reformer". None: detected.
        to: format to write: "hf_reformer" or "builtin".
        head: our class to load a folder with, such as "ReformerForCausalLM". None: the class that saved it.
        attention_mode: "window" converts chunk mode to window mode, see `to_window`. None or "chunk": no change.
        fields: config fields that the source lacks (see `from_trax`, `from_reformer_pytorch`), or for window mode.
        lm_bias: False sets the bias of a language model's head to 0, like transformers 5.0 to 5.23.

    Raises:
        ValueError, OSError: the source cannot be read or has no counterpart, or the output is not empty.
    """
    source, output = Path(source), Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not an empty folder. Name another one.")
    if to not in ("hf_reformer", "builtin") or attention_mode not in (None, "chunk", "window"):
        raise ValueError(f"`to={to!r}` or `attention_mode={attention_mode!r}` is unknown.")
    kind = kind or detect(source)
    of_window_mode = fields if attention_mode == "window" and kind in FOLDERS else None
    model, notes = read(source, kind, head, {} if of_window_mode else fields or {})
    if attention_mode == "window":
        model, more = to_window(model, of_window_mode)
        notes += more
    elif attention_mode == "chunk" and model.config.attention_mode != "chunk":
        raise ValueError(f"{source} is a model of window mode, and windows cannot be turned into chunks.")
    if not lm_bias:
        if not hasattr(model, "lm_head"):
            raise ValueError(f"{type(model).__name__} has no language-model head, and so no bias to leave out.")
        torch.nn.init.zeros_(model.lm_head.bias)
        notes.append("The head's bias is 0, as in transformers 5.0 to 5.23: outputs of other versions differ by it.")
    if to == "builtin":
        model, more = to_builtin(model)
        notes += more
    with written_whole(output.resolve()) as new:
        model.save_pretrained(new)
        for file in (file for pattern in COPIED for file in source.glob(pattern)):
            copy = shutil.copytree if file.is_dir() else shutil.copy2
            copy(file, new / file.name)
    return notes


def detect(source: Path) -> str:
    """Detect the format of a source from its files. Raises ValueError or OSError if it is unknown."""
    if not source.exists():
        raise FileNotFoundError(f"{source} does not exist.")
    if source.is_file():
        if source.suffix == ".safetensors" or zipfile.is_zipfile(source):  # torch.save writes zip files
            return "reformer-pytorch"
        return "trax"
    found = saved_config(source).get("model_type")
    kinds = {"reformer": "builtin", "hf_reformer": "hf_reformer"}
    if not isinstance(found, str) or found not in kinds:
        raise ValueError(f"{source} holds a model of type {found!r}; 'reformer' and 'hf_reformer' can be converted.")
    return kinds[found]


def read(source: Path, kind: str, head: str | None, fields: dict[str, Any]) -> tuple[Any, list[str]]:
    """Read a source of the given kind into our model; also returns the remaining differences."""
    if kind not in KINDS:
        raise ValueError(f"`kind={kind!r}` is unknown. Choose one of {KINDS}.")
    if head is not None and kind not in FOLDERS:
        raise ValueError(f"`head={head!r}` is for folders; weights of {kind} are those of a language model.")
    if kind not in FOLDERS and source.exists() and not source.is_file():
        raise ValueError(f"{source} is not a file, but {kind} weights must be a single file.")
    if fields and kind in FOLDERS:
        raise ValueError(
            "A folder has its own config: pass fields only for window mode, or for weights without a config."
        )
    try:
        if kind in FOLDERS:
            return read_folder(source, head)
        if kind == "trax":
            return from_trax(read_pickle(source), fields)
        return from_reformer_pytorch(read_state_dict(source), fields)
    except FileNotFoundError:
        raise
    except READ_ERRORS as error:
        raise ValueError(f"{source} cannot be read as a checkpoint of {kind}: {error}") from error


def read_folder(source: Path, head: str | None = None) -> tuple[Any, list[str]]:
    """Load our model from a folder of transformers' own Reformer or of ours; also returns what was left out."""
    saved = next(iter(from_builtin(saved_config(source)).get("architectures") or []), None)
    name = head or saved
    if name not in HEADS:
        raise ValueError(f"{source} was saved from {saved}. Name with `head` what to read it as: {sorted(HEADS)}.")
    model, info = load_model(HEADS[name], source)
    for problem in ("missing_keys", "error_msgs"):
        if info[problem]:
            raise ValueError(f"{source} is not a {name}: {problem} are {sorted(map(str, info[problem]))[:5]}.")
    left = sorted(info["unexpected_keys"])
    return model, [f"Left out, since {name} has no place for them: {', '.join(left)}."] if left else []


def read_state_dict(source: Path) -> dict[str, torch.Tensor]:
    """Read tensors by name from a safetensors or `torch.save` file, also from inside a training checkpoint."""
    if source.suffix == ".safetensors":
        return load_file(source)
    check_torch_file(source)
    found = torch.load(source, map_location="cpu", weights_only=True)
    held = found if isinstance(found, dict) else {}
    for state in (held, *(held.get(name) for name in ("state_dict", "model_state_dict", "model"))):
        items = state.items() if isinstance(state, dict) else ()
        if tensors := {name: x for name, x in items if isinstance(name, str) and isinstance(x, torch.Tensor)}:
            for name, x in tensors.items():
                if x.layout is not torch.strided or x.is_quantized or x.is_meta:
                    raise ValueError(
                        f"`{name}` in {source} is sparse, quantized or without values. Save plain tensors."
                    )
                if x.numel() * x.element_size() > x.untyped_storage().nbytes():
                    raise ValueError(f"`{name}` in {source}, {tuple(x.shape)}, repeats values. Save `x.contiguous()`.")
            return tensors
    raise ValueError(f"{source} holds no state dict. Write one: `torch.save(model.state_dict(), path)`.")


def to_window(model: Any, fields: dict[str, Any] | None = None) -> tuple[Any, list[str]]:
    """Convert a chunk-mode model to window mode with the same weights; also returns notes on the new settings.

    Windows cover as many positions as chunks did on average: `(before + 1 / 2) * length` in causal models, where a
    token sees half of its own chunk, otherwise `(before + 1 + after) * length`. `num_buckets` is derived from
    `max_position_embeddings` and the window. Outputs differ: compare them, or fine-tune briefly, before relying on
    them.

    Args:
        fields: fields of `ReformerConfig` to override.

    Raises:
        ValueError: the model is in window mode already, or fields are unknown or contradict each other.
    """
    config = model.config
    if config.attention_mode == "window":
        raise ValueError("The model is in window mode already.")
    windows = {}
    for kind in {"lsh", "local"} & set(config.attn_layers):
        length = getattr(config, f"{kind}_attn_chunk_length")
        before, after = (getattr(config, f"{kind}_num_chunks_{side}") or 0 for side in ("before", "after"))
        own = max(1, length // 2) if config.is_decoder else (1 + after) * length
        windows[f"{kind}_window"] = before * length + own
    if windows:
        windows.setdefault("local_window", windows.get("lsh_window"))  # lsh layers use it, too
        windows.setdefault("lsh_window", windows["local_window"])
    chosen = {"num_buckets": None, "lsh_centering": True, **windows, **(fields or {}), "attention_mode": "window"}
    if unknown := sorted(set(chosen) - set(ReformerConfig.__dataclass_fields__)):
        raise ValueError(f"{unknown} are no fields of ReformerConfig.")
    old = {name: value for name, value in config.to_dict().items() if name != "transformers_version"}
    try:
        made = type(model)(ReformerConfig(**{**old, **chosen}))
        made.load_state_dict(model.state_dict(), assign=True)
    except (StrictDataclassError, RuntimeError) as error:
        raise ValueError(f"Window mode cannot be made: {error}") from error
    if model.can_generate():
        made.generation_config = model.generation_config
    new = made.config
    return made.eval(), [
        f"Window mode: lsh_window={new.lsh_window}, local_window={new.local_window} (from chunks of "
        f"{config.lsh_attn_chunk_length} and {config.local_attn_chunk_length}), num_buckets={new.num_buckets} (were "
        f"{config.num_buckets}).",
        "Outputs differ from chunk mode: every pair counts once, windows never leave a bucket, lsh layers also see "
        f"the local window (lsh_include_local={new.lsh_include_local}) and hash vectors minus their mean "
        f"(lsh_centering={new.lsh_centering}), rotations of hash_seed={new.hash_seed} differ by layer.",
        "Positions count real tokens, so padding changes nothing; training draws exploration orders "
        f"(lsh_exploration_orders={new.lsh_exploration_orders}).",
    ]


def to_builtin(model: Any) -> tuple[Any, list[str]]:
    """Convert a chunk-mode model to transformers' own Reformer, with identical weights; also returns what is lost.

    Raises:
        ValueError: the built-in cannot express this model; the message says why.
    """
    config, name = model.config, type(model).__name__
    kind, shape = config.position_embedding_type, config.axial_pos_shape
    by_another_token = name == "ReformerForSequenceClassification" and config.pooling != "first"
    for obstacle, reason in (
        (name not in BUILTIN_HEADS, f"it has no counterpart of {name}"),
        (config.attention_mode == "window", "`attention_mode='window'`, and it knows chunks alone"),
        ("full" in config.attn_layers, "`attn_layers` holds 'full', and it has local and lsh layers alone"),
        (kind == "rotary", "`position_embedding_type='rotary'`"),
        (kind == "axial" and len(shape) != 2, f"`axial_pos_shape={shape}` has not two axes"),
        (config.type_vocab_size > 0, f"`type_vocab_size={config.type_vocab_size}`, and it has no token types"),
        (config.tie_word_embeddings, "`tie_word_embeddings=True` merges the streams, which it cannot do"),
        (by_another_token, f"`classifier_pooling={config.pooling!r}`, and it classifies by the first token"),
    ):
        if obstacle:
            raise ValueError(f"transformers' own Reformer cannot express this model: {reason}.")
    old, lost = config.to_dict(), []
    for field, described in ReformerConfig.__dataclass_fields__.items():
        if field in transformers.ReformerConfig.__dataclass_fields__ or field in DERIVED_FIELDS:
            continue
        if old.pop(field, described.default) != described.default and field not in SIGNAL_FIELDS:
            lost.append(f"{field}={getattr(config, field)}")
    fields = {key: value for key, value in old.items() if key not in {*DERIVED_FIELDS, "model_type", "architectures"}}
    for key, described in transformers.ReformerConfig.__dataclass_fields__.items():
        if fields.get(key, 0) is None and type(None) not in get_args(described.type):
            fields[key] = described.default  # for layer kinds that the model lacks
    made = BUILTIN_HEADS[name](transformers.ReformerConfig(**fields))
    state = {builtin_name(key, name): value for key, value in model.state_dict().items()}
    adds_bias = LEGACY_LM_HEAD_BIAS in made.state_dict()
    if adds_bias:
        state[LEGACY_LM_HEAD_BIAS] = state["lm_head.bias"].clone()
    made.load_state_dict(state, assign=True)
    made = made.to(model.dtype).eval()
    if model.can_generate():
        made.generation_config = model.generation_config
    notes = [f"The built-in has no field for: {', '.join(lost)}."] if lost else []
    if hasattr(model, "lm_head") and model.lm_head.bias.any() and not adds_bias:
        notes.append("The head's bias is in the file; transformers 5.0 to 5.23 leave it out of the logits.")
    return made, notes


def builtin_name(key: str, head: str) -> str:
    """Return the built-in's name for one of our parameters: BUILTIN_NAMES reversed, longer names first."""
    alone = head == "ReformerModel"
    key = f"model.{key}" if alone else key
    for pattern, ours in sorted(BUILTIN_NAMES.items(), key=lambda pair: -len(pair[1])):
        theirs = pattern.strip("^$").replace("(reformer\\.)?", "" if alone else "reformer.").replace("\\.", ".")
        key = key.replace(ours, theirs)
    return key
