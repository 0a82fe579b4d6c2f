"""The file behind `-o`: a journal while the run goes on, the finished file after it.

The journal has one JSON line per record, and a record is safe once it is written. For JSONL the journal is the output
itself: its lines are the same, so anybody can follow them, and a million records are not written twice. For CSV and
JSON it is `FILE.partial`; the file is written out from it when the run ends, also after Ctrl-C. Only a kill, a power
cut or a full disk leave a journal behind, and `--resume` continues it.
"""

import contextlib
import csv
import errno
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Self

from ...engine.atomic import replacing, sync
from ...engine.codec import decode
from ...errors import OutputError, UsageError
from .records import (
    COLUMNS,
    EARLIER_COLUMNS,
    WITH_WORDS,
    Format,
    Record,
    RunSettings,
    Status,
    document,
    from_line,
    from_row,
    to_line,
)

# A sync protects from a power cut; a kill -9 loses nothing that was written. It takes 0.13 ms here, 10 ms and more on
# hard disks and network shares: so every record is synced, unless that would take over 2 % of the time.
SYNC_PAUSE = 50  # × what the last sync took
_BEGINNING = b'{"image": '  # of every line of a journal


class RecordFile:
    """A file that results are written to, for one thread. Use it in a `with` block and call `finish()` at the end.

    With `resume`, `done` holds the scores of an earlier run with the same settings, by image. Its errors are dropped:
    those images are to be tried again. A record written for an image in `done` takes the place of the old one.
    Without `resume`, a file that holds anything is replaced only with `force`. Raises OutputError.
    """

    def __init__(
        self, path: Path, form: Format, settings: RunSettings, *, resume: bool = False, force: bool = False
    ) -> None:
        if form is Format.TABLE:
            raise UsageError("a file holds jsonl, json or csv, not a table")
        if resume and force:
            raise UsageError("--resume keeps what is in the file, --force starts over: choose one")
        self.path = path
        self._form = form
        self._target = Path(os.path.realpath(path))  # a symbolic link stays one when its file is replaced
        self._journal = self._target if form is Format.JSONL else _beside(self._target, ".partial")
        self._records: dict[str, Record] = {}
        self._superseded = False  # the journal has two records of an image
        self._fd = -1
        self._sync_due = 0.0
        try:
            with _explained(path):
                self._begin(settings, resume=resume, force=force)
        except BaseException:
            self._release()
            raise
        self.done: Mapping[str, Record] = dict(self._records)

    def write(self, record: Record) -> None:
        """Append a record. It survives the process once this returns, and is not in the file if this raises."""
        self._append(to_line(record, Format.JSONL))
        self._superseded |= record.image in self._records
        self._records[record.image] = record

    def finish(self, order: Callable[[list[Record]], list[Record]] | None = None) -> None:
        """Complete the file, with all records, the earlier run's too. They come in `order` if one is given."""
        with _explained(self.path):
            if order or self._superseded or self._journal != self._target:
                records = list(self._records.values())
                _replace(self._target, order(records) if order else records, self._form)
            else:
                os.fsync(self._fd)
            if self._journal != self._target:
                self._journal.unlink()
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Write out what was scored, if the run ended before `finish`."""
        try:
            # The first error says more than a second one: that the full disk has no room for this either.
            with contextlib.suppress(OutputError) if kind else contextlib.nullcontext():
                if self._fd >= 0:
                    self.finish()
        finally:
            self._release()

    def _begin(self, settings: RunSettings, *, resume: bool, force: bool) -> None:
        if self._target.is_symlink() or (self._target.exists() and not self._target.is_file()):  # a link in a circle
            raise OutputError(f"{self.path} is not a regular file; without -o, results go to standard output")
        holding = next((p for p in (self._journal, self._target) if p.exists() and p.stat().st_size), None)
        if holding and not resume and not force:
            raise OutputError(f"{holding} holds results already; add --resume to continue, --force to start over")
        if holding and resume:
            self._read_back(holding, settings)
        self._open()
        if force:
            os.ftruncate(self._fd, 0)

    def _read_back(self, holding: Path, settings: RunSettings) -> None:
        """Take over the scores of an earlier run, and leave only those in the journal."""
        if holding == self._journal:
            self._open()  # before reading: another run may still be writing
        records = read_records(holding, Format.JSONL if holding == self._journal else self._form)
        self._records = {record.image: record for record in records if record.status is Status.OK}
        if different := next(filter(None, map(settings.difference, self._records.values())), None):
            raise OutputError(
                f"{self.path} was begun with other settings ({different}); use those again, another -o FILE, "
                f"or --force to start over"
            )
        if holding != self._journal or len(self._records) < len(records) or not _ends_whole(holding):
            _replace(self._journal, self._records.values(), Format.JSONL)

    def _open(self) -> None:
        """Open and lock the journal that the name now stands for."""
        self._release()
        fresh = not self._journal.exists()
        self._fd = os.open(self._journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        with contextlib.suppress(ImportError, OSError):  # neither Windows nor every network share has such locks
            import fcntl

            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"another run is writing {self.path}; wait for it, or use another -o FILE") from None
        if fresh:
            sync(self._journal.parent)  # a file is as safe as its name

    def _release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _append(self, data: bytes) -> None:
        with _explained(self.path):
            end = os.fstat(self._fd).st_size
            try:
                rest = memoryview(data)
                while rest:  # a second round only happens when the disk is full, and then raises
                    rest = rest[os.write(self._fd, rest) :]
                if (start := time.monotonic()) >= self._sync_due:
                    getattr(os, "fdatasync", os.fsync)(self._fd)
                    now = time.monotonic()
                    self._sync_due = now + SYNC_PAUSE * (now - start)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, end)  # never half a line; if this fails too, resuming cuts it off
                raise


def read_records(path: Path, form: Format) -> list[Record]:
    """Return the records of a file that we wrote. Raises OutputError for any other file.

    Half a line at the end of JSONL is left out: a kill, a full disk or a power cut broke it off. Anything else that we
    did not write is not ours to cut off.
    """
    read = {Format.JSONL: _read_lines, Format.CSV: _read_csv, Format.JSON: _read_array}[form]
    try:
        return read(path)
    except (ValueError, RecursionError, csv.Error) as exc:
        raise OutputError(
            f"{path} is no {form} result of diffiqa ({exc}); mend it, use another -o FILE, or --force to start over"
        ) from exc


def _read_lines(path: Path) -> list[Record]:
    records: list[Record] = []
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                if not records and line[: len(_BEGINNING)] != _BEGINNING[: len(line)]:
                    raise ValueError("it does not begin like one")
                break
            try:
                records.append(from_line(line))
            except ValueError as exc:
                raise ValueError(f"line {number}: {exc}") from exc
    return records


def _read_csv(path: Path) -> list[Record]:
    with path.open(encoding="utf-8", newline="") as stream:
        columns = tuple(stream.readline().removesuffix("\n").split(","))
        if columns not in {WITH_WORDS, COLUMNS, EARLIER_COLUMNS}:
            raise ValueError("its first line is not the header that this version of diffiqa writes")
        return [from_row(row, columns) for row in csv.reader(stream, strict=True)]


def _read_array(path: Path) -> list[Record]:
    return list(decode(tuple[Record, ...], json.loads(path.read_bytes()), "records", ValueError))


def _ends_whole(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read() == b"\n"


def _replace(path: Path, records: Iterable[Record], form: Format) -> None:
    """Put a new file in place of `path`, or leave that as it is."""
    # The lock makes us the only writer: what a killed run left under this name is ours to remove.
    with replacing(path, by_way_of=_beside(path, ".new")) as stream:
        stream.writelines(document(records, form))


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn errors of the system into OutputError with what to do."""
    try:
        yield
    except OSError as exc:
        advice = "choose another -o FILE"
        if exc.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            advice = "the records before are safe: make room, then add --resume to continue"
        elif exc.errno == errno.ENOENT:
            advice = "make its folder first"
        raise OutputError(f"cannot write {path}: {exc.strerror or exc}; {advice}") from exc
