"""What is imported, in fresh processes: by the help of a command nothing but Python's own, by the package little."""

import json
import re
import subprocess
import sys
from functools import cache

import pytest

from reformer_cli.main import make_parser

# Slow to import. transformers brings some of them in by itself, others where they are installed.
SLOW = {
    *("accelerate", "datasets", "evaluate", "matplotlib", "pandas", "peft", "pyarrow", "scipy", "sklearn", "sympy"),
    *("torch._dynamo", "torch._inductor", "torchao", "triton"),
}
OPTIONAL = SLOW - {"sympy", "torch._dynamo", "torch._inductor"}
COMMANDS = re.findall(r"^ {4}(\w+) ", make_parser().format_help(), flags=re.MULTILINE)
HELP = [["--help"], *([name, "--help"] for name in COMMANDS), ["train"]]
RUN = "import sys; from reformer_cli.main import main; sys.exit(main(sys.argv[1:]))"


def imported(code, *argv):
    """Names of the modules of a process that ran `code`, and its exit status."""
    report = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
    done = subprocess.run([sys.executable, "-c", report + code, *argv], capture_output=True, text=True, timeout=300)
    return set(done.stderr.splitlines()[-1].split()), done.returncode


@pytest.fixture(scope="module")
def bare():
    return imported("")[0]  # what site-packages brings into every process


@pytest.mark.parametrize("argv", [*HELP, ["train", "poetry"]])
def test_help_and_mistakes_import_nothing_but_python(argv, bare):
    modules, status = imported(RUN, *argv)
    assert status == (0 if argv in HELP else 2)
    assert {"env", "generate", "train"} < set(COMMANDS)
    others = {name.partition(".")[0] for name in modules - bare} - sys.stdlib_module_names
    assert others == {"reformer_cli"}


IMPORT_PACKAGE = """
import json, os, sys
import torch  # once for all that are forked from here

def found():
    return [name for name, module in sys.modules.items() if module is not None]

for missing in json.loads(sys.argv[1]):
    if os.fork():
        os.wait()
        continue
    if missing is None:
        import reformer_kernels.cpu, reformer_kernels.triton
        print(json.dumps(found()), flush=True)
        os._exit(0)
    sys.modules.update(dict.fromkeys(missing))  # as if they were not installed
    import transformers.modeling_utils
    before = found()
    from hf_reformer import *
    from hf_reformer import ReformerConfig
    print(json.dumps([before, found()]), flush=True)
    os._exit(0)
"""
CASES = {"all libraries": [], "required libraries": sorted(OPTIONAL), "kernels alone": None}


FAST = ("required libraries", "kernels alone")


@cache
def modules_of(*cases):
    """What one process's children have imported, each in its case."""
    command = [sys.executable, "-c", IMPORT_PACKAGE, json.dumps([CASES[case] for case in cases])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    return dict(zip(cases, map(json.loads, lines), strict=True))


@pytest.mark.parametrize(
    "cases", [FAST, pytest.param(("all libraries",), marks=pytest.mark.slow)], ids=lambda cases: cases[0]
)
def test_the_package_imports_nothing_slow_that_transformers_does_not(cases):
    """A time would depend on the machine; `dev/import_time.py` takes it."""
    before, after = map(set, modules_of(*cases)[cases[0]])
    added = after - before
    assert {"hf_reformer", "hf_reformer.models.seq2seq", "reformer_kernels.cpu"} <= added
    assert not added & SLOW
    assert len(added) < 0.15 * len(before)


def test_kernels_import_neither_models_nor_transformers():
    found = set(modules_of(*FAST)["kernels alone"])
    assert {"reformer_kernels.cpu", "reformer_kernels.triton"} <= found
    assert not {"hf_reformer", "transformers"} & found


def test_ctrl_c_while_a_command_imports_ends_it_without_a_traceback():
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs of a shell begin without
        "class Impatient:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Impatient())\n"
    )
    done = subprocess.run([sys.executable, "-c", code + RUN, "env"], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
