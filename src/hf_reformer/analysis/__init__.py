"""What LSH attention does, in numbers and in plots."""

from ..ops.coverage import covered_fraction, mass_entropy
from .lsh_stats import (
    LayerView,
    attention_mass,
    bucket_balance,
    bucket_sizes,
    round_agreement,
    view_layer,
    visible_pairs,
)
from .plots import (
    attention_image,
    plot_attention,
    plot_attention_mass,
    plot_bucket_sizes,
    plot_buckets,
    plot_pairs,
    plot_round_agreement,
)

__all__ = [
    "LayerView",
    "attention_image",
    "attention_mass",
    "bucket_balance",
    "bucket_sizes",
    "covered_fraction",
    "mass_entropy",
    "plot_attention",
    "plot_attention_mass",
    "plot_bucket_sizes",
    "plot_buckets",
    "plot_pairs",
    "plot_round_agreement",
    "round_agreement",
    "view_layer",
    "visible_pairs",
]
