"""Where images come from: files and folders, lists, tar archives, Parquet columns, buckets, web servers.

An archive is gone through once, for the plan: an entry says where its bytes lie, so reading one needs no search.
"""

import collections
import contextlib
import enum
import functools
import itertools
import os
import tarfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from ..errors import DatasetError, ImageError, UsageError, first_line
from ..runtime.images import readable_suffixes
from ..runtime.inputs import each_image
from . import web
from .part import arrow_and_parquet
from .plan import Entry
from .store import SCHEMES, file_system, scheme_of

_WEB = {"http", "https"}
_COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")
_PARQUET = ".parquet#"
_READERS, _AHEAD = 8, 16  # how many images are fetched at a time, and ahead of the scorer
_one_at_a_time = threading.Lock()


class Http(enum.StrEnum):
    """Whether names may be those of web servers."""

    NEVER = "never"
    PUBLIC = "public"
    ANY = "any"  # in private networks too


def entries(names: Iterable[str], http: Http = Http.NEVER) -> Iterator[Entry]:
    """Yield what names stand for, in their order: files, folders, patterns, and what has an ending of its own.

    `LIST.txt` is a list of names, `ARCHIVE.tar` the images in it, `TABLE.parquet#COLUMN` a column of names or images.
    In a bucket `PREFIX/` means all images below. Raises UsageError and DatasetError.
    """
    for name in names:
        for found in _places(name, http):
            if found.endswith(".txt"):
                yield from itertools.chain.from_iterable(map(_inside, _listed(found, http)))
            else:
                yield from _inside(found)


def read(entry: Entry, http: Http = Http.NEVER) -> str | bytes:
    """Return the bytes of an entry, or the name of a file that is to be read as it is. Raises ImageError."""
    name, start, size = entry
    if start is not None and size is not None:
        if _PARQUET in name:
            return _cell(name, start, size)
        return _bytes(name.partition(".tar#")[0] + ".tar", name, start, start + size)
    scheme = scheme_of(name)
    if scheme is None:
        return name
    if scheme in _WEB and http is not Http.NEVER:
        return web.fetch(name, private=http is Http.ANY)
    if scheme not in SCHEMES:
        raise ImageError(f"{name}: images are read from files, {', '.join(SCHEMES)}, and http(s) if it is allowed")
    return _bytes(name, name, 0, None)


def read_ahead(wanted: Iterable[Entry], http: Http) -> Iterator[str | bytes | ImageError]:
    """Yield for each entry what `read` returns or raises, while threads fetch the next ones."""
    waiting: collections.deque[Future[str | bytes] | str] = collections.deque()

    def settled() -> str | bytes | ImageError:
        first = waiting.popleft()
        try:
            return first if isinstance(first, str) else first.result()
        except ImageError as exc:
            return exc

    with ThreadPoolExecutor(_READERS, "diffiqa-fetch") as pool:
        for entry in wanted:
            is_file = entry.start is None and scheme_of(entry.name) is None
            waiting.append(entry.name if is_file else pool.submit(read, entry, http))
            if len(waiting) > _AHEAD:
                yield settled()
        while waiting:
            yield settled()


def _places(name: str, http: Http) -> Iterator[str]:
    """Yield the files, objects and archives that a name stands for, the latter with their column."""
    if not name:
        raise UsageError("an image name is empty: an unset variable?")
    container, column = _split(name)
    scheme = scheme_of(name)
    if scheme in _WEB and http is Http.NEVER:
        raise UsageError(f"{name} is on a web server: allow such names with --http public")
    if scheme is None:
        found: Iterable[str] = each_image([container])
    elif scheme in SCHEMES:
        found = _objects(container)
    else:
        found = [container]
    yield from (f"{one}#{column}" for one in found) if column else found


def _objects(uri: str) -> Iterator[str]:
    """Yield the objects that a prefix or a pattern stands for. If there are none, itself: then reading it fails."""
    below = uri.endswith("/")
    if not below and not any(wild in uri for wild in "*?["):
        yield uri
        return
    fs, path = file_system(uri)
    try:
        found = sorted(fs.find(path) if below else fs.glob(path))
    except Exception as exc:
        raise DatasetError(f"{uri} cannot be listed ({first_line(exc)})") from exc
    images = [one for one in found if not below or Path(one).suffix.lower() in readable_suffixes()]
    yield from map(fs.unstrip_protocol, images) if images else [uri]


def _listed(path: str, http: Http) -> Iterator[str]:
    with _opened(path) as stream:
        for line in stream:
            if name := os.fsdecode(line.rstrip(b"\r\n")):
                if name.endswith(".txt"):
                    raise UsageError(f"{path} has the name of another list, {name}: give that itself")
                yield from _places(name, http)


def _inside(name: str) -> Iterator[Entry]:
    """Yield the images in an archive; anything else is itself."""
    container, column = _split(name)
    if column:
        yield from _cells(container, column)
    elif name.endswith(".parquet"):
        raise UsageError(f"{name} is a table: say which column, as {name}#image")
    elif name.endswith(_COMPRESSED):
        raise UsageError(f"{name} is compressed, so no image in it can be read by itself: unpack it to a .tar")
    elif name.endswith(".tar"):
        yield from _members(name)
    else:
        yield Entry(name)


def _members(path: str) -> Iterator[Entry]:
    suffixes = readable_suffixes()
    try:
        with _opened(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            while member := archive.next():
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                if member.isreg() and not member.issparse() and Path(member.name).suffix.lower() in suffixes:
                    yield Entry(f"{path}#{member.name}", member.offset_data, member.size)
            stream.seek(archive.offset)
            if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # for tarfile a cut or damaged one just ends
                raise tarfile.ReadError("unexpected end of data")
    except tarfile.TarError as exc:
        raise DatasetError(f"{path} is no whole tar archive ({first_line(exc)})") from exc


def _cells(path: str, column: str) -> Iterator[Entry]:
    """Yield the names in a column of texts; else where each image lies."""
    arrow, parquet = arrow_and_parquet()
    number = 0
    try:
        with _opened(path) as stream, parquet.ParquetFile(stream) as table:
            if column not in table.schema_arrow.names:
                raise DatasetError(f"{path} has no column {column}, but {', '.join(table.schema_arrow.names)}")
            kind = table.schema_arrow.field(column).type
            if not arrow.types.is_string(kind) and not arrow.types.is_large_string(kind):
                for group in range(table.num_row_groups):
                    for row in range(table.metadata.row_group(group).num_rows):
                        yield Entry(f"{path}#{column}:{number}", group, row)
                        number += 1
                return
            for batch in table.iter_batches(columns=[column]):
                for name in batch.column(0).to_pylist():
                    if not name:
                        raise DatasetError(f"{path} has a row without a name in column {column}")
                    yield Entry(name)
    except arrow.ArrowException as exc:
        raise DatasetError(f"{path} is no Parquet file that can be read ({first_line(exc)})") from exc


def _cell(name: str, group: int, row: int) -> bytes:
    path, column = _split(name)
    with _explained(name), _one_at_a_time:
        value = _column(path, column.rpartition(":")[0], group)[row].as_py()
    if isinstance(value, dict):  # as data sets of the Hugging Face hub have them
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise ImageError(f"{name}: there are no bytes of an image")
    return value


@functools.lru_cache(1)
def _column(path: str, column: str, group: int) -> Any:
    with _opened(path) as stream, arrow_and_parquet()[1].ParquetFile(stream) as table:
        return table.read_row_group(group, columns=[column]).column(0)


def _bytes(path: str, name: str, start: int, end: int | None) -> bytes:
    with _explained(name):
        if scheme_of(path) is None:
            with Path(path).open("rb") as stream:
                stream.seek(start)
                return stream.read(-1 if end is None else end - start)
        fs, inside = file_system(path)
        most = start + web.MAX_BYTES + 1
        data: bytes = fs.cat_file(inside, start=start, end=most if end is None else min(end, most))
        if len(data) > web.MAX_BYTES:
            raise ImageError(f"{name}: more than {web.MAX_BYTES} bytes")
        return data


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what a library raises into ImageError."""
    try:
        yield
    except ImageError:
        raise
    except Exception as exc:
        why = (
            "no such file" if isinstance(exc, FileNotFoundError) else getattr(exc, "strerror", None) or first_line(exc)
        )
        raise ImageError(f"{name}: cannot be read ({why})") from exc


def _opened(path: str) -> IO[bytes]:
    """Open a list or an archive. Raises DatasetError."""
    try:
        if scheme_of(path) is None:
            return Path(path).open("rb")
        fs, inside = file_system(path)
        stream: IO[bytes] = fs.open(inside, "rb")
    except UsageError:
        raise
    except Exception as exc:
        raise DatasetError(f"{path} cannot be opened: {getattr(exc, 'strerror', None) or first_line(exc)}") from exc
    return stream


def _split(name: str) -> tuple[str, str]:
    """Return the table and the column in `TABLE.parquet#COLUMN`; of other names, themselves and nothing."""
    container, found, column = name.partition(_PARQUET)
    return (container + ".parquet", column) if found else (name, "")
