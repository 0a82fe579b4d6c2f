"""Intermediates on disk: names that cannot escape or collide, pictures that are those of the result."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffiqa.engine.schedule import Kind
from diffiqa.errors import OutputError
from diffiqa.runtime.report.intermediates import difference, file_stem, save_intermediates
from diffiqa.runtime.results import Mode, Pictures
from diffiqa.tests.runtime.fake_results import fake_score

DIGEST = "0123456789abcdef"


def test_stems_are_plain_file_names() -> None:
    cases: list[tuple[str, str]] = [
        ("photos/x.png", "x"),
        ("photos\\sub\\x.png", "x"),
        ("x", "x"),
        ("archive.tar.gz", "archive.tar"),
        ("../../etc/passwd", "passwd"),
        ("..", "image"),
        ("", "image"),
        ("/", "image"),
        (".hidden", "hidden"),
        ("-rf.png", "rf"),
        ("a b\n*?<>|:.png", "a_b"),
        ("Füße.png", "Füße"),
        ("Fu\u0308ße.png", "Füße"),
        ("bad\udcff.png", "bad"),
        ("x\x00y.png", "x_y"),
        ("CON.png", "CON"),
    ]
    for source, stem in cases:
        assert file_stem(source, DIGEST) == f"{stem}-01234567"


def test_long_names_are_cut_to_what_file_systems_take() -> None:
    assert len(file_stem("猫" * 300 + ".png", DIGEST).encode()) < 140


def test_writes_all_pictures_at_full_size(tmp_path: Path) -> None:
    result = fake_score(1, "a/x.png", height=230, width=260, crops=2, mode=Mode.CROP)
    assert result.pictures is not None
    written = save_intermediates(result, tmp_path / "new" / "folder")
    names = ["dis", "y0", "t1", "t2", "difference", "score_map", "weight_map"]
    assert [path.name for path in written] == [f"x-{result.digest[:8]}.{name}.png" for name in names]
    assert sorted(written) == sorted((tmp_path / "new" / "folder").iterdir())
    for kind, path in zip(Kind, written, strict=False):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), result.pictures.planes[kind])


def test_maps_on_disk_carry_their_numbers(tmp_path: Path) -> None:
    result = fake_score(2, height=230, width=700, crops=2)
    assert result.pictures is not None
    path = save_intermediates(result, tmp_path)[-1]
    image = Image.open(path)
    low, high = float(image.info["minimum"]), float(image.info["maximum"])
    index = np.asarray(image)
    expected = result.pictures.weight_map
    assert np.isnan(expected).any()
    np.testing.assert_array_equal(index == 255, np.isnan(expected))
    known = index < 255
    np.testing.assert_allclose(low + (high - low) * index[known] / 254, expected[known], atol=(high - low) / 500)


def test_same_names_do_not_meet_and_writing_again_replaces(tmp_path: Path) -> None:
    first, second = fake_score(1, "a/x.png"), fake_score(2, "b/x.png")
    written = {*save_intermediates(first, tmp_path), *save_intermediates(second, tmp_path)}
    save_intermediates(first, tmp_path)
    assert len(written) == 14
    assert set(tmp_path.iterdir()) == written


def test_a_result_without_pictures_writes_nothing(tmp_path: Path) -> None:
    assert save_intermediates(fake_score(1, pictures=False), tmp_path / "none") == []
    assert not (tmp_path / "none").exists()


def test_an_engine_without_restoration_has_no_difference(tmp_path: Path) -> None:
    result = fake_score(3)
    assert result.pictures is not None
    bare = dataclasses.replace(result.pictures, planes={Kind.DIS: result.pictures.planes[Kind.DIS]})
    names = [
        path.name.split(".")[1] for path in save_intermediates(dataclasses.replace(result, pictures=bare), tmp_path)
    ]
    assert names == ["dis", "score_map", "weight_map"]


def test_trouble_is_an_output_error_and_leaves_no_scraps(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the pictures of"):
        save_intermediates(fake_score(1), tmp_path / "file")
    stem = file_stem(fake_score(1).source, fake_score(1).digest)
    (tmp_path / f"{stem}.y0.png").mkdir()
    with pytest.raises(OutputError, match="cannot write the pictures of"):
        save_intermediates(fake_score(1), tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    assert not list(tmp_path.glob(".*"))


def test_difference_is_unknown_only_where_nothing_was_restored() -> None:
    dis = np.full((2, 3, 3), 100, np.uint8)
    y0 = np.array([[[128] * 3, [128] * 3, [128] * 3], [[90, 100, 130], [128, 128, 127], [100] * 3]], np.uint8)
    score_map = np.array([[1, np.nan, 1], [1, np.nan, np.nan]], np.float32)
    moved = difference(Pictures({Kind.DIS: dis, Kind.Y0: y0}, score_map, score_map))
    assert moved is not None
    np.testing.assert_allclose(moved, [[28, np.nan, 28], [40 / 3, 83 / 3, 0]], rtol=1e-6)
