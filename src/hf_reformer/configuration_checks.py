"""Validation of the config: bounds of its fields, and contradictions between them."""

import math
import sys
from typing import Any

import torch
from transformers.activations import ACT2FN

LAYER_KINDS = ("local", "lsh", "full")
MAX_BUCKETS = 2**20
MAX_FACTOR = 2**14  # of each factor of `num_buckets`: a hash round scores this many at once
MAX_COLUMNS = 2**16  # of the rotations of all hash rounds: numbers computed for every token and head
MAX_WINDOW = 2**30  # no sequence is longer, so larger windows make no difference
MAX_PARAMETERS = 2**40
# A config.json may be untrusted: infeasible sizes are rejected before anything of that size is allocated.
MAX_NUMBERS = {
    "num_hidden_layers": 2**11, "num_attention_heads": 2**12, "attention_head_size": 2**14, "hidden_size": 2**20,
    "feed_forward_size": 2**24, "vocab_size": 2**31 - 1, "max_position_embeddings": 2**31 - 1, "num_labels": 2**18,
    "num_hashes": 2**10, "lsh_exploration_orders": 2**10, "num_buckets": MAX_BUCKETS,
    "lsh_attn_chunk_length": 2**30, "local_attn_chunk_length": 2**30,
    "lsh_num_chunks_before": 2**10, "local_num_chunks_before": 2**10, "lsh_num_chunks_after": 2**10,
    "local_num_chunks_after": 2**10, "chunk_size_feed_forward": 2**62, "chunk_size_lm_head": 2**62,
    "frame_size": 2**24, "frame_stride": 2**24, "gain_window": 2**31, "num_input_features": 2**20,
    "num_channels": 2**16, "patch_size": 2**12,
    "prediction_length": 2**24, "context_length": 2**24, "patch_length": 2**24, "input_size": 2**20,
    "num_time_features": 2**16, "type_vocab_size": 2**20, "num_parallel_samples": 2**24,
    "pad_token_id": 2**31, "bos_token_id": 2**31, "eos_token_id": 2**31, "decoder_start_token_id": 2**31,
}  # fmt: skip
MAX_ENTRIES = {
    "attn_layers": 2**11, "decoder_attn_layers": 2**11, "num_buckets": 20, "axial_pos_shape": 16,
    "axial_pos_embds_dim": 16, "rotary_shape": 16, "series_mean": 2**20, "series_std": 2**20,
    "series_names": 2**20, "predicted_series": 2**20,
    "id2label": 2**18, "label2id": 2**18, "eos_token_id": 2**10,
}  # fmt: skip
CHOICES = {
    "attention_mode": ("window", "chunk"),
    "position_embedding_type": ("axial", "learned", "rotary"),
    "residual_precision": ("float64", "float32"),
    "frame_transform": ("linear", "spectrum"),
    "ctc_loss_reduction": ("mean", "sum"),
    "scaling": ("std", "last", "mean", None),
    "loss": ("nll", "mse", "mae"),
    "distribution_output": ("student_t", "normal", "negative_binomial"),
    "classifier_pooling": ("mean", "last", "first", None),
    "problem_type": ("regression", "single_label_classification", "multi_label_classification", None),
}


def check_limits(config: Any, num_labels: Any = None, torch_dtype: Any = None, **kwargs: Any) -> None:
    """Raise ValueError for values that would fail or take too long before the fields can be checked together."""
    for name, limit in MAX_ENTRIES.items():
        value = getattr(config, name)
        kinds = dict if name in ("id2label", "label2id") else (list, tuple, int)
        if value is not None and not isinstance(value, kinds):
            raise ValueError(f"`{name}` is {type(value).__name__}; it must be a dict.")
        if not isinstance(value, (int, type(None))) and len(value) > limit:
            raise ValueError(f"`{name}` has {len(value):,} entries; nothing could compute more than {limit:,}.")
    if wrong := [key for key in config.id2label or () if not str(key).isdecimal()]:
        raise ValueError(f"`id2label` has the key {wrong[0]!r}; its keys are the numbers of the labels.")
    for name, limit in MAX_NUMBERS.items():
        value = num_labels if name == "num_labels" else getattr(config, name)
        if isinstance(value, (list, tuple, type(None))) and not name.startswith("chunk_size"):
            continue
        if type(value) is not int:
            raise ValueError(f"`{name}={value!r}` must be a whole number.")
        if abs(value) > limit:
            shown = f"{name}={value}" if abs(value) < 10**30 else f"{name}, a number of {value.bit_length()} bits,"
            raise ValueError(f"`{shown}` is more than {limit}, which nothing could compute. Lower it.")
    for dtype in (config.dtype, torch_dtype):
        found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        if dtype is not None and not isinstance(found, torch.dtype):
            raise ValueError(f"`dtype={dtype!r}` is no dtype of torch, such as 'float32'.")
    if num_labels is not None and num_labels < 0:
        raise ValueError(f"`num_labels={num_labels}` must not be negative.")


def check_fields(config: Any) -> None:
    """Raise ValueError for fields that are out of bounds or contradict each other."""
    for check in (
        _check_choices,
        _check_layers,
        _check_numbers,
        _check_positions,
        _check_axial_positions,
        _check_rotary_shape,
        _check_signals,
        _check_series,
        _check_chunks,
        _check_decoder,
        _check_size,
    ):
        check(config)


def _check_choices(config: Any) -> None:
    for name, allowed in CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"`{name}={getattr(config, name)!r}` is unknown. Choose one of {allowed}.")
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"`hidden_act={config.hidden_act!r}` is none of transformers' activations, such as 'relu'.")


def _check_layers(config: Any) -> None:
    for name in ("attn_layers", "decoder_attn_layers"):
        kinds = getattr(config, name)
        if kinds is not None and not kinds:
            raise ValueError(f"`{name}` is empty. Name at least one layer, for example ['local', 'lsh'].")
        if unknown := sorted(set(kinds or ()) - set(LAYER_KINDS)):
            raise ValueError(f"`{name}` holds unknown kinds {unknown}. Every layer is one of {LAYER_KINDS}.")
    if config.num_hidden_layers != len(config.attn_layers):
        raise ValueError(
            f"`num_hidden_layers={config.num_hidden_layers}` contradicts `attn_layers`, which names "
            f"{len(config.attn_layers)} layers. Give only one of the two."
        )


def _check_decoder(config: Any) -> None:
    if not config.is_encoder_decoder:
        return
    if config.is_decoder:
        raise ValueError(
            "`is_decoder=True` gives a single causal stack, but `is_encoder_decoder=True` a bidirectional encoder and "
            "a decoder. Set one of the two to False."
        )
    kinds, start = config.decoder_attn_layers, config.decoder_start_token_id
    if config.tie_encoder_decoder and kinds != config.attn_layers:
        raise ValueError(
            f"`tie_encoder_decoder=True` shares every layer, but `attn_layers={config.attn_layers}` and "
            f"`decoder_attn_layers={kinds}` differ. Leave `decoder_attn_layers` out, or do not tie."
        )
    if start is None or not 0 <= start < config.vocab_size:
        raise ValueError(
            f"`decoder_start_token_id={start}` must be a token, 0 … {config.vocab_size - 1}: the decoder's input "
            "begins with it. Give it, or a `pad_token_id`, which is its default."
        )


def _check_numbers(config: Any) -> None:
    check_num_buckets(config.num_buckets, config.num_hashes)
    kinds = ("lsh", "local")
    positive = ["vocab_size", "hidden_size", "num_attention_heads", "attention_head_size", "feed_forward_size"]
    positive += ["max_position_embeddings", "num_hashes", "lsh_window", "local_window"]
    positive += ["frame_size", "frame_stride", "num_input_features", "num_channels", "patch_size", "input_size"]
    positive += ["prediction_length", "context_length", "patch_length", "num_parallel_samples"]
    if config.attention_mode == "chunk":
        positive += [f"{kind}_attn_chunk_length" for kind in kinds if kind in config.attn_layers]
    not_negative = [
        "gain_window",
        "num_time_features",
        "lsh_exploration_orders",
        "chunk_size_feed_forward",
        "chunk_size_lm_head",
    ]
    not_negative += [
        "type_vocab_size",
        *(f"{kind}_num_chunks_{side}" for kind in kinds for side in ("before", "after")),
    ]
    shares = [
        "hidden_dropout_prob",
        "classifier_dropout",
        "lsh_centering",
        "lsh_rotary",
        *(f"{kind}_attention_probs_dropout_prob" for kind in kinds),
    ]
    for names, low, high, rule in (
        (positive, 1, math.inf, "be at least 1"),
        (not_negative, 0, math.inf, "not be negative"),
        (shares, 0, 1, "lie between 0 and 1"),
        (["coverage_loss_weight", "layer_norm_eps"], 0, sys.float_info.max, "be a finite number of at least 0"),
        (["initializer_range", "axial_norm_std"], 0, 1e6, "lie between 0 and a million"),
    ):
        for name in names:
            if not low <= (getattr(config, name) or 0) <= high:
                raise ValueError(f"`{name}={getattr(config, name)}` must {rule}.")
    if not 1 <= config.rope_theta <= sys.float_info.max:
        raise ValueError(f"`rope_theta={config.rope_theta}` must be a finite number of at least 1.")


def _check_size(config: Any) -> None:
    inner = config.num_attention_heads * config.attention_head_size
    layer = config.hidden_size * (4 * inner + 2 * config.feed_forward_size)
    tables = config.hidden_size * (config.vocab_size + config.type_vocab_size)
    if config.position_embedding_type == "learned":
        tables += config.hidden_size * config.max_position_embeddings
    elif config.position_embedding_type == "axial":
        tables += sum(
            size * dim for size, dim in zip(config.axial_pos_shape, config.axial_pos_embds_dim, strict=False)
        )
    frame = config.frame_size * config.num_input_features
    patch = config.patch_length * (2 * config.input_size + config.num_time_features)
    pixels = config.num_channels * config.patch_size**2
    tables += config.hidden_size * max(frame, patch, pixels)
    if config.linear_skip:
        maps = config.input_size**2 if config.mix_series else config.input_size if config.individual_skip else 1
        tables += config.context_length * config.prediction_length * maps
    parameters = tables + layer * (len(config.attn_layers) + len(config.decoder_attn_layers or ()))
    if parameters > MAX_PARAMETERS:
        raise ValueError(
            f"The sizes make about {parameters:,} parameters, more than {MAX_PARAMETERS:,}. Lower `hidden_size="
            f"{config.hidden_size}`, `vocab_size={config.vocab_size}` or another size."
        )


def _check_positions(config: Any) -> None:
    kind = config.position_embedding_type
    if bool(config.axial_pos_embds) != (kind == "axial"):
        raise ValueError(
            f"`axial_pos_embds={config.axial_pos_embds}` contradicts `position_embedding_type={kind!r}`. "
            "Give `position_embedding_type` alone."
        )
    if kind == "rotary" and config.attention_head_size % 2:
        raise ValueError(
            f"`attention_head_size={config.attention_head_size}` is odd, but rotary positions rotate pairs of "
            "dimensions. Choose an even size or another `position_embedding_type`."
        )


def _check_axial_positions(config: Any) -> None:
    shape, dims, covered = config.axial_pos_shape, config.axial_pos_embds_dim, math.prod(config.axial_pos_shape)
    if config.position_embedding_type != "axial":
        return
    if len(shape) != len(dims):
        raise ValueError(
            f"`axial_pos_shape={shape}` has {len(shape)} axes but `axial_pos_embds_dim={dims}` has {len(dims)}. "
            "Give one embedding size for every axis."
        )
    if min(shape) < 1:
        raise ValueError(f"`axial_pos_shape={shape}` must hold sizes of at least 1. Leave the field out.")
    if min(dims) < 1 or sum(dims) != config.hidden_size:
        raise ValueError(
            f"`axial_pos_embds_dim={dims}` adds up to {sum(dims)}, but must hold positive sizes that add up to "
            f"`hidden_size={config.hidden_size}`. Correct it, or leave the field out for a default."
        )
    if config.attention_mode == "window" and covered < config.max_position_embeddings:
        raise ValueError(
            f"`axial_pos_shape={shape}` covers {covered} positions, fewer than `max_position_embeddings="
            f'{config.max_position_embeddings}`. Enlarge or omit it, or use `position_embedding_type="rotary"`.'
        )


def _check_rotary_shape(config: Any) -> None:
    shape = config.rotary_shape
    if shape is None:
        return
    if config.position_embedding_type != "rotary":
        raise ValueError(
            f"`rotary_shape={shape}` is for rotary positions, but `position_embedding_type="
            f"{config.position_embedding_type!r}`. Leave one of the two out; axial ones have `axial_pos_shape`."
        )
    if not shape or any(type(size) is not int or not 1 <= size < 2**31 for size in shape):
        raise ValueError(f"`rotary_shape={shape}` must hold sizes of at least 1, such as (28, 28).")
    if 2 * len(shape) > config.attention_head_size:
        raise ValueError(
            f"`rotary_shape={shape}` has {len(shape)} axes, and `attention_head_size={config.attention_head_size}` "
            "has fewer pairs of dimensions. Enlarge the heads."
        )


def _check_signals(config: Any) -> None:
    if config.frame_stride > config.frame_size:
        raise ValueError(
            f"`frame_stride={config.frame_stride}` is more than `frame_size={config.frame_size}`, so the samples "
            "between frames would be ignored. Lower it."
        )
    if config.gain_window and config.num_input_features > 1:
        raise ValueError(
            f"`gain_window={config.gain_window}` is of a waveform, but there are `num_input_features="
            f"{config.num_input_features}`. Set it to 0."
        )
    if config.frame_transform == "spectrum" and config.num_input_features > 1:
        raise ValueError(
            f"`frame_transform='spectrum'` is of a waveform, but there are `num_input_features="
            f"{config.num_input_features}`. Use 'linear'."
        )


def _check_series(config: Any) -> None:
    for name in ("series_mean", "series_std"):
        values = getattr(config, name)
        if values is None:
            continue
        numbers = all(type(x) in (int, float) and -sys.float_info.max <= x <= sys.float_info.max for x in values)
        if not numbers or not values or (name == "series_std" and min(values) <= 0):
            raise ValueError(f"`{name}` must hold finite numbers, one for every series, deviations above 0.")
        if config.input_size not in (1, len(values)):
            raise ValueError(f"`{name}` has {len(values)} numbers, but `input_size={config.input_size}` series.")
    if (config.series_mean is None) != (config.series_std is None) or (
        config.series_mean is not None and len(config.series_mean) != len(config.series_std)
    ):
        raise ValueError("Give `series_mean` and `series_std` for the same series, or neither of the two.")
    names, count = config.series_names, config.input_size if config.series_mean is None else len(config.series_mean)
    any_number = config.series_mean is None and config.input_size == 1
    if names is not None and (len(set(names)) < len(names) or not (any_number or len(names) == count)):
        raise ValueError(f"`series_names` are {list(names)}; give one name of its own for each of the series.")
    if unknown := sorted(set(config.predicted_series or ()) - set(names or ())):
        raise ValueError(f"`predicted_series` holds {unknown}, which are none of the `series_names`.")
    if config.individual_skip and (not config.linear_skip or config.mix_series or config.input_size == 1):
        raise ValueError(
            "`individual_skip=True` is a linear map for each of several series, but here `linear_skip="
            f"{config.linear_skip}`, `mix_series={config.mix_series}` and `input_size={config.input_size}`. Set "
            "`linear_skip=True`, `mix_series=False` and `input_size` to the number of series, or leave it out."
        )
    if config.distribution_output == "negative_binomial" and config.loss == "nll":
        shifted = config.scaling not in ("mean", None) or config.series_mean is not None
        if shifted or config.linear_skip:
            raise ValueError(
                "`distribution_output='negative_binomial'` is for counts, which cannot be shifted. Set "
                "`scaling='mean'` or None, and leave out `series_mean`, `series_std` and `linear_skip`."
            )


def _check_chunks(config: Any) -> None:
    lengths = [
        getattr(config, f"{kind}_attn_chunk_length") or 1 for kind in {"lsh", "local"} & set(config.attn_layers)
    ]
    most = max(2**16, 2 * config.max_position_embeddings)
    if config.attention_mode == "chunk" and len(lengths) > 1 and math.lcm(*lengths) > most:
        raise ValueError(
            f"`lsh_attn_chunk_length={config.lsh_attn_chunk_length}` and `local_attn_chunk_length="
            f"{config.local_attn_chunk_length}` have no common multiple up to {most}, and inputs are padded to one. "
            "Choose lengths of which one divides the other."
        )
    for kind in ("lsh", "local"):
        after = getattr(config, f"{kind}_num_chunks_after")
        if after and kind in config.attn_layers and config.attention_mode == "chunk" and config.is_decoder:
            raise ValueError(
                f"`{kind}_num_chunks_after={after}` looks at chunks to come, which a causal model must not. "
                "Set it to 0, or `is_decoder=False`."
            )


def check_num_buckets(num_buckets: int | tuple[int, ...] | list[int] | None, num_hashes: int) -> None:
    """Raise ValueError unless all factors are even, at least 2 and within the limits; None is accepted."""
    if num_buckets is None:
        return
    factors = tuple(num_buckets) if isinstance(num_buckets, (list, tuple)) else (num_buckets,)
    if len(factors) > MAX_ENTRIES["num_buckets"]:
        raise ValueError(f"`num_buckets` has {len(factors)} factors, more than are possible. Give one or two.")
    if not factors or any(not isinstance(factor, int) or factor < 2 or factor % 2 for factor in factors):
        raise ValueError(
            f"`num_buckets={num_buckets}` must be an even number or a list of even numbers: a rotation's columns and "
            "their opposites give two buckets each. Choose for example 32, or [16, 32] for 512 buckets."
        )
    if math.prod(factors) > MAX_BUCKETS:
        raise ValueError(
            f"`num_buckets={num_buckets}` makes {math.prod(factors)} buckets, more than {MAX_BUCKETS}. About as many "
            "as the longest input has windows are useful: `max_position_embeddings / lsh_window`."
        )
    if max(factors) > MAX_FACTOR or num_hashes * sum(factors) > 2 * MAX_COLUMNS:
        raise ValueError(
            f"`num_buckets={num_buckets}` with `num_hashes={num_hashes}` scores {num_hashes * sum(factors)} buckets "
            f"for every token; at most {2 * MAX_COLUMNS} can be, {MAX_FACTOR} at once. Give several factors, for "
            "example [16, 32] for 512 buckets, or fewer hashes."
        )
