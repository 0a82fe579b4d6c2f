"""Keeps on disk the kernels that TensorRT-RTX compiles when it runs; without it every start compiles them again.

The library knows whether a cache is for this GPU, driver and version. This file decides where it lies and sees that it
is whole. A cache is code: it lies beside the engines, which are trusted like a program, or where only its user writes.
"""

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...engine.atomic import replacing
from ...engine.manifest import Build
from ...errors import first_line
from ...kernels.compile import KernelError, cache_folder

MAX_BYTES = 512 * 2**20  # each size of image has kernels of its own; a thousand sizes stop here
_MAGIC = b"diffiqa runtime cache 1\n"
_START = len(_MAGIC) + hashlib.sha256().digest_size

_log = logging.getLogger(__name__)


class RuntimeCache:
    """The compiled kernels of one build on one GPU, shared by all its contexts.

    It is written to the first of `folders` that can be written. That is the build's own; it is not made again if it was
    deleted meanwhile. A cache that is damaged, foreign or cannot be written is logged and costs time, no more.
    """

    def __init__(self, folders: Sequence[Path], key: str) -> None:
        self._paths = [folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.kernels" for folder in folders]
        self._key = key
        self._cache: Any = None
        self._stored = b""

    def attach(self, config: Any) -> None:
        """Give it to a context's configuration; the first one makes the cache and reads its file."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            self._load()
        if not config.set_runtime_cache(self._cache):
            _log.warning("TensorRT-RTX takes no cache: it compiles its kernels at every start")

    def save(self) -> None:
        """Write what was compiled since, and let go of the cache; close all contexts first."""
        cache, self._cache = self._cache, None
        if cache is None:
            return
        try:
            data = bytes(cache.serialize() or b"")
        except Exception as exc:  # the library's: it must not keep a GPU from being freed
            _log.warning("compiled kernels cannot be kept: %s", first_line(exc))
            return
        if not data or data == self._stored:
            return
        if len(data) > MAX_BYTES:
            _log.warning("compiled kernels fill %d bytes and are not kept: more than %d", len(data), MAX_BYTES)
            return
        problems = []
        for number, path in enumerate(self._paths):
            try:
                if number:
                    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with replacing(path) as stream:
                    stream.write(_MAGIC + self._digest(data) + data)
            except OSError as exc:
                problems.append(exc)
                continue
            # What lies in a later folder is out of date now.
            for other in self._paths[number + 1 :]:
                with contextlib.suppress(OSError):
                    other.unlink()
            return
        _log.warning("compiled kernels cannot be kept: %s", "; ".join(map(str, problems)))

    def _load(self) -> None:
        # The user's folder first: a file is there because the build's, which it began with, could not be written.
        for path in reversed(self._paths):
            data = self._read(path)
            if data is None:
                continue
            if self._cache.deserialize(data):
                self._stored = data
                return
            _log.warning("%s is of another GPU, driver or TensorRT-RTX: compiling again", path)

    def _read(self, path: Path) -> bytes | None:
        try:
            if path.stat().st_size > MAX_BYTES + _START:
                _log.warning("%s is too large to be ours: compiling again", path)
                return None
            entry = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as exc:
            _log.warning("compiled kernels cannot be read: %s", exc)
            return None
        if entry[:_START] != _MAGIC + self._digest(entry[_START:]):
            _log.warning("%s is damaged: compiling again", path)
            return None
        return entry[_START:]

    def _digest(self, data: bytes) -> bytes:
        """Bind the file to its key, so that one under another's name counts as damaged."""
        return hashlib.sha256(self._key.encode() + b"\0" + data).digest()


def cache_of(engine: Path, build: Build, gpu: str, capability: str) -> RuntimeCache:
    """Return the cache of a build on a GPU: in the build's folder, or, where that is read-only, in the user's."""
    folders = [(engine / build.plan.path).parent]
    with contextlib.suppress(KernelError):  # no home folder
        folders.append(cache_folder().parent / "tensorrt-rtx")
    fields = {"build": build.key, "library": build.library, "version": build.version, "gpu": gpu, "cc": capability}
    stages = {f"engine {stage.name}": stage.file.sha256 for stage in build.stages}
    return RuntimeCache(folders, "\n".join(f"{name} {len(text)} {text}" for name, text in (fields | stages).items()))
