"""`iqa-run` with `--shards`, which the runtime does not know, and `iqa-status`."""

import sys
import time
from typing import Any

import click

from ..command import Command
from ..errors import UsageError
from ..runtime.command.cli import RunCommand, expand_stdin, how_to_score
from ..runtime.command.cli import run as plain_run

_OF_SHARDS = [
    click.Option(
        ["--shards"],
        metavar="OUT",
        help="For very many images: score them by several processes into numbered shards in this folder or bucket, and "
        "go on where an earlier run ended. Then --workers is the number of processes; default: that of the GPUs, or 1. "
        "diffiqa.read_scores(OUT) reads the scores, iqa-status OUT says how far it is.",
    ),
    click.Option(["--shard-size"], type=click.IntRange(1), metavar="N", help="Images in a shard. Default: 1000."),
    click.Option(["--parquet"], is_flag=True, help="Write shards in Parquet instead of JSONL."),
    click.Option(
        ["--max-failure-rate"],
        type=click.FloatRange(0, 1),
        metavar="RATE",
        help="End with an error as soon as more than this part of all images has failed. Default: 1, never.",
    ),
    click.Option(
        ["--retry-failed"], is_flag=True, help="Try the failed images of an earlier run again, and only them."
    ),
    click.Option(
        ["--http"],
        type=click.Choice(["public", "any"]),
        help="Take names that begin with http:// or https:// too; any: those in private networks as well.",
    ),
    click.Option(
        ["--ray"], metavar="ADDRESS", help="Have workers run on a Ray cluster: its address, or local for one made here."
    ),
]
_NOT_WITH_SHARDS = (
    *("file", "form", "resume", "force", "sort", "descending", "scale", "top", "bottom", "report", "intermediates"),
    "device",
)


class _Run(RunCommand):
    """`iqa-run` as it is, with the options of shards. They need the rooms above the runtime, so they are added here."""

    def __init__(self) -> None:
        parts = {name: getattr(plain_run, name) for name in ("name", "help", "context_settings")}
        params = [parameter for parameter in plain_run.params if parameter.name != "debug"]  # every Command adds it
        super().__init__(**parts, params=params + _OF_SHARDS, callback=_run)


@click.pass_context
def _run(context: click.Context, /, **given: Any) -> None:
    own = {str(option.name): given.pop(str(option.name)) for option in _OF_SHARDS}
    if own["shards"]:
        _refuse(context, _NOT_WITH_SHARDS, "is not for --shards")
        _run_shards(context, own, given)
        return
    _refuse(context, own, "is for --shards OUT")
    plain_run.callback(**given)  # type: ignore[misc]  # it has one


def _refuse(context: click.Context, names: Any, why: str) -> None:
    for parameter in context.command.params:
        if parameter.name in names and _is_given(context, str(parameter.name)):
            raise UsageError(f"{parameter.opts[-1]} {why}")


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _run_shards(context: click.Context, own: dict[str, Any], given: dict[str, Any]) -> None:
    from ..runtime.command.table import Progress
    from .api import SHARD_SIZE, run_shards
    from .driver import Progress as Progressed

    options, backend, max_pixels = how_to_score(given)
    start = time.monotonic()
    with Progress(0, quiet=given["quiet"]) as bar:

        def watch(now: Progressed) -> None:
            bar.show(now.done, now.failed, now.rate, now.total)

        def say(text: str) -> None:
            if not given["quiet"]:
                click.echo(text, err=True)

        done = run_shards(
            given["engine"],
            expand_stdin(given["images"]),
            own["shards"],
            backend,
            options=options,
            shard_size=own["shard_size"] or SHARD_SIZE,
            workers=given["workers"] if _is_given(context, "workers") else None,
            form="parquet" if own["parquet"] else "jsonl",
            max_failure_rate=1.0 if own["max_failure_rate"] is None else own["max_failure_rate"],
            retry_failed=own["retry_failed"],
            http=own["http"] or "never",
            ray=own["ray"],
            max_pixels=max_pixels,
            self_test=not given["no_self_test"],
            watch=watch,
            say=say,
        )
    if not given["quiet"]:
        failed = f", {done.failed} failed" if done.failed else ""
        count = len(done.shards)
        shards = f"{count} shard{'s' * (count != 1)} in {own['shards']}"
        seconds = time.monotonic() - start
        click.echo(
            f"{done.records - done.failed} scored{failed} · {shards} · {done.backend} · {seconds:.1f} s", err=True
        )
    if done.failed:
        sys.exit(1)


run = _Run()


@click.command(cls=Command)
@click.argument("out", metavar="OUT")
def status(out: str) -> None:
    """Say how far a run with --shards is, without disturbing it.

    OUT is what --shards was given: a folder or a bucket.

    \b
    Example:
      iqa-status scores/

    Exit codes: 0 the run is finished, 1 it is not, 2 there is none.
    """
    from ..runtime.command.table import rate_text
    from .api import status as look

    found = look(out)
    click.echo(f"{found.done} of {found.total} done, {found.failed} failed, {found.left} left")
    if found.finished:
        click.echo("finished")
        return
    if now := found.progress:
        ago = max(0, round(time.time() - now.at))
        deaths = f", {now.deaths} workers died" if now.deaths else ""
        click.echo(f"{rate_text(now.rate)}{deaths} · process {now.pid} on {now.host}, last heard of {ago} s ago")
    sys.exit(1)
