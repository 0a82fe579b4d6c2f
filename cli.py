"""The `iqa` group. Every command is also installed as `iqa-NAME`."""

import click

from . import __version__
from .bench.cli import bench
from .calibration.cli import calibrate, quantise
from .evaluation.cli import evaluate
from .export.cli import build, convert, export
from .runtime.command.cli import run
from .training.cli import train
from .verify.cli import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="iqa")
def main() -> None:
    """Give images a quality score, without perfect copies to compare them with.

    iqa export turns trained weights into an engine. iqa run scores images with it. The other commands make engines
    smaller, check them, measure them and train new weights. Each command is also installed under its own name, such as
    iqa-export.
    """


for command in (export, build, calibrate, quantise, verify, run, convert, train, evaluate, bench):
    main.add_command(command)

if __name__ == "__main__":
    main()
