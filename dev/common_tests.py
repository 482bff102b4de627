"""Run the common model tests of transformers on our models, for every kind of layer stack.

    python dev/common_tests.py                      # all, about ten minutes
    python dev/common_tests.py -k "mixed and save"  # arguments are passed to pytest

pip downloads the tests with the source distribution of the installed transformers. It lacks the mixins for export and
generation, which are replaced by empty ones.
"""

import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
import unittest
from pathlib import Path

FOLDER = Path(tempfile.gettempdir()) / f"transformers-{importlib.metadata.version('transformers')}"
LACKING = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def fetch() -> None:
    """Download the tests into a separate folder, unless they are there."""
    if not (FOLDER / "tests").is_dir():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers"]
        with tempfile.TemporaryDirectory() as downloads:
            version = FOLDER.name.replace("-", "==")
            subprocess.run([*command, "--dest", downloads, version], check=True)
            with tarfile.open(next(Path(downloads).glob("*.tar.gz"))) as archive:
                archive.extractall(FOLDER.parent, filter="data")
    for name, text in LACKING.items():
        path = FOLDER / "tests" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    sys.path.insert(0, str(FOLDER))


fetch()

import torch  # noqa: E402
from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask  # noqa: E402
from transformers.models.auto import modeling_auto  # noqa: E402

import hf_reformer  # noqa: E402
from hf_reformer import ReformerConfig  # noqa: E402

# The tests choose labels by looking up class names in transformers' own tables.
for _table, _name in {
    "MODEL_MAPPING_NAMES": "ReformerModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "ReformerForCausalLM",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "ReformerForMaskedLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "ReformerForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "ReformerForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "ReformerForQuestionAnswering",
    "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES": "ReformerForMultipleChoice",
}.items():
    getattr(modeling_auto, _table)["hf_reformer"] = _name

BOTH = ("ReformerModel", "ReformerForSequenceClassification", "ReformerForTokenClassification",
        "ReformerForQuestionAnswering")  # fmt: skip
HEADS = {True: (*BOTH, "ReformerForCausalLM"), False: (*BOTH, "ReformerForMaskedLM", "ReformerForMultipleChoice")}
STACKS = {"local": ["local"] * 2, "lsh": ["lsh"] * 2, "mixed": ["local", "lsh"], "full": ["lsh", "full"]}


class Tester:
    """The model tester that the common tests expect."""

    batch_size, seq_length, num_choices, vocab_size, hidden_size, num_attention_heads = 3, 7, 4, 99, 32, 4

    def __init__(self, parent: unittest.TestCase, layers: list[str], causal: bool):
        self.parent, self.layers, self.is_decoder = parent, layers, causal
        self.num_hidden_layers, self.is_training, self.encoder_seq_length = len(layers), True, self.seq_length

    def get_config(self) -> ReformerConfig:
        return ReformerConfig(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, num_attention_heads=self.num_attention_heads,
            attention_head_size=8, feed_forward_size=37, attn_layers=self.layers, local_window=4, lsh_window=4,
            num_buckets=4, max_position_embeddings=64, hidden_dropout_prob=0.1, is_decoder=self.is_decoder,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self) -> tuple[ReformerConfig, dict[str, torch.Tensor]]:
        shape = [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(shape, self.vocab_size), "attention_mask": random_attention_mask(shape)}
        return self.get_config(), inputs


class OfStack(ModelTesterMixin):
    """All common tests for one kind of stack."""

    layers: list[str] = []
    causal = True

    def setUp(self) -> None:
        self.model_tester = Tester(self, self.layers, self.causal)
        self.config_tester = ConfigTester(self, config_class=ReformerConfig, hidden_size=32)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


for _kind, _layers in STACKS.items():
    for _causal in (True, False):
        _heads = tuple(getattr(hf_reformer, name) for name in HEADS[_causal])
        _title = f"Test_{_kind}_{'causal' if _causal else 'bidirectional'}"
        globals()[_title] = type(
            _title,
            (OfStack, *[GenerationTesterMixin] * _causal, unittest.TestCase),
            {"layers": _layers, "causal": _causal, "all_model_classes": _heads, "__module__": __name__},
        )

if __name__ == "__main__":
    import pytest

    sys.exit(pytest.main([__file__, "-q", "-rs", "-p", "no:cacheprovider", *sys.argv[1:]]))
