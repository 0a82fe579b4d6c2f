"""The weights that a run begins with, and the provenance of those that it ends with."""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.outputs import make_folder
from ..engine.manifest import Source
from ..errors import CheckpointError, ConfigError
from ..model.bundle import save_bundle
from ..model.checkpoint import PARTS, load, load_part, misfits, part_of
from ..model.config import ModelConfig
from ..model.network import DiffV2IQA, build
from .plot import write_plot

PATCHES = "vcg.vit.patch_embed.proj.weight"


@dataclass
class Start:
    """A model, and where the weights of its parts come from. A part without a source holds seeded random numbers."""

    model: DiffV2IQA
    seed: int
    known: dict[str, Source] = field(default_factory=dict)

    def trained(self, part: str, what: str) -> None:
        """Note that `part` now holds weights that a run made."""
        if weights := _of_part(self.model, part):
            size = sum(tensor.nbytes for tensor in weights.values())
            self.known[part] = Source(part, PARTS[part][1], size, weights_digest(weights), what)

    @property
    def sources(self) -> tuple[Source, ...]:
        """What a bundle says of its weights; a part with the role "seed" has not been trained."""
        out = []
        for part, (_, words) in PARTS.items():
            weights = _of_part(self.model, part)
            if weights and part in self.known:
                out.append(self.known[part])
            elif weights:
                size = sum(tensor.nbytes for tensor in weights.values())
                out.append(Source("seed", words, size, "", f"initial values of seed {self.seed}"))
        return tuple(out)

    def save(self, folder: Path, note: str) -> None:
        """Write the bundle and the chart of a finished run. Raises OutputError."""
        save_bundle(self.model.cpu().eval(), folder / "model.safetensors", sources=self.sources, notes=[note])
        write_plot(folder)


def begin(config: ModelConfig, seed: int, files: Mapping[Path, tuple[str, ...]]) -> Start:
    """Build a model, and take parts of it from bundles. `files` says which of `PARTS`; () means all that a bundle has.

    A file of one part may also be another program's. A ViT for patches half or a quarter as large sees ours reduced.
    Parts that a bundle calls untrained are not taken. Raises CheckpointError if a part does not fit.
    """
    start = Start(build(config, seed), seed)
    for path, wanted in files.items():
        if len(wanted) == 1 and (foreign := load_part(path, wanted[0])):
            weights, start.known[wanted[0]] = foreign
            _take(start, path, wanted[0], weights)
            continue
        loaded = load(path)
        untrained = {source.name for source in loaded.sources if source.role == "seed"}
        taken = []
        for part in wanted or PARTS:
            theirs, ours = _of_part(loaded.model, part), _of_part(start.model, part)
            if not theirs or not ours or PARTS[part][1] in untrained:
                continue
            _take(start, path, part, theirs)
            start.known[part] = dataclasses.replace(loaded.sources[0], role=part)
            taken.append(part)
        if missing := [PARTS[part][1] for part in wanted if part not in taken]:
            raise CheckpointError(f"{path} has no trained {' or '.join(missing)} for model {config.name!r}")
    return start


def _take(start: Start, path: Path, part: str, weights: dict[str, Tensor]) -> None:
    """Put the weights of a part into the model. Raises CheckpointError if they do not fit."""
    ours = _of_part(start.model, part)
    if PATCHES in ours and PATCHES in weights:
        weights = weights | {PATCHES: _spread(weights[PATCHES], ours[PATCHES].shape[-1])}
    if problems := misfits(ours, weights):
        lines = "; ".join(f"{title}: {names[0]}" for title, names in problems.items())
        raise CheckpointError(f"{path}: its {PARTS[part][1]} does not fit model {start.model.config.name!r}: {lines}")
    start.model.load_state_dict(weights, strict=False)


def _spread(kernel: Tensor, side: int) -> Tensor:
    """Return a patch embedding that sees patches of `side` as this one sees them reduced, by a whole step."""
    step, rest = divmod(side, kernel.shape[-1])
    if rest or step < 1:
        return kernel
    return kernel.repeat_interleave(step, 2).repeat_interleave(step, 3) / step**2


def average(bundles: tuple[Path, Path], share: float, path: Path) -> None:
    """Write the average of two bundles of one configuration; `share` is that of the second.

    Runs that began alike can be averaged: what each learned adds up. Raises ConfigError or CheckpointError.
    """
    first, second = (load(bundle) for bundle in bundles)
    if not 0 <= share <= 1:
        raise ConfigError(f"the share of the second bundle must be between 0 and 1, not {share}")
    if first.model.config != second.model.config:
        raise ConfigError(f"{bundles[0]} and {bundles[1]} are of different configurations: there is no average")
    start = Start(first.model, 0, {source.role: source for source in first.sources if source.role in PARTS})
    one, other = first.model.state_dict(), second.model.state_dict()
    for part in PARTS:
        names = [name for name in one if part_of(name) == part and not torch.equal(one[name], other[name])]
        if not names:
            continue
        digests = [weights_digest({name: weights[name] for name in names})[:12] for weights in (one, other)]
        for name in names:
            if one[name].is_floating_point():
                one[name].lerp_(other[name], share)
        start.trained(part, f"{1 - share:g} of {digests[0]} and {share:g} of {digests[1]}, two runs that began alike")
    make_folder(path.parent)
    notes = [f"the average of two runs, {share:g} of the second"]
    save_bundle(start.model.eval(), path, sources=start.sources, notes=notes)


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors with their names, types and shapes."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _of_part(model: nn.Module, part: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if part_of(name) == part}
