"""Which files a command means: names as they are given, folders as the images in them, patterns as what they match."""

import os
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

from ..errors import UsageError
from .images import readable_suffixes

Images = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]  # names, folders, patterns; one alone will do


def names_of(images: Images) -> list[str]:
    """Return names, folders and patterns as a list of texts; one alone is a list of one."""
    return [os.fspath(name) for name in ([images] if isinstance(images, str | os.PathLike) else images)]


def find_images(images: Images) -> list[Path]:
    """Return the files that names, folders and patterns stand for, each once, in the order given.

    A pattern means its matches, as if the shell had expanded it; `**` goes through folders. A name that stands for
    nothing (a missing file, a pattern without a match, a folder without images) is returned as it is: nobody overlooks
    it, because reading it fails. Raises UsageError for addresses.
    """
    found: dict[str, Path] = {}
    for image in each_image(names_of(images)):
        found.setdefault(os.path.realpath(image) if os.path.lexists(image) else image, Path(image))
    return list(found.values())


def each_image(names: Iterable[str]) -> Iterator[str]:
    """Yield what `find_images` returns one by one, a file perhaps more than once. Holds no more than one folder's."""
    for name in names:
        image = None
        for path in _matches(name):
            for image in _images_in(path):
                yield image
        if image is None:
            yield str(Path(name))


def _matches(arg: str) -> list[Path]:
    """Return what a name stands for: a file called `a[1].png` is that file, not a pattern."""
    path = Path(arg)
    if not arg:  # an unset variable; it must not mean the current folder
        return []
    there = os.path.lexists(path)
    if not there and "://" in arg:
        raise UsageError(
            f"{arg} is an address, not a file: iqa-run --shards reads buckets, and with --http web servers"
        )
    if there or not any(wild in arg for wild in "*?["):
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


def _images_in(path: Path) -> Iterator[str]:
    """Yield a folder's images at any depth, sorted; hidden ones and linked folders are left out. A file is itself."""
    if not os.path.isdir(path):  # noqa: PTH112 — `Path.is_dir` fails on names that are too long
        yield str(path)
        return
    suffixes = readable_suffixes()
    folders = [_inside(str(path), suffixes)]  # a folder, and before it those that it lies in
    while folders:
        for name, is_folder in folders[-1]:
            if is_folder:
                folders.append(_inside(name, suffixes))
                break
            yield name
        else:
            folders.pop()


def _inside(folder: str, suffixes: Set[str]) -> Iterator[tuple[str, bool]]:
    """Yield the images and folders in a folder, sorted, and which they are."""
    kinds: dict[str, bool] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if _is_folder(entry):
                    if not (entry.name.startswith(".") or entry.is_symlink()):
                        kinds[entry.name] = True
                elif not entry.name.startswith(".") and os.path.splitext(entry.name)[1].lower() in suffixes:  # noqa: PTH122 — a million times
                    kinds[entry.name] = False
    except OSError:
        yield folder, False  # without permission to read it: the error of reading it as an image says so
        return
    above = "" if folder == os.curdir else folder
    for name in sorted(kinds):
        yield os.path.join(above, name), kinds[name]  # noqa: PTH118


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that goes round
        return False
