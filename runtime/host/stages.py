"""Loads the stages of an engine on the host. It refuses a file that differs from its manifest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ...engine.manifest import EngineDirectory, Manifest, StageName
from ...errors import EngineError
from ..executor import Opened, StageRunner
from .executor import HostExecutor

Shapes = Mapping[str, list[int | str]] | Mapping[str, list[int | None]]


class HostStage(StageRunner, Protocol):
    """A loaded stage that knows its shapes."""

    def signature(self) -> tuple[Shapes, Shapes]:
        """Return the shapes of inputs and outputs by name. A free size is its name, or None if that is unknown."""


class StageLoader(Protocol):
    """A backend that loads stages on the host: `OnnxRuntime` or `OpenVino`."""

    @property
    def name(self) -> str:
        """Its name in records. Raises BackendError if this machine does not have it."""

    def load(self, path: Path, stage: StageName) -> HostStage:
        """Load one stage."""


def open_on_host(directory: EngineDirectory, backend: StageLoader) -> Opened:
    """Load an engine on the host, ready to carry out plans."""
    name = backend.name
    return Opened(HostExecutor(directory.manifest, load_stages(directory, backend)), name)


def load_stages(directory: EngineDirectory, backend: StageLoader) -> dict[StageName, StageRunner]:
    """Load every stage of an engine. Shapes decide what is allocated: file, manifest and model must agree on them."""
    wanted = _expected_inputs(directory.manifest)
    stages: dict[StageName, StageRunner] = {}
    for stage in directory.manifest.stages:
        path = directory.file(stage.file)
        listed = tuple({spec.name: list(spec.shape) for spec in specs} for specs in (stage.inputs, stage.outputs))
        loaded = backend.load(path, stage.name)
        if not all(map(_agree, loaded.signature(), listed)) or listed[0] != wanted[stage.name]:
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


def _expected_inputs(m: Manifest) -> dict[StageName, dict[str, list[int | str]]]:
    """Return the input shapes that each stage of such a model must have."""
    kinds, size = len(m.kinds), m.crop.size
    image: list[int | str] = ["B", 3, "H", "W"]
    vit = m.stage(StageName.VIT)
    maps = vit.outputs[0].shape[1:] if vit and vit.outputs else ()
    return {
        StageName.UNET: {"y": image, "condition": image, "noise_level": ["B", 1]},
        StageName.VIT: {"image": ["N", 3, size, size]},
        StageName.VCG: {"maps": ["B", kinds, *maps]},
        StageName.VDA: {"images": ["B", kinds, 3, size, size]},
    }
