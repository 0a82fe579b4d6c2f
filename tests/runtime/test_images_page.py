"""docs/images.md: what each row of its table says of a kind of file is what happens to one."""

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest

from diffiqa import cli
from diffiqa.errors import ImageError
from diffiqa.runtime import images
from diffiqa.runtime.images import read_image

from .test_colour import profile
from .test_images import png, tiff

PAGE = Path(cli.__file__).parent / "docs" / "images.md"
ROWS = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)[1:]
SIDE = 40


def picture(mode: str = "RGB") -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)).convert(mode)


def save(mode: str = "RGB", kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def deep(*channels: int) -> bytes:
    samples = np.random.default_rng(1).integers(0, 65536, (SIDE, SIDE, *channels)).astype(">u2")
    return png(16, 2 if channels else 0, samples)


def floats(top: float) -> bytes:
    return tiff(32, 3, 1, np.linspace(0, top, SIDE * SIDE, dtype="<f4").reshape(SIDE, SIDE))


def whole(bits: int, photometric: int = 1) -> bytes:
    return tiff(bits, 1, photometric, np.full((SIDE, SIDE), 9, f"<u{bits // 8}"))


TURNED = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0" + bytes(4)
FILES: dict[str, Callable[[], bytes]] = {
    "colour in 8 bits": save,
    "grey": lambda: save("L"),
    "a palette": lambda: save("P"),
    "transparent": lambda: png(8, 6, np.zeros((SIDE, SIDE, 4), np.uint8)),
    "grey in 16 bits": deep,
    "colour in 16 bits": lambda: deep(3),
    "grey floats from 0 to 1": lambda: floats(1),
    "other floats": lambda: floats(255),
    "whole numbers of 32 bits": lambda: whole(32),
    "a TIFF in which 0 is white": lambda: whole(8, 0),
    "CMYK": lambda: save("CMYK", "JPEG"),
    "a colour profile": lambda: save(icc_profile=profile("RGB ", 1.8)),
    "a profile for other colours": lambda: save(icc_profile=profile("GRAY", 1.8)),
    "a damaged profile": lambda: save(icc_profile=b"some profile"),
    "turned": lambda: save(exif=TURNED),
    "damaged EXIF data": lambda: save(exif=b"Exif\0\0neither II nor MM"),
    "damage that Pillow reads past": lambda: save(exif=TURNED[:20]),
    "several frames": lambda: save("RGB", "TIFF", save_all=True, append_images=[picture(), picture()]),
    "a side shorter": save,
    "more than 89 million pixels": save,
    "cut off or damaged": lambda: save()[:200],
    "no image": lambda: b"some words",
}


def test_the_page_has_a_row_for_each_kind_that_is_tried() -> None:
    assert len(ROWS) == len(FILES)


def test_what_the_page_says_of_a_file_is_true() -> None:
    for kind, done, note in ROWS:
        data = FILES[
            max((start for start in FILES if kind.startswith(start)), key=len)
        ]()  # "grey floats" is not "grey"
        options: dict[str, Any] = {"min_side": SIDE}
        if "shorter" in kind:
            options["min_side"] = SIDE + 1
        if "million" in kind:
            assert images.DEFAULT_MAX_PIXELS // 10**6 == 89
            options["max_pixels"] = SIDE * SIDE - 1
        if done.startswith("refused"):
            with pytest.raises(ImageError, match=re.escape(note)):
                read_image(data, **options)
            return
        notes = read_image(data, **options).notes
        assert notes == () if note == "–" else any(text.startswith(note) for text in notes)


def test_heif_files_are_read_where_the_extra_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    fake = SimpleNamespace(register_heif_opener=lambda: called.append("registered"))
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    images._init_heif.cache_clear()
    read_image(save(), min_side=1)
    read_image(save(), min_side=1)
    assert called == ["registered"]
    images._init_heif.cache_clear()
