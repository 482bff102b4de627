"""Accelerated backends of ordered attention; everything runs without them, only slower."""

from hf_reformer.ops.lsh import Orders

CONTRACT = 3  # of what attention_ops.py calls here, and how; another number wherever that changes
LONGEST_LINE = 2**29  # places of a line, so that one wrapped around still fits in int32


def check_places(orders: Orders) -> None:
    """Raise ValueError for a line of more than LONGEST_LINE places (rounds x tokens)."""
    places = orders.line.shape[2] * orders.line.shape[3]
    if places > LONGEST_LINE:
        raise ValueError(f"{places} places a line (rounds x tokens) are more than {LONGEST_LINE}. Split the sequence.")
