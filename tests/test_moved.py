"""Import paths of version 0.1 and the public ones of today."""

import importlib

import pytest

import hf_reformer
from hf_reformer.moved import MOVED

NAMES = {
    "cli": "main",
    "cli.main": "main",
    "convert": "convert",
    "coverage_callback": "CoverageCallback",
    "distributed": "SequenceParallelTrainer",
    "model_card": "model_card",
    "pipelines": "LongDocumentQuestionAnswering",
    "visualize": "view_layer",
}


@pytest.mark.parametrize("old", MOVED)
def test_old_modules_work_with_a_warning(old):
    module = importlib.import_module(f"hf_reformer.{old}")
    assert getattr(hf_reformer, old) is module
    with pytest.warns(FutureWarning, match=rf"Import {NAMES[old]} from (hf_reformer|reformer_cli)\."):
        value = getattr(module, NAMES[old])
    assert value.__name__ == NAMES[old]
    assert not hasattr(module, "no_such_name")
    assert not hasattr(module, "__file__")


def test_renamed_functions_are_found_by_their_old_names():
    with pytest.warns(FutureWarning, match=r"Import plot_attention_mass from hf_reformer\.analysis"):
        from hf_reformer.visualize import plot_received
    with pytest.warns(FutureWarning):
        from hf_reformer.visualize import reached_share, received_attention, received_entropy, seen_pairs  # noqa: F401
    with pytest.warns(FutureWarning):
        from hf_reformer.coverage_callback import received_by_layer  # noqa: F401
    assert plot_received is hf_reformer.analysis.plot_attention_mass


def test_renamed_methods_work_by_their_old_names():
    model = hf_reformer.ReformerModel(hf_reformer.ReformerConfig(num_hidden_layers=1, hidden_size=16))
    with pytest.warns(FutureWarning, match="Use enable_sequence_parallel"):
        model.share_sequences(None)
    both = model.config.as_encoder_decoder()
    assert both.is_encoder_decoder
    assert both.of_decoder().is_decoder


def test_names_that_rooms_offer():
    from hf_reformer import cache, hub

    assert cache.ReformerCache.__name__ == "ReformerCache"
    assert hub.export.__name__ == "export"
    assert hub.push_to_hub.__name__ == "push_to_hub"
    with pytest.raises(ImportError):
        from hf_reformer.hub import nothing  # noqa: F401
