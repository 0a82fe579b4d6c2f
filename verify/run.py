"""Is this engine the model? A candidate beside its float32 reference, over the whole loop and with the same noise.

Every image goes through both pipelines by themselves, *freely run*: taps and scores are what the candidate would really
give, and errors of the loop may grow or heal on the way as they do in use. On the first images the candidate's stages
are *also* asked about the reference's own inputs: only such errors belong to one step and one stage, while those of a
free run are mixed with all that came before. That second pass costs another loop, and rounding differs little between
images, so it is made for a few; the reference itself runs once per image, and again for the other seeds of those few.

A candidate on a GPU also scores the first image as `iqa-run` does, all on the device, with a CUDA graph and without.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..engine.manifest import Manifest
from ..engine.pixels import to_plane
from ..errors import ImageError, UsageError
from ..runtime.images import read_image
from ..runtime.plan import Plan, make_plan
from ..runtime.results import Options
from .figures import QUANTILE, ImageFigures, measure, total_score
from .limits import CORRELATIONS, Check, Limits, Loop, check_image, judge
from .sides import Party, Side
from .trace import BROKEN, Answers, FloatArray, Pipeline, Trace

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Choices:
    """How a verification is made."""

    options: Options = dataclasses.field(default_factory=Options)  # `seeds`: how many the spread is taken over
    forced: int = 2  # images whose stages are asked about the reference's inputs
    spread_images: int = 4  # images that the reference scores with the other seeds too
    quantile: float = QUANTILE
    fail_fast: bool = False


@dataclass(frozen=True, eq=False)
class Subject:
    """An image as both engines are given it."""

    name: str
    digest: str
    plane: FloatArray  # (3, height, width) in [-1, 1]
    plan: Plan


@dataclass(frozen=True, eq=False)
class Kept:
    """All inputs and outputs of one image."""

    subject: Subject
    reference: Trace
    candidate: Trace
    answers: Answers | None


@dataclass(frozen=True)
class Findings:
    """What a verification measured; `judge` turns it into a verdict, with any limits."""

    reference: Party
    candidate: Party
    model: str
    trained: bool
    span: float  # of the score's range, which errors of scores are shares of
    quantile: float
    seed: int
    images: tuple[ImageFigures, ...]
    asked: int  # images; more than there are figures of if the run ended at the first failure
    loop: Loop

    def judge(self, limits: Limits) -> tuple[Check, ...]:
        """Return the verdict. A run that ended early has no correlations to judge."""
        if len(self.images) < self.asked:
            limits = {**limits, **dict.fromkeys(CORRELATIONS)}
        return judge(self.images, self.loop, limits, self.span)


def read_subjects(paths: Sequence[Path], manifest: Manifest, options: Options, limits: Limits) -> list[Subject]:
    """Read all images. Raises UsageError for a bad one, and for a set that can verify nothing."""
    wanted = [name for name in CORRELATIONS if limits[name] is not None]
    if not paths:
        raise UsageError("no images found; give files, folders or glob patterns")
    if len(paths) < 2 and wanted:
        leave = " ".join(f"--limit {name}=none" for name in wanted)
        raise UsageError(f"correlations take two images at least, and there is one; give more, or {leave}")
    subjects = []
    dark = 0
    for path in paths:
        try:
            image = read_image(path, min_side=manifest.crop.size)
        except ImageError as exc:
            raise UsageError(f"{exc}; mend this image, or leave it out") from exc
        dark += not image.pixels.any()
        plan = make_plan(image.pixels.shape[0], image.pixels.shape[1], manifest, options)
        subjects.append(Subject(str(path), image.digest, to_plane(image.pixels), plan))
    if dark == len(subjects):
        raise UsageError(f"{_all(subjects)} black: no engine can go wrong on that; give photographs")
    if len(subjects) > 1 and len({subject.digest for subject in subjects}) == 1:
        raise UsageError(f"{_all(subjects)} the same picture: give different ones")
    return subjects


def verify(
    reference: Side,
    candidate: Side,
    subjects: Sequence[Subject],
    choices: Choices,
    limits: Limits,
    *,
    keep: Callable[[Kept], None] = lambda kept: None,
    progress: Progress = lambda doing: None,
) -> Findings:
    """Run both sides over all images.

    `limits` only say where `fail_fast` ends; `keep` is given all that was computed for an image.
    """
    manifest, options = candidate.manifest, choices.options
    span = manifest.score.nominal_maximum - manifest.score.minimum
    ours, theirs = Pipeline(candidate.manifest, candidate.stages), Pipeline(reference.manifest, reference.stages)
    images: list[ImageFigures] = []
    loop = Loop()
    first: Trace | None = None
    variances: list[float] = []
    failed = False
    for number, subject in enumerate(subjects):
        progress(f"{number + 1} of {len(subjects)}: reference")
        want = theirs.trace(subject.plane, subject.plan, options.seed)
        progress(f"{number + 1} of {len(subjects)}: candidate")
        have = ours.trace(subject.plane, subject.plan, options.seed)
        answers = None
        if number < choices.forced:
            progress(f"{number + 1} of {len(subjects)}: stages on the reference's inputs")
            with np.errstate(all="ignore"):
                answers = ours.answer(want)
        if first is None:
            progress("the first image again, and two at once")
            first = have
            again = ours.trace(subject.plane, subject.plan, options.seed)
            loop = Loop(repeat=first.equals(again), batch=ours.batch_difference(first))
            if candidate.whole:
                progress("the first image all on the device")
                whole = candidate.whole(subject.plane, subject.plan, options.seed)
                error = abs(whole.score - total_score(manifest, have.vcg, have.vda)) / span
                device = error if math.isfinite(error) else BROKEN
                loop = dataclasses.replace(loop, graph=whole.graph_same, graph_note=whole.note, device=device)
        keep(Kept(subject, want, have, answers))
        images.append(measure(manifest, subject.name, want, have, answers, choices.quantile))
        failed = choices.fail_fast and not all(check.within for check in check_image(images[-1], limits, span))
        if failed:
            break
        if number < choices.spread_images and options.seeds > 1:
            progress(f"{number + 1} of {len(subjects)}: other seeds")
            totals = [images[-1].scores["score"][0], *_other_seeds(theirs, subject, options)]
            variances.append(statistics.variance(totals))
    if variances:
        spread = statistics.fmean(variances) ** 0.5
        loop = dataclasses.replace(loop, spread=spread, spread_seeds=options.seeds, spread_images=len(variances))
    if len(subjects) > 1 and not failed and first is not None:
        progress("the first image after the others")
        last = ours.trace(subjects[0].plane, subjects[0].plan, options.seed)
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


def _other_seeds(pipeline: Pipeline, subject: Subject, options: Options) -> Iterator[float]:
    for seed in range(options.seed + 1, options.seed + options.seeds):
        yield total_score(pipeline.manifest, *pipeline.scores(subject.plane, subject.plan, seed))


def _all(subjects: Sequence[Subject]) -> str:
    return f"all {len(subjects)} images are" if len(subjects) > 1 else "the only image is"
