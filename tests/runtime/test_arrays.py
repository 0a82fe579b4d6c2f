"""Images in arrays of other libraries: the same pixels, the same image, wherever they lie."""

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffiqa.errors import ImageError
from diffiqa.runtime.images import read_image

from ..tiny import photo


def digest(source: Any) -> str:
    return read_image(source, min_side=16).digest


class Driver:
    """The calls of CUDA's driver, for memory of the host. `log` says in which order they came."""

    CUpointer_attribute = SimpleNamespace(CU_POINTER_ATTRIBUTE_CONTEXT=2, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL=9)
    CUstream = staticmethod(lambda handle: ("stream", handle))
    CUcontext = staticmethod(lambda handle: ("context", handle))

    def __init__(self, context: int = 77) -> None:
        self.context, self.fails = context, ""
        self.log: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.log.append((name, *arguments))
            if name == self.fails:
                return (700,)
            if name == "cuMemcpyDtoH":
                ctypes.memmove(*arguments)
            if name == "cuPointerGetAttribute":
                return 0, (self.context if arguments[0] == 2 else 1)
            return 0, {"cuDeviceGet": "device 1", "cuDevicePrimaryCtxRetain": 99}.get(name)

        return call

    def names(self) -> list[str]:
        return [name for name, *_ in self.log]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=made))
    return made


class GpuArray:
    """What PyCUDA and Numba have: an address, and what lies there."""

    def __init__(self, values: Any, **more: Any) -> None:
        self.values = values
        about = {"shape": values.shape, "typestr": values.dtype.str, "data": (values.ctypes.data, False), "version": 3}
        self._interface = {**about, **more}

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self._interface


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_tensor_on_the_host_is_the_image_that_its_array_is(dtype: torch.dtype) -> None:
    pixels = torch.from_numpy(photo(1, 20, 24).copy())
    tensor = pixels if dtype is torch.uint8 else pixels.float() / 255
    assert digest(tensor) == digest(tensor.numpy())
    assert digest(tensor.transpose(0, 1)) == digest(tensor.numpy().swapaxes(0, 1))  # strides are followed


def test_a_tensor_with_channels_first_is_refused_as_such_an_array_is() -> None:
    with pytest.raises(ImageError, match=r"Tensor: has shape \(3, 20, 24\).*expected \(H, W\)"):
        read_image(torch.zeros(3, 20, 24))


@pytest.mark.parametrize(
    "tensor", [torch.zeros(20, 24, 3, requires_grad=True), torch.zeros(20, 24, 3, dtype=torch.bfloat16)], ids=str
)
def test_values_that_cannot_be_had_say_why_and_what_to_do(tensor: torch.Tensor) -> None:
    with pytest.raises(ImageError, match=r"Tensor: its values cannot be read \(.+\); copy it to the host as a NumPy"):
        read_image(tensor)


def test_an_array_on_a_gpu_is_copied_after_its_stream_in_its_own_context(driver: Driver) -> None:
    pixels = np.ascontiguousarray(photo(2, 20, 24))
    assert digest(GpuArray(pixels, stream=5, strides=None)) == digest(pixels)
    assert driver.names() == [
        "cuInit",
        "cuPointerGetAttribute",
        "cuCtxPushCurrent",
        "cuStreamSynchronize",
        "cuMemcpyDtoH",
        "cuCtxPopCurrent",
    ]
    assert ("cuCtxPushCurrent", ("context", 77)) in driver.log
    assert ("cuStreamSynchronize", ("stream", 5)) in driver.log


def test_memory_of_no_context_is_copied_in_that_of_its_device(driver: Driver) -> None:
    driver.context = 0
    pixels = np.ascontiguousarray(photo(3, 20, 24))
    assert digest(GpuArray(pixels, strides=pixels.strides)) == digest(pixels)
    assert ("cuCtxPushCurrent", ("context", 99)) in driver.log
    assert driver.names()[-2:] == ["cuCtxPopCurrent", "cuDevicePrimaryCtxRelease"]
    assert "cuStreamSynchronize" not in driver.names()  # nothing to wait for, it says


def test_what_the_driver_refuses_is_said_and_the_context_given_back(driver: Driver) -> None:
    driver.fails = "cuMemcpyDtoH"
    with pytest.raises(ImageError, match=r"GpuArray: its values cannot be read \(700\)"):
        read_image(GpuArray(np.ascontiguousarray(photo(4, 20, 24))))
    assert driver.names()[-1] == "cuCtxPopCurrent"


@pytest.mark.parametrize(
    ("more", "says"), [({"strides": (144, 3, 1)}, "not one after the other"), ({"mask": object()}, "has a mask")]
)
def test_arrays_with_gaps_or_masks_are_refused(driver: Driver, more: dict[str, Any], says: str) -> None:
    with pytest.raises(ImageError, match=says):
        read_image(GpuArray(np.ascontiguousarray(photo(5, 20, 24)), **more))
    assert driver.log == []


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["cupy", "torch", "pycuda"])
def test_arrays_of_libraries_with_gpus_are_the_images_that_they_hold(library: str) -> None:
    pixels = np.ascontiguousarray(photo(6, 60, 44))
    if library == "torch":
        if not torch.cuda.is_available():
            pytest.skip("no GPU that torch knows")
        on_gpu: Any = torch.from_numpy(pixels.copy()).cuda()
    elif library == "cupy":
        on_gpu = pytest.importorskip("cupy").asarray(pixels)
    else:
        pytest.importorskip("pycuda.autoinit")
        on_gpu = pytest.importorskip("pycuda.gpuarray").to_gpu(pixels)
    assert digest(on_gpu) == digest(pixels)
