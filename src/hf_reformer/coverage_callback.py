"""Old name of `hf_reformer.training.coverage_callback`."""

import warnings

from .training.coverage_callback import CoverageCallback, received_by_layer

__all__ = ["CoverageCallback", "received_by_layer"]
warnings.warn("Import from hf_reformer.training.coverage_callback instead.", FutureWarning, stacklevel=2)
