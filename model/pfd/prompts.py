"""The vectors of distortions and quality levels: made offline from words, or those of another text encoder from a file.

A file of prompts is a bundle without a model: `distortions` and `levels`, one row of unit length for each word.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...engine.manifest import Source, file_sha256
from ...engine.npz import read_arrays
from ...errors import CheckpointError, ConfigError, UsageError
from ..bundle import Description, read_description, write_bundle
from ..weightfile import read, shown
from .config import MAX_SIZE, PfdConfig, Prompts, Words
from .text import TextEncoder

# LIQE's.
DISTORTION_TEMPLATES = ("a photo with {} artifacts",)
LEVEL_TEMPLATES = ("a photo with {} quality",)


@dataclass(frozen=True)
class PromptBundle(Description[Words]):
    """What a file of prompts says about itself."""

    FORMAT = 3

    config: Words


@dataclass(frozen=True)
class PromptSet:
    """Words, one vector of unit length (words, width) for each, and the file that the vectors come from."""

    words: Words
    distortions: Tensor
    levels: Tensor
    source: Source

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return int(self.levels.shape[1])

    def closest(self) -> tuple[str, str, float]:
        """Return the two words of one list whose vectors are closest, and their cosine."""
        found = []
        for words, vectors in ((self.words.distortions, self.distortions), (self.words.levels, self.levels)):
            cosines = (vectors @ vectors.T).fill_diagonal_(-2)
            a, b = divmod(int(cosines.argmax()), len(words))
            found.append((words[a], words[b], float(cosines[a, b])))
        return max(found, key=lambda pair: pair[2])


def make_prompts(
    encoder: TextEncoder,
    words: Words,
    distortion_templates: Sequence[str] = DISTORTION_TEMPLATES,
    level_templates: Sequence[str] = LEVEL_TEMPLATES,
) -> PromptSet:
    """Put every word into the templates, and average the vectors. Raises UsageError."""

    def vectors(of: Sequence[str], templates: Sequence[str]) -> Tensor:
        if wrong := [template for template in templates if template.count("{}") != 1]:
            raise UsageError(f"the template {shown(wrong[0])!r} must have one place for the word: {{}}")
        each = [torch.stack([encoder(template.replace("{}", word)) for template in templates]) for word in of]
        return F.normalize(torch.stack(each).mean(1), dim=1)

    file = encoder.file
    return PromptSet(
        words,
        vectors(words.distortions, distortion_templates),
        vectors(words.levels, level_templates),
        Source("prompts", file.path.name, file.bytes, file.sha256, "all-MiniLM-L6-v2"),
    )


def save_prompts(prompts: PromptSet, path: Path) -> None:
    """Write a file of prompts. Raises what `save_bundle` does."""
    bundle = PromptBundle(PromptBundle.FORMAT, prompts.words, (prompts.source,))
    write_bundle(bundle, {"distortions": prompts.distortions, "levels": prompts.levels}, path)


def read_prompts(path: Path, words: Words | None = None) -> PromptSet:
    """Read a file of prompts, or any text encoder's vectors (CLIP's, say), which may have any length.

    Such a file is safetensors with `distortions` and `levels`, or .npy with one array whose rows are the distortions',
    then the levels'. It does not name its `words`; None are the default ones. Raises CheckpointError.
    """
    origin = "features"
    if path.suffix == ".npy":
        words = words or Words()
        rows = _load_npy(path)
        parts = [rows[: len(words.distortions)], rows[len(words.distortions) :]]
        size, digest = path.stat().st_size, file_sha256(path)
    else:
        file = read(path)
        parts = [file.weights.get(name, torch.empty(0)) for name in ("distortions", "levels")]
        size, digest = file.bytes, file.sha256
        if file.bundle is not None:
            bundle = read_description(path, file.bundle, PromptBundle)
            words, origin = words or bundle.config, ", ".join(source.format for source in bundle.sources)
        words = words or Words()
    shapes = [tuple(part.shape) for part in parts]
    wanted = [len(words.distortions), len(words.levels)]
    width = max(shapes[0][-1:], default=0)
    if shapes != [(count, width) for count in wanted] or not 1 <= width <= MAX_SIZE:
        raise CheckpointError(
            f"{path} must have a row for each of {wanted[0]} distortions and {wanted[1]} levels, all of one width up "
            f"to {MAX_SIZE}; it has {shapes[0]} and {shapes[1]}"
        )
    parts = [part.float() for part in parts]
    if not all(part.isfinite().all() and part.any(dim=1).all() for part in parts):
        raise CheckpointError(f"{path} has rows that are zero, NaN or infinite")
    distortions, levels = (F.normalize(part, dim=1) for part in parts)
    return PromptSet(words, distortions, levels, Source("prompts", shown(path.name), size, digest, origin))


def _load_npy(path: Path) -> Tensor:
    try:
        rows = read_arrays(path).get("")
    except (OSError, ValueError) as exc:
        raise CheckpointError(f"cannot read {path} as an array: {exc}") from exc
    if rows is None or rows.dtype.kind != "f" or rows.ndim == 0:
        raise CheckpointError(f"{path} must hold one array of floats")
    return torch.from_numpy(rows.astype(np.float32))


def with_prompts(config: PfdConfig, prompts: PromptSet) -> PfdConfig:
    """Return a configuration that has these words as constants. Raises ConfigError if they are of another width."""
    if prompts.width != config.prompt_width:
        raise ConfigError(
            f"the prompts from {prompts.source.name} are {prompts.width} wide, model {config.name!r} wants "
            f"{config.prompt_width}: take those of another text encoder, or a configuration with their prompt_width"
        )
    return replace(config, prompts=Prompts.CONSTANT, words=prompts.words)
