import pytest
import torch

from hf_reformer.reversible import chunking
from hf_reformer.reversible.chunking import ChunkedBuffer, map_tokens, token_chunks, tokens_per_chunk


def parts(first, x, y):
    """Two outputs of other widths and dtypes, one that is missing; the place of a token counts."""
    places = torch.arange(first, first + x.shape[1])[:, None]
    return [x * places, None, (x[..., :1] + y).double()]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
def test_slices_together_are_the_whole(size, grad):
    x, y = torch.randn(2, 7, 4, requires_grad=grad), torch.randn(2, 7, 1)
    expected = parts(0, x, y)
    found = map_tokens(parts, size, x, y)
    assert found[1] is None
    for ours, theirs in zip(found[::2], expected[::2], strict=True):
        assert torch.equal(ours, theirs)
        assert (ours.dtype, ours.requires_grad) == (theirs.dtype, grad)
    if grad:
        weights = [torch.randn_like(z) for z in expected[::2]]
        grads = [torch.autograd.grad(z[::2], x, weights)[0] for z in (found, expected)]
        assert torch.allclose(*grads)


def test_slices_cover_every_token_once():
    x = torch.arange(10).view(1, 10)
    found = [(first, piece.tolist()[0], none) for first, (piece, none) in token_chunks(4, x, None)]
    assert found == [(0, [0, 1, 2, 3], None), (4, [4, 5, 6, 7], None), (8, [8, 9], None)]


def test_given_tensors_are_filled_in_place():
    given = torch.zeros(1, 5)
    joined = ChunkedBuffer(5, given)
    for first, (piece,) in token_chunks(2, torch.arange(5.0)[None]):
        joined.put(first, piece)
    assert joined.tensors[0] is given
    assert given.tolist() == [[0, 1, 2, 3, 4]]


def test_a_slice_holds_as_many_numbers_in_any_batch():
    assert tokens_per_chunk(torch.zeros(1, 5000, 512)) == chunking.CHUNK_ELEMENTS // 512
    assert tokens_per_chunk(torch.zeros(4, 5000, 512)) == chunking.CHUNK_ELEMENTS // 2048
    assert tokens_per_chunk(torch.zeros(2, 3, chunking.CHUNK_ELEMENTS)) == 1
    assert tokens_per_chunk(torch.zeros(4, 5000, 512), requested=7) == 7
    assert tokens_per_chunk(torch.zeros(1, 5000, 512, device="meta")) == 5000
