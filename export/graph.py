"""One stage → one ONNX file: exported, cleaned, and checked for what a runtime could not load."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, checker, helper, shape_inference
from torch.export import Dim

from ..errors import ExportError
from .precision import element_types, without_weights
from .stages import StagePlan

OPSET = 20
MAX_FREE = {"B": 1024, "N": 8192, "H": 1024, "W": 1024}  # upper bounds told to the exporter; H and W in units of 16


def export_graph(plan: StagePlan, path: Path, alignment: int) -> onnx.ModelProto:
    """Write `plan` to `path` as a self-contained ONNX file and return it. Raises ExportError naming what is wrong."""
    sizes = {"B": 2, "N": 2, "H": 4 * alignment, "W": 6 * alignment}
    # Only shapes are traced, and no numbers.
    example = tuple(
        torch.zeros([d if isinstance(d, int) else sizes[d] for d in shape]) for shape in plan.inputs.values()
    )
    dims = {name: Dim(name.lower(), min=1, max=bound) for name, bound in MAX_FREE.items()}
    free = {name: alignment * dim if name in "HW" else dim for name, dim in dims.items()}
    shapes = tuple({i: free[d] for i, d in enumerate(shape) if isinstance(d, str)} for shape in plan.inputs.values())
    try:
        with _quiet():
            program = torch.onnx.export(
                plan.module.eval(),
                example,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(plan.inputs),
                output_names=list(plan.outputs),
                dynamic_shapes=shapes,
                external_data=False,
                verbose=False,
            )
    except Exception as exc:  # whatever torch raises here is a stage that cannot be exported
        root: BaseException = exc
        while root.__cause__:
            root = root.__cause__
        raise ExportError(f"stage {plan.name}: torch.onnx.export failed: {type(root).__name__}: {root}") from exc
    if program is None:
        raise ExportError(f"stage {plan.name}: torch.onnx.export returned nothing")
    model = program.model_proto
    del program  # it has another copy of the weights
    _clean(model, plan)
    _check(model, plan)
    onnx.save_model(model, path)
    return model


def _clean(model: onnx.ModelProto, plan: StagePlan) -> None:
    """Give the free dimensions our names, and drop the exporter's notes, which quote paths of this machine."""
    graph = model.graph
    for value, shape in zip(
        [*graph.input, *graph.output], [*plan.inputs.values(), *plan.outputs.values()], strict=True
    ):
        for dim, wanted in zip(value.type.tensor_type.shape.dim, shape, strict=True):
            if isinstance(wanted, str):
                dim.dim_param = wanted
            else:
                dim.dim_value = wanted
    for item in [model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer]:
        del item.metadata_props[:]
        item.doc_string = ""
    del graph.value_info[:]  # they still carry the exporter's names; shape inference makes them anew
    graph.name = f"diffiqa.{plan.name}"
    model.producer_name, model.producer_version = "diffiqa", ""


def _check(model: onnx.ModelProto, plan: StagePlan) -> None:
    """Raise ExportError unless the graph is valid, plain, self-contained and in inference form."""

    def refuse(why: str) -> ExportError:
        return ExportError(f"stage {plan.name}: the exported graph {why}")

    graph = model.graph
    names = [value.name for value in graph.input], [value.name for value in graph.output]
    if names != (list(plan.inputs), list(plan.outputs)):
        raise refuse(f"has inputs and outputs {names}, expected {list(plan.inputs)}, {list(plan.outputs)}")
    if model.functions or {domain.domain for domain in model.opset_import} - {"", "ai.onnx"}:
        raise refuse("uses custom operators")
    opset = next(domain.version for domain in model.opset_import if domain.domain in {"", "ai.onnx"})
    if opset < OPSET:
        raise refuse(f"is opset {opset}, below {OPSET}")
    try:
        checker.check_model(without_weights(model), full_check=True)
        types = element_types(model)
    except (checker.ValidationError, shape_inference.InferenceError) as exc:
        raise refuse(f"is not valid ONNX: {exc}") from exc
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    if doubles := [name for name, kind in types.items() if kind == TensorProto.DOUBLE]:
        raise refuse(f"still computes in float64: {', '.join(doubles[:5])}")
    if any(tensor.data_location == TensorProto.EXTERNAL for tensor in graph.initializer):
        raise refuse("keeps weights in another file")
    for node in graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Dropout" or attributes.get("training_mode", 0):
            raise refuse(f"has a node in training form: {node.op_type} {node.name}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's own warnings: missing torchvision, deprecations of its own calls, constants it left."""
    loggers = {logger: logger.level for logger in map(logging.getLogger, ("torch.onnx", "onnxscript"))}
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in loggers.items():
            logger.setLevel(level)
