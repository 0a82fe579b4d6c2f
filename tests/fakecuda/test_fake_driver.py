"""The real CudaLayer and cuda.core on a driver without a GPU: driver.h says what that shows and what it cannot."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffiqa.kernels.compile import KernelError, nvrtc_version

HERE = Path(__file__).parent
GPU_TESTS = HERE.parent / "runtime" / "gpu" / "test_on_gpu.py"
# All of the layer, and of the executor what moves memory, runs out of it, captures and blends.
CHOSEN = "test_layer or (host and (test_graph_of_one_shape or test_memory_that_runs_out or test_modes))"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with libcuda.so.1."""
    try:
        nvrtc_version()
    except KernelError as reason:
        pytest.skip(str(reason))
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    folder = tmp_path_factory.mktemp("driver")
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    sources = sorted(map(str, HERE.glob("*.cpp")))
    subprocess.run([compiler, *flags, *sources, "-o", str(folder / "libcuda.so.1"), "-ldl"], check=True)
    return folder


def on_fake_driver(driver: Path, kernels: ctypes.CDLL, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where that driver is the machine's: a process has one, from the first call on."""
    libraries = os.pathsep.join(filter(None, (str(driver), os.environ.get("LD_LIBRARY_PATH"))))
    environment = {"LD_LIBRARY_PATH": libraries, "FAKE_CUDA_KERNELS": kernels._name, "DIFFIQA_CACHE": str(driver)}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parents[1],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_layer_and_executor_pass_the_tests_for_a_gpu(driver: Path, library: ctypes.CDLL) -> None:
    options = ["-q", "-s", "-m", "gpu", "-k", CHOSEN, "-p", "no:cacheprovider"]
    done = on_fake_driver(driver, library, "-m", "pytest", str(GPU_TESTS), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[fake driver]" not in done.stdout + done.stderr
    assert "skipped" not in done.stdout, "the driver was not found"


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("pass", 0),
        ("layer.free(address)", -signal.SIGSEGV),
        ("layer.begin_capture()", 1),
    ],
    ids=["none", "a kernel reads memory that was freed", "a capture loads code"],
)
def test_a_fault_that_may_pass_unnoticed_on_a_gpu_does_not(
    driver: Path, library: ctypes.CDLL, fault: str, status: int
) -> None:
    program = f"""
from diffiqa.kernels.launch import Storage, normalise_pad
from diffiqa.runtime.gpu.cuda import CudaLayer
layer = CudaLayer(0)
layer.enter()
address = layer.allocate(3 * 32 * 32)
launch = normalise_pad(address, (32, 32), 96, layer.allocate(4 * 3 * 32 * 32), (32, 32), Storage.F32)
{fault}
layer.launch(launch)
layer.synchronise()
layer.close()
"""
    done = on_fake_driver(driver, library, "-c", program)
    assert done.returncode == status, done.stderr
    assert ("[fake driver]" in done.stderr) is (status == 1)
