"""The bundle, our own weights file: weights, their configuration, the files they were made from, and notes.

`.safetensors` carries the description as JSON under the metadata key "diffiqa"; `.pt` is a dict of "diffiqa_format",
the other fields of `Bundle` and "weights".
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch

from ..engine.atomic import replacing
from ..engine.codec import LATER, decode, encode
from ..engine.manifest import Source
from ..engine.reference import Reference
from ..errors import CheckpointError, ConfigError, OutputError, UsageError
from .config import ModelConfig
from .network import DiffV2IQA
from .weightfile import listed, not_finite, shown

FORMAT = 1


@dataclass(frozen=True)
class Bundle:
    """What a bundle says about itself. `sources` and `notes` are those of the files it was made from.

    `reference` says what scores of this configuration with these weights mean to a person.
    """

    format: int
    config: ModelConfig
    sources: tuple[Source, ...] = ()
    notes: tuple[str, ...] = ()
    reference: Reference | None = field(default=None, metadata=LATER)


def save_bundle(
    model: DiffV2IQA,
    path: Path,
    *,
    half: bool = False,
    sources: Iterable[Source] = (),
    notes: Iterable[str] = (),
    reference: Reference | None = None,
) -> None:
    """Write weights and configuration to a `.safetensors` or `.pt` file, atomically. `half` stores float16.

    Raises UsageError (another suffix), OutputError (cannot be written) or CheckpointError (weights not finite).
    """
    if path.suffix not in {".safetensors", ".pt"}:
        raise UsageError(f"{path} must end in .safetensors or .pt")
    dtype = torch.float16 if half else torch.float32
    weights = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    if broken := not_finite(weights):
        raise CheckpointError(f"{path} not saved: weights that are not finite as {dtype}: {listed(broken)}")
    bundle = Bundle(FORMAT, model.config, tuple(sources), tuple(notes), reference)
    try:
        with replacing(path) as stream:
            if path.suffix == ".pt":
                description = encode(bundle)
                torch.save({"diffiqa_format": description.pop("format"), **description, "weights": weights}, stream)
            else:
                metadata = {"diffiqa": json.dumps(encode(bundle), ensure_ascii=False)}
                stream.write(safetensors.torch.save(weights, metadata))
    except (OSError, RuntimeError) as exc:  # torch wraps a full disk
        raise OutputError(f"cannot write {path}: {exc}") from exc


def read_description(path: Path, data: Mapping[str, object]) -> Bundle:
    """Check what the bundle at `path` says about itself; raises CheckpointError."""
    if data.get("format") != FORMAT:
        version = shown(str(data.get("format")))
        raise CheckpointError(f"{path} is a diffiqa bundle of format {version}; this version reads {FORMAT}: update")

    def damaged(message: str) -> CheckpointError:
        return CheckpointError(f"{path} is a damaged diffiqa bundle: {shown(message)}")

    try:
        bundle = decode(Bundle, data, "bundle", damaged)
    except ConfigError as exc:
        raise damaged(str(exc)) from exc
    texts = [*bundle.notes, *(text for s in bundle.sources for text in (s.role, s.name, s.sha256, s.format))]
    if not all(text.isprintable() for text in texts):  # they end up in terminals and reports
        raise damaged("its sources or notes are not plain text")
    if bundle.reference and bundle.reference.problem:
        raise damaged(f"its reference {bundle.reference.problem}")
    return bundle
