"""The `iqa` group. Every command is also installed as `iqa-NAME`."""

from pathlib import Path
from typing import Any

import click

from . import __version__
from .bench.cli import bench
from .calibration.cli import calibrate, print_quantised, quantise
from .command import HELP, Command
from .engine.manifest import StageName
from .errors import UsageError
from .evaluation.cli import evaluate
from .export.cli import (
    LIBRARIES,
    PATH,
    build,
    convert,
    print_exported,
    print_preview,
    prompts,
    read_weights,
    weight_options,
)
from .serve.cli import serve
from .shards.cli import run, status
from .training.cli import train
from .verify.cli import verify


@click.group(context_settings=HELP)
@click.version_option(__version__, prog_name="iqa")
def main() -> None:
    """Give images a quality score, without perfect copies to compare them with.

    iqa export turns trained weights into an engine. iqa run scores images with it. The other commands make engines
    smaller, check them, measure them and train new weights. Each command is also installed under its own name, such as
    iqa-export.
    """


# Here and not in export/, because it calls calibration too, which imports export.
@click.command(cls=Command)
@weight_options
@click.option("-o", "--output", type=PATH, required=True, metavar="DIR", help="The engine directory to write.")
@click.option(
    "--stage",
    "stages",
    type=click.Choice([name.value for name in StageName]),
    multiple=True,
    help="Export only this stage (repeatable), to look at it. Such a directory cannot score.",
)
@click.option(
    "--target",
    type=click.Choice([*LIBRARIES, "none"]),
    help="Build fp16 engines with this library too. Default: an installed one if there is a GPU, else none.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "int8", "fp8", "mixed"]),
    default="fp32",
    show_default=True,
    help="What the ONNX stages compute in. For int8, fp8 (TensorRT only) and mixed it calibrates on --calib, as "
    "iqa-quantise does.",
)
@click.option(
    "--calib", multiple=True, metavar="IMAGES", help="Calibration images for int8, fp8 and mixed (repeatable)."
)
@click.option("--force", is_flag=True, help="Replace an engine that is already there.")
@click.option(
    "--accept-drift",
    is_flag=True,
    help="Write stages that differ from PyTorch by more than rounding. The engine then says so wherever it runs.",
)
@click.option("--dry-run", is_flag=True, help="Read the weights, print what would be written, and stop.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def export(
    output: Path,
    stages: tuple[str, ...],
    target: str | None,
    precision: str,
    calib: tuple[str, ...],
    force: bool,
    accept_drift: bool,
    dry_run: bool,
    quiet: bool,
    **weights: Any,
) -> None:
    """Turn a checkpoint into an engine directory.

    Every stage (U-Net step, ViT encoder, VCG head, VDA head) becomes a float32 ONNX file of its own. It is compared
    with PyTorch on random inputs, and recorded with its hash in DIR/manifest.json. DIR appears when everything is
    done, or not at all. With a --target, engines are then built as iqa-build builds them without options.

    \b
    Examples:
      iqa-export --ckpt model.safetensors -o engine/
      iqa-export --ckpt iqa_net.pt --unet I800000_E40_gen.pth -o engine/
      iqa-export --ckpt ckpt_valid.pt --swin-scale 0.13 -o engine/
      iqa-export --preset mini --seed 0 -o engine/        untrained, to try things out

    Exit codes: 0 exported; 2 nothing was written, or only the ONNX stages because an engine could not be built.
    """
    from rich.console import Console

    from .calibration.api import export_quantised
    from .export.api import export as export_float32
    from .export.engine import check_target

    if weights["ckpt"] is None and weights["preset"] is None:
        raise UsageError("give --ckpt FILE; or --preset NAME --seed N for an untrained model")
    if precision == "fp32" and calib:
        raise UsageError("--calib is for --precision int8, fp8 or mixed; float32 stages need no calibration")
    if precision != "fp32" and (stages or not calib or accept_drift or target not in {None, "none"}):
        raise UsageError(
            f"--precision {precision} needs --calib IMAGES and whole models: no --stage, no --target, no --accept-drift"
        )
    check_target(output, force=force)
    console = Console(stderr=True, quiet=quiet)
    loaded = read_weights(console, **weights)
    if dry_run:
        print_preview(loaded, output, [StageName(name) for name in stages])
        return
    with console.status("") as status:
        if precision != "fp32":
            made = export_quantised(loaded, output, calib, precision=precision, force=force, say=status.update)
            print_quantised(console, output, made, quiet=quiet)
            return
        done = export_float32(
            loaded,
            output,
            stages=stages,
            target=target,
            force=force,
            accept_drift=accept_drift,
            say=status.update,
        )
    if not quiet:
        print_exported(output, loaded, done)


COMMANDS = (export, build, calibrate, quantise, verify, run, status, convert, prompts, train, evaluate, serve, bench)
for command in COMMANDS:
    main.add_command(command)

if __name__ == "__main__":
    main()
