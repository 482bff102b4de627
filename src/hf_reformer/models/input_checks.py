"""What a model looks at in its inputs before it computes: whether they can be right, and what is packed into a row."""

import math
from typing import Any

import torch

from ..compat import assert_async
from ..configuration_reformer import ReformerConfig, check_num_buckets
from ..ops.dispatch import resolve_backend


def check_inputs(
    config: ReformerConfig,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    num_hashes: int | None,
    num_buckets: int | tuple[int, ...] | list[int] | None,
    past: int = 0,
) -> None:
    """Raise ValueError for inputs that cannot be right. Values are looked at in eager mode only."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    given, name = (input_ids, "input_ids") if inputs_embeds is None else (inputs_embeds, "inputs_embeds")
    shape = tuple(given.shape)
    if given.dim() != (2 if inputs_embeds is None else 3):
        wanted = "(batch, length)" if inputs_embeds is None else "(batch, length, hidden_size)"
        raise ValueError(f"`{name}` has shape {shape}; it must be {wanted}.")
    if 0 in shape[:2]:
        raise ValueError(f"`{name}` has shape {shape}: an empty batch or sequence. Give at least one row and token.")
    if inputs_embeds is not None and shape[2] != config.hidden_size:
        raise ValueError(f"`inputs_embeds` is {shape[2]} wide, but `hidden_size={config.hidden_size}`.")
    for value, label in ((input_ids, "input_ids"), (position_ids, "position_ids")):
        if value is not None and value.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"`{label}` has dtype {value.dtype}; it must be torch.int64 or torch.int32.")
    if num_hashes is not None and (not isinstance(num_hashes, int) or num_hashes < 1):
        raise ValueError(f"`num_hashes={num_hashes}` must be a whole number of at least 1.")
    if num_buckets is not None:
        check_num_buckets(num_buckets)
    resolve_backend(config.attention_backend)
    for value, label in ((attention_mask, "attention_mask"), (position_ids, "position_ids")):
        rows = (shape[0],) if label == "attention_mask" else (shape[0], 1)
        length = shape[1] + (past if label == "attention_mask" else 0)
        if value is not None and (value.dim() != 2 or value.shape[0] not in rows or value.shape[1] != length):
            held = f" and {past} tokens in the cache" if past else ""
            raise ValueError(
                f"`{label}` has shape {tuple(value.shape)}; with `{name}` of {shape}{held} it must be "
                f"{(shape[0], length)}."
            )
    if position_ids is None:
        _check_positions_cover(config, past + shape[1], attention_mask)
    if not torch.compiler.is_compiling():
        _check_values(config, input_ids, attention_mask, position_ids)


def reject_ignored_packing_args(
    position_ids: torch.Tensor | None, cu_seq_lens_q: Any = None, seq_idx: Any = None, **ignored: Any
) -> None:
    """Raise ValueError for arguments without which a result would be wrong, and of which the model makes no use."""
    told = "cu_seq_lens_q" if cu_seq_lens_q is not None and len(cu_seq_lens_q) > 2 else None
    if seq_idx is not None and not torch.compiler.is_compiling() and bool((seq_idx != seq_idx[:, :1]).any()):
        told = "seq_idx"
    if position_ids is None and told:
        raise ValueError(
            f"`{told}` says that several samples are packed into a row. They are told apart by `position_ids` that "
            "restart at 0, and there are none (prompt tuning drops them). Give them, or pad."
        )


def _check_positions_cover(config, length: int, attention_mask) -> None:
    kind, covered = config.position_embedding_type, config.max_position_embeddings
    if kind == "axial":
        covered = math.prod(config.axial_pos_shape)
    if kind == "rotary" or length <= covered:
        return
    if config.attention_mode == "window" and attention_mask is not None and not torch.compiler.is_compiling():
        length = int((attention_mask != 0).sum(-1).max())  # padding has no position
    if length > covered:
        field = (
            f"axial_pos_shape={config.axial_pos_shape}" if kind == "axial" else f"max_position_embeddings={covered}"
        )
        raise ValueError(
            f"`{field}` covers {covered} positions but the input has {length} tokens. Make the model with a larger "
            '`max_position_embeddings`, shorten the input, or set `position_embedding_type="rotary"`.'
        )


def _check_values(config, input_ids, attention_mask, position_ids) -> None:
    if input_ids is not None and input_ids.device.type != "meta":
        low, high = (int(x) for x in input_ids.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"`input_ids` reach from {low} to {high}, but `vocab_size={config.vocab_size}` knows 0 … "
                f"{config.vocab_size - 1}. Use the model's own tokenizer, or `resize_token_embeddings`."
            )
    check_mask_values(attention_mask)
    if position_ids is not None and config.position_embedding_type != "rotary" and position_ids.device.type != "meta":
        covered = config.max_position_embeddings
        if config.position_embedding_type == "axial":
            covered = math.prod(config.axial_pos_shape)
        low, high = (int(x) for x in position_ids.aminmax())
        if low < 0 or high >= covered:
            raise ValueError(f"`position_ids` reach from {low} to {high}, but the model covers 0 … {covered - 1}.")


def check_mask_values(mask: torch.Tensor | None) -> None:
    """Raise ValueError for anything but 0 and 1; in eager mode only."""
    if mask is None or mask.device.type == "meta" or torch.compiler.is_compiling():
        return
    if bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            "`attention_mask` holds values other than 0 and 1. Give 1 for real tokens and 0 for padding; additive "
            "masks (0 and -inf) are not understood."
        )


def packed_samples(position_ids: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which sample of its row each token belongs to, (B, T) int32; None where every row is one sample.

    A row is packed where its real tokens are numbered from 0 again and again, as data collators do; numbers of any
    other kind are one sample's. Under compile, where values cannot be looked at, never None.
    """
    begins = (position_ids == 0) & (ranks > 0)
    odd = (position_ids[:, 1:] != 0) & (position_ids[:, 1:] != position_ids[:, :-1] + 1)
    if mask is not None:
        begins, odd = begins & mask, odd & mask[:, 1:] & mask[:, :-1]
    begins = begins & ~odd.any(-1, keepdim=True)
    if not torch.compiler.is_compiling() and not begins.any():
        return None
    return begins.cumsum(-1, dtype=torch.int32)


def reject_packed_samples(samples: torch.Tensor, advice: str) -> None:
    """Raise for samples that would be mixed; when it runs where this is compiled.

    advice: without double quotes, since inductor writes it into C++ as it is.
    """
    message = f"`position_ids` restart at 0 within a row, which packs several samples into it. {advice}"
    if not torch.compiler.is_compiling():
        raise ValueError(message)
    assert_async((samples == 0).all(), message)


def given_shape(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Size:
    """(B, T) of the input; what there is of it was checked by the backbone."""
    return (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
