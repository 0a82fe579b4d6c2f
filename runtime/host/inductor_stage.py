"""Stages that PyTorch's compiler made for this CPU."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from ...engine.manifest import Build, BuiltStage, EngineDirectory
from ...errors import BackendError, first_line
from ..builds import NotForShapesError, choose_profile, rebuild_command
from ..executor import Call
from ..inductor import Package, cpu_target, fitting_build, packages, torch
from .onnx_stage import available_cpus
from .stages import OnHost, OnTheHost, refuse_count

if TYPE_CHECKING:
    from torch import Tensor

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Inductor(OnTheHost):
    """PyTorch's compiler on the CPU: the newest build in the engine directory that was made on this machine."""

    key: ClassVar[str] = "inductor"
    title: ClassVar[str] = "PyTorch Inductor"

    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is no number of threads."""
        refuse_count("threads", self.threads)

    @property
    def name(self) -> str:
        """Its name, but for the precision of a build. Raises BackendError if PyTorch is not installed."""
        return f"inductor {torch().__version__}: CPU"

    def load(self, directory: EngineDirectory) -> OnHost:
        """Load the build; an executor then owns it. Raises BackendError or EngineError with the way out."""
        build = fitting_build(directory, cpu_target())
        loaded = packages(directory, build, None)
        threads = self.threads or available_cpus()
        stages = {made.name: InductorStage(directory, build, made, loaded[made.name], threads) for made in build.stages}
        return OnHost(stages, f"inductor {build.version} {build.precision}: CPU", build.precision, build)


class InductorStage:
    """One compiled stage. Several threads may use `bind` and its calls: they share its code, but no buffers."""

    def __init__(
        self, directory: EngineDirectory, build: Build, built: BuiltStage, package: Package, threads: int
    ) -> None:
        self._directory, self._build, self._built = directory, build, built
        self._package, self._threads = package, threads

    def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
        """Return a call that runs the stage from and into these very arrays; outputs that are not given are dropped."""
        profile = choose_profile(self._built.profiles, {name: array.shape for name, array in inputs.items()})
        if profile is None:
            raise NotForShapesError(self._no_profile(inputs))
        form, module = self._package.form(profile), torch()
        dtypes = {spec.name: getattr(module, spec.dtype) for spec in (*self._built.inputs, *self._built.outputs)}
        given = [(module.from_numpy(inputs[spec.name]), dtypes[spec.name]) for spec in self._built.inputs]
        places = {n: spec.name for n, spec in enumerate(self._built.outputs) if spec.name in outputs}
        wanted = {n: module.from_numpy(outputs[name]) for n, name in places.items()}

        def call() -> None:
            module.set_num_threads(self._threads)  # of this thread: OpenMP keeps the number thread by thread
            try:
                results: list[Tensor] = list(form([tensor.to(dtype) for tensor, dtype in given]))
            except Exception as exc:  # whatever compiled code raises
                raise BackendError(f"torch failed in the {self._built.name} stage: {first_line(exc)}") from exc
            for n, tensor in wanted.items():
                tensor.copy_(results[n])

        return call

    def _no_profile(self, inputs: Mapping[str, FloatArray]) -> str:
        shape = next(iter(inputs.values())).shape
        if (image := inputs.get("y")) is None:
            command = rebuild_command(self._directory.path, self._build)
            return f"this build's {self._built.name} takes no inputs of shape {shape}; build it again with: {command}"
        height, width = image.shape[2:]
        command = rebuild_command(self._directory.path, self._build, more_sizes=(f"{height}x{width}",))
        return (
            f"this build's U-Net takes no images of {width}×{height}; use tile or crop mode, or build again with: "
            f"{command}"
        )
