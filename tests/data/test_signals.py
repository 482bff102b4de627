"""Tables and folders of recordings and pictures: which column holds them, and what is in its cells."""

import io

import numpy as np
import pytest
from datasets import Audio, Dataset, Image, Value

from hf_reformer.data.signals import (
    AUDIO_COLUMNS,
    IMAGE_COLUMNS,
    PICTURES,
    SOUNDS,
    files_beside,
    find_signal_column,
    picture,
    pictures,
    read_signals,
    recordings,
    stored_rate,
)

soundfile = pytest.importorskip("soundfile")
image_module = pytest.importorskip("PIL.Image")

SAMPLES = [np.arange(-5, 5, dtype=np.int16) * 1000, np.arange(7, dtype=np.int16) * 2000]
PIXELS = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


def wave(samples: np.ndarray, rate: int = 8000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format="WAV")
    return file.getvalue()


def png(pixels: np.ndarray = PIXELS) -> bytes:
    file = io.BytesIO()
    image_module.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["lists", "Audio", "bytes", "files", "dicts"])
def test_recordings_of_every_kind_of_column(kind, tmp_path):
    rate_column = None
    if kind == "lists":
        table, rate_column = Dataset.from_dict({"audio": SAMPLES, "sampling_rate": [8000, 8000]}), "sampling_rate"
    elif kind == "dicts":
        cells = [{"array": (x / 32768).tolist(), "sampling_rate": 8000} for x in SAMPLES]
        table = Dataset.from_dict({"audio": cells})
    elif kind == "files":
        for row, samples in enumerate(SAMPLES):
            (tmp_path / f"{row}.wav").write_bytes(wave(samples))
        Dataset.from_dict({"file": ["0.wav", "1.wav"], "label": ["a", "b"]}).to_csv(tmp_path / "table.csv")
        table = files_beside(read_signals(tmp_path / "table.csv", SOUNDS), "file", tmp_path)
    else:
        cells = [{"bytes": wave(x), "path": None} for x in SAMPLES]
        table = Dataset.from_dict({"audio": cells})
        table = table.cast_column("audio", Audio()) if kind == "Audio" else table
    column = find_signal_column(table, None, AUDIO_COLUMNS, "--audio_column")
    assert column == ("file" if kind == "files" else "audio")
    assert stored_rate(table, column, rate_column) == 8000
    for found, samples in zip(recordings(table, column, 8000, rate_column), SAMPLES, strict=True):
        assert np.abs(found - samples / 32768).max() < 1e-6
    doubled = [len(x) for x in recordings(table, column, 16000, rate_column)]
    assert doubled == [20, 14]


@pytest.mark.parametrize("kind", ["rows", "square", "Image", "bytes", "files", "channels"])
def test_pictures_of_every_kind_of_column(kind, tmp_path):
    pixels = PIXELS[:, :3] if kind == "square" else PIXELS
    if kind in ("rows", "square"):
        cells = [pixels.tolist() if kind == "rows" else pixels.reshape(-1)]
    elif kind == "channels":
        cells = [np.repeat(pixels[..., None], 3, axis=2).tolist()]
    elif kind == "files":
        (tmp_path / "0.png").write_bytes(png())
        cells = [str(tmp_path / "0.png")]
    else:
        cells = [{"bytes": png(), "path": None}]
    table = Dataset.from_dict({"image": cells})
    table = table.cast_column("image", Image()) if kind == "Image" else table
    column = find_signal_column(table, None, IMAGE_COLUMNS, "--image_column")
    (found,) = pictures(table, column)
    assert found.mode == "RGB"
    assert (np.asarray(found) == pixels[..., None]).all()


@pytest.mark.parametrize("kind", ["string", "large_string", "dict", "Audio", "bytes"])
def test_files_are_looked_for_beside_their_table_whatever_the_column(kind, tmp_path):
    """Empty cells stay empty, and are named by their row."""
    (tmp_path / "a.wav").write_bytes(wave(SAMPLES[0]))
    names = ["a.wav", str(tmp_path / "a.wav"), ""]
    if kind in ("dict", "Audio", "bytes"):
        cells = [{"bytes": wave(SAMPLES[0]) if kind == "bytes" else None, "path": name} for name in names]
        table = Dataset.from_dict({"clip": cells, "label": [1, 2, 3]})
        table = table.cast_column("clip", Audio()) if kind != "dict" else table
    else:
        table = Dataset.from_dict({"clip": names, "label": [1, 2, 3]}).cast_column("clip", Value(kind))
    found = files_beside(table, "clip", tmp_path)
    assert found.features["clip"] == table.features["clip"]
    assert found["label"][:] == [1, 2, 3]
    assert stored_rate(found, "clip", None) == 8000
    heard = recordings(found, "clip", 8000, None)
    for _ in range(2):
        assert np.abs(next(heard) - SAMPLES[0] / 32768).max() < 1e-6
    if kind != "bytes":
        with pytest.raises(ValueError, match="Row 2: "):
            next(heard)
        with pytest.raises(ValueError, match="Row 0: There is no recording"):
            stored_rate(found.select([2]), "clip", None)


def test_recordings_without_a_rate_have_that_of_all(tmp_path):
    table = Dataset.from_dict({"audio": SAMPLES, "rate": [8000, None]})
    assert stored_rate(table, "audio", None) is None
    assert [len(x) for x in recordings(table, "audio", 16000, None, 8000)] == [20, 14]
    with pytest.raises(ValueError, match="Row 1: There is no sampling rate"):
        list(recordings(table, "audio", 8000, "rate"))


@pytest.mark.parametrize("suffix", [".wav", ".png"])
def test_a_folder_with_one_sub_folder_per_label(suffix, tmp_path):
    suffixes, content = (SOUNDS, wave(SAMPLES[0])) if suffix == ".wav" else (PICTURES, png())
    for name in ("b/1", "a/deep/2", "a/.hidden/3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}{suffix}").write_bytes(content)
    (tmp_path / "a" / "notes.txt").write_text("no signal")
    table = read_signals(tmp_path, suffixes)
    assert table["label"][:] == ["a", "b"]
    assert table["file"][:] == [f"a/deep/2{suffix}", f"b/1{suffix}"]
    with pytest.raises(ValueError, match="holds no files ending in"):
        read_signals(tmp_path / "a" / ".hidden", suffixes)


def test_what_is_transparent_is_white():
    pixels = np.zeros((2, 2, 4), dtype=np.uint8)
    pixels[0, 0, 3] = 255
    found = np.asarray(picture(pixels))
    assert (found[0, 0] == 0).all()
    assert (found[1, 1] == 255).all()


def test_sixteen_bits_are_not_cut_off():
    deep = image_module.fromarray(np.array([[0, 257 * 128], [257 * 255, 257]], dtype=np.uint16))
    assert np.asarray(picture(deep))[..., 0].tolist() == [[0, 128], [255, 1]]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"bytes": b"no picture"}, "cannot be read as a picture"),
        ({"bytes": png()[:45]}, "cannot be read as a picture"),
        ("nowhere.png", "There is no picture `nowhere.png`"),
        ("", "There is no picture"),
        (np.arange(10), "no square"),
        (np.full((2, 2), 300), "0 … 255"),
        (np.full((2, 2), -1), "0 … 255"),
        (np.full((2, 2), np.nan), "NaN"),
        (np.zeros((2, 2, 2)), "1, 3 or 4 channels"),
        (np.zeros((0, 2)), "pixels are numbers"),
        (np.array([["a"]]), "pixels are numbers"),
    ],
    ids=lambda x: str(x)[:20],
)
def test_pictures_that_are_refused(cell, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        picture(cell)


def test_a_bad_cell_is_named_by_its_row():
    table = Dataset.from_dict({"audio": [wave(SAMPLES[0]), b"no sound"]})
    with pytest.raises(ValueError, match=r"Row 1: .*no sound file"):
        list(recordings(table, "audio", 8000, None))
    table = Dataset.from_dict({"image": [png(), None]})
    with pytest.raises(ValueError, match="Row 1: There is no picture"):
        list(pictures(table, "image"))


def test_a_column_that_cannot_be_told():
    table = Dataset.from_dict({"x": [1], "y": [2]})
    with pytest.raises(ValueError, match=r"Which column.*`x`, `y`.*--audio_column"):
        find_signal_column(table, None, AUDIO_COLUMNS, "--audio_column")
    with pytest.raises(ValueError, match="no column `z`"):
        find_signal_column(table, "z", AUDIO_COLUMNS, "--audio_column")
