"""The backends, which run an engine: one frozen type for each, with its own settings only.

    diffiqa.load("engine/")                                      the best that this machine has
    diffiqa.load("engine/", TensorRt(device=1, batch=8))         this one, or an error that says what is missing
    diffiqa.load("engine/", [TensorRt(), OnnxRuntime()])         the first of these that can be opened

To add a backend: a class with `key`, `title`, `on_gpu` and `open`, and a place in `BACKENDS`. Its fields are its
options.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from ..engine.manifest import EngineDirectory
from ..errors import UsageError
from .executor import Opened
from .host.inductor_stage import Inductor
from .host.onnx_stage import OnnxRuntime, Provider
from .host.openvino_stage import OpenVino

if TYPE_CHECKING:
    from .gpu.door import OnGpu

__all__ = [
    "BACKENDS",
    "Backend",
    "GpuBackend",
    "HostBackend",
    "Inductor",
    "InductorOnGpu",
    "OnnxOnGpu",
    "OnnxRuntime",
    "OpenVino",
    "TensorRt",
    "best",
]

# Modules below `gpu` are imported when a GPU backend is opened: most machines that score have none, and start sooner.


@dataclass(frozen=True)
class _OnGpu:
    """What the backends on a GPU share."""

    device: int = 0
    batch: int = 1  # images of one size, or seeds of one image, that are restored at a time
    cuda_graph: bool = True  # False: every kernel is launched by itself; scores are the same, it takes more CPU time

    on_gpu: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse what is no number of images or GPU."""
        for name, value, least in (("device", self.device, 0), ("batch", self.batch, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name} must be a whole number from {least} on, not {value!r}")

    def load(self, directory: EngineDirectory) -> "OnGpu":
        """Load the build; an executor then owns it."""
        raise NotImplementedError

    def open(self, directory: EngineDirectory) -> Opened:
        """Load an engine, ready to carry out plans."""
        return self.load(directory).ready(directory, cuda_graph=self.cuda_graph, batch=self.batch)


@dataclass(frozen=True)
class TensorRt(_OnGpu):
    """TensorRT or TensorRT-RTX on a GPU: the newest build in the engine directory that fits the GPU and the library."""

    key: ClassVar[str] = "tensorrt"
    title: ClassVar[str] = "TensorRT"

    def load(self, directory: EngineDirectory) -> "OnGpu":
        """Load the build; an executor then owns it."""
        from .gpu.door import open_tensorrt

        return open_tensorrt(directory, self.device)


@dataclass(frozen=True)
class InductorOnGpu(_OnGpu):
    """PyTorch's compiler on a GPU: the newest build in the engine directory that was made on this machine."""

    key: ClassVar[str] = "inductor-gpu"
    title: ClassVar[str] = "PyTorch Inductor on a GPU"

    def load(self, directory: EngineDirectory) -> "OnGpu":
        """Load the build; an executor then owns it."""
        from .gpu.door import open_inductor

        return open_inductor(directory, self.device)


@dataclass(frozen=True)
class OnnxOnGpu(_OnGpu):
    """ONNX Runtime on a GPU: the newest build for it in the engine directory, else the float32 stages as exported.

    With `cuda_graph`, ONNX Runtime captures each step of a build in a graph of its own.
    """

    providers: Sequence[Provider] = ("CUDAExecutionProvider",)
    session_config: Mapping[str, str] = field(default_factory=dict)  # any entry ONNX Runtime documents
    builds: bool = True  # False: the float32 stages even where there is a build

    key: ClassVar[str] = "onnxruntime-gpu"
    title: ClassVar[str] = "ONNX Runtime on a GPU"

    def load(self, directory: EngineDirectory) -> "OnGpu":
        """Load the stages; an executor then owns them."""
        from .gpu.door import open_onnxruntime

        how = {"cuda_graph": self.cuda_graph, "builds": self.builds}
        return open_onnxruntime(directory, self.device, self.providers, self.session_config, **how)


GpuBackend = TensorRt | InductorOnGpu | OnnxOnGpu
HostBackend = OnnxRuntime | OpenVino | Inductor
Backend = GpuBackend | HostBackend

# By their names in commands. `auto` tries them in this order, up to ONNX Runtime on the CPU. Users ask for the others
# by name: installing a package must not change scores.
BACKENDS: dict[str, type[Backend]] = {
    kind.key: kind for kind in (TensorRt, InductorOnGpu, OnnxOnGpu, OnnxRuntime, OpenVino, Inductor)
}

# The option behind each field that a command can set.
OPTIONS = {
    "device": "--device",
    "batch": "--batch",
    "cuda_graph": "--no-cuda-graph",
    "threads": "--threads",
    "providers": "--provider",
    "spinning": "--spin",
    "precision": "--cpu-precision",
}


def best(*, device: int = 0, batch: int = 1, cuda_graph: bool = True) -> tuple[Backend, ...]:
    """Return what `auto` tries: a GPU's backends, the fastest first; for a batch of 1, then the CPU."""
    on_gpu = tuple(kind(device, batch, cuda_graph) for kind in (TensorRt, InductorOnGpu, OnnxOnGpu))
    return on_gpu if batch > 1 else (*on_gpu, OnnxRuntime())


def from_options(
    name: str,
    *,
    device: int | None = None,
    batch: int = 1,
    no_cuda_graph: bool = False,
    threads: int | None = None,
    providers: Sequence[Provider] = (),
    spin: bool = False,
    cpu_precision: str | None = None,
) -> Backend | tuple[Backend, ...]:
    """Return the backend that a command's options name. Raises UsageError for an option of another backend."""
    given = {
        "device": device,
        "batch": batch if batch > 1 else None,
        "cuda_graph": False if no_cuda_graph else None,
        "threads": threads,
        "providers": providers or None,
        "spinning": spin or None,
        "precision": cpu_precision,
    }
    asked: dict[str, Any] = {option: value for option, value in given.items() if value is not None}
    if name != "auto":
        return _with_options(BACKENDS[name], asked, name)
    if of_the_host := [option for option in ("threads", "providers", "spinning") if option in asked]:
        return _with_options(OnnxRuntime, asked, f"{OnnxRuntime.key}, which {OPTIONS[of_the_host[0]]} asks for")
    _refuse_strangers(asked, _options(TensorRt), "auto")
    return best(**asked)


def _with_options(kind: type[Backend], asked: Mapping[str, Any], name: str) -> Backend:
    _refuse_strangers(asked, _options(kind), name)
    return kind(**asked)


def _options(kind: type[Backend]) -> set[str]:
    return {f.name for f in fields(kind)} & OPTIONS.keys()


def _refuse_strangers(asked: Mapping[str, Any], own: set[str], name: str) -> None:
    for option in asked:
        if option not in own:
            owners = [key for key, kind in BACKENDS.items() if option in _options(kind)]
            *others, last = owners
            whose = f"backends {', '.join(others)} and {last}" if others else f"backend {last}"
            raise UsageError(f"{OPTIONS[option]} is an option of the {whose}, not of {name}")
