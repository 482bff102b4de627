"""What the tests share: makers of tiny configs, models and inputs, and a setting that makes numbers repeat."""

import datetime
import gc
import logging
import time
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, settings

from hf_reformer import ReformerConfig

# One thread: sums come out in one order, so numbers repeat; and workers that run in parallel do not fight for cores.
torch.set_num_threads(1)

# The same examples in every run: a failure is then a change of the code, never luck.
settings.register_profile(
    "repeatable", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), max_examples=20
)
settings.load_profile("repeatable")

transformers.utils.logging.disable_progress_bar()

VOCAB = 40
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "attention_head_size": 8,
    "feed_forward_size": 24,
    "attn_layers": ["local", "lsh"],
    "max_position_embeddings": 256,
    "local_window": 16,  # what it shows whole is not hashed
    # of signals
    "frame_size": 8,
    "frame_stride": 4,
    "patch_length": 4,
    "context_length": 18,
    "prediction_length": 6,
    "input_size": 2,
}
SMALL_WINDOWS = {"lsh_window": 6, "local_window": 6, "num_buckets": 4}  # so that they bite in a short input
needs_fullgraph = pytest.mark.skipif(torch.__version__ < "2.13", reason="whole models as one graph need torch 2.13")
# The library moves what is offloaded on a stream of CUDA if torch was built for it, be there a GPU or not.
CAN_OFFLOAD = torch.version.cuda is None or torch.cuda.is_available()
OFFLOADED = {"offloaded": {"cache_implementation": "offloaded"}} if CAN_OFFLOAD else {}
REPEATABLE = {"hidden_dropout_prob": 0.0, "resample_rotations": False}  # two forwards in training mode agree

BEGIN = time.monotonic()
RUN = 0  # tests of this process


def pytest_addoption(parser):
    """Slow tests as far as time allows."""
    told = "begin no test after so many seconds, but skip it; every day another test comes first"
    parser.addoption("--time_limit", type=float, metavar="SECONDS", help=told)


def pytest_collection_modifyitems(config, items):
    if config.getoption("time_limit") is not None and items:
        first = 37 * datetime.date.today().toordinal() % len(items)
        items[:] = items[first:] + items[:first]


def pytest_collection_finish():
    """What is imported stays, half a million objects: to look at them takes half a second of every collection."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item):
    global RUN
    limit = item.config.getoption("time_limit")
    if limit is not None and RUN and time.monotonic() - BEGIN > limit:
        pytest.skip(f"--time_limit {limit:g}: no time left")
    RUN += 1  # so one runs, however slow the start was


def tiny_config(**overrides) -> ReformerConfig:
    """A config of small widths; windows, buckets and all other rules at their defaults unless overridden."""
    return ReformerConfig(**{**TINY, **overrides})


def make_model(cls, seed: int = 0, dtype: torch.dtype = torch.float64, **overrides):
    """`cls(tiny_config(**overrides))` in evaluation mode, with weights drawn from `seed`.

    Weights are large, so that attention is far from uniform and hashing matters; biases are not zero.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(tiny_config(**{"initializer_range": 0.3, **overrides})).to(dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_ids(*shape: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    """Random token ids of the given shape, without the padding token."""
    return torch.randint(1, vocab, shape, generator=torch.Generator().manual_seed(seed))


def max_abs_diff(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference; the shapes must be equal, and nothing may be NaN."""
    assert a.shape == b.shape
    assert not a.isnan().any()
    assert not b.isnan().any()
    return 0.0 if a.numel() == 0 else (a.double() - b.double()).abs().max().item()


def relative_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative error of all gradients together."""
    assert found.keys() == expected.keys()
    error = sum((found[name] - expected[name]).double().square().sum() for name in expected)
    return float((error / sum(x.double().square().sum() for x in expected.values())).sqrt())


@pytest.fixture
def global_generator_untouched():
    """Fails a test that moves torch's default generator."""
    before = torch.get_rng_state()
    yield
    assert torch.equal(before, torch.get_rng_state())


DRAWN = set()  # names of pictures


@pytest.fixture
def undrawn(monkeypatch):
    """Of every kind of picture a process draws the first; others are empty files: drawing takes a fourth of a tiny
    run, and nobody looks at them."""
    figure = pytest.importorskip("matplotlib.figure")
    draw = figure.Figure.savefig

    def savefig(self, file, **options):
        if Path(file).name in DRAWN:
            return Path(file).touch()
        draw(self, file, **options)
        DRAWN.add(Path(file).name)

    monkeypatch.setattr(figure.Figure, "savefig", savefig)


@pytest.fixture
def captured_warnings():
    """Warnings and errors that transformers logs, and Python's warnings, from here to the end of the test."""
    found = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    logger, verbosity = logging.getLogger("transformers"), transformers.logging.get_verbosity()
    logger.addHandler(handler)
    transformers.logging.set_verbosity_warning()  # others may have said something else: benchmarks do
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, category, *_: found.append(f"{category.__name__}: {message}")
        yield found
    logger.removeHandler(handler)
    transformers.logging.set_verbosity(verbosity)
