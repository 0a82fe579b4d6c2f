"""Which files a command means: names as they are given, folders as the images in them, patterns as what they match."""

import os
from collections.abc import Iterable
from pathlib import Path

from .images import readable_suffixes

Images = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]  # names, folders, patterns; one alone will do


def names_of(images: Images) -> list[str]:
    """Return names, folders and patterns as a list of texts; one alone is a list of one."""
    return [os.fspath(name) for name in ([images] if isinstance(images, str | os.PathLike) else images)]


def find_images(images: Images) -> list[Path]:
    """Return the files that names, folders and patterns stand for, each once, in the order given.

    A pattern means its matches, as if the shell had expanded it; `**` goes through folders. A name that stands for
    nothing (a missing file, a pattern without a match, a folder without images) is returned as it is: nobody overlooks
    it, because reading it fails.
    """
    found: dict[str, Path] = {}
    for arg in names_of(images):
        meant = [image for path in _matches(arg) for image in _images_in(path)]
        for image in meant or [Path(arg)]:
            found.setdefault(os.path.realpath(image) if os.path.lexists(image) else str(image), image)
    return list(found.values())


def _matches(arg: str) -> list[Path]:
    """Return what a name stands for: a file called `a[1].png` is that file, not a pattern."""
    path = Path(arg)
    if not arg:  # an unset variable; it must not mean the current folder
        return []
    if os.path.lexists(path) or not any(wild in arg for wild in "*?["):
        return [path]
    anchor = Path(path.anchor)
    try:
        # `Path.glob`, unlike `glob`, does not follow links to folders, some of which go round.
        matches = sorted(anchor.glob(str(path.relative_to(anchor))))
    except ValueError:  # not a pattern
        return []
    return [match for match in matches if not _is_hidden(match, path)]


def _is_hidden(match: Path, pattern: Path) -> bool:
    return any(part.startswith(".") and part not in pattern.parts for part in match.parts)


def _images_in(path: Path) -> list[Path]:
    """Return a folder's images at any depth, sorted; hidden ones and linked folders are left out. A file is itself."""
    if not os.path.isdir(path):  # noqa: PTH112 — `Path.is_dir` fails on names that are too long
        return [path]
    suffixes = readable_suffixes()
    images: list[Path] = []

    def report(error: OSError) -> None:
        images.append(
            Path(error.filename)
        )  # a folder without permission to read: the error of reading it as an image says so

    for folder, subfolders, names in os.walk(path, onerror=report):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        inside = (Path(folder, name) for name in names if not name.startswith("."))
        images += (image for image in inside if image.suffix.lower() in suffixes)
    return sorted(images)
