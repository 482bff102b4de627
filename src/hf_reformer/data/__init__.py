"""Reading of tables and texts, packing, and training of tokenizers."""

from .bpe_tokenizer import train_bpe_tokenizer
from .columns import Columns, find_columns, hold_out
from .demo_corpus import CORPUS_PACKAGES, clean_source, corpus_file, installed_packages_corpus, names_a_package
from .tables import TABLE_FORMATS, read_examples, require

__all__ = [
    "CORPUS_PACKAGES",
    "TABLE_FORMATS",
    "Columns",
    "clean_source",
    "corpus_file",
    "find_columns",
    "hold_out",
    "installed_packages_corpus",
    "names_a_package",
    "read_examples",
    "require",
    "train_bpe_tokenizer",
]
