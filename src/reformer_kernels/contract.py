"""Accelerated backends of ordered attention; everything runs without them, only slower."""

from hf_reformer.ops.layout import AttentionLayout

CONTRACT = 3  # of what attention_ops.py calls here, and how; another number wherever that changes
MAX_PLACES = 2**29  # places of a line, so that one wrapped around still fits in int32


def check_places(orders: AttentionLayout) -> None:
    """Raise ValueError for a line of more than MAX_PLACES places (rounds x tokens)."""
    places = orders.perm.shape[2] * orders.perm.shape[3]
    if places > MAX_PLACES:
        raise ValueError(f"{places} places a line (rounds x tokens) are more than {MAX_PLACES}. Split the sequence.")
