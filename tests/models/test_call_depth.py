"""How far a hidden state travels from a model to the compiled kernel: few frames, in few files."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import make_ids, make_model

import hf_reformer
from hf_reformer import ReformerForCausalLM
from hf_reformer.ops.dispatch import unsupported_reason
from reformer_kernels.cpu import bindings

SOURCES = Path(hf_reformer.__file__).parents[1]
MAX_FRAMES, MAX_FILES = 11, 8


class Spy:
    """A compiled library that notes the frames of this repository at every call of the attention kernel."""

    def __init__(self, library):
        self.library, self.stacks = library, []

    def __getattr__(self, name):
        return getattr(self.library, name)

    def hf_forward(self, params):
        frame, stack = sys._getframe(1), []
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(SOURCES):
                stack.append((path.name, frame.f_code.co_name))
            frame = frame.f_back
        self.stacks.append(stack[::-1])
        return self.library.hf_forward(params)


@pytest.mark.skipif(unsupported_reason("cpu") is not None, reason="there is no compiled kernel")
@pytest.mark.parametrize("kind", ["local", "lsh"])
def test_frames_from_the_model_to_the_kernel_in_training(kind, monkeypatch):
    assert unsupported_reason("cpu") is None  # the library is checked before it is watched
    spy = Spy(bindings.current_library())
    monkeypatch.setattr(bindings, "current_library", lambda: spy)
    model = make_model(ReformerForCausalLM, dtype=torch.float32, attn_layers=[kind], attention_backend="cpu").train()
    ids = make_ids(2, 40)
    loss = model(ids, labels=ids).loss
    (stack,) = spy.stacks
    assert stack[0] == ("language_models.py", "forward")
    assert len(stack) <= MAX_FRAMES, stack
    assert len({file for file, _ in stack}) <= MAX_FILES, stack
    loss.backward()  # through the same parts, run again
    assert len(spy.stacks) == 2
