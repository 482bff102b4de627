"""The benchmark for GPUs, tried on a CPU: what it plans, what its checks find, and that nothing measured is lost."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("reformer_pytorch")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # `benchmarks` is not installed

from benchmarks import checks, gpu, results  # noqa: E402
from benchmarks.cases import BOTH, NEXT, STEP, Case, Entry, Group  # noqa: E402
from benchmarks.report import write_report  # noqa: E402
from benchmarks.runner import Limits, Runner, carry_out  # noqa: E402
from benchmarks.targets import find_gpu_targets  # noqa: E402

K = 1024


@pytest.fixture(scope="module")
def planned():
    """Cases and implementations of a run on a GPU; a meta device stands for it."""
    args = SimpleNamespace(device="meta", tiny=False, only=list(gpu.SECTIONS))
    return {(*entry.case.__dict__.values(), entry.impl): entry for group in gpu.plan(args) for entry in group.entries}


def lengths(planned, section, impl, **wanted):
    entries = [x for x in planned.values() if (x.case.section, x.impl) == (section, impl)]
    return {x.case.length for x in entries if all(getattr(x.case, name) == value for name, value in wanted.items())}


def test_the_plan_holds_every_table(planned):
    for dtype, exact in (("bfloat16", "flash"), ("float32", "sdpa")):
        for impl in ("hf-reformer window", exact, "flex", "transformers", "reformer-pytorch"):
            assert {4 * K, 16 * K, 32 * K, 256 * K} <= lengths(planned, "core", impl, work=BOTH, dtype=dtype)
    for impl in ("hf-reformer", "transformers", "full"):
        assert lengths(planned, "step", impl, work=STEP, layers=6) == {16 * K, 64 * K}
        assert {K, 256 * K} <= lengths(planned, "generation", impl, work=NEXT)
    assert {K, 256 * K} <= lengths(planned, "generation", "hf-reformer recorded", work=NEXT)
    for impl in ("longformer", "bigbird", "modernbert"):
        assert lengths(planned, "classifier", impl, work=STEP, causal=False) == {16 * K, 64 * K}
    for impl in ("llama", "mistral", "mistral flex"):
        assert lengths(planned, "causal", impl, work=STEP) == {16 * K, 64 * K}
    assert 2**20 in lengths(planned, "step-growth", "hf-reformer 512 wide", work=STEP)


def test_the_goals_are_looked_up_where_the_plan_measures(planned):
    cores = {entry.impl: entry.case for entry in planned.values() if entry.case.section == "core"}
    rows = []
    for length, seconds in ((16 * K, 3.0), (32 * K, 4.0)):
        case = {"section": "core", "length": length, "work": BOTH, "dtype": "bfloat16", "device": "cuda"}
        for impl, value in (("hf-reformer window", 1.0), ("flash", seconds), ("transformers", 9.0)):
            assert impl in cores
            assert length in lengths(planned, "core", impl, work=BOTH, dtype="bfloat16")
            rows.append(results.Row(**case, quantity="time", impl=impl, seconds=value))
    assert [(goal.measured, goal.met) for goal in find_gpu_targets(rows)] == [(3.0, True), (4.0, True), (9.0, False)]


# --- checks


def test_checks_hold_every_kind_of_call():
    entries = [group.entries[0] for group in checks.groups("cpu", 128)]
    assert {entry.impl for entry in entries} == set(checks.backends("cpu"))
    cases = [entry.case for entry in entries]
    for rule in (checks.LSH, checks.LOCAL, checks.CHUNKS):
        for extra in (checks.PLAIN, checks.PADDED, checks.PACKED, checks.MASS, checks.DROPPED):
            kinds = {(x.causal, x.dtype) for x in cases if rule == x.work.split(", ")[0] and extra in x.work}
            assert len(kinds) == (0 if (rule, extra) == (checks.CHUNKS, checks.PACKED) else 4), (rule, extra)


# In bfloat16 the causal ones, in float32 the others; `tests/ops/test_dispatch.py` has both in both.
CALLS = [
    group.entries[0]
    for group in checks.groups("cpu", 128)
    if group.entries[0].impl == "torch"
    and (group.entries[0].case.layers or group.entries[0].case.causal == (group.entries[0].case.dtype == "bfloat16"))
]


@pytest.mark.parametrize("entry", CALLS, ids=lambda entry: f"{entry.case.work} {entry.case.causal} {entry.case.dtype}")
def test_pure_pytorch_agrees_with_the_reference(entry):
    assert checks.check(*entry) <= 1


@pytest.mark.parametrize("work", [f"{checks.LSH}, {checks.MASS}", checks.PACKED_MODEL])
def test_a_check_finds_a_wrong_gradient(work, monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 1.01 * grad

    from hf_reformer.ops import dispatch

    def wrong(query, key, value, *args, attend=dispatch.tiled_attention, **options):
        return attend(query, key, Wrong.apply(value), *args, **options)

    monkeypatch.setitem(dispatch.BACKENDS, "torch", wrong)
    case = Case(section="correctness", length=128, work=work, layers=2 * (work == checks.PACKED_MODEL))
    assert checks.check(case, "torch") > 1


# --- a run


def run_tiny(folder, *arguments):
    gpu.main(["--device", "cpu", "--tiny", "--output_dir", str(folder), *arguments])
    return results.load(folder / "results.csv"), (folder / "report.md").read_text(encoding="utf-8")


def test_a_tiny_run_on_a_cpu_writes_tables_goals_and_plots(tmp_path, monkeypatch):
    few, cores = checks.groups("cpu", 128)[6:10], gpu.core_groups("cpu", tiny=True)
    assert [group.quantity for group in cores[:3]] == ["time", "time", "memory"]
    monkeypatch.setattr(checks, "groups", lambda *_: few)
    monkeypatch.setattr(gpu, "core_groups", lambda *_: cores[:3])
    rows, report = run_tiny(tmp_path, "--only", "correctness", "core")
    assert "**4 of 4 calls agree with `reference`, values and every gradient.**" in report
    assert report.count("| core forward+backward, windows | flash |") == 2
    assert (tmp_path / "core_time_1_threads_bfloat16.png").is_file()
    unsupported = {row.impl for row in rows if row.status == "failed"}
    assert unsupported == {"flex"}  # which has no backward on a CPU, and the rows say so
    assert all("backward on CPU" in row.note for row in rows if row.status == "failed")
    assert {row.impl for row in rows if row.peak_bytes} >= {"hf-reformer window", "flash", "transformers"}


@pytest.mark.slow
def test_everything_runs_tiny_on_a_cpu(tmp_path):
    rows, report = run_tiny(tmp_path, "--minutes", "60")
    assert {row.section for row in rows} == {"machine", *gpu.SECTIONS}
    failed = {(row.impl, row.work) for row in rows if row.status == "failed"}
    assert failed == {("flex", BOTH), ("mistral flex", STEP)}  # no backward on a CPU
    assert not [row for row in rows if row.status == "skipped"]
    assert "calls agree with `reference`" in report


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_every_kind_of_call_agrees_with_the_reference_on_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "start_again", lambda *_: pytest.fail("a kernel left the GPU unusable"))
    gpu.main(["--only", "correctness", "--minutes", "30", "--output_dir", str(tmp_path)])
    rows = [row for row in results.load(tmp_path / "results.csv") if row.quantity == "check"]
    assert not [(row.work, row.causal, row.dtype, row.impl, row.ratio, row.note) for row in rows if row.status != "ok"]


def test_the_time_of_checks_and_of_earlier_processes_counts(tmp_path, monkeypatch):
    deadlines = []
    monkeypatch.setattr(gpu, "carry_out", lambda runner, *_: deadlines.append(runner.limits.left / 60))
    monkeypatch.setattr(gpu, "plan", lambda args: [])
    args = gpu.parse(["--device", "cpu", "--tiny", "--minutes", "5", "--first", "1", "--spent", "1"])
    gpu.measure_all(args, tmp_path / "results.csv")
    assert deadlines == [pytest.approx(0.5, abs=0.1), pytest.approx(4, abs=0.1)]  # three tenths of 5, and 5, less 1


def test_what_has_no_time_left_is_written_as_skipped(tmp_path):
    groups = [Group("time", [Entry(Case(section="core", length=128), "sdpa")])] * 2
    path = tmp_path / "results.csv"
    carry_out(Runner(Limits(0.01, 1.0, deadline=time.monotonic() - 1)), [(group, 1) for group in groups], path)
    assert [(row.status, row.note) for row in results.read(path)] == [("skipped", "out of time")] * 2


def test_a_run_goes_on_behind_the_group_that_lost_the_gpu(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(gpu.os, "execv", lambda _, command: commands.append(command))
    arguments = ["--device", "cpu", "--tiny", "--minutes", "3", "--only", "core", "step", "--output_dir", "x"]
    gpu.start_again(gpu.parse(arguments), 7, 1.5)
    again = gpu.parse(commands[0][3:])
    assert vars(again) == vars(gpu.parse(arguments)) | {"first": 7, "spent": 1.5}
    path = tmp_path / "results.csv"
    groups = [Group("time", [Entry(Case(section="core", length=length), "sdpa")]) for length in (128, 256)]
    carry_out(Runner(Limits(0.01, 1.0)), [(group, 1) for group in groups], path, first=1)
    assert [row.length for row in results.read(path)] == [256]


def test_results_of_an_earlier_run_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "measure_all", lambda args, path: results.append(path, []))
    for _ in range(2):
        gpu.main(["--device", "cpu", "--output_dir", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "results_before.csv", "report.md"}


def test_no_gpu_is_an_error_that_says_what_can_be_done(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.parse([])
    assert "`--device cpu --tiny` tries everything on a CPU" in capsys.readouterr().err


def test_failed_checks_are_counted(tmp_path):
    common = {"section": "correctness", "length": 128, "quantity": "check", "impl": "triton"}
    rows = [results.Row(**common, work="lsh, plain", status="ok", ratio=0.1)]
    rows.append(results.Row(**common, work="local, plain", status="failed", ratio=3.0))
    rows.append(results.Row(**common, work="lsh, packed", status="skipped", note="out of time"))
    results.append(tmp_path / "results.csv", rows)
    report = write_report(tmp_path / "results.csv", tmp_path, gpu.PAGE)[0].read_text(encoding="utf-8")
    assert "1 of 2 calls agree with `reference`, values and every gradient; 1 were not tried." in report
    assert "| local, plain | causal | float32 | triton | 3 | failed |" in report
