"""CUDA C++ source → cubin, once per source, options, GPU architecture and compiler: NVRTC behind a cache on disk.

NVRTC comes through `cuda.core` (`pip install cuda-core cuda-bindings nvidia-cuda-nvrtc`); it needs no GPU, no driver
and no CUDA headers. Cubins are code: the cache folder must be writable by no one else.
"""

import contextlib
import functools
import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = ("images.cu", "sampler.cu")
HEADERS = ("device.h", "noise.h")
# Keyword arguments of cuda.core's ProgramOptions. The last four make every arithmetic operation the IEEE one: noise.h
# and the tests rely on results that are the same bits everywhere. The kernels wait for memory, not for arithmetic.
OPTIONS = (("std", "c++17"), ("fma", False), ("ftz", False), ("prec_div", True), ("prec_sqrt", True))

_KEY_VERSION = "1"  # count up when the meaning of the key or of a cache entry changes
_MAGIC = b"diffiqa cubin 1\n"
_FOLDER = Path(__file__).parent
_log = logging.getLogger(__name__)


class KernelError(RuntimeError):
    """Kernels that cannot be compiled or loaded here; the message says what is missing."""


@dataclass(frozen=True)
class Unit:
    """One compilation: everything that decides what comes out of it."""

    name: str
    text: str
    headers: tuple[tuple[str, str], ...]  # name and text of all that `text` may include
    arch: str  # "sm_90"
    options: tuple[tuple[str, str | bool], ...]
    compiler: str  # name and version

    def key(self) -> str:
        """Return a SHA-256 over all of it; labels and lengths keep two units from ever looking the same."""
        digest = hashlib.sha256()
        options = ((f"option {name}", repr(value)) for name, value in self.options)
        headers = ((f"header {name}", text) for name, text in self.headers)
        for label, text in (
            ("version", _KEY_VERSION),
            ("name", self.name),
            ("text", self.text),
            *headers,
            ("arch", self.arch),
            *options,
            ("compiler", self.compiler),
        ):
            for part in (label.encode(), text.encode()):
                digest.update(len(part).to_bytes(8, "little") + part)
        return digest.hexdigest()


class CubinCache:
    """Cubins by unit in `folder`. Any number of processes may use one folder; an entry is whole or not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, unit: Unit) -> Path:
        """Return the file that holds, or would hold, the cubin of `unit`."""
        return self.folder / f"{Path(unit.name).stem}-{unit.arch}-{unit.key()}.cubin"

    def get(self, unit: Unit) -> bytes | None:
        """Return the cubin of `unit`; None if there is none, or if it is not what was written."""
        try:
            entry = self.path(unit).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as exc:
            _log.warning("the kernel cache cannot be read: %s", exc)
            return None
        start = len(_MAGIC) + hashlib.sha256().digest_size
        if entry[:start] != self._header(unit, entry[start:]):
            _log.warning("%s is damaged: compiling again", self.path(unit))
            return None
        return entry[start:]

    def put(self, unit: Unit, code: bytes) -> None:
        """Store the cubin of `unit`. A cache that cannot be written costs time at the next start, no more."""
        temporary = None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self.folder, prefix=".unfinished-")
            with os.fdopen(handle, "wb") as file:
                file.write(self._header(unit, code) + code)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(self.path(unit))
        except OSError as exc:
            _log.warning("the kernel cache cannot be written: %s", exc)
            if temporary is not None:
                with contextlib.suppress(OSError):
                    Path(temporary).unlink()

    @staticmethod
    def _header(unit: Unit, code: bytes) -> bytes:
        """Bind the entry to its unit: a file under another entry's name is as damaged as a changed one."""
        return _MAGIC + hashlib.sha256(unit.key().encode() + code).digest()


def cache_folder() -> Path:
    """Return where cubins are kept: under $DIFFIQA_CACHE, else under the user's cache folder."""
    if own := os.environ.get("DIFFIQA_CACHE"):
        return Path(own) / "kernels"
    home = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    try:
        # A relative path there is to be ignored, says the XDG specification.
        base = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
    except RuntimeError as exc:
        raise KernelError("no home folder to keep compiled kernels in: set DIFFIQA_CACHE to a folder") from exc
    return base / "diffiqa" / "kernels"


def read_unit(source: str, arch: str, compiler: str) -> Unit:
    """Return one of `SOURCES` as shipped, with our headers and options."""
    text, *headers = ((_FOLDER / name).read_text(encoding="utf-8") for name in (source, *HEADERS))
    return Unit(source, text, tuple(zip(HEADERS, headers, strict=True)), arch, OPTIONS, compiler)


@functools.cache
def nvrtc_version() -> str:
    """Return the compiler's name and version; raises KernelError when it is not there."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as exc:
        raise _missing(exc) from exc
    try:
        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as exc:  # cuda-bindings looks for the library at the first call, and has its own errors
        raise _missing(exc) from exc
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise KernelError(f"NVRTC does not tell its version: {status}")
    return f"nvrtc {major}.{minor}"


def compile_nvrtc(unit: Unit, logs: Any = None) -> bytes:
    """Compile with NVRTC; `logs.write` receives its messages. Raises KernelError with them when it refuses."""
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as exc:
        raise _missing(exc) from exc
    try:
        options = ProgramOptions(name=unit.name, arch=unit.arch, include_path=str(_FOLDER), **dict(unit.options))
        return bytes(Program(unit.text, "c++", options).compile("cubin", logs=logs).code)
    except Exception as exc:  # cuda.core's CUDAError has no public name
        raise KernelError(f"{unit.compiler} cannot compile {unit.name} for {unit.arch}: {exc}") from exc


def cubin(
    source: str,
    arch: str,
    *,
    cache: CubinCache | None = None,
    compiler: Callable[[Unit], bytes] = compile_nvrtc,
    version: Callable[[], str] = nvrtc_version,
) -> bytes:
    """Return the machine code of one of `SOURCES` for `arch` ("sm_90"), from the cache or compiled."""
    unit = read_unit(source, arch, version())
    cache = cache or CubinCache(cache_folder())
    code = cache.get(unit)
    if code is None:
        code = compiler(unit)
        cache.put(unit, code)
    return code


def _missing(exc: Exception) -> KernelError:
    return KernelError(f"the CUDA compiler is not there: pip install cuda-core cuda-bindings nvidia-cuda-nvrtc ({exc})")
