"""Pictures in Debian packages, and on what terms: read in memory, nothing in a package is run."""

import lzma
import re
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO

from ..errors import DatasetError, first_line

MAX_PACKAGE = 512 << 20  # bytes, also of what it unpacks to
MAX_PICTURE = 128 << 20
MAX_TERMS = 1 << 20  # of a copyright file
MAX_MEMORY = 256 << 20  # of unpacking

Terms = tuple[tuple[str, ...], str, str]  # patterns of files, their licence, its holder


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of the pictures and copyright files in a package: an ar archive with data.tar.xz in it.

    Raises DatasetError for a damaged package, and one that unpacks to more than this reads.
    """
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


def read_terms(text: str) -> list[Terms]:
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


def licence_of(name: str, terms: Sequence[Terms]) -> tuple[str, str]:
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
