"""From signals to embeddings: frames, patches, their masks and their places."""

import math

import pytest
import torch
from conftest import make_model, max_abs_diff, tiny_config
from huggingface_hub.errors import StrictDataclassError
from hypothesis import given
from hypothesis import strategies as st

from hf_reformer import ReformerForCausalLM, ReformerForImageClassification, ReformerModel
from hf_reformer.models.frontend import GAIN_FLOOR, FrameEmbeddings, PatchEmbeddings, evenly_loud, log_spectrum
from hf_reformer.ops.axes import along_axes
from hf_reformer.ops.rotary import rotary_tables


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# --- frames


@given(steps=st.integers(1, 60), size=st.integers(1, 12), stride=st.integers(1, 12), features=st.integers(1, 3))
def test_every_frame_is_the_linear_map_of_its_samples(steps, size, stride, features):
    config = tiny_config(frame_size=size, frame_stride=min(size, stride), num_input_features=features)
    stride = config.frame_stride
    frames, signal = FrameEmbeddings(config), noise(2, steps, features)
    found = frames(signal)
    assert found.shape == (2, frames.count(steps), 16)
    assert (frames.count(steps) - 1) * stride + size >= steps  # all is heard
    assert frames.count(steps) == 1 or (frames.count(steps) - 2) * stride + size < steps  # and no frame of silence
    padded = torch.cat([signal, torch.zeros(2, size, features)], dim=1)
    for i in range(frames.count(steps)):
        expected = frames.projection(padded[:, i * stride : i * stride + size].flatten(1))
        assert max_abs_diff(found[:, i], expected) <= 1e-5


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4))
def test_the_mask_of_frames_counts_those_of_each_recording(lengths):
    frames = FrameEmbeddings(tiny_config(frame_size=7, frame_stride=3))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    found = frames.mask(mask)
    assert found.sum(-1).tolist() == [frames.count(length) for length in lengths]
    assert found.shape[1] == frames.count(max(lengths))
    assert (found.diff() <= 0).all()


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=3), window=st.integers(1, 40), causal=st.booleans())
def test_every_sample_is_scaled_by_what_is_around_it(lengths, window, causal):
    signal = noise(len(lengths), max(lengths)) * noise(1, max(lengths)).exp()
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    found = evenly_loud(signal * mask, mask, window, causal)
    for row, length in enumerate(lengths):
        assert (found[row, length:] == 0).all()
        for i in range(length):
            around = signal[row, max(0, i - window + 1) : i + 1]
            if not causal:
                around = signal[row, max(0, i - window // 2) : min(length, i + window // 2 + 1)]
            deviation = (around.double().var(correction=0) + GAIN_FLOOR).sqrt()
            expected = (signal[row, i] - around.double().mean()) / deviation
            assert found[row, i].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)


def test_gain_control_makes_parts_of_any_loudness_sound_alike():
    part = noise(1, 400)
    parts = torch.cat([part, part / 8 - 1, part * 3 + 2], dim=1)  # and of any offset
    found = evenly_loud(parts, None, 50, False).view(3, 400)[:, 25:-25]
    assert max_abs_diff(found[0], found[2]) < 0.01
    assert max_abs_diff(found[0], found[1]) < 0.02
    assert evenly_loud(parts, None, 50, False).abs().max() < 8  # nothing is blown up


def test_silence_stays_silent_after_something_loud():
    """Sums that run over a long recording leave no noise behind."""
    signal = torch.cat([1e3 * noise(1, 100_000), torch.zeros(1, 1000), 1e-3 * noise(1, 1000)], dim=1)
    found = evenly_loud(signal, None, 100, False)[0]
    assert (found[100_050:100_950] == 0).all()
    assert found[101_100:].abs().max() < 1


def test_a_spectrum_shows_the_frequency_of_a_tone():
    time = torch.arange(160) / 8000
    for hertz in (500, 1000, 2150):
        found = log_spectrum(torch.sin(2 * math.pi * hertz * time))
        assert found.shape == (81,)
        assert found.argmax() == hertz / 50
    assert (log_spectrum(torch.zeros(160)) == math.log10(1e-4)).all()


def test_a_spectrum_hears_no_phase():
    time = torch.arange(64)
    a, b = (log_spectrum(torch.sin(2 * math.pi * 8 * time / 64 + phase)) for phase in (0.0, 1.0))
    assert max_abs_diff(a, b) <= 1e-3


# --- patches


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_patch_is_the_linear_map_of_its_pixels(size):
    patches, pictures = PatchEmbeddings(tiny_config(patch_size=size)), noise(2, 3, 5, 7)
    rows, columns = -(-5 // size), -(-7 // size)
    whole = torch.zeros(2, 3, rows * size, columns * size)
    whole[:, :, :5, :7] = pictures
    found = patches(pictures).unflatten(1, (rows, columns))
    for row in range(rows):
        for column in range(columns):
            patch = whole[:, :, row * size : (row + 1) * size, column * size : (column + 1) * size]
            assert max_abs_diff(found[:, row, column], patches.projection(patch.flatten(1))) <= 1e-5


@pytest.mark.parametrize("kind", ["rotary", "axial"])
def test_a_pixel_has_one_place_in_pictures_of_every_size(kind):
    shape = {"rotary": "rotary_shape", "axial": "axial_pos_shape"}[kind]
    config = tiny_config(position_embedding_type=kind, max_position_embeddings=64, **{shape: (8, 8)})
    patches = PatchEmbeddings(config)
    assert patches.position_ids(noise(1, 3, 8, 8)) is None  # counted from pixel to pixel
    assert patches.position_ids(noise(1, 3, 2, 3)).tolist() == [[0, 1, 2, 8, 9, 10]]


def test_a_grid_tells_every_pixel_where_it_is():
    """Beside rotary positions, which tell distances alone: an even picture is not the same everywhere."""
    patches = PatchEmbeddings(tiny_config(rotary_shape=(4, 5)))
    torch.nn.init.normal_(patches.places.weights[0])
    torch.nn.init.normal_(patches.places.weights[1])
    even = torch.ones(1, 3, 3, 2)
    found = patches(even).view(3, 2, 16)
    for row in range(3):
        for column in range(2):
            table = torch.cat([patches.places.weights[0][row, 0], patches.places.weights[1][0, column]])
            assert max_abs_diff(found[row, column], patches.projection(torch.ones(3)) + table) <= 1e-6


def test_a_narrow_picture_is_the_corner_of_a_wide_one():
    """What a pixel is told of its place does not depend on the size of the picture."""
    fields = {"rotary_shape": (6, 6), "attn_layers": ["full"]}
    model = make_model(ReformerForImageClassification, **fields)
    small = noise(1, 3, 4, 3).double()
    positions = model.model.embed_tokens.position_ids(small)
    rows, columns = along_axes(positions, (6, 6))
    assert rows.view(4, 3)[:, 0].tolist() == [0, 1, 2, 3]
    assert columns.view(4, 3)[0].tolist() == [0, 1, 2]
    transposed = small.transpose(2, 3)
    assert max_abs_diff(model(small).logits, model(transposed).logits) > 1e-3  # rows are told from columns


# --- positions along several axes


@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=4), position=st.integers(0, 10_000))
def test_coordinates_count_in_row_major_order(shape, position):
    found = [int(x) for x in along_axes(torch.tensor([[position]]), shape)]
    back = 0
    for axis, (size, coordinate) in enumerate(zip(shape, found, strict=True)):
        assert coordinate >= 0
        assert axis == 0 or coordinate < size
        back = back * size + coordinate
    assert back == position


def test_one_axis_is_the_usual_rotation():
    positions = torch.arange(50)[None]
    for a, b in zip(rotary_tables(positions, 16, 1e4), rotary_tables(positions, 16, 1e4, (50,)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("shape", "shares"), [((4, 5), [4, 4]), ((2, 3, 4), [2, 3, 3])])
def test_every_axis_turns_its_share_of_a_head(shape, shares):
    positions = torch.arange(math.prod(shape))[None]
    cos, sin = rotary_tables(positions, 16, 100.0, shape)
    assert cos.shape == sin.shape == (1, 1, math.prod(shape), 16)
    starts = [sum(shares[:i]) for i in range(len(shares))]
    for coordinate, share, start in zip(along_axes(positions, shape), shares, starts, strict=True):
        angles = coordinate[0, :, None] * 100.0 ** -(torch.arange(share) / share)
        for half in (0, 8):
            part = slice(half + start, half + start + share)
            assert max_abs_diff(cos[0, 0, :, part], angles.cos()) <= 1e-5
            assert max_abs_diff(sin[0, 0, :, part], angles.sin()) <= 1e-5


def test_attention_along_axes_sees_relative_places_alone():
    model = make_model(ReformerModel, rotary_shape=(8, 8), attn_layers=["full"])
    ids = torch.arange(1, 13)[None]
    places = (torch.arange(4)[:, None] * 8 + torch.arange(3)).flatten()[None]
    plain = model(ids, position_ids=places)[0]
    assert max_abs_diff(model(ids, position_ids=places + 8 * 3 + 4)[0], plain) <= 1e-5  # three rows down, four right
    assert max_abs_diff(model(ids, position_ids=torch.arange(12)[None])[0], plain) > 1e-3


@torch.no_grad()
def test_pictures_are_drawn_pixel_by_pixel_with_a_cache():
    """A causal language model over the values of pixels: decoding step by step gives what one forward gives."""
    fields = {"vocab_size": 40, "rotary_shape": (4, 5), "is_decoder": True, "eos_token_id": None}
    model = make_model(ReformerForCausalLM, **fields, lsh_window=6, local_window=6, num_buckets=4)
    start = torch.tensor([[38]])
    drawn = model.generate(start, max_new_tokens=20, do_sample=False)
    for step in range(1, 21):
        assert model(drawn[:, :step]).logits[0, -1].argmax() == drawn[0, step]


# --- what cannot be


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"frame_size": 4, "frame_stride": 5}, "frame_stride=5.*more than.*frame_size=4"),
        ({"gain_window": 5, "num_input_features": 2}, "gain_window=5` is of a waveform"),
        ({"frame_size": 0}, "frame_size=0.*at least 1"),
        ({"frame_transform": "wavelet"}, "frame_transform='wavelet'.*unknown"),
        ({"frame_transform": "spectrum", "num_input_features": 2}, "of a waveform"),
        ({"patch_size": 2.5}, "patch_size"),
        ({"rotary_shape": (0, 4)}, r"rotary_shape=\(0, 4\).*at least 1"),
        ({"rotary_shape": (2, 2, 2, 2, 2)}, "5 axes.*attention_head_size=8"),
        ({"rotary_shape": (16, 16), "position_embedding_type": "axial"}, "rotary_shape.*is for rotary positions"),
        ({"scaling": "max"}, "scaling='max'"),
        ({"loss": "huber"}, "loss='huber'"),
        ({"series_mean": [0.0] * 2}, "Give `series_mean` and `series_std`"),
        ({"series_mean": [0.0], "series_std": [0.0], "input_size": 1}, "above 0"),
        ({"series_mean": [0.0] * 3, "series_std": [1.0] * 3}, "has 3 numbers, but `input_size=2`"),
        ({"series_names": ["a", "a"]}, "one name of its own"),
        ({"series_names": ["a", "b", "c"]}, "one name of its own"),
        ({"series_names": ["a", "b"], "predicted_series": ["c"]}, r"`predicted_series` holds \['c'\]"),
        ({"series_mean": [float("nan")] * 2, "series_std": [1.0] * 2}, "finite"),
        ({"distribution_output": "negative_binomial"}, "counts.*cannot be shifted"),
        ({"frame_size": 10**12}, "frame_size=10+.*more than"),
    ],
)
def test_fields_of_signals_that_contradict_each_other(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        tiny_config(**fields)


def test_fields_of_signals_survive_saving(tmp_path):
    fields = {"rotary_shape": [4, 5], "series_mean": [1.5, 2], "series_std": [1.0, 3], "frame_transform": "spectrum"}
    config = tiny_config(**fields)
    config.save_pretrained(tmp_path)
    loaded = type(config).from_pretrained(tmp_path)
    assert (loaded.rotary_shape, loaded.series_mean, loaded.series_std) == ((4, 5), (1.5, 2), (1.0, 3))
    assert loaded.frame_transform == "spectrum"
    assert (loaded.inputs_to_logits_ratio, loaded.grid_width) == (4, 5)
