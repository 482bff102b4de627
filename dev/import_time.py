"""Measure the startup CPU time (user and system) of the command and the package: the minimum of several processes.

python dev/import_time.py
python dev/import_time.py --required    # as if no optional libraries were installed; they slow down transformers
"""

import argparse
import resource
import subprocess
import sys

OPTIONAL = [
    *("accelerate", "datasets", "evaluate", "matplotlib", "pandas", "peft", "pyarrow", "scipy", "sklearn"),
    *("torchao", "triton", "trl"),
]
LIBRARIES = "import torch, transformers.modeling_utils"
COMMAND = "import sys; sys.argv[1:] = {}; from reformer_cli.main import main; sys.exit(main())"
HELP = (["--help"], ["train", "--help"], ["env", "--help"])
CASES = {
    "nothing": "",
    **{" ".join(["hf-reformer", *argv]): COMMAND.format(argv) for argv in HELP},
    LIBRARIES: LIBRARIES,
    "… and import hf_reformer": f"{LIBRARIES}; import hf_reformer",
    "import hf_reformer": "import hf_reformer",
    "from hf_reformer import ReformerConfig": "from hf_reformer import ReformerConfig",
}


def processor_time(code: str) -> float:
    """Measure the CPU seconds of one process that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--required", action="store_true", help="hide the optional libraries")
    parser.add_argument("--processes", type=int, default=5, metavar="N", help="processes of each kind (5)")
    args = parser.parse_args()
    hide = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL}))\n" if args.required else ""
    rounds = [{name: processor_time(hide + code) for name, code in CASES.items()} for _ in range(args.processes)]
    for name in CASES:
        print(f"{min(times[name] for times in rounds):6.2f} s  {name}")


if __name__ == "__main__":
    main()
