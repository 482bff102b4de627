"""Old name of `hf_reformer.training.distributed`."""

import warnings

from .training.distributed import RepeatedBatches, SequenceParallelTrainer, fsdp_policy

__all__ = ["RepeatedBatches", "SequenceParallelTrainer", "fsdp_policy"]
warnings.warn("Import from hf_reformer.training.distributed instead.", FutureWarning, stacklevel=2)
