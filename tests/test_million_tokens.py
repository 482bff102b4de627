"""The experiment that trains and infers on one very long sequence, run at a short length."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "experiments" / "million_tokens.py"


def run_script(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *args], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_both_jobs_print_time_and_peak_memory():
    done = run_script("--length", "4096", "--layers", "2", "--chunk_size_feed_forward", "1024")
    assert done.returncode == 0, done.stderr
    for job in ("train", "infer"):
        line = re.search(rf"^{job}: 4,096 tokens in \d+ s .* peak ([\d.]+) GiB resident", done.stdout, re.M)
        assert line, done.stdout
        assert 0.1 < float(line[1]) < 4
    loss = float(re.search(r"loss ([\d.]+)", done.stdout)[1])
    assert 4.5 < loss < 6.5  # an untrained model of bytes: near log 256


@pytest.mark.slow
def test_a_job_that_does_not_exist_is_refused():
    done = run_script("--jobs", "sleep")
    assert done.returncode != 0
    assert "train and infer" in done.stderr
