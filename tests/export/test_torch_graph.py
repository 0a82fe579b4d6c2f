"""ONNX stages as PyTorch modules: they compute what ONNX Runtime does, in every precision, and refuse the rest."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from diffiqa.engine.manifest import EngineDirectory, Precision, StageName, open_engine, read_manifest
from diffiqa.errors import ExportError
from diffiqa.export.compare import draw_inputs, run_onnx
from diffiqa.export.engine import export_engine
from diffiqa.export.precision import cast, resolve_plan, rounded
from diffiqa.export.torch_graph import OnnxModule
from diffiqa.model.checkpoint import Loaded
from diffiqa.model.config import Norm
from diffiqa.model.network import build
from diffiqa.tests.tiny import TINY, perturbed

from ..tiny import STAGES

# Of the largest value. Low precisions round the same values; the order of sums decides the last bit of some.
WITHIN = {Precision.FP32: 3e-6, Precision.FP16: 4e-3, Precision.BF16: 2e-2}


def grouped(folder: Path) -> Path:
    """Export a U-Net with group norm, as SR3 has it: other operators than batch norm's."""
    assert TINY.unet
    small = dataclasses.replace(TINY.unet, multipliers=(1, 2), attention_levels=(1,), norm=Norm.GROUP, groups=4)
    config = dataclasses.replace(TINY, unet=small)
    export_engine(Loaded(perturbed(build(config, seed=3), seed=4), (), ()), folder / "group", stages=(StageName.UNET,))
    return folder / "group"


def check(directory: EngineDirectory, name: StageName, precision: Precision) -> None:
    stage, plan = directory.manifest.stage(name), resolve_plan(directory, precision).stage(name)
    assert stage is not None
    typed = cast(onnx.load(directory.file(stage.file)), plan, precision)
    feed = draw_inputs(directory, stage, 5)
    wanted = run_onnx(
        rounded(typed).SerializeToString() if precision is not Precision.FP32 else directory.file(stage.file), feed
    )
    inputs = [torch.from_numpy(feed[s.name]).to(getattr(torch, plan.tensors[s.name])) for s in stage.inputs]
    with torch.no_grad():
        found = OnnxModule(typed)(*inputs)
    for want, have, spec in zip(wanted, found, stage.outputs, strict=True):
        assert str(have.dtype) == f"torch.{plan.tensors[spec.name]}"
        assert have.shape == want.shape
        assert np.abs(have.float().numpy() - want).max() <= WITHIN[precision] * np.abs(want).max()


@pytest.mark.parametrize(
    ("name", "precision"),
    [*itertools.product(STAGES, (Precision.FP32, Precision.FP16)), (StageName.UNET, Precision.BF16)],
)
def test_a_stage_computes_what_onnx_runtime_does(tiny_engine: Path, name: StageName, precision: Precision) -> None:
    check(open_engine(tiny_engine), name, precision)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_stages_of_pfd_iqa_too(pfd_engine: Path, precision: Precision) -> None:
    directory = open_engine(pfd_engine)
    for stage in directory.manifest.stages:
        check(directory, stage.name, precision)


def test_group_norm_too(tmp_path: Path) -> None:
    path = grouped(tmp_path)
    for precision in (Precision.FP32, Precision.FP16):
        check(EngineDirectory(path, read_manifest(path)), StageName.UNET, precision)


def graph_of(*nodes: onnx.NodeProto, constants: dict[str, np.ndarray] | None = None) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    shape = ("B", 2, "H", "W")
    given = [onnx.numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    x, y = value("x", TensorProto.FLOAT, shape), value("y", TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph(list(nodes), "g", [x], [y], given))


@pytest.mark.parametrize(
    ("nodes", "constants", "says"),
    [
        pytest.param([("Erf", ["x"], {})], {}, "Erf, which the target inductor does not know", id="operator"),
        pytest.param(
            [("Resize", ["x", "", "scales"], {"mode": "nearest"})],
            {"scales": np.array([1, 1, 3, 2], np.float32)},
            "Resize has attributes",
            id="scale",
        ),
        pytest.param(
            [("Pow", ["x", "three"], {})], {"three": np.array(3, np.float32)}, "Pow has attributes", id="cube"
        ),
    ],
)
def test_what_it_does_not_know_is_refused_when_the_module_is_made(
    nodes: list[tuple[str, list[str], dict[str, str]]],
    constants: dict[str, np.ndarray],
    says: str,
) -> None:
    made = [helper.make_node(op, read, ["y"], **given) for op, read, given in nodes]
    with pytest.raises(ExportError, match=says):
        OnnxModule(graph_of(*made, constants=constants))


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("MaxPool", {"kernel_shape": [2, 2], "ceil_mode": 1}),
        ("MaxPool", {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}),
        ("MaxPool", {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}),
        ("Conv", {"auto_pad": "SAME_UPPER"}),
        ("Pad", {"mode": "reflect"}),
    ],
)
def test_attributes_that_change_the_result_are_not_passed_over(op: str, attributes: dict[str, Any]) -> None:
    seconds: dict[str, dict[str, np.ndarray]] = {
        "Conv": {"w": np.ones((1, 2, 1, 1), np.float32)},
        "Pad": {"pads": np.array([0, 0, 0, 0, 0, 0, 1, 1], np.int64)},
    }
    second = seconds.get(op, {})
    module = OnnxModule(graph_of(helper.make_node(op, ["x", *second], ["y"], **attributes), constants=second))
    with pytest.raises(ExportError, match=f"a {op} has attributes"):
        module(torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize(
    ("op", "constants", "attributes"),
    [
        pytest.param(
            "Pad",
            {"pads": np.array([0, 1, 0, 2, 0, 0, 1, 0], np.int64), "value": np.array(0.7, np.float32)},
            {},
            id="pad with a value",
        ),
        pytest.param("MaxPool", {}, {"kernel_shape": [2, 3]}, id="max pool without strides"),
        pytest.param("ReduceMean", {"axes": np.array([1], np.int64)}, {"keepdims": 0}, id="mean, dimension dropped"),
        pytest.param("ReduceMean", {"axes": np.array([2, 3], np.int64)}, {}, id="mean, dimensions kept"),
        pytest.param("ReduceMean", {}, {}, id="mean of all"),
        pytest.param("ReduceL2", {"axes": np.array([1], np.int64)}, {}, id="length"),
        pytest.param("AveragePool", {}, {"kernel_shape": [2, 3], "strides": [2, 1]}, id="average pool"),
    ],
)
def test_a_node_computes_what_onnx_runtime_does(
    op: str, constants: dict[str, np.ndarray], attributes: dict[str, Any]
) -> None:
    model = graph_of(helper.make_node(op, ["x", *constants], ["y"], **attributes), constants=constants)
    model.ir_version, model.opset_import[0].version = 10, 20
    x = np.random.default_rng(1).standard_normal((2, 2, 6, 5)).astype(np.float32)
    (want,) = run_onnx(model.SerializeToString(), {"x": x})
    (have,) = OnnxModule(model)(torch.from_numpy(x))
    assert tuple(have.shape) == want.shape
    np.testing.assert_allclose(have.numpy(), want, atol=1e-6)


def _sizes(*nodes: onnx.NodeProto, constants: dict[str, list[int]]) -> onnx.ModelProto:
    given = {name: np.array(values, np.int64) for name, values in constants.items()}
    return graph_of(helper.make_node("Shape", ["x"], ["shape"]), *nodes, constants=given)


def _halved() -> onnx.ModelProto:
    """Reshape to (B, 2, H / 2, 2 W), all computed from the shape as the exporter writes it."""
    make = helper.make_node
    return _sizes(
        make("Gather", ["shape", "two"], ["h"]),
        make("Slice", ["shape", "three", "four"], ["w"]),
        make("Div", ["h", "two1"], ["h2"]),
        make("Mul", ["w", "two1"], ["w2"]),
        make("Concat", ["zeros", "h2", "w2"], ["to"], axis=0),
        make("Reshape", ["x", "to"], ["y"]),
        constants={"two": [2], "two1": [2], "three": [3], "four": [4], "zeros": [0, 0]},
    )


def _head() -> onnx.ModelProto:
    """Take the last row by an open slice, and turn it upside down in channels."""
    make = helper.make_node
    return _sizes(
        make("Slice", ["x", "from", "open", "axis"], ["row"]),
        make("Gather", ["row", "order"], ["y"], axis=1),
        constants={"from": [-1], "open": [2**63 - 1], "axis": [2], "order": [1, 0]},
    )


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        pytest.param(_halved, lambda x: x.reshape(x.shape[0], 2, x.shape[2] // 2, 2 * x.shape[3]), id="reshape"),
        pytest.param(_head, lambda x: x[:, [1, 0], -1:], id="slice and gather"),
    ],
)
def test_sizes_stay_numbers(
    make: Callable[[], onnx.ModelProto], wanted: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    module = OnnxModule(make())
    for shape in ((1, 2, 4, 6), (3, 2, 8, 2)):
        x = torch.randn(shape)
        torch.testing.assert_close(module(x)[0], wanted(x), rtol=0, atol=0)


def test_padding_clipping_and_squares() -> None:
    """As EfficientNet has them: one row more below than above, ReLU6, deviations."""
    make = helper.make_node
    nodes = (
        make("Pad", ["x", "pads"], ["p"]),
        make("Clip", ["p", "low", "high"], ["c"]),
        make("Pow", ["c", "two"], ["y"]),
    )
    constants: dict[str, np.ndarray] = {
        "pads": np.array([0, 0, 0, 1, 0, 0, 1, 2], np.int64),
        "low": np.array(0, np.float32),
        "high": np.array(0.5, np.float32),
        "two": np.array(2, np.float32),
    }
    x = torch.randn(2, 2, 3, 4)
    (found,) = OnnxModule(graph_of(*nodes, constants=constants))(x)
    torch.testing.assert_close(found, torch.nn.functional.pad(x, (1, 2, 0, 1)).clamp(0, 0.5) ** 2)


def test_a_convolution_may_be_padded_more_below_than_above() -> None:
    weight = np.random.default_rng(1).standard_normal((3, 2, 3, 3)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], strides=[2, 2], pads=[0, 1, 1, 2])
    x = torch.randn(1, 2, 6, 5)
    (found,) = OnnxModule(graph_of(node, constants={"w": weight}))(x)
    padded = torch.nn.functional.pad(x, (1, 2, 0, 1))
    torch.testing.assert_close(found, torch.nn.functional.conv2d(padded, torch.from_numpy(weight), stride=2))


def test_a_traced_module_keeps_its_sizes_free() -> None:
    h = torch.export.Dim("h", min=2, max=8)
    program = torch.export.export(
        OnnxModule(_halved()), (torch.zeros(1, 2, 8, 6),), dynamic_shapes=(({2: 2 * h},),), strict=False
    )
    assert program.module()(torch.zeros(1, 2, 4, 6))[0].shape == (1, 2, 2, 12)
