"""compile.py: what the key depends on, what the cache survives. The compiler is a fake, the cache is cuda.core's."""

import dataclasses
import errno
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffiqa.kernels import compile as subject
from diffiqa.kernels.compile import HEADERS, SOURCES, KernelError, Unit, cache_folder, cache_key, read_unit

UNIT = Unit("a.cu", "code", "sm_90", (("fma", False), ("std", "c++17")))
CODE = b"\x7fELF" + bytes(range(256)) * 20


class Compiler:
    """Counts what it compiles."""

    def __init__(self, code: bytes = CODE) -> None:
        self.code = code
        self.units: list[Unit] = []

    def __call__(self, unit: Unit) -> bytes:
        self.units.append(unit)
        return self.code


def compiled(folder: Path, compiler: Compiler, unit: Unit = UNIT) -> bytes:
    return subject.compile_cached(unit, folder, compiler)


def entry_of(folder: Path) -> Path:
    (entry,) = (path for path in folder.rglob("*") if path.is_file())
    return entry


def test_second_call_takes_the_cubin_from_the_cache(tmp_path: Path) -> None:
    first, second = Compiler(), Compiler(b"other")
    assert compiled(tmp_path, first) == CODE
    assert compiled(tmp_path, second) == CODE
    assert (len(first.units), len(second.units)) == (1, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "b.cu"},
        {"text": "code "},
        {"arch": "sm_89"},
        {"options": (("fma", True), ("std", "c++17"))},
        {"options": (("fma", False),)},
    ],
    ids=lambda change: "{}={}".format(*next(iter(change.items()))),
)
def test_another_source_gpu_or_option_is_compiled_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    compiled(tmp_path, Compiler())
    again = Compiler(b"other")
    assert compiled(tmp_path, again, dataclasses.replace(UNIT, **change)) == b"other"
    assert len(again.units) == 1


def test_another_header_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in zip(HEADERS, ("one", "two"), strict=True):
        (tmp_path / name).write_text(text)
    before = cache_key(UNIT)
    monkeypatch.setattr(subject, "_FOLDER", tmp_path)
    keys = {before, cache_key(UNIT)}
    for name, text in zip(HEADERS, ("onet", "wo"), strict=True):
        (tmp_path / name).write_text(text)
        keys.add(cache_key(UNIT))
    assert len(keys) == 4


def test_another_compiler_compiles_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.bindings import nvrtc

    keys = set()
    for version in ((13, 5), (13, 6)):
        monkeypatch.setattr(nvrtc, "nvrtcVersion", lambda version=version: (nvrtc.nvrtcResult.NVRTC_SUCCESS, *version))
        keys.add(cache_key(UNIT))
    assert len(keys) == 2


def test_every_header_that_a_source_includes_counts() -> None:
    for source in SOURCES:
        unit = read_unit(source, "sm_90")
        texts = [unit.text, *((subject._FOLDER / name).read_text() for name in HEADERS)]
        included = {name for text in texts for name in re.findall(r'#include [<"](.+)[>"]', text)}
        assert included <= set(HEADERS)


def _damage(entry: bytes) -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "cut short", entry[:-1]
    yield "cut in the header", entry[:20]
    yield "longer", entry + b"\0"
    yield "one bit", entry[:-7] + bytes([entry[-7] ^ 1]) + entry[-6:]
    yield "digest", entry[:20] + bytes([entry[20] ^ 1]) + entry[21:]
    yield "first byte", b"X" + entry[1:]


def test_damaged_entry_is_compiled_again_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiled(tmp_path, Compiler())
    entry = entry_of(tmp_path)
    whole = entry.read_bytes()
    for name, damaged in _damage(whole):
        entry.write_bytes(damaged)
        caplog.clear()
        again = Compiler()
        assert compiled(tmp_path, again) == CODE, name
        assert len(again.units) == 1, name
        assert "is damaged" in caplog.text, name
        assert entry.read_bytes() == whole, name


def test_entry_under_another_units_name_is_refused(tmp_path: Path) -> None:
    other = dataclasses.replace(UNIT, text="other code")
    compiled(tmp_path / "one", Compiler())
    compiled(tmp_path / "two", Compiler(b"other"), other)
    entry_of(tmp_path / "one").replace(entry_of(tmp_path / "two"))
    again = Compiler(b"other")
    assert compiled(tmp_path / "two", again, other) == b"other"
    assert len(again.units) == 1


WRITER = """
import pathlib, pickle, sys
from diffiqa.kernels.compile import cache_key, compile_cached
folder, unit = pathlib.Path(sys.argv[1]), pickle.loads(bytes.fromhex(sys.argv[2]))
for _ in range(50):
    for entry in (folder / "entries").rglob("*"):
        if entry.is_file():
            entry.unlink(missing_ok=True)
    compile_cached(unit, folder, lambda unit: int(sys.argv[3]).to_bytes(1, "big") * 300_000)
"""


def test_readers_see_whole_entries_while_other_processes_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), pickle.dumps(UNIT).hex(), str(i)])
        for i in range(2)
    ]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        seen.add(compiled(tmp_path, Compiler(b"\2" * 300_000)))
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {bytes([i]) * 300_000 for i in range(3)}
    assert "damaged" not in caplog.text
    entry_of(tmp_path)  # nothing unfinished is left


def test_threads_that_need_the_same_kernel_all_get_it(tmp_path: Path) -> None:
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(compiled(tmp_path, Compiler()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CODE] * 8


def test_cache_that_cannot_be_written_is_said_and_not_fatal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    assert compiled(tmp_path / "file" / "cache", Compiler()) == CODE
    assert "cannot be used" in caplog.text


def test_a_cache_that_takes_no_more_entries_still_gives_those_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compiled(tmp_path, Compiler())

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("mkdir", "utime", "unlink"):
        monkeypatch.setattr(os, name, read_only)
    monkeypatch.setattr("tempfile.mkstemp", read_only)
    assert compiled(tmp_path, Compiler(b"other")) == CODE
    assert caplog.text == ""
    assert compiled(tmp_path, Compiler(b"other"), dataclasses.replace(UNIT, arch="sm_89")) == b"other"
    assert "cannot be written" in caplog.text


def test_write_that_fails_leaves_no_half_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert compiled(tmp_path, Compiler()) == CODE
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_cache_folder_is_private(tmp_path: Path) -> None:
    compiled(tmp_path / "new", Compiler())
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


@pytest.mark.skipif(sys.platform == "win32", reason="XDG folders")
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"DIFFIQA_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}, "/own/kernels"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/diffiqa/kernels"),
        ({"XDG_CACHE_HOME": "relative"}, "/home/of/user/.cache/diffiqa/kernels"),
        ({"XDG_CACHE_HOME": "", "DIFFIQA_CACHE": ""}, "/home/of/user/.cache/diffiqa/kernels"),
        ({}, "/home/of/user/.cache/diffiqa/kernels"),
    ],
    ids=["own", "xdg", "relative xdg", "empty", "home"],
)
def test_cache_folder_follows_the_environment(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for name in ("DIFFIQA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/of/user")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DIFFIQA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(KernelError, match="DIFFIQA_CACHE"):
        cache_folder()


def test_missing_cuda_is_a_kernel_error_that_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cuda", "cuda.core", "cuda.core.utils", "cuda.bindings", "pycuda"):
        monkeypatch.setitem(sys.modules, module, None)
    subject.nvrtc_version.cache_clear()
    from diffiqa.kernels import load

    for call in (subject.nvrtc_version, load.device_arch, lambda: subject.compile_nvrtc(UNIT), lambda: cache_key(UNIT)):
        with pytest.raises(KernelError, match="pip install cuda-core"):
            call()
    with pytest.raises(KernelError, match="pip install pycuda"):
        load.with_pycuda({})
