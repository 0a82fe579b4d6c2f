"""A disk that fails: at the n-th change of a folder a command gets an error, or ends there as in a power cut.

Inside `Disk(root, ...)` all that Python does to files below `root` is counted: writes as they reach the system, syncs,
renames, and so on. At the n-th one the disk fails with EIO, once; or everything ends: `PowerCut` is raised, and raised
again at every later change, so that no clean-up touches the disk.

The disk remembers what was synced. `survivors()` then yields what may be found after the power cut, each as a folder:

    all        everything that was done (as after kill -9)
    torn       names as they are, of contents half of what was not synced
    names      names as they are, of contents what was synced
    synced     contents and names that were synced; a name is synced with its folder

A folder's changes reach the disk in order. Nothing is assumed of the order of two folders.
"""

import builtins
import contextlib
import errno
import io
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

from diffiqa.engine.atomic import exchange

_REAL = {name: getattr(os, name) for name in ("open", "write", "fsync", "ftruncate", "rename", "replace", "unlink")}
_REAL |= {name: getattr(os, name) for name in ("mkdir", "rmdir", "fdatasync", "remove")}
_OPEN, _EXCHANGE = io.open, exchange


class PowerCut(BaseException):
    """The end of the process, as far as the disk can tell."""


@dataclass(eq=False)
class _Node:
    """A file. `synced` is what the disk holds of it for sure."""

    synced: bytes = b""


_FOLDER = _Node()
_Names = dict[str, _Node]  # by path, relative to the root; folders are _FOLDER


@dataclass
class _Change:
    """A change of names that its folders have not synced yet."""

    folders: tuple[str, ...]
    apply: Callable[[_Names], None]


@dataclass
class Disk:
    """All changes below `root`, the `n`-th of which fails; with `n` None none does, and `count` tells how many."""

    root: Path
    n: int | None = None
    power_cut: bool = True
    count: int = 0
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = self.root.resolve()
        self._dead = False
        self._live: _Names = {"": _FOLDER}
        for path in sorted(self.root.rglob("*")):
            self._live[self._name(path)] = _FOLDER if path.is_dir() else _Node(path.read_bytes())
        self._synced = dict(self._live)
        self._pending: list[_Change] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Self:
        for name in _REAL:
            self._patch.setattr(os, name, getattr(self, f"_{name}"))
        self._patch.setattr("diffiqa.export.engine.exchange", self._exchange)
        self._patch.setattr(io, "open", self._stream)
        self._patch.setattr(builtins, "open", self._stream)
        self._patch.setattr(shutil, "_USE_CP_SENDFILE", False)  # copies are writes like others
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def survivors(self, work: Path) -> Iterator[tuple[str, Path]]:
        """Yield what may be left, by name, each as a fresh folder below `work`."""
        torn = {id(node): self._half(path, node) for path, node in self._live.items() if node is not _FOLDER}
        forms: dict[str, tuple[_Names, Callable[[str, _Node], bytes]]] = {
            "all": (self._live, lambda path, _node: (self.root / path).read_bytes()),
            "torn": (self._live, lambda _path, node: torn[id(node)]),
            "names": (self._live, lambda _path, node: node.synced),
            "synced": (self._synced, lambda _path, node: node.synced),
        }
        for form, (names, contents) in forms.items():
            folder = work / form
            shutil.rmtree(folder, ignore_errors=True)
            for path, node in sorted(names.items()):
                if node is _FOLDER:
                    (folder / path).mkdir(parents=True, exist_ok=True)
                elif (folder / path).parent.is_dir():  # a name in a folder that is not there is not there either
                    (folder / path).write_bytes(contents(path, node))
            yield form, folder

    def _half(self, path: str, node: _Node) -> bytes:
        now = (self.root / path).read_bytes()
        if now == node.synced:
            return now
        same = (a == b for a, b in zip(now, node.synced, strict=False))
        kept = sum(1 for _ in itertools.takewhile(bool, same))
        return now[: kept + (len(now) - kept) // 2]

    def _step(self, what: str, path: str | None) -> None:
        """Count a change, and fail at the n-th."""
        if path is None:
            return
        if self._dead:
            raise PowerCut
        self.count += 1
        self.log.append(f"{what} {path}")
        if self.count == self.n:
            if self.power_cut:
                self._dead = True
                raise PowerCut
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)} (planted)")

    def _name(self, path: Any, dir_fd: int | None = None) -> str:
        text = os.fsdecode(path)
        if dir_fd is not None:
            text = os.path.join(_path_of(dir_fd), text)  # noqa: PTH118 — of names that may be bytes
        text = os.path.abspath(text)  # noqa: PTH100 — links are changed themselves
        relative = os.path.relpath(text, self.root)
        return "" if relative == "." else relative

    def _below(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Return a path relative to the root, or None outside it."""
        if isinstance(path, int):
            path = _path_of(path)
        name = self._name(path, dir_fd)
        return None if name.startswith("..") else name

    def _change(self, apply: Callable[[_Names], None], *paths: str) -> None:
        apply(self._live)
        self._pending.append(_Change(tuple({os.path.dirname(path) for path in paths}), apply))  # noqa: PTH120

    def _created(self, path: str, node: _Node) -> None:
        self._change(lambda names: names.__setitem__(path, node), path)

    def _was_synced(self, path: str) -> None:
        node = self._live.get(path)
        if node is None:  # removed meanwhile
            return
        if node is not _FOLDER:
            node.synced = (self.root / path).read_bytes()
            return
        for change in [change for change in self._pending if path in change.folders]:
            change.apply(self._synced)
            self._pending.remove(change)

    # What takes the place of the functions of `os`.

    def _open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        name = self._below(path, dir_fd)
        fresh = name is not None and flags & os.O_CREAT and name not in self._live
        if fresh:
            self._step("create", name)
        descriptor: int = _REAL["open"](path, flags, mode, dir_fd=dir_fd)
        if fresh and name is not None:
            self._created(name, _Node())
        return descriptor

    def _write(self, descriptor: int, data: Any) -> int:
        self._step("write", self._below(descriptor))
        return int(_REAL["write"](descriptor, data))

    def _ftruncate(self, descriptor: int, length: int) -> None:
        self._step("truncate", self._below(descriptor))
        _REAL["ftruncate"](descriptor, length)

    def _fsync(self, descriptor: int) -> None:
        name = self._below(descriptor)
        self._step("sync", name)
        _REAL["fsync"](descriptor)
        if name is not None:
            self._was_synced(name)

    _fdatasync = _fsync

    def _rename(
        self, source: Any, target: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
    ) -> None:
        old, new = self._below(source, src_dir_fd), self._below(target, dst_dir_fd)
        self._step(f"rename {old}", new)
        _REAL["rename"](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        if old is not None and new is not None:
            self._change(lambda names: _move(names, old, new), old, new)

    _replace = _rename

    def _exchange(self, one: Path, other: Path) -> bool:
        """Two names change places: see `engine/atomic.py`."""
        a, b = self._below(one), self._below(other)
        self._step(f"exchange {a}", b)
        done = _EXCHANGE(one, other)
        if done and a is not None and b is not None:

            def swap(names: _Names) -> None:
                for old, new in ((a, ".swap"), (b, a), (".swap", b)):
                    _move(names, old, new)

            self._change(swap, a, b)
        return done

    def _unlink(self, path: Any, *, dir_fd: int | None = None) -> None:
        name = self._below(path, dir_fd)
        if name is None or name in self._live:
            self._step("unlink", name)
        _REAL["unlink"](path, dir_fd=dir_fd)
        if name is not None:
            self._change(lambda names: names.pop(name, None) and None, name)

    _remove = _unlink

    def _mkdir(self, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        name = self._below(path, dir_fd)
        if name not in self._live:
            self._step("mkdir", name)
        _REAL["mkdir"](path, mode, dir_fd=dir_fd)
        if name is not None:
            self._created(name, _FOLDER)

    def _rmdir(self, path: Any, *, dir_fd: int | None = None) -> None:
        name = self._below(path, dir_fd)
        self._step("rmdir", name)
        _REAL["rmdir"](path, dir_fd=dir_fd)
        if name is not None:
            self._change(lambda names: names.pop(name, None) and None, name)

    def _stream(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **options: Any) -> Any:
        """Open as Python does; writes go through a raw file of ours."""
        name = None if isinstance(file, int) else self._below(file)
        if name is None or not set(mode) & set("wax+"):
            return _OPEN(file, mode, buffering, *rest, **options)
        plain = mode.replace("b", "").replace("t", "")
        exists = os.path.exists(file)  # noqa: PTH110
        if not exists or "w" in mode:
            self._step("truncate" if exists else "create", name)
        raw = _Raw(file, plain)
        raw.disk = self
        if not exists:
            self._created(name, _Node())
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return raw if buffering == 0 else buffered
        return io.TextIOWrapper(buffered, *rest, **options)


class _Raw(io.FileIO):
    """A file whose writes are counted."""

    disk: Disk

    def write(self, data: Any) -> int:
        self.disk._step("write", self.disk._below(self.fileno()))
        return super().write(data)


def _path_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink()).removesuffix(" (deleted)")


def _move(names: _Names, old: str, new: str) -> None:
    """Rename a file, or a folder with all that is in it."""
    if old not in names:  # its own name was never synced
        return
    for path in [path for path in names if path == new or path.startswith(new + os.sep)]:
        del names[path]
    for path in [path for path in names if path == old or path.startswith(old + os.sep)]:
        names[new + path[len(old) :]] = names.pop(path)


@contextlib.contextmanager
def cut_at(disk: Disk) -> Iterator[None]:
    """Run a block on a disk, to its end or to the power cut."""
    with disk, contextlib.suppress(PowerCut):
        yield
