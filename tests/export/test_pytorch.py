"""Exported stages beside PyTorch: rounding passes, however large the labels; a conversion that is wrong does not."""

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from diffiqa.engine.manifest import StageName
from diffiqa.errors import ExportError
from diffiqa.export import pytorch as module
from diffiqa.export.compare import run_onnx
from diffiqa.export.engine import export_engine
from diffiqa.export.pytorch import compare_with_pytorch
from diffiqa.export.stages import stage_plans
from diffiqa.model.checkpoint import Loaded
from diffiqa.model.network import DiffV2IQA


def test_labels_of_any_range_are_exported(tiny_model: DiffV2IQA, tmp_path: Path) -> None:
    """A MANIQA trained on labels of 0 to 100 has scores a hundred times as large, and rounding as well."""
    model = copy.deepcopy(tiny_model)
    assert model.vda
    with torch.no_grad():
        for parameter in model.vda.score[3].parameters():
            parameter.mul_(100)
    manifest, _ = export_engine(Loaded(model, (), ()), tmp_path / "engine", stages=(StageName.VDA,))
    score = next(check for check in manifest.stages[-1].checks if check.output == "score_map")
    assert score.max_abs_error <= score.tolerance < 1e-3 * score.max_abs_reference


# What a conversion can do to a stage: each is a change of one node or constant of the exported file.
FAULTS: dict[str, tuple[StageName, Callable[[onnx.GraphProto], None]]] = {}


def fault(name: StageName) -> Callable[[Callable[[onnx.GraphProto], None]], Callable[[onnx.GraphProto], None]]:
    def add(change: Callable[[onnx.GraphProto], None]) -> Callable[[onnx.GraphProto], None]:
        FAULTS[change.__name__] = name, change
        return change

    return add


def of_kind(graph: onnx.GraphProto, op: str, index: int = 0) -> onnx.NodeProto:
    nodes: list[onnx.NodeProto] = [node for node in graph.node if node.op_type == op]
    return nodes[index]


def constant(graph: onnx.GraphProto, name: str, change: Callable[[Any], Any]) -> None:
    tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(tensor).copy()), name))


@fault(StageName.UNET)
def a_convolution_is_one_percent_too_strong(graph: onnx.GraphProto) -> None:
    constant(graph, of_kind(graph, "Conv", 3).input[1], lambda weight: weight * np.float32(1.01))


@fault(StageName.UNET)
def two_output_channels_change_places(graph: onnx.GraphProto) -> None:
    constant(graph, of_kind(graph, "Conv", -1).input[1], lambda weight: weight[[1, 0, 2]])


@fault(StageName.UNET)
def a_bias_is_lost(graph: onnx.GraphProto) -> None:
    constant(graph, of_kind(graph, "Conv", 1).input[2], np.zeros_like)


@fault(StageName.UNET)
def attention_adds_up_over_the_wrong_side(graph: onnx.GraphProto) -> None:
    node = of_kind(graph, "Softmax")
    next(attribute for attribute in node.attribute if attribute.name == "axis").i = 1


@fault(StageName.VIT)
def a_norm_has_another_epsilon(graph: onnx.GraphProto) -> None:
    node = of_kind(graph, "LayerNormalization")
    next(attribute for attribute in node.attribute if attribute.name == "epsilon").f = 1e-3


@fault(StageName.VIT)
def gelu_is_approximated(graph: onnx.GraphProto) -> None:
    node = of_kind(graph, "Gelu")
    del node.attribute[:]
    node.attribute.append(onnx.helper.make_attribute("approximate", "tanh"))


@fault(StageName.VCG)
def a_window_mask_is_missing(graph: onnx.GraphProto) -> None:
    masks = [t.name for t in graph.initializer if (a := onnx.numpy_helper.to_array(t)).size and a.min() <= -99]
    constant(graph, masks[0], np.zeros_like)


@fault(StageName.VCG)
def the_position_table_is_turned(graph: onnx.GraphProto) -> None:
    node = of_kind(graph, "Softmax", -1)
    producers = {value: other for other in graph.node for value in other.output}
    above = producers[node.input[0]]
    table = next(name for name in above.input if name in {tensor.name for tensor in graph.initializer})
    constant(graph, table, lambda value: value[..., ::-1].copy())


@fault(StageName.VDA)
def a_pool_becomes_a_strided_pick(graph: onnx.GraphProto) -> None:
    node = of_kind(graph, "MaxPool")
    shape = next(attribute for attribute in node.attribute if attribute.name == "kernel_shape")
    pads = next(attribute for attribute in node.attribute if attribute.name == "pads")
    shape.ints[:], pads.ints[:] = [1, 1], [0, 0, 0, 0]


@fault(StageName.VDA)
def a_kernel_is_mirrored(graph: onnx.GraphProto) -> None:
    constant(graph, of_kind(graph, "Conv").input[1], lambda weight: weight[..., ::-1].copy())


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_of_the_conversion_is_refused(
    tiny_loaded: Loaded, tiny_engine: Path, tmp_path: Path, name: str
) -> None:
    stage, change = FAULTS[name]
    model = onnx.load(tiny_engine / "onnx" / f"{stage}.onnx")
    change(model.graph)
    onnx.save_model(model, tmp_path / "faulty.onnx")
    plan = next(plan for plan in stage_plans(tiny_loaded.model) if plan.name is stage)
    with pytest.raises(ExportError, match="times the rounding of PyTorch itself"):
        compare_with_pytorch(tiny_loaded.model, plan, tmp_path / "faulty.onnx", seed=1)


@pytest.mark.parametrize("rounds_worse", [True, False])
def test_inputs_that_round_worse_than_the_first_ones_are_measured_themselves(
    tiny_loaded: Loaded, tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, rounds_worse: bool
) -> None:
    plan = next(plan for plan in stage_plans(tiny_loaded.model) if plan.name is StageName.VIT)

    def off_in_pairs(path: Path, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        pair = len(next(iter(feed.values()))) > 1
        return [value + 0.01 * np.abs(value).max() * pair for value in run_onnx(path, feed)]

    def allowed(_model: object, _plan: object, inputs: tuple[torch.Tensor, ...], _results: object) -> dict[str, float]:
        return dict.fromkeys(plan.outputs, 0.1 if rounds_worse and len(inputs[0]) > 1 else 1e-4)

    monkeypatch.setattr(module, "run_onnx", off_in_pairs)
    monkeypatch.setattr(module, "_allowed", allowed)
    path = tiny_engine / "onnx" / "vit.onnx"
    with contextlib.nullcontext() if rounds_worse else pytest.raises(ExportError, match="times the rounding"):
        checks = compare_with_pytorch(tiny_loaded.model, plan, path, seed=1)
        assert checks[0].tolerance < checks[-1].tolerance


def test_a_model_is_in_float32_again_after_it_was_measured(tiny_loaded: Loaded, tiny_engine: Path) -> None:
    before = {name: value.clone() for name, value in tiny_loaded.model.state_dict().items()}
    for plan in stage_plans(tiny_loaded.model):
        compare_with_pytorch(tiny_loaded.model, plan, tiny_engine / "onnx" / f"{plan.name}.onnx", seed=2)
    after = tiny_loaded.model.state_dict()
    assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items())
