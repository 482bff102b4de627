"""Default target modules for peft, so that `LoraConfig()` needs no `target_modules` for our models.

For each kind of adapter, peft has a table from model types to module names, but no way to register an entry. So
entries are added to its tables directly: now if peft is already imported, otherwise once it is. This module never
imports it.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from ..compat import PEFT_TABLES, peft_target_tables
from ..configuration_reformer import ReformerConfig

# Queries and values, as for nearly every model in peft's tables. In lsh layers, queries are also keys.
QUERIES_AND_VALUES = ["qk_proj", "q_proj", "v_proj"]
# Adapters with other targets, by the middle of their table's name. IA3 scales keys, values and inputs of `down_proj`.
TARGETS_BY_METHOD = {
    "BEFT_TARGET": ["v_proj"],
    "IA3_FEEDFORWARD": ["down_proj"],
    "IA3_TARGET": ["qk_proj", "k_proj", "v_proj", "down_proj"],
    "LNTUNING_TARGET": ["attention_norm", "feed_forward_norm", "norm"],
    "OSF_TARGET": ["qk_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
}


def register_adapters() -> None:
    """Add our models to peft's tables, now or as soon as peft is imported. Calling it again has no effect."""
    if PEFT_TABLES in sys.modules:
        fill_tables()
    elif not any(isinstance(finder, _FillWhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _FillWhenImported())


def fill_tables() -> None:
    """Add our models to all of peft's tables; existing entries are kept."""
    for kind, table in peft_target_tables():
        table.setdefault(ReformerConfig.model_type, list(TARGETS_BY_METHOD.get(kind, QUERIES_AND_VALUES)))


class _FillWhenImported(MetaPathFinder):
    """A finder that locates peft's module of tables as Python does, and fills the tables once it has been executed."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != PEFT_TABLES:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_fill(module: ModuleType) -> None:
                execute(module)
                fill_tables()

            spec.loader.exec_module = execute_and_fill  # type: ignore[method-assign]  # this module has its own loader
        return spec
