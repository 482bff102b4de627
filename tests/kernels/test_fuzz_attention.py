"""The op of every backend beside its definition, on whatever inputs a seed draws."""

import random

import pytest
import torch
from attention_cases import TOLERANCES, Case
from conftest import max_abs_diff
from fuzzing import seeds

from hf_reformer.ops.dispatch import lsh_buckets, unsupported_reason
from hf_reformer.ops.lsh import Centering, centered, unit_sums
from hf_reformer.ops.lsh import lsh_buckets as lsh_buckets_in_torch

NO_KERNEL = unsupported_reason("cpu")
BACKENDS = ["torch", pytest.param("cpu", marks=pytest.mark.skipif(NO_KERNEL is not None, reason=str(NO_KERNEL)))]


def with_strides(x: torch.Tensor, draw: random.Random) -> torch.Tensor:
    """The same numbers in another layout: as a projection has them, a part of something larger, reversed, repeated."""
    batch, heads, length, size = x.shape
    kind = draw.choice(["as it is", "projected", "part", "columns", "tokens last"])
    if kind == "projected":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == "part":
        larger = x.new_full((batch, heads + 1, length + 2, size + 8), float("nan"))
        larger[:, 1:, 1:-1, 4:-4] = x
        return larger[:, 1:, 1:-1, 4:-4]
    if kind == "columns":
        return torch.stack([x, x.new_full(x.shape, float("nan"))], dim=-1)[..., 0]
    return x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0) if kind == "tokens last" else x


def draw_case(seed: int, draw: random.Random) -> tuple[Case, float]:
    """A case, and how large its scores are."""
    mode, window = draw.choice(["window", "window", "chunk"]), draw.choice([1, 2, 5, 12, 31, 64, 200])
    length = draw.choice([1, 2, 3, 16, 17, 33, draw.randint(1, 150), draw.randint(1, 400)])
    if mode == "chunk" and length > window:
        length -= length % window
    dtype = draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16])
    case = Case(
        seed, mode, length, draw.randint(1, 3), draw.randint(1, 3), 8 * draw.randint(1, 9), 8 * draw.randint(1, 9),
        draw.randint(1, 4), draw.choice([1, 2, 5, 40]), window, draw.choice([1, 3, 8, 32, 64]), draw.random() < 0.5,
        draw.random() < 0.6, draw.choice([None, None, 0.0, 0.3, 0.9, 1.0]), draw.random() < 0.6,
        draw.choice([0.0, 0.0, 0.1, 0.9, 1.0]), draw.choice([1.0, 0.125]), dtype,
    )  # fmt: skip
    sizes = [10.0 ** draw.choice([-6, -1, 0, 0, 0, 1]) for _ in case.inputs]
    case.inputs = [with_strides((x * size).to(dtype), draw) for x, size in zip(case.inputs, sizes, strict=True)]
    return case, max(1.0, sizes[0] * (1.0 if case.shared else sizes[1]))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_fuzz_attention(backend):
    for seed in seeds():
        draw = random.Random(seed)
        case, scores = draw_case(seed, draw)
        dtype = case.inputs[0].dtype
        results = case.values_and_gradients(backend)
        expected = case.values_and_gradients("reference", torch.float64)
        sizes = [x.abs().max().item() for x in case.inputs]
        # gradients of scores are differences of sums over values, one of which is of outputs in the inputs' dtype:
        # these are larger than values where dropout scales what it leaves
        output = expected[0].abs().max().item()
        largest = max(1.0, sizes[-1] * max(*sizes[:-1], output), *(x.abs().max().item() for x in expected))
        for name, a, b in zip(("output", "query", "key", "value"), results, expected, strict=True):
            assert a.dtype == dtype, (seed, name)
            limit = (
                TOLERANCES[dtype] * scores * (largest if name in ("query", "key") else max(1, b.abs().max().item()))
            )
            assert max_abs_diff(a, b) <= limit, (seed, name)


@pytest.mark.slow
@pytest.mark.skipif(NO_KERNEL is not None, reason=str(NO_KERNEL))
def test_fuzz_hashing():
    """Buckets of the kernel are those of the definition, but for near-ties; and pieces are hashed as the whole."""
    for seed in seeds():
        draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        batch, heads, length, size = (
            draw.randint(1, 3),
            draw.randint(1, 3),
            draw.randint(1, 300),
            8 * draw.randint(1, 9),
        )
        factors = tuple(2 * draw.randint(1, 9) for _ in range(draw.randint(1, 3)))
        vectors = torch.randn(batch, heads, length, size, generator=generator) * 10.0 ** draw.randint(-9, 9)
        vectors += draw.choice([0, 0, 5]) * torch.randn(1, heads, 1, size, generator=generator)
        vectors = vectors[:, :, : draw.choice([1, length])].expand(-1, -1, length, -1)
        vectors = with_strides(vectors.to(draw.choice([torch.float32, torch.bfloat16])), draw)
        rotations = torch.randn(heads, size, draw.randint(1, 4), sum(factors) // 2, generator=generator)
        mask = samples = sums = counts = None
        causal = draw.random() < 0.6
        if draw.random() < 0.5:
            mask = torch.rand(batch, length, generator=generator) >= draw.choice([0.1, 0.5, 1.0])
        if draw.random() < 0.4:
            begins = torch.rand(batch, length, generator=generator) < draw.choice([0.02, 0.3, 1.0])
            samples = (begins.cumsum(-1) - begins[:, :1].long()).int()
        elif causal:
            sums = unit_sums(torch.randn(batch, heads, 9, size, generator=generator))
            counts = torch.full((batch,), 9)
        before = torch.get_num_threads()
        torch.set_num_threads(draw.choice([1, 2, 5]))
        share = draw.choice([1.0, 0.5])
        centering = Centering(causal, mask, samples, sums, counts, share)
        found = [lsh_buckets(vectors, rotations, factors, centering, "cpu")]
        if causal and samples is None and length > 1:
            cut = draw.randint(1, length - 1)
            first, last = (None, None) if mask is None else (mask[:, :cut], mask[:, cut:])
            seen = counts + (cut if first is None else first.sum(-1))
            later = Centering(True, last, None, sums + unit_sums(vectors[:, :, :cut], first), seen, share)
            parts = found[0][..., :cut], lsh_buckets(vectors[:, :, cut:], rotations, factors, later, "cpu")
            found.append(torch.cat(parts, dim=-1))
        torch.set_num_threads(before)
        expected, exact = lsh_buckets_in_torch(vectors, rotations, factors, centering), vectors.double()
        projected = torch.einsum("bhtd,hdrc->bhrtc", centered(exact, centering), rotations.double())
        for buckets in found:
            wrong, stride, column = buckets != expected, 1, 0
            for factor in factors:
                part = projected[..., column : column + factor // 2]
                both = torch.cat([part, -part], dim=-1)
                chosen = both.gather(-1, (buckets.long() // stride % factor)[..., None]).squeeze(-1)
                assert (both.amax(-1) - chosen)[wrong].le(1e-3).all(), seed
                stride, column = stride * factor, column + factor // 2
