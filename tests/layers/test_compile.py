"""torch.compile and torch.export give the values and gradients of the eager model."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL_WINDOWS, make_ids, make_model, max_abs_diff, needs_fullgraph
from memory_census import Census
from torch._dynamo.utils import counters

from hf_reformer import ReformerForCausalLM, ReformerForQuestionAnswering, ReformerForSequenceClassification

DROPOUT = {"hidden_dropout_prob": 0.1, "lsh_attention_probs_dropout_prob": 0.1}
MASK = (torch.arange(50) < torch.tensor([[50], [31]])).long()
IDS = make_ids(2, 50)
CLASSES = torch.tensor([1, 0])
INPUTS = {
    ReformerForCausalLM: {"labels": IDS.where(MASK == 1, -100)},
    ReformerForSequenceClassification: {"labels": CLASSES},
    ReformerForQuestionAnswering: {"start_positions": CLASSES, "end_positions": CLASSES + 9},
}
CHUNKS = {"attention_mode": "chunk", "lsh_attn_chunk_length": 16, "local_attn_chunk_length": 16}
KINDS = [
    (ReformerForCausalLM, {}),
    *(
        pytest.param(cls, changes, marks=pytest.mark.slow)
        for cls, changes in (
            (ReformerForSequenceClassification, {}),
            (ReformerForCausalLM, {"attention_backend": "torch", "position_embedding_type": "axial"}),
            (ReformerForCausalLM, CHUNKS),
            (ReformerForCausalLM, {"reversible": False, "attn_layers": ["full", "lsh"]}),
            (ReformerForQuestionAnswering, {}),
            (ReformerForCausalLM, {"attention_backend": "torch", "lsh_rotary": 1.0}),
        )
    ),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make(cls=ReformerForCausalLM, **changes):
    return make_model(cls, dtype=torch.float32, classifier_dropout=0.0, **{**SMALL_WINDOWS, **DROPOUT, **changes})


def step(run, model) -> dict[str, torch.Tensor]:
    """Loss and gradients of a training step, the generator where it always begins."""
    torch.manual_seed(3)
    loss = run(input_ids=IDS, attention_mask=MASK, **INPUTS[type(model)]).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        assert max_abs_diff(found[name], value) <= tolerance * max(1, value.abs().max().item()), name


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("cls", "changes"), KINDS)
@needs_fullgraph
def test_a_training_step_in_one_graph(cls, changes):
    model, eager = make(cls, **changes).train(), make(cls, **changes).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(step(compiled, model), step(eager, eager), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bf16", "slices"),
    [pytest.param(True, 0, id="bfloat16"), pytest.param(False, 7, id="slices", marks=pytest.mark.slow)],
)
@needs_fullgraph
def test_a_training_step_in_one_graph_rebuilds_exactly(bf16, slices, recwarn):
    changes = {"attn_layers": ["local", "lsh"] * 2, "chunk_size_feed_forward": slices}
    model, eager = make(**changes).train(), make(**changes).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = step(torch.compile(model, fullgraph=True, backend="aot_eager"), model)
        assert_same(found, step(eager, eager), 1e-6)
    assert not [warning for warning in recwarn if "reconstruct" in str(warning.message)]


@pytest.mark.slow
@torch.no_grad()
@needs_fullgraph
def test_evaluation_in_one_graph_is_compiled_anew_for_another_length_but_once():
    model = make().eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for length, limit in ((50, 1), (61, 2), (90, 2), (33, 2)):
        ids, mask = make_ids(2, length), torch.ones(2, length, dtype=torch.long)
        mask[1, length // 2 :] = 0
        found, expected = compiled(input_ids=ids, attention_mask=mask).logits, model(ids, mask).logits
        assert max_abs_diff(found[mask == 1], expected[mask == 1]) <= 1e-6
        assert graphs() <= limit


@pytest.mark.slow
@torch.no_grad()
@needs_fullgraph
def test_packed_samples_in_one_graph():
    model = make().eval()
    positions = torch.cat([torch.arange(20), torch.arange(30)]).expand(2, -1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(input_ids=IDS, position_ids=positions).logits
    assert max_abs_diff(found, model(IDS, position_ids=positions).logits) <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_few_tokens_with_positions_on_top_of_a_cache(backend):
    model = make(attention_backend=backend).eval()
    compiled, positions = torch.compile(model, backend="eager"), torch.arange(50)[None]
    with torch.no_grad():
        cache = model(IDS[:, :40], use_cache=True).past_key_values
        found = compiled(IDS[:, 40:43], past_key_values=cache, position_ids=positions[:, 40:43]).logits
        assert max_abs_diff(found, model(IDS[:, :43], position_ids=positions[:, :43]).logits[:, 40:]) <= 1e-5


def kept_by(model, backend: str = "aot_eager", length: int = 1024) -> int:
    """Bytes that one compiled forward keeps for backward, weights aside."""
    torch._dynamo.reset()
    ids = make_ids(1, length)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    loss = compiled(input_ids=ids, labels=ids).loss
    kept, todo, seen = {}, [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
            for x in (*getattr(node, "saved_tensors", ()), *getattr(node, "_tensors_no_vc_check", ())):
                if x is not None:
                    kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    for parameter in model.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(kept.values())


def put_something_foreign_into(model) -> None:
    for layer in model.model.layers:
        layer.feed_forward.register_forward_hook(lambda module, args, output: 2 * output)


DEEP = {"hidden_size": 32, "max_position_embeddings": 2048, "attn_layers": None}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
@needs_fullgraph
def test_one_graph_keeps_the_same_whatever_its_depth(backend):
    shallow, deep = (kept_by(make(num_hidden_layers=depth, **DEEP).train(), backend) for depth in (2, 6))
    assert deep <= 1.02 * shallow


@pytest.mark.slow
@needs_fullgraph
def test_one_graph_with_foreign_layers_has_the_memory_of_a_checkpointed_model():
    """Of every further layer it keeps less than its two streams."""
    stream, kept = 1024 * 32 * 8, []
    for depth, reversible in ((2, True), (6, True), (6, False)):
        model = make(num_hidden_layers=depth, reversible=reversible, **DEEP).train()
        put_something_foreign_into(model)
        kept.append(kept_by(model))
    shallow, deep, plain = kept
    assert deep - shallow <= 4 * 2 * stream
    assert deep <= plain / 2


@pytest.mark.slow
@needs_fullgraph
def test_one_graph_with_foreign_layers():
    model, eager = make().train(), make().train()
    put_something_foreign_into(model)
    put_something_foreign_into(eager)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(step(compiled, model), step(eager, eager), 1e-6)


@pytest.mark.slow
@needs_fullgraph
def test_training_in_one_graph_is_compiled_anew_for_another_length_but_once():
    model, eager = make().train(), make().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length, limit in ((50, 1), (61, 2), (90, 2), (33, 2)):
        ids, gradients = make_ids(2, length), []
        for run in (compiled, eager):
            torch.manual_seed(3)
            run(input_ids=ids, labels=ids).loss.backward()
        for one, other in zip(model.parameters(), eager.parameters(), strict=True):
            gradients.append(max_abs_diff(one.grad, other.grad) / max(1, other.grad.abs().max().item()))
        assert max(gradients) <= 1e-6
        assert graphs() <= limit


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.model.layers[0].feed_forward.dropout, "p", 0.5),
        lambda model: setattr(model.model.layers[0].feed_forward_norm, "eps", 0.1),
        lambda model: setattr(model.config, "lsh_window", 9),
        lambda model: setattr(model.config, "lsh_exploration_orders", 0),
    ],
    ids=["dropout", "eps", "window", "exploration"],
)
@needs_fullgraph
def test_a_setting_that_changes_changes_one_graph(change):
    model, eager = make().train(), make().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    before = step(compiled, model)["loss"]
    model.zero_grad()
    change(model)
    change(eager)
    found = step(compiled, model)
    assert found["loss"] != before
    assert_same(found, step(eager, eager), 1e-6)


@pytest.mark.slow
@needs_fullgraph
def test_frozen_parameters_in_one_graph():
    model, eager = make().train(), make().train()
    for some in (model, eager):
        some.model.embed_tokens.requires_grad_(False)
        some.model.layers[0].requires_grad_(False)
        some.model.layers[1].feed_forward.up_proj.weight.requires_grad_(False)
    found, expected = step(torch.compile(model, fullgraph=True, backend="aot_eager"), model), step(eager, eager)
    assert [name for name in found if found[name] is None] == [name for name in expected if expected[name] is None]
    trained = [name for name in expected if expected[name] is not None]
    assert_same({name: found[name] for name in trained}, {name: expected[name] for name in trained}, 1e-6)


@pytest.mark.slow
@needs_fullgraph
def test_ddp_makes_a_graph_of_every_bucket(monkeypatch):
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 512)
    model, eager = make().train(), make().train()
    expected = step(eager, eager)
    compiled = torch.compile(model, backend="aot_eager")
    assert_same(step(compiled, model), expected, 1e-6)  # first alone: in one graph
    model.zero_grad()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(compiled, bucket_cap_mb=0.001)
        assert_same(step(wrapped, model), expected, 1e-6)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
@needs_fullgraph
def test_one_graph_tells_that_streams_left_the_range(frozen):
    model = make(residual_precision="float32").train()
    model.model.requires_grad_(not frozen).layers[1].requires_grad_(True)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(3e3)
    with pytest.warns(RuntimeWarning, match="did not reconstruct its input exactly"):
        step(torch.compile(model, fullgraph=True, backend="aot_eager"), model)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("slices", [0, 7])
def test_compiled_parts_of_layers_are_rebuilt_exactly(bf16, slices, recwarn):
    changes = {"attn_layers": ["local", "lsh"] * 3, "chunk_size_feed_forward": slices}
    model, eager = make(**changes).train(), make(**changes).train()
    model.compile_layers(backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found, expected = step(model, model), step(eager, eager)
    assert_same(found, expected, 1e-6)
    assert not [warning for warning in recwarn if "reconstruct" in str(warning.message)]
    assert graphs() <= 24  # three parts, two kinds of layers, a few kinds of slices; not by layer


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
@pytest.mark.slow
def test_copies_compile_parts_of_their_own(copied):
    """A copy computes with its own weights, as a moving average of a model does."""
    model, eager = make().train(), make().train()
    model.compile_layers(backend="aot_eager")
    step(model, model)
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    other = copied(model)
    other.zero_grad()
    with torch.no_grad():
        for p in (*other.parameters(), *eager.parameters()):
            p.mul_(1.1)
    assert_same(step(other, other), step(eager, eager), 1e-6)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters())
    assert all("feed_forward_branch" in vars(layer) for layer in other.model.layers)


@pytest.mark.slow
def test_compiled_parts_keep_memory_flat():
    peaks = []
    for depth in (2, 6):
        model = make(num_hidden_layers=depth, attn_layers=None, max_position_embeddings=2048).train()
        model.compile_layers(backend="aot_eager")
        ids = make_ids(1, 1024)
        model(ids, labels=ids).loss.backward()  # compiles
        model.zero_grad()
        with Census(*model.parameters()) as census:
            model(ids, labels=ids).loss.backward()
        peaks.append(census.peak - sum(p.numel() * p.element_size() for p in model.parameters()))
    assert peaks[1] <= 1.02 * peaks[0]


@torch.no_grad()
@pytest.mark.parametrize(
    "backend", ["auto", *(pytest.param(b, marks=pytest.mark.slow) for b in ("torch", "reference"))]
)
@pytest.mark.parametrize(("cls", "changes"), [KINDS[0], KINDS[4]])
def test_export_with_any_batch_and_length(cls, changes, backend):
    model = make(cls, **{**changes, "attention_backend": backend}).eval()
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=256)
    shape = {0: batch, 1: length}
    exported = torch.export.export(
        model, (), {"input_ids": IDS, "attention_mask": MASK},
        dynamic_shapes={"input_ids": shape, "attention_mask": shape},
    )  # fmt: skip
    for size in ((2, 50), (3, 77), (1, 19), (2, 2), (1, 256)):
        ids, mask = make_ids(*size), torch.ones(size, dtype=torch.long)
        mask[0, size[1] // 2 :] = 0
        found, expected = exported.module()(input_ids=ids, attention_mask=mask).logits, model(ids, mask).logits
        real = mask.bool() if found.dim() == 3 else slice(None)
        assert max_abs_diff(found[real], expected[real]) <= 1e-6


@pytest.mark.slow
def test_export_of_packed_samples_of_any_length():
    model = make(is_decoder=True).eval()
    shape = {1: torch.export.Dim("length", min=3, max=256)}
    inputs = {"input_ids": make_ids(1, 24), "position_ids": torch.cat([torch.arange(10), torch.arange(14)])[None]}
    exported = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, shape))
    for sizes in ((24,), (20, 4), (5, 30, 2)):
        ids, places = make_ids(1, sum(sizes)), torch.cat([torch.arange(size) for size in sizes])[None]
        found = exported.module()(input_ids=ids, position_ids=places).logits
        assert max_abs_diff(found, model(ids, position_ids=places).logits) <= 1e-6


@pytest.mark.slow
@torch._inductor.config.patch(fallback_random=True)
@needs_fullgraph
def test_inductor_trains_and_evaluates():
    """Inductor rounds otherwise; random numbers are eager's with `fallback_random`."""
    model, eager = make().train(), make().train()
    assert_same(step(torch.compile(model, fullgraph=True), model), step(eager, eager), 1e-4)
    with torch.no_grad():
        model, eager = make().eval(), make().eval()
        found = torch.compile(model, fullgraph=True)(input_ids=IDS, attention_mask=MASK).logits
        assert max_abs_diff(found[MASK == 1], eager(IDS, MASK).logits[MASK == 1]) <= 1e-4
