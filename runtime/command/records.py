r"""One flat record per image, its line in each file format, and the order records are shown in.

JSONL and JSON are UTF-8 with the keys in the order of `Record`; CSV has a header, RFC 4180 quoting and `\n` line ends.
Numbers have all their digits, None is null or an empty cell, notes are joined with "; " in CSV. File names are data
and stay as they are, in CSV as well: a cell that starts with `=` is imported as text or it is a formula to a
spreadsheet. Only bytes that are no UTF-8 have to be spelt differently: `\udcXX`, as JSON does anyway.
"""

import csv
import enum
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any, Self

from ...engine.codec import decode, encode
from ...engine.manifest import Manifest
from ...errors import OutputError, UsageError
from ..results import Failure, Mode, Options, Score


class Format(enum.StrEnum):
    """How results are written."""

    TABLE = "table"
    JSONL = "jsonl"
    JSON = "json"
    CSV = "csv"


class Sort(enum.StrEnum):
    """What results are sorted by."""

    SCORE = "score"
    NAME = "name"
    VCG = "vcg"
    VDA = "vda"
    SPREAD = "spread"
    TIME = "time"


class Status(enum.StrEnum):
    """Whether an image has a score."""

    OK = "ok"
    ERROR = "error"


@dataclass(frozen=True)
class RunSettings:
    """What all scores of one run have in common; only runs with the same settings may share a file."""

    engine: str
    crops: int
    seed: int
    seeds: int
    mode: Mode
    pixel_budget: int

    @classmethod
    def of(cls, manifest: Manifest, options: Options) -> Self:
        """Return the settings a run of these options has: the engine's crop count where they give none."""
        crops = options.crops or manifest.crop.count
        return cls(manifest.engine_id, crops, options.seed, options.seeds, options.mode, options.pixel_budget)

    def __str__(self) -> str:
        """Return all but the engine, which has a column of its own, as `crops=4 seed=0 …`."""
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self)[1:])

    def difference(self, record: "Record") -> str | None:
        """Return in which way a record was made with other settings than these, or None."""
        if (record.engine, record.settings) == (self.engine, str(self)):
            return None
        before = {"engine": record.engine} | dict(part.partition("=")[::2] for part in record.settings.split())
        now = {f.name: str(getattr(self, f.name)) for f in fields(self)}
        parts = (f"{name} {before.get(name, '?')}, now {now[name]}" for name in now if before.get(name) != now[name])
        return "; ".join(parts) or f"settings {record.settings!r}, now {str(self)!r}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is written about one image; the order of the fields is that of keys and columns."""

    image: str  # the name as given
    status: Status
    score: float | None = None
    vcg: float | None = None
    vda: float | None = None
    spread: float | None = None
    width: int | None = None
    height: int | None = None
    mode: Mode | None = None  # as carried out
    crops: int | None = None  # as carried out: small images have no room for as many as asked for
    seed: int | None = None  # the first of `seeds` consecutive ones
    seeds: int | None = None
    engine: str
    backend: str | None = None
    seconds: float | None = None
    digest: str | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None
    settings: str  # what was asked for, so that a file tells by itself whether a run may continue it

    @classmethod
    def of(cls, result: Score | Failure, settings: RunSettings) -> Self:
        """Return the record of a result. A score that is no number becomes an error: no format could carry it."""
        if isinstance(result, Score) and math.isfinite(result.score):
            return cls(
                image=result.source,
                status=Status.OK,
                score=result.score,
                vcg=result.vcg,
                vda=result.vda,
                spread=result.spread,
                width=result.width,
                height=result.height,
                mode=result.mode,
                crops=len(result.crops),
                seed=result.seeds[0],
                seeds=len(result.seeds),
                engine=result.engine,
                backend=result.backend,
                seconds=result.seconds,
                digest=result.digest,
                notes=tuple(note.replace("; ", ", ") for note in result.notes if note),  # "; " separates notes in CSV
                settings=str(settings),
            )
        error = result.error if isinstance(result, Failure) else f"the engine returned {result.score}, not a score"
        return cls(
            image=result.source,
            status=Status.ERROR,
            engine=settings.engine,
            error=error or "unknown error",
            settings=str(settings),
        )

    def result(self) -> Score | Failure:
        """Return the result this record is of, as far as it holds it: without pictures and single crops."""
        if self.score is None or self.mode is None or self.seed is None:
            return Failure(self.image, self.error or "not scored")
        return Score(
            source=self.image,
            score=self.score,
            vcg=self.vcg,
            vda=self.vda,
            spread=self.spread,
            width=self.width or 0,
            height=self.height or 0,
            mode=self.mode,
            seeds=tuple(range(self.seed, self.seed + (self.seeds or 1))),
            crops=(),
            notes=self.notes,
            digest=self.digest or "",
            engine=self.engine,
            backend=self.backend or "",
            seconds=self.seconds or 0.0,
        )


COLUMNS = tuple(f.name for f in fields(Record))
CSV_HEADER = (",".join(COLUMNS) + "\n").encode()
_NUMBERS = {f.name for f in fields(Record) if f.type in {float | None, int | None}}


def to_line(record: Record, form: Format) -> bytes:
    """Return a record as one line of a CSV file, else of a JSONL file. A CSV line may hold quoted line breaks."""
    if form is not Format.CSV:
        text = json.dumps(encode(record), ensure_ascii=False, allow_nan=False) + "\n"
        return text.encode("utf-8", "backslashreplace")  # only lone surrogates need it, and so it is their JSON escape
    line = io.StringIO(newline="")
    # The module quotes the characters of its line end, and must quote both of these.
    csv.writer(line, lineterminator="\r\n").writerow([_to_cell(value) for value in encode(record).values()])
    return line.getvalue().removesuffix("\r\n").encode() + b"\n"


def from_line(line: bytes, form: Format) -> Record:
    """Return the record in a whole line; raise ValueError where it is none."""
    if not line.endswith(b"\n"):
        raise ValueError("it breaks off")
    try:
        if form is not Format.CSV:
            return decode(Record, json.loads(line), "record", ValueError)
        rows = list(csv.reader([line.decode().removesuffix("\n")], strict=True))
        if len(rows) != 1 or len(rows[0]) != len(COLUMNS):
            raise ValueError(f"it has not {len(COLUMNS)} columns")
        data = {name: _from_cell(name, cell) for name, cell in zip(COLUMNS, rows[0], strict=True)}
        return decode(Record, data, "record", ValueError)
    except (csv.Error, RecursionError) as exc:
        raise ValueError(str(exc)) from exc


# Lone surrogates (file names that are no UTF-8) are spelt \udcXX in CSV. What looks like that in a name has its
# backslash spelt \u005c, so that reading gives the very name back and `--resume` recognises the image.
_LOOKS_ESCAPED = re.compile(r"\\(?=u(?:d[89a-f][0-9a-f]{2}|005c))")
_ESCAPED = re.compile(r"\\u(d[89a-f][0-9a-f]{2}|005c)")


def _to_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float):
        return json.dumps(value, allow_nan=False)
    text = "; ".join(value) if isinstance(value, list) else value
    return _LOOKS_ESCAPED.sub(r"\\u005c", text).encode("utf-8", "backslashreplace").decode()


def _from_cell(name: str, cell: str) -> Any:
    if name in _NUMBERS:
        return json.loads(cell) if cell else None
    text = _ESCAPED.sub(lambda match: chr(int(match[1], 16)), cell)
    if name == "notes":
        return text.split("; ") if text else []
    return text or None


class RecordWriter:
    """Hands a document to `put` piece by piece, one per record; `close()` gives its end."""

    def __init__(self, put: Callable[[bytes], object], form: Format) -> None:
        self._put, self._form = put, form
        self._before = b"[\n"
        if form is Format.CSV:
            put(CSV_HEADER)

    def write(self, record: Record) -> None:
        """Hand over one record."""
        line = to_line(record, self._form)
        if self._form is Format.JSON:
            line, self._before = self._before + line.rstrip(b"\n"), b",\n"
        self._put(line)

    def close(self) -> None:
        """Hand over what ends the document."""
        if self._form is Format.JSON:
            self._put(b"[]\n" if self._before == b"[\n" else b"\n]\n")


def emit(stream: IO[bytes], data: bytes) -> None:
    """Write to standard output at once. Raises OutputError, or BrokenPipeError once nobody reads on (`| head`)."""
    try:
        rest = memoryview(data)
        while rest:  # with PYTHONUNBUFFERED the stream is the bare file, which may take a part
            rest = rest[stream.write(rest) :]
        stream.flush()
    except OSError as exc:
        # What is left in the stream's buffer can go nowhere, and must not raise again when the interpreter closes it.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        if isinstance(exc, BrokenPipeError):
            raise
        raise OutputError(f"cannot write to standard output: {exc.strerror or exc}") from exc


def choose_format(wanted: Format | None, path: Path | None, *, terminal: bool) -> Format:
    """Return the format asked for, else what FILE's name says; on standard output a table for people, else JSONL."""
    if path is None:
        return wanted or (Format.TABLE if terminal else Format.JSONL)
    by_name = {f".{form}": form for form in (Format.JSONL, Format.JSON, Format.CSV)} | {".ndjson": Format.JSONL}
    form = wanted or by_name.get(path.suffix.lower())
    if form is None:
        raise UsageError(f"the name {path} does not tell a format; add --format jsonl, json or csv")
    if form is Format.TABLE:
        raise UsageError(f"a table is for the terminal; for {path} choose --format jsonl, json or csv")
    return form


_SORT_KEYS: dict[Sort, Callable[[Record], Any]] = {
    Sort.SCORE: lambda record: record.score,
    Sort.NAME: lambda record: record.image,
    Sort.VCG: lambda record: record.vcg,
    Sort.VDA: lambda record: record.vda,
    Sort.SPREAD: lambda record: record.spread,
    Sort.TIME: lambda record: record.seconds,
}


def arrange(
    records: Iterable[Record],
    sort: Sort | None = None,
    *,
    descending: bool = False,
    top: int | None = None,
    bottom: int | None = None,
) -> list[Record]:
    """Return records in order: those with a value, those without, errors; equal ones as they came.

    `top` and `bottom` keep only that many records with the highest and lowest values: of what is sorted by, or of the
    score if that is nothing or the name. Without `sort` they come highest first, with `bottom` alone lowest first.
    """
    records = list(records)
    if top is not None or bottom is not None:
        by = sort if sort not in {None, Sort.NAME} else Sort.SCORE
        ranked = [record for record in _sorted(records, by, descending=False) if _value(record, by) is not None]
        highest = _sorted(ranked, by, descending=True)[: top or 0]
        chosen = {id(record) for record in highest + ranked[: bottom or 0]}
        records = [record for record in records if id(record) in chosen]
        if sort is None:
            return _sorted(records, by, descending=top is not None)
    return records if sort is None else _sorted(records, sort, descending=descending)


def _sorted(records: list[Record], sort: Sort, *, descending: bool) -> list[Record]:
    valued = [record for record in records if _value(record, sort) is not None]
    valued.sort(key=_SORT_KEYS[sort], reverse=descending)
    others = [record for record in records if _value(record, sort) is None]
    return valued + sorted(others, key=lambda record: record.status is Status.ERROR)


def _value(record: Record, sort: Sort) -> Any:
    """Return what a record is sorted by; None where it has none, or failed."""
    value = None if record.status is Status.ERROR else _SORT_KEYS[sort](record)
    return None if isinstance(value, float) and math.isnan(value) else value
