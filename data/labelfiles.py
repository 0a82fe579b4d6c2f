"""Plain Python values out of the files that labels come in: MATLAB 5 (`.mat`), CSV, lines of text.

What is wrong with a file ends in a ValueError that says so.
"""

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import matfile
from .extra import load_extra

MAX_BYTES = 2**24  # of a label file; the largest published one has 3 MB


def read_mat(path: Path) -> dict[str, Any]:
    """Return the variables of a MATLAB 5 file: numbers as lists, char arrays as text, cells as lists.

    Shapes are left out: label files hold vectors, some as rows, some as columns. Other classes are left out, too.
    Raises BackendError without SciPy.
    """
    data, _ = _read(path), load_extra("scipy")
    if data[:10] == b"MATLAB 7.3" or data[:4] == b"\x89HDF":
        raise ValueError("it is a MATLAB 7.3 file; save it in MATLAB with '-v7'")
    if len(data) < 128 or data[126:128] not in {b"IM", b"MI"}:
        raise ValueError("it is no MATLAB 5 file")
    try:
        return isolated(path)
    except ValueError as exc:
        raise ValueError(f"it is damaged or broken off: {exc}") from exc


def isolated(path: Path) -> dict[str, Any]:
    """Return what `matfile.read` returns, in a process of its own, which may crash. Raises ValueError."""
    command = [sys.executable, "-P", matfile.__file__, str(path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)  # noqa: S603 — our own file
    if done.returncode:
        raise ValueError((done.stderr.splitlines() or [f"SciPy's reader crashed (exit code {done.returncode})"])[-1])
    variables: dict[str, Any] = json.loads(done.stdout)
    return variables


def read_csv(path: Path, *columns: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a header, which must name `columns`; cells are stripped."""
    lines = _lines(path)
    _, header = next(lines, (0, []))
    if missing := [name for name in columns if name not in header]:
        raise ValueError(f"its first line names no column {missing[0]!r}, only {', '.join(header) or 'nothing'}")
    rows = []
    for number, cells in lines:
        if len(cells) != len(header):
            raise ValueError(f"line {number} has {len(cells)} cells, the header has {len(header)}")
        rows.append(dict(zip(header, cells, strict=True)))
    return rows


def read_sheet(path: Path, *columns: str) -> list[dict[str, str]]:
    """Return the rows of a sheet that was saved as CSV: its header is the first row with all `columns`, in any case.

    Cells below it are by the header's names in lower case; rows above it are titles.
    """
    lines = _lines(path)
    for _, cells in lines:
        header = [name.lower() for name in cells]
        if set(columns) <= set(header):
            return [dict(zip(header, cells, strict=False)) for _, cells in lines]
    raise ValueError(f"it has no row with the headings {', '.join(columns)}")


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield number and cells of the lines of a CSV file that hold anything; cells are stripped."""
    reader = csv.reader(io.StringIO(_decoded(_read(path)), newline=""))
    try:
        for cells in reader:
            if cells:
                yield reader.line_num, [cell.strip() for cell in cells]
    except csv.Error as exc:
        raise ValueError(f"line {reader.line_num}: {exc}") from exc


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file that hold anything, stripped."""
    return [line.strip() for line in _decoded(_read(path)).splitlines() if line.strip()]


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")  # Excel begins its CSV files with a byte order mark
    except UnicodeDecodeError as exc:
        raise ValueError(f"it is no UTF-8 text (byte {exc.start})") from exc


def _read(path: Path) -> bytes:
    with path.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes, which no label file needs")
    return data
