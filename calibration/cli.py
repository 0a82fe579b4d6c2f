"""`iqa-calibrate` and `iqa-quantise`: options in, one library call, a table out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..command import Command
from ..errors import UsageError
from ..export.cli import PATH, print_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from .api import Quantised
    from .statistics import Skipped
    from .steps import FittedSteps


class StepCounts(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Numbers of steps with commas between; `2..10` is all from 2 to 10."""

    name = "steps"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse a text."""
        found: list[int] = []
        for part in value.split(","):
            first, dots, last = part.strip().partition("..")
            if not (first.isdecimal() and (last.isdecimal() or not dots)):
                self.fail(f"{value!r} is no number of steps such as 5, 4,8 or 2..10", param, ctx)
            low, high = int(first), int(last or first)
            if not 1 <= low <= high <= 4000:
                self.fail(f"{value!r} does not rise, or leaves 1 to 4000", param, ctx)
            found += range(low, high + 1)
        return tuple(found)


_ENGINE = click.option("--engine", type=PATH, required=True, metavar="DIR", help="The float32 engine directory.")
_CALIB = click.option(
    "--calib",
    "images",
    multiple=True,
    metavar="IMAGES",
    help="Calibration images: a file, folder or pattern (repeatable). Give 16 to 64 like those that will be scored. "
    "Default: 16 made-up pictures, where there are no statistics.",
)
_MADE_UP = "on 16 made-up pictures; photographs like those that will be scored do better"


@click.command(cls=Command)
@_ENGINE
@_CALIB
@click.option("-o", "--output", type=PATH, metavar="FOLDER", help="Where the statistics go. Default: DIR/calibration.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Noise of the loop.")
@click.option(
    "--crops", type=click.IntRange(1, 100), default=1, show_default=True, help="Crops per image for the heads."
)
@click.option("--fp16-plan", type=PATH, metavar="FILE", help="Write the fp16 plan they lead to, for iqa-build --plan.")
@click.option(
    "--steps",
    "counts",
    type=StepCounts(),
    metavar="N[..M][,…]",
    help="Instead of statistics: find the fewest of these numbers of steps that keep the scores, and give the engine "
    "a fast sampling with them.",
)
@click.option(
    "--plot", type=PATH, metavar="FILE.png", help="Draw the U-Net's ranges over the steps, or with --steps drift."
)
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def calibrate(
    engine: Path, images: tuple[str, ...], counts: tuple[int, ...] | None, quiet: bool, **options: Any
) -> None:
    """Record the tensors of an engine over the real loop: ranges and histograms, per tensor and step.

    FOLDER receives statistics.npz and, for people, statistics.json. Images that it holds already do not run again: an
    interrupted run goes on where it stopped, and more images can be added later.

    With --steps it records nothing. It scores the images with few of the engine's steps and with all, and writes the
    fewest that keep the scores into DIR/manifest.json, with a correction of their bias. iqa-run --fast uses them.

    \b
    Examples:
      iqa-calibrate --engine engine/ --calib photos/ -o stats/
      iqa-calibrate --engine engine/ --calib photos/ --steps 2..10 --plot drift.png
      iqa-calibrate --engine engine/ --calib photos/ -o stats/ --fp16-plan plan.json
      iqa-calibrate --engine engine/ --calib photos/ -o stats/ --plot ranges.png

    Exit codes: 0 all images were used, 1 some could not be read or no number of steps keeps the scores, 2 nothing was
    written.
    """
    from rich.console import Console

    from . import api

    console = Console(stderr=True, quiet=quiet)
    if counts:
        if options.pop("output") or options.pop("fp16_plan"):
            raise UsageError("--steps writes into the engine's manifest alone: leave out -o and --fp16-plan")
        with console.status("reading images") as status:
            fitted = api.fit_steps(engine, images, counts, **options, say=status.update)
        print_steps(console, engine, fitted, quiet=quiet)
        if fitted.skipped or not fitted.fast:
            click.get_current_context().exit(1)
        return
    if not images:
        console.print(f"no --calib: calibrating {_MADE_UP}", soft_wrap=True)
    with console.status("reading calibration images") as status:
        done = api.calibrate(engine, images, **options, say=status.update)
    _print_skipped(console, done.skipped)
    if not quiet:
        click.echo(f"{done.folder}: {len(done.statistics.samples)} images, statistics {done.statistics.digest}")
    if done.skipped:
        click.get_current_context().exit(1)


@click.command(cls=Command)
@_ENGINE
@_CALIB
@click.option("--statistics", type=PATH, metavar="FOLDER", help="What iqa-calibrate wrote. Default: DIR/calibration.")
@click.option("-o", "--output", type=PATH, required=True, metavar="DIR", help="The engine directory to write.")
@click.option(
    "--precision",
    type=click.Choice(["int8", "fp8", "mixed"]),
    default="int8",
    show_default=True,
    help="mixed: int8 in those stages that keep the score, tried on the images of --calib.",
)
@click.option(
    "--drift",
    "limit",
    type=click.FloatRange(0),
    metavar="X",
    help="The mean change of score that mixed may cause. Default: 0.01.",
)
@click.option(
    "--target",
    type=click.Choice(["onnxruntime", "openvino", "tensorrt"]),
    help="Whose form of Q/DQ to write. Default: onnxruntime for int8, tensorrt for fp8, which only TensorRT runs.",
)
@click.option(
    "--ranges",
    type=click.Choice(["max", "percentile"]),
    default="percentile",
    show_default=True,
    help="How to choose the range of an activation: all that was seen, or all but the ends beyond --percentile.",
)
@click.option("--percentile", type=float, default=99.999, show_default=True, help="For --ranges percentile.")
@click.option("--force", is_flag=True, help="Replace an engine that is already there.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def quantise(engine: Path, output: Path, quiet: bool, **options: Any) -> None:
    """Write an engine directory whose stages compute in 8 bits, from a float32 one and calibration images.

    iqa-run runs it like any other. Weights get a scale per channel. Activations get one each, from measured ranges in
    which every step of the loop counts the same. Some layers stay float32: the first convolution, in a ResNet also
    those that read it, the last layers, and the noise embedding. DIR/calibration/quantisation.json lists what was done
    to each node.

    \b
    Examples:
      iqa-quantise --engine engine/ --calib photos/ -o engine-int8/
      iqa-quantise --engine engine/ -o engine-int8/                      on made-up pictures
      iqa-quantise --engine engine/ --statistics stats/ --ranges max -o engine-int8/
      iqa-quantise --engine engine/ --calib photos/ --precision mixed --drift 0.005 -o engine-mixed/
      iqa-quantise --engine engine/ --calib photos/ --target openvino -o engine-int8-ov/
      iqa-quantise --engine engine/ --statistics stats/ --precision fp8 -o engine-fp8/     for TensorRT only

    Exit codes: 0 written, 1 written, but some images could not be read, 2 nothing was written.
    """
    from rich.console import Console

    from . import api

    console = Console(stderr=True, quiet=quiet)
    with console.status("") as status:
        done = api.quantise(engine, output, **options, say=status.update)
    print_quantised(console, output, done, quiet=quiet)
    if done.skipped:
        click.get_current_context().exit(1)


def print_quantised(console: "Console", output: Path, done: "Quantised", *, quiet: bool) -> None:
    """Print what was left out and tried, on `console`, and a table of the stages in 8 bits."""
    _print_skipped(console, done.skipped)
    if done.made_up:
        console.print(f"no --calib: calibrated {_MADE_UP}", soft_wrap=True)
    for trial in done.trials:
        verdict = "int8" if trial.taken else "stays float32"
        why = trial.why or f"the score changes by {trial.change:.1e}"
        console.print(f"{trial.stage}: {verdict}, {why}", highlight=False, markup=False, soft_wrap=True)
    if quiet:
        return
    rows = []
    for made in done.stages:
        worst = max((c.max_abs_error / max(c.max_abs_reference, 1e-9) for c in made.stage.checks), default=None)
        rows.append(
            (
                made.stage.name,
                str(len(made.report.quantised)),
                str(len(made.report.float32)),
                f"{made.stage.file.bytes / 1e6:.1f} MB",
                f"{made.stage.file.bytes / made.float_bytes:.0%}",
                "not measured" if worst is None else f"{worst:.1e}",
            )
        )
    titles = ("layers in 8 bits", "in float32", "size", "of float32", "max error")
    print_table(titles, rows, "Error: largest difference from float32 on random inputs, of the largest value.")
    click.echo(f"{output}: engine {done.manifest.engine_id}, {done.manifest.provenance.notes[-1]}")


def print_steps(console: "Console", engine: Path, fitted: "FittedSteps", *, quiet: bool) -> None:
    """Print what was tried as a table, and what was taken."""
    _print_skipped(console, fitted.skipped)
    for why in fitted.left_out.values():
        console.print(f"left out: {why}", highlight=False, markup=False, soft_wrap=True)
    if not quiet:
        rows = [
            (
                f"{len(trial.sampling.steps)} {trial.sampling.name}",
                f"{trial.speed:.1f}×",
                f"{trial.drift:.4f}",
                f"{trial.bias:+.4f}",
                f"{trial.corrected_drift:.4f}",
                f"{trial.corrected_bias:.4f}",
                f"{trial.srcc:.4f}",
                " ".join(map(str, trial.sampling.steps)),
            )
            for trial in fitted.trials
        ]
        titles = ("speed", "change", "bias", "corrected", "its bias", "SRCC", "steps taken")
        print_table(
            titles,
            rows,
            f"Against all {fitted.all_steps} steps on {len(fitted.images)} images; corrections are fitted on one half "
            f"for the other. Another seed changes a score by {fitted.other_seed:.4f}.",
            first="steps",
        )
    if fitted.fast:
        click.echo(f"{engine}: fast takes {len(fitted.fast.sampling.steps)} of {fitted.all_steps} steps")
    else:
        console.print(
            "no number of steps keeps the scores as another seed does: the engine stays as it was. "
            "A single number, as in --steps 5, is taken all the same.",
            soft_wrap=True,
        )


def _print_skipped(console: "Console", skipped: "Sequence[Skipped]") -> None:
    for image in skipped:
        console.print(f"left out: {image.why}", highlight=False, markup=False, soft_wrap=True)
