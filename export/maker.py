"""What `builds.py` asks of a library that builds, and what such libraries share."""

import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnx

from ..engine.manifest import Check, EngineDirectory, Library, Precision, ShapeRange, Stage, TensorSpec

Profiles = tuple[dict[str, ShapeRange], ...]


@dataclass(frozen=True)
class Made:
    """The signature of a finished stage, and how far it is from float32, if the library could run it here."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    drift: tuple[Check, ...] = ()  # empty: that of the cast stage is all that is known


class Maker(Protocol):
    """A library that builds. It makes a file of each stage, all with the same settings."""

    library: Library
    version: str
    suffix: str  # of its files
    folder: str  # of its builds, in the engine directory
    machine_code: bool  # its files run on the CPU as they are, so a build is sealed
    capabilities: tuple[str, ...]  # what it builds for; none: portable
    precision: Precision  # where nothing else is asked for
    batches: tuple[str, ...]  # the same; none: its files take all batches and sizes

    def building(self, directory: EngineDirectory, known_timings: bytes) -> AbstractContextManager[None]:
        """Return what holds while stages are made. An earlier build for this GPU measured `known_timings`."""

    def make(
        self, stage: Stage, typed: onnx.ModelProto, dtypes: dict[str, str], profiles: Profiles, file: Path
    ) -> Made:
        """Write `file`. Raises ExportError with the library's own words."""

    def log(self) -> str:
        """Return what it said while building."""

    def timings(self) -> bytes | None:
        """Return what it measured; None if it measures nothing."""


def typed_signature(stage: Stage, dtypes: dict[str, str]) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return inputs and outputs of a stage that was cast as its plan says."""
    inputs, outputs = (
        tuple(dataclasses.replace(spec, dtype=dtypes[spec.name]) for spec in specs)
        for specs in (stage.inputs, stage.outputs)
    )
    return inputs, outputs
