"""Training memory: flat in depth, linear in length, and lower with every means that promises so.

Two measures. The *census* adds up the storages that live, from the moment an operation returns one until it is freed,
parameters not counted: the same numbers in every run and on every machine, so its limits can be tight. It does not
see what a kernel allocates for itself, so the *process* has a word too: the peak of its resident memory
(VmHWM, which Linux lets us reset), in a process of its own where malloc hands every freed block back to the system
(MALLOC_MMAP_THRESHOLD_; without it the peak tells of the heap's gaps as much as of tensors). The two agree to a few
percent.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory_census import Census, census_of, loss_of, make, size_of_gradients

TESTS = Path(__file__).parents[1]
CLEAR_REFS = Path("/proc/self/clear_refs")
MIB = 2**20


def peak_of(*args, length=4096, **kwargs):
    return census_of(make(*args, **kwargs), length)[1]


def test_the_census_counts_what_lives():
    with Census() as census:
        x = torch.zeros(1000)
        views = [x[:10], x.view(10, 100)]
        assert census.now == 4000
        y = x + 1
        del x, views
        assert (census.now, census.peak) == (4000, 8000)
        del y
        assert (census.now, census.peak) == (0, 8000)


def test_the_peak_is_flat_in_depth():
    shallow, deep = make(6), make(24)
    limit = 1.02 * census_of(shallow, 4096)[1] + size_of_gradients(deep) - size_of_gradients(shallow)
    assert census_of(deep, 4096)[1] <= limit


@pytest.mark.slow
def test_the_peak_is_flat_in_depth_up_to_48_layers():
    shallow, deep = make(6), make(48)
    limit = 1.02 * census_of(shallow, 4096)[1] + size_of_gradients(deep) - size_of_gradients(shallow)
    assert census_of(deep, 4096)[1] <= limit


def test_a_forward_keeps_no_activation_of_any_layer():
    """What one more layer keeps until backward is less than a hundredth of one stream."""
    stream = 4096 * 32 * 8
    shallow, deep = (census_of(make(depth), 4096)[0] for depth in (2, 12))
    assert (deep - shallow) / 10 < stream / 100
    plain = [census_of(make(depth, "plain"), 4096)[0] for depth in (2, 4)]
    assert (plain[1] - plain[0]) / 2 > 4 * stream  # so the measure would see it


def test_the_peak_is_linear_in_length():
    peaks = [peak_of(2, length=length) for length in (4096, 32768)]
    assert peaks[1] <= 8.2 * peaks[0]


def test_reversible_needs_less_than_checkpointed_and_checkpointed_less_than_plain():
    reversible, checkpointed, plain = (peak_of(8, path) for path in ("reversible", "checkpointed", "plain"))
    assert reversible <= checkpointed < plain / 1.5


def test_streams_in_float32_need_less():
    assert peak_of(2, residual_precision="float32") < peak_of(2) - 4 * 4096 * 32 * 4


@pytest.mark.parametrize("path", ["reversible", "checkpointed", "plain"])
def test_chunks_of_the_feed_forward_lower_the_peak(path):
    """One activation of the wide feed-forward is 16 MiB, that of a chunk a sixteenth."""
    whole, chunked = (peak_of(2, path, feed_forward_size=1024, chunk_size_feed_forward=size) for size in (4096, 256))
    assert chunked < whole - 2 * 16 * MIB


def test_the_automatic_chunk_lowers_the_peak(monkeypatch):
    monkeypatch.setattr("hf_reformer.reversible.chunking.CHUNK_ELEMENTS", 1024 * 32)  # hidden size 32
    whole, automatic = (peak_of(2, feed_forward_size=1024, chunk_size_feed_forward=size) for size in (4096, 0))
    assert automatic < whole - 2 * 12 * MIB


def test_logits_never_exist_as_a_whole():
    """Of 64 MiB of logits, the loss holds a few million at a time; a smaller chunk, fewer."""
    vocabulary, length = 2**14, 2**10
    model = make(2, vocab_size=vocabulary)
    rest = 2 * size_of_gradients(model)
    automatic, small = (
        peak_of(2, vocab_size=vocabulary, length=length, chunk_size_lm_head=size) for size in (0, length // 16)
    )
    assert small < automatic
    assert small < vocabulary * length * 4 + rest


# --- the process


def status(field):
    """Bytes, from the kernel's account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def resident_peak_of(model, length):
    gc.collect()
    before = status("VmRSS")
    CLEAR_REFS.write_text("5")  # VmHWM starts anew
    loss_of(model, length).backward()
    return status("VmHWM") - before


def in_a_process(*runs):
    """Resident peaks of runs (depth, path, length) in a fresh process, and the sizes of their gradients."""
    if not CLEAR_REFS.exists():
        pytest.skip("needs Linux's /proc")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, json.dumps(runs)]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@pytest.mark.slow
def test_the_process_agrees_that_memory_is_flat_in_depth():
    (shallow, small), (deep, large), (plain, _) = in_a_process(
        (4, "reversible", 2048), (16, "reversible", 2048), (16, "plain", 2048)
    )
    assert deep <= 1.1 * shallow + large - small + 1 * MIB
    assert plain > 2 * deep


@pytest.mark.slow
def test_the_process_agrees_on_depth_length_and_order():
    runs = [(6, "reversible", 4096), (48, "reversible", 4096), (6, "reversible", 32768)]
    runs += [(6, "checkpointed", 4096), (6, "plain", 4096)]
    attempts = [in_a_process(*runs) for _ in range(3)]  # one process may find its heap laid out otherwise
    medians = [sorted(attempt)[1] for attempt in zip(*attempts, strict=True)]
    (base, small), (deep, large), (long, _), (checkpointed, _), (plain, _) = medians
    assert deep <= 1.1 * base + large - small + 1 * MIB
    assert long <= 9 * base
    assert 0.95 * base <= checkpointed < plain


if __name__ == "__main__":
    warm = make(2)
    loss_of(warm, 512).backward()
    found = []
    for depth, path, length in json.loads(sys.argv[1]):
        model = make(depth, path)
        found.append((resident_peak_of(model, length), size_of_gradients(model)))
        del model
    print(json.dumps(found))
