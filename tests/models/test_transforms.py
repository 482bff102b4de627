"""torch.func on whole models: right in every transform, or refused in words; and what records models by tracing."""

import pytest
import torch
from conftest import SMALL_WINDOWS, make_ids, make_model, max_abs_diff
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from hf_reformer import ReformerForCausalLM, ReformerForSequenceClassification, ReformerModel

IDS = make_ids(3, 12)
MASK = torch.ones_like(IDS)
MASK[0, 8:] = 0
CHUNKS = {"attention_mode": "chunk", "lsh_attn_chunk_length": 4, "local_attn_chunk_length": 4}
MODES = pytest.mark.parametrize(
    "mode", [{}, CHUNKS, {"coverage_loss_weight": 0.1}], ids=["window", "chunk", "coverage"]
)
WEIGHT = "model.layers.1.attention.v_proj.weight"


def make(seed=0, **changes):
    return make_model(ReformerForCausalLM, seed, attn_layers=["local", "lsh", "full"], **SMALL_WINDOWS, **changes)


@MODES
def test_gradients_of_every_sample_are_those_of_each_alone(mode):
    model = make(**mode)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, row, mask):
        inputs = {"labels": row[None], "attention_mask": mask[None]}
        return functional_call(model, weights, (row[None],), inputs)["loss"]

    found = vmap(grad(loss), in_dims=(None, 0, 0))(weights, IDS, MASK)[WEIGHT]
    expected = torch.stack([grad(loss)(weights, row, mask)[WEIGHT] for row, mask in zip(IDS, MASK, strict=True)])
    assert max_abs_diff(found, expected) < 1e-8


def test_an_ensemble_gives_what_its_models_give():
    models = [make(seed) for seed in range(2)]
    state = stack_module_state(models)
    found = vmap(lambda *state: functional_call(models[0], state, (IDS,), {"attention_mask": MASK}).logits)(*state)
    expected = torch.stack([model(IDS, attention_mask=MASK).logits for model in models])
    assert max_abs_diff(found[:, MASK.bool()], expected[:, MASK.bool()]) < 1e-8


@MODES
def test_all_derivatives_agree(mode):
    model = make(**mode)
    embeds = model.get_input_embeddings()(IDS).detach()
    direction = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0), dtype=embeds.dtype)

    def along(step):
        return model(inputs_embeds=embeds + step * direction, attention_mask=MASK).logits[MASK.bool()].mean(0)

    zero = torch.zeros((), dtype=embeds.dtype)
    out, forward = jvp(along, (zero,), (torch.ones_like(zero),))
    _, backward = vjp(along, zero)
    expected = torch.stack([backward(row)[0] for row in torch.eye(len(out), dtype=out.dtype)])
    for found in (forward, jacfwd(along)(zero), jacrev(along)(zero)):
        assert max_abs_diff(found, expected) < 1e-8
    curve = lambda step: along(step).square().sum()  # noqa: E731
    assert hessian(curve)(zero).allclose(grad(grad(curve))(zero), rtol=1e-6)


def test_dropout_in_vmap_is_drawn_as_vmap_is_told():
    model = make(hidden_dropout_prob=0.3).train()
    run = lambda row: model(row[None]).logits[0]  # noqa: E731
    same = vmap(run, randomness="same")(IDS[:1].expand(2, -1))
    assert torch.equal(same[0], same[1])
    different = vmap(run, randomness="different")(IDS[:1].expand(2, -1))
    assert not torch.allclose(different[0], different[1])


@pytest.mark.parametrize("layers", [["local"], ["lsh"], ["full", "lsh"]], ids=str)
def test_torch_jit_trace_says_what_works_instead(layers):
    model = make_model(ReformerForSequenceClassification, attn_layers=layers)
    with pytest.raises(NotImplementedError, match=r"`torch.jit.trace` cannot record.*torch\.export\.export"):
        torch.jit.trace(model, (IDS,), strict=False, check_trace=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_onnx_by_torchscript_says_what_works_instead(tmp_path):
    told = r"`torch.onnx.export\(dynamo=False\)` cannot record.*torch\.export\.export.*dynamo=True"
    with pytest.raises(NotImplementedError, match=told):
        torch.onnx.export(make(), (IDS,), str(tmp_path / "x.onnx"), dynamo=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the exporter
def test_onnx_of_every_kind_of_layer_gives_the_same(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    model, inputs = make(dtype=torch.float32, is_decoder=True), {"input_ids": IDS, "attention_mask": MASK}
    torch.onnx.export(model, (), str(tmp_path / "x.onnx"), kwargs=inputs, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    found = torch.from_numpy(session.run(None, {name: x.numpy() for name, x in inputs.items()})[0])
    with torch.no_grad():
        assert max_abs_diff(found[MASK.bool()], model(**inputs).logits[MASK.bool()]) < 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the exporter
@pytest.mark.parametrize("cls", [ReformerForSequenceClassification, ReformerModel], ids=lambda cls: cls.__name__)
def test_onnx_of_any_batch_and_length(cls, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    layers = ["full", "lsh"] if cls is ReformerModel else ["local", "lsh"]
    model = make_model(cls, dtype=torch.float32, attn_layers=layers, **SMALL_WINDOWS)
    shape = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=256)}
    torch.onnx.export(
        model, (), str(tmp_path / "x.onnx"), kwargs={"input_ids": IDS, "attention_mask": MASK}, dynamo=True,
        dynamic_shapes={"input_ids": shape, "attention_mask": shape}, verbose=False,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx")
    for size in ((2, 50), (3, 77), (1, 19), (2, 2), (1, 256)):
        ids, mask = make_ids(*size), torch.ones(size, dtype=torch.long)
        mask[0, size[1] // 2 :] = 0
        found = torch.from_numpy(session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0])
        with torch.no_grad():
            expected = model(ids, mask)[0]
        real = mask.bool() if found.dim() == 3 else slice(None)
        assert max_abs_diff(found[real], expected[real]) < 1e-4


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_stack_of_full_layers_is_traced():
    model = make_model(ReformerForSequenceClassification, attn_layers=["full"])
    with torch.no_grad():
        traced = torch.jit.trace(model, (IDS,), strict=False, check_trace=False)
        assert max_abs_diff(traced(IDS.flip(0))["logits"], model(IDS.flip(0)).logits) < 1e-10
