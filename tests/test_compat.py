"""Private names of other libraries exist and behave as compat.py relies on; its docstrings give the reasons."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import tiny_config
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForMaskedLM, BertConfig, BertModel, PreTrainedConfig, initialization, pipelines

from hf_reformer import ReformerForCausalLM, compat

SOURCE = Path(compat.__file__).parents[1]
MEMBERS = [
    (owner, name, parameters, reason)
    for owner, entries in compat.MEMBERS.items()
    for key, reason in entries.items()
    for name, parameters in re.findall(r"(\w+)(\(.*\))?", key)
]


@pytest.mark.parametrize(("owner", "member", "parameters", "reason"), MEMBERS, ids=[f"{m[0]}.{m[1]}" for m in MEMBERS])
def test_members_of_library_classes(owner, member, parameters, reason):
    room, _, name = owner.rpartition(".")
    cls = getattr(importlib.import_module(room), name)
    holder = cls() if cls in (nn.Module, PreTrainedConfig) else cls
    assert hasattr(holder, member), f"{owner} has lost `{member}`. It serves: {reason}."
    if parameters:
        found = list(inspect.signature(getattr(cls, member)).parameters)
        wanted = re.findall(r"\w+", parameters)
        assert found[: len(wanted)] == wanted, f"`{owner}.{member}` takes {found}, not {wanted}. It serves: {reason}."


def test_functorch_transforms_are_noticed():
    inside = []
    torch.func.vmap(lambda x: (inside.append(compat.in_functorch_transform()), x)[1])(torch.zeros(2))
    assert inside == [True]
    assert not compat.in_functorch_transform()


def test_fake_tensors_have_shapes_alone():
    with compat.fake_tensors():
        assert compat.in_fake_mode()
        assert not compat.values_are_known()
        x = torch.zeros(2**20, 2**20)
        assert (x @ x).shape == x.shape
    assert not compat.in_fake_mode()
    assert compat.values_are_known()


class Probe(torch.autograd.Function):
    """The identity; its backward asks the engine."""

    found: list = []

    @staticmethod
    def forward(ctx, a, b):
        return a.clone() + b

    @staticmethod
    def backward(ctx, grad):
        reached = [compat.will_engine_execute(node) for node, _ in ctx.next_functions]
        Probe.found.append((compat.current_graph_task_id(), reached))
        return grad, grad


def test_the_backward_pass_is_identified():
    a, b = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
    out = Probe.apply(a * 2, b * 2)
    Probe.found.clear()
    torch.autograd.grad(out, a, retain_graph=True)
    torch.autograd.grad(out, [a, b])
    (first, only_a), (second, both) = Probe.found
    assert (only_a, both) == ([True, False], [True, True])
    assert compat.current_graph_task_id() == -1
    assert -1 != first != second != -1


def test_other_tensors_stand_in_for_parameters():
    module, weight = nn.Linear(2, 1, bias=False), torch.ones(1, 2)
    own = module.weight
    with compat.reparametrize_module(module, {"weight": weight}):
        assert module.weight is weight
        assert module(torch.ones(2)).item() == 2
    assert module.weight is own


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older dynamo hands no modules to such functions")
def test_dynamo_does_not_look_into_a_nonstrict_function():
    calls = []

    @compat.nonstrict_trace
    def opaque(module, x):
        calls.append(1)  # a side effect that dynamo would otherwise have to follow
        return module(x)

    module = nn.Linear(2, 2)
    compiled = torch.compile(lambda x: opaque(module, x) + 1, backend="eager", fullgraph=True)
    x = torch.ones(1, 2)
    assert torch.equal(compiled(x), module(x) + 1)
    assert calls


def test_cached_parametrizations_are_noticed():
    assert not compat.parametrization_cache_enabled()
    with nn.utils.parametrize.cached():
        assert compat.parametrization_cache_enabled()


def test_a_running_ddp_module_is_noticed(tmp_path):
    found = []

    class Layer(nn.Linear):
        def forward(self, x):
            found.append(compat.active_ddp_module())
            return super().forward(x)

    assert compat.active_ddp_module() is None
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Layer(2, 2))
        model(torch.ones(1, 2))
    finally:
        torch.distributed.destroy_process_group()
    assert found == [model]


def test_an_assertion_without_waiting():
    compat.assert_async(torch.tensor(True), "fine")
    with pytest.raises(RuntimeError, match="not fine"):
        compat.assert_async(torch.tensor(False), "not fine")


def test_state_of_tensors_and_modules():
    x = torch.zeros(1)
    version = compat.version_of(x)
    x.add_(1)
    assert compat.version_of(x) == version + 1
    x.requires_grad_()
    assert not compat.has_gradient_hooks(x)
    x.register_hook(print)
    assert compat.has_gradient_hooks(x)
    module = nn.Linear(1, 1)
    assert not compat.has_forward_pre_hook(module, print)
    module.register_forward_pre_hook(print)
    assert compat.has_forward_pre_hook(module, print)


@pytest.mark.parametrize("forget", [False, True])
def test_weight_conversions_are_undone_when_saving_unless_forgotten(forget, tmp_path):
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = BertModel(BertConfig(**sizes, intermediate_size=8, max_position_embeddings=8))
    old = {name.replace("embeddings.", "old.", 1): x for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=old)
    model = BertModel.from_pretrained(tmp_path, key_mapping={r"^old\.": "embeddings."})
    assert model._weight_conversions, "from_pretrained keeps its conversions elsewhere now"
    if forget:
        compat.forget_weight_conversions(model)
    model.save_pretrained(tmp_path / "again")
    names = load_file(tmp_path / "again" / "model.safetensors")
    assert any(name.startswith("old.") for name in names) is not forget


def test_filled_parameters_are_not_drawn_again():
    parameter = nn.Parameter(torch.ones(3))
    compat.mark_initialized(parameter)
    initialization.zeros_(parameter)
    assert parameter.sum() == 3


def test_auto_classes_keep_a_table_of_names():
    compat.register_model_name(AutoModelForMaskedLM, "a_model_of_test_compat", "TestForMaskedLM")
    names = AutoModelForMaskedLM._model_mapping._model_mapping
    assert names.pop("a_model_of_test_compat") == "TestForMaskedLM"


def test_pipelines_are_found_by_their_entry():
    compat.register_pipeline_task("a-task-of-test-compat", {"impl": print})
    assert pipelines.check_task("a-task-of-test-compat")[1] == {"impl": print}
    del pipelines.PIPELINE_REGISTRY.supported_tasks["a-task-of-test-compat"]


def test_peft_keeps_tables_of_target_modules():
    peft = pytest.importorskip("peft")
    assert compat.PEFT_TABLES in sys.modules
    tables = dict(compat.peft_target_tables())
    assert {"LORA_TARGET", "IA3_TARGET", "IA3_FEEDFORWARD"} <= tables.keys()
    assert all(isinstance(table, dict) and "llama" in table for table in (tables["LORA_TARGET"], tables["IA3_TARGET"]))
    assert peft.LoraConfig(task_type="CAUSAL_LM").target_modules is None
    model = peft.get_peft_model(ReformerForCausalLM(tiny_config()), peft.LoraConfig(task_type="CAUSAL_LM"))
    assert set(model.peft_config["default"].target_modules) == set(tables["LORA_TARGET"]["hf_reformer"])


def test_weights_are_loaded_by_one_step(tmp_path, monkeypatch):
    calls = []
    step = compat.load_pretrained_weights
    monkeypatch.setattr(
        ReformerForCausalLM,
        "_load_pretrained_model",
        staticmethod(lambda *args, **kwargs: (calls.append(args), step(*args, **kwargs))[1]),
    )
    ReformerForCausalLM(tiny_config()).save_pretrained(tmp_path)
    _, report = ReformerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert len(calls) == 1
    assert not report["missing_keys"]


def test_a_pipeline_task_has_a_class_and_auto_classes():
    entry = compat.pipeline_entry("audio-classification")
    assert issubclass(entry["impl"], transformers.pipelines.AudioClassificationPipeline)
    assert entry["pt"] == (transformers.AutoModelForAudioClassification,)


LIBRARIES = {"torch", "transformers", "peft", "trl", "accelerate", "tokenizers"}


def private_names(tree: ast.Module) -> list[tuple[int, str]]:
    """Imports of private names from these libraries, and private attributes of what was imported from them."""
    found, imported = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {
                (name.asname or name.name).split(".")[0] for name in node.names if top(name.name) in LIBRARIES
            }
        elif isinstance(node, ast.ImportFrom) and not node.level and top(node.module) in LIBRARIES:
            imported |= {name.asname or name.name for name in node.names}
            found += [(node.lineno, name.name) for name in node.names if name.name.startswith("_")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match("_[a-zA-Z]", node.attr):
            text = ast.unparse(node)
            found += [(node.lineno, text)] if text.split(".")[0] in imported else []
    return found


def top(module: str) -> str:
    return module.split(".")[0]


def test_private_names_are_reached_through_compat_alone():
    files = [path for path in SOURCE.rglob("*.py") if path.name != "compat.py"]
    found = [
        f"{path.relative_to(SOURCE)}:{line}: `{name}`. Reach it through hf_reformer/compat.py, with a test."
        for path in files
        for line, name in private_names(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    "text", ["import torch\ntorch._C._f()", "from torch.nn import _f", "from peft import x as y\ny.a._b"]
)
def test_a_private_name_is_noticed(text):
    assert private_names(ast.parse(text))
