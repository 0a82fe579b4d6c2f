"""`iqa-train` and `iqa-eval`: options in, one library call, progress on stderr."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..command import Command
from ..errors import OutputError, UsageError
from ..runtime.command.cli import RunCommand

if TYPE_CHECKING:
    from ..data.datasets import Dataset
    from .config import RunConfig
    from .loop import Conduct, Result
    from .score import Rated

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
_LABELS = [
    click.option("--data", type=_PATH, required=True, metavar="PATH", help="The data set's folder, or a CSV file."),
    click.option("--dataset", metavar="NAME", help="Which published data set the folder holds, such as kadid10k."),
    click.option("--lower-better", is_flag=True, help="In the CSV file, a lower score is better."),
    click.option(
        "--split",
        "split_file",
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
]


def _options(options: Sequence[Callable[[F], F]]) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.group()
def train() -> None:
    """Train the restoring U-Net, the backbones, then the network that scores; make data for all three.

    restore, pretrain and score run on the CPU, on a GPU, or in several processes: torchrun --nproc-per-node 2 -m --
    diffiqa.cli train …. DIR gets log.csv, validation.csv, checkpoint.pt and, at the end, plot.png and
    model.safetensors, which iqa-export takes.
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
def restore(
    config_file: Path,
    output: Path,
    data: tuple[Path, ...],
    held_out: tuple[Path, ...],
    start: Path | None,
    **given: Any,
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
    result = run_restore(config, photos, others, output, start=start, conduct=_conduct(given, config))
    _finish(output, result, quiet=given["quiet"])


@train.command(cls=TrainCommand)
@_options(_SHARED)
@_options(_LABELS)
@click.option("--start", type=_PATH, metavar="FILE", help="Go on with the backbones of this bundle.")
def pretrain(config_file: Path, output: Path, cache: Path | None, start: Path | None, **given: Any) -> None:
    """Teach the ViT and the ResNet what distortions look like, for when ImageNet's weights do not fit the model.

    The data set says how each picture was distorted, as `iqa-train rate` and KADID-10k do; nothing is restored.

    \b
    Example:
      iqa-train rate --photos photos/ -o single/ --train 80 1 --one-level --held-out 1 1
      iqa-train pretrain --config pretrain.toml --data single/labels.csv --split single/split.json -o runs/backbones
      iqa-train score --vit runs/backbones/model.safetensors --resnet runs/backbones/model.safetensors …

    Exit codes: 0 finished, 2 failed, 130 interrupted; a failed or interrupted run can be resumed.
    """
    from .config import PretrainConfig, read_config
    from .pretrain import run_pretrain

    config = read_config(PretrainConfig, config_file)
    parts = _parts(given, config.seed, output, "validation")
    result = run_pretrain(
        config,
        parts["train"],
        parts["validation"],
        output,
        start=start,
        cache=cache,
        conduct=_conduct(given, config),
    )
    _finish(output, result, quiet=given["quiet"])


@train.command(cls=TrainCommand)
@_options(_SHARED)
@_options(_LABELS)
@_options(_PARTS)
@click.option("--start", type=_PATH, metavar="FILE", help="Begin with all trained parts of this bundle.")
def score(
    config_file: Path,
    output: Path,
    unet: Path | None,
    vit: Path | None,
    resnet: Path | None,
    start: Path | None,
    cache: Path | None,
    **given: Any,
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
    from .score import run_score

    config = read_config(ScoreConfig, config_file)
    parts = _parts(given, config.seed, output, "validation")
    result = run_score(
        config,
        parts["train"],
        parts["validation"],
        output,
        unet=unet,
        vit=vit,
        resnet=resnet,
        start=start,
        cache=cache,
        conduct=_conduct(given, config),
    )
    _finish(output, result, quiet=given["quiet"])


@train.command(cls=Command)
@click.argument("sources", nargs=-1, type=_PATH, metavar="[SOURCE]...")
@click.option("-o", "--output", type=_PATH, required=True, metavar="DIR", help="A new folder for the photographs.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of the split into parts.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def photos(sources: tuple[Path, ...], output: Path, seed: int, quiet: bool) -> None:
    """Gather pristine photographs, split into train, validation and test.

    SOURCE is a Debian package (.deb) or a folder of photographs. Without any, wallpaper packages are fetched with
    apt-get download: about 290 photographs, 350 MB. What is small, has hardly any detail, or shows what another
    picture shows is left out, and named. photographs.csv says where each comes from and under which licence.

    Exit codes: 0 done, 2 failed.
    """
    from ..data.photos import gather

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
    "training",
    type=(int, int),
    default=(2, 2),
    show_default=True,
    help="Windows of each photograph to train on, and distortions of each window.",
)
@click.option(
    "--one-level",
    is_flag=True,
    help="Train on one level of each distortion, drawn: every picture shows something else, which pretraining wants.",
)
@click.option(
    "--held-out", type=(int, int), default=(1, 5), show_default=True, help="The same for validation and test."
)
@click.option("--side", type=int, default=176, show_default=True, help="Of the square windows, in pixels.")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of windows and distortions.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
def rate(
    folder: Path,
    output: Path,
    training: tuple[int, int],
    one_level: bool,
    held_out: tuple[int, int],
    side: int,
    seed: int,
    quiet: bool,
) -> None:
    """Make a rated data set from photographs: distort windows of them, let full-reference metrics rate the result.

    The label is a pseudo-score between 0 and 1, the mean rank by HaarPSI, MDSI, GMSD and MS-SSIM among the training
    part: nobody's opinion, but one that needs nobody. labels.csv and split.json are for `iqa-train score`.

    \b
    Example:
      iqa-train photos -o photos/
      iqa-train rate --photos photos/ -o rated/
      iqa-train score --data rated/labels.csv --split rated/split.json …

    Exit codes: 0 done, 2 failed.
    """
    from ..data.photos import parts_in
    from ..data.rate import Amount, rate

    amounts = {"train": Amount(*training, one_level), "validation": Amount(*held_out), "test": Amount(*held_out)}
    say = _voice(quiet=quiet)
    count = rate(
        parts_in(folder),
        output,
        amounts=amounts,
        seed=seed,
        side=side,
        progress=lambda done: say(f"{done} pictures"),
    )
    say(f"{output / 'labels.csv'}: {count} pictures")


@train.command(cls=TrainCommand)
@_options(_SHARED)
@click.option(
    "--recipes", type=_PATH, required=True, multiple=True, metavar="PATH", help="TOML files or folders of them."
)
@_options(_LABELS)
@_options(_PARTS)
def ablate(
    config_file: Path,
    output: Path,
    recipes: tuple[Path, ...],
    unet: Path | None,
    vit: Path | None,
    resnet: Path | None,
    cache: Path | None,
    **given: Any,
) -> None:
    """Train a network for each recipe and compare what they reach: the paper's ablations.

    A recipe holds what it changes in the configuration, such as `[model] vda = false`. DIR gets a run for each, and
    ablation.csv, which is printed, too.

    \b
    Example:
      iqa-train ablate --config score.toml --recipes ablations/ --data rated/labels.csv --split rated/split.json
        --unet runs/unet/model.safetensors -o runs/ablations

    Exit codes: 0 finished, 1 some recipes failed (the table says why), 2 failed, 130 interrupted; --resume goes on.
    """
    from ..evaluation.evaluate import table
    from .ablate import COLUMNS, ablate, read_recipes

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("ablate is one process; under torchrun, give each recipe's configuration to iqa-train score")
    configs = read_recipes(config_file, recipes)
    first = next(iter(configs.values()))
    rows = ablate(
        configs,
        _parts(given, first.seed, output, "validation", "test"),
        output,
        unet=unet,
        vit=vit,
        resnet=resnet,
        cache=cache,
        conduct=_conduct(given, first),
    )
    click.echo(table([COLUMNS, *(row.cells() for row in rows)]))
    if any(row.problem for row in rows):
        sys.exit(1)


@train.command(cls=Command)
@click.argument("runs", nargs=-1, required=True, type=_PATH, metavar="RUN...")
@click.option("-o", "--output", type=_PATH, required=True, metavar="FILE", help="The picture, a PNG file.")
def plot(runs: tuple[Path, ...], output: Path) -> None:
    """Draw loss, learning rate and validation of runs, unfinished ones too, over each other.

    RUN is a folder of `iqa-train restore` or `iqa-train score`; a finished run has such a picture, plot.png.

    Exit codes: 0 done, 2 failed.
    """
    from ..evaluation.charts import save
    from .plot import draw_runs

    if output.suffix.lower() != ".png":
        raise UsageError(f"{output} is no name of a PNG file; call it {output.name or 'plot'}.png")
    save(draw_runs(runs), output)


@click.command("eval", cls=RunCommand)
@click.option("--engine", type=_PATH, metavar="DIR", help="Score the images with this engine.")
@click.option("--scores", type=_PATH, metavar="FILE", help="Take scores from iqa-run's results or a CSV image,score.")
@click.option("--gmad", type=(_PATH, _PATH), metavar="FILE FILE", help="Let the models of two score files compete.")
@click.option("--labels", type=_PATH, metavar="FILE", help="A CSV image,score[,reference][,distortion][,level].")
@click.option("--lower-better", is_flag=True, help="In the CSV file, a lower score is better.")
@click.option("--data", type=_PATH, metavar="DIR", help="The folder of a published data set.")
@click.option("--dataset", metavar="NAME", help="Which one it is, such as kadid10k.")
@click.option("--split", "split_file", type=_PATH, metavar="FILE", help="Evaluate a part of this split only.")
@click.option("--part", default="test", show_default=True, metavar="NAME", help="Which one.")
@click.option("-o", "--output", type=_PATH, metavar="DIR", help="Folder for scores and findings.")
@click.option("--resume", is_flag=True, help="Go on with the scores in DIR.")
@click.option("--force", is_flag=True, help="Start over if DIR holds scores.")
@click.option("--crops", type=click.IntRange(1, 10_000), metavar="N", help="Crops per image. Default: the engine's.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Of the noise.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Default: the CPUs this process may use.")
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Images scored at a time.")
@click.option("--levels", type=click.IntRange(1), default=2, show_default=True, help="Quality levels of --gmad.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no summary on stderr.")
def evaluate(
    engine: Path | None,
    scores: Path | None,
    gmad: tuple[Path, Path] | None,
    labels: Path | None,
    output: Path | None,
    **given: Any,
) -> None:
    """Compare scores with people's opinions: rank and linear correlation, by branch, distortion and level.

    DIR gets scores.jsonl, evaluation.json, evaluation.md (also on stdout) and scatter.png. PLCC is given raw and after
    the 4-parameter logistic. References that a data set comes with are scored, too, to compare with. What iqa-run can
    do beyond the options here, do with it and give --scores.

    \b
    Examples:
      iqa-eval --engine engine/ --data kadid10k/ --dataset kadid10k --split split.json -o results/kadid
      iqa-eval --scores scores.csv --labels labels.csv
      iqa-eval --gmad ours.jsonl theirs.csv

    Between data sets, as in the paper's Table III: once for each data set, with the engine that another one trained,
    without --split.

    Exit codes: 0 all images have a score, 1 some have none, 2 nothing to evaluate, 130 interrupted (--resume goes on).
    """
    from ..data.outputs import to_csv, write_file
    from ..data.splits import Split
    from ..evaluation.evaluate import (
        evaluate,
        gmad_table,
        pictures_of,
        points_of,
        read_branches,
        score_pictures,
        table,
        to_text,
        write_evaluation,
    )

    if sum(value is not None for value in (engine, scores, gmad)) != 1:
        raise UsageError("give one of --engine, --scores and --gmad: where do the scores come from?")
    _refuse_idle("--gmad" if gmad else "--scores" if scores else "--engine")
    if gmad:
        rows = gmad_table(*gmad, given["levels"])
        if output:
            write_file(output / "gmad.csv", to_csv(rows))
        click.echo(table(rows))
        return
    if (labels is None) == (given["data"] is None):
        raise UsageError("give the labels: --labels FILE, or --data DIR with --dataset NAME")
    if engine and not output:
        raise UsageError("name a folder with -o, so that no score is lost if scoring is interrupted")
    dataset = _labelled(labels or given["data"], given["dataset"], lower_better=given["lower_better"], need_files=False)
    split = Split.read(given["split_file"]) if given["split_file"] else None
    items = split.items(dataset, given["part"]) if split else dataset.items
    pictures = pictures_of(items)
    if engine and output:
        from ..runtime.backends import OnnxRuntime
        from ..runtime.results import Options
        from ..runtime.scorer import load

        backend = OnnxRuntime(given["threads"]) if given["threads"] else None
        with load(engine, backend) as scorer:
            branches = score_pictures(
                scorer,
                pictures,
                output,
                Options(given["crops"], given["seed"]),
                **{name: given[name] for name in ("resume", "force", "quiet", "workers")},
            )
            source = f"engine {scorer.info.engine}"
    elif scores:
        branches, source = read_branches(scores, pictures), scores.name
    found = evaluate(dataset, items, branches, scores=source, part=given["part"] if split else None)
    if output:
        write_evaluation(output, found, points_of(dataset, items, branches["score"]))
    click.echo(to_text(found), nl=False)
    if found.missing:
        sys.exit(1)


# What iqa-eval's options are for, where not for all of its three sources.
_SCORING = ("resume", "force", "crops", "seed", "threads", "workers", "quiet")
_COMPARING = ("labels", "lower_better", "data", "dataset", "split_file", "part")
_IDLE = {"--engine": ("levels",), "--scores": ("levels", *_SCORING), "--gmad": (*_SCORING, *_COMPARING)}


def _refuse_idle(source: str) -> None:
    """Refuse options that would change nothing: whoever gave one expects something of it."""
    context = click.get_current_context()
    for parameter in context.command.params:
        name = parameter.name or ""
        if name in _IDLE[source] and context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise UsageError(f"{parameter.opts[0]} has no effect with {source}: leave it out")


def _labelled(path: Path, name: str | None, *, lower_better: bool, need_files: bool = True) -> "Dataset":
    """Read a published data set by its name, or a CSV file."""
    from ..data.datasets import load, load_csv

    if name is None and path.is_dir():
        raise UsageError(f"{path} is a folder: say with --dataset which data set it holds, or give a CSV file")
    if name is None:
        return load_csv(path, lower_is_better=lower_better, need_files=need_files)
    if lower_better:
        raise UsageError("--lower-better is for CSV files: a published data set's direction is known")
    return load(name, path)


def _parts(given: Mapping[str, Any], seed: int, output: Path, *held_out: str) -> "dict[str, list[Rated]]":
    """Return "train" and the held-out parts of the split in a file; without one, draw it and write it to the folder."""
    from ..data.splits import Split, split_by_content
    from .score import Rated

    rated = _labelled(given["data"], given["dataset"], lower_better=given["lower_better"])
    split_file = given["split_file"]
    split = Split.read(split_file) if split_file else split_by_content(rated, seed)
    if split_file is None and _leads():
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise OutputError(f"cannot make the folder {output}: {exc}") from exc
        split.write(output / "split.json")
    parts = {part: part for part in ("train", *held_out)}
    if "training" in split.parts:  # as publishers call it
        parts["train"] = "training"
    return {
        name: [Rated(item.path, item.quality, item.distortion or "") for item in split.items(rated, part)]
        for name, part in parts.items()
    }


def _leads() -> bool:
    """Whether this is the first process of several: the one that speaks and writes."""
    return os.environ.get("RANK", "0") == "0"


def _voice(*, quiet: bool) -> Callable[[str], None]:
    """Return what tells remarks: only the first process of several speaks."""
    silent = quiet or not _leads()

    def say(text: str) -> None:
        if not silent:
            click.echo(text, err=True)

    return say


def _conduct(given: Mapping[str, Any], config: "RunConfig") -> "Conduct":
    """Return how the run goes, of the options that all runs share."""
    from .loop import Conduct

    say, steps = _voice(quiet=given["quiet"]), config.optimisation.steps

    def progress(step: int, loss: float, rate: float) -> None:
        say(f"step {step} of {steps}: loss {loss:.5f}, learning rate {rate:.2e}")

    return Conduct(given["device"], given["resume"], given["threads"], progress, say)


def _finish(output: Path, result: "Result", *, quiet: bool) -> None:
    if quiet or not _leads():
        return
    found = ", ".join(f"{name} {value:.4f}" for name, value in (result.verdict or {}).items())
    last = f"; last validation: {found}" if found else ""
    click.echo(f"{output / 'model.safetensors'}: weights of step {result.step}{last}")
