"""A build as a candidate: its engines one by one between arrays of the host, and an image scored all on the GPU.

Figures by stage and step need the tensors between the stages, and scoring leaves those in GPU memory. So each call here
uploads its inputs and downloads its outputs. These calls use neither our kernels nor a CUDA graph: to check those, the
executor that scores runs one image too.
"""

import contextlib
import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from ..engine.manifest import EngineDirectory, Library, Manifest
from ..errors import BackendError, EngineError
from ..runtime.backends import GpuBackend
from ..runtime.builds import NotForShapesError, build_command, choose_profile
from ..runtime.executor import Call, FloatArray, Outcome, Planes
from ..runtime.gpu.executor import DeviceExecutor
from ..runtime.gpu.graphs import Form
from ..runtime.gpu.layer import ITEM_BYTES, BoundStage, Layer, LoadedStage
from ..runtime.plan import Plan
from .figures import total_score
from .sides import Party, Side, onnx_precision
from .trace import branch_scores

_DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@contextlib.contextmanager
def open_device_side(directory: EngineDirectory, backend: GpuBackend) -> Generator[Side]:
    """Open the build that fits a GPU, for the length of a block. Raises BackendError or EngineError."""
    opened = backend.load(directory)
    if opened.build is None:  # ONNX Runtime takes the exported stages then
        opened.layer.close()
        command = build_command(directory.path, library=Library.ONNXRUNTIME)
        raise EngineError(f"{directory.path} holds no onnxruntime build to verify; make one with: {command}")
    with contextlib.closing(opened.executor(directory)) as executor:
        stages = {name: DeviceStage(opened.layer, engine) for name, engine in opened.stages(1).items()}
        party = Party(
            f"{directory.path}, {opened.name}",
            f"{directory.manifest.engine_id}+{opened.build.key}",
            onnx_precision(directory),
            opened.precision,
        )
        try:
            yield Side(party, directory.manifest, stages, lambda *run: score_whole(directory.manifest, executor, *run))
        finally:
            for stage in stages.values():
                stage.close()


class DeviceStage:
    """An engine that reads and writes arrays of the host. For one thread; close it before its layer.

    Only the last shapes stay bound: scratch memory is as large as the profile asks for, and images differ in size.
    """

    def __init__(self, layer: Layer, stage: LoadedStage) -> None:
        self._layer, self._stage = layer, stage
        self._bound: _Bound | None = None

    def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
        """Return a call that uploads the inputs, runs the engine and downloads the outputs asked for."""
        layer = self._layer
        shapes = {name: array.shape for name, array in inputs.items()}

        def call() -> None:
            layer.enter()
            bound = self._bound_to(shapes)
            for name, array in inputs.items():
                layer.upload(bound.addresses[name], array.astype(bound.dtypes[name], order="C"))
            assert bound.stage is not None  # noqa: S101 — bound
            bound.stage.enqueue()
            found = {name: np.empty(array.shape, bound.dtypes[name]) for name, array in outputs.items()}
            for name, array in found.items():
                layer.download(array, bound.addresses[name])
            layer.synchronise()
            for name, array in found.items():
                outputs[name][...] = array

        return call

    def close(self) -> None:
        """Wait for the GPU, then free the context and its memory."""
        bound, self._bound = self._bound, None
        if bound is None:
            return
        with contextlib.suppress(BackendError, MemoryError):  # an earlier failure has been reported already
            self._layer.enter()
            self._layer.synchronise()
        if bound.stage:
            bound.stage.close()
        for address in bound.owned:
            with contextlib.suppress(BackendError):
                self._layer.free(address)

    def _bound_to(self, shapes: dict[str, tuple[int, ...]]) -> "_Bound":
        if self._bound is not None and self._bound.shapes == shapes:
            return self._bound
        self.close()
        built = self._stage.built
        profile = choose_profile(built.profiles, shapes)
        if profile is None:
            raise NotForShapesError(
                f"no profile of the {built.name} engine takes {shapes}; verify with images of a size it was built for, "
                f"or build again with iqa-build --sizes"
            )
        sizes = built.sizes(shapes)
        specs = (*built.inputs, *built.outputs)
        # Set first, so that `close` frees what was allocated even if the rest fails.
        bound = self._bound = _Bound(shapes, {spec.name: np.dtype(_DTYPES[spec.dtype]) for spec in specs})
        try:
            for spec in specs:
                needed = math.prod(spec.at(sizes)) * ITEM_BYTES[spec.dtype]
                bound.addresses[spec.name] = self._allocated(bound, needed)
            bound.stage = self._stage.bind(profile, shapes, bound.addresses)
            if needed := bound.stage.activation_bytes:
                bound.stage.use_activation(self._allocated(bound, needed), needed)
        except MemoryError as exc:
            raise BackendError(f"{exc}; verify smaller images, or with --mode crop") from exc
        return bound

    def _allocated(self, bound: "_Bound", size: int) -> int:
        bound.owned.append(self._layer.allocate(size))
        return bound.owned[-1]


@dataclass
class _Bound:
    """A context with its memory."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype[Any]]
    addresses: dict[str, int] = field(default_factory=dict)
    owned: list[int] = field(default_factory=list)
    stage: BoundStage | None = None


def score_whole(
    manifest: Manifest, executor: DeviceExecutor, image: Planes, plan: Plan, seed: int
) -> tuple[float, bool | None, str]:
    """Score an image as `iqa-run` does: without a graph, then captured, then replayed. Returns what a `Whole` does."""
    try:
        first = executor.run(image, plan, seed, form=Form.NONE)
        captured, replayed = (executor.run(image, plan, seed, form=Form.LOOP) for _ in range(2))
    except MemoryError as exc:
        raise BackendError(f"not enough GPU memory for a whole score: {exc}") from exc
    note = next((text for text in (*captured.notes, *replayed.notes) if "without a CUDA graph" in text), "")
    same = None if note else _equal(first, captured) and _equal(first, replayed)
    return total_score(manifest, *branch_scores(first)), same, note


def _equal(mine: Outcome, other: Outcome) -> bool:
    """Whether every score and every crop is the same, bit for bit; NaN equals NaN."""
    sides = ((outcome.crops, *branch_scores(outcome)) for outcome in (mine, other))
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*sides, strict=True))
