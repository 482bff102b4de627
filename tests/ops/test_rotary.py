"""Rotary positions: what they are for, and that all ways to compute them agree."""

import pytest
import torch
from torch.autograd import forward_ad

from hf_reformer.ops import dispatch
from hf_reformer.ops.rotary import rotary_tables, rotate

BATCH, HEADS, LENGTH, SIZE = 2, 3, 70, 24


def vectors(dtype=torch.float32, seed=0):
    """(B, H, T, D), laid out as projections lay them out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, LENGTH, HEADS, SIZE, generator=generator).to(dtype).transpose(1, 2)


def tables(rows=BATCH):
    positions = torch.arange(LENGTH) * torch.arange(1, rows + 1)[:, None]
    return rotary_tables(positions, SIZE, 10000.0)


def test_products_depend_on_distances_alone():
    query, key = vectors()[0, 0, :1].expand(LENGTH, -1), vectors(seed=1)[0, 0, :1].expand(LENGTH, -1)
    query, key = (rotate(x[None, None], tables(1))[0, 0] for x in (query, key))
    products = query @ key.mT
    for distance in (-20, 0, 7):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(query.norm(dim=-1), query[:1].norm(dim=-1).expand(LENGTH))


@pytest.mark.parametrize("heads", [None, 1, HEADS])
@pytest.mark.parametrize("rows", [1, BATCH])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.005)])
def test_backends_agree_with_the_definition(dtype, near, rows, heads):
    expected = rotate(vectors(torch.float64), tables(rows), heads)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected_grad,) = gradient(lambda x: rotate(x, tables(rows), heads), torch.float64, grad)
    for backend in ("auto", "torch"):
        turned = dispatch.rotate(vectors(dtype), tables(rows), heads, backend)
        assert turned.dtype == dtype
        torch.testing.assert_close(turned.double(), expected, atol=near, rtol=near)
        (found,) = gradient(lambda x, b=backend: dispatch.rotate(x, tables(rows), heads, b), dtype, grad)
        torch.testing.assert_close(found.double(), expected_grad, atol=near, rtol=near)


def gradient(function, dtype, grad):
    x = vectors(dtype).requires_grad_()
    return torch.autograd.grad(function(x), x, grad.to(dtype))


def test_second_derivatives_forward_mode_and_transforms():
    x = vectors().requires_grad_()
    (first,) = torch.autograd.grad(dispatch.rotate(x, tables()).square().sum(), x, create_graph=True)
    torch.testing.assert_close(first, 2 * x)  # turning keeps lengths
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, torch.full_like(x, 2))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(vectors(), vectors(seed=1))
        tangent = forward_ad.unpack_dual(dispatch.rotate(dual, tables())).tangent
    torch.testing.assert_close(tangent, rotate(vectors(seed=1), tables()))
    rows = torch.func.vmap(lambda row: dispatch.rotate(row[None], tables(1))[0])(vectors())
    torch.testing.assert_close(rows, rotate(vectors(), tables(1)))


def test_tables_of_another_shape_are_refused():
    x, (cos, sin) = vectors(), tables()
    for wrong in ((cos[:, :, 1:], sin[:, :, 1:]), (cos[..., 1:], sin[..., 1:]), (cos, sin[:1]), (cos[:0], sin[:0])):
        with pytest.raises(ValueError, match="don't fit vectors"):
            torch.ops.reformer_kernels.cpu_rotate(x, *wrong, HEADS, False)


def test_no_tables_or_no_heads_turn_nothing():
    x = vectors()
    assert dispatch.rotate(x, None) is x
    assert dispatch.rotate(x, tables(), heads=0) is x
