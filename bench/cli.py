"""`iqa-bench`: options in, one benchmark, a Markdown report out."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..command import Command
from ..engine.atomic import check_folder_of

if TYPE_CHECKING:
    from .results import Results

_PATH = click.Path(path_type=Path)


class BenchCommand(Command):
    """Interrupted benchmarks end with 130: unlike a failed start, they have left figures."""

    interrupt_exit_code = 130


class Sizes(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """`WIDTHxHEIGHT`, several with commas between, as (height, width) pairs."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse a text."""
        sizes = []
        for part in value.split(",") if isinstance(value, str) else ():
            width, cross, height = part.strip().partition("x")
            if not (cross and width.isdecimal() and height.isdecimal() and min(int(width), int(height)) >= 16):
                self.fail(f"{part!r} is not WIDTHxHEIGHT, such as 224x224", param, ctx)
            sizes.append((int(height), int(width)))
        return tuple(dict.fromkeys(sizes))


class Counts(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Whole numbers from 1 on, with commas between."""

    name = "counts"

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse a text."""
        if not isinstance(value, str):
            return value
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isdecimal() and 1 <= int(part) <= self._maximum for part in parts):
            self.fail(f"{value!r} is not whole numbers from 1 to {self._maximum} with commas between", param, ctx)
        return tuple(dict.fromkeys(map(int, parts)))


@click.command(cls=BenchCommand)
@click.option("--engine", type=_PATH, required=True, metavar="DIR", help="The engine directory, from iqa-export.")
@click.argument("images", nargs=-1)
@click.option("--size", "sizes", type=Sizes(), metavar="WxH[,…]", help="Of generated images. Default: 224x224.")
@click.option("--count", type=click.IntRange(1, 1000), metavar="N", help="Generated images of each size. Default: 2.")
@click.option("--crops", type=Counts(10_000), metavar="N[,…]", help="Crops per image. Default: the engine's.")
@click.option("--steps", type=Counts(4000), metavar="N[,…]", help="Sampling steps. Default: the engine's.")
@click.option("--workers", type=Counts(64), default="1", show_default=True, metavar="N[,…]", help="Images at a time.")
@click.option(
    "--batch", type=Counts(1024), default="1", show_default=True, metavar="N[,…]", help="On a GPU: images per batch."
)
@click.option("--rounds", type=click.IntRange(1, 100_000), default=10, show_default=True, help="Samples of each case.")
@click.option(
    "--starts", type=click.IntRange(0, 100), default=3, show_default=True, help="Fresh processes for the start-up."
)
@click.option("--soak", type=click.IntRange(0), default=0, metavar="N", help="Then score N images in a row.")
@click.option("--seed", type=click.IntRange(0, 2**63), default=0, show_default=True, help="Of images and noise.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="Default: the CPUs this process may use.")
@click.option(
    "--backend",
    type=click.Choice(["tensorrt", "onnxruntime-gpu", "onnxruntime", "openvino"]),
    default="onnxruntime",
    show_default=True,
    help="What runs the networks. The first two need a GPU.",
)
@click.option("--device", type=click.IntRange(0), metavar="N", help="GPU, counted from 0.")
@click.option("--no-cuda-graph", is_flag=True, help="Launch every kernel by itself, as iqa-run can.")
@click.option("--spin", is_flag=True, help="Let ONNX Runtime's idle threads on the CPU wait busily, as iqa-run can.")
@click.option("--cpu-precision", type=click.Choice(["fp32", "bf16"]), help="Of OpenVINO's U-Net. Default: fp32.")
@click.option("--peers", is_flag=True, help="Measure all peers too: ONNX Runtime's defaults, OpenVINO, PyTorch, …")
@click.option("--peer", "chosen", multiple=True, metavar="NAME", help="Only this peer (repeatable).")
@click.option("--ckpt", type=_PATH, metavar="FILE", help="The weights the engine was exported from, for PyTorch.")
@click.option(
    "--peer-timeout",
    type=click.FloatRange(1),
    default=900,
    show_default=True,
    metavar="S",
    help="Give a peer up that has not answered for so many seconds.",
)
@click.option("--json", "json_file", type=_PATH, metavar="FILE", help="Write everything, raw samples included.")
@click.option("--html", "html_file", type=_PATH, metavar="FILE", help="Write the report as a page with plots.")
@click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
def bench(engine: Path, images: tuple[str, ...], **given: Any) -> None:
    """Measure how fast this machine scores images, and how fast it could by other means.

    On a GPU also what it does when: transfers, launches, every stage and step, idle time, energy, clocks and limits.

    IMAGES are files, folders or glob patterns; without any, seeded pictures are made. Options with commas are swept:
    every combination is a case. All cases take turns, and a verdict says whether the figures can be trusted.

    \b
    Examples:
      iqa-bench --engine engine/
      iqa-bench --engine engine/ --size 224x224,384x320 --crops 1,9 --json bench.json --html bench.html
      iqa-bench --engine engine/ --peers --ckpt model.safetensors photos/
      iqa-bench --engine engine/ --backend tensorrt --batch 1,8 --json bench.json

    Exit codes: 0 measured, 1 measured, but not stable, an image could not be read, or a peer failed or disagrees (one
    that is not installed is skipped), 2 nothing could be measured, 130 interrupted (what was measured is written).
    """
    from ..runtime.backends import Backend, from_options
    from . import results as results_module
    from .api import bench as measure
    from .page import to_page
    from .report import to_markdown
    from .verdict import judge_results

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
        batches=given["batch"],
        peers=given["chosen"] or given["peers"],
        keep=keep,
        say=lambda text: None if given["quiet"] else click.echo(f"{text} …", err=True),
        **{
            name: given[name]
            for name in ("count", "workers", "rounds", "starts", "soak", "seed", "ckpt", "peer_timeout")
        },
    )
    failed = any(peer.problem and not peer.skipped for peer in results.peers)
    if failed or results.left_out or judge_results(results).problems:
        sys.exit(1)
