"""Losses of the heads: exact under gradient accumulation, 0 without targets, and optionally chunked."""

import warnings
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from ..compat import may_look_at, values_are_known
from ..reversible.recompute import hooked_module, recomputed

IGNORE = -100
MAX_LOGITS = 2**22
Count = torch.Tensor | int | None


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, num_items: Count = None) -> torch.Tensor:
    """Compute the mean cross-entropy over labels other than -100, or their sum divided by `num_items`.

    The loss is 0 without targets.

    Args:
        logits: (N, C) floating; computed in at least float32.
        labels: (N) int64, -100 or 0 … C - 1.
    """
    check_label_shape(labels, logits.shape[:1])
    check_labels(labels, logits.shape[-1])
    return _summed(logits, labels) / _count(labels, num_items)


def chunked_cross_entropy(
    hidden: torch.Tensor,
    head: nn.Module,
    labels: torch.Tensor,
    vocab_size: int,
    chunk: int = 0,
    num_items: Count = None,
) -> torch.Tensor:
    """Compute `cross_entropy(head(hidden), labels)` with logits for `chunk` tokens at a time, also in backward.

    If most tokens have no target, as with masked tokens, no logits are computed for them, except on a GPU, where
    selecting the others would wait for the device.

    Args:
        hidden: (N, D); head: D → vocab_size.
        chunk: number of tokens at a time; 0: enough for about four million logits.
    """
    check_labels(labels, vocab_size)
    if may_look_at(labels) and 2 * (labels != IGNORE).sum() < len(labels):
        targets = (labels != IGNORE).nonzero()[:, 0]
        hidden, labels = hidden[targets], labels[targets]
    chunk = chunk or max(1, MAX_LOGITS // vocab_size)
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    # Before torch 2.13, FSDP2 frees the weights of its root before a checkpoint within it is recomputed.
    keep_logits = chunk >= hidden.shape[0] or (torch.__version__ < "2.13" and dist.is_initialized())
    keep_logits = keep_logits or hooked_module(head) is not None
    of_head = partial(_head_loss, head)
    for part, targets in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        total = total + (of_head(part, targets) if keep_logits else recomputed(head, of_head, part, targets))
    return total / _count(labels, num_items)


def add_coverage_loss(
    loss: torch.Tensor | None,
    coverage: torch.Tensor | None,
    weight: float,
    targets: torch.Tensor | None = None,
    num_items: Count = None,
    training: bool = False,
) -> torch.Tensor | None:
    """Add `weight` times the coverage loss of all layers to a task's loss; None if the task has no loss.

    Args:
        coverage: (layers), or None.
        targets, num_items: if the task's loss is divided by `num_items`, a batch's coverage loss is weighted by
            its share of the targets, so that accumulated batches yield a mean.
        training: warn if there is a coverage loss but no loss to add it to.
    """
    if coverage is None or not weight:
        return loss
    if loss is None:
        if training and not torch.compiler.is_compiling():
            warnings.warn(
                f"coverage_loss_weight={weight}, but without labels there is no loss to add the coverage loss to. "
                "Where the loss is computed elsewhere (label smoothing), add `weight * outputs.coverage_loss.sum()`.",
                stacklevel=2,
            )
        return None
    extra = weight * coverage.sum()
    if num_items is not None and targets is not None:
        extra = extra * ((targets != IGNORE).sum().to(extra.device) / _count(targets, num_items))
    return loss + extra.to(loss.dtype)


def check_labels(labels: torch.Tensor, classes: int) -> None:
    """Raise ValueError for labels that are neither -100 nor a class index; in eager mode only."""
    if not values_are_known() or labels.numel() == 0:
        return
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels have dtype {labels.dtype}, but this loss needs class indices. Use `labels.long()`.")
    if not may_look_at(labels):
        return  # torch's own loss refuses them when it runs
    low, high = labels.masked_fill(labels == IGNORE, 0).aminmax()
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels reach from {int(low)} to {int(high)}, but there are {classes} classes (0 … {classes - 1}). Mark "
            f"tokens without a target with {IGNORE}, or set `num_labels` / `vocab_size` to fit the data."
        )


def check_label_shape(labels: torch.Tensor | None, shape: torch.Size) -> None:
    """Raise ValueError for labels of a different shape."""
    if labels is not None and labels.shape != shape:
        raise ValueError(f"labels have shape {tuple(labels.shape)}. There must be a target for each of {(*shape,)}.")


def _head_loss(head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return _summed(head(hidden), labels)


def _summed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(logits.device, torch.int64)
    return nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


def _count(labels: torch.Tensor, num_items: Count) -> torch.Tensor | int:
    if num_items is None:
        num_items = (labels != IGNORE).sum()
    return num_items.to(labels.device).clamp(min=1) if isinstance(num_items, torch.Tensor) else max(num_items, 1)
