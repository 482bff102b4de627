"""Sources and compiler flags of the CPU kernels, and the names and digests of compiled libraries.

This file only imports the standard library, since setup.py runs it without torch.
"""

import hashlib
import platform
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
PREBUILT = Path(__file__).parent / "prebuilt"  # libraries shipped with a wheel
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-shared"]
# Compiler flags of each variant; every processor supports the last one.
VARIANTS = {
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}


def library_prefix(variant: str, sources: Path = SOURCES) -> str:
    """Return the name prefix of libraries for these sources and this machine type; the compiler's hash follows."""
    digest = hashlib.sha256()
    for source in sorted(sources.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    digest.update(" ".join([*FLAGS, *VARIANTS[variant], platform.machine()]).encode())
    return f"kernels-{variant}-{digest.hexdigest()[:16]}-"


def prebuilt_path(variant: str, folder: Path = PREBUILT, sources: Path = SOURCES) -> Path:
    """Return the path of the variant in a wheel, if included."""
    return folder / f"{library_prefix(variant, sources)}prebuilt.so"


def seal(name: str, library: bytes) -> bytes:
    """Return the digest that ends a stored library; it covers the name."""
    return hashlib.sha256(name.encode() + b"\0" + library).digest()
