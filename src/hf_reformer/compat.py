"""Private names of torch, transformers and peft that the package depends on, each with the reason.

Any release of these libraries may change them. tests/test_compat.py checks every entry and reports which one broke,
so this is the only file to fix. It is exported with the modeling code and used by subpackages that depend on torch
alone, so transformers and peft are imported inside functions only.
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
    """Whether vmap, grad or another torch.func transform is running. There is no public API for this."""
    return torch._C._functorch.maybe_current_level() is not None


def functorch_levels() -> list[str]:
    """Return the running torch.func transforms, outermost first: "Vmap", "Grad" (grad, vjp), "Jvp" …"""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return [interpreter.key().name for interpreter in stack]


def in_vmap() -> bool:
    """Whether `torch.vmap` is running; False while dynamo traces, where this cannot be determined."""
    return not torch.compiler.is_compiling() and "Vmap" in functorch_levels()


def in_forward_mode() -> bool:
    """Whether forward-mode derivatives are being computed (`torch.autograd.forward_ad`, `torch.func.jvp`)."""
    return forward_ad._current_level >= 0


def in_fake_mode() -> bool:
    """Whether tensors are created without memory or values (FakeTensorMode), to estimate what a computation needs."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def fake_tensors() -> AbstractContextManager[Any]:
    """Return a context in which tensors have no memory or values and operations only compute shapes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def values_are_known() -> bool:
    """Whether code may inspect tensor values: not while compiling, under vmap or with fake tensors."""
    return not torch.compiler.is_compiling() and not in_vmap() and not in_fake_mode()


def may_look_at(x: torch.Tensor) -> bool:
    """Whether code may inspect the values of a tensor without waiting: CUDA devices run asynchronously to the host."""
    return values_are_known() and x.device.type not in ("cuda", "meta")


def in_graph_capture() -> bool:
    """Whether a CUDA graph is being captured: values and states of random generators are then unavailable."""
    possible = not torch.compiler.is_compiling() and torch.cuda.is_initialized()
    return possible and torch.cuda.is_current_stream_capturing()


def current_graph_task_id() -> int:
    """Return the id of the running backward pass, or -1 outside of one. It distinguishes passes through one graph."""
    return torch._C._current_graph_task_id()


def will_engine_execute(node: Any) -> bool:
    """Whether the running backward pass will reach `node`; a stream that no node takes must not be kept."""
    return torch._C._will_engine_execute_node(node)


def reparametrize_module(module: nn.Module, tensors: dict[str, torch.Tensor]) -> AbstractContextManager[None]:
    """Return a context that replaces parameters by other tensors; `functional_call` only covers a whole forward."""
    return stateless._reparametrize_module(module, tensors)


def nonstrict_trace(function: Callable) -> Callable:
    """Make a function opaque: dynamo puts it into its graph untraced. Unlike `allow_in_graph`, it accepts modules."""
    return torch._dynamo.nonstrict_trace(function)


def parametrization_cache_enabled() -> bool:
    """Whether `parametrize.cached()` is active, in which parametrized weights are computed once and kept."""
    return bool(parametrize._cache_enabled)


def active_ddp_module() -> Any:
    """Return the DistributedDataParallel module in forward, or None. Dynamo splits graphs at its buckets."""
    return DistributedDataParallel._active_ddp_module


def assert_async(condition: torch.Tensor, message: str) -> None:
    """Assert a condition, also in compiled graphs, without waiting for the device."""
    torch._assert_async(condition, message)


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor was modified in place, the counter that autograd uses for its own check."""
    return tensor._version


def has_gradient_hooks(tensor: torch.Tensor) -> bool:
    """Whether `register_hook` was called on a tensor."""
    return bool(tensor._backward_hooks)


GLOBAL_HOOKS = vars(torch.nn.modules.module)  # holds the hooks on all modules, in variables named `_global_…`


def has_global_hooks() -> bool:
    """Whether there are global module hooks, as registered by module trackers and FLOP counters."""
    return bool(torch.nn.modules.module._has_any_global_hook())


def has_forward_pre_hook(module: nn.Module, hook: Callable) -> bool:
    return hook in module._forward_pre_hooks.values()


# ---- transformers


def load_pretrained_weights(model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Run the step of `from_pretrained` that loads weights into a model; returns the loading report first."""
    from transformers import PreTrainedModel

    return PreTrainedModel._load_pretrained_model(model, *args, **kwargs)


def forget_weight_conversions(model: Any) -> None:
    """Keep `save_pretrained` from writing the old names again after `from_pretrained(key_mapping=...)`."""
    model._weight_conversions = None


def mark_initialized(parameter: nn.Parameter) -> None:
    """Keep the library from reinitializing a parameter that was filled while loading."""
    parameter._is_hf_initialized = True  # type: ignore[attr-defined]


def register_model_name(auto_class: Any, model_type: str, class_name: str) -> None:
    """Add a model to an Auto class's table of names, which `register` does not update; label smoothing reads it."""
    auto_class._model_mapping._model_mapping[model_type] = class_name


def register_pipeline_task(task: str, entry: dict[str, Any]) -> None:
    """Add a pipeline like a built-in one; with `register_pipeline`, its code would be saved with every model."""
    from transformers.pipelines import PIPELINE_REGISTRY

    PIPELINE_REGISTRY.supported_tasks[task] = entry


def pipeline_entry(task: str) -> dict[str, Any]:
    """Return the library's entry for a pipeline task: class, Auto classes, default models."""
    from transformers.pipelines import PIPELINE_REGISTRY

    return PIPELINE_REGISTRY.supported_tasks[task]


# ---- peft

PEFT_TABLES = "peft.utils.constants"


def peft_target_tables() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield peft's default target modules as (kind of adapter, table from model type to module names).

    There is no public registry. peft must have been imported.
    """
    prefix, suffix = "TRANSFORMERS_MODELS_TO_", "_MODULES_MAPPING"
    for name, table in vars(sys.modules[PEFT_TABLES]).items():
        if name.startswith(prefix) and name.endswith(suffix):
            yield name.removeprefix(prefix).removesuffix(suffix), table


# ---- members of library classes that subclasses override or set, or that are read directly
# class → attribute names, or a method with the leading parameters that we rely on → reason

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
