"""Which backend runs, and that it is said: a build that fits a GPU, ONNX Runtime, or an error with the way out."""

import contextlib
import json
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from diffiqa import Failure, Mode, Options, Score, Scorer
from diffiqa.cli import main
from diffiqa.engine.manifest import Library, StageName
from diffiqa.errors import BackendError, DiffiqaError, EngineError, ImageError
from diffiqa.export.profiles import stage_profiles
from diffiqa.runtime.backends import Backend, OnnxRuntime, TensorRt, best
from diffiqa.runtime.builds import choose_profile
from diffiqa.runtime.gpu import door, tensorrt, tensorrt_stage
from diffiqa.runtime.gpu.graphs import Form
from diffiqa.runtime.gpu.layer import DeviceMemoryError
from diffiqa.runtime.gpu.tensorrt import gpu_capability, installed_libraries, load_library
from diffiqa.runtime.scorer import load

from ...fake_device import FakeLayer
from ...tiny import photo

RTX = Library.TENSORRT_RTX


def refused(engine: Path, kind: type[DiffiqaError], *says: str, backend: Backend) -> bool:
    with pytest.raises(kind) as caught:
        load(engine, backend)
    return all(word in str(caught.value) for word in says)


# ------------------------------------------------------------------------------------------------------- the choice


def test_auto_takes_a_build_that_fits_and_says_so(tiny_build: Path, fake_gpu: FakeLayer) -> None:
    with load(tiny_build) as scorer:
        assert scorer.info.backend == "tensorrt-rtx 1.7 fp32: fake GPU"
        assert scorer.info.reason == ""
        assert scorer.score(photo(1, 40, 40)).backend == scorer.info.backend
    assert fake_gpu.alive == 0
    assert fake_gpu.closed


def test_the_engines_of_the_build_that_fits_are_loaded(
    tiny_build: Path, fake_gpu: FakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, asked = tensorrt_stage.load_engines, []

    def note(*given: Any) -> Any:
        asked.append(given)
        return engines(*given)

    monkeypatch.setattr(tensorrt_stage, "load_engines", note)
    load(tiny_build, TensorRt()).close()
    [(layer, library, directory, build)] = asked
    assert (layer, library.library, directory.path, build) == (fake_gpu, RTX, tiny_build, directory.manifest.builds[0])


@pytest.mark.parametrize(
    ("replaced", "value", "says"),
    [
        pytest.param("gpu_capability", "12.0", "is for compute capability 8.9, and this GPU has 12.0", id="other GPU"),
        pytest.param("load_library", "1.8", "made by tensorrt-rtx 1.7, and 1.8 is installed", id="other version"),
        pytest.param("gpu_capability", BackendError("no NVIDIA GPU: none"), "no NVIDIA GPU: none", id="no GPU"),
        pytest.param("load_library", BackendError("install it with: pip"), "install it with: pip", id="no library"),
    ],
)
def test_auto_falls_back_to_onnxruntime_and_says_why_and_tensorrt_refuses(
    tiny_build: Path, fake_gpu: FakeLayer, monkeypatch: pytest.MonkeyPatch, replaced: str, value: Any, says: str
) -> None:
    def answer(_asked: object) -> Any:
        if isinstance(value, Exception):
            raise value
        return SimpleNamespace(library=RTX, version=value, capabilities={}) if replaced == "load_library" else value

    monkeypatch.setattr(door, replaced, answer)
    with load(tiny_build) as scorer:
        assert scorer.info.backend.startswith("onnxruntime ")
        assert scorer.info.reason.startswith("not TensorRT: ")
        assert says in scorer.info.reason
    assert refused(tiny_build, DiffiqaError, says, backend=TensorRt())


def test_without_a_build_the_command_that_makes_one_is_given(tiny_engine: Path, fake_gpu: FakeLayer) -> None:
    with pytest.raises(EngineError, match="holds no tensorrt-rtx build") as caught:
        load(tiny_engine, TensorRt())
    command = str(caught.value).partition("make one with: ")[2]
    assert shlex.split(command) == ["iqa-build", "--engine", str(tiny_engine), "--target", "tensorrt-rtx"]


def test_a_changed_engine_is_refused(tiny_build: Path, fake_gpu: FakeLayer) -> None:
    (tiny_build / "tensorrt" / "a" / "unet.engine").write_bytes(b"UNET.engine")
    assert refused(tiny_build, EngineError, "SHA-256", "iqa-build", "--force", backend=TensorRt())
    assert "SHA-256" in load(tiny_build).info.reason


def test_engines_that_do_not_fit_memory_leave_nothing_behind(
    tiny_build: Path, fake_gpu: FakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: object) -> object:
        raise DeviceMemoryError("fake GPU has no 9 MiB left")

    monkeypatch.setattr(tensorrt_stage, "load_engines", short)
    assert refused(tiny_build, BackendError, "not enough GPU memory to load", "9 MiB", backend=TensorRt())
    assert fake_gpu.closed


def test_this_machine_says_what_it_lacks() -> None:
    """Whatever it is here: a driver, a GPU, or cuda.core."""
    if tensorrt.device_capability() is not None:
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match=r"no NVIDIA GPU|no usable NVIDIA GPU|there is no GPU|cuda.core is not"):
        gpu_capability(0)


# ------------------------------------------------------------------------------------- names that only a GPU would call


@pytest.mark.parametrize("name", [Library.TENSORRT, Library.TENSORRT_RTX])
def test_the_installed_library_has_every_name_the_device_calls(name: Library) -> None:
    """Nothing here runs an engine without a GPU, but a renamed method need not wait for one."""
    if name not in installed_libraries():
        pytest.skip(f"{name} is not installed")
    library = load_library(name)
    calls = {
        "Runtime": ["deserialize_cuda_engine"],
        "ICudaEngine": [
            "create_execution_context",
            "get_device_memory_size_for_profile_v2",
            "get_tensor_bytes_per_component",
            "get_tensor_dtype",
            "get_tensor_name",
            "get_tensor_shape",
            "num_io_tensors",
        ],
        "IExecutionContext": [
            "execute_async_v3",
            "infer_shapes",
            "set_device_memory",
            "set_input_shape",
            "set_optimization_profile_async",
            "set_tensor_address",
        ],
        "ExecutionContextAllocationStrategy": ["USER_MANAGED"],
    }
    if library.traits.tells_validity:
        calls["Runtime"].append("get_engine_validity")
        calls["EngineValidity"] = ["INVALID"]
        calls["EngineInvalidityDiagnostics"] = [
            *("CUDA_ERROR", "INSUFFICIENT_GPU_MEMORY", "MALFORMED_ENGINE", "OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME"),
            *("UNSUPPORTED_CC", "VERSION_MISMATCH"),
        ]
    if library.traits.tells_capturable:
        calls["IExecutionContext"].append("is_stream_capturable")
    if library.traits.compiles_late:
        calls["ICudaEngine"].append("create_runtime_config")
        calls["IRuntimeCache"] = ["deserialize", "serialize"]
        calls["IRuntimeConfig"] = [
            "create_runtime_cache",
            "cuda_graph_strategy",
            "dynamic_shapes_kernel_specialization_strategy",
            "set_execution_context_allocation_strategy",
            "set_runtime_cache",
        ]
        calls["CudaGraphStrategy"] = ["DISABLED"]
        calls["DynamicShapesKernelSpecializationStrategy"] = ["EAGER"]
    missing = [f"{kind}.{call}" for kind, names in calls.items() for call in names if not has(library.api, kind, call)]
    assert missing == []


def test_the_installed_cuda_core_has_every_name_the_device_calls() -> None:
    core = pytest.importorskip("cuda.core")
    calls = {
        "Buffer": ["close", "handle"],
        "Device": [
            *("allocate", "arch", "compute_capability", "create_stream", "get_all_devices", "memory_resource", "name"),
            "set_current",
        ],
        "DeviceMemoryResource": ["handle"],
        "EventOptions": [],
        "LegacyPinnedMemoryResource": ["allocate"],
        "ObjectCode": ["from_cubin", "get_kernel"],
        "Stream": ["close", "handle", "record", "sync"],
    }
    missing = [f"{kind}.{call}" for kind, names in calls.items() for call in names if not has(core, kind, call)]
    assert missing == []
    assert core.EventOptions(timing_enabled=True)


def test_the_installed_driver_bindings_take_as_many_arguments_as_the_device_gives() -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    calls = {
        "cuCtxPushCurrent": 1,
        "cuDevicePrimaryCtxRetain": 1,
        "cuGraphDestroy": 1,
        "cuGraphExecDestroy": 1,
        "cuGraphInstantiate": 2,
        "cuGraphLaunch": 2,
        "cuMemPoolTrimTo": 2,
        "cuMemcpyDtoH": 3,
        "cuMemcpyDtoHAsync": 4,
        "cuMemcpyHtoDAsync": 4,
        "cuPointerGetAttribute": 2,
        "cuStreamBeginCapture": 2,
        "cuStreamEndCapture": 1,
        "cuStreamSynchronize": 1,
    }
    taken = {name: getattr(driver, name).__doc__.partition("(")[2].partition(")")[0].split(", ") for name in calls}
    assert {name: len(parameters) for name, parameters in taken.items()} == calls


def has(api: Any, kind: str, call: str) -> bool:
    return hasattr(getattr(api, kind, None), call)


# -------------------------------------------------------------------------------------------------- scorer and command


def test_a_scorer_on_a_device_keeps_every_promise_of_one_on_the_host(
    tiny_build: Path, fake_gpu: FakeLayer, scorer: Scorer
) -> None:
    pictures = [photo(i, 32 + 4 * i, 60) for i in range(5)]
    options = Options(crops=3, seeds=2)
    with load(tiny_build) as ours:
        alone = [ours.score(picture, options) for picture in pictures]
        for workers in (1, 3):
            together = list(ours.stream(pictures[::-1], options, workers=workers))[::-1]
            assert all(isinstance(result, Score) for result in together)
            assert [result.score for result in together if isinstance(result, Score)] == [a.score for a in alone]
        for mine, picture in zip(alone, pictures, strict=True):
            theirs = scorer.score(picture, options)
            assert mine.score == pytest.approx(theirs.score, abs=1e-5)  # as in test_device.py, two branches
            assert (mine.mode, mine.seeds, mine.digest, mine.engine) == (
                theirs.mode,
                theirs.seeds,
                theirs.digest,
                theirs.engine,
            )
        seen = ours.score(pictures[0], options, pictures=True)
        assert seen.pictures is not None
        assert seen.score == alone[0].score


def test_a_score_depends_on_the_batch_asked_for_and_not_on_what_shares_it(
    tiny_build: Path, fake_gpu: FakeLayer
) -> None:
    """Neighbours of one size, of others, unreadable ones, more seeds than fit a batch: the same bits as alone."""
    images: list[Any] = [photo(i, *((32, 32) if i % 5 else (48, 40))) for i in range(9)]
    images.insert(3, b"no image")
    for options in (Options(crops=1), Options(crops=1, seeds=2), Options(crops=3, seeds=5, mode=Mode.CROP)):
        with load(tiny_build, TensorRt(batch=4)) as scorer:
            alone = [scorer.score(image, options, pictures=True) for image in images if not isinstance(image, bytes)]
            found = list(scorer.stream(images, options, pictures=True))
        assert isinstance(found.pop(3), Failure)
        for mine, theirs in zip(found, alone, strict=True):
            assert isinstance(mine, Score)
            assert (mine.score, mine.spread, mine.digest) == (theirs.score, theirs.spread, theirs.digest)
            assert mine.pictures is not None
            assert theirs.pictures is not None
            for kind, plane in theirs.pictures.planes.items():
                np.testing.assert_array_equal(mine.pictures.planes[kind], plane)


def test_neighbours_of_one_size_and_seeds_of_one_image_share_batches(tiny_build: Path, fake_gpu: FakeLayer) -> None:
    pictures, steps = [photo(i, 32, 32) for i in range(8)], 6
    for options, loops in ((Options(crops=1), 2), (Options(crops=1, seeds=2), 4), (Options(crops=1, seeds=6), 16)):
        with load(tiny_build, TensorRt(batch=4, cuda_graph=False)) as scorer:
            fake_gpu.log.clear()
            assert all(isinstance(result, Score) for result in scorer.stream(pictures, options))
            assert fake_gpu.log.count("unet") == loops * steps
            assert scorer.info.backend.endswith("fake GPU, 4 at a time")


def test_the_build_that_a_smaller_batch_asks_for_takes_the_whole_one(tiny_build: Path, fake_gpu: FakeLayer) -> None:
    with load(tiny_build, best(batch=8)) as scorer:
        (result,) = scorer.score([photo(1, 48, 64)], Options(crops=1))
        manifest = scorer.manifest
    (note,) = result.notes
    command = shlex.split(note.partition("build again with: ")[2])
    given = dict(zip(command[1::2], command[2::2], strict=False))
    unet = manifest.stage(StageName.UNET)
    assert unet
    profiles = stage_profiles(manifest, unet, given["--batch"].split(","), given["--sizes"].split(","))
    shape = (8, 3, 48, 64)
    assert choose_profile(profiles, {"y": shape, "condition": shape, "noise_level": (8, 1)}) is not None
    assert len(set(given["--sizes"].split(","))) == len(given["--sizes"].split(","))


def test_seconds_are_those_of_an_image_and_not_of_the_one_before_it(tiny_build: Path, fake_gpu: FakeLayer) -> None:
    """A device does one thing at a time, so that what it spent on all of them is no more than there was."""
    with load(tiny_build) as scorer:
        for workers in (1, 3):
            start = time.perf_counter()
            results = list(scorer.stream([photo(i, 48, 64) for i in range(6)], Options(crops=1), workers=workers))
            wall = time.perf_counter() - start
            assert 0 < sum(result.seconds for result in results if isinstance(result, Score)) <= wall


def test_batches_hold_no_more_images_than_fill_one_and_those_ahead(tiny_build: Path, fake_gpu: FakeLayer) -> None:
    taken = 0

    def source() -> Iterator[Any]:
        nonlocal taken
        for i in range(60):
            taken += 1
            yield photo(i, 32, 32 + i)  # no two of one size

    with load(tiny_build, TensorRt(batch=4)) as scorer, contextlib.closing(scorer.stream(source(), ahead=3)) as results:
        next(results)
        # Three are scored or wait for that, beside three ahead and the rest of a batch.
        assert taken <= 3 + 3 + 3


def test_one_image_too_many_for_the_memory_costs_its_batch_nothing(tiny_build: Path, fake_gpu: FakeLayer) -> None:
    pictures = [photo(i, 32, 32) for i in range(4)]
    with load(tiny_build, TensorRt(batch=4)) as scorer:
        scorer.score(pictures[0], Options(crops=1))
        fake_gpu.capacity = fake_gpu.held  # nothing more than one image needs
        results = list(scorer.stream(pictures, Options(crops=1)))
    assert all(isinstance(result, Score) for result in results), results


def test_a_batch_where_no_gpu_runs_is_refused(tiny_engine: Path) -> None:
    if tensorrt.device_capability() is not None:
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match=r"a batch of 2 needs a GPU, and none here can run .* \(not TensorRT: "):
        load(tiny_engine, best(batch=2))


def test_the_first_of_several_that_can_be_opened_runs(tiny_engine: Path, fake_gpu: FakeLayer) -> None:
    with load(tiny_engine, [TensorRt(), OnnxRuntime(threads=1)]) as scorer:
        assert scorer.info.backend.startswith("onnxruntime ")
        assert "holds no tensorrt-rtx build" in scorer.info.reason
    with pytest.raises(BackendError, match=r"nothing here can run .*holds no tensorrt-rtx build.*no Magic"):
        load(tiny_engine, [TensorRt(), OnnxRuntime(providers=["Magic"])])


def test_no_cuda_graph_gives_the_same_scores_and_makes_none(tiny_build: Path, fake_gpu: FakeLayer) -> None:
    pictures, options = [photo(i, 48, 48) for i in range(4)], Options(crops=1)
    with load(tiny_build) as with_graphs:
        expected = [with_graphs.score(picture, options).score for picture in pictures]
    assert len(fake_gpu.graphs) == 2
    fake_gpu.graphs.clear()
    with load(tiny_build, best(cuda_graph=False)) as without:
        assert without._executor.graphs.form is Form.NONE  # type: ignore[union-attr]
        assert [without.score(picture, options).score for picture in pictures] == expected
    assert fake_gpu.graphs == []


def test_a_graph_that_could_not_be_captured_is_in_the_notes(tiny_build: Path, fake_gpu: FakeLayer) -> None:
    fake_gpu.capture_fails = lambda launches: True
    with load(tiny_build) as scorer:
        results = [scorer.score(photo(i, 48, 48), Options(crops=1)) for i in range(3)]
    assert [len(result.notes) for result in results] == [0, 1, 1]
    assert "ran without a CUDA graph" in results[1].notes[0]


def test_memory_that_runs_out_costs_one_image_only(tiny_build: Path, fake_gpu: FakeLayer) -> None:
    with load(tiny_build) as scorer:
        scorer.score(photo(0, 32, 32), Options(crops=1))
        fake_gpu.capacity = fake_gpu.held + 1000
        results = list(scorer.stream([photo(1, 128, 128), photo(2, 32, 32)], Options(crops=1)))
        assert isinstance(results[0], Failure)
        assert "not enough memory for 128×128 pixels in whole mode" in results[0].error
        assert "fake GPU has no" in results[0].error
        assert isinstance(results[1], Score)


def test_a_gpu_that_is_lost_keeps_the_results_before_it(tiny_build: Path, fake_gpu: FakeLayer, tmp_path: Path) -> None:
    """A driver that has met an illegal address answers every call of the process with it."""
    for i in range(4):
        Image.fromarray(photo(i, 48, 48)).save(tmp_path / f"{i}.png")

    def lose(_launches: int) -> None:
        if fake_gpu.log.count("normalise_pad_f32") == 3:
            fake_gpu.driver.lose_context()

    fake_gpu.watch = lose
    out = tmp_path / "scores.jsonl"
    assert call(tiny_build, tmp_path, "--crops", "1", "-o", out).exit_code == 1
    records = [json.loads(line) for line in out.read_text().splitlines()]
    errors = [record["error"] for record in records if record["status"] == "error"]
    assert [len(records), len(errors)] == [4, 2]  # the third to begin is not always the third image
    assert all("ILLEGAL_ADDRESS" in error for error in errors)


def test_an_image_no_profile_takes_names_the_rebuild(tiny_build: Path, fake_gpu: FakeLayer) -> None:
    with load(tiny_build) as scorer:
        with pytest.raises(ImageError, match=r"use tile or crop mode.*--sizes 32x32,32x32:64x64:128x128,160x40"):
            scorer.score(photo(1, 160, 40))
        assert scorer.score(photo(1, 160, 40), Options(mode=Mode.CROP)).score > 0


def test_a_stream_that_is_given_up_leaves_a_device_that_can_be_freed(tiny_build: Path, fake_gpu: FakeLayer) -> None:
    with load(tiny_build) as scorer:
        results = scorer.stream([photo(i, 64, 64) for i in range(6)], workers=2)
        next(results)
        results.close()
    assert fake_gpu.alive == 0


def call(engine: Path, *arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, ["run", "--engine", str(engine), *map(str, arguments)])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(photo(1, 40, 50)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_the_command_says_what_runs_and_why(
    tiny_build: Path, tiny_engine: Path, fake_gpu: FakeLayer, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    several = call(tiny_build, image, "--batch", "2", "--format", "jsonl")
    assert several.exit_code == 0, several.output
    assert json.loads(several.stdout)["backend"] == "tensorrt-rtx 1.7 fp32: fake GPU, 2 at a time"
    on_gpu = call(tiny_build, image, "--backend", "tensorrt", "--device", "0", "--format", "jsonl")
    assert on_gpu.exit_code == 0, on_gpu.output
    assert "backend: tensorrt-rtx 1.7 fp32: fake GPU\n" in on_gpu.stderr
    assert json.loads(on_gpu.stdout)["backend"] == "tensorrt-rtx 1.7 fp32: fake GPU"
    auto = call(tiny_engine, image, "--format", "jsonl")
    assert auto.exit_code == 0, auto.output
    assert "backend: onnxruntime " in auto.stderr
    assert "(not TensorRT: " in auto.stderr
    assert "backend" not in call(tiny_engine, image, "--format", "jsonl", "-q").stderr


def test_the_command_never_falls_back_from_what_was_asked_for(
    tiny_engine: Path, fake_gpu: FakeLayer, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = call(tiny_engine, image, "--backend", "tensorrt")
    assert missing.exit_code == 2
    assert "error:" in missing.stderr
    assert "iqa-build --engine" in missing.stderr
    assert missing.stdout == ""
    for options in (["--backend", "tensorrt", "--threads", "1"], ["--backend", "onnxruntime", "--no-cuda-graph"]):
        refused = call(tiny_engine, image, *options)
        assert refused.exit_code == 2
        assert "Traceback" not in refused.stderr
