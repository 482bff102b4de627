"""Samples packed into a row, told apart by positions that restart at 0, don't see each other."""

import time

import pytest
import torch
from conftest import REPEATABLE, SMALL_WINDOWS, make_ids, make_model, max_abs_diff
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DataCollatorWithFlattening

from hf_reformer import ReformerForCausalLM, ReformerModel
from hf_reformer.models.input_checks import packed_samples


def positions_of(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    kind=st.sampled_from(["local", "lsh", "full"]),
    backend=st.sampled_from(["auto", "torch", "reference"]),
    causal=st.booleans(),
    training=st.booleans(),
    padded=st.integers(0, 3),
)
@settings(max_examples=60)
def test_a_packed_sample_equals_the_sample_alone(lengths, kind, backend, causal, training, padded):
    """In training too: exploration orders count positions from the sample's beginning."""
    config = {"attn_layers": [kind] * 2, "attention_backend": backend, "is_decoder": causal}
    model = make_model(ReformerModel, **config, **SMALL_WINDOWS, **REPEATABLE).train(training)
    ids, end = make_ids(1, sum(lengths) + padded), sum(lengths)
    mask = torch.arange(ids.shape[1])[None] < end if padded else None
    positions = torch.nn.functional.pad(positions_of(lengths), (0, padded))
    packed = model(ids, mask, positions).last_hidden_state[:, :end].split(lengths, dim=1)
    for sample, found in zip(ids[:, :end].split(lengths, dim=1), packed, strict=True):
        assert max_abs_diff(found, model(sample).last_hidden_state) <= 1e-10


@pytest.mark.parametrize("backend", ["auto", "torch"])
@torch.no_grad()
def test_many_samples_with_many_buckets(backend):
    """More buckets than int32 counts, of all samples together, and nearly all of them empty."""
    options = {**SMALL_WINDOWS, "num_buckets": (512, 1024), "attn_layers": ["lsh"], "attention_backend": backend}
    model = make_model(ReformerModel, dtype=torch.float32, position_embedding_type="rotary", **options)
    assert 512 * 1024 * 5000 > 2**31
    ids, positions = make_ids(1, 15000), torch.arange(3).repeat(5000)[None]
    begin = time.process_time()
    packed = model(ids, position_ids=positions).last_hidden_state
    took = time.process_time() - begin
    begin = time.process_time()
    model(ids)
    assert took < 5 * (time.process_time() - begin) + 1  # and not the minutes that it takes to count empty buckets
    for at in (0, 7500, 14997):
        alone = model(ids[:, at : at + 3]).last_hidden_state
        assert max_abs_diff(packed[:, at : at + 3], alone) < 1e-5


def test_rows_are_packed_each_in_its_own_way():
    model = make_model(ReformerModel, **SMALL_WINDOWS)
    ids, layouts = make_ids(3, 40), [[40], [7, 33], [10, 10, 20]]
    packed = model(ids, position_ids=torch.cat([positions_of(lengths) for lengths in layouts])).last_hidden_state
    for row, lengths in enumerate(layouts):
        alone = [model(sample).last_hidden_state for sample in ids[row : row + 1].split(lengths, dim=1)]
        assert max_abs_diff(packed[row : row + 1], torch.cat(alone, dim=1)) <= 1e-10


def test_the_loss_of_a_flattened_batch_is_that_of_its_samples():
    """As transformers' collator packs them: the first token of a sample is nobody's target."""
    model = make_model(ReformerForCausalLM, **SMALL_WINDOWS)
    samples = [make_ids(length, seed=length) for length in (5, 21, 13)]
    batch = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": x.tolist()} for x in samples])
    packed = model(**batch).loss
    alone = [model(x[None], labels=x[None]).loss * (len(x) - 1) for x in samples]
    assert max_abs_diff(packed, sum(alone) / sum(len(x) - 1 for x in samples)) <= 1e-10


def test_positions_that_do_not_restart_pack_nothing():
    model = make_model(ReformerModel, **SMALL_WINDOWS)
    ids = make_ids(2, 30)
    positions = torch.arange(30).expand(2, -1)
    assert torch.equal(model(ids, position_ids=positions)[0], model(ids)[0])
    downwards = positions.flip(-1)  # any numbers may be given; these end in 0
    assert max_abs_diff(model(ids, position_ids=downwards)[0], model(ids)[0]) > 1e-3
    assert packed_samples(downwards, positions, None) is None
    mask = torch.arange(30) >= torch.tensor([[0], [9]])
    left = (mask.long().cumsum(-1) - 1).clamp(min=0)  # as generation numbers a row that is padded on the left
    assert torch.equal(model(ids, mask, left)[0], model(ids, mask)[0])


def test_chunks_refuse_packed_samples():
    model = make_model(ReformerModel, attention_mode="chunk")
    with pytest.raises(ValueError, match=r"position_ids.*restart at 0.*attention_mode='window'"):
        model(make_ids(1, 30), position_ids=positions_of([10, 20]))


def test_samples_numbered_without_positions_are_never_mixed():
    model = make_model(ReformerForCausalLM, **SMALL_WINDOWS)
    collate = DataCollatorWithFlattening(return_tensors="pt", return_position_ids=False, return_seq_idx=True)
    with pytest.raises(ValueError, match="`seq_idx` indicates packed samples"):
        model(**collate([{"input_ids": make_ids(length).tolist()} for length in (5, 21)]))
    assert model(**collate([{"input_ids": make_ids(21).tolist()}])).loss > 0


@torch.no_grad()
def test_compiled_chunks_take_positions_and_refuse_packed_samples():
    model = make_model(ReformerModel, attention_mode="chunk")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = make_ids(1, 30)
    positions = torch.arange(30)[None] + 3
    assert torch.equal(compiled(ids, position_ids=positions)[0], model(ids, position_ids=positions)[0])
    with pytest.raises(RuntimeError, match=r"position_ids.*restart at 0.*attention_mode='window'"):
        compiled(ids, position_ids=positions_of([10, 20]))
