"""What a case scores: images of one size, and how."""

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import PIL.Image

from ..engine.manifest import Manifest, StageName
from ..engine.sampling import choose_sampling
from ..engine.schedule import Taps
from ..errors import ImageError, UsageError
from ..runtime.images import read_for, synthetic
from ..runtime.results import Options

Size = tuple[int, int]  # height, width

# Batches, or images alone, in a row in an end-to-end sample on a GPU: one is decoded while another is computed, and the
# first, which nothing hides, weighs little.
_GROUPS = 4


@dataclass(frozen=True)
class Workload:
    """Images of one size, and how they are scored."""

    images: tuple[Path, ...]
    height: int
    width: int
    crops: int
    steps: int
    workers: int
    seed: int
    batch: int = 1  # images that are restored together, on a GPU
    fast: bool = False  # `steps` are those of the engine's fast sampling

    @property
    def options(self) -> Options:
        """The options of every score."""
        return Options(crops=self.crops, seed=self.seed, fast=self.fast)


@dataclass(frozen=True)
class Images:
    """Image files by the size at which they are scored, and why others are left out."""

    by_size: dict[Size, list[Path]]
    left_out: tuple[str, ...] = ()


def generate(folder: Path, sizes: Sequence[Size], count: int, seed: int) -> Images:
    """Write `count` pictures of every size as PNG; the same seed gives the same pictures."""
    by_size: dict[Size, list[Path]] = {}
    for height, width in sizes:
        names = [folder / f"{width}x{height}-{index}.png" for index in range(count)]
        for index, name in enumerate(names):
            PIL.Image.fromarray(synthetic((seed, height, width, index), height, width)).save(name)
        by_size[height, width] = names
    return Images(by_size)


def sort_by_size(paths: Sequence[Path], manifest: Manifest) -> Images:
    """Read every image once. Raises UsageError if none can be read."""
    by_size: defaultdict[Size, list[Path]] = defaultdict(list)
    left_out = []
    for path in paths:
        try:
            height, width = read_for(path, manifest).size
            by_size[height, width].append(path)
        except ImageError as exc:
            left_out.append(str(exc))
    if not by_size:
        raise UsageError(f"no image can be measured: {left_out[0] if left_out else 'none was given'}")
    return Images(dict(by_size), tuple(left_out))


def in_batches(paths: Sequence[Path], batch: int) -> tuple[Path, ...]:
    """Return the images, repeated until they fill whole batches, and enough of them for a sample on a GPU."""
    batches = max(_GROUPS, -(-len(paths) // batch))
    return tuple(itertools.islice(itertools.cycle(paths), batches * batch))


def with_steps(manifest: Manifest, steps: int) -> Manifest:
    """Return the manifest with another number of sampling steps, and its taps at the same share of them.

    That is another function with other scores. Only its speed is asked for.
    """
    if steps == manifest.schedule.steps:
        return manifest
    if linear := manifest.schedule.linear:
        taken = choose_sampling(manifest.schedule, manifest.taps, manifest.kinds, steps, None).steps
        fewer = tuple(linear.timesteps[len(linear.timesteps) - 1 - step] for step in reversed(taken))
        return replace(
            manifest, schedule=replace(manifest.schedule, steps=steps, linear=replace(linear, timesteps=fewer))
        )
    share = steps / manifest.schedule.steps
    taps = Taps(manifest.taps.y0, *(max(1, round(tap * share)) for tap in (manifest.taps.t1, manifest.taps.t2)))
    if StageName.UNET not in [stage.name for stage in manifest.stages]:
        raise UsageError("this engine restores nothing, so it has no steps to choose")
    if not 2 <= steps <= 4000 or len({taps.y0, taps.t1, taps.t2}) < 3 or max(taps.t1, taps.t2) >= steps:
        raise UsageError(f"{steps} steps are too few, or too many, for the taps of this engine")
    return replace(manifest, schedule=replace(manifest.schedule, steps=steps), taps=taps)
