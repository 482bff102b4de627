"""Time of one more token at a given context."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.models.reformer.modeling_reformer import ReformerDynamicCache

from .cases import NEXT, Case, Entry, Group, Run, Settings
from .models import HEAD_SIZE, HEADS, HIDDEN, LAYERS, ROUNDS, VOCABULARY, FullModel, built_in_model, our_model


def groups(settings: Settings) -> list[Group]:
    lengths = settings.choose((1024, 4096, 16384, 65536), (1024, 16384))
    cases = [Case(section="generation", length=length, work=NEXT, rounds=ROUNDS, layers=LAYERS) for length in lengths]
    rivals = "ours", "built-in", "full"
    return [Group("time", [Entry(case, rival) for rival in rivals], LAYERS, in_a_row=16) for case in cases]


def make(case: Case, rival: str) -> Run:
    """The step after `length` tokens. What fills a cache is not timed, nor is what the rivals' caches hold read."""
    torch.manual_seed(0)
    makers: dict[str, Callable[[Case], Callable[[], Any]]] = {
        "ours": our_step, "built-in": built_in_step, "full": full_step
    }  # fmt: skip
    with torch.no_grad():
        call = makers[rival](case)
    return Run(torch.no_grad()(call), note="cache")


def our_step(case: Case) -> Callable[[], Any]:
    """The cache grows by a token a call, as in generation."""
    model: Any = our_model(2 * case.length, case.layers).eval()
    context, token = torch.randint(2, VOCABULARY, (1, case.length)), torch.tensor([[2]])
    cache = model(context, use_cache=True, logits_to_keep=1).past_key_values
    return lambda: model(token, past_key_values=cache).logits


def built_in_step(case: Case) -> Callable[[], Any]:
    """The built-in Reformer's step with its cache of buckets and states, which is filled with random ones."""
    model: Any = built_in_model(2 * case.length, case.layers).eval()
    token, filled = torch.tensor([[2]]), model(torch.tensor([[2] * 128]), use_cache=True).past_buckets_states
    states = [torch.randn(1, case.length, HIDDEN) for _ in range(case.layers)]
    buckets = [
        torch.randint(0, max(2, 2 * case.length // 64), (1, HEADS, ROUNDS, case.length)) if layer % 2 else kept
        for layer, kept in enumerate(filled.buckets_cache)
    ]

    def call() -> Any:
        cache = ReformerDynamicCache()  # tensors are shared with the filled one, which thus stays as it is
        cache.buckets_cache, cache.states_cache, cache._seen_tokens = list(buckets), list(states), case.length
        return model(input_ids=token, past_buckets_states=cache, use_cache=True).logits

    return call


def full_step(case: Case) -> Callable[[], Any]:
    """Keys and values lie in place, as in a static cache: nothing is copied."""
    model = FullModel(case.length + 1, case.layers).eval()
    token, shape = torch.tensor([[2]]), (1, HEADS, case.length + 1, HEAD_SIZE)
    past = [(torch.randn(shape), torch.randn(shape)) for _ in range(case.layers)]
    return lambda: model.next_logits(token, past)
