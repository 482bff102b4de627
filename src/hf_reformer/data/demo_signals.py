"""Signals for demos that need no download: synthetic speech and grid load, and scikit-learn's handwritten digits."""

from typing import TYPE_CHECKING

import numpy as np

from .tables import require

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

RATE = 8000
WORDS = ("ba", "do", "fi", "gu", "ke", "la", "mo", "ni", "ru", "se")
# Each word is two vowels: one pair of resonances (Hz) at its beginning, another at its end.
VOWELS = {"a": (800, 1300), "e": (450, 2000), "i": (300, 2500), "o": (500, 900), "u": (320, 750)}
SOUNDS = ("au", "eo", "ia", "oi", "ue", "ae", "ea", "iu", "oa", "ui")


def spoken_word(word: int, draw: np.random.Generator) -> np.ndarray:
    """Synthesize (N) float32 samples of one of the ten words, with a random voice and speed."""
    length = int(RATE * draw.uniform(0.2, 0.4))
    time = np.arange(length) / RATE
    pitch = draw.uniform(90, 250) * (1 + draw.uniform(-0.1, 0.1) * time / time[-1])
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    size = draw.uniform(0.9, 1.1)  # of the speaker
    first, last = (np.array(VOWELS[sound]) * size for sound in SOUNDS[word])
    share = np.clip((time / time[-1] - 0.35) / 0.3, 0, 1)[:, None]
    resonances = first * (1 - share) + last * share  # (N, 2)
    samples = np.zeros(length)
    for harmonic in range(1, int(RATE / 2 / pitch.max())):
        distance = (harmonic * pitch[:, None] - resonances) / 120
        samples += (np.exp(-(distance**2)).sum(1) + 0.02) / harmonic**0.3 * np.sin(harmonic * phase)
    samples *= np.sin(np.pi * (time + 1 / RATE) / (time[-1] + 2 / RATE)) ** 0.5
    samples /= np.abs(samples).max()
    return (draw.uniform(0.2, 0.8) * (samples + 0.03 * draw.standard_normal(length))).astype(np.float32)


def spoken_tones(train: int = 400, validation: int = 100) -> "DatasetDict":
    """Make recordings of one word each: `audio`, `sampling_rate`, `label`."""
    return _splits({"train": train, "validation": validation}, lambda draw, row: _one_word(row % 10, draw))


def spoken_strings(train: int = 800, validation: int = 80) -> "DatasetDict":
    """Make recordings of two to five words: `audio`, `sampling_rate`, `text`."""
    return _splits({"train": train, "validation": validation}, lambda draw, row: _string(draw))


def _one_word(word: int, draw: np.random.Generator) -> dict:
    return {"audio": spoken_word(word, draw), "sampling_rate": RATE, "label": WORDS[word]}


def _string(draw: np.random.Generator) -> dict:
    words = draw.integers(0, 10, draw.integers(2, 6))
    parts = []
    for word in words:
        gap = 0.01 * draw.standard_normal(int(RATE * draw.uniform(0.03, 0.15)))
        parts += [gap.astype(np.float32), spoken_word(word, draw)]
    text = " ".join(WORDS[word] for word in words)
    return {"audio": np.concatenate(parts), "sampling_rate": RATE, "text": text}


def seasonal_load(hours: int = 4000) -> "Dataset":
    """Make a table of `time` and the hourly loads of three places of a grid: daily and weekly cycles, and weather."""
    draw = np.random.default_rng(0)
    pandas = require("pandas")
    hour = np.arange(hours)
    weather = np.convolve(draw.standard_normal(hours + 71), np.ones(72) / 72**0.5, mode="valid")
    columns = {"time": pandas.date_range("2024-01-01", periods=hours, freq="h").astype(str).tolist()}
    for name, level, phase in (("north", 50.0, 0.0), ("south", 120.0, 1.0), ("harbour", 8.0, 2.5)):
        day = np.sin(2 * np.pi * hour / 24 + phase) + 0.4 * np.sin(4 * np.pi * hour / 24 + 2 * phase)
        week = np.where(hour // 24 % 7 >= 5, -0.8, 0.0)
        values = level * (1 + 0.2 * day + 0.2 * week + 0.1 * weather + 0.03 * draw.standard_normal(hours))
        values[draw.random(hours) < 0.01] = np.nan
        columns[name] = values.tolist()
    return require("datasets").Dataset.from_dict(columns)


def _splits(sizes: dict[str, int], make) -> "DatasetDict":
    datasets = require("datasets")
    found = {}
    for number, (split, size) in enumerate(sizes.items()):
        draw = np.random.default_rng(number)
        rows = [make(draw, row) for row in range(size)]
        found[split] = datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})
    return datasets.DatasetDict(found)


def handwritten_digits() -> "DatasetDict":
    """Load scikit-learn's 8 × 8 digits: `pixels` (64 integers from 0 to 255), `label`."""
    bunch = require("sklearn.datasets").load_digits()
    pixels = (bunch.data * (255 / 16)).round().astype(np.uint8)
    datasets, found = require("datasets"), {}
    for split, part in (("train", slice(0, 1300)), ("validation", slice(1300, None))):
        labels = [str(label) for label in bunch.target[part]]
        found[split] = datasets.Dataset.from_dict({"pixels": list(pixels[part]), "label": labels})
    return datasets.DatasetDict(found)
