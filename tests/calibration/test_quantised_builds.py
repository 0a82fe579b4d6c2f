"""8-bit engines as TensorRT-RTX really builds them, on a machine without a GPU; and what casting them costs."""

import dataclasses
from pathlib import Path

import onnx
import pytest

from diffiqa.calibration.quantise import Number, Recipe, Target, quantise_engine, quantise_stage
from diffiqa.calibration.statistics import Statistics, collect
from diffiqa.engine.manifest import Build, FileEntry, Precision, StageName, open_engine, read_manifest
from diffiqa.errors import UsageError
from diffiqa.export.builds import BuildOptions, build_engines
from diffiqa.export.compare import CAST_TOLERANCE_8_BITS, compare_cast
from diffiqa.export.precision import cast, plan_stage

from ..rtx import ONE, RTX, check_signatures, needs_rtx
from ..tiny import STAGES

MODELS = Path(__file__).parents[2] / "models"
numbers = pytest.mark.parametrize("number", Number)


@pytest.fixture(scope="module", params=Number)
def built(
    request: pytest.FixtureRequest,
    tiny_engine: Path,
    calibration_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Build]:
    path = tmp_path_factory.mktemp("quantised") / request.param
    quantise_engine(tiny_engine, path, calibration_folder, Recipe(request.param, Target.TENSORRT))
    build, _ = build_engines(path, ONE)
    return path, build


@needs_rtx
def test_names_shapes_and_types_are_those_of_an_fp16_build(built: tuple[Path, Build]) -> None:
    path, build = built
    assert [made.name for made in build.stages] == list(STAGES)
    check_signatures(path, build)


@needs_rtx
def test_every_stage_reports_what_the_cast_added(built: tuple[Path, Build]) -> None:
    path, build = built
    for made, stage in zip(build.stages, read_manifest(path).stages, strict=True):
        assert [check.output for check in made.drift] == [spec.name for spec in stage.outputs]
        assert all(check.max_abs_error <= check.tolerance for check in made.drift)


@needs_rtx
@numbers
def test_the_library_sees_8_bit_tensors_in_the_network(
    tiny_engine: Path, tiny_statistics: Statistics, number: Number
) -> None:
    """Its parser turns the pairs into layers of its own; the engine itself can be looked into on a GPU only."""
    trt = pytest.importorskip("tensorrt_rtx")

    directory = open_engine(tiny_engine)
    kind = {Number.INT8: trt.DataType.INT8, Number.FP8: trt.DataType.FP8}[number]
    for stage in directory.manifest.stages:
        statistics, recipe = tiny_statistics.stages[stage.name], Recipe(number, Target.TENSORRT)
        model, _ = quantise_stage(onnx.load(directory.file(stage.file)), stage, statistics, recipe)
        typed = cast(model, plan_stage(model, stage, Precision.FP16), Precision.FP16)
        builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
        assert parser.parse(typed.SerializeToString())
        layers = [network.get_layer(i) for i in range(network.num_layers)]
        rounded = [layer for layer in layers if layer.type == trt.LayerType.QUANTIZE]
        back = [layer for layer in layers if layer.type == trt.LayerType.DEQUANTIZE]
        written = [node.op_type for node in model.graph.node]
        assert {layer.get_output(0).dtype for layer in rounded} == {kind}
        assert len(rounded) == written.count("QuantizeLinear")
        assert len(back) == written.count("DequantizeLinear")


@pytest.mark.parametrize(("number", "precision"), [(Number.INT8, Precision.FP16), (Number.FP8, Precision.BF16)])
@pytest.mark.parametrize("name", STAGES)
def test_the_cast_of_an_8_bit_stage_is_measured(
    tiny_engine: Path,
    tiny_statistics: Statistics,
    tmp_path: Path,
    number: Number,
    precision: Precision,
    name: StageName,
) -> None:
    """fp8 included, which ONNX Runtime runs only where it leaves Q/DQ as it stands."""
    directory = open_engine(tiny_engine)
    stage = directory.manifest.stage(name)
    vit = directory.manifest.stage(StageName.VIT)
    assert stage is not None
    assert vit is not None
    recipe = Recipe(number, Target.TENSORRT)
    model, _ = quantise_stage(onnx.load(directory.file(stage.file)), stage, tiny_statistics.stages[name], recipe)
    (tmp_path / "onnx").mkdir()
    (tmp_path / vit.file.path).write_bytes(directory.file(vit.file).read_bytes())  # it feeds the VCG head
    onnx.save(model, tmp_path / "onnx" / "eight.onnx")
    here = dataclasses.replace(directory, path=tmp_path)
    eight = dataclasses.replace(stage, file=FileEntry("onnx/eight.onnx", 0, ""))
    checks = compare_cast(here, eight, cast(model, plan_stage(model, stage, precision), precision), precision)
    assert max(check.max_abs_error for check in checks) > 0
    assert all(check.tolerance >= CAST_TOLERANCE_8_BITS * check.max_abs_reference for check in checks)


@needs_rtx
def test_onnx_runtimes_form_is_refused_with_the_command_that_makes_the_other(
    tiny_engine: Path, calibration_folder: Path, tmp_path: Path
) -> None:
    quantise_engine(tiny_engine, tmp_path / "int8", calibration_folder, Recipe())
    with pytest.raises(UsageError, match=r"quantised for ONNX Runtime.*iqa-quantise --target tensorrt"):
        build_engines(tmp_path / "int8", ONE)
    assert not (tmp_path / "int8" / "tensorrt").exists()


@needs_rtx
@pytest.mark.slow
def test_the_trained_model_builds_in_fp8(calibration_images: list[Path], tmp_path: Path) -> None:
    from diffiqa.export.engine import export_engine
    from diffiqa.model.checkpoint import load

    export_engine(load(MODELS / "mini" / "model.safetensors"), tmp_path / "mini")
    collect(tmp_path / "mini", calibration_images, tmp_path / "statistics", minimum=3)
    recipe = Recipe(Number.FP8, Target.TENSORRT)
    quantise_engine(tmp_path / "mini", tmp_path / "fp8", tmp_path / "statistics", recipe)
    build, _ = build_engines(tmp_path / "fp8", BuildOptions(RTX, batches=("1",), sizes=("112x112",)))
    assert [stage.name for stage in build.stages] == list(STAGES)
