"""Whether a compiled library computes on this machine what the definitions say; asked once a process."""

import ctypes
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from reformer_kernels.cpu.bindings import Call, backward, forward, received, run_hashing, run_normals, run_sorting
from reformer_kernels.cpu.decode import run_layers, run_step

from . import layout
from . import lsh as hashing
from .bucket_tables import BucketChains
from .prng import make_key, normal_rows
from .reference import attention_with_weights, shared_key


def agrees(library: ctypes.CDLL) -> bool:
    """Compare every entry of the library with its definition, on small inputs that use every mask."""
    generator = torch.Generator("cpu").manual_seed(0)
    query, value, grad = (_normal(generator, 2, 2, 192, 24) for _ in range(3))
    mask = torch.rand(2, 192, generator=generator, device="cpu", dtype=torch.float32) > 0.1
    rotations, factors = _normal(generator, 2, 24, 2, 6), (2, 10)
    buckets = hashing.lsh_buckets(query, rotations, factors)
    lines = run_sorting(buckets, mask, 20, *layout.reach(31, False), 3, library)
    keys = buckets[0, 0, 0]
    other_buckets = int((run_hashing(query, rotations, list(factors), library) != buckets).sum())
    return (
        other_buckets < 0.01 * buckets.numel()  # near-ties
        and all(map(torch.equal, lines, layout.bucket_windows(buckets, 20, 31, False, mask)))
        and torch.allclose(run_normals(keys, 50, library), normal_rows(keys, 50), atol=1e-4)
        and _attention_agrees(query, value, grad, buckets, mask, library)
        and _step_agrees(query[:, :, :40], value[:, :, :40], library)
        and _layer_agrees(library)
    )


def _step_agrees(query, value, library: ctypes.CDLL) -> bool:
    """Tokens put on top of each other see what the definition shows them."""
    batch, heads, length, size = query.shape
    count, window, local_window = 6, 5, 7
    tables = BucketChains((batch, heads, 2), count, length, query.device)
    kept = SimpleNamespace(
        keys=torch.zeros_like(query).contiguous(), values=torch.zeros_like(value).contiguous(), tables=tables,
        buckets=torch.zeros(batch, heads, 2, length, dtype=torch.int32), num_buckets=count, room=length, window=window,
        rotations=_normal(torch.Generator("cpu").manual_seed(1), heads, size, 2, count // 2),
    )  # fmt: skip
    numbers = torch.arange(length).expand(batch, -1)
    found = run_step(query, query, value, query, kept, numbers, local_window, size**-0.5, library)
    orders = layout.window_layout(
        [(kept.buckets[:, :, :1] * 0, 1, local_window), (kept.buckets, count, window)], True, None
    )
    expected, _ = attention_with_weights(query, None, value, orders, causal=True)
    other = int((hashing.lsh_buckets(query, kept.rotations, count) != kept.buckets).sum())
    return other < 0.01 * kept.buckets.numel() and torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def _layer_agrees(library: ctypes.CDLL) -> bool:
    """A token through a layer without attention to anything but itself is what dense layers say."""
    generator = torch.Generator("cpu").manual_seed(2)
    batch, hidden, heads, size, wide = 2, 20, 2, 8, 12
    shapes = {
        "attention_norm": (hidden,), "attention_norm_bias": (hidden,), "feed_forward_norm": (hidden,),
        "feed_forward_norm_bias": (hidden,), "query_proj": (heads * size, hidden), "key_proj": (heads * size, hidden),
        "value_proj": (heads * size, hidden), "out_proj": (hidden, heads * size), "up_proj": (wide, hidden),
        "up_bias": (wide,), "down_proj": (hidden, wide), "down_bias": (hidden,),
    }  # fmt: skip
    w: dict[str, Any] = {name: _normal(generator, *shape) for name, shape in shapes.items()}
    x1, x2 = (_normal(generator, batch, 1, hidden).double() for _ in range(2))
    keys, values = (_normal(generator, batch, heads, 4, size) for _ in range(2))
    kept = SimpleNamespace(keys=keys, values=values, buckets=None, room=4)
    numbers = torch.zeros(batch, 1, dtype=torch.int64)
    rest = {"gelu": True, "epsilon": 1e-5, "local_window": 4, "scale": 1.0}
    found = run_layers(x1, x2, [{"kept": kept, "numbers": numbers, "weights": w, **rest}], None, library)

    def norm(x, name):
        return F.layer_norm(x.float(), (hidden,), w[name], w[name + "_bias"], 1e-5)

    y1 = x1 + F.linear(F.linear(norm(x2, "attention_norm"), w["value_proj"]), w["out_proj"])
    inside = F.gelu(F.linear(norm(y1, "feed_forward_norm"), w["up_proj"], w["up_bias"]))
    y2 = x2 + F.linear(inside, w["down_proj"], w["down_bias"])
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(found, (y1, y2), strict=True))


def _attention_agrees(query, value, grad, buckets, mask, library: ctypes.CDLL) -> bool:
    windows = layout.window_layout([(buckets * 0, 1, 20), (buckets, 20, 90)], True, mask)
    dropout_key = make_key(0, "cpu")
    paid, push = _normal(torch.Generator("cpu").manual_seed(1), 2, 2, 192)  # (B, T) each
    for orders in (windows, layout.chunk_layout(buckets, 20, 64, 1, 0, mask)):
        for key in (None, shared_key(query)):
            scale = 1.0 if key is None else 0.5
            call = Call(orders, True, mask, 0.3, dropout_key, scale)
            out, top, mass = forward(query, key, value, call, library)
            found = [out, received(query, key, call, top, mass, paid, library)]
            found += backward(query, key, value, call, out, top, mass, grad, library, paid, push)
            inputs = [None if x is None else x.detach().requires_grad_() for x in (query, key, value)]
            keys = None if key is None else scale * inputs[1]
            rule = {"causal": True, "mask": mask, "dropout": 0.3, "dropout_key": dropout_key}
            expected, weights = attention_with_weights(inputs[0], keys, inputs[2], orders, **rule)
            both = expected, (weights * paid[:, None, :, None]).sum((1, 2))
            grads = iter(torch.autograd.grad(both, [x for x in inputs if x is not None], [grad, push]))
            wanted = [*both, *(None if x is None else next(grads) for x in inputs)]
            pairs = ((a, b) for a, b in zip(found, wanted, strict=True) if b is not None)
            if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in pairs):
                return False
    return True


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
