"""The image classification head. To generate images pixel by pixel, use `ReformerForCausalLM` over pixel values."""

from typing import Any

import torch
from transformers.utils import can_return_tuple

from ..configuration_reformer import ReformerConfig
from .frontend import PatchEmbeddings, check_pixels
from .heads_text import ClassificationHead, classification_loss, pool
from .modeling_reformer import ReformerModel
from .outputs import ReformerImageClassifierOutput
from .pretrained import ReformerPreTrainedModel


class ReformerForImageClassification(ReformerPreTrainedModel):
    """Reformer with a classification or regression head over all pixels, or patches, of an image."""

    main_input_name = "pixel_values"
    accepts_loss_kwargs = False  # the loss is a mean over rows

    def __init__(self, config: ReformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ReformerModel(config)
        self.model.set_input_embeddings(PatchEmbeddings(config))
        self.classifier = ClassificationHead(config, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.FloatTensor | None = None, labels: torch.Tensor | None = None, **kwargs: Any
    ) -> ReformerImageClassifierOutput:
        r"""
        Args:
            pixel_values: (B, num_channels, height, width), images of any size. Tokens are square patches, `patch_size`
                pixels on a side, at their positions in the grid of `rotary_shape` or `axial_pos_shape`.
            labels: (B) int64 classes; floats, (B) or (B, num_labels), for regression or multi-label classification.
        """
        check_pixels(self.config, pixel_values)
        embeds = self.model.embed_tokens(pixel_values)
        positions = self.model.embed_tokens.position_ids(pixel_values)
        outputs = self.model(inputs_embeds=embeds, position_ids=positions, return_dict=True, **kwargs)
        pooled = pool(outputs.last_hidden_state, None, self.config.pooling, self.model.shard(embeds.shape[1]))
        logits = self.classifier(pooled)
        loss = None if labels is None else classification_loss(self.config, logits, labels.to(logits.device))
        return self._head_output(ReformerImageClassifierOutput, outputs, loss, logits=logits)
