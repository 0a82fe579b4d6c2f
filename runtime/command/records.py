r"""One flat record per image, as it stands in each file format.

JSONL and JSON are UTF-8, with the keys in the order of `Record`. CSV has a header, RFC 4180 quoting and `\n` line ends.
Numbers have all their digits. None is null, or an empty cell. CSV joins notes with "; ", and has a
column for probabilities, as JSON, only where there are some. Texts stay as they are, but
for two kinds of characters. Bytes that are not UTF-8 are written as `\udcXX`, which is what JSON does anyway. In CSV a
text that starts with `=`, `+`, `-`, `@`, a tab or a line end has this character spelt, as in `\u003d`: spreadsheets
would run it as a formula.
"""

import csv
import enum
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from ...engine.codec import LATER, decode, encode
from ...engine.manifest import Manifest
from ...engine.sampling import Sampling
from ...errors import UsageError
from ..plan import sampling_of
from ..results import Failure, Mode, Options, Probabilities, Score


class Format(enum.StrEnum):
    """How results are written."""

    TABLE = "table"
    JSONL = "jsonl"
    JSON = "json"
    CSV = "csv"


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
    sampling: str = ""  # empty: all steps, as trained

    @classmethod
    def of(cls, manifest: Manifest, options: Options) -> Self:
        """Return the settings a run of these options has: the engine's crop count where they give none.

        Raises UsageError for steps that the engine cannot take.
        """
        crops, sampling, name = options.crops or manifest.crop.count, sampling_of(manifest, options), ""
        if options.fast and manifest.fast:
            name = f"fast:{manifest.fast.key}"  # the engine may get another one
        elif sampling != Sampling.trained(manifest.schedule):
            name = f"{len(sampling.steps)}:{sampling.name}"
        return cls(manifest.engine_id, crops, options.seed, options.seeds, options.mode, options.pixel_budget, name)

    def __str__(self) -> str:
        """Return all but the engine, which has a column of its own, as `crops=4 seed=0 …`; no sampling if empty."""
        given = {f.name: getattr(self, f.name) for f in fields(self)[1:]}
        return " ".join(f"{name}={value}" for name, value in given.items() if value != "")

    def difference(self, record: "Record") -> str | None:
        """Return which settings a record was made with that are not these, or None."""
        if (record.engine, record.settings) == (self.engine, str(self)):
            return None
        absent = {"sampling": "all steps"}
        before = absent | {"engine": record.engine} | _parts(record.settings)
        now = absent | {"engine": self.engine} | _parts(str(self))
        parts = (f"{name} {before.get(name, '?')}, now {now[name]}" for name in now if before.get(name) != now[name])
        return "; ".join(parts) or f"settings {record.settings!r}, now {str(self)!r}"


def _parts(settings: str) -> dict[str, str]:
    return dict(part.partition("=")[::2] for part in settings.split())


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
    # What came later is at the end: files of earlier versions end before it. JSON has it only where it is known.
    percentile: float | None = field(default=None, metadata=LATER)
    opinion: float | None = field(default=None, metadata=LATER)
    opinion_error: float | None = field(default=None, metadata=LATER)
    probabilities: Probabilities | None = field(default=None, metadata=LATER)  # of words, by kind

    @classmethod
    def of(cls, result: Score | Failure, settings: RunSettings) -> Self:
        """Return the record of a result. A score that is no number becomes an error: no format could carry it."""
        if isinstance(result, Score) and all(map(math.isfinite, _numbers(result))):
            return cls(
                image=result.source,
                status=Status.OK,
                crops=len(result.crops),
                seed=result.seeds[0],
                seeds=len(result.seeds),
                notes=tuple(note.replace("; ", ", ") for note in result.notes if note),  # "; " separates notes in CSV
                settings=str(settings),
                **{name: getattr(result, name) for name in _SAME_IN_SCORE},
            )
        error = result.error if isinstance(result, Failure) else f"the engine returned {result.score}, not a score"
        return cls(
            image=result.source,
            status=Status.ERROR,
            engine=settings.engine,
            error=error or "unknown error",
            settings=str(settings),
        )

    def known_to(self, manifest: Manifest, settings: RunSettings) -> Self:
        """Return it with what its score means to a person, as the engine knows it now."""
        meaning, reference = manifest.score, manifest.score.reference
        if self.score is None or reference is None:
            return self
        percentile, opinion = meaning.percentile(self.score), meaning.opinion(self.score)
        caveat = reference.caveat(settings.crops, settings.mode)
        notes = self.notes if caveat in {None, *self.notes} else (*self.notes, str(caveat))
        return replace(self, percentile=percentile, opinion=opinion, opinion_error=reference.error, notes=notes)

    def result(self) -> Score | Failure:
        """Return the result this record was made of, as far as it holds it: without pictures and single crops."""
        if self.seed is None or self.seeds is None or self.score is None:
            return Failure(self.image, self.error or "not scored")
        same: dict[str, Any] = {name: getattr(self, name) for name in _SAME_IN_SCORE}
        seeds = tuple(range(self.seed, self.seed + self.seeds))
        return Score(source=self.image, crops=(), seeds=seeds, notes=self.notes, **same)


_SAME_IN_SCORE = (
    *("score", "vcg", "vda", "spread", "width", "height", "mode", "engine", "backend", "seconds", "digest"),
    *("percentile", "opinion", "opinion_error", "probabilities"),
)
WITH_WORDS = tuple(f.name for f in fields(Record))
COLUMNS = WITH_WORDS[:-1]
EARLIER_COLUMNS = COLUMNS[: COLUMNS.index("settings") + 1]
_NUMBERS = {f.name for f in fields(Record) if f.type in {float | None, int | None}}


def csv_header(columns: Sequence[str] = COLUMNS) -> bytes:
    """Return the first line of a CSV file with these columns."""
    return (",".join(columns) + "\n").encode()


def _numbers(score: Score) -> Iterator[float]:
    yield score.score
    for kind in (score.probabilities or {}).values():
        yield from kind.values()


def to_line(record: Record, form: Format, columns: Sequence[str] = COLUMNS) -> bytes:
    """Return a record as one line of a CSV file, else of a JSONL file. A CSV line may hold quoted line breaks."""
    if form is not Format.CSV:
        text = json.dumps(encode(record), ensure_ascii=False, allow_nan=False) + "\n"
        return text.encode("utf-8", "backslashreplace")  # only lone surrogates need it, and so it is their JSON escape
    line, data = io.StringIO(newline=""), encode(record)
    # The module quotes the characters of its line end, and must quote both of these.
    csv.writer(line, lineterminator="\r\n").writerow([_to_cell(data.get(name)) for name in columns])
    return line.getvalue().removesuffix("\r\n").encode() + b"\n"


def from_line(line: bytes) -> Record:
    """Return the record in a whole line of JSON; raise ValueError where it is none."""
    try:
        return decode(Record, json.loads(line), "record", ValueError)
    except RecursionError as exc:
        raise ValueError(str(exc)) from exc


def from_row(cells: Sequence[str], columns: Sequence[str] = COLUMNS) -> Record:
    """Return the record in a row of CSV with these columns; raise ValueError where it is none."""
    if len(cells) != len(columns):
        raise ValueError(f"it has not {len(columns)} columns")
    data = {name: _from_cell(name, cell) for name, cell in zip(columns, cells, strict=True)}
    return decode(Record, data, "record", ValueError)


# What looks like such a spelling in a name has its backslash spelt \u005c, so that reading gives the very name back and
# `--resume` recognises the image.
_STARTS_FORMULA = re.compile(r"^[=+\-@\t\r\n]")
_CODES = "d[89a-f][0-9a-f]{2}|005c|" + "|".join(f"{ord(character):04x}" for character in "=+-@\t\r\n")
_LOOKS_ESCAPED = re.compile(rf"\\(?=u(?:{_CODES}))")
_ESCAPED = re.compile(rf"\\u({_CODES})")


def _to_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, int | float | dict):
        return json.dumps(value, allow_nan=False)
    text = "; ".join(value) if isinstance(value, list) else value
    text = _LOOKS_ESCAPED.sub(r"\\u005c", text).encode("utf-8", "backslashreplace").decode()
    return _STARTS_FORMULA.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def text_in_cell(cell: str) -> str:
    """Return the text that a cell of our CSV files spells."""
    return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), cell)


def _from_cell(name: str, cell: str) -> Any:
    if name in _NUMBERS or name == "probabilities":
        return json.loads(cell) if cell else None
    text = text_in_cell(cell)
    if name == "notes":
        return text.split("; ") if text else []
    return text or None


def document(records: Iterable[Record], form: Format) -> Iterator[bytes]:
    """Yield a whole document in pieces, one per record."""
    if form is Format.CSV:
        records = list(records)
        columns = WITH_WORDS if any(record.probabilities for record in records) else COLUMNS
        yield csv_header(columns)
        yield from (to_line(record, form, columns) for record in records)
        return
    if form is not Format.JSON:
        yield from (to_line(record, form) for record in records)
        return
    before = b"[\n"
    for record in records:
        yield before + to_line(record, form).rstrip(b"\n")
        before = b",\n"
    yield b"[]\n" if before == b"[\n" else b"\n]\n"


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
