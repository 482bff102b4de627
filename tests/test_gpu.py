"""What a CUDA GPU adds: `pytest -m gpu`. Sizes are small; most of the time goes into compiling kernels."""

import contextlib
import itertools

import pytest
import torch
from attention_cases import TOLERANCES, Case
from conftest import REPEATABLE, SMALL_WINDOWS, make_ids, make_model, max_abs_diff, relative_error
from transformers import Trainer, TrainingArguments, set_seed

from hf_reformer import ReformerForCausalLM, ReformerForMaskedLM, ReformerForSequenceClassification
from hf_reformer.cache import ReformerCache
from hf_reformer.models.recorded_step import RecordedStep
from hf_reformer.ops import lsh
from hf_reformer.ops.dispatch import describe_backends, lsh_buckets, select_backend, windowed_attention
from hf_reformer.ops.prng import make_key

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    pytest.mark.filterwarnings("error::RuntimeWarning"),  # of streams that were not rebuilt exactly
]
DEVICE, KERNEL = "cuda", "triton"
SIZE = 64  # one head size, so that most kernels are compiled once
WIDE = {"hidden_size": 2 * SIZE, "attention_head_size": SIZE, "dtype": torch.float32, **SMALL_WINDOWS}


@pytest.fixture(autouse=True)
def chosen_by_itself(monkeypatch):
    monkeypatch.delenv("HF_REFORMER_BACKEND", raising=False)


def make(cls=ReformerForCausalLM, **changes):
    return make_model(cls, **{**WIDE, "initializer_range": 0.1, **changes}).to(DEVICE)


def ids_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return make_ids(*shape, seed=seed).to(DEVICE)


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def trained(model, ids, autocast: torch.dtype | None = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a step in training mode that draws the same keys every time."""
    set_seed(0)
    model.train().zero_grad()
    with torch.autocast(DEVICE, dtype=autocast) if autocast else contextlib.nullcontext():
        loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), gradients(model)


# --- the op


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_auto_takes_the_kernels(dtype):
    x = torch.zeros(1, 2, 8, SIZE, dtype=dtype, device=DEVICE)
    assert select_backend("auto", x, x) == KERNEL


def test_the_device_is_described():
    assert KERNEL in describe_backends().values()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("mode", "shared", "causal", "dropout"),
    list(itertools.product(["window", "chunk"], [True, False], [True, False], [0.0, 0.3])),
)
def test_auto_equals_the_reference(dtype, mode, shared, causal, dropout):
    case = Case(mode=mode, shared=shared, causal=causal, dropout=dropout, length=120, window=12, size=SIZE,
                value_size=SIZE)  # fmt: skip
    inputs = [(x * SIZE**-0.5).to(dtype) for x in case.inputs]
    grad_out = case.draw(*inputs[2].shape).to(dtype)

    def results(device, backend, dtype):
        query, key, value = (x.to(device, dtype).requires_grad_() for x in inputs)
        layout = case.layout._replace(**{name: x.to(device) for name, x in case.layout._asdict().items()
                                         if isinstance(x, torch.Tensor)})  # fmt: skip
        options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in case.options.items()}
        weights = torch.rand(2, 120, generator=torch.Generator().manual_seed(0)).to(device)
        out, mass = windowed_attention(
            query, None if shared else key, value, layout, **options, query_weights=weights, backend=backend
        )
        leaves = [query, value] if shared else [query, key, value]
        grads = torch.autograd.grad((out, mass.sum()), leaves, (grad_out.to(device, dtype), mass.new_ones(())))
        return [out, mass, *grads]

    expected = results("cpu", "reference", torch.float64)
    for a, b in zip(results(DEVICE, "auto", dtype), expected, strict=True):
        tolerance = 1e-4 if dtype == torch.float32 else TOLERANCES[dtype]
        assert max_abs_diff(a.cpu(), b) <= tolerance * max(1, b.abs().max().item())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_buckets_are_those_of_the_torch_backend(causal, packed):
    vectors = torch.randn(2, 2, 1000, SIZE, generator=torch.Generator().manual_seed(0)) + 0.5
    samples = (torch.arange(1000) // 300).int().expand(2, -1) if packed else None
    mask = torch.rand(2, 1000, generator=torch.Generator().manual_seed(1)) > 0.1
    rotations = lsh.window_rotations(make_key(0), 0, 2, SIZE, 2, (4, 16))
    expected = lsh.lsh_buckets(vectors, rotations, (4, 16), lsh.Centering(causal, mask, samples))
    there = lsh.Centering(causal, mask.to(DEVICE), None if samples is None else samples.to(DEVICE))
    found = lsh_buckets(vectors.to(DEVICE), rotations.to(DEVICE), (4, 16), there)
    assert (found.cpu() != expected).float().mean() <= 1e-3  # near-ties


# --- no waiting


@contextlib.contextmanager
def no_waiting():
    """An error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_a_training_step_does_not_wait_for_the_device(reversible, mask):
    model, ids = make(reversible=reversible, lsh_attention_probs_dropout_prob=0.1).train(), ids_of(2, 100)
    options = {"labels": ids}
    if mask:
        options["attention_mask"] = torch.ones_like(ids).index_fill(1, torch.arange(90, 100, device=DEVICE), 0)
    model(ids, **options).loss.backward()  # compiles
    torch.cuda.synchronize()
    with no_waiting():
        model(ids, **options).loss.backward()


@torch.no_grad()
def test_a_decode_step_does_not_wait_for_the_device():
    model, ids = make(), ids_of(2, 100)
    cache = model(ids[:, :97], use_cache=True).past_key_values
    model(ids[:, 97:98], past_key_values=cache, use_cache=True)
    torch.cuda.synchronize()
    with no_waiting():
        model(ids[:, 98:99], past_key_values=cache, use_cache=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_mode": "chunk"},
        {"position_embedding_type": "axial", "axial_pos_shape": (8, 8), "max_position_embeddings": 64},
    ],
    ids=str,
)
@torch.no_grad()
def test_filling_a_cache_does_not_wait_for_the_device(changes):
    model, ids = make(**changes), ids_of(2, 80)
    options = {"use_cache": True}
    if "axial_pos_shape" in changes:  # which covers no more than the real tokens
        options["attention_mask"] = torch.ones_like(ids).index_fill(1, torch.arange(60, 80, device=DEVICE), 0)
    model(ids, **options)
    torch.cuda.synchronize()
    with no_waiting():
        model(ids, **options)


# --- CUDA graphs


def test_a_graph_records_forward_and_backward():
    model, ids, others = make(**REPEATABLE).train(), ids_of(2, 64), ids_of(2, 64, seed=1)

    def step():
        model.zero_grad(set_to_none=False)
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    ids.copy_(others)
    graph.replay()
    found = loss.clone(), gradients(model)
    expected = step(), gradients(model)
    assert max_abs_diff(found[0], expected[0]) <= 1e-5
    assert relative_error(found[1], expected[1]) <= 1e-5


def test_graphs_of_compiled_models():
    model, ids = make().eval(), ids_of(2, 64)
    compiled = torch.compile(model, mode="reduce-overhead")
    with torch.no_grad():
        expected = model(ids).logits
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            found = compiled(ids).logits.clone()
    assert max_abs_diff(found, expected) <= 1e-3


@pytest.mark.parametrize("padded", [True, False])
@torch.no_grad()
def test_a_graph_records_a_decode_step(padded):
    model, ids, mask = make(), ids_of(2, 40), torch.ones(2, 40, dtype=torch.int64, device=DEVICE)
    mask[0, :5] = 0 if padded else 1
    expected = model(ids, attention_mask=mask).logits[:, 30:]
    cache = ReformerCache(model.config, max_cache_len=40)
    model(ids[:, :30], attention_mask=mask[:, :30], cache=cache)
    step = RecordedStep(model, cache)
    found = torch.cat([step(ids[:, at : at + 1]) for at in range(30, 40)], dim=1)
    assert max_abs_diff(found, expected) <= 1e-3 * max(1, expected.abs().max().item())


# --- training


@pytest.mark.parametrize("mode", ["window", "chunk"])
def test_reversible_gradients_are_plain_ones(mode):
    changes = {"attention_mode": mode, "lsh_attention_probs_dropout_prob": 0.2}
    ids, found = ids_of(2, 80), []
    for reversible in (True, False):
        found.append(trained(make(reversible=reversible, **changes), ids))
    assert max_abs_diff(found[0][0], found[1][0]) <= 1e-6
    assert relative_error(found[0][1], found[1][1]) <= 1e-5


def test_the_gpu_trains_as_the_cpu():
    model, ids = make(**REPEATABLE), make_ids(2, 80)
    loss, grads = trained(model, ids.to(DEVICE))
    expected, expected_grads = trained(model.cpu(), ids, None)
    assert max_abs_diff(loss.cpu(), expected) <= 1e-4
    assert relative_error({name: x.cpu() for name, x in grads.items()}, expected_grads) <= 1e-2  # a near-tie, perhaps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reversible", [True, False])
def test_autocast_is_close_to_float32(dtype, reversible):
    smooth = {"lsh_window": 128, "local_window": 128, "hidden_act": "gelu", "reversible": reversible}
    model, ids = make(**smooth, **REPEATABLE), ids_of(2, 60)
    expected, expected_grads = trained(model, ids)
    found, grads = trained(model, ids, autocast=dtype)
    assert (found - expected).abs() <= 3e-2 * expected
    assert relative_error(grads, expected_grads) <= 6e-2


def test_a_gradient_scaler_trains_in_float16():
    model, ids = make().train(), ids_of(4, 60)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.amp.GradScaler(DEVICE)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss = model(ids, labels=ids).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("cls", [ReformerForCausalLM, ReformerForMaskedLM, ReformerForSequenceClassification])
def test_heads_train_in_bfloat16_weights(cls):
    model = make(cls, dtype=torch.bfloat16, is_decoder=cls is ReformerForCausalLM).train()
    ids = ids_of(2, 50)
    labels = torch.tensor([0, 1], device=DEVICE) if cls is ReformerForSequenceClassification else ids
    loss = model(ids, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def run_trainer(folder, resume: bool = False, **options) -> dict[str, torch.Tensor]:
    set_seed(0)
    model = make(lsh_attention_probs_dropout_prob=0.1)
    data = [{"input_ids": row, "labels": row} for row in make_ids(16, 40)]
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=6, save_steps=3, learning_rate=1e-3,
        report_to=[], use_cpu=DEVICE == "cpu", disable_tqdm=True, logging_steps=1, **options,
    )  # fmt: skip
    checkpoint = f"{folder}/checkpoint-3" if resume else None
    Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=checkpoint)
    return {name: x.detach().cpu() for name, x in model.named_parameters()}


def test_a_resumed_run_ends_where_the_uninterrupted_one_does(tmp_path):
    whole = run_trainer(tmp_path, bf16=True)
    again = run_trainer(tmp_path, resume=True, bf16=True)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_gradient_checkpointing_trains_alike(tmp_path):
    plain = run_trainer(tmp_path / "plain")
    checkpointed = run_trainer(tmp_path / "checkpointed", gradient_checkpointing=True)
    assert relative_error(checkpointed, plain) <= 1e-4


def test_compiled_training_is_close_to_eager():
    model, ids = make(**REPEATABLE), ids_of(2, 64)
    expected, expected_grads = trained(model, ids)
    set_seed(0)
    model.zero_grad()
    loss = torch.compile(model, backend="aot_eager")(ids, labels=ids).loss
    loss.backward()
    assert max_abs_diff(loss.detach(), expected) <= 1e-3
    assert relative_error(gradients(model), expected_grads) <= 1e-2


# --- generation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_every_step_gives_what_one_forward_gives(dtype):
    model, ids = make(dtype=dtype), ids_of(2, 60)
    expected = model(ids).logits
    outputs = model(ids[:, :50], use_cache=True)
    logits, cache = [outputs.logits], outputs.past_key_values
    for at in range(50, 60):
        logits.append(model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    assert max_abs_diff(torch.cat(logits, 1), expected) <= tolerance * max(1, expected.abs().max().item())


def test_generate_goes_on():
    model, ids = make(), ids_of(2, 20)
    assert model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None).shape == (2, 28)
