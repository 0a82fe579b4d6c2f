import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from diffiqa.data import labelfiles
from diffiqa.data.labelfiles import read_csv, read_lines, read_mat, read_sheet
from diffiqa.errors import BackendError

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


def test_a_missing_scipy_is_named_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    savemat(tmp_path / "x.mat", CONTENT)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(BackendError, match=r"scipy cannot be loaded .*pip install 'diffiqa\[train\]'"):
        read_mat(tmp_path / "x.mat")


def test_refuses_other_matlab_files(tmp_path: Path) -> None:
    path = tmp_path / "x.mat"
    path.write_bytes(b"MATLAB 7.3 MAT-file".ljust(512))
    with pytest.raises(ValueError, match="save it in MATLAB with '-v7'"):
        read_mat(path)
    path.write_bytes(b"something")
    with pytest.raises(ValueError, match="no MATLAB 5 file"):
        read_mat(path)


def test_files_larger_than_any_labels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelfiles, "MAX_BYTES", 10_000)
    savemat(tmp_path / "x.mat", {"zeros": np.zeros(100_000)})
    with pytest.raises(ValueError, match="more than 10000 bytes"):
        read_mat(tmp_path / "x.mat")
    (tmp_path / "x.csv").write_text("a\n" * 10_000)
    with pytest.raises(ValueError, match="more than 10000 bytes"):
        read_csv(tmp_path / "x.csv")


def test_a_sheet_saved_as_csv_begins_below_its_titles(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("A title,,\n,,\n,Image,DMOS\n,1600,0.25\n,a,\n")
    assert read_sheet(path, "image", "dmos") == [
        {"": "", "image": "1600", "dmos": "0.25"},
        {"": "", "image": "a", "dmos": ""},
    ]
    with pytest.raises(ValueError, match="no row with the headings image, mos"):
        read_sheet(path, "image", "mos")


def test_damage_ends_in_a_value_error(tmp_path: Path) -> None:
    path = tmp_path / "x.mat"
    savemat(path, {"names": np.array(["a.bmp", "b"], dtype=object)})
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match="damaged or broken off"):
        read_mat(path)
    path.write_bytes(whole[:144] + b"\4" + whole[145:])  # cells that say they are text crash SciPy 1.17.1
    with pytest.raises(ValueError, match="SciPy's reader crashed"):
        read_mat(path)


def test_csv_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes('\ufeffa, b\r\n"1,5", ü \r\n\r\n'.encode())
    assert read_csv(path, "b") == [{"a": "1,5", "b": "ü"}]
    assert read_lines(path) == ["a, b", '"1,5", ü']
    path.write_bytes(b"a\n\xff")
    with pytest.raises(ValueError, match="no UTF-8 text"):
        read_lines(path)
