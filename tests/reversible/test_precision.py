"""Half precision: autocast in bfloat16 and float16, and weights of these types, compared with float32."""

import importlib.util
from pathlib import Path

import pytest
import torch
from conftest import REPEATABLE, SMALL_WINDOWS, make_ids, make_model, max_abs_diff
from head_cases import HEADS, heads, inputs_of
from transformers import Trainer, TrainingArguments, set_seed

import hf_reformer.layers.attention
from hf_reformer import (
    ReformerConfig,
    ReformerForCausalLM,
    ReformerForCTC,
    ReformerForSequenceClassification,
    ReformerForTimeSeriesPrediction,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # of streams that were not rebuilt exactly

SCRIPT = Path(__file__).parents[2] / "experiments" / "million_tokens.py"
TOLERANCES = {torch.bfloat16: 3e-2, torch.float16: 4e-3}  # relative to the largest number
# Half precision rounds; without these it may also decide otherwise, at relu's corner or where buckets nearly tie.
SMOOTH = {"hidden_act": "gelu", "lsh_window": 128, "local_window": 128}  # windows that show every pair
halves = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
SMALL = {**SMALL_WINDOWS, "hidden_act": "relu"}  # of one head, as all have the same backbone
trained = pytest.mark.parametrize(
    ("cls", "windows"),
    [
        (ReformerForCausalLM, SMALL),
        (ReformerForSequenceClassification, {}),
        *(
            pytest.param(cls, {}, marks=pytest.mark.slow)
            for cls in HEADS
            if cls is not ReformerForSequenceClassification
        ),
    ],
)


def make_head(cls, **overrides):
    """Weights of usual size: the large ones of the other tests make half precision lose more than it does in use."""
    fields = {"num_labels": 3, "dtype": torch.float32, "initializer_range": 0.1, **SMOOTH, **overrides}
    return make_model(cls, **fields)


def flat(values) -> list[torch.Tensor]:
    """Tensors, also those of tuples among them."""
    return [x for value in values for x in (value if isinstance(value, tuple) else (value,))]


def relative_gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    return max_abs_diff(found, expected) / max(expected.abs().max().item(), 1e-3)


def run(model, cls, scale: float = 1.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients in float32, the loss scaled by `scale` in between."""
    loss = model(**inputs_of(cls), **HEADS[cls]).loss
    grads = torch.autograd.grad(loss * scale, list(model.parameters()))
    return loss.detach(), [grad.float() / scale for grad in grads]


# --- autocast


@pytest.mark.parametrize("reversible", [True, False])
@halves
@heads
def test_losses_and_gradients_under_autocast_are_close_to_float32(cls, dtype, reversible):
    model = make_head(cls, reversible=reversible, **REPEATABLE).train()
    expected, exact = run(model, cls)
    with torch.autocast("cpu", dtype=dtype):
        loss, grads = run(model, cls, scale=1024.0)
    assert loss.dtype == torch.float32
    assert relative_gap(loss, expected) <= TOLERANCES[dtype]
    size = max(grad.abs().max().item() for grad in exact)
    for found, wanted in zip(grads, exact, strict=True):
        assert max_abs_diff(found, wanted) <= TOLERANCES[dtype] * size
    assert any(max_abs_diff(found, wanted) > 1e-5 * size for found, wanted in zip(grads, exact, strict=True))


@trained
def test_a_gradient_scaler_trains_in_float16(cls, windows):
    torch.manual_seed(0)
    model = make_head(cls, hidden_dropout_prob=0.05, **windows).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scaler, losses = torch.amp.GradScaler("cpu", init_scale=2.0**12), []
    for _ in range(15):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**inputs_of(cls), **HEADS[cls]).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert norm.isfinite()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() == 2.0**12  # it never had to give way
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@heads
def test_a_scale_too_large_skips_the_step_and_is_lowered(cls):
    model = make_head(cls).train()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**28)
    taken = []
    while not any(taken) and len(taken) < 24:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**inputs_of(cls), **HEADS[cls]).loss
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        taken.append(scaler.get_scale() == scale)
        if not any(taken):
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not taken[0]
    assert taken[-1]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("cls", [ReformerForCausalLM, ReformerForSequenceClassification], ids=lambda cls: cls.__name__)
def test_the_trainer_in_bfloat16_is_close_to_float32(cls, tmp_path):
    ids = make_ids(16, 20)
    labels = ids if cls is ReformerForCausalLM else ids[:, 0] % 3
    rows = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]

    def losses(bf16: bool) -> list[float]:
        model = make_head(cls, **REPEATABLE)
        arguments = TrainingArguments(
            str(tmp_path),
            bf16=bf16,
            bf16_full_eval=bf16,
            max_steps=10,
            learning_rate=5e-3,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        assert all(p.dtype == torch.float32 for p in model.parameters())
        trained = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return [*trained, trainer.evaluate()["eval_loss"]]

    half, single = losses(True), losses(False)
    assert half == pytest.approx(single, rel=2e-2)
    assert half != single
    assert half[-1] < half[0]


# --- weights


@halves
@heads
def test_outputs_of_half_precision_weights_are_close_to_float32(cls, dtype):
    model = make_head(cls)
    with torch.no_grad():
        expected = model(**inputs_of(cls), **HEADS[cls])
        found = model.to(dtype)(**inputs_of(cls), **HEADS[cls])
        again = model(**inputs_of(cls), **HEADS[cls])
    assert found.loss.dtype == torch.float32
    assert relative_gap(found.loss, expected.loss) <= TOLERANCES[dtype]
    real = inputs_of(cls).get("attention_mask", torch.zeros(0)).bool()
    if cls is ReformerForCTC:
        real = model.model.embed_tokens.mask(real).bool()
    for x, y, same in zip(*(flat(out.to_tuple()[1:]) for out in (found, expected, again)), strict=True):
        assert x.dtype == (torch.float32 if cls is ReformerForTimeSeriesPrediction else dtype)  # units of the data
        assert torch.equal(x, same)
        x, y = (x[real], y[real]) if x.shape[:2] == real.shape else (x, y)
        assert relative_gap(x.float(), y) <= TOLERANCES[dtype]


@trained
def test_bfloat16_weights_train(cls, windows):
    torch.manual_seed(0)
    model = make_head(cls, hidden_dropout_prob=0.05, **windows).to(torch.bfloat16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(**inputs_of(cls), **HEADS[cls]).loss
        loss.backward()
        assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize(("precision", "dtype"), [("float64", torch.float64), ("float32", torch.float32)])
@pytest.mark.parametrize("reversible", [True, False])
@pytest.mark.parametrize("how", ["bf16 weights", "fp16 weights", "bf16 autocast", "fp16 autocast"])
def test_streams_and_rotations_keep_their_own_precision(how, reversible, precision, dtype, monkeypatch):
    half = torch.bfloat16 if how.startswith("bf16") else torch.float16
    fields = {"reversible": reversible, "residual_precision": precision, "local_window": 16}
    model = make_head(ReformerForCausalLM, **fields).train()
    model = model.to(half) if how.endswith("weights") else model
    streams, hashed = [], []
    lsh_buckets = hf_reformer.layers.attention.lsh_buckets

    def watched(vectors, rotations, *args):
        buckets = lsh_buckets(vectors, rotations, *args)
        hashed.append((vectors.dtype, rotations.dtype, buckets.dtype))
        return buckets

    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, out: streams.extend([*args[:2], *out]))
    monkeypatch.setattr(hf_reformer.layers.attention, "lsh_buckets", watched)
    ids = make_ids(2, 20)
    with torch.autocast("cpu", dtype=half, enabled=how.endswith("autocast")):
        model(ids, labels=ids).loss.backward()
    assert {stream.dtype for stream in streams} == {dtype}
    steps = 2.0 ** (32 if precision == "float64" else 16)
    assert all(torch.equal(stream * steps, (stream * steps).round()) for stream in streams)
    assert not torch.equal(streams[-1], streams[-1].to(half).to(dtype))
    assert set(hashed) == {(half, torch.float32, torch.int32)}


# --- a whole training


@pytest.fixture(scope="module")
def million_tokens():
    spec = importlib.util.spec_from_file_location("million_tokens", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_a_language_model_learns_as_much_in_bfloat16_autocast(million_tokens):
    text = million_tokens.read_bytes(2**20)[0]
    config = {
        "vocab_size": 256,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "attention_head_size": 32,
        "feed_forward_size": 128,
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "max_position_embeddings": 256,
        "lsh_window": 64,
        "local_window": 64,
    }

    def last_losses(bf16: bool) -> float:
        set_seed(0)
        model = ReformerForCausalLM(ReformerConfig(**config)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        draw, losses = torch.Generator().manual_seed(1), []
        for _ in range(200):
            starts = torch.randint(len(text) - 256, (4,), generator=draw)
            ids = torch.stack([text[start : start + 256] for start in starts])
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
                loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return sum(losses[-50:]) / 50

    single, half = last_losses(False), last_losses(True)
    assert single < 4  # it has learned: bytes at random are 5.5
    assert half == pytest.approx(single, rel=2e-2)
