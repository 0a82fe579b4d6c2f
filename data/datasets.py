"""Data sets with opinions about quality: published ones, read from their folders, and any CSV file.

Each image has its label as published, and its quality: the label brought to [0, 1], higher is better, by one straight
line for the whole set. Names are matched without case. A set is read whole or not at all. Labels without images, images
without labels, and another number of labels than published are errors, which name the first few.
"""

import math
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DatasetError, UsageError
from .distortions import DISTORTIONS
from .labelfiles import read_csv, read_lines, read_mat, read_sheet


@dataclass(frozen=True)
class Item:
    """One labelled image."""

    image: str  # its path below the data set's root, with slashes: its name in splits and score files
    path: Path
    label: float  # as published
    quality: float  # the label in [0, 1], higher is better
    reference: str | None = None  # names the content; images that share it must never be split up
    reference_path: Path | None = None
    distortion: str | None = None
    level: int | None = None  # as published: higher need not be worse (KADID-10k's mean shift and contrast)


@dataclass(frozen=True)
class Dataset:
    """Labelled images, sorted by name, with what their labels are: quality = (label - worst) / (best - worst)."""

    name: str
    root: Path
    label_file: str
    worst: float  # label of the worst image
    best: float
    items: tuple[Item, ...]

    @property
    def higher_is_better(self) -> bool:
        """Which way the published labels point."""
        return self.best > self.worst


@dataclass(frozen=True)
class _Row:
    """A label, before its files are looked up; names are keys of `_Content`: lower case, below their folder."""

    image: str
    label: float
    reference: str | None = None
    distortion: str | None = None
    level: int | None = None


@dataclass(frozen=True)
class _Content:
    """What a reader finds. All `images` must have a row, but for the `unlabelled`."""

    label_file: str
    rows: Sequence[_Row]
    images: Mapping[str, Path]
    references: Mapping[str, Path]
    unlabelled: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Published:
    """Facts about a published data set, and its reader."""

    read: Callable[[Path], _Content]
    images: int  # that have a label and a distortion
    higher_is_better: bool


def read_labels(
    path: Path, name: str | None = None, *, lower_is_better: bool = False, need_files: bool = True
) -> Dataset:
    """Read the published data set called `name` from its folder; without a name, a CSV file. Raises DatasetError."""
    if name is None and path.is_dir():
        raise UsageError(f"{path} is a folder: say with --dataset which data set it holds, or give a CSV file")
    if name is None:
        return load_csv(path, lower_is_better=lower_is_better, need_files=need_files)
    if lower_is_better:
        raise UsageError("--lower-better is for CSV files: a published data set's direction is known")
    return load(name, path)


def load(name: str, root: Path) -> Dataset:
    """Read one of the PUBLISHED data sets from the folder it was unpacked to. Raises DatasetError."""
    if name not in PUBLISHED:
        raise DatasetError(f"there is no data set {name!r}; known are {', '.join(PUBLISHED)}, and any CSV file")
    published = PUBLISHED[name]
    if not root.is_dir():
        raise DatasetError(f"{name}: {root} is no folder; give the one that the data set was unpacked to")
    try:
        content = published.read(root)
    except OSError as exc:
        raise DatasetError(f"{name}: {exc.filename} cannot be read: {exc.strerror}") from exc
    if len(content.rows) != published.images:
        raise DatasetError(
            f"{name}: {content.label_file} in {root} labels {len(content.rows)} distorted images, published are "
            f"{published.images}: is it complete? (A part of a set can be used as a CSV file.)"
        )
    return _dataset(name, root, content, higher_is_better=published.higher_is_better)


def load_csv(path: Path, *, lower_is_better: bool = False, need_files: bool = True) -> Dataset:
    """Read a CSV file with the columns image, score and, where known, reference, distortion and level.

    Paths in the file start at its folder. A `reference` that ends like a picture (.png …) is a file; any other is a
    name for what the image shows. Pictures must exist if `need_files`. Raises DatasetError.
    """
    root = path.parent
    rows, images, references = [], {}, {}
    for number, cells in enumerate(_parsed(read_csv, path, "image", "score"), 1):
        where, image, reference, level = f"{path}, image {number}", _name(cells["image"]), None, cells.get("level")
        if not need_files or _is_file(root / image, where):
            images[image] = root / image
        if given := cells.get("reference"):
            reference = _name(given) if _is_image(given) else given
            if _is_image(given) and (not need_files or _is_file(root / reference, where)):
                references[reference] = root / reference
        degree = int(_number(level, where)) if level else None
        rows.append(_Row(image, _number(cells["score"], where), reference, cells.get("distortion") or None, degree))
    content = _Content(path.name, rows, images, references)
    return _dataset(path.stem, root, content, higher_is_better=not lower_is_better)


def _dataset(name: str, root: Path, content: _Content, *, higher_is_better: bool) -> Dataset:
    where = f"{name}: {content.label_file} in {root}"
    labelled = [row.image for row in content.rows]
    if twice := [image for image, count in Counter(labelled).items() if count > 1]:
        raise DatasetError(f"{where} labels some images twice: {_few(twice)}")
    if missing := [image for image in labelled if image not in content.images]:
        raise DatasetError(
            f"{where} labels {len(missing)} images of {len(labelled)} that are missing or empty: {_few(missing)}; "
            f"is the download complete?"
        )
    if extra := sorted(set(content.images) - set(labelled) - content.unlabelled):
        raise DatasetError(f"{where} has no label for {len(extra)} images: {_few(extra)}; move them elsewhere")
    # A reference called like an image is a file; anything else is just a name for the content.
    wanted = {row.reference for row in content.rows if row.reference and _is_image(row.reference)}
    if missing := sorted(wanted - set(content.references)):
        raise DatasetError(
            f"{where} names {len(missing)} of {len(wanted)} references that are missing or empty: {_few(missing)}"
        )
    labels = [row.label for row in content.rows]
    if not all(map(math.isfinite, labels)):
        raise DatasetError(f"{where} has labels that are NaN or infinite")
    if len(set(labels)) < 2:
        raise DatasetError(f"{where} has {len(labels)} labels without any difference: nothing can be learned from it")
    worst, best = (min(labels), max(labels)) if higher_is_better else (max(labels), min(labels))
    items = []
    for row in content.rows:
        path = content.images[row.image]
        reference_path = content.references.get(row.reference or "")
        items.append(
            Item(
                image=_relative(path, root),
                path=path,
                label=row.label,
                quality=(row.label - worst) / (best - worst),
                reference=_relative(reference_path, root) if reference_path else row.reference,
                reference_path=reference_path,
                distortion=row.distortion,
                level=row.level,
            )
        )
    return Dataset(name, root, content.label_file, worst, best, tuple(sorted(items, key=lambda item: item.image)))


# The published layouts. LIVE: image files are numbered per folder, labels are in one row over all folders.

LIVE_FOLDERS = {"jp2k": 227, "jpeg": 233, "wn": 174, "gblur": 174, "fastfading": 174}


def _live(root: Path) -> _Content:
    names = [f"{folder}/img{i + 1}.bmp" for folder, count in LIVE_FOLDERS.items() for i in range(count)]
    # Release 2 has the opinions twice; in the first file, scales of the separate studies are not aligned.
    label_file = _first_file(root, "dmos_realigned.mat", "dmos.mat")
    mat = _parsed(read_mat, label_file)
    labels = _variable(label_file, mat, "dmos_new" if "realigned" in label_file.name.lower() else "dmos", len(names))
    pristine = _variable(label_file, mat, "orgs", len(names))  # 203 images are the reference under another name
    reference_file = _first_file(root, "refnames_all.mat")
    references = _variable(reference_file, _parsed(read_mat, reference_file), "refnames_all", len(names))
    images = {f"{folder}/{key}": path for folder in LIVE_FOLDERS for key, path in _images(root, folder).items()}
    return _Content(
        label_file.name,
        [
            _Row(name, float(label), str(reference).lower(), name.partition("/")[0])
            for name, label, original, reference in zip(names, labels, pristine, references, strict=True)
            if not original
        ],
        images,
        _images(root, "refimgs"),
        frozenset(name for name, original in zip(names, pristine, strict=True) if original),
    )


CSIQ_TYPES = {  # in the spreadsheet: in names of folders and files
    "noise": "awgn",
    "jpeg": "jpeg",
    "jpeg 2000": "jpeg2000",
    "fnoise": "fnoise",
    "blur": "blur",
    "contrast": "contrast",
}


def _csiq(root: Path) -> _Content:
    if _find(root, "csiq.DMOS.csv") is None and _find(root, "csiq.DMOS.xlsx"):
        raise DatasetError(
            f"{root} has its labels in csiq.DMOS.xlsx, and this reads CSV: open it, and save its sheet all_by_image as "
            f"csiq.DMOS.csv beside it"
        )
    label_file = _first_file(root, "csiq.DMOS.csv")
    rows = []
    for cells in _parsed(read_sheet, label_file, "image", "dst_type", "dst_lev", "dmos"):
        if not cells.get("dmos"):
            continue
        folder = CSIQ_TYPES.get(cells["dst_type"].lower())
        if folder is None:
            raise DatasetError(f"{label_file} has the unknown distortion {cells['dst_type']!r}")
        content, degree = cells["image"].lower(), int(_number(cells["dst_lev"], label_file))
        name = f"{folder}/{content}.{folder}.{degree}.png"
        rows.append(_Row(name, _number(cells["dmos"], label_file), f"{content}.png", folder, degree))
    return _Content(label_file.name, rows, _images(root, "dst_imgs"), _images(root, "src_imgs"))


TID2013_TYPES = (
    "additive noise",
    "colour noise",
    "spatially correlated noise",
    "masked noise",
    "high-frequency noise",
    "impulse noise",
    "quantisation noise",
    "gaussian blur",
    "denoising",
    "jpeg",
    "jpeg 2000",
    "jpeg transmission errors",
    "jpeg 2000 transmission errors",
    "non-eccentricity pattern",
    "local blocks",
    "mean shift",
    "contrast",
    "saturation",
    "multiplicative noise",
    "comfort noise",
    "lossy compression of noisy images",
    "colour quantisation with dither",
    "chromatic aberrations",
    "sparse sampling",
)


def _tid2013(root: Path) -> _Content:
    label_file = _first_file(root, "mos_with_names.txt")
    rows = []
    for line in _parsed(read_lines, label_file):
        label, _, name = line.partition(" ")
        name = name.strip().lower()
        content, kind, level = _fields(r"(i\d\d)_(\d\d)_(\d)\.bmp", name, label_file)
        if not 1 <= int(kind) <= len(TID2013_TYPES):
            raise DatasetError(f"{label_file} has the unknown distortion {kind} ({name})")
        distortion = TID2013_TYPES[int(kind) - 1]
        rows.append(_Row(name, _number(label, label_file), f"{content}.bmp", distortion, int(level)))
    return _Content(label_file.name, rows, _images(root, "distorted_images"), _images(root, "reference_images"))


def _kadid10k(root: Path) -> _Content:
    label_file = _first_file(root, "dmos.csv")
    rows = []
    for cells in _parsed(read_csv, label_file, "dist_img", "ref_img", "dmos"):
        name, reference = cells["dist_img"].lower(), cells["ref_img"].lower()
        _, kind, level = _fields(r"(i\d\d)_(\d\d)_(\d\d)\.png", name, label_file)
        if int(kind) not in DISTORTIONS:
            raise DatasetError(f"{label_file} has the unknown distortion {kind} ({name})")
        label = _number(cells["dmos"], label_file)  # higher is better, whatever the column is called
        rows.append(_Row(name, label, reference, DISTORTIONS[int(kind)].name, int(level)))
    images = _images(root, "images")  # references among them
    references = {name: path for name, path in images.items() if "_" not in name}
    return _Content(label_file.name, rows, images, references, frozenset(references))


CLIVE_PRACTICE = 7  # the first images were shown to get used to the task


def _clive(root: Path) -> _Content:
    name_file = _first_file(root, "Data/AllImages_release.mat")
    label_file = _first_file(root, "Data/AllMOS_release.mat")
    names = _variable(name_file, _parsed(read_mat, name_file), "AllImages_release", None)
    labels = _variable(label_file, _parsed(read_mat, label_file), "AllMOS_release", len(names))
    pairs = zip(names[CLIVE_PRACTICE:], labels[CLIVE_PRACTICE:], strict=True)
    images = _images(root, "Images")
    practice = frozenset(name for name in images if name.startswith("trainingimages/"))
    practice |= {str(name).lower() for name in names[:CLIVE_PRACTICE]}
    rows = [_Row(str(name).lower(), float(label)) for name, label in pairs]
    return _Content(label_file.name, rows, images, {}, practice)


def _koniq10k(root: Path) -> _Content:
    # MOS is the mean opinion: 1 to 5 in the first file, 0 to 100 in the second.
    label_file = _first_file(root, "koniq10k_scores_and_distributions.csv", "koniq10k_distributions_sets.csv")
    labels = {row["image_name"].lower(): row["MOS"] for row in _parsed(read_csv, label_file, "image_name", "MOS")}
    rows = [_Row(name, _number(label, label_file)) for name, label in labels.items()]
    folder = "1024x768" if _find(root, "1024x768") else "512x384"
    return _Content(label_file.name, rows, _images(root, folder), {})


COPIES = Path(__file__).with_name("biq2021-copies.txt")


def _biq2021(root: Path) -> _Content:
    # The publisher's split shares pictures between its parts: near-copies share a reference here, so that ours do not.
    copies = {name: group[0].removesuffix(".jpg") for group in near_copies() for name in group}
    rows = []
    for title in ("Train", "Test"):
        label_file = _first_file(root, f"{title} (Images and MOS).csv")
        for cells in _parsed(read_csv, label_file, "Image Name", "MOS"):
            name = cells["Image Name"].lower()
            rows.append(_Row(name, _number(cells["MOS"], f"{label_file}, {name}"), copies.get(name)))
    return _Content("Train and Test (Images and MOS).csv", rows, _images(root, "Images"), {})


def near_copies() -> list[list[str]]:
    """Return the groups of BIQ2021's images that show the same: `figures/near_copies.py` found them."""
    return [line.split(", ") for line in COPIES.read_text().splitlines() if line and not line.startswith("#")]


def _pipal(root: Path) -> _Content:
    rows = []
    folder = _find(root, "Train_Label")
    files = sorted(folder.glob("*.txt")) if folder else []
    if not files:
        raise DatasetError(f"{root} has no folder Train_Label with .txt files: is the download complete?")
    for label_file in files:
        for line in _parsed(read_lines, label_file):
            name, _, label = line.lower().partition(",")
            content, kind, _ = _fields(r"(a\d{4})_(\d\d)_(\d\d)\.bmp", name.strip(), label_file)
            # The last number counts methods and strengths of one kind, it is no level.
            rows.append(_Row(name.strip(), _number(label, label_file), f"{content}.bmp", kind))
    images: dict[str, Path] = {}
    for part in range(1, 5):
        images |= {Path(name).name: path for name, path in _images(root, f"Distortion_{part}").items()}
    return _Content("Train_Label", rows, images, _images(root, "Train_Ref"))


PUBLISHED: dict[str, Published] = {
    "live": Published(_live, 779, higher_is_better=False),
    "csiq": Published(_csiq, 866, higher_is_better=False),
    "tid2013": Published(_tid2013, 3000, higher_is_better=True),
    "kadid10k": Published(_kadid10k, 10125, higher_is_better=True),
    "clive": Published(_clive, 1162, higher_is_better=True),
    "biq2021": Published(_biq2021, 12000, higher_is_better=True),
    "koniq10k": Published(_koniq10k, 10073, higher_is_better=True),
    "pipal": Published(_pipal, 23200, higher_is_better=True),
}

IMAGE_SUFFIXES = {".bmp", ".png", ".jpg", ".jpeg"}


def _find(root: Path, name: str) -> Path | None:
    """Return the file or folder of that name, however its letters are cased."""
    path = root
    for part in name.split("/"):
        matches = [entry for entry in path.iterdir() if entry.name.lower() == part.lower()] if path.is_dir() else []
        if not matches:
            return None
        path = next((entry for entry in matches if entry.name == part), matches[0])
    return path


def _first_file(root: Path, *names: str) -> Path:
    for name in names:
        if (path := _find(root, name)) is not None and path.is_file():
            return path
    raise DatasetError(f"{root} has no file {' or '.join(names)}: is it the data set's folder, and complete?")


def _images(root: Path, folder: str) -> dict[str, Path]:
    """Return the images below a folder by lower-case name. Empty files are what a broken download leaves: left out."""
    found = _find(root, folder)
    if found is None or not found.is_dir():
        raise DatasetError(f"{root} has no folder {folder}: is it the data set's folder, and complete?")
    images: dict[str, Path] = {}
    for path in sorted(found.rglob("*")):
        if _is_image(path.name) and _is_file(path, folder):
            name = _relative(path, found).lower()
            if name in images:
                raise DatasetError(f"{images[name]} and {path} differ in case only; remove one")
            images[name] = path
    return images


def _is_file(path: Path, where: str) -> bool:
    """Return whether there is a file with anything in it."""
    try:
        return path.is_file() and path.stat().st_size > 0
    except OSError as exc:  # a name that is too long, say
        raise DatasetError(f"{where}: {exc.strerror}: {str(path)[:80]}") from exc


def _name(path: str) -> str:
    """Return one spelling of a path, so that `./a.png` and `a.png` are seen to be one picture."""
    return posixpath.normpath(path.replace("\\", "/"))


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def _parsed(read: Callable[..., Any], path: Path, *arguments: str) -> Any:
    """Call a reader of label files; what it raises becomes a DatasetError that names the file."""
    try:
        return read(path, *arguments)
    except (ValueError, OSError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise DatasetError(f"the label file {path} cannot be read: {reason}") from exc


def _variable(path: Path, mat: Mapping[str, Any], name: str, count: int | None) -> Any:
    if name not in mat:
        raise DatasetError(f"the label file {path} has no variable {name}, only {', '.join(sorted(mat)) or 'nothing'}")
    if count is not None and len(mat[name]) != count:
        raise DatasetError(f"the label file {path} has {len(mat[name])} values in {name}, not {count}")
    return mat[name]


def _fields(pattern: str, name: str, path: Path) -> tuple[str, ...]:
    match = re.fullmatch(pattern, name)
    if match is None:
        raise DatasetError(f"the label file {path} names {name!r}, which is not how its images are called")
    return match.groups()


def _number(text: str, where: str | Path) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DatasetError(f"{where}: a number was expected, not {text!r}")
    return number


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
