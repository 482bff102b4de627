"""The attention mass that every token receives: that of the dense weights, values and gradients, on every backend."""

import pytest
import torch
from attention_cases import Case, cases, make_case
from attention_mass_cases import assert_mass_equals_reference, draw_query_weights, gradients
from conftest import max_abs_diff
from hypothesis import given, settings

from hf_reformer.layers.full_attention import full_attention_mass
from hf_reformer.ops.dispatch import windowed_attention
from reformer_kernels.cpu import build


@pytest.mark.parametrize("backend", ["reference", "torch"])
@given(drawn=cases)
@settings(max_examples=60)
def test_mass_equals_reference(backend, drawn):
    assert_mass_equals_reference(make_case(drawn), backend, torch.float64)


def has_compiler() -> bool:
    try:
        build.compiler()
    except build.KernelBuildError:
        return False
    return True


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@given(drawn=cases)
@settings(max_examples=60)
def test_kernel_mass_equals_reference(drawn):
    assert_mass_equals_reference(make_case(drawn, size=8, value_size=16), "cpu", torch.float32)


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("mode", ["window", "chunk"])
@pytest.mark.parametrize("threads", [1, 2])
def test_kernel_mass_equals_reference_over_many_tiles(mode, threads):
    drawn = {"mode": mode, "length": 400, "window": 50, "num_buckets": 3, "padding": 0.1, "dropout": 0.2}
    torch.set_num_threads(threads)
    try:
        assert_mass_equals_reference(make_case(drawn, size=16, value_size=8), "cpu", torch.float32)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_output_is_the_same_with_query_weights(backend):
    case = Case(dropout=0.2, dtype=torch.float32, size=8, value_size=8)
    query, _, value = case.inputs
    options = {**case.options, "backend": backend}
    results, _ = windowed_attention(query, None, value, case.layout, query_weights=draw_query_weights(case), **options)
    assert torch.equal(results, windowed_attention(query, None, value, case.layout, **options)[0])


@pytest.mark.parametrize("causal", [True, False])
def test_full_attention_mass_in_pieces(causal, monkeypatch):
    """As for cross-attention: other numbers of queries and keys, keys that nobody may see."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64) for n in (9, 9 if causal else 5))
    query_weights = torch.rand(2, 9, generator=generator, dtype=torch.float64)
    visible = torch.ones(2, 1, 1, key.shape[2], dtype=torch.bool)
    visible[1, ..., -2:] = False
    allowed = None if causal else visible

    def run():
        inputs = [x.clone().requires_grad_() for x in (query, key)]
        mass = full_attention_mass(*inputs, query_weights, allowed, causal, 0.5)
        return [mass, *gradients([mass], inputs)]

    whole = run()
    monkeypatch.setattr("hf_reformer.layers.full_attention.MAX_SCORES", 100)
    assert all(max_abs_diff(a, b) <= 1e-12 for a, b in zip(run(), whole, strict=True))
    scores = 0.5 * query @ key.transpose(-1, -2)
    masked = torch.ones(9, 9).triu(1).bool() if causal else ~visible
    weights = scores.masked_fill(masked, -torch.inf).softmax(-1)
    assert max_abs_diff(whole[0], (weights * query_weights[:, None, :, None]).sum((1, 2))) <= 1e-12
