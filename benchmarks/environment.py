"""The machine: facts about it, its matrix-product rate, its copy bandwidth."""

import os
import platform
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

from hf_reformer.ops.dispatch import select_backend

from .cases import Case, Entry, Group, Run, Settings

RATES = ("mm", "copy")
PRODUCT, PRODUCTS = 1024, 10  # size of the square matrices whose products measure the rate; products per call
COPIED = 2**27  # bytes


def facts(device: str = "cpu") -> dict[str, str]:
    """Return the facts that a reader needs to interpret the numbers."""
    like = torch.zeros(1, 1, 1, 64, device=device)
    return {
        **(gpu_facts() if device == "cuda" else {}),
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.machine()}",
        "transparent huge pages": huge_pages(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_reformer backend": select_backend("auto", like, like),
    }


def gpu_facts() -> dict[str, str]:
    """Describe the GPU, and what its kernels are compiled with."""
    found = torch.cuda.get_device_properties(0)
    return {
        "GPU": f"{found.name}, compute capability {found.major}.{found.minor}",
        "GPU memory": f"{found.total_memory / 2**30:.0f} GiB",
        "CUDA": str(torch.version.cuda),
        "triton": metadata.version("triton") if find_spec("triton") else "not installed",
    }


def processor() -> str:
    """Return the processor's model name, and the SIMD instructions that torch uses on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor() or 'unknown')}, {torch.backends.cpu.get_cpu_capability()}"


def huge_pages() -> str:
    """Return the kernel's huge-page setting, and whether torch's allocator requests them."""
    try:
        words = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().split()
    except OSError:
        words = []
    setting = next((word.strip("[]") for word in words if word.startswith("[")), "unknown")
    return f"{setting}, {'asked for' if asks_for_huge_pages() else 'not asked for'} by torch"


def asks_for_huge_pages() -> bool:
    """Return whether this process runs with `--huge_pages`."""
    return os.environ.get("THP_MEM_ALLOC_ENABLE") == "1"


def groups(settings: Settings) -> list[Group]:
    return [Group("time", [Entry(Case(section="machine", length=PRODUCT), impl) for impl in RATES])]


def make(case: Case, impl: str) -> Run:
    """Make a run. `mm`: square float32 products into memory touched before. `copy`: a long copy, read plus write."""
    if impl == "mm":
        a, b, product = (torch.randn(PRODUCT, PRODUCT) for _ in range(3))

        def multiply() -> None:
            for _ in range(PRODUCTS):
                torch.mm(a, b, out=product)

        return Run(multiply, flops=2.0 * PRODUCT**3 * PRODUCTS)
    source, target = torch.ones(COPIED // 4), torch.ones(COPIED // 4)
    return Run(lambda: target.copy_(source), bytes=2.0 * COPIED)
