"""Colour profiles, beside the formulas of ICC's matrix profiles in float64. The profiles are written here by hand."""

import io
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest
from PIL import ImageCms

from diffiqa.runtime.images import Image, read_image

Floats = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]

# Columns: X, Y, Z of red, green and blue, seen under D50.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
D50 = (0.9642, 1.0, 0.8249)


def profile(space: str, gamma: float, primaries: Floats = P3, name: str = "by hand") -> bytes:
    """An ICC profile, version 2: grey, or colours by a matrix; CMYK has no table, which makes it damaged."""

    def xyz(values: Any) -> bytes:
        return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))
    text = name.encode() + b"\0"
    tags = {b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78), b"wtpt": xyz(D50)}
    if space == "GRAY":
        tags[b"kTRC"] = curve
    elif space == "RGB ":
        for colour, column in zip((b"r", b"g", b"b"), primaries.T, strict=True):
            tags[colour + b"XYZ"], tags[colour + b"TRC"] = xyz(column), curve
    offset, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for tag, data in tags.items():
        table += tag + struct.pack(">II", offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">4xI4s4s4s12s4s", 0x02100000, b"mntr", space.encode(), b"XYZ ", bytes(12), b"acsp")
    header += bytes(28) + b"".join(struct.pack(">i", round(v * 65536)) for v in D50)
    size = struct.pack(">I", 128 + len(table) + len(body))
    return size + header + bytes(124 - len(header)) + table + body


def to_srgb(pixels: Bytes, gamma: float, primaries: Floats) -> Floats:
    """What the pixels are in sRGB, 0 to 255, by the formulas."""
    linear = (pixels / 255.0) ** gamma @ primaries.T @ np.linalg.inv(SRGB).T
    linear = linear.clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.asarray(encoded * 255)


def random_bytes(*channels: int) -> Bytes:
    return np.random.default_rng(len(channels)).integers(0, 256, (24, 31, *channels), np.uint8)


def read(image: PIL.Image.Image, icc: bytes, kind: str = "PNG") -> Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, icc_profile=icc)
    return read_image(buffer.getvalue(), min_side=1)


@pytest.mark.parametrize("primaries", [P3, SRGB], ids=["display-p3", "srgb-primaries"])
def test_colours_are_converted_as_the_profile_says(primaries: Floats) -> None:
    pixels = random_bytes(3)
    image = read(PIL.Image.fromarray(pixels), profile("RGB ", 1.8, primaries))
    assert np.abs(image.pixels - to_srgb(pixels, 1.8, primaries)).max() < 1.5
    assert np.abs(image.pixels.astype(int) - pixels).mean() > 5
    assert image.notes == ("colours converted from by hand to sRGB",)


def test_srgb_in_other_words_changes_nothing_and_is_not_mentioned() -> None:
    pixels = random_bytes(3)
    ours = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = read(PIL.Image.fromarray(pixels), ours)
    np.testing.assert_array_equal(image.pixels, pixels)
    assert image.notes == ()


def test_transparency_is_kept_and_blended_after_the_conversion() -> None:
    pixels = random_bytes(4)
    image = read(PIL.Image.fromarray(pixels), profile("RGB ", 1.8))
    alpha = pixels[..., 3:] / 255
    expected = to_srgb(pixels[..., :3], 1.8, P3) * alpha + 255 * (1 - alpha)
    assert np.abs(image.pixels - expected).max() < 2
    assert image.notes == ("colours converted from by hand to sRGB", "alpha blended over white")


def test_palettes_are_converted_too() -> None:
    picture = PIL.Image.fromarray(random_bytes(3)).quantize(32)
    image = read(picture, profile("RGB ", 1.8))
    assert np.abs(image.pixels - to_srgb(np.asarray(picture.convert("RGB")), 1.8, P3)).max() < 1.5
    assert image.notes == ("colours converted from by hand to sRGB", "palette expanded")


@pytest.mark.parametrize("space", ["GRAY", "RGB "])
def test_grey_takes_profiles_of_grey_and_of_colours(space: str) -> None:
    pixels = random_bytes()
    image = read(PIL.Image.fromarray(pixels), profile(space, 1.8))
    expected = to_srgb(np.stack([pixels] * 3, axis=2), 1.8, SRGB)  # neutral in any matrix
    assert np.abs(image.pixels - expected).max() < 2.5
    assert image.notes == ("colours converted from by hand to sRGB", "grey expanded to RGB")


@pytest.mark.parametrize(
    ("mode", "icc", "note"),
    [
        ("RGB", profile("GRAY", 2.2), "colour profile not applied: it is for GRAY"),
        ("RGB", b"some profile", "colour profile damaged, so not applied"),
        ("RGB", profile("RGB ", 1.8)[:200], "colour profile damaged, so not applied"),
        ("CMYK", profile("RGB ", 1.8), "colour profile not applied: it is for RGB"),
        ("CMYK", profile("CMYK", 1.8), "colour profile damaged, so not applied"),
        ("I;16", profile("GRAY", 1.8), "colour profile not applied"),
        ("F", profile("GRAY", 1.8), "colour profile not applied"),
    ],
)
def test_what_cannot_be_applied_is_said(mode: str, icc: bytes, note: str) -> None:
    picture = PIL.Image.new(mode, (20, 10), "black" if mode == "CMYK" else 0)
    plain, tagged = read(picture, b"", "TIFF"), read(picture, icc, "TIFF")
    assert note in tagged.notes
    assert tagged.notes == (note, *plain.notes)
    assert tagged.digest == plain.digest


def test_a_name_from_a_profile_stays_on_one_short_line() -> None:
    image = read(PIL.Image.fromarray(random_bytes(3)), profile("RGB ", 1.8, name="red\nsea " * 40))
    assert image.notes == ("colours converted from " + ("red sea " * 40)[:60] + " to sRGB",)
