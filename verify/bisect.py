"""Which nodes cost a precision plan its verdict: the smallest set found whose return to float32 brings it under limits.

Delta debugging (Zeller's ddmin) over groups of nodes: one that computes, with those behind it that only move its result
and would round it again. A trial runs the whole pipeline on the image that is worst, because drift that a stage shows
by itself may vanish in the loop, or grow there. The plan found is then verified on all images, and where another one
stays beyond a limit, trials go on with that image too.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, shape_inference

from ..engine.manifest import EngineDirectory, StageName
from ..errors import UsageError
from ..export.precision import MOVES, Kept, PrecisionPlan, StagePrecision
from ..runtime.executor import Call, StageRunner
from ..runtime.host.onnx_stage import OnnxRuntime
from .figures import measure
from .limits import RULES, Check, Limits, check_image
from .run import Choices, Findings, Progress, Subject, verify
from .sides import Side, emulate, emulated_side
from .trace import FloatArray, Pipeline, Trace

WHY = "returned to float32 by iqa-verify --bisect"
TRIALS = 64
_FORCED = {"unet-max", "unet-mean", "unet-cosine", "vit-mean", "vit-cosine"}
_REMEMBERED = 4  # loops of the U-Net that are kept, so that trials in the heads need not run it again


@dataclass(frozen=True)
class Group:
    """Nodes that go to float32 together."""

    stage: StageName
    nodes: tuple[tuple[str, str], ...]  # name, operator


@dataclass(frozen=True)
class Culprits:
    """What a bisection found."""

    groups: tuple[Group, ...]
    trials: int
    minimal: bool  # no group of these can stay low; False if the trials were used up before that was known
    checks: tuple[Check, ...]  # the verdict on the plan, over all images
    plan: PrecisionPlan  # the plan with these nodes in float32


def node_groups(model: onnx.ModelProto, plan: StagePrecision) -> list[Group]:
    """Return what a plan computes in the low type, in the order of the graph."""
    graph = shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*graph.input, *graph.value_info, *graph.output]
    floats = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    floats |= {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    kept = {entry.node for entry in plan.float32}
    groups: list[list[tuple[str, str]]] = []
    owner: dict[str, int] = {}  # value → the group that makes it
    for node in graph.node:
        makes = floats.intersection(node.output)
        if not makes or not floats.intersection(node.input) or node.name in kept:
            continue
        moved = [owner[name] for name in node.input if name in owner] if node.op_type in MOVES else []
        if not moved:
            groups.append([])
        at = moved[0] if moved else len(groups) - 1
        groups[at].append((node.name, node.op_type))
        owner |= dict.fromkeys(makes, at)
    return [Group(plan.name, tuple(nodes)) for nodes in groups]


def with_returned(plan: PrecisionPlan, groups: Sequence[Group]) -> PrecisionPlan:
    """Return the plan with these groups in float32 too."""
    stages = []
    for stage in plan.stages:
        more = tuple(Kept(name, op, WHY) for g in groups if g.stage is stage.name for name, op in g.nodes)
        stages.append(dataclasses.replace(stage, float32=stage.float32 + more))
    return dataclasses.replace(plan, stages=tuple(stages))


def smallest(
    parts: Sequence[Sequence[Group]], passes: Callable[[tuple[Group, ...]], bool | None]
) -> tuple[tuple[Group, ...], bool]:
    """Return the smallest set that passes, and whether it is minimal; `parts` are tried first, `passes` of all is true.

    Ends with what it has when `passes` returns None, for want of trials.
    """
    chunks = [list(part) for part in parts if part]
    while True:
        current = [group for chunk in chunks for group in chunk]
        if len(current) == 1:
            return tuple(current), True
        complements = [[g for other in chunks if other is not chunk for g in other] for chunk in chunks]
        for index, candidate in enumerate([*chunks, *complements]):
            if len(candidate) in {0, len(current)}:
                continue
            answer = passes(tuple(candidate))
            if answer is None:
                return tuple(current), False
            if answer:
                # A chunk starts over in halves; of a complement, the other chunks stay as they are.
                left_out = index - len(chunks)
                chunks = _halves([candidate]) if left_out < 0 else [*chunks[:left_out], *chunks[left_out + 1 :]]
                break
        else:
            if all(len(chunk) == 1 for chunk in chunks):
                return tuple(current), True
            chunks = _halves(chunks)


def _halves(chunks: Sequence[list[Group]]) -> list[list[Group]]:
    halves = [half for c in chunks for half in (c[: len(c) // 2], c[len(c) // 2 :])]
    return [half for half in halves if half]


def bisect(
    directory: EngineDirectory,
    plan: PrecisionPlan,
    reference: Side,
    subjects: Sequence[Subject],
    findings: Findings,
    limits: Limits,
    *,
    choices: Choices,
    settings: OnnxRuntime,
    trials: int = TRIALS,
    progress: Progress = lambda doing: None,
) -> Culprits:
    """Find the smallest set that brings `findings`, of this plan, under the limits.

    Raises UsageError if no image shows what is beyond, or if all nodes in float32 do not help.
    """
    failed = [check for check in findings.judge(limits) if not check.within]
    per_image = _per_image(failed, findings, limits)
    trial = _Trials(directory, plan, reference, subjects, findings, per_image, settings, trials, progress)
    trial.forced = any(check.name in _FORCED for check in failed)
    parts = [node_groups(model, plan.stage(name)) for name, model in trial.stages.models.items()]
    everything = tuple(group for part in parts for group in part)
    if not everything:
        raise UsageError("the plan keeps every node in float32 already; there is nothing to return")
    looked = findings
    result: Culprits | None = None
    while True:
        trial.places.append(_worst_image(looked, per_image))
        answer = trial.passes(everything)
        if answer is None and result:
            return dataclasses.replace(result, minimal=False)
        if not answer:
            raise UsageError(
                f"even with every node in float32, {subjects[trial.places[-1]].name} stays beyond the limits: they are "
                f"tighter than the rounding of what passes between stages; raise them with --limit, or plan "
                f"float32 for those tensors"
            )
        groups, minimal = smallest(parts, trial.passes)
        found = with_returned(plan, groups)
        progress(f"bisect: the plan with {len(groups)} groups in float32, on all images")
        looked = verify(
            reference,
            emulated_side(directory, found, settings),
            subjects,
            dataclasses.replace(choices, options=dataclasses.replace(choices.options, seeds=1)),
            limits,
        )
        known = findings.loop
        loop = dataclasses.replace(
            looked.loop, spread=known.spread, spread_seeds=known.spread_seeds, spread_images=known.spread_images
        )
        looked = dataclasses.replace(looked, loop=loop)
        checks = looked.judge(limits)
        result = Culprits(groups, trial.count, minimal, checks, found)
        if all(check.within for check in checks) or not minimal or _worst_image(looked, per_image) in trial.places:
            return result


class _Trials:
    """Answers whether groups in float32 bring the images that were chosen so far under the limits."""

    def __init__(
        self,
        directory: EngineDirectory,
        plan: PrecisionPlan,
        reference: Side,
        subjects: Sequence[Subject],
        findings: Findings,
        limits: Limits,
        settings: OnnxRuntime,
        budget: int,
        progress: Progress,
    ) -> None:
        self.stages = _Stages(directory, plan, settings)
        self.places: list[int] = []
        self.forced = False  # whether stages are asked about the reference's inputs too
        self.count = 0
        self._manifest, self._subjects, self._findings, self._limits = directory.manifest, subjects, findings, limits
        self._budget, self._progress = budget, progress
        self._reference = Pipeline(reference.manifest, reference.stages)
        self._wanted: dict[int, Trace] = {}
        self._known: dict[tuple[int, frozenset[Group]], bool] = {}

    def passes(self, groups: tuple[Group, ...]) -> bool | None:
        """Whether all chosen images are within; None once the trials are used up. Nothing is tried twice."""
        for place in self.places:
            key = place, frozenset(groups)
            if key not in self._known:
                if self.count >= self._budget:
                    return None
                self.count += 1
                self._known[key] = self._try(place, groups)
                outcome = "within" if self._known[key] else "beyond"
                of = f"trial {self.count} of {self._budget} at most"
                self._progress(f"bisect: {of}, {len(groups)} groups in float32: {outcome}")
            if not self._known[key]:
                return False
        return True

    def _try(self, place: int, groups: tuple[Group, ...]) -> bool:
        subject, findings = self._subjects[place], self._findings
        if place not in self._wanted:
            self._wanted[place] = self._reference.trace(subject.plane, subject.plan, findings.seed)
        want = self._wanted[place]
        have, runner = self.stages.trace(groups, place, subject, findings.seed)
        with np.errstate(all="ignore"):
            answers = runner.answer(want) if self.forced else None
        figures = measure(self._manifest, subject.name, want, have, answers, findings.quantile)
        return all(check.within for check in check_image(figures, self._limits, findings.span))


def _per_image(failed: Sequence[Check], findings: Findings, limits: Limits) -> dict[str, float | None]:
    """Return limits under which one image shows what is beyond: those of the mean become the image's own."""
    names = {check.name for check in failed}
    if not names - {"srcc", "plcc", "batch", "repeat", "order"}:
        raise UsageError(
            f"what is beyond ({', '.join(sorted(names))}) shows in no single image, so nodes cannot be tried on one; "
            f"name a drift to reach instead, such as --limit score=0.001"
        )
    bounds = [limits["score"], limits["score-mean"] if "score-mean" in names else None]
    if "spread" in names and (limit := limits["spread"]) is not None and findings.loop.spread:
        bounds.append(limit * findings.loop.spread / findings.span)
    known = [bound for bound in bounds if bound is not None]
    return {**limits, "score": min(known) if known else None}


def _worst_image(findings: Findings, limits: Limits) -> int:
    def excess(index: int) -> float:
        checks = check_image(findings.images[index], limits, findings.span)
        return max((c.excess if c.name in RULES else float("inf") for c in checks if not c.within), default=0.0)

    return max(range(len(findings.images)), key=excess)


class _Stages:
    """Emulated stages by what is returned in them, and loops that need not run twice."""

    def __init__(self, directory: EngineDirectory, plan: PrecisionPlan, settings: OnnxRuntime) -> None:
        self._directory, self._plan, self._settings = directory, plan, settings
        self.models = {s.name: onnx.load(directory.file(s.file)) for s in directory.manifest.stages}
        self._loaded: dict[StageName, tuple[frozenset[Group], StageRunner]] = {}
        self._loops: dict[tuple[int, frozenset[Group]], FloatArray] = {}

    def trace(self, groups: Sequence[Group], place: int, subject: Subject, seed: int) -> tuple[Trace, Pipeline]:
        """Score an image with these groups in float32; return the pipeline too."""
        manifest = self._directory.manifest
        loaded = {name: self._stage(name, groups) for name in self.models}
        runner = Pipeline(manifest, loaded)
        if StageName.UNET not in loaded or len(subject.plan.windows) > 1:
            return runner.trace(subject.plane, subject.plan, seed), runner
        key = place, frozenset(group for group in groups if group.stage is StageName.UNET)
        if (noise := self._loops.get(key)) is not None:
            replayed = Pipeline(manifest, {**loaded, StageName.UNET: _Replay(noise)})
            return replayed.trace(subject.plane, subject.plan, seed), runner
        trace = runner.trace(subject.plane, subject.plan, seed)
        while len(self._loops) >= _REMEMBERED:
            del self._loops[next(iter(self._loops))]
        self._loops[key] = trace.noise
        return trace, runner

    def _stage(self, name: StageName, groups: Sequence[Group]) -> StageRunner:
        key = frozenset(group for group in groups if group.stage is name)
        if name in self._loaded and self._loaded[name][0] == key:
            return self._loaded[name][1]
        stage = self._directory.manifest.stage(name)
        assert stage is not None  # noqa: S101 — the models are those of the manifest
        plan = with_returned(self._plan, [group for group in groups if group.stage is name])
        loaded = emulate(self._directory, stage, plan.stage(name), plan.precision, self._settings)
        self._loaded[name] = key, loaded
        return loaded


class _Replay:
    """A U-Net that gives the answers it gave before: from the same state come the same ones."""

    def __init__(self, noise: FloatArray) -> None:
        self._noise, self._next = noise, 0

    def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
        def call() -> None:
            outputs["noise"][0] = self._noise[self._next]
            self._next += 1

        return call
