"""Results of commands: files that appear whole or not at all, and rows as CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..engine.atomic import replacing
from ..errors import OutputError


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file, whole or not at all, making its folder if need be. Raises OutputError."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogateescape")  # names of files are bytes in the end
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as stream:
            stream.write(data)
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror or exc}") from exc


def to_csv(rows: Iterable[Sequence[object]]) -> str:
    """Return rows as the text of a CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
