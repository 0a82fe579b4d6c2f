"""Records survive every format to the last bit, whatever their names; and they come in the order asked for."""

import csv
import io
import json
import math
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffiqa.errors import UsageError
from diffiqa.runtime.command.order import Sort, arrange
from diffiqa.runtime.command.records import (
    COLUMNS,
    EARLIER_COLUMNS,
    Format,
    Record,
    RunSettings,
    Status,
    choose_format,
    csv_header,
    document,
    from_line,
    from_row,
    text_in_cell,
    to_line,
)
from diffiqa.runtime.command.table import emit
from diffiqa.runtime.results import CropScore, Failure, Mode, Score

SETTINGS = RunSettings("0123456789abcdef", crops=4, seed=7, seeds=2, mode=Mode.WHOLE, pixel_budget=2**20)
SCORE = Score(
    source="a.png",
    score=0.1 + 0.2,
    vcg=1 / 3,
    vda=None,
    spread=5e-324,
    width=640,
    height=480,
    mode=Mode.TILE,
    seeds=(7, 8),
    crops=(CropScore(0, 0, 0.25, 0.5, None), CropScore(0, 96, 0.35, 0.5, None)),
    notes=("alpha over white", "rotated by EXIF; 90°"),
    digest="ab" * 32,
    engine="0123456789abcdef",
    backend="onnxruntime cpu",
    seconds=1.25,
    percentile=72.5,
    opinion=3.5,
    opinion_error=0.5,
)
RECORD = Record.of(SCORE, SETTINGS)
LINE_FORMATS = [Format.JSONL, Format.CSV]
NAMES = {
    "plain": "photos/a b.png",
    "unicode": "фото/日本語 🦊.png",
    "newline": "a\nb.png",
    "only a newline": "\n",
    "carriage return": "a\rb\r\nc.png",
    "other line ends": "a\x0b\x0c\x1c\x85\u2028\u2029b.png",
    "quotes": '"a""b",".png"',
    "a quote": '"',
    "commas": "a,b;c\td.png",
    "spaces": "  a.png ",
    "markup": "</script><b>[red]&amp;",
    "formula": "=HYPERLINK(1)|'/C calc'!A0",
    "option": "-rf",
    "not UTF-8": os.fsdecode(b"caf\xe9 \xff\xfe.png"),
    "surrogates no file system makes": "\ud800-\udfff",
    "looks escaped": r"\udcff \u005cudcff \u005c \\udc80 \n",
    "backslash before a bad byte": "\\\udcff\\",
    "terminal commands": "\x1b[31m\x9b2J\x07\x7f.png",
    "looks like a number": "1e5",
    "looks like nothing": "null",
}


def failed(image: str) -> Record:
    return Record.of(Failure(image, f"{image} is empty"), SETTINGS)


def written(records: list[Record], form: Format) -> bytes:
    return b"".join(document(records, form))


def reread(line: bytes, form: Format) -> Record:
    if form is Format.JSONL:
        return from_line(line)
    (row,) = csv.reader(io.StringIO(line.decode(), newline=""), strict=True)
    return from_row(row)


# What a record says


def test_record_of_a_score_is_flat_and_in_the_documented_order() -> None:
    values = json.loads(to_line(RECORD, Format.JSONL))
    assert list(values) == list(COLUMNS)
    assert values == {
        "image": "a.png",
        "status": "ok",
        "score": 0.1 + 0.2,
        "vcg": 1 / 3,
        "vda": None,
        "spread": 5e-324,
        "width": 640,
        "height": 480,
        "mode": "tile",
        "crops": 2,
        "seed": 7,
        "seeds": 2,
        "engine": "0123456789abcdef",
        "backend": "onnxruntime cpu",
        "seconds": 1.25,
        "digest": "ab" * 32,
        "notes": ["alpha over white", "rotated by EXIF, 90°"],
        "error": None,
        "settings": "crops=4 seed=7 seeds=2 mode=whole pixel_budget=1048576",
        "percentile": 72.5,
        "opinion": 3.5,
        "opinion_error": 0.5,
    }


def test_an_engine_that_knows_no_percentile_writes_json_as_earlier_versions_did() -> None:
    record = replace(RECORD, percentile=None, opinion=None, opinion_error=None)
    assert list(json.loads(to_line(record, Format.JSONL))) == list(EARLIER_COLUMNS)
    assert EARLIER_COLUMNS[-1] == "settings"


def test_record_of_a_failure_has_error_engine_and_settings_only() -> None:
    record = failed("b.png")
    filled = {name for name in COLUMNS if getattr(record, name) not in {None, ()}}
    assert filled == {"image", "status", "engine", "error", "settings"}
    assert record.status is Status.ERROR
    assert record.error == "b.png is empty"


def test_score_that_is_no_number_is_an_error_not_an_unreadable_file() -> None:
    for value in (math.nan, math.inf, -math.inf):
        record = Record.of(replace(SCORE, score=value), SETTINGS)
        assert record.status is Status.ERROR
        assert record.score is None
        assert str(value) in (record.error or "")


# Formats


@pytest.mark.parametrize("form", LINE_FORMATS)
def test_any_name_round_trips(form: Format) -> None:
    for name in NAMES.values():
        for record in (replace(RECORD, image=name, notes=(name, "b")), failed(name)):
            assert reread(to_line(record, form), form) == record


@pytest.mark.parametrize("form", LINE_FORMATS)
def test_any_name_of_random_hostile_characters_round_trips(form: Format) -> None:
    source = random.Random(20)  # noqa: S311
    for _ in range(2000):
        name = "".join(source.choices('\n\r",\\u023bcd+-@\t 5fD;=\udcff\udc80é🦊', k=source.randint(1, 12)))
        record = replace(RECORD, image=name, error=name)
        assert reread(to_line(record, form), form) == record


@pytest.mark.parametrize("form", LINE_FORMATS)
def test_floats_keep_every_bit(form: Format) -> None:
    source = random.Random(3)  # noqa: S311
    values = [5e-324, 1e300, -0.0, 0.1, 1e22, 123456789.123456789, *(source.gauss(0, 1) for _ in range(200))]
    for value in values:
        copy = reread(to_line(replace(RECORD, score=value), form), form)
        assert copy.score is not None
        assert copy.score.hex() == value.hex()


@pytest.mark.parametrize("form", LINE_FORMATS)
def test_no_file_can_hold_nan(form: Format) -> None:
    with pytest.raises(ValueError, match=r"JSON compliant"):
        to_line(replace(RECORD, vcg=math.nan), form)


def test_jsonl_is_one_line_per_record_in_utf_8() -> None:
    for name in NAMES.values():
        line = to_line(replace(RECORD, image=name), Format.JSONL)
        assert line.count(b"\n") == 1
        line.decode("utf-8")
    assert "日本語".encode() in to_line(replace(RECORD, image="日本語"), Format.JSONL)


def test_csv_is_what_other_csv_readers_expect() -> None:
    spelt = re.compile("[\ud800-\udfff\\\\]|^[=+@\t\r\n-]")
    names = [name for name in NAMES.values() if not spelt.search(name)]
    data = written([replace(RECORD, image=name) for name in names] + [failed("b.png")], Format.CSV)
    assert data.startswith(csv_header())
    rows = list(csv.DictReader(io.StringIO(data.decode("utf-8"), newline="")))
    assert [row["image"] for row in rows] == [*names, "b.png"]
    assert rows[0]["score"] == "0.30000000000000004"
    assert rows[0]["vda"] == ""
    assert rows[0]["notes"] == "alpha over white; rotated by EXIF, 90°"
    assert rows[-1]["score"] == ""
    assert all(len(row) == len(COLUMNS) for row in rows)


def test_csv_spells_bytes_that_are_no_utf_8() -> None:
    line = to_line(replace(RECORD, image=os.fsdecode(b"caf\xe9.png")), Format.CSV)
    assert line.decode("utf-8").startswith(r"caf\udce9.png,")


def test_no_text_in_csv_starts_like_a_formula() -> None:
    for start in "=+-@\t\r\n":
        name = start + "HYPERLINK(A1).png"
        line = to_line(replace(failed(name), error=name, notes=(name,)), Format.CSV)
        (row,) = csv.reader(io.StringIO(line.decode(), newline=""), strict=True)
        assert not [cell for cell in row if cell[:1] == start]
        assert row[0] == f"\\u{ord(start):04x}HYPERLINK(A1).png"
        assert text_in_cell(row[0]) == name
    assert to_line(replace(RECORD, image="a=b.png", score=-0.5), Format.CSV).startswith(b"a=b.png,ok,-0.5,")


def test_json_is_an_array_with_a_record_per_line() -> None:
    for count in (0, 1, 3):
        data = written([replace(RECORD, image=str(i)) for i in range(count)], Format.JSON)
        assert [item["image"] for item in json.loads(data)] == [str(i) for i in range(count)]
        assert data.endswith(b"]\n")
        assert data.count(b"\n") == (count + 2 if count else 1)


def test_csv_without_records_is_its_header() -> None:
    assert written([], Format.CSV) == csv_header()


JSON = json.loads(to_line(RECORD, Format.JSONL))
NO_RECORDS = {
    "empty": b"\n",
    "no object": b"[1]\n",
    "text": b"hello\n",
    "two at once": to_line(RECORD, Format.JSONL)[:-1] * 2 + b"\n",
    "no UTF-8": b'{"image": "\xff"}\n',
    "deep": b"[" * 100_000 + b"\n",
    "a score that is text": json.dumps(JSON | {"score": "0.5"}).encode() + b"\n",
    "NaN": json.dumps(JSON | {"score": math.nan}).encode() + b"\n",
    "a new entry": json.dumps(JSON | {"verdict": 1}).encode() + b"\n",
    "no image": json.dumps({key: JSON[key] for key in EARLIER_COLUMNS[1:]}).encode() + b"\n",
}


def test_reading_refuses_what_is_no_record() -> None:
    for line in NO_RECORDS.values():
        with pytest.raises(ValueError, match=r"."):
            from_line(line)


@pytest.mark.parametrize(
    "edit",
    [lambda s: s + ",", lambda s: s.replace("640", "640.5"), lambda s: s.replace("ok", "OK"), lambda s: '"' + s],
    ids=["a column too many", "half a pixel", "unknown status", "a stray quote"],
)
def test_reading_refuses_edited_csv(edit: Callable[[str], str]) -> None:
    line = edit(to_line(RECORD, Format.CSV).decode().rstrip("\n")).encode() + b"\n"
    with pytest.raises((ValueError, csv.Error), match=r"."):
        reread(line, Format.CSV)


# Standard output


def run_writer(code: str, **options: Any) -> "subprocess.Popen[bytes]":
    head = "import sys; from diffiqa.runtime.command.records import *; from diffiqa.errors import OutputError\n"
    head += "from diffiqa.runtime.command.table import emit\n"
    head += "put = lambda data: emit(sys.stdout.buffer, data)\n"
    head += f"record = Record(image='a.png', status=Status.OK, score=0.5, engine='e', settings='')\n{code}"
    return subprocess.Popen([sys.executable, "-c", head], stderr=subprocess.PIPE, **options)


def test_each_record_reaches_a_pipe_at_once() -> None:
    code = "put(to_line(record, Format.JSONL)); sys.stdin.read()"
    with run_writer(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        assert json.loads(child.stdout.readline())["image"] == "a.png"  # while the child still waits for us
        child.communicate()


def test_closed_pipe_ends_quietly() -> None:
    code = """
try:
    while True: put(to_line(record, Format.CSV))
except BrokenPipeError:
    sys.exit(3)
"""
    with run_writer(code, stdout=subprocess.PIPE) as child:
        assert child.stdout
        assert child.stderr
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b""
    assert child.returncode == 3  # and not Python's 120 for a standard output that could not be flushed


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_full_disk_behind_standard_output_is_an_output_error(unbuffered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    code = """
try:
    put(to_line(record, Format.JSONL))
except OutputError as error:
    sys.exit(str(error))
"""
    with Path("/dev/full").open("wb") as full, run_writer(code, stdout=full) as child:
        _, stderr = child.communicate()
    assert stderr == b"cannot write to standard output: No space left on device\n"
    assert child.returncode == 1


def test_file_that_takes_a_part_at_a_time_gets_all() -> None:
    class Bare(io.BytesIO):
        def write(self, data: Any) -> int:
            return super().write(data[:3])

    stream = Bare()
    emit(stream, b"0123456789")
    assert stream.getvalue() == b"0123456789"


# Which format


def test_format_is_the_one_asked_for_or_fits_where_it_goes() -> None:
    cases: list[tuple[Format | None, str | None, bool, Format]] = [
        (None, None, True, Format.TABLE),
        (None, None, False, Format.JSONL),
        (Format.TABLE, None, False, Format.TABLE),
        (Format.CSV, None, True, Format.CSV),
        (None, "a.csv", True, Format.CSV),
        (None, "a.JSON", True, Format.JSON),
        (None, "a.jsonl", True, Format.JSONL),
        (None, "a.ndjson", False, Format.JSONL),
        (Format.JSONL, "a.txt", True, Format.JSONL),
    ]
    for wanted, path, terminal, chosen in cases:
        assert choose_format(wanted, Path(path) if path else None, terminal=terminal) is chosen


def test_file_without_a_machine_format_is_refused() -> None:
    cases: list[tuple[Format | None, str]] = [(None, "results.txt"), (None, "results"), (Format.TABLE, "a.csv")]
    for wanted, name in cases:
        with pytest.raises(UsageError, match=r"--format jsonl, json or csv"):
            choose_format(wanted, Path(name), terminal=True)


# Order


def scored(image: str, score: float | None, **values: Any) -> Record:
    return replace(RECORD, image=image, score=score, **values)


MIXED = [
    failed("bad1"),
    scored("c", 0.5, vcg=0.1, seconds=3.0),
    scored("a", 0.9, vcg=None, seconds=1.0),
    failed("bad0"),
    scored("n", math.nan, vcg=0.2, seconds=2.5),
    scored("b", 0.5, vcg=0.3, seconds=2.0),
    scored("d", -1.0, vcg=math.nan, seconds=4.0),
]


def images(records: list[Record]) -> str:
    return " ".join(record.image for record in records)


def test_arrange_is_stable_and_puts_errors_last() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "bad1 c a bad0 n b d"),
        ({"sort": Sort.SCORE}, "d c b a n bad1 bad0"),
        ({"sort": Sort.SCORE, "descending": True}, "a c b d n bad1 bad0"),
        ({"sort": Sort.NAME}, "a b c d n bad1 bad0"),
        ({"sort": Sort.NAME, "descending": True}, "n d c b a bad1 bad0"),
        ({"sort": Sort.VCG}, "c n b a d bad1 bad0"),
        ({"sort": Sort.VCG, "descending": True}, "b n c a d bad1 bad0"),
        ({"sort": Sort.VDA}, "c a n b d bad1 bad0"),
        ({"sort": Sort.TIME}, "a b n c d bad1 bad0"),
        ({"top": 2}, "a c"),
        ({"bottom": 2}, "d c"),
        ({"top": 1, "bottom": 1}, "a d"),
        ({"top": 3, "bottom": 3}, "a c b d"),
        ({"top": 0}, ""),
        ({"top": 2, "sort": Sort.NAME}, "a c"),
        ({"top": 2, "sort": Sort.VCG, "descending": True}, "b n"),
    ]
    for options, expected in cases:
        assert images(arrange(MIXED, **options)) == expected


def test_arrange_leaves_its_input_alone() -> None:
    before = list(MIXED)
    arrange(MIXED, Sort.SCORE, top=1)
    assert before == MIXED
