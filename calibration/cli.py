"""`iqa-calibrate` and `iqa-quantise`: options in, one library call, a table out."""

import contextlib
import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..command import Command
from ..engine.atomic import check_folder_of, replacing
from ..engine.manifest import StageName
from ..errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from rich.console import Console

    from ..engine.manifest import Manifest
    from .quantise import QuantisedStage, Recipe
    from .statistics import Skipped, Statistics

_PATH = click.Path(path_type=Path)
ALL = tuple(StageName)
_CALIB = click.option(
    "--calib",
    "images",
    multiple=True,
    metavar="IMAGES",
    help="Calibration images: a file, folder or pattern (repeatable). 16 to 64 like those that will be scored. Default "
    "of iqa-calibrate: 16 made-up ones.",
)


@click.command(cls=Command)
@click.option("--engine", "path", type=_PATH, required=True, metavar="DIR", help="The float32 engine directory.")
@_CALIB
@click.option("-o", "--output", type=_PATH, metavar="FOLDER", help="Where statistics go. Default: DIR/calibration.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Noise of the loop.")
@click.option(
    "--crops", type=click.IntRange(1, 100), default=1, show_default=True, help="Crops per image for the heads."
)
@click.option("--fp16-plan", type=_PATH, metavar="FILE", help="Write the fp16 plan made of them, for iqa-build --plan.")
@click.option("--plot", type=_PATH, metavar="FILE.png", help="Draw the U-Net's ranges over the steps.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def calibrate(
    path: Path,
    images: tuple[str, ...],
    output: Path | None,
    seed: int,
    crops: int,
    fp16_plan: Path | None,
    plot: Path | None,
    quiet: bool,
) -> None:
    """Record what the tensors of an engine look like over the real loop: ranges and histograms, per tensor and step.

    FOLDER receives statistics.npz and, for people, statistics.json. Images that it holds already are not run again, so
    an interrupted run goes on where it was, and more images can be added later.

    \b
    Examples:
      iqa-calibrate --engine engine/ --calib photos/ -o stats/
      iqa-calibrate --engine engine/ --calib photos/ -o stats/ --fp16-plan plan.json
      iqa-calibrate --engine engine/ --calib photos/ -o stats/ --plot ranges.png

    Exit codes: 0 all images were used, 1 some could not be read, 2 nothing was written.
    """
    from rich.console import Console

    from ..engine.manifest import open_engine
    from .statistics import fp16_plan as make_plan

    for file in (fp16_plan, plot):
        if file:
            check_folder_of(file)
    console = Console(stderr=True, quiet=quiet)
    folder = output or path / "calibration"
    with contextlib.ExitStack() as while_running:
        if not images:
            images = (while_running.enter_context(_made_up(console, path, folder)),)
        statistics, skipped = collect_statistics(console, path, images, folder, seed=seed, crops=crops)
    if fp16_plan:
        plan = make_plan(open_engine(path), statistics)
        with replacing(fp16_plan) as stream:
            stream.write(plan.to_json().encode())
    if plot:
        from ..evaluation.charts import save
        from .plot import draw_ranges

        save(draw_ranges(statistics), plot)
    if not quiet:
        click.echo(f"{folder}: {len(statistics.samples)} images, statistics {statistics.digest}")
    if skipped:
        click.get_current_context().exit(1)


@click.command(cls=Command)
@click.option("--engine", "path", type=_PATH, required=True, metavar="DIR", help="The float32 engine directory.")
@_CALIB
@click.option(
    "--statistics", "folder", type=_PATH, metavar="FOLDER", help="What iqa-calibrate wrote. Default: DIR/calibration."
)
@click.option("-o", "--output", type=_PATH, required=True, metavar="DIR", help="The engine directory to write.")
@click.option(
    "--precision",
    type=click.Choice(["int8", "fp8", "mixed"]),
    default="int8",
    show_default=True,
    help="mixed: int8 in those stages that keep the score, as tried on the images of --calib.",
)
@click.option("--drift", type=click.FloatRange(0), metavar="X", help="Mean change of score that mixed may cause: 0.01.")
@click.option(
    "--target",
    type=click.Choice(["onnxruntime", "tensorrt"]),
    help="Whose form of Q/DQ to write. Default: onnxruntime for int8, tensorrt for fp8, which nothing else runs.",
)
@click.option(
    "--ranges",
    type=click.Choice(["max", "percentile", "entropy", "mse"]),
    default="percentile",
    show_default=True,
    help="How the range of an activation is chosen from its histogram.",
)
@click.option("--percentile", type=float, default=99.999, show_default=True, help="For --ranges percentile.")
@click.option("--force", is_flag=True, help="Replace an engine that is already there.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def quantise(
    path: Path,
    images: tuple[str, ...],
    folder: Path | None,
    output: Path,
    precision: str,
    drift: float | None,
    target: str | None,
    ranges: str,
    percentile: float,
    force: bool,
    quiet: bool,
) -> None:
    """Write an engine directory whose stages compute in 8 bits, from a float32 one and calibration images.

    iqa-run runs it like any other. Weights get a scale per channel, activations one from their measured ranges, in
    which every step of the loop counts the same. The first convolution, in a ResNet those that read it, the last layers
    and the noise embedding stay float32. DIR/calibration/quantisation.json says what was done to which node.

    \b
    Examples:
      iqa-quantise --engine engine/ --calib photos/ -o engine-int8/
      iqa-quantise --engine engine/ --statistics stats/ --ranges mse -o engine-int8/
      iqa-quantise --engine engine/ --calib photos/ --precision mixed --drift 0.005 -o engine-mixed/
      iqa-quantise --engine engine/ --statistics stats/ --precision fp8 -o engine-fp8/     for TensorRT only

    Exit codes: 0 written, 1 written, but some images could not be read, 2 nothing was written.
    """
    from rich.console import Console

    from ..export.engine import check_target
    from .quantise import Recipe
    from .ranges import Method

    mixed = precision == "mixed"
    if mixed and target == "tensorrt":
        raise UsageError("--precision mixed is found by running it, in the form of ONNX Runtime: leave --target out")
    if mixed and not images:
        raise UsageError("--precision mixed tries stages on images: give --calib, beside --statistics too")
    if drift is not None and not mixed:
        raise UsageError(f"--drift says which stages --precision mixed takes; {precision} takes all")
    recipe = Recipe.of(precision, target, method=Method(ranges), percentile=percentile)
    check_target(output, force=force)
    console = Console(stderr=True, quiet=quiet)
    skipped: Sequence[Skipped] = ()
    place = folder or path / "calibration"
    if images:
        _, skipped = collect_statistics(console, path, images, place)
    only = choose(console, path, place, images, recipe, skipped=skipped, drift=drift) if mixed else ALL
    quantise_into(console, path, output, place, recipe, only=only, force=force, quiet=quiet)
    if skipped:
        click.get_current_context().exit(1)


@contextlib.contextmanager
def _made_up(console: "Console", engine: Path, folder: Path) -> "Generator[str]":
    """Lend a folder of made-up pictures. Raises UsageError where their ranges would be mixed with those of others."""
    from ..engine.manifest import read_manifest
    from .pictures import COUNT, draw
    from .statistics import NAME

    side = read_manifest(engine).crop.size * 3 // 2
    if (folder / f"{NAME}.npz").exists():
        raise UsageError(
            f"{folder} holds statistics already: name images to add with --calib, or another folder with -o, or remove "
            f"this one"
        )
    console.print(
        f"no --calib: calibrating on {COUNT} made-up pictures; photographs like those that will be scored do better",
        soft_wrap=True,
    )
    with tempfile.TemporaryDirectory(prefix="iqa-calibrate-") as made:
        draw(Path(made), side)
        yield made


def collect_statistics(
    console: "Console", path: Path, images: tuple[str, ...], folder: Path, *, seed: int = 0, crops: int = 1
) -> "tuple[Statistics, Sequence[Skipped]]":
    """Run the calibration with a progress line, and name on stderr the images that were left out."""
    from ..runtime.inputs import find_images
    from .statistics import collect

    with console.status("reading calibration images") as status:
        statistics, skipped = collect(
            path,
            find_images(images),
            folder,
            seed=seed,
            crops=crops,
            progress=lambda done, total, name: status.update(f"calibrating: {done + 1} of {total}, {name}"),
        )
    for image in skipped:
        console.print(f"left out: {image.why}", highlight=False, markup=False, soft_wrap=True)
    return statistics, skipped


def choose(
    console: "Console",
    path: Path,
    folder: Path,
    images: tuple[str, ...],
    recipe: "Recipe",
    *,
    skipped: "Sequence[Skipped]" = (),
    drift: float | None = None,
) -> tuple[StageName, ...]:
    """Return the stages that `mixed` takes, tried on all images but the `skipped`; say on stderr what each costs."""
    from ..runtime.inputs import find_images
    from .mixed import LIMIT, choose_stages

    unreadable = {image.name for image in skipped}
    with console.status("") as status:
        trials = choose_stages(
            path,
            folder,
            [image for image in find_images(images) if str(image) not in unreadable],
            recipe,
            limit=LIMIT if drift is None else drift,
            progress=lambda stage, doing: status.update(f"{stage}: {doing}"),
        )
    for trial in trials:
        verdict = "int8" if trial.taken else "stays float32"
        why = trial.why or f"the score moves by {trial.drift:.1e}"
        console.print(f"{trial.stage}: {verdict}, {why}", highlight=False, markup=False, soft_wrap=True)
    taken = tuple(trial.stage for trial in trials if trial.taken)
    if not taken:
        least = min(trial.drift for trial in trials)
        if math.isinf(least):
            raise UsageError("no stage can be quantised; calibrate with more images, or stay with float32")
        raise UsageError(
            f"no stage keeps the score within the limit, the best moves it by {least:.1e}; give iqa-quantise a larger "
            f"--drift, or stay with float32"
        )
    return taken


def quantise_into(
    console: "Console",
    path: Path,
    output: Path,
    folder: Path,
    recipe: "Recipe",
    *,
    only: tuple[StageName, ...] = ALL,
    force: bool,
    quiet: bool,
) -> None:
    """Quantise the engine `path` into `output` by the statistics in `folder`, with a progress line and a table."""
    from .quantise import quantise_engine

    with console.status("") as status:
        manifest, done = quantise_engine(
            path,
            output,
            folder,
            recipe,
            only=only,
            force=force,
            progress=lambda stage, doing: status.update(f"{stage}: {doing}"),
        )
    if not quiet:
        _summary(manifest, done, output)


def _summary(manifest: "Manifest", done: "list[QuantisedStage]", output: Path) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, caption="Drift: largest difference from float32 on random inputs, of the largest value.")
    table.add_column("stage")
    for title in ("layers in 8 bits", "in float32", "size", "of float32", "drift"):
        table.add_column(title, justify="right")
    for made in done:
        worst = max((c.max_abs_error / max(c.max_abs_reference, 1e-9) for c in made.stage.checks), default=None)
        table.add_row(
            made.stage.name,
            str(len(made.report.quantised)),
            str(len(made.report.float32)),
            f"{made.stage.file.bytes / 1e6:.1f} MB",
            f"{made.stage.file.bytes / made.float_bytes:.0%}",
            "not measured" if worst is None else f"{worst:.1e}",
        )
    Console().print(table)
    click.echo(f"{output}: engine {manifest.engine_id}, {manifest.provenance.notes[-1]}")
