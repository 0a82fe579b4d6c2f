"""Stages through ONNX Runtime on the CPU (or whatever execution provider is asked for)."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ...engine.manifest import EngineDirectory, StageName
from ...errors import BackendError, UsageError, first_line
from ..executor import Call
from .stages import OnHost, OnTheHost, load_files, refuse_count

FloatArray = npt.NDArray[np.float32]
Provider = str | tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class OnnxRuntime(OnTheHost):
    """ONNX Runtime on the CPU, or on whatever execution provider is asked for; how it is set up."""

    key: ClassVar[str] = "onnxruntime"
    title: ClassVar[str] = "ONNX Runtime"

    threads: int | None = None
    providers: Sequence[Provider] = ("CPUExecutionProvider",)
    spinning: bool = False  # idle threads burn CPU for latency; wrong on a shared machine
    session_config: Mapping[str, str] = field(default_factory=dict)  # any entry ONNX Runtime documents
    deterministic: bool = False  # of kernels on a GPU; those of the CPU are
    as_written: bool = False  # for 8-bit stages that stand in for what TensorRT makes of them

    def __post_init__(self) -> None:
        """Refuse what ONNX Runtime would take for something else."""
        refuse_count("threads", self.threads)
        if isinstance(self.providers, str) or not self.providers:
            raise UsageError(f"providers must be a list of execution providers, not {self.providers!r}")

    @property
    def provider_names(self) -> list[str]:
        """The providers without their options, in order of preference."""
        return [provider if isinstance(provider, str) else provider[0] for provider in self.providers]

    @property
    def name(self) -> str:
        """What records call it. Raises BackendError where it is not installed."""
        return f"onnxruntime {version()}: {', '.join(self.provider_names)}"

    def load_stage(self, path: Path, _stage: StageName) -> "OnnxStage":
        """Load one stage; ONNX Runtime computes as the engine's files say."""
        return OnnxStage(path, self)

    def load(self, directory: EngineDirectory) -> OnHost:
        """Load the stages; an executor then owns them."""
        return load_files(directory, self)


def make_session(
    model: Path | bytes, settings: OnnxRuntime, name: str = "", *, sizes: Mapping[str, int] | None = None
) -> Any:
    """Return a session of a file or of a model in memory. Messages call it `name`, or by its path.

    `sizes` fixes free dimensions: all that depends on sizes alone is then computed when the session is made.
    """
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads or available_cpus()
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # errors reach the user as exceptions
    options.use_deterministic_compute = settings.deterministic
    if settings.as_written:
        # ONNX Runtime 1.31 would change results otherwise: fused Q/DQ rounds values that TensorRT does not round; Q/DQ
        # moved past other nodes cannot run in fp8; and beyond the basic optimisations it silently drops a ReLU before
        # fp8.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    # A memory pattern reserves the peak of each shape. Without patterns a 720×720 image takes half the memory, and no
    # more time.
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if settings.spinning else "0")
    for dimension, size in (sizes or {}).items():
        options.add_free_dimension_override_by_name(dimension, size)
    available = ort.get_available_providers()
    if missing := set(settings.provider_names) - set(available):
        raise BackendError(f"this onnxruntime has no {', '.join(sorted(missing))}; it has {', '.join(available)}")
    try:
        for key, value in settings.session_config.items():
            options.add_session_config_entry(key, value)
        session = ort.InferenceSession(model, options, providers=list(settings.providers))
    except Exception as exc:  # onnxruntime's exceptions share no base class
        what = name or (model if isinstance(model, Path) else "a model")
        raise BackendError(f"onnxruntime cannot load {what}: {first_line(exc)}") from exc
    in_use = session.get_providers()
    if in_use[0] != settings.provider_names[0]:
        # If a provider cannot start, onnxruntime only warns and computes elsewhere.
        raise BackendError(f"onnxruntime cannot run {settings.provider_names[0]} here, only {', '.join(in_use)}")
    return session


class OnnxStage:
    """One loaded ONNX file. Several threads may use `bind` and its calls: they share the session, but no buffers."""

    def __init__(self, path: Path, settings: OnnxRuntime, *, sizes: Mapping[str, int] | None = None) -> None:
        self.session = make_session(path, settings, sizes=sizes)
        self._path = path

    def signature(self) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Return the shapes of inputs and outputs by name, as the file has them."""
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        return {v.name: v.shape for v in inputs}, {v.name: v.shape for v in outputs}

    def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
        """Return a call that runs the stage from and into these very arrays; the call keeps them alive."""
        binding = self.session.io_binding()
        held = (dict(inputs), dict(outputs))
        for bind, arrays in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for name, array in arrays.items():
                if not array.flags.c_contiguous or array.dtype != np.float32:
                    raise ValueError(f"{name} must be a C-contiguous float32 array")
                bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)

        def call() -> None:
            assert held  # noqa: S101 — the closure keeps the arrays alive that the binding points into
            try:
                self.session.run_with_iobinding(binding)
            except Exception as exc:
                raise BackendError(f"onnxruntime failed in {self._path.name}: {first_line(exc)}") from exc

        return call


def available_cpus() -> int:
    """Return how many CPUs this process may use: its affinity, cut down to the cgroup's quota."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota_file, period_file in (
        ("/sys/fs/cgroup/cpu.max", None),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    ):
        try:
            words = Path(quota_file).read_text(encoding="ascii").split()
            if period_file:
                words += Path(period_file).read_text(encoding="ascii").split()
            quota, period = float(words[0]), float(words[1])
        except (OSError, ValueError, IndexError):
            continue  # no such cgroup version here, or no limit ("max")
        if quota > 0 and period > 0:
            cpus = min(cpus, max(1, round(quota / period)))
    return cpus


def providers_here() -> list[str]:
    """Return the execution providers of the installed onnxruntime; whether they can start is another question."""
    return list(_onnxruntime().get_available_providers())


def version() -> str:
    """Return the version of the installed onnxruntime."""
    return str(_onnxruntime().__version__)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as exc:
        if exc.name != "onnxruntime":
            raise
        raise BackendError("onnxruntime is not installed; install it with: pip install 'diffiqa[cpu]'") from exc
    return onnxruntime
