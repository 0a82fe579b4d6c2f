"""`iqa-export`, `iqa-build` and `iqa-convert`: options in, one library call, a table out."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..command import Command
from ..engine.manifest import Library, Precision, StageName
from ..errors import DiffiqaError, ExportError, OutputError, UsageError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn

    from ..engine.manifest import Manifest
    from ..model.checkpoint import Loaded
    from .engine import StageCost
    from .tensorrt import BuildOptions, StageBuild

F = TypeVar("F", bound=Callable[..., Any])
_FILE = click.Path(path_type=Path, dir_okay=True)

_WEIGHTS = [
    click.option(
        "--ckpt",
        type=_FILE,
        metavar="FILE",
        help="Weights: a diffiqa bundle (.pt or .safetensors), the authors' IQA network, or MANIQA's.",
    ),
    click.option("--unet", type=_FILE, metavar="FILE", help="SR3's generator (I…_E…_gen.pth), for the authors' files."),
    click.option("--vit", type=_FILE, metavar="FILE", help="timm's vit_base_patch8_224, to replace the ViT."),
    click.option("--resnet", type=_FILE, metavar="FILE", help="torchvision's resnet50, to replace the ResNet."),
    click.option(
        "--preset",
        metavar="NAME",
        help="Model configuration: paper, authors, maniqa or mini. Default: what the weights fit.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**63 - 1),
        help="Fill parts that no file gives with random numbers from this seed. Scores then mean nothing.",
    ),
]

_LIBRARIES = [library.value for library in Library]


def _weight_options(command: F) -> F:
    for option in reversed(_WEIGHTS):
        command = option(command)
    return command


@click.command(cls=Command)
@_weight_options
@click.option("-o", "--output", type=_FILE, required=True, metavar="DIR", help="The engine directory to write.")
@click.option(
    "--stage",
    "stages",
    type=click.Choice([name.value for name in StageName]),
    multiple=True,
    help="Export only this stage (repeatable), to look at it; such a directory cannot score.",
)
@click.option(
    "--target",
    type=click.Choice([*_LIBRARIES, "none"]),
    help="Build fp16 engines with this library too. Default: one that is installed, where there is a GPU; else none.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "int8", "fp8", "mixed"]),
    default="fp32",
    show_default=True,
    help="What the ONNX stages compute in: as iqa-quantise makes them, from --calib. fp8 is for TensorRT only.",
)
@click.option(
    "--calib", multiple=True, metavar="IMAGES", help="Calibration images for int8, fp8 and mixed (repeatable)."
)
@click.option("--force", is_flag=True, help="Replace an engine that is already there.")
@click.option("--dry-run", is_flag=True, help="Read the weights, say what would be written, and stop.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def export(
    ckpt: Path | None,
    unet: Path | None,
    vit: Path | None,
    resnet: Path | None,
    preset: str | None,
    seed: int | None,
    output: Path,
    stages: tuple[str, ...],
    target: str | None,
    precision: str,
    calib: tuple[str, ...],
    force: bool,
    dry_run: bool,
    quiet: bool,
) -> None:
    """Turn a checkpoint into an engine directory.

    Every stage (U-Net step, ViT encoder, VCG head, VDA head) becomes a self-contained float32 ONNX file, is compared
    with PyTorch on random inputs, and is recorded with its hash in DIR/manifest.json. DIR appears when all is done,
    or not at all. With a --target, engines are then built as iqa-build does without options.

    \b
    Examples:
      iqa-export --ckpt model.safetensors -o engine/
      iqa-export --ckpt iqa_net.pt --unet I800000_E40_gen.pth -o engine/
      iqa-export --preset mini --seed 0 -o engine/        untrained, to try things out

    Exit codes: 0 exported, 2 nothing was written, or ONNX stages alone because an engine could not be built.
    """
    from rich.console import Console

    from .engine import check_target, export_engine, plan_names

    console = Console(stderr=True, quiet=quiet)
    if ckpt is None and preset is None:
        raise UsageError("give --ckpt FILE; or --preset NAME --seed N for an untrained model")
    if precision == "fp32" and calib:
        raise UsageError("--calib is for --precision int8, fp8 or mixed; float32 stages need no calibration")
    if precision != "fp32" and (stages or not calib or target not in {None, "none"}):
        raise UsageError(f"--precision {precision} needs --calib IMAGES and whole models: no --stage, no --target")
    check_target(output, force=force)
    chosen = tuple(StageName(name) for name in stages)
    library = _library("none" if precision != "fp32" else target, chosen)
    loaded = _load(console, ckpt, unet, vit, resnet, preset, seed)
    if dry_run:
        _describe(loaded, output, chosen or plan_names(loaded.model.config))
        return
    if precision != "fp32":
        _export_quantised(console, loaded, output, precision, calib, force=force, quiet=quiet)
        return
    with console.status("") as status:
        manifest, costs = export_engine(
            loaded,
            output,
            stages=chosen,
            force=force,
            progress=lambda stage, doing: status.update(f"{stage}: {doing}"),
        )
    if not quiet:
        _summary(manifest, costs, output)
    if library:
        from .tensorrt import BuildOptions

        try:
            _build(console, output, BuildOptions(library), force=False, quiet=quiet)
        except DiffiqaError as exc:
            raise ExportError(f"{output} holds the ONNX stages, but no {library} engines: {exc}") from exc


@click.command(cls=Command)
@click.option("--engine", "path", type=_FILE, required=True, metavar="DIR", help="The engine directory to add to.")
@click.option(
    "--target",
    type=click.Choice(_LIBRARIES),
    help="The library. Default: tensorrt where it is installed and there is a GPU, else tensorrt-rtx.",
)
@click.option(
    "--precision",
    type=click.Choice([precision.value for precision in Precision]),
    default=Precision.FP16.value,
    show_default=True,
    help="What most nodes compute in; the plan says which stay float32.",
)
@click.option(
    "--plan",
    type=_FILE,
    metavar="FILE",
    help="A precision plan to follow: another build's plan.json, perhaps with more nodes kept in float32.",
)
@click.option(
    "--batch",
    "batches",
    metavar="N,…",
    default="",
    help="Crops at a time: N for exactly N, as CUDA graphs like it, or MIN:OPT:MAX. Default: 1,8.",
)
@click.option(
    "--sizes",
    metavar="HxW,…",
    default="",
    help="Image sizes of the U-Net: HxW, or MIN:OPT:MAX, one image at a time. Default: a crop, and up to 1024x1024.",
)
@click.option(
    "--compute-capability",
    "capabilities",
    metavar="X.Y,…",
    default="",
    help="tensorrt-rtx: build for these GPUs, such as 8.9. Default: portable, 8.0 and later.",
)
@click.option("--force", is_flag=True, help="Build again what is there already.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def build(
    path: Path,
    target: str | None,
    precision: str,
    plan: Path | None,
    batches: str,
    sizes: str,
    capabilities: str,
    force: bool,
    quiet: bool,
) -> None:
    """Build TensorRT or TensorRT-RTX engines from the ONNX stages of an engine directory.

    TensorRT builds on the GPU that will run the engine. TensorRT-RTX needs no GPU to build. Every stage is cast to the
    precision by a plan, compared with its float32 original on random inputs, and built; all of it is recorded in
    DIR/manifest.json when all is done, or not at all. The ONNX stages stay as they are.

    \b
    Examples:
      iqa-build --engine engine/                                           fp16, for this machine
      iqa-build --engine engine/ --target tensorrt-rtx --compute-capability 8.9
      iqa-build --engine engine/ --batch 1,4,16 --sizes 512x384,224x224:512x512:1024x1024

    Exit codes: 0 built, or already there; 2 nothing was added.
    """
    from rich.console import Console

    from ..runtime.gpu.tensorrt import usable_library
    from .precision import read_plan
    from .tensorrt import BuildOptions

    library = Library(target) if target else usable_library() or Library.TENSORRT_RTX
    options = BuildOptions(
        library,
        Precision(precision),
        batches=_split(batches),
        sizes=_split(sizes),
        compute_capabilities=_split(capabilities),
        plan=read_plan(plan) if plan else None,
    )
    _build(Console(stderr=True, quiet=quiet), path, options, force=force, quiet=quiet)


@click.command(cls=Command)
@_weight_options
@click.option("-o", "--output", type=_FILE, required=True, metavar="FILE", help="The bundle: .safetensors or .pt.")
@click.option("--half", is_flag=True, help="Store float16: half the size, weights rounded.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def convert(
    ckpt: Path | None,
    unet: Path | None,
    vit: Path | None,
    resnet: Path | None,
    preset: str | None,
    seed: int | None,
    output: Path,
    half: bool,
    force: bool,
    quiet: bool,
) -> None:
    """Turn weights of other programs into one diffiqa bundle: configuration and weights in a single file.

    \b
    Examples:
      iqa-convert --ckpt iqa_net.pt --unet I800000_E40_gen.pth -o model.safetensors
      iqa-convert --ckpt maniqa.pt -o maniqa.safetensors
      iqa-convert --preset paper --vit vit.pth --resnet resnet50.pth --seed 0 -o start.safetensors

    Exit codes: 0 written, 2 nothing was written.
    """
    from rich.console import Console

    from ..model.bundle import save_bundle
    from ..model.network import count_parameters

    console = Console(stderr=True, quiet=quiet)
    if output.exists() and not force:
        raise OutputError(f"{output} exists; give --force to overwrite it")
    loaded = _load(console, ckpt, unet, vit, resnet, preset, seed)
    save_bundle(loaded.model, output, half=half, sources=loaded.sources, notes=loaded.notes)
    if not quiet:
        millions = count_parameters(loaded.model) / 1e6
        click.echo(f"{output}: {loaded.model.config.name}, {millions:.1f} M parameters, {_size(output.stat().st_size)}")


def _load(
    console: "Console",
    ckpt: Path | None,
    unet: Path | None,
    vit: Path | None,
    resnet: Path | None,
    preset: str | None,
    seed: int | None,
) -> "Loaded":
    with console.status("reading weights"):
        from ..model.checkpoint import load

        loaded = load(ckpt, unet=unet, vit=vit, resnet=resnet, preset=preset, seed=seed)
    for note in loaded.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    return loaded


def _export_quantised(
    console: "Console",
    loaded: "Loaded",
    output: Path,
    precision: str,
    calib: tuple[str, ...],
    *,
    force: bool,
    quiet: bool,
) -> None:
    """Export float32 stages beside `output`, calibrate on them, and write `output` quantised."""
    import tempfile

    from ..calibration.cli import ALL, choose, collect_statistics, quantise_into
    from ..calibration.quantise import Recipe
    from .engine import export_engine

    recipe = Recipe.of(precision)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.float32.") as folder:
        engine, statistics = Path(folder, "engine"), Path(folder, "statistics")
        with console.status("") as status:
            export_engine(loaded, engine, progress=lambda stage, doing: status.update(f"{stage}: {doing}"))
        _, skipped = collect_statistics(console, engine, calib, statistics)
        mixed = precision == "mixed"
        only = choose(console, engine, statistics, calib, recipe, skipped=skipped) if mixed else ALL
        quantise_into(console, engine, output, statistics, recipe, only=only, force=force, quiet=quiet)


def _library(target: str | None, stages: tuple[StageName, ...]) -> Library | None:
    """Return the library to build with after the export, refusing early what could not work at the end."""
    from ..runtime.gpu.tensorrt import load_library, usable_library

    if target == "none" or (stages and target is None):
        return None
    if stages:
        raise UsageError("engines are built of whole models; give --target or --stage, not both")
    library = Library(target) if target else usable_library()
    if library:
        load_library(library)
    return library


def _build(console: "Console", path: Path, options: "BuildOptions", *, force: bool, quiet: bool) -> None:
    from .tensorrt import build_engines

    with console.status("") as status:
        made, stages = build_engines(
            path, options, force=force, progress=lambda stage, doing: status.update(f"{stage}: {doing}")
        )
    if quiet:
        return
    if stages:
        _build_summary(stages)
    click.echo(f"{path}: build {made.key}{'' if stages else ' is there already'}")


def _split(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.replace(",", " ").split() if part)


def _describe(loaded: "Loaded", output: Path, stages: tuple[StageName, ...]) -> None:
    model = loaded.model
    vit = model.vcg.vit if model.vcg else None
    parameters = {
        StageName.UNET: _count(model.unet),
        StageName.VIT: _count(vit),
        StageName.VCG: _count(model.vcg) - _count(vit) + _count(model.tabs),
        StageName.VDA: _count(model.vda) + _count(model.tabs),
    }
    click.echo(f"would {'replace' if output.exists() else 'write'} {output} ({model.config.name}):")
    total = 0
    for name in stages:
        count = parameters[name]
        total += 4 * count
        click.echo(f"  onnx/{name}.onnx   about {_size(4 * count)}, {count / 1e6:.1f} M parameters before merging")
    click.echo(f"  manifest.json\nabout {_size(total)} in all; nothing was written")


def _count(part: "nn.Module | None") -> int:
    from ..model.network import count_parameters

    return count_parameters(part) if part is not None else 0


def _summary(manifest: "Manifest", costs: "list[StageCost]", output: Path) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, caption="GMAC: for one crop-sized image. Error: largest difference from PyTorch.")
    table.add_column("stage")
    for title in ("M param.", "GMAC", "size", "max error", "allowed", "seconds"):
        table.add_column(title, justify="right")
    for cost in costs:
        stage = cost.stage
        worst = max(stage.checks, key=lambda check: check.max_abs_error / check.tolerance)
        table.add_row(
            stage.name,
            f"{stage.parameters / 1e6:.1f}",
            f"{stage.macs / 1e9:.2f}",
            _size(stage.file.bytes),
            f"{worst.max_abs_error:.1e}",
            f"{worst.tolerance:.1e}",
            f"{cost.export_seconds + cost.verify_seconds:.1f}",
        )
    Console().print(table)
    click.echo(f"{output}: engine {manifest.engine_id}, model {manifest.model_name}")
    if not manifest.score.trained:
        click.echo(manifest.score.meaning)


def _build_summary(stages: "list[StageBuild]") -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    seeds = {check.seed for made in stages for check in made.stage.drift}
    drawn = f" Inputs drawn with seed {', '.join(map(str, sorted(seeds)))}." if seeds else ""
    table = Table(box=SIMPLE, caption=f"Drift: largest difference from float32, of the largest value.{drawn}")
    table.add_column("stage")
    for title in ("profiles", "size", "drift", "allowed", "cast s", "build s"):
        table.add_column(title, justify="right")
    for made in stages:
        worst = max(made.stage.drift, key=lambda check: check.max_abs_error / check.tolerance, default=None)
        scale = worst.max_abs_reference if worst and worst.max_abs_reference else 1.0  # a head may answer 0
        table.add_row(
            made.stage.name,
            str(len(made.stage.profiles)),
            _size(made.stage.file.bytes),
            f"{worst.max_abs_error / scale:.1e}" if worst else "none",
            f"{worst.tolerance / scale:.1e}" if worst else "",
            f"{made.cast_seconds:.1f}",
            f"{made.build_seconds:.1f}",
        )
    Console().print(table)


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB"
