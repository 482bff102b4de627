"""Import the scripts of `experiments/`, which import each other by their bare names as scripts do."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


def load_experiment(name: str) -> ModuleType:
    """A script as a module; the path is changed for the time of the import alone, so nothing else is shadowed."""
    with patch.object(sys, "path", [str(EXPERIMENTS), *sys.path]):
        return importlib.import_module(name)
