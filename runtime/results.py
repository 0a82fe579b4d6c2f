"""What scoring an image returns, and its options: plain data, without engine or files."""

import enum
import operator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..engine.noise import MAX_SEED
from ..engine.sampling import parse_sampler
from ..engine.schedule import Kind
from ..errors import UsageError

Picture = npt.NDArray[np.uint8]
Probabilities = dict[str, dict[str, float]]  # of words, by what they are about; those of one thing sum to 1

# Attention at an eighth of the image's size takes memory with the square of its pixels: 0.7 GB at 720×720, 2.7 GB at
# 1024×1024, whatever the width of the network.
PIXEL_BUDGET = 2**19


WORDS_EXPLAINED = (
    "Looks like: of each kind the word that fits best, with its probability, the mean over crops. It says how well an "
    "image matches this word rather than the others. It does not say how strong a distortion is, and probabilities of "
    "one kind add up to 1 even where no word fits."
)


def words_text(probabilities: Probabilities | None) -> str:
    """Return the most probable word of each kind, as in `blur 0.62, poor 0.41`."""
    kinds = (probabilities or {}).values()
    return ", ".join(f"{word} {kind[word]:.2f}" for kind in kinds for word in [max(kind, key=lambda w: kind[w])])


class Mode(enum.StrEnum):
    """How an image is restored."""

    WHOLE = "whole"  # at once; above the pixel budget in overlapping tiles
    TILE = "tile"  # in overlapping tiles that see the noise of the whole image
    CROP = "crop"  # each crop by itself


@dataclass(frozen=True)
class Options:
    """What a score depends on, apart from pixels and engine."""

    crops: int | None = None  # None: the engine's own count
    seed: int = 0
    seeds: int = 1  # how many consecutive seeds are averaged
    mode: Mode = Mode.WHOLE  # or its text
    pixel_budget: int = PIXEL_BUDGET  # whole images above it are tiled
    steps: int | None = None  # None: all that the engine was trained with
    sampler: str | None = None  # ancestral, as trained; ddim; ddim:ETA; image+ before one
    fast: bool = False  # the steps and the correction that iqa-calibrate --steps gave the engine

    def __post_init__(self) -> None:
        """Refuse values that cannot be used. Raises UsageError."""
        try:
            object.__setattr__(self, "mode", Mode(self.mode))
            for name in ("crops", "seed", "seeds", "pixel_budget", "steps"):
                if (value := getattr(self, name)) is not None:
                    object.__setattr__(self, name, operator.index(value))  # NumPy's integers too
        except ValueError:
            raise UsageError(f"mode must be one of {', '.join(Mode)}, not {self.mode!r}") from None
        except TypeError:
            raise UsageError(f"{name} must be a whole number, not {value!r}") from None
        rules = {
            f"crops must be between 1 and 10000, not {self.crops}": self.crops is None or 1 <= self.crops <= 10_000,
            f"seeds must be between 1 and 1000, not {self.seeds}": 1 <= self.seeds <= 1000,
            f"seeds run from 0 to {MAX_SEED}; {self.seeds} from {self.seed} on do not fit": (
                0 <= self.seed <= MAX_SEED - self.seeds + 1
            ),
            f"steps must be at least 1, not {self.steps}": self.steps is None or self.steps >= 1,
            "fast has steps and a sampler of its own: leave out the others": not self.fast
            or (self.steps is None and self.sampler is None),
            f"the pixel budget must be at least 65536 (256×256), not {self.pixel_budget}": self.pixel_budget >= 65536,
        }
        for text, ok in rules.items():
            if not ok:
                raise UsageError(text)
        if self.sampler is not None:
            parse_sampler(self.sampler)


class Scale(enum.StrEnum):
    """On what people read a score first."""

    RAW = "raw"  # as the model gives it
    PERCENTILE = "percentile"  # among the images of the engine's reference
    MOS = "mos"  # as an opinion from 1 to 5


@dataclass(frozen=True)
class CropScore:
    """The verdict on one crop, averaged over seeds."""

    top: int
    left: int
    score: float
    vcg: float | None
    vda: float | None
    probabilities: Probabilities = field(default_factory=dict)


@dataclass(frozen=True)
class WordMap:
    """The probability of one word, crop by crop, laid over the image."""

    word: str
    values: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Pictures:
    """What the model saw, and its maps: planes are (H, W, 3) uint8, maps (H, W) float32.

    Planes are mid-grey where nothing was restored (in tile and crop mode); maps are NaN outside all crops. Maps come
    from the VCG branch; without VCG from the VDA branch. A model without branches has one score for each crop,
    which count alike, and the most probable word of each kind.
    """

    planes: dict[Kind, Picture]
    score_map: npt.NDArray[np.float32]
    weight_map: npt.NDArray[np.float32]
    words: dict[str, WordMap] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """The score of one image. `score` is the mean over crops and seeds; higher is better."""

    source: str
    score: float
    vcg: float | None
    vda: float | None
    spread: float | None  # standard deviation over seeds; None for a single seed
    width: int  # of the pixels that were scored
    height: int
    mode: Mode  # as carried out
    seeds: tuple[int, ...]
    crops: tuple[CropScore, ...]
    notes: tuple[str, ...]  # what was done to the image before scoring
    digest: str  # SHA-256 of the pixels
    engine: str
    backend: str
    seconds: float
    percentile: float | None = None  # of the engine's reference: the percentage of its images that this is better than
    opinion: float | None = None  # from 1 to 5, that the reference's people would have of it
    opinion_error: float | None = None  # of the opinion, as root mean square
    probabilities: Probabilities | None = None  # how well it matches the engine's words, such as kinds of distortion
    pictures: Pictures | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Failure:
    """An image that could not be scored."""

    source: str
    error: str
