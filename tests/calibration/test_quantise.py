"""8-bit engines: what is written into the graphs, how far they are from float32, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from diffiqa.calibration.cli import quantise
from diffiqa.calibration.quantise import Number, Recipe, StageQuantisation, Target, quantise_engine, quantise_stage
from diffiqa.calibration.ranges import Method
from diffiqa.calibration.statistics import StageStatistics, Statistics, read, watched, write
from diffiqa.cli import export
from diffiqa.engine.manifest import EngineDirectory, StageName, TensorSpec, open_engine
from diffiqa.errors import EngineError, UsageError
from diffiqa.export.selftest import LEAST_8_BITS
from diffiqa.runtime.host.openvino_stage import OpenVino
from diffiqa.runtime.scorer import Scorer, load
from diffiqa.runtime.selftest import read_self_test, self_test

from ..runtime.test_selftest import spoil
from ..tiny import STAGES, photo

FloatArray = npt.NDArray[np.float32]
TENSORRT = Recipe(target=Target.TENSORRT)
FP8 = Recipe(Number.FP8, Target.TENSORRT)


@pytest.fixture(scope="module")
def int8_engine(tiny_engine: Path, calibration_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("engines") / "int8"
    quantise_engine(tiny_engine, target, calibration_folder, Recipe())
    return target


@pytest.fixture(scope="module")
def directory(tiny_engine: Path) -> EngineDirectory:
    return open_engine(tiny_engine)


def quantised(
    directory: EngineDirectory, name: StageName, statistics: Statistics, recipe: Recipe
) -> tuple[onnx.ModelProto, onnx.ModelProto, StageQuantisation]:
    stage = directory.manifest.stage(name)
    assert stage is not None
    model = onnx.load(directory.file(stage.file))
    made, report = quantise_stage(model, stage, statistics.stages[name], recipe)
    return model, made, report


def constants(model: onnx.ModelProto) -> dict[str, npt.NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_the_self_test_holds_what_the_engine_itself_answers(int8_engine: Path, tmp_path: Path) -> None:
    """8 bits move scores of trained models by a tenth: a tolerance around the float32 model would allow anything."""
    test = read_self_test(open_engine(int8_engine))
    assert test is not None
    assert LEAST_8_BITS < test.tolerances["fp32"] < 4 * LEAST_8_BITS
    assert all(answer.share == 0 for answer in self_test(int8_engine).answers)
    assert self_test(int8_engine, OpenVino()).within
    spoil(engine := Path(shutil.copytree(int8_engine, tmp_path / "engine")), StageName.VIT)
    assert not self_test(engine).within


def test_scores_stay_near_float32(int8_engine: Path, scorer: Scorer) -> None:
    pictures = [photo(seed, 40, 48) for seed in (11, 12)]
    with load(int8_engine) as int8:
        for picture in pictures:
            exact, rounded = scorer.score(picture), int8.score(picture)
            assert rounded.score == pytest.approx(exact.score, rel=0.01)
            assert rounded.score != exact.score


def test_the_engine_is_whole_and_says_how_it_was_made(
    int8_engine: Path, directory: EngineDirectory, tiny_statistics: Statistics
) -> None:
    made = open_engine(int8_engine).manifest
    assert made.engine_id != directory.manifest.engine_id
    assert dataclasses.replace(made.stages[0], file=None, checks=()) == dataclasses.replace(  # type: ignore[arg-type]
        directory.manifest.stages[0],
        file=None,  # type: ignore[arg-type]
        checks=(),
    )
    assert all(check.max_abs_error <= check.tolerance for stage in made.stages for check in stage.checks)
    assert (
        f"engine {directory.manifest.engine_id} quantised with percentile 99.999 ranges of 3 images"
        in made.provenance.notes[-1]
    )
    assert made.provenance.sources[-1].format.endswith(tiny_statistics.digest)
    report = json.loads((int8_engine / "calibration" / "quantisation.json").read_text())
    assert report["recipe"]["method"] == "percentile"
    assert [stage["name"] for stage in report["stages"]] == list(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_weights_are_int8_per_channel_and_near_the_float_ones(
    directory: EngineDirectory, tiny_statistics: Statistics, name: StageName
) -> None:
    model, made, report = quantised(directory, name, tiny_statistics, TENSORRT)
    exact, stored = constants(model), constants(made)
    producers = {output: node for node in made.graph.node for output in node.output}
    assert report.quantised
    joined = {node.input[1] for node in made.graph.node if "joined" in node.input[0]}  # have scales folded in
    for before, after in ((n, m) for n in model.graph.node for m in made.graph.node if n.name == m.name):
        if before.name not in report.quantised:
            continue
        dequantise = producers[after.input[1]]
        numbers, scales, zeros = (stored[part] for part in dequantise.input)
        (axis,) = (attribute.i for attribute in dequantise.attribute if attribute.name == "axis")
        assert numbers.dtype == np.int8
        assert not zeros.any()
        assert scales.shape == (numbers.shape[axis],)
        assert np.abs(numbers).max() == 127
        if after.input[1] not in joined:
            shape = [-1 if i == axis else 1 for i in range(numbers.ndim)]
            error = np.abs(numbers * scales.reshape(shape) - exact[before.input[1]])
            assert (error <= scales.reshape(shape) * 0.5001).all()


def test_what_matters_most_stays_float32(directory: EngineDirectory, tiny_statistics: Statistics) -> None:
    model, made, report = quantised(directory, StageName.UNET, tiny_statistics, Recipe())
    kept = {entry.node: entry.why for entry in report.float32}
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    assert kept[convolutions[0]].startswith("first convolution")
    assert kept[convolutions[-1]].startswith("last layer")
    assert set(convolutions[1:-1]) <= set(report.quantised)
    gemms = [node.name for node in model.graph.node if node.op_type == "Gemm"]  # all of the noise embedding
    assert all(kept[name].startswith("noise embedding") for name in gemms)
    stored = constants(made)
    for node in made.graph.node:
        if node.name in kept:
            assert stored[node.input[1]].dtype == np.float32


def test_what_reads_the_first_convolution_of_a_resnet_stays_float32(
    directory: EngineDirectory, tiny_statistics: Statistics
) -> None:
    """Its first block and that block's shortcut: their rounding was two thirds of what `mini`'s VDA lost."""
    model, _, report = quantised(directory, StageName.VDA, tiny_statistics, Recipe())
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    (pooled,) = (node.output[0] for node in model.graph.node if node.op_type == "MaxPool")
    readers = {node.name for node in convolutions if node.input[0] == pooled}
    assert len(readers) == 2
    assert {entry.node for entry in report.float32 if entry.why.startswith("second convolution")} == readers
    assert {node.name for node in convolutions[1:]} - readers <= set(report.quantised)


def test_a_convolution_of_features_is_none_that_reads_the_image(
    directory: EngineDirectory, tiny_statistics: Statistics
) -> None:
    model, _, report = quantised(directory, StageName.VCG, tiny_statistics, Recipe())
    assert next(node.name for node in model.graph.node if node.op_type == "Conv") in report.quantised


def test_the_halves_of_each_skip_have_scales_of_their_own(
    directory: EngineDirectory, tiny_statistics: Statistics
) -> None:
    _, made, _ = quantised(directory, StageName.UNET, tiny_statistics, Recipe())
    stored = constants(made)
    producers = {output: node for node in made.graph.node for output in node.output}
    skips = [node for node in made.graph.node if node.op_type == "Concat" and node.input[0].endswith(".quantised")]
    assert len(skips) == 6  # as many as the tiny U-Net has
    for node in skips:
        first, second = (producers[name] for name in node.input)
        assert first.op_type == second.op_type == "QuantizeLinear"
        assert stored[first.input[1]] != stored[second.input[1]]
        assert stored[first.input[2]] == stored[second.input[2]] == 128


def skip_of_unlike_halves() -> tuple[onnx.ModelProto, dict[str, FloatArray]]:
    """image → Conv → (h, 100·h) → Concat → Conv, in whose result both halves weigh the same, → Conv."""
    rng = np.random.default_rng(1)
    second = rng.standard_normal((8, 8, 1, 1)).astype(np.float32)
    second[:, 4:] /= 100
    weights = {
        "w1": rng.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "hundred": np.float32(100),
        "w2": second,
        "w3": np.eye(8, dtype=np.float32).reshape(8, 8, 1, 1),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["half"], "one", pads=[1, 1, 1, 1]),
        helper.make_node("Mul", ["half", "hundred"], ["scaled"], "scale"),
        helper.make_node("Concat", ["half", "scaled"], ["skip"], "join", axis=1),
        helper.make_node("Conv", ["skip", "w2"], ["middle"], "two"),
        helper.make_node("Conv", ["middle", "w3"], ["noise"], "three"),
    ]
    return in_a_model(nodes, weights, [1, 8, 16, 16]), {"image": rng.standard_normal((1, 3, 16, 16)).astype(np.float32)}


def in_a_model(nodes: list[onnx.NodeProto], weights: dict[str, Any], result: list[int]) -> onnx.ModelProto:
    image, noise = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("image", [1, 3, 16, 16]), ("noise", result))
    )
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "small", [image], [noise], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def in_8_bits(
    directory: EngineDirectory, model: onnx.ModelProto, feed: dict[str, FloatArray], recipe: Recipe
) -> tuple[StageQuantisation, float]:
    """Return what was done to a model from image to noise, and how far its result then is, relative to its size."""
    names = watched(model)
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    inside = [name for name in names if name not in {"image", "noise"}]
    shown.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inside)
    outputs = ["noise", *inside]
    values = dict(zip(outputs, onnxruntime.InferenceSession(shown.SerializeToString()).run(outputs, feed), strict=True))
    statistics = StageStatistics.empty(names, 1)
    for row, name in enumerate(names):
        statistics.observe(row, 0, {**feed, **values}[name])
    stage = dataclasses.replace(
        directory.manifest.stages[0], inputs=(TensorSpec("image", "float32", feed["image"].shape),), outputs=()
    )
    made, report = quantise_stage(model, stage, statistics, recipe)
    (got,) = onnxruntime.InferenceSession(made.SerializeToString()).run(["noise"], feed)
    return report, float(np.sqrt(np.mean((got - values["noise"]) ** 2) / np.mean(values["noise"] ** 2)))


RECIPES = [Recipe(target=target, method=Method.MAX) for target in Target]


@pytest.mark.parametrize("recipe", RECIPES)
def test_unlike_halves_lose_nothing_to_each_other(directory: EngineDirectory, recipe: Recipe) -> None:
    report, error = in_8_bits(directory, *skip_of_unlike_halves(), recipe)
    assert report.quantised == ("two",)
    assert error < 0.015  # one scale for both would leave the first half 2 numbers, and an error above 0.2


@pytest.mark.parametrize("recipe", RECIPES)
def test_numbers_go_to_what_relu6_lets_through(directory: EngineDirectory, recipe: Recipe) -> None:
    """In EfficientNet-Lite0 that is 6 of 100: with the range of what it reads, `mini`'s score moved by 0.04."""
    report, error = in_8_bits(directory, *limited_to_six(), recipe)
    assert report.quantised == ("three", "four")
    assert {entry.node: entry.why.partition(":")[0] for entry in report.float32} == {
        "one": "first convolution",
        "two": "second convolution",
        "five": "a small product",
        "six": "last layer",
    }
    assert error < 0.02


def limited_to_six() -> tuple[onnx.ModelProto, dict[str, FloatArray]]:
    """image → Conv → ReLU6 → three more of both, whose results reach far beyond 6 → a product of few numbers → one."""
    rng = np.random.default_rng(2)
    weights = {
        "w1": rng.standard_normal((64, 3, 1, 1)).astype(np.float32),
        **{name: rng.standard_normal((64, 64, 3, 3)).astype(np.float32) for name in ("w2", "w3", "w4")},
        "w5": rng.standard_normal((1, 2)).astype(np.float32),
        "w6": rng.standard_normal((2, 1)).astype(np.float32),
        "zero": np.float32(0),
        "limit": np.float32(6),
        "places": np.array([1]),
    }
    nodes = []
    for number, name in enumerate(("one", "two", "three", "four"), start=1):
        read = f"limited{number - 1}" if number > 1 else "image"
        nodes += [
            helper.make_node("Conv", [read, f"w{number}"], [name], name),
            helper.make_node("Clip", [name, "zero", "limit"], [f"limited{number}"], f"limit{number}"),
        ]
    nodes += [
        helper.make_node("ReduceMean", ["limited4", "places"], ["mean"], "mean", keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "last"], ["column"], "column"),
        helper.make_node("MatMul", ["column", "w5"], ["few"], "five"),
        helper.make_node("MatMul", ["few", "w6"], ["noise"], "six"),
    ]
    weights["last"] = np.array([-1])
    feed = {"image": rng.standard_normal((1, 3, 16, 16)).astype(np.float32)}
    return in_a_model(nodes, weights, [1, 10, 10, 1]), feed


@pytest.mark.parametrize("name", STAGES)
def test_tensorrts_form_is_signed_around_zero_with_float_biases(
    directory: EngineDirectory, tiny_statistics: Statistics, name: StageName
) -> None:
    _, made, _ = quantised(directory, name, tiny_statistics, TENSORRT)
    stored = constants(made)
    rounding = [node for node in made.graph.node if node.op_type in {"QuantizeLinear", "DequantizeLinear"}]
    assert rounding
    for node in rounding:
        assert stored[node.input[2]].dtype == np.int8
        assert not stored[node.input[2]].any()
    assert not any(value.dtype == np.int32 for value in stored.values())


def test_openvino_runs_its_form_of_the_unet_in_8_bits_with_no_float_between(
    directory: EngineDirectory, tiny_statistics: Statistics, tmp_path: Path
) -> None:
    openvino = pytest.importorskip("openvino")
    _, made, report = quantised(directory, StageName.UNET, tiny_statistics, Recipe(target=Target.OPENVINO))
    onnx.save_model(made, tmp_path / "unet.onnx")
    writers = {name: node for node in made.graph.node for name in node.output}
    products = [node for node in made.graph.node if node.op_type == "MatMul"]
    assert products
    assert all(writers[name].op_type == "DequantizeLinear" for node in products for name in node.input)
    core = openvino.Core()
    model = core.read_model(tmp_path / "unet.onnx")
    model.reshape({"y": [1, 3, 32, 32], "condition": [1, 3, 32, 32], "noise_level": [1, 1]})
    form = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    ran: dict[str, str] = {}  # by the node of the file that it came from: what computed it
    for op in form.get_runtime_model().get_ops():
        about = {key: str(op.get_rt_info()[key].astype(str)) for key in ("originalLayersNames", "primitiveType")}
        for name in about["originalLayersNames"].split(","):
            ran[name.partition("/")[0]] = about["primitiveType"].lower()
    done = [name for name in report.quantised if name in ran]
    assert len(done) > len(report.quantised) / 2
    assert [name for name in done if not ran[name].endswith("i8")] == []
    joined = [node for node in made.graph.node if node.op_type == "Concat" and ".joined" in node.output[0]]
    assert joined
    floats = {node.output[0].removesuffix(".joined") for node in joined}
    assert not any(node.op_type == "Concat" and node.output[0] in floats for node in made.graph.node)


@pytest.mark.parametrize("name", STAGES)
def test_fp8_is_written_as_a_choice_of_type(
    directory: EngineDirectory, tiny_statistics: Statistics, name: StageName
) -> None:
    _, made, report = quantised(directory, name, tiny_statistics, FP8)
    eights = [t for t in made.graph.initializer if t.data_type == TensorProto.FLOAT8E4M3FN]
    assert len(eights) >= 2 * len(report.quantised)
    assert not any(t.data_type in {TensorProto.INT8, TensorProto.UINT8} for t in made.graph.initializer)


def test_both_ways_of_choosing_ranges_give_a_likeness(
    tiny_engine: Path, int8_engine: Path, calibration_folder: Path, tmp_path: Path
) -> None:
    quantise_engine(tiny_engine, tmp_path / "max", calibration_folder, Recipe(method=Method.MAX))
    made = [open_engine(path).manifest for path in (int8_engine, tmp_path / "max")]
    assert made[0].engine_id != made[1].engine_id
    for stage in (*made[0].stages, *made[1].stages):
        for check in stage.checks:
            assert check.max_abs_error < 0.1 * check.max_abs_reference, stage.name


def test_a_node_that_saw_infinities_stays_float32(directory: EngineDirectory, tiny_statistics: Statistics) -> None:
    stage = directory.manifest.stage(StageName.VDA)
    assert stage is not None
    model = onnx.load(directory.file(stage.file))
    node = [node for node in model.graph.node if node.op_type == "Conv"][5]
    seen = tiny_statistics.stages[StageName.VDA]
    nonfinite = seen.nonfinite.copy()
    nonfinite[seen.tensors.index(node.output[0])] = 1
    _, report = quantise_stage(model, stage, dataclasses.replace(seen, nonfinite=nonfinite), Recipe())
    assert node.name in {entry.node for entry in report.float32 if "not finite" in entry.why}


def test_an_engine_is_not_quantised_twice(int8_engine: Path, tiny_statistics: Statistics, tmp_path: Path) -> None:
    engine = open_engine(int8_engine).manifest.engine_id
    write(dataclasses.replace(tiny_statistics, engine=engine), tmp_path)
    with pytest.raises(EngineError, match="quantised already; start from the float32 engine"):
        quantise_engine(int8_engine, tmp_path / "again", tmp_path, Recipe())
    assert not (tmp_path / "again").exists()


def test_statistics_of_another_engine_are_refused(
    tiny_engine: Path, tiny_statistics: Statistics, tmp_path: Path
) -> None:
    write(dataclasses.replace(tiny_statistics, engine="0" * 16), tmp_path)
    with pytest.raises(EngineError, match="statistics are of engine 0000000000000000"):
        quantise_engine(tiny_engine, tmp_path / "int8", tmp_path, Recipe())


def test_recipes_that_cannot_run_are_refused() -> None:
    with pytest.raises(UsageError, match="do not compute in fp8"):
        Recipe(Number.FP8)
    with pytest.raises(UsageError, match="percentile must be above 50"):
        Recipe(percentile=10)
    assert Recipe.of("fp8").target is Target.TENSORRT


def test_the_command_writes_an_engine_and_a_table(tiny_engine: Path, calibration_folder: Path, tmp_path: Path) -> None:
    arguments = ["--engine", str(tiny_engine), "--statistics", str(calibration_folder), "-o", str(tmp_path / "e")]
    result = CliRunner().invoke(quantise, [*arguments, "--ranges", "percentile", "--percentile", "99.5"])
    assert result.exit_code == 0, result.output
    assert "layers in 8 bits" in result.stdout
    assert "quantised with percentile 99.5 ranges" in result.stdout
    again = CliRunner().invoke(quantise, arguments)
    assert again.exit_code == 2
    assert "give --force to replace it" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "int8"], "--precision int8 needs --calib IMAGES"),
        (["--precision", "int8", "--calib", "x", "--stage", "unet"], "no --stage, no --target"),
        (["--calib", "x"], "--calib is for --precision int8, fp8 or mixed"),
    ],
)
def test_export_refuses_options_that_contradict_each_other(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(export, ["--preset", "mini", "--seed", "0", "-o", str(tmp_path / "e"), *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


def test_quantise_wants_statistics_where_it_is_sent(tiny_engine: Path, tmp_path: Path) -> None:
    nothing = ["--engine", str(tiny_engine), "--statistics", str(tmp_path), "-o", str(tmp_path / "e")]
    result = CliRunner().invoke(quantise, nothing)
    assert result.exit_code == 2
    assert "holds no statistics.npz; make it with iqa-calibrate" in result.stderr


def test_quantise_alone_draws_its_pictures(tiny_engine: Path, tmp_path: Path) -> None:
    engine = shutil.copytree(tiny_engine, tmp_path / "engine")
    alone = ["--engine", str(engine), "-o", str(tmp_path / "e")]
    result = CliRunner().invoke(quantise, alone)
    assert result.exit_code == 0, result.output
    assert "no --calib: calibrated on 16 made-up pictures" in " ".join(result.stderr.split())
    assert len(read(engine / "calibration").samples) == 16
    again = CliRunner().invoke(quantise, [*alone, "--force"])  # by the statistics that are there now
    assert again.exit_code == 0, again.output
    assert "made-up" not in again.stderr
