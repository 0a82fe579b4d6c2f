"""The files a user has → a `DiffV2IQA` with every weight in place.

Names and shapes are compared before any memory is allocated. One message lists everything that does not fit.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..engine.manifest import Source, weights_id
from ..engine.reference import Reference, read_reference
from ..errors import CheckpointError, ConfigError, DatasetError, UsageError
from . import hub
from .bundle import Bundle, read_description
from .config import PRESETS, Encoder, ModelConfig
from .config import preset as preset_config
from .naming import BUNDLE, DDPM, DEIQT, IQA, SR3, Format, adapt, find, is_average
from .network import DiffV2IQA, build
from .options import OPTIONS, Values, apply, as_text, parse_options, read_options
from .sr3 import in_words, read_size
from .weightfile import WeightFile, listed, not_finite, read, shown

# The parts of the model: prefix of their tensors, and name in messages. The first four may have a file of their own.
PARTS = {
    "unet": ("unet.", "U-Net"),
    "vit": ("vcg.vit.", "ViT"),
    "resnet": ("vda.resnet.", "ResNet"),
    "lite0": ("vda.lite0.", "EfficientNet-Lite0"),
    "tabs": ("tabs.", "shared attention blocks"),
    "vcg": ("vcg.", "VCG head"),
    "vda": ("vda.", "VDA head"),
}
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
COUNTER = "num_batches_tracked"  # of BatchNorm; nothing here reads it, and old files lack it
MAX_SWIN_TABLE_BYTES = 256 * 2**20

Misfits = dict[str, list[str]]


class Origin(enum.StrEnum):
    """How a setting became known."""

    READ = "read"  # a file of weights says it
    ASSUMED = "assumed"
    GIVEN = "given"  # the user says it


@dataclass(frozen=True)
class Setting:
    """Something that scores depend on and people should look at once. `where` is the file that says it, if one does."""

    origin: Origin
    name: str
    value: str
    where: str = ""


@dataclass(frozen=True)
class Loaded:
    """A float32 model in eval mode, its source files, and notes on what was ignored or is untrained.

    An untrained part has a source with role "seed" and no hash. `reference` says what scores mean to a person.
    """

    model: DiffV2IQA
    sources: tuple[Source, ...]
    notes: tuple[str, ...]
    settings: tuple[Setting, ...] = ()
    reference: Reference | None = None


@dataclass(frozen=True)
class _Given:
    """A file the user gave, recognised. `option` is how: ckpt, unet, vit, resnet or lite0."""

    option: str
    file: WeightFile
    form: Format
    bundle: Bundle | None
    remarks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return shown(self.file.path.name)

    @property
    def source(self) -> Source:
        role = self.form.role if self.option == "ckpt" else self.option
        return Source(role, self.name, self.file.bytes, self.file.sha256, self.form.words)


def load(
    ckpt: Path | None,
    *,
    unet: Path | None = None,
    vit: Path | None = None,
    resnet: Path | None = None,
    lite0: Path | None = None,
    preset: str | None = None,
    seed: int | None = None,
    options: Mapping[str, object] | None = None,
    options_file: Path | None = None,
    reference: Path | None = None,
) -> Loaded:
    """Load a model from a bundle, the authors' network or MANIQA; `unet`, `vit`, `resnet`, `lite0` replace these parts.

    The configuration is that of `preset`, else the bundle's own, else the preset that fits the weights. With a `seed`,
    a part that is in no file keeps its seeded initial values, and `sources` and `notes` say so. Without a seed it is
    an error. `options` say what weights do not tell, by the names in `options.OPTIONS`. Those they leave out come from
    `options_file`, else from `NAME.toml` beside a checkpoint `NAME.pt`. `reference` is a file of `iqa-eval
    --reference`, about an engine of these files alone. Without one, a bundle that is used as it is brings its own.
    Raises CheckpointError, ConfigError (no such preset or option), DatasetError (the reference) or UsageError.
    """
    if ckpt is None and (preset is None or seed is None):
        raise UsageError("without a checkpoint there must be a preset and a seed, for the parts that no file gives")
    base = _open("ckpt", ckpt) if ckpt else None
    files = {"unet": unet, "vit": vit, "resnet": resnet, "lite0": lite0}
    parts = [_open(option, path) for option, path in files.items() if path]
    given = [base, *parts] if base else parts
    own = _config(base, given, preset, seed)
    _check_parts(own, base, parts, seed)
    stated = _stated(ckpt, options or {}, options_file)
    config = apply(own, {name: values for name, (values, _) in stated.items()})
    settings = _settings(config, base, preset, given, stated)
    if base and base.bundle and preset is None:
        seed = None  # a bundle is complete for its own configuration: a hole is damage, which no seed mends
    weights, notes = _gather(config, given)
    notes += [note for g in given if g.option == "ckpt" for note in _assumptions(g, settings)]
    model = _skeleton(config)
    if problems := misfits(model.state_dict(), weights, seeded=seed is not None):
        raise CheckpointError(_explain(config, given, problems, seed))
    untrained = _fill(model, copied(weights, _paths(given), sum(g.file.bytes for g in given)), seed)
    inherited, old_notes = _ancestry(given)
    if stated:
        notes.append("given: " + ", ".join(f"{name} {as_text(values)}" for name, (values, _) in stated.items()))
    if base and base.bundle and preset and base.bundle.config != own:
        notes.append(f"{base.name}: its configuration {base.bundle.config.name!r} gives way to preset {preset!r}")
    sources = (*(g.source for g in given), *inherited, *untrained)
    known = base.bundle.reference if base and base.bundle and base.bundle.config == config and not parts else None
    known = reference_for(reference, sources, _paths(given)) if reference else known
    return Loaded(model.eval(), sources, (*old_notes, *notes, *map(_untrained_note, untrained)), settings, known)


def reference_for(path: Path, sources: tuple[Source, ...], whose: str) -> Reference:
    """Read a file of `iqa-eval --reference` that is about an engine of these sources. Raises DatasetError."""
    known = read_reference(path)
    if known.weights != weights_id(sources):
        raise DatasetError(
            f"{path} is of an engine with other weights than {whose}: score {known.name} with an engine of these, and "
            f"make a reference anew with iqa-eval --reference"
        )
    return known


def load_part(path: Path, part: str) -> tuple[dict[str, Tensor], Source] | None:
    """Return one part's weights, under our names, from another program's file of that part; None if it is a bundle.

    Raises CheckpointError if the file holds something else.
    """
    given = _open(part, path)
    if not given.form.part:
        return None
    prefix, words = PARTS[part]
    if given.form.part != prefix:
        raise CheckpointError(f"{path}, given with --{part}, has no {words}: it is {given.form.words}")
    ours = adapt(given.form, given.file.weights, vit_blocks=64)[0]
    return copied(ours, str(given.file.path), given.file.bytes), given.source


def misfits(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], *, seeded: bool = False) -> Misfits:
    """Return why `weights` cannot fill `expected`, by kind of misfit. Only names, shapes and types are read.

    `seeded`: a part may be absent as a whole. It must not be there in part: the rest would silently be random, such as
    BatchNorm's statistics beside GroupNorm's weights.
    """
    present = {part_of(name) for name in weights}
    shared = [(name, tensor, weights[name]) for name, tensor in expected.items() if name in weights]
    groups = {
        "missing": [
            name
            for name in expected
            if name not in weights and not name.endswith(COUNTER) and not (seeded and part_of(name) not in present)
        ],
        "unknown to this model": [name for name in weights if name not in expected],
        "of another shape": [
            f"{name} is {tuple(has.shape)}, must be {tuple(want.shape)}"
            for name, want, has in shared
            if has.shape != want.shape
        ],
        "of another type": [
            f"{name} is {has.dtype}, must be {want.dtype}"
            for name, want, has in shared
            if (has.dtype not in FLOATS if want.is_floating_point() else has.dtype != want.dtype)
        ],
    }
    return {title: lines for title, lines in groups.items() if lines}


def part_of(name: str) -> str:
    """Return the part of the model that one of our tensors belongs to, a key of `PARTS`; "" for other names."""
    return next((part for part, (prefix, _) in PARTS.items() if name.startswith(prefix)), "")


def _open(option: str, path: Path) -> _Given:
    """Read a file and find out what it is."""
    remarks = []
    if hub.is_remote(path):
        path, note = hub.fetch(path)
        remarks.append(note)
    file = read(path)
    path = file.path
    if file.bundle is not None:
        return _Given(option, file, BUNDLE, read_description(path, file.bundle), tuple(remarks))
    form, prefix = find(path, file.weights, parts=option != "ckpt")
    if form is DDPM:
        raise CheckpointError(
            f"{path} is the {form.words}, which is told the number of the step where SR3 is told the noise level; "
            f"restoring needs SR3's own: train it with which_model_G = sr3"
        )
    if form is DEIQT:
        raise CheckpointError(f"{path} is {form.words}'s network, a part of PFD-IQA; this command wants Diff-V²-IQA")
    if file.average or is_average(prefix):
        remarks.append(f"the moving average of its weights is taken ({file.average or prefix.removesuffix('.')})")
    if prefix:
        if beside := [name for name in file.weights if not name.startswith(prefix)]:
            remarks.append(f"tensors beside those under {shown(prefix)} ignored: {listed(beside)}")
        own = {name.removeprefix(prefix): tensor for name, tensor in file.weights.items() if name.startswith(prefix)}
        file = replace(file, weights=own)
    return _Given(option, file, form, None, tuple(remarks))


def _stated(
    ckpt: Path | None, options: Mapping[str, object], options_file: Path | None
) -> dict[str, tuple[Values, str]]:
    """Return the options that the user states, and the file that does so: "" for those of the program."""
    if options_file is None and ckpt and not hub.is_remote(ckpt):
        place = ckpt.absolute()
        beside = place.parent / f"{place.name if place.is_dir() else place.stem}.toml"
        options_file = beside if beside.is_file() else None
    in_file = read_options(options_file) if options_file else {}
    where = options_file.name if options_file else ""
    return {name: (values, where) for name, values in in_file.items()} | {
        name: (values, "") for name, values in parse_options(options).items()
    }


def _settings(
    config: ModelConfig,
    base: _Given | None,
    preset: str | None,
    given: list[_Given],
    stated: Mapping[str, tuple[Values, str]],
) -> tuple[Setting, ...]:
    """Return what the scores of this model depend on, and who says so."""
    found = [Setting(Origin.GIVEN if preset else Origin.READ, "model", config.name)]
    if config.unet and any(g.form is SR3 for g in given):
        found.append(Setting(Origin.READ, "U-Net", f"{in_words(config.unet)}, {config.unet.norm} norm"))
    for option in OPTIONS:
        if not option.concerns(config):
            continue
        origin, where = Origin.ASSUMED, ""
        if option.name in stated:
            origin, where = Origin.GIVEN, stated[option.name][1]
        elif base and not preset and (base.bundle or (option.name == "swin-scale" and base.form.swin_scale)):
            origin = Origin.READ
        found.append(Setting(origin, option.name, as_text(option.values(config)), where))
    return tuple(found)


def _config(base: _Given | None, given: list[_Given], preset: str | None, seed: int | None) -> ModelConfig:
    """Return the configuration: the one asked for, else the bundle's own, else the preset the weights fit best."""
    if base and base.bundle and preset is None:
        return _sized(base.bundle.config, given)
    if preset is None and base and base.form.role == "iqa" and base.form is not IQA:
        preset = "maniqa"  # whatever else was given along with it
    config = _sized(preset_config(preset), given) if preset is not None else _fitting(given, seed)
    if base and config.vcg and base.form.swin_scale:
        swin = replace(config.vcg.swin, scale=base.form.swin_scale)
        return replace(config, vcg=replace(config.vcg, swin=swin))
    return config


def _sized(config: ModelConfig, given: list[_Given]) -> ModelConfig:
    """Return a configuration with the size of the SR3 U-Net that was given, if that has the norm of its own."""
    sr3 = next((g for g in given if g.form is SR3), None)
    if sr3 is None or config.unet is None:
        return config
    path = sr3.file.path
    size = read_size(path, adapt(SR3, sr3.file.weights, vit_blocks=0)[0], config.unet)
    if size is None or size.norm is not config.unet.norm:
        return config
    try:
        return replace(config, unet=size)
    except ConfigError as exc:
        raise CheckpointError(f"{path} is an SR3 U-Net of another size: {in_words(size)}; {exc}") from exc


def _fitting(given: list[_Given], seed: int | None) -> ModelConfig:
    """Return the preset that the weights fit best."""
    distances = _distances(given, seed)
    fitting = [name for name, distance in distances.items() if distance == 0]
    if len(fitting) > 1:
        raise UsageError(f"{_paths(given)}: these weights fit presets {' and '.join(fitting)}; choose with --preset")
    return _sized(PRESETS[min(distances, key=lambda name: distances[name])], given)


def _distances(given: list[_Given], seed: int | None) -> dict[str, int]:
    """Return how many tensors keep the given files from being each preset."""
    out = {}
    for name, preset in PRESETS.items():
        config = _sized(preset, given)
        problems = misfits(_skeleton(config).state_dict(), _gather(config, given)[0], seeded=seed is not None)
        out[name] = sum(map(len, problems.values()))
    return out


def _check_parts(config: ModelConfig, base: _Given | None, parts: list[_Given], seed: int | None) -> None:
    """Refuse a file that was given with the wrong option, and the authors' network without its U-Net."""
    if base and base.form.part:
        raise CheckpointError(
            f"{base.file.path} is only a part, the {PARTS[base.form.role][1]} ({base.form.words}): give it with "
            f"--{base.form.role}, beside the checkpoint of the scoring network. To start training from parts: "
            f"iqa convert --preset paper --vit VIT --resnet RESNET --seed 0 -o start.safetensors"
        )
    encoder = config.vda and config.vda.encoder
    has = {
        "unet": config.unet,
        "vit": config.vcg,
        "resnet": encoder is Encoder.RESNET,
        "lite0": encoder is Encoder.LITE0,
    }
    for g in parts:
        prefix, words = PARTS[g.option]
        if not has[g.option]:
            raise CheckpointError(f"model {config.name!r} has no {words}: leave out --{g.option} {g.file.path}")
        if not any(name.startswith(prefix) for name in adapt(g.form, g.file.weights, vit_blocks=64)[0]):
            raise CheckpointError(f"{g.file.path}, given with --{g.option}, has no {words}: it is {g.form.words}")
    if base and base.form is IQA and seed is None and all(g.option != "unet" for g in parts):
        raise CheckpointError(
            f"{base.file.path} is the {IQA.words}; it scores restored images but does not restore them. Give its U-Net "
            f"with --unet: the file I<iterations>_E<epoch>_gen.pth that training the diffusion model (SR3) wrote"
        )


def _gather(config: ModelConfig, given: list[_Given]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights of all files under our names. A part's own file replaces that part of the checkpoint."""
    vit_blocks = max(config.vcg.layers) + 1 if config.vcg else 0
    weights: dict[str, Tensor] = {}
    notes: list[str] = []
    for g in given:
        own, remarks = adapt(g.form, g.file.weights, vit_blocks)
        prefix, words = PARTS.get(g.option, ("", ""))
        if prefix and g.form.part != prefix:
            own = {name: tensor for name, tensor in own.items() if name.startswith(prefix)}
            remarks = [f"only its {words} is used"]
        kept = {name: tensor for name, tensor in weights.items() if not prefix or not name.startswith(prefix)}
        if len(kept) < len(weights):
            remarks.append(f"its {words} replaces that of {given[0].name}")
        weights = kept | own
        notes += [f"{g.name}: {text}" for text in (*remarks, *_remarks(config, g))]
    return weights, notes


def _remarks(config: ModelConfig, g: _Given) -> list[str]:
    """Return notes on entries that were ignored, and on what the weights do not tell."""
    remarks = list(g.remarks)
    if g.file.ignored:
        remarks.append(f"entries beside the weights ignored: {listed(g.file.ignored)}")
    betas = g.file.weights.get("betas")
    if g.form is SR3 and betas is not None and betas.ndim == 1 and len(betas) != config.schedule.steps:
        remarks.append(f"trained with {len(betas)} diffusion steps, sampled here with {config.schedule.steps}")
    return remarks


def _assumptions(g: _Given, settings: tuple[Setting, ...]) -> list[str]:
    """Return notes on assumptions that are known to be wrong for some public checkpoint."""
    scale = next((s.value for s in settings if s.name == "swin-scale" and s.origin is Origin.ASSUMED), None)
    if scale is None or g.form.role != "iqa":
        return []
    return [
        f"{g.name}: the scale of its Swin stages is not stored in it, {scale} is assumed "
        "(one public MANIQA checkpoint was trained with 0.13: --swin-scale 0.13)"
    ]


def _skeleton(config: ModelConfig) -> DiffV2IQA:
    """Return the model on the meta device: names, shapes and types without memory."""
    if config.vcg:
        # Swin's tables take real memory even there: a file must not decide how much.
        swin = config.vcg.swin
        size = 2 * swin.layers * swin.blocks * swin.window**2 * (8 * swin.window**2 + 4 * config.grid**2)
        if size > MAX_SWIN_TABLE_BYTES:
            raise CheckpointError(f"model {config.name!r}: the tables of its Swin windows would take {size:,} bytes")
    with torch.device("meta"):
        return DiffV2IQA(config)


def copied(weights: Mapping[str, Tensor], where: str, size: int) -> dict[str, Tensor]:
    """Copy tensors out of files of so many bytes, as float32. Raises CheckpointError where that is not finite."""
    # One stored number may pose as a tensor of any shape: the model must be no larger than its files.
    if sum(tensor.numel() for tensor in weights.values()) > size:
        raise CheckpointError(f"{where}: the tensors have more numbers than the file has bytes")
    # Always copy: a file stays mapped only until `load` returns. A training run that truncates a mapped file, to write
    # its next checkpoint, would end this process (SIGBUS), and Windows could not replace the file.
    out = {
        name: tensor.to(
            torch.float32 if tensor.is_floating_point() else tensor.dtype,
            copy=True,
            memory_format=torch.contiguous_format,
        )
        for name, tensor in weights.items()
    }
    if broken := not_finite(out):
        raise CheckpointError(f"{where}: weights that are NaN, infinite or beyond float32: {listed(broken)}")
    return out


def _fill(model: DiffV2IQA, weights: dict[str, Tensor], seed: int | None) -> tuple[Source, ...]:
    """Fill the model with the weights, and missing parts with initial values; return a source for each such part."""
    expected = model.state_dict()
    present = {part_of(name) for name in weights}
    missing = set(expected) - set(weights)
    absent = {name for name in missing if part_of(name) not in present}
    weights |= {name: torch.zeros((), dtype=torch.int64) for name in missing - absent}  # the counters
    sources = []
    if absent and seed is not None:
        initial = build(model.config, seed)
        weights |= {name: tensor for name, tensor in initial.state_dict().items() if name in absent}
        for part, (_, words) in PARTS.items():
            of_part = [p for name, p in initial.named_parameters() if name in absent and part_of(name) == part]
            if of_part:
                sources.append(
                    Source("seed", words, sum(p.nbytes for p in of_part), "", f"initial values of seed {seed}")
                )
    model.load_state_dict(weights, assign=True)
    return tuple(sources)


def _untrained_note(source: Source) -> str:
    return f"untrained: {source.name}, {source.bytes // 4:,} parameters with the {source.format}"


def _ancestry(given: list[_Given]) -> tuple[list[Source], list[str]]:
    """Return the sources and notes that bundles recorded about the parts used here.

    So an untrained part stays marked through any number of bundles, until a file replaces it.
    """

    def concerns(source: Source, part: str) -> bool:
        return source.role == part or (source.role == "seed" and source.name == PARTS[part][1])

    replaced = [g.option for g in given if g.option != "ckpt"]
    sources: list[Source] = []
    notes: list[str] = []
    for g in given:
        if g.bundle and g.option == "ckpt":
            used = [s for s in g.bundle.sources if not any(concerns(s, part) for part in replaced)]
            stale = {_untrained_note(s) for s in g.bundle.sources if s not in used}
            notes += [note for note in g.bundle.notes if note not in stale]
            sources += used
        elif g.bundle:
            used = [s for s in g.bundle.sources if concerns(s, g.option)]
            notes += [_untrained_note(s) for s in used if s.role == "seed"]
            sources += used
    return sources, notes


def _explain(config: ModelConfig, given: list[_Given], problems: Misfits, seed: int | None) -> str:
    lines = [f"{_paths(given)} does not fit model {config.name!r}:"]
    lines += [f"  {title} ({len(names)}): {listed(names)}" for title, names in problems.items()]
    distances = _distances(given, seed)
    best = min(distances, key=lambda name: distances[name])
    if distances[best] < sum(map(len, problems.values())):
        how = "fits" if distances[best] == 0 else f"is closer (tensors that do not fit: {distances[best]})"
        lines.append(f"Preset {best!r} {how}: --preset {best}")
    return "\n".join(lines)


def _paths(given: list[_Given]) -> str:
    return " + ".join(str(g.file.path) for g in given) or "no file"
