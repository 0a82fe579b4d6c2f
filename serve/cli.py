"""`iqa-serve`: options in, one library call, an exit code out."""

import logging
from pathlib import Path
from typing import Any

import click

from ..command import Command, refuse_given
from ..errors import UsageError
from ..runtime.command.cli import backend_of, provider

_WHOLE = click.IntRange(1)


@click.command(cls=Command, context_settings={"show_default": True})
@click.option(
    "--engine",
    "engines",
    multiple=True,
    required=True,
    metavar="[NAME=]DIR",
    help="An engine directory, from iqa-export (repeatable). NAME is what requests call it; by default the name of its "
    "model. The first engine scores where a request names none.",
)
@click.option("--host", default="127.0.0.1", help="Address to listen at. Others than this machine need 0.0.0.0 or ::.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, help="Port to listen at; 0 takes a free one.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Answer only requests with one of the tokens in this file, one on each line.",
)
@click.option("--workers", type=click.IntRange(1, 64), default=1, metavar="N", help="Score N images at a time.")
@click.option("--max-bytes", type=_WHOLE, default=32 * 2**20, metavar="N", help="Bytes of a request, at most.")
@click.option("--max-pixels", type=_WHOLE, default=24_000_000, metavar="N", help="Pixels of an image, at most.")
@click.option("--max-images", type=_WHOLE, default=32, metavar="N", help="Images in a request, at most.")
@click.option("--queue", type=_WHOLE, default=64, metavar="N", help="Images that wait or are being scored, at most.")
@click.option(
    "--per-client", type=_WHOLE, metavar="N", help="Of those, at most N of one token, or else of one address."
)
@click.option(
    "--seconds", type=click.FloatRange(0, min_open=True), default=60.0, metavar="S", help="Time for one request."
)
@click.option(
    "--drain",
    type=click.FloatRange(0),
    default=30.0,
    metavar="S",
    help="Told to end, go on for S seconds to answer what was accepted.",
)
@click.option(
    "--pixel-budget",
    type=click.IntRange(65536),
    default=2**19,
    metavar="N",
    help="Restore images of more than N pixels in tiles.",
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "tensorrt", "inductor-gpu", "onnxruntime-gpu", "onnxruntime", "openvino", "inductor"]),
    default="auto",
    help="What runs the networks, as for iqa-run.",
)
@click.option("--cpu-precision", type=click.Choice(["fp32", "bf16"]), help="Numbers that OpenVINO computes in.")
@click.option("--device", type=click.IntRange(0), metavar="N", help="Number of the GPU, counted from 0.")
@click.option("--no-cuda-graph", is_flag=True, help="Launch every kernel by itself.")
@click.option(
    "--batch",
    type=click.IntRange(1, 1024),
    default=1,
    metavar="N",
    help="On a GPU, restore N images of one size at a time: an image waits up to 5 ms for others. Scores depend on N "
    "in their last bits, but never on what shares a batch.",
)
@click.option("--threads", type=_WHOLE, metavar="N", help="CPU threads. Default: one for each CPU.")
@click.option("--spin", is_flag=True, help="Let idle threads of ONNX Runtime wait busily.")
@click.option(
    "--provider",
    "providers",
    type=provider,
    metavar="NAME[,KEY=VALUE…]",
    multiple=True,
    help="Execution provider of ONNX Runtime, with its options.",
)
@click.option(
    "--triton",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Serve nothing: write the engines to DIR as models for a Triton server. Not tried in one.",
)
@click.option("-q", "--quiet", is_flag=True, help="Write no access log.")
def serve(engines: tuple[str, ...], **given: Any) -> None:
    """Answer with scores over HTTP: the records of iqa-run, the same bits.

    POST /score takes an image as body, or several as a form. The Open Inference Protocol is under /v2, a description of
    everything at /openapi.json, counters for Prometheus at /metrics, and a page for people at /.

    \b
    Examples:
      iqa-serve --engine engine/
      iqa-serve --engine full=engine/ --engine small=engine-int8/ --port 8080 --token-file tokens.txt
      iqa-serve --engine engine/ --triton models/
      curl --data-binary @photo.jpg 'http://127.0.0.1:8000/score?crops=4'

    Exit codes: 0 it was told to end, and answered what it had accepted; 2 it could not start.
    """
    if given["triton"]:
        from .triton import write_model

        refuse_given({"engines", "triton", "quiet"}, "--triton serves nothing: leave out {}", all_but=True)
        for name, path in _named(engines).items():
            click.echo(write_model(path, given["triton"], name))
        return

    from .api import serve as run
    from .limits import Limits

    logging.basicConfig(format="%(message)s", level=logging.WARNING)  # to standard error
    logging.getLogger("diffiqa.access").setLevel(logging.WARNING if given["quiet"] else logging.INFO)
    same = {name: given[name] for name in ("queue", "per_client", "seconds", "drain", "pixel_budget")}
    limits = Limits(given["max_bytes"], given["max_pixels"], given["max_images"], **same)
    run(
        _named(engines),
        backend=backend_of(given),
        host=given["host"],
        port=given["port"],
        workers=given["workers"],
        limits=limits,
        token_file=given["token_file"],
        say=lambda text: click.echo(text, err=True),
    )


def _named(engines: tuple[str, ...]) -> dict[str, Path]:
    """Return the folders by name; a folder without a name is the only one, or takes its model's."""
    found: dict[str, Path] = {}
    for text in engines:
        name, equals, path = text.partition("=")
        if not equals or Path(text).is_dir():
            name, path = "", text
        if name in found:
            raise UsageError("several engines need names: --engine one=DIR --engine two=DIR")
        found[name] = Path(path)
    return found
