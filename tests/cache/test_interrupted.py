"""A call with a cache that breaks off anywhere: afterwards the cache gives what it should, or refuses."""

import functools
import itertools
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_WINDOWS, make_ids, make_model, max_abs_diff
from fuzzing import seeds
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import hf_reformer
from hf_reformer import ReformerForCausalLM, ReformerForConditionalGeneration, ReformerModel
from hf_reformer.cache.cache import ReformerCache

SOURCES = str(Path(hf_reformer.__file__).parent)
IDS = make_ids(2, 40)
MASK = torch.ones(2, 40, dtype=torch.long)
MASK[0, :5] = 0


class Interruption(KeyboardInterrupt):
    pass


def interrupt(call: Callable, at: int) -> bool:
    """Run it up to the given line of this package, counted as they are run; whether there was one."""
    left = at

    def trace(frame, event, _):
        nonlocal left
        if not frame.f_code.co_filename.startswith(SOURCES):
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise Interruption
        return trace

    sys.settrace(trace)
    try:
        call()
    except Interruption:
        return True
    finally:
        sys.settrace(None)
    return False


@functools.cache
def model_of(cls, **options):
    """One for all that is broken off: what an interruption leaves behind in a model shows in the next."""
    return make_model(cls, dtype=torch.float32, **options)


def make(kind: str):
    """A model, a new cache of it, and what takes pieces of its tokens and a cache and gives the logits."""
    layers = ("local", "lsh") if kind in ("encoder-decoder", "fused", "chunk", "static") else ("local", "lsh", "full")
    mode = {"attention_mode": "chunk", "num_buckets": None} if kind == "chunk" else {"lsh_centering": True}
    options = {**SMALL_WINDOWS, "attn_layers": layers, **mode}
    mask = MASK if kind in ("padded", "pieces") else None
    if kind == "torch":
        options["attention_backend"] = "torch"
    if kind == "backbone":
        model = model_of(ReformerModel, is_decoder=True, **options)
        return (
            model,
            ReformerCache(model.config),
            lambda ids, cache, seen: model(ids, past_key_values=cache, use_cache=True).last_hidden_state,
        )
    if kind == "encoder-decoder":
        model = model_of(ReformerForConditionalGeneration, is_encoder_decoder=True, **options)
        source = make_ids(2, 20, seed=1)
        states = model.model(source)
        return (
            model,
            EncoderDecoderCache(DynamicCache(), DynamicCache()),
            lambda ids, cache, seen: (
                model(encoder_outputs=states, decoder_input_ids=ids, past_key_values=cache, use_cache=True).logits
            ),
        )
    model = model_of(ReformerForCausalLM, **options)
    caches = {"static": lambda: StaticCache(model.config, max_cache_len=40), "empty": DynamicCache}
    cache = caches.get(kind, lambda: ReformerCache(model.config))()

    def run(ids, cache, seen):
        part = None if mask is None else mask[:, : seen + ids.shape[1]]
        return model(ids, attention_mask=part, past_key_values=cache, use_cache=True).logits

    return model, cache, run


KINDS = ["mixed", "fused", "torch", "padded", "pieces", "chunk", "static", "empty", "backbone", "encoder-decoder"]
STEPS = [12, 1, 1, 1, 1]
PIECES = {"pieces": [12, 10, 1, 9, 1]}


def goes_on_rightly(run, cache, pieces, expected, seen: int) -> bool:
    """Whether the cache goes on behind `seen` tokens, and then it has to be right; or it refuses."""
    for length in pieces:
        try:
            logits = run(IDS[:, seen : seen + length], cache, seen)
        except ValueError as error:
            if "interrupted" not in str(error):
                raise
            return False
        assert max_abs_diff(logits, expected[:, seen : seen + length]) < 1e-4
        seen += length
    return True


@functools.cache
@torch.no_grad()
def expected_logits(kind: str) -> torch.Tensor:
    _, cache, run = make(kind)
    ends = list(itertools.accumulate(PIECES.get(kind, STEPS), initial=0))
    return torch.cat([run(IDS[:, begin:end], cache, begin) for begin, end in itertools.pairwise(ends)], dim=1)


@torch.no_grad()
def check_broken_step(kind: str, broken: int, break_off: Callable[[Any, Callable], bool]) -> bool:
    """Break one step off, then run the same step again, and others; whether the cache went on.

    break_off: runs a step of the model, and says whether it broke off.
    """
    (model, cache, run), pieces = make(kind), PIECES.get(kind, STEPS)
    expected, seen = expected_logits(kind), sum(pieces[:broken])
    assert goes_on_rightly(run, cache, pieces[:broken], expected, 0)
    if not break_off(model, lambda: run(IDS[:, seen : seen + pieces[broken]], cache, seen)):
        seen, broken = seen + pieces[broken], broken + 1
    return goes_on_rightly(run, cache, pieces[broken:], expected, seen)


def check_interrupted_step(kind: str, seed: int) -> bool:
    draw = random.Random(seed)
    line = int(lines_of_a_step(kind) * draw.random() ** draw.choice([0.2, 1]))  # tokens are written late
    return check_broken_step(kind, draw.randrange(len(STEPS)), lambda _, call: interrupt(call, line))


@functools.cache
@torch.no_grad()
def lines_of_a_step(kind: str) -> int:
    _, cache, run = make(kind)
    run(IDS[:, :12], cache, 0)
    lines = 0

    def count(frame, event, _):
        nonlocal lines
        lines += event == "line"
        return count if frame.f_code.co_filename.startswith(SOURCES) else None

    sys.settrace(count)
    run(IDS[:, 12:13], cache, 12)
    sys.settrace(None)
    return lines


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_interrupted_anywhere_is_no_step(kind):
    went_on = [check_interrupted_step(kind, seed) for seed in range(12)]
    assert 0 < sum(went_on) < len(went_on)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["mixed", "fused", pytest.param("encoder-decoder", marks=pytest.mark.slow)])
def test_an_error_in_a_hook_of_any_module(kind, when):
    def fail(*_):
        raise OSError("of a hook")

    def break_off(model, call):
        module = model.get_submodule(name)
        register = module.register_forward_pre_hook if when == "before" else module.register_forward_hook
        with register(fail):
            try:
                call()
            except OSError:
                return True
        return False  # this module is not called

    for name, _ in make(kind)[0].named_modules():
        if name:
            check_broken_step(kind, len(name) % len(STEPS), break_off)


@pytest.mark.parametrize("change", ["crop", "reorder", "repeat", "record", "reset"])
@torch.no_grad()
def test_a_change_of_the_cache_that_is_interrupted_anywhere(change):
    model, _, run = make("mixed")
    make_change = {
        "crop": lambda cache: cache.crop(-1),
        "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        "repeat": lambda cache: (cache.batch_repeat_interleave(2), cache.batch_select_indices(torch.tensor([2, 3]))),
        "record": lambda cache: cache.activate_past_recording(),
        "reset": lambda cache: cache.reset(),
    }[change]
    for at in [*range(30), *range(30, 300, 7)]:
        cache = ReformerCache(model.config)
        run(IDS[:, :10], cache, 0)
        interrupt(lambda cache=cache: make_change(cache), at)
        seen = cache.get_seq_length()
        ids = torch.cat([IDS[:, :seen], IDS[[1, 1], seen : seen + 3]], dim=1)  # both rows may be the last
        try:
            logits = run(ids[:, seen:], cache, 0)
        except ValueError as error:
            if not any(reason in str(error) for reason in ("interrupted", "sequences")):
                raise
            continue
        expected = [model(x).logits[:, seen:] for x in (ids, ids[[1, 1]])]
        assert min(max_abs_diff(logits, x) for x in expected) < 1e-4, at


@torch.no_grad()
def test_a_cache_that_refuses_can_be_emptied():
    model, cache, run = make("mixed")
    expected = run(IDS, ReformerCache(model.config), 0)
    run(IDS[:, :10], cache, 0)
    handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(IDS[:, 10:11], cache, 10)
    handle.remove()
    with pytest.raises(ValueError, match="was interrupted"):
        run(IDS[:, 10:11], cache, 10)
    cache.reset()
    assert max_abs_diff(run(IDS, cache, 0), expected) < 1e-5


@torch.no_grad()
def test_input_that_is_refused_leaves_the_cache_as_it_was():
    model, cache, run = make("mixed")
    run(IDS[:, :10], cache, 0)
    with pytest.raises(ValueError, match="attention_mask"):
        model(IDS[:, 10:11], attention_mask=torch.ones(2, 3), past_key_values=cache)
    assert max_abs_diff(run(IDS[:, 10:11], cache, 10), model(IDS[:, :11]).logits[:, 10:]) < 1e-5


@pytest.mark.slow
def test_fuzz_interrupted_steps():
    for seed in seeds():
        kind = KINDS[seed % len(KINDS)]
        try:
            check_interrupted_step(kind, seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}, {kind}: {error}") from error


def test_an_error_of_a_hook_on_the_model_itself_comes_after_a_whole_step():
    model = make_model(ReformerForCausalLM, attn_layers=["local", "lsh"], is_decoder=True, **SMALL_WINDOWS)
    ids, cache = make_ids(2, 30), ReformerCache(model.config)

    def fail(*_):
        raise RuntimeError("of the hook")

    with torch.no_grad():
        handle = model.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="of the hook"):
            model(ids[:, :20], past_key_values=cache, use_cache=True)
        handle.remove()
        found = model(ids[:, 20:], past_key_values=cache, use_cache=True).logits
        assert max_abs_diff(found, model(ids).logits[:, 20:]) < 1e-10
