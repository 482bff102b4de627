"""The adapter for the Time-Series-Library does what the library expects of a model."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FILE = Path(__file__).parents[1] / "examples" / "time_series_library" / "Reformer.py"
ARGUMENTS = {  # as the library's run.py has them
    "task_name": "long_term_forecast", "seq_len": 48, "label_len": 24, "pred_len": 12, "enc_in": 3, "dec_in": 3,
    "c_out": 3, "d_model": 32, "n_heads": 2, "e_layers": 2, "d_ff": 64, "dropout": 0.0, "activation": "gelu",
    "embed": "timeF", "freq": "h", "use_norm": 1, "patch_len": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def adapter():
    spec = importlib.util.spec_from_file_location("adapter", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(adapter, **changed):
    torch.manual_seed(0)
    return adapter.Model(SimpleNamespace(**ARGUMENTS | changed)).float()


def batch(rows=16, marks=4, generator=None):
    """Windows of daily waves, as the library cuts and calls them: the decoder's input ends with zeros."""
    start = torch.randint(0, 24, (rows, 1, 1), generator=generator)
    steps = start + torch.arange(60)[None, :, None]
    values = torch.sin(2 * torch.pi * (steps + torch.tensor([0.0, 5.0, 9.0])) / 24) + 3
    calendar = (steps % 24 / 23 - 0.5).expand(-1, -1, marks)
    decoder = torch.cat([values[:, 24:48], torch.zeros(rows, 12, 3)], dim=1)
    return (values[:, :48], calendar[:, :48], decoder, calendar[:, 24:]), values[:, 48:]


def test_it_learns_in_the_loop_of_the_library(adapter):
    model, generator = make(adapter), torch.Generator().manual_seed(0)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=3e-3), []
    for _ in range(40):
        inputs, future = batch(generator=generator)
        outputs = model(*inputs)
        assert outputs.shape == future.shape
        loss = torch.nn.functional.mse_loss(outputs, future)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < 0.1 * losses[0]


def test_calendar_features_and_each_series_count(adapter):
    model = make(adapter).eval()
    inputs, _ = batch()
    with torch.no_grad():
        for p in model.parameters():  # a new model forecasts the mean of the past
            p.add_(torch.randn_like(p), alpha=0.05)
        outputs = model(*inputs)
        assert not torch.allclose(outputs, model(inputs[0], inputs[1], inputs[2], -inputs[3]))
        changed = inputs[0].clone()
        changed[..., 0] += torch.linspace(0, 1, 48)
        moved = (model(changed, *inputs[1:]) - outputs).abs().amax((0, 1))
    assert moved[0] > 0.01
    assert moved[1:].max() == 0  # every series by itself


@pytest.mark.parametrize(
    "changed",
    [
        {"task_name": "short_term_forecast", "enc_in": 1, "pred_len": 6, "seq_len": 12},  # M4, without a calendar
        {"embed": "fixed"},
        {"use_norm": 0, "e_layers": 3, "freq": "15min"},
    ],
)
def test_other_settings_of_the_library(adapter, changed):
    model = make(adapter, **changed)
    config = model.model.config
    (values, *_), _ = batch()
    values = values[:, -config.context_length :, : config.input_size]
    outputs = model(values, None, None, None)
    assert outputs.shape == (16, config.prediction_length, config.input_size)
    assert len(config.attn_layers) == changed.get("e_layers", 2)
    shifted = model(values + 10, None, None, None)
    assert torch.allclose(shifted, outputs + 10, atol=1e-3) == (changed.get("use_norm") != 0)


def test_what_is_no_forecast_is_refused(adapter):
    with pytest.raises(ValueError, match="imputation"):
        make(adapter, task_name="imputation")
