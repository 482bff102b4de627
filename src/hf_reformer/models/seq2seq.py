"""Encoder-decoder: a bidirectional Reformer and a causal one with cross-attention to its states."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput, can_return_tuple

from ..cache.cache import CACHE_NAME, whole_step
from ..configuration_reformer import ReformerConfig
from .decoder import ReformerDecoder
from .input_checks import given_shape
from .language_models import ReformerGenerativeLM
from .losses import IGNORE, add_coverage_loss, check_label_shape, check_labels
from .modeling_reformer import ReformerModel
from .outputs import ReformerSeq2SeqLMOutput


class ReformerForConditionalGeneration(ReformerGenerativeLM):
    """Encoder-decoder with a language-model head, regardless of `config.is_encoder_decoder`.

    The encoder, `model`, is a `ReformerModel`. So other classes can load it from a folder of this class, and this
    class can start from the encoder in any folder. It shares token embeddings with `decoder`, and with
    `config.tie_encoder_decoder` everything except the decoder's cross-attention and the final norms.
    """

    def __init__(self, config: ReformerConfig):
        super().__init__(config.to_encoder_decoder())
        self.decoder = ReformerDecoder(self.config.decoder_config())
        self.decoder.embed_tokens = self.model.embed_tokens
        names = [name for name, _ in self.decoder.named_parameters(remove_duplicate=False)]
        shared = ("embed_tokens.", "position_embeddings.", "layers.")[: 3 if config.tie_encoder_decoder else 1]
        shared_names = [name for name in names if name.startswith(shared) and "cross_attention" not in name]
        self._tied_weights_keys = {f"decoder.{name}": f"model.{name}" for name in shared_names}
        self._tied_weights_keys |= type(self)._tied_weights_keys if config.tie_word_embeddings else {}
        self.post_init()
        if config.tie_encoder_decoder:  # two layers that share weights cannot be wrapped one by one
            self._no_split_modules = set()  # type: ignore[assignment]  # the library makes it a set

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a model as in transformers; from a folder of another model, load only the encoder."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.generation_config.decoder_start_token_id is None:  # not in the folder
            model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id
        model._check_sharing()
        return loaded

    def _check_sharing(self) -> None:
        """Raise ValueError if shared weights differ in the folder and were therefore not tied."""
        if not self.config.tie_encoder_decoder or getattr(self, "hf_quantizer", None) is not None:
            return
        named = dict(self.named_parameters(remove_duplicate=False))
        shared = self.get_expanded_tied_weights_keys().items()
        apart = [x for x, source in shared if x.startswith("decoder.") and named[x] is not named[source]]
        if apart:
            raise ValueError(
                f"`tie_encoder_decoder=True`, but the folder's encoder and decoder differ, {apart[0]} for one. Load "
                "it with `tie_encoder_decoder=False`, or begin with a folder of the encoder alone."
            )

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Map tied weights to their sources; unlike in transformers, also without `tie_word_embeddings`."""
        names = {name for name, _ in self.named_parameters(remove_duplicate=False)}
        return {name: source for name, source in self._tied_weights_keys.items() if {name, source} <= names}

    def get_encoder(self, *args: Any, **kwargs: Any) -> ReformerModel:
        return self.model

    def get_decoder(self) -> ReformerDecoder:
        return self.decoder

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = self.decoder.embed_tokens = value  # type: ignore[assignment]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.decoder.config.vocab_size = self.config.vocab_size
        return embeddings

    def enable_sequence_parallel(self, group: Any) -> None:
        """Not supported: raises ValueError unless `group` is None."""
        if group is not None:
            raise ValueError(
                "Processes cannot share the sequences of an encoder-decoder: its cross-attention looks at a whole "
                "source. Split the batch instead: DistributedDataParallel or FSDP."
            )

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """Shift labels (B, T) to the right, after the start token, and replace -100 by padding."""
        check_labels(labels, self.config.vocab_size)
        pad = self.config.decoder_start_token_id if self.config.pad_token_id is None else self.config.pad_token_id
        shifted = nn.functional.pad(labels[:, :-1], (1, 0), value=self.config.decoder_start_token_id)
        return shifted.masked_fill(shifted == IGNORE, pad)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.LongTensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        decoder_inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_hashes: int | None = None,
        num_buckets: int | list[int] | None = None,
        cache: Cache | None = None,
        token_type_ids: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> ReformerSeq2SeqLMOutput:
        r"""
        Args:
            input_ids, attention_mask, inputs_embeds, token_type_ids: the source, as in `ReformerModel`, (B, S).
            encoder_outputs: output of the encoder, instead of a source; its first entry is (B, S, 2 D). Without a
                `coverage_loss`, only the decoder's is used.
            decoder_input_ids or decoder_inputs_embeds: the target so far, (B, T), after the start token. Default:
                `labels`, shifted.
            decoder_attention_mask: (B, T), 1 for real tokens; with a cache, it also covers the earlier tokens.
            labels: (B, T) int64, the target of every position (not shifted again), -100 for no target.
            cache, past_key_values: two names for an `EncoderDecoderCache`, from an earlier call or empty.
            use_cache, logits_to_keep, num_items_in_batch: as in `ReformerForCausalLM`.
            num_hashes, num_buckets, output_attentions, output_hidden_states: as in `ReformerModel`, for both stacks.

        Returns:
            ReformerSeq2SeqLMOutput. `logits` (B, T, vocab_size) is None in training with labels.

        Raises:
            ValueError: invalid inputs; the message says which and why.
        """
        if any(name in kwargs for name in ("position_ids", "decoder_position_ids")):
            raise ValueError(
                "An encoder-decoder takes no position ids: positions follow from the masks, and a sequence is a "
                "single source or target, never several samples."
            )
        if labels is not None:  # before the encoder runs
            if labels.dim() != 2 or 0 in labels.shape:
                raise ValueError(
                    f"labels have shape {tuple(labels.shape)}; an encoder-decoder's must be (batch, length of the "
                    "target)."
                )
            check_labels(labels, self.config.vocab_size)
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)  # type: ignore[assignment]
            if decoder_attention_mask is None and self.model._covers(kwargs.get("output_coverage")):
                targets = (labels != IGNORE).long()
                decoder_attention_mask = targets.flip(-1).cummax(-1).values.flip(-1)  # without padding at the end
        if decoder_input_ids is None and decoder_inputs_embeds is None:
            raise ValueError(
                "The decoder has no input: give `labels` or `decoder_input_ids`. If the Trainer keeps the labels to "
                "itself, as for label smoothing, `DataCollatorForSeq2Seq(tokenizer, model=model)` creates both."
            )
        check_label_shape(labels, given_shape(decoder_input_ids, decoder_inputs_embeds))
        usable = isinstance(encoder_outputs, (ModelOutput, tuple, list)) and encoder_outputs
        if encoder_outputs is not None and not usable:
            raise ValueError(
                f"`encoder_outputs` is {type(encoder_outputs).__name__}. Give what the encoder returned, or a tuple "
                "that begins with its last hidden state, (B, S, 2 D)."
            )
        for name in ("output_attentions", "output_hidden_states"):
            kwargs[name] = getattr(self.config, name) if kwargs.get(name) is None else kwargs[name]
        kwargs.update(num_hashes=num_hashes, num_buckets=num_buckets, return_dict=True)
        if encoder_outputs is None:
            source = {"inputs_embeds": inputs_embeds, "token_type_ids": token_type_ids}
            encoder_outputs = self.model(input_ids, attention_mask, **source, **kwargs)
        with whole_step(past_key_values if cache is None else cache):
            outputs = self.decoder(
                decoder_input_ids,
                decoder_attention_mask,
                encoder_hidden_states=encoder_outputs[0],
                encoder_attention_mask=attention_mask,
                inputs_embeds=decoder_inputs_embeds,
                use_cache=use_cache,
                past_key_values=past_key_values,
                cache=cache,
                **kwargs,
            )
            hidden = outputs.last_hidden_state
            loss, logits = self._loss_and_logits(hidden, labels, None, num_items_in_batch, logits_to_keep)
            coverage = getattr(encoder_outputs, "coverage_loss", None), outputs.coverage_loss
            layers = [x for x in coverage if x is not None]  # of the encoder's layers, then the decoder's
            both = None if outputs.coverage_loss is None else torch.cat(layers)
            weight = self.config.coverage_loss_weight
            return ReformerSeq2SeqLMOutput(
                loss=add_coverage_loss(loss, both, weight, labels, num_items_in_batch, training=self.training),
                logits=logits,
                **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
                decoder_hidden_states=outputs.hidden_states,
                decoder_attentions=outputs.attentions,
                cross_attentions=outputs.cross_attentions,
                encoder_last_hidden_state=encoder_outputs[0],
                encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
                encoder_attentions=getattr(encoder_outputs, "attentions", None),
                coverage_loss=both,
            )


__all__ = ["ReformerForConditionalGeneration"]
