"""Every head with inputs and labels: padded on both sides, labels with holes, an answer outside the input; recordings
of several lengths, a small picture, and series with gaps."""

import pytest
import torch
from conftest import SMALL_WINDOWS, make_ids, make_model

from hf_reformer import (
    ReformerForAudioClassification,
    ReformerForCausalLM,
    ReformerForCTC,
    ReformerForImageClassification,
    ReformerForMaskedLM,
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTimeSeriesPrediction,
    ReformerForTokenClassification,
)

IDS = make_ids(3, 20)
MASK = torch.ones_like(IDS)
MASK[1, 14:], MASK[2, :5] = 0, 0  # padded right, and left
HOLES = torch.where(make_ids(3, 20, seed=5) % 3 == 0, -100, IDS)  # labels, some of them no target
STARTS, ENDS = torch.tensor([2, 0, 7]), torch.tensor([4, 25, 19])  # the second answer ends outside the input
NOISE = torch.randn(3, 41, 24, generator=torch.Generator().manual_seed(0))
WAVES = {"input_values": NOISE[..., 0], "attention_mask": torch.ones(3, 41, dtype=torch.long)}
WAVES["attention_mask"][1, 23:] = WAVES["attention_mask"][2, 5:] = 0
PAST, FUTURE = NOISE[:, :20, :2].clone(), NOISE[:, 20:26, :2].clone()
PAST[1, :9] = PAST[2, 12, 1] = FUTURE[0, 3, 0] = torch.nan  # a series that begins late, and gaps
SIGNALS = {  # class → inputs
    ReformerForAudioClassification: WAVES,
    ReformerForCTC: WAVES,
    ReformerForImageClassification: {"pixel_values": NOISE[:, :15, :4].unflatten(1, (3, 5))},
    ReformerForTimeSeriesPrediction: {"past_values": PAST},
}
TEXT_HEADS = {
    ReformerForCausalLM: {"labels": HOLES},
    ReformerForMaskedLM: {"labels": HOLES},
    ReformerForSequenceClassification: {"labels": torch.tensor([1, 0, 2])},
    ReformerForTokenClassification: {"labels": torch.where(HOLES == -100, -100, HOLES % 3)},
    ReformerForQuestionAnswering: {"start_positions": STARTS, "end_positions": ENDS},
    ReformerForMultipleChoice: {"labels": torch.tensor([1])},
}
HEADS = {
    **TEXT_HEADS,
    ReformerForAudioClassification: {"labels": torch.tensor([1, 0, 2])},
    ReformerForCTC: {"labels": torch.tensor([[5, 5, -100, 7], [1, -100, -100, 9], [-100, -100, -100, -100]])},
    ReformerForImageClassification: {"labels": torch.tensor([1, 0, 2])},
    ReformerForTimeSeriesPrediction: {"future_values": FUTURE},
}
text_heads = pytest.mark.parametrize("cls", TEXT_HEADS, ids=lambda cls: cls.__name__)
heads = pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__)


def make_head(cls, **overrides):
    return make_model(cls, **{**SMALL_WINDOWS, "num_labels": 3, **overrides})


def inputs_of(cls, ids=IDS, mask=MASK) -> dict:
    """Inputs as the head wants them; multiple choice: one question with three choices. Signals are always the same."""
    if cls in SIGNALS:
        return {name: x.clone() for name, x in SIGNALS[cls].items()}
    if cls is ReformerForMultipleChoice:
        ids, mask = ids[None], mask[None]
    return {"input_ids": ids, "attention_mask": mask}
