"""Whatever the bytes are: an image or an ImageError, soon, and nothing on the side."""

import contextlib
import io
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from diffiqa.errors import ImageError
from diffiqa.runtime.images import read_image

SEED = 20240817
PER_DAMAGE = 60
# A decoder that loops over sizes found in the file would take minutes; these images take milliseconds, and a decoded
# bomb within the limit of pixels below a second.
SECONDS = 5.0
MAX_PIXELS = 1_000_000  # so that a size made up by the damage is not filled at length
Damage = Callable[[np.random.Generator, bytearray], bytes]


def samples() -> dict[str, bytes]:
    """Small images in many formats, modes and compressions, with metadata to break."""
    rng = np.random.default_rng(SEED)
    colour = PIL.Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
    grey, indexed, clear = colour.convert("L"), colour.quantize(16), colour.convert("RGBA")
    clear.putalpha(grey)
    deep = PIL.Image.fromarray(rng.integers(0, 65536, (24, 32), np.uint16))
    exif = PIL.Image.Exif()
    exif[274] = 6
    exif[305] = "a program's name of some length"

    def frames() -> dict[str, Any]:  # new each time: Pillow leaves the options of one encoder to the next
        return {"save_all": True, "append_images": [grey.convert("RGB"), colour.copy()]}

    wanted: list[tuple[PIL.Image.Image, str, dict[str, Any]]] = [
        (colour, "PNG", {"exif": exif}),
        (indexed, "PNG", {"transparency": 3}),
        (deep, "PNG", {}),
        (clear, "PNG", frames()),
        (colour, "JPEG", {"exif": exif}),
        (grey, "JPEG", {"progressive": True}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour, "MPO", frames()),
        (indexed, "GIF", {"transparency": 3}),
        (colour, "GIF", frames()),
        (colour, "BMP", {}),
        (indexed, "BMP", {}),
        (colour, "TIFF", {"exif": exif}),
        (deep, "TIFF", {"compression": "tiff_lzw"}),
        (colour, "TIFF", {"compression": "jpeg"}),
        (clear, "TIFF", {"compression": "tiff_adobe_deflate", **frames()}),
        (colour, "WEBP", {"exif": exif}),
        (clear, "WEBP", {"lossless": True, **frames()}),
        (colour, "PPM", {}),
        (clear, "TGA", {"compression": "tga_rle"}),
        (clear, "ICO", {"sizes": [(16, 16), (32, 24)]}),
        (colour, "PCX", {}),
        (colour, "SGI", {}),
        (clear, "DDS", {}),
        (colour, "QOI", {}),
        (colour, "JPEG2000", {}),
    ]
    files = {}
    PIL.Image.init()
    for index, (image, kind, options) in enumerate(wanted):
        if kind not in PIL.Image.SAVE:  # QOI, by an older Pillow
            continue
        buffer = io.BytesIO()
        image.copy().save(buffer, kind, **options)
        files[f"{kind} {index}"] = buffer.getvalue()
    return files


def flip_bytes(rng: np.random.Generator, data: bytearray) -> bytes:
    for place in rng.integers(0, len(data), rng.integers(1, 9)):
        data[place] = rng.integers(0, 256)
    return bytes(data)


def flip_header(rng: np.random.Generator, data: bytearray) -> bytes:
    """As above, where sizes, counts and offsets stand."""
    for place in rng.integers(4, min(len(data), 80), rng.integers(1, 5)):
        data[place] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(0, 256))]))
    return bytes(data)


def truncate(rng: np.random.Generator, data: bytearray) -> bytes:
    return bytes(data[: rng.integers(0, len(data))])


def cut_out(rng: np.random.Generator, data: bytearray) -> bytes:
    start = rng.integers(0, len(data))
    del data[start : start + rng.integers(1, 64)]
    return bytes(data)


def lie_about_length(rng: np.random.Generator, data: bytearray) -> bytes:
    """Overwrite four bytes, as in the length of a chunk or the offset of a table, with a number that is wrong."""
    number = int(rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(data), int(rng.integers(2**32))]))
    place = rng.integers(0, max(len(data) - 4, 1))
    data[place : place + 4] = struct.pack(str(rng.choice(["<I", ">I"])), number)
    return bytes(data)


def repeat(rng: np.random.Generator, data: bytearray) -> bytes:
    start, end = sorted(rng.integers(0, len(data), 2))
    return bytes(data[:end] + data[start:])


DAMAGES: list[Damage] = [flip_bytes, flip_header, truncate, cut_out, lie_about_length, repeat]


def check(data: bytes, what: str) -> None:
    start = time.monotonic()
    message = ""
    try:
        image = read_image(data, min_side=16, max_pixels=MAX_PIXELS)
    except ImageError as exc:
        message = str(exc)
    assert time.monotonic() - start < SECONDS, what
    if message:
        assert message.startswith("bytes: "), what
        assert message.isprintable(), what
        assert len(message) < 500, what
    else:
        assert image.pixels.ndim == 3, what
        assert image.pixels.shape[2] == 3, what
        assert min(image.pixels.shape[:2]) >= 16, what
        assert image.pixels.dtype in (np.uint8, np.float32), what
        assert all(note.isprintable() for note in image.notes), what


@pytest.fixture(autouse=True)
def _nothing_on_the_side(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """No warning gets out (they are errors here) and nothing is logged. What libtiff itself prints is not ours."""
    yield
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


def test_the_samples_are_fine_before_the_damage() -> None:
    for data in samples().values():
        read_image(data)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_images(damage: Damage) -> None:
    rng = np.random.default_rng([SEED, DAMAGES.index(damage)])
    files = samples()
    names = list(files)
    for index in range(PER_DAMAGE * 2):
        name = names[index % len(names)]
        check(damage(rng, bytearray(files[name])), f"{name}, case {index} of {damage.__name__}, seed {SEED}")


def test_headers_of_one_format_before_the_body_of_another() -> None:
    rng = np.random.default_rng([SEED, 100])
    files = list(samples().items())
    for _ in range(PER_DAMAGE):
        (head_name, head), (body_name, body) = (files[i] for i in rng.integers(0, len(files), 2))
        kept = rng.integers(2, 64)
        check(head[:kept] + body[kept:], f"{kept} bytes of {head_name}, then {body_name}")


def test_random_bytes_with_and_without_a_header() -> None:
    rng = np.random.default_rng([SEED, 101])
    heads = [b"", *(data[:12] for data in samples().values())]
    for index in range(PER_DAMAGE):
        head = heads[index % len(heads)]
        check(head + rng.bytes(int(rng.integers(0, 3000))), f"{head!r} and random bytes, case {index}")


def test_files_under_wrong_names(tmp_path: Path) -> None:
    rng = np.random.default_rng([SEED, 102])
    suffixes = [".png", ".jpg", ".gif", ".bmp", ".tif", ".webp", ".tga", ".ico", ".eps", ".txt", ""]
    for index, (name, data) in enumerate(samples().items()):
        path = tmp_path / f"{index}{suffixes[index % len(suffixes)]}"
        path.write_bytes(data)
        assert read_image(path, min_side=1).digest == read_image(data, min_side=1).digest, name
        path.write_bytes(truncate(rng, bytearray(data)))
        with contextlib.suppress(ImageError):
            read_image(path)


def test_a_warning_that_gets_out_would_be_seen() -> None:
    with pytest.raises(UserWarning):
        warnings.warn("seen", UserWarning, stacklevel=1)
