"""Checks that all kinds of calls agree with the definition (`reference`), values and gradients, on any device."""

from typing import Any

import torch

import hf_reformer
from hf_reformer.configuration_reformer import default_num_buckets
from hf_reformer.ops.dispatch import KERNELS, lsh_buckets, unsupported_reason, windowed_attention
from hf_reformer.ops.layout import AttentionLayout, chunk_layout, window_layout
from hf_reformer.ops.lsh import Centering, num_buckets_total, window_rotations
from hf_reformer.ops.prng import make_key

from .cases import Case, Entry, Group

# Maximum difference from the float64 reference on the same (rounded) inputs of magnitude about 1; as in the tests.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}
MODEL_TOLERANCE = 1e-3  # relative: all gradients of a float32 model together, or logits
BATCH, HEADS, SIZE, WINDOW, CHUNK = 2, 3, 64, 48, 64
DROPOUT = 0.3
LSH, LOCAL, CHUNKS = "lsh", "local", "lsh in chunks"
PLAIN, PADDED, PACKED, MASS, DROPPED = "plain", "padded", "packed", "coverage mass", "dropout"
EXTRAS = ((PLAIN,), (PADDED, MASS, DROPPED), (PACKED,), (PADDED,), (MASS,), (DROPPED,))
CACHED, PACKED_MODEL = "model: cached steps and a forward", "model: a step of training, packed"
PADDED_MODEL = "model: a step of training, padded, coverage loss, dropout"


def backends(device: str) -> list[str]:
    """Return the backends to check that support tensors on the device."""
    like = torch.zeros(1, 1, 1, SIZE, device=device)
    return [name for name in KERNELS if unsupported_reason(name, like, like) is None] + ["torch"]


def groups(device: str, length: int) -> list[Group]:
    """Return all kinds of calls with all backends, most important first; the length must be a multiple of `CHUNK`."""
    calls = [(CACHED, True, 2, "float32"), (PADDED_MODEL, True, 2, "float32"), (PACKED_MODEL, False, 2, "float32")]
    for extra in EXTRAS:
        rules = (LSH, LOCAL) if PACKED in extra else (LSH, LOCAL, CHUNKS)  # chunks cannot hold packed samples
        calls += [
            (", ".join((rule, *extra)), causal, 0, dtype)
            for rule in rules
            for dtype in ("bfloat16", "float32")
            for causal in (True, False)
        ]
    common: dict[str, Any] = {"section": "correctness", "length": length, "device": device}
    return [
        Group("check", [Entry(Case(**common, work=work, causal=causal, layers=layers, dtype=dtype), backend)])
        for work, causal, layers, dtype in calls
        for backend in backends(device)
    ]


def check(case: Case, backend: str) -> float:
    """Return the largest difference over the allowed one: at most 1 if the backend agrees."""
    if case.work == CACHED:
        return cached_difference(case, backend) / MODEL_TOLERANCE
    if case.layers:
        return model_difference(case, backend) / MODEL_TOLERANCE
    return op_difference(case, backend)


# --- the op


def op_difference(case: Case, backend: str) -> float:
    """Compute the largest difference in output, mass and gradients of query, key, value, relative to the tolerance."""
    rule, *extras = case.work.split(", ")
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.device, case.torch_dtype)

    query, key, value = (draw(BATCH, HEADS, case.length, SIZE) for _ in range(3))
    inputs = [query, value] if rule != LOCAL else [query, value, key]
    grad_out, grad_mass = draw(BATCH, HEADS, case.length, SIZE), draw(BATCH, case.length)
    mask = padding(case) if PADDED in extras else None
    samples = samples_of(case) if PACKED in extras else None
    layout = make_layout(rule, query, case.causal, mask, samples)
    options: dict[str, Any] = {"causal": case.causal, "mask": mask, "scale": SIZE**-0.5 if rule == LOCAL else 1.0}
    if DROPPED in extras:
        options |= {"dropout": DROPOUT, "dropout_key": make_key(1, case.device)}
    if MASS in extras:
        weights = torch.rand(BATCH, case.length, generator=generator).to(case.device)
        options["query_weights"] = weights if mask is None else weights * mask

    def run(name: str, dtype: torch.dtype) -> list[torch.Tensor]:
        query, value, *keys = leaves = [(SIZE**-0.5 * x.to(dtype)).detach().requires_grad_() for x in inputs]
        out, mass = windowed_attention(query, keys[0] if keys else None, value, layout, **options, backend=name)
        results = [out] if mass is None else [out, mass]
        grads = [grad.to(x.dtype) for grad, x in zip((grad_out, grad_mass), results, strict=False)]
        return [x.detach() for x in results] + list(torch.autograd.grad(results, leaves, grads))

    pairs = zip(run(backend, case.torch_dtype), run("reference", torch.float64), strict=True)
    return max(difference(a, b) / max(1.0, b.abs().max().item()) for a, b in pairs) / TOLERANCES[case.torch_dtype]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest absolute difference; infinity if there is a NaN."""
    found = (a.double() - b.double()).abs().max().item()
    return found if found == found else float("inf")


def padding(case: Case) -> torch.Tensor:
    """Make a mask, (B, T) bool: the first sequence is padded on the left, the second on the right."""
    position, pad = torch.arange(case.length, device=case.device), case.length // 5
    return torch.stack([position >= pad, position < case.length - 2 * pad])


def samples_of(case: Case) -> torch.Tensor:
    """Make sample numbers, (B, T) int32: three samples of different lengths in every row."""
    position = torch.arange(case.length, device=case.device)
    return ((position >= case.length // 4).int() + (position >= case.length // 2).int()).expand(BATCH, -1)


def make_layout(
    rule: str, query: torch.Tensor, causal: bool, mask: torch.Tensor | None, samples: torch.Tensor | None
) -> AttentionLayout:
    """Make windows along the sequence, optionally also in two orders by hash; or chunks by hash."""
    length = query.shape[2]
    factors = default_num_buckets(length, WINDOW)
    rotations = window_rotations(make_key(0, query.device), 0, HEADS, SIZE, 2, factors)
    buckets = lsh_buckets(query.float(), rotations, factors, Centering(causal, mask, samples), "torch")
    count = num_buckets_total(factors)
    if rule == CHUNKS:
        return chunk_layout(buckets, count, CHUNK, 1, 0 if causal else 1, mask)
    position = torch.zeros_like(buckets[:, :, :1])
    groups: list[tuple[torch.Tensor, int | None, int]] = [(position, 1, WINDOW)]
    groups += [(buckets, count, WINDOW)] if rule == LSH else []
    if samples is not None:
        sample = samples[:, None, None, :].long()
        groups = [(sample * (number or 1) + group, None, window) for group, number, window in groups]
    return window_layout(groups, causal, mask)


# --- whole models


def make_model(case: Case, backend: str, **changes: Any) -> Any:
    """Make a small float32 model with a local and an lsh layer; its weights do not depend on the backend."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 2 * SIZE, "num_attention_heads": 2, "attention_head_size": SIZE,
        "feed_forward_size": 2 * SIZE, "attn_layers": ["local", "lsh"], "max_position_embeddings": case.length,
        "lsh_window": WINDOW, "local_window": WINDOW, "is_decoder": case.causal, "hidden_dropout_prob": 0.0,
    }  # fmt: skip
    config = hf_reformer.ReformerConfig(**sizes | changes, attention_backend=backend)
    model = hf_reformer.ReformerForCausalLM if case.causal else hf_reformer.ReformerForMaskedLM
    return model(config).to(case.device)


def make_tokens(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, 64, (BATCH, case.length), generator=generator).to(case.device)


@torch.no_grad()
def cached_difference(case: Case, backend: str) -> float:
    """Compare logits of a prompt and steps after it with those of one forward over all, relative to the largest."""
    model, tokens = make_model(case, backend).eval(), make_tokens(case)
    prompt = case.length - 4
    found = model(tokens[:, :prompt], use_cache=True)
    logits, cache = [found.logits], found.past_key_values
    for position in range(prompt, case.length):
        found = model(tokens[:, position : position + 1], past_key_values=cache, use_cache=True)
        logits.append(found.logits)
    expected = model(tokens).logits
    return difference(torch.cat(logits, 1), expected) / max(1.0, expected.abs().max().item())


def model_difference(case: Case, backend: str) -> float:
    """Compute the relative error of the loss and all gradients together, against the same model on `reference`."""
    tokens = make_tokens(case)
    changes: dict[str, Any] = {}
    inputs: dict[str, Any] = {"input_ids": tokens, "labels": tokens}
    if case.work == PADDED_MODEL:
        changes = {"coverage_loss_weight": 0.1, "hidden_dropout_prob": 0.1}
        changes |= {f"{kind}_attention_probs_dropout_prob": 0.1 for kind in ("lsh", "local")}
        mask = padding(case)
        inputs |= {"attention_mask": mask.long(), "labels": tokens.masked_fill(~mask, -100)}
    else:
        samples = samples_of(case)
        position = torch.arange(case.length, device=case.device).expand_as(samples)
        begins = (samples != samples.roll(1, 1)) * position
        inputs["position_ids"] = position - begins.cummax(1).values

    def run(name: str) -> torch.Tensor:
        model = make_model(case, name, **changes).train()
        torch.manual_seed(2)  # seeds the randomness of this forward
        loss = model(**inputs).loss
        grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        return torch.cat([loss.detach().view(1), *(x.flatten() for x in grads)]).double()

    found, expected = run(backend), run("reference")
    error = float((found - expected).norm() / expected.norm())
    return error if error == error else float("inf")
