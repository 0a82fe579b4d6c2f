"""Multiply-accumulates of an ONNX graph, counted from its nodes at given input shapes."""

import math
from collections import Counter

import onnx
from onnx import shape_inference
from onnxscript import optimizer

from ..errors import ExportError
from .precision import without_weights

Shape = tuple[int, ...]
_COUNTED = {"Conv", "ConvTranspose", "MatMul", "Gemm", "Einsum", "Attention"}


def count_macs(model: onnx.ModelProto, input_shapes: dict[str, Shape]) -> int:
    """Return the MACs of all convolutions and matrix products. Raises ExportError if a shape cannot be known."""
    return sum(macs_by_node(model, input_shapes).values())


def macs_by_node(model: onnx.ModelProto, input_shapes: dict[str, Shape]) -> Counter[str]:
    """Return the MACs of each convolution and matrix product, by the node's name. Raises ExportError likewise."""
    graph, shapes = _infer(model, input_shapes)
    found: Counter[str] = Counter()  # ONNX does not promise names that are unique
    for node in graph.node:
        if node.op_type in _COUNTED:
            try:
                found[node.name] += _of_node(node, shapes)
            except KeyError as exc:
                raise ExportError(f"cannot count the work of node {node.name!r}: shape of {exc} is unknown") from exc
    return found


def _of_node(node: onnx.NodeProto, shapes: dict[str, Shape]) -> int:
    out = math.prod(shapes[node.output[0]])
    if node.op_type == "Conv":
        return out * math.prod(shapes[node.input[1]][1:])  # weight: (out, in / groups, kernel…)
    if node.op_type == "MatMul":
        return out * shapes[node.input[0]][-1]
    if node.op_type == "Gemm":
        transposed = any(a.name == "transA" and a.i for a in node.attribute)
        return out * shapes[node.input[0]][0 if transposed else 1]
    raise ExportError(f"cannot count the work of a {node.op_type} node")


def _infer(model: onnx.ModelProto, input_shapes: dict[str, Shape]) -> tuple[onnx.GraphProto, dict[str, Shape]]:
    """Return the graph for these inputs, its shape arithmetic folded away, and the static shape of its values."""
    fixed = without_weights(model)
    for value in fixed.graph.input[: len(model.graph.input)]:
        for dim, size in zip(value.type.tensor_type.shape.dim, input_shapes[value.name], strict=True):
            dim.dim_value = size
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    # Plain inference does not see through Shape → Concat → Reshape; folding does, and costs a second.
    folded = optimizer.optimize(fixed, onnx_shape_inference=True)
    graph = shape_inference.infer_shapes(folded, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return graph, shapes
