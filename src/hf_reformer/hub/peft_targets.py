"""Where adapters go by default: what peft is told about our models, so that `LoraConfig()` needs no `target_modules`.

peft keeps a table for every kind of adapter, from a model type to the names of modules, and offers no way to register
an entry. So the entries are written into its tables: at once where peft is imported already, else when it is. It is
never imported from here.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

from ..configuration_reformer import ReformerConfig

TABLES = "peft.utils.constants"
# Queries and values, as for nearly every model in peft's tables. An lsh layer's queries are its keys.
QUERIES_AND_VALUES = ["qk_proj", "q_proj", "v_proj"]
EVERY_PROJECTION = ["qk_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
# Kinds that go elsewhere, by the middle of their table's name. IA3 scales keys, values and what enters `down_proj`.
TARGETS_BY_METHOD = {
    "BEFT_TARGET": ["v_proj"],
    "IA3_FEEDFORWARD": ["down_proj"],
    "IA3_TARGET": ["qk_proj", "k_proj", "v_proj", "down_proj"],
    "LNTUNING_TARGET": ["attention_norm", "feed_forward_norm", "norm"],
    "OSF_TARGET": EVERY_PROJECTION,
}


def register_adapters() -> None:
    """Enter our models in peft's tables, now or as soon as peft is imported. Doing it again changes nothing."""
    if TABLES in sys.modules:
        fill(sys.modules[TABLES])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def fill(tables: ModuleType) -> None:
    """Enter our models in all of the tables; what somebody else entered for them stays."""
    for name, table in vars(tables).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and name.endswith("_MODULES_MAPPING"):
            kind = name.removeprefix("TRANSFORMERS_MODELS_TO_").removesuffix("_MODULES_MAPPING")
            table.setdefault(ReformerConfig.model_type, list(TARGETS_BY_METHOD.get(kind, QUERIES_AND_VALUES)))


class _WhenImported(MetaPathFinder):
    """Finds peft's module of tables as Python does, and has them filled when they exist."""

    def find_spec(self, fullname, path=None, target=None) -> ModuleSpec | None:
        if fullname != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Filling(spec.loader)
        return spec


class _Filling(Loader):
    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        fill(module)


__all__ = ["register_adapters"]
