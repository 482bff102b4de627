"""Compiling the C++ kernel on first use: once, announced, and never a reason to fail."""

import ctypes
import logging
import multiprocessing
import os
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from fuzzing import seeds

from hf_reformer.ops import dispatch
from hf_reformer.ops.dispatch import select_backend, windowed_attention
from hf_reformer.ops.layout import window_layout
from reformer_kernels.cpu import build, library, sources

VARIANT = build.supported_variants()[-1]


@pytest.fixture
def attend(monkeypatch, caplog):
    """Attention as where it is first used, with a cache of its own: which backend served, and what was logged."""

    def forget():
        dispatch.check_library.cache_clear()
        dispatch._warn_once.cache_clear()

    def run(cache: Path, **environment: str) -> tuple[str, str]:
        own = {"HF_REFORMER_CACHE": str(cache), "HF_REFORMER_CPU_VARIANT": VARIANT}
        for name, value in {**own, **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(library, "_library", None)
        forget()
        caplog.clear()
        x = torch.randn(1, 1, 4, 8)
        layout = window_layout([(torch.zeros(1, 1, 1, 4, dtype=torch.int32), 1, 2)], True, None)
        assert windowed_attention(x, None, x, layout, causal=True)[0].isfinite().all()
        return select_backend("auto", x, x), caplog.text

    yield run
    forget()


@pytest.fixture
def needs_compiler():
    try:
        build.compiler()
    except build.KernelBuildError as error:
        pytest.skip(str(error))


def test_without_a_compiler_everything_runs_in_pytorch(tmp_path, attend):
    backend, told = attend(tmp_path, PATH=str(tmp_path), CXX="")
    assert backend == "torch"
    assert told.count("there is no C++ compiler") == 1


def test_a_compiler_that_is_not_there_is_told_about(tmp_path, attend):
    backend, told = attend(tmp_path, CXX="no-such-compiler")
    assert backend == "torch"
    assert told.count("CXX='no-such-compiler' cannot be found") == 1


def test_a_compiler_may_bring_arguments(monkeypatch, needs_compiler):
    path, *_ = build.compiler()
    monkeypatch.setenv("CXX", f"{path} -g0")
    assert build.compiler() == [path, "-g0"]


def test_a_compiler_that_fails_is_told_about(tmp_path, attend):
    backend, told = attend(tmp_path, CXX=shutil.which("false"))
    assert backend == "torch"
    assert told.count("compiling failed") == 1


def test_an_unwritable_cache_is_told_about(tmp_path, needs_compiler, attend):
    (tmp_path / "file").write_text("not a folder")
    backend, told = attend(tmp_path / "file")
    assert backend == "torch"
    assert told.count("cannot be stored in") == 1


@pytest.mark.slow
def test_it_is_compiled_once_and_says_so(tmp_path, needs_compiler, attend):
    found = [attend(tmp_path) for _ in range(2)]
    assert [backend for backend, _ in found] == ["cpu", "cpu"], found
    assert [told.count("compiling the") for _, told in found] == [1, 0]


NUMBER = 'extern "C" long hf_sizeof(const char*) { return 7; }'  # the least that is taken for a library


@pytest.fixture
def small_library(tmp_path, monkeypatch, needs_compiler):
    """Sources that compile at once, and a cache of the test's own."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "api.cpp").write_text(NUMBER)
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    monkeypatch.setenv("HF_REFORMER_CACHE", str(tmp_path / "cache"))
    return build.library_path(VARIANT)


def number() -> int:
    return build.load_library(VARIANT).hf_sizeof(b"")


@pytest.fixture
def bundled(small_library, monkeypatch, tmp_path) -> Path:
    """Where a wheel has the variant; there it is, as setup.py compiles it."""
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    path = sources.prebuilt_path(VARIANT, build.PREBUILT, build.SOURCES)
    number()  # compiled, and stored in the cache
    library = small_library.read_bytes()[:-32]
    small_library.unlink()
    path.parent.mkdir()
    path.write_bytes(library + sources.seal(path.name, library))
    return path


def test_a_library_that_came_with_the_package_needs_no_compiler(bundled, small_library, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert number() == 7
    assert not small_library.exists()
    assert not caplog.records


def test_a_library_of_other_sources_is_not_used(bundled, small_library):
    (build.SOURCES / "api.cpp").write_text('extern "C" long hf_sizeof(const char*) { return 8; }')
    assert number() == 8


def test_a_bundled_library_that_is_damaged_is_compiled_anew(bundled, small_library, caplog):
    bundled.write_bytes(bundled.read_bytes()[:-40])
    assert number() == 7
    assert "is damaged" in caplog.text
    assert small_library.exists()


def test_a_compiler_that_is_asked_for_compiles(bundled, small_library, monkeypatch):
    monkeypatch.setenv("CXX", build.compiler()[0])
    assert number() == 7
    assert list(small_library.parent.glob("*.so"))


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def spoil(path: Path, kind: str) -> None:
    """Put something else under the name of a stored library."""
    data = path.read_bytes()
    path.unlink()
    if kind in ("pipe", "folder", "link", "dangling link"):
        elsewhere = path.with_suffix(".elsewhere")
        if kind == "link":
            elsewhere.write_bytes(data)
        make = {"pipe": os.mkfifo, "folder": os.mkdir}.get(kind, lambda own: own.symlink_to(elsewhere))
        return make(path)
    size = len(data)
    changed = {
        "nothing": b"", "half": data[: size // 2], "all but a byte": data[:-1], "more": data + b"\0", "text": b"hello",
        "another library": Path(sys.modules["_ctypes"].__file__).read_bytes(),
        "a bit": bytes([data[0] ^ 1]) + data[1:], "zeros behind": data[:4096] + bytes(size - 4096),
    }  # fmt: skip
    path.write_bytes(changed[kind])


SPOILED = ["pipe", "link", "dangling link", "nothing", "half", "all but a byte", "more", "text", "another library"]
SPOILED += ["a bit", "zeros behind"]


@pytest.mark.parametrize("kind", SPOILED)
def test_a_damaged_library_is_compiled_anew(kind, small_library, caplog):
    assert number() == 7
    spoil(small_library, kind)
    caplog.clear()
    assert number() == 7
    assert [record.getMessage().split()[0] for record in caplog.records] == (
        ["compiling"] if kind == "dangling link" else ["a", "compiling"]
    )
    caplog.clear()
    assert number() == 7
    assert not caplog.records


def test_a_folder_under_the_name_of_the_library_is_told_about(small_library):
    small_library.mkdir(parents=True)
    with pytest.raises(build.KernelBuildError, match="cannot be stored"):
        number()
    assert small_library.is_dir()


def test_a_library_under_the_name_of_another_is_not_taken_for_it(small_library, tmp_path):
    assert number() == 7
    (tmp_path / "csrc" / "api.cpp").write_text(NUMBER.replace("7", "8"))
    shutil.copy(small_library, build.library_path(VARIANT))
    assert number() == 8


def test_a_library_that_is_cut_short_while_it_is_used_does_no_harm(small_library):
    library = build.load_library(VARIANT)
    os.truncate(small_library, 0)
    assert library.hf_sizeof(b"") == 7


def test_a_library_that_does_not_fit_is_not_stored(small_library):
    def refuse(library):
        raise build.KernelDisagreementError

    with pytest.raises(build.KernelDisagreementError):
        build.load_library(VARIANT, refuse)
    assert not small_library.exists()
    assert not list(small_library.parent.glob("**/*.so"))


COMPILERS = {
    "an open quote": ('g++ "', "is no command"),
    "no program": ("hello", "cannot be run|failed"),
    "no interpreter": ("#!/nonexistent/x", "cannot be run"),
    "messages that are not UTF-8": (r"printf '\377' >&2; exit 1", "compiling failed"),
    "no file": ("exit 0", "No such file"),
    "text": (
        'for to; do :; done; echo hello > "$to"',
        "no library that can be used",
    ),
    "a pipe": ('for to; do :; done; mkfifo "$to"', "no library"),
    "a folder": ('for to; do :; done; mkdir "$to"', "no library"),
}


def choose_compiler(monkeypatch, tmp_path, command: str) -> None:
    """A script that does so when it is to compile, the file it should write as its last argument."""
    body = f'case "$*" in *--version) echo 1.0; exit 0;; esac\n{command}'
    monkeypatch.setenv("CXX", script(tmp_path / f"compiler{time.monotonic_ns()}", body))


@pytest.mark.parametrize("kind", COMPILERS)
def test_whatever_the_compiler_is_the_reason_is_told(kind, small_library, monkeypatch, tmp_path):
    command, reason = COMPILERS[kind]
    if kind == "an open quote":
        monkeypatch.setenv("CXX", command)
    elif kind in ("no program", "no interpreter"):
        (tmp_path / "program").write_text(command)
        (tmp_path / "program").chmod(0o755)
        monkeypatch.setenv("CXX", str(tmp_path / "program"))
    else:
        choose_compiler(monkeypatch, tmp_path, command)
    with pytest.raises(build.KernelBuildError, match=reason):
        number()
    assert not list(small_library.parent.glob("**/*.so"))


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_what_a_compiler_left_half_written_is_never_loaded(share, small_library, monkeypatch, tmp_path):
    number()
    data = small_library.read_bytes()[:-32]
    (tmp_path / "half").write_bytes(data[: int(len(data) * share)])
    choose_compiler(monkeypatch, tmp_path, f'for to; do :; done; cp {tmp_path / "half"} "$to"')
    with pytest.raises(build.KernelBuildError, match="no library that can be used"):
        number()


@pytest.mark.parametrize("asked", ["version", "compile"])
def test_a_compiler_that_hangs_is_stopped_with_its_processes(asked, small_library, monkeypatch, tmp_path):
    monkeypatch.setattr(build, f"{'ANSWER' if asked == 'version' else 'COMPILE'}_SECONDS", 0.5)
    hang = f"sleep 1000 & echo $! > {tmp_path / 'pid'}; wait"
    if asked == "version":
        monkeypatch.setenv("CXX", script(tmp_path / "compiler", hang))
    else:
        choose_compiler(monkeypatch, tmp_path, hang)
    with pytest.raises(build.KernelBuildError, match=r"does not answer|took more than"):
        number()
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):  # until whoever adopts it has seen it die
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split():
            return
        time.sleep(0.05)
    pytest.fail("the compiler's own process is still there")


def test_arguments_that_are_not_utf8(small_library, monkeypatch):
    monkeypatch.setenv("CXX", os.fsdecode(os.fsencode(build.compiler()[0]) + b" -DX=\xff"))
    assert number() == 7


needs_root = pytest.mark.skipif(os.name != "posix" or os.getuid() != 0, reason="another user has to be played")


@needs_root
@pytest.mark.parametrize("whose", ["file", "file of all", "folder", "folder of all", "folder of a group", "above"])
def test_a_library_of_somebody_else_is_never_loaded(whose, small_library, monkeypatch):
    number()
    folder = small_library.parent
    {
        "file": lambda: os.chown(small_library, 65534, 65534),
        "file of all": lambda: small_library.chmod(0o666),
        "folder": lambda: os.chown(folder, 65534, 65534),
        "folder of all": lambda: folder.chmod(0o777),
        "folder of a group": lambda: (os.chown(folder, 0, 65534), folder.chmod(0o775)),
        "above": lambda: folder.parent.chmod(0o777),
    }[whose]()
    read = []
    monkeypatch.setattr(build, "_load", lambda library: read.append(library))
    if whose.startswith("file"):  # the folder is one's own: another takes its place
        inode = small_library.stat().st_ino
        number_of = build.load_library(VARIANT)
        assert (len(read), number_of) == (1, None)
        assert small_library.stat().st_ino != inode
        return
    with pytest.raises(build.KernelBuildError, match=r"belongs to user 65534|others may write to"):
        number()
    assert not read


def test_a_folder_of_all_is_fine_where_nobody_removes_what_is_of_others(small_library):
    folder = small_library.parent
    number()
    folder.parent.chmod(0o1777)
    assert number() == 7


def test_a_cache_that_can_only_be_read_is_used(small_library, monkeypatch):
    number()
    for name in ("FileLock", "_compile", "_store"):
        monkeypatch.setattr(build, name, None)
    assert number() == 7


def test_a_cache_of_an_image_serves_where_no_compiler_is(small_library, monkeypatch, tmp_path):
    number()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert number() == 7


def test_a_cache_of_an_image_serves_where_nothing_can_be_written(small_library, monkeypatch):
    def nowhere(*_, **__):
        raise FileNotFoundError("No usable temporary directory found")

    number()
    for name in ("gettempdir", "TemporaryFile", "TemporaryDirectory"):
        monkeypatch.setattr(build.tempfile, name, nowhere)
    monkeypatch.setattr(build, "_version", build._version.__wrapped__)
    monkeypatch.delenv("CXX", raising=False)
    assert number() == 7


def test_a_lesser_variant_serves_where_the_best_was_not_compiled(small_library, monkeypatch, tmp_path):
    number()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "supported_variants", lambda: ["avx2", VARIANT])
    monkeypatch.setattr(library, "bind_functions", lambda library: None)
    monkeypatch.setattr(library, "_library", None)
    assert library.choose_library(lambda: True) is None


def test_a_user_without_a_home_has_a_cache(small_library, monkeypatch, tmp_path):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HF_REFORMER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(build.Path, "home", homeless)
    assert number() == 7
    assert len(list(tmp_path.glob(f"hf_reformer-{os.getuid()}/*.so"))) == 1
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(build.Path, "home", lambda: tmp_path / "file")  # a home that is not there
    assert number() == 7


def _number(barrier, found) -> None:
    barrier.wait()
    found.put(number())


def test_processes_that_start_at_once_compile_once(small_library):
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(4), context.SimpleQueue()
    processes = [context.Process(target=_number, args=(barrier, found)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [found.get() for _ in processes] == [7] * 4
    for process in processes:
        process.join()
    assert [path.suffix for path in sorted(small_library.parent.iterdir())] in (([".so"]), [".lock", ".so"])


@pytest.mark.slow
def test_fuzz_the_kernel_cache(small_library):
    """Whatever is done to a stored library, the right one is loaded, or a reason given."""
    number()
    whole = small_library.read_bytes()
    logging.getLogger(build.__name__).setLevel(logging.ERROR)
    for seed in seeds():
        draw = random.Random(seed)
        data = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(1 + len(data))
            change = draw.choice(["cut", "flip", "insert", "zero", "repeat"])
            if change == "cut":
                del data[place:]
            elif change == "insert":
                data[place:place] = draw.randbytes(draw.randint(1, 100))
            elif change == "repeat":
                data += data[place:]
            elif change == "zero":
                data[place : place + 4096] = bytes(len(data[place : place + 4096]))
            elif data:
                data[place % len(data)] ^= 1 << draw.randrange(8)
        small_library.write_bytes(data[: 2 * len(whole)])
        small_library.chmod(draw.choice([0o644, 0o600, 0o755, 0o666, 0o000]))
        if draw.random() < 0.2:
            small_library.unlink()
            spoil_as = draw.choice([os.mkfifo, lambda path: path.symlink_to("nowhere"), lambda path: None])
            spoil_as(small_library)
        assert number() == 7, seed


@pytest.mark.parametrize("variant", ["mmx", "avx512"])
def test_a_variant_that_the_processor_does_not_run_is_refused(variant, monkeypatch):
    monkeypatch.setattr(build.torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setenv("HF_REFORMER_CPU_VARIANT", variant)
    with pytest.raises(ValueError, match=rf"'{variant}' is none of \['avx2', 'portable'\]"):
        build.supported_variants()


def stub(trap: str | None = None) -> str:
    """Source of a library that fits this package and compiles at once. Its functions do nothing; one may trap."""
    structures = {x.__name__: ctypes.sizeof(x) for x in (*library.STRUCTURES.values(), *library.FUNCTIONS.values())}
    sizes = "".join(f'if (!strcmp(name, "{name}")) return {size};\n' for name, size in structures.items())
    functions = "".join(
        f"int {name}(const void*) {{ {'__builtin_trap();' if name == trap else 'return 0;'} }}\n"
        for name in library.FUNCTIONS
    )
    size_of = f"long long hf_sizeof(const char* name) {{\n{sizes}return 0;\n}}\n"
    variant = f'const char* hf_variant() {{ return "{VARIANT}"; }}\n'
    return f'#include <cstring>\nextern "C" {{\n{size_of}{variant}{functions}}}\n'


def test_a_kernel_is_rehearsed_wherever_modules_are_looked_for(small_library, monkeypatch, tmp_path):
    """Python passes over entries of its path that are no strings; the other process does not."""
    (tmp_path / "csrc" / "api.cpp").write_text(stub())
    called = "kernels.library.current_library().hf_hash(None)"
    seen = "pathlib.Path(__file__).with_suffix('.seen').touch()"
    (tmp_path / "made_up_check.py").write_text(f"import pathlib\ndef agrees(kernels):\n    {called}\n    {seen}\n")
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path])
    assert build.load_library(VARIANT, rehearsal="made_up_check")
    assert (tmp_path / "made_up_check.seen").exists()


def test_a_kernel_that_ends_the_process_when_it_is_called_is_left_alone(small_library, tmp_path, attend):
    """Such as one with instructions that this processor lacks: they trap when they come."""
    (tmp_path / "csrc" / "api.cpp").write_text(stub(trap="hf_hash"))
    backend, told = attend(tmp_path / "cache")
    assert backend == "torch"
    assert told.count("calling it ends a process") == 1
    assert not list(tmp_path.glob("cache/*.so"))
