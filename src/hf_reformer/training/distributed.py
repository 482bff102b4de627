"""Training on several devices with accelerate and the Trainer: precision under FSDP2, sequence parallelism."""

from collections.abc import Iterator, Sized
from itertools import chain, cycle, islice
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader, IterableDataset, Sampler
from transformers import Trainer


def fsdp_policy(
    param_dtype: torch.dtype = torch.bfloat16, reduce_dtype: torch.dtype = torch.float32
) -> MixedPrecisionPolicy:
    """Mixed precision for FSDP2 that keeps reversible layers exact and their memory independent of depth.

    accelerate's default policy casts the inputs of every layer, the residual streams included, so that they cannot be
    recomputed exactly. Pass this one to `FullyShardedDataParallelPlugin(mixed_precision_policy=...)`, or to a Trainer
    before `train()`:

        trainer.accelerator.state.fsdp_plugin.mixed_precision_policy = fsdp_policy()
    """
    return MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)


class RepeatedBatches(Sampler[int]):
    """Repeats every batch of another sampler; the last batch is filled up with the first indices.

    If processes fetch batches in turn, `times` consecutive processes then get the same batch.
    """

    def __init__(self, sampler: Sampler[int], batch_size: int, times: int):
        self.sampler, self.batch_size, self.times = sampler, batch_size, times

    def __len__(self) -> int:
        assert isinstance(self.sampler, Sized)
        return -(-len(self.sampler) // self.batch_size) * self.batch_size * self.times

    def __iter__(self) -> Iterator[int]:
        indices = list(self.sampler)
        for start in range(0, len(indices), self.batch_size):
            batch = list(islice(chain(indices[start:], cycle(indices)), self.batch_size))
            yield from batch * self.times


class SequenceParallelTrainer(Trainer):
    """A Trainer whose processes share sequences in groups of `sequence_parallel_size` neighbors.

    The processes of a group work together on one batch of `per_device_train_batch_size` sequences; different groups
    are data parallel. Every group evaluates on the whole set.

    Args:
        sequence_parallel_size: number of processes that share a sequence; it must divide the numbers of processes and
            attention heads.
        args, kwargs: as for `Trainer`.

    Raises:
        ValueError: the number of processes is not a multiple of `sequence_parallel_size`, or a dataset has no length.
    """

    sequence_group: Any = None
    # In evaluation every process has all results: nothing is gathered, whatever the Trainer sets.
    gather_function = property(lambda self: lambda results: results, lambda self, value: None)

    def __init__(self, *args: Any, sequence_parallel_size: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        processes = self.args.world_size
        if sequence_parallel_size < 1 or processes % sequence_parallel_size:
            raise ValueError(
                f"sequence_parallel_size={sequence_parallel_size} does not divide the {processes} processes of this "
                "run. Start a multiple of it, for example by `accelerate launch --num_processes`."
            )
        self.sequence_parallel_size = sequence_parallel_size
        if sequence_parallel_size > 1:
            self.sequence_group, _ = dist.new_subgroups(sequence_parallel_size)
            model: Any = self.model
            model.enable_sequence_parallel(self.sequence_group)

    def call_model_init(self, trial: Any = None) -> Any:
        """Enable sequence parallelism again: the Trainer may call `model_init` when training begins."""
        model: Any = super().call_model_init(trial)
        model.enable_sequence_parallel(self.sequence_group)
        return model

    def _get_dataloader(
        self, dataset, description, batch_size, sampler_fn=None, is_training=False, dataloader_key=None
    ) -> DataLoader:
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "Processes that share sequences must get the same batches, which needs a dataset with a length and an "
                "order. An IterableDataset has neither: use a map-style dataset."
            )
        if is_training and sampler_fn is not None:

            def repeated(data):
                return RepeatedBatches(sampler_fn(data), batch_size, self.sequence_parallel_size)

            return super()._get_dataloader(dataset, description, batch_size, repeated, is_training, dataloader_key)
        collate = self._get_collator_with_removed_columns(self.data_collator, description=description)
        return DataLoader(dataset, batch_size=batch_size, collate_fn=collate)


__all__ = ["RepeatedBatches", "SequenceParallelTrainer", "fsdp_policy"]
