"""The exported files: self-contained, plain ONNX with fixed names, and nothing of the machine that made them."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from diffiqa.engine.manifest import StageName, read_manifest
from diffiqa.errors import ExportError
from diffiqa.export.graph import export_graph
from diffiqa.export.macs import count_macs
from diffiqa.export.stages import StagePlan, stage_plans
from diffiqa.model.network import DiffV2IQA

from ..tiny import STAGES, TINY

STAGE_NAMES = [name.value for name in STAGES]


def load(engine: Path, stage: str) -> onnx.ModelProto:
    return onnx.load(engine / "onnx" / f"{stage}.onnx")


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_signature_in_the_file_is_the_one_in_the_manifest(tiny_engine: Path, stage: str) -> None:
    entry = read_manifest(tiny_engine).stage(StageName(stage))
    graph = load(tiny_engine, stage).graph
    assert entry is not None
    for values, specs in ((graph.input, entry.inputs), (graph.output, entry.outputs)):
        in_file = [(v.name, tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim)) for v in values]
        assert in_file == [(spec.name, spec.shape) for spec in specs]


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_file_is_valid_plain_and_self_contained(tiny_engine: Path, stage: str) -> None:
    model = load(tiny_engine, stage)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    assert not model.functions
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert onnx.TensorProto.DOUBLE not in kinds
    assert all(t.data_location == onnx.TensorProto.DEFAULT for t in model.graph.initializer)
    assert "Dropout" not in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_file_says_nothing_of_the_machine_that_made_it(tiny_engine: Path, stage: str) -> None:
    data = (tiny_engine / "onnx" / f"{stage}.onnx").read_bytes()
    assert b".py" not in data
    assert str(Path(__file__).parents[2]).encode() not in data


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_checks_cover_two_batch_sizes_and_hold(tiny_engine: Path, stage: str) -> None:
    entry = read_manifest(tiny_engine).stage(StageName(stage))
    assert entry is not None
    batches = {next(iter(check.input_shapes.values()))[0] for check in entry.checks}
    assert batches == {1, 2}
    assert {check.output for check in entry.checks} == {spec.name for spec in entry.outputs}
    assert all(0 <= check.max_abs_error <= check.tolerance for check in entry.checks)
    assert all(check.max_abs_reference > 0.01 for check in entry.checks)  # nothing was compared on zeros
    if stage == "unet":
        assert len({check.input_shapes["y"][2:] for check in entry.checks}) == 2


def test_macs_are_those_of_the_layers(tiny_engine: Path) -> None:
    model = load(tiny_engine, "vit")
    tokens, width, hidden = 17, 16, 32  # 4×4 patches and the class token
    block = tokens * width * (4 * width + 2 * hidden) + 2 * tokens * tokens * width
    patches = 16 * width * 3 * 8 * 8
    assert count_macs(model, {"image": (1, 3, 32, 32)}) == patches + 2 * block


def test_macs_grow_with_the_image(tiny_engine: Path) -> None:
    model = load(tiny_engine, "unet")

    def macs(side: int) -> int:
        image = (1, 3, side, side)
        return count_macs(model, {"y": image, "condition": image, "noise_level": (1, 1)})

    assert 4 * macs(32) < macs(64) < 4.5 * macs(32)  # convolutions with the area, attention with its square


class Unexportable(torch.nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.sort(image.detach().numpy()))


def test_a_stage_torch_cannot_export_is_named(tiny_model: DiffV2IQA, tmp_path: Path) -> None:
    plan = list(stage_plans(tiny_model))[1]
    broken = StagePlan(plan.name, Unexportable(), plan.inputs, plan.outputs, plan.draw)
    with pytest.raises(ExportError, match=r"stage vit: torch\.onnx\.export failed"):
        export_graph(broken, tmp_path / "vit.onnx", TINY.unet.alignment if TINY.unet else 1)
