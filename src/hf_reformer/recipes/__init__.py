"""A recipe trains one kind of model: `hf-reformer train NAME` and `scripts/train_*.py` run its `main`."""

from types import ModuleType

from ..data.tables import require


def load_recipe(name: str) -> ModuleType:
    """The module of a recipe; ImportError, which says what to install, if a library is missing."""
    return require(f"{__name__}.{name.replace('-', '_')}")
