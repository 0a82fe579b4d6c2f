"""Stages that PyTorch's compiler made for this GPU: they launch on the layer's stream, and our graphs hold them.

PyTorch allocates what a form computes in between. It does so in one pool that lives as long as the stages: a graph
holds addresses in it, and the pool never gives them to anybody else. All stages share the pool, because they run one
after the other.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...engine.manifest import Build, BuiltStage, StageName
from ...errors import BackendError, first_line
from ..inductor import Package, torch
from .layer import DeviceMemoryError, Layer, LoadedStage, Shapes

if TYPE_CHECKING:
    from torch import Tensor

    from .cuda import CudaLayer

_TYPESTR = {"float32": "<f4", "float16": "<f2", "bfloat16": "<i2"}  # NumPy knows no bfloat16: its bits travel as int16


def on_stream(
    layer: "CudaLayer", ordinal: int, build: Build, loaded: Mapping[StageName, Package]
) -> dict[StageName, LoadedStage]:
    """Return the stages of a build, to run on the layer's stream."""
    place = _place(layer, ordinal)
    return {made.name: _Stage(place, made, loaded[made.name]) for made in build.stages}


def _place(layer: "CudaLayer", ordinal: int) -> "_Place":
    module = torch()
    device = module.device("cuda", ordinal)
    return _Place(layer, device, module.cuda.ExternalStream(layer.stream, device), module.cuda.MemPool())


class _Place:
    """Where forms run: PyTorch's names for the layer's device and stream, and the pool for what is in between."""

    def __init__(self, layer: Layer, device: Any, stream: Any, pool: Any) -> None:
        self.layer, self.device, self.stream, self.pool = layer, device, stream, pool
        self._failures = 0

    def tensor(self, address: int, dtype: str, shape: tuple[int, ...]) -> "Tensor":
        """Return the tensor that lies at an address of the layer; it copies nothing, and owns nothing."""
        module = torch()
        tensor: Tensor = module.as_tensor(_At(address, _TYPESTR[dtype], shape), device=self.device)
        return tensor.view(getattr(module, dtype))

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Launch on the layer's stream, and allocate from the pool."""
        module = torch()
        with module.cuda.stream(self.stream), module.cuda.use_mem_pool(self.pool, self.device):
            yield

    def ran_out_of_memory(self) -> bool:
        """Return whether PyTorch has, since this was last asked: compiled code does not say why it failed."""
        before, self._failures = self._failures, int(torch().cuda.memory_stats(self.device).get("num_ooms", 0))
        return self._failures > before


class _At:
    """Memory as PyTorch, CuPy and Numba pass it to each other."""

    def __init__(self, address: int, typestr: str, shape: tuple[int, ...]) -> None:
        self.__cuda_array_interface__ = {"version": 3, "data": (address, False), "typestr": typestr, "shape": shape}


class _Stage:
    """A package whose forms take addresses."""

    open_ended = False

    def __init__(self, place: _Place, built: BuiltStage, package: Package) -> None:
        self.built, self._place, self._package = built, place, package

    def bind(self, profile: int, shapes: Shapes, addresses: Mapping[str, int]) -> "_Bound":
        """Return a form with its tensors; the first `enqueue` loads what it needs."""
        sizes = self.built.sizes(shapes)
        given, wanted = (
            [self._place.tensor(addresses[spec.name], spec.dtype, spec.at(sizes)) for spec in specs]
            for specs in (self.built.inputs, self.built.outputs)
        )
        return _Bound(self._place, self.built.name, self._package.form(profile), given, wanted)

    def close(self) -> None:
        pass  # its last reference frees it


class _Bound:
    """A form, its inputs and its outputs at addresses that never change."""

    activation_bytes = 0  # PyTorch allocates its own

    def __init__(
        self, place: _Place, name: StageName, form: Any, given: "Sequence[Tensor]", wanted: "Sequence[Tensor]"
    ) -> None:
        self._place, self._name, self._form = place, name, form
        self._given, self._wanted = given, wanted

    def use_activation(self, address: int, size: int) -> None:
        pass  # none was asked for

    def enqueue(self) -> None:
        """Launch on the layer's stream, or become part of what is being captured."""
        place = self._place
        try:
            with place.running():
                for tensor, result in zip(self._wanted, self._form(self._given), strict=True):
                    tensor.copy_(result)
        except RuntimeError as exc:
            text = f"{place.layer.name}: torch failed in the {self._name} stage: {first_line(exc)}"
            raise (DeviceMemoryError if place.ran_out_of_memory() else BackendError)(text) from exc

    def capture_problem(self) -> str | None:
        """Return None: a form launches kernels, and allocates from a pool that its first run has filled."""
        return None

    def close(self) -> None:
        self._given = self._wanted = ()
