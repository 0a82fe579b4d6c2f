"""CUDA C++ source → cubin: NVRTC behind cuda.core's program cache on disk.

NVRTC comes through `cuda.core` (`pip install cuda-core cuda-bindings nvidia-cuda-nvrtc`); it needs no GPU, no driver
and no CUDA headers. Cubins are code: only their user may write the cache folder.
"""

import functools
import hashlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCES = ("images.cu", "sampler.cu")
HEADERS = ("device.h", "noise.h")
# Keyword arguments of cuda.core's ProgramOptions. The last four make every arithmetic operation the IEEE one: noise.h
# and the tests rely on results that are the same bits everywhere. The kernels wait for memory, not for arithmetic.
OPTIONS = (("std", "c++17"), ("fma", False), ("ftz", False), ("prec_div", True), ("prec_sqrt", True))

_FOLDER = Path(__file__).parent
_SEAL_BYTES = hashlib.sha256().digest_size
_log = logging.getLogger(__name__)


class KernelError(RuntimeError):
    """Kernels that cannot be compiled or loaded here; the message says what is missing."""


@dataclass(frozen=True)
class Unit:
    """One compilation: a source that finds our headers beside it."""

    name: str
    text: str
    arch: str  # "sm_90"
    options: tuple[tuple[str, str | bool], ...] = OPTIONS


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


def read_unit(source: str, arch: str) -> Unit:
    """Return one of `SOURCES` as shipped."""
    return Unit(source, (_FOLDER / source).read_text(encoding="utf-8"), arch)


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
    compiler = nvrtc_version()
    try:
        from cuda.core import Program
    except ImportError as exc:
        raise _missing(exc) from exc
    try:
        return bytes(Program(unit.text, "c++", _options(unit)).compile("cubin", logs=logs).code)
    except Exception as exc:  # cuda.core's CUDAError has no public name
        raise KernelError(f"{compiler} cannot compile {unit.name} for {unit.arch}: {exc}") from exc


def cubin(source: str, arch: str) -> bytes:
    """Return the machine code of one of `SOURCES` for `arch` ("sm_90"), from the cache or compiled."""
    return compile_cached(read_unit(source, arch), cache_folder())


def compile_cached(unit: Unit, folder: Path, compiler: Callable[[Unit], bytes] = compile_nvrtc) -> bytes:
    """Return the machine code of `unit` from the cache in `folder`, or compile it and keep it there.

    A cache that cannot be read or written, or whose entry is damaged, costs time and a warning, no more. Any number of
    threads and processes may use one folder.
    """
    key = cache_key(unit)
    from cuda.core.utils import FileStreamProgramCache

    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        cache = FileStreamProgramCache(folder)
        entry = cache.get(key)
    except OSError as exc:
        _log.warning("the kernel cache cannot be used: %s", exc)
        return compiler(unit)
    if entry is not None:
        code: bytes = entry[_SEAL_BYTES:]
        if entry[:_SEAL_BYTES] == _seal(key, code):
            return code
        _log.warning("the entry of %s in the kernel cache %s is damaged: compiling again", unit.name, folder)
    code = compiler(unit)
    try:
        cache[key] = _seal(key, code) + code
    except OSError as exc:
        _log.warning("the kernel cache cannot be written: %s", exc)
    return code


def cache_key(unit: Unit) -> bytes:
    """Return a digest of all that decides what comes out: unit, headers, and the compiler's version."""
    headers = hashlib.sha256()
    for name in HEADERS:
        headers.update(hashlib.sha256((_FOLDER / name).read_bytes()).digest())
    try:
        from cuda.core.utils import make_program_cache_key
    except ImportError as exc:
        raise _missing(exc) from exc
    key: bytes = make_program_cache_key(
        code=unit.text, code_type="c++", options=_options(unit), target_type="cubin", extra_digest=headers.digest()
    )
    return key


def _options(unit: Unit) -> Any:
    from cuda.core import ProgramOptions

    return ProgramOptions(name=unit.name, arch=unit.arch, include_path=str(_FOLDER), **dict(unit.options))


def _seal(key: bytes, code: bytes) -> bytes:
    """Bind an entry to its key, which cuda.core does not: a driver loads whatever it is given."""
    return hashlib.sha256(key + code).digest()


def _missing(exc: Exception) -> KernelError:
    return KernelError(f"the CUDA compiler is not there: pip install cuda-core cuda-bindings nvidia-cuda-nvrtc ({exc})")
