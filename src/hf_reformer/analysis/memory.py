"""Estimate the memory of a step by running the model with fake tensors, which have shapes but no data."""

import math
import operator
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..cache.cache import CACHE_NAME
from ..compat import fake_tensors
from ..configuration_reformer import ReformerConfig
from ..models.heads_text import (
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
)
from ..models.language_models import ReformerForCausalLM, ReformerForMaskedLM
from ..models.losses import MAX_LOGITS
from ..models.modeling_reformer import ReformerModel
from ..models.pretrained import ReformerPreTrainedModel
from ..models.seq2seq import ReformerForConditionalGeneration
from ..ops.dispatch import unsupported_reason
from ..reversible.chunking import CHUNK_ELEMENTS

MODELS: dict[str, type[ReformerPreTrainedModel]] = {
    model.__name__: model
    for model in (
        ReformerModel,
        ReformerForCausalLM,
        ReformerForMaskedLM,
        ReformerForSequenceClassification,
        ReformerForTokenClassification,
        ReformerForQuestionAnswering,
        ReformerForMultipleChoice,
        ReformerForConditionalGeneration,
    )
}
CHOICES = 2  # per question, in multiple choice
# The phases of a step, in order. "loss" creates logits, losses and their gradients.
FORWARD, LOSS, BACKWARD, UPDATE = "forward", "loss", "backward", "update"


class Living(NamedTuple):
    """A live storage; `number` distinguishes it from later ones at the same address."""

    number: int
    size: int
    moment: str  # the phase in which it was created


class Census(TorchDispatchMode):
    """A counter of the bytes in live storages returned by operations: `now`, and at their `peak`.

    Attributes:
        moment: name of the current phase; `at_peak` holds the storages that were live at the peak of each phase.
    """

    def __init__(self, *ignored: torch.Tensor):
        super().__init__()
        self.alive = {x.untyped_storage()._cdata: Living(0, 0, "") for x in ignored}
        self.moment = ""
        self.now = self.peak = self.count = 0
        self.peaks: dict[str, int] = {}
        self.at_peak: dict[str, list[Living]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        name = storage._cdata
        if name in self.alive:
            return
        self.count += 1
        self.alive[name] = Living(self.count, storage.nbytes(), self.moment)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        if self.now > self.peaks.get(self.moment, -1):
            self.peaks[self.moment], self.at_peak[self.moment] = self.now, list(self.alive.values())
        weakref.finalize(storage, self._forget, name)

    def _forget(self, name: int) -> None:
        self.now -= self.alive.pop(name).size


@dataclass(frozen=True)
class MemoryEstimate:
    """Memory at the peak of a step in bytes, excluding Python and its libraries.

    Attributes:
        weights: all parameters and buffers.
        gradients: parameter gradients allocated at that point.
        optimizer: optimizer states.
        kept: what the forward pass saved for backward and is still needed: the residual streams after the last layer
            and the hidden states that the head reads; without reversible layers, the activations of all layers.
        layers: working memory of one layer, or of its backward pass, including the streams that it reconstructs.
        logits: logits and loss, their gradients and intermediate results.
        cache: keys, values and buckets of the cached tokens.
        moment: when the peak occurs: `"forward"`, `"loss"` (including its backward), `"backward"` or `"update"`.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    kept: int = 0
    layers: int = 0
    logits: int = 0
    cache: int = 0
    moment: str = ""

    @property
    def parts(self) -> dict[str, int]:
        """Return the bytes of each part."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "moment"}

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        return format_memory({"": self})


def format_memory(estimates: dict[str, MemoryEstimate]) -> str:
    """Format estimates as a table in MiB, one named column each."""
    rows = [["MiB", *estimates]]
    for part in MemoryEstimate().parts:
        sizes = [estimate.parts[part] for estimate in estimates.values()]
        rows += [[part, *(f"{size / 2**20:,.1f}" for size in sizes)]] if any(sizes) else []
    rows += [["total", *(f"{estimate.total / 2**20:,.1f}" for estimate in estimates.values())]]
    rows += [["most at", *(estimate.moment for estimate in estimates.values())]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *rest = widths
    lines = [[row[0].ljust(first), *map(str.rjust, row[1:], rest)] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def estimate_memory(
    config: ReformerConfig,
    batch_size: int,
    length: int,
    training: bool = True,
    *,
    model_class: type[ReformerPreTrainedModel] | None = None,
    use_cache: bool = False,
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    optimizer_states: int = 2,
) -> MemoryEstimate:
    """Estimate the memory of a training step or forward pass with `batch_size` sequences of `length` tokens on a CPU.

    Nothing is computed: the model runs with fake tensors, and every storage is counted from its allocation until it
    is freed. Long sequences are extrapolated from shorter ones. Internal allocations of the compiled kernel, about 1%,
    are not counted.

    Args:
        training: estimate a training step (forward, backward, update) instead of a forward pass without gradients.
        model_class: default: the class in `config.architectures`, or else `ReformerForConditionalGeneration`,
            `ReformerForCausalLM` or, for an encoder, `ReformerForMaskedLM`.
        use_cache: in a forward pass, prefill a cache with a prompt, as `generate` does, and compute the last token's
            logits.
        dtype: dtype of the weights, and of computations outside of autocast.
        autocast: the dtype of `torch.autocast`, bfloat16 for the Trainer's `bf16=True`; None: no autocast.
        optimizer_states: number of values that the optimizer stores per weight: 2 for AdamW, 0 for plain SGD.

    Raises:
        ValueError: the model does not support these sizes, or options exclude each other.
    """
    if not isinstance(config, ReformerConfig):
        raise ValueError(
            f"The config is a {type(config).__name__}; memory is estimated only for a {ReformerConfig.__name__}."
        )
    batch_size, length = operator.index(batch_size), operator.index(length)
    if min(batch_size, length) < 1 or length > config.covered_positions:
        raise ValueError(
            f"batch_size={batch_size}, length={length}: both must be at least 1, and the config's position embeddings "
            f"cover {config.covered_positions} tokens (`max_position_embeddings`, `axial_pos_shape`)."
        )
    model_class = default_class(config) if model_class is None else known_class(model_class.__name__)
    causal = model_class is ReformerForCausalLM or (model_class is ReformerModel and config.is_decoder)
    if use_cache and (training or not causal):
        raise ValueError("`use_cache=True` is for causal models (`config.is_decoder`) with `training=False`.")
    unsupported_reason("cpu")  # compiles and checks the kernel, unless already done
    run = partial(_run, config, model_class, batch_size, training, use_cache, dtype, autocast, optimizer_states)
    # Chunks of tokens and logits have fixed sizes; beyond a few chunks, memory grows linearly.
    chunk = CHUNK_ELEMENTS // (batch_size * config.hidden_size)
    short = 2 * max(1, chunk, MAX_LOGITS // (2 * batch_size * config.vocab_size))
    long = short + 2 * max(1, chunk)
    if length <= long:
        estimates = run(length)
    else:
        first, second = run(short), run(long)
        estimates = [_extrapolate(a, b, (length - long) / (long - short)) for a, b in zip(first, second, strict=True)]
    return max(estimates, key=lambda estimate: estimate.total)


def known_class(name: str) -> type[ReformerPreTrainedModel]:
    """Return the class with the given name.

    Raises:
        ValueError: its inputs are not tokens, or it is not a class of this package.
    """
    if name not in MODELS:
        raise ValueError(
            f"Memory is estimated for {', '.join(MODELS)}, not for {name}. Give one of them as `model_class`. For "
            "signals use ReformerForSequenceClassification, which has the same layers; `length` is then the number "
            "of frames or patches."
        )
    return MODELS[name]


def default_class(config: ReformerConfig) -> type[ReformerPreTrainedModel]:
    """Return the class in `config.architectures`, or else the language model that fits the config."""
    if config.architectures:
        return known_class(config.architectures[0])
    if config.is_encoder_decoder:
        return ReformerForConditionalGeneration
    return ReformerForCausalLM if config.is_decoder else ReformerForMaskedLM


def _extrapolate(first: MemoryEstimate, second: MemoryEstimate, steps: float) -> MemoryEstimate:
    """Extrapolate linearly beyond `second`, by `steps` times the difference between `first` and `second`."""
    grown = {name: size + steps * (size - first.parts[name]) for name, size in second.parts.items()}
    return MemoryEstimate(**{name: max(0, math.ceil(size)) for name, size in grown.items()}, moment=second.moment)


def _run(
    config: ReformerConfig, model_class: Callable[..., Any], batch: int, training: bool, use_cache: bool,
    dtype: torch.dtype, autocast: torch.dtype | None, optimizer_states: int, length: int,
) -> list[MemoryEstimate]:  # fmt: skip
    """Return one estimate for each phase."""
    with fake_tensors(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the model warns when it really runs, and a fake tensor has no address
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # the dtype of a fake parameter cannot be changed later
        try:
            model = model_class(config).train(training)
        finally:
            torch.set_default_dtype(before)
        inputs = example_inputs(model, batch, length, training)
        inputs |= {"use_cache": True, "logits_to_keep": 1} if use_cache else {}
        census = Census(*model.parameters(), *model.buffers(), *filter(torch.is_tensor, inputs.values()))
        census.moment = FORWARD

        def at_backbones_end(module: Any, args: Any, output: Any) -> None:
            census.moment = LOSS
            if output.last_hidden_state.requires_grad:
                output.last_hidden_state.register_hook(lambda grad: setattr(census, "moment", BACKWARD))

        (model.get_decoder() if model.config.is_encoder_decoder else model.base_model).register_forward_hook(
            at_backbones_end
        )
        amp = torch.autocast("cpu", dtype=autocast, enabled=autocast is not None)
        with census, torch.set_grad_enabled(training):
            with amp:
                out = model(**inputs, return_dict=True)
                loss = (
                    (out.last_hidden_state.sum() if model_class is ReformerModel else out.loss) if training else None
                )
            cache = getattr(out, CACHE_NAME, None) if use_cache else None
            del out
            lasting = {x.number for x in census.alive.values() if x.moment == FORWARD}
            if training:
                loss.backward()
        trained = [x for x in model.parameters() if x.grad is not None]
        grads = {census.alive[x.grad.untyped_storage()._cdata].number for x in trained}
        del cache
    weights = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    states = optimizer_states * sum(x.numel() * x.element_size() for x in trained)
    estimates = []
    for moment, living in census.at_peak.items():
        sizes = {
            "weights": weights,
            "optimizer": states,
            "gradients": 0,
            "kept": 0,
            "cache": 0,
            "layers": 0,
            "logits": 0,
        }
        for x in living:
            lasts = "kept" if training else "cache"
            made = "logits" if x.moment == LOSS else "layers"
            sizes["gradients" if x.number in grads else lasts if x.number in lasting else made] += x.size
        estimates.append(MemoryEstimate(**sizes, moment=moment))
    if training:  # AdamW updates one parameter at a time, with two temporary values per weight
        largest = max(x.numel() * x.element_size() for x in trained)
        all_grads = sum(x.numel() * x.element_size() for x in trained)
        estimates.append(MemoryEstimate(weights, all_grads, states + 2 * largest, moment=UPDATE))
    return estimates


def example_inputs(model: Any, batch: int, length: int, training: bool) -> dict[str, Any]:
    """Make token ids for a model, and in training also labels."""
    config, kind = model.config, type(model)
    shape = (batch, CHOICES, length) if kind is ReformerForMultipleChoice else (batch, length)
    inputs: dict[str, Any] = {"input_ids": torch.ones(shape, dtype=torch.int64)}
    if kind is ReformerForConditionalGeneration:
        inputs["decoder_input_ids"] = torch.ones(shape, dtype=torch.int64)
    if not training or kind is ReformerModel:
        return inputs
    if kind is ReformerForQuestionAnswering:
        return inputs | {name: torch.ones(batch, dtype=torch.int64) for name in ("start_positions", "end_positions")}
    if kind is ReformerForSequenceClassification and config.num_labels > 1:
        return inputs | {"labels": torch.ones(batch, dtype=torch.int64)}
    if kind is ReformerForSequenceClassification:
        return inputs | {"labels": torch.ones(batch)}
    if kind is ReformerForMultipleChoice:
        return inputs | {"labels": torch.ones(batch, dtype=torch.int64)}
    return inputs | {"labels": torch.ones(shape, dtype=torch.int64)}
