"""Bits per byte: the metric of language models, with general-purpose compressors as baselines."""

import bz2
import lzma
import math

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase

from ..data.packing import token_ids


class BitsPerByte:
    """`compute_metrics` for `LanguageModelTrainer`.

    For a masked model: bits of the masked tokens per byte they stand for, assuming the texts' mean bytes per token.
    """

    def __init__(self, texts: list[str], tokenizer: PreTrainedTokenizerBase, masked: bool):
        self.num_bytes = sum(len(text.encode()) for text in texts)
        self.num_tokens = sum(len(ids) for ids in token_ids([[text] for text in texts], tokenizer)) - len(texts)
        self.name = "bits_per_masked_byte" if masked else "bits_per_byte"

    @property
    def bits_per_nat(self) -> float:
        """Bits per byte of a loss of one nat per token."""
        return self.num_tokens / self.num_bytes / math.log(2)

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        nats, targets = np.asarray(prediction.predictions, dtype=np.float64), np.asarray(prediction.label_ids)
        return {self.name: nats.sum() / max(1, targets.sum()) * self.bits_per_nat}


def compressor_baselines(train: list[str], texts: list[str]) -> dict[str, float]:
    """Bits per byte that the texts add to the compressed training texts, for general-purpose compressors."""
    seen, new = "".join(train).encode(), "".join(texts).encode()
    scores = {}
    for name, compress in (("xz", lambda x: lzma.compress(x, preset=9 | lzma.PRESET_EXTREME)), ("bz2", bz2.compress)):
        added = len(compress(seen + new)) - len(compress(seen))
        scores[f"{name}, given the training texts" if train else name] = 8 * added / len(new)
    return scores
