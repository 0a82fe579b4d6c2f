"""Verify an engine from Python: everything that `iqa-verify` does, as functions that return values.

import diffiqa

result = diffiqa.verify("engine/", ["photos/"], precision="fp16", limits={"score-mean": 0.005})
print(result.within, [check.name for check in result.checks if not check.within])
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..engine.manifest import Precision, read_manifest
from ..errors import UsageError, member
from ..export.precision import PrecisionPlan
from ..runtime.backends import GpuBackend, Inductor, OnnxRuntime
from ..runtime.inputs import Images, find_images
from ..runtime.plan import sampling_of
from ..runtime.results import Options
from ..runtime.scorer import Scorer
from .bisect import TRIALS, Bisection, Culprits
from .compare import Choices, Say, compare_sides, read_subjects
from .figures import QUANTILE, Findings
from .limits import CORRELATIONS, LimitCheck, Limits, check_image, is_within, judge, make_limits
from .saved import Store, read_saved
from .scores import is_scores
from .sides import (
    Given,
    chosen_plan,
    compiled_side,
    default_limits,
    emulated_side,
    engine_side,
    fast_side,
    open_verified,
    plan_id,
    reference_side,
)


@dataclass(frozen=True)
class Verification:
    """What was measured, and the verdict."""

    findings: Findings
    checks: tuple[LimitCheck, ...]
    culprits: Culprits | None = None  # of a bisection, if one was asked for and a limit was exceeded

    @property
    def within(self) -> bool:
        """Whether the candidate is within all limits."""
        return is_within(self.checks)


def verify(
    engine: str | Path,
    images: Images,
    *,
    against: str | Path | None = None,
    precision: Precision | str | None = None,
    plan: PrecisionPlan | None = None,
    backend: GpuBackend | Inductor | None = None,
    any_weights: bool = False,
    options: Options = Options(seeds=3),  # noqa: B008 — frozen
    forced: int = 2,
    quantile: float = QUANTILE,
    limits_of: str | None = None,
    limits: Limits | None = None,
    fail_fast: bool = False,
    save: str | Path | None = None,
    bisect: bool = False,
    trials: int = TRIALS,
    threads: int | None = None,
    say: Say = lambda doing: None,
) -> Verification:
    """Compare an engine with a float32 reference over the whole loop, with the same noise, and judge the difference.

    The candidate is the engine itself; or, with `precision` or `plan`, the engine as iqa-build would round it, emulated
    in float32; or, with `backend`, the build that this backend runs. The reference is `against` (another engine
    directory, or a checkpoint), or else the engine's own ONNX stages. `any_weights` compares the two even if they were
    made from different weights files.

    With `options.fast` the candidate takes the steps of the engine's fast sampling, and corrects its score; the
    reference takes all steps.

    `options.seeds` is the number of seeds that the spread of scores is measured with. On the first `forced` images,
    each stage also runs on the reference's inputs. `limits_of` names the precision whose default limits apply, and
    `limits` changes single ones; None lifts a limit. `fail_fast` ends at the first image beyond a limit. `save` names a
    new folder for all inputs and outputs, which `verify_saved` can judge again. `bisect` searches, if a limit is
    exceeded, for the fewest nodes that must be float32, in so many `trials`.

    Raises UsageError, EngineError, BackendError or OutputError.
    """
    if against and is_scores(Path(against)):
        raise UsageError(f"{against} holds scores: compare them with diffiqa.verify.scores.compare_scores")
    of = Path(against) if against else None
    given = Given(Path(engine), of, plan, _precision(precision), any_weights, options.fast)
    _refuse_contradictions(given, backend, fail_fast=fail_fast, bisect=bisect)
    if given.fast:
        if bisect or save:
            raise UsageError("--bisect and --save need a candidate with the reference's steps: leave --fast out")
        options, forced = replace(options, fast=False), 0  # other steps have other inputs
    changes = limits or {}
    settings = OnnxRuntime(threads=threads)
    choices = Choices(options, forced, quantile)
    with contextlib.ExitStack() as opened:
        # Loading networks takes long: bad images and limits are refused before.
        paths = find_images(images)
        make_limits("fp32", changes, len(paths))
        _refuse_too_few(paths, changes)
        manifest = read_manifest(given.engine)
        if given.fast:
            sampling_of(manifest, Options(fast=True))  # refuses an engine that has none
        subjects = read_subjects(paths, manifest, options)
        store = Store(Path(save)) if save else None
        directory = open_verified(given.engine)
        low = chosen_plan(given, directory) if backend is None else None
        reference = reference_side(given, directory, settings)
        if isinstance(backend, Inductor):
            candidate = compiled_side(directory, backend)
        elif backend:
            from .device import open_device_side

            candidate = opened.enter_context(open_device_side(directory, backend))
        else:
            candidate = emulated_side(directory, low, settings) if low else engine_side(directory, settings)
        name = limits_of or ("fast" if given.fast else default_limits(reference.party, candidate.party))
        if given.fast:
            candidate = fast_side(candidate)
        allowed = make_limits(name, changes, len(subjects))
        span = candidate.manifest.score.nominal_maximum - candidate.manifest.score.minimum
        findings = compare_sides(
            reference,
            candidate,
            subjects,
            choices,
            goes_on=lambda image: not fail_fast or is_within(check_image(image, allowed, span)),
            keep=store.add if store else None,
            say=say,
        )
        if store:
            store.finish(findings, candidate.manifest)
        result = Verification(findings, judge(findings, allowed))
        if not bisect or result.within:
            return result
        assert low is not None  # noqa: S101 — refused above
        search = Bisection(directory, low, reference, subjects, findings, allowed, choices, settings, trials, say)
        return Verification(findings, result.checks, search.culprits())


def verify_saved(
    folder: str | Path,
    *,
    engine: str | Path | None = None,
    against: str | Path | None = None,
    precision: Precision | str | None = None,
    plan: PrecisionPlan | None = None,
    quantile: float | None = None,
    limits_of: str | None = None,
    limits: Limits | None = None,
) -> Verification:
    """Judge again what `verify(..., save=folder)` kept, without a run; options as there.

    `engine`, `against`, `precision` and `plan` are optional: results of others than these are refused.
    """
    findings, engine_id = read_saved(Path(folder), quantile)

    def require(name: object, wanted: str, saved: str) -> None:
        if wanted != saved:
            raise UsageError(
                f"{folder} holds results of another engine: {saved}, while {name} is {wanted}; name the one that was "
                f"saved, or verify this one without --saved"
            )

    if engine:
        manifest = read_manifest(Path(engine))
        require(engine, manifest.engine_id, engine_id)
        if plan:
            require("the plan", plan_id(manifest, plan), findings.candidate.id)
    if precision:
        require("--precision", str(precision), findings.candidate.cast or findings.candidate.precision)
    if against and Path(against).is_dir():
        require(against, read_manifest(Path(against)).engine_id, findings.reference.id)
    name = limits_of or default_limits(findings.reference, findings.candidate)
    return Verification(findings, judge(findings, make_limits(name, limits or {}, len(findings.images))))


def load_emulated(
    engine: str | Path,
    *,
    precision: Precision | str | None = None,
    plan: PrecisionPlan | None = None,
    threads: int | None = None,
) -> tuple[Scorer, PrecisionPlan]:
    """Return a scorer that rounds as a build of this precision or plan would, and the plan.

    It computes in float32, so its times say nothing about the build.
    """
    directory = open_verified(Path(engine))
    low = chosen_plan(Given(directory.path, None, plan, _precision(precision)), directory)
    assert low is not None  # noqa: S101 — only where there is another engine to compare with
    side = emulated_side(directory, low, OnnxRuntime(threads=threads))
    return Scorer(side.manifest, side.stages, backend=f"{low.precision}, emulated"), low


def _precision(name: Precision | str | None) -> Precision | None:
    return member(Precision, name) if name else None


def _refuse_contradictions(
    given: Given, backend: GpuBackend | Inductor | None, *, fail_fast: bool, bisect: bool
) -> None:
    low = given.plan or given.precision
    if backend and (low or bisect):
        raise UsageError(
            f"a build has a plan of its own; leave --plan, --precision and --bisect out, or --backend {backend.key}"
        )
    if bisect and not low:
        raise UsageError("--bisect changes a precision plan: give one with --plan, or --precision")
    if bisect and fail_fast:
        raise UsageError("--bisect needs the worst of all images, and --fail-fast ends earlier; choose one")


def _refuse_too_few(paths: Sequence[Path], changes: Mapping[str, float | None]) -> None:
    if not paths:
        raise UsageError("no images found; give files, folders or glob patterns")
    wanted = [name for name in CORRELATIONS if changes.get(name) is not None]
    if len(paths) < 2 and wanted:
        raise UsageError(f"{' and '.join(wanted)} compares the order of images, and there is one; give more")
