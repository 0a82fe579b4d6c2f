"""Device memory and page-locked memory by name, which only grow; and docks, where images wait for the device."""

import itertools
import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..executor import FloatArray
from .layer import Array, Bytes, Layer


class Pool:
    """Named pieces of device memory that only grow. `version` counts how often an address has become invalid.

    A pool `beside` holds memory of the second stream; nothing may be using a piece of it that grows.
    """

    def __init__(self, layer: Layer, *, beside: bool = False) -> None:
        self._layer, self._beside = layer, beside
        self._held: dict[str, tuple[int, int]] = {}
        self.version = 0

    def get(self, name: str, size: int) -> int:
        """Return the address of at least `size` bytes; what was in them is lost if they had to move."""
        address, held = self._held.get(name, (0, 0))
        if held < size:
            if held:
                if not self._beside:
                    self._layer.synchronise()
                del self._held[name]
                self.version += 1
                self._layer.free(address)
            address = self._layer.allocate(size, beside=self._beside)
            self._held[name] = address, size
        return address

    def release(self) -> None:
        """Free everything."""
        self.version += 1
        while self._held:
            self._layer.free(self._held.popitem()[1][0])


class Pinned:
    """Named pieces of page-locked host memory that only grow. Wait for the copies of a piece before it is got again."""

    def __init__(self, layer: Layer, *, beside: bool = False) -> None:
        self._layer, self._beside = layer, beside
        self._held: dict[str, Bytes] = {}

    def get(self, name: str, shape: Sequence[int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return an array in that memory, its contents arbitrary."""
        size = math.prod(shape) * dtype.itemsize
        if name not in self._held or self._held[name].nbytes < size:
            if name in self._held:
                self._layer.free_pinned(self._held.pop(name))
            self._held[name] = self._layer.allocate_pinned(size, beside=self._beside)
        return self._held[name][:size].view(dtype).reshape(shape)

    def release(self) -> None:
        """Free everything."""
        while self._held:
            self._layer.free_pinned(self._held.popitem()[1])


class Dock:
    """Device memory for the images of one caller, filled while the device computes with another caller's.

    8-bit images come as they are, others as planes, padded on the host. Hold `lock` to use a dock. Take it with `with`:
    it is the one wait that Ctrl-C cannot leave locked.
    """

    def __init__(self, layer: Layer) -> None:
        self.lock = threading.Lock()
        self._layer, self._pool, self._pinned = layer, Pool(layer, beside=True), Pinned(layer, beside=True)
        self.images: list[tuple[int, tuple[int, int] | None]] = []  # address, and (height, width) of bytes

    def bring(self, images: Sequence[FloatArray | Bytes], padded: tuple[int, int]) -> None:
        """Copy images to the device, each once; they are there when this returns."""
        distinct = {id(image): image for image in images}  # seeds of one image come with the same array
        arrays = [_padded(image, padded) if image.dtype == np.float32 else image for image in distinct.values()]
        starts = [0, *itertools.accumulate(round_up(array.nbytes, 256) for array in arrays)]
        staged = self._pinned.get("images", (starts[-1],), np.dtype(np.uint8))
        for start, array in zip(starts, arrays, strict=False):
            np.copyto(staged[start : start + array.nbytes].view(array.dtype).reshape(array.shape), array)
        address = self._pool.get("images", starts[-1])
        self._layer.bring(address, staged)
        where = {
            key: (address + start, None if array.dtype == np.float32 else (array.shape[0], array.shape[1]))
            for key, start, array in zip(distinct, starts, arrays, strict=False)
        }
        self.images = [where[id(image)] for image in images]

    def release(self) -> None:
        """Free the memory."""
        self._pool.release()
        self._pinned.release()


def _padded(plane: Array, size: tuple[int, int]) -> Array:
    below, right = size[0] - plane.shape[1], size[1] - plane.shape[2]
    return np.pad(plane, ((0, 0), (0, below), (0, right)), mode="reflect")


def round_up(number: int, multiple: int) -> int:
    """Return the next multiple."""
    return -(-number // multiple) * multiple
