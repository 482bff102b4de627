"""Statistics and plots of LSH attention."""

from ..ops.coverage import covered_fraction, mass_entropy
from .found import AttentionFound, attention_found, format_found
from .lsh_stats import (
    LayerView,
    attention_mass,
    bucket_balance,
    bucket_balance_by_head,
    bucket_sizes,
    round_agreement,
    view_layer,
    view_layers,
    visible_pairs,
)
from .memory import MemoryEstimate, estimate_memory, format_memory
from .plots import (
    attention_image,
    plot_attention,
    plot_attention_found,
    plot_attention_mass,
    plot_bucket_sizes,
    plot_buckets,
    plot_pairs,
    plot_round_agreement,
)
from .speed import measure_seconds

__all__ = [
    "AttentionFound",
    "LayerView",
    "MemoryEstimate",
    "attention_found",
    "attention_image",
    "attention_mass",
    "bucket_balance",
    "bucket_balance_by_head",
    "bucket_sizes",
    "covered_fraction",
    "estimate_memory",
    "format_found",
    "format_memory",
    "mass_entropy",
    "measure_seconds",
    "plot_attention",
    "plot_attention_found",
    "plot_attention_mass",
    "plot_bucket_sizes",
    "plot_buckets",
    "plot_pairs",
    "plot_round_agreement",
    "round_agreement",
    "view_layer",
    "view_layers",
    "visible_pairs",
]
