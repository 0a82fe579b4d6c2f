"""Files that appear whole or not at all, and the lock of a folder that one process at a time may write."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import OutputError


def check_folder_of(file: Path, what: str = "") -> None:
    """Raise OutputError if there is no folder to write `file` (called `what`) into: better now than after an hour."""
    if not file.resolve().parent.is_dir():
        raise OutputError(f"cannot write {what}{file}: there is no folder {file.parent}; create it first")


@contextlib.contextmanager
def replacing(path: Path, *, by_way_of: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a stream that takes the place of `path` when the block ends well; what was there before stays till then.

    A killed process leaves the temporary file behind. Where only one process writes, `by_way_of` names it, and the next
    call removes what the last one left.
    """
    # A name of its own and not `path` with a suffix: that could be too long, or meet another run's.
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
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock on `folder`; yield False if another process has it, or moved the folder away meanwhile."""
    try:
        import fcntl
    except ImportError:  # Windows: two writers at once are the user's to avoid
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


def sync(path: Path) -> None:
    """Have a file or folder reach the disk."""
    if os.name == "nt":  # Windows opens no directories, and syncs only files open for writing
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
