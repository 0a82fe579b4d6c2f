"""`iqa-calibrate --steps`: the fewest steps that keep the scores of an engine, and what takes out their bias.

Every number of steps is tried from several starts, from noise and from the image, as trained and by DDIM: the noisiest
steps of a schedule see nothing but noise. Eight images choose the way whose scores scatter least around those with all
steps. Then all images are scored with it, in turn with all steps, so that speeds are those of one run.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..engine.agreement import Array, srcc
from ..engine.atomic import replacing
from ..engine.manifest import MANIFEST, Manifest, open_engine, read_manifest
from ..engine.monotone import Monotone, fit_monotone
from ..engine.sampling import Fast, Sampler, Sampling, TapRule, choose_sampling, spread
from ..errors import EngineError, OutputError, UsageError
from ..evaluation.charts import add_legend, colour, panels
from ..runtime.host.onnx_stage import OnnxRuntime
from ..runtime.host.stages import load_stages
from ..runtime.plan import by_crops
from ..runtime.results import Options
from ..runtime.scorer import Scorer
from .statistics import Skipped, read_usable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_SRCC = 0.99  # of scores with few steps and with all
LEAST_IMAGES = 8
IMAGES_PER_KNOT = 20
STARTS = (1.0, 0.9, 0.8, 0.65, 0.5)  # shares of the schedule
STARTS_FROM_IMAGE = (0.5, 0.35, 0.25, 0.15)
_UNCORRECTED = Monotone((0.0,), (0.0,), slope_beyond=1)


@dataclass(frozen=True)
class StepsTrial:
    """Some of an engine's steps beside all of them. `corrected…`: fitted on one half of the images for the other."""

    sampling: Sampling
    correction: Monotone  # fitted on all images
    speed: float  # images a second, as a multiple of those with all steps
    drift: float  # mean change of a score
    bias: float  # the same with its sign
    corrected_drift: float
    corrected_bias: float  # the mean of the two halves, without signs
    srcc: float

    def keeps(self, other_seed: float) -> bool:
        """Whether it changes scores no more than another seed does, and hardly their order."""
        return self.corrected_drift <= other_seed and self.srcc >= LEAST_SRCC


@dataclass(frozen=True)
class FittedSteps:
    """What was tried, and what was taken: None where nothing keeps the scores."""

    images: tuple[str, ...]
    all_steps: int
    other_seed: float  # mean change of a score with all steps and the next seed
    trials: tuple[StepsTrial, ...]
    fast: Fast | None
    skipped: tuple[Skipped, ...]
    left_out: dict[int, str]  # numbers of steps that the engine cannot take, and why


def find_steps(
    engine: Path,
    images: Sequence[Path],
    counts: Sequence[int],
    *,
    seed: int = 0,
    crops: int = 1,
    say: Callable[[str], None] = lambda _text: None,
) -> FittedSteps:
    """Try numbers of steps on images, and write the fewest that keep the scores into the manifest as its `fast`.

    A single number is taken whatever it does. Raises UsageError for numbers that the engine cannot take.
    """
    directory = open_engine(engine)
    manifest = directory.manifest
    plans, left_out = _candidates(manifest, counts)
    usable, skipped = read_usable(images, manifest.crop.size, LEAST_IMAGES)
    stages = load_stages(directory, OnnxRuntime())
    mode = by_crops(manifest)

    def run(sampling: Sampling, seed: int = seed) -> _Run:
        trying = dataclasses.replace(manifest, fast=Fast(sampling, _UNCORRECTED, 0))
        return _Run(sampling, Scorer(trying, stages, backend="trial"), Options(crops, seed, mode=mode, fast=True))

    own = Sampling.trained(manifest.schedule)
    every, reseeded = run(own), run(own, seed + 1)
    groups = [[run(sampling) for sampling in group] for group in plans]
    for number, name in enumerate(usable.values()):
        say(f"image {number + 1} of {len(usable)}")
        for each in (every, reseeded, *(each for group in groups for each in group)):
            each.score(name)
        if number + 1 == LEAST_IMAGES:
            groups = [[min(group, key=lambda each: each.scatter(every))] for group in groups]
    other_seed = float(np.abs(reseeded.changes(every)).mean())
    trials = tuple(group[0].trial(every) for group in groups)
    taken = next((trial for trial in trials if len(trials) == 1 or trial.keeps(other_seed)), None)
    fast = Fast(taken.sampling, taken.correction, len(usable)) if taken else None
    if fast:
        _publish(directory.path, manifest, fast)
    return FittedSteps(tuple(usable.values()), manifest.schedule.steps, other_seed, trials, fast, skipped, left_out)


def draw_steps(fitted: FittedSteps) -> "Figure":
    """Draw drift and speed over the number of steps."""
    counts = [len(trial.sampling.steps) for trial in fitted.trials]
    figure, (drift, speed) = panels(["Mean change of a score", "Images a second, as a multiple of all steps"])
    drift.plot(counts, [trial.drift for trial in fitted.trials], color=colour(0), marker="o")
    drift.plot(counts, [trial.corrected_drift for trial in fitted.trials], color=colour(1), marker="o")
    drift.axhline(fitted.other_seed, color=colour(2))
    speed.plot(counts, [trial.speed for trial in fitted.trials], color=colour(0), marker="o")
    for axes in (drift, speed):
        axes.set_xlabel(f"steps of {fitted.all_steps}")
        axes.set_ylim(bottom=0)
    add_legend(figure, ["as it is", "corrected", "all steps, another seed"])
    return figure


class _Run:
    """One way to sample, over the images so far."""

    def __init__(self, sampling: Sampling, scorer: Scorer, options: Options) -> None:
        self.sampling, self._scorer, self._options = sampling, scorer, options
        self.scores: list[float] = []
        self._seconds: list[float] = []

    def score(self, name: str) -> None:
        """Score an image."""
        found = self._scorer.score(Path(name), self._options)
        self.scores.append(found.score)
        self._seconds.append(found.seconds)

    def changes(self, every: "_Run") -> Array:
        """Return the changes of scores from those with all steps."""
        return np.subtract(self.scores, every.scores, dtype=np.float64)

    def scatter(self, every: "_Run") -> float:
        """Return how far scores change beyond their bias."""
        changes = self.changes(every)
        return float(np.abs(changes - changes.mean()).mean())

    def trial(self, every: "_Run") -> StepsTrial:
        """Return the figures over all images."""
        speed = statistics.median(base / mine for base, mine in zip(every._seconds, self._seconds, strict=True))
        return compare(self.sampling, self.scores, every.scores, speed)


def compare(sampling: Sampling, few: Sequence[float], every: Sequence[float], speed: float) -> StepsTrial:
    """Return the figures of scores with few steps beside those with all."""
    scores, wanted = np.array(few), np.array(every)
    changes, first = scores - wanted, np.arange(len(scores)) % 2 == 0
    corrected = changes.copy()
    for half in (first, ~first):
        fitted = _fit(scores[~half], wanted[~half])
        corrected[half] = [fitted(score) for score in scores[half]] - wanted[half]
    return StepsTrial(
        sampling,
        _fit(scores, wanted),
        speed,
        float(np.abs(changes).mean()),
        float(changes.mean()),
        float(np.abs(corrected).mean()),
        statistics.fmean(abs(float(corrected[half].mean())) for half in (first, ~first)),
        srcc(scores, wanted),
    )


def _candidates(manifest: Manifest, counts: Sequence[int]) -> tuple[list[list[Sampling]], dict[int, str]]:
    """Return for each number of steps the ways to take them; and what the engine cannot take. Raises UsageError."""
    schedule, groups, left_out = manifest.schedule, [], {}
    last = schedule.steps - 1
    starts = sorted({(round(share * last), False) for share in STARTS})
    starts += sorted({(round(share * last), True) for share in STARTS_FROM_IMAGE})
    needed = {manifest.taps.step_of(kind) - 1 for kind in manifest.kinds[1:]} - {-1}
    for count in sorted({*counts} - {schedule.steps}):
        ways = []
        try:
            ways.append(choose_sampling(schedule, manifest.taps, manifest.kinds, count, None))
        except UsageError as exc:
            left_out[count] = str(exc)
        for start, from_image in [] if schedule.linear else starts:
            if start < count - 1:
                continue
            if start > max(needed, default=0):
                ways.append(Sampling(spread({*needed, start}, count), from_image=from_image))
            # Without noise on the way the taps are made of the result, so any steps will do.
            ways.append(Sampling(spread({start}, count), Sampler.DDIM, 0, TapRule.RENOISED, from_image))
        if ways := [way for way in dict.fromkeys(ways) if len(way.steps) == count]:
            groups.append(ways)
            left_out.pop(count, None)
    if not groups:
        raise UsageError(f"nothing to try: {'; '.join(left_out.values()) or f'{schedule.steps} are all steps'}")
    return groups, left_out


def _fit(scores: Array, wanted: Array) -> Monotone:
    return fit_monotone(scores, wanted, max(1, min(5, len(scores) // IMAGES_PER_KNOT)), slope_beyond=1)


def _publish(path: Path, fitted: Manifest, fast: Fast) -> None:
    """Write the manifest with its fast sampling."""
    manifest = read_manifest(path)  # again: a build may have come since, or another export
    if manifest.engine_id != fitted.engine_id:
        raise EngineError(f"{path} was exported anew meanwhile; run iqa-calibrate again")
    try:
        with replacing(path / MANIFEST) as stream:
            stream.write(dataclasses.replace(manifest, fast=fast).to_json().encode())
    except OSError as exc:
        raise OutputError(f"cannot write {path / MANIFEST}: {exc.strerror or exc}") from exc
