"""The benchmarks: the same rule for every implementation, fair turns, and targets computed correctly."""

import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("reformer_pytorch")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `benchmarks` is not installed

from benchmarks import attention_impls, results, rivals, run, targets  # noqa: E402
from benchmarks.cases import BOTH, FORWARD, STEP, Case, Settings  # noqa: E402
from benchmarks.measure import TimingBudget, alternate  # noqa: E402
from benchmarks.plan import SECTIONS, make, plan  # noqa: E402
from benchmarks.plots import spread  # noqa: E402
from benchmarks.report import write_report  # noqa: E402


def row(impl, value, quantity="time", **fields):
    numbers = {"seconds" if quantity == "time" else "peak_bytes": value}
    fields = {"section": "core", "length": 1024, "threads": 1} | fields
    return results.Row(impl=impl, quantity=quantity, **numbers, **fields)


# --- the implementations


def gradients(core, q, v):
    q, v = q.clone().requires_grad_(), v.clone().requires_grad_()
    out = core(q, v)
    return out, *torch.autograd.grad(out.square().sum(), [q, v])


@pytest.mark.parametrize("causal", [True, False])
def test_all_reformers_compute_the_same_rule(causal):
    """Two chunks that see each other show everything, whatever the hash: then all cores agree."""
    q, v, _ = attention_impls.inputs(2 * attention_impls.CHUNK)
    ours = gradients(attention_impls.hf_reformer_core("chunk", 1, causal), q, v)
    for found, expected in zip(
        gradients(attention_impls.transformers_core(q.shape[2], 1, causal), q, v), ours, strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    scale = attention_impls.SIZE**0.5  # reformer-pytorch scales the scores, the others leave that to the caller
    out, of_q, of_v = gradients(attention_impls.reformer_pytorch_core(1, causal), q * scale, v)
    for found, expected in zip((out, of_q * scale, of_v), ours, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_the_local_bound_is_exact_attention_inside_chunks(causal):
    q, v, _ = attention_impls.inputs(4 * attention_impls.CHUNK)
    position = torch.arange(q.shape[2])
    chunk = position // attention_impls.CHUNK
    visible = (chunk[:, None] - chunk >= 0) & (chunk[:, None] - chunk <= 1)
    visible = visible & (position[:, None] >= position) if causal else visible
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, v, attn_mask=visible)
    torch.testing.assert_close(attention_impls.local_core(causal)(q, v), expected)


LENGTHS = {"bigbird": 384, "mamba": 64}  # it takes blocks only from there on; its loop over tokens is slow


LONG = ("classifier", "depth")


@pytest.mark.parametrize(
    "section", [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in SECTIONS]
)
def test_everything_in_the_plan_runs(section):
    groups = plan(Settings(lengths=[256], rounds=[2], short=section not in ("classifier", "causal")), [section])
    entries = dict.fromkeys(entry for group in groups for entry in group.entries if entry.impl != "mistral flex")
    assert entries
    for case, impl in entries:
        if case.layers:
            case = replace(case, layers=2)
        make(replace(case, length=LENGTHS.get(impl, case.length)), impl).call()


def test_implementations_can_be_measured_one_at_a_time():
    groups = plan(Settings(lengths=[65536], rounds=[2], short=False), ["step"], ["full"])
    assert [[entry.impl for entry in group.entries] for group in groups] == [["full"]]


# --- what people choose instead


def seen_by(impl, causal, position, length=512, training=False):
    """Tokens that one token's output depends on, in the last layer of a model."""
    case = Case(section="causal" if causal else "classifier", length=length, causal=causal, layers=2)
    torch.manual_seed(0)
    model = rivals.make_model(case, impl).train(training)
    base = getattr(model, model.base_model_prefix)
    stack = base if hasattr(base, "layers") else base.encoder
    kept = "layers" if hasattr(stack, "layers") else "layer"
    setattr(stack, kept, torch.nn.ModuleList([getattr(stack, kept)[-1]]))
    inputs = torch.randn(1, length, 512, requires_grad=True)
    out = base(inputs_embeds=inputs).last_hidden_state[0, position]
    (grad,) = torch.autograd.grad((out * torch.linspace(-1, 2, len(out)).square()).sum(), inputs)
    return grad[0].abs().amax(-1).nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("impl", "causal", "expected"),
    [
        ("longformer", False, range(300 - 128, 300 + 129)),
        ("modernbert", False, range(300 - 128, 300 + 129)),
        ("mistral", True, range(300 - 255, 301)),
        ("llama", True, range(301)),
    ],
)
def test_rivals_see_what_the_report_says(impl, causal, expected):
    assert seen_by(impl, causal, 300) == list(expected)


def test_bigbird_attends_in_blocks():
    """Those around the token, the first, the last, and in training random ones, in every head others."""
    fixed = {0, 8, 9, 10, 15}
    assert {token // 32 for token in seen_by("bigbird", False, 300)} == fixed
    seen = seen_by("bigbird", False, 300, training=True)
    assert fixed < {token // 32 for token in seen}
    assert len(seen) % 32 == 0
    with pytest.raises(ValueError, match="length 352: up to 352 tokens, BigBird"):
        rivals.bigbird(352, 1)


@pytest.mark.parametrize(
    ("impl", "causal"), [(impl, False) for impl in rivals.CLASSIFIERS] + [(impl, True) for impl in rivals.CAUSAL]
)
def test_rivals_have_the_same_sizes_and_no_dropout(impl, causal):
    case = Case(section="", length=512, causal=causal, layers=2)
    model = rivals.make_model(case, impl)
    config = getattr(model, "config", None) or model.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (512, 2, 320)
    assert getattr(config, "num_attention_heads", 8) == 8
    assert all(module.p == 0 for module in model.modules() if isinstance(module, torch.nn.Dropout))
    dropouts = {name: value for name, value in config.to_dict().items() if "drop" in name and value}
    assert not dropouts
    model.train()
    tokens = torch.randint(2, 320, (1, 512 if impl == "bigbird" else 64))
    outputs = [model(input_ids=tokens).logits for _ in range(2)]
    if impl not in ("hf-reformer", "bigbird"):  # these draw hash rotations, or blocks
        assert torch.equal(*outputs)


def test_flex_attention_gets_sliding_windows():
    case = Case(section="core", length=512, rounds=2)
    q, v, _ = attention_impls.inputs(512)
    position = torch.arange(512)
    distance = position[:, None] - position
    visible = (distance >= 0) & (distance < 2 * attention_impls.WINDOW)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, v, attn_mask=visible)
    torch.testing.assert_close(attention_impls.flex_core(case)(q, v), expected, rtol=1e-4, atol=1e-4)


# --- measuring


def test_implementations_are_called_back_and_forth_and_one_that_fails_is_out():
    calls, budget = [], TimingBudget(budget=0, once_over=60, min_repeats=2)

    def failing():
        calls.append("c")
        raise ValueError("no")

    timings = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b"), "c": failing}, budget)
    assert "".join(calls) == "abc" + "ba" + "ab"
    assert [len(timing.wall) for timing in timings.values()] == [2, 2, 0]
    assert timings["c"].failure == "ValueError: no"


def test_a_slow_implementation_is_called_once():
    calls = []
    timings = alternate({"a": lambda: calls.append("a")}, TimingBudget(budget=0, once_over=0))
    assert calls == ["a"]
    assert timings["a"].once


def test_a_measured_row_outlives_a_later_one_without_a_number(tmp_path):
    path = tmp_path / "results.csv"
    old, new = row("sdpa", 1.0), row("sdpa", 2.0)
    results.append(path, [old])
    results.append(path, [new, replace(old, seconds=None, status="skipped")])
    assert results.load(path) == [new]
    path.write_text("quantity,impl\n")
    with pytest.raises(ValueError, match="other columns"):
        results.append(path, [old])


def test_older_names_of_options_and_results_still_work(tmp_path):
    path = tmp_path / "results.csv"
    results.append(path, [row("ours chunk", 1.0, base="ours chunk 1024"), row("built-in", 2.0)])
    path.write_text(path.read_text().replace("impl", "rival"))
    current = [row("hf-reformer chunk", 1.0, base="hf-reformer chunk 1024"), row("transformers", 2.0)]
    results.append(path, [row("sdpa", 3.0)])
    assert results.load(path) == [*current, row("sdpa", 3.0)]
    assert run.parse(["--rivals", "ours", "full"]).impls == ["hf-reformer", "full"]


# --- what is made of it


def found(rows, what, against=None, setting=""):
    table = targets.find_targets(rows, threads=1, huge_pages=False)
    return [t for t in table if t.what == what and against in (None, t.against) and setting in t.setting]


def test_ratios_are_the_paired_ones_measured_in_one_group():
    rows = [row("hf-reformer chunk", 1.0, base="hf-reformer chunk 1024", ratio=1.0)]
    rows += [row("transformers", 20.0, base="hf-reformer chunk 1024", ratio=13.0), row("reformer-pytorch", 11.0)]
    transformers, other = found(rows, f"core {FORWARD}, chunks", setting="1024 tokens, causal")
    assert (transformers.measured, transformers.met) == (13.0, True)
    assert (other.measured, other.met) == (11.0, False)


def test_break_even_lies_where_exact_attention_loses_for_good():
    def pair(length, exact):
        case = {"section": "break-even", "length": length, "rounds": 1, "work": BOTH}
        return [row("hf-reformer default", 1.0, **case), row("sdpa", exact, **case)]

    rows = pair(64, 1.2) + pair(128, 0.5) + pair(512, 2.0)
    assert found(rows, f"break-even, {BOTH}")[0].measured == pytest.approx(256)
    assert not found(pair(512, 0.5), f"break-even, {BOTH}")[0].met


def test_the_floor_of_a_step_is_its_products_and_three_times_two_layers_of_attention():
    case = {"section": "step", "length": 16384, "work": STEP, "layers": 6}
    rows = [row("hf-reformer", 10.0, flops=400.0, **case), row("mm", 0.1, flops=10.0, **case)]
    rows.append(row("attention part", 1.0, **case))
    assert found(rows, STEP, "its floor")[0].measured == pytest.approx(10 / (4 + 3))


def test_shares_memory_and_growth():
    mm = row("mm", 1.0, section="ops", length=4096, flops=100.0)
    op = row("chunk attention", 2.0, section="ops", length=4096, flops=170.0)
    assert found([mm, op], f"attention alone, {FORWARD}")[0].measured == pytest.approx(0.85)
    peak = row("hf-reformer chunk", 105.0, "memory", length=16384, work=BOTH, bytes=100.0)
    assert found([peak], f"memory of core {BOTH}, chunks")[0].measured == pytest.approx(0.05)
    lines = [
        row("hf-reformer chunk", 1.0, section="growth"),
        row("hf-reformer chunk", 10.0, section="growth", length=8192),
    ]
    assert found(lines, f"time per token, core {FORWARD}, chunks")[0].measured == pytest.approx(1.25)


def test_the_report_says_where_others_are_faster(tmp_path):
    case = {"section": "classifier", "causal": False, "work": STEP, "layers": 6, "base": "hf-reformer 1024"}
    rows = [row("hf-reformer", 1.0, ratio=1.0, **case), row("longformer", 2.0, ratio=2.0, **case)]
    rows.append(row("modernbert", 0.5, ratio=0.5, **case))
    results.append(tmp_path / "results.csv", rows)
    report = write_report(tmp_path / "results.csv", tmp_path)[0].read_text(encoding="utf-8")
    assert "Here others are faster than hf-reformer: modernbert at 1024 tokens, training step (0.50)." in report


def test_names_in_plots_keep_apart():
    heights = spread([0.1, 0.1, 0.11, 0.9], 0.05)
    assert all(b - a > 0.0499 for a, b in pairwise(heights))
    assert heights[-1] == 0.9


@pytest.mark.slow
def test_results_come_in_pieces_and_are_reported_together(tmp_path):
    common = ["--short", "--threads", "1", "--budget", "0.01", "--output_dir", str(tmp_path)]
    pieces = [["--only", "core", "--lengths", "128", "256", "--quantities", "time", "--impls", "sdpa", "local"]]
    pieces.append(["--only", "core", "--lengths", "128", "--quantities", "memory", "--impls", "hf-reformer chunk"])
    path = tmp_path / "results.csv"
    for piece in pieces:
        run.measure_all(run.parse([*piece, *common]), path)
    made = write_report(path, tmp_path)
    assert [file.name for file in made] == ["report.md", "core_time_1_threads.png"]
    report = made[0].read_text(encoding="utf-8")
    assert report.count("| 256 | 2 | – | causal | forward |") == 1
    assert report.count(" MiB |") == 1
    assert {loaded.status for loaded in results.load(path)} <= {"ok", "once"}
