"""`iqa-bench`: options in, one benchmark, a Markdown report out."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..command import Command, refuse_given
from ..engine.atomic import check_folder_of
from ..errors import UsageError

if TYPE_CHECKING:
    from .results import Results

_PATH = click.Path(path_type=Path)
_OF_RECOMMEND = {"engine", "images", "recommend", "quantised", "seed", "quiet", "debug"}


class BenchCommand(Command):
    """Ends with 130 when it is interrupted: unlike other commands it has results then."""

    interrupt_exit_code = 130


class Several(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Values with commas between; `parse` raises ValueError for a text that is none."""

    name = "values"

    def __init__(self, parse: Callable[[str], Any], what: str) -> None:
        self._parse, self._what = parse, what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse a text; a value that comes twice counts once."""
        try:
            return tuple(dict.fromkeys(self._parse(part.strip()) for part in value.split(",")))
        except ValueError:
            self.fail(f"{value!r} is not {self._what}", param, ctx)


def _size(text: str) -> tuple[int, int]:
    """Parse `WIDTHxHEIGHT` into (height, width)."""
    width, height = map(_whole, text.split("x"))
    if min(width, height) < 16:
        raise ValueError(text)
    return height, width


def _whole(text: str, most: int = 100_000) -> int:
    if not (text.isdecimal() and 1 <= int(text) <= most):
        raise ValueError(text)
    return int(text)


def counts(maximum: int) -> Several:
    """Return the type of whole numbers from 1 on."""
    return Several(partial(_whole, most=maximum), f"whole numbers from 1 to {maximum} with commas between")


@click.command(cls=BenchCommand, context_settings={"show_default": True})
@click.option("--engine", type=_PATH, required=True, metavar="DIR", help="The engine directory, from iqa-export.")
@click.argument("images", nargs=-1)
@click.option(
    "--size",
    "sizes",
    type=Several(_size, "WIDTHxHEIGHT, such as 224x224"),
    metavar="WxH[,…]",
    help="Size of generated images. Default: 224x224.",
)
@click.option(
    "--count", type=click.IntRange(1, 1000), metavar="N", help="How many images to generate of each size. Default: 2."
)
@click.option("--crops", type=counts(10_000), metavar="N[,…]", help="Crops per image. Default: the engine's.")
@click.option("--steps", type=counts(4000), metavar="N[,…]", help="Sampling steps, as in iqa-run. Default: all.")
@click.option("--fast", is_flag=True, help="Measure the fast sampling from iqa-calibrate --steps beside all steps.")
@click.option("--workers", type=counts(64), default="1", metavar="N[,…]", help="Images scored at the same time.")
@click.option("--batch", type=counts(1024), default="1", metavar="N[,…]", help="Images per batch; needs a GPU.")
@click.option("--rounds", type=click.IntRange(1, 100_000), default=10, help="How many samples to take of each case.")
@click.option(
    "--starts",
    type=click.IntRange(0, 100),
    default=3,
    help="How many fresh processes to start, to time the start-up.",
)
@click.option("--soak", type=click.IntRange(0), default=0, metavar="N", help="At the end, score N images in a row.")
@click.option("--seed", type=click.IntRange(0, 2**63), default=0, help="Seed of generated images and of the noise.")
@click.option(
    "--threads", type=click.IntRange(1), metavar="N", help="CPU threads. Default: the CPUs this process may use."
)
@click.option(
    "--backend",
    type=click.Choice(["tensorrt", "inductor-gpu", "onnxruntime-gpu", "onnxruntime", "openvino", "inductor"]),
    default="onnxruntime",
    help="What runs the networks. The first three need a GPU.",
)
@click.option("--device", type=click.IntRange(0), metavar="N", help="Number of the GPU, from 0 on.")
@click.option("--no-cuda-graph", is_flag=True, help="Launch every kernel by itself, as in iqa-run.")
@click.option("--spin", is_flag=True, help="Let ONNX Runtime's idle CPU threads spin, as in iqa-run.")
@click.option(
    "--cpu-precision", type=click.Choice(["fp32", "bf16"]), help="Precision of OpenVINO's U-Net. Default: fp32."
)
@click.option("--peers", is_flag=True, help="Also measure all peers: ONNX Runtime's defaults, OpenVINO, PyTorch, …")
@click.option("--peer", "chosen", multiple=True, metavar="NAME", help="Measure this peer only (repeatable).")
@click.option(
    "--ckpt", type=_PATH, metavar="FILE", help="The weights that the engine was exported from; PyTorch needs them."
)
@click.option(
    "--peer-timeout",
    type=click.FloatRange(1),
    default=900,
    metavar="S",
    help="Give up on a peer after S seconds without an answer.",
)
@click.option("--recommend", is_flag=True, help="Only find the fastest iqa-run for this machine.")
@click.option(
    "--quantised",
    multiple=True,
    type=_PATH,
    metavar="DIR",
    help="For --recommend: an 8-bit form of the engine (repeatable).",
)
@click.option("--json", "json_file", type=_PATH, metavar="FILE", help="Write all results, with the raw samples.")
@click.option("--html", "html_file", type=_PATH, metavar="FILE", help="Write the report as a page with plots.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
def bench(engine: Path, images: tuple[str, ...], **given: Any) -> None:
    """Measure how fast this machine scores images, and how fast it could by other means.

    On a GPU it also shows where the time goes: transfers, launches, every stage and step, idle time, energy, clocks and
    what limits them.

    IMAGES are files, folders or glob patterns. Without any, the command makes pictures from the seed. An option with
    commas takes several values, and every combination is a case. All cases take turns. A verdict says whether you can
    trust the figures.

    \b
    Examples:
      iqa-bench --engine engine/
      iqa-bench --engine engine/ --size 224x224,384x320 --crops 1,9 --json bench.json --html bench.html
      iqa-bench --engine engine/ --peers --ckpt model.safetensors photos/
      iqa-bench --engine engine/ --backend tensorrt --batch 1,8 --json bench.json
      iqa-bench --engine engine/ --recommend --quantised engine-int8/

    Exit codes: 0 measured; 1 measured, but the figures are not stable, an image could not be read, or a peer failed or
    disagrees (a peer that is not installed is skipped); 2 nothing could be measured; 130 interrupted: the report holds
    what was measured until then.
    """
    from ..runtime.backends import Backend, from_options
    from . import results as results_module
    from .api import bench as measure
    from .page import to_page
    from .report import to_markdown
    from .verdict import judge_results

    say = partial(_say, quiet=given["quiet"])
    if given["recommend"] or given["quantised"]:
        _recommend(engine, images, given, say)
        return
    for file in (given["json_file"], given["html_file"]):
        if file:
            check_folder_of(file)
    taken = ("device", "no_cuda_graph", "threads", "spin", "cpu_precision")
    backend = from_options(given["backend"], **{name: given[name] for name in taken})
    assert isinstance(backend, Backend)  # noqa: S101 — there is no auto here: what is measured was asked for

    def keep(results: "Results") -> None:
        if given["json_file"]:
            results_module.write(results, given["json_file"])
        if given["html_file"]:
            to_page(results, given["html_file"])
        click.echo(to_markdown(results), nl=False)

    results = measure(
        engine,
        images,
        backend,
        sizes=given["sizes"] or (),
        crops=given["crops"] or (),
        steps=given["steps"] or (),
        fast=given["fast"],
        batches=given["batch"],
        peers=given["chosen"] or given["peers"],
        keep=keep,
        say=say,
        **{
            name: given[name]
            for name in ("count", "workers", "rounds", "starts", "soak", "seed", "ckpt", "peer_timeout")
        },
    )
    failed = any(peer.problem and not peer.skipped for peer in results.peers)
    if failed or results.left_out or judge_results(results).problems:
        sys.exit(1)


def _say(text: str, *, quiet: bool) -> None:
    if not quiet:
        click.echo(f"{text} …", err=True)


def _recommend(engine: Path, images: tuple[str, ...], given: dict[str, Any], say: Callable[[str], None]) -> None:
    """Print what was tried, then the line of the best."""
    from .recommend import recommend

    if not given["recommend"]:
        raise UsageError("--quantised is for --recommend")
    refuse_given(_OF_RECOMMEND, "--recommend chooses by itself: leave out {}", all_but=True)
    found = recommend(engine, images, quantised=given["quantised"], seed=given["seed"], say=say)
    rows = ["| speed | middle half | s per image | change of score | |", "|--:|--:|--:|--:|---|"]
    for t in found.trials:
        if t.seconds is None or t.speed is None or t.spread is None:
            rows.append(f"| | | | | `{t.way.line}`: {t.problem} |")
            continue
        drift = "not measured" if t.drift is None else f"{t.drift:.5f}"
        rows.append(
            f"| {t.speed:.2f}× | {t.spread[0]:.2f}–{t.spread[1]:.2f} | {t.seconds:.2f} | {drift} | `{t.way.line}` |"
        )
    click.echo("\n".join(rows))
    click.echo(
        f"\nThe first is the reference, in {found.steps} of {found.all_steps} steps. Another seed changes its scores "
        f"by {found.allowed:.5f}: what changes them more is not recommended.\n\n{found.best.way.line}"
    )
