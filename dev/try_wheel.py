"""Install a wheel into an empty environment and test it there: python dev/try_wheel.py WHEEL [SITE_PACKAGES]

Without other libraries, every `--help` must work, and all files that the package reads must exist. With those in
SITE_PACKAGES (default: of the Python that runs this), a model must compute; if the wheel has kernels, with them and
without a compiler.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

DATA = ("hf_reformer/py.typed", "reformer_kernels/cpu/csrc/api.cpp", "reformer_kernels/cpu/csrc/params.hpp")
TRY = """
import sys, torch, hf_reformer
from hf_reformer import ReformerByteTokenizer, ReformerConfig, ReformerForCausalLM
from hf_reformer.ops.dispatch import describe_backends
assert hf_reformer.__file__.startswith(sys.prefix), hf_reformer.__file__
model = ReformerForCausalLM(ReformerConfig(vocab_size=260, max_position_embeddings=512))
ids = ReformerByteTokenizer()("a ship, a wide, calm sea", return_tensors="pt")["input_ids"]
model(ids, labels=ids).loss.backward()
model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
print(describe_backends()["cpu"])
"""


def main(wheel: str, libraries: str = sysconfig.get_paths()["purelib"]) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    missing = [name for name in DATA if name not in names]
    assert not missing, f"{wheel} lacks {missing}"
    stray = [name for name in names if re.match(r"(tests|benchmarks|experiments|dev|scripts|docs)/", name)]
    assert not stray, f"{wheel} installs {stray[:3]} beside the packages"
    kernels = [name for name in names if name.endswith("prebuilt.so")]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        python, command = (str(Path(folder, "bin", name)) for name in ("python", "hf-reformer"))
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
        subprocess.run(pip, check=True)
        run = {"cwd": folder, "check": True, "text": True, "stdout": subprocess.PIPE}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        told = subprocess.run([command, "--help"], env=clean, **run).stdout
        commands = re.findall(r"^ {4}(\w+) ", told, flags=re.MULTILINE)
        for name in commands:
            subprocess.run([command, name, "--help"], env=clean, **run)
        print(f"{len(commands)} commands: {', '.join(commands)}")
        with_libraries = clean | {"PYTHONPATH": libraries, "HF_REFORMER_CACHE": str(Path(folder, "cache"))}
        if kernels:
            with_libraries |= {"PATH": str(Path(folder, "bin"))}  # no compiler
            with_libraries.pop("CXX", None)
        backend = subprocess.run([python, "-c", TRY], env=with_libraries, **run).stdout.split()[0]
        print(f"{Path(wheel).name}: {len(kernels)} compiled kernels; attention on a CPU by {backend!r}")
        assert not kernels or backend.startswith("cpu"), backend


if __name__ == "__main__":
    main(*sys.argv[1:])
