"""A rated data set from photographs: windows, distorted in KADID-10k's 25 ways, rated by full-reference metrics.

The rating is the pseudo-score of `fullref.PseudoScale`: no person has looked at these pictures.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image

from ..engine.atomic import writing
from ..errors import ConfigError, DatasetError, OutputError
from .distortions import DISTORTIONS, LEVELS, distort
from .draws import Purpose, generator
from .fullref import METRICS, MS_SSIM_SIDE, fit_pseudo_scale, measure
from .outputs import make_folder, to_csv, write_file
from .pictures import Pictures, Pixels, detailed
from .splits import Split

LABELS, SPLIT, SCALE = "labels.csv", "split.json", "scale.json"
MOST_PICTURES = 10_000  # of one photograph
LONGEST_SIDE = 768  # of a photograph, in pixels: larger ones are reduced
TRIES = 8  # places of which a window takes the one with most detail


@dataclass(frozen=True)
class Amount:
    """How many windows are cut from each photograph, and how many distortions each window gets.

    By default the set has the undistorted window, and each of its distortions at all five levels. Over the photographs
    of a part all kinds come equally often. With `one_level` the set has each distortion at one level, which is drawn;
    "undistorted" is then one of the kinds. A network cannot compare versions of a window then: it must learn from the
    distortion itself.
    """

    windows: int
    distortions: int
    one_level: bool = False

    def __post_init__(self) -> None:
        """Refuse what would rate one distortion of one photograph in two windows: levels are compared within one."""
        most = MOST_PICTURES if self.one_level else len(DISTORTIONS)
        if self.windows < 1 or self.distortions < 1 or self.windows * self.distortions > most:
            raise ConfigError(
                f"{self.windows} windows with {self.distortions} distortions each: both must be at least 1, and "
                f"together at most {most} per photograph"
            )


@dataclass(frozen=True)
class _Row:
    image: str
    reference: str
    part: str
    distortion: str  # empty for the original
    level: str
    values: npt.NDArray[np.float64]


def rate_photographs(
    parts: Mapping[str, Sequence[Path]],
    folder: Path,
    *,
    amounts: Mapping[str, Amount],
    seed: int,
    side: int = 176,
    progress: Callable[[int], None] = lambda _done: None,
) -> int:
    """Write pictures (PNG), labels.csv, split.json and scale.json; return how many pictures there are.

    The pseudo-score is fitted on the part "train" alone.
    """
    if side < MS_SSIM_SIDE:
        raise ConfigError(f"windows must have at least {MS_SSIM_SIDE} pixels a side, which MS-SSIM needs; not {side}")
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"{folder} is not empty: give a new folder")
    names = [path.stem for paths in parts.values() for path in paths]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DatasetError(f"two photographs are called {twice[0]}, and pictures are named after them: rename one")
    rows: list[_Row] = []
    for part, paths in parts.items():
        pictures = Pictures(paths, folder / "cache", min_side=side, longest_side=LONGEST_SIDE)
        for index, path in enumerate(pictures.paths):
            rows += _of_photograph(pictures[index], path.stem, part, index, folder, amounts[part], seed, side)
            progress(len(rows))
    scale = fit_pseudo_scale(np.array([row.values for row in rows if row.part == "train"]))
    scores = scale.scores(np.array([row.values for row in rows]))
    table: list[list[str]] = [
        ["image", "score", "reference", "distortion", "level", *(metric.name for metric in METRICS)],
        *(
            [row.image, f"{score:.6f}", row.reference, row.distortion, row.level, *(f"{v:.6f}" for v in row.values)]
            for row, score in zip(rows, scores, strict=True)
        ),
    ]
    contents = {part: tuple(sorted({row.reference for row in rows if row.part == part})) for part in parts}
    write_file(folder / SCALE, scale.to_json())
    Split(Path(LABELS).stem, seed, contents).write(folder / SPLIT)
    write_file(folder / LABELS, to_csv(table))  # last: where it is, the set is whole
    return len(rows)


def _of_photograph(
    photo: Pixels, name: str, part: str, index: int, folder: Path, amount: Amount, seed: int, side: int
) -> list[_Row]:
    """Write the versions of all windows of a photograph.

    Random numbers depend on its name and size. At all levels, the kinds that it gets depend on its `index` too.
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    make_folder(folder / name)
    rows = []
    for window in range(amount.windows):
        pristine = _window(photo, side, generator(seed, Purpose.WINDOW, key, window))
        reference = pristine.astype(np.float32) / np.float32(255)
        for number, level in _cases(amount, index, window, seed, key):
            image = pristine
            if number:
                draw = generator(seed, Purpose.DISTORTION, key, window * 1000 + number * 10 + level)
                distorted = distort(reference, number, level, draw)
                image = np.rint(distorted * 255).astype(np.uint8)
            path = f"{name}/{window}-{f'{number:02d}-{level}' if number else 'original'}.png"
            _save(folder / path, image)
            kind = DISTORTIONS[number].name if number else ""
            values = measure(reference, image.astype(np.float32) / np.float32(255))
            rows.append(_Row(path, name, part, kind, str(level or ""), values))
    return rows


def _cases(amount: Amount, index: int, window: int, seed: int, key: int) -> list[tuple[int, int]]:
    """Return distortion and level of each version of a window; (0, 0) is the original."""
    places = range(window * amount.distortions, (window + 1) * amount.distortions)
    if not amount.one_level:
        # Dealt round, because drawing for each photograph leaves some kinds out of a test part of 58.
        order = generator(seed, Purpose.KINDS, 0).permutation(list(DISTORTIONS))
        first = index * amount.windows * amount.distortions
        return [(0, 0)] + [(int(order[(first + place) % len(order)]), level) for place in places for level in LEVELS]
    cases = []
    for place in places:
        # All kinds come once before any comes again.
        turn, position = divmod(place, len(DISTORTIONS) + 1)
        number = int(generator(seed, Purpose.KINDS, key, turn).permutation([0, *DISTORTIONS])[position])
        level = int(generator(seed, Purpose.LEVEL, key, place).choice(LEVELS)) if number else 0
        cases.append((number, level))
    return cases


def _window(photo: Pixels, side: int, draw: np.random.Generator) -> Pixels:
    """Draw a few windows and return the one with most detail: an empty sky shows no distortion."""
    windows = []
    for _ in range(TRIES):
        top, left = (int(draw.integers(length - side + 1)) for length in photo.shape[:2])
        windows.append(np.ascontiguousarray(photo[top : top + side, left : left + side]))
    return max(windows, key=detailed)


def _save(path: Path, image: npt.NDArray[np.uint8]) -> None:
    with writing(path) as stream:
        PIL.Image.fromarray(image).save(stream, "PNG")
