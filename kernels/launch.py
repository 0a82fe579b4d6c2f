"""What to launch: kernel, grid and arguments as plain data, and the tables the kernels read. Needs no GPU.

Addresses are device addresses in bytes; the caller owns the memory and keeps it alive until the launch (or the graph it
is captured in) is over. Images are (…, 3, height, width), C-contiguous, at addresses that are multiples of 16.
"""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.pixels import TapForm

# The structs of sampler.cu and images.cu.
WINDOW = np.dtype(
    [(name, "<u4") for name in ("key_low", "key_high", "lane")]
    + [(name, "<i4") for name in ("height", "width", "top", "left", "unused")]
)
COEFFICIENTS = ("noise_level", "y_to_x0", "noise_to_x0", "x0_to_mean", "y_to_mean", "sigma")
STEP = np.dtype([(name, "<f4") for name in COEFFICIENTS] + [("tap", "<i4"), ("counter", "<i4")])
PROGRESS = np.dtype([("step", "<i4"), ("ticket", "<u4")])
SOURCE = np.dtype([("address", "<u8"), ("is_half", "<i4"), ("form", "<i4")])
CROP = np.dtype([(name, "<i4") for name in ("image", "top", "left", "unused")])

Table = npt.NDArray[Any]

_FORMS = tuple(TapForm)  # images.cu numbers them

_BLOCK = 256
# Enough blocks along x to fill any GPU with a single plane; in larger planes every thread does several quads. The limit
# of y is CUDA's. The loops in the kernels cover whatever the grid does not.
_MAX_GRID = 1024, 65535
_ALIGNMENT = 16  # bytes a thread loads at once


class Storage(enum.StrEnum):
    """How pixels are kept in memory on the networks' side."""

    F32 = "f32"
    F16 = "f16"

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy type of one element."""
        return np.dtype(np.float32 if self is Storage.F32 else np.float16)


@dataclass(frozen=True)
class Launch:
    """One kernel launch. Blocks are one-dimensional; an argument's NumPy type is the kernel parameter's."""

    source: str
    kernel: str
    grid: tuple[int, int]
    block: int
    arguments: tuple[np.generic, ...]


@dataclass(frozen=True)
class Window:
    """Where one image of a batch gets its noise: `seed`, and its place in a padded image of `size` (height, width)."""

    seed: int
    size: tuple[int, int]
    top: int = 0
    left: int = 0
    lane: int = 0


@dataclass(frozen=True)
class SamplerBuffers:
    """The device memory of one loop over a `batch` of states of P `planes` of `height`×`width`.

    `state` (N,P,H,W) float32 · `y`, `noise` (N,P,H,W) `storage`: the network's input and output · `noise_level` (N,1)
    float32 · `taps` (slots,N,P,H,W) float32, 0 if no step is tapped · `windows` N × WINDOW · `table` `steps` × STEP ·
    `progress` one PROGRESS · `given` (N,P,H,W) and its `share` (N,1) `storage`: what the loop starts from beside noise,
    0 if nothing. Without a `share`, `shares` are those of `given` and of noise. With float32 storage, `y` may be
    `state`. `start` is the counter of the first noise. `silent` rows leave the state alone.
    """

    storage: Storage
    batch: int
    height: int
    width: int
    steps: int
    start: int
    state: int
    y: int
    noise: int
    noise_level: int
    taps: int
    windows: int
    table: int
    progress: int
    given: int = 0
    share: int = 0
    shares: tuple[float, float] = (0.0, 1.0)
    planes: int = 3
    silent: int = 0
    clip: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for what the kernels do not check."""
        _check_size("sampler", self.batch, self.height, self.width)
        for name in ("state", "y", "noise", "taps", "windows", "table", "given"):
            _check_address(name, getattr(self, name))
        if self.y == self.state and self.storage is not Storage.F32:
            raise ValueError("y and state can share memory only if both are float32")

    def begin(self) -> Launch:
        """Fill `state` and `y` with what the loop starts from, and make the last row the next one to do."""
        addresses = (self.state, self.y, self.noise_level, self.windows, self.table, self.progress)
        return self._launch(
            "noise_init", (*addresses, self.given, self.share), np.int32(self.start), *map(np.float32, self.shares)
        )

    def step(self) -> Launch:
        """Advance `state` and `y` past the current row, copy a tap, and move on `progress` and `noise_level`.

        The same launch serves every row. After the last one it changes nothing any more.
        """
        addresses = (self.state, self.y, self.noise, self.noise_level, self.taps, self.windows, self.table)
        limit = np.float32(1 if self.clip else np.inf)
        return self._launch("sampler_step", (*addresses, self.progress), np.int32(self.silent), limit)

    def _launch(self, kernel: str, addresses: Sequence[int], *more: np.generic) -> Launch:
        sizes = self.batch, self.planes, self.height, self.width, self.steps
        return Launch(
            "sampler.cu",
            f"{kernel}_{self.storage}",
            _grid(self.height * self.width // 4, self.planes * self.batch),
            _BLOCK,
            (*map(np.uint64, addresses), *map(np.int32, sizes), *more),
        )


def normalise_pad(
    image: int, size: tuple[int, int], row_bytes: int, plane: int, padded: tuple[int, int], storage: Storage
) -> Launch:
    """8-bit RGB pixels to [-1, 1], padded by reflection at the right and bottom.

    `image` (height, width, 3), any alignment, rows `row_bytes` apart → `plane` (3, *`padded`) of `storage`.
    """
    _check_size("padded image", 1, *padded)
    _check_address("plane", plane)
    height, width = size
    if not (0 < height <= padded[0] and 0 < width <= padded[1]):
        raise ValueError(f"an image of {width}×{height} does not fit a plane of {padded[1]}×{padded[0]}")
    if abs(row_bytes) < 3 * width:  # a negative pitch is an image stored bottom up
        raise ValueError(f"rows of {width} pixels cannot be {row_bytes} bytes apart")
    return Launch(
        "images.cu",
        f"normalise_pad_{storage}",
        _grid(padded[0] * padded[1] // 4, 1),
        _BLOCK,
        (
            np.uint64(image),
            np.uint64(plane),
            np.int32(height),
            np.int32(width),
            np.int64(row_bytes),
            *map(np.int32, padded),
        ),
    )


def gather_crops(
    sources: int,
    kinds: int,
    size: tuple[int, int],
    crops: int,
    count: int,
    out: int,
    crop_size: tuple[int, int],
    storage: Storage,
) -> Launch:
    """Cut `count` crops at the same places out of `kinds` kinds of images.

    `sources` `kinds` × SOURCE, images (…, 3, *`size`); `crops` `count` × CROP → `out` (count, kinds, 3, *`crop_size`)
    of `storage`.
    """
    _check_size("source image", kinds, *size)
    _check_size("crop", count, *crop_size)
    for name, address in (("sources", sources), ("crops", crops), ("out", out)):
        _check_address(name, address)
    return Launch(
        "images.cu",
        f"gather_crops_{storage}",
        _grid(crop_size[0] * crop_size[1] // 4, 3 * kinds * count),
        _BLOCK,
        (*map(np.uint64, (sources, crops, out)), *map(np.int32, (count, kinds, *size, *crop_size))),
    )


def step_table(
    coefficients: Mapping[str, npt.NDArray[np.float32]], taps: Sequence[int], counters: Sequence[int]
) -> Table:
    """Return the sampling table: a row adds the noise of its counter; the result of row `taps[slot]` goes there."""
    table = np.zeros(len(counters), STEP)
    for name in COEFFICIENTS:
        table[name] = coefficients[name]
    if len(set(taps)) != len(taps) or not all(0 <= row < len(table) for row in taps):
        raise ValueError(f"taps are different rows from 0 to {len(table) - 1}, not {list(taps)}")
    table["counter"] = counters
    table["tap"] = -1
    table["tap"][list(taps)] = range(len(taps))
    return table


def window_table(windows: Sequence[Window], size: tuple[int, int]) -> Table:
    """Return the noise windows of a batch whose images, or states of one plane, are `size` (height, width)."""
    rows = []
    for window in windows:
        height, width = window.size
        if not (0 <= window.seed < 2**64 and 0 <= window.lane < 2**32):
            raise ValueError(f"seed {window.seed} or lane {window.lane} is not of 64 or 32 bits")
        if width % 4 or window.left % 4:
            raise ValueError(f"noise windows are aligned to 4 pixels: image {window.size}, left {window.left}")
        if 3 * height * width // 4 >= 2**32:
            raise ValueError(f"an image of {width}×{height} has more elements than the noise counter can number")
        if not (0 <= window.top <= height - size[0] and 0 <= window.left <= width - size[1]):
            raise ValueError(f"a window of {size} at ({window.top}, {window.left}) leaves its image of {window.size}")
        key = window.seed & 0xFFFFFFFF, window.seed >> 32
        rows.append((*key, window.lane, height, width, window.top, window.left, 0))
    return np.array(rows, WINDOW)


def source_table(sources: Sequence[tuple[int, Storage]], form: TapForm = TapForm.FLOAT) -> Table:
    """Return the sources of `gather_crops`: for every kind the address of its images and how they are stored.

    All but the first are restorations: `gather_crops` gives them the `form`.
    """
    for address, _ in sources:
        _check_address("source", address)
    table = np.array([(address, storage is Storage.F16, 0) for address, storage in sources], SOURCE)
    table["form"][1:] = _FORMS.index(form)
    return table


def crop_table(
    crops: Sequence[tuple[int, int, int]], images: int, size: tuple[int, int], crop_size: tuple[int, int]
) -> Table:
    """Return the crops of `gather_crops`: (image index, top, left) each, all inside `images` images of `size`."""
    for image, top, left in crops:
        if not 0 <= image < images:
            raise ValueError(f"a crop of image {image} of {images}")
        if not (0 <= top <= size[0] - crop_size[0] and 0 <= left <= size[1] - crop_size[1]):
            raise ValueError(f"a crop of {crop_size} at ({top}, {left}) of image {image} leaves its image of {size}")
    return np.array([(*crop, 0) for crop in crops], CROP)


def _grid(quads: int, planes: int) -> tuple[int, int]:
    return min(-(-quads // _BLOCK), _MAX_GRID[0]), min(planes, _MAX_GRID[1])


def _check_size(what: str, count: int, height: int, width: int) -> None:
    if min(count, height, width) < 1 or width % 4 or height * width >= 2**31:
        raise ValueError(f"{what}: {count} × {width}×{height} pixels; widths are multiples of 4, a plane is below 2³¹")


def _check_address(name: str, address: int) -> None:
    if address % _ALIGNMENT:
        raise ValueError(f"{name} is at address {address:#x}, which is not a multiple of {_ALIGNMENT}")
