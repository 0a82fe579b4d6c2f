"""Memory of a device, by name, that only grows; and places where images wait for it to be free."""

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

    That of a pool `beside` is for `bring`, and nothing may be using it when it grows.
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
    """Named pieces of page-locked host memory that only grow; no copy may be under way when one does."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._held: dict[str, Bytes] = {}

    def get(self, name: str, shape: Sequence[int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        """Return an array in that memory, its contents arbitrary."""
        size = math.prod(shape) * dtype.itemsize
        if name not in self._held or self._held[name].nbytes < size:
            if name in self._held:
                self._layer.free_pinned(self._held.pop(name))
            self._held[name] = self._layer.allocate_pinned(size)
        return self._held[name][:size].view(dtype).reshape(shape)

    def release(self) -> None:
        """Free everything."""
        while self._held:
            self._layer.free_pinned(self._held.popitem()[1])


class Dock:
    """Memory for images that wait for the device: bytes as they are, others as planes, padded on the host.

    Who uses it holds its lock, by `with`: of all that could be waited for, an interrupt loses only that never.
    """

    def __init__(self, layer: Layer) -> None:
        self.lock = threading.Lock()
        self._layer, self._pool, self._pinned = layer, Pool(layer, beside=True), Pinned(layer)
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
