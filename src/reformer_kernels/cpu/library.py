"""The compiled library: its ctypes structures, how it is loaded, and which variant is in use."""

import ctypes
import logging
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from . import build

logger = logging.getLogger(__name__)


def _read_structures(header: str) -> dict[str, type[ctypes.Structure]]:
    """Parse the structures that csrc/params.hpp declares, by name."""
    structures: dict[str, type[ctypes.Structure]] = {}
    kinds: dict[str, Any] = {"int64_t": ctypes.c_int64, "double": ctypes.c_double}
    for name, body in re.findall(r"struct (\w+) \{(.*?)\};", re.sub("//.*", "", header), re.DOTALL):
        fields = []
        for kind, names in re.findall(r"(?:const )?(\w+)([^;]+);", body):
            for field in names.split(","):
                fields.append((field.strip("* "), ctypes.c_void_p if "*" in field else kinds[kind]))
        kinds[name] = structures[name] = type(name, (ctypes.Structure,), {"_fields_": fields})
    return structures


STRUCTURES = _read_structures((build.SOURCES / "params.hpp").read_text(encoding="utf-8"))
Strided, AttentionParams, DecodeParams = (STRUCTURES[name] for name in ("Strided", "AttentionParams", "DecodeParams"))
HashParams, NormalParams, SortParams = (STRUCTURES[name] for name in ("HashParams", "NormalParams", "SortParams"))
LayerParams, RotateParams, StackParams = (STRUCTURES[name] for name in ("LayerParams", "RotateParams", "StackParams"))

FUNCTIONS = {
    "hf_forward": AttentionParams, "hf_backward": AttentionParams, "hf_sweep": AttentionParams, "hf_hash": HashParams,
    "hf_normals": NormalParams, "hf_sort": SortParams, "hf_rotate": RotateParams,
    "hf_decode_attention": DecodeParams, "hf_decode_layers": StackParams,
}  # fmt: skip


def _raise_error(code: int, function: Any, arguments: Any) -> None:
    if code == 2:
        raise ValueError(f"{function.__name__}: a bucket lies outside of the number of buckets given.")
    if code:
        raise MemoryError(f"{function.__name__}: no memory left for what the kernel works with.")


def bind_functions(library: ctypes.CDLL) -> None:
    """Declare the functions of a compiled library.

    Raises:
        build.KernelBuildError: its functions or structures do not match this file.
    """
    try:
        library.hf_sizeof.restype = ctypes.c_int64
        functions = {name: getattr(library, name) for name in (*FUNCTIONS, "hf_variant")}
    except AttributeError as error:
        raise build.KernelBuildError(f"the compiled kernels lack a function: {error}") from error
    for structure in (*STRUCTURES.values(), *FUNCTIONS.values()):
        compiled, expected = library.hf_sizeof(structure.__name__.encode()), ctypes.sizeof(structure)
        if compiled != expected:
            raise build.KernelBuildError(
                f"the compiled kernels do not fit this package: their {structure.__name__} has {compiled} bytes, "
                f"not {expected}"
            )
    for name, structure in FUNCTIONS.items():
        functions[name].argtypes, functions[name].restype = [ctypes.POINTER(structure)], ctypes.c_int
        functions[name].errcheck = _raise_error
    library.hf_variant.restype = ctypes.c_char_p


_library: ctypes.CDLL | None = None


def choose_library(agrees: Callable[[], bool], rehearsal: str | None = None) -> str | None:
    """Use the best variant that compiles and `agrees` with the reference. Return why there is none, or None.

    rehearsal: as for `build.load_library`.
    """
    reason = None
    for variant in build.supported_variants():
        try:
            build.load_library(variant, partial(_try, agrees), reason is None, rehearsal)
            return None
        except build.KernelDisagreementError:
            logger.warning(
                "The %s attention kernel disagrees with its definition here and is not used. Please report this, with "
                "the processor's name.", variant
            )  # fmt: skip
        except build.KernelBuildError as error:  # a lesser variant may have been compiled earlier
            reason = reason or str(error)
    return reason or "no compiled kernel agrees with its definition here"


def _try(agrees: Callable[[], bool], library: ctypes.CDLL) -> None:
    """Use a library if it matches this package and `agrees`.

    Raises:
        build.KernelBuildError: it does not match.
        build.KernelDisagreementError: it does not agree with the reference.
    """
    global _library
    bind_functions(library)
    used = False
    _library = library
    try:
        with ThreadPoolExecutor(1) as fresh:  # a new thread, independent of the caller's grad mode and autocast
            used = fresh.submit(agrees).result()
    finally:
        _library = library if used else None
    if not used:
        raise build.KernelDisagreementError


def current_library() -> ctypes.CDLL:
    """Return the library in use; if none was chosen, that of the best variant that compiles.

    Raises:
        RuntimeError: no variant can be used.
    """
    reason = choose_library(lambda: True) if _library is None else None
    if _library is None:
        raise RuntimeError(f"the compiled CPU kernel cannot be used: {reason}")
    return _library


def current_variant() -> str:
    """Return the name of the variant in use."""
    return current_library().hf_variant().decode()
