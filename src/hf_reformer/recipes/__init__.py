"""A recipe trains one kind of model: `hf-reformer train NAME` and `scripts/train_*.py` run its `main`."""

from types import ModuleType

from ..data.tables import require

RECIPES = {  # a module of this folder each
    "classification": "label texts or pairs of texts, or predict a number for them",
    "language-model": "causal and masked language models, evaluated in bits per byte",
    "seq2seq": "translation, summarisation, any text to any other",
}


def load_recipe(name: str) -> ModuleType:
    """The module of a recipe; ImportError, which says what to install, if a library is missing."""
    return require(f"{__name__}.{name.replace('-', '_')}")
