"""What the frozen blocks of EfficientNet-Lite see of pictures and damaged pictures: computed once, kept on disk."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.distortions import distort
from ..data.draws import Purpose, generator
from ..data.outputs import make_folder
from ..data.pictures import read_pixels
from ..engine.atomic import writing
from ..engine.crops import crop_grid
from ..engine.pixels import FloatArray, to_plane
from ..errors import DatasetError, ImageError
from ..model.lite import Lite, Variant, moments
from ..model.pfd.config import PfdConfig
from ..model.pfd.encoder import LiteEncoder
from .config import digest
from .score import Rated
from .start import weights_digest

SCHEMA = 1  # of files: raised when the same causes would give other numbers
FROZEN = 3  # maps, of those that are read, which frozen blocks make: strides 4, 8, 16

Seen = npt.NDArray[np.float16]


@dataclass(frozen=True)
class Picture(Rated):
    """A picture to learn from, as it is or damaged here; the quality is that of the picture as it is."""

    kind: int = 0  # one of the 25 distortions; 0: as it is
    level: int = 0

    @property
    def name(self) -> str:
        """What it is in words."""
        return f"{self.path}, distortion {self.kind} at level {self.level}" if self.kind else str(self.path)


def learning(encoder: LiteEncoder) -> list[nn.Module]:
    """Return the parts of the encoder's network that come after the frozen ones."""
    lite = encoder.lite
    return [*lite._blocks[lite.variant.read[FROZEN - 1] + 1 :], lite._conv_head, lite._bn1]


def finished(encoder: LiteEncoder, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Go on from rows (N, row_width) through the last blocks: the moments of all maps, and all maps on the grid."""
    variant = encoder.lite.variant
    channels, grid = variant.channels[:FROZEN], _grid(rows.shape[1], variant)
    # The moments of the maps that frozen blocks make come first.
    own, places = rows[:, : 2 * sum(channels)], rows[:, variant.features :]
    at_grid = places.reshape(-1, sum(channels), grid, grid)
    *blocks, head, norm = learning(encoder)
    x = at_grid[:, -channels[-1] :].contiguous(memory_format=torch.channels_last)  # a CPU takes less time
    for block in blocks:
        x = block(x)
    coarse = F.interpolate(x, scale_factor=2, mode="nearest")
    return torch.cat([own, moments([x, F.relu6(norm(head(x)))])], dim=1), torch.cat([at_grid, coarse], dim=1)


def _grid(row_width: int, variant: Variant) -> int:
    """Return the places along a side of the maps in a row."""
    return math.isqrt((row_width - variant.features) // sum(variant.channels[:FROZEN]))


def turned(rows: Seen, variant: Variant, draw: np.random.Generator) -> npt.NDArray[np.float32]:
    """Return rows in float32, each mirrored by lot. Of a mirrored crop frozen blocks would see nearly that."""
    out = rows.astype(np.float32)
    places = out[:, variant.features :].reshape(len(out), -1, _grid(out.shape[1], variant))
    mirrored = draw.integers(2, size=len(out)).astype(bool)
    places[mirrored] = places[mirrored, :, ::-1]
    return out


def encoded(encoder: LiteEncoder, seen: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return what the encoder makes of what it has `finished`: class vectors and features."""
    of_maps, maps = seen
    return encoder.readout(of_maps), encoder.norm(encoder.project(maps))


class SeenPictures:
    """The rows of each picture's crops, (crops, row_width) float16. A file's name is a hash of its causes."""

    def __init__(self, lite: Lite, config: PfdConfig, cache: Path, *, crops: int, seed: int) -> None:
        self._lite, self._config, self._cache, self._crops, self._seed = lite, config, cache, crops, seed
        self._weights = weights_digest(lite.state_dict())
        self._files: dict[Picture, Path] = {}

    def __call__(self, picture: Picture) -> Seen:
        """Return the rows of a picture, which `fill` has computed."""
        rows: Seen = np.load(self.file(picture), mmap_mode="r")
        return rows

    def file(self, picture: Picture) -> Path:
        """Return where the rows of a picture are, or will be. Raises DatasetError."""
        if picture not in self._files:
            try:
                pixels = hashlib.sha256(picture.path.read_bytes()).hexdigest()
            except OSError as exc:
                raise DatasetError(f"{picture.path} cannot be read: {exc.strerror}") from exc
            causes = {"schema": SCHEMA, "picture": pixels, "encoder": self._weights, "crop": self._config.crop}
            causes |= {"crops": self._crops, "damage": [picture.kind, picture.level, self._seed] * bool(picture.kind)}
            self._files[picture] = self._cache / f"{digest(causes)}.npy"
        return self._files[picture]

    def fill(self, pictures: Sequence[Picture], say: Callable[[str], None]) -> list[Picture]:
        """Compute what is missing or damaged; return the pictures that can be read, and name those that cannot."""
        make_folder(self._cache)
        missing = [picture for picture in pictures if not self._kept(picture, say)]
        bad = set()
        for count, picture in enumerate(missing):
            try:
                rows = look(self._lite, self.crops(picture)).astype(np.float16)
            except ImageError as exc:
                say(f"left out: {exc}")
                bad.add(picture)
                continue
            with writing(self.file(picture)) as stream:
                np.save(stream, rows)
            if (count + 1) % 100 == 0:
                say(f"looked at {count + 1} of {len(missing)}")
        return [picture for picture in pictures if picture not in bad]

    def _kept(self, picture: Picture, say: Callable[[str], None]) -> bool:
        try:
            self(picture)
        except FileNotFoundError:
            return False
        except (ValueError, EOFError) as exc:  # cut off, as by a full disk where the cache was copied to
            say(f"{self.file(picture)} is damaged, and is made anew: {exc}")
            return False
        return True

    def crops(self, picture: Picture) -> FloatArray:
        """Return the crops that scoring looks at, (crops, 3, crop, crop)."""
        size = self._config.crop
        pixels: npt.NDArray[np.generic] = read_pixels(picture.path, min_side=size)
        if picture.kind:
            draw = generator(self._seed, Purpose.DISTORTION, picture.kind, picture.level)
            pixels = distort(pixels.astype(np.float32) / np.float32(255), picture.kind, picture.level, draw)
            pixels = np.rint(pixels * np.float32(255)).astype(np.uint8)
        height, width, _ = pixels.shape
        places = crop_grid(height, width, size, self._crops)
        return np.stack([to_plane(pixels[c.top : c.top + size, c.left : c.left + size]) for c in places])


@torch.no_grad()
def look(lite: Lite, crops: FloatArray) -> FloatArray:
    """Crops (N, 3, crop, crop) → rows (N, row_width)."""
    stride4, stride8, stride16, _, _ = maps = lite.maps(
        torch.from_numpy(crops).contiguous(memory_format=torch.channels_last)  # a CPU takes less time
    )
    kept = (F.avg_pool2d(stride4, 4), F.avg_pool2d(stride8, 2), stride16)
    rows: FloatArray = torch.cat([moments(maps), *(part.flatten(1) for part in kept)], dim=1).numpy()
    return rows
