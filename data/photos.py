"""Pristine photographs that anyone can get, from packages of Debian and from any folder, split into parts."""

import hashlib
import itertools
import re
import subprocess
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

import numpy as np
import numpy.typing as npt
import PIL.Image

from ..errors import DatasetError, ImageError, OutputError
from ..runtime.inputs import find_images
from .debian import MAX_PICTURE, Terms, licence_of, members, read_terms
from .outputs import to_csv, write_file
from .pictures import detailed, read_pixels
from .splits import DEFAULT_RATIOS, shares

LIST = "photographs.csv"

# What to take from which package of Debian: provenance of models/mini, and in the package because the command needs it.
PACKAGES: dict[str, tuple[str, ...]] = {
    package: tuple(titles)
    for package, titles in tomllib.loads(Path(__file__).with_name("packages.toml").read_text(encoding="utf-8")).items()
}
# Packages that are split by themselves: they came later, and what was held out before has to stay held out.
APART = ("endless-sky-high-dpi",)

MIN_SIDE = 512  # pixels
MIN_DETAILED = 0.035  # of its blocks, see `detailed`
SAME = 6  # of 64 signs that two pictures may differ in and still be one


@dataclass(frozen=True)
class Photograph:
    """A picture that was taken: where it is now, where it came from, and on what terms."""

    file: str  # below the folder, with its part
    origin: str  # package and version, or the folder
    name: str  # in the package or folder
    licence: str
    holder: str
    sha256: str


@dataclass(frozen=True)
class _Found:
    name: str  # what the file will be called
    data: bytes
    origin: str
    path: str
    licence: str
    holder: str


def download(folder: Path) -> list[Path]:
    """Fetch the PACKAGES with apt-get, which checks their signatures; raises DatasetError with the way around it."""
    command = ["apt-get", "download", *PACKAGES]
    around = "give .deb files or folders of photographs instead"
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError:
        raise DatasetError(
            f"the packages cannot be fetched: this is no Debian, there is no apt-get; {around}"
        ) from None
    if done.returncode:
        raise DatasetError(f"apt-get download failed: {(done.stderr.strip().splitlines() or ['?'])[-1]}; {around}")
    return sorted(folder.glob("*.deb"))


def gather(sources: Sequence[Path], folder: Path, *, seed: int) -> tuple[list[Photograph], list[str]]:
    """Copy photographs into `folder`/part/; return them, and in words what was left out.

    `sources` are packages and folders; without any, PACKAGES are fetched. The split depends on the seed and on all
    names: with other sources, a photograph may change its part. Packages in APART are split by themselves.
    Raises DatasetError, OutputError.
    """
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} is not empty: give a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        given = sources or download(Path(temporary))
        found = (_of_package(source) if source.suffix == ".deb" else _of_folder(source) for source in given)
        chosen, left = _choose(itertools.chain.from_iterable(found))
    if len(chosen) < len(DEFAULT_RATIOS):
        raise DatasetError(f"{len(chosen)} usable photographs are too few to split; left out: {'; '.join(left) or '-'}")
    part_of = _dealt(chosen, seed)
    photographs = []
    for item in chosen:
        path = Path(part_of[item.name], item.name)
        write_file(folder / path, item.data)
        digest = hashlib.sha256(item.data).hexdigest()
        photographs.append(Photograph(path.as_posix(), item.origin, item.path, item.licence, item.holder, digest))
    photographs.sort(key=lambda photograph: photograph.file)
    head = [field.name for field in fields(Photograph)]
    write_file(folder / LIST, to_csv([head, *map(astuple, photographs)]))
    return photographs, left


def _dealt(chosen: Sequence[_Found], seed: int) -> dict[str, str]:
    """Return the part of each photograph by its name."""
    groups: dict[str, list[str]] = {}
    for item in chosen:
        package = item.origin.split(" ")[0]
        groups.setdefault(package if package in APART else "", []).append(item.name)
    few = [group for group, names in groups.items() if len(names) < len(DEFAULT_RATIOS)]
    together = [name for group in few for name in groups.pop(group)]
    if together:
        max(groups.values(), key=len, default=groups.setdefault("", [])).extend(together)
    return {
        name: part
        for names in groups.values()
        for part, members in shares(names, seed, DEFAULT_RATIOS).items()
        for name in members
    }


def _choose(found: Iterable[_Found]) -> tuple[list[_Found], list[str]]:
    """Return the usable pictures, each content once in its largest version, and in words why others are not."""
    usable: list[tuple[_Found, npt.NDArray[np.bool_], int]] = []
    left = []
    for item in found:
        try:
            pixels = read_pixels(item.data)
        except ImageError as exc:
            left.append(f"{item.path}{str(exc).removeprefix('bytes')}")
            continue
        share = detailed(pixels)
        if min(pixels.shape[:2]) < MIN_SIDE:
            left.append(f"{item.path}: {pixels.shape[1]}×{pixels.shape[0]} is small")
        elif share < MIN_DETAILED:
            left.append(f"{item.path}: {share:.1%} of it has any detail")
        else:
            usable.append((item, signs(pixels), pixels.size))
    usable.sort(key=lambda entry: (-entry[2], entry[0].name))
    kept: list[tuple[_Found, npt.NDArray[np.bool_], int]] = []
    for entry in usable:
        same = [other for other, known, _ in kept if np.count_nonzero(known ^ entry[1]) <= SAME]
        if same:
            left.append(f"{entry[0].path}: shows the same as {same[0].path}")
        elif any(other.name == entry[0].name for other, _, _ in kept):
            left.append(f"{entry[0].path}: another picture is called {entry[0].name}")
        else:
            kept.append(entry)
    return sorted((item for item, _, _ in kept), key=lambda item: item.name), left


def signs(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return where an 8×9 thumbnail gets brighter to the right: all but the same for one content at any size."""
    small = PIL.Image.fromarray(pixels).convert("L").resize((9, 8), PIL.Image.Resampling.BOX)
    grey = np.asarray(small, np.int16)
    brighter: npt.NDArray[np.bool_] = grey[:, 1:] > grey[:, :-1]
    return brighter


def _of_folder(folder: Path) -> Iterator[_Found]:
    for path in find_images([str(folder)]):
        try:
            if path.stat().st_size > MAX_PICTURE:
                raise DatasetError(f"{path} has more than {MAX_PICTURE >> 20} MiB")
            data = path.read_bytes()
        except OSError as exc:
            raise DatasetError(f"{path} cannot be read: {exc.strerror}") from exc
        name = f"{_slug(folder.resolve().name)}_{_slug(path.stem)}{path.suffix.lower()}"
        yield _Found(name, data, folder.name, path.name, "", "")


def _of_package(path: Path) -> Iterator[_Found]:
    """Yield a package's photographs; of one that PACKAGES knows, those named there."""
    package, version = ([*path.stem.split("_"), ""])[:2]
    wanted = PACKAGES.get(package)
    pictures: list[tuple[str, bytes]] = []
    terms: list[Terms] = []
    for name, data in members(path):
        if name == f"usr/share/doc/{package}/copyright":
            terms = read_terms(data.decode(errors="replace"))
        elif data and (wanted is None or any(_named(name, pattern) for pattern in wanted)):
            pictures.append((name, data))
    if missing := [p for p in wanted or () if not any(_named(name, p) for name, _ in pictures)]:
        raise DatasetError(f"{path} has no {min(missing)}: it is not the version this diffiqa knows; give a folder")
    for name, data in pictures:
        licence, holder = licence_of(name, terms)
        file = f"{_slug(package)}_{_slug(_title(name))}{PurePosixPath(name).suffix.lower()}"
        yield _Found(file, data, f"{package} {version.replace('%3a', ':')}", name, licence, holder)


def _named(name: str, pattern: str) -> bool:
    """Return whether this is a picture's title, or, with a slash in it, how its path ends."""
    return fnmatchcase(name, f"*/{pattern}") if "/" in pattern else _title(name) == pattern


def _title(name: str) -> str:
    """Return what a picture is called: where files are called by their size (2560x1600.jpg), by their folder."""
    path = PurePosixPath(name)
    if re.fullmatch(r"\d+x\d+", path.stem):
        return next((part for part in reversed(path.parts[:-1]) if not re.match("contents|images", part)), path.stem)
    return path.stem


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)


def parts_in(folder: Path) -> Mapping[str, list[Path]]:
    """Return the photographs of each part below a folder that `gather` filled; raises DatasetError."""
    parts = {part: find_images([str(folder / part)]) for part in DEFAULT_RATIOS if (folder / part).is_dir()}
    if missing := [part for part in DEFAULT_RATIOS if part not in parts]:
        raise DatasetError(f"{folder} has no folder {missing[0]}: make it with `iqa-train photos -o {folder}`")
    return parts
