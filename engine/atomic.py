"""Files that appear whole or not at all, and the lock of a folder that one process at a time may write."""

import contextlib
import ctypes
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import OutputError


def check_folder_of(file: Path, what: str = "") -> None:
    """Raise OutputError if the folder of `file` does not exist. Call it before a long run, not after."""
    if not file.resolve().parent.is_dir():
        raise OutputError(f"cannot write {what}{file}: there is no folder {file.parent}; create it first")


@contextlib.contextmanager
def replacing(path: Path, *, by_way_of: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a stream whose file replaces `path` when the block ends without an error; until then `path` stays as it is.

    A killed process leaves the temporary file behind. If only one process writes here, `by_way_of` can give that file a
    fixed name: then the next call removes it.
    """
    # A random name, not `path` with a suffix: that could be too long, or be the name of another run's file.
    temporary = by_way_of or path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if path.exists():
            temporary.chmod(path.stat().st_mode & 0o777)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def writing(path: Path, advice: str = "") -> Iterator[BinaryIO]:
    """Do as `replacing`, for a file that the user named. Raises OutputError, which ends with `advice`."""
    try:
        with replacing(path) as stream:
            yield stream
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror or exc}{advice}") from exc


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock on `folder`; yield False if another process has it, or moved the folder away meanwhile."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock: users must not write twice at once
        yield True
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat())
        except BlockingIOError:
            ours = False
        yield ours
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Let two names change places, in one step that a crash cannot halve; return False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2  # Linux
    except (AttributeError, OSError, TypeError):
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def sync_all(folder: Path) -> None:
    """Write a folder and all that is in it through to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Write a file or folder through to the disk."""
    if os.name == "nt":  # Windows opens no directories, and syncs only files open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
