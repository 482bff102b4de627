"""`estimate_memory` against what a process takes, and against a census of a real step."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_ids
from head_cases import SIGNALS
from memory_census import Census

import hf_reformer
from hf_reformer import ReformerConfig, estimate_memory
from hf_reformer.analysis.memory import MODELS, MemoryEstimate, format_memory
from hf_reformer.hub.registration import AUTO_CLASSES

CLEAR_REFS = Path("/proc/self/clear_refs")
SIZES = {"vocab_size": 258, "hidden_size": 128, "num_attention_heads": 2, "feed_forward_size": 256}
SIZES |= {"attn_layers": ["local", "lsh"], "max_position_embeddings": 2**16}
CAUSAL = {**SIZES, "is_decoder": True}
# config, batch size, length, options
TABLE = [
    (CAUSAL, 1, 4096, {}),
    ({**CAUSAL, "attn_layers": ["local", "lsh"] * 2}, 4, 2048, {"training": False}),
    ({**CAUSAL, "reversible": False}, 2, 1024, {}),
    ({**SIZES, "vocab_size": 20000}, 1, 256, {}),  # weights, gradients and the optimizer's states
    ({**SIZES, "attn_layers": ["full", "lsh"], "residual_precision": "float32"}, 1, 4096, {}),
    ({**CAUSAL, "attn_layers": ["full", "lsh"] * 2}, 1, 4096, {"training": False, "use_cache": True}),
]


def process_status(field):
    """Bytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def step(model, ids, optimizer, use_cache=False):
    if optimizer is None:
        with torch.no_grad():
            return model(ids, use_cache=use_cache, logits_to_keep=1) if use_cache else model(ids)
    optimizer.zero_grad()
    model(ids, labels=ids).loss.backward()
    optimizer.step()


def measured_peak(fields, batch, length, options):
    """Peak of resident memory above what there was before the model was made."""
    options = {"training": True, **options}
    gc.collect()
    before = process_status("VmRSS")
    CLEAR_REFS.write_text("5")  # VmHWM starts anew
    config = ReformerConfig(**fields)
    model_class = hf_reformer.ReformerForCausalLM if config.is_decoder else hf_reformer.ReformerForMaskedLM
    model = model_class(config).train(options["training"])
    optimizer = torch.optim.AdamW(model.parameters()) if options["training"] else None
    for _ in range(2):
        step(model, make_ids(batch, length), optimizer, options.get("use_cache", False))
    return process_status("VmHWM") - before


@pytest.mark.parametrize("rows", [(0, 3), pytest.param((1, 2, 4, 5), marks=pytest.mark.slow)], ids=["some", "others"])
def test_the_estimate_is_within_a_fifth_of_what_a_process_takes(rows):
    if not CLEAR_REFS.exists():
        pytest.skip("needs Linux's /proc")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}  # freed is given back
    command = [sys.executable, __file__, *map(str, rows)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    for row, measured in zip(rows, json.loads(done.stdout), strict=True):
        fields, batch, length, options = TABLE[row]
        estimate = estimate_memory(ReformerConfig(**fields), batch, length, **options)
        told = f"{fields}, {batch} x {length}, {options}: measured {measured / 2**20:.1f} MiB\n{estimate}\n"
        print(told)
        assert 0.8 * measured < estimate.total < 1.2 * measured, told


FAST = ("ReformerForCausalLM", "ReformerForConditionalGeneration", "ReformerForSequenceClassification")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in MODELS]
)
def test_every_head_trains_in_what_is_estimated(name, global_generator_untouched):
    """The storages of a real step, counted."""
    fields = {**SIZES, "is_encoder_decoder": "Conditional" in name, "num_labels": 3, "hidden_dropout_prob": 0.1}
    config = ReformerConfig(**fields)
    estimate = estimate_memory(config, 2, 300, model_class=MODELS[name])
    with torch.random.fork_rng(devices=[]):
        model = MODELS[name](config).train()
        ids = make_ids(2, 2, 300) if "Choice" in name else make_ids(2, 300)
        labels = {"labels": torch.tensor([1, 0])}
        if "Question" in name:
            labels = {"start_positions": torch.tensor([1, 0]), "end_positions": torch.tensor([5, 0])}
        elif "LM" in name or "Conditional" in name:
            labels = {"labels": ids}
        elif "Token" in name:
            labels = {"labels": ids % 3}
        elif name == "ReformerModel":
            labels = {}
        more = {"decoder_input_ids": ids} if "Conditional" in name else {}
        with Census(*model.parameters()) as census:
            out = model(ids, **labels, **more)
            loss = out.last_hidden_state.sum() if name == "ReformerModel" else out.loss
            del out
            loss.backward()
    counted = estimate.total - estimate.weights - estimate.optimizer
    at_update = 2 * max(x.numel() for x in model.parameters()) * 4 if estimate.moment == "update" else 0
    assert 0.98 * census.peak < counted - at_update < 1.02 * census.peak or estimate.moment == "update"
    assert estimate.weights == sum(x.numel() * 4 for x in model.parameters())
    assert estimate.optimizer - at_update == 2 * sum(x.numel() * 4 for x in model.parameters() if x.grad is not None)


def test_every_head_that_reads_tokens_is_known():
    assert set(MODELS.values()) == set(AUTO_CLASSES.values()) - set(SIGNALS)


@pytest.mark.slow
def test_a_long_sequence_is_extrapolated(monkeypatch):
    for module in ("models.losses.MAX_LOGITS", "reversible.chunking.CHUNK_ELEMENTS"):
        monkeypatch.setattr(f"hf_reformer.{module}", 2**16)
    config = ReformerConfig(**CAUSAL)
    whole = estimate_memory(config, 1, 3000)
    for name in ("MAX_LOGITS", "CHUNK_ELEMENTS"):
        monkeypatch.setattr(f"hf_reformer.analysis.memory.{name}", 2**16)
    extrapolated = estimate_memory(config, 1, 3000)  # from 1024 and 2048
    assert extrapolated != whole
    assert extrapolated.total == pytest.approx(whole.total, rel=0.02)


def test_memory_is_flat_in_depth_and_half_precision_needs_less():
    shallow, deep = (ReformerConfig(**{**CAUSAL, "attn_layers": ["local", "lsh"] * n}) for n in (1, 3))
    first, second = estimate_memory(shallow, 1, 4096), estimate_memory(deep, 1, 4096)
    assert second.kept + second.layers < 1.02 * (first.kept + first.layers)


def test_options_of_the_estimate():
    config = ReformerConfig(**CAUSAL)
    estimate, half, amp, sgd = (
        estimate_memory(config, 1, 512, **options)
        for options in ({}, {"dtype": torch.bfloat16}, {"autocast": torch.bfloat16}, {"optimizer_states": 0})
    )
    assert half.weights == estimate.weights / 2
    assert half.total < estimate.total
    assert (amp.weights, amp.optimizer) == (estimate.weights, estimate.optimizer)
    assert amp != estimate
    assert sgd.optimizer == 0 < estimate.optimizer


def test_the_class_is_the_one_that_the_config_names():
    saved = ReformerConfig(**SIZES, architectures=["ReformerForSequenceClassification"])
    assert estimate_memory(saved, 1, 512).total < estimate_memory(ReformerConfig(**SIZES), 1, 512).total


@pytest.mark.parametrize(
    ("fields", "sizes", "options", "told"),
    [
        ({}, (0, 128), {}, "at least 1"),
        ({"position_embedding_type": "learned", "max_position_embeddings": 256}, (1, 257), {}, "cover 256 tokens"),
        ({"is_decoder": True}, (1, 128), {"use_cache": True}, "training=False"),
        ({}, (1, 128), {"use_cache": True, "training": False}, "causal models"),
        ({"architectures": ["ReformerForCTC"]}, (1, 128), {}, "not for ReformerForCTC"),
    ],
)
def test_sizes_that_cannot_be_are_refused(fields, sizes, options, told):
    with pytest.raises(ValueError, match=told):
        estimate_memory(ReformerConfig(**{**SIZES, **fields}), *sizes, **options)


def test_the_table_shows_parts_that_there_are():
    estimates = {"512": MemoryEstimate(2**20, layers=2**21, moment="forward"), "1024": MemoryEstimate(2**20)}
    lines = [line.split() for line in format_memory(estimates).splitlines()]
    assert lines[:4] == [
        ["MiB", "512", "1024"],
        ["weights", "1.0", "1.0"],
        ["layers", "2.0", "0.0"],
        ["total", "3.0", "1.0"],
    ]


if __name__ == "__main__":
    torch.manual_seed(0)
    warm = {**CAUSAL, "attn_layers": ["full", "local", "lsh"]}
    measured_peak(warm, 1, 512, {})
    measured_peak(warm, 1, 512, {"training": False, "use_cache": True})
    print(json.dumps([measured_peak(*TABLE[int(row)]) for row in sys.argv[1:]]))
