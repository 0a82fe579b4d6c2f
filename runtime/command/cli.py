"""`iqa-run`: options in, one library call, an exit code out."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...command import Command
from ...errors import UsageError

if TYPE_CHECKING:
    from ..backends import Backend
    from ..results import Options

_PATH = click.Path(path_type=Path)


class RunCommand(Command):
    """A run that is interrupted ends with 130: unlike a failed start, it has left results."""

    interrupt_exit_code = 130

    def invoke(self, ctx: click.Context) -> Any:
        """Run; end quietly, as programs do, when the reader of the results has gone (`| head`)."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            ctx.exit(128 + 13)


def provider(text: str) -> str | tuple[str, dict[str, str]]:
    """Parse `NAME` or `NAME,key=value,…` into ONNX Runtime's form."""
    name, *pairs = text.split(",")
    if not name or any("=" not in pair for pair in pairs):
        raise ValueError(text)
    return (name, dict(pair.split("=", 1) for pair in pairs)) if pairs else name


@click.command(cls=RunCommand, context_settings={"show_default": True})
@click.option("--engine", type=_PATH, required=True, metavar="DIR", help="The engine directory, from iqa-export.")
@click.argument("images", nargs=-1, required=True)
@click.option("-o", "--output", "file", type=_PATH, metavar="FILE", help="Write the results here, not to stdout.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "jsonl", "json", "csv"]),
    help="Default: what FILE's name says; without FILE, a table on a terminal and jsonl in a pipe.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the run that FILE is from. A picture keeps its score while its pixels are the same; a picture that "
    "changed or failed is scored again.",
)
@click.option("--force", is_flag=True, help="Start over if FILE holds results.")
@click.option(
    "--sort", type=click.Choice(["score", "name", "vcg", "vda", "spread", "time"]), help="Default: the order of IMAGES."
)
@click.option("--descending", is_flag=True, help="Sort from high to low.")
@click.option(
    "--scale",
    type=click.Choice(["raw", "percentile", "mos"]),
    default="raw",
    help="What the table and the report show first: the score as it is, its percentile among the images that the "
    "engine names, or people's opinion of 1 to 5 that it stands for. Records have all.",
)
@click.option("--top", type=click.IntRange(1), metavar="N", help="Show only the N best.")
@click.option("--bottom", type=click.IntRange(1), metavar="N", help="Show only the N worst.")
@click.option(
    "--crops", type=click.IntRange(1, 10_000), metavar="N", help="Crops in each image. Default: the engine's."
)
@click.option(
    "--seed", type=click.IntRange(0, 2**64 - 1), default=0, metavar="N", help="Seed of the noise, and of random crops."
)
@click.option(
    "--seeds",
    type=click.IntRange(1, 1000),
    default=1,
    metavar="N",
    help="Average the scores of N seeds; shows their spread.",
)
@click.option(
    "--mode",
    type=click.Choice(["whole", "tile", "crop"]),
    default="whole",
    help="Restore each image whole, in overlapping tiles, or crop by crop.",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    metavar="N",
    help="Restore in N of the engine's steps: sooner, with other scores.",
)
@click.option(
    "--sampler",
    metavar="NAME",
    help="How a step is made: ancestral (the default, as in training), ddim, or ddim:ETA with a share of its noise. "
    "With image+ before it, the steps start from the image, not from noise.",
)
@click.option(
    "--fast", is_flag=True, help="Take the steps, and correct the score, as iqa-calibrate --steps found best."
)
@click.option(
    "--pixel-budget",
    type=click.IntRange(65536),
    metavar="N",
    help="Restore images of more than N pixels in tiles. Default: 524288, which is 724×724.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(0),
    metavar="N",
    help="Refuse images of more than N pixels; 0 refuses none. Default: 89478485, Pillow's guard against decompression "
    "bombs.",
)
@click.option("--report", type=_PATH, metavar="FILE", help="Write an HTML page that shows what the model saw.")
@click.option(
    "--save-intermediates", "intermediates", type=_PATH, metavar="DIR", help="Write its pictures as PNG files."
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "inductor-gpu", "onnxruntime-gpu", "onnxruntime", "openvino", "inductor"]),
    default="auto",
    help="What runs the networks. auto takes the first that works here: on a GPU TensorRT, then PyTorch's compiler, if "
    "iqa-build has made a build that fits, then ONNX Runtime; else ONNX Runtime on the CPU. It never takes openvino or "
    "inductor: installing a package must not change a score.",
)
@click.option(
    "--cpu-precision",
    type=click.Choice(["fp32", "bf16"]),
    help="Numbers that OpenVINO computes the U-Net in. bf16 changes scores and needs a CPU that has it. Default: fp32.",
)
@click.option("--device", type=click.IntRange(0), metavar="N", help="Number of the GPU, counted from 0.")
@click.option(
    "--no-cuda-graph", is_flag=True, help="Launch every kernel by itself: the same scores, but more CPU time."
)
@click.option(
    "--batch",
    type=click.IntRange(1, 1024),
    default=1,
    metavar="N",
    help="On a GPU, restore N images of one size, or N seeds of one image, at a time. A half-full batch costs as much "
    "as a full one. Scores depend on N in their last bits, but never on what shares a batch.",
)
@click.option(
    "--threads",
    type=click.IntRange(1),
    metavar="N",
    help="CPU threads. Default: one for each CPU this process may use.",
)
@click.option(
    "--spin",
    is_flag=True,
    help="Let idle threads of ONNX Runtime wait busily. Scores stay the same. They come sooner if nothing else runs on "
    "this CPU, and later if something does.",
)
@click.option("--workers", type=click.IntRange(1, 64), default=1, metavar="N", help="Score N images at a time.")
@click.option(
    "--provider",
    "providers",
    type=provider,
    metavar="NAME[,KEY=VALUE…]",
    multiple=True,
    help="Execution provider of ONNX Runtime, with its options. Repeat it for several, the best one first.",
)
@click.option(
    "--no-self-test",
    is_flag=True,
    help="Do not test the engine first. It is tested once on each machine, with each build and version of a library.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print no progress and no summary.")
def run(engine: Path, images: tuple[str, ...], **given: Any) -> None:
    """Score images: higher is better.

    IMAGES are files, folders (all images in them), glob patterns, or - for a list on standard input with one
    name per line. The same pixels, engine and seed give the same score, whatever else is scored in the same run.

    \b
    Examples:
      iqa-run --engine engine/ photos/
      iqa-run --engine engine/ photos/*.jpg -o scores.csv --report report.html
      find . -name '*.png' | iqa-run --engine engine/ - -o scores.jsonl --resume

    Exit codes: 0 all images were scored, 1 some failed (their records say why), 2 nothing could be scored, 130
    interrupted (finished scores are kept, and --resume continues).
    """
    from ..results import Scale
    from ..selftest import load_tested
    from .api import Outputs, find_names
    from .display import run_shown
    from .order import Sort
    from .records import Format

    options, backend, max_pixels = how_to_score(given)
    outputs = Outputs(
        form=Format(given["form"]) if given["form"] else None,
        sort=Sort(given["sort"]) if given["sort"] else None,
        scale=Scale(given["scale"]),
        **{name: given[name] for name in ("file", "resume", "force", "descending", "report", "intermediates")},
    )
    if outputs.file and (given["top"] or given["bottom"]):
        raise UsageError("--top and --bottom select what is shown; a file (-o) always gets every record")
    names = find_names(expand_stdin(images))
    outputs.refuse_collisions(names)
    # A person at a terminal reads what runs before the work starts. A log gets it beside the summary, because neither
    # is written if the reader of the results goes away.
    watched = sys.stderr.isatty()

    def say(text: str) -> None:
        if watched and not given["quiet"]:
            click.echo(text, err=True)

    wanted = not given["no_self_test"]
    with load_tested(engine, backend, max_pixels=max_pixels, wanted=wanted, say=say) as scorer:
        reason = f" ({scorer.info.reason})" if scorer.info.reason else ""
        says = f"backend: {scorer.info.backend}{reason}"
        if watched and not given["quiet"]:
            click.echo(says, err=True)
        shown = {name: given[name] for name in ("workers", "quiet", "top", "bottom")}
        done = run_shown(scorer, names, options, outputs, **shown)
        if not watched and not given["quiet"]:
            click.echo(says, err=True)
    if done.failed:
        sys.exit(1)


def backend_of(given: Mapping[str, Any]) -> "Backend | tuple[Backend, ...]":
    """Return the backend that a command line asks for, or those of which the first that works is taken."""
    from ..backends import from_options

    taken = ("device", "batch", "no_cuda_graph", "threads", "providers", "spin", "cpu_precision")
    return from_options(given["backend"], **{name: given[name] for name in taken})


def how_to_score(given: Mapping[str, Any]) -> "tuple[Options, Backend | tuple[Backend, ...], int | None]":
    """Return the options, the backend and the largest size of images that a command line asks for."""
    from ..images import DEFAULT_MAX_PIXELS
    from ..results import PIXEL_BUDGET, Mode, Options

    same = {name: given[name] for name in ("crops", "seed", "seeds", "steps", "sampler", "fast")}
    options = Options(**same, mode=Mode(given["mode"]), pixel_budget=given["pixel_budget"] or PIXEL_BUDGET)
    backend = backend_of(given)
    return options, backend, DEFAULT_MAX_PIXELS if given["max_pixels"] is None else given["max_pixels"] or None


def expand_stdin(names: Iterable[str]) -> Iterator[str]:
    """Replace `-` by the lines of standard input; undecodable names survive as surrogates. Raises UsageError."""
    for name in names:
        if name != "-":
            yield name
            continue
        for line in sys.stdin.buffer:
            if b"\0" in line:
                raise UsageError(
                    "names on standard input need a line each; these end in null bytes: leave out find's -print0"
                )
            if line.strip():
                yield os.fsdecode(line.rstrip(b"\r\n"))
