"""Attention with query weights against the dense weights, values and gradients: for the tests of all backends."""

import torch
from attention_cases import TOLERANCES
from conftest import max_abs_diff

from hf_reformer.ops.dispatch import windowed_attention
from hf_reformer.ops.reference import attention_with_weights


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
