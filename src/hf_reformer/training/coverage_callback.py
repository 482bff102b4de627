"""A Trainer callback that logs how far attention reaches, and the function behind it."""

from typing import Any

import torch
from transformers import Trainer

from ..analysis.lsh_stats import stack_outputs
from ..models.input_checks import packed_samples
from ..models.modeling_reformer import ReformerModel
from ..ops.coverage import covered_fraction, mass_entropy
from .evaluation_callback import INPUTS, EvaluationCallback


@torch.no_grad()
def attention_mass_by_layer(model: torch.nn.Module, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Compute the share of attention that every token receives in every layer: (layers, B, T), summing to 1 over T.

    The shares are means over heads and real queries, before dropout. Unlike the matrices of `output_attentions`, they
    cost little more than a forward pass.

    Args:
        model: any model of this package, in training or evaluation mode.
        input_ids, inputs: inputs of the model. The shares of each packed sample sum to 1.

    Raises:
        ValueError: the model contains no `ReformerModel`, or a cache is given.
    """
    stack = next((module for module in model.modules() if isinstance(module, ReformerModel)), None)
    if stack is None:
        raise ValueError(f"{type(model).__name__} holds no ReformerModel, so no layer reports its attention mass.")
    (output,) = stack_outputs(model, [stack], input_ids=input_ids, output_attention_mass=True, **inputs)
    return torch.stack(output.attention_mass)


class CoverageCallback(EvaluationCallback):
    """Logs how far attention reaches after every evaluation, as a mean over layers and for each of them.

    `eval_received_entropy`: entropy of the attention mass, 1 if all tokens receive the same; `eval_reached_share`: the
    fraction of tokens that receive at least a tenth of the even mass (`least`). The numbers of a single layer have the
    suffix `_layer_0`, …

    ```python
    trainer.add_callback(CoverageCallback(trainer))
    ```
    """

    names = ("eval_received_entropy", "eval_reached_share")

    def __init__(self, trainer: Trainer, batches: int = 1, least: float = 0.1):
        """
        Args:
            trainer: the Trainer, whose `log` receives the numbers.
            batches: number of evaluation batches to use.
            least: share of the even mass from which a token counts as reached.
        """
        super().__init__(trainer, batches)
        if getattr(getattr(trainer.model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                "CoverageCallback looks at models of one stack, and this is an encoder-decoder. Its `coverage_loss` "
                "covers every layer of both."
            )
        self.least = least

    def layer_numbers(self, model: torch.nn.Module, batch: dict[str, Any]) -> dict[int, torch.Tensor]:
        """Compute entropy and covered fraction, averaged over samples with at least one real token."""
        inputs = {name: batch[name] for name in INPUTS if batch.get(name) is not None}
        mass = attention_mass_by_layer(model, **inputs).float()
        real = inputs.get("attention_mask", torch.ones_like(mass[0])) != 0
        samples = None
        if "position_ids" in inputs:
            samples = packed_samples(inputs["position_ids"], (real.cumsum(-1) - 1).clamp(min=0), real)
        if samples is not None:  # a sequence for each packed sample; its tokens stay where they are
            parts = [real & (samples == sample) for sample in range(int(samples.max()) + 1)]
            mass, real = torch.cat([torch.where(part, mass, 0) for part in parts], dim=1), torch.cat(parts)
        some = real.any(-1)
        mass, real = mass[:, some], real[some]
        numbers = mass_entropy(mass, real), covered_fraction(mass, real, self.least)
        return dict(enumerate(torch.stack([x.mean(-1) for x in numbers], dim=-1)))
