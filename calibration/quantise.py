"""float32 ONNX stages → 8-bit ones in an engine directory: explicit QuantizeLinear/DequantizeLinear by measured ranges.

There are three forms. ONNX Runtime's CPU kernels compute in 8 bits where a convolution has uint8 activations, int32
biases and a quantised result. TensorRT takes signed numbers around zero and float biases, and chooses kernels itself.
OpenVINO takes the same; what lies between the convolutions of the U-Net then costs as much as they do, so it has its
attention and skip connections in 8 bits too.
"""

import dataclasses
import enum
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, checker, helper, numpy_helper, shape_inference

from ..engine.codec import encode
from ..engine.manifest import (
    MANIFEST,
    Check,
    EngineDirectory,
    FileEntry,
    Manifest,
    Source,
    Stage,
    StageName,
    file_sha256,
    open_engine,
)
from ..errors import EngineError, ExportError, UsageError, first_line, member
from ..export.compare import compare_with_original
from ..export.engine import one_image, writing
from ..export.macs import macs_by_node
from ..export.precision import Kept, noise_embedding, replace_nodes
from ..export.selftest import write_self_test
from ..runtime.host.onnx_stage import OnnxRuntime
from ..runtime.host.stages import load_stages
from ..runtime.scorer import Scorer
from .ranges import Method, choose_range
from .statistics import NAME, StageStatistics, Statistics, check_engine, read

FloatArray = npt.NDArray[np.float32]
SEED = 20260102  # of the inputs on which 8 bits are compared with float32
TOLERANCE = 0.5  # largest error, of the largest value: more is not rounding
FP8_LARGEST = 448.0
_FP8: Any = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
_BIAS_LIMIT = 2.0**30
_FEW = 0.001  # of the multiplications of a stage
_SIDE = 224  # of images of no fixed size, when multiplications are counted: shares hardly depend on it
_LIMITED = {"Relu", "Clip"}  # Clip is what ReLU6 becomes
_IMAGES = {"y", "condition", "image", "images", "crop"}  # inputs of stages, with three channels: others are features


class Number(enum.StrEnum):
    """What is computed in."""

    INT8 = "int8"
    FP8 = "fp8"


class Target(enum.StrEnum):
    """Whose form of Q/DQ is written."""

    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"
    TENSORRT = "tensorrt"


@dataclass(frozen=True)
class Recipe:
    """How stages become 8-bit."""

    number: Number = Number.INT8
    target: Target = Target.ONNXRUNTIME
    # Measured on the trained `mini`: with more clipping the U-Net and VCG lose more than they gain.
    method: Method = Method.PERCENTILE
    percentile: float = 99.999

    @staticmethod
    def of(number: str, target: str | None = None, **choices: Any) -> "Recipe":
        """Return the recipe for int8, fp8 or mixed. Without a `target`, its form is one that something can run."""
        eight = Number.INT8 if number == "mixed" else member(Number, number)
        default = Target.ONNXRUNTIME if eight is Number.INT8 else Target.TENSORRT
        return Recipe(eight, member(Target, target) if target else default, **choices)

    def __post_init__(self) -> None:
        """Refuse what cannot run."""
        if self.number is Number.FP8 and self.target is not Target.TENSORRT:
            whose = {Target.ONNXRUNTIME: "ONNX Runtime's", Target.OPENVINO: "OpenVINO's"}[self.target]
            raise UsageError(f"{whose} CPU kernels do not compute in fp8; fp8 is for --target tensorrt")
        if not 50 < self.percentile <= 100:
            raise UsageError(f"percentile must be above 50 and at most 100, not {self.percentile}")


@dataclass(frozen=True)
class Grid:
    """The numbers that a tensor is rounded to: `scale · (integer − zero_point)`."""

    tensor: str
    scale: float
    zero_point: int


@dataclass(frozen=True)
class StageQuantisation:
    """What was done to a stage: the grids of its activations, and the layers that stay float32."""

    name: StageName
    onnx_sha256: str  # of the float32 file
    quantised: tuple[str, ...]  # nodes
    grids: tuple[Grid, ...]
    float32: tuple[Kept, ...]


@dataclass(frozen=True)
class QuantisedStage:
    """A finished stage, before and after."""

    stage: Stage
    float_bytes: int
    report: StageQuantisation


def quantise_engine(
    path: Path,
    target: Path,
    calibration: Path,
    recipe: Recipe,
    *,
    only: Collection[StageName] = tuple(StageName),
    force: bool = False,
    say: Callable[[str], None] = lambda _text: None,
) -> tuple[Manifest, list[QuantisedStage]]:
    """Write the engine of `path` with 8-bit stages to `target`, by the statistics in the folder `calibration`.

    Stages that are not in `only` are copied. With `force`, `path` and `target` may be the same place.

    Raises EngineError if the statistics are of another engine or `target` must not be replaced, ExportError if a
    quantised stage is wrong. Until everything is done, `target` stays as it is.
    """
    directory = open_engine(path)
    if not any(stage.name in only for stage in directory.manifest.stages):
        raise UsageError(f"no stage of {path} is to be quantised: name one")
    statistics = read_fitting(calibration, directory)
    file = calibration / f"{NAME}.npz"
    digest = f"diffiqa {NAME} {statistics.digest}"
    source = Source(NAME, file.name, file.stat().st_size, file_sha256(file), digest)
    done = []
    with writing(target, force=force) as work:
        stages = []
        for stage in directory.manifest.stages:
            file = work / stage.file.path
            file.parent.mkdir(exist_ok=True)
            if stage.name in only:
                done.append(write_stage(directory, stage, statistics, recipe, file, say))
                stages.append(done[-1].stage)
            else:
                shutil.copyfile(directory.file(stage.file), file)
                stages.append(stage)
        manifest = _manifest(directory.manifest, statistics, source, recipe, tuple(stages), done)
        folder = work / "calibration"
        folder.mkdir()
        reports = {"recipe": recipe, "statistics": statistics.digest, "stages": [made.report for made in done]}
        (folder / "quantisation.json").write_text(json.dumps(encode(reports), indent=1) + "\n", encoding="utf-8")
        say("self-test: scoring in float32")
        original = Scorer(manifest, load_stages(directory, OnnxRuntime()), backend="float32")
        write_self_test(work, manifest, original, in_8_bits=recipe.number)
        (work / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest, done


def read_fitting(calibration: Path, directory: EngineDirectory) -> Statistics:
    """Return the statistics in a folder. Raises EngineError if they are of another engine, or the engine is 8-bit."""
    statistics = read(calibration)
    check_engine(directory, statistics)
    if any(source.role == NAME for source in directory.manifest.provenance.sources):
        raise EngineError(f"{directory.path} is quantised already; start from the float32 engine")
    return statistics


def write_stage(
    directory: EngineDirectory,
    stage: Stage,
    statistics: Statistics,
    recipe: Recipe,
    file: Path,
    say: Callable[[str], None],
) -> QuantisedStage:
    """Write the 8-bit form of a stage to `file`. Raises ExportError if it is no likeness of the float32 one."""
    say(f"{stage.name}: quantising to {recipe.number}")
    model = onnx.load(directory.file(stage.file))
    quantised, report = quantise_stage(model, stage, statistics.stages[stage.name], recipe)
    onnx.save_model(quantised, file)
    say(f"{stage.name}: comparing with float32")
    checks = _compare(directory, stage, file) if recipe.number is Number.INT8 else ()
    entry = FileEntry(stage.file.path, file.stat().st_size, file_sha256(file))
    made = dataclasses.replace(stage, file=entry, checks=checks)
    return QuantisedStage(made, stage.file.bytes, report)


def quantise_stage(
    model: onnx.ModelProto, stage: Stage, statistics: StageStatistics, recipe: Recipe
) -> tuple[onnx.ModelProto, StageQuantisation]:
    """Return the 8-bit form of a stage and what was done. Raises ExportError if it is not valid ONNX."""
    quantised = onnx.ModelProto()
    quantised.CopyFrom(model)
    kept = _kept(quantised.graph, statistics, macs_by_node(model, one_image(stage.inputs, _SIDE)))
    between = recipe.target is Target.OPENVINO and stage.name is StageName.UNET
    work = _Quantiser(quantised, statistics, recipe, {entry.node for entry in kept}, between=between)
    work.run()
    try:
        checker.check_model(quantised, full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError) as exc:
        raise ExportError(f"stage {stage.name}: the quantised graph is not valid ONNX: {first_line(exc)}") from exc
    report = StageQuantisation(stage.name, stage.file.sha256, tuple(work.done), tuple(work.grids.values()), kept)
    return quantised, report


def _kept(graph: onnx.GraphProto, statistics: StageStatistics, macs: Mapping[str, int]) -> tuple[Kept, ...]:
    """Return the weight layers that stay float32, and why. `macs` has the multiplications of each node."""
    layers = _weight_layers(graph)
    embedding = set(noise_embedding(graph))
    before = _before(graph, layers)
    after = _passed_on(graph, {n.output[0] for n in graph.node if n.op_type == "Conv" and n.input[0] in before})
    few = _FEW * sum(macs.values())
    unwell = {t for row, t in enumerate(statistics.tensors) if statistics.nonfinite[row].any()}
    followed = _followed(graph, layers)
    kept = []
    for node in graph.node:
        if node.name not in layers:
            continue
        why = None
        if node.name in embedding:
            why = "noise embedding: it must tell levels near 1 apart"
        elif node.op_type == "Conv" and node.input[0] in before:
            why = "first convolution: it reads the image"
        elif node.input[0] in after:
            why = "second convolution: rounding what the first one found moves scores most"
        elif node.name not in followed:
            why = "last layer: nothing after it evens its error out"
        elif node.op_type != "Conv" and macs[node.name] < few:
            why = "a small product: 8 bits save no time here, and cost the score"
        elif unwell & {node.input[0], node.output[0]}:
            why = "values that are not finite were seen here"
        elif node.op_type == "Gemm" and any(a.name in {"alpha", "beta"} and a.f != 1 for a in node.attribute):
            why = "a scaled product"
        if why:
            kept.append(Kept(node.name, node.op_type, why))
    return tuple(kept)


def _weight_layers(graph: onnx.GraphProto) -> set[str]:
    """Return the nodes that multiply an activation with stored weights."""
    weights = {tensor.name: len(tensor.dims) for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    return {
        node.name
        for node in graph.node
        if (node.op_type in {"Conv", "Gemm"} or (node.op_type == "MatMul" and weights.get(node.input[1]) == 2))
        and node.input[1] in weights
        and node.input[0] not in weights
    }


def _before(graph: onnx.GraphProto, layers: set[str]) -> set[str]:
    """Return the tensors that depend on an image by a path through none of `layers`. Its size is no value."""
    inputs = {i.name: i.type.tensor_type.shape.dim for i in graph.input if i.name in _IMAGES}
    known = {name for name, dims in inputs.items() if len(dims) > 3 and dims[-3].dim_value == 3}
    for node in graph.node:
        if node.op_type != "Shape" and node.name not in layers and known.intersection(node.input):
            known |= set(node.output)
    return known


def _passed_on(graph: onnx.GraphProto, start: set[str]) -> set[str]:
    """Return `start` and what only ReLU, ReLU6 and pooling make of it."""
    known = set(start)
    for node in graph.node:
        if node.op_type in {*_LIMITED, "MaxPool"} and node.input[0] in known:
            known |= set(node.output)
    return known


def _followed(graph: onnx.GraphProto, layers: set[str]) -> set[str]:
    """Return the nodes whose results reach another weight layer."""
    read: set[str] = set()
    followed = set()
    for node in reversed(graph.node):
        if set(node.output) & read:
            followed.add(node.name)
            read |= set(node.input)
        if node.name in layers:
            read.add(node.input[0])
    return followed


class _Quantiser:
    """One pass over a graph in order; knows which tensors it has rounded to which grid."""

    def __init__(
        self, model: onnx.ModelProto, statistics: StageStatistics, recipe: Recipe, kept: set[str], *, between: bool
    ) -> None:
        self.graph, self.statistics, self.recipe = model.graph, statistics, recipe
        self.between = between  # whether attention, and whatever reads a skip concatenation, is 8-bit as well
        self.layers = _weight_layers(model.graph) - kept
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self.producers = {name: node for node in self.graph.node for name in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        inferred = shape_inference.infer_shapes(model, strict_mode=True).graph
        self.dims = {v.name: v.type.tensor_type.shape.dim for v in (*inferred.value_info, *inferred.input)}
        self.grids: dict[str, Grid] = {}  # of the tensors that are rounded
        self.rounded: dict[str, str] = {}  # what holds them, rounded
        self.centred = {
            name for node in self.graph.node if node.name in self.layers for name in self._halves(node.input[0])
        }
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.done: list[str] = []

    def run(self) -> None:
        read_joined = {node.input[0] for node in self.graph.node if node.name in self.layers}
        for node in self.graph.node:
            if node.name in self.layers:
                self._layer(node)
                self.done.append(node.name)
            elif self.between and node.output[0] in read_joined and self._halves(node.output[0]):
                self._join_for_all(node.output[0])
            else:
                if self.between and node.op_type == "MatMul" and set(node.input) <= set(self.statistics.tensors):
                    node.input[:] = [self._rounded(name)[0] for name in node.input]
                    self.done.append(node.name)
                self.nodes.append(node)
            if self.recipe.target is Target.ONNXRUNTIME:
                self._round_result(node)
        self.graph.initializer.extend(self.constants)
        replace_nodes(self.graph, self.nodes)

    def _layer(self, node: onnx.NodeProto) -> None:
        """Write a convolution or product on rounded input and weights."""
        weight = numpy_helper.to_array(self.weights[node.input[1]])
        x, halves = node.input[0], self._halves(node.input[0])
        if halves:
            node.input[0], grid, factors = self._joined(x, halves)
            weight = weight * factors.reshape(-1, *[1] * (weight.ndim - 2))  # of (outputs, inputs, …)
        else:
            node.input[0], grid = self._rounded(x)
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        axis = 0 if node.op_type == "Conv" or transposed else 1
        bias = self.weights[node.input[2]] if len(node.input) > 2 and node.input[2] else None
        has_whole_bias = bias is not None and self.recipe.target is Target.ONNXRUNTIME
        offsets = numpy_helper.to_array(bias) if bias is not None else np.zeros(1, np.float32)
        scales = np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis)) / self._limit
        if has_whole_bias:
            # A channel of hardly any weight would make its bias too large a number for 32 bits.
            scales = np.maximum(scales, np.abs(offsets) / (grid.scale * _BIAS_LIMIT))
        scales = np.where(scales > 0, scales, 1.0).astype(np.float32)
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        node.input[1] = self._dequantised(
            f"{node.name}.weight", self._numbers(weight / scales.reshape(shape)), scales, axis
        )
        if has_whole_bias:
            whole = np.rint(offsets / (grid.scale * scales.astype(np.float64))).astype(np.int32)
            node.input[2] = self._dequantised(
                f"{node.name}.bias", whole, (grid.scale * scales.astype(np.float64)).astype(np.float32), 0
            )
        self.nodes.append(node)

    def _round_result(self, node: onnx.NodeProto) -> None:
        """Round the result of a convolution, or of the ReLU after it: else ONNX Runtime does not run it in 8 bits.

        Its matrix products return float32 directly.
        """
        source = self.producers.get(node.input[0]) if node.op_type in _LIMITED else None
        if source is not None and source.name in self.layers and source.op_type == "Conv" and self._limited(source):
            self._round_in_place(node, source.output[0])
        elif node.op_type == "Conv" and node.name in self.layers and not self._limited(node):
            self._round_in_place(node, node.output[0])

    def _limited(self, node: onnx.NodeProto) -> bool:
        """Return whether all that is read of a node's result is its ReLU or ReLU6."""
        readers = self.readers.get(node.output[0], [])
        return len(readers) == 1 and readers[0].op_type in _LIMITED

    def _round_in_place(self, node: onnx.NodeProto, measured: str) -> None:
        """Make a node's result go through Q/DQ under its own name."""
        name = node.output[0]
        if node.op_type == "Clip" and name in self.statistics.tensors:
            measured = name  # what ReLU6 lets through may be a small part of what it reads
        grid = self._grid(name, measured, positive=node.op_type == "Relu")
        node.output[0] = f"{name}.unquantised"
        self._pair(f"{name}.unquantised", name, grid)

    def _halves(self, name: str) -> list[str]:
        """Return the parts of a skip concatenation that a layer reads directly, or nothing.

        The parts come from different depths of the network and differ in range, so each gets a scale of its own.
        """
        node = self.producers.get(name)
        if node is None or node.op_type != "Concat" or self.recipe.number is Number.FP8:
            return []  # fp8 cannot be concatenated, and its exponent bridges such differences
        parts = list(node.input)
        axis = next(a.i for a in node.attribute if a.name == "axis")
        known = all(part in self.statistics.tensors and self._channels(part) for part in parts)
        image = len(self.dims.get(name, ())) == 4
        return parts if image and axis in {1, -3} and len(parts) > 1 and known else []

    def _channels(self, name: str) -> int:
        dims = self.dims.get(name, ())
        return int(dims[1].dim_value) if len(dims) == 4 else 0

    def _joined(self, name: str, parts: list[str]) -> tuple[str, Grid, FloatArray]:
        """Concatenate the parts as integers, each rounded to its own scale.

        The layer reads all of them with the largest scale. The factors, one per channel of its weights, correct that.
        """
        grids = [self._rounded(part)[1] for part in parts]
        common = dataclasses.replace(max(grids, key=lambda grid: grid.scale), tensor=name)
        factors = [
            np.full(self._channels(part), grid.scale / common.scale, np.float32)
            for part, grid in zip(parts, grids, strict=True)
        ]
        if name not in self.grids:
            self.grids[name] = common
            whole, scale, zero = f"{name}.joined", *self._grid_names(common)
            self.nodes += [
                helper.make_node("Concat", [f"{p}.quantised" for p in parts], [whole], f"{whole}.concat", axis=1),
                helper.make_node("DequantizeLinear", [whole, scale, zero], [f"{whole}.back"], f"{whole}.dequantise"),
            ]
        return f"{name}.joined.back", common, np.concatenate(factors)

    def _join_for_all(self, name: str) -> None:
        """Give all readers of a skip concatenation the 8-bit one, instead of a second one in float."""
        _, common, factors = self._joined(name, self._halves(name))
        inputs = [f"{name}.joined"]
        for part, value in (("scales", factors * np.float32(common.scale)), ("zeros", np.zeros(len(factors), np.int8))):
            inputs.append(f"{name}.{part}")
            self.constants.append(numpy_helper.from_array(value, inputs[-1]))
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [name], f"{name}.dequantise", axis=1))

    def _rounded(self, name: str) -> tuple[str, Grid]:
        """Return the rounded form of a tensor and its grid, and round it if nobody did before."""
        if name not in self.rounded:
            self._pair(name, f"{name}.dequantised", self._grid(name, name))
        return self.rounded[name], self.grids[name]

    def _pair(self, source: str, target: str, grid: Grid) -> None:
        base = grid.tensor
        self.rounded[base] = target
        scale, zero = self._grid_names(grid)
        self.nodes += [
            helper.make_node("QuantizeLinear", [source, scale, zero], [f"{base}.quantised"], f"{base}.quantise"),
            helper.make_node("DequantizeLinear", [f"{base}.quantised", scale, zero], [target], f"{base}.dequantise"),
        ]

    def _grid(self, name: str, measured: str, *, positive: bool = False) -> Grid:
        """Choose the grid of a tensor from the ranges of `measured`: the tensor itself, or what its ReLU reads."""
        weights, low, high = self.statistics.distribution(measured)
        if positive:
            weights, low = weights.copy(), 0.0
            weights[: len(weights) // 2] = 0
        found = choose_range(weights, low, high, self.recipe.method, self.recipe.percentile)
        signed = self.recipe.target is not Target.ONNXRUNTIME
        if signed or name in self.centred:
            scale, zero = found.largest / self._limit, 0 if signed else 128
        else:
            scale = (found.high - found.low) / 255
            zero = round(-found.low / scale) if scale > 0 else 0
        scale = float(np.float32(scale)) or 1.0
        self.grids[name] = Grid(name, scale, zero)
        return self.grids[name]

    def _grid_names(self, grid: Grid) -> tuple[str, str]:
        """Store a grid, and return the names of its scale and zero point."""
        dtype = _FP8
        if self.recipe.number is Number.INT8:
            dtype = np.uint8 if self.recipe.target is Target.ONNXRUNTIME else np.int8
        names = f"{grid.tensor}.scale", f"{grid.tensor}.zero_point"
        values = np.float32(grid.scale), np.asarray(grid.zero_point).astype(dtype)
        self.constants += [numpy_helper.from_array(np.asarray(v), n) for n, v in zip(names, values, strict=True)]
        return names

    def _dequantised(self, name: str, numbers: npt.NDArray[Any], scales: FloatArray, axis: int) -> str:
        """Store numbers with a scale per channel, and return the name of the floats that they stand for."""
        zeros = np.zeros(scales.shape, numbers.dtype)
        parts = (numbers, scales, zeros)
        names = [f"{name}.{part}" for part in ("quantised", "scale", "zero_point")]
        self.constants += [numpy_helper.from_array(value, n) for n, value in zip(names, parts, strict=True)]
        self.nodes.append(helper.make_node("DequantizeLinear", names, [name], f"{name}.dequantise", axis=axis))
        return name

    @property
    def _limit(self) -> float:
        return 127.0 if self.recipe.number is Number.INT8 else FP8_LARGEST

    def _numbers(self, values: FloatArray) -> npt.NDArray[Any]:
        """Round weights to 8 bits, symmetrically."""
        clipped = np.clip(values, -self._limit, self._limit)
        if self.recipe.number is Number.FP8:
            return np.asarray(clipped.astype(_FP8))
        return np.rint(clipped).astype(np.int8)


def _compare(directory: EngineDirectory, stage: Stage, file: Path) -> tuple[Check, ...]:
    """Compare a quantised stage with its float32 original. Raises ExportError if it is no likeness."""
    return compare_with_original(
        directory,
        stage,
        file,
        called="its 8-bit form",
        seed=SEED,
        allowed=TOLERANCE,
        advice="; calibrate with more images, or choose ranges by another method",
    )


def _manifest(
    m: Manifest,
    statistics: Statistics,
    source: Source,
    recipe: Recipe,
    stages: tuple[Stage, ...],
    done: list[QuantisedStage],
) -> Manifest:
    """Return the manifest of the quantised engine; its provenance names the engine and the statistics used."""
    how = recipe.method + (f" {recipe.percentile}" if recipe.method is Method.PERCENTILE else "")
    which = "" if len(done) == len(stages) else f", of {', '.join(made.stage.name for made in done)} alone"
    note = (
        f"{recipe.number} for {recipe.target}{which}: engine {m.engine_id} quantised with {how} ranges of "
        f"{len(statistics.samples)} images over all steps; checks compare with its float32 stages"
    )
    old = m.provenance
    provenance = dataclasses.replace(old, sources=(*old.sources, source), notes=(*old.notes, note))
    return dataclasses.replace(m, stages=stages, provenance=provenance, builds=(), fast=None)
