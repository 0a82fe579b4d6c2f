"""Ranges and histograms of the tensors inside an engine's stages, per tensor and step of the real loop.

The runtime's own scorer runs the loop. Its stages are `Recorder`s, which return the inner tensors too and record them.
The U-Net has as many steps as the loop, every other stage has one, over all image kinds.
"""

import dataclasses
import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from ..engine.atomic import replacing
from ..engine.codec import decode, encode
from ..engine.manifest import EngineDirectory, Precision, StageName, open_engine
from ..errors import BackendError, EngineError, ImageError, OutputError, UsageError, first_line
from ..export.precision import PLAN_SCHEMA, Kept, PrecisionPlan, element_types, plan_stage
from ..runtime.executor import Call
from ..runtime.host.onnx_stage import OnnxRuntime, make_session
from ..runtime.images import read_image
from ..runtime.results import Options
from ..runtime.scorer import Scorer
from . import ranges
from .ranges import BINS, Counts, FloatArray

SCHEMA = 1
NAME = "statistics"
MIN_IMAGES = 4
SAVE_SECONDS = 30.0  # a killed run loses at most this much work
# fp16 rounding costs every tensor 8e-8 of its power. A node that loses ten times as much near zero stays float32.
MAX_FP16_LOSS = 1e-6

_WATCHED = {
    "Add", "BatchNormalization", "Concat", "Conv", "Div", "Gemm", "GroupNormalization", "InstanceNormalization",
    "LayerNormalization", "MatMul", "ReduceMean", "ReduceSum", "Softmax",
}  # fmt: skip


@dataclass(frozen=True)
class CalibrationImage:
    """An image that was recorded: its name for people, the digest of its pixels to recognise it."""

    name: str
    digest: str
    seed: int


@dataclass(frozen=True)
class Skipped:
    """An image that could not be used."""

    name: str
    why: str


@dataclass(frozen=True, eq=False)
class StageStatistics:
    """What was recorded of one stage: arrays of shape (tensors, steps); `histogram` has the bins as a third axis."""

    tensors: tuple[str, ...]
    low: FloatArray  # +inf where nothing was seen
    high: FloatArray
    nonfinite: Counts
    overflow: Counts  # of finite values that fp16 rounds to infinity
    histogram: Counts

    @staticmethod
    def empty(tensors: tuple[str, ...], steps: int) -> "StageStatistics":
        """Return statistics of nothing."""
        shape = (len(tensors), steps)
        return StageStatistics(
            tensors,
            np.full(shape, np.inf, np.float32),
            np.full(shape, -np.inf, np.float32),
            np.zeros(shape, np.int64),
            np.zeros(shape, np.int64),
            np.zeros((*shape, BINS), np.int64),
        )

    def observe(self, row: int, step: int, values: FloatArray) -> None:
        """Add the values of a tensor, by its place in `tensors`."""
        counts, nonfinite = ranges.histogram(values)
        self.histogram[row, step] += counts
        self.nonfinite[row, step] += nonfinite
        finite = values[np.isfinite(values)] if nonfinite else values
        if finite.size:
            low, high = finite.min(), finite.max()
            self.low[row, step] = min(self.low[row, step], low)
            self.high[row, step] = max(self.high[row, step], high)
            if max(-low, high) >= ranges.FP16_OVERFLOW:
                self.overflow[row, step] += np.count_nonzero(np.abs(finite) >= ranges.FP16_OVERFLOW)

    def distribution(self, tensor: str) -> tuple[ranges.Weights, float, float]:
        """Return a tensor's distribution with every step counting the same, and its extremes over all steps."""
        row = self.tensors.index(tensor)
        low, high = float(self.low[row].min()), float(self.high[row].max())
        weights = ranges.balanced(self.histogram[row])
        return (weights, low, high) if low <= high else (weights, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Statistics:
    """What was recorded of an engine on some images. `samples` are sorted: their order on disk changes nothing."""

    engine: str  # engine_id
    samples: tuple[CalibrationImage, ...]
    stages: dict[StageName, StageStatistics]

    @property
    def digest(self) -> str:
        """Sixteen hex digits of engine, pixels and seeds."""
        seen = [(sample.digest, sample.seed) for sample in self.samples]
        text = json.dumps({"schema": SCHEMA, "engine": self.engine, "samples": seen})
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def collect(
    path: Path,
    images: Sequence[Path],
    output: Path,
    *,
    seed: int = 0,
    crops: int = 1,
    minimum: int | None = None,
    say: Callable[[str], None] = lambda _text: None,
) -> tuple[Statistics, tuple[Skipped, ...]]:
    """Run the loop of the engine `path` on images and write `statistics.npz` and `.json` into the folder `output`.

    Statistics that are there already are added to, and their images do not run again. Raises UsageError if the images
    cannot stand for real ones: fewer than `minimum` (default: MIN_IMAGES) different ones, or only flat ones.
    """
    directory = open_engine(path)
    statistics = _start(directory, output)
    usable, skipped = read_usable(images, directory.manifest.crop.size, MIN_IMAGES if minimum is None else minimum)
    known = {(sample.digest, sample.seed) for sample in statistics.samples}
    todo = {digest: name for digest, name in usable.items() if (digest, seed) not in known}
    saved = time.monotonic()
    if todo:
        recorders = {
            stage.name: Recorder(directory, stage.name, statistics.stages[stage.name])
            for stage in directory.manifest.stages
        }
        scorer = Scorer(directory.manifest, recorders, backend="calibration")
    for done, (digest, name) in enumerate(todo.items()):
        say(f"calibrating: {done + 1} of {len(todo)}, {name}")
        scorer.score(name, Options(seed=seed, crops=crops))  # the recorders add to the statistics in place
        samples = sorted(
            (*statistics.samples, CalibrationImage(name, digest, seed)), key=lambda seen: (seen.digest, seen.seed)
        )
        statistics = dataclasses.replace(statistics, samples=tuple(samples))
        if time.monotonic() - saved > SAVE_SECONDS:
            write(statistics, output)
            saved = time.monotonic()
    if todo:
        write(statistics, output)
    return statistics, skipped


def read(folder: Path) -> Statistics:
    """Read the statistics in a folder. Raises UsageError naming what is wrong with them."""
    path = folder / f"{NAME}.npz"

    def damaged(message: str) -> UsageError:
        return UsageError(f"{path} is not whole ({message}); delete it and run iqa-calibrate again")

    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            header = json.loads(bytes(arrays["header"]).decode())
            parts = {name: arrays[name] for name in arrays.files if name != "header"}
    except FileNotFoundError as exc:
        raise UsageError(f"{folder} holds no {NAME}.npz; make it with iqa-calibrate") from exc
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except (ValueError, KeyError, RecursionError, EOFError, zipfile.BadZipFile) as exc:
        raise damaged(first_line(exc)) from exc
    parsed = decode(_Header, header, "header", damaged)
    if parsed.schema != SCHEMA:
        raise damaged(f"it has schema version {parsed.schema}, this diffiqa reads version {SCHEMA}")
    fields = [field.name for field in dataclasses.fields(StageStatistics)[1:]]
    stages = {}
    for name, tensors in parsed.tensors.items():
        expected = StageStatistics.empty(tensors, parsed.steps[name])
        for field in fields:
            wanted, found = getattr(expected, field), parts.get(f"{name}.{field}")
            if found is None or found.shape != wanted.shape or found.dtype != wanted.dtype:
                raise damaged(f"{name}.{field} does not fit")
        stages[name] = StageStatistics(tensors, **{field: parts[f"{name}.{field}"] for field in fields})
    return Statistics(parsed.engine, parsed.samples, stages)


def write(statistics: Statistics, folder: Path) -> None:
    """Write two files into a folder: the arrays, then a summary for people."""
    header = _Header(
        SCHEMA,
        statistics.engine,
        statistics.samples,
        {name: stage.tensors for name, stage in statistics.stages.items()},
        {name: stage.low.shape[1] for name, stage in statistics.stages.items()},
    )
    arrays: dict[str, Any] = {"header": np.frombuffer(json.dumps(encode(header)).encode(), np.uint8)}
    for name, stage in statistics.stages.items():
        for field in dataclasses.fields(stage)[1:]:
            arrays[f"{name}.{field.name}"] = getattr(stage, field.name)
    memory = io.BytesIO()
    np.savez_compressed(memory, **arrays)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"{NAME}.npz") as stream:
            stream.write(memory.getbuffer())
        with replacing(folder / f"{NAME}.json") as stream:
            stream.write((json.dumps(summary(statistics), indent=1, ensure_ascii=False) + "\n").encode())
    except OSError as exc:
        raise OutputError(f"cannot write into {folder}: {exc.strerror or exc}") from exc


def summary(statistics: Statistics) -> dict[str, Any]:
    """Return the summary for people: ranges and shares of every tensor over all steps, as JSON values."""
    stages: dict[str, Any] = {}
    for name, stage in statistics.stages.items():
        stages[name] = {}
        for row, tensor in enumerate(stage.tensors):
            weights, low, high = stage.distribution(tensor)
            counts = stage.histogram[row].sum(axis=0)
            nonzero = np.delete(counts, ranges.ZERO)
            flushed = nonzero[np.delete(ranges.LOWER, ranges.ZERO) < ranges.FP16_FLUSH]
            count = max(1, int(counts.sum()))
            stages[name][tensor] = {
                "low": low,
                "high": high,
                "percentiles": {str(p): ranges.quantile(weights, p / 100) for p in (0.01, 1, 50, 99, 99.99)},
                "largest_by_step": [
                    float(f"{max(-low, high):.4g}") if low <= high else None
                    for low, high in zip(stage.low[row], stage.high[row], strict=True)
                ],
                "fp16_overflow_share": int(stage.overflow[row].sum()) / count,
                "fp16_flush_share": float(flushed.sum() / max(1, nonzero.sum())),
                "nonfinite": int(stage.nonfinite[row].sum()),
            }
    return {
        "schema": SCHEMA,
        "engine": statistics.engine,
        "digest": statistics.digest,
        "samples": encode(statistics.samples),
        "stages": stages,
    }


def fp16_plan(directory: EngineDirectory, statistics: Statistics) -> PrecisionPlan:
    """Return the plan made from the graphs, plus every node that reads or writes values which fp16 cannot hold.

    Both the writer and the readers of such a tensor stay float32: a cast between them would lose the values again.
    """
    check_engine(directory, statistics)
    stages = []
    for stage in directory.manifest.stages:
        model = onnx.load(directory.file(stage.file))
        plan = plan_stage(model, stage, Precision.FP16, directory.manifest.flow.loop)
        reasons = {kept.node: kept.why for kept in plan.float32}
        unfit = _unfit(statistics.stages[stage.name])
        for node in model.graph.node:
            for tensor in (*node.input, *node.output):
                if tensor in unfit and node.name not in reasons:
                    reasons[node.name] = f"{tensor} {unfit[tensor]}"
        kept = tuple(Kept(n.name, n.op_type, reasons[n.name]) for n in model.graph.node if n.name in reasons)
        stages.append(dataclasses.replace(plan, float32=kept))
    return PrecisionPlan(PLAN_SCHEMA, Precision.FP16, tuple(stages))


def check_engine(directory: EngineDirectory, statistics: Statistics) -> None:
    """Raise EngineError unless the statistics are of this engine."""
    if statistics.engine != directory.manifest.engine_id:
        raise EngineError(
            f"the statistics are of engine {statistics.engine}, {directory.path} is engine "
            f"{directory.manifest.engine_id}; run iqa-calibrate on it, into another folder"
        )


def _unfit(stage: StageStatistics) -> dict[str, str]:
    """Return the tensors that fp16 cannot hold, with the reason."""
    reasons = {}
    for row, tensor in enumerate(stage.tensors):
        weights, low, high = stage.distribution(tensor)
        if stage.nonfinite[row].any() or stage.overflow[row].any():
            reasons[tensor] = f"reaches {max(-low, high):.3g}, beyond fp16"
        elif (loss := ranges.fp16_loss(weights)) > MAX_FP16_LOSS:
            reasons[tensor] = f"would lose {loss:.1e} of its power to fp16's spacing near zero"
    return reasons


class Recorder:
    """Runs a stage through ONNX Runtime and adds its tensors to `statistics`, at the step that it is told."""

    def __init__(self, directory: EngineDirectory, name: StageName, statistics: StageStatistics) -> None:
        self._statistics = statistics
        self._levels, self._loop = directory.manifest.schedule.coefficients.noise_level, directory.manifest.flow.loop
        stage = directory.manifest.stage(name)
        if stage is None:
            raise EngineError(f"{directory.path} has no stage {name}")
        self._name = name
        fed, results = ([spec.name for spec in specs] for specs in (stage.inputs, stage.outputs))
        model = onnx.load(directory.file(stage.file))
        inside = [name for name in statistics.tensors if name not in {*fed, *results}]
        model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inside)
        self._outputs = [*results, *inside]
        self._session = make_session(model.SerializeToString(), OnnxRuntime(), f"stage {name}")

    def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
        """Return a call that runs the stage from and into these arrays, and records."""

        def call() -> None:
            step = 0
            if self._name is self._loop.stage:
                step = int(np.argmin(np.abs(self._levels - inputs[self._loop.scalar][0, 0])))
            try:
                values = self._session.run(self._outputs, dict(inputs))
            except Exception as exc:
                raise BackendError(f"onnxruntime failed in stage {self._name}: {first_line(exc)}") from exc
            seen = {**inputs, **dict(zip(self._outputs, values, strict=True))}
            for row, tensor in enumerate(self._statistics.tensors):
                self._statistics.observe(row, step, seen[tensor])
            for name, array in outputs.items():
                np.copyto(array, seen[name])

        return call


def watched(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the tensors to record: floats that the operators which decide precision read or write.

    Shapes (whole numbers) and constants are not among them.
    """
    floats = {name for name, kind in element_types(model).items() if kind == TensorProto.FLOAT}
    floats -= {tensor.name for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in _WATCHED]
    return tuple(dict.fromkeys(name for node in nodes for name in (*node.input, *node.output) if name in floats))


@dataclass(frozen=True)
class _Header:
    schema: int
    engine: str
    samples: tuple[CalibrationImage, ...]
    tensors: dict[StageName, tuple[str, ...]]
    steps: dict[StageName, int]


def _start(directory: EngineDirectory, output: Path) -> Statistics:
    """Return what the folder holds of this engine, or statistics of nothing."""
    if (output / f"{NAME}.npz").exists():
        statistics = read(output)
        check_engine(directory, statistics)
        return statistics
    m = directory.manifest
    stages = {
        stage.name: StageStatistics.empty(
            watched(onnx.load(directory.file(stage.file))), m.schedule.steps if stage.name is m.flow.loop.stage else 1
        )
        for stage in m.stages
    }
    return Statistics(m.engine_id, (), stages)


def read_usable(images: Sequence[Path], side: int, minimum: int) -> tuple[dict[str, str], tuple[Skipped, ...]]:
    """Return names of the usable images by digest, and those that cannot be read. Raises UsageError if too few stay."""
    usable: dict[str, str] = {}
    skipped: list[Skipped] = []
    flat = 0
    for path in images:
        try:
            image = read_image(path, min_side=side)
        except ImageError as exc:
            skipped.append(Skipped(str(path), str(exc)))
            continue
        flat += image.digest not in usable and bool((image.pixels == image.pixels[0, 0]).all())
        usable.setdefault(image.digest, str(path))
    broken = f"; {len(skipped)} could not be read, the first: {skipped[0].why}" if skipped else ""
    if len(usable) == 1 and len(images) - len(skipped) > 1:
        raise UsageError(f"all {len(images) - len(skipped)} calibration images are the same picture{broken}")
    if usable and flat == len(usable):
        raise UsageError(f"all calibration images are of a single colour: no range can be taken from them{broken}")
    if len(usable) < minimum:
        raise UsageError(
            f"calibration needs at least {minimum} different images, {len(usable)} can be used{broken}; give more"
        )
    return usable, tuple(skipped)
