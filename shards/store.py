"""Where a run keeps its files: a folder, or a bucket, with the same methods.

What is written is there whole, or not at all, and survives a power cut once the call returns. Errors are OutputErrors.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.atomic import locked, replacing, sync
from ..errors import DiffiqaError, OutputError, UsageError, first_line

SCHEMES = ("s3", "gs", "az")
LOCK = "lock.json"  # of a bucket; folders have locks of the system
BEAT_SECONDS, DEAD_SECONDS = 10.0, 40.0  # how often who holds a bucket renews that; when others take it over
_URI = re.compile(r"([a-zA-Z][\w+.-]+)://")


def scheme_of(name: str) -> str | None:
    """Return the scheme of a URI in lower case; None for the name of a file."""
    match = _URI.match(name)
    return match[1].lower() if match else None


def open_store(out: str | os.PathLike[str]) -> "Store":
    """Return the store at a place, where nothing needs to be yet."""
    place = os.fspath(out)
    if not place:
        raise UsageError("the place for the shards has no name: an unset variable?")
    if (scheme := scheme_of(place)) is None:
        return Folder(Path(place))
    if scheme not in SCHEMES:
        raise UsageError(f"shards go to a folder or a bucket ({', '.join(SCHEMES)}), not to {place}")
    return Bucket(place.rstrip("/"))


def file_system(uri: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URI, and the path in it. Raises UsageError.

    Whatever needs more than one image's bytes goes through here, and so never to a web server.
    """
    if scheme_of(uri) not in SCHEMES:
        raise UsageError(f"{uri}: lists, archives and tables are read from files and buckets ({', '.join(SCHEMES)})")
    try:
        from fsspec.core import url_to_fs

        fs, path = url_to_fs(uri)
    except ImportError as exc:
        raise UsageError(f"{uri} needs a package: pip install 'diffiqa[cloud]' ({first_line(exc)})") from exc
    return fs, path


@contextlib.contextmanager
def _explained(what: str, kind: type[Exception] = OSError) -> Iterator[None]:
    """Turn what a file system, or a bucket's library, raises into OutputError."""
    try:
        yield
    except DiffiqaError:
        raise
    except kind as exc:
        why = getattr(exc, "strerror", None) or first_line(exc)
        advice = "mend this and give the command again: whole shards are kept"
        raise OutputError(f"cannot use {what}: {why}; {advice}") from exc


@contextlib.contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    with _explained(str(place)), tempfile.TemporaryDirectory(prefix=".plan-", dir=place) as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Folder:
    """A folder of this machine, or one that it shares with others."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes | None:
        """Return a file or a part of it."""
        with _explained(f"{self.path / name}"):
            try:
                with (self.path / name).open("rb") as stream:
                    stream.seek(start)
                    return stream.read(-1 if end is None else end - start)
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file through to the disk, give it its name, and write the folder through."""
        with _explained(f"{self.path / name}"), replacing(self.path / name) as stream:
            stream.write(data)

    create = write  # on a file system the last of equal attempts may stay

    def take(self, name: str, file: Path) -> None:
        """Give a file its name as `write` does."""
        with _explained(f"{self.path / name}"):
            sync(file)
            file.replace(self.path / name)
            sync(self.path)

    def names(self) -> set[str]:
        """Return the names of all files."""
        with _explained(str(self.path)):
            try:
                with os.scandir(self.path) as entries:
                    return {entry.name for entry in entries if entry.is_file()}
            except FileNotFoundError:
                return set()

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """Yield a folder in this one, so that files can be moved out of it."""
        return _scratch(self.path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder and lock it. The system frees the lock when its process ends, however it does."""
        with _explained(str(self.path)):
            self.path.mkdir(exist_ok=True)
            sync(self.path.resolve().parent)
        with locked(self.path) as ours:
            if not ours:
                raise OutputError(f"another run is writing {self.path}; wait for it, or use another folder")
            for left in self.path.glob(".*"):  # by processes that were killed
                if left.name.startswith(".plan-"):
                    shutil.rmtree(left)
                elif re.fullmatch(r"\.[0-9a-f]{16}\.tmp", left.name):
                    left.unlink(missing_ok=True)
            yield


@dataclass(frozen=True)
class Bucket:
    """A prefix in an object store, by fsspec. An object appears whole, and `create` never replaces one."""

    uri: str

    def __str__(self) -> str:
        return self.uri

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes | None:
        """Return an object or a part of it."""
        with self._at(name) as (fs, path):
            try:
                data: bytes = fs.cat_file(path, start=start or None, end=end)
            except FileNotFoundError:
                return None
            return data

    def write(self, name: str, data: bytes) -> None:
        """Write an object."""
        with self._at(name) as (fs, path):
            fs.pipe_file(path, data)

    def create(self, name: str, data: bytes) -> None:
        """Write an object that is not there yet."""
        if not self._is_new(name, data) and self.read(name) != data:
            raise OutputError(f"{self.uri}/{name} is there with other bytes: is another run writing here?")

    def take(self, name: str, file: Path) -> None:
        """Send a file, in parts if it is large."""
        with self._at(name) as (fs, path):
            fs.put_file(str(file), path)

    def names(self) -> set[str]:
        """Return the names of all objects right below the prefix."""
        with self._at() as (fs, path):
            fs.invalidate_cache()
            try:
                return {found.rpartition("/")[2] for found in fs.ls(path, detail=False)}
            except FileNotFoundError:
                return set()

    def scratch(self) -> contextlib.AbstractContextManager[Path]:
        """Yield a folder of this machine."""
        return _scratch(Path(tempfile.gettempdir()))

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep an object that is renewed as long as this process lives; take over one that is not."""
        mine = {"owner": secrets.token_hex(8), "host": socket.gethostname(), "pid": os.getpid()}
        if not self._is_new(LOCK, json.dumps(mine).encode()):
            self._wait_for_death()
            self.write(LOCK, json.dumps(mine).encode())
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(BEAT_SECONDS):
                with contextlib.suppress(OutputError):  # an outage of the network; the next shard will tell
                    self.write(LOCK, json.dumps(mine | {"beat": time.time()}).encode())

        thread = threading.Thread(target=renew, name="diffiqa-lock", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with contextlib.suppress(OutputError), self._at(LOCK) as (fs, path):
                fs.rm_file(path)

    def _wait_for_death(self) -> None:
        """Return once who holds the bucket is dead. Raises OutputError if it renews its hold meanwhile."""
        before = self.read(LOCK)
        with contextlib.suppress(ValueError, KeyError, TypeError, ProcessLookupError):
            holder = json.loads(before or b"")
            if holder["host"] == socket.gethostname():
                os.kill(int(holder["pid"]), 0)  # raises ProcessLookupError if it is gone: then there is no need to wait
            deadline = time.monotonic() + DEAD_SECONDS
            while time.monotonic() < deadline:
                time.sleep(BEAT_SECONDS / 4)
                if (now := self.read(LOCK)) != before and now is not None:
                    who = f"process {holder['pid']} on {holder['host']}"
                    raise OutputError(f"another run is writing {self.uri} ({who}); wait for it, or use another place")

    def _is_new(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one (If-None-Match); return whether it was written."""
        with self._at(name) as (fs, path):
            try:
                fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            return True

    @contextlib.contextmanager
    def _at(self, name: str = "") -> Iterator[tuple[Any, str]]:
        uri = f"{self.uri}/{name}".rstrip("/")
        with _explained(uri, Exception):
            yield file_system(uri)


Store = Folder | Bucket
