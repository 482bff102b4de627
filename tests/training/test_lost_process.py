"""Several processes train together; one of them dies."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_one_process_ends_the_other_in_words(victim, tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"Line {i} of a small book.\n" for i in range(400)))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    options = ["--train_file", "book.txt", "--hidden_size", "16", "--attn_layers", "local", "--sequence_length", "64"]
    options += ["--use_cpu", "--eval_strategy", "no", "--save_strategy", "no", "--max_steps", "1000000"]
    options += ["--disable_tqdm", "True", "--report_to", "none", "--logging_steps", "5", "--output_dir", "out"]
    processes = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(tmp_path / f"{rank}.out", "w") as out, open(tmp_path / f"{rank}.err", "w") as err:
            command = [sys.executable, "-m", "hf_reformer", "train", "language-model", *options]
            started = subprocess.Popen(command, env=os.environ | place, cwd=tmp_path, stdout=out, stderr=err)
            processes.append(started)
    try:
        while "'loss'" not in (tmp_path / "0.out").read_text():  # both have exchanged gradients
            assert all(process.poll() is None for process in processes), (tmp_path / "0.err").read_text()[-2000:]
            time.sleep(0.2)
        os.kill(processes[victim].pid, signal.SIGKILL)
        assert processes[1 - victim].wait(timeout=60) == 2
    finally:
        for process in processes:
            process.kill()
            process.wait()
    told = (tmp_path / f"{1 - victim}.err").read_text()
    assert re.search("^hf-reformer: Another process of this run has ended", told, re.MULTILINE)
    assert "Traceback" not in told
