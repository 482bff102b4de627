"""What the compiled CPU kernels are made of, and how a library is named and sealed.

The standard library is all that this file imports, as setup.py runs it where there is no torch.
"""

import hashlib
import platform
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
PREBUILT = Path(__file__).parent / "prebuilt"  # where a wheel brings libraries
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared"]
# What each variant asks of the compiler; every processor runs the last one.
VARIANTS = {
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}


def library_prefix(variant: str, sources: Path = SOURCES) -> str:
    """What the name of a library of these sources and this kind of machine begins with; who compiled it follows."""
    digest = hashlib.sha256()
    for source in sorted(sources.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update(" ".join([*FLAGS, *VARIANTS[variant], platform.machine()]).encode())
    return f"kernels-{variant}-{digest.hexdigest()[:16]}-"


def prebuilt_path(variant: str, folder: Path = PREBUILT, sources: Path = SOURCES) -> Path:
    """Where a wheel has the variant, if it has it."""
    return folder / f"{library_prefix(variant, sources)}prebuilt.so"


def seal(name: str, library: bytes) -> bytes:
    """The digest that a stored library ends with: only its own name fits it."""
    return hashlib.sha256(name.encode() + b"\0" + library).digest()
