"""Audio heads: transcription with connectionist temporal classification (Graves et al. 2006), and classification."""

from typing import Any

import torch
from torch import nn
from transformers.utils import can_return_tuple

from ..compat import may_look_at
from ..configuration_reformer import ReformerConfig
from ..ops.sequence_parallel import gather_sequence
from .frontend import FrameEmbeddings, checked_signal
from .heads_text import ClassificationHead, classification_loss, classifier_dropout, pool
from .losses import IGNORE, check_labels
from .modeling_reformer import ReformerModel
from .outputs import ReformerCTCOutput, ReformerSequenceClassifierOutput
from .pretrained import ReformerPreTrainedModel


class ReformerForCTC(ReformerPreTrainedModel):
    """Reformer for speech recognition: character logits for every frame, and CTC loss."""

    main_input_name = "input_values"
    accepts_loss_kwargs = False  # the loss is a mean over rows

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.main_input_name = "input_values" if config.num_input_features == 1 else "input_features"
        self.model = ReformerModel(config)
        self.model.set_input_embeddings(FrameEmbeddings(config))
        self.dropout = nn.Dropout(classifier_dropout(config))
        self.lm_head = nn.Linear(2 * config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        input_features: torch.FloatTensor | None = None,
        **kwargs: Any,
    ) -> ReformerCTCOutput:
        r"""
        Args:
            input_values: (B, N) waveforms of any length; or `input_features`: (B, N, num_input_features).
            attention_mask: (B, N), 1 for real samples, which come first.
            labels: (B, L) int64, ids of the transcripts, -100 for padding.

        Returns:
            ReformerCTCOutput with `logits` (B, frames, vocab_size), one frame for every `frame_stride` samples. At
            padding, all logits but the blank's are the lowest number of the dtype.
        """
        signal = checked_signal(self.config, input_values, input_features, attention_mask)
        outputs, mask, shard = listen(self.model, signal, attention_mask, **kwargs)
        logits = gather_sequence(self.lm_head(self.dropout(outputs.last_hidden_state)), shard)
        loss = None if labels is None else ctc_loss(self.config, logits, mask, labels)
        blank = self.config.pad_token_id
        if mask is not None and blank is not None:  # greedy decoding then finds nothing there
            others = torch.arange(logits.shape[-1], device=logits.device) != blank
            padding = (mask == 0).to(logits.device)[..., None]
            logits = logits.masked_fill(padding & others, torch.finfo(logits.dtype).min)
        return self._head_output(ReformerCTCOutput, outputs, loss, logits=logits)


class ReformerForAudioClassification(ReformerPreTrainedModel):
    """Reformer with a classification or regression head over a whole recording (`config.classifier_pooling`)."""

    main_input_name = "input_values"
    accepts_loss_kwargs = False  # the loss is a mean over rows

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.main_input_name = "input_values" if config.num_input_features == 1 else "input_features"
        self.num_labels = config.num_labels
        self.model = ReformerModel(config)
        self.model.set_input_embeddings(FrameEmbeddings(config))
        self.classifier = ClassificationHead(config, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        input_features: torch.FloatTensor | None = None,
        **kwargs: Any,
    ) -> ReformerSequenceClassifierOutput:
        r"""
        Args:
            input_values: (B, N) waveforms of any length; or `input_features`: (B, N, num_input_features).
            attention_mask: (B, N), 1 for real samples, which come first.
            labels: (B) int64 classes; floats, (B) or (B, num_labels), for regression or multi-label classification.
        """
        signal = checked_signal(self.config, input_values, input_features, attention_mask)
        outputs, mask, shard = listen(self.model, signal, attention_mask, **kwargs)
        pooled = pool(outputs.last_hidden_state, mask, self.config.pooling, shard)
        logits = self.classifier(pooled)
        loss = None if labels is None else classification_loss(self.config, logits, labels.to(logits.device))
        return self._head_output(ReformerSequenceClassifierOutput, outputs, loss, logits=logits)


def listen(
    model: ReformerModel, signal: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
) -> tuple[Any, torch.Tensor | None, Any]:
    """Run the backbone on a signal (B, N, F); returns its output, the mask (B, frames) of frames, and the shard."""
    frames: Any = model.embed_tokens
    embeds = frames(signal, attention_mask)
    mask = None if attention_mask is None else frames.mask(attention_mask)
    outputs = model(inputs_embeds=embeds, attention_mask=mask, return_dict=True, **kwargs)
    return outputs, mask, model.shard(embeds.shape[1])


def ctc_loss(
    config: ReformerConfig, logits: torch.Tensor, mask: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """Compute the CTC loss in at least float32, with `config.pad_token_id` as the blank.

    Args:
        logits: (B, frames, vocab_size); mask: (B, frames), ones first; labels: (B, L) int64, -100 for padding.

    Raises:
        ValueError: no valid blank; labels of another batch size, outside the vocabulary, or equal to the blank.
    """
    blank = config.pad_token_id
    if blank is None or not 0 <= blank < config.vocab_size:
        raise ValueError(f"`pad_token_id={blank}` is the blank of CTC and must be one of {config.vocab_size} tokens.")
    if labels.dim() != 2 or labels.shape[0] != logits.shape[0]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}; they must be (batch of {logits.shape[0]}, length)."
        )
    check_labels(labels, config.vocab_size)
    if may_look_at(labels) and bool((labels == blank).any()):
        raise ValueError(
            f"labels hold {blank}, the blank of CTC (`pad_token_id`), which stands for no character. Pad labels with "
            f"{IGNORE}."
        )
    labels = labels.to(logits.device)
    real = labels != IGNORE
    frames = logits.shape[1]
    lengths = labels.new_full(labels.shape[:1], frames) if mask is None else mask.sum(-1).to(logits.device)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    with torch.backends.cudnn.flags(enabled=False):  # cuDNN's loss has limits of its own and is not deterministic
        return nn.functional.ctc_loss(
            scores.transpose(0, 1),
            labels[real],
            lengths,
            real.sum(-1),
            blank,
            config.ctc_loss_reduction,
            config.ctc_zero_infinity,
        )
