"""Validation of inputs before any computation, and detection of packed samples."""

from typing import Any

import torch

from ..compat import assert_async, may_look_at, values_are_known
from ..configuration_checks import check_num_buckets
from ..ops.dispatch import resolve_backend


def reject_tracing(config: Any) -> None:
    """Raise NotImplementedError if TorchScript traces a model with sort orders, which traces cannot represent."""
    if torch.jit.is_tracing() and set(config.attn_layers) != {"full"}:
        way = "torch.onnx.export(dynamo=False)" if torch.onnx.is_in_onnx_export() else "torch.jit.trace"
        raise NotImplementedError(
            f"`{way}` cannot record local and lsh layers: how they cut a sequence into windows depends on its length, "
            "and a trace keeps one. Use `torch.export.export(model.eval(), …)`, which takes any batch and length, and "
            "save it with `torch.export.save`. For ONNX, `torch.onnx.export(…, dynamo=True)` also takes them."
        )


def check_inputs(
    config: Any, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, num_hashes: Any, num_buckets: Any,
    past: int = 0, token_type_ids: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Raise ValueError for invalid inputs. Values are checked in eager mode only.

    On a CUDA device, checking values would require synchronization, so device assertions reject them instead.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    x, name, axes = input_ids, "input_ids", "(batch, length)"
    if inputs_embeds is not None:
        x, name, axes = inputs_embeds, "inputs_embeds", "(batch, length, hidden_size)"
    shape = tuple(x.shape)
    if len(shape) != len(axes.split()):
        raise ValueError(f"`{name}` has shape {shape}; it must be {axes}.")
    if 0 in shape[:2]:
        raise ValueError(
            f"`{name}` has shape {shape}: an empty batch, or no token where caches, attentions, sorting or mass need "
            "one. Give at least one row and token."
        )
    if inputs_embeds is not None and shape[2] != config.hidden_size:
        raise ValueError(f"`inputs_embeds` is {shape[2]} wide, but `hidden_size={config.hidden_size}`.")
    types = token_type_ids if config.type_vocab_size else None
    for value, label in ((input_ids, "input_ids"), (position_ids, "position_ids"), (types, "token_type_ids")):
        if value is not None and value.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"`{label}` has dtype {value.dtype}; it must be torch.int64 or torch.int32.")
    if num_hashes is not None and (not isinstance(num_hashes, int) or num_hashes < 1):
        raise ValueError(f"`num_hashes={num_hashes}` must be a whole number of at least 1.")
    check_num_buckets(
        config.num_buckets if num_buckets is None else num_buckets,
        config.num_hashes if num_hashes is None else num_hashes,
    )
    resolve_backend(config.attention_backend)
    batch, length = shape[:2]
    for value, label, rows, columns in (
        (attention_mask, "attention_mask", (batch,), length + past),
        (position_ids, "position_ids", (batch, 1), length),
        (types, "token_type_ids", (batch,), length),
    ):
        if value is not None and (value.dim() != 2 or value.shape[0] not in rows or value.shape[1] != columns):
            raise ValueError(
                f"`{label}` has shape {tuple(value.shape)}; with `{name}` of {shape} and {past} tokens in the cache "
                f"it must be {(batch, columns)}."
            )
    if position_ids is None:
        _check_positions_cover(config, past + length, attention_mask)
    if values_are_known():
        _check_values(config, input_ids, attention_mask, position_ids, types)


def reject_ignored_packing_args(
    position_ids: torch.Tensor | None, cu_seq_lens_q: Any = None, seq_idx: torch.Tensor | None = None, **ignored: Any
) -> None:
    """Raise ValueError if other arguments indicate packed samples but there are no `position_ids`."""
    name = "cu_seq_lens_q" if cu_seq_lens_q is not None and len(cu_seq_lens_q) > 2 else None
    advice = (
        "indicates packed samples. They are separated by `position_ids` that restart at 0, and there are none (prompt "
        "tuning drops them). Give them, or pad."
    )
    if position_ids is None and name:
        raise ValueError(f"`{name}` {advice}")
    if position_ids is None and seq_idx is not None and values_are_known():
        refuse_values(seq_idx == seq_idx[:, :1], f"`seq_idx` {advice}")


def _check_positions_cover(config: Any, length: int, attention_mask: torch.Tensor | None) -> None:
    kind, covered = config.position_embedding_type, config.covered_positions
    if kind == "rotary" or length <= covered:
        return
    lengths = None
    if config.attention_mode == "window" and attention_mask is not None and values_are_known():
        lengths = (attention_mask != 0).sum(-1)  # padding has no position
        length = int(lengths.max()) if may_look_at(lengths) else length
    name = "axial_pos_shape" if kind == "axial" else "max_position_embeddings"
    message = (
        f"`{name}={getattr(config, name)}` covers {covered} positions but the input has {length} tokens. Make the "
        "model with a larger `max_position_embeddings`, shorten the input, or set "
        '`position_embedding_type="rotary"`.'
    )
    if lengths is not None:
        refuse_values(lengths <= covered, message)
    elif length > covered:
        raise ValueError(message)


def _check_values(
    config: Any, input_ids: torch.Tensor | None, mask: torch.Tensor | None, position_ids: torch.Tensor | None,
    types: torch.Tensor | None,
) -> None:  # fmt: skip
    if input_ids is not None and may_look_at(input_ids):
        low, high = (int(x) for x in input_ids.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"`input_ids` reach from {low} to {high}, but `vocab_size={config.vocab_size}` knows 0 … "
                f"{config.vocab_size - 1}. Use the model's own tokenizer, or `resize_token_embeddings`."
            )
    check_mask_values(mask)
    covered = config.covered_positions
    if position_ids is not None and config.position_embedding_type != "rotary":
        reach = "out"
        if may_look_at(position_ids):
            reach = "from {} to {}".format(*(int(x) for x in position_ids.aminmax()))
        within = (position_ids >= 0) & (position_ids < covered)
        refuse_values(within, f"`position_ids` reach {reach}, but the model covers 0 … {covered - 1}.")
    if types is not None:
        size = config.type_vocab_size
        refuse_values(
            (types >= 0) & (types < size),
            f"`token_type_ids` hold others than 0 … {size - 1}, and `type_vocab_size={size}`. Use the model's own "
            "tokenizer, or a model with a larger `type_vocab_size`.",
        )


def check_mask_values(mask: torch.Tensor | None) -> None:
    """Raise ValueError for mask values other than 0 and 1; in eager mode only."""
    if mask is not None and values_are_known():
        refuse_values(
            (mask == 0) | (mask == 1),
            "`attention_mask` holds values other than 0 and 1. Give 1 for real tokens and 0 for padding, no additive "
            "masks (0 and -inf).",
        )


def refuse_values(right: torch.Tensor, message: str) -> None:
    """Raise ValueError unless all of `right` is True; on a CUDA device, use an asynchronous assertion instead."""
    if may_look_at(right):
        if not bool(right.all()):
            raise ValueError(message)
    elif right.device.type != "meta":
        assert_async(right.all(), message)


def packed_samples(position_ids: torch.Tensor, ranks: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor | None:
    """Return each token's sample within its row, (B, T) int32; None if every row is one sample.

    A row is packed if the numbering of its real tokens restarts at 0, as written by data collators. Any other
    numbering is that of a single sample. Never None if values cannot be inspected.
    """
    begins = (position_ids == 0) & (ranks > 0)
    odd = (position_ids[:, 1:] != 0) & (position_ids[:, 1:] != position_ids[:, :-1] + 1)
    if mask is not None:
        begins, odd = begins & mask, odd & mask[:, 1:] & mask[:, :-1]
    begins = begins & ~odd.any(-1, keepdim=True)
    if may_look_at(begins) and not begins.any():
        return None
    return begins.cumsum(-1, dtype=torch.int32)


def reject_packed_samples(samples: torch.Tensor, advice: str) -> None:
    """Raise ValueError for samples that would be mixed; without access to values, by a device assertion.

    `advice` must not contain double quotes, since inductor copies it verbatim into C++.
    """
    message = f"`position_ids` restart at 0 within a row, which packs several samples into it. {advice}"
    if may_look_at(samples):
        raise ValueError(message)
    assert_async((samples == 0).all(), message)


def has_no_token(inputs: torch.Tensor | None) -> bool:
    """Whether the input is a batch of empty sequences, (B, 0) or (B, 0, D)."""
    return inputs is not None and inputs.dim() > 1 and inputs.shape[0] > 0 and inputs.shape[1] == 0


def given_shape(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Size:
    """Return the shape (B, T) of the input."""
    return (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
