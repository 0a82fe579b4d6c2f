"""Files, bytes, Pillow images and arrays become RGB pixels, with notes of what was done to them.

Files are not trusted. Whatever their bytes are, reading one ends in an `Image` or an `ImageError`, in any thread.
"""

import functools
import hashlib
import importlib
import io
import logging
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import PIL.Image

from ..engine.manifest import Manifest
from ..engine.pixels import Preparation, bicubic, to_pixels, to_plane
from ..engine.schedule import Kind
from ..errors import ImageError, one_line
from .arrays import Exchangeable, GpuArray, is_foreign, to_numpy
from .colour import to_srgb

Source = str | os.PathLike[str] | bytes | PIL.Image.Image | npt.NDArray[Any] | GpuArray | Exchangeable
Array = npt.NDArray[Any]

# Pillow's own guard against decompression bombs: a quarter of a GiB of RGB.
DEFAULT_MAX_PIXELS = 89_478_485
MAX_FILE_BYTES = 2**31
ALLOW_MORE = "allow more with --max-pixels"

# Drawings and measurements. For EPS Pillow runs Ghostscript, on a program from the file; of the others it reads no
# pixels.
UNREAD_FORMATS = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
GREY, PALETTE = "grey expanded to RGB", "palette expanded"
DEEP, BLENDED = "16-bit reduced to 8", "alpha blended over white"
MODE_NOTES = {"1": GREY, "L": GREY, "LA": GREY, "P": PALETTE, "PA": PALETTE}
PLAIN_MODES = {"RGB", "RGBA", "RGBa", "RGBX"}
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # tags of TIFF, and their values
SAMPLE_FORMAT, SIGNED = 339, 2
ARRAY_TYPES = ("uint8", "uint16", "float32", "float64")

# Pillow logs about some broken files. Without a handler Python prints that to stderr.
logging.getLogger("PIL").addHandler(logging.NullHandler())
_pillow_limit = threading.Lock()
_callers_images = threading.Lock()


@dataclass(frozen=True, eq=False)
class Image:
    """RGB pixels (H, W, 3), read-only: uint8, or float32 in [0, 1] if the source had floats.

    `width` and `height` are those of the upright image before upscaling. `notes` say in words what was done. Equal
    pixels have equal digests, whatever file they came from.
    """

    pixels: npt.NDArray[np.uint8] | npt.NDArray[np.float32]
    width: int
    height: int
    notes: tuple[str, ...]
    digest: str
    restored_from: npt.NDArray[Any] | None = None  # what the U-Net gets, where that is not `pixels`

    @property
    def size(self) -> tuple[int, int]:
        """The (height, width) of what is restored, or else looked at."""
        height, width, _ = (self.pixels if self.restored_from is None else self.restored_from).shape
        return height, width


def read_image(source: Source, *, min_side: int = 224, max_pixels: int | None = DEFAULT_MAX_PIXELS) -> Image:
    """Decode an image: upright, over white, with no side below `min_side`. Every failure is an `ImageError`.

    A `max_pixels` above Pillow's limit (None: no limit) raises that limit for the whole process.
    """
    notes: list[str] = []
    warned: list[str] = []
    try:
        with _pillow_warnings(warned):
            pixels = _decode(source, max_pixels, notes)
            height, width = pixels.shape[:2]
            pixels = np.ascontiguousarray(_upscale(pixels, min_side, max_pixels, notes))
            pixels.setflags(write=False)
            digest = hashlib.sha256(repr(pixels.shape).encode())
            digest.update(pixels.data)
    except Exception as exc:
        raise ImageError(f"{_name(source)}: {_reason(exc)}") from exc
    if warned:  # a broken table of tags may cause thousands
        others = f" ({len(warned) - 1} more warnings)" if warned[1:] else ""
        notes.append(f"Pillow warns: {one_line(warned[0])}{others}")
    return Image(pixels, width, height, tuple(notes), digest.hexdigest())


def read_for(source: Source, manifest: Manifest, *, max_pixels: int | None = DEFAULT_MAX_PIXELS) -> Image:
    """Read an image and prepare it as an engine's model was trained. Its digest is that of the pixels as given.

    Every failure is an `ImageError`.
    """
    image, how = read_image(source, min_side=manifest.crop.size, max_pixels=max_pixels), manifest.preparation
    try:
        seen, restored_from = prepare(image.pixels, how)
    except MemoryError as exc:
        raise ImageError(f"{_name(source)}: {_reason(exc)}") from exc
    if seen is image.pixels:
        return image
    size = image.size
    notes = [
        f"{done} to {width}×{height}"
        for done, before, (height, width) in (
            ("resized", size, how.restored(*size)),
            ("squashed", how.restored(*size), how.seen(*size)),
        )
        if before != (height, width)
    ]
    for pixels in (seen, restored_from):
        pixels.setflags(write=False)
    other = restored_from if manifest.kinds != (Kind.DIS,) else None
    return replace(image, pixels=seen, restored_from=other, notes=(*image.notes, *notes))


def prepare(pixels: Array, how: Preparation) -> tuple[Array, Array]:
    """Return what the heads see of an image, and what the U-Net restores: `pixels` itself if there is nothing to do.

    The authors' programs scale the image twice, on 8 bits: for the heads by OpenCV's bicubic filter, for the U-Net by
    Pillow's bilinear one.
    """
    size = pixels.shape[0], pixels.shape[1]
    seen, restored = how.seen(*size), how.restored(*size)
    if seen == restored == size:
        return pixels, pixels
    pixels = to_pixels(to_plane(pixels)) if pixels.dtype != np.uint8 else pixels
    to_restore = pixels if restored == size else _resized(pixels, restored[::-1], PIL.Image.Resampling.BILINEAR)
    return bicubic(pixels, *seen), to_restore


def synthetic(seed: int | tuple[int, ...], height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return a random picture for checks and timings. Like photographs it has detail at several scales."""
    generator = np.random.default_rng(seed)
    sum_of_scales = np.zeros((height, width, 3), np.float32)
    for cell in (1, 8, 64):
        coarse = generator.random((-(-height // cell), -(-width // cell), 3), np.float32)
        sum_of_scales += np.repeat(np.repeat(coarse, cell, 0), cell, 1)[:height, :width]
    return (sum_of_scales * 85).astype(np.uint8)


def readable_suffixes() -> frozenset[str]:
    """Return the lower-case suffixes, with their dot, of the files that can be read."""
    formats = _formats()
    return frozenset(suffix for suffix, name in PIL.Image.registered_extensions().items() if name in formats)


def _formats() -> tuple[str, ...]:
    # Pillow loads its plugins when it meets an unknown file. If two threads do so at once, one may find none.
    PIL.Image.init()
    _init_heif()
    return tuple(name for name in PIL.Image.ID if name not in UNREAD_FORMATS)


@functools.cache
def _init_heif() -> None:
    """Let Pillow read the photographs of iPhones, if the extra `heif` is installed."""
    with suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()


class _Listener(threading.local):
    """A message pattern for `warnings.filters` that collects the warnings of a thread while it reads an image.

    `warnings.catch_warnings` replaces a list that all threads share, so it cannot be used here. A plain filter would
    silence Pillow for the rest of the program. Every thread asks this filter; it matches only in one that reads.
    """

    heard: list[str] | None = None

    def match(self, text: str) -> bool:
        if self.heard is None:
            return False
        self.heard.append(text)
        return True


_LISTENER = _Listener()
_FILTERS = [("ignore", _LISTENER, kind, None, 0) for kind in (UserWarning, PIL.Image.DecompressionBombWarning)]


@contextmanager
def _pillow_warnings(heard: list[str]) -> Iterator[None]:
    """Collect the warnings of this thread, except those about size: we have our own limit."""
    filters = cast("list[Any]", warnings.filters)
    if filters[: len(_FILTERS)] != _FILTERS:
        filters[:0] = _FILTERS
    _LISTENER.heard = heard
    try:
        yield
    finally:
        _LISTENER.heard = None
        heard[:] = [text for text in heard if "decompression bomb" not in text]


def _decode(source: Source, max_pixels: int | None, notes: list[str]) -> Array:
    """Return upright RGB pixels of any size."""
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels, notes)
    if isinstance(source, PIL.Image.Image):
        with _callers_images:  # Pillow decodes late, and two threads may have the same image, or the same file
            return _from_pillow(source, max_pixels, notes)
    if is_foreign(source):
        return _from_array(to_numpy(source), max_pixels, notes)
    if max_pixels is None or max_pixels > DEFAULT_MAX_PIXELS:
        _raise_pillow_limit(max_pixels)
    if not isinstance(source, str | bytes | os.PathLike):
        raise ImageError("not an image; expected a path, bytes, a Pillow image or an array")
    # Pillow gets an open file: given a name it maps the file into memory, and a file that is cut meanwhile kills us.
    with _open(source) as file, PIL.Image.open(file, formats=_formats()) as image:
        return _from_pillow(image, max_pixels, notes)


def _raise_pillow_limit(max_pixels: int | None) -> None:
    # Pillow refuses images with twice as many pixels as its limit, before we see their size. Its limit is one variable
    # for the whole process. Setting it for each call would race: so it only goes up, for callers who allow more than
    # Pillow does. `_check_size` enforces the limit of each call.
    with _pillow_limit:
        pillow = PIL.Image.MAX_IMAGE_PIXELS
        PIL.Image.MAX_IMAGE_PIXELS = None if pillow is None or max_pixels is None else max(pillow, max_pixels)


def _open(source: str | os.PathLike[str] | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        if not source:
            raise ImageError("no bytes at all")
        return io.BytesIO(source)
    path = Path(source)
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise ImageError("a folder, not an image file (and as a folder of images, either empty or not readable)")
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for its writer
        raise ImageError("a pipe, socket or device; only plain files are read")
    if not status.st_size:
        raise ImageError("an empty file")
    if status.st_size > MAX_FILE_BYTES:
        raise ImageError(f"a file of {status.st_size} bytes; at most {MAX_FILE_BYTES} are read")
    return path.open("rb")


def _from_pillow(image: PIL.Image.Image, max_pixels: int | None, notes: list[str]) -> Array:
    _check_size(*image.size, max_pixels)
    # To count frames, Pillow reads on in the file. It cannot if the file is closed, and the pixels may still be there.
    frames = getattr(image, "n_frames", 1) if getattr(image, "fp", None) else 1
    if frames > 1 and image.format != "PSD":  # the "frames" of PSD are layers; Pillow reads the merged picture
        place = image.tell() + 1
        notes.append(f"first of {frames} frames" if place == 1 else f"frame {place} of {frames}")
    _refuse_measurements(image)
    if _is_reduced_by_pillow(image):
        notes.append(DEEP)
    comes_upright = image.format == "TIFF" and _orientation(image, []) != 1  # Pillow turns these as it decodes them
    image.load()
    _check_size(*image.size, max_pixels)  # an icon may turn out larger than it says
    # After loading, as a PNG's EXIF may follow its pixels. Not by `ImageOps.exif_transpose`: it also writes the EXIF
    # again, and fails on an odd tag.
    orientation = _orientation(image, notes)
    if comes_upright or orientation != 1:
        notes.append("rotated as EXIF says")
    return _turn(_rgb(image, notes), orientation)


def _check_size(width: int, height: int, max_pixels: int | None) -> None:
    if max_pixels is not None and width * height > max_pixels:
        raise ImageError(
            f"{width}×{height} is more than {max_pixels} pixels; if it is meant to be so large, {ALLOW_MORE}"
        )


def _orientation(image: PIL.Image.Image, notes: list[str]) -> int:
    """Return the EXIF orientation, 1 to 8. Damaged EXIF does not make an image unreadable."""
    try:
        value = image.getexif().get(274, 1)
    except Exception:
        notes.append("EXIF data is damaged, so not rotated")
        return 1
    return value if value in range(1, 9) else 1


def _turn(pixels: Array, orientation: int) -> Array:
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in {2, 3, 6, 7}:
        pixels = pixels[:, ::-1]
    if orientation in {3, 4, 7, 8}:
        pixels = pixels[::-1]
    return pixels


def _tiles(image: PIL.Image.Image) -> Iterator[tuple[str, str, list[Any]]]:
    """Return the codec, the raw mode and other options of each part of a file that is not decoded yet."""
    for codec, *_, options in getattr(image, "tile", ()):
        raw_mode, *rest = options if isinstance(options, tuple) else (options,)
        yield codec, str(raw_mode), rest


def _refuse_measurements(image: PIL.Image.Image) -> None:
    """Raise ImageError for whole numbers of which nobody knows which one is white: of 32 bits, or with a sign."""
    tags = cast("Any", image).tag_v2 if image.format == "TIFF" and image.mode != "LAB" else {}
    signed = SIGNED in tags.get(SAMPLE_FORMAT, ())
    if signed or any(re.match(r"I;(32|16.?S)", raw_mode) for _, raw_mode, _ in _tiles(image)):
        kind = "signed" if signed else "32-bit"
        raise ImageError(f"{kind} whole numbers, whose white is not known; save it with 8 or 16 bits without a sign")


def _is_reduced_by_pillow(image: PIL.Image.Image) -> bool:
    """Return whether Pillow cuts 16-bit colour to its upper 8 bits; known for PNG, TIFF, SGI and PPM."""
    for codec, raw_mode, rest in _tiles(image):
        if codec.startswith("ppm"):
            return image.mode == "RGB" and rest[0] > 255  # the largest value of the file
        if re.fullmatch(r"(LA|RGB.?|CMYK);16[BLN]", raw_mode):
            return True
    return False


def _rgb(image: PIL.Image.Image, notes: list[str]) -> Array:
    mode = image.mode
    image = to_srgb(image, notes)
    if mode in {"F", "I"} or mode.startswith("I;16"):
        values = np.asarray(image)
        if image.format == "TIFF" and cast("Any", image).tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
            values = (1 if mode == "F" else 65535) - values  # Pillow sees to this for 8 bits only
        if mode == "F":
            return _from_array(values, None, notes)
        return _from_16_bit(values, image.info.get("transparency"), notes)
    if mode in MODE_NOTES:
        notes.append(MODE_NOTES[mode])
    elif mode not in PLAIN_MODES:
        notes.append(f"{mode} converted to RGB")
    if image.has_transparency_data:
        return _over_white(np.asarray(image.convert("RGBA")), notes)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _from_16_bit(values: Array, transparent: object, notes: list[str]) -> Array:
    """Return grey pixels; a PNG may name one value that is transparent."""
    if not 0 <= values.min() <= values.max() <= 65535:
        raise ImageError(f"values from {values.min()} to {values.max()}; expected 16-bit ones, 0 to 65535")
    pixels = _from_array(values.astype(np.uint16), None, notes)
    clear = values == transparent
    if np.any(clear):
        notes.append(BLENDED)
        pixels[clear] = 255
    return pixels


def _from_array(array: Array, max_pixels: int | None, notes: list[str]) -> Array:
    """Return RGB pixels that share no memory with the array."""
    channels = array.shape[2] if array.ndim == 3 else 1
    kind = array.dtype.name
    if array.ndim not in {2, 3} or channels not in {1, 3, 4} or not array.size or kind not in ARRAY_TYPES:
        raise ImageError(
            f"has shape {array.shape} and type {kind}; expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
            f"not empty, of type {', '.join(ARRAY_TYPES)}"
        )
    height, width = array.shape[:2]
    _check_size(width, height, max_pixels)
    if array.dtype.kind == "f":
        if not 0 <= array.min() <= array.max() <= 1:  # false for NaN too
            raise ImageError(
                f"floats from {array.min()} to {array.max()}; expected 0 to 1 (divide by 255, or use uint8)"
            )
        pixels = array.astype(np.float32)
    elif kind == "uint16":
        notes.append(DEEP)
        pixels = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)  # rounds to the nearest of 256 levels
    else:
        pixels = array.astype(np.uint8)
    if channels == 4:
        return _over_white(pixels, notes)
    if channels == 1:
        notes.append(GREY)
        pixels = np.repeat(pixels.reshape(height, width, 1), 3, axis=2)
    return pixels


def _over_white(rgba: Array, notes: list[str]) -> Array:
    is_float = rgba.dtype == np.float32
    # 255 · 255 + 127 fits into 16 bits. In place, as a copy of the largest image takes half a gigabyte.
    work, one = (np.float32, 1) if is_float else (np.uint16, 255)
    colour, alpha = rgba[..., :3], rgba[..., 3:].astype(work)
    if alpha.min() == one:
        return colour
    notes.append(BLENDED)
    blended: Array = colour.astype(work)
    blended *= alpha
    blended += (one - alpha) * one
    if is_float:
        return blended
    blended += 127
    blended //= 255
    return blended.astype(np.uint8)


def _upscale(pixels: Array, min_side: int, max_pixels: int | None, notes: list[str]) -> Array:
    """Enlarge an image whose short side is below `min_side`. Pillow's Lanczos uses integers: the same anywhere."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short >= min_side:
        return pixels
    wide, high = ((side * min_side + short // 2) // short for side in (width, height))
    if max_pixels is not None and wide * high > max_pixels:
        raise ImageError(
            f"{width}×{height} is too narrow: scaled until its short side has {min_side} pixels, it would be "
            f"{wide}×{high}, more than {max_pixels} pixels; crop it"
        )
    notes.append(f"upscaled from {width}×{height} to {wide}×{high}")
    return _resized(pixels, (wide, high), PIL.Image.Resampling.LANCZOS)


def _resized(pixels: Array, size: tuple[int, int], by: PIL.Image.Resampling) -> Array:
    if pixels.dtype == np.uint8:
        return np.asarray(PIL.Image.fromarray(np.ascontiguousarray(pixels)).resize(size, by))
    planes = (PIL.Image.fromarray(np.ascontiguousarray(pixels[..., c])).resize(size, by) for c in range(3))
    return np.stack([np.asarray(plane) for plane in planes], axis=2).clip(0, 1)  # Lanczos overshoots at edges


def _name(source: Source) -> str:
    if isinstance(source, str | os.PathLike):
        name = os.fsdecode(source)
        return name if name.isprintable() else repr(name)  # one line, and one that can be printed
    if isinstance(source, bytes):
        return "bytes"
    return "Pillow image" if isinstance(source, PIL.Image.Image) else type(source).__name__


def _reason(exc: Exception) -> str:
    """Return what went wrong and what to do, on one line."""
    text = one_line(str(exc)) or type(exc).__name__
    match exc:
        case ImageError():
            return str(exc)
        case FileNotFoundError() | NotADirectoryError():
            return "no such file"
        case PermissionError():
            return "may not be read; check its permissions"
        case OSError(strerror=str(reason)):
            return f"cannot be read: {reason}"
        case PIL.UnidentifiedImageError():
            return f"not an image, or of a kind that Pillow {PIL.__version__} does not read here: save it as PNG"
        case PIL.Image.DecompressionBombError():
            return f"{text} If it is meant to be so large, {ALLOW_MORE}"
        case MemoryError():
            return "not enough memory to decode it; make it smaller"
    return f"damaged, or not a kind that Pillow {PIL.__version__} decodes ({text}); save it again, as a PNG for example"
