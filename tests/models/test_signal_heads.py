"""Heads of signals: speech, pictures, time series. What every head has in common is in test_heads.py."""

import itertools

import pytest
import torch
from conftest import SMALL_WINDOWS, make_model, max_abs_diff, tiny_config
from head_cases import FUTURE, HEADS, PAST, SIGNALS, WAVES, inputs_of, make_head
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F

from hf_reformer import (
    ReformerForAudioClassification,
    ReformerForCTC,
    ReformerForImageClassification,
    ReformerForTimeSeriesPrediction,
)

hearing = pytest.mark.parametrize("cls", [ReformerForCTC, ReformerForAudioClassification], ids=lambda x: x.__name__)
signals = pytest.mark.parametrize("cls", SIGNALS, ids=lambda x: x.__name__)
LENGTHS = WAVES["attention_mask"].sum(-1).tolist()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# --- rows of a batch


@pytest.mark.parametrize(("transform", "gain"), [("linear", 0), ("spectrum", 0), ("spectrum", 9)])
@pytest.mark.parametrize("causal", [False, True])
@hearing
def test_a_recording_in_a_batch_equals_it_alone(cls, causal, transform, gain):
    model = make_head(cls, is_decoder=causal, frame_transform=transform, gain_window=gain)
    together = model(**inputs_of(cls)).logits
    for row, length in enumerate(LENGTHS):
        alone = model(WAVES["input_values"][row : row + 1, :length]).logits
        found = together[row : row + 1, : alone.shape[1]] if cls is ReformerForCTC else together[row : row + 1]
        assert max_abs_diff(found, alone) <= 1e-10


@hearing
def test_what_padding_holds_does_not_matter(cls):
    model, inputs = make_head(cls), inputs_of(cls)
    expected = model(**inputs).logits
    inputs["input_values"][inputs["attention_mask"] == 0] = torch.nan
    real = model.model.embed_tokens.mask(inputs["attention_mask"]).bool()
    found = model(**inputs).logits
    found, expected = (found[real], expected[real]) if cls is ReformerForCTC else (found, expected)
    assert torch.equal(found, expected)


@signals
def test_the_order_of_a_batch_does_not_matter(cls):
    model, inputs = make_head(cls), inputs_of(cls)
    order = [2, 0, 1]
    name = "prediction_outputs" if cls is ReformerForTimeSeriesPrediction else "logits"
    swapped = model(**{key: value[order] for key, value in inputs.items()})[name]
    assert max_abs_diff(swapped, model(**inputs)[name][order]) <= 1e-10


@hearing
def test_a_recording_may_have_any_length(cls):
    model = make_head(cls)
    for length in (1, 2, 7, 8, 9, 1000):
        logits = model(noise(1, length)).logits
        assert logits.isfinite().all()
        if cls is ReformerForCTC:
            assert logits.shape[1] == model.model.embed_tokens.count(length)
    assert model(noise(2, 0)).logits.shape == ((2, 0, 40) if cls is ReformerForCTC else (2, 3))


@pytest.mark.parametrize("transform", ["linear", "spectrum"])
def test_local_layers_hear_a_part_of_a_long_recording_as_they_hear_it_alone(transform):
    """But for what lies within their reach of its ends."""
    model = make_head(ReformerForCTC, attn_layers=["local", "local"], local_window=8, frame_transform=transform)
    stride, reach = model.config.frame_stride, 2 * 8
    long, part = noise(1, 4000 * stride), slice(2000, 2100)
    alone = model(long[:, part.start * stride : part.stop * stride]).logits
    within = model(long).logits[:, part]
    found, expected = within[:, reach:-reach], alone[:, reach : 100 - reach]
    assert max_abs_diff(found, expected) <= 1e-3  # angles of rotary positions are float32
    assert max_abs_diff(within[:, :1], alone[:, :1]) > 0.1  # before it, there is something to hear


@hearing
def test_features_in_the_place_of_samples(cls):
    model = make_head(cls, num_input_features=5)
    features = noise(2, 30, 5).double()
    found = model(input_features=features).logits
    assert found.shape[0] == 2
    with pytest.raises(ValueError, match="num_input_features=5"):
        model(noise(2, 30))


@pytest.mark.parametrize("values", [torch.int16, torch.float64, torch.float16])
def test_samples_of_any_dtype(values):
    model = make_head(ReformerForCTC)
    samples = (noise(1, 30) * 100).round()
    assert max_abs_diff(model(samples.to(values)).logits, model(samples).logits) == 0


# --- connectionist temporal classification


def every_alignment(frames: int, target: list[int], symbols: list[int], blank: int):
    """All sequences of a symbol a frame that collapse to the target."""
    for path in itertools.product(symbols, repeat=frames):
        collapsed = [symbol for symbol, _ in itertools.groupby(path)]
        if [symbol for symbol in collapsed if symbol != blank] == target:
            yield path


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_ctc_loss_is_that_of_all_alignments(reduction):
    model = make_head(ReformerForCTC, vocab_size=4, ctc_loss_reduction=reduction, pad_token_id=2)
    waves, mask = noise(2, 24).double(), torch.ones(2, 24, dtype=torch.long)
    mask[1, 12:] = 0
    targets = [[1, 1, 3], [3]]
    out = model(waves, mask, torch.tensor([[1, -100, 1, 3], [-100, 3, -100, -100]]))
    losses = []
    for logits, target, frames in zip(out.logits, targets, [5, 2], strict=True):
        scores = logits.log_softmax(-1)
        paths = [torch.stack([scores[t, s] for t, s in enumerate(path)]).sum()
                 for path in every_alignment(frames, target, [0, 1, 2, 3], blank=2)]  # fmt: skip
        losses.append(-torch.stack(paths).logsumexp(0) / (len(target) if reduction == "mean" else 1))
    expected = torch.stack(losses).mean() if reduction == "mean" else torch.stack(losses).sum()
    assert max_abs_diff(out.loss, expected) <= 1e-9


def test_a_transcript_longer_than_its_recording():
    inputs = {"input_values": noise(1, 8), "labels": torch.tensor([[3, 4, 5]])}
    assert make_head(ReformerForCTC)(**inputs).loss == torch.inf
    assert make_head(ReformerForCTC, ctc_zero_infinity=True)(**inputs).loss == 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[3, 0]], "labels hold 0, the blank"),
        ([[3, 40]], "labels reach from 3 to 40"),
        ([[3.0, 1.0]], "dtype"),
        ([3, 1], "must be .batch of 1, length"),
        ([[3], [1]], "must be .batch of 1, length"),
    ],
)
def test_labels_that_are_no_transcripts(labels, message):
    with pytest.raises(ValueError, match=message):
        make_head(ReformerForCTC)(noise(1, 30), labels=torch.tensor(labels))


def test_a_model_without_a_blank_has_no_ctc_loss():
    with pytest.raises(ValueError, match=r"pad_token_id=None.*blank"):
        make_head(ReformerForCTC, pad_token_id=None)(noise(1, 30), labels=torch.tensor([[3]]))


# --- what is refused

BAD_WAVES = [
    ({}, "exactly one of `input_values`"),
    ({"input_values": noise(1, 9), "input_features": noise(1, 9, 1)}, "exactly one of `input_values`"),
    ({"input_values": noise(9)}, r"\(9,\).*\(batch, samples\)"),
    ({"input_values": noise(1, 2, 9)}, "Average the channels of stereo"),
    ({"input_features": noise(1, 9)}, r"\(batch, steps, features\)"),
    ({"input_values": torch.tensor([[0.0, torch.nan]])}, "NaN or infinity, first in row 0"),
    ({"input_values": torch.tensor([[0.0], [torch.inf]])}, "NaN or infinity, first in row 1"),
    ({"input_values": noise(2, 9), "attention_mask": torch.ones(2, 8)}, r"attention_mask.*\(2, 8\)"),
    ({"input_values": noise(1, 3), "attention_mask": torch.tensor([[0, 1, 1]])}, "ones after zeros"),
    ({"input_values": noise(1, 3), "attention_mask": torch.tensor([[2, 1, 1]])}, "values other than 0 and 1"),
]


@pytest.mark.parametrize(("inputs", "message"), BAD_WAVES)
@hearing
def test_recordings_that_are_refused(cls, inputs, message):
    with pytest.raises(ValueError, match=message):
        make_head(cls)(**inputs)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (None, "shape None"),
        (noise(3, 5, 5), r"\(3, 5, 5\).*\(batch, channels, height, width\)"),
        (noise(1, 1, 5, 5), "1 channels, but `num_channels=3`"),
        (noise(1, 4, 5, 5), "4 channels, but `num_channels=3`"),
        (noise(1, 3, 5, 9), "9 patches wide, but the grid of positions has 8"),
        (noise(1, 3, 9, 5), "9 patches high, but `rotary_shape=.8, 8.` has 8 rows"),
        (torch.full((1, 3, 2, 2), torch.nan), "NaN"),
    ],
)
def test_pictures_that_are_refused(pixels, message):
    with pytest.raises(ValueError, match=message):
        make_head(ReformerForImageClassification, rotary_shape=(8, 8))(pixels)


def test_pictures_of_any_size():
    model = make_head(ReformerForImageClassification, rotary_shape=(8, 8), patch_size=2)
    for height, width in ((1, 1), (2, 16), (15, 3)):
        assert model(noise(2, 3, height, width)).logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"past_values": None}, "shape None"),
        ({"past_values": noise(2, 9, 3)}, "3 series, but the model is of 2"),
        ({"past_values": noise(2, 0, 2)}, r"\(2, 0, 2\)"),
        ({"past_values": PAST / 0}, "infinite"),
        ({"past_values": PAST, "past_observed_mask": torch.ones(3, 19, 2)}, r"\(3, 19, 2\)"),
        ({"past_values": PAST, "future_values": FUTURE[:, :5]}, r"future_values.*\(3, 5, 2\)"),
    ],
)
def test_series_that_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        make_head(ReformerForTimeSeriesPrediction)(**inputs)


def test_time_features_must_be_those_of_the_steps():
    model = make_head(ReformerForTimeSeriesPrediction, num_time_features=2)
    with pytest.raises(ValueError, match=r"past_time_features.*None.*\(batch, 20, 2\)"):
        model(PAST)
    features = noise(3, 26, 2)
    with pytest.raises(ValueError, match=r"future_time_features.*\(3, 5, 2\).*\(batch, 6, 2\)"):
        model(PAST, past_time_features=features[:, :20], future_time_features=features[:, 21:])
    plain = model(PAST, past_time_features=features[:, :20], future_time_features=features[:, 20:])
    other = model(PAST, past_time_features=features[:, :20], future_time_features=features[:, 20:] + 1)
    assert max_abs_diff(plain.prediction_outputs, other.prediction_outputs) > 1e-3


# --- forecasts


def forecaster(**overrides):
    return make_head(ReformerForTimeSeriesPrediction, **overrides)


def forecast(model, past=PAST, **inputs) -> torch.Tensor:
    return model(past.double(), **inputs).prediction_outputs


@pytest.mark.parametrize("mix", [False, True])
def test_a_series_that_begins_late_equals_it_alone(mix):
    model = forecaster(mix_series=mix, linear_skip=True)
    alone = forecast(model, PAST[1:2, 9:])
    assert max_abs_diff(forecast(model)[1:2], alone) <= 1e-10
    masked = PAST.clone()
    masked[1, :9] = 7.0
    mask = torch.ones_like(PAST)
    mask[1, :9] = 0
    assert max_abs_diff(forecast(model, masked, past_observed_mask=mask)[1:2], alone) <= 1e-10


def test_series_of_one_model_are_predicted_each_by_itself():
    model = forecaster(input_size=1)
    together = forecast(model)
    for series in (0, 1):
        alone = forecast(model, PAST[..., series])
        assert alone.shape == (3, 6)
        assert max_abs_diff(together[..., series], alone) <= 1e-10


def test_mixed_series_tell_each_other():
    other = PAST.clone()
    other[:, :, 1] += noise(3, 20)
    for mix in (False, True):
        model = forecaster(mix_series=mix)
        change = max_abs_diff(forecast(model, other)[..., 0], forecast(model)[..., 0])
        assert change > 1e-3 if mix else change <= 1e-10


@pytest.mark.parametrize("scaling", ["std", "last"])
@pytest.mark.parametrize("loss", ["nll", "mse", "mae"])
def test_a_shifted_and_scaled_past_shifts_and_scales_the_forecast(scaling, loss):
    model = forecaster(scaling=scaling, loss=loss)
    past = PAST * 1000  # the library's scaler adds 1e-5 to variances
    assert max_abs_diff(forecast(model, past * 3 + 500), forecast(model, past) * 3 + 500) <= 1e-2


def test_only_the_context_is_looked_at():
    model = forecaster()
    past = noise(2, 40, 2)
    assert max_abs_diff(forecast(model, past), forecast(model, past[:, -18:])) <= 1e-12
    assert max_abs_diff(forecast(model, past), forecast(model, past[:, -17:])) > 1e-6


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("name", ["student_t", "normal"])
def test_the_loss_is_the_likelihood_by_hand(name, mix):
    """In standardized units, over observed values alone."""
    mean, std = torch.tensor([1.0, -2.0]).double(), torch.tensor([2.0, 0.5]).double()
    units = {"series_mean": mean.tolist(), "series_std": std.tolist()}
    model = forecaster(distribution_output=name, mix_series=mix, **units)
    out = model(PAST.double(), future_values=FUTURE)
    df = out.params[0] if name == "student_t" else None
    loc, scale = out.params[-2:]
    center, width = out.loc + out.scale * loc, out.scale * scale
    assert max_abs_diff(out.prediction_outputs, center) <= 1e-9
    z = (FUTURE - center) / width
    if name == "student_t":
        density = torch.lgamma((df + 1) / 2) - torch.lgamma(df / 2) - 0.5 * (df * torch.pi).log()
        density = density - width.log() - (df + 1) / 2 * (1 + z.square() / df).log()
    else:
        density = -0.5 * z.square() - width.log() - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    density = density + std.log()  # of the standardized value
    assert max_abs_diff(out.loss, -density[~FUTURE.isnan()].mean()) <= 1e-6


@pytest.mark.parametrize("loss", ["mse", "mae"])
def test_losses_of_numbers_by_hand(loss):
    units = {"series_mean": [1.0, -2.0], "series_std": [2.0, 0.5]}
    out = forecaster(loss=loss, **units)(PAST.double(), future_values=FUTURE)
    error = ((out.prediction_outputs - FUTURE) / torch.tensor([2.0, 0.5]))[~FUTURE.isnan()]
    assert max_abs_diff(out.loss, error.square().mean() if loss == "mse" else error.abs().mean()) <= 1e-6


def test_a_mask_of_the_future_says_what_counts():
    model, mask = forecaster(), torch.ones_like(FUTURE)
    mask[1] = 0
    gaps = FUTURE.clone()
    gaps[1] = torch.nan
    masked = model(PAST, future_values=FUTURE, future_observed_mask=mask).loss
    assert max_abs_diff(masked, model(PAST, future_values=gaps).loss) <= 1e-12
    assert model(PAST, future_values=FUTURE * torch.nan).loss == 0


@pytest.mark.parametrize("alone", [False, True])
def test_samples_have_the_distribution_that_is_predicted(alone):
    model = forecaster(input_size=1, distribution_output="normal")
    past = PAST[..., 0] if alone else PAST
    out = model(past.double())
    torch.manual_seed(0)
    drawn = model.generate(past.double(), num_parallel_samples=4000).sequences
    assert drawn.shape == (3, 4000, *out.prediction_outputs.shape[1:])
    width = out.scale * out.params[1]
    assert ((drawn.mean(1) - out.prediction_outputs) / width).abs().max() < 0.08
    assert (drawn.std(1) / width - 1).abs().max() < 0.06
    assert model.generate(past.double()).sequences.shape[1] == model.config.num_parallel_samples


def test_a_model_of_numbers_draws_no_samples():
    with pytest.raises(ValueError, match=r"loss='mse'.*no distribution"):
        forecaster(loss="mse").generate(PAST)


def test_counts_have_a_distribution_of_their_own():
    model = forecaster(distribution_output="negative_binomial", scaling="mean")
    counts = PAST.abs().mul(5).round()
    future = FUTURE.abs().mul(5).round()
    out = model(counts.double(), future_values=future)
    assert out.loss.isfinite()
    torch.manual_seed(0)
    drawn = model.generate(counts.double(), num_parallel_samples=50).sequences
    assert torch.equal(drawn, drawn.round())
    assert (drawn >= 0).all()


def test_constant_and_unobserved_series_are_predicted():
    model = forecaster(scaling="last")
    constant = torch.full((1, 20, 2), 5.0)
    assert (forecast(model, constant) - 5).abs().max() < 0.1
    assert forecast(model, constant * torch.nan).isfinite().all()
    assert forecast(model, constant[:, :1]).isfinite().all()  # one step


def test_a_linear_skip_is_nothing_at_first_and_then_a_linear_map_of_the_context():
    plain, model = forecaster(loss="mse"), forecaster(loss="mse", linear_skip=True)
    weights = {name: x for name, x in model.state_dict().items() if "skip" not in name}
    plain.load_state_dict(weights)
    with torch.no_grad():
        model.skip.bias.zero_()
        assert max_abs_diff(forecast(model), forecast(plain)) == 0
        model.skip.weight.copy_(noise(6, 18))
    past = noise(1, 18, 2)
    added = (forecast(model, past) - forecast(plain, past)) / plain(past).scale
    scaled = (past - plain(past).loc) / plain(past).scale
    assert max_abs_diff(added, (model.skip.weight @ scaled)) <= 1e-6


def test_a_linear_skip_of_mixed_series_is_one_map_of_all():
    model = forecaster(loss="mse", linear_skip=True, mix_series=True)
    plain = forecaster(loss="mse", mix_series=True)
    plain.load_state_dict({name: x for name, x in model.state_dict().items() if "skip" not in name})
    with torch.no_grad():
        model.skip.bias.zero_()
        model.skip.weight.copy_(noise(6 * 2, 18 * 2))
    past = noise(1, 18, 2)
    out = plain(past)
    added = (forecast(model, past) - forecast(plain, past)) / out.scale
    scaled = ((past - out.loc) / out.scale).flatten()
    assert max_abs_diff(added[0], (model.skip.weight @ scaled).view(6, 2)) <= 1e-6


def test_individual_skips_are_maps_of_their_series_alone():
    settings = {"loss": "mse", "linear_skip": True, "input_size": 2}
    model, shared = forecaster(individual_skip=True, **settings), forecaster(**settings)
    shared.load_state_dict({name: x for name, x in model.state_dict().items() if "skip" not in name}, strict=False)
    past = noise(1, 18, 2)
    for series in (0, 1):
        with torch.no_grad():
            shared.skip.weight.copy_(model.skip[series].weight.copy_(noise(6, 18) + series))
            shared.skip.bias.copy_(model.skip[series].bias)
        assert max_abs_diff(forecast(model, past)[..., series], forecast(shared, past)[..., series]) <= 1e-6


def test_series_that_follow_rules_of_their_own_are_forecast_by_individual_skips():
    """One repeats with its sign turned, the other as it was; no single map can do both."""
    past = noise(300, 18, 2)
    future = torch.stack([-past[:, :6, 0], past[:, :6, 1]], dim=-1)
    errors = {}
    for individual in (False, True):
        model = forecaster(loss="mse", linear_skip=True, individual_skip=individual, input_size=2, scaling=None)
        model.fit_skip([{"past_values": past[:200], "future_values": future[:200]}])
        errors[individual] = (forecast(model, past[200:]) - future[200:]).square().mean()
    assert errors[True] < 0.05
    assert errors[False] > 0.5


@pytest.mark.parametrize("wrong", [{"linear_skip": False}, {"mix_series": True}, {"input_size": 1}], ids=str)
def test_individual_skips_need_several_series_apart(wrong):
    with pytest.raises(StrictDataclassError, match="individual_skip=True` is a linear map for each of several"):
        tiny_config(**{"linear_skip": True, "individual_skip": True, "input_size": 2, **wrong})


@pytest.mark.parametrize("scaling", [None, "std"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("loss", ["mse", "nll"])
def test_a_fitted_skip_forecasts_what_is_linear(mixed, scaling, loss):
    """Before any training, and with gaps, which tell nothing."""
    settings = {"linear_skip": True, "mix_series": mixed, "scaling": scaling, "loss": loss, "input_size": 2}
    settings |= {"context_length": 18, "prediction_length": 6, "series_mean": [1.0, -1.0], "series_std": [2.0, 0.5]}
    model = make_model(ReformerForTimeSeriesPrediction, dtype=torch.float32, **SMALL_WINDOWS, **settings).eval()
    waves = torch.sin(torch.arange(24) * 0.7 + 7 * noise(400, 1)) * noise(400, 1).exp()
    series = torch.stack([waves, waves.roll(1, 0) * 3 if mixed else waves * 3], dim=-1) + torch.tensor([1.0, -1.0])
    past, future = series[:, :18], series[:, 18:].clone()
    future[::7, 2:, 1] = torch.nan
    future[::11, :, 0] = torch.nan
    model.fit_skip([{"past_values": past[a : a + 100], "future_values": future[a : a + 100]} for a in (0, 100, 200)])
    error = forecast(model, past[300:]) - series[300:, 18:]
    assert error.square().mean() < 0.05 * (series[300:, 18:] - series[300:, 17:18]).square().mean()
    assert forecast(model, past.roll(5, 1)).isfinite().all()


@pytest.mark.parametrize("sizes", [(50,), (10, 10, 10, 10, 10), (1, 48, 1)])
def test_a_skip_that_is_fitted_to_noise_forecasts_the_mean(sizes):
    """Whatever the batches, the penalty is chosen on windows that were not fitted."""
    model = forecaster(loss="mse", linear_skip=True, mix_series=True, scaling=None)
    series = noise(250, 24, 2)
    past, future = series[:, :18], series[:, 18:]
    pieces = zip(past[:50].split(sizes), future[:50].split(sizes), strict=True)
    model.fit_skip([{"past_values": before, "future_values": after} for before, after in pieces])
    assert forecast(model, past[50:]).square().mean() < 0.05  # 2.7 without a penalty


def test_a_model_without_a_skip_has_none_to_fit():
    with pytest.raises(ValueError, match="linear_skip=True"):
        forecaster().fit_skip([{"past_values": PAST, "future_values": FUTURE}])


def test_horizons_may_be_longer_than_the_context():
    assert forecast(forecaster(context_length=3, prediction_length=50)).shape == (3, 50, 2)


# --- training


@signals
def test_a_signal_head_learns_its_rows(cls):
    torch.manual_seed(0)
    model = make_model(cls, dtype=torch.float32, num_labels=3, **SMALL_WINDOWS, initializer_range=0.1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(**inputs_of(cls), **HEADS[cls]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.4 * abs(losses[0])


@signals
def test_embeddings_of_a_signal_head_are_its_own(cls):
    model = make_head(cls)
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.main_input_name in inputs_of(cls)
    assert not any("embed_tokens.weight" in name for name, _ in model.named_parameters())


def test_a_recording_of_ten_minutes_is_heard_in_one_pass():
    """At 8 kHz: memory of the frames, of which there are far fewer than samples, is all there is."""
    fields = {"frame_size": 160, "frame_stride": 80, "local_window": 8, "attn_layers": ["local"]}
    model = make_model(ReformerForCTC, dtype=torch.float32, hidden_size=8, num_attention_heads=1, **{
        **fields, "feed_forward_size": 8})  # fmt: skip
    with torch.no_grad():
        assert model(noise(1, 8000 * 600)).logits.shape == (1, 59999, 40)


def test_pooling_of_frames_counts_real_ones():
    model = make_head(ReformerForAudioClassification, classifier_pooling="last")
    waves = noise(1, 20).double()
    padded, mask = F.pad(waves, (0, 13)), F.pad(torch.ones(1, 20, dtype=torch.long), (0, 13))
    assert max_abs_diff(model(padded, mask).logits, model(waves).logits) <= 1e-10
