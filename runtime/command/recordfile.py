"""The file behind `-o`: records that are safe once written, and a run that can be continued after any end.

JSONL and CSV grow by one whole record per write. A JSON array cannot grow, so its records wait as JSONL in
`FILE.partial` until the run is over.
"""

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from ...engine.atomic import replacing
from ...engine.codec import decode
from ...errors import OutputError, UsageError
from .records import CSV_HEADER, Format, Record, RecordWriter, RunSettings, Status, from_line, to_line

# A sync protects from a power cut; after kill -9 the kernel has what was written anyway. It takes 0.13 ms here, 10 ms
# and more on hard disks and network shares: so every record is synced, until that would take over 2 % of the time.
SYNC_PAUSE = 50  # × what the last sync took


class RecordFile:
    """A file that results are written to. Use it in a `with` block, call `finish()` at the end; for one thread.

    With `resume`, `done` holds the scores of an earlier run with the same settings. Images are matched by name only:
    one that has changed since is not scored again. Errors are dropped, for their images to be tried again.
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
        self.done: Mapping[str, Record] = {}
        self._form = form
        self._line_form = Format.JSONL if form is Format.JSON else form
        self._target = Path(os.path.realpath(path))  # a symbolic link stays one when its file is replaced
        self._growing = _sibling(self._target, ".partial") if form is Format.JSON else self._target
        self._fd = -1
        self._sync_due = 0.0
        with _explained(path):
            if self._target.exists() and not self._target.is_file():
                raise OutputError(f"{path} is not a regular file; without -o, results go to standard output")
            holding = next((p for p in (self._growing, self._target) if p.exists() and p.stat().st_size), None)
            if holding and not resume and not force:
                raise OutputError(f"{holding} holds results already; add --resume to continue, --force to start over")
        try:
            if holding and resume:
                self._resume(holding, settings)
            with _explained(path):
                self._open()
                if force:
                    os.ftruncate(self._fd, 0)
            if form is Format.CSV and not os.fstat(self._fd).st_size:
                self._append(CSV_HEADER)
        except BaseException:
            self.close()
            raise

    def write(self, record: Record) -> None:
        """Append a record. It survives the process once this returns, and is not in the file if this raises."""
        self._append(to_line(record, self._line_form))

    def finish(self, order: Callable[[list[Record]], list[Record]] | None = None) -> None:
        """Complete the file: close a JSON array; put all records, the earlier run's too, in `order` if one is given."""
        with _explained(self.path):
            os.fsync(self._fd)
            if order or self._form is Format.JSON:
                records, _ = read_records(self._growing, self._line_form)
                _replace(self._target, order(records) if order else records, self._form)
            if self._growing != self._target:
                self._growing.unlink()
        self.close()

    def close(self) -> None:
        """Let go of the file as it is: an unfinished one can be resumed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _resume(self, holding: Path, settings: RunSettings) -> None:
        """Fill `done`, and leave in the growing file just that."""
        form = self._form if holding == self._target else self._line_form
        with _explained(self.path):
            if holding == self._growing:
                self._open()  # before reading: another run may still be writing
            records, whole_bytes = read_records(holding, form)
        self.done = {record.image: record for record in records if record.status is Status.OK}
        if different := next(filter(None, map(settings.difference, self.done.values())), None):
            raise OutputError(
                f"{self.path} was begun with other settings ({different}); use those again, another -o FILE, "
                f"or --force to start over"
            )
        with _explained(self.path):
            if holding != self._growing or len(self.done) < len(records):
                _replace(self._growing, self.done.values(), self._line_form)
            elif whole_bytes < holding.stat().st_size:
                os.truncate(holding, whole_bytes)

    def _open(self) -> None:
        """Open and lock what the name now stands for."""
        self.close()
        self._fd = os.open(self._growing, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
        with contextlib.suppress(ImportError, OSError):  # neither Windows nor every network share has such locks
            import fcntl

            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"another run is writing {self.path}; wait for it, or use another -o FILE") from None

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
                    os.ftruncate(self._fd, end)  # never half a line; should even this fail, resuming cuts it off
                raise


def read_records(path: Path, form: Format) -> tuple[list[Record], int]:
    """Return a file's whole records, and how many bytes hold them (with the CSV header).

    The rest, if any, is the beginning of a record that a kill, a full disk or a power cut broke off. Anything else that
    is no record raises OutputError: what we did not leave there is not ours to cut off.
    """
    if form is Format.JSON:
        return _read_array(path), path.stat().st_size
    records: list[Record] = []
    whole_bytes = 0
    with path.open("rb") as stream:
        for number, line in enumerate(_whole_lines(stream, form), 1):
            if form is Format.CSV and number == 1:
                if line != CSV_HEADER:
                    raise _foreign(path, form, number, "it is not the header that this version of diffiqa writes")
            else:
                try:
                    records.append(from_line(line, form))
                except ValueError as exc:
                    raise _foreign(path, form, number, str(exc)) from exc
            whole_bytes += len(line)
        stream.seek(whole_bytes)
        rest = stream.read()
    begin = CSV_HEADER if form is Format.CSV else b'{"image": '
    if not whole_bytes and rest[: len(begin)] != begin[: len(rest)]:
        raise _foreign(path, form, 1, "it does not begin like one")
    if any(_is_record(line + b"\n", form) for line in rest.split(b"\n")[1:]):  # a quote too many, far up in a CSV file
        raise _foreign(path, form, len(records) + 2, "a quotation mark is never closed")
    return records, whole_bytes


def _read_array(path: Path) -> list[Record]:
    try:
        return list(decode(tuple[Record, ...], json.loads(path.read_bytes()), "records", ValueError))
    except (ValueError, RecursionError) as exc:
        raise _foreign(path, Format.JSON, 0, str(exc)) from exc


def _whole_lines(stream: IO[bytes], form: Format) -> Iterator[bytes]:
    """Yield lines with their ends, up to the first that has none; in CSV, line breaks between quotes are no ends."""
    parts: list[bytes] = []
    quotes = 0
    for part in stream:
        parts.append(part)
        quotes += part.count(b'"') if form is Format.CSV else 0
        if quotes % 2 == 0 and part.endswith(b"\n"):
            yield b"".join(parts)
            parts.clear()


def _is_record(line: bytes, form: Format) -> bool:
    try:
        from_line(line, form)
    except ValueError:
        return False
    return True


def _foreign(path: Path, form: Format, number: int, problem: str) -> OutputError:
    where = path if form is Format.JSON else f"line {number} of {path}"
    return OutputError(
        f"{where} is no {form} result of diffiqa ({problem}); mend it, use another -o FILE, or --force to start over"
    )


def _replace(path: Path, records: Iterable[Record], form: Format) -> None:
    """Put a new file in place of `path`, or leave that as it is."""
    # The lock makes us the only writer: what a killed run left under this name is ours to remove.
    with replacing(path, by_way_of=_sibling(path, ".new")) as stream:
        writer = RecordWriter(stream.write, form)
        for record in records:
            writer.write(record)
        writer.close()


def _sibling(path: Path, suffix: str) -> Path:
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
