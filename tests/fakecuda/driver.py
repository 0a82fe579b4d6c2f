"""Puts the fake driver (driver.h) in the place of this machine's, for one process, and asks it what happened."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..kernels.devices import Missing

DRIVER = "libcuda.so.1"
OUT_OF_MEMORY, ILLEGAL_ADDRESS, NOT_SUPPORTED = 2, 700, 801
Run = ctypes.CFUNCTYPE(ctypes.c_int)


class Driver:
    """A machine with one GPU, as new; `close` takes the GPU out again."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.fake_count.restype = library.fake_alive.restype = library.fake_pending.restype = ctypes.c_long
        library.fake_bytes.restype = ctypes.c_size_t
        library.fake_problem.restype = ctypes.c_char_p
        self.layers: list[Any] = []  # that are open, each with two streams
        self.plug_in()

    def plug_in(self) -> None:
        """Put in a GPU that is as new."""
        self._library.fake_reset(1)

    @property
    def alive(self) -> int:
        """Graphs, pieces of memory, and streams that no open layer has."""
        return int(self._library.fake_alive()) - 2 * len(self.layers)

    @property
    def capturing(self) -> bool:
        """Whether a capture is open."""
        return bool(self._library.fake_capturing())

    @property
    def held(self) -> int:
        """Bytes of device memory in use."""
        return int(self._library.fake_bytes(0))

    @property
    def peak(self) -> int:
        """The most bytes of device memory that were in use."""
        return int(self._library.fake_bytes(1))

    @property
    def kept(self) -> int:
        """Bytes of device memory that were freed, and that the pool keeps from others."""
        return int(self._library.fake_bytes(2))

    def count(self, *what: str) -> int:
        """Return how often functions were called, or things put on a stream or allocated.

        Things are: kernel, graph, stage, upload, download, free, event, wait, capture, device memory, pinned memory.
        """
        return sum(self._library.fake_count(name.encode()) for name in what)

    @property
    def capacity(self) -> int:
        """Bytes of device memory."""
        return int(self._library.fake_bytes(3))

    @capacity.setter
    def capacity(self, size: int) -> None:
        self._library.fake_set_capacity(ctypes.c_size_t(size))

    def fail(self, what: str, nth: int, result: int = OUT_OF_MEMORY, *, times: int = 1) -> None:
        """Let the `nth` of these things from now on fail, and so many in a row; there is one such plan at a time."""
        self._library.fake_fail(what.encode(), ctypes.c_long(nth), ctypes.c_long(times), result)

    def lose_context(self, after: int = 0) -> None:
        """Lose the context after so many more calls; `plug_in` another GPU then."""
        self._library.fake_lose_context(ctypes.c_long(after))

    def problems(self) -> list[str]:
        """Return what went wrong since the last time."""
        return [text.decode() for text in iter(self._library.fake_problem, None)]

    def tell(self, problem: str) -> None:
        """Add a problem."""
        self._library.fake_tell(problem.encode())

    def pending(self, stream: int) -> int:
        """Return how much work a stream has that has not run."""
        return int(self._library.fake_pending(ctypes.c_void_p(stream)))

    def stage(self, stream: int, run: "ctypes._FuncPointer", memory: Sequence[tuple[int, int]]) -> int:
        """Put a network on a stream that works on these pieces (address, size); return the driver's answer."""
        addresses, sizes = zip(*memory, strict=True)
        count = len(memory)
        arrays = (ctypes.c_uint64 * count)(*addresses), (ctypes.c_size_t * count)(*sizes)
        return int(self._library.fake_stage(ctypes.c_void_p(stream), run, count, *arrays))

    def close(self) -> None:
        """Close what is open, and take the GPU out."""
        while self.layers:
            self.layers[-1].close()
        self._library.fake_reset(0)


def build_driver(folder: Path) -> None:
    """Compile the driver to DRIVER in a folder; raises Missing where there is no compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise Missing("g++ is not installed")
    library = folder / DRIVER
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-Wl,-soname,{library.name}"]
    sources = sorted(map(str, Path(__file__).parent.glob("*.cpp")))
    subprocess.run([compiler, *flags, *sources, "-o", str(library), "-ldl"], check=True)


def load_driver(library: Path, kernels: str) -> ctypes.CDLL:
    """Load it before anything loads another: whoever asks for libcuda.so.1 later gets what is there by that name.

    `kernels` is the file of their host build. Raises Missing if this process has another driver already.
    """
    os.environ["FAKE_CUDA_KERNELS"] = kernels
    ours = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    if not hasattr(ctypes.CDLL("libcuda.so.1"), "fake_reset"):
        raise Missing("this process has loaded a real driver already")
    return ours


def environment(ours: ctypes.CDLL) -> dict[str, str]:
    """Return the variables of a process in which this driver is the machine's from the start, with a GPU."""
    folders = [str(Path(ours._name).parent), os.environ.get("LD_LIBRARY_PATH", "")]
    return os.environ | {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, folders)), "FAKE_CUDA_GPU": "1"}


def compiled(arch: str) -> dict[str, bytes]:
    """Stand in for `kernels.load.compiled`: this driver runs no machine code, so none has to be made."""
    from diffiqa.kernels.compile import SOURCES

    return dict.fromkeys(SOURCES, b"no machine code")
