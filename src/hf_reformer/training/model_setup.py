"""Setup of a recipe: its command line, a tokenizer, and a saved or new model."""

import argparse
import ast
import copy
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoTokenizer, HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import logging

from ..configuration_reformer import ReformerConfig
from ..data.bpe_tokenizer import INPUT_NAMES, train_bpe_tokenizer
from ..data.packing import separator
from ..data.tables import read_text, require
from ..hub.model_folder import check_own_files, other_task
from ..tokenization_reformer import ReformerByteTokenizer
from .trainers import checkpoint_to_resume, force_cpu_backend

logger = logging.get_logger(__name__)

# Defaults that differ from those of `TrainingArguments`, for a small Reformer trained from scratch.
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 5, "learning_rate": 1e-3, "warmup_steps": 0.1, "weight_decay": 0.01,
    "per_device_train_batch_size": 16, "per_device_eval_batch_size": 16,
    "logging_steps": 10, "eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 2,
}  # fmt: skip
# The option that asks for each split. Without any of these options, the given files decide.
ACTIONS = {"train": "do_train", "validation": "do_eval", "test": "do_predict"}
# Presets for a saved encoder that is trained further.
SAVED_MODEL = {"--model_name_or_path": {"learning_rate": 2e-4, "num_train_epochs": 3}}
SIZES = (
    "hidden_size", "attn_layers", "num_attention_heads", "attention_head_size", "feed_forward_size", "num_hashes",
    "position_embedding_type", "hidden_dropout_prob",
)  # fmt: skip


_AT_LEAST_1 = (
    *("max_train_samples", "max_eval_samples", "max_predict_samples", "max_length", "train_length"),
    *("max_answer_length", "n_best_size"),
    *("max_source_length", "hidden_size", "early_stopping_patience", "tokenizer_vocab_size", "num_attention_heads"),
    *("attention_head_size", "num_hashes", "feed_forward_size", "generation_num_beams", "patch_size", "image_size"),
    *(
        "sampling_rate",
        "prediction_length",
        "context_length",
        "patch_length",
        "window_stride",
        "eval_stride",
        "season",
    ),
    *("draw_samples",),
    *("gradient_accumulation_steps", "eval_accumulation_steps"),
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
)
# Limits of numeric options in all recipes: the rule in words, the rule, the names of the options.
LIMITS: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    ("between 0 and 1", lambda x: 0 < x < 1, ("validation_fraction",)),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, ("item_dropout",)),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, ("mlm_probability",)),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, ("hidden_dropout_prob",)),
    ("above 0", lambda x: x > 0, ("num_train_epochs", "frame_ms", "stride_ms")),
    ("a number of at least 0", lambda x: 0 <= x < math.inf, ("learning_rate", "pretrain_learning_rate", "reorder")),
    ("at least 1", lambda x: x >= 1, _AT_LEAST_1),
    ("at least 0", lambda x: x >= 0, ("pretrain_steps",)),
    ("at least 2", lambda x: x >= 2, ("pretrain_length", "max_target_length", "generation_max_length", "eval_length")),
)


def check_options(options: Any) -> None:
    """Raise ValueError if an attribute of `options` is a number outside its `LIMITS`; None is allowed."""
    for words, allowed, names in LIMITS:
        for name in names:
            value = getattr(options, name, None)
            if value is not None and not allowed(value):
                raise ValueError(f"--{name} {value} must be {words}.")


def option(default: Any, help: str, choices: Sequence[str] | None = None, aliases: Sequence[str] = ()) -> Any:
    """Make a dataclass field for a recipe's option; a default list is copied for every instance."""
    value = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return HfArg(help=help, aliases=list(aliases), metadata={"choices": choices} if choices else None, **value)


@dataclass
class BackboneArguments:
    """A saved model to start from, or the sizes of a new one."""

    model_name_or_path: str | None = option(None, "A saved model to start from.")
    hidden_size: int = option(128, "Width of the model.")
    attn_layers: list[str] = option(["local", "lsh", "local", "lsh"], "Type of each layer: local, lsh or full.")
    num_attention_heads: int = option(2, "Attention heads per layer.")
    attention_head_size: int = option(64, "Width of every head.")
    feed_forward_size: int = option(256, "Width inside the feed-forward layers.")
    num_hashes: int = option(2, "Hash rounds in the lsh layers.")
    position_embedding_type: str = option("rotary", "axial, learned or rotary.")
    hidden_dropout_prob: float = option(0.05, "Dropout of a new model; use 0 if every text is seen only once.")
    config_overrides: str | None = option(None, 'Any other field of ReformerConfig: "lsh_window=64,reversible=False".')


@dataclass
class ModelArguments(BackboneArguments):
    """`BackboneArguments`, and a tokenizer."""

    tokenizer: str | None = option(
        None,
        "bytes; train (a byte-level BPE on the training texts); or a name or path. "
        "Default: the saved model's own, or train.",
    )
    tokenizer_vocab_size: int = option(8192, "Vocabulary size for --tokenizer train.")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Hides the defaults None and those of the actions, and dashed spellings of options; keeps line breaks."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.dest in ACTIONS.values()
        return action.help if says_nothing else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown, names = copy.copy(action), action.option_strings
        shown.option_strings = [x for x in names if "-" not in x[2:] or "--" + x[2:].replace("-", "_") not in names]
        return super()._format_action_invocation(shown)


def parse_arguments(
    recipe: str,
    description: str | None,
    classes: Sequence[Any],
    arguments: Sequence[str] | None,
    defaults: Mapping[str, Any],
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Any, ...]:
    """Parse a recipe's command line into instances of `classes`.

    Args:
        classes: dataclasses of options; the last one is `TrainingArguments` or a subclass of it.
        arguments: the arguments, or a single JSON or YAML file of them. Default: those of the process.
        defaults: in addition to `DEFAULTS`; both replace the defaults of `classes`.
        presets: further defaults for each flag, used if the flag is given.

    Raises:
        ValueError: a number is outside its `LIMITS`, or evaluation is both requested and turned off.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if len(arguments) == 1 and arguments[0].lower().endswith((".json", ".yaml", ".yml")):
        arguments = arguments_of_file(Path(arguments[0]))
    require("accelerate")  # without it, `TrainingArguments` would name another package to install
    force_cpu_backend()
    options = {"prog": f"hf-reformer train {recipe}", "usage": "%(prog)s [OPTIONS]", "description": description}
    given = _given_options(HfArgumentParser(classes, add_help=False, **options), classes, arguments)
    parser = HfArgumentParser(classes, formatter_class=_Formatter, **options)
    parser.set_defaults(**{**DEFAULTS, **defaults})
    for flag, preset in (presets or {}).items():
        if flag.removeprefix("--") in given:
            parser.set_defaults(**preset)
    requested = [given.get(name) for name in ACTIONS.values()]
    if requested[1] is False or (any(requested) and not requested[1]):
        parser.set_defaults(eval_strategy="no")
    *parsed, args = parser.parse_args_into_dataclasses(arguments)
    args.do_train, args.do_eval, args.do_predict = requested  # None: not given
    if requested[1] is False and args.eval_strategy != "no":
        raise ValueError(
            f"--eval_strategy {args.eval_strategy.value} evaluates, and --do_eval False does not. Leave one out."
        )
    if any(requested) and args.eval_strategy != "no":
        args.do_eval = True
    for options in (*parsed, args):
        check_options(options)
    check_report_to(args.report_to)
    args.resume_from_checkpoint = checkpoint_to_resume(args)
    args.dataloader_pin_memory &= torch.accelerator.is_available()  # without one, torch would warn
    return *parsed, args


def run_recipe(
    recipe: str,
    description: str | None,
    classes: Sequence[Any],
    run: Callable[..., Any],
    arguments: Sequence[str] | None,
    defaults: Mapping[str, Any],
    presets: Mapping[str, Mapping[str, Any]],
    predict: Callable[[Any, str, Any], None] | None = None,
) -> None:
    """Parse the command line (`parse_arguments`), check the options before anything is read, and run a recipe.

    Args:
        run: reads the data, trains and reports; for a recipe with `predict`, returns whether a model was trained.
        predict: called in the main process with the data options, the folder of the trained or given model, and the
            `TrainingArguments`; prints the model's predictions for `--predict_file`.
    """
    data, model, args = parse_arguments(recipe, description, classes, arguments, defaults, presets)
    data.check(model, args)
    trained = (predict is None or bool(data.parts)) and run(data, model, args)
    if predict is not None and data.predict_file is not None and args.process_index == 0:
        predict(data, str(args.output_dir if trained else model.model_name_or_path), args)


def arguments_of_file(file: Path) -> list[str]:
    """Convert a JSON or YAML file of option names and values to command-line arguments; None leaves an option out."""
    if not file.is_file():
        raise ValueError(f"There is no file `{file}` of arguments.")
    text = read_text(file)
    try:
        values = json.loads(text) if file.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"`{file}` cannot be read as a file of arguments: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f'`{file}` must hold an object of option names and values, such as {{"max_steps": 10}}.')
    arguments = []
    for name, value in values.items():
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is not None:
            text = json.dumps(value) if isinstance(value, dict) else str(value)
            arguments.append(f"--{name}={text}")
    return arguments


def _given_options(parser: HfArgumentParser, classes: Sequence[Any], arguments: list[str]) -> dict[str, Any]:
    """Return the options given in `arguments`, with their values. The parser loses its defaults."""
    absent = object()
    parser.set_defaults(**{field.name: absent for one in classes for field in fields(one) if field.init})
    return {name: x for name, x in vars(parser.parse_known_args(arguments)[0]).items() if x is not absent}


def check_report_to(names: list[str]) -> None:
    """Raise an error for a tracker that is unknown or not installed, before any data is read."""
    for tracker in get_reporting_integration_callbacks(names):
        try:
            tracker()
        except RuntimeError as error:
            raise ImportError(f"--report_to: {error}") from error


def parse_overrides(text: str | None) -> dict[str, Any]:
    """Parse a string like `"a=1,b=(2,3),c=word"` into a dictionary."""

    def value(word: str) -> Any:
        try:
            return ast.literal_eval(word)
        except (SyntaxError, ValueError):
            return word

    assignments = re.findall(r"(\w+)\s*=\s*(\(.*?\)|\[.*?\]|[^,]*)", text or "")
    return {name: value(word.strip()) for name, word in assignments}


def make_tokenizer(
    args: ModelArguments,
    texts: Iterable[str],
    max_length: int,
    offsets: bool = False,
    pairs: bool = False,
    causal: bool = False,
) -> PreTrainedTokenizerBase:
    """Make the tokenizer that `args` specify, which truncates at `max_length`; `texts` are only read to train one.

    A tokenizer without a padding token pads with another special token.

    Args:
        offsets: the tokenizer must map tokens to characters; it pads and truncates on the right.
        pairs: a new tokenizer also returns which text of a pair each token belongs to (`token_type_ids`).
        causal: a new tokenizer adds no end token, so that the model can continue the text.

    Raises:
        ValueError: a directory in `args` contains links to files elsewhere, or `offsets` are needed and the tokenizer
            is not a fast one.
    """
    for given in {args.tokenizer, args.model_name_or_path} - {None}:
        if Path(given).is_dir():
            check_own_files(Path(given))
    name = args.tokenizer or args.model_name_or_path or "train"
    names = [*INPUT_NAMES, "token_type_ids"] if pairs else [*INPUT_NAMES]
    if name == "train":
        return train_bpe_tokenizer(texts, args.tokenizer_vocab_size, max_length, names, causal)
    if name == "bytes":
        tokenizer: PreTrainedTokenizerBase = ReformerByteTokenizer(model_input_names=names)
    else:
        tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.model_max_length = max_length
    if tokenizer.pad_token is None:
        tokenizer.pad_token_id = separator(tokenizer)
    if offsets:
        if not tokenizer.is_fast:
            raise ValueError(
                f"{type(tokenizer).__name__} does not tell which characters its tokens stand for. Give a fast "
                "tokenizer."
            )
        tokenizer.padding_side = tokenizer.truncation_side = "right"
    return tokenizer


def for_pairs(args: ModelArguments, tokenizer: PreTrainedTokenizerBase, comparing: bool = True) -> ModelArguments:
    """Add defaults for a new model that compares two texts; `--config_overrides` take precedence.

    Half of the heads of LSH layers compare content alone (`lsh_rotary=0.5`), so that they find what both texts say
    wherever it occurs. If the tokenizer returns `token_type_ids`, the model embeds them.

    Args:
        comparing: if False, the model reads single texts at first and may be fine-tuned on pairs later: it embeds
            `token_type_ids`, and its heads stay as they are.
    """
    if args.model_name_or_path is not None:
        return args
    fields = ["lsh_rotary=0.5"] if comparing else []
    if "token_type_ids" in tokenizer.model_input_names:
        fields.append(f"type_vocab_size={max(2, tokenizer.pad_token_type_id + 1)}")
    return replace(args, config_overrides=",".join([*fields, args.config_overrides or ""]).rstrip(",") or None)


def make_model(
    auto_class: Any,
    args: BackboneArguments,
    tokenizer: PreTrainedTokenizerBase | None,
    max_length: int,
    trains: bool = True,
    **fields: Any,
) -> PreTrainedModel:
    """Load the saved model with the head of `auto_class`, or make a new one for up to `max_length` tokens.

    Args:
        tokenizer: the tokenizer; None: the model reads no text.
        trains: whether the model is to be trained; if not, a saved model must have all weights.
        fields: further fields of the config, such as labels.

    Raises:
        ValueError: the config lacks a field of `args.config_overrides`, or the tokenizer, weights or overrides do not
            fit the saved model.
    """
    name, overrides = args.model_name_or_path, parse_overrides(args.config_overrides)
    base = ReformerConfig() if name is None else AutoConfig.from_pretrained(name)
    if unknown := [field for field in overrides if not hasattr(base, field)]:
        raise ValueError(f"--config_overrides: {type(base).__name__} has no field {', '.join(unknown)}.")
    if name is not None:
        config = AutoConfig.from_pretrained(name, **fields, **overrides)
        if tokenizer is not None and len(tokenizer) > config.vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens, but `{name}` has only {config.vocab_size}. Leave out "
                "`--tokenizer` to use the model's own."
            )
        if overrides:
            _check_overrides(auto_class, name, AutoConfig.from_pretrained(name, **fields), config)
        if config.pad_token_id is None and tokenizer is not None:
            config.pad_token_id = tokenizer.pad_token_id
        return _load_saved(auto_class, name, config, base.num_labels, trains)
    sizes: dict[str, Any] = {size: getattr(args, size) for size in SIZES}
    sizes["max_position_embeddings"] = max_length
    if tokenizer is not None:
        sizes["vocab_size"] = len(tokenizer)
        sizes |= {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    return auto_class.from_config(ReformerConfig(**{**sizes, **fields, **overrides}))


def check_same_as_saved(name: str, given: Any, saved: Mapping[str, Any]) -> None:
    """Raise ValueError for options, attributes of `given`, that are set and differ from the saved model `name`.

    Its weights would not fit the data otherwise, and options that cannot be honored must not be ignored silently.
    """
    for option, value in saved.items():
        wanted = getattr(given, option)
        if wanted is not None and wanted != value:
            raise ValueError(
                f"--{option} {wanted}: that of the saved model `{name}` is {value}. Leave the option out, or leave "
                "out --model_name_or_path to train a new model."
            )


def load_trained(auto_class: Any, name: str) -> PreTrainedModel:
    """Load a saved model for inference.

    Raises:
        ValueError: it lacks weights, or was saved for another task.
    """
    config = AutoConfig.from_pretrained(name)
    return _load_saved(auto_class, name, config, config.num_labels, trains=False)


def _check_overrides(auto_class: Any, name: str, saved: Any, config: Any) -> None:
    """Raise ValueError for a config that needs different weights than the saved one."""

    def shapes(config: Any) -> dict[str, tuple[int, ...]]:
        with torch.device("meta"):
            return {key: tuple(x.shape) for key, x in auto_class.from_config(config).state_dict().items()}

    has, wants = shapes(saved), shapes(config)
    changed = sorted(key for key in has.keys() | wants.keys() if has.get(key) != wants.get(key))
    if changed:
        changes = ", ".join(f"{key} {has.get(key, 'none')} → {wants.get(key, 'none')}" for key in changed[:5])
        raise ValueError(
            f"--config_overrides: `{name}` has no such weights. {len(changed)} tensors would be lost or new, among "
            f"them {changes}. Leave out these overrides, or --model_name_or_path to train a new model."
        )


def _load_saved(auto_class: Any, name: str, config: Any, num_labels: int, trains: bool) -> PreTrainedModel:
    """Load a saved model. Its head is new if none was saved, or one for other labels, which a warning reports."""
    options = {"config": config, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, report = auto_class.from_pretrained(name, **options)
    new_head = {}
    for key, saved, wanted in sorted(report["mismatched_keys"]):
        if saved[:1] == (num_labels,) and wanted[:1] == (config.num_labels,) and saved[1:] == wanted[1:]:
            new_head[key] = f"{key} {tuple(saved)} → {tuple(wanted)}"
        else:
            raise ValueError(f"{key} of `{name}` is {tuple(saved)}, but its config asks for {tuple(wanted)}.")
    if new_head and trains:
        which = ", ".join(new_head.values())
        logger.warning(
            f"`{name}` has {num_labels} labels, not {config.num_labels}, so these weights are new: {which}."
        )
    missing = [*sorted(report["missing_keys"]), *new_head]
    if missing and not trains:
        raise ValueError(
            f"`{name}` lacks {', '.join(missing[:5])} for a {type(model).__name__}, and nothing is trained here. Give "
            "--train_file, or a model that was trained for this."
        )
    if not missing and (saved_by := other_task(model)):
        if not trains:
            raise ValueError(
                f"`{name}` was saved by {saved_by}, so as a {type(model).__name__} its output would be random, and "
                "this run does not train it. Give --train_file, or evaluate it for the task it was trained on (for "
                "a masked language model, add --masked)."
            )
        logger.warning(f"`{name}` was saved by {saved_by} and is trained on as {type(model).__name__}.")
    return model
