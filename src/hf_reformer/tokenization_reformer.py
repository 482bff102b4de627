"""A tokenizer whose tokens are the bytes of the text."""

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import BatchEncoding, TokenizersBackend
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging

logger = logging.get_logger(__name__)

BYTE_OFFSET = 2  # as in google/reformer-enwik8: id = byte + 2
WHITE_SPACE = [byte + BYTE_OFFSET for byte in b" \t\n\r\f\v"]
PAD, EOS, MASK, BOS = "<|pad|>", "<|eos|>", "<|mask|>", "<|bos|>"

# The `tokenizers` library represents every byte by a visible character ("Ġ" is the space).
VOCAB: dict[str, int] = {
    PAD: 0,
    EOS: 1,
    **{character: byte + BYTE_OFFSET for byte, character in bytes_to_unicode().items()},
    MASK: 258,
    BOS: 259,
}


class ReformerByteTokenizer(TokenizersBackend):
    r"""Fast byte-level tokenizer: the UTF-8 bytes of the text, each as `byte + 2`, and nothing else.

    | id       | token                                                     |
    |----------|-----------------------------------------------------------|
    | 0        | `<\|pad\|>`                                               |
    | 1        | `<\|eos\|>`, also the separator of pairs                  |
    | 2 to 257 | the bytes 0 to 255                                        |
    | 258      | `<\|mask\|>`                                              |
    | 259      | `<\|bos\|>`                                               |
    | 260 on   | added tokens, such as a `cls_token`                       |

    By default, no tokens are added around a text, and a pair becomes `A <|eos|> B`. Both use 258 ids and thus suit
    models with 258 embeddings (google/reformer-enwik8); masking and `<|bos|>` need 260, the `vocab_size`.
    `add_bos_token=True` and `add_eos_token=True` add these tokens around a text or pair.

    Offsets count characters: each byte of "é" points to that one character. Decoding is UTF-8; invalid bytes become
    U+FFFD, and ids outside the vocabulary, such as the -100 of labels, are skipped.

    Text that spells a special token (`"<|pad|>"`) is read as that token, as in all of transformers;
    `split_special_tokens=True` reads it as bytes. The pair format is fixed when the tokenizer is created: to change
    `sep_token` later, set it and call `update_post_processor()`.

    Args:
        pad_token, eos_token, mask_token, bos_token: Special tokens. Ids 0, 1, 258 and 259 keep the names above; any
            other name, here or below, is a new token after them.
        sep_token: Token between the two texts of a pair, or `None`.
        add_prefix_space: Add a space before a text that does not start with one. With `is_split_into_words=True`,
            this separates words.
        vocab: The vocabulary of `tokenizer.json`, which is only checked.
        model_input_names: Names of the outputs. Add `"token_type_ids"` for models that distinguish the texts of a pair
            (`ReformerConfig.type_vocab_size`).

    Raises:
        ValueError: The files belong to another tokenizer.

    Examples:
        >>> tokenizer = ReformerByteTokenizer()
        >>> tokenizer("Hé")["input_ids"]
        [74, 197, 171]
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json", "vocab_file": "spiece.model"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        pad_token: str | AddedToken | None = PAD,
        eos_token: str | AddedToken | None = EOS,
        sep_token: str | AddedToken | None = EOS,
        mask_token: str | AddedToken | None = MASK,
        bos_token: str | AddedToken | None = BOS,
        add_prefix_space: bool = False,
        vocab: dict[str, int] | list | None = None,
        **kwargs: Any,
    ) -> None:
        self._tokenizer = Tokenizer(BPE(vocab=VOCAB, merges=[]))  # nothing is normalized, nothing merged
        # Splitting into words changes no ids; it enables `word_ids()`, so that labels and masks can follow words.
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=True)
        self._tokenizer.decoder = decoders.ByteLevel()
        special = [AddedToken(token, normalized=False, special=True) for token in (PAD, EOS, MASK, BOS)]
        self._tokenizer.add_special_tokens(special)
        super().__init__(
            pad_token=pad_token,
            eos_token=eos_token,
            sep_token=sep_token,
            mask_token=mask_token,
            bos_token=bos_token,
            add_prefix_space=add_prefix_space,
            **kwargs,
        )
        if (self._tokenizer.get_vocab(with_added_tokens=False) if vocab is None else vocab) != VOCAB:
            raise ValueError(_foreign(self.name_or_path))

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Read `tokenizer.json` if it exists; without files (google/reformer-enwik8), use the byte vocabulary."""
        name = kwargs.get("name_or_path", "")
        vocab_file = kwargs.pop("vocab_file", None)
        if kwargs.get("tokenizer_file") is None:
            if vocab_file is not None:  # a SentencePiece model
                raise ValueError(_foreign(name))
            logger.warning(f"'{name}' has no tokenizer files; its text is read as bytes.")
        return super().convert_to_native_format(trust_remote_code=trust_remote_code, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> BatchEncoding:
        """Tokenize as in transformers; tensors are integers even if all texts are empty."""
        return _typed(super().__call__(*args, **kwargs))

    def pad(self, encoded_inputs: Any, *args: Any, **kwargs: Any) -> BatchEncoding:
        """Pad as in transformers, and also pad offsets, adapted to whole-word masking.

        For whole-word masking, transformers treats tokens without a gap in their offsets as one word. So white space
        before a word and all but the first byte of a character become empty spans at the end of what they represent.
        """
        several = isinstance(encoded_inputs, (list, tuple))
        rows = encoded_inputs if several else [encoded_inputs]
        if not all("offset_mapping" in row for row in rows) or not several:
            return _typed(super().pad(encoded_inputs, *args, **kwargs))
        without = [{name: x for name, x in row.items() if name != "offset_mapping"} for row in rows]
        padded = super().pad(without, *args, **kwargs)
        length = len(padded["input_ids"][0])
        offsets = []
        for row in rows:
            spans = _word_offsets(row["input_ids"], row["offset_mapping"])
            fill = [(0, 0)] * (length - len(spans))
            offsets.append([*fill, *spans] if self.padding_side == "left" else [*spans, *fill])
        tensors = kwargs.get("return_tensors")
        padded["offset_mapping"] = BatchEncoding({"x": offsets}, tensor_type=tensors)["x"]
        return _typed(padded)

    def update_post_processor(self) -> None:
        """Set the formats `[bos] A [eos]` and `[bos] A sep B [eos]` for the current special tokens."""
        bos = [self.bos_token] if self.add_bos_token and self.bos_token else []
        eos = [self.eos_token] if self.add_eos_token and self.eos_token else []
        sep = [self.sep_token] if self.sep_token else []
        self._tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *sep, "$B:1", *(f"{token}:1" for token in eos)],
            special_tokens=[(token, self.convert_tokens_to_ids(token)) for token in {*bos, *eos, *sep}],
        )

    def train_new_from_iterator(self, *args: Any, **kwargs: Any) -> "TokenizersBackend":
        """Raise NotImplementedError: there is nothing to learn, and merges would change the ids of the bytes."""
        raise NotImplementedError(
            "ReformerByteTokenizer has no vocabulary to train: its tokens are the 256 bytes. Use it, or train "
            "another tokenizer and give its size to the model as `vocab_size`."
        )

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Convert tokens to text. Strings that are not all tokens are words of a pipeline and are joined."""
        vocab = self.get_vocab()
        if all(token in vocab for token in tokens):
            return super().convert_tokens_to_string(tokens)
        return "".join(tokens)

    def _decode(self, token_ids: int | list[int], *args: Any, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        try:
            return super()._decode(ids, *args, **kwargs)
        except OverflowError:  # the Rust code accepts 0 ≤ id < 2³²
            return super()._decode([i for i in ids if 0 <= i < len(self)], *args, **kwargs)


def _typed(encoded: BatchEncoding) -> BatchEncoding:
    """Fix empty tensors, which torch creates as floats and, for offsets, with an axis missing."""
    for name, x in encoded.items():
        if isinstance(x, torch.Tensor) and x.numel() == 0:
            shape = (*x.shape, 2) if name == "offset_mapping" and x.dim() < 3 else x.shape
            encoded[name] = torch.zeros(shape, dtype=torch.int64)
    return encoded


def _word_offsets(ids: Any, offsets: Any) -> list[tuple[int, int]]:
    """Return the offsets of the bytes of one text, with a gap before every word and none inside."""
    found, before = [], None
    for token, span in zip(ids, offsets, strict=True):
        start, end = map(int, span)
        found.append((end if (start, end) == before or int(token) in WHITE_SPACE else start, end))
        before = start, end
    return found


def _foreign(name: str) -> str:
    return (
        f"'{name}' holds the vocabulary of another tokenizer, whose ids are not bytes. Load it with the class that "
        "made it (`transformers.ReformerTokenizer` for SentencePiece files of the built-in Reformer)."
    )
