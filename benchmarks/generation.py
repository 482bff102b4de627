"""Time of one more token at a given context."""

from collections.abc import Callable
from typing import Any

import torch
from transformers.models.reformer.modeling_reformer import ReformerDynamicCache

from .cases import Case, Entry, Group, Run, Settings
from .models import LAYERS, ROUNDS, VOCABULARY, FullModel, built_in_model, our_model

NEXT = "next token"


def groups(settings: Settings) -> list[Group]:
    """Ours runs the whole context for every token as long as it has no cache; the rivals use theirs."""
    lengths = settings.choose((1024, 4096, 16384), (4096,))
    rivals = ["ours", "built-in", "built-in, no cache", "full"]
    cases = [Case(section="generation", length=length, work=NEXT, rounds=ROUNDS, layers=LAYERS) for length in lengths]
    return [Group("time", [Entry(case, rival) for rival in rivals], LAYERS) for case in cases]


def make(case: Case, rival: str) -> Run:
    """The step after `length` tokens; what fills a cache is not timed, and a step's growth of it is thrown away."""
    torch.manual_seed(0)
    context, token = torch.randint(2, VOCABULARY, (1, case.length)), torch.tensor([[2]])
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "ours": lambda: whole_context(our_model(case.length, case.layers), context),
        "built-in": lambda: built_in_step(case, context, token),
        "built-in, no cache": lambda: whole_context(built_in_model(case.length, case.layers), context),
        "full": lambda: full_step(case, context, token),
    }
    with torch.no_grad():
        call = makers[rival]()
    return Run(torch.no_grad()(call), note="no cache" if rival in ("ours", "built-in, no cache") else "cache")


def whole_context(model: Any, context: torch.Tensor) -> Callable[[], Any]:
    model.eval()
    return lambda: model(input_ids=context, logits_to_keep=1).logits[:, -1]


def built_in_step(case: Case, context: torch.Tensor, token: torch.Tensor) -> Callable[[], Any]:
    """The built-in Reformer's step with its cache of buckets and states."""
    model: Any = built_in_model(2 * case.length, case.layers).eval()
    filled = model(input_ids=context, use_cache=True).past_buckets_states

    def call() -> Any:
        cache = ReformerDynamicCache()  # tensors are shared with the filled one, which thus stays as it is
        cache.buckets_cache, cache.states_cache = list(filled.buckets_cache), list(filled.states_cache)
        cache._seen_tokens = filled._seen_tokens
        return model(input_ids=token, past_buckets_states=cache, use_cache=True).logits

    return call


def full_step(case: Case, context: torch.Tensor, token: torch.Tensor) -> Callable[[], Any]:
    model = FullModel(case.length + 1, case.layers).eval()
    cache = model.next_logits(context)[1]
    return lambda: model.next_logits(token, cache)[0]
