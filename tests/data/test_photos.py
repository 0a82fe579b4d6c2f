"""Photographs from packages and folders: what is taken, what is left out, where it is said to come from."""

import csv
import hashlib
import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffiqa.data import debian as reader
from diffiqa.data import photos
from diffiqa.data.photos import LIST, gather, parts_in
from diffiqa.data.pictures import detailed
from diffiqa.errors import DatasetError, OutputError
from diffiqa.tests.tiny import photo

COPYRIGHT = """Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2010, Everyone
License: GPL-2+

Files: nature/b.png
       nature/c.png
Copyright: 2011, Somebody
License: CC-BY-4.0
 The long text of it.
"""


def textured(seed: int, height: int = 520, width: int = 560) -> Image.Image:
    """Return a picture with detail everywhere, different for each seed also when it is small."""
    draw = np.random.default_rng(seed)
    coarse = Image.fromarray(draw.integers(0, 256, (9, 10, 3), np.uint8)).resize((width, height))
    noise = draw.integers(-40, 40, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(coarse, np.int16) + noise, 0, 255).astype(np.uint8))


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def package(path: Path, files: dict[str, bytes], *, section: str = "data.tar.xz") -> Path:
    """Write a Debian package as dpkg does: an ar archive of debian-binary, control and data."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz", preset=0) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    out = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (section, data.getvalue())):
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        out += b"\n" * (len(content) % 2)
    path.write_bytes(out)
    return path


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pictures = {f"usr/share/backgrounds/{name}.png": png(textured(seed)) for seed, name in enumerate("abcd")}
    files = {**pictures, "usr/share/doc/walls/copyright": COPYRIGHT.encode(), "usr/bin/tool": b"#!/bin/sh"}
    return package(tmp_path_factory.mktemp("package") / "walls_1%3a2.0_all.deb", files)


@pytest.fixture
def debian(original: Path, tmp_path: Path) -> Path:
    """Return a package that a test may spoil."""
    return Path(shutil.copy(original, tmp_path))


def test_a_package_gives_its_pictures_with_licence_and_origin(debian: Path, tmp_path: Path) -> None:
    found, left = gather([debian], tmp_path / "out", seed=1)
    assert not left
    assert {(p.name, p.origin) for p in found} == {
        (f"usr/share/backgrounds/{name}.png", "walls 1:2.0") for name in "abcd"
    }
    terms = {Path(p.name).stem: (p.licence, p.holder) for p in found}
    assert terms["a"] == ("GPL-2+", "2010, Everyone")
    assert terms["b"] == terms["c"] == ("CC-BY-4.0", "2011, Somebody")
    with (tmp_path / "out" / LIST).open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["file"] for row in rows] == sorted(row["file"] for row in rows)
    for row in rows:
        assert hashlib.sha256((tmp_path / "out" / row["file"]).read_bytes()).hexdigest() == row["sha256"]


def test_the_part_of_a_photograph_depends_on_its_name_alone(debian: Path, tmp_path: Path) -> None:
    first, _ = gather([debian], tmp_path / "one", seed=1)
    again, _ = gather([debian], tmp_path / "two", seed=1)
    assert [p.file for p in first] == [p.file for p in again]
    parts = parts_in(tmp_path / "one")
    assert {part: len(paths) for part, paths in parts.items()} == {"train": 2, "validation": 1, "test": 1}


def test_folders_are_taken_too_and_keep_their_bytes(tmp_path: Path) -> None:
    folder = tmp_path / "My pictures"
    folder.mkdir()
    for seed in range(3):
        textured(seed).save(folder / f"{seed} x.jpg")
    found, _ = gather([folder], tmp_path / "out", seed=1)
    assert sorted(Path(p.file).name for p in found) == [f"My-pictures_{seed}-x.jpg" for seed in range(3)]
    for p in found:
        assert (tmp_path / "out" / p.file).read_bytes() == (folder / p.name).read_bytes()


def test_what_shows_the_same_is_taken_once_in_its_largest_version(debian: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    larger = textured(2).resize((840, 780), Image.Resampling.LANCZOS)
    larger.save(folder / "copy.png")
    found, left = gather([debian, folder], tmp_path / "out", seed=1)
    assert "mine_copy.png" in {Path(p.file).name for p in found}
    assert left == ["usr/share/backgrounds/c.png: shows the same as copy.png"]


def test_small_flat_and_damaged_pictures_are_left_out_and_named(debian: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    textured(7, 200, 300).save(folder / "small.png")
    Image.linear_gradient("L").resize((600, 600)).convert("RGB").save(folder / "gradient.png")
    (folder / "damaged.png").write_bytes(png(textured(8))[:5000])
    found, left = gather([debian, folder], tmp_path / "out", seed=1)
    assert len(found) == 4
    assert sorted(text.split(":")[0] for text in left) == ["damaged.png", "gradient.png", "small.png"]
    assert any("300×200 is small" in text for text in left)


def test_detail_is_what_no_plane_explains() -> None:
    y, x = np.mgrid[:512, :512]
    gradient = np.repeat(((x + y) / 4).astype(np.uint8)[..., None], 3, axis=2)
    assert detailed(gradient) == 0
    half = gradient.copy()
    half[:, :256] = np.random.default_rng(1).integers(0, 256, (512, 256, 3))
    assert detailed(half) == pytest.approx(0.5, abs=0.01)
    assert detailed(photo(3, 4, 4)) == 0  # too small for a block


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"PK" + data, "is no Debian package"),
        (lambda data: data[:-2000], "is damaged"),
        (lambda data: data.replace(b"data.tar.xz", b"data.tar.zs"), r"has no data\.tar\.xz, only debian-binary"),
        (lambda data: data[:70], r"has no data\.tar\.xz"),
        (lambda data: data[:-3000] + bytes(3000), "is damaged"),
    ],
    ids=["magic", "cut", "compression", "header", "zeros"],
)
def test_a_damaged_package_is_named(debian: Path, tmp_path: Path, damage: object, message: str) -> None:
    debian.write_bytes(damage(debian.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DatasetError, match=message):
        gather([debian], tmp_path / "out", seed=1)
    assert not (tmp_path / "out").exists()


def test_a_package_that_unpacks_to_too_much_is_refused(
    debian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "MAX_PICTURE", 100_000)
    with pytest.raises(DatasetError, match="unpacks to more"):
        gather([debian], tmp_path / "out", seed=1)


def test_a_package_that_unpacks_without_end_is_refused_before_memory_is_gone(
    debian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few kilobytes of xz stand for 64 MiB of zeros, in a file that nobody would have read."""
    monkeypatch.setattr(reader, "MAX_PACKAGE", 16 << 20)
    package(debian, {"usr/lib/zeros": bytes(64 << 20)})
    assert debian.stat().st_size < 100_000
    with pytest.raises(DatasetError, match="unpacks to more than 16 MiB"):
        gather([debian], tmp_path / "out", seed=1)


def test_a_path_says_more_about_a_licence_than_a_name() -> None:
    terms = [(("walls/a/*.png",), "CC0-1.0", "A"), (("icons/x.png",), "GPL-2+", "B"), (("*",), "MIT", "C")]
    assert reader.licence_of("usr/share/walls/a/x.png", terms) == ("CC0-1.0", "A")
    assert reader.licence_of("usr/share/other/x.png", terms) == ("GPL-2+", "B")
    assert reader.licence_of("usr/share/other/x.jpg", terms) == ("MIT", "C")


def test_a_pattern_of_another_folder_says_nothing_about_a_licence() -> None:
    """`debian/*` is in nearly every package, and its last part matches any name."""
    terms = [(("*",), "CC-BY-4.0", "A"), (("debian/*", "icons/*.png"), "Expat", "B")]
    assert reader.licence_of("usr/share/walls/x.png", terms) == ("CC-BY-4.0", "A")


def test_a_known_package_gives_what_was_chosen_by_eye_and_nothing_else(
    debian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(photos.PACKAGES, "walls", ("a", "b", "d"))
    found, left = gather([debian], tmp_path / "out", seed=1)
    assert len(found) == 3
    assert not left
    monkeypatch.setitem(photos.PACKAGES, "walls", ("a", "e"))
    with pytest.raises(DatasetError, match="has no e"):
        gather([debian], tmp_path / "other", seed=1)


def test_where_files_are_called_by_their_size_the_folder_names_the_picture(tmp_path: Path) -> None:
    files = {
        f"usr/share/wallpapers/{name}/contents/images/2560x1600.png": png(textured(seed))
        for seed, name in enumerate(("Path", "Kite", "Grey"))
    }
    found, _ = gather([package(tmp_path / "walls_1_all.deb", files)], tmp_path / "out", seed=1)
    assert sorted(Path(p.file).name for p in found) == ["walls_Grey.png", "walls_Kite.png", "walls_Path.png"]


def test_names_in_a_package_cannot_leave_the_folder(tmp_path: Path) -> None:
    files = {f"../../{name}/..{seed}.png": png(textured(seed)) for seed, name in enumerate(("..", "x", "/y"))}
    found, _ = gather([package(tmp_path / "walls_1_all.deb", files)], tmp_path / "deep" / "out", seed=1)
    inside = {path.relative_to(tmp_path / "deep" / "out").as_posix() for path in (tmp_path / "deep").rglob("*.png")}
    assert inside == {p.file for p in found}
    assert len(inside) == 3


def test_too_few_photographs_and_a_used_folder_are_refused(debian: Path, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(OutputError, match="is not empty"):
        gather([debian], tmp_path / "used", seed=1)
    folder = tmp_path / "two"
    folder.mkdir()
    for seed in range(2):
        textured(seed).save(folder / f"{seed}.png")
    with pytest.raises(DatasetError, match="2 usable photographs are too few"):
        gather([folder], tmp_path / "out", seed=1)


def test_without_apt_get_the_way_around_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DatasetError, match=r"no apt-get; give \.deb files or folders"):
        gather([], tmp_path / "out", seed=1)


def test_a_folder_without_parts_is_refused_with_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="has no folder train: make it with `iqa-train photos"):
        parts_in(tmp_path)


def test_a_package_that_came_later_is_split_by_itself(
    debian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was held out before must not be trained on because there is more now."""
    before, _ = gather([debian], tmp_path / "before", seed=1)
    later = package(
        tmp_path / "later_2_all.deb",
        {f"usr/share/land/{name}.png": png(textured(seed)) for seed, name in enumerate("efghi", 20)}
        | {"usr/share/planet/e.png": png(textured(30))},
    )
    monkeypatch.setattr(photos, "APART", ("later",))
    monkeypatch.setitem(photos.PACKAGES, "later", ("land/[a-z].png",))
    after, left = gather([debian, later], tmp_path / "after", seed=1)
    assert not left
    assert {p.file for p in before} <= {p.file for p in after}
    assert {p.name for p in after} - {p.name for p in before} == {f"usr/share/land/{name}.png" for name in "efghi"}
    assert len({p.file.split("/")[0] for p in after if p.origin == "later 2"}) == 3


def test_too_few_photographs_of_a_later_package_are_split_with_the_others(
    debian: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = package(tmp_path / "later_2_all.deb", {"usr/share/land/e.png": png(textured(20))})
    monkeypatch.setattr(photos, "APART", ("later",))
    found, _ = gather([debian, later], tmp_path / "out", seed=1)
    assert len(found) == 5
    assert {part: len(paths) for part, paths in parts_in(tmp_path / "out").items()} == {
        "train": 3,
        "validation": 1,
        "test": 1,
    }
