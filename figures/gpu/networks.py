"""PyTorch's networks where an executor expects stages: on a card, on the fake driver, and on the host.

On a card a network runs on the layer's stream, in the memory of the executor, and can become part of its CUDA graph: it
runs three times when it is bound, so that cuDNN has chosen its algorithms and PyTorch's allocator holds what the
network needs. Whatever runs on one stream reuses that memory in order.
"""

import contextlib
import copy
import ctypes
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...bench.torch_loop import lowered_unet
from ...engine.manifest import BuiltStage, FileEntry, Manifest, Precision, Stage, StageName, TensorSpec
from ...export.engine import manifest_of
from ...export.stages import StagePlan, stage_plans
from ...model.checkpoint import Loaded
from ...model.unet import UNet
from ...runtime.arrays import result_of
from ...runtime.gpu.cuda import CudaLayer
from ...runtime.gpu.graphs import Form
from ...runtime.gpu.layer import LoadedStage, Shapes
from ...runtime.host.executor import HostExecutor
from .check import Place

HALF = torch.float16


class Networks:
    """The stages of a model, and the manifest that executors want."""

    def __init__(self, loaded: Loaded) -> None:
        self.model = loaded.model
        self._plans = {plan.name: plan for plan in stage_plans(loaded.model)}
        self.manifest: Manifest = manifest_of(loaded, tuple(map(_stage, self._plans.values())))

    def host(self) -> HostExecutor:
        """Return the host's executor, in float32."""
        return HostExecutor(self.manifest, {name: OnHost(plan.module) for name, plan in self._plans.items()})

    def modules(self, place: Place, *, half: bool) -> dict[StageName, nn.Module]:
        """Return the networks on the device, channels last: in float32, or with fp16 where tensor cores multiply."""
        found = {}
        for name, plan in self._plans.items():
            module = channels_last(copy.deepcopy(plan.module), place)
            if half and place.device == "cuda":
                module = lowered_unet(cast(UNet, module), HALF) if name is StageName.UNET else Autocast(module)
            found[name] = module
        return found

    def stages(
        self, place: Place, layer: CudaLayer, modules: Mapping[StageName, nn.Module], sizes: Sequence[str], **more: Any
    ) -> dict[StageName, LoadedStage]:
        """Return stages for an executor on `layer`, with the profiles of `iqa-build`; `more` are its options."""
        from ...tests.fake_device import fake_stages

        directory: Any = SimpleNamespace(manifest=self.manifest, file=lambda entry: entry)
        options = {"batches": ("1:1:8",), "sizes": tuple(sizes), **more}
        return fake_stages(
            layer,  # type: ignore[arg-type]  # it is passed on
            directory,
            kind=lambda _layer, _path, built: TorchStage(place, layer, built, modules[built.name]),
            **options,
        )


class TorchOnGpu:
    """A backend for `bench.running`: PyTorch's networks in fp16."""

    device = 0

    def __init__(self, place: Place, networks: Networks, sizes: Sequence[str]) -> None:
        self._place, self._networks, self._sizes = place, networks, sizes
        self.modules = networks.modules(place, half=True)

    def load(self, _directory: Any) -> Any:
        """Return what `backends.TensorRt.load` does."""
        from ...runtime.gpu.door import OnGpu

        layer = open_layer()

        def stages(_batch: int) -> Mapping[StageName, LoadedStage]:
            precision = Precision.FP16 if self._place.device == "cuda" else Precision.FP32
            return self._networks.stages(self._place, layer, self.modules, self._sizes, precision=precision)

        return OnGpu(layer, stages, f"torch {torch.__version__}", Precision.FP16, Form.LOOP)


class TorchStage:
    """A network as a `LoadedStage`."""

    open_ended = False

    def __init__(self, place: Place, layer: CudaLayer, built: BuiltStage, module: nn.Module) -> None:
        self.place, self.layer, self.built, self.module = place, layer, built, module

    def bind(self, profile: int, shapes: Shapes, addresses: Mapping[str, int]) -> "TorchBinding":
        """Return the network on these addresses."""
        return TorchBinding(self, shapes, addresses)

    def close(self) -> None:
        """Leave the network to who made it."""


class TorchBinding:
    """A network with its tensors at fixed addresses, as a `BoundStage`."""

    activation_bytes = 0  # PyTorch allocates its own

    def __init__(self, stage: TorchStage, shapes: Shapes, addresses: Mapping[str, int]) -> None:
        built, device = stage.built, stage.place.device
        sizes = built.sizes(shapes)
        self._module, self._layer, self._on_card = stage.module, stage.layer, device == "cuda"
        self._inputs, self._outputs = (
            [tensor_at(device, addresses[spec.name], spec.at(sizes), spec.dtype) for spec in specs]
            for specs in (built.inputs, built.outputs)
        )
        self._late: Any = None
        for _ in range(3):
            self._at_once()

    def use_activation(self, address: int, size: int) -> None:
        """Never asked for."""

    def enqueue(self) -> None:
        """Run on the layer's stream, or become part of what is being captured."""
        if self._on_card:
            self._at_once()
            return
        # The fake driver's streams run late, and PyTorch on a CPU at once: let the stream call it.
        driver = self._layer._driver
        self._late = self._late or ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _data: self._at_once())
        function = driver.CUhostFn(ctypes.cast(self._late, ctypes.c_void_p).value)
        result_of(driver.cuLaunchHostFunc(self._layer.stream, function, 0))

    def capture_problem(self) -> str | None:
        """Say that nothing is known to be in the way."""
        return None

    def close(self) -> None:
        """Forget the addresses."""
        self._inputs, self._outputs = [], []

    @torch.inference_mode()
    def _at_once(self) -> None:
        stream = torch.cuda.ExternalStream(self._layer.stream)  # type: ignore[no-untyped-call, unused-ignore]
        with torch.cuda.stream(stream):
            given = self._inputs if self._on_card else [x.float() for x in self._inputs]
            found = self._module(*given)
            for target, value in zip(self._outputs, found if isinstance(found, tuple) else (found,), strict=True):
                target.copy_(value)


class OnHost:
    """A network as a `StageRunner`."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Callable[[], None]:
        """Return a call that runs the network from and into these arrays."""
        given, targets = ([torch.from_numpy(array) for array in side.values()] for side in (inputs, outputs))

        @torch.inference_mode()
        def call() -> None:
            found = self._module(*given)
            for target, value in zip(targets, found if isinstance(found, tuple) else (found,), strict=True):
                target.copy_(value)

        return call


class Autocast(nn.Module):
    """A network of a head: autocast keeps norms and sums in float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        """Run it."""
        with torch.autocast("cuda", HALF):
            return self.module(*inputs)


def channels_last(module: nn.Module, place: Place) -> nn.Module:
    """Return a network on the device, in eval mode."""
    placed = module.eval().to(place.device)
    return placed.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore, no-any-return]


class _Memory:
    """Memory of a card as other libraries take it."""

    def __init__(self, address: int, shape: tuple[int, ...], typestr: str) -> None:
        interface = {"shape": shape, "typestr": typestr, "data": (address, False), "strides": None, "version": 3}
        self.__cuda_array_interface__ = interface


def tensor_at(device: str, address: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Return a tensor on memory that somebody else owns."""
    kind = np.dtype(dtype)
    if device == "cuda":
        tensor = torch.as_tensor(_Memory(address, shape, kind.str), device=device)
    else:
        raw = (ctypes.c_uint8 * (math.prod(shape) * kind.itemsize)).from_address(address)
        tensor = torch.from_numpy(np.ctypeslib.as_array(raw).view(kind).reshape(shape))
    if tensor.data_ptr() != address:
        raise RuntimeError(f"PyTorch copied {shape} instead of using it where it lies")
    return tensor


def open_layer() -> CudaLayer:
    """Return the card through cuda.core, or the fake driver's."""
    layer = CudaLayer(0)
    layer.enter()
    return layer


@contextlib.contextmanager
def executor_on(
    place: Place, networks: Networks, modules: Mapping[StageName, nn.Module], sizes: Sequence[str], **options: Any
) -> Iterator[Any]:
    """Give a device executor; it is closed with its layer."""
    from ...runtime.gpu.executor import DeviceExecutor

    half = options.pop("half", False)
    layer = open_layer()
    precision = Precision.FP16 if half else Precision.FP32
    stages = networks.stages(place, layer, modules, sizes, precision=precision)
    executor = DeviceExecutor(networks.manifest, layer, stages, **options)
    try:
        yield executor
    finally:
        executor.close()


def _stage(plan: StagePlan) -> Stage:
    inputs, outputs = (
        tuple(TensorSpec(name, "float32", shape) for name, shape in signature.items())
        for signature in (plan.inputs, plan.outputs)
    )
    return Stage(plan.name, FileEntry("", 0, ""), 20, inputs, outputs, 0, 0, ())
