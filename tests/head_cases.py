"""Every head with inputs and labels: padded on both sides, labels with holes, an answer outside the input."""

import pytest
import torch
from conftest import SMALL_WINDOWS, make_ids, make_model

from hf_reformer import (
    ReformerForCausalLM,
    ReformerForMaskedLM,
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTokenClassification,
)

IDS = make_ids(3, 20)
MASK = torch.ones_like(IDS)
MASK[1, 14:], MASK[2, :5] = 0, 0  # padded right, and left
HOLES = torch.where(make_ids(3, 20, seed=5) % 3 == 0, -100, IDS)  # labels, some of them no target
STARTS, ENDS = torch.tensor([2, 0, 7]), torch.tensor([4, 25, 19])  # the second answer ends outside the input
HEADS = {
    ReformerForCausalLM: {"labels": HOLES},
    ReformerForMaskedLM: {"labels": HOLES},
    ReformerForSequenceClassification: {"labels": torch.tensor([1, 0, 2])},
    ReformerForTokenClassification: {"labels": torch.where(HOLES == -100, -100, HOLES % 3)},
    ReformerForQuestionAnswering: {"start_positions": STARTS, "end_positions": ENDS},
    ReformerForMultipleChoice: {"labels": torch.tensor([1])},
}
heads = pytest.mark.parametrize("cls", HEADS, ids=lambda cls: cls.__name__)


def make_head(cls, **overrides):
    return make_model(cls, **{**SMALL_WINDOWS, "num_labels": 3, **overrides})


def inputs_of(cls, ids=IDS, mask=MASK) -> dict:
    """Inputs as the head wants them; multiple choice: one question with three choices."""
    if cls is ReformerForMultipleChoice:
        ids, mask = ids[None], mask[None]
    return {"input_ids": ids, "attention_mask": mask}
