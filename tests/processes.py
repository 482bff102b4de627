"""A function run in each of several gloo processes on the CPU, as ranks of one group."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

# Processes are forked from one that has done nothing but import what takes seconds.
torch.multiprocessing.set_forkserver_preload(["hf_reformer.models.seq2seq", "transformers.trainer"])


def run_in_processes(function: Callable, size: int, *args) -> list:
    """What `function(*args)` returned in every process, by rank. It lives at the top of its module."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _enter, (function, size, folder, args), nprocs=size, start_method="forkserver"
        )
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def _enter(rank: int, function: Callable, size: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    for name, number in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", size), ("LOCAL_WORLD_SIZE", size)):
        os.environ[name] = str(number)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
