"""Reversible layers: their gradients are those of plain backpropagation, whatever the graph around them looks like.

A model and its twin have the same weights; the twin runs with `reversible=False`. Both draw the same keys, because
the generator is seeded before every forward. Wherever a test does not ask for it, no RuntimeWarning may appear: that
is how a reconstruction that was not exact speaks up.
"""

import contextlib
import copy
import functools
import gc
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.func import functional_call
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from hf_reformer import ReformerConfig, ReformerModel
from hf_reformer.layers.attention import ReformerAttention
from hf_reformer.layers.feed_forward import FeedForward, LayerNorm
from hf_reformer.models import modeling_reformer as modeling
from hf_reformer.reversible import reversible as machinery
from hf_reformer.reversible.grid import Grid, choose_grid, to_stream
from hf_reformer.reversible.recompute import layer_tensors
from hf_reformer.reversible.reversible import ReversibleFunction, StreamHandoff, residual_step

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

KINDS = ("local", "lsh", "full")
DEEP = KINDS * 2
EXACT = 1e-6  # gradients differ by the order of a few additions, where at all
IDS = torch.arange(2 * 50).mul_(37).remainder_(39).add_(1).view(2, 50)


def make(layers=KINDS, **changes):
    """A small causal model in training, with every kind of dropout."""
    fields = {"vocab_size": 40, "hidden_size": 32, "num_attention_heads": 2, "attention_head_size": 8}
    fields |= {"feed_forward_size": 48, "max_position_embeddings": 64, "attn_layers": layers, "is_decoder": True}
    fields |= {"num_buckets": 4, "lsh_window": 12, "local_window": 12, "hidden_dropout_prob": 0.2}
    fields |= {"lsh_attention_probs_dropout_prob": 0.2, "local_attention_probs_dropout_prob": 0.2}
    torch.manual_seed(0)
    return ReformerModel(ReformerConfig(**{**fields, **changes})).train()


def twin_of(model):
    twin = copy.deepcopy(model)
    twin.config.reversible = False
    return twin


def hidden_of(model, seed=5, **inputs):
    torch.manual_seed(seed)
    return model(**inputs or {"input_ids": IDS}).last_hidden_state


def loss_of(hidden):
    """A number to which every entry contributes its own share."""
    probe = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (hidden.double() * probe).mean()


def gradients(model):
    return [p.grad for p in model.parameters() if p.requires_grad]


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def step(model, **inputs):
    """Gradients of one training step."""
    model.zero_grad()
    loss_of(hidden_of(model, **inputs)).backward()
    return gradients(model)


def gap(found, expected):
    """Relative error of all gradients together. A missing gradient must be missing on both sides."""
    assert len(found) == len(expected) > 0
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None or b is not None]
    assert all(a is not None and b is not None for a, b in pairs)
    pairs = [(a.detach().double(), b.detach().double()) for a, b in pairs]
    return float((sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt())


def is_reversible(tensor):
    """Whether the graph behind `tensor` holds reversible layers."""
    todo, seen = [tensor.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [previous for previous, _ in node.next_functions]
    return any("ReversibleFunction" in node.name() for node in seen)


def autocast(enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


class WithDropout(nn.Module):
    """What an adapter does to a projection: a second branch, with dropout that knows nothing of our keys."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.dropout = inner, nn.Dropout(0.3)
        self.down, self.up = nn.Linear(inner.in_features, 4), nn.Linear(4, inner.out_features)

    def forward(self, x):
        return self.inner(x) + self.up(self.down(self.dropout(x)))


def with_adapters(model):
    for layer in model.layers:
        layer.attention.v_proj = WithDropout(layer.attention.v_proj)
        layer.feed_forward.up_proj = WithDropout(layer.feed_forward.up_proj)
    return model


# --- gradients are those of plain backpropagation


@pytest.mark.parametrize(
    ("order", "bf16"), [("together", False), ("together", True), ("first first", False), ("second first", False)]
)
def test_two_forwards_before_one_backward(order, bf16):
    model = make()
    found = {}
    for name, each in (("reversible", model), ("plain", twin_of(model))):
        losses = []
        for seed, ids in ((1, IDS), (2, IDS[:, :33])):
            with autocast(bf16):
                losses.append(loss_of(hidden_of(each, seed, input_ids=ids)))
        assert is_reversible(losses[0]) == (name == "reversible")
        if order == "together":
            (losses[0] + losses[1]).backward()
        else:
            for loss in losses if order == "first first" else reversed(losses):
                loss.backward()
        found[name] = gradients(each)
    assert gap(found["reversible"], found["plain"]) <= EXACT


CHANGES = {
    "bidirectional": {"is_decoder": False},
    "chunk rule": {"attention_mode": "chunk", "lsh_attn_chunk_length": 8, "local_attn_chunk_length": 8},
    "rotary": {"position_embedding_type": "rotary"},
    "rotary in lsh layers, too": {"position_embedding_type": "rotary", "lsh_rotary": 1.0},
    "axial": {"position_embedding_type": "axial"},
    "float32 streams": {"residual_precision": "float32"},
    "reference backend": {"attention_backend": "reference"},
    "chunked feed-forward": {"chunk_size_feed_forward": 7},
    "fixed rotations": {"resample_rotations": False},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_every_kind_of_model(changes):
    model = make(**changes)
    assert gap(step(model), step(twin_of(model))) <= EXACT


@pytest.mark.parametrize("tokens", [1, 16, 33, 99], ids=str)
def test_automatic_slices_change_nothing(tokens, monkeypatch):
    whole = make()
    expected = step(whole)
    values = hidden_of(whole.double())
    sliced = make()
    monkeypatch.setattr("hf_reformer.reversible.chunking.CHUNK_ELEMENTS", tokens * sliced.config.hidden_size)
    assert gap(step(sliced), step(twin_of(sliced))) <= EXACT
    assert gap(step(sliced), expected) <= 1e-5  # other matrix products
    sliced.double()  # whose rounding is far below the bound
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            assert torch.allclose(hidden_of(sliced), values, atol=1e-6)


@pytest.mark.parametrize("hold", ["left", "right", "holes"])
def test_padding(hold):
    mask = torch.ones_like(IDS)
    mask[0, {"left": slice(0, 20), "right": slice(30, None), "holes": slice(5, None, 3)}[hold]] = 0
    model, inputs = make(), {"input_ids": IDS, "attention_mask": mask}
    assert gap(step(model, **inputs), step(twin_of(model), **inputs)) <= EXACT


@pytest.mark.parametrize("chunk", [0, 7], ids=["whole", "chunked feed-forward"])
def test_bf16_autocast(chunk):
    model = make(chunk_size_feed_forward=chunk)
    found = []
    for each in (model, twin_of(model)):
        with autocast():
            loss = loss_of(hidden_of(each))
        loss.backward()
        found.append(gradients(each))
    assert gap(*found) <= EXACT


def test_float64_weights():
    model = make().double()
    assert gap(step(model), step(twin_of(model))) <= 1e-12


def test_bf16_weights():
    model = make().bfloat16()
    assert all(g.dtype == torch.bfloat16 for g in step(model))
    assert gap(step(model), step(twin_of(model))) <= EXACT


# --- values are the same on every path


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16 autocast"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_values_are_equal_bit_for_bit_on_every_path(training, bf16, precision):
    model = make(residual_precision=precision).train(training)
    checkpointed = copy.deepcopy(model)
    checkpointed.activation_checkpointing_enable()
    with autocast(bf16):
        reversible, plain, third = (hidden_of(m) for m in (model, twin_of(model), checkpointed))
        states = model(IDS, output_hidden_states=True).hidden_states if not training else None
    assert torch.equal(reversible, plain)
    assert torch.equal(reversible, third)
    assert is_reversible(reversible)
    assert not is_reversible(plain)
    assert is_reversible(third) is not training  # checkpointing is for training
    assert states is None or states[-1].shape == (2, 50, 32)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_is_a_third_path(reentrant):
    model = make()
    third = copy.deepcopy(model)
    third.activation_checkpointing_enable({"use_reentrant": reentrant})
    embeds = torch.randn(2, 50, 32)
    found = []
    for each in (third, model):
        leaf = embeds.clone().requires_grad_()
        found.append([*step(each, inputs_embeds=leaf)[1:], leaf.grad])
    assert gap(*found) <= EXACT


def test_rounding_moves_values_by_little():
    """Evaluation is not rounded; a graph rounds to multiples of 2^-32."""
    model = make().eval()
    with torch.no_grad():
        free = hidden_of(model)
    assert 0 < (hidden_of(model) - free).abs().max() < 1e-5


def test_asking_for_hidden_states_takes_the_plain_path():
    model = make()
    torch.manual_seed(5)
    out = model(IDS, output_hidden_states=True)
    assert not is_reversible(out.last_hidden_state)
    assert torch.equal(out.last_hidden_state, hidden_of(model))
    out.hidden_states[2].sum().backward()
    assert model.layers[0].attention.v_proj.weight.grad is not None


@pytest.mark.parametrize("chunk", [3, 7, 49, 50, 64])
def test_chunks_of_the_feed_forward_change_nothing(chunk):
    model = make(chunk_size_feed_forward=chunk)
    whole = make()
    assert torch.allclose(hidden_of(model), hidden_of(whole), atol=1e-6)
    assert gap(step(model), step(whole)) <= 1e-5  # other matrix products


# --- reconstruction is exact


@pytest.mark.parametrize(
    ("depth", "spread", "precision"), [(24, 0.02, "float32"), (96, 0.2, "float32"), (24, 0.2, "float64")]
)
def test_every_layers_input_is_recovered_bit_for_bit(depth, spread, precision, monkeypatch):
    """Of many layers, f in bf16: what f and g of every layer see in forward, they see again in backward."""
    forward = LayerNorm.forward

    def watch(module, x):
        if module in seen:
            seen[module].append(x.detach().clone())
        return forward(module, x)

    width = {"hidden_size": 8, "attention_head_size": 4, "feed_forward_size": 16}
    model = make(("local", "lsh") * (depth // 2), initializer_range=spread, residual_precision=precision, **width)
    seen = {module: [] for layer in model.layers for module in (layer.attention_norm, layer.feed_forward_norm)}
    monkeypatch.setattr(LayerNorm, "forward", watch)  # a hook would be a reason for the plain path
    with autocast():
        hidden = hidden_of(model, input_ids=IDS[:, :24])
    loss_of(hidden).backward()
    for forward, backward in seen.values():
        assert torch.equal(forward.view(torch.int32), backward.view(torch.int32))


def beyond_the_range(model):
    with torch.no_grad():  # a branch whose values fill the mantissa, on top of a stream that has left the grid's range
        model.embed_tokens.weight.mul_(3e7)
    return model


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_leaving_the_range_is_told(precision):
    with pytest.warns(RuntimeWarning, match="did not reconstruct its input exactly"):
        step(beyond_the_range(make(residual_precision=precision)))


def test_leaving_the_range_is_told_though_the_lowest_layers_are_frozen():
    model = beyond_the_range(make(DEEP, residual_precision="float32")).requires_grad_(False)
    model.layers[3:].requires_grad_(True)
    with pytest.warns(RuntimeWarning, match="did not reconstruct its input exactly"):
        loss_of(hidden_of(model)).backward()


def test_the_plain_path_has_no_range(recwarn):
    step(twin_of(beyond_the_range(make(residual_precision="float32"))))
    assert not recwarn.list


def test_rounding_passes_through_vmap():
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    grid = choose_grid("float64", torch.float32, True)
    assert torch.equal(torch.func.vmap(lambda row: to_stream(row, grid))(x), to_stream(x, grid))


@pytest.mark.parametrize(("precision", "bits"), [("float64", 32), ("float32", 16)])
def test_sums_on_the_grid_can_be_undone_up_to_its_limit(precision, bits):
    grid = choose_grid(precision, torch.float32, rounded=True)
    generator = torch.Generator().manual_seed(0)
    x = to_stream((torch.rand(10000, generator=generator) * 2 - 1) * grid.limit / 2, grid)
    y = torch.randn(10000, generator=generator) * torch.logspace(-12, 2, 10000)
    y = to_stream(y.clamp(-grid.limit / 2, grid.limit / 2), grid)
    assert x.dtype == y.dtype == grid.dtype
    assert torch.equal((x + y) - y, x)
    assert torch.equal(y, y.mul(2**bits).round().div(2**bits))
    assert torch.equal(to_stream(x, grid), x)


def test_rounding_is_to_the_nearest_and_has_the_gradient_of_the_identity():
    x = torch.tensor([0.3, -0.3, 1.0, 2.5], requires_grad=True)
    rounded = to_stream(x, Grid(torch.float32, 1))
    assert rounded.tolist() == [0.5, -0.5, 1.0, 2.5]
    rounded.backward(torch.arange(4.0))
    assert x.grad.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_no_zero_of_a_stream_is_negative():
    tiny = torch.tensor([-0.0, -1e-30, 1e-30])
    for precision in ("float64", "float32"):
        assert not to_stream(tiny, choose_grid(precision, torch.float32, True)).signbit().any()


# --- a toy stack, for what a model does not show


class Toy(nn.Module):
    """Branches with foreign dropout and foreign draws that decide something, so that a wrong bit or draw shows."""

    def __init__(self, width=8, chunk_size=0):
        super().__init__()
        self.first, self.second, self.dropout = nn.Linear(width, width), nn.Linear(width, width), nn.Dropout(0.2)
        self.chunk_size = chunk_size

    def qkv_projection(self, x2, ctx, offset):
        return [x2]

    def attend(self, projected, ctx, *states):
        (x2,) = projected.take()
        x = self.first(x2.float() + sum(states))
        bucket = (x.detach() @ torch.randn(x.shape[-1], 6)).argmax(-1, keepdim=True)
        return (x.tanh() * (1 + bucket % 3),)

    def output_projection(self, mixed, ctx, offset):
        return self.dropout(mixed)

    def feed_forward_branch(self, y1, ctx, offset):
        return self.dropout(self.second(y1.float()).relu())


class Zero(Toy):
    """Branches that give negative zeros."""

    def feed_forward_branch(self, y1, ctx, offset):
        return -0.0 * self.second(y1.float()).relu()


GRID = choose_grid("float64", torch.float32, rounded=True)


def reversible_step(layer, x1, x2, handoff, index, states=()):
    tensors = layer_tensors(layer)
    return ReversibleFunction.apply(layer, None, handoff, index, tuple(tensors), x1, x2, *states, *tensors.values())


def run_toys(layers, x, reversible, *extra):
    torch.manual_seed(1)
    handoff = StreamHandoff(GRID, len(layers))
    x1 = x2 = to_stream(x, GRID)
    for index, layer in enumerate(layers):
        if reversible:
            x1, x2 = reversible_step(layer, x1, x2, handoff, index, extra)
        else:
            x1, x2 = residual_step(layer, x1, x2, None, GRID, extra)
    return torch.cat([x1, x2], -1)


def toys(order, layer=Toy, **kwargs):
    torch.manual_seed(0)
    made = [layer(**kwargs) for _ in range(max(order) + 1)]
    return nn.ModuleList(made[i] for i in order)


@pytest.mark.parametrize("chunk", [0, 2], ids=["whole", "slices"])
@pytest.mark.parametrize("order", [[0], [0, 1, 2, 3], [0, 0, 0, 0, 0], [0, 1, 0, 1]], ids=str)
def test_layers_may_be_used_several_times(order, chunk):
    layers, x = toys(order, chunk_size=chunk), torch.randn(2, 5, 8)
    found = []
    for reversible in (True, False):
        layers.zero_grad()
        loss_of(run_toys(layers, x, reversible)).backward()
        found.append([p.grad for p in layers.parameters()])
    assert gap(*found) <= EXACT


def test_negative_zeros_raise_no_alarm():
    layers = toys([0, 1], Zero)
    loss_of(run_toys(layers, torch.full((2, 5, 8), -0.0, requires_grad=True), True)).backward()


def test_other_tensors_get_their_gradients():
    """Encoder states: used by every layer; one of them wants no gradient, and one takes part in nothing."""
    layers, x = toys([0, 1, 2]), torch.randn(2, 5, 8)
    found = []
    for reversible in (True, False):
        extra = [torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(s)) for s in range(3)]
        extra[0].requires_grad_()
        extra[2] = extra[2][:, :1].requires_grad_()
        source = extra[2] * 2  # not a leaf
        layers.zero_grad()
        loss_of(run_toys(layers, x, reversible, extra[0], extra[1], source)).backward()
        assert extra[1].grad is None
        found.append([*(p.grad for p in layers.parameters()), extra[0].grad, extra[2].grad])
    assert gap(*found) <= EXACT


class Shared(Toy):
    """Two parameters whose gradients autograd hands out as one tensor."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.a, self.b = (nn.Parameter(torch.randn(8)) for _ in range(2))

    def feed_forward_branch(self, y1, ctx, offset):
        return y1.float() * 0.5 + (self.a + self.b)


@pytest.mark.parametrize("chunk", [0, 1, 2, 5], ids=str)
def test_gradients_of_slices_add_up_for_every_parameter_alone(chunk):
    layers, x = toys([0, 1], Shared, chunk_size=chunk), torch.randn(2, 5, 8)
    found = []
    for reversible in (True, False):
        layers.zero_grad()
        loss_of(run_toys(layers, x, reversible)).backward()
        found.append([p.grad.clone() for p in layers.parameters() if p.grad is not None])
    assert gap(*found) <= EXACT


def test_gradients_of_slices_add_up_in_float32():
    """In bfloat16 a sum of a thousand equal numbers would stop growing at 256."""
    length = 1024

    class Half(Toy):
        def feed_forward_branch(self, y1, ctx, offset):
            return self.second.bias.expand(*y1.shape) + 0 * y1.to(torch.bfloat16)

    layer = Half(chunk_size=1)
    layer.second.to(torch.bfloat16)
    streams = [torch.zeros(1, length, 8, dtype=torch.float64)] * 2
    _, x2 = reversible_step(layer, *streams, StreamHandoff(GRID, 1), 0)
    x2.sum().backward()
    assert torch.equal(layer.second.bias.grad, torch.full((8,), float(length), dtype=torch.bfloat16))


def test_gradcheck_sees_through_the_grid():
    class Smooth(Toy):
        def attend(self, projected, ctx, *states):
            return (self.first(projected.take()[0] + sum(states)).tanh(),)

        def output_projection(self, mixed, ctx, offset):
            return mixed

        def feed_forward_branch(self, y1, ctx, offset):
            return self.second(y1).tanh()

    layers = nn.ModuleList(Smooth(3).double() for _ in range(3))
    names, tensors = zip(*layers.named_parameters(), strict=True)

    def run(x, extra, *tensors):
        x1 = x2 = to_stream(x, grid)
        handoff = StreamHandoff(grid, len(layers))
        with torch.nn.utils.stateless._reparametrize_module(layers, dict(zip(names, tensors, strict=True))):
            for index, layer in enumerate(layers):
                x1, x2 = reversible_step(layer, x1, x2, handoff, index, (extra,))
        return x1, x2

    grid = choose_grid("float64", torch.float64, rounded=True)
    x, extra = (torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(run, (x, extra, *tensors), eps=1e-4, atol=1e-5)


# --- whatever is asked of autograd


def test_backward_twice_with_retain_graph():
    model = make()
    expected = step(twin_of(model))
    loss = loss_of(hidden_of(model))
    for times in (1, 2):
        loss.backward(retain_graph=True)
        assert gap(gradients(model), [times * g for g in expected]) <= EXACT


def test_gradients_of_all_parameters_or_of_one():
    model = make()
    expected = step(twin_of(model))
    loss = loss_of(hidden_of(model))
    assert gap(torch.autograd.grad(loss, trainable(model), retain_graph=True), expected) <= EXACT
    for place in (0, len(expected) // 2, len(expected) - 1):
        found = torch.autograd.grad(loss, trainable(model)[place], retain_graph=True)
        assert gap(found, expected[place : place + 1]) <= EXACT


def test_nothing_is_left_over_where_gradients_stop_halfway(handoffs):
    model = make(DEEP)
    loss = loss_of(hidden_of(model))
    torch.autograd.grad(loss, list(model.layers[3].parameters()), retain_graph=True)
    assert not handoffs[0]()._pending
    loss.backward()
    assert not handoffs[0]()._pending


@pytest.mark.parametrize("chunk", [0, 7], ids=["whole", "chunked feed-forward"])
@pytest.mark.parametrize("adapters", [False, True], ids=["bare", "adapters"])
@pytest.mark.parametrize(("during", "after"), [(False, False), (True, False), (False, True)])
def test_backward_restores_the_flags_of_its_forward(during, after, adapters, chunk):
    """`eval()` or `train()` between forward and backward changes nothing, and stays in force."""
    model = make(chunk_size_feed_forward=chunk)
    model = with_adapters(model) if adapters else model
    expected = step(twin_of(model.train(during)))
    loss = loss_of(hidden_of(model))
    model.train(after)
    loss.backward()
    assert all(module.training is after for module in model.modules())
    assert gap(gradients(model), expected) <= EXACT


FROZEN = {
    "embeddings": lambda m: [m.embed_tokens, m.position_embeddings],
    "all but two layers": lambda m: [*m.layers[:3], *m.layers[5:], m.embed_tokens, m.position_embeddings, m.norm],
    "all but the norm": lambda m: [m.layers, m.embed_tokens, m.position_embeddings],
    "the last layers": lambda m: [m.layers[4:]],
    "every attention": lambda m: [layer.attention for layer in m.layers],
    "every feed-forward": lambda m: [layer.feed_forward for layer in m.layers],
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_frozen_parts(frozen):
    model = make(DEEP, position_embedding_type="axial")
    for part in frozen(model):
        part.requires_grad_(False)
    found = step(model)
    assert all(g is not None for g in found)
    assert gap(found, step(twin_of(model))) <= EXACT


@pytest.mark.parametrize("transposed", [False, True], ids=["contiguous", "from a convolution"])
def test_gradients_of_inputs_alone(transposed):
    model = make().requires_grad_(False)
    found = []
    for each in (model, twin_of(model)):
        leaf = torch.randn(2, 32, 50, generator=torch.Generator().manual_seed(0)).requires_grad_()
        embeds = leaf.transpose(1, 2) if transposed else leaf.view(2, 50, 32)
        found.append(torch.autograd.grad(loss_of(hidden_of(each, inputs_embeds=embeds)), [leaf]))
    assert gap(*found) <= EXACT


def test_parts_may_be_shared_between_layers():
    model = make(DEEP)
    for layer, donor in ((3, 0), (4, 1), (5, 0)):
        model.layers[layer].feed_forward = model.layers[donor].feed_forward
    model.layers[3].attention = model.layers[0].attention
    model.layers[4].attention.v_proj = model.layers[1].attention.v_proj
    assert gap(step(model), step(twin_of(model))) <= EXACT


@pytest.mark.parametrize("order", [[0, 1, 2, 0, 1, 2], [2, 3, 4], [0, 1, 4, 5]], ids=str)
def test_whole_layers_may_be_repeated_or_left_out(order):
    model = make(DEEP)
    model.layers = nn.ModuleList(model.layers[i] for i in order)
    assert gap(step(model), step(twin_of(model))) <= EXACT


def test_a_second_backward_without_retain_graph_is_refused():
    loss = loss_of(hidden_of(make()))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_weights_changed_before_backward_are_refused():
    model = make()
    loss = loss_of(hidden_of(model))
    with torch.no_grad():
        model.layers[1].feed_forward.up_proj.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_weights_changed_before_the_plain_path_recomputes_are_refused():
    model = make(reversible=False, chunk_size_feed_forward=7)
    loss = loss_of(hidden_of(model))
    with torch.no_grad():
        model.layers[1].feed_forward.up_proj.weight.mul_(3)
    with pytest.raises(
        RuntimeError, match=r"modified (by an inplace operation|in place between forward and backward)"
    ):
        loss.backward()


@pytest.mark.parametrize("chunk", [0, 7], ids=["whole", "chunked"])
def test_hooks_on_parameters_see_whole_gradients_once(chunk):
    """Clipping, masking or scaling by `register_hook` acts on the sum over slices and branches."""
    calls = []

    def clip(grad):
        calls.append(grad)
        return grad.clamp(-1e-4, 1e-4)

    found = {}
    for reversible in (True, False):
        model = make(chunk_size_feed_forward=chunk, reversible=reversible)
        for parameter in model.parameters():
            parameter.register_hook(clip)
        calls.clear()
        found[reversible] = step(model)
        assert len(calls) == len(found[reversible])
    assert gap(found[True], found[False]) <= EXACT


def test_weights_kept_by_a_parametrization_cache_get_gradients():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = make()
    for layer in model.layers:
        nn.utils.parametrize.register_parametrization(layer.feed_forward.up_proj, "weight", Doubled())
    expected = step(twin_of(model))
    with nn.utils.parametrize.cached():
        assert gap(step(model), expected) <= EXACT
    assert gap(step(model), expected) <= EXACT


def test_a_trainable_tensor_from_outside_is_refused_rather_than_forgotten():
    class Steered(nn.Sequential):
        steer = [nn.Parameter(torch.zeros(32))]  # no parameter of the module's own

        def forward(self, x):
            return super().forward(x) + self.steer[0]

    model = make()
    model.layers[1].feed_forward.down_proj = Steered(model.layers[1].feed_forward.down_proj)
    loss = loss_of(hidden_of(model))
    with pytest.raises(
        RuntimeError, match=r"shape \(32,\) comes into a reversible layer from outside.*reversible=False"
    ):
        loss.backward()
    model.config.reversible = False
    loss_of(hidden_of(model)).backward()
    assert Steered.steer[0].grad.abs().sum() > 0


def test_modules_replaced_before_backward_are_told_about():
    model = make()
    loss = loss_of(hidden_of(model))
    model.layers[1].feed_forward.down_proj = nn.Sequential(model.layers[1].feed_forward.down_proj)
    with pytest.raises(RuntimeError, match=r"Modules within ReformerLayer were added, removed or replaced"):
        loss.backward()


# --- what a layer was run with in forward, it is run with again: hooks, settings, parameters that are trained


def up_proj(model):
    return model.layers[1].feed_forward.up_proj


def captured(model):
    """A loss on what a hook keeps."""
    kept = []
    up_proj(model).register_forward_hook(lambda module, given, out: kept.append(out))
    return lambda: sum(x.square().mean() for x in kept)


def nothing(*given):
    """Nothing to clean up, and no further loss."""
    return 0.0


def on(method, hook, **options):
    """A hook that is removed before backward."""
    return lambda model: getattr(up_proj(model), method)(hook, **options).remove


def on_all(register, hook):
    return lambda model: register(hook).remove


def in_block(manager):
    """A context manager around the forward alone."""

    def enter(model):
        manager.__enter__()
        return lambda: manager.__exit__(None, None, None)

    return enter


def forward_of_its_own(model):
    module = up_proj(model)
    module.forward = lambda x: 2 * type(module).forward(module, x)
    return lambda: vars(module).pop("forward")


def pruned(model):
    prune.random_unstructured(up_proj(model), "weight", 0.5)
    return nothing


def doubled(module, given, out):
    return 2 * out


REACHES = {
    "forward hook": on("register_forward_hook", doubled),
    "forward hook with kwargs": on("register_forward_hook", lambda m, a, k, out: 2 * out, with_kwargs=True),
    "forward hook always called": on("register_forward_hook", doubled, always_call=True),
    "forward pre-hook": on("register_forward_pre_hook", lambda module, given: (given[0] + 0.5,)),
    "forward pre-hook with kwargs": on(
        "register_forward_pre_hook", lambda module, given, kwargs: ((given[0] + 0.5,), kwargs), with_kwargs=True
    ),
    "full backward hook": on("register_full_backward_hook", lambda module, grad, out: (2 * grad[0],)),
    "full backward pre-hook": on("register_full_backward_pre_hook", lambda module, grad: (2 * grad[0],)),
    "global forward hook": on_all(
        nn.modules.module.register_module_forward_hook,
        lambda module, given, out: 2 * out if isinstance(module, nn.Linear) else None,
    ),
    "global backward hook": on_all(
        nn.modules.module.register_module_full_backward_hook,
        lambda module, grad, out: (2 * grad[0],) if isinstance(module, nn.Linear) else None,
    ),
    "module tracker": lambda model: in_block(ModuleTracker())(model),
    "flop counter": lambda model: in_block(FlopCounterMode(display=False))(model),
    "a forward of the module's own": forward_of_its_own,
    "pruning": pruned,
    "capture": captured,
}


@pytest.mark.parametrize("chunk", [0, 7], ids=["whole", "chunked"])
@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES)
def test_what_reaches_into_a_layer_in_forward_alone(reach, chunk):
    """Gradients are those of a model that keeps everything, whether a hook changes values or gradients, or looks."""
    found = []
    for reversible in (True, False):
        model = make(chunk_size_feed_forward=chunk, reversible=reversible)
        torch.manual_seed(1)  # of pruning
        leave = reach(model)
        loss = loss_of(hidden_of(model))
        extra = leave()
        (loss + (extra if isinstance(extra, torch.Tensor) else 0)).backward()
        found.append(gradients(model))
    assert gap(*found) <= EXACT


ARRIVALS = {
    "forward hook": lambda model: up_proj(model).register_forward_hook(doubled).remove,
    "global forward hook": lambda model: (
        nn.modules.module.register_module_forward_hook(
            lambda module, given, out: 2 * out if isinstance(module, nn.Linear) else None
        ).remove
    ),
    "a forward of the module's own": forward_of_its_own,
    "config": lambda model: setattr(model.config, "local_window", 4),
    "frozen": lambda model: up_proj(model).requires_grad_(False),
}


@pytest.mark.parametrize("chunk", [0, 7], ids=["whole", "chunked"])
@pytest.mark.parametrize("arrive", ARRIVALS.values(), ids=ARRIVALS)
def test_what_comes_before_backward_changes_nothing(arrive, chunk):
    found = []
    for reversible in (True, False):
        model = make(chunk_size_feed_forward=chunk * reversible, reversible=reversible)
        loss = loss_of(hidden_of(model))
        leave = arrive(model)
        loss.backward()
        if callable(leave) and not isinstance(leave, nn.Module):
            leave()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert gap(*found) <= EXACT


def test_parameters_trained_from_now_on_were_frozen_in_forward():
    found = []
    for reversible in (True, False):
        model = make(reversible=reversible)
        up_proj(model).requires_grad_(False)
        loss = loss_of(hidden_of(model))
        up_proj(model).requires_grad_(True)
        loss.backward()
        found.append(gradients(model))
    assert gap(*found) <= EXACT


class Scaled(nn.Module):
    """As adapters are: settings in lists, dictionaries and flags."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.scaling, self.active, self.disabled, self.calls = inner, {"a": 2.0}, ["a"], False, 0

    def forward(self, x):
        self.calls += 1
        out = self.inner(x)
        return out if self.disabled else out * sum(self.scaling[name] for name in self.active)


SETTINGS = {
    "an entry of a dictionary": lambda module: module.scaling.update(a=5.0),
    "another dictionary": lambda module: setattr(module, "scaling", {"a": 5.0, "b": 1.0}),
    "a list": lambda module: module.active.clear(),
    "a flag": lambda module: setattr(module, "disabled", True),
    "nothing": lambda module: None,
}


@pytest.mark.parametrize("chunk", [0, 7], ids=["whole", "chunked"])
@pytest.mark.parametrize("change", SETTINGS.values(), ids=SETTINGS)
def test_settings_changed_before_backward_change_nothing_and_stay(change, chunk):
    found = []
    for reversible in (True, False):
        model = make(chunk_size_feed_forward=chunk * reversible, reversible=reversible)
        module = model.layers[1].feed_forward.up_proj = Scaled(up_proj(model))
        loss = loss_of(hidden_of(model))
        change(module)
        before = dict(module.scaling), list(module.active), module.disabled, module.calls
        loss.backward()
        assert before == (module.scaling, module.active, module.disabled, module.calls)
        found.append(gradients(model))
    assert gap(*found) <= EXACT


def test_hooks_within_layers_take_the_plain_path_and_hooks_on_layers_do_not(captured_warnings):
    model = make()
    handle = model.layers[1].register_forward_hook(lambda module, given, out: None)
    assert is_reversible(hidden_of(model))
    handle.remove()
    assert is_reversible(hidden_of(model))
    handle = up_proj(model).register_forward_hook(lambda module, given, out: None)
    assert not is_reversible(hidden_of(model))
    handle.remove()
    assert is_reversible(hidden_of(model))


def test_backward_keeps_to_the_slices_of_its_forward():
    model = make(chunk_size_feed_forward=7)
    expected = step(model)
    loss = loss_of(hidden_of(model))
    for layer in model.layers:
        layer.chunk_size = 5
    model.zero_grad()
    loss.backward()
    assert gap(gradients(model), expected) == 0


def test_what_is_not_a_number_is_no_matter_of_the_streams_range(captured_warnings):
    model = make()
    with torch.no_grad():
        model.layers[0].feed_forward.down_proj.bias[3] = float("nan")
    step(model)
    assert not [message for message in captured_warnings if "reconstruct" in message]


def test_double_backward_is_refused():
    model = make()
    grads = torch.autograd.grad(loss_of(hidden_of(model)), trainable(model), create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        sum(g.square().sum() for g in grads).backward()


@pytest.mark.parametrize("chunk", [0, 7], ids=["whole", "chunked feed-forward"])
def test_functional_calls(chunk):
    """Other parameters than the model's own: functional_call, and torch.func's transforms on the plain path."""
    model = make(chunk_size_feed_forward=chunk, initializer_range=0.02)
    other = {name: (p.detach() * 1.5).requires_grad_() for name, p in model.named_parameters()}
    reference = twin_of(model)
    reference.load_state_dict({name: p.detach() for name, p in other.items()})
    expected = step(reference)

    def loss(parameters):
        torch.manual_seed(5)
        return loss_of(functional_call(model, parameters, (IDS,)).last_hidden_state)

    assert is_reversible(loss(other))
    assert gap(torch.autograd.grad(loss(other), list(other.values())), expected) <= EXACT
    assert gap(list(torch.func.grad(loss)(other).values()), expected) <= EXACT
    value, pull = torch.func.vjp(loss, other)
    assert gap(list(pull(torch.ones_like(value))[0].values()), expected) <= EXACT


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_whole_model_inside_a_checkpoint(reentrant):
    model = make()
    found = []
    for each in (model, twin_of(model)):
        embeds = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        torch.manual_seed(5)
        if each is model:
            hidden = checkpoint(lambda x: model(inputs_embeds=x).last_hidden_state, embeds, use_reentrant=reentrant)
        else:
            hidden = each(inputs_embeds=embeds).last_hidden_state
        loss_of(hidden).backward()
        found.append([*gradients(each)[1:], embeds.grad])
    assert gap(*found) <= EXACT


def test_layers_inside_checkpoints():
    """As accelerate wraps them: without the generators' state. Ours needs none."""
    model = make()
    expected = step(twin_of(model))
    for i, layer in enumerate(model.layers):
        model.layers[i] = checkpoint_wrapper(layer, CheckpointImpl.NO_REENTRANT, preserve_rng_state=False)
    assert gap(step(model), expected) <= EXACT


def test_layers_inside_reentrant_checkpoints_are_refused():
    model = make()
    model.layers[1] = checkpoint_wrapper(model.layers[1], CheckpointImpl.REENTRANT)
    with pytest.raises(RuntimeError, match="reversible=False"):
        step(model)


@pytest.mark.parametrize("chunk", [0, 7], ids=["whole", "chunked feed-forward"])
def test_saved_tensors_moved_elsewhere(chunk):
    model = make(chunk_size_feed_forward=chunk)
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(hidden_of(model))
    loss.backward()
    assert gap(gradients(model), step(twin_of(model))) <= EXACT


# --- hooks, and losses on inner streams


def halve_a_stream(model):
    model.layers[1].register_forward_hook(lambda module, args, out: (out[0] * 0.5, out[1]))


def cast_the_streams(model):
    def cast(module, args):
        return (*(x.bfloat16().to(x.dtype) for x in args[:2]), *args[2:])

    model.layers[1].register_forward_pre_hook(cast)


def swap_the_streams(model):
    model.layers[1].register_forward_hook(lambda module, args, out: (out[1], out[0]))


def stop_a_gradient(model):
    model.layers[1].register_forward_hook(lambda module, args, out: (out[0].detach(), out[1]))


@pytest.mark.parametrize("hook", [halve_a_stream, cast_the_streams, swap_the_streams, stop_a_gradient])
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_hooks_may_replace_streams(hook, precision):
    model = make(residual_precision=precision)
    twin = twin_of(model)
    hook(model)
    hook(twin)
    assert gap(step(model), step(twin)) <= EXACT


def test_a_stream_changed_in_place_is_refused():
    model = make()
    model.layers[1].register_forward_hook(lambda module, args, out: (out[0].mul_(0.5), out[1]))
    with pytest.raises(RuntimeError, match="modified in place"):
        hidden_of(model)


def test_the_last_stream_changed_in_place_is_refused():
    model = make()
    model.layers[-1].register_forward_hook(lambda module, args, out: (out[0].mul_(0.5), out[1]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(model)


def test_tensor_hooks_see_the_same_gradients():
    """On either stream, in every layer, by a hook or by retain_grad."""
    model = make()
    found = []
    for each in (model, twin_of(model)):
        streams, hooked = [], {}
        for layer in each.layers:
            layer.register_forward_hook(lambda module, args, out, streams=streams: streams.extend(out))
        hidden = hidden_of(each)
        for place, stream in enumerate(streams):
            stream.retain_grad()
            stream.register_hook(functools.partial(hooked.__setitem__, place))
        loss_of(hidden).backward()
        found.append([stream.grad for stream in streams] + [hooked[place] for place in range(len(streams))])
    assert gap(*found) <= EXACT


def inner_streams(model):
    """The streams that leave layer 1, and the last hidden state."""
    kept = []
    handle = model.layers[1].register_forward_hook(lambda module, args, out: kept.extend(out))
    hidden = hidden_of(model)
    handle.remove()
    return kept, hidden


@pytest.mark.parametrize("which", [(0,), (1,), (0, 1)], ids=str)
def test_losses_on_inner_streams_beside_the_output(which):
    model = make()
    found = []
    for each in (model, twin_of(model)):
        streams, hidden = inner_streams(each)
        (loss_of(hidden) + sum(loss_of(streams[i]) for i in which)).backward()
        found.append(gradients(each))
    assert gap(*found) <= EXACT


def test_losses_on_inner_streams_alone_are_refused():
    streams, hidden = inner_streams(make())
    loss_of(hidden).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="output_hidden_states=True"):
        loss_of(streams[0]).backward()


# --- foreign randomness, threads, failures, memory


@pytest.mark.parametrize("chunk", [0, 7], ids=["whole", "chunked feed-forward"])
def test_foreign_dropout_is_replayed(chunk):
    model = with_adapters(make(chunk_size_feed_forward=chunk))
    expected = step(twin_of(model))
    loss = loss_of(hidden_of(model))
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)
    assert gap(gradients(model), expected) <= EXACT


def test_foreign_dropout_is_replayed_in_adapters_of_frozen_weights():
    model = make().requires_grad_(False)
    model = with_adapters(model)
    for module in model.modules():
        if isinstance(module, WithDropout):
            module.up.requires_grad_(True)
            module.down.requires_grad_(True)
    assert gap(step(model), step(twin_of(model))) <= EXACT


@pytest.mark.parametrize("adapters", [False, True], ids=["bare", "adapters"])
@pytest.mark.parametrize("flipped", [False, True], ids=["train", "eval before backward"])
def test_threads_may_walk_one_graph(flipped, adapters):
    model = with_adapters(make()) if adapters else make()
    expected = step(twin_of(model))
    loss, parameters = loss_of(hidden_of(model)), trainable(model)
    model.train(not flipped)
    found = {}

    def walk(thread):
        found[thread] = torch.autograd.grad(loss, parameters, retain_graph=True)

    threads = [threading.Thread(target=walk, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert max(gap(grads, expected) for grads in found.values()) <= EXACT
    assert all(module.training is not flipped for module in model.modules())


@pytest.mark.parametrize("where", ["f", "g", "between"])
def test_a_failing_backward_leaves_no_trace(where, handoffs, monkeypatch):
    model = with_adapters(make())
    expected = step(twin_of(model))
    streams, hidden = inner_streams(model)
    loss = loss_of(hidden)
    model.eval()

    def fail(*_):
        raise KeyError("on purpose")

    state = torch.get_rng_state()
    handle = streams[0].register_hook(fail if where == "between" else lambda grad: None)
    with monkeypatch.context() as patch:
        if where != "between":
            patch.setattr(ReformerAttention if where == "f" else FeedForward, "forward", fail)
        with pytest.raises(KeyError, match="on purpose"):
            loss.backward(retain_graph=True)
    handle.remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert not torch.is_autocast_enabled("cpu")
    model.zero_grad()
    loss.backward()
    assert gap(gradients(model), expected) <= EXACT


@pytest.fixture
def handoffs(monkeypatch):
    """Weak references to the stream handoffs of all forwards to come, with the cycle collector asleep."""
    born = []

    class Watched(StreamHandoff):
        def __init__(self, *args):
            super().__init__(*args)
            born.append(weakref.ref(self))

    monkeypatch.setattr(modeling, "StreamHandoff", Watched)
    gc.collect()
    gc.disable()
    yield born
    gc.enable()


@pytest.mark.parametrize("chunk", [0, 7], ids=["whole", "chunked feed-forward"])
@pytest.mark.parametrize("end", ["backward", "no backward", "failure", "hook"])
def test_memory_is_freed_at_once(end, chunk, handoffs):
    model = with_adapters(make(chunk_size_feed_forward=chunk))
    if end == "hook":
        halve_a_stream(model)
    hidden = hidden_of(model)
    watched = [weakref.ref(hidden.untyped_storage()), *handoffs]
    assert len(handoffs) == 1
    if end == "failure":
        hidden.register_hook(lambda grad: grad[:1])
    if end != "no backward":
        with contextlib.suppress(RuntimeError):
            loss_of(hidden).backward()
    del hidden
    assert [reference() for reference in watched] == [None, None]


class Event:
    """Of a CUDA device that does not answer at once."""

    answers = True

    def record(self):
        pass

    def query(self):
        return Event.answers


def test_a_device_that_is_not_waited_for_warns_a_step_later(monkeypatch):
    """A CUDA device works behind the host; a CPU stands in for it here."""
    monkeypatch.setattr(machinery, "may_look_at", lambda x: False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(machinery, "_PENDING", [])
    streams = torch.ones(2, 3), torch.ones(2, 3)
    before, grid = tuple(map(machinery.checksum, streams)), Grid(torch.float32, 16)

    def warned(*streams):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            machinery.warn_if_inexact(before, streams, grid)
        return len(found)

    assert warned(streams[0], streams[1] + 1) == 0  # not known yet
    assert warned(*streams) == 1
    assert warned(*streams) == 0
    assert warned(streams[0] * torch.nan, streams[1]) == 0
    assert warned(*streams) == 0  # the loss shows what is not a number
    monkeypatch.setattr(Event, "answers", False)
    assert warned(streams[0], streams[1] + 1) == warned(*streams) == 0
    monkeypatch.setattr(Event, "answers", True)
    assert warned(*streams) == 1


def test_while_a_cuda_graph_records_layers_take_the_plain_path(monkeypatch):
    """Nothing asks for the state of a generator then, and keys come from the device's own."""
    model = make()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("a generator was asked"))
    hidden = hidden_of(model)
    assert not is_reversible(hidden)
    found = step(model)
    model.config.reversible = False
    assert gap(found, step(model)) <= EXACT
