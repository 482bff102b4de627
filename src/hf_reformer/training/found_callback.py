"""A Trainer callback that logs how much of exact attention hashing finds."""

from typing import Any

import torch
from transformers import Trainer
from transformers.utils import logging

from ..analysis.found import attention_found
from ..layers.attention import ReformerAttention
from ..models.losses import IGNORE
from .evaluation_callback import INPUTS, SIGNALS, EvaluationCallback

logger = logging.get_logger(__name__)

LOW_ENTROPY = 0.5  # below it, a few buckets hold nearly all tokens


class AttentionFoundCallback(EvaluationCallback):
    """Logs what hashing finds after every evaluation, as a mean over LSH layers and for each of them.

    `eval_attention_found`: the share of exact attention that falls on pairs visible to the layer (`attention_found`);
    `eval_bucket_entropy`: 1 if all buckets are equally full, 0 if one holds everything; `eval_fullest_bucket`: tokens
    in the fullest bucket, as a multiple of an even share. The numbers of a single layer have the suffix `_layer_1`, …;
    a decoder's layers follow those of its encoder.

    Warns once per layer whose entropy is below 0.5 in two evaluations with training between them: its hash orders then
    show little more than its position order. The recipes use this callback; with another Trainer, add it:

    ```python
    trainer.add_callback(AttentionFoundCallback(trainer))
    ```
    """

    names = ("eval_attention_found", "eval_bucket_entropy", "eval_fullest_bucket")

    def __init__(self, trainer: Trainer, batches: int = 1, sequences: int = 4, queries: int = 64):
        """
        Args:
            trainer: the Trainer, whose `log` receives the numbers.
            batches: number of evaluation batches to use.
            sequences: maximum number of sequences per batch.
            queries: maximum number of queries per sequence; memory grows with this number times the length.
        """
        super().__init__(trainer, batches)
        if not has_hashing_layers(trainer.model):
            raise ValueError("AttentionFoundCallback looks at lsh layers, and the model has none. Leave it out.")
        self.sequences, self.queries = sequences, queries
        self.low: dict[int, int] = {}  # layer of low entropy → step of the first such evaluation
        self.warned: set[int] = set()

    def layer_numbers(self, model: torch.nn.Module, batch: dict[str, Any]) -> dict[int, torch.Tensor]:
        names: tuple[str, ...] = (*INPUTS, *SIGNALS)
        config: Any = model.config
        if config.is_encoder_decoder:
            names = (*INPUTS, "decoder_input_ids", "decoder_attention_mask", "labels")
        inputs = {name: batch[name][: self.sequences] for name in names if batch.get(name) is not None}
        if "labels" in inputs:  # padding is not part of the target
            targets = (inputs["labels"] != IGNORE).long()
            inputs.setdefault("decoder_attention_mask", targets.flip(-1).cummax(-1).values.flip(-1))
        if getattr(model, "can_generate", lambda: False)():
            inputs["logits_to_keep"] = 1  # so that the logits take little memory
        found = attention_found(model, inputs, self.queries)
        return {x.layer: torch.stack([x.found, x.bucket_entropy, x.fullest_bucket]).mean(-1) for x in found}

    def judge(self, layers: dict[int, list[float]], step: int) -> None:
        if not self.trainer.is_world_process_zero():
            return
        for layer, (_, entropy, fullest) in layers.items():
            if entropy >= LOW_ENTROPY:
                self.low.pop(layer, None)
            elif step > self.low.setdefault(layer, step) and layer not in self.warned:
                self.warned.add(layer)
                logger.warning(
                    f"Layer {layer} hashes its tokens unevenly: the entropy of its buckets stays below {LOW_ENTROPY} "
                    f"({entropy:.2f}), and the fullest holds {fullest:.1f} times an even share. So its hash orders "
                    "show little that its local window does not. Are inputs too short for `num_buckets`? "
                    "`hf_reformer.analysis.attention_found` tells what hashing finds."
                )


def has_hashing_layers(model: Any) -> bool:
    """Whether the model has lsh layers of this package."""
    modules = model.modules() if isinstance(model, torch.nn.Module) else ()
    return any(isinstance(module, ReformerAttention) and module.kind == "lsh" for module in modules)
