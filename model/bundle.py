"""The bundle, our own weights file: weights, their configuration, the files they were made from, and notes.

`.safetensors` carries the description as JSON under the metadata key "diffiqa"; `.pt` is a dict of "diffiqa_format",
the other fields of `Bundle` and "weights".
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from ..engine.atomic import replacing
from ..engine.codec import LATER, decode, encode
from ..engine.manifest import Source
from ..engine.reference import Reference
from ..errors import CheckpointError, ConfigError, OutputError, UsageError
from .config import ModelConfig
from .weightfile import listed, not_finite, shown

# What a bundle of each format is. To a version of diffiqa that knows fewer of them, the others are too new.
FORMATS = {1: "a Diff-V²-IQA checkpoint", 2: "a PFD-IQA checkpoint", 3: "a file of prompts"}
C = TypeVar("C")
B = TypeVar("B", bound="Description[Any]")


@dataclass(frozen=True)
class Description(Generic[C]):
    """What a bundle says about itself. `sources` and `notes` are those of the files it was made from.

    `reference` says what scores of this configuration with these weights mean to a person.
    """

    FORMAT: ClassVar[int]

    format: int
    config: C
    sources: tuple[Source, ...] = ()
    notes: tuple[str, ...] = ()
    reference: Reference | None = field(default=None, metadata=LATER)


@dataclass(frozen=True)
class Bundle(Description[ModelConfig]):
    """A bundle of Diff-V²-IQA."""

    FORMAT = 1

    config: ModelConfig


def save_bundle(
    model: nn.Module,
    path: Path,
    *,
    kind: type[Description[Any]] = Bundle,
    half: bool = False,
    sources: Iterable[Source] = (),
    notes: Iterable[str] = (),
    reference: Reference | None = None,
) -> None:
    """Write weights and configuration to a `.safetensors` or `.pt` file, atomically. `half` stores float16.

    `kind` is that of the model. Raises UsageError (another suffix), OutputError (cannot be written) or CheckpointError
    (weights not finite).
    """
    bundle = kind(kind.FORMAT, model.config, tuple(sources), tuple(notes), reference)
    write_bundle(bundle, model.state_dict(), path, half=half)


def write_bundle(bundle: Description[Any], weights: Mapping[str, Tensor], path: Path, *, half: bool = False) -> None:
    """Write a bundle of any format as `save_bundle` does.

    Raises UsageError (another suffix), OutputError (cannot be written) or CheckpointError (weights not finite).
    """
    if path.suffix not in {".safetensors", ".pt"}:
        raise UsageError(f"{path} must end in .safetensors or .pt")
    dtype = torch.float16 if half else torch.float32
    weights = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in weights.items()
    }
    if broken := not_finite(weights):
        raise CheckpointError(f"{path} not saved: weights that are not finite as {dtype}: {listed(broken)}")
    try:
        with replacing(path) as stream:
            if path.suffix == ".pt":
                description = encode(bundle)
                torch.save({"diffiqa_format": description.pop("format"), **description, "weights": weights}, stream)
            else:
                metadata = {"diffiqa": json.dumps(encode(bundle), ensure_ascii=False)}
                stream.write(safetensors.torch.save(weights, metadata))
    except (OSError, RuntimeError) as exc:  # torch wraps a full disk
        raise OutputError(f"cannot write {path}: {getattr(exc, 'strerror', None) or exc}") from exc


def read_description(path: Path, data: Mapping[str, object], kind: type[B] = Bundle) -> B:  # type: ignore[assignment]
    """Check what the bundle at `path` says about itself; raises CheckpointError, also if it is of another kind."""
    found = next((known for known in FORMATS if known == data.get("format")), None)
    if found is None:
        version = shown(str(data.get("format")))
        newest = max(FORMATS)
        raise CheckpointError(f"{path} is a diffiqa bundle of format {version}; this version reads {newest}: update")
    check_format(path, found, kind.FORMAT)

    def damaged(message: str) -> CheckpointError:
        return CheckpointError(f"{path} is a damaged diffiqa bundle: {shown(message)}")

    try:
        bundle = decode(kind, data, "bundle", damaged)
    except ConfigError as exc:
        raise damaged(str(exc)) from exc
    texts = [*bundle.notes, *(text for s in bundle.sources for text in (s.role, s.name, s.sha256, s.format))]
    if not all(text.isprintable() for text in texts):  # they end up in terminals and reports
        raise damaged("its sources or notes are not plain text")
    if bundle.reference and bundle.reference.problem:
        raise damaged(f"its reference {bundle.reference.problem}")
    return bundle


class OtherFormatError(CheckpointError):
    """A bundle is of another format than the one that is wanted."""

    def __init__(self, message: str, found: int) -> None:
        super().__init__(message)
        self.found = found


def check_format(path: Path, found: int, wanted: int) -> None:
    """Refuse a file of another format than the one that is wanted. Raises OtherFormatError."""
    if found != wanted:
        raise OtherFormatError(f"{path} is {FORMATS[found]}; this command wants {FORMATS[wanted]}", found)
