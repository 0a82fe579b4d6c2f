"""Results of commands: files that appear whole or not at all, and rows as CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..engine.atomic import writing
from ..errors import OutputError


def make_folder(path: Path) -> None:
    """Make a folder, unless it is there, and those above it. Raises OutputError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise OutputError(f"cannot make the folder {path}: {exc.strerror or exc}") from exc


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file, whole or not at all, making its folder if need be. Raises OutputError."""
    make_folder(path.parent)
    with writing(path) as stream:  # names of files are bytes in the end
        stream.write(data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data)


def to_csv(rows: Iterable[Sequence[object]]) -> str:
    """Return rows as the text of a CSV file."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
