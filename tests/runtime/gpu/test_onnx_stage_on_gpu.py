"""What only a GPU can show of ONNX Runtime in the device's loop. Never run where it was written (no GPU there).

`pytest -m gpu tests/runtime/gpu/test_onnx_stage_on_gpu.py`, after test_on_gpu.py, whose test_layer_… speak for
cuda.core; it needs onnxruntime-gpu. Read failures from the top: a stage by itself, the loop, what a run leaves behind.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from diffiqa.engine.manifest import EngineDirectory, StageName, open_engine
from diffiqa.engine.pixels import to_plane
from diffiqa.errors import BackendError
from diffiqa.runtime.backends import OnnxOnGpu
from diffiqa.runtime.gpu.cuda import CudaLayer
from diffiqa.runtime.gpu.executor import DeviceExecutor
from diffiqa.runtime.gpu.graphs import Form
from diffiqa.runtime.gpu.onnx_stage import gpu_settings, on_device, prepare
from diffiqa.runtime.host.executor import HostExecutor
from diffiqa.runtime.host.onnx_stage import OnnxRuntime, OnnxStage
from diffiqa.runtime.host.stages import load_stages
from diffiqa.runtime.plan import make_plan
from diffiqa.runtime.results import Mode, Options
from diffiqa.runtime.scorer import load

from ...tiny import STAGES, photo
from .test_executor import scores
from .test_on_gpu import PIXELS, SCORES, STAGE

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def directory(tiny_engine: Path) -> EngineDirectory:
    return open_engine(tiny_engine)


@pytest.fixture
def layer() -> Iterator[CudaLayer]:
    try:
        prepare(None)
        made = CudaLayer(0)
    except BackendError as reason:
        pytest.skip(str(reason))
    made.enter()
    yield made
    made.close()


@pytest.fixture
def executor(directory: EngineDirectory, layer: CudaLayer) -> Iterator[DeviceExecutor]:
    sessions = load_stages(directory, gpu_settings(None, 0, layer.stream))
    stages = on_device(layer.name, 0, directory.manifest, sessions)
    made = DeviceExecutor(directory.manifest, layer, stages, form=Form.NONE)
    yield made
    made.close()


@pytest.fixture(scope="module")
def host(directory: EngineDirectory) -> HostExecutor:
    return HostExecutor(directory.manifest, load_stages(directory, OnnxRuntime(threads=2)))


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("batch", [1, 3])
def test_stage_gives_what_the_cpu_gives(
    directory: EngineDirectory, layer: CudaLayer, name: StageName, batch: int
) -> None:
    """Through `bind`, on our memory and stream."""
    sessions = load_stages(directory, gpu_settings(None, 0, layer.stream))
    stage = on_device(layer.name, 0, directory.manifest, sessions)[name]
    onnx = directory.manifest.stage(name)
    assert onnx is not None
    kinds, size = len(directory.manifest.kinds), directory.manifest.crop.size
    dims = {"B": batch, "N": batch * kinds, "H": size, "W": size}
    rng = np.random.default_rng(batch)
    shapes = {
        s.name: tuple(dims[n] if isinstance(n, str) else n for n in s.shape) for s in (*onnx.inputs, *onnx.outputs)
    }
    arrays = {s.name: rng.uniform(0, 1, shapes[s.name]).astype(np.float32) for s in onnx.inputs}
    expected = {s.name: np.zeros(shapes[s.name], np.float32) for s in onnx.outputs}
    OnnxStage(directory.file(onnx.file), OnnxRuntime(threads=2)).bind(arrays, expected)()
    addresses = {spec: layer.allocate(4 * int(np.prod(shape))) for spec, shape in shapes.items()}
    for spec, values in arrays.items():
        layer.upload(addresses[spec], values)
    bound = stage.bind(0, {s.name: shapes[s.name] for s in onnx.inputs}, addresses)
    bound.enqueue()
    for spec, values in expected.items():
        found = np.full_like(values, np.nan)
        layer.download(found, addresses[spec])
        layer.synchronise()
        scale = max(1.0, float(np.abs(values).max()))
        np.testing.assert_allclose(found, values, atol=STAGE * scale, err_msg=spec)
    bound.close()
    stage.close()


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(("height", "width", "seed"), [(32, 32, 0), (45, 70, 1), (67, 141, 2**40 + 3)])
def test_loop_is_the_hosts_and_repeats_itself_bit_for_bit(
    executor: DeviceExecutor, host: HostExecutor, mode: Mode, height: int, width: int, seed: int
) -> None:
    pixels = photo(seed % 97, height, width)
    plan = make_plan(height, width, executor._manifest, Options(mode=mode, crops=9))
    found, expected = executor.run(pixels, plan, seed), host.run(to_plane(pixels), plan, seed)
    np.testing.assert_array_equal(found.crops[:, 0], expected.crops[:, 0], err_msg="the image as given")
    np.testing.assert_allclose(found.crops, expected.crops, atol=PIXELS, err_msg="restored images")
    np.testing.assert_allclose(scores(found), scores(expected), atol=SCORES, err_msg="scores")
    again = executor.run(pixels, plan, seed)
    assert again.crops.tobytes() == found.crops.tobytes()
    assert scores(again) == scores(found)


def test_memory_stays_flat(executor: DeviceExecutor) -> None:
    from cuda.bindings import driver

    pictures = [photo(i, *size) for i, size in enumerate([(32, 32), (64, 90), (120, 110)])]
    for number in range(300):
        if number == 30:
            free = int(driver.cuMemGetInfo()[1])
        picture = pictures[number % 3]
        executor.run(
            picture, make_plan(picture.shape[0], picture.shape[1], executor._manifest, Options(crops=4)), number
        )
    assert free - int(driver.cuMemGetInfo()[1]) < 8 * 2**20


def test_the_backend_by_name_scores_as_the_cpu_does(directory: EngineDirectory, layer: CudaLayer) -> None:
    with load(directory.path, OnnxOnGpu()) as gpu, load(directory.path, OnnxRuntime()) as cpu:
        assert " on " in gpu.info.backend
        found, expected = gpu.score(photo(0, 64, 64)), cpu.score(photo(0, 64, 64))
    assert found.score == pytest.approx(expected.score, abs=SCORES)
