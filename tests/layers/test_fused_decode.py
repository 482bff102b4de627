"""A decode step through all layers in one call of the kernel: what the modules compute, wherever it is taken."""

import pytest
import torch
from torch import nn

from hf_reformer import ReformerConfig, ReformerForCausalLM
from hf_reformer.models import modeling_reformer
from reformer_kernels.cpu import build

try:
    build.compiler()
except build.KernelBuildError as error:  # where one compiles and is then not used, the tests fail
    pytest.skip(f"no compiled kernel: {error}", allow_module_level=True)

TOKENS, PROMPT = 60, 40


@pytest.fixture
def steps(monkeypatch):
    """The number of fused decode steps; `steps.allowed = False` leaves all to the modules."""

    class Steps:
        allowed, count = True, 0

        def __call__(self, *inputs):
            run = plan_fused_decode(*inputs) if self.allowed else None
            self.count += run is not None
            return run

    steps, plan_fused_decode = Steps(), modeling_reformer.plan_fused_decode
    monkeypatch.setattr(modeling_reformer, "plan_fused_decode", steps)
    return steps


def make_model(dtype=torch.float32, **changes) -> ReformerForCausalLM:
    """Sizes that are no multiple of a vector."""
    sizes = {"hidden_size": 36, "num_attention_heads": 3, "attention_head_size": 16, "feed_forward_size": 44}
    windows = {"num_buckets": 4, "lsh_window": 8, "local_window": 6, "max_position_embeddings": 256}
    defaults = {
        "vocab_size": 50,
        "attn_layers": ["local", "lsh", "local"],
        "is_decoder": True,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    return ReformerForCausalLM(ReformerConfig(**defaults | sizes | windows | changes)).to(dtype).eval()


def tokens(rows: int = 3) -> torch.Tensor:
    return torch.randint(1, 50, (rows, TOKENS), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def one_by_one(model, ids, mask=None) -> torch.Tensor:
    """Logits of a prompt, and then of one token after the other."""
    mask = torch.ones_like(ids) if mask is None else mask
    out = model(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], use_cache=True)
    logits = [out.logits]
    for end in range(PROMPT + 1, ids.shape[1] + 1):
        out = model(ids[:, end - 1 : end], attention_mask=mask[:, :end], past_key_values=out.past_key_values)
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"position_embedding_type": "axial"},
        {"position_embedding_type": "rotary", "lsh_rotary": 0.0},
        {"position_embedding_type": "rotary", "lsh_rotary": 0.5},
        {"position_embedding_type": "rotary", "lsh_rotary": 1.0},
        {"position_embedding_type": "rotary", "attn_layers": ["lsh"]},
        {"position_embedding_type": "rotary", "hidden_act": "gelu", "residual_precision": "float32"},
        {"position_embedding_type": "learned", "lsh_include_local": False, "num_buckets": [2, 4], "num_hashes": 3},
    ],
    ids=["axial", "content alone", "half content", "rotary", "rotary lsh alone", "rotary gelu float32", "learned"],
)
def test_every_logit_is_that_of_one_forward(changes, padded, steps):
    model, ids = make_model(**changes), tokens()
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = mask[1, -7:] = mask[2, 20] = 0
    found, real = one_by_one(model, ids, mask), mask.bool()
    assert steps.count == TOKENS - PROMPT
    with torch.no_grad():
        assert (found - model(ids, attention_mask=mask).logits)[real].abs().max() < 1e-5
    steps.allowed = False
    assert (found - one_by_one(model, ids, mask)).abs().max() < 1e-5  # padding, too


def test_rows_are_the_rows_alone(steps):
    model, ids = make_model(), tokens(4)
    alone = torch.cat([one_by_one(model, row[None]) for row in ids])
    assert (one_by_one(model, ids) - alone).abs().max() < 1e-5


def test_not_a_number_stays_one(steps):
    model, ids = make_model(), tokens(1)
    with torch.no_grad():
        model.base_model.layers[0].feed_forward.up_proj.bias[3] = torch.nan
    assert one_by_one(model, ids)[:, PROMPT:].isnan().all()
    assert steps.count


def foreign(name: str, model: nn.Module) -> None:
    layer = model.base_model.layers[0]
    if name == "hook":
        layer.attention.v_proj.register_forward_hook(lambda module, given, out: 2 * out)
    elif name == "adapter":
        layer.feed_forward.up_proj = nn.Sequential(layer.feed_forward.up_proj, nn.Tanh())
    elif name == "activation":
        layer.feed_forward.act = nn.SiLU()
    elif name == "another forward":
        layer.attention.o_proj.forward = lambda x: torch.zeros(*x.shape[:-1], 36)
    elif name == "weights in columns":
        weight = layer.feed_forward.down_proj.weight
        weight.data = weight.data.T.contiguous().T
    elif name == "bias":
        layer.attention.v_proj = nn.Linear(36, 48)
    else:
        layer.attention_norm.bias = None


@pytest.mark.parametrize(
    "name", ["hook", "adapter", "activation", "another forward", "weights in columns", "no bias", "bias"]
)
def test_what_is_not_as_it_was_made_takes_the_modules(name, steps):
    model, ids = make_model(), tokens()
    foreign(name, model)
    found = one_by_one(model, ids)
    assert steps.count == (TOKENS - PROMPT) * (len(model.base_model.layers) - 1)
    with torch.no_grad():
        assert (found - model(ids).logits).abs().max() < 1e-5


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    def forward(self, *given):
        return self.inner(*given)


@pytest.mark.slow
def test_a_wrapped_layer_takes_its_modules(steps):
    model, ids = make_model(), tokens()[:, : PROMPT + 3]
    layers = model.base_model.layers
    layers[0] = Wrapper(layers[0])
    layers[1] = torch.compile(layers[1], backend="eager")
    found = one_by_one(model, ids)
    with torch.no_grad():
        assert (found - model(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("case", ["bfloat16", "torch backend", "gradients", "autocast", "many rows", "attentions"])
def test_what_it_does_not_know_takes_the_modules(case, steps):
    model = make_model(
        torch.bfloat16 if case == "bfloat16" else torch.float32,
        **{"attention_backend": "torch"} if case == "torch backend" else {},
    )
    ids = tokens(9 if case == "many rows" else 2)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast")
    with torch.set_grad_enabled(case == "gradients"), autocast:
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        logits = model(ids[:, -1:], past_key_values=cache, output_attentions=case == "attentions").logits
    assert logits.requires_grad == (case == "gradients")
    assert steps.count == 0
