"""Stages in OpenVINO on the CPU, compiled for each shape that they get."""

import functools
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ...engine.manifest import EngineDirectory, StageName
from ...errors import BackendError, UsageError
from ..executor import Call
from .onnx_stage import available_cpus
from .stages import OnHost, OnTheHost, load_files, refuse_count

FloatArray = npt.NDArray[np.float32]
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}  # and OpenVINO's word for each
_IMPORT = threading.Lock()


@dataclass(frozen=True)
class OpenVino(OnTheHost):
    """OpenVINO on the CPU, and its settings."""

    key: ClassVar[str] = "openvino"
    title: ClassVar[str] = "OpenVINO"

    threads: int | None = None
    precision: str = "fp32"  # of the U-Net's float32 parts; 8-bit parts stay 8-bit, the heads stay float32
    shapes: int = 4  # compiled forms to keep per stage; each holds weights, and takes half a second or more to make

    def __post_init__(self) -> None:
        """Refuse values that OpenVINO would misread."""
        refuse_count("threads", self.threads)
        refuse_count("shapes", self.shapes)
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision must be {' or '.join(PRECISIONS)}, not {self.precision!r}")

    @property
    def name(self) -> str:
        """Its name in records. Raises BackendError if it is not installed, or the CPU lacks the precision."""
        if self.precision == "bf16" and "BF16" not in _capabilities():
            raise BackendError(
                "this CPU has no bfloat16 arithmetic that OpenVINO uses (AVX512_BF16 or AMX); ask for precision fp32"
            )
        version = str(_openvino().__version__).partition("-")[0]
        return f"openvino {version}: CPU, {'fp32' if self.precision == 'fp32' else f'U-Net in {self.precision}'}"

    def load_stage(self, path: Path, stage: StageName) -> "OpenVinoStage":
        """Load one stage: the U-Net in the precision asked for, the heads in float32.

        The U-Net takes nearly all the time. Heads in bf16 would change scores much more than the U-Net does, and save
        no time that can be measured.
        """
        return OpenVinoStage(path, self if stage is StageName.UNET else replace(self, precision="fp32"))

    def load(self, directory: EngineDirectory) -> OnHost:
        """Load the stages; an executor then owns them. Raises BackendError for bf16 without a U-Net."""
        if self.precision == "bf16" and directory.manifest.stage(StageName.UNET) is None:
            raise BackendError("only a U-Net is computed in bf16, and this engine has none; ask for precision fp32")
        return load_files(directory, self)


class OpenVinoStage:
    """One ONNX file, compiled at the first `bind` of a shape. Several threads may use `bind` and its calls.

    It keeps the forms that were used last: many sizes then do not fill the memory, and a few are compiled only once.
    """

    def __init__(self, path: Path, settings: OpenVino) -> None:
        _ = settings.name  # says what is missing
        self._path, self._kept = path, settings.shapes
        self._config = {
            # By default OpenVINO computes a float32 model in bfloat16 if the CPU has it.
            "INFERENCE_PRECISION_HINT": PRECISIONS[settings.precision],
            "INFERENCE_NUM_THREADS": settings.threads or available_cpus(),
            "PERFORMANCE_HINT": "LATENCY",
            # Pinning saves no time, and would pin two processes to the same cores.
            "ENABLE_CPU_PINNING": False,
            # Only the engine decides which activations are 8-bit.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        }
        self._compiled: OrderedDict[str, Any] = OrderedDict()  # by shapes, the one used last at the end
        self._lock = threading.Lock()
        try:
            # Read only once: so the file that was checked is the one that runs, for every shape.
            self._model = _core().read_model(path)
        except Exception as exc:  # openvino's exceptions share no base class
            raise BackendError(f"openvino cannot load {path}: {_reason(exc)}") from exc
        inputs, outputs = (
            {port.get_any_name(): _sizes(port.get_partial_shape()) for port in ports}
            for ports in (self._model.inputs, self._model.outputs)
        )
        self._signature = inputs, outputs

    def signature(self) -> tuple[dict[str, list[int | None]], dict[str, list[int | None]]]:
        """Return the shapes of inputs and outputs by name. A free size is None: OpenVINO drops its name."""
        return self._signature

    def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
        """Return a call that runs the stage on these arrays. The call keeps them alive."""
        arrays = {**inputs, **outputs}
        for key, array in arrays.items():
            if not array.flags.c_contiguous or array.dtype != np.float32:
                raise ValueError(f"{key} must be a C-contiguous float32 array")
        shapes = {key: list(array.shape) for key, array in inputs.items()}
        try:
            request = self._form(shapes).create_infer_request()
            for key, array in arrays.items():
                request.set_tensor(key, _openvino().Tensor(array, shared_memory=True))
        except (MemoryError, BackendError):
            raise
        except Exception as exc:
            raise BackendError(f"openvino cannot run {self._path.name} on {shapes}: {_reason(exc)}") from exc

        def call() -> None:
            assert arrays  # noqa: S101 — the tensors have only their addresses, so this closure keeps the arrays alive
            try:
                request.infer(share_outputs=True)  # otherwise it returns a copy of every output
            except MemoryError:
                raise
            except Exception as exc:
                raise BackendError(f"openvino failed in {self._path.name}: {_reason(exc)}") from exc

        return call

    def _form(self, shapes: dict[str, list[int]]) -> Any:
        """Return the stage compiled for these shapes. Other threads wait, so that none compiles it again."""
        key = str(sorted(shapes.items()))
        with self._lock:
            if key not in self._compiled:
                while len(self._compiled) >= self._kept:  # first, as the new form takes memory
                    self._compiled.popitem(last=False)
                self._model.reshape(shapes)
                form = _core().compile_model(self._model, "CPU", self._config)
                asked, got = self._config["INFERENCE_PRECISION_HINT"], form.get_property("INFERENCE_PRECISION_HINT")
                if got.get_type_name() != asked:
                    raise BackendError(f"openvino computes {self._path.name} in {got.get_type_name()}, not in {asked}")
                self._compiled[key] = form
            self._compiled.move_to_end(key)
            return self._compiled[key]


def _capabilities() -> list[str]:
    return list(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


@functools.cache
def _core() -> Any:
    return _openvino().Core()


def _sizes(shape: Any) -> list[int | None]:
    return [dimension.get_length() if dimension.is_static else None for dimension in shape]


def _reason(exc: Exception) -> str:
    """Return the message of an OpenVINO exception: its last line, as the first ones name places in its source."""
    return next((line.strip() for line in reversed(str(exc).splitlines()) if line.strip()), type(exc).__name__)


def _openvino() -> Any:
    """Import OpenVINO without its telemetry."""
    with _IMPORT:
        loaded: dict[str, Any] = sys.modules  # None in it forbids an import
        before = loaded.get("openvino_telemetry")
        if "openvino" not in loaded:
            # The import alone reports to Intel, unless the user once ran `opt_in_out --opt_out`. If this package cannot
            # be imported, openvino uses its own stub from then on.
            loaded["openvino_telemetry"] = None
        try:
            import openvino
        except ModuleNotFoundError as exc:
            if exc.name != "openvino":
                raise
            raise BackendError("openvino is not installed; install it with: pip install 'diffiqa[openvino]'") from exc
        finally:
            if before is not None:
                loaded["openvino_telemetry"] = before
            elif "openvino_telemetry" in loaded and loaded["openvino_telemetry"] is None:
                del loaded["openvino_telemetry"]
    return openvino
