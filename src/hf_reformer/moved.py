"""Old names of modules that now live in a room: importing from them works, with a warning."""

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

MOVED = {
    "convert": ["hub.convert"],
    "coverage_callback": ["training.coverage_callback"],
    "distributed": ["training.distributed"],
    "model_card": ["hub.model_card"],
    "pipelines": ["hub.pipelines"],
    "visualize": ["analysis.plots", "analysis.lsh_stats", "ops.coverage"],
}


class MovedModule(ModuleType):
    """Takes its names from the modules that hold them now."""

    def __getattr__(self, name: str) -> Any:
        package, _, old = self.__name__.rpartition(".")
        for target in [] if name.startswith("__") else MOVED[old]:
            module = import_module(f"{package}.{target}")
            if hasattr(module, name):
                message = f"{self.__name__} is deprecated. Import {name} from {module.__name__}."
                warnings.warn(message, FutureWarning, stacklevel=2)
                return getattr(module, name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


def register_moved_modules() -> None:
    """Let `import hf_reformer.OLD` and `from hf_reformer.OLD import x` find the moved modules."""
    for name in MOVED:
        module = sys.modules.setdefault(f"{__package__}.{name}", MovedModule(f"{__package__}.{name}"))
        setattr(sys.modules[__package__], name, module)
