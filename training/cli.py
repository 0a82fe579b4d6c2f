"""`iqa-train restore` and `iqa-train score`: options in, one library call, progress on stderr."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..command import Command
from ..errors import OutputError, UsageError

F = TypeVar("F", bound=Callable[..., Any])
_PATH = click.Path(path_type=Path)


class TrainCommand(Command):
    """An interrupted run ends with 130: it has left a checkpoint."""

    interrupt_exit_code = 130


_SHARED = [
    click.option("--config", "config_file", type=_PATH, required=True, metavar="FILE", help="What to do, as TOML."),
    click.option("-o", "--output", type=_PATH, required=True, metavar="DIR", help="The run's folder."),
    click.option("--resume", is_flag=True, help="Go on with the run in DIR, if one is there, to the same result."),
    click.option("--device", metavar="NAME", help="cpu, cuda or cuda:N. Default: a GPU if there is one."),
    click.option(
        "--threads", type=click.IntRange(1, 256), default=2, show_default=True, help="Threads that prepare batches."
    ),
    click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
]


def _shared_options(command: F) -> F:
    for option in reversed(_SHARED):
        command = option(command)
    return command


@click.group()
def train() -> None:
    """Train the restoring U-Net, then the network that scores.

    Runs on the CPU, on a GPU, or under torchrun on several. DIR gets log.csv, validation.csv, checkpoint.pt and, at
    the end, model.safetensors, which iqa-export takes.
    """


@train.command(cls=TrainCommand)
@_shared_options
@click.option(
    "--data", type=_PATH, required=True, multiple=True, metavar="DIR", help="Pristine photographs (repeatable)."
)
@click.option(
    "--held-out", type=_PATH, multiple=True, metavar="DIR", help="Photographs to validate on: never those of --data."
)
@click.option("--start", type=_PATH, metavar="FILE", help="Begin with the U-Net of this bundle.")
def restore(
    config_file: Path,
    output: Path,
    resume: bool,
    device: str | None,
    threads: int,
    quiet: bool,
    data: tuple[Path, ...],
    held_out: tuple[Path, ...],
    start: Path | None,
) -> None:
    """Teach the U-Net to restore distorted photographs.

    \b
    Example:
      iqa-train restore --config restore.toml --data photos/ --held-out others/ -o runs/unet

    Exit codes: 0 finished, 2 failed, 130 interrupted; a failed or interrupted run can be resumed.
    """
    from ..runtime.inputs import find_images
    from .config import RestoreConfig, read_config
    from .restore import run_restore

    config = read_config(RestoreConfig, config_file)
    photos, others = (find_images(map(str, folders)) for folders in (data, held_out))
    if both := {path.resolve() for path in photos} & {path.resolve() for path in others}:
        raise UsageError(f"{min(both)} is given both with --data and with --held-out")
    say, progress = _voices(quiet, config.optimisation.steps)
    result = run_restore(
        config,
        photos,
        others,
        output,
        start=start,
        device=device,
        resume=resume,
        threads=threads,
        progress=progress,
        say=say,
    )
    _finish(output, result.step, result.verdict, quiet=quiet)


@train.command(cls=TrainCommand)
@_shared_options
@click.option("--data", type=_PATH, required=True, metavar="PATH", help="The data set's folder, or a CSV file.")
@click.option("--dataset", metavar="NAME", help="Which published data set the folder holds, such as kadid10k.")
@click.option("--lower-better", is_flag=True, help="In the CSV file, a lower score is better.")
@click.option(
    "--split",
    "split_file",
    type=_PATH,
    metavar="FILE",
    help="Parts to train and validate on. Default: drawn by reference from the seed, written to DIR/split.json.",
)
@click.option("--unet", type=_PATH, metavar="FILE", help="The bundle with the U-Net that restores.")
@click.option("--start", type=_PATH, metavar="FILE", help="Begin with all trained parts of this bundle.")
@click.option("--cache", type=_PATH, metavar="DIR", help="Where restorations are kept. Default: the run's folder.")
def score(
    config_file: Path,
    output: Path,
    resume: bool,
    device: str | None,
    threads: int,
    quiet: bool,
    data: Path,
    dataset: str | None,
    lower_better: bool,
    split_file: Path | None,
    unet: Path | None,
    start: Path | None,
    cache: Path | None,
) -> None:
    """Teach the network to score images that people (or metrics) have rated.

    The part "validation" of the split chooses the best weights; "test" is not looked at.

    \b
    Example:
      iqa-train score --config score.toml --data kadid10k/ --dataset kadid10k --unet runs/unet/model.safetensors
        -o runs/score

    Exit codes: 0 finished, 2 failed, 130 interrupted; a failed or interrupted run can be resumed.
    """
    from .config import ScoreConfig, read_config
    from .datasets import load, load_csv
    from .score import Rated, run_score
    from .splits import Split, split_by_content

    config = read_config(ScoreConfig, config_file)
    if dataset is None and data.is_dir():
        raise UsageError(f"{data} is a folder: say with --dataset which data set it holds, or give a CSV file")
    if dataset is not None and lower_better:
        raise UsageError("--lower-better is for CSV files: a published data set's direction is known")
    rated = load_csv(data, lower_is_better=lower_better) if dataset is None else load(dataset, data)
    split = Split.read(split_file) if split_file else split_by_content(rated, config.seed)
    if split_file is None and _leads():
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise OutputError(f"cannot make the folder {output}: {exc}") from exc
        split.write(output / "split.json")
    training = "training" if "training" in split.parts else "train"  # as publishers call it, or we
    parts = [[Rated(item.path, item.quality) for item in split.items(rated, part)] for part in (training, "validation")]
    say, progress = _voices(quiet, config.optimisation.steps)
    result = run_score(
        config,
        parts[0],
        parts[1],
        output,
        unet=unet,
        start=start,
        cache=cache,
        device=device,
        resume=resume,
        threads=threads,
        progress=progress,
        say=say,
    )
    _finish(output, result.step, result.verdict, quiet=quiet)


def _leads() -> bool:
    """Whether this is the first process of several: the one that speaks and writes."""
    return os.environ.get("RANK", "0") == "0"


def _voices(quiet: bool, steps: int) -> tuple[Callable[[str], None], Callable[[int, float, float], None]]:
    """Return what tells remarks and what tells progress; only the first process of several speaks."""
    silent = quiet or not _leads()

    def say(text: str) -> None:
        if not silent:
            click.echo(text, err=True)

    def progress(step: int, loss: float, rate: float) -> None:
        say(f"step {step} of {steps}: loss {loss:.5f}, learning rate {rate:.2e}")

    return say, progress


def _finish(output: Path, step: int, verdict: dict[str, float] | None, *, quiet: bool) -> None:
    if quiet or not _leads():
        return
    found = ", ".join(f"{name} {value:.4f}" for name, value in (verdict or {}).items())
    click.echo(
        f"{output / 'model.safetensors'}: weights of step {step}{'; last validation: ' + found if found else ''}"
    )
