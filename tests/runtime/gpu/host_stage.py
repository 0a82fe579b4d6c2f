"""Stages for a GPU that has no engines: copy to the host, run ONNX Runtime there, copy back, all in the stream's order.

The driver calls a host function when the stream comes to it. That may call nothing of CUDA, needs nothing of it, and
can be captured; so an executor, its graphs and its memory can be tested on any GPU that cuda.core knows.
"""

import ctypes
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffiqa.engine.manifest import BuiltStage
from diffiqa.runtime.arrays import result_of
from diffiqa.runtime.gpu.cuda import CudaLayer
from diffiqa.runtime.gpu.layer import Shapes
from diffiqa.runtime.host.onnx_stage import OnnxRuntime, OnnxStage

_HostFunction = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class HostStage:
    """An ONNX file as an engine with profiles. Types that are not float32 are converted on the host."""

    open_ended = False

    def __init__(self, layer: CudaLayer, path: Path, built: BuiltStage) -> None:
        self.layer, self.built, self.session = layer, built, OnnxStage(path, OnnxRuntime(threads=1))

    def bind(self, profile: int, shapes: Shapes, addresses: Mapping[str, int]) -> "HostContext":
        return HostContext(self, shapes, addresses)

    def close(self) -> None: ...


class HostContext:
    """A stage on fixed memory."""

    activation_bytes = 0

    def __init__(self, stage: HostStage, shapes: Shapes, addresses: Mapping[str, int]) -> None:
        self._layer, self._addresses, built = stage.layer, addresses, stage.built
        sizes = built.sizes(shapes)
        self._pinned = {
            spec.name: self._layer.allocate_pinned(int(np.prod(spec.at(sizes))) * np.dtype(spec.dtype).itemsize)
            for spec in (*built.inputs, *built.outputs)
        }
        self._inputs, self._outputs = (
            {spec.name: np.zeros(spec.at(sizes), np.float32) for spec in specs}
            for specs in (built.inputs, built.outputs)
        )
        self._on_host = {
            spec.name: self._pinned[spec.name].view(spec.dtype).reshape(spec.at(sizes))
            for spec in (*built.inputs, *built.outputs)
        }
        self._call = stage.session.bind(self._inputs, self._outputs)
        self._failure: BaseException | None = None
        self._function = _HostFunction(self._run)  # the driver keeps no reference

    def use_activation(self, address: int, size: int) -> None: ...

    def enqueue(self) -> None:
        driver, layer = self._layer._driver, self._layer
        for name in self._inputs:
            layer.download(self._pinned[name], self._addresses[name])
        function = driver.CUhostFn(ctypes.cast(self._function, ctypes.c_void_p).value)
        result_of(driver.cuLaunchHostFunc(layer.stream, function, 0))
        for name in self._outputs:
            layer.upload(self._addresses[name], self._pinned[name])

    def capture_problem(self) -> str | None:
        return None

    def close(self) -> None:
        while self._pinned:
            self._layer.free_pinned(self._pinned.popitem()[1])
        assert self._failure is None, repr(self._failure)

    def _run(self, _data: object) -> None:
        try:
            for name, array in self._inputs.items():
                array[...] = self._on_host[name]
            self._call()
            for name, array in self._outputs.items():
                self._on_host[name][...] = array
        except BaseException as exc:  # there is nobody above to raise it to
            self._failure = exc
