"""A recipe trains one kind of model: `hf-reformer train NAME` and `scripts/train_*.py` run its `main`."""

from types import ModuleType

from ..data.tables import require


def load_recipe(name: str) -> ModuleType:
    """Import the module of a recipe. If a library is missing, an ImportError says what to install."""
    return require(f"{__name__}.{name.replace('-', '_')}")
