"""PyTorch's networks where an executor expects stages: on a card, on the fake driver, and on the host.

On a card a network runs on the layer's stream, in the executor's memory, and can become part of its CUDA graph. It runs
three times when it is bound: then cuDNN has chosen its algorithms, and PyTorch's allocator holds what the network
needs. Whatever runs on one stream uses that memory in turn.
"""

import copy
import ctypes
import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...bench.torch_loop import lowered_unet
from ...engine.manifest import BuiltStage, FileEntry, Precision, Stage, StageName, TensorSpec
from ...export import pfd
from ...export.engine import manifest_of
from ...export.pytorch import TorchStage
from ...export.stages import stage_plans
from ...model.checkpoint import Loaded
from ...model.pfd.checkpoint import LoadedPfd
from ...model.unet import UNet
from ...runtime.arrays import result_of
from ...runtime.gpu.cuda import CudaLayer
from ...runtime.gpu.door import OnGpu
from ...runtime.gpu.graphs import Form
from ...runtime.gpu.layer import LoadedStage, Shapes
from ...runtime.scorer import Scorer
from .check import Place

HALF = torch.float16


class Networks:
    """The deployed stages of a model, and the manifest that executors want."""

    def __init__(self, loaded: Loaded | LoadedPfd) -> None:
        plans = pfd.stage_plans(loaded.model) if isinstance(loaded, LoadedPfd) else stage_plans(loaded.model)
        self.model = loaded.model
        self.plans = {plan.name: plan for plan in plans}
        stages = []
        for name, plan in self.plans.items():
            inputs, outputs = (
                tuple(TensorSpec(tensor, "float32", shape) for tensor, shape in signature.items())
                for signature in (plan.inputs, plan.outputs)
            )
            stages.append(Stage(name, FileEntry("", 0, ""), 20, inputs, outputs, 0, 0, ()))
        self.manifest = manifest_of(loaded, tuple(stages))

    def host(self) -> Scorer:
        """Return a scorer on the CPU, in float32."""
        return Scorer(self.manifest, {s.name: TorchStage(self.model, s) for s in self.manifest.stages}, backend="host")


class TorchOnGpu:
    """PyTorch as a backend of GPUs. The networks are channels last; `half` is fp16 where tensor cores multiply.

    `sizes` are those that the U-Net meets, as `iqa-build` takes them.
    """

    device, cuda_graph = 0, True

    def __init__(self, place: Place, networks: Networks, sizes: Sequence[str], *, half: bool = True) -> None:
        self._place, self._sizes, self._half = place, sizes, half
        self.directory: Any = SimpleNamespace(manifest=networks.manifest, path="", file=lambda entry: entry)
        self.modules: dict[StageName, nn.Module] = {}
        for name, plan in networks.plans.items():
            module = channels_last(copy.deepcopy(plan.module), place)
            if half and place.device == "cuda":
                module = lowered_unet(cast(UNet, module), HALF) if name is StageName.UNET else Autocast(module)
            self.modules[name] = module

    def load(self, _directory: object = None, form: Form = Form.LOOP) -> OnGpu:
        """Return what `TensorRt.load` does: the layer, and its stages."""
        from ...tests.fake_device import fake_stages

        layer = CudaLayer(0)
        layer.enter()

        def stages(_batch: int) -> Mapping[StageName, LoadedStage]:
            return fake_stages(
                cast(Any, layer),
                self.directory,
                batches=("1:1:8",),
                sizes=tuple(self._sizes),
                precision=Precision.FP16 if self._half else Precision.FP32,
                kind=lambda _layer, _path, built: PlacedStage(self._place, layer, built, self.modules[built.name]),
            )

        return OnGpu(layer, stages, f"torch {torch.__version__}", Precision.FP16, form)

    def scorer(self, form: Form, batch: int = 1) -> tuple[Scorer, Any]:
        """Return a scorer and its executor."""
        executor = self.load(form=form).executor(self.directory, batch=batch)
        return Scorer(self.directory.manifest, executor, backend="torch"), executor


class PlacedStage:
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

    def __init__(self, stage: PlacedStage, shapes: Shapes, addresses: Mapping[str, int]) -> None:
        built, device = stage.built, stage.place.device
        sizes = built.sizes(shapes)
        self._module, self._layer, self._on_card = stage.module, stage.layer, device == "cuda"
        self._inputs, self._outputs = (
            [tensor_at(device, addresses[spec.name], spec.at(sizes), spec.dtype) for spec in specs]
            for specs in (built.inputs, built.outputs)
        )
        self._late = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _data: self._run(self._inputs, self._outputs))
        # On zeros: what memory holds by chance may be no step that a network knows.
        for _ in range(3):
            self._run([torch.zeros_like(x) for x in self._inputs], [torch.empty_like(x) for x in self._outputs])

    def use_activation(self, address: int, size: int) -> None:
        """Never asked for."""

    def enqueue(self) -> None:
        """Run on the layer's stream, or become part of what is being captured."""
        if self._on_card:
            self._run(self._inputs, self._outputs)
        else:  # PyTorch on a CPU runs at once, the fake driver's streams run late: let the stream call it
            driver = self._layer._driver
            function = driver.CUhostFn(ctypes.cast(self._late, ctypes.c_void_p).value)
            result_of(driver.cuLaunchHostFunc(self._layer.stream, function, 0))

    def capture_problem(self) -> str | None:
        """Say that nothing is known to be in the way."""
        return None

    def close(self) -> None:
        """Forget the addresses."""
        self._inputs, self._outputs = [], []

    @torch.inference_mode()
    def _run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        stream = torch.cuda.ExternalStream(self._layer.stream)  # type: ignore[no-untyped-call, unused-ignore]
        with torch.cuda.stream(stream):
            found = self._module(*(inputs if self._on_card else [x.float() for x in inputs]))
            for target, value in zip(outputs, found if isinstance(found, tuple) else (found,), strict=True):
                target.copy_(value)


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


def tensor_at(device: str, address: int, shape: tuple[int, ...], dtype: str) -> Tensor:
    """Return a tensor on memory that somebody else owns."""
    kind = np.dtype(dtype)
    if device == "cuda":
        memory = {"shape": shape, "typestr": kind.str, "data": (address, False), "strides": None, "version": 3}
        tensor = torch.as_tensor(SimpleNamespace(__cuda_array_interface__=memory), device=device)
    else:
        raw = (ctypes.c_uint8 * (math.prod(shape) * kind.itemsize)).from_address(address)
        tensor = torch.from_numpy(np.ctypeslib.as_array(raw).view(kind).reshape(shape))
    if tensor.data_ptr() != address:
        raise RuntimeError(f"PyTorch copied {shape} instead of using it where it lies")
    return tensor
