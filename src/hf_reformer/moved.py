"""Modules and functions under their names of version 0.1, which can be imported with a warning."""

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

MOVED = {
    "cli": "reformer_cli.main",
    "cli.main": "reformer_cli.main",  # entry point of development versions, kept by editable installations
    "convert": "hf_reformer.hub.convert",
    "coverage_callback": "hf_reformer.training.coverage_callback",
    "distributed": "hf_reformer.training.distributed",
    "model_card": "hf_reformer.hub.model_card",
    "pipelines": "hf_reformer.hub.pipelines",
    "visualize": "hf_reformer.analysis",
}
RENAMED = {
    "plot_received": "plot_attention_mass",
    "reached_share": "covered_fraction",
    "received_attention": "attention_mass",
    "received_by_layer": "attention_mass_by_layer",
    "received_entropy": "mass_entropy",
    "seen_pairs": "visible_pairs",
}


class MovedModule(ModuleType):
    """A module whose names come from the module that holds them now."""

    def __getattr__(self, name: str) -> Any:
        module, new = MOVED[self.__name__.removeprefix(f"{__package__}.")], RENAMED.get(name, name)
        if name.startswith("__") or not hasattr(import_module(module), new):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        warnings.warn(f"{self.__name__} is deprecated. Import {new} from {module}.", FutureWarning, stacklevel=2)
        return getattr(import_module(module), new)


def register_moved_modules() -> None:
    """Let `import hf_reformer.OLD` and `from hf_reformer.OLD import x` find the moved modules."""
    for name in MOVED:
        module = sys.modules.setdefault(f"{__package__}.{name}", MovedModule(f"{__package__}.{name}"))
        setattr(sys.modules[__package__], name, module)
