"""Two places to run a launch: the kernels compiled by a C++ compiler on this machine, and a GPU.

A test that takes the `device` fixture says the same of both. Every array lies between guard bands of 0xFF bytes, NaN
for floats: a stray write is found by `get`, a stray read shows in the result.
"""

import ctypes
import shutil
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffiqa.kernels import compile as kernels_compile
from diffiqa.kernels.compile import SOURCES, Unit, cubin
from diffiqa.kernels.launch import Launch
from diffiqa.kernels.load import device_arch, with_cuda_core

Array = npt.NDArray[Any]

HOST_LIBRARY = "kernels.so"
_BAND = 256
_FOLDER = Path(__file__).parent


class Missing(Exception):  # noqa: N818 — a reason to skip, not an error
    """This machine lacks what the device needs."""


class Device(ABC):
    """Memory with guard bands, and launches on it."""

    def __init__(self) -> None:
        self._arrays: dict[int, tuple[int, np.dtype[Any], tuple[int, ...]]] = {}

    def put(self, values: Array, offset: int = 0) -> int:
        """Copy an array to the device and return its address, `offset` bytes past a multiple of 256."""
        band = b"\xff" * _BAND
        base = self._upload(band + b"\xff" * offset + values.tobytes() + band)
        self._arrays[base + _BAND + offset] = base, values.dtype, values.shape
        return base + _BAND + offset

    def like(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> int:
        """Return the address of a new array of 0xFF bytes."""
        return self.put(np.frombuffer(b"\xff" * (int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape))

    def get(self, address: int) -> Array:
        """Return a copy of the array at `address`, after a look at its guard bands."""
        base, dtype, shape = self._arrays[address]
        size, start = int(np.prod(shape)) * dtype.itemsize, address - base
        data = self._download(base, start + size + _BAND)
        assert set(data[:start]) == {255}, "something wrote before the array"
        assert set(data[start + size :]) == {255}, "something wrote past the array"
        return np.frombuffer(data[start : start + size], dtype).reshape(shape).copy()

    @abstractmethod
    def set(self, address: int, values: Array) -> None:
        """Overwrite an array with another of the same bytes."""

    @abstractmethod
    def run(self, launch: Launch) -> None:
        """Launch and wait."""

    @abstractmethod
    def _upload(self, data: bytes) -> int: ...

    @abstractmethod
    def _download(self, address: int, size: int) -> bytes: ...


class Host(Device):
    """The same kernels, compiled into a shared library by a C++ compiler."""

    def __init__(self, library: ctypes.CDLL) -> None:
        super().__init__()
        self._library = library
        self._memory: list[Array] = []

    def set(self, address: int, values: Array) -> None:
        ctypes.memmove(address, values.tobytes(), values.nbytes)

    def run(self, launch: Launch) -> None:
        arguments = launch.arguments
        boxes = [np.array(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(boxes))(*(box.ctypes.data for box in boxes))
        sizes = (ctypes.c_uint * len(boxes))(*(box.nbytes for box in boxes))
        kernel = self._library[f"host_{launch.kernel}"]
        kernel.restype = ctypes.c_bool
        fits = kernel(*launch.grid, launch.block, len(boxes), pointers, sizes)
        assert fits, f"the arguments are not {launch.kernel}'s parameters: {arguments}"

    def struct_sizes(self) -> list[int]:
        """Return the sizes of Window, Step, Progress, Source and Crop."""
        return list((ctypes.c_uint * 5).in_dll(self._library, "host_struct_sizes"))

    def _upload(self, data: bytes) -> int:
        memory = np.empty(len(data) + 256, np.uint8)
        self._memory.append(memory)
        address = -(-memory.ctypes.data // 256) * 256
        ctypes.memmove(address, data, len(data))
        return int(address)

    def _download(self, address: int, size: int) -> bytes:
        return ctypes.string_at(address, size)


class Gpu(Device):
    """The first GPU, through cuda.core. Not run where it was written: no GPU there."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from cuda.bindings import driver
            from cuda.core import Device as CudaDevice
        except ImportError as exc:
            raise Missing(f"cuda.core is not installed: {exc}") from exc
        try:
            count = driver.cuInit(0)[0] == 0 and driver.cuDeviceGetCount()[1]
        except Exception as exc:  # cuda-bindings looks for libcuda at the first call, and has its own errors
            raise Missing(f"no CUDA driver: {exc}") from exc
        if not count:
            raise Missing("no GPU")
        self.cuda = CudaDevice(0)
        self.cuda.set_current()
        self.stream = self.cuda.create_stream()
        self._driver = driver
        self._buffers: list[Any] = []
        arch = device_arch()
        self.cubins = {source: cubin(source, arch) for source in SOURCES}
        self.cubins["probes.cu"] = kernels_compile.compile_nvrtc(probes(arch))
        self.enqueue = with_cuda_core(self.cubins)

    def set(self, address: int, values: Array) -> None:
        values = np.ascontiguousarray(values)
        self._ok(self._driver.cuMemcpyHtoDAsync(address, values.ctypes.data, values.nbytes, self.stream.handle))
        self.stream.sync()

    def run(self, launch: Launch) -> None:
        self.enqueue(launch, self.stream)
        self.stream.sync()

    def forget(self) -> None:
        """Give back the memory of all arrays."""
        self._arrays.clear()
        while self._buffers:
            self._buffers.pop().close()

    def _upload(self, data: bytes) -> int:
        buffer = self.cuda.allocate(len(data), stream=self.stream)
        self._buffers.append(buffer)
        address = int(buffer.handle)
        self.set(address, np.frombuffer(data, np.uint8))
        return address

    def _download(self, address: int, size: int) -> bytes:
        data = np.empty(size, np.uint8)
        self._ok(self._driver.cuMemcpyDtoHAsync(data.ctypes.data, address, size, self.stream.handle))
        self.stream.sync()
        return data.tobytes()

    @staticmethod
    def _ok(answer: tuple[Any, ...]) -> None:
        assert int(answer[0]) == 0, answer[0]


def probes(arch: str) -> Unit:
    """Return the compilation of the probe kernels, with the headers and options of the real ones."""
    return Unit("probes.cu", (_FOLDER / "probes.cu").read_text(), arch)


def build_host(folder: Path) -> None:
    """Compile the kernels for the host, to HOST_LIBRARY in a folder; raises Missing where no compiler can."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise Missing("g++ is not installed")
    macros = subprocess.run([compiler, "-dM", "-E", "-x", "c++", "/dev/null"], check=True, capture_output=True).stdout
    if b"__FLT16_MAX__" not in macros:
        raise Missing("this g++ has no _Float16")
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-shared", "-fPIC"]
    # A GPU faults on an unaligned vector load where this machine would shrug: trap, and pytest shows the test.
    flags += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    include = Path(kernels_compile.__file__).parent
    subprocess.run(
        [compiler, *flags, f"-I{include}", str(_FOLDER / "host.cpp"), "-o", str(folder / HOST_LIBRARY)], check=True
    )
