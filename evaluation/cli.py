"""`iqa-eval`: options in, one library call, the findings out."""

import sys
from pathlib import Path
from typing import Any

import click

from ..command import refuse_given
from ..errors import UsageError
from ..runtime.command.cli import RunCommand

_PATH = click.Path(path_type=Path)


@click.command("eval", cls=RunCommand)
@click.option("--engine", type=_PATH, metavar="DIR", help="Score the images with this engine.")
@click.option("--scores", type=_PATH, metavar="FILE", help="Take scores from iqa-run's results or a CSV image,score.")
@click.option("--gmad", type=(_PATH, _PATH), metavar="FILE FILE", help="Let the models of two score files compete.")
@click.option("--labels", type=_PATH, metavar="FILE", help="A CSV image,score[,reference][,distortion][,level].")
@click.option("--lower-better", is_flag=True, help="In the CSV file, a lower score is better.")
@click.option("--data", type=_PATH, metavar="DIR", help="The folder of a published data set.")
@click.option("--dataset", metavar="NAME", help="Which one it is, such as kadid10k.")
@click.option("--split", type=_PATH, metavar="FILE", help="Evaluate a part of this split only.")
@click.option("--part", default="test", show_default=True, metavar="NAME", help="Which one.")
@click.option(
    "--reference",
    type=_PATH,
    metavar="FILE",
    help="Write what iqa-export and iqa-convert take with --reference: later scores then have a percentile among these "
    "images, and the opinion that they stand for.",
)
@click.option(
    "--opinions",
    type=(float, float),
    metavar="WORST BEST",
    help="The labels that are an opinion of 1 and of 5. Default: the worst and the best label of the set.",
)
@click.option("-o", "--output", type=_PATH, metavar="DIR", help="Folder for scores and findings.")
@click.option("--resume", is_flag=True, help="Go on with the scores in DIR.")
@click.option("--force", is_flag=True, help="Start over if DIR holds scores.")
@click.option("--crops", type=click.IntRange(1, 10_000), metavar="N", help="Crops per image. Default: the engine's.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Seed of the noise.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Default: the CPUs this process may use.")
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="Images scored at a time.")
@click.option("--levels", type=click.IntRange(1), default=2, show_default=True, help="Quality levels of --gmad.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, no summary on stderr.")
def evaluate(
    engine: Path | None,
    scores: Path | None,
    gmad: tuple[Path, Path] | None,
    labels: Path | None,
    **given: Any,
) -> None:
    """Compare scores with people's opinions: rank and linear correlation, by branch, distortion and level.

    DIR gets scores.jsonl, evaluation.json, evaluation.md (also on stdout) and scatter.png. PLCC is given raw and after
    the 4-parameter logistic. If a data set has references, they are scored too, for comparison. iqa-run has more
    options for scoring: use it, and give its results with --scores. SciPy and matplotlib are needed:
    pip install 'diffiqa[train]'.

    \b
    Examples:
      iqa-eval --engine engine/ --data kadid10k/ --dataset kadid10k --split split.json -o results/kadid
      iqa-eval --scores scores.csv --labels labels.csv
      iqa-eval --gmad ours.jsonl theirs.csv
      iqa-eval --engine engine/ --labels labels.csv -o results/ --reference reference.json

    To test one data set's model on another, as in the paper's Table III: give the engine and the other data set, but
    no --split.

    Exit codes: 0 all images have a score, 1 some have none, 2 nothing to evaluate, 130 interrupted (--resume goes on).
    """
    from .api import compete
    from .api import evaluate as compare
    from .text import table, to_text

    if sum(value is not None for value in (engine, scores, gmad)) != 1:
        raise UsageError("give one of --engine, --scores and --gmad: where do the scores come from?")
    source = "--gmad" if gmad else "--scores" if scores else "--engine"
    # Whoever gives an option expects an effect.
    refuse_given(_IDLE[source], f"{{}} has no effect with {source}: leave it out")
    levels, data, threads = given.pop("levels"), given.pop("data"), given.pop("threads")
    if gmad:
        click.echo(table(compete(*gmad, levels=levels, output=given["output"])))
        return
    if (labels is None) == (data is None):
        raise UsageError("give the labels: --labels FILE, or --data DIR with --dataset NAME")
    backend = None
    if threads:
        from ..runtime.backends import OnnxRuntime

        backend = OnnxRuntime(threads)
    found = compare(labels or data, engine=engine, scores=scores, backend=backend, **given)
    click.echo(to_text(found), nl=False)
    if found.missing:
        sys.exit(1)


# What iqa-eval's options are for, where not for all of its three sources.
_SCORING = ("resume", "force", "crops", "seed", "threads", "workers", "quiet")
_COMPARING = ("labels", "lower_better", "data", "dataset", "split", "part", "opinions")
_IDLE = {
    "--engine": ("levels",),
    "--scores": ("levels", "reference", *_SCORING),
    "--gmad": ("reference", *_SCORING, *_COMPARING),
}
