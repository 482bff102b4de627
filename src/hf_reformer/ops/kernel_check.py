"""Checks that compiled kernels agree with their reference implementations on this machine.

The CPU library is checked once per process, GPU kernels once per version of the kernels.
"""

from collections.abc import Iterable
from itertools import product
from typing import Any

import torch
from torch.nn import functional as F

from .bucket_tables import BucketChains
from .layout import chunk_layout, sort_by_bucket, window_layout
from .lsh import Centering, lsh_buckets, unit_sums
from .prng import make_key, normal_rows
from .reference import attention_mass, attention_with_weights, shared_key
from .rotary import rotary_tables, rotate

# Tolerated difference of a GPU's results from the reference in float64, for values of magnitude about 1.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


# --- the CPU library


def agrees(kernels: Any) -> bool:
    """Compare every function of the library with its reference, on small inputs that use every mask.

    kernels: `reformer_kernels.cpu`.
    """
    bindings, generator = kernels.bindings, torch.Generator("cpu").manual_seed(0)
    query, value, grad = (_normal(generator, 2, 2, 192, 24) for _ in range(3))
    mask = torch.rand(2, 192, generator=generator, device="cpu", dtype=torch.float32) > 0.1
    rotations, factors = _normal(generator, 2, 24, 2, 6), (2, 10)
    samples = (torch.arange(192, device="cpu") // 100).int().expand(2, -1)
    buckets = lsh_buckets(query, rotations, factors)
    sort_inputs = [buckets * 0, buckets], mask, [1, 20], [30, 15], [30, 15], 3
    key = make_key(3, "cpu")
    return (
        _same_buckets(bindings.lsh_buckets(query, rotations, list(factors), False, *Centering(True)), buckets)
        and all(
            _same_buckets(
                bindings.lsh_buckets(query, rotations, list(factors), True, *centering),
                lsh_buckets(query, rotations, factors, centering),
            )
            for centering in (Centering(True, mask, samples), Centering(False, mask, samples, share=0.5))
        )
        and all(map(torch.equal, bindings.sort_by_bucket(*sort_inputs), sort_by_bucket(*sort_inputs)))
        and _close([bindings.normal_rows(key, 2, 50)], [normal_rows(key, 2, 50)])
        and _rotation_agrees(bindings, query)
        and _attention_agrees(kernels, query, value, grad, buckets, mask)
        and _tells_what_is_not_finite(kernels, query, value)
        and _decode_attention_agrees(kernels, query[:, :, :40], value[:, :, :40])
        and _decode_layers_agree(kernels)
    )


def _rotation_agrees(bindings, x) -> bool:
    """Compare rotations of all heads or one, and the inverse rotation."""
    tables = rotary_tables(torch.arange(x.shape[2], device="cpu")[None], x.shape[3], 10000.0)
    turned = [bindings.rotate(x, *tables, heads, False) for heads in (1, 2)]
    back, half = bindings.rotate(turned[0], *tables, 1, True), x.bfloat16()
    halves = bindings.rotate(half, *tables, 2, False).float()
    return (
        _close([*turned, back], [rotate(x, tables, 1), rotate(x, tables), x])
        and (halves - rotate(half.float(), tables)).abs().max() < 2e-2
    )


def _attention_agrees(kernels, query, value, grad, buckets, mask) -> bool:
    windows = window_layout([(buckets * 0, 1, 20), (buckets, 20, 90)], True, mask)
    dropout_key = make_key(0, "cpu")
    query_weights, grad_mass = _normal(torch.Generator("cpu").manual_seed(1), 2, 2, 192)  # (B, T) each
    for layout in (windows, chunk_layout(buckets, 20, 64, 1, 0, mask)):
        for key in (None, shared_key(query)):
            scale = 1.0 if key is None else 0.5
            args = kernels.AttentionArgs(
                query, key, value, *layout[:3], mask, dropout_key, query_weights, *layout[3:], True, 0.3, scale
            )
            out, row_max, row_sum, mass = kernels.bindings.forward(*args)
            grads = kernels.bindings.backward(out, row_max, row_sum, grad, grad_mass, *args)
            inputs = [x.detach().requires_grad_() for x in (query, value, key) if x is not None]
            options = {"causal": True, "mask": mask, "dropout": 0.3, "dropout_key": dropout_key}
            scaled = None if key is None else scale * inputs[2]
            expected, weights = attention_with_weights(inputs[0], scaled, inputs[1], layout, **options)
            results = expected, attention_mass(weights, query_weights)
            expected_grads = torch.autograd.grad(results, inputs, [grad, grad_mass])
            if not _close([out, mass, *grads], [*results, *expected_grads]):
                return False
    return True


def _tells_what_is_not_finite(kernels, query, value) -> bool:
    """Check that nonfinite keys, even of weight 0, and values make row sums NaN, which -ffast-math would break."""
    layout = window_layout([(torch.zeros(2, 1, 1, 192, dtype=torch.int32, device="cpu"), 1, 20)], True, None)
    query, bad_key, bad_value = query.abs(), query.abs(), value.clone()
    bad_key[0, 0, 30], bad_value[0, 0, 30] = -torch.inf, torch.inf
    for inputs in ((query, bad_key, value), (query, None, bad_value)):
        args = kernels.AttentionArgs(*inputs, *layout[:3], None, None, None, *layout[3:], True, 0.0, 1.0)
        row_sum = kernels.bindings.forward(*args)[2]
        if not (row_sum[0, 0, 30].isnan() and row_sum[1].isfinite().all()):
            return False
    return True


def _decode_attention_agrees(kernels, query, value, device="cpu") -> bool:
    """Compare attention of new tokens, one or several at once, with the reference: by bucket, and in a ring buffer.

    query, value: (B, H, T, D), T at least 13.
    """
    batch, heads, length, size = query.shape
    num_buckets, factors, window, local_window, scale = 8, (2, 4), 5, 7, size**-0.5
    pieces = 1, 1, length - 12, 10
    generator = torch.Generator("cpu").manual_seed(1)
    rotations, key = _normal(generator, heads, size, 2, sum(factors) // 2), _normal(generator, *query.shape)
    key = key.to(query.dtype)
    chains = BucketChains((batch, heads, 2), num_buckets, length, device)
    keys, values = (torch.zeros(query.shape, dtype=query.dtype, device=device) for _ in range(2))
    ring = [x[:, :, : 2 * local_window].clone() for x in (keys, values)]
    buckets = torch.zeros(batch, heads, 2, length, dtype=torch.int32, device=device)
    sums = torch.zeros(batch, heads, size, dtype=torch.float64, device=device)
    by_bucket = kernels.CacheTensors(
        keys, values, buckets, chains.newest, chains.previous, rotations.to(device), factors, window, sums, 0.5
    )
    indices = torch.arange(length, device=device).expand(batch, -1)
    there, outputs = [x.to(device).split(pieces, 2) for x in (query, key, value)], []
    for q, k, v, new in zip(*there, indices.split(pieces, 1), strict=True):
        outputs.append(
            (
                kernels.decode_attention(q, q, v, q, new, by_bucket, local_window, scale),
                kernels.decode_attention(q, k, v, None, new, kernels.CacheTensors(*ring), local_window, scale),
            )
        )
    found, buckets = [torch.cat(x, dim=2) for x in zip(*outputs, strict=True)], buckets.cpu()
    groups = [(buckets[:, :, :1] * 0, 1, local_window), (buckets, num_buckets, window)]
    exact = query.double(), key.double() * scale, value.double()
    expected = [
        attention_with_weights(exact[0], keys, exact[2], window_layout(shown, True, None), causal=True)[0]
        for keys, shown in ((None, groups), (exact[1], groups[:1]))
    ]
    expected_buckets = lsh_buckets(query, rotations, factors, Centering(causal=True, share=0.5))
    return _same_buckets(buckets, expected_buckets) and _near(found, expected, TOLERANCES[query.dtype])


def _decode_layers_agree(kernels) -> bool:
    """Compare a layer step of one token, which attends only to itself, with dense layers."""
    generator = torch.Generator("cpu").manual_seed(2)
    batch, hidden, heads, size, wide = 2, 20, 2, 8, 12
    shapes = {
        "attention_norm": (hidden,), "attention_norm_bias": (hidden,), "feed_forward_norm": (hidden,),
        "feed_forward_norm_bias": (hidden,), "query_proj": (heads * size, hidden), "key_proj": (heads * size, hidden),
        "value_proj": (heads * size, hidden), "out_proj": (hidden, heads * size), "up_proj": (wide, hidden),
        "up_bias": (wide,), "down_proj": (hidden, wide), "down_bias": (hidden,),
    }  # fmt: skip
    w = {name: _normal(generator, *shape) for name, shape in shapes.items()}
    x1, x2 = (_normal(generator, batch, 1, hidden).double() for _ in range(2))
    cache = kernels.CacheTensors(*(_normal(generator, batch, heads, 4, size) for _ in range(2)))
    layer = kernels.DecodeLayer(w, cache, torch.zeros(batch, 1, dtype=torch.int64), None, heads, True, 1e-5, 4, 1.0)

    def norm(x, name):
        return F.layer_norm(x.float(), (hidden,), w[name], w[name + "_bias"], 1e-5)

    y1 = x1 + F.linear(F.linear(norm(x2, "attention_norm"), w["value_proj"]), w["out_proj"])
    activations = F.gelu(F.linear(norm(y1, "feed_forward_norm"), w["up_proj"], w["up_bias"]))
    y2 = x2 + F.linear(activations, w["down_proj"], w["down_bias"])
    return _close(kernels.decode_layers(x1, x2, [layer]), (y1, y2))


# --- the GPU kernels


# Rule; whether shared keys; whether causal; whether with padding, dropout, attention mass and several rounds.
KINDS = tuple(product(("windows", "chunks"), (True, False), (True, False), (True, False)))


def triton_agrees(
    kernels: Any, device: torch.device, dtype: torch.dtype, size: int, value_size: int,
    kinds: Iterable[tuple[str, bool, bool, bool]] = KINDS, length: int = 70,
) -> bool:  # fmt: skip
    """Compare values and gradients of several kinds of calls with the reference, on small inputs of several tiles.

    kernels: `reformer_kernels.triton`, or a substitute.
    """
    return (
        _triton_hashing_agrees(kernels, device, dtype, size, length)
        and (size != value_size or _triton_decoding_agrees(kernels, device, dtype, size, length))
        and all(_triton_attention_agrees(kernels, device, dtype, size, value_size, length, *kind) for kind in kinds)
    )


def _triton_hashing_agrees(kernels, device, dtype, size, length) -> bool:
    """Compare buckets of vectors without and with every kind of centering, with padding and packed samples."""
    generator, factors = torch.Generator("cpu").manual_seed(0), (2, 10)
    vectors = (_normal(generator, 2, 3, length, size) + 0.3).to(dtype)
    rotations = _normal(generator, 3, size, 2, 6)
    mask = torch.rand(2, length, generator=generator, device="cpu", dtype=torch.float32) > 0.2
    samples = (torch.arange(length, device="cpu") // 24).int().expand(2, -1)
    sums, counts = unit_sums(vectors), torch.full((2,), length, device="cpu")
    kinds = [None, Centering(True, mask), Centering(False, mask), Centering(True, None, None, sums, counts)]
    kinds += [Centering(causal, mask, samples, share=0.5) for causal in (True, False)]
    for centering in kinds:
        expected = lsh_buckets(vectors, rotations, factors, centering)
        center = [x.to(device) if isinstance(x, torch.Tensor) else x for x in centering or Centering(False)]
        inputs = vectors.to(device), rotations.to(device), list(factors), centering is not None
        if not _same_buckets(kernels.lsh_buckets(*inputs, *center).cpu(), expected):
            return False
    return True


def _triton_decoding_agrees(kernels, device, dtype, size, length) -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    query, value = (_normal(generator, 2, 2, length, size).to(dtype) for _ in range(2))
    return _decode_attention_agrees(kernels, query, value, device)


def _triton_attention_agrees(
    kernels, device, dtype, size, value_size, length, rule: str, shared: bool, causal: bool, everything: bool
) -> bool:
    batch, heads = (2, 2) if everything else (1, 1)
    generator, scale = torch.Generator("cpu").manual_seed(0), 0.5
    shapes = (size, value_size, size, value_size)
    rows = [(_normal(generator, batch, heads, length, n) * n**-0.5).to(dtype) for n in shapes]
    query, value, key, grad = rows
    buckets = torch.randint(0, 3, (batch, heads, 2, length), generator=generator, dtype=torch.int32, device="cpu")
    real = torch.rand(batch, length, generator=generator, device="cpu", dtype=torch.float32) > 0.2
    mask: Any = real if everything else None
    query_weights: Any = None
    dropout_key: Any = None
    if everything:
        (query_weights, grad_mass), dropout_key = _normal(generator, 2, batch, length), make_key(0, "cpu")
    if rule == "windows":
        groups = [(buckets[:, :, :1] * 0, 1, 20), (buckets, 3, 12)]
        layout = window_layout(groups if everything else groups[:1], causal, mask)
    else:
        layout = chunk_layout(buckets, 3, 14, 1, 0 if causal else 1, mask)
    inputs, dropout = (query, value) if shared else (query, value, key), 0.3 if everything else 0.0

    exact = [x.double().requires_grad_() for x in inputs]
    options: dict[str, Any] = {"causal": causal, "mask": mask, "dropout": dropout, "dropout_key": dropout_key}
    out, weights = attention_with_weights(exact[0], None if shared else scale * exact[2], exact[1], layout, **options)
    results, grads = [out], [grad.double()]
    if everything:
        results, grads = [out, attention_mass(weights, query_weights.double())], [*grads, grad_mass.double()]
    expected = [*results, *torch.autograd.grad(results, exact, grads)]

    there = [x.to(device).requires_grad_() for x in inputs]
    first = (there[0], None if shared else there[2], there[1])
    rest = [
        x.to(device) if isinstance(x, torch.Tensor) else x for x in (*layout[:3], mask, dropout_key, query_weights)
    ]
    out, _, _, mass = kernels.attention(*first, *rest, *layout[3:], causal, dropout, scale)
    results, grads = [out], [grad.to(device)]
    if everything:
        results, grads = [out, mass], [*grads, grad_mass.to(device)]
    found = [*results, *torch.autograd.grad(results, there, grads)]
    return _near(found, expected, TOLERANCES[dtype])


def _near(results: Iterable[torch.Tensor], expected: Iterable[torch.Tensor], tolerance: float) -> bool:
    pairs = [(a.detach().cpu().double(), b.detach()) for a, b in zip(results, expected, strict=True)]
    gaps = [(float((a - b).abs().max()), float(b.abs().max())) for a, b in pairs]
    return all(gap <= tolerance * max(1.0, largest) for gap, largest in gaps)


# --- comparisons


def _same_buckets(buckets: torch.Tensor, expected: torch.Tensor) -> bool:
    return int((buckets != expected).sum()) < 0.01 * buckets.numel()  # near-ties


def _close(results: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(results, expected, strict=True))


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
