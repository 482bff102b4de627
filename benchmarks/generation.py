"""Time to generate one more token after a given context."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.models.reformer.modeling_reformer import ReformerDynamicCache

from hf_reformer.cache import ReformerCache
from hf_reformer.models.recorded_step import RecordedStep

from .cases import NEXT, PREFILL, Case, Entry, Group, Run, Settings
from .models import (
    HEAD_SIZE,
    HEADS,
    HIDDEN,
    LAYERS,
    ROUNDS,
    VOCABULARY,
    Cache,
    FullModel,
    hf_reformer_model,
    transformers_model,
)

MOST_STEPS = 4096  # sixteen in a row, repeated


def groups(settings: Settings) -> list[Group]:
    lengths = settings.choose((1024, 4096, 16384, 65536), (1024, 16384))
    cases = [Case(section="generation", length=length, work=NEXT, rounds=ROUNDS, layers=LAYERS) for length in lengths]
    impls = "hf-reformer", "transformers", "full"
    return [Group("time", [Entry(case, impl) for impl in impls], LAYERS, in_a_row=16) for case in cases]


def prefill_groups(settings: Settings) -> list[Group]:
    """Return groups of a prompt processed at once and in chunks."""
    found = []
    for length in settings.choose([65536], [16384]):
        case = Case(section="prefill", length=length, work=PREFILL, rounds=ROUNDS, layers=LAYERS)
        impls = ["at once", *(f"chunks of {piece}" for piece in (16384, 4096, 1024) if piece < length)]
        entries = [Entry(case, impl) for impl in impls]
        found += [Group("time", entries, LAYERS), Group("memory", entries, LAYERS)]
    return found


def make(case: Case, impl: str) -> Run:
    """Make the step after `length` tokens. Filling caches is not timed; contents of the baselines' do not matter."""
    torch.manual_seed(0)
    makers: dict[str, Callable[[Case], tuple[Callable[[], Any], Any]]] = {
        "hf-reformer": hf_reformer_step, "hf-reformer recorded": recorded_step, "transformers": transformers_step,
        "full": full_step,
    }  # fmt: skip
    with torch.no_grad():
        call, kept = makers[impl](case)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_in(kept)}
    size = sum(storages.values())
    return Run(torch.no_grad()(call), note=f"cache of {size / 2**20:.0f} MiB")


def tensors_in(kept: Any) -> list[torch.Tensor]:
    """Return all tensors of a cache."""
    if isinstance(kept, torch.Tensor):
        return [kept]
    parts = kept if isinstance(kept, list | tuple) else vars(kept).values() if hasattr(kept, "__dict__") else []
    return [x for part in parts for x in tensors_in(part)]


def make_prefill(case: Case, impl: str) -> Run:
    """Make a run that fills a new cache with the whole prompt."""
    torch.manual_seed(0)
    model: Any = hf_reformer_model(2 * case.length, case.layers).eval()
    prompt = torch.randint(2, VOCABULARY, (1, case.length))
    piece = case.length if impl == "at once" else int(impl.split()[-1])

    @torch.no_grad()
    def call() -> Any:
        cache = None
        for part in prompt.split(piece, dim=1):
            cache = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        return cache

    return Run(call)


def ready(model: nn.Module, case: Case) -> Any:
    """Prepare the model for inference, on the device and in the dtype of the case."""
    return model.eval().to(case.device, case.torch_dtype)


def hf_reformer_step(case: Case) -> tuple[Callable[[], Any], Any]:
    """Make a step of hf_reformer; the cache grows by one token per call, as in generation."""
    model = ready(hf_reformer_model(2 * case.length, case.layers), case)
    context = torch.randint(2, VOCABULARY, (1, case.length), device=case.device)
    token = torch.tensor([[2]], device=case.device)
    cache = model(context, use_cache=True, logits_to_keep=1).past_key_values
    return lambda: model(token, past_key_values=cache).logits, cache.layers


def recorded_step(case: Case) -> tuple[Callable[[], Any], Any]:
    """Make the same step as a CUDA graph, with memory for the maximum number of tokens that are measured."""
    model = ready(hf_reformer_model(2 * case.length, case.layers), case)
    context = torch.randint(2, VOCABULARY, (1, case.length), device=case.device)
    token = torch.tensor([[2]], device=case.device)
    cache = ReformerCache(model.config, max_cache_len=case.length + MOST_STEPS)
    model(context, cache=cache, logits_to_keep=1)
    step = RecordedStep(model, cache)
    return lambda: step(token), cache.layers


def transformers_step(case: Case) -> tuple[Callable[[], Any], Any]:
    """Make a step of transformers' Reformer; its cache is filled with random buckets and states."""
    model = ready(transformers_model(2 * case.length, case.layers), case)
    placed: dict[str, Any] = {"device": case.device, "dtype": case.torch_dtype}
    token, prompt = (torch.full((1, count), 2, device=case.device) for count in (1, 128))
    filled = model(prompt, use_cache=True).past_buckets_states
    states = [torch.randn(1, case.length, HIDDEN, **placed) for _ in range(case.layers)]
    shape, number = (1, HEADS, ROUNDS, case.length), max(2, 2 * case.length // 64)
    buckets = [
        torch.randint(0, number, shape, device=case.device) if layer % 2 else kept
        for layer, kept in enumerate(filled.buckets_cache)
    ]

    def call() -> Any:
        cache = ReformerDynamicCache()  # shares its tensors with the filled one, which stays unchanged
        cache.buckets_cache, cache.states_cache, cache._seen_tokens = list(buckets), list(states), case.length
        return model(input_ids=token, past_buckets_states=cache, use_cache=True).logits

    return call, [states, buckets]


def full_step(case: Case) -> tuple[Callable[[], Any], Any]:
    """Make a step of exact attention; keys and values are in place, as in a static cache: nothing is copied."""
    model = ready(FullModel(case.length + 1, case.layers), case)
    token, shape = torch.tensor([[2]], device=case.device), (1, HEADS, case.length + 1, HEAD_SIZE)
    past: Cache = [
        tuple(torch.randn(shape, device=case.device, dtype=case.torch_dtype) for _ in range(2))  # type: ignore
        for _ in range(case.layers)
    ]
    return lambda: model.next_logits(token, past), past
