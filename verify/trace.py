"""The pipeline of `iqa-run` with recorders between its stages: what an engine computed on the way to a score."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from ..engine.manifest import Manifest, StageName
from ..runtime.builds import NotForShapesError
from ..runtime.executor import Call, Outcome, Planes, StageRunner
from ..runtime.host.executor import BoundLoop, HostExecutor
from ..runtime.plan import Plan

FloatArray = npt.NDArray[np.float32]
BROKEN = 1e9  # stands for a difference to NaN or Inf: JSON has no infinity
HEAD_CALLS = 4  # crops of an image whose ViT maps are kept: at full size they are 38 MB each

_LOOP = ("y", "condition", "noise")
_WATCHED = {StageName.UNET: _LOOP, StageName.DENOISER: _LOOP, StageName.VIT: ("maps",)}


@dataclass(frozen=True, eq=False)
class Trace:
    """What an engine computed for one image and seed. Steps stand in the order they ran, the noisiest first.

    A larger image is restored in several windows: `state`, `noise` and `condition` are those of the first; of the
    first crop, where each has a state of its own.
    """

    state: FloatArray  # (T, 3, H, W), or of the shape that the state has: what each step starts from
    noise: FloatArray  # the same: the network's answer
    condition: FloatArray  # (3, H, W), or the prompts that guide the network
    crops: FloatArray  # (crops, kinds, 3, size, size): the taps as the heads saw them
    maps: FloatArray  # (first HEAD_CALLS crops, kinds, layers, tokens, width)
    vcg: FloatArray  # (crops,), or empty where the model has no such branch
    vda: FloatArray
    own: FloatArray  # the same, where a model has no branches

    def equals(self, other: "Trace") -> bool:
        """Whether every number is the same, bit for bit; NaN equals NaN."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return all(np.array_equal(mine, its, equal_nan=True) for mine, its in pairs)


@dataclass(frozen=True, eq=False)
class Answers:
    """What each stage of an engine answers to the inputs in another engine's trace."""

    noise: FloatArray  # (T, 3, H, W)
    maps: FloatArray  # as in the trace
    vcg: FloatArray  # (first HEAD_CALLS crops,)
    vda: FloatArray


class Pipeline:
    """The stages of one engine under the executor that scores with them."""

    def __init__(self, manifest: Manifest, stages: Mapping[StageName, StageRunner]) -> None:
        self.manifest, self._stages = manifest, stages
        self._recorders = {name: _Recorder(stage, _WATCHED.get(name, ())) for name, stage in stages.items()}
        self._executor = HostExecutor(manifest, self._recorders)

    def trace(self, image: Planes, plan: Plan, seed: int) -> Trace:
        """Score a (3, height, width) image in [-1, 1] and return all that was recorded."""
        for name, recorder in self._recorders.items():
            recorder.start(len(plan.sampling.steps) if name is self.manifest.flow.loop.stage else HEAD_CALLS)
        # A candidate may well overflow: that is a finding, not a warning.
        with np.errstate(all="ignore"):
            outcome = self._executor.run(image, plan, seed)
        steps = self._recorded(self.manifest.flow.loop.stage)
        vcg, vda, own = branch_scores(outcome)
        return Trace(
            state=_stacked(steps, "y", 0),
            noise=_stacked(steps, "noise", 0),
            condition=steps[0]["condition"][0] if steps else np.empty(0, np.float32),
            crops=outcome.crops,
            maps=_stacked(self._recorded(StageName.VIT), "maps"),
            vcg=vcg,
            vda=vda,
            own=own,
        )

    def scores(self, image: Planes, plan: Plan, seed: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return what `branch_scores` does; record nothing."""
        for recorder in self._recorders.values():
            recorder.start(0)
        return branch_scores(self._executor.run(image, plan, seed))

    @np.errstate(all="ignore")  # as in `trace`
    def answer(self, trace: Trace, plan: Plan) -> Answers:
        """Run every stage on the inputs that a trace of a plan has for it."""
        noise = np.empty_like(trace.noise)
        if len(noise):
            loop, condition = self.manifest.flow.loop, np.ascontiguousarray(trace.condition[None], np.float32)
            denoiser = BoundLoop(self._stages[loop.stage], noise.shape[1:], loop.scalar, {"condition": condition})
            for index, level in enumerate(self._levels(plan)):
                denoiser.y[:] = trace.state[index]
                denoiser(float(level))
                noise[index] = denoiser.noise
        maps = np.empty_like(trace.maps)
        for index in range(len(maps)):
            maps[index] = self._run(StageName.VIT, {"image": trace.crops[index]}, "maps", maps[index].shape)
        # One crop at a time, as scoring does it.
        vcg = [self._run(StageName.VCG, {"maps": each[None]}, "score", (1,))[0] for each in trace.maps]
        looked = trace.crops[:HEAD_CALLS] if len(trace.vda) else ()
        vda = [self._run(StageName.VDA, {"images": crop[None]}, "score", (1,))[0] for crop in looked]
        return Answers(noise, maps, np.array(vcg, np.float32), np.array(vda, np.float32))

    def batch_difference(self, trace: Trace, plan: Plan) -> dict[str, float]:
        """Return, by stage, how far the answers to two inputs at once are from those in `trace`, one of our own.

        As a share of the largest answer. A stage is left out if the trace has no two inputs for it, or if it does not
        take two at once.
        """
        pairs: dict[str, tuple[FloatArray, FloatArray]] = {}

        def compare(name: StageName, inputs: dict[str, FloatArray], output: str, alone: FloatArray) -> None:
            with contextlib.suppress(NotForShapesError):
                pairs[name] = alone, self._run(name, inputs, output, alone.shape)

        if len(trace.noise) > 1:
            ends = [0, -1]
            level = self._levels(plan)[ends].reshape(2, 1)
            loop = self.manifest.flow.loop
            inputs = {"y": trace.state[ends], "condition": np.stack([trace.condition] * 2), loop.scalar: level}
            compare(loop.stage, inputs, "noise", trace.noise[ends])
        if len(trace.maps):
            compare(StageName.VIT, {"image": trace.crops[0, :1]}, "maps", trace.maps[0, :1])
        if len(trace.maps) > 1:
            compare(StageName.VCG, {"maps": trace.maps[:2]}, "score", trace.vcg[:2])
        if len(trace.vda) > 1:
            compare(StageName.VDA, {"images": trace.crops[:2]}, "score", trace.vda[:2])
        return {name: _difference(*pair) for name, pair in pairs.items()}

    def _levels(self, plan: Plan) -> FloatArray:
        """Return what the network is told at a plan's steps, as they run."""
        return self.manifest.schedule.coefficients.noise_level[list(plan.sampling.steps)][::-1]

    def _recorded(self, name: StageName) -> list[dict[str, FloatArray]]:
        return self._recorders[name].calls if name in self._recorders else []

    def _run(self, name: StageName, inputs: dict[str, FloatArray], output: str, shape: tuple[int, ...]) -> FloatArray:
        result = np.empty(shape, np.float32)
        bound = {key: np.ascontiguousarray(value, np.float32) for key, value in inputs.items()}
        self._stages[name].bind(bound, {output: result})()
        return result


def branch_scores(outcome: Outcome) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the scores of an image's crops by VCG, by VDA and by a model without branches; empty for none."""
    verdicts = outcome.verdicts
    vcg = np.array([v.vcg.score for v in verdicts if v.vcg], np.float32)
    vda = np.array([v.vda.score for v in verdicts if v.vda], np.float32)
    return vcg, vda, np.array([v.score for v in verdicts if v.score is not None], np.float32)


class _Recorder:
    """A stage that keeps copies of what its calls read and write; for one thread."""

    def __init__(self, stage: StageRunner, names: tuple[str, ...]) -> None:
        self._stage, self._names, self._limit = stage, names, 0
        self.calls: list[dict[str, FloatArray]] = []

    def start(self, limit: int) -> None:
        """Forget all recorded calls, and record the next `limit` ones."""
        self.calls, self._limit = [], limit

    def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
        call = self._stage.bind(inputs, outputs)
        watched = {name: array for name, array in {**inputs, **outputs}.items() if name in self._names}

        def run() -> None:
            call()
            if len(self.calls) < self._limit:
                known = self.calls[0] if self.calls else {}
                # The condition is the same at every step of a window: one copy will do.
                self.calls.append(
                    {n: known[n] if n == "condition" and n in known else a.copy() for n, a in watched.items()}
                )

        return run


def _stacked(calls: list[dict[str, FloatArray]], name: str, index: int | None = None) -> FloatArray:
    values = [call[name] if index is None else call[name][index] for call in calls]
    return np.stack(values) if values else np.empty(0, np.float32)


def _difference(alone: FloatArray, together: FloatArray) -> float:
    largest = float(np.abs(alone).max())
    with np.errstate(all="ignore"):
        error = float(np.abs(together.astype(np.float64) - alone).max())
    if not math.isfinite(error):
        return 0.0 if np.array_equal(alone, together, equal_nan=True) else BROKEN
    return error / largest if largest else error
