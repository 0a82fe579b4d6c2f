"""What only a GPU can show of `iqa-bench`. Never run where it was written (no GPU there).

`pytest -m gpu tests/bench/test_on_gpu.py`, after tests/runtime/gpu/test_on_gpu.py. Read failures from the top: events,
NVML, the ceilings, a whole run.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffiqa.bench.ceilings import probe_gpu
from diffiqa.bench.gpu import GpuWatch
from diffiqa.bench.results import Results, read
from diffiqa.cli import main
from diffiqa.engine.manifest import EngineDirectory
from diffiqa.errors import BackendError
from diffiqa.runtime.gpu.cuda import CudaLayer
from diffiqa.runtime.gpu.onnx_stage import prepare
from diffiqa.runtime.gpu.tensorrt import gpu_capability

from ..runtime.gpu.test_on_gpu import capability, directory, library  # noqa: F401 — fixtures

pytestmark = pytest.mark.gpu


@pytest.fixture
def layer() -> Iterator[CudaLayer]:
    try:
        made = CudaLayer(0)
    except BackendError as reason:
        pytest.skip(str(reason))
    made.enter()
    yield made
    made.close()


def test_events_time_copies_in_order_and_in_seconds(layer: CudaLayer) -> None:
    address, values = layer.allocate(2**26), layer.allocate_pinned(2**26)
    layer.upload(address, values)
    first = layer.mark()
    layer.upload(address, values)
    middle = layer.mark()
    for _ in range(9):
        layer.upload(address, values)
    last = layer.mark()
    layer.synchronise()
    one, nine = layer.seconds_between(first, middle), layer.seconds_between(middle, last)
    assert 2**26 / 1e12 < one < 1  # between a terabyte and 64 MiB a second
    assert 3 < nine / one < 27


def test_nvml_describes_the_gpu_that_cuda_counts_first(layer: CudaLayer) -> None:
    watch = GpuWatch(0)
    watch.opened()
    before = watch.joules()
    with watch:
        for _ in range(200):
            layer.upload(layer.allocate(2**20), layer.allocate_pinned(2**20))
        watch.glance()
        layer.synchronise()
    found = watch.found(layer.name)
    print(found, watch.refused)  # noqa: T201 — what a driver refuses is worth knowing
    assert found.compute_capability == gpu_capability(0)
    assert found.driver
    assert found.memory_mib
    assert all(0 < celsius < 120 for celsius in found.load.celsius)
    assert all(0 <= share < 1 for share in (found.load.held_back or {}).values())
    after = watch.joules()
    if before is not None and after is not None:
        assert 0 <= after - before < 1e5


def test_the_copy_is_probed_and_the_product_too_where_torch_has_cuda(layer: CudaLayer) -> None:
    torch = pytest.importorskip("torch")
    probe = probe_gpu(0)
    probe.sample()
    probe.close()
    found = probe.found("float16")
    assert 10 < found.copy_gbs[0] < 20_000, probe.refused
    if torch.cuda.is_available():
        assert 1e3 < found.matmul_gflops[0] < 1e7, probe.refused


def measured(engine: Path, folder: Path, *options: str) -> Results:
    file = folder / "bench.json"
    sizes = ["--size", "32x32,64x64", "--crops", "1,2", "--rounds", "5", "--starts", "1", "--json", str(file)]
    result = CliRunner().invoke(main, ["bench", "--engine", str(engine), *sizes, *options])
    assert result.exit_code in {0, 1}, result.output
    print(result.stdout)  # noqa: T201 — for who reads the log
    return read(file)


def test_a_run_with_engines_is_whole(directory: EngineDirectory, tmp_path: Path) -> None:  # noqa: F811
    results = measured(directory.path, tmp_path, "--backend", "tensorrt", "--batch", "1,4")
    assert len(results.starts) == 1
    assert results.starts[0].second_score
    for case in results.measured:
        assert case.device
        assert case.device.notes == () or case.batch > 1
        assert case.device.late_allocations == 0
        assert case.device.graphs == 2
        # Steps lie in the U-Net's time, that in the score's.
        assert sum(map(min, case.step_seconds)) <= 1.01 * max(case.stages["unet"]) * case.batch
        assert all(busy <= 1.01 * wall for busy, wall in zip(case.device.busy, case.device.wall, strict=True))


def test_a_run_with_onnxruntime_is_whole(tiny_engine: Path, tmp_path: Path) -> None:
    try:
        gpu_capability(0)
        prepare(None)
    except BackendError as reason:
        pytest.skip(str(reason))
    results = measured(tiny_engine, tmp_path, "--backend", "onnxruntime-gpu")
    assert all(case.device and not case.device.plain for case in results.measured)
