"""What this machine can do at most, measured in the same run: a matrix product, and a copy of memory."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ..errors import BackendError, first_line
from ..runtime.host.onnx_stage import OnnxRuntime, make_session
from .results import Ceilings
from .timing import Clock

SIDE = 1536  # of the matrices: large enough for the full rate, small enough for 20 products a second on two cores
COPY_BYTES = 2**27  # in each direction: more than any last-level cache holds of it
DEVICE_SIDE = 8192  # large enough for the full rate of the largest GPU
DEVICE_COPY_BYTES = 2**29
DEVICE_CALLS = 5  # in a row: together far longer than it takes to launch one

Floats = NDArray[np.float32]
Work = Callable[[], object]  # returns when it is done


class Probe:
    """Measures both ceilings a little at a time, between the cases, so that both see the same machine.

    `refused` says which of the two this machine could not measure, and why.
    """

    def __init__(self, where: str, product: Callable[[], Work], flop: int, copy: Callable[[], Work], size: int) -> None:
        self.refused: dict[str, str] = {}
        self._flop, self._bytes = flop, size
        self._product = self._ready(f"matrix product of the {where}", product)
        self._copy = self._ready(f"copy within the {where}'s memory", copy)
        self._gflops: list[float] = []
        self._gbs: list[float] = []

    def sample(self, clock: Clock = time.perf_counter) -> None:
        """Measure each of them once more."""
        for work, amount, rates in (
            (self._product, self._flop, self._gflops),
            (self._copy, self._bytes, self._gbs),
        ):
            if work:
                start = clock()
                work()
                rates.append(amount / max(clock() - start, 1e-9) / 1e9)

    def found(self, dtype: str) -> Ceilings:
        """Return the rates in the order measured; `dtype` is that of the product."""
        return Ceilings(tuple(self._gflops), tuple(self._gbs), dtype)

    def close(self) -> None:
        """Free the memory."""
        self._product = self._copy = None

    def _ready(self, what: str, make: Callable[[], Work]) -> Work | None:
        try:
            work = make()
            work()  # the first call allocates, and chooses a kernel
        except Exception as exc:  # torch, cuda.core or onnxruntime cannot do it here: the run goes on without
            self.refused[what] = first_line(exc)
            return None
        return work


def probe_cpu(threads: int) -> Probe:
    """Return the probe of the CPU: ONNX Runtime multiplies, NumPy copies, both on so many threads."""
    product, copy = partial(host_product, threads, SIDE), partial(host_copy, threads, COPY_BYTES)
    return Probe("CPU", product, 2 * SIDE**3, copy, 2 * COPY_BYTES)


def probe_gpu(ordinal: int) -> Probe:
    """Return the probe of a GPU.

    PyTorch multiplies in fp16 with float32 sums, whatever the engine computes in: data sheets state that peak, and
    shares are quoted of it. The copy needs cuda.core alone.
    """
    product = partial(torch_product, f"cuda:{ordinal}", DEVICE_SIDE)
    copy = partial(device_copy, ordinal, DEVICE_COPY_BYTES)
    return Probe("GPU", product, DEVICE_CALLS * 2 * DEVICE_SIDE**3, copy, DEVICE_CALLS * 2 * DEVICE_COPY_BYTES)


def host_product(threads: int, side: int) -> Callable[[], Floats]:
    """Return what multiplies two square matrices of float32, and returns the product."""
    a, b = np.random.default_rng(0).standard_normal((2, side, side), np.float32)
    out = np.empty((side, side), np.float32)
    session = make_session(matmul_model(side), OnnxRuntime(threads, spinning=True), "a matrix product")
    binding = session.io_binding()
    for name, array in (("a", a), ("b", b)):
        binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
    binding.bind_output("c", "cpu", 0, np.float32, out.shape, out.ctypes.data)

    def multiply(_a: Floats = a, _b: Floats = b) -> Floats:  # held here, as the binding knows their addresses alone
        session.run_with_iobinding(binding)
        return out

    return multiply


def host_copy(threads: int, size: int) -> Work:
    """Return what copies memory once."""
    source, target = np.ones((2, size // 4), np.float32)
    pieces = list(zip(*(np.array_split(array, threads) for array in (target, source)), strict=True))
    pool = ThreadPoolExecutor(threads)  # NumPy lets go of the interpreter's lock while it copies
    return lambda: list(pool.map(lambda piece: np.copyto(*piece), pieces))


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
    """Return what copies memory of a GPU several times and waits for it."""
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
