"""Arrays of other libraries, in the host's memory or a GPU's, as NumPy arrays: by DLPack or `__cuda_array_interface__`.

An array on a GPU says which stream it is made on, or must be ready: PyTorch's does not say. It is copied to the host,
whatever is to score it, because its digest, alpha and size are seen to there as those of any image. That is two copies,
beside a loop that takes many times as long (an estimate: about a thousandth).
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
    """Whether something is an array of another library. Its type is asked: it may refuse by any error itself."""
    return hasattr(type(source), "__cuda_array_interface__") or hasattr(type(source), "__dlpack__")


def to_numpy(source: Any) -> npt.NDArray[Any]:
    """Return the values, after what is enqueued on the stream that they say they are made on. Raises ImageError."""
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
            f"its values cannot be had ({first_line(exc)}); copy it to the host as a NumPy array of (H, W, 3)"
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
    """Copy from a GPU, in the context that the memory belongs to, after what `stream` has in hand."""
    from cuda.bindings import driver

    with _context_of(driver, address):
        if stream is not None:
            result_of(driver.cuStreamSynchronize(driver.CUstream(stream)))
        result_of(driver.cuMemcpyDtoH(values.ctypes.data, address, values.nbytes))


@contextmanager
def _context_of(driver: Any, address: int) -> Iterator[None]:
    """Make the context current that memory is of; that of memory pools is of none: then the device's own."""
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
    """Return the result of a call of cuda.bindings, None if it has none. Raises RuntimeError with its status."""
    status, *results = answer
    if int(status):
        raise RuntimeError(str(status))
    return results[0] if results else None
