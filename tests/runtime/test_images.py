"""What people have becomes RGB pixels, with words on what was done; what cannot be read is one clear error.

Expected pixels are computed here by other means: floating point where the reader uses whole numbers, explicit flips.
"""

import hashlib
import io
import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import pytest

from diffiqa.errors import ImageError
from diffiqa.runtime import images
from diffiqa.runtime.images import DEFAULT_MAX_PIXELS, Image, Source, read_image, readable_suffixes

Bytes = npt.NDArray[np.uint8]
HEIGHT, WIDTH = 30, 41
GREY = "grey expanded to RGB"
WHITE = "alpha blended over white"
DEEP = "16-bit reduced to 8"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    seed = zlib.crc32(request.node.name.encode())
    print(f"pixels of seed {seed}")  # noqa: T201 — shown when the test fails
    return np.random.default_rng(seed)


def random_bytes(rng: np.random.Generator, *channels: int) -> Bytes:
    return rng.integers(0, 256, (HEIGHT, WIDTH, *channels), np.uint8)


def encoded(image: PIL.Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(bits: int, colour_type: int, samples: npt.NDArray[Any], *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of any kind, written by hand, since Pillow cannot write 16-bit colour."""
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    height, width = samples.shape[:2]
    return png_of(width, height, bits, colour_type, *chunks, (b"IDAT", zlib.compress(rows)))


def png_of(width: int, height: int, bits: int, colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    body = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        body += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return body


def as_is(source: Source, **options: Any) -> Image:
    return read_image(source, **{"min_side": 1, **options})


def grey_rgb(grey: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.stack([grey, grey, grey], axis=2)


def over_white(rgba: Bytes) -> Bytes:
    """Alpha over white in floating point, rounded."""
    colour, alpha = rgba[..., :3].astype(np.float64), rgba[..., 3:] / 255.0
    return np.rint(colour * alpha + 255 * (1 - alpha)).astype(np.uint8)


def assert_pixels(image: Image, expected: npt.NDArray[Any]) -> None:
    assert image.pixels.dtype == expected.dtype
    np.testing.assert_array_equal(image.pixels, expected)
    assert (image.height, image.width) == expected.shape[:2]


# --- sources and formats


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP", "PPM", "TGA", "PCX", "SGI", "DDS", "QOI", "JPEG2000"])
def test_lossless_formats_give_the_very_pixels(kind: str, rng: np.random.Generator) -> None:
    PIL.Image.init()
    if kind not in PIL.Image.SAVE:
        pytest.skip(f"this Pillow does not write {kind}")
    pixels = random_bytes(rng, 3)
    options = {"lossless": True} if kind == "WEBP" else {}
    image = as_is(encoded(PIL.Image.fromarray(pixels), kind, **options))
    assert_pixels(image, pixels)
    assert image.notes == ()


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiffs_give_the_very_pixels(compression: str, rng: np.random.Generator) -> None:
    pixels = random_bytes(rng, 3)
    assert_pixels(as_is(encoded(PIL.Image.fromarray(pixels), "TIFF", compression=compression)), pixels)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_gives_what_the_decoder_gives_at_full_size(options: dict[str, Any], rng: np.random.Generator) -> None:
    data = encoded(PIL.Image.fromarray(random_bytes(rng, 3)), "JPEG", quality=90, **options)
    with PIL.Image.open(io.BytesIO(data)) as decoded:
        expected = np.array(decoded)
    assert_pixels(as_is(data), expected)


def test_a_path_a_string_bytes_a_pillow_image_and_an_array_agree(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = random_bytes(rng, 3)
    path = tmp_path / "picture.png"
    path.write_bytes(encoded(PIL.Image.fromarray(pixels), "PNG"))
    link = tmp_path / "link"
    link.symlink_to(path)
    with PIL.Image.open(path) as unread:
        sources: list[Source] = [path, str(path), link, path.read_bytes(), unread, PIL.Image.fromarray(pixels), pixels]
        read = [as_is(source) for source in sources]
    for image in read:
        assert_pixels(image, pixels)
    assert len({image.digest for image in read}) == 1


def test_the_name_of_a_file_does_not_decide_its_format(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = random_bytes(rng, 3)
    path = tmp_path / "really_a_bitmap.jpg"
    path.write_bytes(encoded(PIL.Image.fromarray(pixels), "BMP"))
    assert_pixels(as_is(path), pixels)


def test_equal_pixels_of_different_files_share_a_digest(rng: np.random.Generator) -> None:
    image = PIL.Image.fromarray(random_bytes(rng, 3))
    digests = {read_image(encoded(image, kind)).digest for kind in ("PNG", "BMP", "TIFF")}
    assert len(digests) == 1
    image.putpixel((0, 0), (1, 2, 3))
    assert read_image(encoded(image, "PNG")).digest not in digests


def test_the_digest_knows_the_shape() -> None:
    flat = np.zeros((10, 20, 3), np.uint8)
    assert as_is(flat).digest != as_is(flat.reshape(20, 10, 3)).digest
    expected = hashlib.sha256(b"(10, 20, 3)" + bytes(600)).hexdigest()
    assert as_is(flat).digest == expected


def test_pixels_are_read_only_contiguous_and_nobody_elses(rng: np.random.Generator) -> None:
    mine = random_bytes(rng, 3)
    image = as_is(mine)
    assert image.pixels.flags.c_contiguous
    assert not np.shares_memory(image.pixels, mine)
    with pytest.raises(ValueError, match="read-only"):
        image.pixels[0] = 0
    mine[0] = 0  # the caller's array is still the caller's


# --- kinds of pixels


def test_grey_is_expanded(rng: np.random.Generator) -> None:
    grey = random_bytes(rng)
    image = as_is(encoded(PIL.Image.fromarray(grey), "PNG"))
    assert_pixels(image, grey_rgb(grey))
    assert image.notes == (GREY,)


def test_one_bit_is_black_and_white(rng: np.random.Generator) -> None:
    bits = random_bytes(rng) > 127
    image = as_is(encoded(PIL.Image.fromarray(bits), "PNG"))
    assert_pixels(image, grey_rgb(np.where(bits, 255, 0).astype(np.uint8)))
    assert image.notes == (GREY,)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "TGA"])
def test_alpha_is_blended_over_white_and_rounded(kind: str, rng: np.random.Generator) -> None:
    rgba = random_bytes(rng, 4)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    image = as_is(encoded(PIL.Image.fromarray(rgba), kind, **options))
    assert_pixels(image, over_white(rgba))
    assert image.notes == (WHITE,)


def test_alpha_blending_is_exact_for_every_colour_and_alpha() -> None:
    colour, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    rgba = np.stack([colour, colour, colour, alpha], axis=2)
    assert_pixels(as_is(rgba), over_white(rgba))


def test_opaque_alpha_is_dropped_without_a_word(rng: np.random.Generator) -> None:
    rgba = random_bytes(rng, 4)
    rgba[..., 3] = 255
    image = as_is(rgba)
    assert_pixels(image, rgba[..., :3])
    assert image.notes == ()


def test_grey_with_alpha(rng: np.random.Generator) -> None:
    grey, alpha = random_bytes(rng), random_bytes(rng)
    image = as_is(png(8, 4, np.stack([grey, alpha], axis=2)))
    assert_pixels(image, over_white(np.stack([grey, grey, grey, alpha], axis=2)))
    assert image.notes == (GREY, WHITE)


def test_palette_is_expanded(rng: np.random.Generator) -> None:
    index, colours = random_bytes(rng), rng.integers(0, 256, (256, 3), np.uint8)
    indexed = PIL.Image.fromarray(index)
    indexed.putpalette(colours.tobytes())
    for kind in ("PNG", "BMP", "TIFF", "GIF"):
        image = as_is(encoded(indexed, kind))
        assert_pixels(image, colours[index])
        assert image.notes == ("palette expanded",)


def test_palette_with_an_alpha_of_each_entry(rng: np.random.Generator) -> None:
    index, colours = random_bytes(rng), rng.integers(0, 256, (256, 4), np.uint8)
    data = png(8, 3, index, (b"PLTE", colours[:, :3].tobytes()), (b"tRNS", colours[:, 3].tobytes()))
    image = as_is(data)
    assert_pixels(image, over_white(colours[index]))
    assert image.notes == ("palette expanded", WHITE)


def test_palette_with_one_clear_entry(rng: np.random.Generator) -> None:
    index, colours = random_bytes(rng) % 8, rng.integers(0, 255, (8, 3), np.uint8)
    indexed = PIL.Image.fromarray(index)
    indexed.putpalette(colours.tobytes())
    expected = colours[index]
    expected[index == 3] = 255
    for kind in ("PNG", "GIF"):
        image = as_is(encoded(indexed, kind, transparency=3))
        assert_pixels(image, expected)
        assert image.notes == ("palette expanded", WHITE)


@pytest.mark.parametrize("colour_type", [0, 2])
def test_one_clear_colour(colour_type: int, rng: np.random.Generator) -> None:
    samples = random_bytes(rng, 3) if colour_type else random_bytes(rng)
    clear = samples[3, 4]
    key = struct.pack(f">{clear.size}H", *np.atleast_1d(clear))
    image = as_is(png(8, colour_type, samples, (b"tRNS", key)))
    expected = (samples if colour_type else grey_rgb(samples)).copy()
    expected[(expected == clear).all(axis=2)] = 255
    assert_pixels(image, expected)
    assert image.notes[-1] == WHITE


def nearest_of_256(deep: npt.NDArray[Any]) -> Bytes:
    return np.rint(deep / 257.0).astype(np.uint8)


def test_16_bit_grey_is_rounded_to_the_nearest_level() -> None:
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = grey_rgb(nearest_of_256(every))
    signed = PIL.Image.fromarray(every.astype(np.int32))
    assert signed.mode == "I"
    big = PIL.Image.frombytes("I;16B", (256, 256), every.astype(">u2").tobytes())
    deep = PIL.Image.fromarray(every)
    swapped = every.astype(">u2")
    sources: list[Source] = [every, swapped, deep, big, signed, png(16, 0, swapped), encoded(deep, "TIFF")]
    for image in map(as_is, sources):
        assert_pixels(image, expected)
        assert image.notes == (DEEP, GREY)


def test_16_bit_grey_with_a_clear_value(rng: np.random.Generator) -> None:
    deep = rng.integers(0, 65000, (HEIGHT, WIDTH)).astype(">u2")
    image = as_is(png(16, 0, deep, (b"tRNS", deep[:1, :1].tobytes())))
    expected = grey_rgb(nearest_of_256(deep))
    expected[deep == deep[0, 0]] = 255
    assert_pixels(image, expected)
    assert image.notes == (DEEP, GREY, WHITE)


def test_16_bit_colour_comes_from_pillow_with_its_upper_bytes_and_is_named(rng: np.random.Generator) -> None:
    deep = rng.integers(0, 65536, (HEIGHT, WIDTH, 4)).astype(">u2")
    image = as_is(png(16, 2, deep[..., :3]))
    assert_pixels(image, (deep[..., :3] >> 8).astype(np.uint8))
    assert image.notes == (DEEP,)
    image = as_is(png(16, 6, deep))
    assert_pixels(image, over_white((deep >> 8).astype(np.uint8)))
    assert image.notes == (DEEP, WHITE)
    assert as_is(b"P6 41 30 65535\n" + deep[..., :3].tobytes()).notes == (DEEP,)


def test_a_16_bit_array_of_colour_is_rounded(rng: np.random.Generator) -> None:
    deep = rng.integers(0, 65536, (HEIGHT, WIDTH, 3), np.uint16)
    image = as_is(deep)
    assert_pixels(image, nearest_of_256(deep))
    assert image.notes == (DEEP,)


def test_five_and_six_bits_of_colour_are_not_called_16_bit() -> None:
    header = struct.pack("<IiiHHIIiiII", 40, 1, 1, 1, 16, 3, 4, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xF800, 0x07E0, 0x001F)
    image = as_is(b"BM" + struct.pack("<IHHI", 70, 0, 0, 66) + header + masks + struct.pack("<HH", 0xF800, 0))
    assert_pixels(image, np.array([[[255, 0, 0]]], np.uint8))
    assert image.notes == ()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_from_0_to_1_stay_floats(dtype: type, rng: np.random.Generator) -> None:
    floats: npt.NDArray[Any] = rng.random((HEIGHT, WIDTH, 4)).astype(dtype)
    floats[0, 0], floats[0, 1] = 0, 1
    image = as_is(floats[..., :3])
    assert_pixels(image, floats[..., :3].astype(np.float32))
    assert image.notes == ()
    assert_pixels(as_is(floats[..., :1]), grey_rgb(floats[..., 0].astype(np.float32)))
    image = as_is(floats)
    colour, alpha = floats[..., :3].astype(np.float64), floats[..., 3:].astype(np.float64)
    np.testing.assert_allclose(image.pixels, colour * alpha + 1 - alpha, atol=2e-7)  # float32
    assert image.pixels.dtype == np.float32
    assert image.notes == (WHITE,)


def test_a_float_tiff_from_0_to_1_stays_float(rng: np.random.Generator) -> None:
    floats = rng.random((HEIGHT, WIDTH)).astype(np.float32)
    image = as_is(encoded(PIL.Image.fromarray(floats), "TIFF"))
    assert_pixels(image, grey_rgb(floats))
    with pytest.raises(ImageError, match=r"^bytes: floats from .* expected 0 to 1 \(divide by 255"):
        read_image(encoded(PIL.Image.fromarray(floats * 255), "TIFF"))


def tiff(bits: int, sample_format: int, photometric: int, samples: npt.NDArray[Any]) -> bytes:
    """A grey TIFF of any kind, written by hand, since Pillow writes few."""
    height, width = samples.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    tags += [(278, height), (279, samples.nbytes), (339, sample_format)]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = 8 + samples.nbytes
    return b"II*\0" + struct.pack("<I", start) + samples.tobytes() + struct.pack("<H", len(tags)) + directory + bytes(4)


@pytest.mark.parametrize(
    ("bits", "sample_format", "kind"),
    [(8, 2, "signed"), (16, 2, "signed"), (32, 2, "signed"), (32, 1, "32-bit")],
)
def test_whole_numbers_without_a_known_white_are_refused(bits: int, sample_format: int, kind: str) -> None:
    samples = np.full((8, 8), 100, f"<i{bits // 8}")
    with pytest.raises(ImageError, match=f"^bytes: {kind} whole numbers, whose white is not known; save it with 8 or"):
        as_is(tiff(bits, sample_format, 1, samples))


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_a_tiff_whose_white_is_zero_is_no_negative(bits: int, rng: np.random.Generator) -> None:
    if bits == 32:
        samples: npt.NDArray[Any] = rng.random((HEIGHT, WIDTH)).astype("<f4")
        expected: npt.NDArray[Any] = 1 - samples
    else:
        samples = rng.integers(0, 2**bits, (HEIGHT, WIDTH)).astype(f"<u{bits // 8}")
        expected = np.rint((2**bits - 1 - samples.astype(float)) * (255 / (2**bits - 1))).astype(np.uint8)
    assert_pixels(as_is(tiff(bits, 3 if bits == 32 else 1, 0, samples)), grey_rgb(expected))


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LAB", "TIFF")])
def test_other_colour_spaces_are_converted_and_named(mode: str, kind: str, rng: np.random.Generator) -> None:
    data = encoded(PIL.Image.fromarray(random_bytes(rng, 3)).convert(mode), kind)
    image = as_is(data)
    with PIL.Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == mode
        expected = np.array(opened.convert("RGB"))
    assert_pixels(image, expected)
    assert image.notes[0].startswith(f"{mode} converted to RGB")


def test_cmyk_is_converted_and_named() -> None:
    cmyk = PIL.Image.new("CMYK", (8, 8), (10, 20, 30, 40))
    assert as_is(encoded(cmyk, "JPEG")).notes == ("CMYK converted to RGB",)


def test_colour_spaces_that_exist_only_in_memory() -> None:
    red = np.full((8, 8, 3), (255, 0, 0), np.uint8)
    image = as_is(PIL.Image.new("HSV", (8, 8), (0, 255, 255)))
    assert_pixels(image, red)
    assert image.notes == ("HSV converted to RGB",)
    image = as_is(PIL.Image.fromarray(red).convert("YCbCr"))
    np.testing.assert_allclose(image.pixels, red, atol=1)
    assert image.notes == ("YCbCr converted to RGB",)


# --- EXIF

UPRIGHT: dict[int, Callable[[npt.NDArray[Any]], npt.NDArray[Any]]] = {
    1: lambda p: p,
    2: np.fliplr,
    3: lambda p: np.rot90(p, 2),
    4: np.flipud,
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
    8: np.rot90,
}


def exif(orientation: object) -> PIL.Image.Exif:
    tags = PIL.Image.Exif()
    tags[274] = orientation
    return tags


# Pillow itself turns a TIFF; the others go one way, so one orientation shows that their EXIF is found.
@pytest.mark.parametrize(
    ("orientation", "kind"), [*((turn, "PNG") for turn in UPRIGHT), (1, "TIFF"), (6, "TIFF"), (6, "WEBP"), (6, "JPEG")]
)
def test_images_are_turned_as_exif_says(orientation: int, kind: str, rng: np.random.Generator) -> None:
    stored = PIL.Image.fromarray(random_bytes(rng, 3))
    options = {"lossless": True} if kind == "WEBP" else {}
    plain = as_is(encoded(stored, kind, **options)).pixels
    image = as_is(encoded(stored, kind, exif=exif(orientation), **options))
    assert_pixels(image, UPRIGHT[orientation](plain))
    assert image.notes == (() if orientation == 1 else ("rotated as EXIF says",))


def test_an_image_opened_by_the_caller_is_turned_too(rng: np.random.Generator) -> None:
    pixels = random_bytes(rng, 3)
    with PIL.Image.open(io.BytesIO(encoded(PIL.Image.fromarray(pixels), "PNG", exif=exif(6)))) as opened:
        image = as_is(opened)
        assert opened.size == (WIDTH, HEIGHT)  # and stays as it was
    assert_pixels(image, np.rot90(pixels, -1))


def test_an_impossible_orientation_is_ignored(rng: np.random.Generator) -> None:
    pixels = random_bytes(rng, 3)
    for orientation in (0, 9, 65535):
        assert_pixels(as_is(encoded(PIL.Image.fromarray(pixels), "PNG", exif=exif(orientation))), pixels)


@pytest.mark.parametrize(
    ("damage", "kind"), [("cut", "JPEG"), ("garbage", "PNG"), ("width", "WEBP"), ("garbage", "JPEG"), ("cut", "PNG")]
)
def test_damaged_exif_does_not_cost_the_image(damage: str, kind: str) -> None:
    whole = with_long_text(exif(6)).tobytes()
    damaged = {
        "cut": whole[:-12],
        "garbage": b"Exif\0\0neither II nor MM",
        "width": whole.replace(b"\x01\x31", b"\x01\x00"),
    }
    image = as_is(encoded(PIL.Image.new("RGB", (8, 8)), kind, exif=damaged[damage]))
    assert image.pixels.shape == (8, 8, 3)
    assert ("rotated as EXIF says" in image.notes) == (damage != "garbage")


def with_long_text(tags: PIL.Image.Exif) -> PIL.Image.Exif:
    tags[305] = "a program's name of some length"
    return tags


# --- animations and pages


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_is_taken_and_the_others_counted(kind: str, rng: np.random.Generator) -> None:
    frames = [PIL.Image.fromarray(random_bytes(rng)) for _ in range(12)]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = as_is(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert_pixels(image, grey_rgb(np.asarray(frames[0])))
    assert image.notes[0] == "first of 12 frames"


def test_a_frame_the_caller_chose_is_kept(rng: np.random.Generator) -> None:
    frames = [PIL.Image.fromarray(random_bytes(rng, 3)) for _ in range(3)]
    data = encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])
    with PIL.Image.open(io.BytesIO(data)) as pages:
        pages.seek(1)
        image = as_is(pages)
    assert_pixels(image, np.asarray(frames[1]))
    assert image.notes == ("frame 2 of 3",)


def test_layers_are_not_frames() -> None:
    layer = struct.pack(">4iHhIhIhI", 0, 0, 1, 1, 3, 0, 3, 1, 3, 2, 3) + b"8BIMnorm\xff\0\0\0" + struct.pack(">I", 12)
    layers = struct.pack(">h", 2) + (layer + bytes(12)) * 2 + b"\0\0\x07" * 6
    section = struct.pack(">I", len(layers)) + layers
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 1, 1, 8, 3) + bytes(8)
    merged = b"\0\0" + bytes([10, 20, 30])
    image = as_is(header + struct.pack(">I", len(section)) + section + merged)
    assert_pixels(image, np.array([[[10, 20, 30]]], np.uint8))
    assert image.notes == ()


def test_pixels_of_a_closed_file_can_be_used(tmp_path: Path, rng: np.random.Generator) -> None:
    pixels = random_bytes(rng)
    for kind in ("GIF", "TIFF", "PNG", "JPEG", "WEBP"):
        path = tmp_path / kind
        path.write_bytes(encoded(PIL.Image.fromarray(pixels), kind))
        with PIL.Image.open(path) as opened:
            opened.load()
        assert as_is(opened).digest == as_is(path).digest


# --- small and large


def test_small_images_are_upscaled_until_the_short_side_fits() -> None:
    image = read_image(np.zeros((90, 120, 3), np.uint8), min_side=224)
    assert image.notes == ("upscaled from 120×90 to 299×224",)
    assert (image.width, image.height) == (120, 90)
    assert image.pixels.shape == (224, 299, 3)


def test_upscaling_is_lanczos(rng: np.random.Generator) -> None:
    pixels = random_bytes(rng, 3)
    expected = PIL.Image.fromarray(pixels).resize((82, 60), PIL.Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(read_image(pixels, min_side=60).pixels, np.asarray(expected))


def test_floats_are_upscaled_like_bytes_and_stay_in_range(rng: np.random.Generator) -> None:
    pixels = random_bytes(rng, 3)
    floats = read_image((pixels / np.float32(255)).astype(np.float32), min_side=60).pixels
    assert floats.min() == 0
    assert floats.max() == 1
    calm = pixels // 4 + 96  # so that the overshoots fit into bytes
    floats = read_image((calm / np.float32(255)).astype(np.float32), min_side=60).pixels
    np.testing.assert_allclose(floats * 255, read_image(calm, min_side=60).pixels, atol=1.5)  # bytes are rounded twice


def test_what_is_large_enough_is_left_alone() -> None:
    for shape in ((224, 300, 3), (300, 224, 3), (500, 400, 3)):
        image = read_image(np.zeros(shape, np.uint8))
        assert image.pixels.shape == shape
        assert image.notes == ()


def test_one_pixel_is_an_image() -> None:
    image = read_image(encoded(PIL.Image.new("RGB", (1, 1), (10, 200, 30)), "PNG"))
    np.testing.assert_array_equal(image.pixels, np.full((224, 224, 3), (10, 200, 30), np.uint8))
    assert (image.width, image.height) == (1, 1)


def test_a_thread_of_pixels_is_refused_before_it_is_upscaled() -> None:
    with pytest.raises(ImageError, match=r"50000×1 is too narrow: .* would be 11200000×224, more than 89478485 pixels"):
        read_image(np.zeros((1, 50000, 3), np.uint8))


def test_the_limit_of_pixels_holds_for_every_source(tmp_path: Path) -> None:
    path = tmp_path / "big.png"
    picture = PIL.Image.new("RGB", (101, 100))
    picture.save(path)
    for source in (path, path.read_bytes(), picture, np.asarray(picture)):
        with pytest.raises(ImageError, match=r"101×100 is more than 10000 pixels; .* allow more with --max-pixels"):
            as_is(source, max_pixels=10_000)
        assert as_is(source, max_pixels=10_100).width == 101


def test_the_limit_is_pillows_own() -> None:
    assert DEFAULT_MAX_PIXELS == PIL.Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("side", [9_500, 20_000, 2_000_000])  # below twice Pillow's limit, above, absurd
def test_a_bomb_is_refused_before_it_takes_memory(side: int, recwarn: pytest.WarningsRecorder) -> None:
    bombs = [
        png_of(side, side, 8, 2, (b"IDAT", zlib.compress(bytes(1000)))),
        b"P6 %d %d 255\n" % (side, side),
        b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(99),
    ]
    for bomb in bombs:
        with pytest.raises(ImageError, match="--max-pixels"):
            read_image(bomb)
    assert not recwarn.list


def test_who_raises_the_limit_gets_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    # With a small stand-in for the limit of Pillow: at its real size this would take a gigabyte.
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(images, "DEFAULT_MAX_PIXELS", 1000)
    data = encoded(PIL.Image.new("RGB", (100, 100)), "PNG")
    with pytest.raises(ImageError, match="--max-pixels"):
        as_is(data, max_pixels=1000)
    assert PIL.Image.MAX_IMAGE_PIXELS == 1000
    assert as_is(data, max_pixels=10_000).width == 100
    assert PIL.Image.MAX_IMAGE_PIXELS == 10_000  # raised for the process
    with pytest.raises(ImageError, match="more than 1000 pixels"):
        as_is(data, max_pixels=1000)  # while each call keeps its own limit
    assert as_is(np.zeros((9, 9), np.uint8), max_pixels=None).width == 9  # nothing to open, so nothing to raise
    assert as_is(encoded(PIL.Image.new("RGB", (9, 9)), "PNG"), max_pixels=5000).width == 9
    assert PIL.Image.MAX_IMAGE_PIXELS == 10_000  # and it is never lowered: another thread may rely on it
    assert as_is(data, max_pixels=None).width == 100


def test_a_lower_limit_of_the_program_itself_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    assert as_is(encoded(PIL.Image.new("RGB", (50, 30)), "PNG")).notes == ()  # Pillow warns, but we know the size
    with pytest.raises(ImageError, match="exceeds limit of 2000 pixels"):
        as_is(encoded(PIL.Image.new("RGB", (50, 60)), "PNG"))
    assert PIL.Image.MAX_IMAGE_PIXELS == 1000


def test_an_icon_that_is_larger_than_it_says_is_refused() -> None:
    inner = encoded(PIL.Image.new("RGB", (200, 200)), "PNG")
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 24, len(inner), 22) + inner
    assert as_is(icon).width == 200
    with pytest.raises(ImageError, match="200×200 is more than 10000 pixels"):
        as_is(icon, max_pixels=10_000)


def test_bombs_in_the_text_of_a_png_are_refused(rng: np.random.Generator) -> None:
    text = b"Comment\0\0" + zlib.compress(bytes(2**21))
    profile = b"icc\0\0" + zlib.compress(bytes(2**21))
    for chunk in ((b"zTXt", text), (b"iCCP", profile)):
        with pytest.raises(ImageError, match="damaged, or not a kind"):
            read_image(png(8, 2, random_bytes(rng, 3), chunk))


# --- arrays that are not images


def test_arrays_that_are_no_image_are_described() -> None:
    cases: list[tuple[npt.NDArray[Any], str]] = [
        (
            np.zeros((3, 224, 225), np.uint8),
            r"has shape \(3, 224, 225\) and type uint8; expected \(H, W\), \(H, W, 1\)",
        ),
        (np.zeros((10, 10, 2), np.uint8), r"shape \(10, 10, 2\)"),
        (np.zeros(10, np.uint8), r"shape \(10,\)"),
        (np.zeros((0, 10, 3), np.uint8), "not empty"),
        (np.zeros((10, 0), np.uint8), "not empty"),
        (np.zeros((10, 10), np.int64), "type int64; expected .* uint8, uint16, float32, float64"),
        (np.zeros((10, 10), bool), "type bool"),
        (np.zeros((10, 10), object), "type object"),
        (np.full((10, 10, 3), 255.0), r"floats from 255.0 to 255.0; expected 0 to 1 \(divide by 255, or use uint8\)"),
        (np.full((10, 10, 3), -0.1, np.float32), "floats from -0.1"),
        (np.full((10, 10, 3), np.nan), "floats from nan to nan"),
        (np.array([[0, np.nan]], np.float32), "floats from nan to nan"),
        (np.array([[0, np.inf]]), "floats from 0.0 to inf"),
    ]
    for array, message in cases:
        with pytest.raises(ImageError, match=f"^ndarray: .*{message}"):
            read_image(array)


@pytest.mark.parametrize("values", [[[-1, 5]], [[0, 65536]]])
def test_whole_numbers_beyond_16_bits_are_refused(values: list[list[int]]) -> None:
    picture = PIL.Image.fromarray(np.array(values, np.int32))
    with pytest.raises(ImageError, match="expected 16-bit ones, 0 to 65535"):
        read_image(picture)


def test_other_things_are_not_images() -> None:
    cases: list[Any] = [None, 5, [1, 2], io.BytesIO(b"x")]
    for source in cases:
        with pytest.raises(ImageError, match=f"^{type(source).__name__}: not an image; expected a path, bytes"):
            read_image(source)


# --- files that are not images


def test_missing_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ImageError, match=r"missing\.png: no such file$"):
        read_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match=r"dangling: no such file$"):
        read_image(tmp_path / "dangling")
    with pytest.raises(ImageError, match=r"file/x\.png: no such file$"):
        read_image(tmp_path / "file" / "x.png")
    with pytest.raises(ImageError, match=r"loop: cannot be read: "):
        read_image(tmp_path / "loop")
    with pytest.raises(ImageError, match="cannot be read: File name too long"):
        read_image("x" * 5000)
    with pytest.raises(ImageError, match="a folder, not an image file"):
        read_image(tmp_path)
    with pytest.raises(ImageError):
        read_image("")
    with pytest.raises(ImageError):
        read_image("nul\0byte")


def test_files_without_an_image(tmp_path: Path) -> None:
    path = tmp_path / "file.png"
    for content, message in {
        b"": r"file\.png: an empty file$",
        b"just some words\n"
        * 9: r"file\.png: not an image, or of a kind that Pillow .* does not read here: save it as PNG$",
        b"\x89PNG\r\n\x1a\n": r"file\.png: ",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n": "not an image, or of a kind",  # a program
    }.items():
        path.write_bytes(content)
        with pytest.raises(ImageError, match=message):
            read_image(path)
    with pytest.raises(ImageError, match=r"^bytes: no bytes at all$"):
        read_image(b"")


def test_the_name_stays_on_one_printable_line(tmp_path: Path) -> None:
    for name in (os.fsdecode(b"odd\xff"), "two\nlines", "bell\a"):
        with pytest.raises(ImageError) as caught:
            read_image(tmp_path / name)
        assert str(caught.value).isprintable()


def test_what_a_decoder_says_is_brought_to_one_printable_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("bad\0 block\nat line 2" + "!" * 1000)

    monkeypatch.setattr(images, "_rgb", fail)
    with pytest.raises(ImageError, match=r"^Pillow image: damaged, .* \('bad\\x00 block at line 2!!") as caught:
        read_image(PIL.Image.new("RGB", (9, 9)))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


@pytest.mark.skipif(not hasattr(os, "mkfifo") or not Path("/dev/zero").exists(), reason="needs pipes and devices")
def test_pipes_and_devices_are_refused_without_waiting(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    for path in (pipe, "/dev/zero"):
        with pytest.raises(ImageError, match="a pipe, socket or device; only plain files are read"):
            read_image(path)


def test_a_file_one_may_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")  # as root, file modes would not stop us

    path = tmp_path / "secret.png"
    path.write_bytes(b"x")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ImageError, match=r"secret\.png: may not be read; check its permissions$"):
        read_image(path)


def test_a_file_larger_than_any_image(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(2**31 + 1)  # takes no room on the disk
    with pytest.raises(ImageError, match="a file of 2147483649 bytes; at most 2147483648 are read"):
        read_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF"])
def test_a_truncated_file_is_an_error_and_not_half_an_image(kind: str, rng: np.random.Generator) -> None:
    data = encoded(PIL.Image.fromarray(random_bytes(rng, 3)), kind)
    for kept in (0.3, 0.6, 0.9):
        with pytest.raises(ImageError, match=r"^bytes: (damaged, or not a kind that Pillow .* decodes|not an image)"):
            read_image(data[: int(len(data) * kept)])


def test_a_jpeg_cut_anywhere_is_an_error(rng: np.random.Generator) -> None:
    smooth = PIL.Image.fromarray(random_bytes(rng, 3)).resize((64, 64))
    for progressive in (False, True):
        data = encoded(smooth, "JPEG", progressive=progressive)
        for length in range(1, len(data), 7):
            with pytest.raises(ImageError):
                read_image(data[:length])


def test_running_out_of_memory_is_an_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "_rgb", fail)
    with pytest.raises(ImageError, match="not enough memory to decode it") as caught:
        read_image(PIL.Image.new("RGB", (9, 9)))
    assert isinstance(caught.value.__cause__, MemoryError)


def test_the_users_interrupt_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(images, "_rgb", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read_image(PIL.Image.new("RGB", (9, 9)))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux shows them")
def test_files_are_closed_whatever_happens(tmp_path: Path, rng: np.random.Generator) -> None:
    picture = PIL.Image.fromarray(random_bytes(rng, 3))
    paths = []
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"):
        data = encoded(picture, kind, **({"save_all": True, "append_images": [picture]} if kind == "TIFF" else {}))
        for name, content in ((f"{kind}.whole", data), (f"{kind}.cut", data[: len(data) // 2])):
            paths.append(tmp_path / name)
            paths[-1].write_bytes(content)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for path in paths:
        try:
            read_image(path)
        except ImageError:
            assert path.suffix == ".cut"
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


# --- warnings and threads


def with_broken_exif() -> bytes:
    tags = with_long_text(exif(3)).tobytes()[:-12]
    return encoded(PIL.Image.new("RGB", (8, 8), (9, 9, 9)), "JPEG", exif=tags)


def test_what_pillow_warns_of_becomes_a_note() -> None:
    notes = as_is(with_broken_exif()).notes
    assert notes[0] == "rotated as EXIF says"
    assert notes[1].startswith("Pillow warns: ")


def test_nothing_is_printed_under_pythons_own_settings(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(with_broken_exif())
    samples = struct.pack("<HHII", 277, 4, 1, 10**6)  # a TIFF of a million samples, of which Pillow logs
    header = b"II*\0" + struct.pack("<IH", 8, 4)
    sizes = b"".join(struct.pack("<HHII", tag, 4, 1, 9) for tag in (256, 257))
    tiff = tmp_path / "x.tif"
    tiff.write_bytes(header + sizes + struct.pack("<HHII", 262, 3, 1, 2) + samples + bytes(4))
    code = (
        "import sys; from diffiqa.runtime.images import read_image, ImageError\n"
        "for name in sys.argv[1:]:\n"
        "    try: read_image(name)\n"
        "    except ImageError: pass"
    )
    run = subprocess.run([sys.executable, "-c", code, path, tiff], capture_output=True, text=True, check=True)
    assert (run.stdout, run.stderr) == ("", "")


def test_warnings_of_the_caller_are_left_alone() -> None:
    read_image(with_broken_exif())
    with pytest.raises(UserWarning, match="of the caller"):  # warnings are errors in these tests
        warnings.warn("of the caller", UserWarning, stacklevel=1)
    with pytest.raises(UserWarning, match="Truncated"), PIL.Image.open(io.BytesIO(with_broken_exif())) as opened:
        opened.getexif()  # in the caller's hands, Pillow goes on warning


def test_warnings_of_other_threads_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, done = threading.Event(), threading.Event()
    decode = images._rgb

    def slow(*args: Any) -> Any:
        reading.set()
        assert done.wait(10)
        return decode(*args)

    monkeypatch.setattr(images, "_rgb", slow)
    with ThreadPoolExecutor(1) as pool:
        image = pool.submit(as_is, with_broken_exif())
        assert reading.wait(10)
        with pytest.raises(UserWarning, match="meanwhile"):
            warnings.warn("meanwhile", UserWarning, stacklevel=1)
        done.set()
        assert "meanwhile" not in image.result().notes[-1]


def test_many_threads_read_at_once(rng: np.random.Generator) -> None:
    """Some images that warn, some that fail, some fine: nobody hears another's warnings, and none escapes."""
    picture = PIL.Image.fromarray(random_bytes(rng, 3))
    fine = {encoded(picture, kind): () for kind in ("PNG", "BMP", "TIFF")}
    expected = as_is(np.asarray(picture)).digest
    start = threading.Barrier(8)

    def work(index: int) -> None:
        start.wait()
        for _ in range(20):
            for data, notes in fine.items():
                image = as_is(data)
                assert (image.digest, image.notes) == (expected, notes)
            assert as_is(with_broken_exif()).notes[1].startswith("Pillow warns: ")
            with pytest.raises(ImageError):
                read_image(png_of(10_000 + index, 10_000, 8, 2))

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(work, index) for index in range(8)]:
            done.result()


def test_formats_are_there_for_all_threads_from_the_start(tmp_path: Path) -> None:
    """Pillow loads its plugins lazily: the first images of a process, read at once, must find them all."""
    path = tmp_path / "x.tif"
    PIL.Image.new("RGB", (8, 8)).save(path)
    code = (
        "import sys, threading; from diffiqa.runtime.images import read_image\n"
        "failed = []; threading.excepthook = failed.append; sys.setswitchinterval(1e-5)\n"
        "threads = [threading.Thread(target=read_image, args=sys.argv[1:]) for _ in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]; sys.exit(len(failed))"
    )
    subprocess.run([sys.executable, "-c", code, path], check=True)


def test_suffixes_are_those_of_images() -> None:
    suffixes = readable_suffixes()
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"} <= suffixes
    assert not {".eps", ".ps", ".pdf", ".mpg", ".h5", ".hdf", ".wmf", ".txt", ""} & suffixes
