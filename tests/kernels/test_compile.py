"""compile.py: what the key depends on, what the cache survives. No CUDA is needed: the compiler here is a fake."""

import dataclasses
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffiqa.kernels import compile as subject
from diffiqa.kernels.compile import HEADERS, SOURCES, CubinCache, KernelError, Unit, cache_folder, cubin, read_unit

UNIT = Unit("a.cu", "code", (("a.h", "one"), ("b.h", "two")), "sm_90", (("fma", False), ("std", "c++17")), "nvrtc 13.5")
CODE = b"\x7fELF" + bytes(range(256)) * 20


class Compiler:
    """Counts what it compiles."""

    def __init__(self, code: bytes = CODE) -> None:
        self.code = code
        self.units: list[Unit] = []

    def __call__(self, unit: Unit) -> bytes:
        self.units.append(unit)
        return self.code


def compiled(
    folder: Path, compiler: Compiler, source: str = "sampler.cu", arch: str = "sm_90", version: str = "1"
) -> bytes:
    return cubin(source, arch, cache=CubinCache(folder), compiler=compiler, version=lambda: version)


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
        {"headers": (("a.h", "one"), ("b.h", "two!"))},
        {"headers": (("a.h", "one"), ("c.h", "two"))},
        {"headers": (("a.h", "onet"), ("b.h", "wo"))},
        {"headers": (("a.h", "one"),)},
        {"arch": "sm_89"},
        {"options": (("fma", True), ("std", "c++17"))},
        {"options": (("fma", "False"), ("std", "c++17"))},
        {"options": (("fma", False),)},
        {"compiler": "nvrtc 13.6"},
    ],
    ids=lambda change: "{}={}".format(*next(iter(change.items()))),
)
def test_key_differs_on(change: dict[str, str]) -> None:
    assert dataclasses.replace(UNIT, **change).key() != UNIT.key()  # type: ignore[arg-type]
    assert dataclasses.replace(UNIT).key() == UNIT.key()


def test_key_sees_where_one_field_ends_and_the_next_begins() -> None:
    one, other = (dataclasses.replace(UNIT, name=name, text=text) for name, text in (("atext", "b"), ("a", "textb")))
    assert one.key() != other.key()


def test_key_differs_on_its_own_version(monkeypatch: pytest.MonkeyPatch) -> None:
    before = UNIT.key()
    monkeypatch.setattr(subject, "_KEY_VERSION", "next")
    assert UNIT.key() != before


@pytest.mark.parametrize(
    "change", [{"source": "images.cu"}, {"arch": "sm_89"}, {"version": "2"}], ids=lambda c: next(iter(c))
)
def test_another_source_gpu_or_compiler_is_compiled_anew(tmp_path: Path, change: dict[str, str]) -> None:
    compiled(tmp_path, Compiler())
    again = Compiler(b"other")
    assert compiled(tmp_path, again, **change) == b"other"
    assert len(again.units) == 1


def test_unit_carries_every_header_its_source_includes() -> None:
    for source in SOURCES:
        unit = read_unit(source, "sm_90", "nvrtc 13.5")
        texts = [unit.text, *(text for _, text in unit.headers)]
        included = {name for text in texts for name in re.findall(r'#include [<"](.+)[>"]', text)}
        assert included <= set(HEADERS)


def _damage(entry: bytes) -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "cut short", entry[:-1]
    yield "cut in the header", entry[:20]
    yield "longer", entry + b"\0"
    yield "one bit", entry[:-7] + bytes([entry[-7] ^ 1]) + entry[-6:]
    yield "digest", entry[:20] + bytes([entry[20] ^ 1]) + entry[21:]
    yield "another format", b"X" + entry[1:]


def test_damaged_entry_is_compiled_again_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiled(tmp_path, Compiler())
    (entry,) = tmp_path.iterdir()
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
    cache, other = CubinCache(tmp_path), dataclasses.replace(UNIT, text="other code")
    cache.put(UNIT, CODE)
    cache.path(UNIT).rename(cache.path(other))
    assert cache.get(other) is None


WRITER = """
import pathlib, pickle, sys
from diffiqa.kernels.compile import CubinCache
unit, code = pickle.loads(bytes.fromhex(sys.argv[2]))
for _ in range(50):
    CubinCache(pathlib.Path(sys.argv[1])).put(unit, code * 300_000)
"""


def test_readers_see_whole_entries_while_other_processes_write(tmp_path: Path) -> None:
    cache = CubinCache(tmp_path)
    cache.put(UNIT, b"\0" * 300_000)
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), pickle.dumps((UNIT, bytes([i]))).hex()])
        for i in range(2)
    ]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        seen.add(cache.get(UNIT))
    assert [writer.returncode for writer in writers] == [0, 0]
    assert seen <= {bytes([i]) * 300_000 for i in range(2)}
    assert [path.name for path in tmp_path.iterdir()] == [cache.path(UNIT).name]  # nothing unfinished is left


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
    assert "cannot be written" in caplog.text


def test_write_that_fails_leaves_no_half_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert compiled(tmp_path, Compiler()) == CODE
    assert list(tmp_path.iterdir()) == []


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
    for module in ("cuda", "cuda.core", "cuda.bindings", "pycuda"):
        monkeypatch.setitem(sys.modules, module, None)
    subject.nvrtc_version.cache_clear()
    from diffiqa.kernels import load

    for call in (subject.nvrtc_version, load.device_arch, lambda: subject.compile_nvrtc(UNIT)):
        with pytest.raises(KernelError, match="pip install cuda-core"):
            call()
    with pytest.raises(KernelError, match="pip install pycuda"):
        load.with_pycuda({})
