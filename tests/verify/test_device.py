"""`iqa-verify --backend tensorrt`, on a driver without a GPU: engines by stage and step, and all on the device."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from diffiqa import cli
from diffiqa.engine.manifest import Precision, StageName, open_engine
from diffiqa.errors import BackendError
from diffiqa.kernels.launch import Launch
from diffiqa.runtime.builds import NotForShapesError
from diffiqa.runtime.gpu import tensorrt_stage
from diffiqa.runtime.host.onnx_stage import OnnxRuntime, OnnxStage
from diffiqa.verify.device import DeviceStage

from ..fake_device import FakeGraph, FakeLayer, fake_stages
from .verify_engines import edited, pictures, scale_weights

CALM = ("--limit", "srcc=none", "--limit", "plcc=none", "--threads", "1", "--seeds", "1")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures") / "in", 2)


def call(engine: Path, images: Path, *more: str | Path) -> Result:
    return CliRunner().invoke(
        cli.main, ["verify", "--engine", str(engine), "--backend", "tensorrt", str(images), *CALM, *map(str, more)]
    )


def checks(file: Path) -> dict[str, Any]:
    return {check["name"]: check for check in json.loads(file.read_text())["checks"]}


def test_a_build_is_verified_against_its_own_onnx_stages_by_step_and_as_a_whole(
    tiny_build: Path, fake_gpu: FakeLayer, images: Path, tmp_path: Path
) -> None:
    result = call(tiny_build, images, "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    found = checks(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["candidate"]["label"].endswith("fp32: fake GPU")
    assert found["unet-max"]["value"] == 0  # ONNX Runtime stands in for engines: the same numbers step by step
    assert found["graph"]["value"] == 0
    assert 0 <= found["device"]["value"] < 1e-5  # our kernels, beside the sampler on the host
    assert "graph" in fake_gpu.log
    assert fake_gpu.closed
    assert fake_gpu.left == 0


def test_an_engine_that_computes_something_else_is_caught_in_its_stage(
    tiny_build: Path,
    tiny_engine: Path,
    fake_gpu: FakeLayer,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = open_engine(edited(tiny_engine, tmp_path / "other", StageName.UNET, scale_weights))
    monkeypatch.setattr(tensorrt_stage, "load_engines", lambda layer, *_: fake_stages(layer, other))
    result = call(tiny_build, images, "--json", tmp_path / "a.json")
    assert result.exit_code == 1, result.output
    found = checks(tmp_path / "a.json")
    assert not found["unet-mean"]["within"]
    assert found["vit-mean"]["value"] == 0


def test_a_graph_that_cannot_be_captured_is_said_and_is_no_failure(
    tiny_build: Path, fake_gpu: FakeLayer, images: Path, tmp_path: Path
) -> None:
    fake_gpu.capture_fails = lambda launches: True
    result = call(tiny_build, images, "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    found = checks(tmp_path / "a.json")["graph"]
    assert found["value"] is None
    assert "captures nothing today" in found["where"]


def test_where_only_one_step_can_be_captured_that_graph_is_judged(
    tiny_build: Path, fake_gpu: FakeLayer, images: Path, tmp_path: Path
) -> None:
    fake_gpu.capture_fails = lambda launches: launches > 4
    result = call(tiny_build, images, "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    assert checks(tmp_path / "a.json")["graph"]["value"] == 0
    assert "graph" in fake_gpu.log


def test_too_little_memory_on_the_device_is_said_with_the_way_out(
    tiny_build: Path, fake_gpu: FakeLayer, images: Path
) -> None:
    fake_gpu.capacity = 100_000
    result = call(tiny_build, images)
    assert result.exit_code == 2
    assert "MiB left" in result.stderr
    assert "--mode crop" in result.stderr
    assert fake_gpu.left == 0


def test_images_of_a_size_that_the_build_does_not_take_are_refused_and_all_is_freed(
    tiny_build: Path, fake_gpu: FakeLayer, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def small(layer: FakeLayer, _library: object, directory: Any, _build: object) -> Any:
        return fake_stages(layer, directory, sizes=("32x32",))

    monkeypatch.setattr(tensorrt_stage, "load_engines", small)
    result = call(tiny_build, images)
    assert result.exit_code == 2
    assert "no profile of the unet engine takes" in result.stderr
    assert "iqa-build --sizes" in result.stderr
    assert fake_gpu.closed
    assert fake_gpu.left == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--precision", "fp16"), "a build has a plan of its own"),
        (("--bisect", "plan.json"), "a build has a plan of its own"),
        (("--saved", "kept"), "--backend needs a run"),
    ],
)
def test_options_that_contradict_a_build_are_refused(
    tiny_engine: Path, images: Path, options: tuple[str, ...], says: str
) -> None:
    arguments = ["verify", "--engine", str(tiny_engine), "--backend", "tensorrt", *options]
    result = CliRunner().invoke(cli.main, arguments if "--saved" in options else [*arguments, str(images)])
    assert result.exit_code == 2
    assert says in result.stderr


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
def test_a_stage_on_the_device_answers_as_on_the_host_in_the_types_of_its_engine(
    tiny_engine: Path, fake_gpu: FakeLayer, precision: Precision
) -> None:
    random = np.random.default_rng(4)
    directory = open_engine(tiny_engine)
    engine = fake_stages(fake_gpu, directory, precision=precision)[StageName.UNET]
    entry = directory.manifest.stage(StageName.UNET)
    assert entry
    host, stage = OnnxStage(directory.file(entry.file), OnnxRuntime(threads=1)), DeviceStage(fake_gpu, engine)
    for side in (32, 64, 32):
        arrays = {name: random.standard_normal((1, 3, side, side)).astype(np.float32) for name in ("y", "condition")}
        arrays["noise_level"] = np.full((1, 1), 0.5, np.float32)
        want, have = (np.empty((1, 3, side, side), np.float32) for _ in range(2))
        host.bind(arrays, {"noise": want})()
        stage.bind(arrays, {"noise": have})()
        if precision is Precision.FP32:
            np.testing.assert_array_equal(have, want)
        else:
            np.testing.assert_allclose(have, want, atol=0.01)
            np.testing.assert_array_equal(have, have.astype(np.float16))
        assert fake_gpu.contexts == 1  # the last size alone holds memory
    nine = {name: np.tile(array, (9, 1, 1, 1)[: array.ndim]) for name, array in arrays.items()}
    with pytest.raises(NotForShapesError, match="no profile of the unet engine"):
        stage.bind(nine, {})()
    stage.bind(arrays, {"noise": have})()
    stage.close()
    assert fake_gpu.alive == 0


def test_a_stage_waits_for_its_work_before_it_frees_what_the_work_uses(
    tiny_engine: Path, fake_gpu: FakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call that fails midway leaves work on the stream."""

    def fails(values: Any, address: int) -> None:
        raise BackendError("no copy today")

    directory = open_engine(tiny_engine)
    stage = DeviceStage(fake_gpu, fake_stages(fake_gpu, directory)[StageName.UNET])
    arrays = {name: np.zeros((1, 3, 32, 32), np.float32) for name in ("y", "condition")}
    arrays["noise_level"] = np.full((1, 1), 0.5, np.float32)
    monkeypatch.setattr(fake_gpu, "download", fails)
    with pytest.raises(BackendError, match="no copy today"):
        stage.bind(arrays, {"noise": np.empty((1, 3, 32, 32), np.float32)})()
    stage.close()
    fake_gpu.synchronise()  # what is run only now would find its memory gone
    assert fake_gpu.alive == 0
    assert "unet" in fake_gpu.log


def test_a_graph_that_gives_other_numbers_is_caught(
    tiny_build: Path, fake_gpu: FakeLayer, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeGraph, "launch", lambda graph: None)
    result = call(tiny_build, images, "--json", tmp_path / "a.json")
    assert result.exit_code == 1, result.output
    found = checks(tmp_path / "a.json")
    assert (found["graph"]["value"], found["graph"]["within"]) == (1, False)
    assert found["device"]["within"]  # which is without a graph


def test_kernels_that_compute_something_else_are_caught_in_the_score_of_the_whole(
    tiny_build: Path, fake_gpu: FakeLayer, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = fake_gpu.launch

    def without_the_sampler(one: Launch) -> None:
        if not one.kernel.startswith("sampler_step"):
            launch(one)

    monkeypatch.setattr(fake_gpu, "launch", without_the_sampler)
    result = call(tiny_build, images, "--json", tmp_path / "a.json")
    assert result.exit_code == 1, result.output
    found = checks(tmp_path / "a.json")
    assert [name for name, check in found.items() if not check["within"]] == ["device"]
