"""How much attention every token receives: what the dense weights say, values and gradients, on every backend."""

import pytest
import torch
from attention_cases import TOLERANCES, Case, cases, make_case
from conftest import max_abs_diff
from hypothesis import given, settings

from hf_reformer.ops.dispatch import windowed_attention
from hf_reformer.ops.received_attention import exact_received
from hf_reformer.ops.reference import attention_with_weights
from reformer_kernels.cpu import build


def values_and_gradients(case, backend: str, query_weights: torch.Tensor) -> list[torch.Tensor]:
    """Output, what is received, and the gradients of query, key and value by both."""
    inputs = [x.detach().requires_grad_() for x in case.inputs]
    query, key, value = inputs
    key = None if case.shared else key
    options = {**case.options, "scale": case.scale, "backend": backend, "query_weights": query_weights}
    found = windowed_attention(query, key, value, case.orders, **options)
    return [x.detach() for x in found] + gradients(found, inputs)


def gradients(found, inputs) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in found]
    return [*torch.autograd.grad(found, inputs, upstream, materialize_grads=True)]


def by_hand(case, paid: torch.Tensor) -> list[torch.Tensor]:
    """The same in float64 from the matrix of weights."""
    inputs = [x.detach().double().requires_grad_() for x in case.inputs]
    query, key, value = inputs
    out, weights = attention_with_weights(
        query, None if case.shared else key * case.scale, value, case.orders, **case.options
    )
    received = (weights * paid.double()[:, None, :, None]).sum((1, 2))
    return [out.detach(), received.detach(), *gradients((out, received), inputs)]


def shares(case) -> torch.Tensor:
    batch, _, length, _ = case.inputs[0].shape
    paid = torch.rand(batch, length, generator=torch.Generator().manual_seed(2))
    return paid if case.mask is None else paid * case.mask


def assert_equal(found, expected, dtype) -> None:
    for name, a, b in zip(("output", "received", "query", "key", "value"), found, expected, strict=True):
        assert max_abs_diff(a, b) <= TOLERANCES[dtype] * max(1, b.abs().max().item()), name


def assert_is_what_the_weights_say(case, backend: str, dtype: torch.dtype) -> None:
    case.inputs = [x.to(dtype) for x in case.inputs]
    assert_equal(values_and_gradients(case, backend, shares(case)), by_hand(case, shares(case)), dtype)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@given(drawn=cases)
@settings(max_examples=60)
def test_it_is_what_the_weights_say(backend, drawn):
    assert_is_what_the_weights_say(make_case(drawn), backend, torch.float64)


def has_compiler() -> bool:
    try:
        build.compiler()
    except build.KernelBuildError:
        return False
    return True


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@given(drawn=cases)
@settings(max_examples=60)
def test_it_is_what_the_weights_say_to_the_kernel(drawn):
    assert_is_what_the_weights_say(make_case(drawn, size=8, value_size=16), "cpu", torch.float32)


@pytest.mark.skipif(not has_compiler(), reason="no C++ compiler")
@pytest.mark.parametrize("mode", ["window", "chunk"])
@pytest.mark.parametrize("threads", [1, 2])
def test_it_is_what_the_weights_say_over_many_tiles(mode, threads):
    drawn = {"mode": mode, "length": 400, "window": 50, "count": 3, "hidden": 0.1, "dropout": 0.2}
    torch.set_num_threads(threads)
    try:
        assert_is_what_the_weights_say(make_case(drawn, size=16, value_size=8), "cpu", torch.float32)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_attention_is_the_same_with_it(backend):
    case = Case(dropout=0.2, dtype=torch.float32, size=8, value_size=8)
    query, _, value = case.inputs
    how = {**case.options, "backend": backend}
    found, _ = windowed_attention(query, None, value, case.orders, query_weights=shares(case), **how)
    assert torch.equal(found, windowed_attention(query, None, value, case.orders, **how)[0])


@pytest.mark.parametrize("causal", [True, False])
def test_exact_attention_in_pieces(causal, monkeypatch):
    """As for cross-attention: other numbers of queries and keys, keys that nobody may see."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 3, n, 4, generator=generator, dtype=torch.float64) for n in (9, 9 if causal else 5))
    paid = torch.rand(2, 9, generator=generator, dtype=torch.float64)
    seen = torch.ones(2, 1, 1, key.shape[2], dtype=torch.bool)
    seen[1, ..., -2:] = False
    allowed = None if causal else seen

    def run():
        inputs = [x.clone().requires_grad_() for x in (query, key)]
        received = exact_received(*inputs, paid, allowed, causal, 0.5)
        return [received, *gradients([received], inputs)]

    whole = run()
    monkeypatch.setattr("hf_reformer.ops.received_attention.MAX_SCORES", 100)
    assert all(max_abs_diff(a, b) <= 1e-12 for a, b in zip(run(), whole, strict=True))
    scores = 0.5 * query @ key.transpose(-1, -2)
    hidden = torch.ones(9, 9).triu(1).bool() if causal else ~seen
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    assert max_abs_diff(whole[0], (weights * paid[:, None, :, None]).sum((1, 2))) <= 1e-12
