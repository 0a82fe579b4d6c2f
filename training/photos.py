"""Pristine photographs that anyone can get: from wallpaper packages of Debian and from any folder, split into parts.

Packages are unpacked in memory, and only pictures and copyright files are looked at; nothing in them is run.
"""

import hashlib
import lzma
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import numpy.typing as npt
import PIL.Image

from ..data.splits import DEFAULT_RATIOS, shares
from ..errors import DatasetError, ImageError, OutputError, first_line
from ..runtime.inputs import find_images
from .outputs import to_csv, write_file
from .pictures import read_pixels, reduced

LIST = "photographs.csv"

# What to take from Debian's packages, by title or by pattern of path, chosen by eye: the others in them are drawings,
# renderings and logos, which no rule tells from photographs reliably.
PACKAGES: dict[str, tuple[str, ...]] = {
    "lomiri-wallpapers-16.04": (
        "Bridge_by_Sander_Klootwijk",
        "Dragonfly_by_Bolly",
        "Picture_0B_by_freespace",
        "Picture_1A_by_freespace",
        "Wine_by_Jakkub_Mede",
        "aitzgorri_by_Aitzol_Berasategi",
        "free_by_Peter_Nerlich",
        "friends_by_Aitzol_Berasategi",
        "greentock_by_Peter_Nerlich",
        "life_by_Aitzol_Berasategi",
        "picosdeeuropa_by_Aitzol_Berasategi",
        "seeding_by_Clements_Engelhardt",
        "sunset_by_Aitzol_Berasategi",
    ),
    "lomiri-wallpapers-20.04": ("Kleiber_by_Lukas_Baubkus",),
    "lxqt-themes": (
        "Butterfly-Kenneth-Wimer",
        "Valendas",
        "after-the-rain",
        "appleflower",
        "butterfly",
        "cloud",
        "drop",
        "flowers",
        "fog",
        "this-is-not-windows",
    ),
    "mate-backgrounds": (
        "Aqua",
        "Blinds",
        "Dune",
        "FreshFlower",
        "Garden",
        "GreenMeadow",
        "LadyBird",
        "RainDrops",
        "Storm",
        "TwoWings",
        "Wood",
        "YellowFlower",
    ),
    "palapeli-data": (
        "castle-maintenon",
        "cincinnati-bridge",
        "citrus-fruits",
        "european-honey-bee",
        "panther-chameleon-female",
    ),
    "plasma-workspace-wallpapers": (
        "BytheWater",
        "ColdRipple",
        "ColorfulCups",
        "DarkestHour",
        "EveningGlow",
        "FallenLeaf",
        "Grey",
        "Kite",
        "OneStandsOut",
        "Path",
        "summer_1am",
    ),
    # Landscapes behind the menus of a game. Others of its pictures are rendered, or show hardly anything but sky.
    "endless-sky-high-dpi": tuple(
        f"land/{subject}[0-9]*@2x.jpg"
        for subject in (
            *("badlands", "beach", "bwerner", "canyon", "city", "desert", "dmottl", "dune", "fields", "fog", "forest"),
            *("hills", "lava", "loc", "mfield", "mountain", "myrabella", "sea", "snow", "valley", "water"),
        )
    ),
}
# Packages that are split by themselves: they came later, and what was held out before has to stay held out.
APART = ("endless-sky-high-dpi",)

MAX_PACKAGE = 512 << 20  # bytes, also of what it unpacks to
MAX_PICTURE = 128 << 20
MAX_TERMS = 1 << 20  # of a copyright file
MAX_MEMORY = 256 << 20  # of unpacking
MIN_SIDE = 512  # pixels
# Detail: at a longest side of 1024, blocks of 8×8 pixels whose luma leaves its best plane by more than DETAIL of 255.
DETAIL_SIDE, DETAIL, MIN_DETAILED = 1024, 3.0, 0.035
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
    """Copy photographs from packages and folders (none: PACKAGES) into `folder`/part/; return them and what was left.

    The split depends on the seed and on all names, those of the packages in APART aside: with other photographs, those
    that were held out may be trained on.
    Raises DatasetError, OutputError.
    """
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} is not empty: give a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        chosen, left = _choose(_all(sources or download(Path(temporary))))
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


def _all(sources: Iterable[Path]) -> Iterator[_Found]:
    for source in sources:
        yield from _of_package(source) if source.suffix == ".deb" else _of_folder(source)


def _choose(found: Iterable[_Found]) -> tuple[list[_Found], list[str]]:
    """Return what can be used, each content once in its largest version, and in words what cannot."""
    usable: list[tuple[_Found, npt.NDArray[np.bool_], int]] = []
    left = []
    for item in found:
        try:
            pixels = _pixels(item)
        except ImageError as exc:
            left.append(str(exc))
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


def _pixels(item: _Found) -> npt.NDArray[np.uint8]:
    """Decode with the reader of the runtime, which has limits for untrusted files."""
    with tempfile.NamedTemporaryFile(suffix=Path(item.name).suffix) as file:
        file.write(item.data)
        file.flush()
        try:
            return read_pixels(Path(file.name))
        except ImageError as exc:
            raise ImageError(str(exc).replace(file.name, item.path)) from exc


def detailed(pixels: npt.NDArray[np.uint8]) -> float:
    """Return the share of blocks with detail: near 0 for drawings of flat colours, gradients, and what is blurred."""
    picture = PIL.Image.fromarray(reduced(pixels, DETAIL_SIDE))
    luma = np.asarray(picture.convert("L"), np.float64)
    rows, columns = luma.shape[0] // 8, luma.shape[1] // 8
    if not rows or not columns:
        return 0.0
    blocks = luma[: rows * 8, : columns * 8].reshape(rows, 8, columns, 8).transpose(0, 2, 1, 3).reshape(-1, 64)
    y, x = np.mgrid[:8, :8].reshape(2, 64)
    plane, _ = np.linalg.qr(np.stack([np.ones(64), x, y], axis=1))
    return float(np.mean((blocks - blocks @ plane @ plane.T).std(axis=1) > DETAIL))


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
    terms: list[tuple[tuple[str, ...], str, str]] = []
    for name, data in _members(path):
        if name == f"usr/share/doc/{package}/copyright":
            terms = _terms(data.decode(errors="replace"))
        elif data and (wanted is None or any(_named(name, pattern) for pattern in wanted)):
            pictures.append((name, data))
    if missing := [p for p in wanted or () if not any(_named(name, p) for name, _ in pictures)]:
        raise DatasetError(f"{path} has no {min(missing)}: it is not the version this diffiqa knows; give a folder")
    for name, data in pictures:
        licence, holder = _licence(name, terms)
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


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the pictures and the copyright files in a Debian package: an ar archive with data.tar.xz in it."""
    try:
        if path.stat().st_size > MAX_PACKAGE:
            raise DatasetError(f"{path} has more than {MAX_PACKAGE >> 20} MiB")
        data = path.read_bytes()
    except OSError as exc:
        raise DatasetError(f"{path} cannot be read: {exc.strerror}") from exc
    content = _section(path, data, "data.tar.xz")
    try:
        with tempfile.SpooledTemporaryFile(16 << 20) as unpacked:
            _unpack(path, content, unpacked)
            archive = tarfile.open(fileobj=unpacked, mode="r:")  # noqa: SIM115 — closed with the file
            for member in archive:
                name = member.name.removeprefix("./")
                picture = PurePosixPath(name).suffix.lower() in (".jpg", ".jpeg", ".png", ".webp")
                if not member.isfile() or not (picture or name.endswith("/copyright")):
                    continue
                if member.size > (MAX_PICTURE if picture else MAX_TERMS):
                    raise DatasetError(f"{path}: {name} unpacks to more than this reads")
                stream = archive.extractfile(member)
                yield name, stream.read() if stream else b""
    except (tarfile.TarError, lzma.LZMAError, EOFError, OSError, ValueError) as exc:
        raise DatasetError(f"{path} is damaged: {first_line(exc)}") from exc


def _unpack(path: Path, content: bytes, into: IO[bytes]) -> None:
    """Write what an .xz file unpacks to, in pieces: a few bytes of it can stand for any amount."""
    decompressor, total = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_MEMORY), 0
    piece = decompressor.decompress(content, max_length=1 << 20)
    while True:
        total += into.write(piece)
        if total > MAX_PACKAGE:
            raise DatasetError(f"{path} unpacks to more than {MAX_PACKAGE >> 20} MiB")
        if decompressor.eof:
            break
        if decompressor.needs_input:
            raise EOFError("it ends too early")
        piece = decompressor.decompress(b"", max_length=1 << 20)
    into.seek(0)


def _section(path: Path, data: bytes, wanted: str) -> bytes:
    """Return one member of an ar archive."""
    if not data.startswith(b"!<arch>\n"):
        raise DatasetError(f"{path} is no Debian package")
    place, names = 8, []
    while place + 60 <= len(data):
        header = data[place : place + 60]
        name, size = header[:16].decode("ascii", "replace").strip().rstrip("/"), header[48:58].strip()
        if not size.isdigit():
            break
        place += 60
        if name == wanted:
            return data[place : place + int(size)]
        names.append(name)
        place += int(size) + int(size) % 2
    raise DatasetError(f"{path} has no {wanted}, only {', '.join(names) or 'nothing'}: repack it, or give a folder")


def _terms(text: str) -> list[tuple[tuple[str, ...], str, str]]:
    """Return files, licence and copyright holders of each stanza of a machine-readable copyright file."""
    terms = []
    for stanza in re.split(r"\n\s*\n", text):
        entries: dict[str, str] = {}
        name = "license"
        for line in stanza.splitlines():
            if match := re.match(r"([\w-]+):\s*(.*)", line):
                name = match[1].lower()
                entries[name] = match[2]
            elif name != "license":  # whose text follows its name
                entries[name] = f"{entries[name]} {line.strip()}"
        if "files" in entries:
            holder = entries.get("copyright", "")
            terms.append((tuple(entries["files"].split()), entries.get("license", "")[:60], holder[:200]))
    return terms


def _licence(name: str, terms: Sequence[tuple[tuple[str, ...], str, str]]) -> tuple[str, str]:
    """Return licence and holder of a file: the last stanza that names it; sources lie in other folders than files."""
    everything = ("", "")
    found: dict[bool, tuple[str, str]] = {}  # by whether only the file's own name was compared, wildcards left out
    for patterns, licence, holder in terms:
        for pattern in patterns:
            if pattern == "*":
                everything = (licence, holder)
            elif fnmatchcase(name, pattern) or fnmatchcase(name, f"*/{pattern}"):
                found[False] = (licence, holder)
            elif PurePosixPath(name).name == PurePosixPath(pattern).name:
                found[True] = (licence, holder)
    return found.get(False) or found.get(True) or everything


def parts_in(folder: Path) -> Mapping[str, list[Path]]:
    """Return the photographs of each part below a folder that `gather` filled; raises DatasetError."""
    parts = {part: find_images([str(folder / part)]) for part in DEFAULT_RATIOS if (folder / part).is_dir()}
    if missing := [part for part in DEFAULT_RATIOS if part not in parts]:
        raise DatasetError(f"{folder} has no folder {missing[0]}: make it with `iqa-train photos -o {folder}`")
    return parts
