"""Files that nobody would write: a config.json of odd fields, and Trax's pickles with bytes exchanged."""

import gzip
import json
import pickle
import pickletools
import resource
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from conftest import TINY, make_ids
from fuzzing import seeds
from huggingface_hub.errors import StrictDataclassError
from test_convert import TRAX_FIELDS, History, flat, make_builtin, to_trax
from test_files_of_others import BAD_ARRAYS, BAD_TREES
from transformers import AutoConfig

from hf_reformer import ReformerConfig, ReformerForCausalLM, ReformerForMaskedLM
from hf_reformer.hub.convert.trax import from_trax, read_pickle

SECONDS = 30  # for one input; most take milliseconds
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    8,
    64,
    2**15,
    10**6,
    2**24,
    10**9,
    2**31 - 1,
    2**31,
    2**32 + 1,
    2**40,
    2**63,
    10**30,
    10**400,
]
NUMBERS += [0.0, 0.5, 1.0, -0.5, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")]
WORDS = ["", "lsh", "local", "full", "window", "chunk", "axial", "learned", "rotary", "float32", "relu", "../x", "#\n"]


@pytest.fixture
def little_memory():
    """So that a test fails that would fill the memory."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def odd_value(random, depth=0):
    kind = random.randrange(8)
    if kind == 0:
        return random.choice(WORDS)
    if kind == 1:
        return random.choice([None, True, False])
    if kind == 2 and depth < 2:
        return [odd_value(random, depth + 1) for _ in range(random.choice([0, 1, 2, 3, 100]))]
    if kind == 3 and depth < 2:
        return {str(odd_value(random, 2)): odd_value(random, depth + 1) for _ in range(random.randrange(4))}
    return random.choice(NUMBERS)


def close_value(random, value):
    """One that may be right."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice([value + 1, 2 * value, value // 2, random.randrange(1, 300)])
    if isinstance(value, (tuple, list)):
        return random.choice([list(value)[::-1], [*value, *value], list(value)[:1]])
    return random.choice(WORDS) if isinstance(value, str) else random.choice([None, 1, 0.1, 2, [2, 4]])


@pytest.mark.slow
def test_fuzz_config(tmp_path, little_memory):
    """A config is refused in words, or its model computes finite numbers."""
    fields = ReformerConfig(**TINY).to_dict()
    accepted = 0
    for seed in seeds():
        random = Random(seed)
        odd = dict(TINY)
        for name in random.sample(sorted(fields), random.randrange(1, 5)):
            odd[name] = odd_value(random) if random.random() < 0.5 else close_value(random, fields[name])
        (tmp_path / "config.json").write_text(json.dumps({**odd, "model_type": "hf_reformer"}))
        begin = time.monotonic()
        try:
            config = AutoConfig.from_pretrained(tmp_path)
        except (StrictDataclassError, ValueError):
            continue
        finally:
            assert time.monotonic() - begin < SECONDS, (seed, odd)
        cls = ReformerForMaskedLM if random.random() < 0.5 else ReformerForCausalLM
        try:
            with torch.device("meta"):
                large = len(config.attn_layers) > 8 or cls(config).num_parameters() > 10**7
            if large or config.vocab_size < 5:
                continue
            ids = make_ids(2, 20, vocab=config.vocab_size)
            with torch.no_grad():
                logits = cls(config).float().eval()(ids, return_dict=True).logits
        except (ValueError, StrictDataclassError):
            continue
        assert logits.isfinite().all(), (seed, odd)
        assert time.monotonic() - begin < SECONDS, (seed, odd)
        accepted += 1
    assert accepted


def mutated(random, data, others):
    """Bytes exchanged, left out, doubled, or taken from another pickle."""
    data = bytearray(data)
    for _ in range(random.randrange(1, 8)):
        start = random.randrange(len(data) + 1)
        end = min(len(data), start + random.choice([0, 1, 2, 4, 30]))
        other = random.choice(others)
        place = random.randrange(len(other))
        opcode = random.choice(pickletools.opcodes).code.encode("latin1")
        data[start:end] = random.choice(
            [b"", bytes([random.randrange(256)]), opcode, data[start:end] * 2, other[place : place + 40],
             opcode + random.randbytes(random.choice([1, 2, 4, 8]))]
        )  # fmt: skip
    return bytes(data)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_fuzz_pickle(tmp_path, little_memory):
    """A pickle is read or refused in words, and changes nothing."""
    tree = to_trax(make_builtin("ReformerModelWithLMHead", num_buckets=8), chunked=True)
    small = {"weights": [np.arange(6.0), np.float32(2), {"a": (1, "x", None, History())}, np.arange(4, dtype=">i2")]}
    records = [tree, {**small, "history": History()}, {"flat_weights": flat(tree["weights"])}]
    good = [pickle.dumps(record, protocol=protocol) for record in records for protocol in range(6)]
    crafted = [x for x in BAD_ARRAYS.values() if len(x) < 10**4] + [x for x, _ in BAD_TREES.values() if len(x) < 10**4]
    others = [*good, *(b"\x80\x02" + x + b"." for x in crafted)]
    before = np._core.numeric._frombuffer.__defaults__
    for seed in seeds():
        random = Random(seed)
        data = mutated(random, random.choice(others), others)
        (tmp_path / "x.pkl").write_bytes(gzip.compress(data, 1) if random.random() < 0.1 else data)
        begin = time.monotonic()
        try:
            from_trax(read_pickle(tmp_path / "x.pkl"), TRAX_FIELDS)
        except (ValueError, StrictDataclassError):
            pass
        assert time.monotonic() - begin < SECONDS, seed
    assert np._core.numeric._frombuffer.__defaults__ == before
