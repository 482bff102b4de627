"""Sharing: an exported directory that works the same without the package, and a truthful model card."""

import copy
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from conftest import SMALL_WINDOWS, make_ids, make_model, tiny_config
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GPT2Config,
    GPT2Model,
    ReformerConfig,
    Trainer,
    TrainerState,
    TrainingArguments,
)
from without_package import load, observe, observe_tokenizer

from hf_reformer import (
    ReformerByteTokenizer,
    ReformerForAudioClassification,
    ReformerForCausalLM,
    ReformerForConditionalGeneration,
    ReformerForCTC,
    ReformerForImageClassification,
    ReformerForMaskedLM,
    ReformerForMultipleChoice,
    ReformerForQuestionAnswering,
    ReformerForSequenceClassification,
    ReformerForTimeSeriesPrediction,
    ReformerForTokenClassification,
    ReformerModel,
)
from hf_reformer.hub import export, model_folder, push_to_hub
from hf_reformer.hub import exporting as hub
from hf_reformer.hub.flatten import PACKAGE
from hf_reformer.hub.model_card import PIPELINE_TAGS, evaluations, model_card
from hf_reformer.hub.registration import AUTO_CLASSES
from hf_reformer.ops import dispatch as attention_ops
from hf_reformer.ops.dispatch import KERNELS
from reformer_kernels import contract as kernels

HEADS = list(dict.fromkeys(AUTO_CLASSES.values()))
COMMIT = "0123456789" * 4
SITE_FOLDERS = [path for path in map(Path, sys.path) if any(path.glob("*.dist-info"))]
# torchao is left out as well: it is none of what the package needs, and slow to import.
LEFT_OUT = re.compile(r"_*editable_*hf_reformer|hf_reformer|reformer_kernels|torchao", re.IGNORECASE)
LOG = [
    {"loss": 3.0, "step": 1, "epoch": 0.5},
    {"eval_loss": 2.5, "eval_accuracy": 0.75, "eval_runtime": 3.25, "step": 2, "epoch": 1.0},
    {"eval_loss": 2.625, "eval_accuracy": 0.5, "eval_samples_per_second": 7.5, "step": 4, "epoch": 2.0},
]
OVER = {"train_runtime": 12.5, "train_loss": 2.75, "step": 4, "epoch": 2.0}


def make(cls=ReformerForCausalLM, **overrides):
    sizes = {"vocab_size": 260, "position_embedding_type": "rotary", **SMALL_WINDOWS}
    return make_model(cls, dtype=torch.float32, **{**sizes, **overrides})


def make_state(log=LOG, **overrides):
    fields = {"global_step": 4, "epoch": 2.0, "train_batch_size": 8, "best_global_step": 2, **overrides}
    return TrainerState(log_history=copy.deepcopy(log), **fields)


def names(folder) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


@pytest.fixture(scope="session")
def other_python(tmp_path_factory):
    """Runs without_package.py by a Python that has everything that is installed here, the package only on request."""
    site = tmp_path_factory.mktemp("site")
    for entry in (entry for folder in SITE_FOLDERS for entry in folder.iterdir()):
        if not LEFT_OUT.match(entry.name) and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    script = Path(__file__).parents[1] / "without_package.py"

    def run(home, *arguments, installed=False, **environment):
        own = {"HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_MODULES_CACHE": str(home / "modules")}
        inherited = {name: value for name, value in os.environ.items() if name != "HF_REFORMER_BACKEND"}
        path = os.pathsep.join(map(str, [PACKAGE.parent, site] if installed else [site]))
        env = {**inherited, **own, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **environment}
        command = [sys.executable, "-S", script, home / "results.pt", *arguments]  # -S: no .pth file is followed
        done = subprocess.run(command, capture_output=True, text=True, cwd=home, env=env, timeout=500)
        assert done.returncode == 0, done.stderr
        return torch.load(home / "results.pt")

    return run


@pytest.fixture
def plain(monkeypatch):
    """Without the package there are no compiled kernels: numbers are compared in pure PyTorch."""
    monkeypatch.setenv("HF_REFORMER_BACKEND", "torch")


def in_cache(home, repo_id):
    """Where the Hub's cache keeps a repository, as if it had been downloaded."""
    repository = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    return repository / "snapshots" / COMMIT


def snippet(folder, name) -> Path:
    """The example of a model card, as a file."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    file = folder.parent / f"{name}.py"
    file.write_text(code, encoding="utf-8")
    return file


def same(found, expected) -> bool:
    """Bit for bit."""
    return found.keys() - {"module"} == expected.keys() and all(
        all(torch.equal(a, b) for a, b in zip(found[key], value, strict=True))
        if isinstance(value, list)
        else torch.equal(found[key], value)
        if isinstance(value, torch.Tensor)
        else found[key] == value
        for key, value in expected.items()
    )


# ---- without the package


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A home directory, and arguments of without_package.py: every Auto class with a directory of its own head, and
    with one repository for all of them."""
    home = tmp_path_factory.mktemp("exports")
    repository = export(make(ReformerForMaskedLM), in_cache(home, "ada/one"))
    arguments = {}
    for auto_class, cls in AUTO_CLASSES.items():
        folder = export(make(cls), home / auto_class.__name__, ReformerByteTokenizer())
        arguments[f"{auto_class.__name__}={folder.name}"] = folder
        arguments[f"{auto_class.__name__}=ada/one"] = repository
    folder = export(make(attention_mode="chunk", attention_backend="cpu"), home / "chunks")
    return home, {**arguments, "AutoModelForPreTraining=chunks": folder}


def check_models(found, arguments):
    """They are of the code beside them, and compute what the package computes, bit for bit."""
    for argument, folder in arguments.items():
        auto_class = argument.split("=")[0]
        expected = observe(load(auto_class, folder))
        assert expected["class"] == {auto.__name__: cls for auto, cls in AUTO_CLASSES.items()}[auto_class].__name__
        assert same(found[argument], expected), argument
        assert found[argument]["module"].startswith("transformers_modules."), argument


OF_EVERY_KIND = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageClassification")


@pytest.mark.parametrize("own", [OF_EVERY_KIND, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_auto_class_works_without_the_package(own, exports, other_python, plain):
    """From one repository for all, and from a directory of its own."""
    home, arguments = exports
    arguments = {
        name: folder
        for name, folder in arguments.items()
        if own is None or name.endswith("=ada/one") or name.startswith(own)
    }
    repository = export(make(), in_cache(home, "ada/tiny"), ReformerByteTokenizer(), name="ada/tiny")
    example = snippet(repository, "example")
    found = other_python(home, *arguments, "AutoTokenizer=ada/tiny", example)
    assert found["installed"] == found["imported"] == []
    check_models(found, arguments)
    assert found["AutoModelForCausalLM=ada/one"]["module"] == f"transformers_modules.ada.one.{COMMIT}.language_models"
    assert found["AutoTokenizer=ada/tiny"] == observe_tokenizer(ReformerByteTokenizer())
    assert found["example.py"].startswith("Once upon a time")


@pytest.mark.slow
def test_the_code_of_a_directory_works_where_the_package_is_not_imported(exports, other_python, monkeypatch):
    """It runs on the installed kernels; the package itself stays out."""
    backend = "torch" if KERNELS["cpu"].unsupported_reason() else "cpu"
    monkeypatch.setenv("HF_REFORMER_BACKEND", backend)
    home, arguments = exports
    some = "AutoModelForCausalLM=", "AutoModelForSeq2SeqLM=", "AutoModelForPreTraining=chunks"  # all kinds of layers
    arguments = {name: folder for name, folder in arguments.items() if name.startswith(some)}
    assert len(arguments) == 5
    found = other_python(home, *arguments, installed=True, HF_REFORMER_BACKEND=backend)
    assert found["installed"] == ["hf_reformer", "reformer_kernels"]
    assert found["imported"] == ["reformer_kernels"]
    check_models(found, arguments)


@pytest.mark.parametrize("trust", [None, True])
def test_every_auto_class_gives_the_classes_of_an_imported_package(trust, exports):
    for auto_class, cls in AUTO_CLASSES.items():
        for folder in ("AutoModelForMaskedLM", auto_class.__name__):
            loaded = auto_class.from_pretrained(exports[0] / folder, trust_remote_code=trust)
            assert type(loaded) is cls
        if trust:
            assert same(observe(loaded), observe(make(cls)))
    tokenizer = AutoTokenizer.from_pretrained(exports[0] / "AutoModel", trust_remote_code=trust)
    assert type(tokenizer) is ReformerByteTokenizer


@pytest.mark.slow
def test_every_example_runs_without_the_package(tmp_path, other_python):
    files = []
    tokenizer = ReformerByteTokenizer()
    for cls in HEADS:
        export(make(cls), tmp_path / cls.__name__, tokenizer)
        export(make(cls), tmp_path / f"{cls.__name__}_alone")
        files += [snippet(tmp_path / name, f"of_{name}") for name in (cls.__name__, f"{cls.__name__}_alone")]
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    export(make(), tmp_path / "chat", tokenizer)
    assert "apply_chat_template" in (tmp_path / "chat" / "README.md").read_text()
    found = other_python(tmp_path, *files, snippet(tmp_path / "chat", "of_chat"))
    assert all(printed.strip() for printed in found.values() if isinstance(printed, str))
    assert len([name for name in found if name.endswith(".py")]) == 1 + 2 * len(HEADS)


def test_code_of_another_age_leaves_the_kernels_alone(monkeypatch):
    spec = importlib.util.spec_from_file_location("hf_reformer.ops.as_it_was", attention_ops.__file__)
    for contract, served in ((kernels.CONTRACT, True), (kernels.CONTRACT + 1, False)):
        monkeypatch.setattr(kernels, "CONTRACT", contract)
        spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
        assert bool(module.KERNELS) is served


# ---- the folder


@pytest.mark.parametrize("cls", HEADS)
def test_what_is_in_the_folder(cls, tmp_path):
    model = make(cls)
    before = model.config.to_dict()
    assert export(model, tmp_path / "model", ReformerByteTokenizer()) == tmp_path / "model"
    data = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    data |= {"generation_config.json"} if model.can_generate() else set()
    assert names(tmp_path / "model") == data | set(hub.code_files())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    classes = {"AutoConfig": "ReformerConfig", **{auto.__name__: cls.__name__ for auto, cls in AUTO_CLASSES.items()}}
    assert {auto: reference.split(".")[1] for auto, reference in config["auto_map"].items()} == classes
    for reference in config["auto_map"].values():
        module, name = reference.split(".")
        assert f"class {name}(" in (tmp_path / "model" / f"{module}.py").read_text(encoding="utf-8")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in model.named_parameters())
    assert model.config.to_dict() == before | {"architectures": [cls.__name__], "dtype": "float32"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_keep_their_dtype(dtype, tmp_path):
    export(make().to(dtype), tmp_path / "model")
    assert {weight.dtype for weight in load_file(tmp_path / "model" / "model.safetensors").values()} == {dtype}
    export(tmp_path / "model", tmp_path / "again")
    assert {weight.dtype for weight in load_file(tmp_path / "again" / "model.safetensors").values()} == {dtype}


def test_a_backend_of_the_package_is_not_insisted_on(tmp_path):
    for backend, left in (("cpu", "auto"), ("triton", "auto"), ("torch", "torch")):
        model = make(attention_backend=backend)
        export(model, tmp_path / backend)
        assert AutoConfig.from_pretrained(tmp_path / backend).attention_backend == left
        assert model.config.attention_backend == backend


def test_overwriting_leaves_nothing_of_another_model(tmp_path):
    folder = tmp_path / "model"
    export(make(), folder, ReformerByteTokenizer())
    (folder / "notes.txt").write_text("mine")
    make().save_pretrained(folder, max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists()
    with pytest.raises(FileExistsError, match="not empty"):
        export(make(ReformerModel), folder)
    export(make(ReformerModel), folder, overwrite=True)
    assert names(folder) - set(hub.code_files()) == {"config.json", "model.safetensors", "README.md", "notes.txt"}
    assert names(tmp_path) == {"model"}


def test_other_files_stay_whatever_their_names_begin_with(tmp_path):
    folder, mine = tmp_path / "model", ["tokenizer_corpus.txt", "tokenizers.md", "model_of_last_year.safetensors"]
    export(make(), folder, ReformerByteTokenizer())
    for name in [*mine, "chat_templates.md", "vocabulary.txt", "sub/tokenizer.json", "sub/deeper/model.safetensors"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    (folder / "link").symlink_to("sub")
    before = {path.relative_to(folder) for path in folder.rglob("*") if path.suffix not in (".py", ".json")}
    mode = 0o750
    folder.chmod(mode)
    export(make(hidden_size=32), folder, overwrite=True)
    assert {path.relative_to(folder) for path in folder.rglob("*") if path.suffix not in (".py", ".json")} == before
    assert (folder / "sub" / "tokenizer.json").read_text() == "mine"
    assert not (folder / "tokenizer.json").exists()
    assert (folder / "link").is_symlink()
    assert folder.stat().st_mode & 0o777 == mode
    assert names(tmp_path) == {"model"}


def killed_at(count, write):
    """Whether a process that does `write` is dead by its step number `count` on files; the others end well."""
    child = os.fork()
    if child == 0:
        left = [count]

        def hook(event, arguments):
            if event in ("os.rename", "os.link", "os.rmdir", "os.mkdir", "ctypes.call_function"):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        write()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="directories are exchanged in one step on Linux alone")
def test_a_model_that_is_overwritten_is_the_old_or_the_new_one_at_any_moment(tmp_path):
    old, new, found = make(), make(hidden_size=32), None
    export(old, tmp_path / "old", ReformerByteTokenizer())
    (tmp_path / "old" / "notes.txt").write_text("mine")
    for count in itertools.count(1):
        folder = shutil.copytree(tmp_path / "old", tmp_path / str(count) / "model")
        dead = killed_at(count, functools.partial(export, new, folder, overwrite=True))
        found = ReformerForCausalLM.from_pretrained(folder)
        expected = {16: old, 32: new}[found.config.hidden_size]
        assert all(torch.equal(x, expected.state_dict()[name]) for name, x in found.state_dict().items())
        assert (folder / "tokenizer.json").exists() is (found.config.hidden_size == 16)
        assert (folder / "notes.txt").read_text() == "mine"
        if not dead:
            break
    assert count > 5
    assert found.config.hidden_size == 32


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that share what is imported")
@pytest.mark.parametrize("exists", [True, False])
def test_a_new_folder_appears_whole_or_not_at_all(exists, tmp_path):
    model = make()
    for count in itertools.count(1):
        folder = tmp_path / str(count) / "model"
        (folder if exists else folder.parent).mkdir(parents=True)
        dead = killed_at(count, functools.partial(export, model, folder, ReformerByteTokenizer()))
        assert not folder.exists() or names(folder) == set() or ReformerForCausalLM.from_pretrained(folder)
        if not dead:
            break
    assert count > 2


def test_directories_are_replaced_where_they_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(model_folder.ctypes, "CDLL", lambda *args, **options: None)
    export(make(), tmp_path / "model")
    export(make(hidden_size=32), tmp_path / "model", overwrite=True)
    assert ReformerForCausalLM.from_pretrained(tmp_path / "model").config.hidden_size == 32
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: rename(self / "gone" if self.name == "new" else self, to))
    with pytest.raises(FileNotFoundError):
        export(make(hidden_size=48), tmp_path / "model", overwrite=True)
    assert ReformerForCausalLM.from_pretrained(tmp_path / "model").config.hidden_size == 32
    assert names(tmp_path) == {"model"}


def test_a_folder_that_one_stands_in_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    export(make(), ".")
    assert ReformerForCausalLM.from_pretrained(tmp_path / "empty")
    assert names(".") == names(tmp_path / "empty")
    with pytest.raises(OSError, match="current directory"):
        export(make(), ".", overwrite=True)


def make_trained(folder, **arguments):
    """A Trainer after four steps on rows of one text, judged every second step."""
    rows = [{"input_ids": make_ids(12, seed=i), "labels": make_ids(12, seed=i)} for i in range(8)]
    settings = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "report_to": "none"}
    args = TrainingArguments(folder, per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True, **settings)
    tokenizer = ReformerByteTokenizer()
    trainer = Trainer(make(), args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return trainer


def test_numbers_of_layers_are_no_scores_on_a_card():
    numbers = {"eval_attention_found": 0.5, "eval_bucket_entropy_layer_1": 0.25, "eval_dev_fullest_bucket": 2.0}
    numbers |= {"step": 4, "epoch": 2.0}
    cards = [model_card(make(), "x", dataset_name="rows", state=make_state(log)) for log in (LOG, [*LOG, numbers])]
    assert str(cards[0]) == str(cards[1])


def test_a_checkpoint_of_the_trainer_becomes_a_folder(tmp_path):
    trainer = make_trained(tmp_path / "run")
    for step in (2, 4):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        assert not list(checkpoint.glob("*.py"))
        assert "auto_map" not in json.loads((checkpoint / "config.json").read_text())
        folder = export(checkpoint, tmp_path / f"step{step}", datasets="ada/rows")
        assert load_file(folder / "model.safetensors").keys() == load_file(checkpoint / "model.safetensors").keys()
        assert not any(name.startswith(("optimizer", "trainer", "training", "rng")) for name in names(folder))
        assert type(AutoTokenizer.from_pretrained(folder)) is ReformerByteTokenizer
        (entry,) = [entry for entry in trainer.state.log_history if entry["step"] == step and "eval_loss" in entry]
        card = ModelCard.load(folder / "README.md")
        assert [(x.metric_type, x.metric_value) for x in card.data.eval_results] == [("loss", entry["eval_loss"])]
    saved = load_file(tmp_path / "step4" / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in trainer.model.state_dict().items())
    # and a model that was read from such a folder is trained without code, too
    again = ReformerForCausalLM.from_pretrained(tmp_path / "step4")
    again.save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").glob("*.py"))


# ---- refused, before anything is written


def adapters(tmp_path):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(make(), peft.LoraConfig(task_type="CAUSAL_LM"))


def injected(tmp_path):
    peft = pytest.importorskip("peft")
    model = make()
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["v_proj"]), model)
    del model.peft_config
    return model


def adapter_folder(tmp_path):
    adapters(tmp_path).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def quantized(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    model = make(hidden_size=64, attention_head_size=32, feed_forward_size=128)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def unsavable(tmp_path):
    class Quantizer:
        def is_serializable(self):
            return False

    model = make()
    model.hf_quantizer = Quantizer()
    return model


def sharing(tmp_path):
    model = make()
    model.model.sequence_group = object()  # a group of processes; `enable_sequence_parallel` would want a real one
    return model


def on_meta(tmp_path):
    with torch.device("meta"):
        return ReformerForCausalLM(tiny_config())


class Derived(ReformerForCausalLM):
    pass


def enlarged(tmp_path):
    model = make()
    model.lm_head = torch.nn.Linear(32, 7)
    return model


def headless(tmp_path):
    make(ReformerModel).save_pretrained(tmp_path / "body")
    config = json.loads((tmp_path / "body" / "config.json").read_text())
    config |= {"architectures": ["ReformerForCausalLM"], "is_decoder": True}
    (tmp_path / "body" / "config.json").write_text(json.dumps(config))
    return tmp_path / "body"


def damaged(tmp_path):
    make().save_pretrained(tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    return tmp_path / "damaged"


def unsafe(tmp_path):
    make().save_pretrained(tmp_path / "unsafe")
    (tmp_path / "unsafe" / "model.safetensors").unlink()
    torch.save({"lm_head.bias": print}, tmp_path / "unsafe" / "pytorch_model.bin")
    return tmp_path / "unsafe"


def without_index(tmp_path):
    make().save_pretrained(tmp_path / "sharded")
    (tmp_path / "sharded" / "model.safetensors").unlink()
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text("{}")
    return tmp_path / "sharded"


def gpt2(tmp_path):
    GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def builtin(tmp_path):
    ReformerConfig().save_pretrained(tmp_path / "builtin")
    return tmp_path / "builtin"


def nameless(tmp_path):
    tiny_config().save_pretrained(tmp_path / "nameless")
    return tmp_path / "nameless"


def listed(tmp_path):
    (tmp_path / "listed").mkdir()
    (tmp_path / "listed" / "config.json").write_text("[1]")
    return tmp_path / "listed"


def of_other_sizes(tmp_path):
    make().save_pretrained(tmp_path / "sizes")
    config = json.loads((tmp_path / "sizes" / "config.json").read_text())
    config["feed_forward_size"] += 8
    (tmp_path / "sizes" / "config.json").write_text(json.dumps(config))
    return tmp_path / "sizes"


def empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


REFUSED = {
    "merge_and_unload": adapters,
    "remove modules that were added": injected,
    "holds only an adapter": adapter_folder,
    "quantized in place": quantized,
    "quantize it when loading": unsavable,
    r"enable_sequence_parallel\(None\)": sharing,
    "without `device_map`": on_meta,
    "no subclasses": lambda tmp_path: Derived(tiny_config()),
    "Linear cannot be exported": lambda tmp_path: torch.nn.Linear(2, 2),
    "`lm_head.bias` has the shape": enlarged,
    "do not fit ReformerForCausalLM: lm_head.bias is missing": headless,
    "or damaged": damaged,
    "or damaged: Weights only load failed": unsafe,
    "or damaged: 'weight_map'": without_index,
    "type 'gpt2'": gpt2,
    "hf-reformer convert": builtin,
    "says none": nameless,
    "no config.json": empty,
    "holds a list, but must hold an object": listed,
    r"_proj.* has the shape \(\d+.*, where the config asks": of_other_sizes,
    "neither a directory nor": lambda tmp_path: "ada/absent",
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(message, tmp_path, monkeypatch):
    model = REFUSED[message](tmp_path)
    before = names(tmp_path)
    monkeypatch.setattr(hub, "create_repo", None)  # the Hub is not even asked
    for write in (lambda: export(model, tmp_path / "out"), lambda: push_to_hub(model, "ada/tiny")):
        with pytest.raises(ValueError, match=message):
            write()
    assert names(tmp_path) == before


def test_weights_distributed_over_processes_are_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = make()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match="distributed over processes"):
            export(model, tmp_path / "out")
    finally:
        torch.distributed.destroy_process_group()
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_written_are_refused(tmp_path):
    make().save_pretrained(tmp_path / "full")
    (tmp_path / "file").touch()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(FileExistsError, match="--overwrite"):
        export(make(), tmp_path / "full")
    with pytest.raises(FileExistsError, match="is a file"):
        export(make(), tmp_path / "file", overwrite=True)
    with pytest.raises(ValueError, match="into itself"):
        export(tmp_path / "full", tmp_path / "full", overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_failure_on_the_way_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    export(make(), tmp_path / "model")
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    monkeypatch.setattr(ReformerByteTokenizer, "save_pretrained", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(make(seed=1), tmp_path / "model", ReformerByteTokenizer(), overwrite=True)
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
    assert names(tmp_path) == {"model"}


def test_quantized_weights_that_can_be_saved_are_exported(tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    make(hidden_size=64, attention_head_size=32, feed_forward_size=128).save_pretrained(tmp_path / "float")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = ReformerForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    export(model, tmp_path / "model")
    again = ReformerForCausalLM.from_pretrained(tmp_path / "model")
    ids = make_ids(1, 20)
    assert torch.equal(again(ids).logits, model(ids).logits)


# ---- pushing


@pytest.fixture
def hub_calls(monkeypatch):
    """What is asked of the Hub, which answers that the user is ada."""
    calls = []

    def create_repo(repo_id, **options):
        calls.append(("create_repo", repo_id, options))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/ada/{repo_id.removeprefix('ada/')}")

    def upload_folder(**options):
        folder = Path(options.pop("folder_path"))
        calls.append(("upload_folder", {path.name: path.read_bytes() for path in folder.iterdir()}, options))
        return "commit"

    monkeypatch.setattr(hub, "create_repo", create_repo)
    monkeypatch.setattr(hub, "create_branch", lambda repo_id, **options: calls.append(("create_branch", options)))
    monkeypatch.setattr(hub, "upload_folder", upload_folder)
    return calls


def test_pushing_uploads_the_exported_folder(tmp_path, hub_calls):
    model, tokenizer = make(), ReformerByteTokenizer()
    commit = push_to_hub(model, "tiny", tokenizer, private=True, token="hf_x", state=make_state(), license="mit")
    assert commit == "commit"
    (_, name, made), (_, files, sent) = hub_calls
    assert (name, made) == ("tiny", {"private": True, "token": "hf_x", "exist_ok": True})
    assert (sent["repo_id"], sent["token"], sent["revision"]) == ("ada/tiny", "hf_x", None)
    earlier = ["model.safetensors", "model-00001-of-00002.safetensors", "tokenizer.json", "generation_config.json"]
    others = ["model_of_last_year.safetensors", "tokenizer_corpus.txt", "vocabulary.txt", "chat_templates.md"]
    deleted = set(filter_repo_objects([*earlier, *others], allow_patterns=sent["delete_patterns"]))
    assert deleted == set(earlier)
    export(model, tmp_path / "tiny", tokenizer, name="ada/tiny", state=make_state(), license="mit")
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    assert b'name = "ada/tiny"' in files["README.md"]


def test_pushing_a_folder_to_a_branch(tmp_path, hub_calls):
    make().save_pretrained(tmp_path / "model")
    push_to_hub(tmp_path / "model", "ada/tiny", revision="next", commit_message="Better")
    assert [call[0] for call in hub_calls] == ["create_repo", "create_branch", "upload_folder"]
    assert hub_calls[1][1]["branch"] == hub_calls[2][2]["revision"] == "next"
    assert hub_calls[2][2]["commit_message"] == "Better"
    assert "tokenizer.json" not in hub_calls[2][1]


def test_bad_names_and_cards_are_refused_before_the_hub_is_asked(hub_calls):
    for name, card in (("a/b/c", {}), ("ada/tiny", {"license": "Apache 2"}), ("ada/tiny", {"licence": "mit"})):
        with pytest.raises(ValueError):
            push_to_hub(make(), name, **card)
    assert hub_calls == []


def test_a_repository_of_the_hub_can_be_exported(tmp_path, monkeypatch):
    model = make(ReformerForTokenClassification)
    model.save_pretrained(tmp_path / "download")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **options: tmp_path / name.replace("ada/", ""))
    export("ada/download", tmp_path / "out")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(saved[name], weight) for name, weight in model.named_parameters())


# ---- model cards


def test_the_card_says_what_is_known():
    told = {"language": ["en", "de"], "license": "apache-2.0", "base_model": "ada/base", "datasets": ["ada/books"]}
    card = model_card(make(), "ada/tiny", ReformerByteTokenizer(), make_state(), tags="bytes", **told)
    data = yaml.safe_load(str(card).split("---")[1])
    assert {name: data[name] for name in told} == told
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert data["tags"] == ["reformer", "hf_reformer", "bytes"]
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"] == {"name": "ada/books", "type": "ada/books"}
    assert result["metrics"] == [{"type": "loss", "value": 2.625}, {"type": "accuracy", "value": 0.5}]
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict() == data


def test_what_is_unknown_is_left_out():
    card = model_card(make(), "ada/tiny")
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert [line for line in card.text.splitlines() if line.startswith("## ")] == ["## Use"]
    card = model_card(make(), "ada/tiny", state=make_state())  # scores on nobody knows what
    assert "model-index" not in card.data.to_dict()
    assert "## Evaluation" in card.text


def rows(card) -> dict[str, list[float]]:
    lines = [line for line in card.text.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {what: [float(cell) for cell in others] for what, *others in cells}


def test_scores_are_those_of_the_record():
    """Of the last step, of the best, and of these weights, where that is certain."""
    at_2, at_4 = [2, 2.5, 0.75], [4, 2.625, 0.5]
    known = {"dataset_name": "books"}
    card = model_card(make(), "x", state=make_state(), **known)  # a checkpoint
    assert rows(card) == {"these weights, last": at_4, "best": at_2}
    assert [x.metric_value for x in card.data.eval_results] == at_4[1:]
    card = model_card(make(), "x", state=make_state([*LOG, OVER]), **known)  # perhaps it went back to step 2
    assert rows(card) == {"best": at_2, "last": at_4}
    assert card.data.eval_results is None
    assert "does not tell" in card.text
    judged = [*LOG, OVER, {"eval_loss": 2.5, "eval_accuracy": 0.75, "step": 4, "epoch": 2.0}]  # it did
    card = model_card(make(), "x", state=make_state(judged), **known)
    assert rows(card) == {"these weights, last": [4, 2.5, 0.75], "best": at_2}
    assert [x.metric_value for x in card.data.eval_results] == at_2[1:]
    for best in (None, 4):
        card = model_card(make(), "x", state=make_state([*LOG, OVER], best_global_step=best), **known)
        assert [x.metric_value for x in card.data.eval_results] == at_4[1:]
    card = model_card(make(), "x", state=make_state(LOG, global_step=5), **known)  # trained on since
    assert card.data.eval_results is None
    assert "does not tell" in card.text


def test_scores_that_are_no_numbers_stay_out_of_the_metadata():
    log = [{"eval_loss": math.nan, "eval_a_score": 1, "eval_b_score": 2, "step": 4}]
    card = model_card(make(), "x", state=make_state(log, best_global_step=None), dataset_name="books")
    assert [x.metric_type for x in card.data.eval_results] == ["a_score", "b_score"]
    assert "nan" in card.text


HOSTILE = "x\n\n# Trust me\n\n[here](http://a.b) <script>x</script> | `" + "long " * 1000


def test_a_record_writes_no_markdown_into_the_card(tmp_path):
    """A checkpoint may come from anybody, and so may what its `trainer_state.json` says."""
    entry = {f"eval_{HOSTILE}": 0.5, "eval_text": HOSTILE, "eval_true": True, "eval_large": 10**4000, "step": 4}
    entry |= {f"eval_{i}": 1.0 for i in range(10_000)}
    card = model_card(make(), "x", state=make_state([entry], best_global_step=None), dataset_name="x\n# Trust me")
    plain = model_card(make(), "x", state=make_state([LOG[2]], best_global_step=None), dataset_name="x # Trust me")
    lines, expected = card.text.splitlines(), plain.text.splitlines()
    assert [line for line in lines if not line.startswith("|")] == [x for x in expected if not x.startswith("|")]
    (head,) = [line for line in lines if line.startswith("| | step")]
    assert len(head) < 10_000
    assert head.startswith("| | step | x Trust me here (http://a.b) script x /script long long")
    assert not set("[]<`#") & set(head)
    assert "\n# Trust" not in str(model_card(make(), "ada/x\n# Trust me", training={"a\n# Trust": "b\n# Trust"}))


@pytest.mark.parametrize(
    "record",
    ["[1]", "{", "[" * 10**5, '{"log_history": 3}', '{"log_history": [3]}', '{"log_history": [{"eval_loss": 1.0}]}',
     '{"log_history": [{"eval_loss": 1.0, "step": "4"}]}', '{"global_step": "# Trust me"}', '{"epoch": {"a": 1}}',
     '{"train_batch_size": "8"}', '{"best_global_step": [2]}', '{"unknown": 1}', '{"global_step": 1e300}'],
)  # fmt: skip
def test_a_record_that_is_none_is_refused_in_words(record, tmp_path):
    make().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "trainer_state.json").write_text(record)
    with pytest.raises(ValueError, match=r"trainer_state\.json is no record of the Trainer"):
        export(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_evaluation_sets_are_one_evaluation():
    log = [{"eval_a_loss": 1.0, "step": 4}, {"eval_b_loss": 2.0, "step": 4}]
    (found,) = evaluations(log)
    assert found.scores == {"a_loss": 1.0, "b_loss": 2.0}


def test_the_head_gives_the_task():
    expected = {
        ReformerModel: "feature-extraction",
        ReformerForCausalLM: "text-generation",
        ReformerForAudioClassification: "audio-classification",
        ReformerForCTC: "automatic-speech-recognition",
        ReformerForConditionalGeneration: "text2text-generation",
        ReformerForImageClassification: "image-classification",
        ReformerForMaskedLM: "fill-mask",
        ReformerForMultipleChoice: "multiple-choice",
        ReformerForQuestionAnswering: "question-answering",
        ReformerForSequenceClassification: "text-classification",
        ReformerForTimeSeriesPrediction: "time-series-forecasting",
        ReformerForTokenClassification: "token-classification",
    }
    assert {cls: model_card(make(cls), "x").data.pipeline_tag for cls in HEADS} == expected
    assert set(PIPELINE_TAGS) <= {auto_class.__name__ for auto_class in AUTO_CLASSES}


def test_names_with_quotes_are_names_still(tmp_path):
    name = """it's "mine"\n\\ – ü"""
    (line,) = [line for line in model_card(make(), name).text.splitlines() if line.startswith("name = ")]
    scope = {}
    exec(line, scope)
    assert scope["name"] == name


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("language", "english!"),
        ("language", ["en", "German"]),
        ("license", "Apache 2.0"),
        ("license", "other"),
        ("datasets", "a book"),
        ("datasets", ["ada/books", "a/b/c"]),
        ("base_model", "../base"),
        ("licence", "mit"),
        ("pipeline_tag", "text-generation"),
    ],
)
def test_metadata_that_the_hub_would_not_take_is_refused(field, value, tmp_path):
    with pytest.raises(ValueError, match=field):
        export(make(), tmp_path / "out", **{field: value})
    assert names(tmp_path) == set()


def test_a_license_of_ones_own():
    own = {"license": "other", "license_name": "mine", "license_link": "LICENSE"}
    assert own.items() <= model_card(make(), "x", **own).data.to_dict().items()


def test_versions_are_those_of_the_package():
    text = (PACKAGE.parents[1] / "pyproject.toml").read_text()
    needed = dict(re.findall(r'"(torch|transformers)>=([\d.]+)"', text))
    assert f"transformers {needed['transformers']} and torch {needed['torch']}" in model_card(make(), "x").text
