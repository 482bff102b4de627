"""The compiled C++ kernels: shipped with the package, or compiled at first use and stored in the user's cache.

There is one shared library per vector width. A stored library ends with a digest of its name and bytes. It is read,
compared with its digest and loaded from memory, so that neither a truncated file nor one that changes later can crash
the process.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import logging
import math
import os
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock

from .sources import FLAGS, PREBUILT, SOURCES, VARIANTS, library_prefix, prebuilt_path, seal

logger = logging.getLogger(__name__)

COMPILE_SECONDS = 120  # timeout of compilation
ANSWER_SECONDS = 10  # timeout of printing the compiler's version, and of loading its output
MAX_BYTES = 2**26  # maximum size of a library
LOAD = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).hf_sizeof"
REHEARSE = """
import ctypes, importlib, json, sys
sys.path[:] = json.loads(sys.argv[3])
from reformer_kernels import cpu
from reformer_kernels.cpu import library
found = ctypes.CDLL(sys.argv[1])
library.bind_functions(found)
library._library = found
importlib.import_module(sys.argv[2]).agrees(cpu)
"""


class KernelBuildError(Exception):
    """An error because no compiled kernel can be used; the message tells users why."""


class KernelDisagreementError(KernelBuildError):
    """An error because a kernel disagrees with its reference implementation."""


def supported_variants() -> list[str]:
    """Return the variants that this processor supports, best first; HF_REFORMER_CPU_VARIANT selects one of them.

    Raises:
        ValueError: the environment variable names no variant, or one that this processor does not support.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    runs = list(VARIANTS)[{"AVX512": 0, "AVX2": 1}.get(capability, 2) :]
    chosen = os.environ.get("HF_REFORMER_CPU_VARIANT")
    if chosen and chosen not in runs:
        raise ValueError(f"HF_REFORMER_CPU_VARIANT={chosen!r} is none of {runs}, which this processor runs.")
    return [chosen] if chosen else runs


def compiler() -> list[str]:
    """Return the C++ compiler and its first arguments: $CXX, else the first of c++, g++ and clang++.

    Raises:
        KernelBuildError: there is none, CXX is not a valid command or cannot be found, or this is Windows.
    """
    if sys.platform == "win32":
        raise KernelBuildError("the compiled kernels are not built on Windows")
    given = os.environ.get("CXX", "")
    try:
        chosen = shlex.split(given)
    except ValueError as error:
        raise KernelBuildError(f"CXX={given!r} is no command ({error}); correct it, or unset it") from error
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    if chosen:
        raise KernelBuildError(f"CXX={given!r} cannot be found; correct it, or unset it")
    raise KernelBuildError("there is no C++ compiler (c++, g++ or clang++; or set CXX)")


def run_limited(command: list[str], seconds: float) -> tuple[int | None, str]:
    """Run a command; return its exit status, or None if it was killed after `seconds`, and the end of its output."""
    with tempfile.TemporaryFile() as output:
        status: int | None = None
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(seconds)
        finally:
            if status is None:  # out of time, or interrupted
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(max(0, output.seek(0, os.SEEK_END) - 2000))
        return status, output.read().decode(errors="replace")


@functools.cache
def _version(command: tuple[str, ...]) -> tuple[str, str]:
    """Return the version text of a compiler, and why it cannot be used, or ""."""
    try:
        status, version = run_limited([*command, "--version"], ANSWER_SECONDS)
    except OSError as error:
        return "", f"{shlex.join(command)} cannot be run ({error}); set CXX to a C++ compiler"
    if status is None:
        return "", f"{shlex.join(command)} does not answer within {ANSWER_SECONDS} seconds; set CXX to another"
    return version, ""


# --- storage of libraries


def cache_folders() -> list[Path]:
    """Return candidate folders: $HF_REFORMER_CACHE, or those in the user's cache and in the temporary directory.

    Raises:
        KernelBuildError: there are none.
    """
    if chosen := os.environ.get("HF_REFORMER_CACHE"):
        return [Path(chosen)]
    places = []
    with contextlib.suppress(RuntimeError):  # the user has no home
        places.append(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_reformer")
    with contextlib.suppress(OSError, AttributeError):  # no writable directory; no user ids on Windows
        places.append(Path(tempfile.gettempdir(), f"hf_reformer-{os.getuid()}"))
    if not places:
        raise KernelBuildError("there is no folder for compiled kernels; set HF_REFORMER_CACHE to one")
    return places


def library_path(variant: str) -> Path:
    """Return the path of the compiled variant, existing or not. Its name has hashes of sources, compiler and flags.

    Raises:
        KernelBuildError: there is no compiler, nor a library that was compiled earlier from these sources.
    """
    prefix, folders = library_prefix(variant, SOURCES), cache_folders()
    try:
        command = compiler()
        version, fault = _version(tuple(command))
        if fault:
            raise KernelBuildError(fault)
    except KernelBuildError:
        stored = [path for folder in folders for path in sorted(folder.glob(prefix + "*.so"))]
        if stored and not os.environ.get("CXX"):  # compiled earlier, perhaps when an image was built
            return stored[0]
        raise
    name = prefix + hashlib.sha256(os.fsencode(version + shlex.join(command))).hexdigest()[:8] + ".so"
    found = [folder / name for folder in folders if os.path.lexists(folder / name)]
    return (found or [folder / name for folder in folders if _can_be_written(folder)] or [folders[0] / name])[0]


def _can_be_written(folder: Path) -> bool:
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _make_folder(folder: Path) -> None:
    for path in reversed([folder, *folder.parents]):
        if not path.is_dir():
            path.mkdir(0o755, exist_ok=True)  # not writable by others, whatever the umask


def _stranger(path: Path, status: os.stat_result) -> str | None:
    """Return who else may have written to a file or folder (its owner, a group or everyone), or None."""
    if status.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to user {status.st_uid}"
    if (
        stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX
    ):  # sticky: everyone may add files, but only change their own
        return None
    if status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid)):
        return f"others may write to {path}"
    return None


def _is_private(gid: int) -> bool:
    """Whether the user is a group's only member: many systems create a group per user, with write permission."""
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return group.gr_name == user.pw_name and user.pw_gid == gid and set(group.gr_mem) <= {user.pw_name}


def _check_folder(folder: Path) -> None:
    """Check that only the user can write to a folder.

    Raises:
        KernelBuildError: others could put a library there.
    """
    for path in (folder, *folder.parents):
        if stranger := _stranger(path, path.stat()):
            raise KernelBuildError(
                f"compiled kernels are not kept in {folder}, as {stranger}. Take the right to write from others "
                "(chmod go-w), or set HF_REFORMER_CACHE to a folder that is yours alone"
            )


def _read_file(path: Path) -> bytes:
    """Read a regular file that nobody else could have written.

    Raises:
        OSError: there is no such file, or it cannot be read.
        KernelBuildError: it is not a regular file, is too large, or others could have written it.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)  # opening a pipe would block
    with open(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise KernelBuildError(f"{path} is no library")
        if stranger := _stranger(path, status):
            raise KernelBuildError(stranger)
        return file.read()


def _read_stored(path: Path) -> bytes | None:
    """Read a stored library and check its digest, which covers its name; return None if there is none.

    Raises:
        KernelBuildError: it is unreadable or damaged, is another library, or others could have put it there.
    """
    try:
        stored = _read_file(path)
    except OSError as error:
        if os.path.isfile(path):
            raise KernelBuildError(f"{path} cannot be read ({error})") from error
        return None
    return _unsealed(path, stored)


def _unsealed(path: Path, stored: bytes) -> bytes:
    library, digest = stored[:-32], stored[-32:]
    if seal(path.name, library) != digest:
        raise KernelBuildError(f"{path} is damaged, or another library")
    return library


def _read_prebuilt(path: Path) -> bytes | None:
    """Read the library shipped with a wheel, None if there is none. It is trusted like the Python files next to it."""
    return _unsealed(path, path.read_bytes()) if path.is_file() else None


def _store(path: Path, library: bytes, folder: Path) -> None:
    """Write a library with its digest, atomically, by way of a file in `folder`."""
    written = folder / "stored"
    with open(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
        file.write(library + seal(path.name, library))
        file.flush()
        os.fsync(file.fileno())
    if _read_file(written) != library + seal(path.name, library):
        raise OSError("it is not what was written")
    written.replace(path)


# --- loading and compiling


def load_library(
    variant: str,
    check: Callable[[ctypes.CDLL], None] = lambda library: None,
    compile_missing: bool = True,
    rehearsal: str | None = None,
) -> ctypes.CDLL:
    """Load a variant: the one shipped with the package unless CXX is set, a cached one, or a newly compiled one.

    Args:
        check: raises KernelBuildError for a library that cannot be used: a stored one is then recompiled, and a new
            one is not stored.
        compile_missing: whether the variant may be compiled.
        rehearsal: a module whose `agrees` is first called in another process with a newly compiled library, which may
            crash, for example if the processor lacks its instructions.

    Raises:
        KernelBuildError: there is no compiler, it fails, or the library cannot be used.
        KernelDisagreementError: raised by `check`; nothing is recompiled.
    """
    if not os.environ.get("CXX"):
        prebuilt = prebuilt_path(variant, PREBUILT, SOURCES)
        if library := _load_stored(prebuilt, check, warn=True, read=_read_prebuilt):
            return library
    path = library_path(variant)
    try:
        if compile_missing:
            _make_folder(path.parent)
        path = path.parent.resolve() / path.name
        _check_folder(path.parent)
        if library := _load_stored(path, check, warn=True):
            return library
        if not compile_missing:
            raise KernelBuildError(f"{path} cannot be used")
        with FileLock(path.with_suffix(".lock"), timeout=COMPILE_SECONDS):
            return _load_stored(path, check, warn=False) or _compile(variant, path, check, rehearsal)
    except OSError as error:  # an unwritable cache, a lock that is never released, a library that does not load
        raise KernelBuildError(
            f"the compiled kernels cannot be stored in or loaded from {path.parent}: {error}"
        ) from error


def _load_stored(
    path: Path,
    check: Callable[[ctypes.CDLL], None],
    *,
    warn: bool,
    read: Callable[[Path], bytes | None] = _read_stored,
) -> ctypes.CDLL | None:
    """Load and check a stored library; None if there is none or it cannot be used, in which case `warn` warns."""
    try:
        stored = read(path)
        if stored is None:
            return None
        library = _load(stored)
        check(library)
        return library
    except KernelDisagreementError:
        raise
    except (KernelBuildError, OSError) as error:
        if warn:
            logger.warning("a stored attention kernel cannot be used: %s", error)
        return None


def _load(library: bytes) -> ctypes.CDLL:
    """Load a library from memory or, if that is impossible, from a temporary file."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("reformer_kernels")
        with contextlib.suppress(OSError), open(handle, "wb", closefd=False) as file:
            file.write(library)
            file.flush()
            return ctypes.CDLL(f"/proc/self/fd/{handle}")  # stays open: it is the name of the library
        os.close(handle)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernels.so").write_bytes(library)
        return ctypes.CDLL(str(Path(folder) / "kernels.so"))


def _check_length(library: bytes) -> None:
    """Raise KernelBuildError for a truncated ELF file, which ends with its section table: it might crash later."""
    if library[:5] == b"\x7fELF\x02":
        (table,) = struct.unpack_from("=Q", library.ljust(64), 40)
        if table + math.prod(struct.unpack_from("=HH", library.ljust(64), 58)) > len(library):
            raise KernelBuildError("it is cut short")


def _compile(variant: str, path: Path, check: Callable[[ctypes.CDLL], None], rehearsal: str | None) -> ctypes.CDLL:
    """Compile, check and store the variant."""
    logger.warning("compiling the %s attention kernel, once (10 to 25 seconds)", variant)
    end = time.monotonic() + COMPILE_SECONDS
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        first, last = [*compiler(), *FLAGS, *VARIANTS[variant]], [str(SOURCES / "api.cpp"), "-o", str(built)]
        for threads in (["-fopenmp"], []):  # without OpenMP (Apple, clang without libomp): own threads
            command = [*first, *threads, *last]
            status, output = run_limited(command, end - time.monotonic())
            if status is None:
                raise KernelBuildError(f"compiling took more than {COMPILE_SECONDS} seconds: {shlex.join(command)}")
            if status == 0:
                break
        else:
            raise KernelBuildError(f"compiling failed: {shlex.join(command)}\n{output}")
        try:
            compiled = _read_file(built)
            _check_length(compiled)
            if sys.executable and not getattr(sys, "frozen", False):  # another process may crash
                status, _ = run_limited([sys.executable, "-I", "-S", "-c", LOAD, str(built)], ANSWER_SECONDS)
                if status is None or status < 0:
                    raise KernelBuildError("loading it ends a process")
                if rehearsal:  # other failures will show up here
                    arguments = [str(built), rehearsal, json.dumps(list(map(str, sys.path)))]
                    status, _ = run_limited([sys.executable, "-c", REHEARSE, *arguments], end - time.monotonic())
                    if status is not None and status < 0:
                        raise KernelBuildError(f"calling it ends a process: {signal.strsignal(-status)}")
            library = _load(compiled)
            check(library)
        except KernelDisagreementError:
            raise
        except (KernelBuildError, OSError) as error:
            raise KernelBuildError(
                f"the compiler wrote no library that can be used ({error}): {shlex.join(command)}"
            ) from error
        _store(path, compiled, Path(folder))
    return library
