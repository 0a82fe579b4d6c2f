import contextlib
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from diffiqa.data import labelfiles
from diffiqa.data.labelfiles import read_csv, read_lines, read_mat, read_xlsx

from ..training.fake_datasets import write_xlsx

CONTENT = {
    "numbers": np.array([1.5, -2, 1e300]),
    "bytes": np.arange(9, dtype=np.uint8),
    "flags": np.array([True, False, True]),
    "names": np.array(["a.bmp", "größer.bmp", "x" * 300], dtype=object),
    "text": "one name",
    "short": np.array([[7]], dtype=np.int16),
    "empty": np.zeros((0, 0)),
}


@pytest.mark.parametrize("compressed", [False, True])
def test_reads_what_matlab_writes(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "x.mat"
    savemat(path, CONTENT | {"left_out": {"a": 1}}, do_compression=compressed)
    found = read_mat(path)
    assert set(found) == set(CONTENT)
    for name in ("numbers", "bytes", "flags", "short", "empty"):
        assert np.array_equal(np.asarray(found[name]), np.ravel(np.asarray(CONTENT[name])))
    assert found["names"] == ["a.bmp", "größer.bmp", "x" * 300]
    assert found["text"] == "one name"


def test_refuses_other_matlab_files(tmp_path: Path) -> None:
    path = tmp_path / "x.mat"
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(512))
    with pytest.raises(ValueError, match="save it in MATLAB with '-v7'"):
        read_mat(path)
    path.write_bytes(b"something")
    with pytest.raises(ValueError, match="no MATLAB 5 file"):
        read_mat(path)


def test_a_packed_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelfiles, "MAX_BYTES", 10_000)
    monkeypatch.setattr(labelfiles, "MAX_XML_BYTES", 10_000)
    savemat(tmp_path / "x.mat", {"zeros": np.zeros(100_000)}, do_compression=True)
    with pytest.raises(ValueError, match="more than 10000 bytes"):
        read_mat(tmp_path / "x.mat")
    write_xlsx(tmp_path / "x.xlsx", {"s": [["0" * 100_000]]})
    with pytest.raises(ValueError, match=r"sharedStrings\.xml unpacks to more than 10000 bytes"):
        read_xlsx(tmp_path / "x.xlsx", "s")
    (tmp_path / "x.csv").write_text("a\n" * 10_000)
    with pytest.raises(ValueError, match="more than 10000 bytes"):
        read_csv(tmp_path / "x.csv")


def test_reads_what_excel_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.xlsx"
    write_xlsx(path, {"first": [["no"]], "second": [["a & b", "", 1600.0], [], ["", 0.25]]})
    assert read_xlsx(path, "second") == [{"A": "a & b", "C": 1600.0}, {}, {"B": 0.25}]
    with pytest.raises(ValueError, match="no sheet 'third', only 'first', 'second'"):
        read_xlsx(path, "third")


def spoiled(path: Path, part: str, content: str | bytes) -> Path:
    """Copy a spreadsheet with one part replaced."""
    target = path.with_name("spoiled.xlsx")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name == part else old.read(name))
    return target


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_spreadsheets_with_entities_are_refused(tmp_path: Path, encoding: str) -> None:
    bomb = f'<?xml version="1.0" encoding="{encoding}"?><!DOCTYPE a [<!ENTITY b "bb">]><a>&b;</a>'
    write_xlsx(tmp_path / "x.xlsx", {"s": [["text"]]})
    with pytest.raises(ValueError, match="document type"):
        read_xlsx(spoiled(tmp_path / "x.xlsx", "xl/workbook.xml", bomb.encode(encoding)), "s")


def test_spreadsheets_that_refer_to_nothing_are_refused(tmp_path: Path) -> None:
    write_xlsx(tmp_path / "x.xlsx", {"s": [["text"]]})
    with pytest.raises(ValueError, match="text number '0' of 0"):
        read_xlsx(spoiled(tmp_path / "x.xlsx", "xl/sharedStrings.xml", "<sst/>"), "s")
    with pytest.raises(ValueError, match="the part of sheet 's' is not in it"):
        read_xlsx(spoiled(tmp_path / "x.xlsx", "xl/_rels/workbook.xml.rels", "<x/>"), "s")
    with pytest.raises(ValueError, match=r"no readable \.xlsx"):
        read_xlsx(spoiled(tmp_path / "x.xlsx", "xl/workbook.xml", "<x"), "s")


@pytest.mark.parametrize("form", ["mat", "packed mat", "xlsx"])
def test_damage_ends_in_a_value_error(tmp_path: Path, form: str) -> None:
    path = tmp_path / "x"
    if form == "xlsx":
        write_xlsx(path, {"s": [["a", 1.0, "b"]] * 5})
    else:
        savemat(tmp_path / "x.mat", CONTENT, do_compression=form == "packed mat")
        (tmp_path / "x.mat").rename(path)
    whole = path.read_bytes()
    chance = random.Random(0)  # noqa: S311
    for _ in range(150):
        data = bytearray(whole[: chance.randrange(len(whole))] if chance.random() < 0.2 else whole)
        for _ in range(chance.randrange(1, 6)):
            if data:
                data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data)
        with contextlib.suppress(ValueError):
            read_xlsx(path, "s") if form == "xlsx" else read_mat(path)


def test_csv_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes('\ufeffa, b\r\n"1,5", ü \r\n\r\n'.encode())
    assert read_csv(path, "b") == [{"a": "1,5", "b": "ü"}]
    assert read_lines(path) == ["a, b", '"1,5", ü']
    path.write_bytes(b"a\n\xff")
    with pytest.raises(ValueError, match="no UTF-8 text"):
        read_lines(path)
