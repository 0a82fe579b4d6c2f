"""Pictures decoded once into files of plain pixels, of which crops are then read."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image

from ..engine.atomic import writing
from ..errors import DatasetError, ImageError
from ..runtime.images import read_image
from .outputs import make_folder

Pixels = npt.NDArray[np.uint8]  # (H, W, 3), RGB

# A block of 8×8 pixels has detail if its luma leaves its best plane by more than this (of 255), at this longest side.
DETAIL, DETAIL_SIDE = 3.0, 1024

SCHEMA = 1  # of the cache: raised when the same file would give other pixels


class Pictures:
    """Pictures by index, as memory-mapped pixels. Files that cannot be used are left out, and `skipped` says why.

    Runs and processes may share the folder `cache`: a file there is named by the hash of what it was made from.

    A picture whose short side is below `min_side` is left out. With `enlarge` it is enlarged instead, as scoring does.
    A picture whose long side is above `longest_side` is reduced. A picture larger than `window` is cut to its middle.
    Raises DatasetError if no picture is left.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        cache: Path,
        *,
        min_side: int,
        enlarge: bool = False,
        longest_side: int = 0,
        window: int = 0,
    ) -> None:
        self._cache, self._min_side, self._enlarge, self._longest_side = cache, min_side, enlarge, longest_side
        self._window = window
        self.skipped: list[str] = []
        self.paths: list[Path] = []
        self.files: list[Path] = []  # the cached pixels of each
        make_folder(cache)
        for path in paths:
            try:
                self.files.append(self._stored(path))
                self.paths.append(path)
            except ImageError as exc:
                self.skipped.append(str(exc))
        if not self.paths:
            why = f": {self.skipped[0]}" if self.skipped else ""
            raise DatasetError(f"none of {len(paths)} pictures can be used{why}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Pixels:
        pixels: Pixels = np.load(self.files[index], mmap_mode="r")
        return pixels

    def fingerprint(self) -> str:
        """Return a digest of all pictures in their order."""
        return hashlib.sha256("\n".join(file.name for file in self.files).encode()).hexdigest()

    def _stored(self, path: Path) -> Path:
        """Return the file of a picture's pixels, written now if nobody has before."""
        try:
            data = path.read_bytes()
        except OSError as exc:
            raise ImageError(f"{path}: {exc.strerror or exc}") from exc
        made_of = f"{SCHEMA} {self._min_side} {self._enlarge} {self._longest_side} {hashlib.sha256(data).hexdigest()}"
        made_of += f" {self._window}" if self._window else ""
        file = self._cache / f"{hashlib.sha256(made_of.encode()).hexdigest()}.npy"
        if not file.exists():
            pixels = self._decoded(path)
            with writing(file) as stream:
                np.save(stream, pixels)
        return file

    def _decoded(self, path: Path) -> Pixels:
        pixels = read_pixels(path, min_side=self._min_side if self._enlarge else 1)
        if self._longest_side:
            pixels = reduced(pixels, self._longest_side)
        if min(pixels.shape[:2]) < self._min_side:
            width, height = pixels.shape[1], pixels.shape[0]
            raise ImageError(f"{path}: {width}×{height} is smaller than a crop of {self._min_side}×{self._min_side}")
        if self._window:
            top, left = (max(0, length - self._window) // 2 for length in pixels.shape[:2])
            pixels = pixels[top : top + self._window, left : left + self._window]
        return pixels


def read_pixels(source: Path | bytes, *, min_side: int = 1) -> Pixels:
    """Return a picture as the runtime reads it, on 8-bit values. Raises ImageError."""
    image = read_image(source, min_side=min_side).pixels
    scale = 1 if image.dtype == np.uint8 else 255
    pixels: Pixels = np.rint(image * np.float32(scale)).astype(np.uint8)
    return pixels


def reduced(pixels: Pixels, longest_side: int) -> Pixels:
    """Return a picture scaled down to this side, or as it is if it is no larger."""
    height, width = pixels.shape[:2]
    if max(height, width) <= longest_side:
        return pixels
    scale = longest_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(PIL.Image.fromarray(pixels).resize(size, PIL.Image.Resampling.LANCZOS))


def detailed(pixels: npt.NDArray[np.uint8]) -> float:
    """Return the share of blocks with detail. It is near 0 for flat drawings, gradients and blurred pictures."""
    picture = PIL.Image.fromarray(reduced(pixels, DETAIL_SIDE))
    luma = np.asarray(picture.convert("L"), np.float64)
    rows, columns = luma.shape[0] // 8, luma.shape[1] // 8
    if not rows or not columns:
        return 0.0
    blocks = luma[: rows * 8, : columns * 8].reshape(rows, 8, columns, 8).transpose(0, 2, 1, 3).reshape(-1, 64)
    y, x = np.mgrid[:8, :8].reshape(2, 64)
    plane, _ = np.linalg.qr(np.stack([np.ones(64), x, y], axis=1))
    return float(np.mean((blocks - blocks @ plane @ plane.T).std(axis=1) > DETAIL))
