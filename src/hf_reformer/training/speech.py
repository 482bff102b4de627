"""Speech recognition: a character tokenizer, error rates, a baseline, plots of recognized characters."""

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from datasets import Dataset
from matplotlib.figure import Figure
from sklearn.neighbors import NearestNeighbors
from transformers import EvalPrediction, Wav2Vec2CTCTokenizer

from .signals import Change, spectra_of, vary_recording

BLANK, UNKNOWN, SPACE = "<pad>", "<unk>", "|"
MOST_CHARACTERS = 20_000
SHOWN = 4  # recordings in a plot
GAINS = (-4, 2)  # range of gains in training, as powers of two


def character_tokenizer(texts: Sequence[str]) -> Wav2Vec2CTCTokenizer:
    """Make a tokenizer of the blank, which is also the padding token, the unknown token, and the texts' characters.

    Raises:
        ValueError: a text contains the character that stands for a space, or there are too many characters.
    """
    characters = Counter(character for text in texts for character in text)
    if SPACE in characters:
        raise ValueError(f"Transcripts hold {SPACE!r}, by which the tokenizer writes a space. Replace it.")
    if len(characters) > MOST_CHARACTERS:
        raise ValueError(f"Transcripts hold {len(characters):,} characters; at most {MOST_CHARACTERS:,} are possible.")
    names = [BLANK, UNKNOWN, *sorted({SPACE if character == " " else character for character in characters})]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vocab.json")
        file.write_text(json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8")
        return Wav2Vec2CTCTokenizer(
            str(file), unk_token=UNKNOWN, pad_token=BLANK, bos_token=None, eos_token=None, word_delimiter_token=SPACE
        )


def normalized(text: str) -> str:
    """Reduce white space to single spaces and strip it at the ends."""
    return " ".join(text.split())


def frames_of(ids: Sequence[int]) -> int:
    """Return the fewest frames that can produce these ids: one for each, and a blank between equal neighbors."""
    return len(ids) + sum(a == b for a, b in pairwise(ids))


def check_lengths(labels: Sequence[Sequence[int]], frames: Sequence[int], split: str) -> None:
    """Raise ValueError for transcripts that need more frames than their recordings have."""
    for row, (ids, count) in enumerate(zip(labels, frames, strict=True)):
        if frames_of(ids) > count:
            raise ValueError(
                f"Row {row} of the {split} data has a transcript of {len(ids)} characters, but its recording only "
                f"{count} frames. Is it the right one? Otherwise lower --stride_ms, or leave the row out."
            )


class ErrorRates:
    """`compute_metrics` for the Trainer: error rates of the transcripts that the likeliest ids of all frames give."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def texts(self, frames: np.ndarray) -> list[str]:
        """Decode (rows, frames) ids to transcripts; -100 stands for no frame."""
        ids = np.where(frames < 0, self.tokenizer.pad_token_id, frames)
        return [normalized(text) for text in self.tokenizer.batch_decode(ids)]

    def references(self, labels: np.ndarray) -> list[str]:
        rows = [[token for token in row if token >= 0] for row in labels.tolist()]
        return [normalized(self.tokenizer.decode(row, group_tokens=False)) for row in rows]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        return error_rates(
            self.references(np.asarray(prediction.label_ids)), self.texts(np.asarray(prediction.predictions))
        )


def vary_speech(size: int, stride: int) -> Change:
    """Make a function that applies `vary_recording` and makes waveforms up to 16 times softer or 4 times louder.

    Recordings are normalized as a whole, so a voice in a long one may be far softer than it would be alone. None gets
    so short that its frames of `size` steps, `stride` apart, could not produce the transcript.
    """

    def change(samples: np.ndarray, draw: np.random.Generator, row: Mapping[str, Any]) -> np.ndarray:
        frames = frames_of(row["labels"])
        varied = vary_recording(samples, draw, row, shortest=1 if frames < 2 else stride * (frames - 2) + size + 1)
        gain = 2.0 ** draw.uniform(*GAINS) if samples.ndim == 1 else 1.0
        return varied * np.float32(gain)

    return change


def error_rates(references: Sequence[str], found: Sequence[str]) -> dict[str, float]:
    """Compute word and character error rates over all texts together (jiwer), and the share of exact matches."""
    right = sum(a == b for a, b in zip(references, found, strict=True)) / len(references)
    return {"wer": jiwer.wer(list(references), list(found)), "cer": jiwer.cer(list(references), list(found)),
            "exact": right}  # fmt: skip


def likeliest(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`preprocess_logits_for_metrics` for the Trainer: (B, frames, characters) logits to (B, frames) ids."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def nearest_recordings(train: Dataset, unknown: Dataset, texts: Sequence[str], features: Any) -> list[str]:
    """A simple baseline: the transcript of the training recording with the most similar features."""
    x, y = features(train), features(unknown)
    scale = x.std(0) + 1e-6
    _, found = NearestNeighbors(n_neighbors=1).fit(x / scale).kneighbors(y / scale)
    return [texts[row] for row in found[:, 0]]


def draw_heard(
    file: Path, encoded: Dataset, frames: np.ndarray, texts: Sequence[str | None], tokenizer: Any, rate: int,
    stride: int, title: str,
) -> None:  # fmt: skip
    """Plot spectra of the first recordings over time, with the recognized characters at their frames.

    Args:
        rate: steps of the recordings per second.
        stride: steps from one frame to the next.
    """
    count = min(SHOWN, len(encoded))
    figure = Figure(figsize=(10, 2.2 * count), layout="constrained")
    for axes, row in zip(np.atleast_1d(figure.subplots(count)), range(count), strict=True):
        example, size = encoded[row], max(2, round(rate * 0.025))
        mels, end = "input_features" in example, example["length"] / rate
        top = len(example["input_features"]) // example["length"] if mels else rate / 2000
        spectra = spectra_of(example, size, max(1, size // 3)).T.numpy()
        axes.imshow(spectra, origin="lower", aspect="auto", cmap="magma", extent=(0, end, 0, top))
        place = 0
        for token, run in groupby(frames[row].tolist()):
            if token >= 0 and token != tokenizer.pad_token_id:
                name = tokenizer.convert_ids_to_tokens(token)
                axes.text(place * stride / rate, top * 0.9, "␣" if name == SPACE else name, color="white")
            place += len(list(run))
        true = f"true: {texts[row]}" if texts[row] is not None else ""
        axes.set(ylabel="mel band" if mels else "kHz", title=true, xlim=(0, end))
    figure.suptitle(title)
    figure.supxlabel("seconds")
    figure.savefig(file, dpi=110)


def label_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return [tokenizer(text)["input_ids"] for text in texts]
