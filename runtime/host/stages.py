"""Loads the stages of an engine on the host. It refuses a file that differs from its manifest."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from ...engine.manifest import Build, EngineDirectory, Precision, StageName, wiring
from ...errors import EngineError, UsageError
from ..executor import Opened, StageRunner
from .executor import HostExecutor

Shapes = Mapping[str, list[int | str]] | Mapping[str, list[int | None]]


class HostStage(StageRunner, Protocol):
    """A loaded stage that knows its shapes."""

    def signature(self) -> tuple[Shapes, Shapes]:
        """Return the shapes of inputs and outputs by name. A free size is its name, or None if that is unknown."""


class StageLoader(Protocol):
    """A backend that runs the ONNX files themselves: `OnnxRuntime` or `OpenVino`."""

    @property
    def name(self) -> str:
        """Its name in records. Raises BackendError if this machine does not have it."""

    def load_stage(self, path: Path, stage: StageName) -> HostStage:
        """Load one stage."""


@dataclass(frozen=True)
class OnHost:
    """An engine on the host, for an executor to take over."""

    stages: Mapping[StageName, StageRunner]
    name: str  # what records call it
    precision: Precision = Precision.FP32  # of the files
    build: Build | None = None  # whose files they are; None: the exported stages themselves

    def ready(self, directory: EngineDirectory) -> Opened:
        """Return it as `load` takes it."""
        return Opened(HostExecutor(directory.manifest, self.stages), self.name)


class OnTheHost:
    """What the backends on the CPU share. Their `threads` are None for as many as the CPUs this process may use."""

    on_gpu: ClassVar[bool] = False

    def load(self, directory: EngineDirectory) -> OnHost:
        """Load the stages; an executor then owns them."""
        raise NotImplementedError

    def open(self, directory: EngineDirectory) -> Opened:
        """Load an engine, ready to carry out plans."""
        return self.load(directory).ready(directory)


def refuse_count(name: str, value: int | None) -> None:
    """Raise UsageError for what is no number from 1 on."""
    if value is not None and (not isinstance(value, int) or value < 1):
        raise UsageError(f"{name} must be a whole number above 0, not {value!r}")


def load_files(directory: EngineDirectory, backend: StageLoader) -> OnHost:
    """Load the ONNX files of an engine with a backend that runs them."""
    name = backend.name
    return OnHost(load_stages(directory, backend), name)


def load_stages(directory: EngineDirectory, backend: StageLoader) -> dict[StageName, StageRunner]:
    """Load every stage of an engine. Shapes decide what is allocated: file, manifest and model must agree on them."""
    wanted = wiring(directory.manifest)
    stages: dict[StageName, StageRunner] = {}
    for stage in directory.manifest.stages:
        path = directory.file(stage.file)
        listed = tuple({spec.name: list(spec.shape) for spec in specs} for specs in (stage.inputs, stage.outputs))
        loaded = backend.load_stage(path, stage.name)
        if not all(map(_agree, loaded.signature(), listed)) or stage.takes != wanted[stage.name]:
            raise EngineError(
                f"{path} is not the {stage.name} stage that the manifest describes; export the engine again"
            )
        stages[stage.name] = loaded
    return stages


def _agree(found: Shapes, listed: Mapping[str, list[int | str]]) -> bool:
    """Return whether a file has the shapes of the manifest; a free size without a name matches any name."""
    return found.keys() == listed.keys() and all(
        len(found[name]) == len(shape)
        and all(
            have == want or (have is None and isinstance(want, str))
            for have, want in zip(found[name], shape, strict=True)
        )
        for name, shape in listed.items()
    )
