"""Arrays come back as they were; whatever else is in such a file is one kind of error. The fuzzer found some."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffiqa.engine.npz import read_arrays

ROWS = np.arange(600, dtype=np.float32).reshape(200, 3)


def written(save: Callable[..., None], *arrays: object, **named: object) -> bytes:
    save(stream := io.BytesIO(), *arrays, **named)
    return stream.getvalue()


ONE, SOME, SMALL = written(np.save, ROWS), written(np.savez, a=ROWS), written(np.savez_compressed, a=ROWS)
DAMAGED = {
    "nothing": b"",
    "text": b"rows\n",
    "cut": ONE[:100],
    "a header that cannot be tokenised": ONE.replace(b"(200, 3)", b"(\0'''(, "),
    "a header that is code": ONE.replace(b"(200, 3)", b"print(1)"),
    "more than there is memory": ONE.replace(b"(200, 3), }          ", b"(200000000000000, 3)}"),
    "pickled": written(np.save, np.array([None])),
    "a method of compression that is none": SMALL.replace(b"\x08\x00", b"\x63\x00"),
    "damage in what is compressed": SMALL[:90] + b"\xff" * 40 + SMALL[130:],
    "a cut archive": SOME[:-50],
    "a checksum that does not fit": SOME.replace(ROWS[7].tobytes(), ROWS[8].tobytes()),
}


def test_arrays_come_back(tmp_path: Path) -> None:
    file = tmp_path / "arrays"
    for content, name in ((ONE, ""), (SOME, "a"), (SMALL, "a")):
        file.write_bytes(content)
        assert np.array_equal(read_arrays(file)[name], ROWS)


@pytest.mark.parametrize("what", DAMAGED)
def test_what_is_damaged_is_one_kind_of_error(tmp_path: Path, what: str) -> None:
    assert DAMAGED[what] not in {ONE, SOME, SMALL}
    (file := tmp_path / "arrays").write_bytes(DAMAGED[what])
    with pytest.raises(ValueError, match=r"\w"):
        read_arrays(file)


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_arrays(tmp_path / "none")
