"""The engines of a build as a candidate: each stage on the GPU between arrays of the host, and the whole as it scores.

Figures by stage and step take the numbers between stages, which scoring leaves in the device's memory: here every call
carries its inputs there and its outputs back. What that goes round, our kernels and the CUDA graph, is asked of the
executor that scores.
"""

import contextlib
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..runtime.device import DeviceExecutor
from ..runtime.device_layer import BoundStage, Layer, LoadedStage, choose_profile
from ..runtime.host import Call, FloatArray, Outcome
from ..runtime.manifest import EngineDirectory, Manifest
from ..runtime.plan import Plan
from ..runtime.scorer import open_tensorrt
from .verify_figures import total_score
from .verify_sides import Party, Side, Whole, onnx_precision
from .verify_trace import NotForShapesError

_DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@contextlib.contextmanager
def open_device_side(directory: EngineDirectory, ordinal: int) -> Generator[Side]:
    """Lend the build that fits a GPU. Raises BackendError or EngineError with the way out."""
    layer, engines, build = open_tensorrt(directory, ordinal)
    with contextlib.closing(DeviceExecutor(directory.manifest, layer, engines)) as executor:
        stages = {name: DeviceStage(layer, engine) for name, engine in engines.items()}
        lowest = onnx_precision(directory)
        party = Party(
            f"{directory.path}, {build.library} {build.version} {build.precision} on {layer.name}",
            f"{directory.manifest.engine_id}+{build.key}",
            build.precision if lowest == "fp32" else lowest,
        )
        try:
            yield Side(party, directory.manifest, stages, lambda *run: score_whole(directory.manifest, executor, *run))
        finally:
            for stage in stages.values():
                stage.close()


class DeviceStage:
    """An engine behind arrays of the host. One thread at a time; `close()` before the layer goes."""

    def __init__(self, layer: Layer, stage: LoadedStage) -> None:
        self._layer, self._stage = layer, stage
        self._bound: dict[tuple[tuple[int, ...], ...], _Bound] = {}

    def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
        """Return a call that takes the inputs to the device, runs the engine and fetches the outputs asked for."""
        layer = self._layer
        layer.enter()
        bound = self._bound_to({name: array.shape for name, array in inputs.items()})

        def call() -> None:
            layer.enter()
            for name, array in inputs.items():
                layer.upload(bound.addresses[name], array.astype(bound.dtypes[name], order="C"))
            bound.stage.enqueue()
            found = {name: np.empty(array.shape, bound.dtypes[name]) for name, array in outputs.items()}
            for name, array in found.items():
                layer.download(array, bound.addresses[name])
            layer.synchronise()
            for name, array in found.items():
                outputs[name][...] = array

        return call

    def close(self) -> None:
        """Free contexts and memory."""
        for bound in self._bound.values():
            bound.stage.close()
            for address in bound.owned:
                self._layer.free(address)
        self._bound.clear()

    def _bound_to(self, shapes: dict[str, tuple[int, ...]]) -> "_Bound":
        built = self._stage.built
        key = tuple(shapes[spec.name] for spec in built.inputs)
        if key in self._bound:
            return self._bound[key]
        profile = choose_profile(built.profiles, shapes)
        if profile is None:
            raise NotForShapesError(
                f"no profile of the {built.name} engine takes {shapes}; verify with images of a size it was built for, "
                f"or build again with iqa-build --sizes"
            )
        free = {
            name: size
            for spec in built.inputs
            for name, size in zip(spec.shape, shapes[spec.name], strict=True)
            if isinstance(name, str)
        }
        dtypes = {spec.name: np.dtype(_DTYPES[spec.dtype]) for spec in (*built.inputs, *built.outputs)}
        addresses = {}
        for spec in (*built.inputs, *built.outputs):
            items = math.prod(free[n] if isinstance(n, str) else n for n in spec.shape)
            addresses[spec.name] = self._layer.allocate(items * dtypes[spec.name].itemsize)
        owned = list(addresses.values())
        stage = self._stage.bind(profile, shapes, addresses)
        if stage.activation_bytes:
            owned.append(self._layer.allocate(stage.activation_bytes))
            stage.use_activation(owned[-1], stage.activation_bytes)
        self._bound[key] = _Bound(stage, addresses, dtypes, owned)
        return self._bound[key]


@dataclass(frozen=True)
class _Bound:
    """A context with its memory."""

    stage: BoundStage
    addresses: dict[str, int]
    dtypes: dict[str, np.dtype[Any]]
    owned: list[int]


def score_whole(manifest: Manifest, executor: DeviceExecutor, image: FloatArray, plan: Plan, seed: int) -> Whole:
    """Score an image as `iqa-run` does: at first without a graph, then captured, then replayed."""
    first, captured, replayed = (executor.run(image, plan, seed) for _ in range(3))
    branches = (_scores(first, name) for name in ("vcg", "vda"))
    note = next((text for text in (*captured.notes, *replayed.notes) if "CUDA graph" in text), "")
    same = None if note else _equal(first, captured) and _equal(first, replayed)
    return Whole(total_score(manifest, *branches), same, note)


def _scores(outcome: Outcome, name: str) -> npt.NDArray[np.float32]:
    return np.array([branch.score for v in outcome.verdicts if (branch := getattr(v, name))], np.float32)


def _equal(mine: Outcome, other: Outcome) -> bool:
    """Whether every score and every crop is the same, bit for bit; NaN equals NaN."""
    pairs = [(mine.crops, other.crops), *((_scores(mine, n), _scores(other, n)) for n in ("vcg", "vda"))]
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)
