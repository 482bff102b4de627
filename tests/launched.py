"""A training step under `accelerate launch`, on CPUs: writes losses and whole gradients of every model asked for.

python -m accelerate.commands.launch --config_file examples/accelerate/fsdp2.yaml tests/launched.py OUT [OPTION]

OPTION: --flat_policy (FSDP2), --find_unused_parameters or --static_graph (DDP).
"""

import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from conftest import make_ids, make_model
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from hf_reformer import ReformerForCausalLM
from hf_reformer.training.distributed import fsdp_policy

SMALL = {"attn_layers": ["local", "lsh"] * 2, "hidden_dropout_prob": 0.0, "resample_rotations": False, "lsh_window": 6,
         "local_window": 6, "num_buckets": 4}  # fmt: skip


def batch_of(rank: int) -> torch.Tensor:
    return make_ids(2, 45 + rank, seed=rank)


def model_of(**changes):
    return make_model(ReformerForCausalLM, dtype=torch.float32, **{**SMALL, **changes}).train()


def whole(x: torch.Tensor) -> torch.Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def pretend_to_have_gpus() -> None:
    """accelerate takes FSDP for GPUs alone; the processes of this launch are one group on CPUs."""
    sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if sharded:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    state = PartialState(cpu=True)
    if sharded:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    assert state.num_processes == 2


def step(model, accelerator: Accelerator, seed: int = 0) -> torch.Tensor:
    ids = batch_of(accelerator.process_index + 2 * seed)
    loss = model(input_ids=ids, labels=ids).loss
    accelerator.backward(loss)
    return loss.detach()


def prepare(accelerator: Accelerator, **changes):
    model = model_of(**changes)
    return accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))


def gradients_of(accelerator: Accelerator, **changes) -> dict:
    """Loss of this process, whole gradients of a step with accelerate's wrapper, and what was warned of."""
    model, _ = prepare(accelerator, **changes)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loss = step(model, accelerator)
    fsdp1 = isinstance(model, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True) if fsdp1 else nullcontext():
        grads = {
            name.removeprefix("module.").replace("_fsdp_wrapped_module.", ""): whole(p.grad)
            for name, p in model.named_parameters()
        }
    return {"loss": loss, "gradients": grads, "told": [str(warning.message) for warning in told]}


def weights_after_resuming(accelerator: Accelerator, folder: Path) -> list[dict[str, torch.Tensor]]:
    """Whole weights after two steps; and after the second of them taken again from a checkpoint of the first."""
    model, optimizer = prepare(accelerator)
    step(model, accelerator)
    optimizer.step()
    accelerator.save_state(str(folder))
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        step(model, accelerator, seed=1)
        optimizer.step()
        found.append({name: whole(p) for name, p in model.named_parameters()})
        accelerator.load_state(str(folder))
    return found


def results(out: str, *options: str) -> dict:
    """What this process of several finds."""
    pretend_to_have_gpus()
    flags = {option[2:]: True for option in options if option in ("--find_unused_parameters", "--static_graph")}
    accelerator = Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(**flags)])
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if "--flat_policy" in options:
        plugin.mixed_precision_policy = fsdp_policy()
    found = {
        "plain": gradients_of(accelerator),
        "loss in chunks": gradients_of(accelerator, chunk_size_lm_head=7),
        "not reversible": gradients_of(accelerator, reversible=False),
    }
    if plugin is not None and plugin.fsdp_version == 2:
        accelerator.free_memory()
        found["resumed"] = weights_after_resuming(accelerator, Path(out) / "checkpoint")
    return found


def results_in(environment: dict[str, str], out: str) -> dict:
    """The same where no command has set the environment."""
    os.environ.update(environment)
    return results(out)


if __name__ == "__main__":
    torch.save(results(*sys.argv[1:]), Path(sys.argv[1]) / f"{PartialState().process_index}.pt")
    Accelerator().end_training()
