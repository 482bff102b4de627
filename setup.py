"""With HF_REFORMER_PREBUILT=1, a wheel brings compiled kernels, so that its users need no compiler.

    HF_REFORMER_PREBUILT=1 python -m build --wheel

OpenMP is left out: its library would have to come along, and torch has one of its own. The kernels then start threads
themselves. Everything else is in pyproject.toml.
"""

import importlib.util
import os
import platform
import shlex
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py
from setuptools.dist import Distribution

PREBUILT = os.environ.get("HF_REFORMER_PREBUILT") == "1"
CPU = Path(__file__).parent / "src" / "reformer_kernels" / "cpu"


def compile_kernels(folder: Path) -> None:
    """Every variant that a processor of this kind may run, into a folder."""
    spec = importlib.util.spec_from_file_location("sources", CPU / "sources.py")  # the package would import torch
    sources = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sources)
    folder.mkdir(parents=True, exist_ok=True)
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    for variant, flags in sources.VARIANTS.items():
        if flags and not on_x86:
            continue
        path = sources.prebuilt_path(variant, folder)
        command = [*shlex.split(os.environ.get("CXX", "c++")), *sources.FLAGS, "-s", *flags]
        subprocess.run([*command, str(CPU / "csrc" / "api.cpp"), "-o", str(path)], check=True)
        library = path.read_bytes()
        path.write_bytes(library + sources.seal(path.name, library))


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        if PREBUILT:
            compile_kernels(Path(self.build_lib) / "reformer_kernels" / "cpu" / "prebuilt")


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return PREBUILT


class WheelOfThePlatform(bdist_wheel):
    """For any Python 3, and with kernels for one platform: they are called through ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(distclass=PlatformDistribution, cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelOfThePlatform})
