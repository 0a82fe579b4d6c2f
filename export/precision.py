"""float32 ONNX → strongly typed fp16 or bf16 ONNX, by a plan that says which nodes stay float32 and why.

The plan is data. It is made here from the graph and stored beside the engines; a user can change it and build again.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, checker, helper, numpy_helper, shape_inference

from ..engine.codec import decode, encode
from ..engine.manifest import EngineDirectory, Loop, Precision, Stage, StageName
from ..errors import ExportError, UsageError, first_line

PLAN_SCHEMA = 1
_LOW: dict[Precision, int] = {Precision.FP16: TensorProto.FLOAT16, Precision.BF16: TensorProto.BFLOAT16}
_BF16_OPSET = 22
_NAMES: dict[int, str] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.BFLOAT16: "bfloat16",
}
_DTYPES = {name: value for value, name in _NAMES.items()}

# Operators that only move values. Rounding their results again would change nothing.
MOVES = {
    "Concat", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Relu", "Reshape", "Resize", "Slice",
    "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
_FIXED_INPUTS = {"Resize": {1, 2}}  # regions and scales: float32 whatever the image is
_LARGE = 1024  # bytes: sizes, which shapes depend on, have less


@dataclass(frozen=True)
class Kept:
    """A node that stays float32."""

    node: str
    op: str
    why: str


@dataclass(frozen=True)
class StagePrecision:
    """The precision of one stage: of what goes in and out, and the nodes that stay float32."""

    name: StageName
    onnx_sha256: str  # of the float32 file whose nodes these are
    tensors: dict[str, str]  # input or output → dtype
    float32: tuple[Kept, ...]


@dataclass(frozen=True)
class PrecisionPlan:
    """What an engine computes in which precision."""

    schema: int
    precision: Precision
    stages: tuple[StagePrecision, ...]

    def to_json(self) -> str:
        """Return the text of a plan file."""
        return json.dumps(encode(self), indent=2, ensure_ascii=False) + "\n"

    def stage(self, name: StageName) -> StagePrecision:
        """Return the plan of a stage. Raises UsageError if it has none."""
        for stage in self.stages:
            if stage.name is name:
                return stage
        raise UsageError(f"the precision plan says nothing of stage {name}; make one that does, or build without it")


def read_plan(path: Path) -> PrecisionPlan:
    """Read a plan file. Raises UsageError naming what is wrong with it."""

    def damaged(message: str) -> UsageError:
        return UsageError(f"{path} is not a precision plan: {message}")

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise damaged(first_line(exc)) from exc
    plan = decode(PrecisionPlan, data, "plan", damaged)
    if plan.schema != PLAN_SCHEMA:
        raise damaged(f"it has schema version {plan.schema}, this diffiqa reads version {PLAN_SCHEMA}")
    return plan


def resolve_plan(
    directory: EngineDirectory, precision: Precision | None = None, plan: PrecisionPlan | None = None
) -> PrecisionPlan:
    """Return `plan`, checked against the engine, or else the plan that the graphs lead to in `precision`.

    Raises UsageError if the plan is of another precision or engine, or if TensorRT does not take the engine's 8 bits.
    """
    if plan and precision not in {None, plan.precision}:
        raise UsageError(f"the precision plan is for {plan.precision}, not {precision}; leave --precision out")
    wanted = plan.precision if plan else precision or Precision.FP16
    made = []
    for stage in directory.manifest.stages:
        model = onnx.load(directory.file(stage.file))
        if _is_unsigned(model.graph):
            raise UsageError(
                f"{directory.path} is quantised for ONNX Runtime, with unsigned numbers that TensorRT does not take; "
                f"quantise the float32 engine with iqa-quantise --target tensorrt, and take that"
            )
        if plan and plan.stage(stage.name).onnx_sha256 != stage.file.sha256:
            raise UsageError(
                f"the precision plan is for another {stage.file.path} than {directory.path} holds; use the engine that "
                f"it was made for, or --precision {wanted} for a plan of this one"
            )
        loop = directory.manifest.flow.loop
        made.append(plan.stage(stage.name) if plan else plan_stage(model, stage, wanted, loop))
    return plan or PrecisionPlan(PLAN_SCHEMA, wanted, tuple(made))


def _is_unsigned(graph: onnx.GraphProto) -> bool:
    """Whether a stage is in 8 bits as ONNX Runtime wants them: TensorRT's parser takes no such zero points."""
    unsigned = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.UINT8}
    return any(node.op_type == "QuantizeLinear" and unsigned & set(node.input) for node in graph.node)


def plan_stage(
    model: onnx.ModelProto,
    stage: Stage,
    precision: Precision,
    loop: Loop = Loop(),  # noqa: B008 — a frozen value
) -> StagePrecision:
    """Return the plan of a stage from its graph alone; `calibration.statistics.fp16_plan` adds what it measured.

    Inputs and outputs: ViT maps go from engine to engine in the low type. Images and noise are fp16 in an fp16 plan,
    because our kernels store fp16, and float32 in a bf16 plan, because they do not store bf16. So are the state of a
    crop, and what its loop starts from. The rest is float32.

    Softmax and LayerNormalization become low too. The products around them round their inputs and results anyway, and
    LayerNormalization with `stash_type` 1 has float32 statistics by definition. In float32, the 6912×6912 attention of
    the full-size VCG head would take twice the memory.
    """
    graph = model.graph
    reasons: dict[str, str] = {}
    lengths = {node.output[0] for node in graph.node if node.op_type == "ReduceL2"}
    if precision is not Precision.FP32:
        for node in graph.node:
            if node.op_type in {"ReduceMean", "ReduceSum", "GlobalAveragePool"}:
                reasons[node.name] = "a sum of many values"
            elif node.op_type in {"InstanceNormalization", "GroupNormalization"} or _low_statistics(node):
                reasons[node.name] = "norm statistics: sums of squares"
            elif node.op_type == "ReduceL2":
                reasons[node.name] = "a length: a sum of squares"
            elif node.op_type == "Clip" and node.input[0] in lengths:
                reasons[node.name] = "it keeps a length above a bound that is 0 in fp16"
        reasons |= dict.fromkeys(
            noise_embedding(graph, loop.scalar), "noise embedding: it must tell levels near 1 apart"
        )
        reasons |= dict.fromkeys(_score_reduction(graph), "score reduction")
    kept = tuple(Kept(node.name, node.op_type, reasons[node.name]) for node in graph.node if node.name in reasons)
    low = _NAMES[_LOW.get(precision, TensorProto.FLOAT)]
    images = "float16" if precision is Precision.FP16 else "float32"
    touched = ("y", "condition", "noise", "image", "images", "crop", loop.start, loop.share, loop.result)
    dtypes = {"maps": low, **dict.fromkeys(touched, images)}
    names = [spec.name for spec in (*stage.inputs, *stage.outputs)]
    return StagePrecision(stage.name, stage.file.sha256, {name: dtypes.get(name, "float32") for name in names}, kept)


def _low_statistics(node: onnx.NodeProto) -> bool:
    """Whether a LayerNormalization keeps its statistics in the type of its input (`stash_type` 1 means float32)."""
    stash = next((a.i for a in node.attribute if a.name == "stash_type"), 1)
    return node.op_type == "LayerNormalization" and stash != TensorProto.FLOAT


def noise_embedding(graph: onnx.GraphProto, scalar: str = "noise_level") -> list[str]:
    """Return the nodes that depend on what tells the step, and on constants alone."""
    constants = {tensor.name for tensor in graph.initializer} | {""}
    known, nodes = {scalar}, []
    for node in graph.node:
        read = set(node.input) - constants
        if read and read <= known:
            nodes.append(node.name)
            known |= set(node.output)
    return nodes


def _score_reduction(graph: onnx.GraphProto) -> list[str]:
    """Return the nodes whose results reach only the score."""
    readers: dict[str, set[str]] = {value.name: {"(output)"} for value in graph.output if value.name != "score"}
    for node in graph.node:
        for value in node.input:
            readers.setdefault(value, set()).add(node.name)
    nodes: list[str] = []
    for node in reversed(graph.node):
        if "score" in node.output or all(readers.get(value) and readers[value] <= set(nodes) for value in node.output):
            nodes.append(node.name)
    return nodes if any(value.name == "score" for value in graph.output) else []


def cast(model: onnx.ModelProto, plan: StagePrecision, precision: Precision) -> onnx.ModelProto:
    """Return the typed model: the plan's nodes in float32, all others low, and casts where the two meet.

    Raises ExportError if the plan does not fit the graph, or the result is not valid ONNX.
    """
    typed = onnx.ModelProto()
    typed.CopyFrom(model)
    if precision is Precision.FP32:
        return typed
    graph = typed.graph
    kept = {entry.node for entry in plan.float32}
    if unknown := kept - {node.name for node in graph.node}:
        raise ExportError(
            f"stage {plan.name}: the precision plan names nodes that are not in it: {', '.join(sorted(unknown)[:3])}"
        )
    _lower_batch_norms(graph, kept)
    if precision is Precision.BF16:
        _raise_opset(typed, plan)
    _Caster(typed, plan, kept, _LOW[precision]).run()
    try:
        checker.check_model(typed, full_check=True)
    except (checker.ValidationError, shape_inference.InferenceError) as exc:
        raise ExportError(f"stage {plan.name}: the typed graph is not valid ONNX: {first_line(exc)}") from exc
    return typed


class _Caster:
    """One pass over a graph in order. `types` holds the type of every value so far."""

    def __init__(self, model: onnx.ModelProto, plan: StagePrecision, kept: set[str], low: int) -> None:
        self.graph, self.plan, self.kept, self.low = model.graph, plan, kept, low
        self.floats = {name for name, kind in element_types(model).items() if kind == TensorProto.FLOAT}
        self.constants = {t.name: t for t in self.graph.initializer if t.data_type == TensorProto.FLOAT}
        self.types = {v.name: self._planned(v.name) for v in self.graph.input if v.name in self.floats}
        self.converted: set[str] = set()
        self.nodes: list[onnx.NodeProto] = []

    def run(self) -> None:
        outputs = {value.name for value in self.graph.output if value.name in self.floats}
        for node in self.graph.node:
            reads = [i for i, name in enumerate(node.input) if name in self.types or name in self.constants]
            # A node that reads no floats but returns some makes float32: there is nothing to follow.
            kind = self.low if reads and node.name not in self.kept else TensorProto.FLOAT
            for i in reads:
                fixed = i in _FIXED_INPUTS.get(node.op_type, ())
                node.input[i] = self._as(node.input[i], TensorProto.FLOAT if fixed else kind)
            self.nodes.append(node)
            for i, name in enumerate(node.output):
                if name in self.floats:
                    self.types[name] = kind
                    if name in outputs and kind != self._planned(name):
                        node.output[i] = f"{name}.{_NAMES[kind]}"
                        self.converted.add(node.output[i])  # nodes after it may read it as it is
                        self._cast(node.output[i], name, self._planned(name))
        replace_nodes(self.graph, self.nodes)
        for value in [*self.graph.input, *self.graph.output]:
            if value.name in self.floats:
                value.type.tensor_type.elem_type = self._planned(value.name)

    def _planned(self, name: str) -> int:
        try:
            return _DTYPES[self.plan.tensors[name]]
        except KeyError as exc:
            raise ExportError(f"stage {self.plan.name}: the precision plan gives {name} no dtype we know") from exc

    def _as(self, name: str, kind: int) -> str:
        """Return the name under which a value can be read in this type."""
        if self.types.get(name, TensorProto.FLOAT) == kind:
            return name
        other = f"{name}.{_NAMES[kind]}"
        if other not in self.converted:
            self.converted.add(other)
            if name in self.constants:
                self.graph.initializer.append(_converted(self.constants[name], other, kind))
            else:
                self._cast(name, other, kind)
        return other

    def _cast(self, source: str, target: str, kind: int) -> None:
        self.nodes.append(helper.make_node("Cast", [source], [target], name=f"cast.{target}", to=kind))
        self.types[target] = kind


def _converted(tensor: TensorProto, name: str, kind: int) -> TensorProto:
    """Return a float32 constant in a lower type. Raises ExportError if it does not fit."""
    values = numpy_helper.to_array(tensor)
    with np.errstate(over="ignore"):
        lower = values.astype(helper.tensor_dtype_to_np_dtype(kind))
    if not np.isfinite(lower.astype(np.float32)).all():
        raise ExportError(f"constant {tensor.name} reaches {np.abs(values).max():.3g}, too large for {_NAMES[kind]}")
    return numpy_helper.from_array(lower, name)


def _lower_batch_norms(graph: onnx.GraphProto, kept: set[str]) -> None:
    """Replace each BatchNormalization by a product and a sum, whose constants are computed in float64.

    Rounding its variance would scale the whole channel. Rounding the product's factor once does not.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "BatchNormalization" or node.name in kept:
            nodes.append(node)
            continue
        scale, bias, mean, variance = (numpy_helper.to_array(constants[n]).astype(np.float64) for n in node.input[1:])
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        factor = scale / np.sqrt(variance + epsilon)
        x, y = node.input[0], node.output[0]
        for suffix, value in (("scale", factor), ("offset", bias - mean * factor)):
            shaped = value.astype(np.float32).reshape(-1, 1, 1)  # inputs are (B, C, H, W)
            graph.initializer.append(numpy_helper.from_array(shaped, f"{y}.{suffix}"))
        nodes += [
            helper.make_node("Mul", [x, f"{y}.scale"], [f"{y}.scaled"], name=f"{node.name}.scale"),
            helper.make_node("Add", [f"{y}.scaled", f"{y}.offset"], [y], name=f"{node.name}.offset"),
        ]
    replace_nodes(graph, nodes)


def _raise_opset(model: onnx.ModelProto, plan: StagePrecision) -> None:
    """Raise the opset to 22, from which convolutions and pooling take bf16. Refuse graphs that it would change."""
    if any(node.op_type == "GroupNormalization" for node in model.graph.node):
        raise ExportError(f"stage {plan.name}: GroupNormalization means something else in opset {_BF16_OPSET}")
    model.opset_import[0].version = max(model.opset_import[0].version, _BF16_OPSET)


def rounded(typed: onnx.ModelProto) -> onnx.ModelProto:
    """Return a float32 model that computes the same as `typed`: in float32, with every result rounded to its type.

    ONNX Runtime's CPU provider runs fp16 nodes in float32 and drops the casts between them: `typed` itself would show
    no rounding error there. It does not run bf16 at all. It keeps explicit pairs of casts.
    """
    model = onnx.ModelProto()
    model.CopyFrom(typed)
    graph = model.graph
    low = {name: kind for name, kind in element_types(typed).items() if kind in _LOW.values()}
    constants = [t for t in graph.initializer if t.data_type in _LOW.values()]
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        for i, name in enumerate(node.output):
            if name not in low or node.op_type in MOVES:
                continue
            node.output[i] = f"{name}.rounded" if node.op_type == "Cast" else f"{name}.exact"
            if node.op_type != "Cast":
                nodes.append(helper.make_node("Cast", [f"{name}.exact"], [f"{name}.rounded"], to=low[name]))
            nodes.append(helper.make_node("Cast", [f"{name}.rounded"], [name], to=TensorProto.FLOAT))
    for tensor in constants:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for value in [*graph.input, *graph.output]:
        if value.name in low:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    replace_nodes(graph, nodes)
    return model


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element type of every value of a graph. Raises InferenceError if they contradict each other."""
    graph = shape_inference.infer_shapes(without_weights(model), strict_mode=True).graph
    values = [*graph.input[: len(model.graph.input)], *graph.value_info, *graph.output]
    return {value.name: value.type.tensor_type.elem_type for value in values}


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a graph in which large constants are inputs, after its own: shapes and types stay as they are.

    The tools of onnx copy a model several times, which takes gigabytes where weights are in it.
    """
    graph = model.graph
    parts = {"node": graph.node, "input": graph.input, "output": graph.output, "value_info": graph.value_info}
    bare = onnx.ModelProto(
        ir_version=model.ir_version,
        opset_import=model.opset_import,
        functions=model.functions,
        graph=onnx.GraphProto(name=graph.name, **parts),
    )
    for tensor in graph.initializer:
        if tensor.ByteSize() > _LARGE:
            bare.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            bare.graph.initializer.append(tensor)
    return bare


def replace_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Give a graph these nodes, and keep only those constants that they read."""
    used = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)


def in_8_bits(model: onnx.ModelProto) -> bool:
    """Whether a stage rounds values to 8 bits on its way."""
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)
