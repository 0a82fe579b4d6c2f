"""What is computed for an image, as plain data: which windows are restored, how they blend, which crops are scored.

The executors of host and GPU carry out the same plan. Modes and tiles are decided here, and only here.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..engine.crops import Crop, padded_size, place_crops
from ..engine.manifest import Manifest
from ..engine.pixels import ImageForm
from ..engine.sampling import Sampling, choose_sampling
from ..errors import UsageError
from .results import PIXEL_BUDGET, Mode, Options

TILE = 512  # side of a tile, pixels
OVERLAP = 64  # least overlap of neighbouring tiles, pixels
TILE_STEP = 16  # tiles start at multiples of this: aligned for every U-Net, and to whole noise blocks


@dataclass(frozen=True)
class Window:
    """A part of the padded image that is restored in one go."""

    top: int
    left: int
    height: int
    width: int
    lane: int = 0  # windows of different lanes have different noise


@dataclass(frozen=True)
class Plan:
    """All that is done to one image of `height`×`width` for one seed."""

    mode: Mode  # as carried out
    height: int
    width: int
    padded: tuple[int, int]  # what the image is padded to, by reflection at the bottom and right
    noise_size: tuple[int, int]  # of the image in which noise has its coordinates: the padded one, or a crop
    windows: tuple[Window, ...]
    crops: tuple[Crop, ...]
    crop_size: int
    sampling: Sampling
    squashed: bool = False  # the one crop is the whole image: restored, and then scaled to the crop's size

    @property
    def cut(self) -> tuple[int, int]:
        """The size (height, width) of what is cut out of the image and its restorations."""
        return (self.height, self.width) if self.squashed else (self.crop_size, self.crop_size)

    def noise_origin(self, window: Window) -> tuple[int, int]:
        """Return where a window lies in the noise image."""
        return (0, 0) if self.mode is Mode.CROP else (window.top, window.left)

    def readers(self, window: Window) -> list[int]:
        """Return the indices of the crops that read pixels of a window."""
        if self.mode is Mode.CROP:
            return [self.windows.index(window)]
        height, width = self.cut
        return [
            index
            for index, crop in enumerate(self.crops)
            if crop.top < window.top + window.height
            and window.top < crop.top + height
            and crop.left < window.left + window.width
            and window.left < crop.left + width
        ]

    def blend_weight(self, window: Window) -> npt.NDArray[np.float32] | None:
        """Return the (height, width) weights of a window, to be normalised; None if it overlaps no other."""
        if self.mode is not Mode.TILE:
            return None
        rows = _ramp(window.top, window.height, self.padded[0])
        columns = _ramp(window.left, window.width, self.padded[1])
        return rows[:, None] * columns


def make_plan(height: int, width: int, manifest: Manifest, options: Options) -> Plan:
    """Decide mode, windows and crops for an image that `read_for` has prepared for this engine."""
    size, mode = manifest.crop.size, options.mode
    squashed = manifest.image_form is ImageForm.SQUASHED and (height, width) != (size, size)
    count = options.crops or manifest.crop.count
    if squashed:
        mode = Mode.WHOLE if mode is Mode.CROP else mode  # the one crop is the whole image
        crops: tuple[Crop, ...] = (Crop(0, 0),)
    else:
        crops = place_crops(manifest.crop.places, height, width, size, count, options.seed)
    padded = padded_size(height, width, manifest.alignment)
    sampling = sampling_of(manifest, options)
    if mode is Mode.WHOLE and padded[0] * padded[1] > options.pixel_budget:
        mode = Mode.TILE
    if mode is Mode.CROP:
        windows = tuple(Window(c.top, c.left, size, size, lane) for lane, c in enumerate(crops))
        return Plan(mode, height, width, (height, width), (size, size), windows, crops, size, sampling)
    whole = (Window(0, 0, *padded),)
    plan = Plan(mode, height, width, padded, padded, whole, crops, size, sampling, squashed)
    if mode is Mode.TILE:
        tops, tile_height = _tile_offsets(padded[0])
        lefts, tile_width = _tile_offsets(padded[1])
        tiles = (Window(top, left, tile_height, tile_width) for top in tops for left in lefts)
        # Tiles that no crop reads are not restored: a score costs what its crops cost, not the whole image.
        windows = tuple(tile for tile in tiles if plan.readers(tile))
        plan = replace(plan, windows=windows)
    return plan


def by_crops(manifest: Manifest) -> Mode:
    """Return the mode in which each crop is by itself. An engine that restores no images has no other."""
    return Mode.WHOLE if manifest.flow.loop.result else Mode.CROP


def sampling_of(manifest: Manifest, options: Options) -> Sampling:
    """Return the steps that options ask of an engine. Raises UsageError for options that mean nothing to it."""
    if manifest.flow.loop.result and (options.mode, options.pixel_budget) != (Mode.WHOLE, PIXEL_BUDGET):
        raise UsageError("this engine restores no images, so there are none to tile: leave out mode and pixel budget")
    if not options.fast:
        return choose_sampling(manifest.schedule, manifest.taps, manifest.kinds, options.steps, options.sampler)
    if manifest.fast is None:
        raise UsageError(
            "this engine has no fast sampling yet; make one with: iqa-calibrate --engine DIR --calib IMAGES --steps "
            "2..10"
        )
    return manifest.fast.sampling


def _tile_offsets(length: int) -> tuple[list[int], int]:
    """Return where tiles start along an axis, and their length."""
    if length <= TILE:
        return [0], length
    count = -(-(length - OVERLAP) // (TILE - OVERLAP))
    last = length - TILE
    # The last tile ends at the border. The others round down to the grid, which only makes overlaps wider.
    return [last * i // (count - 1) // TILE_STEP * TILE_STEP for i in range(count - 1)] + [last], TILE


def _ramp(start: int, length: int, total: int) -> npt.NDArray[np.float32]:
    """Return weights that fall off towards window edges inside the image, and stay 1 towards its borders."""
    ramp = np.minimum(np.arange(length, dtype=np.float32) + 0.5, OVERLAP) / OVERLAP
    weights = np.ones(length, np.float32)
    if start > 0:
        weights = np.minimum(weights, ramp)
    if start + length < total:
        weights = np.minimum(weights, ramp[::-1])
    return weights
