"""Training on several processes gives the mean of what each gives alone: DDP, FSDP1, FSDP2, accelerate."""

import copy
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate.commands import launch as launching
from accelerate.utils.launch import prepare_multi_gpu_env
from conftest import SMALL_WINDOWS, make_ids, make_model, max_abs_diff, relative_error
from launched import batch_of, model_of, results_in, whole
from processes import run_in_processes
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from hf_reformer import ReformerForCausalLM
from hf_reformer.models import modeling_reformer
from hf_reformer.training.distributed import fsdp_policy

ROOT = Path(__file__).resolve().parents[2]
CASES = {"plain": {}, "loss in chunks": {"chunk_size_lm_head": 7}, "not reversible": {"reversible": False}}


def alone(rank: int, dtype: torch.dtype = torch.float32, **changes) -> dict[str, torch.Tensor]:
    """Gradients of a process's batch, computed by one process."""
    model, ids = model_of(**changes).to(dtype), batch_of(rank)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        model(ids, labels=ids).loss.backward()
    return {name: p.grad.float() for name, p in model.named_parameters()}


def mean_of_both(**changes) -> dict[str, torch.Tensor]:
    first, second = (alone(rank, **changes) for rank in range(2))
    return {name: (first[name] + second[name]) / 2 for name in first}


# --- as transformers shards it while loading


def gradients_where_the_library_shards(folder: str) -> dict:
    """Whole gradients of a process's step, and which modules are sharded."""
    config = DistributedConfig(fsdp_size=2)
    model = ReformerForCausalLM.from_pretrained(folder, distributed_config=config).train()
    ids = batch_of(dist.get_rank())
    model(ids, labels=ids).loss.backward()
    sharded = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    return {"gradients": {name: whole(p.grad) for name, p in model.named_parameters()}, "sharded": sharded}


@pytest.mark.slow
@pytest.mark.multi_process
def test_the_library_s_own_fsdp_plan(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    names = {re.sub(r"\.\d+", ".*", name) for name, _ in model.named_modules()}
    assert set(model.fsdp_plan) <= names, "a plan of modules that there are not"
    layers = {f"model.layers.{i}" for i in range(len(model.model.layers))}
    for found in run_in_processes(gradients_where_the_library_shards, 2, str(tmp_path)):
        assert found["sharded"] >= {"", "lm_head", "model.embed_tokens", "model.norm"} | layers
        assert relative_error(found["gradients"], mean_of_both()) < 1e-6


# --- as accelerate starts them


@pytest.fixture(scope="module")
def launch(tmp_path_factory):
    """The results of tests/launched.py in each of two processes under a configuration of examples/accelerate."""

    @cache
    def run(config: str, *options: str) -> list[dict]:
        folder = tmp_path_factory.mktemp("launched")
        command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
        command += [str(ROOT / "examples" / "accelerate" / f"{config}.yaml"), str(ROOT / "tests" / "launched.py")]
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        done = subprocess.run(
            [*command, str(folder), *options], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]

    return run


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """The same of `fsdp2`, quicker: as accelerate's command tells processes, in forks that have imported all."""
    told = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "multi_gpu_launcher", lambda args: told.append(prepare_multi_gpu_env(args)))
        config = ROOT / "examples" / "accelerate" / "fsdp2.yaml"
        arguments = ["--main_process_port", "0", "--config_file", str(config), "launched.py"]
        launching.launch_command(launching.launch_command_parser().parse_args(arguments))
    (environment,) = told
    own = {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    return run_in_processes(results_in, 2, own, str(tmp_path_factory.mktemp("forked")))


WAYS = [("fsdp2",), ("ddp",), ("ddp", "--find_unused_parameters"), ("ddp", "--static_graph"), ("fsdp1",)]


@pytest.mark.multi_process
def test_gradients_of_fsdp2_are_the_mean_of_both_processes(forked):
    for case, changes in CASES.items():
        expected = mean_of_both(**changes)
        for found in forked:
            assert relative_error(found[case]["gradients"], expected) <= 1e-5


@pytest.mark.multi_process
def test_training_resumes_from_checkpoints_of_fsdp2(forked):
    for result in forked:
        once, again = result["resumed"]
        assert all(torch.equal(again[name], once[name]) for name in once)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("way", WAYS, ids=" ".join)
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_mean_of_both_processes(way, case, launch):
    expected = mean_of_both(**CASES[case])
    for found in launch(*way):
        assert relative_error(found[case]["gradients"], expected) <= 1e-5


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("options", [("--flat_policy",), ()], ids=str)
def test_fsdp2_in_bfloat16(options, launch):
    """With our policy, or with accelerate's, which casts the streams between layers and is warned of."""
    expected = mean_of_both(dtype=torch.bfloat16)
    for found in launch("fsdp2_bf16", *options):
        assert relative_error(found["plain"]["gradients"], found["not reversible"]["gradients"]) <= 1e-6
        assert relative_error(found["plain"]["gradients"], expected) <= (0.02 if options else 0.2)
        warned = [text for text in found["plain"]["told"] if "streams" in text]
        assert bool(warned) != bool(options)
        assert all("fsdp_policy" in text for text in warned)


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize(("config", "options"), [("fsdp2", ()), ("fsdp2_bf16", ("--flat_policy",))])
def test_training_resumes_from_full_and_from_sharded_checkpoints(config, options, launch):
    for result in launch(config, *options):
        once, again = result["resumed"]
        assert all(torch.equal(again[name], once[name]) for name in once)


# --- as torch wraps them


def gradients_under_ddp() -> dict[str, dict[str, torch.Tensor]]:
    """After three steps of gradient descent, so that what is decided in the first step is used."""
    result = {}
    for name, flags in DDP_FLAGS.items():
        for bf16 in (False, True):
            model = DistributedDataParallel(model_of(), **flags)
            for _ in range(3):
                model.zero_grad()
                ids = batch_of(dist.get_rank())
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = model(input_ids=ids, labels=ids).loss
                loss.backward()
            result[name, bf16] = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    return result


DDP_FLAGS = {"default": {}, "find unused": {"find_unused_parameters": True}, "static graph": {"static_graph": True}}


@pytest.mark.slow
@pytest.mark.multi_process
def test_ddp_with_any_flag():
    alone_in_bf16 = []
    for rank in range(2):
        model, ids = model_of(), batch_of(rank)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        alone_in_bf16.append({name: p.grad for name, p in model.named_parameters()})
    expected = {False: mean_of_both()}
    expected[True] = {name: (x + alone_in_bf16[1][name]) / 2 for name, x in alone_in_bf16[0].items()}
    for found in run_in_processes(gradients_under_ddp, 2):
        for (_, bf16), grads in found.items():
            assert relative_error(grads, expected[bf16]) <= 1e-6


class CountingChain(modeling_reformer.StreamHandoff):
    """Tells afterwards how many layers' outputs had to be kept."""

    last: "CountingChain"

    def __init__(self, *args):
        super().__init__(*args)
        CountingChain.last = self


def fsdp2_in_many_ways() -> dict:
    modeling_reformer.StreamHandoff = CountingChain
    result = {}
    policies = {"float32": None, "flat": fsdp_policy(), "casting": MixedPrecisionPolicy(param_dtype=torch.bfloat16)}
    for name, policy in policies.items():
        model, ids = model_of(), batch_of(dist.get_rank())
        for layer in model.model.layers:
            fully_shard(layer, **({} if policy is None else {"mp_policy": policy}))
        fully_shard(model, **({} if policy is None else {"mp_policy": policy}))
        model(ids, labels=ids).loss.backward()
        result[name] = len(CountingChain.last._originals)
    model, ids = model_of(), batch_of(dist.get_rank())
    for layer in model.model.layers:
        fully_shard(layer.feed_forward)  # within a layer
    fully_shard(model)
    model(ids, labels=ids).loss.backward()
    result["within"] = {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    return result


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.filterwarnings("ignore")
def test_fsdp2_keeps_streams_only_where_they_are_cast():
    """And modules wrapped within a layer take the plain path, since their parameters change identity."""
    expected = mean_of_both()
    for found in run_in_processes(fsdp2_in_many_ways, 2):
        assert found["float32"] == found["flat"] == 0
        assert found["casting"] > 0
        assert relative_error(found["within"], expected) <= 1e-5


def with_tied_layers(**changes):
    """Layers 2 and 3 are made of the modules of layers 0 and 1, as a decoder's are that shares its encoder's."""
    model = model_of(**changes)
    for own, other in ((0, 2), (1, 3)):
        for name, module in list(model.model.layers[own].named_children()):
            setattr(model.model.layers[other], name, module)
    return model


def fsdp2_with_tied_layers() -> dict[str, torch.Tensor]:
    model, ids = with_tied_layers(), batch_of(dist.get_rank())
    layers = model.model.layers
    for own, other in ((0, 2), (1, 3)):
        fully_shard([layers[own], layers[other]])
    fully_shard(model)
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.multi_process
def test_tied_layers_form_one_fsdp2_group():
    expected = {}
    for rank in range(2):
        model, ids = with_tied_layers(), batch_of(rank)
        model(ids, labels=ids).loss.backward()
        for name, p in model.named_parameters():
            expected[name] = expected.get(name, 0) + p.grad / 2
    for found in run_in_processes(fsdp2_with_tied_layers, 2):
        assert relative_error(found, expected) <= 1e-5


# --- one process, weights elsewhere


@pytest.mark.parametrize("where", ["cpu offload", "disk offload", "device map"])
def test_offloaded_weights_give_the_same_logits(where, tmp_path):
    model = make_model(ReformerForCausalLM, dtype=torch.float32, position_embedding_type="axial", **SMALL_WINDOWS)
    ids = make_ids(2, 33)
    with torch.no_grad():
        expected = model(ids).logits
        if where == "cpu offload":
            other = accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")
        elif where == "disk offload":
            other = accelerate.disk_offload(copy.deepcopy(model), tmp_path, execution_device="cpu")
        else:
            model.save_pretrained(tmp_path / "saved")
            places = {"model.embed_tokens": "cpu", "model.position_embeddings": "cpu", "model.layers.0": "cpu"}
            places |= {"model.layers.1": "disk", "model.norm": "cpu", "lm_head": "disk"}
            other = ReformerForCausalLM.from_pretrained(
                tmp_path / "saved", device_map=places, offload_folder=tmp_path / "offload"
            )
        assert max_abs_diff(other(ids).logits, expected) <= 1e-6
