"""The bundle, our own weights file: weights, their configuration, the files they were made from, and notes.

`.safetensors` carries the description as JSON under the metadata key "diffiqa"; `.pt` is a dict of "diffiqa_format",
the other fields of `Bundle` and "weights".
"""

import contextlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..engine.codec import decode, encode
from ..engine.manifest import Source
from ..errors import CheckpointError, ConfigError, OutputError, UsageError
from .config import ModelConfig
from .network import DiffV2IQA
from .weightfile import listed, not_finite, shown

FORMAT = 1


@dataclass(frozen=True)
class Bundle:
    """What a bundle says about itself. `sources` and `notes` are those of the files it was made from."""

    format: int
    config: ModelConfig
    sources: tuple[Source, ...] = ()
    notes: tuple[str, ...] = ()


def save_bundle(
    model: DiffV2IQA,
    path: Path,
    *,
    half: bool = False,
    sources: Iterable[Source] = (),
    notes: Iterable[str] = (),
) -> None:
    """Write weights and configuration to a `.safetensors` or `.pt` file, atomically. `half` stores float16.

    Raises UsageError (another suffix), OutputError (cannot be written) or CheckpointError (weights not finite).
    """
    write = {".safetensors": _write_safetensors, ".pt": _write_torch}.get(path.suffix)
    if write is None:
        raise UsageError(f"{path} must end in .safetensors or .pt")
    dtype = torch.float16 if half else torch.float32
    weights = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    if broken := not_finite(weights):
        raise CheckpointError(f"{path} not saved: weights that are not finite as {dtype}: {listed(broken)}")
    # Beside the target, so that the last step is one rename: a reader sees the old file or the new one, never half.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary, Bundle(FORMAT, model.config, tuple(sources), tuple(notes)), weights)
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as exc:  # torch and safetensors wrap a full disk
        raise OutputError(f"cannot write {path}: {exc}") from exc
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


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
    return bundle


def _write_safetensors(path: Path, bundle: Bundle, weights: dict[str, Tensor]) -> None:
    safetensors.torch.save_file(weights, path, {"diffiqa": json.dumps(encode(bundle), ensure_ascii=False)})


def _write_torch(path: Path, bundle: Bundle, weights: dict[str, Tensor]) -> None:
    description = encode(bundle)
    with path.open("wb") as file:  # given a path, torch would put the temporary name into the archive
        torch.save({"diffiqa_format": description.pop("format"), **description, "weights": weights}, file)
