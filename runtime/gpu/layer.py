"""What an executor asks of a device, and of a stage that is loaded onto it: protocols of a few calls.

`cuda.py` has the one `Layer`. It is a protocol, so that others can stand around it: iqa-bench times every call so.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...engine.manifest import BuiltStage
from ...kernels.launch import Launch

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
Shapes = Mapping[str, tuple[int, ...]]
Enqueue = Callable[[], None]

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class DeviceMemoryError(MemoryError):
    """The device has not enough memory; the message says how much was asked for, and where."""


class BoundStage(Protocol):
    """An engine with its shapes and addresses set. A captured graph of it holds as long as they stay."""

    activation_bytes: int  # scratch memory that it needs while it runs; stages that run in turn share one piece

    def use_activation(self, address: int, size: int) -> None:
        """Set its scratch memory: once, before the first `enqueue`."""

    def enqueue(self) -> None:
        """Run on the layer's stream, or become part of what is being captured."""

    def capture_problem(self) -> str | None:
        """Return why it cannot be captured; None if it can, or does not know."""

    def close(self) -> None:
        """Free its context."""


class LoadedStage(Protocol):
    """An engine on the device."""

    # Whether its profiles take any size. Buffers then grow with the images; else they are made for the largest at once.
    open_ended: bool

    @property
    def built(self) -> BuiltStage:
        """Its signature and profiles."""

    def bind(self, profile: int, shapes: Shapes, addresses: Mapping[str, int]) -> BoundStage:
        """Return it in a context of its own, with the shapes of its inputs and the address of every tensor."""

    def close(self) -> None:
        """Free it."""


class Graph(Protocol):
    """A captured sequence of launches, ready to run."""

    def launch(self) -> None:
        """Run it on the layer's stream."""

    def close(self) -> None:
        """Free it."""


class Layer(Protocol):
    """One device and one stream: all calls take effect in order. Device addresses are multiples of 256.

    A second stream runs beside it, for `bring` and the memory that this fills: allocate, fill and free such memory at
    any time, even while another thread captures or waits.

    Raises DeviceMemoryError, and BackendError for whatever else the device refuses.
    """

    name: str

    def enter(self) -> None:
        """Make the device current; every thread calls this first."""

    def allocate(self, size: int, *, beside: bool = False) -> int:
        """Return the address of new device memory, its contents arbitrary."""

    def bring(self, address: int, values: Array) -> None:
        """Copy pinned `values` to memory that was allocated `beside`; they are there when it returns."""

    def free(self, address: int) -> None:
        """Give back device memory, once its stream has done what was launched before."""

    def trim(self) -> None:
        """Wait for everything, and give the device what was freed and kept for later; other libraries may need it."""

    def allocate_pinned(self, size: int, *, beside: bool = False) -> Bytes:
        """Return host memory that the device copies from and to by itself, on the second stream if `beside`."""

    def free_pinned(self, memory: Bytes) -> None:
        """Give it back, after the copies that its stream has to do."""

    def upload(self, address: int, values: Array) -> None:
        """Copy to the device. Leave pinned `values` as they are until `synchronise`; others are copied at once."""

    def download(self, values: Array, address: int) -> None:
        """Copy from the device; pinned `values` are there after `synchronise`."""

    def launch(self, launch: Launch) -> None:
        """Launch a kernel, or make it part of what is being captured."""

    def synchronise(self) -> None:
        """Wait for all that was launched and copied."""

    def mark(self) -> object:
        """Have the stream note the time when it comes to this place; never while capturing."""

    def seconds_between(self, first: object, last: object) -> float:
        """Return the time on the device between two marks; after `synchronise`."""

    def begin_capture(self) -> None:
        """From now on launches of this thread are recorded, not run."""

    def end_capture(self) -> Graph:
        """Return what was recorded, ready to run."""

    def abandon_capture(self) -> None:
        """Drop what is being recorded, if anything; never raises."""

    def close(self) -> None:
        """Free the device's stream and all memory; never raises."""
