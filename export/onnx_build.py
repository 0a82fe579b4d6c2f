"""Builds for ONNX Runtime on a GPU: the cast stages themselves, portable as the float32 stages are."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import onnx

from ..engine.manifest import EngineDirectory, Library, Precision, Stage
from ..errors import UsageError
from ..runtime.host.onnx_stage import version
from .maker import Made, Profiles, typed_signature


class OnnxMaker:
    """Writes strongly typed ONNX, as TensorRT gets it. Whoever runs it fixes the sizes."""

    library, suffix, folder, machine_code = Library.ONNXRUNTIME, ".onnx", "onnxruntime", False
    precision: Precision = Precision.FP16
    capabilities: tuple[str, ...] = ()
    batches: tuple[str, ...] = ()

    def __init__(self, compute_capabilities: tuple[str, ...]) -> None:
        if compute_capabilities:
            raise UsageError(f"{self.library} builds are for every GPU; leave --compute-capability out")
        self.version = version()
        self._lines: list[str] = []

    @contextlib.contextmanager
    def building(self, _directory: EngineDirectory, _known_timings: bytes) -> Iterator[None]:
        """Begin a build."""
        self._lines = []
        yield

    def make(
        self, stage: Stage, typed: onnx.ModelProto, dtypes: dict[str, str], _profiles: Profiles, file: Path
    ) -> Made:
        """Write the cast stage."""
        onnx.save_model(typed, file)
        self._lines.append(f"{stage.name}: {len(typed.graph.node)} nodes, opset {typed.opset_import[0].version}\n")
        return Made(*typed_signature(stage, dtypes))

    def log(self) -> str:
        """Return a line for each stage."""
        return "".join(self._lines)

    def timings(self) -> None:
        """Return None: nothing is measured."""
