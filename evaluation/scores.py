"""Scores of images by their names in the labels: read from a file, whatever that calls them."""

import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.datasets import Item
from ..data.labelfiles import read_csv
from ..errors import DatasetError, OutputError
from ..runtime.command.recordfile import read_records
from ..runtime.command.records import Format, text_in_cell
from .findings import BRANCHES, PEOPLE, Scores

IMAGE_COLUMNS = ("image", "path", "name")


def read_scores(path: Path) -> dict[str, float]:
    """Return the scores by image of a file that `read_columns` reads. Raises DatasetError."""
    return read_columns(path, ("score",))["score"]


def read_columns(path: Path, wanted: Sequence[str] = (*BRANCHES, *PEOPLE)) -> dict[str, dict[str, float]]:
    """Return the numbers of a file that `iqa-run` wrote (.jsonl, .json, .csv), or of any CSV image,score.

    They are by column, of those `wanted`, and by image. The images' column may also be called path or name. Images
    without a number (failed ones) are left out. Raises DatasetError.
    """
    columns: dict[str, dict[str, float]] = {column: {} for column in wanted}
    twice = 0
    try:
        for image, values in _rows(path):
            known = {column: float(values[column]) for column in columns if values.get(column) not in {None, ""}}
            twice += "score" in known and image in columns["score"]
            for column, value in known.items():
                columns[column][image] = value
    except (OutputError, ValueError, OSError) as exc:
        raise DatasetError(f"the score file {path} cannot be read: {exc}") from exc
    if twice:
        raise DatasetError(f"the score file {path} has {twice} images twice")
    return columns


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.suffix.lower() == ".csv":
        rows = read_csv(path, "score")
        header = next((name for name in IMAGE_COLUMNS if rows and name in rows[0]), IMAGE_COLUMNS[0])
        yield from ((text_in_cell(row[header]), row) for row in read_csv(path, header, "score"))
    elif path.suffix.lower() in {".jsonl", ".json"}:
        yield from ((record.image, vars(record)) for record in read_records(path, Format(path.suffix.lower()[1:])))
    else:
        raise DatasetError(f"the score file {path} must be called .jsonl, .json or .csv")


def pictures_of(items: Iterable[Item]) -> dict[str, Path]:
    """Return the files of images and of the references that are files, by their names in the labels."""
    found: dict[str, Path] = {}
    for item in items:
        if item.reference and item.reference_path:
            found[item.reference] = item.reference_path
        found[item.image] = item.path
    return found


def read_branches(path: Path, pictures: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """Return the scores of a file by column and by the labels' names of the images. Raises DatasetError."""
    columns = read_columns(path)
    return _renamed(columns, match_names(pictures, columns["score"], path))


def branches_of(path: Path, names: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Return the scores of a file by column, with what it calls each image in `names`. Raises DatasetError."""
    return _renamed(read_columns(path), names)


def _renamed(columns: Mapping[str, Scores], names: Mapping[str, str]) -> dict[str, dict[str, float]]:
    return {
        column: {image: values[name] for image, name in names.items() if name in values}
        for column, values in columns.items()
    }


def turned(branches: Mapping[str, Scores]) -> dict[str, dict[str, float]]:
    """Return scores of which lower ones are better so that higher ones are; percentiles and opinions stay."""
    return {
        column: {image: -value for image, value in values.items()} if column in BRANCHES else dict(values)
        for column, values in branches.items()
    }


def match_names(pictures: Mapping[str, Path], names: Iterable[str], where: Path) -> dict[str, str]:
    """Return what the score file calls each picture: its path, its name in the labels, or an end of either.

    So scores may have been made in another folder. Raises DatasetError where two names would fit.
    """
    spelt = {posixpath.normpath(name.replace("\\", "/")): name for name in names}
    found: dict[str, str] = {}
    for image, path in pictures.items():
        exact = next((name for name in (path.as_posix(), image) if name in spelt), None)
        if exact:
            found[image] = exact
    free = set(spelt) - set(found.values())
    by_end: dict[str, list[str]] = defaultdict(list)
    for name in sorted(free):
        for end in _ends(name):
            by_end[end].append(name)
    unknown = set(pictures) - set(found)
    claims = Counter(end for image in unknown for end in _ends(image) if end in free)
    # The longest names choose first: what ends like `b/a.png` is not the picture `a.png`.
    for image in sorted(unknown, key=lambda image: (-image.count("/"), image)):
        candidates = [name for name in by_end.get(image, []) if name in free]
        candidates = candidates or [end for end in _ends(image) if end in free][:1]
        if len(candidates) > 1:
            raise DatasetError(
                f"{where} has {candidates[0]} and {candidates[1]}, and either could be {image}; name images in it as "
                f"the labels do"
            )
        if candidates and claims[candidates[0]] > 1:
            raise DatasetError(
                f"{where} has {candidates[0]}, which could be {image} or another image of the labels; name images in "
                f"it as the labels do"
            )
        if candidates:
            found[image] = candidates[0]
            free.remove(candidates[0])
    return {image: spelt[name] for image, name in found.items()}


def _ends(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[start:]) for start in range(len(parts))]
