"""Decode steps by a CUDA graph. A tape of operations on a CPU stands in for the graph: nothing else of it is known."""

import copy
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import SMALL_WINDOWS, make_ids, make_model, max_abs_diff
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_reformer import ReformerForCausalLM
from hf_reformer.cache.cache import ReformerCache
from hf_reformer.models.recorded_step import RecordedStep

PROMPT, STEPS, ROOM = 9, 12, 40
IDS = make_ids(2, PROMPT + STEPS)
MASK = torch.ones_like(IDS)
MASK[0, :4] = 0


class Tape(TorchDispatchMode):
    """Replays operations on the tensors that they had, and leaves no trace of the recording, as a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        kwargs = kwargs or {}
        writes = [arg.alias_info is not None and arg.alias_info.is_write for arg in func._schema.arguments]
        before = [(x, x.clone()) for x, written in zip(args, writes, strict=False) if written]
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out, before))
        return out

    @contextmanager
    def recording(self):
        with self:
            yield
        for *_, before in reversed(self.calls):
            for x, old in before:
                x.copy_(old)

    def replay(self):
        self.replays += 1
        for func, args, kwargs, out, _ in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def tapes(monkeypatch):
    """The tapes that were made; and a CPU that is called a CUDA device."""
    made = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Tape()) or made[-1])
    monkeypatch.setattr(torch.cuda, "graph", lambda tape: tape.recording())
    monkeypatch.setattr(ReformerForCausalLM, "device", torch.device("cuda"))
    for name in ("cache.cache_layers", "models.input_checks", "models.modeling_reformer", "ops.dispatch", "ops.lsh"):
        monkeypatch.setattr(f"hf_reformer.{name}.may_look_at", lambda x: False)
    return made


def make(**changes):
    fields = {"attn_layers": ["local", "lsh"], "is_decoder": True, "attention_backend": "torch", **SMALL_WINDOWS}
    return make_model(ReformerForCausalLM, **{**fields, **changes})


@torch.no_grad()
def filled(model, mask=None, room=ROOM):
    kept = ReformerCache(model.config, max_cache_len=room)
    model(IDS[:, :PROMPT], attention_mask=mask, cache=kept)
    return kept


def run(step, first=PROMPT, last=PROMPT + STEPS):
    return torch.cat([step(IDS[:, at : at + 1]) for at in range(first, last)], dim=1)


@pytest.mark.parametrize(
    "changes",
    [{}, {"position_embedding_type": "axial"}, {"num_buckets": [2, 4], "lsh_centering": False}, {"lsh_rotary": 0.5}],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
def test_recorded_steps_are_those_of_the_model(tapes, changes, padded):
    model = make(**changes)
    mask = MASK if padded else torch.ones_like(IDS)
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask).logits[:, PROMPT:]
    kept = filled(model, mask[:, :PROMPT] if padded else None)
    assert max_abs_diff(run(RecordedStep(model, kept)), expected) <= 1e-10
    assert [tape.replays for tape in tapes] == [STEPS - 1]
    assert kept.get_seq_length() == PROMPT + STEPS
    with torch.no_grad():  # and the model goes on where the graph stopped
        more = model(IDS[:, :1], attention_mask=torch.cat([mask, mask[:, -1:]], 1), cache=kept).logits
        whole = model(torch.cat([IDS, IDS[:, :1]], 1), attention_mask=torch.cat([mask, mask[:, -1:]], 1)).logits
    assert max_abs_diff(more, whole[:, -1:]) <= 1e-10


def test_changed_sequences_are_recorded_anew(tapes):
    model = make()
    kept = filled(model)
    step, half = RecordedStep(model, kept), PROMPT + STEPS // 2
    run(step, last=half)
    other = copy.deepcopy(kept)
    for x in (kept, other):
        x.reorder_cache(torch.tensor([1, 1]))
    with torch.no_grad():
        expected = torch.cat([model(IDS[:, at : at + 1], cache=other).logits for at in range(half, half + 3)], dim=1)
    assert max_abs_diff(run(step, half, half + 3), expected) <= 1e-10
    assert len(tapes) == 2


def test_what_a_graph_cannot_do_is_refused(tapes, monkeypatch):
    model = make()
    step = RecordedStep(model, filled(model, room=PROMPT + 2))
    run(step, last=PROMPT + 2)
    with pytest.raises(ValueError, match=r"holds 11 tokens and has no memory .* larger `max_cache_len`"):
        step(IDS[:, :1])
    with pytest.raises(ValueError, match=r"shape \(2, 2\), and the cache holds 11 tokens of 2"):
        step(IDS[:, :2])
    with pytest.raises(ValueError, match="holds 0 tokens"):
        RecordedStep(model, ReformerCache(model.config, 20))(IDS[:, :1])
    for changes in ({"attention_mode": "chunk"}, {"attn_layers": ["local", "full"]}):
        other = make_model(ReformerForCausalLM, is_decoder=True, **changes)
        with pytest.raises(ValueError, match="tensors of fixed shapes"):
            RecordedStep(other, ReformerCache(other.config))
    monkeypatch.setattr(ReformerForCausalLM, "device", torch.device("cpu"))
    with pytest.raises(ValueError, match="the model is on cpu"):
        RecordedStep(model, filled(model))


def test_the_block_of_the_docs_runs(tapes):
    page = (Path(__file__).parents[2] / "docs" / "generation.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n((?:(?!```).)*RecordedStep.*?)```", page, flags=re.DOTALL)
    model = make()
    names = {"model": model, "prompt": IDS[:, :PROMPT], "mask": MASK[:, :PROMPT]}
    exec(compile(block.replace("500", str(STEPS)), "docs/generation.md", "exec"), names)
    assert len(tapes) == 1
    ids, mask = names["prompt"], names["mask"]
    with torch.no_grad():
        for _ in range(STEPS + 1):
            ids = torch.cat([ids, model(ids, attention_mask=mask).logits[:, -1:].argmax(-1)], dim=1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.equal(names["token"], ids[:, -1:])
