"""The step's part of the U-Net as a table: the same numbers for every level of the schedule, in every precision."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from diffiqa.engine.manifest import EngineDirectory, Library, Precision, Stage, StageName, open_engine, read_manifest
from diffiqa.engine.sampling import choose_sampling
from diffiqa.engine.schedule import Schedule
from diffiqa.errors import ExportError
from diffiqa.export.builds import BuildOptions, build_engines
from diffiqa.export.compare import run_onnx
from diffiqa.export.precision import StagePrecision, cast, noise_embedding, resolve_plan, rounded
from diffiqa.export.tabulate import tabulate
from diffiqa.export.torch_graph import OnnxModule
from diffiqa.runtime.builds import rebuild_command


@pytest.fixture(scope="module")
def directory(tiny_engine: Path) -> EngineDirectory:
    return open_engine(tiny_engine)


@pytest.fixture(scope="module")
def unet(directory: EngineDirectory) -> Stage:
    stage = directory.manifest.stage(StageName.UNET)
    assert stage
    return stage


def feeds(directory: EngineDirectory) -> list[dict[str, np.ndarray]]:
    """Inputs at every level of the schedule, two at a time, which differ."""
    generator = np.random.default_rng(3)
    levels = directory.manifest.schedule.coefficients.noise_level
    pairs = np.stack([levels, levels[::-1]], axis=1).reshape(-1, 2, 1)
    draw = generator.standard_normal((2, 3, 32, 40)).astype(np.float32)
    return [{"y": draw, "condition": draw[::-1].copy(), "noise_level": pair} for pair in pairs]


@pytest.mark.parametrize("precision", Precision)
def test_every_level_of_the_schedule_gives_the_same_bits(
    directory: EngineDirectory, unet: Stage, precision: Precision
) -> None:
    model, plan = onnx.load(directory.file(unet.file)), resolve_plan(directory, precision).stage(StageName.UNET)
    tabulated, changed = tabulate(model, plan, directory.manifest.schedule)
    assert [node.op_type for node in tabulated.graph.node].count("Gemm") == 0
    assert len(tabulated.graph.node) < len(model.graph.node)
    before = rounded(cast(model, plan, precision)).SerializeToString()
    after = rounded(cast(tabulated, changed, precision)).SerializeToString()
    for feed in feeds(directory):
        np.testing.assert_array_equal(run_onnx(after, feed)[0], run_onnx(before, feed)[0])


def test_fewer_steps_find_their_rows_in_the_table(directory: EngineDirectory, unet: Stage) -> None:
    m = directory.manifest
    tabulated, _ = tabulate(onnx.load(directory.file(unet.file)), resolve_plan(directory).stage(unet.name), m.schedule)
    names = [tensor.name for tensor in tabulated.graph.initializer]
    levels = numpy_helper.to_array(tabulated.graph.initializer[names.index("steps.levels")])
    for sampler in ("ancestral", "ddim", "ddim:0.5"):
        rows = choose_sampling(m.schedule, m.taps, m.kinds, 4, sampler).rows(m.schedule, m.taps, m.kinds)
        asked = rows.factors.noise_level[rows.factors.noise_level > 0]
        assert set(asked) <= set(levels[0])


def test_levels_are_told_apart_in_float32(directory: EngineDirectory, unet: Stage) -> None:
    plan = resolve_plan(directory, Precision.FP16).stage(StageName.UNET)
    model = onnx.load(directory.file(unet.file))
    tabulated, changed = tabulate(model, plan, directory.manifest.schedule)
    kept = {entry.node for entry in changed.float32}
    assert {"steps.off", "steps.distance"} <= kept
    assert not kept & set(noise_embedding(model.graph))
    typed = cast(tabulated, changed, Precision.FP16)
    assert next(t for t in typed.graph.initializer if t.name == "steps.levels").data_type == TensorProto.FLOAT


def test_pytorch_reads_the_table_too(directory: EngineDirectory, unet: Stage) -> None:
    plan = resolve_plan(directory, Precision.FP32).stage(StageName.UNET)
    model = onnx.load(directory.file(unet.file))
    tabulated, _ = tabulate(model, plan, directory.manifest.schedule)
    feed = feeds(directory)[1]
    with torch.no_grad():
        (found,) = OnnxModule(tabulated)(*(torch.from_numpy(feed[spec.name].copy()) for spec in unet.inputs))
    (wanted,) = run_onnx(directory.file(unet.file), feed)
    np.testing.assert_allclose(found.numpy(), wanted, atol=3e-6 * np.abs(wanted).max())


def test_other_stages_stay_as_they_are(directory: EngineDirectory) -> None:
    stage = directory.manifest.stages[-1]
    plan = resolve_plan(directory, Precision.FP16).stage(stage.name)
    model = onnx.load(directory.file(stage.file))
    assert tabulate(model, plan, directory.manifest.schedule) == (model, plan)


def test_what_is_no_row_is_refused(unet: Stage) -> None:
    level = helper.make_tensor_value_info("noise_level", TensorProto.FLOAT, ("B", 1))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ("B", 1))
    out = helper.make_tensor_value_info("noise", TensorProto.FLOAT, ("B", 1))
    nodes = [helper.make_node("Sin", ["noise_level"], ["s"], "s"), helper.make_node("Add", ["s", "y"], ["noise"], "a")]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [y, level], [out]), ir_version=10, opset_imports=[helper.make_opsetid("", 20)]
    )
    plan = StagePrecision(StageName.UNET, unet.file.sha256, {}, ())
    with pytest.raises(ExportError, match=r"s of shape \(6, 1\) depends on the step alone, and cannot be tabulated"):
        tabulate(model, plan, Schedule(steps=6))


def test_a_build_says_that_it_is_tabulated(directory: EngineDirectory, tmp_path: Path) -> None:
    path = Path(shutil.copytree(directory.path, tmp_path / "engine"))
    options = BuildOptions(Library.ONNXRUNTIME, Precision.FP16)
    plain, _ = build_engines(path, options)
    tabulated, _ = build_engines(path, dataclasses.replace(options, tabulate=True))
    assert [build.tabulated for build in read_manifest(path).builds] == [False, True]
    assert plain.key != tabulated.key
    assert plain.stages[0].file.sha256 != tabulated.stages[0].file.sha256
    assert plain.stages[1:] != tabulated.stages[1:]  # other paths
    assert [s.file.sha256 for s in plain.stages[1:]] == [s.file.sha256 for s in tabulated.stages[1:]]
    assert rebuild_command(path, tabulated).endswith("--precision fp16 --tabulate")
