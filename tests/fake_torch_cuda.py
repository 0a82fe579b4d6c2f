"""The part of torch.cuda that figures/gpu asks for, on a machine without a GPU: the clock, and calls that do nothing.

With it `scripts/gpu-check --dry-run` runs every line that a card would. A graph replays nothing.
"""

import contextlib
import time
from types import SimpleNamespace
from typing import Any

import torch


class Event:
    """A place in the program's order."""

    def __init__(self, *, enable_timing: bool = False) -> None:
        self._timed, self._at = enable_timing, 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        assert self._timed
        return 1e3 * max(end._at - self._at, 1e-6)


class Stream:
    """A stream of nobody, or of another library by its handle."""

    def __init__(self, handle: int | None = None) -> None:
        assert handle is None or handle > 0

    def wait_stream(self, stream: "Stream") -> None:
        assert isinstance(stream, Stream)


class CUDAGraph:
    """A graph of nothing."""

    def replay(self) -> None: ...


def install() -> None:
    """Put them in the place of PyTorch's."""
    none = contextlib.nullcontext()
    others: dict[str, Any] = {
        "Event": Event,
        "Stream": Stream,
        "ExternalStream": Stream,
        "CUDAGraph": CUDAGraph,
        "current_stream": Stream,
        "stream": lambda stream: none,
        "graph": lambda graph: none,
        "synchronize": lambda: None,
        "mem_get_info": lambda: (2**30, 2**31),
        "empty_cache": lambda: None,
        "get_device_properties": lambda ordinal: SimpleNamespace(name="none", multi_processor_count=1),
    }
    for name, stand_in in others.items():
        assert hasattr(torch.cuda, name)
        setattr(torch.cuda, name, stand_in)
