"""Files → a `PfdIQA` with every weight in place: our bundles, and encoders of other programs to begin training with."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...engine.manifest import Source
from ...engine.reference import Reference
from ...errors import CheckpointError, UsageError
from ..bundle import Bundle, Description, OtherFormatError, check_format, read_description
from ..checkpoint import COUNTER, Loaded, Setting, copied, misfits, reference_for
from ..checkpoint import load as load_diff_v2_iqa
from ..naming import DEIQT, IQA, LITE0, MANIQA, PLAIN, SR3, adapt, recognise
from ..weightfile import WeightFile, listed, read, shown
from .config import PFD_PRESETS, Backbone, PfdConfig
from .encoder import LiteEncoder
from .network import PfdIQA, build
from .prompts import PromptSet, with_prompts

DIFF_V2_IQA = (IQA, MANIQA, SR3, PLAIN)


@dataclass(frozen=True)
class PfdBundle(Description[PfdConfig]):
    """A bundle of PFD-IQA."""

    FORMAT = 2

    config: PfdConfig


@dataclass(frozen=True)
class LoadedPfd:
    """A float32 model in eval mode, the files it was made from, and notes on what is untrained."""

    model: PfdIQA
    sources: tuple[Source, ...]
    notes: tuple[str, ...]
    settings: tuple[Setting, ...] = ()
    reference: Reference | None = None


def load(path: Path) -> LoadedPfd:
    """Load a bundle of PFD-IQA. Raises CheckpointError, also if it is of Diff-V²-IQA."""
    file = read(path)
    if file.bundle is None:
        form = recognise(file.weights)
        if form in DIFF_V2_IQA:
            check_format(path, Bundle.FORMAT, PfdBundle.FORMAT)
        raise CheckpointError(f"{path} is no bundle of PFD-IQA, but {form.words if form else 'some other network'}")
    bundle = read_description(path, file.bundle, PfdBundle)
    with torch.device("meta"):
        model = PfdIQA(bundle.config)
    weights = {name.replace("encoder.lite0.", "encoder.lite."): tensor for name, tensor in file.weights.items()}
    _fill(model, file, weights, model.state_dict())
    source = Source("bundle", shown(path.name), file.bytes, file.sha256, "diffiqa bundle")
    return LoadedPfd(model.eval(), (source, *bundle.sources), bundle.notes, reference=bundle.reference)


def load_either(
    ckpt: Path | None, *, preset: str | None = None, seed: int | None = None, **given: Any
) -> Loaded | LoadedPfd:
    """Load a checkpoint of either family, as `checkpoint.load` does; of PFD-IQA a bundle, or a preset with a seed.

    Raises UsageError where PFD-IQA is given an option that is for Diff-V²-IQA alone.
    """
    begun = preset if preset in PFD_PRESETS else None
    if not begun:
        try:
            return load_diff_v2_iqa(ckpt, preset=preset, seed=seed, **given)
        except OtherFormatError as exc:
            if exc.found != PfdBundle.FORMAT:
                raise
    reference = given.pop("reference", None)
    named = {**(given.pop("options", None) or {}), "options": given.pop("options_file", None), **given}
    stray = [name for name, value in {**named, "preset": None if begun else preset}.items() if value is not None]
    if stray:
        raise UsageError(f"{begun or ckpt} is PFD-IQA, which takes no {', '.join(f'--{name}' for name in stray)}")
    if begun and (ckpt or seed is None):
        raise UsageError(f"--preset {begun} is for an untrained model: give --seed N, and no checkpoint")
    if begun and seed is not None:
        fresh = begin(PFD_PRESETS[begun], seed)
        return replace(fresh, sources=(Source("seed", "everything", 0, "", f"initial values of seed {seed}"),))
    assert ckpt  # noqa: S101 — a bundle was refused above
    loaded = load(ckpt)
    return replace(loaded, reference=reference_for(reference, loaded.sources, str(ckpt))) if reference else loaded


def begin(config: PfdConfig, seed: int, *, encoder: Path | None = None, prompts: PromptSet | None = None) -> LoadedPfd:
    """Return a model to train: initial values of a seed, what another program's file of the encoder has, and prompts.

    DEIQT's file brings the decoder too. Raises CheckpointError if the file holds something else, ConfigError if the
    prompts are of another width.
    """
    model = build(with_prompts(config, prompts) if prompts else config, seed)
    sources: list[Source] = []
    notes: list[str] = []
    filled: set[str] = set()
    if prompts:
        model.prior.distortions.prompts.copy_(prompts.distortions)
        model.prior.levels.prompts.copy_(prompts.levels)
        sources.append(prompts.source)
        filled.add("the prompts")
    if encoder:
        source, parts, remarks = _fill_encoder(model, encoder)
        sources.append(source)
        notes += [f"{source.name}: {text}" for text in remarks]
        filled |= parts
    besides = f", but for {' and '.join(sorted(filled))}" if filled else ""
    return LoadedPfd(model, tuple(sources), (f"untrained: initial values of seed {seed}{besides}", *notes))


def _fill_encoder(model: PfdIQA, path: Path) -> tuple[Source, set[str], list[str]]:
    """Put another program's weights into a model; return the file, the parts that it had, and what was left out."""
    config = model.config
    file = read(path)
    form = recognise(file.weights)
    wanted = DEIQT if config.encoder is Backbone.VIT else LITE0
    if form is not wanted:
        has = form.words if form else "some other network"
        raise CheckpointError(f"{path} is {has}; model {config.name!r} wants an encoder of {wanted.words}")
    ours, remarks = adapt(form, file.weights, vit_blocks=0)
    used = {re.sub(r"^vda\.lite0\.", "encoder.lite.", name): tensor for name, tensor in ours.items()}
    if isinstance(model.encoder, LiteEncoder):
        variant, blocks = model.encoder.lite.variant, sum(name.endswith("._bn2.weight") for name in used)
        if blocks != variant.blocks:
            raise CheckpointError(
                f"{path} has {blocks} blocks, and {variant.name}, which model {config.name!r} wants, has "
                f"{variant.blocks}: give the file of that one"
            )
    parts = {_part(name) for name in used}
    expected = {name: tensor for name, tensor in model.state_dict().items() if _part(name) in parts}
    _fill(model, file, used, expected)
    return Source("encoder", shown(path.name), file.bytes, file.sha256, form.words), parts, remarks


def _part(name: str) -> str:
    """Return what a file has or lacks as a whole."""
    return "encoder.lite" if name.startswith("encoder.lite.") else name.partition(".")[0]


def _fill(model: PfdIQA, file: WeightFile, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Put weights into a model that expects these names and shapes. Raises CheckpointError with all that do not fit."""
    if problems := misfits(expected, weights):
        lines = [f"  {title} ({len(names)}): {listed(names)}" for title, names in problems.items()]
        raise CheckpointError("\n".join([f"{file.path} does not fit model {model.config.name!r}:", *lines]))
    own = copied(weights, str(file.path), file.bytes)
    own |= {name: torch.zeros((), dtype=torch.int64) for name in expected if name not in own and name.endswith(COUNTER)}
    model.load_state_dict(own, strict=False, assign=True)
