"""Names, folders and patterns become files: each once, in an order that does not change, and nothing passes unseen."""

import os
from pathlib import Path

import pytest

from diffiqa.runtime.inputs import find_images

TREE = [
    "b.png",
    "a.JPG",
    "notes.txt",
    ".hidden.png",
    "sub/z.tif",
    "sub/deep/c.webp",
    ".git/x.png",
    "a[1].png",
    "no_suffix",
]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in TREE:
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "tree" / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "tree"


def found(*args: str) -> list[str]:
    return [path.as_posix() for path in find_images(args)]


@pytest.mark.usefixtures("tree")
def test_names_are_returned_as_given_whatever_they_are() -> None:
    names = ["tree/notes.txt", "tree/no_suffix", "tree/.hidden.png", "tree/b.png", "missing.png", "x" * 5000, "nul\0"]
    assert found(*names) == names


@pytest.mark.usefixtures("tree")
def test_a_folder_means_its_images_at_any_depth_sorted() -> None:
    expected = ["tree/a.JPG", "tree/a[1].png", "tree/b.png", "tree/sub/deep/c.webp", "tree/sub/z.tif"]
    assert found("tree") == expected
    assert found("tree/") == expected
    assert found("./tree/sub/..") == [f"tree/sub/../{name.removeprefix('tree/')}" for name in expected]


def test_absolute_names_stay_absolute(tree: Path) -> None:
    assert found(str(tree / "sub")) == [str(tree / "sub/deep/c.webp"), str(tree / "sub/z.tif")]
    assert found(str(tree / "*.png")) == [str(tree / "a[1].png"), str(tree / "b.png")]


def test_a_hidden_folder_is_searched_when_it_is_named(tree: Path) -> None:
    assert found("tree/.git") == ["tree/.git/x.png"]
    assert found("tree/.git/*") == ["tree/.git/x.png"]
    assert found("tree/.*") == ["tree/.*"]
    (tree / ".git").rename(tree / ".photos")
    assert found("tree/*/x.png") == ["tree/*/x.png"]


@pytest.mark.usefixtures("tree")
def test_a_pattern_means_what_the_shell_would_have_made_of_it() -> None:
    cases: list[tuple[str, list[str]]] = [
        ("tree/*.png", ["tree/a[1].png", "tree/b.png"]),
        ("tree/?.png", ["tree/b.png"]),
        ("tree/[ab].*", ["tree/a.JPG", "tree/b.png"]),
        ("tree/**/*.tif", ["tree/sub/z.tif"]),
        ("tree/**", ["tree/a.JPG", "tree/a[1].png", "tree/b.png", "tree/sub/deep/c.webp", "tree/sub/z.tif"]),
        ("tree/s*", ["tree/sub/deep/c.webp", "tree/sub/z.tif"]),
        ("tr*/notes.*", ["tree/notes.txt"]),
    ]
    for pattern, expected in cases:
        assert found(pattern) == expected


@pytest.mark.usefixtures("tree")
def test_a_file_with_the_name_of_a_pattern_is_that_file() -> None:
    assert found("tree/a[1].png") == ["tree/a[1].png"]


@pytest.mark.usefixtures("tree")
def test_what_stands_for_nothing_is_kept_to_be_reported() -> None:
    for arg in ("tree/*.bmp", "nowhere/*", "tree/empty", "tree/e*", "*****", "tree/[", "nul\0*"):
        assert found(arg, "tree/b.png") == [arg, "tree/b.png"]


@pytest.mark.usefixtures("tree")
def test_an_empty_name_does_not_mean_the_current_folder() -> None:
    assert find_images([""]) == [Path()]


def test_a_file_is_returned_once_under_its_first_name(tree: Path) -> None:
    (tree / "link.png").symlink_to("b.png")
    assert found("tree/link.png", "tree/b.png", str(tree / "b.png"), "tree/./b.png") == ["tree/link.png"]
    assert found("tree/b.png", "tree") == [
        "tree/b.png",
        "tree/a.JPG",
        "tree/a[1].png",
        "tree/sub/deep/c.webp",
        "tree/sub/z.tif",
    ]
    assert found("missing", "missing") == ["missing"]


def test_links_to_folders_are_followed_only_when_named(tree: Path) -> None:
    for name in ("loop", "again"):  # two of them, for which a naive search takes 2^40 steps
        (tree / "sub" / name).symlink_to("..")
    assert found("tree/sub") == ["tree/sub/deep/c.webp", "tree/sub/z.tif"]
    assert found("tree/**/*.webp") == ["tree/sub/deep/c.webp"]
    assert found("tree/sub/loop/sub") == ["tree/sub/loop/sub/deep/c.webp", "tree/sub/loop/sub/z.tif"]


def test_a_link_that_goes_nowhere_is_kept_to_be_reported(tree: Path) -> None:
    (tree / "sub" / "gone.png").symlink_to("nowhere")
    (tree / "sub" / "self.png").symlink_to("self.png")
    assert found("tree/sub") == ["tree/sub/deep/c.webp", "tree/sub/gone.png", "tree/sub/self.png", "tree/sub/z.tif"]


@pytest.mark.usefixtures("tree")
def test_a_folder_that_may_not_be_read_is_kept_to_be_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def refuse(path: str) -> object:
        if os.fspath(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)  # as root, file modes would not stop us
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert found("tree/sub") == ["tree/sub/deep", "tree/sub/z.tif"]
