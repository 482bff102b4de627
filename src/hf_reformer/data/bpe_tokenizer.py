"""Training a byte-level BPE tokenizer on texts."""

import re
from collections.abc import Iterable, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
INPUT_NAMES = ("input_ids", "attention_mask")
_LONG_WORD = re.compile(r"(\S{256})(?=\S)")


def train_bpe_tokenizer(
    texts: Iterable[str],
    vocab_size: int = 8192,
    max_length: int = 4096,
    input_names: Sequence[str] = INPUT_NAMES,
    causal: bool = False,
) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE from `texts`. Every text can be encoded.

    Args:
        input_names: what the tokenizer returns; `token_type_ids`, if included, are 1 for a second text and its end
            token, else 0.
        causal: add no end token: `<s> A` and `<s> A </s> B`, instead of `<s> A </s>` and `<s> A </s> B </s>`.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Every merge scans the words that contain it: one word of 100,000 letters would take minutes.
    backend.train_from_iterator((_LONG_WORD.sub(r"\1\n", text) for text in texts), trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A" if causal else "<s> $A </s>",
        pair="<s> $A </s> $B:1" if causal else "<s> $A </s> $B:1 </s>:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=max_length,
        model_input_names=list(input_names),
        **SPECIAL,
    )
