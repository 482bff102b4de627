"""Properties of whatever model a seed draws: padding, the future, caches, packing, and gradients on every path."""

import random

import pytest
import torch
from conftest import make_ids, make_model, max_abs_diff, relative_error
from fuzzing import seeds

from hf_reformer import ReformerForCausalLM, ReformerModel

TOLERANCE = 1e-9  # in float64, where no two buckets are so near to each other


def draw_options(draw: random.Random) -> dict:
    chunks = draw.random() < 0.25
    size = 8 * draw.randint(1, 2)
    options = {
        "attn_layers": [draw.choice(["local", "lsh", "lsh", "full"]) for _ in range(draw.randint(1, 4))],
        "num_attention_heads": draw.randint(1, 3),
        "attention_head_size": size,
        "num_hashes": draw.randint(1, 3),
        "position_embedding_type": draw.choice(["rotary", "learned", "axial"]),
        "attention_backend": draw.choice(["auto", "torch", "reference"]),
        "hidden_dropout_prob": draw.choice([0.0, 0.1]),
        "chunk_size_feed_forward": draw.choice([0, 7]),
        "residual_precision": draw.choice(["float64", "float32"]),
    }
    if chunks:
        chunk = draw.choice([4, 8])
        return options | {
            "attention_mode": "chunk", "num_buckets": draw.choice([None, 4]), "lsh_attn_chunk_length": chunk,
            "local_attn_chunk_length": chunk, "position_embedding_type": draw.choice(["axial", "learned"]),
        }  # fmt: skip
    return options | {
        "lsh_window": draw.choice([1, 2, 6, 40, 2**20]),
        "local_window": draw.choice([1, 2, 6, 40, 2**20]),
        "num_buckets": draw.choice([2, 4, (4, 6), 64]),
        "lsh_include_local": draw.random() < 0.7,
        "lsh_centering": draw.choice([True, 0.5, False]),
        "lsh_exploration_orders": draw.randint(0, 2),
        "lsh_rotary": draw.choice([0.0, 0.5, 1.0]),
    }


def forward(model, *inputs, **options):
    with torch.no_grad():
        return model(*inputs, **options).last_hidden_state


def check_padding(model, ids, draw):
    """Padding and neighbors change nothing."""
    left, right = draw.randint(0, 9), draw.randint(0, 9)
    row = torch.nn.functional.pad(ids[:1], (left, right))
    mask = torch.nn.functional.pad(torch.ones_like(ids[:1]), (left, right))
    other = make_ids(1, row.shape[1], seed=5)
    found = forward(model, torch.cat([row, other]), torch.cat([mask, torch.ones_like(mask)]))
    assert max_abs_diff(found[:1, left : left + ids.shape[1]], forward(model, ids[:1])) < TOLERANCE
    assert max_abs_diff(found[1:], forward(model, other)) < TOLERANCE


def check_future(model, ids, draw):
    """What comes changes nothing that was."""
    cut = draw.randint(1, ids.shape[1])
    assert max_abs_diff(forward(model, ids[:, :cut]), forward(model, ids)[:, :cut]) < TOLERANCE


def check_pieces(model, ids, draw):
    """Tokens in pieces, on top of a cache, give what they give at once."""
    expected, seen, cache = forward(model, ids), 0, None
    while seen < ids.shape[1]:
        end = min(ids.shape[1], seen + draw.choice([1, 1, 2, 9, 30]))
        with torch.no_grad():
            outputs = model(ids[:, seen:end], past_key_values=cache, use_cache=True)
        assert max_abs_diff(outputs.last_hidden_state, expected[:, seen:end]) < TOLERANCE
        seen, cache = end, outputs.past_key_values


def check_packing(model, ids, draw):
    """Samples in one row give what each gives alone."""
    lengths = []
    while (left := ids.shape[1] - sum(lengths)) > 0:
        lengths.append(draw.randint(1, left))
    positions = torch.cat([torch.arange(length) for length in lengths])[None].expand_as(ids)
    alone = torch.cat([forward(model, sample) for sample in ids.split(lengths, dim=1)], dim=1)
    assert max_abs_diff(forward(model, ids, position_ids=positions), alone) < TOLERANCE


def check_gradients(options, seed, ids):
    """The reversible path, the plain and the checkpointed one give the same loss and gradients."""
    found = []
    for path in ("plain", "reversible", "checkpointed"):
        model = make_model(ReformerForCausalLM, seed, **{**options, "reversible": path == "reversible"}).train()
        if path == "checkpointed":
            model.gradient_checkpointing_enable()
        torch.manual_seed(seed)
        loss = model(ids, labels=ids).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), gradients))
    for loss, gradients in found[1:]:
        assert max_abs_diff(loss, found[0][0]) < 1e-9
        assert relative_error(gradients, found[0][1]) < 1e-7


def check_model(seed: int) -> None:
    draw = random.Random(seed)
    options = draw_options(draw)
    options["is_decoder"] = causal = draw.random() < 0.6
    chunks = options.get("attention_mode") == "chunk"
    ids = make_ids(2, draw.choice([1, 2, 5, 17, 40, 65]), seed=seed)
    if draw.random() < 0.4 and ids.shape[1] > 1:
        check_gradients(options, seed, ids)
        return
    model = make_model(ReformerModel, seed, **options)
    if not chunks:
        check_padding(model, ids, draw)
        check_packing(model, ids, draw)
    if causal and not chunks:
        check_future(model, ids, draw)
        check_pieces(model, ids, draw)
    parts = [forward(model, row) for row in ids.split(1)]
    assert max_abs_diff(forward(model, ids), torch.cat(parts)) < TOLERANCE


@pytest.mark.parametrize("seed", range(8))
def test_properties_of_some_models(seed):
    check_model(seed)


@pytest.mark.slow
def test_fuzz_models():
    for seed in seeds():
        try:
            check_model(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {draw_options(random.Random(seed))}") from error
