"""Training, validation and test parts that share no content. A split is drawn by reference, and kept in a file.

An image without a known reference is its own content. An image that is the reference of others goes with them.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ..engine.atomic import replacing
from ..engine.codec import decode, encode
from ..errors import DatasetError
from .datasets import Dataset, Item

SCHEMA_VERSION = 1
DEFAULT_RATIOS = {"train": 0.7, "validation": 0.1, "test": 0.2}
RATIOS_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Split:
    """Which contents (references, or images that have none) belong to which part of a data set."""

    dataset: str
    seed: int | None  # None: not drawn but the publisher's own split
    parts: dict[str, tuple[str, ...]]
    schema_version: int = SCHEMA_VERSION

    def items(self, dataset: Dataset, part: str) -> tuple[Item, ...]:
        """Return the images of a part. Raises DatasetError if this is not a split of just that data set."""
        if part not in self.parts:
            raise DatasetError(f"the split of {self.dataset} has no part {part!r}, only {', '.join(self.parts)}")
        self._refuse_leaks(dataset)
        found, known = {content_of(item) for item in dataset.items}, set().union(*self.parts.values())
        if different := found ^ known:
            raise DatasetError(
                f"the split of {self.dataset} does not fit {dataset.root}: {len(found - known)} of its contents are "
                f"new and {len(known - found)} are gone, such as {min(different)}; make a new split"
            )
        wanted = set(self.parts[part])
        return tuple(item for item in dataset.items if content_of(item) in wanted)

    def _refuse_leaks(self, dataset: Dataset) -> None:
        """Raise DatasetError if two images that show the same are named in different parts."""
        contents = {item.image: content_of(item) for item in dataset.items}
        first: dict[str, tuple[str, str]] = {}
        for part, names in self.parts.items():
            for name in names:
                other, theirs = first.setdefault(contents.get(name, name), (name, part))
                if theirs != part:
                    raise DatasetError(
                        f"the split of {self.dataset} leaks: {other} in {theirs!r} and {name} in {part!r} show the "
                        f"same; make a new split, which keeps them together"
                    )

    def write(self, path: Path) -> None:
        """Write the split as JSON, whole or not at all. Raises DatasetError."""
        text = json.dumps(encode(self), indent=1, ensure_ascii=False) + "\n"
        try:
            with replacing(path) as stream:
                stream.write(text.encode())
        except OSError as exc:
            raise DatasetError(f"the split {path} cannot be written: {exc.strerror}") from exc

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read what `write` wrote, and check that no content is in two parts. Raises DatasetError."""
        try:
            split = decode(cls, json.loads(path.read_text(encoding="utf-8")), f"the split {path}", DatasetError)
        except (OSError, ValueError, RecursionError) as exc:
            raise DatasetError(f"the split {path} cannot be read: {exc}") from exc
        if split.schema_version != SCHEMA_VERSION:
            raise DatasetError(f"the split {path} has format {split.schema_version}, this diffiqa reads 1")
        part_of: dict[str, str] = {}
        for part, contents in split.parts.items():
            if not contents:
                raise DatasetError(f"the split {path} has nothing in part {part!r}")
            for content in contents:
                if content in part_of:
                    raise DatasetError(f"the split {path} has {content} in {part_of[content]!r} and again in {part!r}")
                part_of[content] = part
        return split


def content_of(item: Item) -> str:
    """Return what the image shows: its reference's name, or its own."""
    return item.reference or item.image


def split_by_content(dataset: Dataset, seed: int, ratios: Mapping[str, float] | None = None) -> Split:
    """Draw a split; `ratios` are shares of contents, by part, that add up to 1 (DEFAULT_RATIOS).

    Shares are rounded down, and the last part gets the rest: KADID-10k's 81 references at 8:2 make 64 and 17. Every
    part gets one content at least. The draw depends on the seed and the names alone: another library, another machine
    or another order of files gives the same split.

    Raises DatasetError, for example if there is only one reference: it cannot be in two parts.
    """
    ratios = DEFAULT_RATIOS if ratios is None else ratios
    contents = {content_of(item) for item in dataset.items}
    if len(contents) < len(ratios):
        raise DatasetError(
            f"{dataset.name} shows {len(contents)} different reference{'s'[: len(contents) != 1]}, too few for "
            f"{len(ratios)} parts that share none: parts with the same content would measure memory, not quality"
        )
    return Split(dataset.name, seed, shares(contents, seed, ratios))


def shares(names: Iterable[str], seed: int, ratios: Mapping[str, float]) -> dict[str, tuple[str, ...]]:
    """Deal different names out to parts, of which there are no more than names. Raises DatasetError."""
    if len(ratios) < 2 or min(ratios.values()) <= 0 or abs(sum(ratios.values()) - 1) > RATIOS_TOLERANCE:
        raise DatasetError(f"a split needs two or more positive shares that add up to 1, not {dict(ratios)}")
    drawn = sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    sizes = [max(1, math.floor(share * len(drawn) + RATIOS_TOLERANCE)) for share in ratios.values()]
    sizes[-1] = max(1, len(drawn) - sum(sizes[:-1]))
    while sum(sizes) > len(drawn):  # few names: the parts that had to get one take it from the largest
        sizes[sizes.index(max(sizes))] -= 1
    rest = iter(drawn)
    return {part: tuple(sorted(next(rest) for _ in range(size))) for part, size in zip(ratios, sizes, strict=True)}
