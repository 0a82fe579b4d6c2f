"""An ONNX stage as a PyTorch module, operator by operator: what `inductor.py` compiles is what the file says.

A value is a tensor, or, for sizes, a number or a tuple of numbers. Sizes stay Python numbers, so that
`torch.export` sees which of them are free.
"""

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ExportError

Value = Any  # Tensor | int | tuple[int, ...] | None, and a SymInt wherever an int may stand
Pair = tuple[int, int]

_DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT64: torch.int64,
}
_OPEN_END = 2**31  # a Slice that ends at or beyond this goes to the end


class OnnxModule(nn.Module):
    """A graph whose inputs are positional, in its own order, and whose outputs are a tuple."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Take the graph and its weights. Raises ExportError for an operator that is not known here."""
        super().__init__()
        graph = model.graph
        self._inputs, self._outputs = ([value.name for value in values] for values in (graph.input, graph.output))
        self._sizes: dict[str, Value] = {}
        self._weights: dict[str, str] = {}  # a tensor's name in the graph, and its buffer's
        self._nodes: list[tuple[str, tuple[str, ...], tuple[str, ...], dict[str, Any]]] = []
        for tensor in graph.initializer:
            self._add(tensor.name, _constant(tensor))
        for node in graph.node:
            given = {attribute.name: _attribute(attribute) for attribute in node.attribute}
            if node.op_type == "Constant":
                self._add(node.output[0], next(iter(given.values())))
                continue
            if node.op_type == "Resize":  # every pixel becomes 2×2: no trace could read another scale
                scales = self._constant_of(node.input[2])
                _expect(scales is not None and scales.tolist() == [1, 1, 2, 2], "Resize", {"scales": scales})
            if node.op_type == "Pow":  # as the exporter writes a square
                exponent = self._constant_of(node.input[1])
                _expect(exponent is not None and float(exponent) == 2, "Pow", {"exponent": exponent})
            if node.op_type in _OPERATORS:
                read = (node.input[0], *map(self._number, node.input[1:])) if node.op_type == "Clip" else node.input
                self._nodes.append((node.op_type, tuple(read), tuple(node.output), given))
            else:
                raise ExportError(f"node {node.name} is a {node.op_type}, which the target inductor does not know")

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Compute all outputs."""
        values = dict(zip(self._inputs, inputs, strict=True))
        values |= self._sizes | {name: getattr(self, buffer) for name, buffer in self._weights.items()} | {"": None}
        for op, read, written, given in self._nodes:
            result = _OPERATORS[op](*(values[name] for name in read), **given)
            values.update(zip(written, result if len(written) > 1 else (result,), strict=True))
        return tuple(values[name] for name in self._outputs)

    def _number(self, name: str) -> str:
        """Return the name of a constant as Python's number: the compiler fails at bounds that are tensors."""
        value = self._constant_of(name)
        if value is None:
            return name
        self._sizes[f"{name} as a number"] = value.item()
        return f"{name} as a number"

    def _constant_of(self, name: str) -> Tensor | None:
        return getattr(self, self._weights[name]) if name in self._weights else None

    def _add(self, name: str, value: Value) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            self._weights[name] = f"weight_{len(self._weights)}"
            self.register_buffer(self._weights[name], value)
        else:
            self._sizes[name] = value


def _constant(tensor: TensorProto) -> Value:
    """Return whole numbers as Python's, if they are at most a list, and anything else as a tensor."""
    array = np.array(numpy_helper.to_array(tensor))  # a copy: PyTorch wants to write
    if tensor.data_type == TensorProto.BFLOAT16:
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    if array.dtype == np.int64 and array.ndim < 2:
        return tuple(array.tolist()) if array.ndim else int(array)
    return torch.from_numpy(array)


def _attribute(attribute: onnx.AttributeProto) -> Value:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, TensorProto):
        return _constant(value)
    return value.decode() if isinstance(value, bytes) else value


def _many(value: Value) -> tuple[Value, ...]:
    return value if isinstance(value, tuple) else (value,)


def _binary(of_tensors: Callable[[Any, Any], Any], of_sizes: Callable[[Any, Any], Any]) -> Callable[..., Value]:
    def compute(a: Value, b: Value) -> Value:
        if isinstance(a, Tensor) or isinstance(b, Tensor):
            return of_tensors(a, b)
        if not isinstance(a, tuple) and not isinstance(b, tuple):
            return of_sizes(a, b)
        length = max(len(_many(a)), len(_many(b)))
        pairs = zip(*(_many(side) * (length if len(_many(side)) == 1 else 1) for side in (a, b)), strict=True)
        return tuple(of_sizes(x, y) for x, y in pairs)

    return compute


def _gemm(a: Tensor, b: Tensor, c: Tensor | None = None, **given: Any) -> Tensor:
    plain = given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0 and not given.get("transA")
    _expect(plain, "Gemm", given)
    return functional.linear(a, b if given.get("transB") else b.t(), c)


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, **given: Any) -> Tensor:
    _expect(given.get("auto_pad", "NOTSET") == "NOTSET", "Conv", given)
    top, left, bottom, right = given.get("pads", (0, 0, 0, 0))
    padding = top, left
    if padding != (bottom, right):
        x, padding = functional.pad(x, (left, right, top, bottom)), (0, 0)
    strides, dilations = (tuple(given.get(name, (1, 1))) for name in ("strides", "dilations"))
    return functional.conv2d(x, weight, bias, strides, padding, dilations, given.get("group", 1))


def _max_pool(x: Tensor, **given: Any) -> Tensor:
    padding = _padding("MaxPool", given)
    _expect(not given.get("ceil_mode") and set(given.get("dilations", (1,))) == {1}, "MaxPool", given)
    return functional.max_pool2d(x, tuple(given["kernel_shape"]), tuple(given.get("strides", (1, 1))), padding)


def _average_pool(x: Tensor, **given: Any) -> Tensor:
    _expect(_padding("AveragePool", given) == (0, 0) and not given.get("ceil_mode"), "AveragePool", given)
    return functional.avg_pool2d(x, tuple(given["kernel_shape"]), tuple(given.get("strides", (1, 1))))


def _padding(op: str, given: dict[str, Any]) -> Pair:
    top, left, bottom, right = given.get("pads", (0, 0, 0, 0))
    _expect((top, left) == (bottom, right) and given.get("auto_pad", "NOTSET") == "NOTSET", op, given)
    return top, left


def _pad(x: Tensor, pads: tuple[int, ...], value: Tensor | None = None, axes: Value = None, **given: Any) -> Tensor:
    _expect(axes is None and given.get("mode", "constant") == "constant", "Pad", given)
    half = len(pads) // 2
    turned = [
        n for before, after in zip(pads[half - 1 :: -1], pads[: half - 1 : -1], strict=True) for n in (before, after)
    ]
    return functional.pad(x, turned, value=0.0 if value is None else float(value))


def _clip(x: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    return torch.clamp(x, low, high)


def _batch_norm(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, **given: Any) -> Tensor:
    return functional.batch_norm(x, mean, variance, scale, bias, eps=given.get("epsilon", 1e-5))


def _layer_norm(x: Tensor, scale: Tensor, bias: Tensor | None = None, **given: Any) -> Tensor:
    _expect(given.get("axis", -1) in {-1, x.ndim - 1}, "LayerNormalization", given)
    return functional.layer_norm(x, scale.shape, scale, bias, given.get("epsilon", 1e-5))


def _instance_norm(x: Tensor, scale: Tensor, bias: Tensor, **given: Any) -> Tensor:
    return functional.instance_norm(x, weight=scale, bias=bias, eps=given.get("epsilon", 1e-5))


def _resize(x: Tensor, _roi: Value = None, scales: Value = None, sizes: Value = None, **given: Any) -> Tensor:
    _expect(sizes is None and given.get("mode") == "nearest", "Resize", given)
    return functional.interpolate(x, size=(2 * x.shape[2], 2 * x.shape[3]), mode="nearest")


def _expand(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, shape))  # type: ignore[no-untyped-call]


def _gather(x: Value, indices: Value, axis: int = 0) -> Value:
    if isinstance(x, tuple):
        return tuple(x[i] for i in indices) if isinstance(indices, tuple) else x[indices]
    if not isinstance(indices, Tensor) and not isinstance(indices, tuple):
        return x.select(axis, indices)
    index = torch.as_tensor(indices, device=x.device)
    taken = x.index_select(axis, index.reshape(-1))
    axis %= x.ndim
    return taken.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _concat(*values: Value, axis: int) -> Value:
    if isinstance(values[0], Tensor):
        return torch.cat(values, axis)
    return tuple(number for value in values for number in _many(value))


def _unsqueeze(x: Value, axes: tuple[int, ...]) -> Value:
    if not isinstance(x, Tensor):
        return _many(x)
    for axis in sorted(axes):
        x = x.unsqueeze(axis)
    return x


def _squeeze(x: Value, axes: tuple[int, ...] | None = None) -> Value:
    if isinstance(x, Tensor):
        return x.squeeze() if axes is None else x.squeeze(axes)
    return _many(x)[0]


def _reshape(x: Value, shape: tuple[int, ...], **given: Any) -> Value:
    if not isinstance(x, Tensor):
        return _many(x) if shape else _many(x)[0]
    # A 0 stands for the input's own size, unless it is to be one. Never ask a symbolic size: the answer would fix it.
    stands_for = not given.get("allowzero")
    return x.reshape([x.shape[i] if stands_for and isinstance(n, int) and n == 0 else n for i, n in enumerate(shape)])


def _slice(x: Value, starts: Value, ends: Value, axes: Value = None, steps: Value = None) -> Value:
    axes, steps = axes or tuple(range(len(starts))), steps or (1,) * len(starts)
    if not isinstance(x, Tensor):
        return x[starts[0] : ends[0] : steps[0]]
    where = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        open_end = isinstance(end, int) and end >= _OPEN_END
        where[axis] = slice(start, None if open_end else end, step)
    return x[tuple(where)]


def _split(x: Tensor, split: Value = None, *, axis: int = 0, num_outputs: int = 0) -> tuple[Tensor, ...]:
    return torch.split_with_sizes(x, list(split), axis) if split else x.chunk(num_outputs, axis)


def _reduce(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def compute(x: Tensor, axes: Value = None, **given: Any) -> Tensor:
        over = tuple(axes) if axes else tuple(range(x.ndim))
        return method(x, over, keepdim=bool(given.get("keepdims", 1)))

    return compute


def _cast(x: Value, to: int, **_given: Any) -> Value:
    return x.to(_DTYPES[to]) if isinstance(x, Tensor) else x


def _expect(known: bool, op: str, given: dict[str, Any]) -> None:
    if not known:
        raise ExportError(f"a {op} has attributes that the target inductor does not know: {given}")


_OPERATORS: dict[str, Callable[..., Value]] = {
    "Abs": torch.abs,
    "Add": _binary(operator.add, operator.add),
    "ArgMin": lambda x, axis=0, keepdims=1: x.argmin(axis, keepdim=bool(keepdims)),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Clip": _clip,
    "Concat": _concat,
    "Conv": _conv,
    "Cos": torch.cos,
    "Div": _binary(operator.truediv, operator.floordiv),
    "Expand": _expand,
    "Gather": _gather,
    "Gelu": lambda x, approximate="none": functional.gelu(x, approximate=approximate),
    "Gemm": _gemm,
    "Identity": lambda x: x,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "MatMul": torch.matmul,
    "MaxPool": _max_pool,
    "Mul": _binary(operator.mul, operator.mul),
    "Pad": _pad,
    "ReduceL2": _reduce(lambda x, over, keepdim: torch.linalg.vector_norm(x, dim=over, keepdim=keepdim)),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "Pow": lambda x, _two: x * x,
    "Relu": torch.relu,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": lambda x, start=0, end=None: tuple(x.shape)[start:end],
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Slice": _slice,
    "Softmax": lambda x, axis=-1: torch.softmax(x, axis),
    "Split": _split,
    "Sqrt": lambda x: x.sqrt() if isinstance(x, Tensor) else math.isqrt(x),
    "Squeeze": _squeeze,
    "Sub": _binary(operator.sub, operator.sub),
    "Transpose": lambda x, perm: x.permute(perm),
    "Unsqueeze": _unsqueeze,
}
