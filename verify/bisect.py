"""Find the fewest nodes of a precision plan that must return to float32 so that the plan is within the limits.

The search is delta debugging (Zeller's ddmin) over groups of nodes. A group is a node that computes, and the nodes
behind it that only move its result: they would round it again. A trial runs the whole pipeline on the worst image,
because an error that a stage makes by itself may vanish in the loop, or grow there. The plan that is found is verified
on all images; if another image is still beyond a limit, the search goes on with that image too.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from ..engine.manifest import EngineDirectory, StageName
from ..errors import UsageError
from ..export.precision import MOVES, Kept, PrecisionPlan, StagePrecision, element_types
from ..runtime.executor import Call, StageRunner
from ..runtime.host.onnx_stage import OnnxRuntime
from .compare import Choices, Say, Subject, compare_sides
from .figures import Findings, image_figures
from .limits import RULES, LimitCheck, Limits, check_image, is_within, judge
from .sides import Side, emulate, emulated_side
from .trace import FloatArray, Pipeline, Trace

WHY = "returned to float32 by iqa-verify --bisect"
TRIALS = 64
_FORCED = {"unet-max", "unet-mean", "unet-cosine", "vit-mean", "vit-cosine"}
_IN_NO_IMAGE = {"srcc", "plcc", "batch", "repeat", "order"}
_REMEMBERED = 4  # loops of the U-Net that are kept: trials in the heads then need not run it again


@dataclass(frozen=True)
class Group:
    """Nodes that go to float32 together."""

    stage: StageName
    nodes: tuple[tuple[str, str], ...]  # name, operator


@dataclass(frozen=True)
class Culprits:
    """What a search found."""

    groups: tuple[Group, ...]
    trials: int
    minimal: bool  # each of the groups is needed; False: the trials were used up before that was known
    checks: tuple[LimitCheck, ...]  # the verdict on the new plan, over all images
    plan: PrecisionPlan  # the plan with these nodes in float32


def node_groups(model: onnx.ModelProto, plan: StagePrecision) -> list[Group]:
    """Return the nodes that a plan computes in the low type, in groups and in the order of the graph."""
    types = element_types(model) | {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    floats = {name for name, kind in types.items() if kind == TensorProto.FLOAT}
    kept = {entry.node for entry in plan.float32}
    groups: list[list[tuple[str, str]]] = []
    owner: dict[str, int] = {}  # value → the group that makes it
    for node in model.graph.node:
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
    """Return the smallest set that passes, and whether it is known to be minimal.

    All groups together must pass. `parts` are tried first. `passes` returns None when no trials are left: then the
    smallest set so far is returned.
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


@dataclass(eq=False)
class Bisection:
    """A search on one plan. `findings`, of this plan, are beyond some of `limits`."""

    directory: EngineDirectory
    plan: PrecisionPlan
    reference: Side
    subjects: Sequence[Subject]
    findings: Findings
    limits: Limits
    choices: Choices
    settings: OnnxRuntime
    budget: int = TRIALS
    say: Say = lambda doing: None

    def __post_init__(self) -> None:
        """Prepare the trials. Raises UsageError if no image shows what is beyond."""
        failed = {check.name for check in judge(self.findings, self.limits) if not check.within}
        self._per_image = limits_of_an_image(failed, self.findings, self.limits)
        self._forced = bool(failed & _FORCED)
        self._stages = EmulatedStages(self.directory, self.plan, self.settings)
        self._pipeline = Pipeline(self.reference.manifest, self.reference.stages)
        self._places: list[int] = []  # of the images that trials run on
        self._wanted: dict[int, Trace] = {}
        self._known: dict[tuple[int, frozenset[Group]], bool] = {}

    def culprits(self) -> Culprits:
        """Search. Raises UsageError if not even all nodes in float32 are enough."""
        parts = [node_groups(model, self.plan.stage(name)) for name, model in self._stages.models.items()]
        everything = tuple(group for part in parts for group in part)
        if not everything:
            raise UsageError("the plan keeps every node in float32 already: there is none to return")
        looked = self.findings
        result: Culprits | None = None
        while True:
            self._places.append(worst_image(looked, self._per_image))
            enough = self._passes(everything)
            if enough is None and result:
                return dataclasses.replace(result, minimal=False)
            if not enough:
                raise UsageError(
                    f"even with every node in float32, {self.subjects[self._places[-1]].name} stays beyond the limits: "
                    f"they are tighter than the rounding of the tensors between stages; raise them with --limit, or "
                    f"plan float32 for those tensors"
                )
            groups, minimal = smallest(parts, self._passes)
            found = with_returned(self.plan, groups)
            self.say(f"bisect: the plan with {len(groups)} groups in float32, on all images")
            looked = self._verified(found)
            checks = judge(looked, self.limits)
            result = Culprits(groups, len(self._known), minimal, checks, found)
            within = is_within(checks)
            if within or not minimal or worst_image(looked, self._per_image) in self._places:
                return result

    def _verified(self, plan: PrecisionPlan) -> Findings:
        """Compare the engine under another plan. The spread between seeds is the reference's: known already."""
        one_seed = dataclasses.replace(self.choices, options=dataclasses.replace(self.choices.options, seeds=1))
        side = emulated_side(self.directory, plan, self.settings)
        looked = compare_sides(self.reference, side, self.subjects, one_seed)
        known = self.findings.loop
        loop = dataclasses.replace(
            looked.loop, spread=known.spread, spread_seeds=known.spread_seeds, spread_images=known.spread_images
        )
        return dataclasses.replace(looked, loop=loop)

    def _passes(self, groups: tuple[Group, ...]) -> bool | None:
        """Whether all chosen images are within the limits; None if no trials are left. Nothing is tried twice."""
        for place in self._places:
            key = place, frozenset(groups)
            if key not in self._known:
                if len(self._known) >= self.budget:
                    return None
                self._known[key] = self._try(place, groups)
                outcome = "within" if self._known[key] else "beyond"
                of = f"trial {len(self._known)} of {self.budget} at most"
                self.say(f"bisect: {of}, {len(groups)} groups in float32: {outcome}")
            if not self._known[key]:
                return False
        return True

    def _try(self, place: int, groups: tuple[Group, ...]) -> bool:
        subject, findings = self.subjects[place], self.findings
        if place not in self._wanted:
            self._wanted[place] = self._pipeline.trace(subject.plane, subject.plan, findings.seed)
        want = self._wanted[place]
        have, runner = self._stages.trace(groups, place, subject, findings.seed)
        answers = runner.answer(want, subject.plan) if self._forced else None
        figures = image_figures(self.directory.manifest, subject.name, want, have, answers, findings.quantile)
        return is_within(check_image(figures, self._per_image, findings.span))


def limits_of_an_image(failed: set[str], findings: Findings, limits: Limits) -> dict[str, float | None]:
    """Return limits under which one image shows what is beyond: those of means become limits of each image."""
    if failed <= _IN_NO_IMAGE:
        raise UsageError(
            f"what is beyond ({', '.join(sorted(failed))}) shows in no single image, so nodes cannot be tried on one; "
            f"name an error to reach instead, such as --limit score=0.001"
        )
    bounds = [limits["score"], limits["score-mean"] if "score-mean" in failed else None]
    if "spread" in failed and (limit := limits["spread"]) is not None and findings.loop.spread:
        bounds.append(limit * findings.loop.spread / findings.span)
    known = [bound for bound in bounds if bound is not None]
    return {**limits, "score": min(known) if known else None}


def worst_image(findings: Findings, limits: Limits) -> int:
    """Return the place of the image that is furthest beyond its limits."""

    def excess(index: int) -> float:
        checks = check_image(findings.images[index], limits, findings.span)
        return max((c.excess if c.name in RULES else float("inf") for c in checks if not c.within), default=0.0)

    return max(range(len(findings.images)), key=excess)


class EmulatedStages:
    """Loads emulated stages with some groups in float32, and runs no loop twice."""

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
        key = place, frozenset(group for group in groups if group.stage is StageName.UNET)
        noise = self._loops.get(key)
        scored = runner if noise is None else Pipeline(manifest, {**loaded, StageName.UNET: _Replay(noise)})
        trace = scored.trace(subject.plane, subject.plan, seed)
        if noise is None and StageName.UNET in loaded and len(subject.plan.windows) == 1:
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
    """A U-Net that repeats its answers: the same state gives the same ones."""

    def __init__(self, noise: FloatArray) -> None:
        self._noise, self._next = noise, 0

    def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
        def call() -> None:
            outputs["noise"][0] = self._noise[self._next]
            self._next += 1

        return call
