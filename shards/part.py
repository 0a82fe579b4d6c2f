"""One shard's results as a file: its records in JSONL or Parquet, and a side file that says what was written.

The records hold no seconds, host or backend. So whoever computes a shard writes the same bytes.
"""

import enum
import hashlib
import io
import json
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.codec import decode, encode
from ..errors import DiffiqaError, OutputError, UsageError, first_line
from ..runtime.command.records import Format, Record, Status, from_line, to_line
from .store import Store


class Form(enum.StrEnum):
    """How shards are written."""

    JSONL = "jsonl"
    PARQUET = "parquet"


@dataclass(frozen=True)
class Shard:
    """A shard that is done: its file, and what is in it."""

    file: str
    sha256: str
    records: int
    failed: int


@dataclass(frozen=True)
class Side:
    """What is true of one attempt only."""

    shard: Shard
    plan: str
    host: str
    backend: str
    seconds: float
    ended: float  # since 1970


def file_of(index: int, attempt: int, form: Form) -> str:
    """Return the name of a shard's file. The first attempt's has no number."""
    return f"part-{index:06}{f'.{attempt}' if attempt else ''}.{form}"


def side_of(file: str) -> str:
    """Return the name of the side file."""
    return file.rpartition(".")[0] + ".json"


def place_of(file: str) -> tuple[int, int] | None:
    """Return the index and the attempt in a name that `file_of` gave; None for other names."""
    found = re.fullmatch(r"part-(\d{6,})(?:\.([1-9]\d*))?\.(?:jsonl|parquet)", file)
    return (int(found[1]), int(found[2] or 0)) if found else None


def commit(store: Store, file: str, records: Sequence[Record], side: Any) -> Shard:
    """Write a shard; `side` makes a Side of it. The side file comes first: a shard without one does not count."""
    data = to_bytes(records, Form(file.rpartition(".")[2]))
    failed = sum(record.status is Status.ERROR for record in records)
    shard = Shard(file, hashlib.sha256(data).hexdigest(), len(records), failed)
    store.write(side_of(file), json.dumps(encode(side(shard))).encode())
    store.create(file, data)
    return shard


def read_side(store: Store, file: str) -> Side | None:
    """Return what the side file of a shard says; None if there is none that can be read."""
    try:
        return decode(Side, json.loads(store.read(side_of(file)) or b""), "side", ValueError)
    except (ValueError, RecursionError):
        return None


def read_shard(store: Store, shard: Shard) -> list[Record]:
    """Return the records of a shard. Raises OutputError if they are not those that were written."""
    data = store.read(shard.file)
    if data is None or hashlib.sha256(data).hexdigest() != shard.sha256:
        what = "is missing" if data is None else "was changed since it was written"
        raise OutputError(f"{store}/{shard.file} {what}; give the command that wrote it again, and it is scored again")
    try:
        return from_bytes(data, Form(shard.file.rpartition(".")[2]))
    except DiffiqaError:
        raise
    except Exception as exc:  # the reader of Parquet has many of its own
        raise OutputError(f"{store}/{shard.file} holds no records of diffiqa ({first_line(exc)})") from exc


def to_bytes(records: Sequence[Record], form: Form) -> bytes:
    """Return records as a file."""
    if form is Form.JSONL:
        return b"".join(to_line(record, Format.JSONL) for record in records)
    arrow, parquet = arrow_and_parquet()
    schema = arrow.schema([(name, _type(arrow, hint)) for name, hint in typing.get_type_hints(Record).items()])
    rows = [{name: _to_cell(value) for name, value in encode(record).items()} for record in records]
    stream = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows, schema=schema), stream, compression="zstd")
    return stream.getvalue()


def from_bytes(data: bytes, form: Form) -> list[Record]:
    """Return the records in a file."""
    if form is Form.JSONL:
        return [from_line(line) for line in data.splitlines()]
    _, parquet = arrow_and_parquet()
    rows = parquet.read_table(io.BytesIO(data)).to_pylist()
    for row in rows:
        row["probabilities"] = json.loads(row.get("probabilities") or "null")
    return [decode(Record, row, "record", ValueError) for row in rows]


def arrow_and_parquet() -> tuple[Any, Any]:
    """Return the two modules. Raises UsageError if they are not installed."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as exc:
        raise UsageError(f"Parquet needs a package: pip install 'diffiqa[parquet]' ({first_line(exc)})") from exc
    return pyarrow, parquet


def _type(arrow: Any, hint: Any) -> Any:
    if hint == float | None:
        return arrow.float64()
    if hint == int | None:
        return arrow.uint64()
    return arrow.list_(arrow.string()) if hint == tuple[str, ...] else arrow.string()


def _to_cell(value: Any) -> Any:
    """Return an object as JSON, and a text with lone surrogates, which UTF-8 has not, spelt: both as in our CSV."""
    if isinstance(value, dict):
        return json.dumps(value)
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
