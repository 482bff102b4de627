"""The benchmarks measure what they say: the same rule for every rival, fair turns, and targets worked out rightly."""

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

from benchmarks import cores, results, run, targets  # noqa: E402
from benchmarks.cases import BOTH, FORWARD, STEP, Settings  # noqa: E402
from benchmarks.measure import TimingBudget, alternate  # noqa: E402
from benchmarks.pictures import spread  # noqa: E402
from benchmarks.plan import SECTIONS, make, plan  # noqa: E402
from benchmarks.report import write_report  # noqa: E402


def row(rival, value, quantity="time", **fields):
    numbers = {"seconds" if quantity == "time" else "peak_bytes": value}
    fields = {"section": "core", "length": 1024, "threads": 1} | fields
    return results.Row(rival=rival, quantity=quantity, **numbers, **fields)


# --- the rivals


def gradients(core, q, v):
    q, v = q.clone().requires_grad_(), v.clone().requires_grad_()
    out = core(q, v)
    return out, *torch.autograd.grad(out.square().sum(), [q, v])


@pytest.mark.parametrize("causal", [True, False])
def test_all_reformers_compute_the_same_rule(causal):
    """Two chunks that see each other show everything, whatever the hash: then all cores must agree."""
    q, v, _ = cores.inputs(2 * cores.CHUNK)
    ours = gradients(cores.our_core("chunk", 1, causal), q, v)
    for found, expected in zip(gradients(cores.built_in_core(q.shape[2], 1, causal), q, v), ours, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    scale = cores.SIZE**0.5  # reformer-pytorch scales the scores, the others leave that to the caller
    out, of_q, of_v = gradients(cores.reformer_pytorch_core(1, causal), q * scale, v)
    for found, expected in zip((out, of_q * scale, of_v), ours, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_the_local_bound_is_exact_attention_inside_chunks(causal):
    q, v, _ = cores.inputs(4 * cores.CHUNK)
    place = torch.arange(q.shape[2])
    chunk = place // cores.CHUNK
    shown = (chunk[:, None] - chunk >= 0) & (chunk[:, None] - chunk <= 1)
    shown = shown & (place[:, None] >= place) if causal else shown
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, v, attn_mask=shown)
    torch.testing.assert_close(cores.local_core(causal)(q, v), expected)


@pytest.mark.parametrize("section", list(SECTIONS))
def test_everything_in_the_plan_runs(section):
    groups = plan(Settings(lengths=[256], rounds=[2], short=True), [section])
    entries = dict.fromkeys(entry for group in groups for entry in group.entries)
    assert entries
    for case, rival in entries:
        if case.layers:
            case = replace(case, layers=2)
        make(case, rival).call()


def test_rivals_can_be_measured_one_at_a_time():
    groups = plan(Settings(lengths=[65536], rounds=[2], short=False), ["step"], ["full"])
    assert [[entry.rival for entry in group.entries] for group in groups] == [["full"]]


# --- measuring


def test_rivals_are_called_to_and_fro_and_one_that_fails_is_out():
    calls, effort = [], TimingBudget(budget=0, once_over=60, min_repeats=2)

    def failing():
        calls.append("c")
        raise ValueError("no")

    timings = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b"), "c": failing}, effort)
    assert "".join(calls) == "abc" + "ba" + "ab"
    assert [len(timing.wall) for timing in timings.values()] == [2, 2, 0]
    assert timings["c"].failure == "ValueError: no"


def test_a_slow_rival_is_called_once():
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
    path.write_text("quantity,rival\n")
    with pytest.raises(ValueError, match="other columns"):
        results.append(path, [old])


# --- what is made of it


def found(rows, what, against=None, setting=""):
    table = targets.find_targets(rows, threads=1, huge_pages=False)
    return [t for t in table if t.what == what and against in (None, t.against) and setting in t.setting]


def test_ratios_are_the_paired_ones_where_rivals_stood_in_one_group():
    rows = [row("ours chunk", 1.0, base="ours chunk 1024", ratio=1.0)]
    rows += [row("built-in", 20.0, base="ours chunk 1024", ratio=13.0), row("reformer-pytorch", 11.0)]
    built_in, other = found(rows, f"core {FORWARD}, chunks", setting="1024 tokens, causal")
    assert (built_in.measured, built_in.met) == (13.0, True)
    assert (other.measured, other.met) == (11.0, False)


def test_break_even_lies_where_exact_attention_loses_for_good():
    def pair(length, exact):
        case = {"section": "break-even", "length": length, "rounds": 1, "work": BOTH}
        return [row("ours default", 1.0, **case), row("sdpa", exact, **case)]

    rows = pair(64, 1.2) + pair(128, 0.5) + pair(512, 2.0)
    assert found(rows, f"break-even, {BOTH}")[0].measured == pytest.approx(256)
    assert not found(pair(512, 0.5), f"break-even, {BOTH}")[0].met


def test_the_floor_of_a_step_is_its_products_and_three_times_two_layers_of_attention():
    case = {"section": "step", "length": 16384, "work": STEP, "layers": 6}
    rows = [row("ours", 10.0, flops=400.0, **case), row("mm", 0.1, flops=10.0, **case)]
    rows.append(row("attention part", 1.0, **case))
    assert found(rows, STEP, "its floor")[0].measured == pytest.approx(10 / (4 + 3))


def test_shares_memory_and_growth():
    mm = row("mm", 1.0, section="ops", length=4096, flops=100.0)
    op = row("chunk attention", 2.0, section="ops", length=4096, flops=170.0)
    assert found([mm, op], f"attention alone, {FORWARD}")[0].measured == pytest.approx(0.85)
    peak = row("ours chunk", 105.0, "memory", length=16384, work=BOTH, bytes=100.0)
    assert found([peak], f"memory of core {BOTH}, chunks")[0].measured == pytest.approx(0.05)
    lines = [row("ours chunk", 1.0, section="growth"), row("ours chunk", 10.0, section="growth", length=8192)]
    assert found(lines, f"time per token, core {FORWARD}, chunks")[0].measured == pytest.approx(1.25)


def test_names_in_pictures_keep_apart():
    heights = spread([0.1, 0.1, 0.11, 0.9], 0.05)
    assert all(b - a > 0.0499 for a, b in pairwise(heights))
    assert heights[-1] == 0.9


@pytest.mark.slow
def test_results_come_in_pieces_and_are_reported_together(tmp_path):
    common = ["--short", "--threads", "1", "--budget", "0.01", "--output_dir", str(tmp_path)]
    pieces = [["--only", "core", "--lengths", "128", "256", "--quantities", "time", "--rivals", "sdpa", "local"]]
    pieces.append(["--only", "core", "--lengths", "128", "--quantities", "memory", "--rivals", "ours chunk"])
    path = tmp_path / "results.csv"
    for piece in pieces:
        run.measure_all(run.parse([*piece, *common]), path)
    made = write_report(path, tmp_path)
    assert [file.name for file in made] == ["report.md", "core_time_1_threads.png"]
    report = made[0].read_text(encoding="utf-8")
    assert report.count("| 256 | 2 | – | causal | forward |") == 1
    assert report.count(" MiB |") == 1
    assert {loaded.status for loaded in results.load(path)} <= {"ok", "once"}
