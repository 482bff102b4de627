"""Every private name of torch, transformers and peft that the package depends on, each with its reason.

A release of one of these libraries may change any of them. tests/test_compat.py checks each entry and says which one
broke, so that this is the only file to mend. It is exported with the modeling code and used by rooms that know torch
alone: transformers and peft are imported inside functions only.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, stateless

# ---- torch


def in_functorch_transform() -> bool:
    """Inside vmap, grad or another torch.func transform. There is no public way to ask."""
    return torch._C._functorch.maybe_current_level() is not None


def functorch_levels() -> list[str]:
    """The torch.func transforms that are running, outermost first: "Vmap", "Grad" (grad, vjp), "Jvp" …"""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return [interpreter.key().name for interpreter in stack]


def in_vmap() -> bool:
    """Whether `torch.vmap` runs; False in a graph that dynamo traces, which cannot ask."""
    return not torch.compiler.is_compiling() and "Vmap" in functorch_levels()


def in_forward_mode() -> bool:
    """Whether derivatives are computed in forward mode (`torch.autograd.forward_ad`, `torch.func.jvp`)."""
    return forward_ad._current_level >= 0


def in_fake_mode() -> bool:
    """Whether tensors are made without memory or values (FakeTensorMode), to learn what a computation would take."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def fake_tensors() -> AbstractContextManager[Any]:
    """Within it tensors are made without memory or values; operations on them give those of the right shapes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def values_are_known() -> bool:
    """Whether code may look at what tensors hold: not in a compiled graph, nor of a sample that vmap hides."""
    return not torch.compiler.is_compiling() and not in_vmap() and not in_fake_mode()


def may_look_at(x: torch.Tensor) -> bool:
    """Whether code may look at what a tensor holds, and need not wait for it: a CUDA device works behind the host."""
    return values_are_known() and x.device.type not in ("cuda", "meta")


def in_graph_capture() -> bool:
    """Whether a CUDA graph records what runs: without values, and without states of random generators."""
    possible = not torch.compiler.is_compiling() and torch.cuda.is_initialized()
    return possible and torch.cuda.is_current_stream_capturing()


def current_graph_task_id() -> int:
    """The id of the running backward pass, -1 outside of one. Tells apart two passes through one graph."""
    return torch._C._current_graph_task_id()


def will_engine_execute(node: Any) -> bool:
    """Whether the running backward pass will reach `node`; a stream that nobody takes must not be kept."""
    return torch._C._will_engine_execute_node(node)


def reparametrize_module(module: nn.Module, tensors: dict[str, torch.Tensor]) -> AbstractContextManager[None]:
    """Other tensors in the place of parameters, for a `with` block; `functional_call` serves whole forwards only."""
    return stateless._reparametrize_module(module, tensors)


def nonstrict_trace(function: Callable) -> Callable:
    """A function that dynamo puts into its graph without looking into; unlike `allow_in_graph`, it takes modules."""
    return torch._dynamo.nonstrict_trace(function)


def parametrization_cache_enabled() -> bool:
    """Inside `parametrize.cached()`, where parametrized weights are computed once and kept."""
    return bool(parametrize._cache_enabled)


def active_ddp_module() -> Any:
    """The DistributedDataParallel module whose forward is running, or None. Dynamo splits graphs at its buckets."""
    return DistributedDataParallel._active_ddp_module


def assert_async(condition: torch.Tensor, message: str) -> None:
    """An assertion inside compiled graphs that does not wait for the device."""
    torch._assert_async(condition, message)


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was modified in place. Autograd uses the same counter for the same check."""
    return tensor._version


def has_gradient_hooks(tensor: torch.Tensor) -> bool:
    """Whether `register_hook` was called on a tensor."""
    return bool(tensor._backward_hooks)


GLOBAL_HOOKS = vars(torch.nn.modules.module)  # hooks on all modules are in its variables `_global_…`


def has_global_hooks() -> bool:
    """Whether there are hooks on all modules, as module trackers and flop counters register them."""
    return bool(torch.nn.modules.module._has_any_global_hook())


def has_forward_pre_hook(module: nn.Module, hook: Callable) -> bool:
    return hook in module._forward_pre_hooks.values()


# ---- transformers


def load_pretrained_weights(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The library's step of `from_pretrained` that reads weights into a model; the report comes first."""
    from transformers import PreTrainedModel

    return PreTrainedModel._load_pretrained_model(model, *args, **kwargs)


def forget_weight_conversions(model: Any) -> None:
    """After `from_pretrained(key_mapping=...)`, `save_pretrained` would write the old names again."""
    model._weight_conversions = None


def mark_initialized(parameter: nn.Parameter) -> None:
    """Keep the library from drawing a parameter again that was filled while loading."""
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def register_model_name(auto_class: Any, model_type: str, class_name: str) -> None:
    """Enter a model in an Auto class's table of names, which `register` leaves alone; label smoothing reads it."""
    auto_class._model_mapping._model_mapping[model_type] = class_name


def register_pipeline_task(task: str, entry: dict[str, Any]) -> None:
    """Enter a pipeline like the library's own. Of a task by `register_pipeline`, every saved folder holds the code."""
    from transformers.pipelines import PIPELINE_REGISTRY

    PIPELINE_REGISTRY.supported_tasks[task] = entry


def pipeline_entry(task: str) -> dict[str, Any]:
    """What the library knows of a pipeline's task: the class, Auto classes, default models."""
    from transformers.pipelines import PIPELINE_REGISTRY

    return PIPELINE_REGISTRY.supported_tasks[task]


# ---- peft

PEFT_TABLES = "peft.utils.constants"


def peft_target_tables() -> Iterator[tuple[str, dict[str, Any]]]:
    """The default target modules of each kind of adapter: (kind, table from model type to module names). No registry.

    peft must have been imported.
    """
    prefix, suffix = "TRANSFORMERS_MODELS_TO_", "_MODULES_MAPPING"
    for name, table in vars(sys.modules[PEFT_TABLES]).items():
        if name.startswith(prefix) and name.endswith(suffix):
            yield name.removeprefix(prefix).removesuffix(suffix), table


# ---- members of library classes that subclasses override or set, or that are read in place
# class → names of attributes, or a method with its first parameters as we rely on them → the reason

MEMBERS: dict[str, dict[str, str]] = {
    "torch.nn.Module": {
        "_modules _parameters": "fused_decode reads them for every token; attribute access would dominate",
        "_forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks": "a layer with hooks runs in modules",
    },
    "transformers.PreTrainedModel": {
        "_init_weights(self, module)": "the library's protocol for initialization",
        "_no_split_modules _skip_keys_device_placement": "the library's protocol for device maps and FSDP",
        "_supports_sdpa": "the library's protocol for attention functions",
        "_supports_context_parallel": "the library's protocol for context parallelism",
        "_tied_weights_keys": "the library's protocol for tied weights",
        "_keys_to_ignore_on_load_unexpected": "the library's protocol for keys that are no mistake",
        "_load_pretrained_model(model, state_dict, checkpoint_files)": (
            "an older bias of the language-model head is read there; an encoder ignores a decoder's keys"
        ),
        "get_expanded_tied_weights_keys(self, all_submodels)": "weights shared by encoder and decoder",
    },
    "transformers.GenerationMixin": {
        "_supports_default_dynamic_cache()": "the library says no to every class with `reformer` in its name",
        "_prepare_cache_for_generation(self, generation_config, model_kwargs)": "the cache gets layers of ours",
        "_prepare_attention_mask_for_generation(self, inputs_tensor, generation_config, model_kwargs)": (
            "what a cache holds is masked as it was filled"
        ),
    },
    "transformers.PreTrainedConfig": {"_attn_implementation": "selects the attention function, as in the library"},
    "transformers.TokenizersBackend": {"_decode(self, token_ids)": "ids outside the vocabulary are left out"},
    "transformers.Pipeline": {
        "_load_tokenizer _load_processor _load_image_processor": "the library's protocol for pipelines",
        "_load_video_processor _load_feature_extractor": "the library's protocol for pipelines",
        "_sanitize_parameters(self)": "the library's protocol for pipelines",
        "_forward(self, input_tensors)": "the library's protocol for pipelines",
    },
    "transformers.cli.serving.model_manager.ModelManager": {
        "_load_model(self, model_id_and_revision)": "the server looks our classes up in transformers itself",
        "_load_processor(self, model_id_and_revision)": "as `_load_model`",
    },
    "transformers.Trainer": {
        "_get_dataloader(self, dataset, description, batch_size, sampler_fn, is_training, dataloader_key)": (
            "processes that share sequences must get the same batches"
        ),
        "_get_collator_with_removed_columns(self, data_collator, description)": "as `_get_dataloader`",
        "_save_checkpoint(self, model, trial)": "a checkpoint that could not be saved whole is removed",
        "_get_output_dir(self, trial)": "as `_save_checkpoint`",
        "_save_rng_state(self, output_dir)": "the state, written after it, is to be the last file of all processes",
        "_get_train_sampler(self, train_dataset)": "grouping by length must be the same after resuming",
        "_get_eval_sampler(self, eval_dataset)": "predictions must come in the order of the dataset",
    },
}
