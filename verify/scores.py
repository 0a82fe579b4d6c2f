"""Your program's scores beside an engine's: how far apart they are, and what explains that best.

Where they differ, what weights cannot tell is tried: other branch weights and another scale by least squares, and other
ways to prepare images by scoring some of them again.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..engine.agreement import plcc, srcc
from ..engine.codec import decode
from ..engine.crops import CropPlaces
from ..engine.manifest import Manifest, StageName
from ..engine.pixels import ImageForm, Sides, TapForm
from ..errors import DatasetError, EngineError, ImageError, UsageError
from ..evaluation.scores import match_names, read_scores
from ..model.config import ModelConfig, Pixels
from ..runtime.executor import Call, FloatArray, StageRunner
from ..runtime.host.onnx_stage import OnnxRuntime
from ..runtime.inputs import Images, find_images
from ..runtime.results import Mode, Options
from ..runtime.scorer import Scorer
from .sides import engine_side, open_verified

SUFFIXES = {".csv", ".json", ".jsonl"}
SHARE = 1e-3  # of the range of scores: more than rounding makes, less than anybody sees
SPREADS = 3  # two runs with noise of their own are rarely further apart
SPREAD_IMAGES = 4
FEWEST = 4  # images that can tell one cause from another
UNEXPLAINED = 0.3  # of the deviation of your scores: what a fit may leave
SIMPLER = 2  # of two causes, the one with a change or a fitted number more must leave this many times less
EXACT = 1e-3  # of the range of scores: a fit that leaves less is no accident, and nothing else is tried
IMAGENET = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NO_WEIGHT = 2e-3  # of the other branch's: least squares find no exact zero
NOT_TRIED = "other weights, swin-scale, steps, taps"

Array = npt.NDArray[np.float64]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Distance:
    """Two lists of scores of the same images. A correlation is None where one does not exist."""

    srcc: float | None
    plcc: float | None
    mean: float  # of |theirs − ours|
    largest: float
    worst: str  # the image of the largest
    root: float  # root of the mean square


@dataclass(frozen=True)
class Explanation:
    """Something that was tried, and the root mean square of what it leaves. `option` brings it into an engine."""

    what: str
    option: str
    left: float  # on the scale of our scores
    changes: int  # how many things are otherwise, each number that was fitted counted
    enough: bool  # whether no more is left than two runs may differ by


@dataclass(frozen=True)
class ScoresFound:
    """What a comparison of scores found; `explanations` are ordered, the best one first."""

    engine: str
    images: int
    unused: int  # scores in the file whose images were not given
    distance: Distance
    spread: float  # of our scores over seeds
    allowed: float  # of `distance.root`
    explanations: tuple[Explanation, ...]
    tried_on: int  # images

    @property
    def within(self) -> bool:
        """Whether the engine says what your program says."""
        return self.distance.root <= self.allowed


@dataclass(frozen=True)
class _Ours:
    """Our scores of some images: in all, and of each branch that the model has."""

    score: Array
    branches: tuple[Array, ...]
    weights: tuple[float, float]  # of the branches

    def first(self, count: int) -> "_Ours":
        """Return those of the first images."""
        return replace(self, score=self.score[:count], branches=tuple(one[:count] for one in self.branches))


@dataclass(frozen=True)
class _Allowance:
    """How far two runs may be apart: a share of the range of scores, or the spread of our scores over seeds."""

    least: float
    seeds: tuple[_Ours, ...]  # the same images under each seed

    def spread(self, *weights: float) -> float:
        """Return the spread of our scores, or what it would be under other weights of the branches."""
        if len(self.seeds) < 2:
            return 0.0
        values = [np.dot(weights, ours.branches) if weights else ours.score for ours in self.seeds]
        return float(np.std(values, axis=0, ddof=1).mean())

    def root(self, spread: float) -> float:
        """Return what the root mean square of differences may be."""
        return max(self.least, SPREADS * spread)


@dataclass(frozen=True)
class _Change:
    """Another way to prepare images."""

    what: str
    option: str
    scorer: Scorer
    options: Options


def is_scores(path: Path) -> bool:
    """Whether a path names a table of scores, and no engine or checkpoint."""
    return path.suffix.lower() in SUFFIXES and not path.name.endswith(".index.json") and not path.is_dir()


def compare_scores(
    engine: str | Path,
    images: Images,
    scores: str | Path,
    *,
    options: Options = Options(seeds=3),  # noqa: B008 — frozen
    trials: int = 64,
    threads: int | None = None,
    say: Say = lambda doing: None,
) -> ScoresFound:
    """Compare your program's scores of images with an engine's, and look for what explains the difference.

    `scores` is a CSV file with the columns name (or path, or image) and score, or what iqa-run wrote. `options.seeds`
    is the number of seeds that the spread of our scores is measured with. At most `trials` images are scored again in
    other ways. Raises UsageError, DatasetError or EngineError.
    """
    side = engine_side(open_verified(Path(engine)), OnnxRuntime(threads=threads))
    if side.manifest.flow.score:
        raise UsageError(f"{engine} is no Diff-V²-IQA: no other program has scores of it that could be compared")
    paths, theirs, unused = _matched(images, Path(scores))
    once = replace(options, seeds=1)
    scorer = Scorer(side.manifest, side.stages, backend="onnxruntime")
    ours = _score(scorer, paths, once, say)
    few, further = paths[:SPREAD_IMAGES], range(options.seed + 1, options.seed + options.seeds)
    if further:
        say("measuring the spread over seeds")
    seeds = [_score(scorer, few, replace(once, seed=seed), lambda _doing: None) for seed in further]
    span = side.manifest.score.nominal_maximum - side.manifest.score.minimum
    allowance = _Allowance(SHARE * span, (ours.first(SPREAD_IMAGES), *seeds))
    spread = allowance.spread()
    distance, allowed = _distance(paths, theirs, ours.score), allowance.root(spread)
    explanations: list[Explanation] = []
    tried_on = 0
    if distance.root > allowed:
        explanations = list(_readings(theirs, ours, allowance))
        exact = EXACT * float(np.ptp(ours.score))
        if all(found.left > exact for found in explanations):
            changes = list(_changes(side.manifest, side.stages, once))
            tried_on = min(len(paths), max(FEWEST, trials // max(1, len(changes))))
            for change in changes:
                say(f"trying {change.what}")
                again = _score(change.scorer, paths[:tried_on], change.options, say)
                left = _root(theirs[:tried_on] - again.score)
                explanations.append(Explanation(change.what, change.option, left, 1, left <= allowed))
                explanations += _readings(theirs[:tried_on], again, allowance, change)
        explanations.sort(key=lambda one: (not one.enough, one.left * SIMPLER**one.changes))
    return ScoresFound(
        side.manifest.engine_id, len(paths), unused, distance, spread, allowed, tuple(explanations), tried_on
    )


def _matched(images: Images, scores: Path) -> tuple[list[Path], Array, int]:
    """Return the images, your scores of them, and how many scores are of other images."""
    paths = find_images(images)
    if len(paths) < 2:
        raise UsageError(f"scores are compared over two images and more, and there are {len(paths)}")
    table = read_scores(scores)
    names = match_names({path.as_posix(): path for path in paths}, table, scores)
    if missing := [str(path) for path in paths if path.as_posix() not in names]:
        raise DatasetError(
            f"{scores} has no score of {missing[0]}" + (f" and {len(missing) - 1} more" if missing[1:] else "")
        )
    theirs = np.array([table[names[path.as_posix()]] for path in paths], np.float64)
    if not np.isfinite(theirs).all():
        raise DatasetError(f"{scores} has scores that are NaN or infinite")
    return paths, theirs, len(table) - len(paths)


def _score(scorer: Scorer, paths: Sequence[Path], options: Options, say: Say) -> _Ours:
    rows = []
    for index, path in enumerate(paths, start=1):
        say(f"scoring {index} of {len(paths)}")
        try:
            found = scorer.score(path, options)
        except ImageError as exc:
            raise UsageError(f"{exc}; mend this image, or leave it out") from exc
        rows.append((found.score, *(value for value in (found.vcg, found.vda) if value is not None)))
    score, *branches = np.array(rows, np.float64).T
    meaning = scorer.info.score
    return _Ours(score, tuple(branches), (meaning.vcg_weight, meaning.vda_weight))


def _distance(paths: Sequence[Path], theirs: Array, ours: Array) -> Distance:
    difference = np.abs(theirs - ours)
    varied = bool(np.ptp(theirs) and np.ptp(ours))
    return Distance(
        srcc=srcc(ours, theirs) if varied else None,
        plcc=plcc(ours, theirs) if varied else None,
        mean=float(difference.mean()),
        largest=float(difference.max()),
        worst=str(paths[int(difference.argmax())]),
        root=_root(difference),
    )


def _readings(
    theirs: Array, ours: _Ours, allowance: _Allowance, change: _Change | None = None
) -> Iterator[Explanation]:
    """Fit our branches to your scores, and our scores, as they are or after a change."""

    def explanation(what: str, option: str, rest: Array, scale: float, fitted: int, spread: float) -> Explanation:
        left = math.sqrt(float(rest @ rest) / max(1, len(rest) - fitted))
        # A few images of like quality can be fitted by anything: the fit must also follow your scores up and down.
        enough = (
            len(rest) >= FEWEST and left / scale <= allowance.root(spread) and left <= UNEXPLAINED * float(theirs.std())
        )
        words, options = (f"{change.what}, and {what}", f"{change.option} {option}") if change else (what, option)
        return Explanation(words, options.strip(), left / scale, fitted + bool(change), enough)

    if len(ours.branches) == 2:
        weights, rest = _fitted(theirs, ours.branches)
        weights[np.abs(weights) < NO_WEIGHT * np.abs(weights).max()] = 0
        (vcg, vda), (own_vcg, own_vda) = map(float, weights), ours.weights
        ratio = abs(vcg * own_vda - vda * own_vcg) / max(vcg, vda, 1e-30)  # 0: the same weights, on another scale
        if min(vcg, vda) >= 0 and ratio > NO_WEIGHT * max(ours.weights):
            what = f"branch weights: your scores look like {_rounded(vcg)}·VCG + {_rounded(vda)}·VDA"
            option = f"--branch-weights {_rounded(vcg)},{_rounded(vda)}"
            scale = (vcg + vda) / sum(ours.weights)
            yield explanation(what, option, rest, scale, 2, allowance.spread(vcg, vda) / scale)
    for columns in ((ours.score,), (ours.score, np.ones_like(theirs))):
        weights, rest = _fitted(theirs, columns)
        slope, *offsets = map(float, weights)
        if slope:
            what = f"another scale: your scores look like {_rounded(slope)}·ours"
            what += "".join(f" {'−' if offset < 0 else '+'} {_rounded(abs(offset))}" for offset in offsets)
            yield explanation(what, "", rest, abs(slope), len(columns), allowance.spread())


def _fitted(theirs: Array, columns: Sequence[Array]) -> tuple[Array, Array]:
    """Return the least-squares weights of the columns, and the rest."""
    matrix = np.stack(columns, axis=1)
    weights = np.asarray(np.linalg.lstsq(matrix, theirs, rcond=None)[0], np.float64)
    return weights, theirs - matrix @ weights


def _changes(manifest: Manifest, stages: Mapping[StageName, StageRunner], options: Options) -> Iterator[_Change]:
    """Yield the other ways that images may have been prepared."""

    def scorer(changed: Manifest, own: Mapping[StageName, StageRunner] = stages) -> Scorer:
        return Scorer(changed, own, backend="onnxruntime")

    restores = StageName.UNET in stages
    if restores:
        for form in TapForm:
            if form is not manifest.tap_form:
                yield _Change(
                    f"taps as {form}", f"--tap-form {form}", scorer(replace(manifest, tap_form=form)), options
                )
        for sides in Sides:
            if sides is not manifest.sides:
                yield _Change(f"sides {sides}", f"--sides {sides}", scorer(replace(manifest, sides=sides)), options)
        if options.mode is not Mode.CROP:
            yield _Change(
                "every crop restored by itself",
                "(iqa-run --mode crop)",
                scorer(manifest),
                replace(options, mode=Mode.CROP),
            )
    for image in ImageForm:
        if image is not manifest.image_form:
            what = "images squashed into one crop" if image is ImageForm.SQUASHED else "crops of images as they are"
            yield _Change(what, f"--image-form {image}", scorer(replace(manifest, image_form=image)), options)
    crop = manifest.crop
    for count, places in itertools.product((1, 9), CropPlaces):
        if (count, places) != (options.crops or crop.count, crop.places) and (count > 1 or places is CropPlaces.GRID):
            yield _Change(
                f"crops: {count}, {places}" if count > 1 else "one crop, in the middle",
                f"--crop-count {count} --crop-places {places}",
                scorer(replace(manifest, crop=replace(crop, places=places))),
                replace(options, crops=count),
            )
    now = decode(ModelConfig, manifest.model, "manifest.model", EngineError).pixels
    for pixels, words in ((Pixels(), "0.5"), (IMAGENET, "ImageNet's")):
        if pixels != now:
            seeing = {name: _Seeing(stage, now, pixels) if name in _SEES else stage for name, stage in stages.items()}
            mean, std = (",".join(map(str, values)) for values in (pixels.mean, pixels.std))
            yield _Change(
                f"pixels by {words} mean and deviation", f"--mean {mean} --std {std}", scorer(manifest, seeing), options
            )


_SEES = {StageName.VIT: "image", StageName.VDA: "images"}


class _Seeing:
    """A stage that has `now` as the range of its pixels, given them in another."""

    def __init__(self, stage: StageRunner, now: Pixels, other: Pixels) -> None:
        self._stage = stage
        mean, std, other_mean, other_std = (np.array(v) for v in (now.mean, now.std, other.mean, other.std))
        # What the stage makes of x is (pixel − mean) / std. It must get the x that makes that the other's.
        factor, offset = std / other_std, (mean - 0.5 - (other_mean - 0.5) * std / other_std) / 0.5
        self._factor, self._offset = (v.astype(np.float32).reshape(3, 1, 1) for v in (factor, offset))

    def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
        changed = {name: np.empty_like(value) for name, value in inputs.items()}
        call = self._stage.bind(changed, outputs)

        def run() -> None:
            for name, value in inputs.items():
                changed[name][...] = value * self._factor + self._offset
            call()

        return run


def _root(difference: Array) -> float:
    return float(np.sqrt(np.mean(difference**2)))


def _rounded(value: float) -> str:
    """Return a fitted number as people would have written it."""
    nearest = round(value)
    return str(nearest) if nearest and abs(value / nearest - 1) < 0.005 else f"{value:.3g}"
