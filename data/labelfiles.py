"""Plain Python values out of the files that labels come in: MATLAB 5 (`.mat`), Excel (`.xlsx`), CSV.

Only what the published data sets use, so that no reader of these formats has to be installed. Files are untrusted:
whatever they hold, reading one ends in values or in a ValueError that says what is wrong.
"""

import csv
import io
import itertools
import re
import struct
import xml.etree.ElementTree as ET
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_BYTES = 2**26  # of a label file, packed or unpacked; the largest published one has 3 MB
MAX_XML_BYTES = 2**24  # of a part of a spreadsheet: its tree takes ten times that

# MATLAB's element types (MAT-File Format, tables 1-1 and 1-3)
_MI_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_MI_TEXT = {16: "utf-8", 17: "utf-16", 18: "utf-32"}
_MI_MATRIX, _MI_COMPRESSED = 14, 15
_MX_CELL, _MX_CHAR, _MX_NUMBERS = 1, 4, range(6, 16)

_XLSX = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_OFFICE = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}"

Value = npt.NDArray[Any] | str | list[Any]


def read_mat(path: Path) -> dict[str, Value]:
    """Return the variables of a MATLAB 5 file: numbers as flat arrays, char arrays as text, cells as flat lists.

    Shapes are left out: label files hold vectors, some as rows, some as columns. Other classes are left out, too.
    """
    data = _read(path)
    if data[:10] == b"MATLAB 7.3" or data[:4] == b"\x89HDF":
        raise ValueError("it is a MATLAB 7.3 file; save it in MATLAB with '-v7'")
    if len(data) < 128 or data[126:128] not in {b"IM", b"MI"}:
        raise ValueError("it is no MATLAB 5 file")
    order = "<" if data[126:128] == b"IM" else ">"
    variables: dict[str, Value] = {}
    try:
        for kind, body in _elements(data[128:], order):
            if kind == _MI_COMPRESSED:
                kind, body = next(_elements(_inflate(body), order))
            if kind == _MI_MATRIX:
                name, value = _matrix(body, order)
                if value is not None:
                    variables[name] = value
    except (struct.error, StopIteration, zlib.error, UnicodeError, RecursionError, TypeError) as exc:
        raise ValueError(f"it is damaged or broken off ({type(exc).__name__})") from exc
    return variables


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Yield (type, body) of the elements in a row: a tag of 8 bytes and a padded body, or both in 8 bytes."""
    at = 0
    while at < len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        at += 8
        if kind >> 16:  # the small form: size and type share the first four bytes
            kind, size = kind & 0xFFFF, kind >> 16
            at -= 4
        if size > len(data) - at:
            raise ValueError("it is damaged or broken off")
        yield kind, data[at : at + size]
        at += size
        if kind != _MI_COMPRESSED:  # which alone is not padded
            at += -at % 8


def _matrix(body: bytes, order: str) -> tuple[str, Value | None]:
    if not body:  # an empty cell
        return "", []
    elements = _elements(body, order)
    flags, dims, name = [next(elements)[1] for _ in range(3)]
    kind = struct.unpack_from(order + "I", flags)[0] & 0xFF
    count = int(np.prod(np.frombuffer(dims, order + "i4").astype(np.int64)))
    value: Value | None = None
    if kind == _MX_CELL:
        value = [_matrix(cell, order)[1] for _, cell in itertools.islice(elements, max(count, 0))]
    elif kind == _MX_CHAR:
        value = _text(*next(elements, (1, b"")), order)
    elif kind in _MX_NUMBERS:
        value = _numbers(*next(elements, (1, b"")), order)
    if value is not None and kind != _MX_CHAR and len(value) != count:
        raise ValueError(f"{name.decode('latin-1')!r} has {len(value)} of {count} values")
    return name.decode("latin-1"), value


def _numbers(kind: int, body: bytes, order: str) -> npt.NDArray[Any]:
    if kind not in _MI_NUMBERS:
        raise ValueError(f"numbers are stored as type {kind}, which is unknown")
    return np.frombuffer(body, order + _MI_NUMBERS[kind])


def _text(kind: int, body: bytes, order: str) -> str:
    if kind in _MI_TEXT:
        suffix = "" if kind == 16 else ("-le" if order == "<" else "-be")
        return body.decode(_MI_TEXT[kind] + suffix)
    return "".join(map(chr, _numbers(kind, body, order)))


def _inflate(body: bytes) -> bytes:
    inflater = zlib.decompressobj()
    data = inflater.decompress(body, MAX_BYTES)
    if not inflater.eof:
        raise ValueError(f"it is broken off, or unpacks to more than {MAX_BYTES} bytes")
    return data


def read_xlsx(path: Path, sheet: str) -> list[dict[str, str | float]]:
    """Return the rows of a sheet, each as {column letters: text or number}; formulas give their stored results."""
    try:
        with zipfile.ZipFile(io.BytesIO(_read(path))) as book:
            parts = {info.filename: info for info in book.infolist()}
            target = _sheet_part(_xml(book, parts, "xl/workbook.xml"), sheet, book, parts)
            strings: list[str] = []
            if "xl/sharedStrings.xml" in parts:
                strings = [_joined(item) for item in _xml(book, parts, "xl/sharedStrings.xml").iter(_XLSX + "si")]
            return [
                dict(_cell(cell, strings) for cell in row.iter(_XLSX + "c") if _filled(cell))
                for row in _xml(book, parts, target).iter(_XLSX + "row")
            ]
    except (zipfile.BadZipFile, zlib.error, ET.ParseError, NotImplementedError, RuntimeError, EOFError) as exc:
        raise ValueError(f"it is no readable .xlsx file: {exc}") from exc


def _sheet_part(workbook: ET.Element, sheet: str, book: zipfile.ZipFile, parts: dict[str, zipfile.ZipInfo]) -> str:
    sheets = {item.get("name", ""): item.get(_OFFICE + "id") for item in workbook.iter(_XLSX + "sheet")}
    if sheet not in sheets:
        raise ValueError(f"it has no sheet {sheet!r}, only {', '.join(map(repr, sheets))}")
    for relation in _xml(book, parts, "xl/_rels/workbook.xml.rels"):
        if relation.get("Id") == sheets[sheet]:
            target = relation.get("Target", "")
            return target[1:] if target.startswith("/") else "xl/" + target
    raise ValueError(f"the part of sheet {sheet!r} is not in it")


def _xml(book: zipfile.ZipFile, parts: dict[str, zipfile.ZipInfo], name: str) -> ET.Element:
    if name not in parts:
        raise ValueError(f"the part {name} is not in it")
    with book.open(parts[name]) as stream:
        data = stream.read(MAX_XML_BYTES + 1)  # what the directory says of the size need not be true
    if len(data) > MAX_XML_BYTES:
        raise ValueError(f"the part {name} unpacks to more than {MAX_XML_BYTES} bytes")
    # Entities that multiply need a document type, which no spreadsheet has. UTF-16 would hide it: hence the zero byte.
    if b"<!DOCTYPE" in data or b"\0" in data:
        raise ValueError(f"the part {name} has a document type or is not in UTF-8: no spreadsheet does that")
    return ET.fromstring(data)  # noqa: S314 - no document type, no entities: see above


def _filled(cell: ET.Element) -> bool:
    return cell.find(_XLSX + "v") is not None or cell.find(_XLSX + "is") is not None


def _cell(cell: ET.Element, strings: list[str]) -> tuple[str, str | float]:
    column = re.sub(r"\d+$", "", cell.get("r", ""))
    kind, text = cell.get("t", "n"), cell.findtext(_XLSX + "v", "")
    if kind == "s":
        if not text.isdecimal() or int(text) >= len(strings):
            raise ValueError(f"cell {cell.get('r')} refers to text number {text!r} of {len(strings)}")
        return column, strings[int(text)]
    if kind == "inlineStr":
        return column, _joined(cell)
    return column, float(text) if kind == "n" else text


def _joined(element: ET.Element) -> str:
    return "".join(part.text or "" for part in element.iter(_XLSX + "t"))


def read_csv(path: Path, *columns: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file with a header, which must name `columns`; cells are stripped."""
    reader = csv.reader(io.StringIO(_decoded(_read(path)), newline=""))
    try:
        header = [name.strip() for name in next(reader, [])]
        if missing := [name for name in columns if name not in header]:
            raise ValueError(f"its first line names no column {missing[0]!r}, only {', '.join(header) or 'nothing'}")
        rows = []
        for cells in filter(None, reader):
            if len(cells) != len(header):
                raise ValueError(f"line {reader.line_num} has {len(cells)} cells, the header has {len(header)}")
            rows.append(dict(zip(header, (cell.strip() for cell in cells), strict=True)))
    except csv.Error as exc:
        raise ValueError(f"line {reader.line_num}: {exc}") from exc
    return rows


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
