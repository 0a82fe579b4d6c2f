"""Takes arrays of other libraries, on the host or a GPU, as NumPy arrays: by DLPack or `__cuda_array_interface__`.

An array on a GPU may name the stream that makes it; one that names none, as PyTorch's, must be ready. It is copied to
the host, even if a GPU is to score it: the host checks digest, alpha and size, as for any image. These two copies take
perhaps a thousandth of the time of the loop (an estimate).
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ImageError, first_line

_ON_HOST = {1, 3, 11}  # DLPack's numbers for memory that the CPU reads: its own, page-locked by CUDA, by ROCm


class GpuArray(Protocol):
    """An array of CuPy, PyCUDA, Numba or PyTorch on a GPU."""

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]: ...


class Exchangeable(Protocol):
    """An array of any library that knows DLPack."""

    def __dlpack__(self, *arguments: Any, **options: Any) -> Any: ...

    def __dlpack_device__(self) -> tuple[Any, Any]: ...


def is_foreign(source: object) -> bool:
    """Whether something is an array of another library. This asks its type: the object may refuse with any error."""
    return hasattr(type(source), "__cuda_array_interface__") or hasattr(type(source), "__dlpack__")


def to_numpy(source: Any) -> npt.NDArray[Any]:
    """Return the values, once the stream that makes them has done so. Raises ImageError."""
    try:
        if hasattr(source, "__cuda_array_interface__"):
            return _from_gpu(source.__cuda_array_interface__)
        if int(source.__dlpack_device__()[0]) in _ON_HOST:
            return np.from_dlpack(source)
        return np.from_dlpack(source, device="cpu", copy=True)
    except ImageError:
        raise
    except Exception as exc:  # each library has errors of its own
        raise ImageError(
            f"its values cannot be read ({first_line(exc)}); copy it to the host as a NumPy array of (H, W, 3)"
        ) from exc


def _from_gpu(interface: Mapping[str, Any]) -> npt.NDArray[Any]:
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    values = np.empty(shape, dtype)
    strides = interface.get("strides")
    if strides is not None and tuple(strides) != values.strides and values.size:
        raise ImageError(f"its rows are not one after the other (strides {tuple(strides)}); make it contiguous")
    if interface.get("mask") is not None:
        raise ImageError("it has a mask; fill it in")
    if math.prod(shape):
        _copy(interface["data"][0], values, interface.get("stream"))
    return values


def _copy(address: int, values: npt.NDArray[Any], stream: int | None) -> None:
    """Copy from a GPU, in the context that owns the memory, once `stream` has done its work."""
    from cuda.bindings import driver

    with _context_of(driver, address):
        if stream is not None:
            result_of(driver.cuStreamSynchronize(driver.CUstream(stream)))
        result_of(driver.cuMemcpyDtoH(values.ctypes.data, address, values.nbytes))


@contextmanager
def _context_of(driver: Any, address: int) -> Iterator[None]:
    """Make the context current that owns the memory. A memory pool has none: then the device's own."""
    result_of(driver.cuInit(0))
    attribute = driver.CUpointer_attribute
    status, context = driver.cuPointerGetAttribute(attribute.CU_POINTER_ATTRIBUTE_CONTEXT, address)
    device = None
    if int(status) or not int(context):
        ordinal = result_of(driver.cuPointerGetAttribute(attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, address))
        device = result_of(driver.cuDeviceGet(ordinal))
        context = result_of(driver.cuDevicePrimaryCtxRetain(device))
    try:
        result_of(driver.cuCtxPushCurrent(driver.CUcontext(int(context))))
        try:
            yield
        finally:
            driver.cuCtxPopCurrent()
    finally:
        if device is not None:
            driver.cuDevicePrimaryCtxRelease(device)


def result_of(answer: tuple[Any, ...]) -> Any:
    """Return the result of a call of cuda.bindings, None if it has none. Raises RuntimeError with a bad status."""
    status, *results = answer
    if int(status):
        raise RuntimeError(str(status))
    return results[0] if results else None
