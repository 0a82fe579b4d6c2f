"""Run a candidate beside its float32 reference, over the whole loop and with the same noise, and measure both.

Each image makes a whole run of both pipelines: the candidate goes on from its own results, as it does in use, so errors
may grow or shrink from step to step. On the first images the candidate's stages are *also* run on the inputs
that the reference had: such an error belongs to one step and one stage. This second pass costs another loop, and
rounding differs little between images, so a few images are enough.

The reference runs once for each image, and again with other seeds on the first ones. A candidate on a GPU also scores
the first image as `iqa-run` does: all on the device, with a CUDA graph and without.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engine.manifest import Manifest
from ..errors import ImageError, UsageError
from ..runtime.executor import Planes
from ..runtime.images import read_for
from ..runtime.plan import Plan, make_plan
from ..runtime.results import Options
from ..runtime.scorer import given
from .figures import QUANTILE, Findings, ImageFigures, RunFigures, image_figures, total_score
from .sides import Side
from .trace import BROKEN, Answers, Pipeline, Trace

Say = Callable[[str], None]
SPREAD_IMAGES = 4  # that the reference also scores with the other seeds


@dataclass(frozen=True)
class Choices:
    """How a verification is made."""

    options: Options = dataclasses.field(default_factory=Options)  # `seeds`: how many the spread is taken over
    forced: int = 2  # images whose stages are also run on the reference's inputs
    quantile: float = QUANTILE


@dataclass(frozen=True, eq=False)
class Subject:
    """An image as both engines are given it."""

    name: str
    digest: str
    plane: Planes  # (3, height, width) in [-1, 1]
    plan: Plan


def read_subjects(paths: Sequence[Path], manifest: Manifest, options: Options) -> list[Subject]:
    """Read all images. Raises UsageError for one that cannot be scored, and for a set that cannot show a difference."""
    subjects = []
    dark = 0
    for path in paths:
        try:
            image = read_for(path, manifest)
        except ImageError as exc:
            raise UsageError(f"{exc}; mend this image, or leave it out") from exc
        dark += not image.pixels.any()
        plan = make_plan(*image.size, manifest, options)
        subjects.append(Subject(str(path), image.digest, given(image), plan))
    if dark == len(subjects):
        raise UsageError(f"{_all(subjects)} black, and black images show no difference; give photographs")
    if len(subjects) > 1 and len({subject.digest for subject in subjects}) == 1:
        raise UsageError(f"{_all(subjects)} the same picture; give different ones")
    return subjects


def compare_sides(
    reference: Side,
    candidate: Side,
    subjects: Sequence[Subject],
    choices: Choices,
    *,
    goes_on: Callable[[ImageFigures], bool] = lambda figures: True,
    keep: Callable[[Subject, Trace, Trace, Answers | None], None] | None = None,
    say: Say = lambda doing: None,
) -> Findings:
    """Run both sides over all images; end early at the first image for which `goes_on` is false.

    `keep` is given all that was computed for an image: both traces, and the answers to the reference's inputs.
    """
    manifest, options = candidate.manifest, choices.options
    span = manifest.score.nominal_maximum - manifest.score.minimum
    ours, theirs = Pipeline(manifest, candidate.stages), Pipeline(reference.manifest, reference.stages)
    images: list[ImageFigures] = []
    variances: list[float] = []
    loop = RunFigures()
    first: Trace | None = None
    ended = False
    for number, subject in enumerate(subjects):
        place = f"image {number + 1} of {len(subjects)}"
        say(f"{place}: reference")
        want = theirs.trace(subject.plane, subject.plan, options.seed)
        say(f"{place}: candidate")
        have = ours.trace(subject.plane, candidate.plan(subject.plan), options.seed)
        answers = None
        if number < choices.forced:
            say(f"{place}: the candidate's stages on the reference's inputs")
            answers = ours.answer(want, subject.plan)
        if first is None:
            first = have
            loop = _invariance(candidate, ours, subject, first, options.seed, span, say)
        if keep:
            keep(subject, want, have, answers)
        images.append(image_figures(manifest, subject.name, want, have, answers, choices.quantile, candidate.fast))
        ended = not goes_on(images[-1])
        if ended:
            break
        if number < SPREAD_IMAGES and options.seeds > 1:
            say(f"{place}: reference with other seeds")
            seeds = range(options.seed + 1, options.seed + options.seeds)
            others = [theirs.scores(subject.plane, subject.plan, seed) for seed in seeds]
            scores = [images[-1].scores["score"][0], *(total_score(reference.manifest, *each) for each in others)]
            variances.append(statistics.variance(scores))
    if variances:
        spread = statistics.fmean(variances) ** 0.5
        loop = dataclasses.replace(loop, spread=spread, spread_seeds=options.seeds, spread_images=len(variances))
    if len(subjects) > 1 and not ended and first is not None:
        say("the first image again, after the others")
        last = ours.trace(subjects[0].plane, candidate.plan(subjects[0].plan), options.seed)
        loop = dataclasses.replace(loop, order=first.equals(last))
    return Findings(
        reference.party,
        candidate.party,
        manifest.model_name,
        manifest.score.trained,
        span,
        choices.quantile,
        options.seed,
        tuple(images),
        len(subjects),
        loop,
    )


def _invariance(
    candidate: Side, pipeline: Pipeline, subject: Subject, first: Trace, seed: int, span: float, say: Say
) -> RunFigures:
    """Measure, on the first image, what must not change a result."""
    say("the first image again, and two inputs at once")
    plan = candidate.plan(subject.plan)
    again = pipeline.trace(subject.plane, plan, seed)
    found = RunFigures(repeat=first.equals(again), batch=pipeline.batch_difference(first, plan))
    if candidate.whole is None:
        return found
    say("the first image, all on the GPU")
    score, same, note = candidate.whole(subject.plane, plan, seed)
    error = abs(score - total_score(candidate.manifest, first.vcg, first.vda, first.own)) / span
    device = error if math.isfinite(error) else BROKEN
    return dataclasses.replace(found, graph=same, graph_note=note, device=device)


def _all(subjects: Sequence[Subject]) -> str:
    return f"all {len(subjects)} images are" if len(subjects) > 1 else "the only image is"
