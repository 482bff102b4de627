"""Inputs of the attention op, drawn from a seed, and its comparison with the reference, for all backends' tests."""

import functools

import torch
from conftest import max_abs_diff
from hypothesis import strategies as st

from hf_reformer.ops.dispatch import windowed_attention
from hf_reformer.ops.layout import chunk_layout, window_layout
from hf_reformer.ops.prng import make_key

# Largest difference from the reference in float64 on the same (rounded) inputs of size about 1.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


class Case:
    """Inputs of one call of the op, drawn from a seed."""

    def __init__(
        self,
        seed: int = 0,
        mode: str = "window",
        length: int = 30,
        batch: int = 2,
        heads: int = 2,
        size: int = 4,
        value_size: int | None = None,
        rounds: int = 2,
        num_buckets: int = 3,
        window: int = 5,
        block_size: int = 32,
        position_order: bool = True,
        causal: bool = True,
        padding: float | None = 0.3,
        shared: bool = True,
        dropout: float = 0.0,
        scale: float = 1.0,
        dtype: torch.dtype = torch.float64,
    ):
        self.generator = torch.Generator().manual_seed(seed)
        self.mask = None if padding is None else torch.rand(batch, length, generator=self.generator) >= padding
        self.window, self.causal, self.shared, self.mode, self.scale = window, causal, shared, mode, scale
        self.buckets = torch.randint(0, num_buckets, (batch, heads, rounds, length), generator=self.generator).int()
        if mode == "window":
            groups = [(self.buckets, num_buckets, window)]
            if position_order:
                groups.insert(0, (torch.zeros(batch, heads, 1, length, dtype=torch.int32), 1, window + 2))
            self.groups = groups
            self.layout = window_layout(groups, causal, self.mask, block_size)
        else:
            self.layout = chunk_layout(self.buckets, num_buckets, window, 1, 0 if causal else 1, self.mask)
        self.inputs = [
            self.draw(batch, heads, length, width).to(dtype) for width in (size, size, value_size or size + 1)
        ]
        self.options = {
            "causal": causal,
            "mask": self.mask,
            "dropout": dropout,
            "dropout_key": make_key(seed) if dropout else None,
        }

    def draw(self, *shape):
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def attend(self, query, key, value, backend: str = "auto"):
        """The op on these inputs; shared query/key attention makes its own keys, and `key` is not used."""
        key = None if self.shared else key
        return windowed_attention(query, key, value, self.layout, **self.options, scale=self.scale, backend=backend)[0]

    def values_and_gradients(
        self, backend: str, dtype: torch.dtype | None = None, autocast: bool = False
    ) -> list[torch.Tensor]:
        """The output, and gradients of query, key and value."""
        inputs = [x.to(dtype or x.dtype).detach().requires_grad_() for x in self.inputs]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = self.attend(*inputs, backend=backend)
        grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grads = torch.autograd.grad(out, inputs, grad_out.to(out.dtype), materialize_grads=True)
        return [out.detach(), *grads]


@functools.lru_cache(maxsize=200)
def reference_of(**options) -> list[torch.Tensor]:
    """The reference in float64 on `Case(**options)`, computed once for all that is compared with it."""
    return Case(**options).values_and_gradients("reference", torch.float64)


def assert_equals_reference(
    case: Case, backend: str, dtype: torch.dtype = torch.float64, expected: list[torch.Tensor] | None = None
) -> None:
    """expected: of `reference_of`, for inputs that are rounded to `dtype`."""
    case.inputs = [x.to(dtype) for x in case.inputs]  # both get the rounded numbers
    results = case.values_and_gradients(backend)
    expected = expected or case.values_and_gradients("reference", torch.float64)
    for name, a, b in zip(("output", "query", "key", "value"), results, expected, strict=True):
        assert a.dtype == dtype
        assert max_abs_diff(a, b) <= TOLERANCES[dtype] * max(1, b.abs().max().item()), name


cases = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10**6),
        "mode": st.sampled_from(["window", "chunk"]),
        "length": st.integers(1, 70),
        "batch": st.integers(1, 3),
        "heads": st.integers(1, 3),
        "rounds": st.integers(1, 3),
        "num_buckets": st.integers(1, 5),
        "window": st.integers(1, 12),
        "block_size": st.sampled_from([1, 3, 8, 32]),
        "position_order": st.booleans(),
        "causal": st.booleans(),
        "padding": st.sampled_from([None, 0.0, 0.3, 0.9]),
        "shared": st.booleans(),
        "dropout": st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    }
)


def make_case(drawn: dict, **changes) -> Case:
    drawn = {**drawn, **changes}
    if drawn["mode"] == "chunk" and drawn["length"] > drawn["window"]:  # whole chunks, as the caller pads them
        drawn["length"] -= drawn["length"] % drawn["window"]
    return Case(**drawn)
