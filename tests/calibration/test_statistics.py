"""What is recorded of the loop's tensors: against NumPy, over steps, merged, resumed, and refused where it must be."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import PIL.Image
import pytest
from click.testing import CliRunner
from onnx import helper

from diffiqa.calibration import statistics as module
from diffiqa.calibration.cli import calibrate
from diffiqa.calibration.ranges import BINS, LOWER, ZERO
from diffiqa.calibration.statistics import (
    CalibrationImage,
    Recorder,
    StageStatistics,
    Statistics,
    collect,
    fp16_plan,
    read,
    watched,
    write,
)
from diffiqa.engine.manifest import EngineDirectory, Precision, StageName, open_engine
from diffiqa.engine.npz import read_arrays
from diffiqa.errors import EngineError, UsageError
from diffiqa.export.precision import cast, plan_stage, read_plan

from ..tiny import STAGES, TINY, photo


@pytest.fixture
def directory(tiny_engine: Path) -> EngineDirectory:
    return open_engine(tiny_engine)


def of_tensors(**tensors: list[list[float]]) -> StageStatistics:
    """Statistics of named tensors, a list of values per step."""
    steps = len(next(iter(tensors.values())))
    made = StageStatistics.empty(tuple(tensors), steps)
    for row, values in enumerate(tensors.values()):
        for step, seen in enumerate(values):
            made.observe(row, step, np.array(seen, np.float32))
    return made


def of_vda(digests: str, stage: StageStatistics, engine: str = "e") -> Statistics:
    return Statistics(engine, tuple(CalibrationImage(d, d, 0) for d in digests), {StageName.VDA: stage})


def test_recorded_figures_are_those_of_the_tensors(directory: EngineDirectory) -> None:
    stage = directory.manifest.stage(StageName.UNET)
    assert stage is not None
    model = onnx.load(directory.file(stage.file))
    names = watched(model)
    statistics = StageStatistics.empty(names, TINY.schedule.steps)
    level = TINY.schedule.coefficients.noise_level[2]
    rng = np.random.default_rng(1)
    feed = {name: rng.standard_normal((1, 3, 16, 32)).astype(np.float32) for name in ("y", "condition")}
    feed["noise_level"] = np.full((1, 1), level)
    noise = np.empty((1, 3, 16, 32), np.float32)
    Recorder(directory, StageName.UNET, statistics).bind(feed, {"noise": noise})()

    outputs = [name for name in names if name not in feed]
    shown = {value.name for value in model.graph.output}
    model.graph.output.extend(helper.make_tensor_value_info(n, 1, None) for n in outputs if n not in shown)
    values = onnxruntime.InferenceSession(model.SerializeToString()).run(outputs, feed)
    seen = {**feed, **dict(zip(outputs, values, strict=True))}
    assert np.array_equal(noise, seen["noise"])
    for row, name in enumerate(names):
        tensor = seen[name]
        assert (statistics.low[row, 2], statistics.high[row, 2]) == (tensor.min(), tensor.max()), name
        small = np.count_nonzero((np.abs(tensor) < 0.25) & (tensor != 0))
        bins = (LOWER < 0.25) & (np.arange(BINS) != ZERO)
        assert statistics.histogram[row, 2][bins].sum() == small, name
        assert statistics.histogram[row].sum() == statistics.histogram[row, 2].sum() == tensor.size, name


def test_layers_norms_and_skips_are_watched(directory: EngineDirectory) -> None:
    for stage in directory.manifest.stages:
        model = onnx.load(directory.file(stage.file))
        names = set(watched(model))
        weights = {tensor.name for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type in {"Conv", "Gemm", "MatMul", "Softmax", "BatchNormalization", "LayerNormalization"}:
                assert {node.input[0], node.output[0]} <= names | weights
        assert not names & weights


def test_every_step_and_stage_is_seen(tiny_statistics: Statistics) -> None:
    assert set(tiny_statistics.stages) == set(STAGES)
    for name, stage in tiny_statistics.stages.items():
        counts = stage.histogram.sum(axis=2)
        assert counts.shape[1] == (TINY.schedule.steps if name is StageName.UNET else 1)
        assert (counts > 0).all()
        assert (counts == counts[:, :1]).all()
        assert (stage.low <= stage.high).all()
    assert [sample.seed for sample in tiny_statistics.samples] == [0, 0, 0]


def test_a_step_that_was_seen_more_often_weighs_no_more() -> None:
    weights, low, high = of_tensors(x=[[1.0] * 999, [-8.0]]).distribution("x")
    assert weights[ZERO + 1 :].sum() == pytest.approx(0.5)
    assert (low, high) == (-8, 1)


def test_what_was_written_is_read_and_damage_is_named(tmp_path: Path) -> None:
    statistics = of_vda("ab", of_tensors(x=[[1.0, 2e-8], [7e4]]))
    write(statistics, tmp_path)
    assert read(tmp_path).digest == statistics.digest
    have, want = read(tmp_path).stages[StageName.VDA], statistics.stages[StageName.VDA]
    assert np.array_equal(have.histogram, want.histogram)
    readable = (tmp_path / "statistics.json").read_text()
    assert '"fp16_flush_share": 0.33' in readable
    data = (tmp_path / "statistics.npz").read_bytes()
    (tmp_path / "statistics.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError, match=r"statistics.npz is not whole .*run iqa-calibrate again"):
        read(tmp_path)
    with pytest.raises(UsageError, match=r"holds no statistics.npz; make it with iqa-calibrate"):
        read(tmp_path / "nothing")


@pytest.mark.parametrize("steps", [{}, {"vda": -1}, {"vda": 3}, {"vda": 10**18}])
def test_steps_that_the_arrays_do_not_have_are_refused(tmp_path: Path, steps: dict[str, int]) -> None:
    write(of_vda("ab", of_tensors(x=[[1.0], [2.0]])), tmp_path)
    arrays = read_arrays(tmp_path / "statistics.npz")
    header = json.loads(bytes(arrays.pop("header"))) | {"steps": steps}
    text = np.frombuffer(json.dumps(header).encode(), np.uint8)
    np.savez(tmp_path / "statistics.npz", header=text, **arrays)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"vda.low does not fit"):
        read(tmp_path)


def test_images_that_are_there_already_are_not_run_again(
    tiny_engine: Path, calibration_images: list[Path], calibration_folder: Path, tmp_path: Path
) -> None:
    ran: list[str] = []
    for count in (1, 3):
        collect(
            tiny_engine,
            calibration_images[:count],
            tmp_path,
            minimum=1,
            say=lambda text: ran.append(text.partition(", ")[2]),
        )
    assert sorted(ran) == sorted(map(str, calibration_images))
    resumed, whole = read(tmp_path), read(calibration_folder)
    assert resumed.digest == whole.digest
    for name, stage in resumed.stages.items():
        assert np.array_equal(stage.histogram, whole.stages[name].histogram)


def test_statistics_of_another_engine_are_not_added_to(
    tiny_engine: Path, calibration_images: list[Path], tmp_path: Path
) -> None:
    write(of_vda("a", of_tensors(x=[[1.0]])), tmp_path)
    with pytest.raises(EngineError, match=r"statistics are of engine e, .* into another folder"):
        collect(tiny_engine, calibration_images, tmp_path)


def test_planted_overflow_and_underflow_stay_float32(directory: EngineDirectory, tiny_statistics: Statistics) -> None:
    unet = copy.deepcopy(tiny_statistics.stages[StageName.UNET])
    stage = directory.manifest.stage(StageName.UNET)
    assert stage is not None
    model = onnx.load(directory.file(stage.file))
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    large, small = convolutions[3].output[0], convolutions[8].output[0]
    unet.observe(unet.tensors.index(large), 4, np.array([-7e4], np.float32))
    row = unet.tensors.index(small)
    unet.histogram[row] = 0
    unet.observe(row, 0, np.random.default_rng(1).standard_normal(999).astype(np.float32) * 1e-6)

    planted = dataclasses.replace(tiny_statistics, stages={**tiny_statistics.stages, StageName.UNET: unet})
    plan = fp16_plan(directory, planted).stage(StageName.UNET)
    kept = {entry.node: entry.why for entry in plan.float32}
    before = {entry.node for entry in plan_stage(model, stage, Precision.FP16).float32}
    assert before <= set(kept)
    for tensor, why in ((large, f"{large} reaches 7e+04, beyond fp16"), (small, f"{small} would lose")):
        for node in model.graph.node:
            if tensor in {*node.input, *node.output} and node.name not in before:
                assert kept[node.name].startswith(why)
    assert convolutions[3].name in kept
    assert convolutions[12].name not in kept
    cast(model, plan, Precision.FP16)  # the plan fits the graph


def test_the_plan_of_statistics_without_trouble_is_that_of_the_graph(
    directory: EngineDirectory, tiny_statistics: Statistics
) -> None:
    for stage in directory.manifest.stages:
        found = fp16_plan(directory, tiny_statistics).stage(stage.name)
        assert found.onnx_sha256 == stage.file.sha256
        assert found.tensors == plan_stage(onnx.load(directory.file(stage.file)), stage, Precision.FP16).tensors


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        pytest.param([photo(1, 32, 32)], "needs at least 4 different images, 1 can be used", id="too-few"),
        pytest.param([photo(1, 32, 32)] * 5, "all 5 calibration images are the same picture", id="identical"),
        pytest.param([np.zeros((32 + n, 32, 3), np.uint8) for n in range(5)], "are of a single colour", id="all-black"),
    ],
)
def test_images_that_cannot_stand_for_real_ones_are_refused(
    tiny_engine: Path, tmp_path: Path, pictures: list[np.ndarray], message: str
) -> None:
    for number, picture in enumerate(pictures):
        PIL.Image.fromarray(picture).save(tmp_path / f"{number}.png")
    with pytest.raises(UsageError, match=message):
        collect(tiny_engine, sorted(tmp_path.iterdir()), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_files_are_named_and_the_rest_is_used(
    tiny_engine: Path, calibration_images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MIN_IMAGES", 1)
    for path in calibration_images[:1]:
        shutil.copy(path, tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    only_broken = CliRunner().invoke(
        calibrate, ["--engine", str(tiny_engine), "--calib", str(tmp_path / "broken.png"), "-o", str(tmp_path / "a")]
    )
    assert only_broken.exit_code == 2
    assert "0 can be used; 1 could not be read, the first:" in " ".join(only_broken.stderr.split())
    assert "broken.png" in only_broken.stderr
    plan, used = tmp_path / "plan.json", ["--calib", str(tmp_path), "-o", str(tmp_path / "b")]
    some = CliRunner().invoke(calibrate, ["--engine", str(tiny_engine), *used, "--fp16-plan", str(plan)])
    assert some.exit_code == 1, some.output
    assert "left out: " in some.stderr
    assert "broken.png" in some.stderr
    assert "b: 1 images, statistics" in some.stdout
    assert read_plan(plan).precision is Precision.FP16


def test_without_images_it_calibrates_on_pictures_of_its_own_and_says_so(tiny_engine: Path, tmp_path: Path) -> None:
    arguments = ["--engine", str(tiny_engine), "-o", str(tmp_path / "a")]
    result = CliRunner().invoke(calibrate, arguments)
    assert result.exit_code == 0, result.output
    assert "no --calib: calibrating on 16 made-up pictures" in " ".join(result.stderr.split())
    samples = read(tmp_path / "a").samples
    assert len({sample.digest for sample in samples}) == 16
    again = CliRunner().invoke(calibrate, arguments)
    assert again.exit_code == 2
    assert "holds statistics already: name images to add with --calib" in " ".join(again.stderr.split())
    assert read(tmp_path / "a").samples == samples


def test_an_engine_without_onnx_is_refused(tiny_engine: Path, calibration_images: list[Path], tmp_path: Path) -> None:
    engine = shutil.copytree(tiny_engine, tmp_path / "engine")
    shutil.rmtree(engine / "onnx")
    with pytest.raises(EngineError, match=r"unet\.onnx is missing; export the engine again"):
        collect(engine, calibration_images, tmp_path / "out")
