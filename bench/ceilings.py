"""What this machine can do at most, measured in the same run: a matrix product, and a copy of memory.

`Probe` asks the CPUs, `DeviceProbe` a GPU. `refused` says which of the two a machine could not measure, and why.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from ..errors import BackendError, first_line
from ..runtime.host.onnx_stage import OnnxRuntime, make_session

Clock = Callable[[], float]

SIDE = 1536  # of the matrices: large enough for the full rate, small enough for 20 products a second on two cores
COPY_BYTES = 2**27  # in each direction: more than any last-level cache holds of it
DEVICE_SIDE = 8192  # large enough for the full rate of the largest GPU
DEVICE_COPY_BYTES = 2**29
DEVICE_CALLS = 5  # in a row: together far longer than it takes to launch one


@dataclass
class Ceilings:
    """Rates of single products and copies, in the order measured: GFLOP/s, GB/s read and written."""

    matmul_gflops: list[float] = field(default_factory=list)
    copy_gbs: list[float] = field(default_factory=list)


class Probe:
    """Measures the ceilings a little at a time, between what they are compared with, so that both see one machine."""

    def __init__(self, threads: int, *, side: int = SIDE, copy_bytes: int = COPY_BYTES) -> None:
        self.found = Ceilings()
        self._threads, self._side = threads, side
        generator = np.random.default_rng(0)
        self._a, self._b = generator.standard_normal((2, side, side), np.float32)
        self._product = np.empty((side, side), np.float32)
        self._source, self._target = np.ones((2, copy_bytes // 4), np.float32)
        self.refused: dict[str, str] = {}
        self._multiply = _made(self.refused, "matrix product of the CPU", self._bind)

    def sample(self, clock: Clock = time.perf_counter) -> None:
        """Measure either once more."""
        if self._multiply:
            start = clock()
            self._multiply()
            self.found.matmul_gflops.append(2 * self._side**3 / max(clock() - start, 1e-9) / 1e9)
        pieces = list(zip(*(np.array_split(a, self._threads) for a in (self._target, self._source)), strict=True))
        with ThreadPoolExecutor(self._threads) as pool:  # NumPy lets go of the interpreter's lock while it copies
            start = clock()
            list(pool.map(lambda piece: np.copyto(*piece), pieces))
            seconds = clock() - start
        self.found.copy_gbs.append(2 * self._source.nbytes / max(seconds, 1e-9) / 1e9)

    def _bind(self) -> Callable[[], None]:
        settings = OnnxRuntime(threads=self._threads, spinning=True)
        session = make_session(matmul_model(self._side), settings, "a matrix product")
        binding = session.io_binding()
        for name, array in (("a", self._a), ("b", self._b)):
            binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
        out = self._product
        binding.bind_output("c", "cpu", 0, np.float32, out.shape, out.ctypes.data)
        return lambda: session.run_with_iobinding(binding)


class DeviceProbe:
    """Measures the ceilings of a GPU, between what they are compared with.

    The product is torch's, of fp16 with float32 sums whatever the engine computes in: that is the peak that data sheets
    state and shares are quoted of. The copy needs no more than cuda.core has.
    """

    def __init__(self, ordinal: int) -> None:
        self.found = Ceilings()
        self.refused: dict[str, str] = {}
        product, copy = "matrix product of the GPU", "copy within the GPU's memory"
        self._product = _made(self.refused, product, lambda: torch_product(f"cuda:{ordinal}", DEVICE_SIDE))
        self._copy = _made(self.refused, copy, lambda: device_copy(ordinal, DEVICE_COPY_BYTES))

    def sample(self, clock: Clock = time.perf_counter) -> None:
        """Measure either once more."""
        for run, amount, rates in (
            (self._product, 2 * DEVICE_SIDE**3, self.found.matmul_gflops),
            (self._copy, 2 * DEVICE_COPY_BYTES, self.found.copy_gbs),
        ):
            if run:
                start = clock()
                run()
                rates.append(DEVICE_CALLS * amount / max(clock() - start, 1e-9) / 1e9)

    def close(self) -> None:
        """Free the memory."""
        self._product = self._copy = None


def torch_product(device: str, side: int) -> Callable[[], None]:
    """Return what multiplies two square matrices of fp16 several times and waits for it. Raises where it cannot."""
    try:
        import torch
    except ModuleNotFoundError as exc:
        raise BackendError("torch is not installed") from exc
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise BackendError(f"torch {torch.__version__} is installed, but has no CUDA or no GPU")
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator, device=device, dtype=torch.float16) for _ in "ab")
    out = torch.empty_like(a)

    def run() -> None:
        for _ in range(DEVICE_CALLS):
            torch.matmul(a, b, out=out)
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)

    return run


def device_copy(ordinal: int, size: int) -> Callable[[], None]:
    """Return what copies memory of a GPU several times and waits for it. Not run on a GPU yet."""
    from cuda.core import Device

    device = Device(ordinal)
    device.set_current()
    stream = device.create_stream()
    source, target = (device.allocate(size, stream=stream) for _ in "ab")
    source.fill(0, stream=stream)

    def run() -> None:
        for _ in range(DEVICE_CALLS):
            source.copy_to(target, stream=stream)
        stream.sync()

    return run


def matmul_model(side: int) -> bytes:
    """Return the ONNX file of `c = a @ b` for square matrices. Raises ModuleNotFoundError without the package onnx."""
    from onnx import TensorProto, helper

    a, b, c = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [side, side]) for name in "abc")
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "matmul", [a, b], [c])
    opset = [helper.make_opsetid("", 17)]
    return bytes(helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString())


def _made(refused: dict[str, str], what: str, make: Callable[[], Callable[[], None]]) -> Callable[[], None] | None:
    """Return what measures a ceiling, ready; or note in `refused` why this machine cannot."""
    try:
        run = make()
        run()  # the first call allocates, and chooses a kernel
    except Exception as exc:  # errors of torch, cuda.core and onnxruntime: a ceiling less, no more
        refused[what] = first_line(exc)
        return None
    return run
