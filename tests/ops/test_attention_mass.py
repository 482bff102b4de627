"""The attention mass that every token receives: that of the dense weights, values and gradients, on every backend."""

import pytest
import torch
from attention_cases import TOLERANCES, Case, cases, make_case
from conftest import max_abs_diff
from hypothesis import given, settings

from hf_reformer.layers.full_attention import full_attention_mass
from hf_reformer.ops.dispatch import windowed_attention
from hf_reformer.ops.reference import attention_with_weights
from reformer_kernels.cpu import build


def values_and_gradients(case, backend: str, query_weights: torch.Tensor) -> list[torch.Tensor]:
    """Output, attention mass, and the gradients of query, key and value by both."""
    inputs = [x.detach().requires_grad_() for x in case.inputs]
    query, key, value = inputs
    key = None if case.shared else key
    options = {**case.options, "scale": case.scale, "backend": backend, "query_weights": query_weights}
    results = windowed_attention(query, key, value, case.layout, **options)
    return [x.detach() for x in results] + gradients(results, inputs)


def gradients(results, inputs) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in results]
    return [*torch.autograd.grad(results, inputs, grads, materialize_grads=True)]


def expected_results(case, query_weights: torch.Tensor) -> list[torch.Tensor]:
    """The same in float64 from the matrix of weights."""
    inputs = [x.detach().double().requires_grad_() for x in case.inputs]
    query, key, value = inputs
    out, weights = attention_with_weights(
        query, None if case.shared else key * case.scale, value, case.layout, **case.options
    )
    mass = (weights * query_weights.double()[:, None, :, None]).sum((1, 2))
    return [out.detach(), mass.detach(), *gradients((out, mass), inputs)]


def draw_query_weights(case) -> torch.Tensor:
    batch, _, length, _ = case.inputs[0].shape
    query_weights = torch.rand(batch, length, generator=torch.Generator().manual_seed(2))
    return query_weights if case.mask is None else query_weights * case.mask


def assert_equal(results, expected, dtype) -> None:
    for name, a, b in zip(("output", "mass", "query", "key", "value"), results, expected, strict=True):
        assert max_abs_diff(a, b) <= TOLERANCES[dtype] * max(1, b.abs().max().item()), name


def assert_mass_equals_reference(case, backend: str, dtype: torch.dtype) -> None:
    case.inputs = [x.to(dtype) for x in case.inputs]
    assert_equal(
        values_and_gradients(case, backend, draw_query_weights(case)),
        expected_results(case, draw_query_weights(case)),
        dtype,
    )


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
